"""Decoder rerankers: a language model is asked whether the passage answers the query, yes or no."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from retrieval_ray.batching import Indices
from retrieval_ray.model_code import Source
from retrieval_ray.teachers.loading import (
    TokenHead,
    difference,
    load_model,
    load_tokenizer,
    longest_input,
    padding_id,
    token_ids,
)
from retrieval_ray.teachers.pairs import Scores, in_chunks, inference, padded
from retrieval_ray.teachers.template import Template

# Qwen3-Reranker's own. bge-reranker-v2-gemma: "A: {query}\nB: {passage}\n" and its question, tokens [Yes].
TEMPLATE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the "
    'Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {passage}<|im_end|>\n<|im_start|>assistant\n"
    "<think>\n\n</think>\n\n"
)
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
TOKENS = ("yes", "no")


def prompts(tokenizer: Any, max_tokens: int, template: str | None, instruction: str | None) -> Template:
    """What either engine is given: token rows that end where the answer begins."""
    return Template(
        tokenizer,
        template or TEMPLATE,
        max_tokens=max_tokens,
        ends_open=True,
        instruction=INSTRUCTION if instruction is None else instruction,
    )


class YesNo:
    """score = logit(yes) - logit(no) at the last position, or the logit of one token alone.

    template, instruction: see ``Template``; tokens: of the answers, one or two. Only the last hidden state
    of a prompt goes through the output layer. Raises ``UserError`` as ``Template`` and ``token_ids`` do,
    and for a model that cannot be loaded.
    """

    def __init__(
        self,
        model: Source,
        *,
        max_tokens: int,
        template: str | None = None,
        instruction: str | None = None,
        tokens: Sequence[str] | None = None,
        precision: str = "float32",
        token_budget: int = 16_384,
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        answers = token_ids(self.tokenizer, tokens or TOKENS)
        self.model, self.device = load_model(
            "AutoModelForCausalLM",
            model,
            device=device,
            trust_remote_code=trust_remote_code,
            dtype=precision,  # a decoder of billions: half the memory, and nothing to cast in every batch
        )
        self.model.set_output_embeddings(TokenHead(self.model.get_output_embeddings(), answers))
        longest = longest_input(self.tokenizer, self.model, max_tokens)
        self.template = prompts(self.tokenizer, longest, template, instruction)
        self.token_budget = token_budget
        self.padding = padding_id(self.tokenizer, self.model)

    def score(self, queries: Sequence[str], passages: Sequence[str]) -> Scores:
        """Raw scores of the pairs, in their order."""
        if not queries:
            return np.zeros(0, dtype=np.float32)
        rows = self.template.rows(queries, passages)

        def forward(chunk: Indices) -> Tensor:
            # On the left, so that all rows end together and one position of each is put through the head.
            ids_NL, mask_NL = padded([rows[i] for i in chunk], self.padding, self.device, left=True)
            logits_N1T = self.model(
                input_ids=ids_NL,
                attention_mask=mask_NL,
                position_ids=(mask_NL.cumsum(dim=1) - 1).clamp(min=0),
                use_cache=False,
                logits_to_keep=1,
            ).logits
            return difference(logits_N1T[:, -1])

        with inference(self.device, "float32"):
            return in_chunks([len(row) for row in rows], forward, token_budget=self.token_budget)
