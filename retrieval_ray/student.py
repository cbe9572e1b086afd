"""The bi-encoder: a SentenceTransformer, with its own tokens, prompts and pooling respected.

Encoders (BERT, ModernBERT, XLM-R) and decoders (Qwen3-Embedding: last token, instructions) alike.
Batches are sorted by length and cut by tokens; embeddings are L2-normalised (the method works on
cosines), and a model without a Normalize module gets one when it is saved.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retrieval_ray.batching import cut_chunks
from retrieval_ray.errors import UserError
from retrieval_ray.memory import give_back_seldom, keep_freed
from retrieval_ray.model_code import Source
from retrieval_ray.model_files import load_model, resolve_model, save_model
from retrieval_ray.moe import casts_kept
from retrieval_ray.tokens import Tokens, count_read

Role = Literal["query", "passage"]
TOKEN_VECTORS = 3  # version of ``token_vectors``, for the ids of scores that are made with them
# As tensors all rows would be padded, and the padding taken out again: an eighth of the time of short texts.
_AS_LISTS = {
    "common": {"return_tensors": None},
    "text": {"padding": False, "return_attention_mask": False},
}
_PLAIN_ATTENTION_TOKENS = 512
# What goes backward is padded to a multiple of so many tokens. Each shape costs a CPU some 4 MiB for good
# (oneDNN keeps the kernels it made), and blocks of the same few sizes fit where others were freed.
WIDTH = 8


class Student:
    """Encodes queries and passages; ``embed`` keeps the graph, ``encode`` does not.

    model: what ``resolve_model`` takes. precision: float32, bfloat16 or float16 (while it computes; weights
    stay float32, and so does training where it is float16). Raises ``UserError`` for a model that cannot be
    loaded and for one whose first module is not a text transformer.
    """

    def __init__(
        self,
        model: Source,
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

        path = resolve_model(model, "student.model", trust_remote_code=trust_remote_code)
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
        _give_pad_token(self.model.tokenizer)
        positions = _positions(self.model[0].auto_model)
        if (self.model.max_seq_length or 0) > positions:
            self.model.max_seq_length = positions
        limit = int(self.model.max_seq_length or 512)
        self.max_tokens: dict[Role, int] = {
            "query": min(max_query_tokens or limit, limit),
            "passage": min(max_passage_tokens or limit, limit),
        }
        self._as_lists = True
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
                features = self._preprocessed(list(texts[start : start + 256]), self.prompts[role] or None)
                self._prompt_length[role] = features.get("prompt_length")
                ids, mask = features["input_ids"], features.get("attention_mask")
                if mask is None:
                    rows += [np.array(row, dtype=np.int64) for row in ids]
                else:  # of a module that pads all the same
                    kept = mask.numpy().astype(bool)
                    rows += [row[keep] for row, keep in zip(ids.numpy(), kept, strict=True)]
        finally:
            self.model.max_seq_length = before
        if len(rows) != len(texts):  # packed for an attention that takes no padding
            raise UserError(
                "student.model: it packs several texts into one row (flash attention); take it out of the "
                "model's configuration, attention is chosen here"
            )
        return rows

    def _preprocessed(self, texts: list[str], prompt: str | None) -> dict[str, Any]:
        """What the model's first module makes of texts: lists of tokens, where it knows how."""
        if self._as_lists:
            try:
                return dict(self.model.preprocess(texts, prompt=prompt, processing_kwargs=_AS_LISTS))
            except TypeError:  # a module of the model's own
                self._as_lists = False
        return dict(self.model.preprocess(texts, prompt=prompt))

    def embed(self, rows: Sequence[Tokens], role: Role) -> Tensor:
        """One forward pass: embeddings_ND in float32, normalised, with a graph where enabled."""
        with self.autocast():
            vectors = self.model(self._features(rows, role, multiple=WIDTH))["sentence_embedding"]
        return torch.nn.functional.normalize(vectors[:, : self.dimension].float(), dim=-1)

    @torch.inference_mode()
    def encode_tokens(
        self, rows: Sequence[Tokens], role: Role, *, token_budget: int
    ) -> npt.NDArray[np.float32]:
        """Embeddings of already tokenised texts, in their order.

        In half precision the transformer runs on weights that are cast once a call, where autocast would cast
        them in every forward pass; pooling is in float32. On a GPU nothing waits for a chunk's result. Raises
        ``UserError`` where a vector is not finite.
        """
        forward = self.model if self.precision == "float32" else self._half()
        chunks = cut_chunks([len(row) for row in rows], token_budget)
        found_ND = torch.empty((len(rows), self.dimension), device=self.device)  # chunk by chunk
        start = 0
        for chunk in chunks:
            vectors = forward(self._features([rows[i] for i in chunk], role))["sentence_embedding"]
            vectors = torch.nn.functional.normalize(vectors[:, : self.dimension].float(), dim=-1)
            found_ND[start : start + len(chunk)] = vectors
            start += len(chunk)
        if self.device.type == "cpu":
            give_back_seldom()  # and not after each chunk: it is asked for again right away
        vectors_ND = np.empty((len(rows), self.dimension), dtype=np.float32)
        vectors_ND[[row for chunk in chunks for row in chunk]] = found_ND.cpu().numpy()
        if not np.isfinite(vectors_ND).all():
            lower = (
                ""
                if self.precision == "float32"
                else "; its numbers may be too large: compute.precision=float32"
            )
            raise UserError(f"student.model: it gives vectors that are not finite in {self.precision}{lower}")
        return vectors_ND

    def _half(self) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """The model with its transformer in half precision; its own weights stay as they are."""
        first, *rest = self.model
        tensors = {
            name: tensor.to(getattr(torch, self.precision)) if tensor.is_floating_point() else tensor
            for name, tensor in [*first.named_parameters(), *first.named_buffers()]
            # Rotary angles need float32, and tokens go where they go in training
            if not name.endswith(("inv_freq", "router_EI"))
        }

        def forward(features: dict[str, Any]) -> dict[str, Any]:
            features = torch.func.functional_call(first, tensors, (features,))
            features["token_embeddings"] = features["token_embeddings"].float()
            for module in rest:
                features = module(features)
            return features

        return forward

    def encode(self, texts: Sequence[str], role: Role, *, token_budget: int) -> npt.NDArray[np.float32]:
        """Embeddings_ND of texts, in their order; batches are cut by tokens after sorting."""
        return self.encode_tokens(self.tokenize(texts, role), role, token_budget=token_budget)

    @torch.inference_mode()
    def token_vectors(self, texts: Sequence[str], role: Role, *, token_budget: int) -> list[Tensor]:
        """The last layer's normalised vector of each token of each text: a list of (T, D).

        Projected where the model has a projection of tokens, as ColBERT checkpoints do. Special tokens and
        the prompt are left out: they match everything and say nothing. Raises ``UserError`` for a model that
        does something else with its tokens.
        """
        projections = self._projections()
        rows = self.tokenize(texts, role)
        count_read(sum(map(len, rows)))
        special = set(self.model.tokenizer.all_special_ids)
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        for chunk in cut_chunks([len(row) for row in rows], token_budget):
            batch = [rows[i] for i in chunk]
            features = self._features(batch, role)
            mask = features["attention_mask"].bool()
            with self.autocast():
                vectors = self.model[0](features)["token_embeddings"]
                for dense in projections:
                    vectors = dense({dense.module_input_name: vectors})[dense.module_output_name]
            vectors = torch.nn.functional.normalize(vectors.float(), dim=-1)
            for n, i in enumerate(chunk):
                kept = vectors[n][mask[n]]
                useful = [
                    at
                    for at, token in enumerate(rows[i])
                    if int(token) not in special and at >= (self._prompt_length[role] or 0)
                ]
                found[i] = (kept[useful] if useful else kept).cpu()
        return found

    def _projections(self) -> list[Any]:
        """The layers that every token goes through behind the transformer: those before the pooling."""
        from sentence_transformers.base.modules import Dense
        from sentence_transformers.sentence_transformer.modules import Dropout, Normalize, Pooling

        found, pooled = [], False
        for module in list(self.model)[1:]:
            pooled = pooled or isinstance(module, Pooling)
            of_tokens = getattr(module, "module_input_name", "") == "token_embeddings" or not pooled
            if isinstance(module, Dense) and not pooled:
                found.append(module)
            elif of_tokens and not isinstance(module, (Dropout, Normalize)):
                raise UserError(
                    f"student.model: late interaction does not know what {type(module).__name__} does with "
                    "the vectors of tokens; take a model of a transformer, projections (Dense) and a pooling"
                )
        return found

    def prepare_training(self) -> None:
        """Choose a precision that can go backward and the attention that does so fastest; keep freed memory.

        In float16 small gradients would be 0, so what encodes in it trains in float32. The fastest attention
        is, on a CPU in bf16, plain matrix products, whose forward and backward take 0.75 to 0.85 of the
        time of torch's fused kernel; they keep every attention probability, so only for short texts.
        """
        if self.precision == "float16":
            self.precision = "float32"
        if self.device.type == "cpu":
            keep_freed()
        short = max(self.max_tokens.values()) <= _PLAIN_ATTENTION_TOKENS
        if self.device.type == "cpu" and self.precision == "bfloat16" and short:
            self.model[0].auto_model.set_attn_implementation("eager")

    def save(self, folder: str) -> None:
        """Write a folder that plain sentence-transformers loads (safetensors only), see ``save_model``."""
        self.model.prompts = {"query": self.prompts["query"], "document": self.prompts["passage"]}
        default = self.model.default_prompt_name
        default = "document" if default == "passage" else default
        self.model.default_prompt_name = default if default in self.model.prompts else None
        save_model(self.model, folder)

    def _features(self, rows: Sequence[Tokens], role: Role, *, multiple: int = 1) -> dict[str, Any]:
        longest = max(map(len, rows))
        limit = int(self.model.max_seq_length or 512)
        width = max(longest, min(-(-longest // multiple) * multiple, limit))
        ids_NT = np.full((len(rows), width), self.model.tokenizer.pad_token_id, dtype=np.int64)
        mask_NT = np.zeros_like(ids_NT)
        for n, row in enumerate(rows):  # behind the text, also for decoders: it cannot see what comes after
            ids_NT[n, : len(row)], mask_NT[n, : len(row)] = row, 1
        features: dict[str, Any] = {
            "input_ids": torch.from_numpy(ids_NT).to(self.device),
            "attention_mask": torch.from_numpy(mask_NT).to(self.device),
            "modality": "text",
        }
        if self._prompt_length[role] is not None:
            features["prompt_length"] = self._prompt_length[role]
        return features

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """The student's precision. One around several ``embed`` casts each weight once for all of them.

        Not those of a sharded student: each layer's are gathered for its own time, and casts would stay.
        """
        if self.precision == "float32":
            yield
            return
        from torch.distributed.fsdp import FSDPModule  # not above: it takes more than a second to import

        dtype, sharded = getattr(torch, self.precision), isinstance(self.model, FSDPModule)
        kept = contextlib.nullcontext() if sharded else casts_kept(self.model)
        with torch.autocast(self.device.type, dtype, cache_enabled=not sharded), kept:
            yield


def default_token_budget(device: str) -> int:
    """Tokens of one encoding batch: on CPUs what their caches hold, on GPUs what keeps them busy.

    On a CPU 1,024 to 4,096 are equally fast for passages; of short texts a part holds few batches, which are
    then of more even length: with 2,048 they take an eighth less time than with 4,096.
    """
    return 16_384 if device == "cuda" else 2048


def default_chunk_tokens(device: str, experts: int = 0) -> int:
    """Tokens of one chunk that goes forward and backward, through a student with so many experts a layer.

    On a CPU a step is as fast with 2,048 as with 8,192 (matrix products have their full rate) and its graph
    takes a quarter. 512 lists of 20, sorted by length and cut so, have .3 to .8 % of padding, and with widths
    rounded up to ``WIDTH`` .8 to 4.4 % (SciFact, SQuAD, CosQA): attention without padding would save no more.
    Experts want some 1,024 rows each, 8 of them that many: every product lays out its weights anew.
    """
    return 8192 if device == "cuda" else min(8192, max(2048, 1024 * experts))


def _give_pad_token(tokenizer: Any) -> None:
    """Decoders' tokenizers often have none. What pads is masked, so any token that is there will do."""
    if tokenizer.pad_token is None:
        spare = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
        tokenizer.pad_token = spare


def _positions(backbone: torch.nn.Module) -> int:
    """How long a text may be: RoBERTa and XLM-R count positions from behind the padding's id.

    Their config and, where it says more, the tokenizer promise places that are not there.
    """
    for module in backbone.modules():
        table = getattr(module, "position_embeddings", None)
        offset = getattr(module, "padding_idx", None)
        if isinstance(table, torch.nn.Embedding) and isinstance(offset, int):
            return table.num_embeddings - offset - 1
    return 2**31


def probe_precision(device: str | None = None) -> str:
    """float32, bfloat16 or float16, whichever this device multiplies fastest (at least 1.3 times).

    On CPUs bf16 is several times faster with the right instructions and many times slower without,
    so it is measured, on the shapes of a small encoder.
    """
    import time

    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if target.type == "cuda":
        # emulated, as on GPUs before Ampere, it is slower than float32; Volta and Turing are fast in float16
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16"
        return "float16" if torch.cuda.get_device_capability()[0] >= 7 else "float32"
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
