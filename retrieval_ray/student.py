"""The bi-encoder: a SentenceTransformer, with its own tokens, prompts and pooling respected.

Batches are sorted by length and cut by tokens; embeddings are L2-normalised (the method works on
cosines), and a model without a Normalize module gets one when it is saved.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retrieval_ray.artifacts import Location
from retrieval_ray.batching import cut_chunks
from retrieval_ray.errors import UserError
from retrieval_ray.model_files import load_model, resolve_model, save_model

Role = Literal["query", "passage"]
Tokens = npt.NDArray[np.int64]


class Student:
    """Encodes queries and passages; ``embed`` keeps the graph, ``encode`` does not.

    model: what ``resolve_model`` takes. precision: float32 or bfloat16 (autocast; weights stay
    float32). Raises ``UserError`` for a model that cannot be loaded and for one whose first module is
    not a text transformer.
    """

    def __init__(
        self,
        model: str | Location,
        *,
        precision: str,
        device: str | None = None,
        query_prompt: str | None = None,
        passage_prompt: str | None = None,
        max_query_tokens: int | None = None,
        max_passage_tokens: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        from sentence_transformers.sentence_transformer.modules import Normalize
        from transformers.utils import logging

        logging.disable_progress_bar()  # of loading weights, in every worker

        path = resolve_model(model, "student.model")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.precision = precision
        try:
            self.model = load_model(
                path,
                device=str(self.device),
                trust_remote_code=trust_remote_code,
                model_kwargs={"dtype": torch.float32},
                local_files_only=True,
            )
        except Exception as error:  # a broken folder makes the libraries raise anything at all
            raise UserError(
                f"student.model: cannot load '{path}': {type(error).__name__}: {error}"
            ) from error
        if self.model.tokenizer is None or not hasattr(self.model[0], "auto_model"):
            raise UserError(f"student.model: '{path}' does not begin with a text transformer")
        if not any(isinstance(module, Normalize) for module in self.model):
            self.model.append(Normalize())
        self.model.eval()  # dropout off: both GradCache passes must compute the same function
        own: dict[str, str] = self.model.prompts or {}
        self.prompts: dict[Role, str] = {
            "query": own.get("query", "") if query_prompt is None else query_prompt,
            "passage": (own.get("document") or own.get("passage") or "")
            if passage_prompt is None
            else passage_prompt,
        }
        limit = int(self.model.max_seq_length or 512)
        self.max_tokens: dict[Role, int] = {
            "query": min(max_query_tokens or limit, limit),
            "passage": min(max_passage_tokens or limit, limit),
        }
        self._prompt_length: dict[Role, int | None] = {"query": None, "passage": None}
        for role in self._prompt_length:  # also for rows that were tokenised elsewhere
            self.tokenize([""], role)

    @property
    def dimension(self) -> int:
        return int(self.model.get_embedding_dimension())

    def tokenize(self, texts: Sequence[str], role: Role, *, limit: int | None = None) -> list[Tokens]:
        """Token ids per text, prompt and special tokens included, cut to the role's limit, or lower."""
        rows: list[Tokens] = []
        before = self.model.max_seq_length
        self.model.max_seq_length = min(limit or self.max_tokens[role], self.max_tokens[role])
        try:
            for start in range(0, len(texts), 256):
                features = self.model.preprocess(
                    list(texts[start : start + 256]), prompt=self.prompts[role] or None
                )
                self._prompt_length[role] = features.get("prompt_length")
                ids, mask = features["input_ids"].numpy(), features["attention_mask"].numpy()
                rows += [row[keep.astype(bool)] for row, keep in zip(ids, mask, strict=True)]
        finally:
            self.model.max_seq_length = before
        return rows

    def embed(self, rows: Sequence[Tokens], role: Role) -> Tensor:
        """One forward pass: embeddings_ND in float32, normalised, with a graph where enabled."""
        with self._autocast():
            vectors = self.model(self._features(rows, role))["sentence_embedding"]
        return torch.nn.functional.normalize(vectors[:, : self.dimension].float(), dim=-1)

    @torch.inference_mode()
    def encode_tokens(
        self, rows: Sequence[Tokens], role: Role, *, token_budget: int
    ) -> npt.NDArray[np.float32]:
        """Embeddings of already tokenised texts, in their order."""
        vectors = np.zeros((len(rows), self.dimension), dtype=np.float32)
        for chunk in cut_chunks([len(row) for row in rows], token_budget):
            vectors[chunk] = self.embed([rows[i] for i in chunk], role).cpu().numpy()
        return vectors

    def encode(self, texts: Sequence[str], role: Role, *, token_budget: int) -> npt.NDArray[np.float32]:
        """Embeddings_ND of texts, in their order; batches are cut by tokens after sorting."""
        return self.encode_tokens(self.tokenize(texts, role), role, token_budget=token_budget)

    @torch.inference_mode()
    def token_vectors(self, texts: Sequence[str], role: Role, *, token_budget: int) -> list[Tensor]:
        """The last layer's normalised vector of each token of each text: a list of (T, D).

        Special tokens are left out: they match everything and say nothing.
        """
        rows = self.tokenize(texts, role)
        special = set(self.model.tokenizer.all_special_ids)
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        for chunk in cut_chunks([len(row) for row in rows], token_budget):
            batch = [rows[i] for i in chunk]
            features = self._features(batch, role)
            mask = features["attention_mask"].bool()
            with self._autocast():
                vectors = self.model[0](features)["token_embeddings"]
            vectors = torch.nn.functional.normalize(vectors.float(), dim=-1)
            for n, i in enumerate(chunk):
                kept = vectors[n][mask[n]]
                useful = [at for at, token in enumerate(rows[i]) if int(token) not in special]
                found[i] = (kept[useful] if useful else kept).cpu()
        return found

    def save(self, folder: str) -> None:
        """Write a folder that plain sentence-transformers loads (safetensors only), see ``save_model``."""
        self.model.prompts = {"query": self.prompts["query"], "document": self.prompts["passage"]}
        default = self.model.default_prompt_name
        default = "document" if default == "passage" else default
        self.model.default_prompt_name = default if default in self.model.prompts else None
        save_model(self.model, folder)

    def _features(self, rows: Sequence[Tokens], role: Role) -> dict[str, Any]:
        tokenizer = self.model.tokenizer
        padded = tokenizer.pad(
            {"input_ids": [row.tolist() for row in rows]}, padding=True, return_tensors="pt"
        )
        features: dict[str, Any] = {
            "input_ids": padded["input_ids"].to(self.device),
            "attention_mask": padded["attention_mask"].to(self.device),
            "modality": "text",
        }
        if self._prompt_length[role] is not None:
            features["prompt_length"] = self._prompt_length[role]
        return features

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.precision == "bfloat16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()


def probe_precision(device: str | None = None) -> str:
    """float32 or bfloat16, whichever this device multiplies faster (at least 1.3 times).

    On CPUs bf16 is several times faster with the right instructions and many times slower without,
    so it is measured, on the shapes of a small encoder.
    """
    import time

    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if target.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    layer = torch.nn.Linear(384, 1536)
    inputs = torch.randn(2048, 384)
    seconds: dict[str, float] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # and the thread's own time, so that other work on the machine counts for little
    try:
        for _ in range(8):
            for precision in ("float32", "bfloat16"):
                with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, precision == "bfloat16"):
                    start = time.thread_time()
                    layer(inputs)
                    took = time.thread_time() - start
                seconds[precision] = min(took, seconds.get(precision, took))
    finally:
        torch.set_num_threads(threads)
    return "bfloat16" if seconds["float32"] > 1.3 * seconds["bfloat16"] else "float32"
