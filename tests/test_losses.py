"""Losses against loops over ids and against sentence-transformers' losses."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers.sentence_transformer import losses as peers
from torch.nn.functional import normalize

from retrieval_ray.batching import excluded_mask, unique_passages
from retrieval_ray.losses import (
    calibrate_temperature,
    clp,
    infonce,
    infonce_list,
    listwise_kl,
    margin_mse,
    ranking,
)
from tests import oracles

SEEDS = st.integers(0, 10_000)
TEMPERATURES = st.floats(0.02, 2.0)


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def _random(seed, *shape):
    return torch.rand(*shape, generator=_generator(seed), dtype=torch.float64)


def _unit(seed, *shape):
    return normalize(torch.randn(*shape, generator=_generator(seed), dtype=torch.float64), dim=-1)


@st.composite
def batches(draw):
    """Lists that share passages, and exclusions among them (and of ids that are not there)."""
    names = [f"p{n}" for n in range(7)]
    size = draw(st.integers(1, 4))
    lists = [
        draw(st.lists(st.sampled_from(names), min_size=size, max_size=size, unique=True))
        for _ in range(draw(st.integers(1, 5)))
    ]
    left_out = st.lists(st.sampled_from([*names, "elsewhere"]), max_size=4, unique=True)
    return lists, [draw(left_out) for _ in lists]


def _naive(queries, vectors, lists, excluded, temperature):
    rows = [[vectors[passage] for passage in row] for row in lists]
    return oracles.infonce(queries, rows, lists, excluded, temperature)


def _ours(queries, vectors, lists, excluded, temperature):
    unique = unique_passages(lists)
    matrix = torch.stack([vectors[passage] for passage in unique.passage_ids])
    return infonce(
        queries @ matrix.T,
        torch.from_numpy(unique.index_BK[:, 0]),
        excluded_BN=torch.from_numpy(excluded_mask(unique, excluded)),
        counts_N=torch.from_numpy(unique.counts_N),
        temperature=temperature,
    )


@given(SEEDS, st.integers(1, 4), st.integers(1, 6), TEMPERATURES, TEMPERATURES)
def test_listwise_kl_is_the_naive_sum(seed, rows, size, student_temperature, teacher_temperature):
    student, teacher = 2 * _random(seed, rows, size) - 1, _random(seed + 1, rows, size)
    ours = listwise_kl(
        student,
        teacher,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
    )
    naive = oracles.listwise_kl(student, teacher, student_temperature, teacher_temperature)
    torch.testing.assert_close(ours, naive, atol=1e-12, rtol=1e-9)


@given(SEEDS, st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_the_kl_of_lists_of_several_lengths_is_the_mean_of_theirs(seed, lengths):
    """What stands behind a list's end counts for nothing, nor does it have a gradient."""
    student, teacher = 2 * _random(seed, len(lengths), 7) - 1, _random(seed + 1, len(lengths), 7)
    absent = torch.arange(7) >= torch.tensor(lengths)[:, None]
    student = student.masked_fill(absent, 100.0).requires_grad_()
    ours = listwise_kl(
        student, teacher.masked_fill(absent, -torch.inf), student_temperature=0.1, teacher_temperature=0.3
    )
    alone = [
        oracles.listwise_kl(student[n : n + 1, :size], teacher[n : n + 1, :size], 0.1, 0.3)
        for n, size in enumerate(lengths)
    ]
    expected = torch.stack(alone).mean()
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-9)
    (gradient,), (plain,) = torch.autograd.grad(ours, student), torch.autograd.grad(expected, student)
    torch.testing.assert_close(gradient, plain, atol=1e-12, rtol=1e-9)
    assert bool((gradient[absent] == 0).all())


@given(SEEDS, TEMPERATURES, st.floats(0.2, 2.0))
def test_kl_is_zero_exactly_where_the_distributions_are_equal(seed, student_temp, teacher_temp):
    teacher = _random(seed, 3, 5)
    same = teacher / teacher_temp * student_temp + 0.3  # a shift changes no softmax
    temperatures = {"student_temperature": student_temp, "teacher_temperature": teacher_temp}
    assert abs(float(listwise_kl(same, teacher, **temperatures))) < 1e-12
    other = same.clone()
    other[1, 2] += student_temp
    assert float(listwise_kl(other, teacher, **temperatures)) > 1e-6


