"""Cross-encoders: a sequence classifier with one output reads query and passage together."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from retrieval_ray.batching import Indices
from retrieval_ray.errors import UserError
from retrieval_ray.model_code import Source
from retrieval_ray.teachers.first_token import read_first_token_alone
from retrieval_ray.teachers.loading import KEY, load_model, load_tokenizer, longest_input, padding_id
from retrieval_ray.teachers.pairs import Scores, in_chunks, inference, padded, shortened


class CrossEncoder:
    """Raw logits of a sequence classifier (ms-marco MiniLM, bge-reranker, gte, mxbai ...), no activation.

    model: what ``model_files.resolve_model`` takes. max_tokens: of a pair; of what is too long the longer
    text is cut first, which leaves a query whole that takes less than half of the room. precision: of the
    matrix products; weights stay float32. Raises ``UserError`` for a model that cannot be loaded and for
    another number of outputs.
    """

    def __init__(
        self,
        model: Source,
        *,
        max_tokens: int,
        precision: str = "float32",
        token_budget: int = 16_384,
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        self.model, self.device = load_model(
            "AutoModelForSequenceClassification", model, device=device, trust_remote_code=trust_remote_code
        )
        if self.model.config.num_labels != 1:
            raise UserError(
                f"{KEY}: '{model}' has {self.model.config.num_labels} outputs; a teacher needs one"
            )
        self.first_token_alone = read_first_token_alone(self.model)
        self.precision, self.token_budget = precision, token_budget
        self.max_tokens = longest_input(self.tokenizer, self.model, max_tokens)
        self.padding = padding_id(self.tokenizer, self.model)
        self.model.config.pad_token_id = self.padding  # a decoder reads its score before the padding

    def score(self, queries: Sequence[str], passages: Sequence[str]) -> Scores:
        """Raw logits of the pairs, in their order."""
        if not queries:
            return np.zeros(0, dtype=np.float32)
        tokens = self.tokenizer(
            [shortened(self.tokenizer, text, self.max_tokens) for text in queries],
            [shortened(self.tokenizer, text, self.max_tokens) for text in passages],
            truncation="longest_first",
            max_length=self.max_tokens,
            return_attention_mask=False,
        )
        rows: list[list[int]] = tokens["input_ids"]
        types: list[list[int]] | None = tokens.get("token_type_ids")

        def forward(chunk: Indices) -> Tensor:
            ids_NL, mask_NL = padded([rows[i] for i in chunk], self.padding, self.device)
            inputs = {"input_ids": ids_NL, "attention_mask": mask_NL}
            if types is not None:
                inputs["token_type_ids"], _ = padded([types[i] for i in chunk], 0, self.device)
            logits: Tensor = self.model(**inputs).logits
            return logits[:, 0]

        with inference(self.device, self.precision):
            return in_chunks([len(row) for row in rows], forward, token_budget=self.token_budget)
