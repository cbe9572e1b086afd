"""What was once asked of a model about a passage, kept: teachers' scores and an LLM's replies.

Keyed by the content of the question (who is asked, and the texts), shared by all runs of a store. A part
of work commits one immutable file, named by what it holds, so concurrent writers cannot harm each other
and a part is in the cache whole or not at all. Files lie in folders ``n/b``: what concerns passages whose
text falls in bucket ``b`` of ``n``, so no folder of all parts is ever listed to read one. Because bucket
``b`` of ``n`` is the union of buckets ``b`` and ``b + n`` of ``2n``, corpora cut into different numbers
of parts share it.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from retrieval_ray.artifacts import Location, digest

SCORE = pa.float32()
REPLY = pa.struct(
    [("text", pa.string()), ("tokens_in", pa.int64()), ("tokens_out", pa.int64()), ("cut", pa.bool_())]
)


class ContentCache:
    """The answers of one model. ``identity`` holds everything that decides an answer beside the texts.

    folder: of all models that answer with this kind of value. value: the Arrow type of an answer.
    """

    def __init__(self, folder: Location, identity: str, value: pa.DataType) -> None:
        self.folder = folder / digest(identity)[:16]
        self._identity, self._value = identity.encode(), value

    def key(self, question: str, passage: str) -> bytes:
        """16 bytes that stand for (identity, question, passage text)."""
        state = hashlib.blake2b(digest_size=16)
        for piece in (self._identity, question.encode(), passage.encode()):
            state.update(len(piece).to_bytes(8, "big") + piece)
        return state.digest()

    def read(self, bucket: int, buckets: int) -> dict[bytes, Any]:
        """Every answer known for passages of bucket ``bucket`` of ``buckets``."""
        known: dict[bytes, Any] = {}
        for count in map(int, self.folder.names()):
            first = bucket % min(count, buckets)
            for at in range(first, count, min(count, buckets)):
                for part in (self.folder / f"{count}/{at}").names():
                    if part.endswith(".parquet"):
                        table = (self.folder / f"{count}/{at}/{part}").read_table()
                        keys, values = (table.column(c).to_pylist() for c in ("key", "value"))
                        known.update(zip(keys, values, strict=True))
        return known

    def write(self, bucket: int, buckets: int, keys: Sequence[bytes], values: Sequence[Any]) -> None:
        """Commit one part's new answers."""
        if not keys:
            return
        table = pa.table({"key": pa.array(keys, pa.binary(16)), "value": pa.array(values, self._value)})
        name = hashlib.sha256(b"".join(sorted(keys))).hexdigest()[:16]
        (self.folder / f"{buckets}/{bucket}/{name}.parquet").write_table(table)
