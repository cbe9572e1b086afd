"""Teachers: raw scores of (query, passage) pairs. Each is a pure function of the two texts.

The embedded default needs no download: ``late`` (token embeddings of the student, below),
``bm25`` (bm25.py) and ``dense`` (the student's own cosine), weighted in groups.py. A cross-encoder
replaces it.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retrieval_ray.errors import UserError
from retrieval_ray.model_files import resolve_model


def late_interaction(queries_TD: Sequence[Tensor], passage_TD: Tensor) -> list[float]:
    """Scores of one passage for several queries: mean over query tokens of the best passage token.

    s(q, p) = 1/|q| sum_i max_j cos(q_i, p_j)   (ColBERT's MaxSim, arXiv 2004.12832, as a mean)

    Vectors are normalised. A query or passage without tokens scores 0.
    """
    lengths = [len(query) for query in queries_TD]
    if len(passage_TD) == 0 or not sum(lengths):
        return [0.0] * len(lengths)
    best = (torch.cat([q for q in queries_TD if len(q)]) @ passage_TD.T).amax(dim=1)
    pieces = torch.split(best, [n for n in lengths if n])
    scores = iter(float(piece.mean()) for piece in pieces)
    return [next(scores) if n else 0.0 for n in lengths]


class CrossEncoderTeacher:
    """A sentence-transformers CrossEncoder with one output: its raw logit, no activation.

    model: what ``model_files.resolve_model`` takes. Raises ``UserError`` for one that cannot be loaded
    and for another number of outputs.
    """

    def __init__(
        self,
        model: str,
        *,
        max_tokens: int,
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        from sentence_transformers import CrossEncoder

        path = resolve_model(model, "teacher.model")
        try:
            self.model = CrossEncoder(
                path,
                device=device,
                trust_remote_code=trust_remote_code,
                model_kwargs={"use_safetensors": True, "dtype": torch.float32},
                local_files_only=True,
            )
        except Exception as error:  # a broken folder makes the libraries raise anything at all
            raise UserError(
                f"teacher.model: cannot load '{path}': {type(error).__name__}: {error}"
            ) from error
        if self.model.num_labels != 1:
            raise UserError(
                f"teacher.model: '{path}' has {self.model.num_labels} outputs; a teacher needs one"
            )
        own = self.model.max_seq_length
        self.model.max_seq_length = min(max_tokens, own) if own else max_tokens

    def score(self, pairs: Sequence[tuple[str, str]], *, batch_size: int = 32) -> npt.NDArray[np.float32]:
        """Raw logits of (query, passage) pairs, in their order."""
        scores = self.model.predict(
            list(pairs),
            batch_size=batch_size,
            activation_fn=torch.nn.Identity(),
            show_progress_bar=False,
        )
        return np.asarray(scores, dtype=np.float32).reshape(-1)
