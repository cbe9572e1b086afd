"""Tiny random students of other architectures than BERT, as folders that sentence-transformers writes."""

from pathlib import Path

import numpy as np

HIDDEN, TOKENS = 32, 40  # width; tokens of the longest text
INSTRUCTION = "ba co di : "  # stands before queries; words that the tokenizer knows
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


def _tokenizer(words, ends, **more):
    """A word-level tokenizer; ``ends``: what it puts around a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = [*SPECIAL, ":", *words]
    inner = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single=ends, special_tokens=[(name, n) for n, name in enumerate(SPECIAL)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", **more)
    return tokenizer, len(names)


def _modernbert(vocabulary):
    from transformers import ModernBertConfig, ModernBertModel

    return ModernBertModel(
        ModernBertConfig(
            vocab_size=vocabulary, hidden_size=HIDDEN, num_hidden_layers=3, num_attention_heads=2,
            intermediate_size=48, max_position_embeddings=TOKENS, local_attention=8,
            global_attn_every_n_layers=2, pad_token_id=1, bos_token_id=0, eos_token_id=2, cls_token_id=0,
            sep_token_id=2, initializer_range=0.3, initializer_cutoff_factor=2.0,
        )
    )  # fmt: skip


def _xlm_r(vocabulary):
    from transformers import XLMRobertaConfig, XLMRobertaModel

    return XLMRobertaModel(
        XLMRobertaConfig(
            vocab_size=vocabulary, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=TOKENS + 2, type_vocab_size=1, pad_token_id=1,
            bos_token_id=0, eos_token_id=2, initializer_range=0.3,
        )
    )  # fmt: skip


def _qwen3(vocabulary):
    from transformers import Qwen3Config, Qwen3Model

    return Qwen3Model(
        Qwen3Config(
            vocab_size=vocabulary, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, intermediate_size=64, max_position_embeddings=TOKENS,
            bos_token_id=None, eos_token_id=2, initializer_range=0.3,
        )
    )  # fmt: skip


_ENDS, _BEHIND = "<s> $A </s>", "$A </s>"
FAMILIES = {  # backbone, tokenizer, pooling, prompts
    "modernbert": (_modernbert, _ENDS, {"pad_token": "<pad>"}, "mean", {}),
    "xlm-r": (_xlm_r, _ENDS, {"pad_token": "<pad>"}, "cls", {}),
    "decoder, padded left": (
        _qwen3, _BEHIND, {"pad_token": "<pad>", "padding_side": "left"}, "lasttoken", {"query": INSTRUCTION}
    ),
    "decoder, padded right": (
        _qwen3, _BEHIND, {"pad_token": "<pad>", "padding_side": "right"}, "lasttoken", {"query": INSTRUCTION}
    ),
    "decoder, no padding token": (_qwen3, _BEHIND, {}, "lasttoken", {"query": INSTRUCTION}),
    "decoder, mean without its prompt": (
        _qwen3, "$A", {"pad_token": "<pad>", "padding_side": "left"}, "mean", {"query": INSTRUCTION}
    ),
}  # fmt: skip


def save_family(family: str, words: list[str], place: Path) -> str:
    """Write a student of a family below ``place``; returns its folder."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    backbone, ends, more, pooling, prompts = FAMILIES[family]
    tokenizer, vocabulary = _tokenizer(words, ends, **more)
    torch.manual_seed(0)
    backbone(vocabulary).save_pretrained(place / "backbone")
    tokenizer.save_pretrained(place / "backbone")
    modules = [
        Transformer(str(place / "backbone")),
        Pooling(HIDDEN, pooling_mode=pooling, include_prompt="without" not in family),
        Normalize(),
    ]
    model = SentenceTransformer(modules=modules, device="cpu", prompts=prompts)
    model.save(str(place / "student"), create_model_card=False)
    return str(place / "student")


def texts_of_any_length(words: list[str]) -> list[str]:
    """Twenty texts, of a word and up to nearly the longest."""
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(words, length)) for length in rng.integers(1, TOKENS - 8, 20)]