def test_listwise_kl_is_sentence_transformers_loss_without_its_temperature_squared():
    queries, passages = _unit(0, 6, 8), _unit(1, 6, 5, 8)
    teacher = _random(2, 6, 5)
    peer = peers.DistillKLDivLoss(None, student_temperature=0.05, teacher_temperature=0.3)
    theirs = peer.compute_loss_from_embeddings([queries, *passages.unbind(1)], teacher)
    ours = listwise_kl(
        torch.einsum("bd,bkd->bk", queries, passages),
        teacher,
        student_temperature=0.05,
        teacher_temperature=0.3,
    )
    torch.testing.assert_close(ours * 0.05**2, theirs, atol=0, rtol=1e-9)


@given(batches(), SEEDS, st.floats(0.01, 1.0))
def test_infonce_is_the_naive_loss_where_each_lists_rows_are_repeated(batch, seed, temperature):
    lists, excluded = batch
    queries, matrix = _unit(seed, len(lists), 4), _unit(seed + 1, 7, 4)
    vectors = {f"p{n}": matrix[n] for n in range(7)}
    naive = _naive(queries, vectors, lists, excluded, temperature)
    ours = _ours(queries, vectors, lists, excluded, temperature)
    torch.testing.assert_close(ours, naive, atol=1e-9, rtol=1e-9)


