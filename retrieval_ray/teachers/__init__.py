"""Teachers: raw scores of (query, passage) pairs, each a pure function of the two texts.

Every kind is a class whose ``score(queries, passages)`` takes texts of equal number and gives float32
scores in their order, neither squashed nor relative to a list. What a model cannot judge is found by
``pairs.judge``. Two teachers that need no model of their own, ``bm25`` and ``dense``, are looked up in the
score stage.
"""

from typing import Any

from retrieval_ray.teachers.cross_encoder import CrossEncoder
from retrieval_ray.teachers.late import Late
from retrieval_ray.teachers.seq2seq import Seq2Seq
from retrieval_ray.teachers.yes_no import YesNo

KINDS: dict[str, Any] = {
    "cross_encoder": CrossEncoder,
    "late": Late,
    "seq2seq": Seq2Seq,
    "yes_no": YesNo,
}
