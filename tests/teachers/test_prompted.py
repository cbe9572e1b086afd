"""Teachers that answer with a token: the model's own logits of it, computed one by one."""

import numpy as np
import pytest
import torch

from retrieval_ray.errors import UserError
from retrieval_ray.teachers.pairs import judge
from retrieval_ray.teachers.seq2seq import Seq2Seq
from retrieval_ray.teachers.yes_no import YesNo
from tests.ray.llm import make_llm

from .models import make_t5
from .test_cross_encoder import STRANGE

TEMPLATE = "<|user|>query: {query}\npassage: {passage}\nyes or no?<|assistant|>"


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return make_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return str(make_llm(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def pairs(words):
    rng = np.random.default_rng(0)
    return (
        [" ".join(rng.choice(words, 4)) for _ in range(12)],
        [" ".join(rng.choice(words, n)) for n in rng.integers(1, 60, 12)],
    )


@pytest.mark.parametrize(
    ("tokens", "template"),
    [(None, None), (["true", "false"], "Query: {query} Document: {passage} Relevant:")],
)
def test_seq2seq_scores_are_logits_at_the_first_decoder_step(t5, pairs, tokens, template):
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    teacher = Seq2Seq(t5, max_tokens=512, tokens=tokens, template=template, device="cpu", token_budget=128)
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(t5).eval(), AutoTokenizer.from_pretrained(t5)
    expected = []
    for query, passage in zip(*pairs, strict=True):
        text = f"Query: {query} Document: {passage}" + (" Relevant:" if tokens else "")
        with torch.no_grad():
            out = model(**tokenizer(text, return_tensors="pt"), decoder_input_ids=torch.tensor([[0]]))
        logits = out.logits[0, 0]
        ids = tokenizer.convert_tokens_to_ids(tokens or ["<extra_id_10>"])
        expected.append(float(logits[ids[0]] - (logits[ids[1]] if tokens else 0)))
    scores = teacher.score(*pairs)
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    assert np.std(scores) > 1e-2


def plain_logits(folder, texts, ids):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    found = []
    for text in texts:
        with torch.no_grad():
            found.append(model(**tokenizer(text, return_tensors="pt")).logits[0, -1, ids])
    return torch.stack(found).numpy()


@pytest.mark.parametrize("tokens", [["yes", "no"], ["yes"]])
def test_yes_no_scores_are_logits_at_the_last_position(llama, pairs, tokens):
    from transformers import AutoTokenizer

    # of the tiny tokenizer's vocabulary, words of one token each
    tokens = {"yes": "y", "no": "n"}[tokens[0]], *(["n"] if len(tokens) == 2 else [])
    teacher = YesNo(llama, max_tokens=512, template=TEMPLATE, tokens=tokens, device="cpu", token_budget=400)
    ids = AutoTokenizer.from_pretrained(llama).convert_tokens_to_ids(list(tokens))
    texts = [TEMPLATE.format(query=q, passage=p) for q, p in zip(*pairs, strict=True)]
    logits = plain_logits(llama, texts, ids)
    expected = logits[:, 0] - (logits[:, 1] if len(tokens) == 2 else 0)
    scores = teacher.score(*pairs)
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    assert np.std(scores) > 1e-3
    reduced = YesNo(
        llama, max_tokens=512, template=TEMPLATE, tokens=tokens, device="cpu", precision="bfloat16"
    ).score(*pairs)
    assert np.corrcoef(scores, reduced)[0, 1] > 0.98 and len(set(reduced.tolist())) == len(reduced)


def test_a_soft_cap_stays_the_models_own(tmp_path, llama, pairs):
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.05,
        sliding_window=16,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    teacher = YesNo(str(tmp_path), max_tokens=512, template=TEMPLATE, tokens=["y"], device="cpu")
    texts = [TEMPLATE.format(query=q, passage=p) for q, p in zip(*pairs, strict=True)]
    expected = plain_logits(str(tmp_path), texts, [tokenizer.convert_tokens_to_ids("y")])[:, 0]
    scores = teacher.score(*pairs)
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    assert 0.001 < np.abs(scores).max() < 0.05


def test_the_default_prompt_is_that_of_qwens_reranker(llama):
    with pytest.raises(UserError, match="'yes' is not one token"):
        YesNo(llama, max_tokens=512, device="cpu")
    teacher = YesNo(llama, max_tokens=512, tokens=["y", "n"], device="cpu")
    text = teacher.tokenizer.decode(teacher.template.rows(["QUERY"], ["PASSAGE"])[0])
    assert "<Query>: QUERY\n<Document>: PASSAGE<|im_end|>" in text and text.endswith("</think>\n\n")
    assert "<Instruct>: Given a web search query" in text


@pytest.mark.parametrize("name", STRANGE)
def test_no_text_stops_them(t5, llama, name):
    text = STRANGE[name]
    for teacher in (
        Seq2Seq(t5, max_tokens=64, device="cpu"),
        YesNo(llama, max_tokens=64, template=TEMPLATE, tokens=["y", "n"], device="cpu"),
    ):
        scores, reasons = judge(teacher.score, ["baco", text, text], [text, "baco", text])
        assert not reasons and np.isfinite(scores).all()
        assert teacher.score([], []).shape == (0,)
