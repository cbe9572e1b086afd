"""Loads a teacher's tokenizer and model: safetensors only, on its device, ready to judge."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from retrieval_ray.errors import UserError
from retrieval_ray.model_code import Source
from retrieval_ray.model_files import resolve_model

KEY = "teacher.model"  # the config key that messages name


def load_tokenizer(model: Source, *, trust_remote_code: bool) -> Any:
    """The model's own tokenizer. Raises ``UserError`` where there is none."""
    from transformers import AutoTokenizer

    path = resolve_model(model, KEY, trust_remote_code=trust_remote_code)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # a broken folder makes the library raise anything at all
        raise UserError(f"{KEY}: no tokenizer in '{path}': {type(error).__name__}: {error}") from error


def load_model(
    auto: str, model: Source, *, device: str | None, trust_remote_code: bool, dtype: str = "float32"
) -> tuple[Any, torch.device]:
    """A model by the name of its Auto class, dropout off.

    Raises ``UserError`` for one that cannot be loaded or lacks weights.
    """
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading weights, in every worker
    path = resolve_model(model, KEY, trust_remote_code=trust_remote_code)
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        found, info = getattr(transformers, auto).from_pretrained(
            path,
            use_safetensors=True,
            dtype=getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise UserError(f"{KEY}: cannot load '{path}': {type(error).__name__}: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing:  # the library fills them with random numbers
        raise UserError(
            f"{KEY}: '{path}' has no weights for {', '.join(missing[:3])}: not a model for this kind"
        )
    return found.to(target).eval(), target


def longest_input(tokenizer: Any, model: Any, max_tokens: int) -> int:
    """How many tokens a row may have: as asked, or what the tokenizer or the model can take."""
    limits = [max_tokens, int(tokenizer.model_max_length)]
    most = getattr(model.config, "max_position_embeddings", None)
    if isinstance(most, int) and most > 0:
        # RoBERTa counts positions from the padding index on, so as many rows of its table are never used
        table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
        offset = getattr(table, "padding_idx", None)
        limits.append(most - (offset + 1 if offset is not None else 0))
    return min(limits)


def padding_id(tokenizer: Any, model: Any) -> int:
    """The token that fills rows up: the tokenizer's, the model's, or one with which no row ends."""
    ids = (tokenizer.pad_token_id, getattr(model.config, "pad_token_id", None))
    return next((int(found) for found in ids if found is not None), 0)


def token_ids(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """The ids of tokens named as text. Raises ``UserError`` for a text that is not one token."""
    found = []
    for token in tokens:
        ids = tokenizer.encode(token, add_special_tokens=False)
        known = tokenizer.convert_tokens_to_ids(token)
        if len(ids) != 1 and (known is None or known == tokenizer.unk_token_id):
            raise UserError(f"teacher.tokens: '{token}' is not one token of this model but {len(ids)}")
        found.append(int(ids[0]) if len(ids) == 1 else int(known))
    return found


class TokenHead(torch.nn.Module):
    """An output layer cut down to the tokens whose logits are asked for, in float32.

    Of a language model's 150,000 logits one or two count, and in bfloat16 those of many passages would be
    equal. What a model does with its logits afterwards (soft caps, scales) stays its own.
    """

    def __init__(self, head: Any, tokens: Sequence[int]) -> None:
        super().__init__()
        self.weight_TD = torch.nn.Parameter(head.weight[list(tokens)].detach().float(), requires_grad=False)
        bias = getattr(head, "bias", None)
        self.bias_T = None if bias is None else bias[list(tokens)].detach().float()

    def forward(self, hidden_NLD: Tensor) -> Tensor:
        """logits_NLT. A product and a sum, which autocast leaves in float32."""
        logits_NLT = (hidden_NLD.float().unsqueeze(-2) * self.weight_TD).sum(dim=-1)
        return logits_NLT if self.bias_T is None else logits_NLT + self.bias_T


def difference(logits_NT: Tensor) -> Tensor:
    """The one token's logit, or the first's less the second's."""
    return logits_NT[:, 0] if logits_NT.shape[1] == 1 else logits_NT[:, 0] - logits_NT[:, 1]
