"""Sequence-to-sequence rerankers: the logit of one token at the first decoder step."""

from collections.abc import Sequence

import numpy as np
import torch
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

TEMPLATE = "Query: {query} Document: {passage}"  # RankT5; monoT5 has " Relevant:" behind it
TOKENS = ("<extra_id_10>",)


class Seq2Seq:
    """RankT5 and monoT5: an encoder reads the pair, a decoder is asked for its first token.

    tokens: one, whose raw logit is the score (RankT5, arXiv 2210.10634, its code's ``<extra_id_10>``), or
    two, of which the second's logit is taken off the first's (monoT5, arXiv 2003.06713: ``true``, ``false``;
    its probability is the logistic function of that difference, which keeps every order). Raises
    ``UserError`` as ``Template`` and ``token_ids`` do, and for a model that cannot be loaded.
    """

    def __init__(
        self,
        model: Source,
        *,
        max_tokens: int,
        template: str | None = None,
        tokens: Sequence[str] | None = None,
        precision: str = "float32",
        token_budget: int = 16_384,
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        answers = token_ids(self.tokenizer, tokens or TOKENS)
        self.model, self.device = load_model(
            "AutoModelForSeq2SeqLM", model, device=device, trust_remote_code=trust_remote_code
        )
        self.model.set_output_embeddings(TokenHead(self.model.get_output_embeddings(), answers))
        longest = longest_input(self.tokenizer, self.model, max_tokens)
        self.template = Template(self.tokenizer, template or TEMPLATE, max_tokens=longest, ends_open=False)
        # T5 was trained in bfloat16, and its sums go beyond what float16 can hold
        self.precision = "float32" if precision == "float16" else precision
        self.token_budget = token_budget
        self.padding = padding_id(self.tokenizer, self.model)
        self.start = int(self.model.config.decoder_start_token_id)

    def score(self, queries: Sequence[str], passages: Sequence[str]) -> Scores:
        """Raw scores of the pairs, in their order."""
        if not queries:
            return np.zeros(0, dtype=np.float32)
        rows = self.template.rows(queries, passages)

        def forward(chunk: Indices) -> Tensor:
            ids_NL, mask_NL = padded([rows[i] for i in chunk], self.padding, self.device)
            start_N1 = torch.full((len(chunk), 1), self.start, device=self.device)
            logits_N1T = self.model(
                input_ids=ids_NL, attention_mask=mask_NL, decoder_input_ids=start_N1
            ).logits
            return difference(logits_N1T[:, 0])

        with inference(self.device, self.precision):
            return in_chunks([len(row) for row in rows], forward, token_budget=self.token_budget)