@given(batches(), SEEDS)
def test_the_gradient_of_infonce_is_the_naive_gradient(batch, seed):
    lists, excluded = batch
    gradients = []
    for loss in (_ours, _naive):
        queries = _unit(seed, len(lists), 4).requires_grad_()
        matrix = _unit(seed + 1, 7, 4).requires_grad_()
        loss(queries, {f"p{n}": matrix[n] for n in range(7)}, lists, excluded, 0.05).backward()
        gradients.append(torch.cat([queries.grad, matrix.grad]))
    assert torch.isfinite(gradients[0]).all()
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("peer", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"])
def test_infonce_is_sentence_transformers_loss_without_duplicates_or_exclusions(peer):
    lists = [[f"p{row}-{place}" for place in range(3)] for row in range(5)]
    queries, passages = _unit(3, 5, 8), _unit(4, 5, 3, 8)
    vectors = {lists[b][k]: passages[b, k] for b in range(5) for k in range(3)}
    ours = _ours(queries, vectors, lists, [[]] * 5, 0.01)
    columns = [queries, *passages.unbind(1)]
    if peer == "MultipleNegativesRankingLoss":
        loss = peers.MultipleNegativesRankingLoss(None, scale=100.0)
        theirs = loss.compute_loss_from_embeddings(columns, None)
    else:
        loss = peers.CachedMultipleNegativesRankingLoss([None], scale=100.0, mini_batch_size=2)
        theirs = loss.calculate_loss([[column] for column in columns])
    torch.testing.assert_close(ours, theirs.to(ours.dtype), atol=1e-6, rtol=1e-6)


def test_a_passage_is_masked_by_id_wherever_in_the_batch_it_stands():
    """q0 excludes q1's positive and q1's negative: only its own list is left to it."""
    lists = [["a", "b"], ["c", "d"]]
    matrix = _unit(5, 4, 4)
    vectors, queries = dict(zip("abcd", matrix, strict=True)), _unit(6, 2, 4)
    cosine = queries @ matrix.T
    alone = -math.log(
        math.exp(cosine[0, 0] / 0.1) / (math.exp(cosine[0, 0] / 0.1) + math.exp(cosine[0, 1] / 0.1))
    )
    everything = float(torch.logsumexp(cosine[1] / 0.1, 0) - cosine[1, 2] / 0.1)
    ours = float(_ours(queries, vectors, lists, [["c", "d"], []], 0.1))
    assert ours == pytest.approx((alone + everything) / 2, rel=1e-12)


def test_a_querys_own_positive_counts_once_even_if_excluded_and_in_other_lists():
    lists = [["a", "b"], ["c", "a"], ["d", "a"]]
    vectors = dict(zip("abcd", _unit(7, 4, 4), strict=True))
    queries = _unit(8, 3, 4)
    only_first = [["a", "b", "c", "d"], [], []]
    torch.testing.assert_close(
        _ours(queries, vectors, lists, only_first, 0.05),
        _naive(queries, vectors, lists, only_first, 0.05),
    )
    alone = _ours(queries[:1], vectors, lists[:1], only_first[:1], 0.05)
    assert float(alone) == pytest.approx(0.0, abs=1e-12)  # nothing to be told apart from


def test_infonce_is_finite_at_the_papers_temperature_and_opposite_vectors():
    queries = torch.eye(2, dtype=torch.float64)
    vectors = {"a": -queries[0], "b": queries[0]}
    loss = _ours(queries[:1], vectors, [["a", "b"]], [[]], 0.01)
    assert float(loss) == pytest.approx(200.0)


@given(SEEDS, st.integers(1, 4), st.integers(1, 6), TEMPERATURES)
def test_infonce_of_the_list_is_the_naive_loss(seed, rows, size, temperature):
    student, excluded = 2 * _random(seed, rows, size) - 1, _random(seed + 1, rows, size) < 0.3
    ours = infonce_list(student, excluded_BK=excluded, temperature=temperature)
    naive = oracles.infonce_list(student, excluded.tolist(), temperature)
    torch.testing.assert_close(ours, naive, atol=1e-10, rtol=1e-9)


def test_infonce_of_lists_without_exclusions_is_cross_entropy():
    student = 2 * _random(0, 5, 4) - 1
    ours = infonce_list(student, excluded_BK=torch.zeros(5, 4, dtype=torch.bool), temperature=0.02)
    expected = torch.nn.functional.cross_entropy(student / 0.02, torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(ours, expected)


@given(SEEDS, st.integers(1, 4), st.integers(2, 6), TEMPERATURES, TEMPERATURES)
def test_margin_mse_is_the_naive_mean(seed, rows, size, student_temperature, teacher_temperature):
    student, teacher = 2 * _random(seed, rows, size) - 1, _random(seed + 1, rows, size)
    temperatures = {"student_temperature": student_temperature, "teacher_temperature": teacher_temperature}
    naive = oracles.margin_mse(student, teacher, student_temperature, teacher_temperature)
    torch.testing.assert_close(margin_mse(student, teacher, **temperatures), naive)


def test_margin_mse_at_temperature_one_is_sentence_transformers_loss():
    queries, passages, teacher = _unit(0, 6, 8), _unit(1, 6, 5, 8), _random(2, 6, 5)
    peer = peers.MarginMSELoss(None)
    theirs = peer.compute_loss_from_embeddings([queries, *passages.unbind(1)], teacher)
    student = torch.einsum("bd,bkd->bk", queries, passages)
    ours = margin_mse(student, teacher, student_temperature=1.0, teacher_temperature=1.0)
    torch.testing.assert_close(ours, theirs)


@given(SEEDS, st.integers(1, 4), st.integers(1, 6), TEMPERATURES, st.booleans())
def test_ranking_is_the_naive_mean_over_ordered_pairs(seed, rows, size, temperature, ties):
    student, teacher = 2 * _random(seed, rows, size) - 1, _random(seed + 1, rows, size)
    teacher = (3 * teacher).round() if ties else teacher
    naive = oracles.ranking(student, teacher, temperature)
    torch.testing.assert_close(ranking(student, teacher, temperature=temperature), naive)


def test_ranking_sees_the_teachers_order_alone():
    student, teacher = 2 * _random(0, 4, 6) - 1, _random(1, 4, 6)
    ours = ranking(student, teacher, temperature=0.1)
    assert torch.equal(ours, ranking(student, (9 * teacher).exp() - 5, temperature=0.1))
    assert float(ranking(teacher, teacher, temperature=1e-4)) < 1e-6 < float(ours)


def test_clp_is_the_naive_mean_and_its_gradient_draws_negatives_to_their_queries():
    cosine = (2 * _random(0, 4, 3) - 1).requires_grad_()
    there = torch.tensor([[True, True, False], [False, True, False], [True] * 3, [False] * 3])
    naive = oracles.clp(
        [
            [value if is_there else None for value, is_there in zip(*row, strict=True)]
            for row in zip(cosine, there.tolist(), strict=True)
        ]
    )
    ours = clp(cosine, there)
    torch.testing.assert_close(ours, naive)
    ours.backward()
    assert (cosine.grad[there] < 0).all() and (cosine.grad[~there] == 0).all()


@given(SEEDS, st.floats(0.02, 0.5), st.floats(0.05, 0.5))
def test_calibration_finds_the_minimum(seed, spread, teacher_temperature):
    student = 0.5 + spread * torch.randn(8, 10, generator=_generator(seed), dtype=torch.float64)
    teacher = (_random(seed + 1, 8, 10) + student).clamp(0, 1)

    def kl(tau):
        return float(
            listwise_kl(student, teacher, student_temperature=tau, teacher_temperature=teacher_temperature)
        )

    found = calibrate_temperature(student, teacher, teacher_temperature=teacher_temperature)
    assert 0.005 * 0.999 <= found <= 2 * 1.001
    assert kl(found) <= kl(oracles.minimum_on_grid(kl, 0.005, 2.0, 400)) + 1e-5


def test_calibration_recovers_the_temperature_of_a_student_that_is_the_teacher():
    teacher = _random(9, 20, 10)
    found = calibrate_temperature(0.25 * teacher, teacher, teacher_temperature=0.2)
    assert found == pytest.approx(0.25 * 0.2, rel=2e-3)
