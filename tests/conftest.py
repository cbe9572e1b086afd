"""What the tests share: offline tiny random models, Hypothesis without a clock, one thread.

The models are folders as users have them (safetensors, tokenizer, pooling), small enough to load in
a fraction of a second. Their weights are drawn wide, so that different texts differ.
"""

import functools
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

settings.register_profile("suite", max_examples=50, deadline=None, derandomize=True, database=None)
settings.register_profile("search", max_examples=300, deadline=None, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))

HIDDEN = 32
_SYLLABLES = "ba co di fe gu ha jo ki lu me no pi ra se tu vo".split()
WORDS = ["".join(pair) for pair in itertools.product(_SYLLABLES, repeat=2)]  # 256 of one token each
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;?!'-"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """A second thread makes models this small several times slower on a shared machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def words() -> list[str]:
    """Words that the tiny models know as one token each."""
    return WORDS


def _save_tokenizer(folder: Path) -> int:
    from transformers import BertTokenizerFast

    folder.mkdir(parents=True)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *_CHARACTERS]
    pieces += [f"##{character}" for character in _CHARACTERS]
    (folder / "vocab.txt").write_text("\n".join(pieces))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return len(pieces)


def _bert_config(vocabulary: int, **more: Any) -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=96,
        initializer_range=0.3,
        **more,
    )


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random two-layer BERT with its tokenizer."""
    import torch
    from transformers import BertModel

    folder = tmp_path_factory.mktemp("models") / "bert"
    vocabulary = _save_tokenizer(folder)
    torch.manual_seed(0)
    BertModel(_bert_config(vocabulary)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def make_student(bert_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """A function that writes a sentence-transformers folder around that BERT."""

    def make(*, include_prompt: bool = True, normalize: bool = True, mode: str = "mean", **more: Any) -> str:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import (
            Normalize,
            Pooling,
            Transformer,
        )

        modules = [
            Transformer(bert_folder, max_seq_length=48),
            Pooling(HIDDEN, pooling_mode=mode, include_prompt=include_prompt),
            *([Normalize()] if normalize else []),
        ]
        folder = tmp_path_factory.mktemp("models") / "student"
        model = SentenceTransformer(modules=modules, device="cpu", **more)
        model.save(str(folder), create_model_card=False, safe_serialization=True)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def student_folder(make_student: Callable[..., str]) -> str:
    """A tiny sentence-transformers model: mean pooling, normalised, no prompts."""
    return make_student()


@pytest.fixture(scope="session")
def make_cross_encoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """A function that writes a tiny cross-encoder folder with some number of outputs."""

    def make(outputs: int) -> str:
        import torch
        from transformers import BertForSequenceClassification

        folder = tmp_path_factory.mktemp("models") / "cross-encoder"
        vocabulary = _save_tokenizer(folder)
        torch.manual_seed(1)
        model = BertForSequenceClassification(_bert_config(vocabulary, num_labels=outputs))
        model.save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def cross_encoder_folder(make_cross_encoder: Callable[..., str]) -> str:
    """A tiny cross-encoder with one output."""
    return make_cross_encoder(1)


@pytest.fixture(scope="session")
def roberta_cross_encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny XLM-R cross-encoder: another tokenizer, another pair template, no token types."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import Unigram
    from tokenizers.pre_tokenizers import Metaspace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaForSequenceClassification

    folder = tmp_path_factory.mktemp("models") / "roberta"
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = [*special, *(f"▁{word}" for word in WORDS), "▁", *_CHARACTERS]
    tokenizer = Tokenizer(Unigram([(piece, -float(n % 7)) for n, piece in enumerate(pieces)], unk_id=3))
    tokenizer.pre_tokenizer = Metaspace()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>",
        pad_token="<pad>", unk_token="<unk>", model_input_names=["input_ids", "attention_mask"],
        model_max_length=94,
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(2)
    XLMRobertaForSequenceClassification(
        XLMRobertaConfig(
            vocab_size=len(pieces), hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=96, initializer_range=0.3, num_labels=1,
            type_vocab_size=1,
        )
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


@pytest.fixture(scope="session")
def make_family(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A function that gives the folder of a tiny student of a family (see ``families.py``)."""
    from tests.families import save_family

    return functools.cache(lambda family: save_family(family, words, tmp_path_factory.mktemp("family")))


@pytest.fixture(scope="session")
def make_backbone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A function that writes a tiny student around a random bert, xlm-roberta or modernbert; each once."""
    folders: dict[str, str] = {}

    def make(kind: str) -> str:
        if kind not in folders:
            folders[kind] = _backbone_student(kind, tmp_path_factory.mktemp("models"))
        return folders[kind]

    return make


def _backbone_student(kind: str, place: Path) -> str:
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import (
        AutoModel,
        BertTokenizerFast,
        ModernBertConfig,
        XLMRobertaConfig,
    )

    vocabulary = _save_tokenizer(place / "backbone")
    inputs = ["input_ids", "attention_mask"]
    BertTokenizerFast(vocab=str(place / "backbone" / "vocab.txt"), model_input_names=inputs).save_pretrained(
        place / "backbone"
    )
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 96,
        "pad_token_id": 0,
    }
    wide: dict[str, Any] = {"initializer_range": 0.3}
    configs = {
        "bert": lambda: _bert_config(vocabulary),
        "xlm-roberta": lambda: XLMRobertaConfig(**sizes, **wide, type_vocab_size=1),
        "modernbert": lambda: ModernBertConfig(
            **sizes, **wide, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3, local_attention=8
        ),
    }
    torch.manual_seed(0)
    AutoModel.from_config(configs[kind]()).save_pretrained(place / "backbone")
    modules = [Transformer(str(place / "backbone"), max_seq_length=48), Pooling(HIDDEN, pooling_mode="mean")]
    folder = str(place / "student")
    SentenceTransformer(modules=modules, device="cpu").save(folder, create_model_card=False)
    return folder
