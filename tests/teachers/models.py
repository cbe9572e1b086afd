"""Tiny random models with which a prompt can be cut, for the teachers that read templates."""

from pathlib import Path

from tests.conftest import WORDS


def make_t5(folder: Path) -> str:
    """A T5 with a word-level tokenizer that knows ``<extra_id_10>``, ``true`` and ``false``."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    pieces = [
        "<pad>",
        "</s>",
        "<unk>",
        "<extra_id_10>",
        "true",
        "false",
        "Query:",
        "Document:",
        "Relevant:",
        *WORDS,
    ]
    tokenizer = Tokenizer(WordLevel({piece: n for n, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(3)
    T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(pieces), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
            decoder_start_token_id=0, initializer_factor=3.0,
        )
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)
