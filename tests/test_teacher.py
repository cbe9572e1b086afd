"""Teachers: raw, in order, and the same as the library's own numbers."""

import shutil
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import CrossEncoder
from torch.nn.functional import normalize

from retrieval_ray.errors import UserError
from retrieval_ray.teacher import CrossEncoderTeacher, late_interaction
from tests import oracles

COUNTS = st.lists(st.integers(0, 5), max_size=5)


def _tokens(count, seed):
    if count == 0:
        return torch.empty(0)  # what Student.token_vectors gives for an empty text
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(count, 6, generator=generator), dim=-1)


@given(COUNTS, st.integers(0, 7), st.integers(0, 1000))
def test_late_interaction_is_the_naive_mean_of_maxima(counts, passage_tokens, seed):
    queries = [_tokens(count, seed + n + 1) for n, count in enumerate(counts)]
    passage = _tokens(passage_tokens, seed)
    expected = [oracles.late_interaction(query, passage) for query in queries]
    assert late_interaction(queries, passage) == pytest.approx(expected, abs=1e-6)


def test_a_passage_that_holds_the_query_scores_one_and_other_queries_change_nothing():
    passage = _tokens(7, 0)
    alone = late_interaction([passage[2:5]], passage)
    assert alone == pytest.approx([1.0], abs=1e-6)
    among = late_interaction([_tokens(3, 1), passage[2:5], _tokens(0, 2)], passage)
    assert among[1] == pytest.approx(alone[0], abs=1e-6) and among[2] == 0.0


@pytest.fixture(scope="module")
def pairs(words):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, 40)  # some pairs are cut
    return [(" ".join(rng.choice(words, 4)), " ".join(rng.choice(words, length))) for length in lengths]


def test_a_cross_encoder_gives_the_raw_logits_of_predict_exactly(cross_encoder_folder, pairs):
    teacher = CrossEncoderTeacher(cross_encoder_folder, max_tokens=512, device="cpu")
    plain = CrossEncoder(cross_encoder_folder, num_labels=1, device="cpu")
    expected = plain.predict(pairs, batch_size=32, activation_fn=torch.nn.Identity())
    scores = teacher.score(pairs)
    assert scores.dtype == np.float32
    assert np.array_equal(scores, expected)
    assert scores.min() < 0 or scores.max() > 1  # not squashed


def test_scores_do_not_depend_on_what_else_is_judged(cross_encoder_folder, pairs):
    teacher = CrossEncoderTeacher(cross_encoder_folder, max_tokens=64, device="cpu")
    scores = teacher.score(pairs)
    np.testing.assert_allclose(teacher.score(pairs[::-1])[::-1], scores, atol=1e-5)
    np.testing.assert_allclose(teacher.score(pairs, batch_size=3), scores, atol=1e-5)
    np.testing.assert_allclose(teacher.score(pairs[7:8]), scores[7:8], atol=1e-5)
    assert teacher.score([]).shape == (0,)


def test_max_tokens_cuts_the_pair(cross_encoder_folder, words):
    short = CrossEncoderTeacher(cross_encoder_folder, max_tokens=16, device="cpu")
    long = CrossEncoderTeacher(cross_encoder_folder, max_tokens=64, device="cpu")
    head = " ".join(words[:30])
    same_head = [("baco", f"{head} baco"), ("baco", f"{head} vovo")]
    assert len(set(short.score(same_head).tolist())) == 1
    assert len(set(long.score(same_head).tolist())) == 2


def test_max_tokens_cannot_exceed_what_the_model_can_read(cross_encoder_folder, words):
    teacher = CrossEncoderTeacher(cross_encoder_folder, max_tokens=10_000, device="cpu")
    assert np.isfinite(teacher.score([("baco", " ".join(words))])).all()


def test_loading_a_teacher_warns_of_nothing(cross_encoder_folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CrossEncoderTeacher(cross_encoder_folder, max_tokens=32, device="cpu")


def test_a_teacher_needs_exactly_one_output(make_cross_encoder):
    with pytest.raises(UserError, match="3 outputs"):
        CrossEncoderTeacher(make_cross_encoder(3), max_tokens=32)


def test_a_folder_that_is_no_model_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match=r"teacher\.model"):
        CrossEncoderTeacher(str(tmp_path), max_tokens=32)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_teacher_that_was_cut_off_is_the_users_error(cross_encoder_folder, tmp_path, name):
    shutil.copytree(cross_encoder_folder, tmp_path / "model")
    file = tmp_path / "model" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=r"teacher\.model: cannot load '.*model'"):
        CrossEncoderTeacher(str(tmp_path / "model"), max_tokens=32)
