"""The cross-encoder: the library's own numbers, whatever stands in a pair."""

import shutil
import warnings

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder as Peer
from tokenizers.processors import TemplateProcessing

from retrieval_ray.errors import UserError
from retrieval_ray.teachers.cross_encoder import CrossEncoder
from retrieval_ray.teachers.first_token import FirstTokenLayer, read_first_token_alone
from retrieval_ray.teachers.pairs import judge
from tests.ray.llm import make_llm


@pytest.fixture(scope="module")
def pairs(words):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 130, 40)  # some pairs are cut, some queries are longer than their passage
    return [
        (" ".join(rng.choice(words, rng.integers(1, 70))), " ".join(rng.choice(words, length)))
        for length in lengths
    ]


@pytest.fixture(scope="module", params=["bert", "xlm-roberta"])
def folder(request, cross_encoder_folder, roberta_cross_encoder_folder):
    return cross_encoder_folder if request.param == "bert" else roberta_cross_encoder_folder


def teacher_of(folder, max_tokens=512, **more):
    return CrossEncoder(folder, max_tokens=max_tokens, **{"device": "cpu", "token_budget": 512, **more})


def scores_of(teacher, pairs):
    return teacher.score([q for q, _ in pairs], [p for _, p in pairs])


def test_scores_are_the_raw_logits_of_predict(folder, pairs):
    expected = Peer(folder, device="cpu").predict(pairs, activation_fn=torch.nn.Identity())
    scores = scores_of(teacher_of(folder), pairs)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=1e-3)
    np.testing.assert_allclose(scores, expected, atol=1e-4)  # far below what was asked for
    assert scores.min() < 0 or scores.max() > 1  # not squashed
    assert np.std(scores) > 0.1  # the tiny models tell texts apart, or this test could not fail


def test_the_last_layer_is_computed_for_the_first_token_where_that_changes_nothing(folder, pairs):
    teacher = teacher_of(folder)
    assert teacher.first_token_alone
    layers = teacher.model.base_model.encoder.layer
    assert isinstance(layers[-1], FirstTokenLayer)
    scores = scores_of(teacher, pairs)
    layers[-1] = layers[-1].layer
    np.testing.assert_allclose(scores, scores_of(teacher, pairs), atol=1e-5)


def test_a_model_whose_head_reads_other_tokens_stays_as_it_is(folder, pairs):
    model = teacher_of(folder).model
    layers = model.base_model.encoder.layer
    layers[-1] = layers[-1].layer
    hook = model.base_model.encoder.register_forward_hook(
        lambda module, inputs, output: setattr(
            output, "last_hidden_state", output.last_hidden_state.mean(dim=1, keepdim=True)
        )
    )
    assert not read_first_token_alone(model)
    assert not isinstance(layers[-1], FirstTokenLayer)
    hook.remove()
    model.config._attn_implementation = "eager"
    assert not read_first_token_alone(model)


def test_reduced_precision_stays_near(folder, pairs):
    exact, *halves = (
        scores_of(teacher_of(folder, precision=name), pairs) for name in ("float32", "bfloat16", "float16")
    )
    for reduced, correlation in zip(halves, (0.98, 0.999), strict=True):
        assert not np.array_equal(exact, reduced)
        assert np.corrcoef(exact, reduced)[0, 1] > correlation


def test_scores_do_not_depend_on_what_else_is_judged(cross_encoder_folder, pairs):
    teacher = teacher_of(cross_encoder_folder, 64)
    scores = scores_of(teacher, pairs)
    np.testing.assert_allclose(scores_of(teacher, pairs[::-1])[::-1], scores, atol=1e-5)
    np.testing.assert_allclose(scores_of(teacher, pairs[7:8]), scores[7:8], atol=1e-5)
    one_by_one = teacher_of(cross_encoder_folder, 64, token_budget=1)
    np.testing.assert_allclose(scores_of(one_by_one, pairs), scores, atol=1e-5)
    assert teacher.score([], []).shape == (0,)


def test_max_tokens_cuts_the_passage_and_not_the_query(cross_encoder_folder, words):
    short, long = (teacher_of(cross_encoder_folder, n) for n in (24, 64))
    head = " ".join(words[:30])
    same_head = [("baco dife", f"{head} baco"), ("baco dife", f"{head} vovo")]
    assert np.ptp(scores_of(short, same_head)) < 1e-5
    assert np.ptp(scores_of(long, same_head)) > 1e-2
    other_query = [("baco dife", head), ("baco fedi", head)]
    assert np.ptp(scores_of(short, other_query)) > 1e-2


def test_max_tokens_cannot_exceed_what_the_model_can_read(folder, words):
    teacher = teacher_of(folder, 10_000)
    assert np.isfinite(scores_of(teacher, [("baco", " ".join(words))])).all()


STRANGE = {
    "long": "wordy " * 20_000, "empty": "", "spaces": " \n\t ", "half a pair": "a \ud83d b", "null": "a\0b",
    "emoji": "👩‍👩‍👧‍👦" * 50, "direction": "\u202eabc\u202c", "combining": "e" + "\u0301" * 5_000,
    "one word": "x" * 100_000, "unassigned": "\U000e0fff\uffff",
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGE)
def test_no_text_stops_a_cross_encoder(folder, name):
    text = STRANGE[name]
    scores, reasons = judge(
        teacher_of(folder).score, ["baco", text, text, "dife"], [text, "baco", text, "baco"]
    )
    assert not reasons and np.isfinite(scores).all()
    plain, _ = judge(teacher_of(folder).score, ["dife"], ["baco"])
    np.testing.assert_allclose(scores[3:], plain, atol=1e-5)


def test_loading_a_teacher_warns_of_nothing(cross_encoder_folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teacher_of(cross_encoder_folder)


def test_a_teacher_needs_exactly_one_output(make_cross_encoder):
    with pytest.raises(UserError, match="3 outputs"):
        teacher_of(make_cross_encoder(3))


def test_a_model_without_a_head_is_the_users_error(bert_folder):
    with pytest.raises(UserError, match=r"no weights for classifier"):
        teacher_of(bert_folder)


def test_a_folder_that_is_no_model_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match=r"teacher\.model"):
        teacher_of(str(tmp_path))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_teacher_that_was_cut_off_is_the_users_error(cross_encoder_folder, tmp_path, name):
    shutil.copytree(cross_encoder_folder, tmp_path / "model")
    file = tmp_path / "model" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=r"teacher\.model: .*model'"):
        teacher_of(str(tmp_path / "model"))


@pytest.mark.parametrize("padding", [True, False])
def test_a_decoder_whose_config_knows_no_padding_reads_each_texts_own_end(tmp_path, pairs, padding):
    """Against the library, pair by pair; without padding of the tokenizer's either, rows end in eos."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    folder = make_llm(tmp_path / "decoder")
    config = LlamaConfig.from_pretrained(folder, num_labels=1)
    assert config.pad_token_id is None
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not padding:
        tokenizer.pad_token = None
        tokenizer._tokenizer.post_processor = TemplateProcessing(
            pair="$A $B:1 </s>:1", special_tokens=[("</s>", tokenizer.eos_token_id)]
        )
        tokenizer.save_pretrained(folder)
    cut = {"truncation": "longest_first", "max_length": 512, "return_tensors": "pt"}
    with torch.inference_mode():
        alone = [float(model(**tokenizer(*pair, **cut)).logits) for pair in pairs]
    assert np.std(alone) > 0.005
    np.testing.assert_allclose(scores_of(teacher_of(str(folder)), pairs), alone, atol=1e-5)
