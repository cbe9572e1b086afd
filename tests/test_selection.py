"""Which epoch is returned, and the dev measures that it is chosen by."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from retrieval_ray.batching import rectangular
from retrieval_ray.selection import Dev, candidate, chosen, evaluate, gain
from retrieval_ray.step import Lists
from retrieval_ray.student import Student
from retrieval_ray.tokens import TokenRows
from tests import oracles
from tests.corpora import tiny_corpus


def _history(values, name="dev_ndcg@10", kl=None):
    rows = zip(values, kl or [1.0] * len(values), strict=True)
    return [{"epoch": float(n), name: value, "dev_kl": far} for n, (value, far) in enumerate(rows)]


@pytest.mark.parametrize(
    ("values", "expected", "best_trained"),
    [
        ([0.5], 0, None),
        ([0.5, 0.4, 0.45], 0, 2),  # none beats the untouched student; the best of them is kept all the same
        ([0.5, 0.6, 0.6, 0.55], 1, 1),  # the first of equals
        ([0.5, 0.4, 0.5, 0.5], 0, 2),
        ([0.1, 0.2, 0.3], 2, 2),
    ],
)
def test_the_best_epoch_counts_the_untouched_student_in(values, expected, best_trained):
    history = _history(values)
    assert chosen(history) == expected
    if best_trained is not None:
        assert candidate(history) == best_trained


def test_without_judged_queries_an_epoch_far_from_the_teacher_is_not_taken():
    values, kl = [0.5, 0.9, 0.6, 0.7], [1.0, 1.51, 1.5, 0.2]
    assert chosen(_history(values, "teacher_ndcg@10", kl)) == 3
    assert chosen(_history(values[:3], "teacher_ndcg@10", kl[:3])) == 2
    assert chosen(_history(values, "dev_ndcg@10", kl)) == 1  # judgements need no guard


@pytest.fixture
def student(student_folder):
    return Student(student_folder, precision="float32", device="cpu")


def _dev(student, corpus, keep=4, qrels=None):
    lists = corpus.dev
    lists = replace(
        lists,
        query_ids=lists.query_ids[:keep],
        passage_ids=lists.passage_ids[:keep],
        teacher_BK=lists.teacher_BK[:keep],
        excluded_ids=lists.excluded_ids[:keep],
    )
    rows = {
        role: TokenRows(texts, lambda ids, texts=texts, role=role: student.tokenize(
            [texts[i] for i in ids], role))
        for role, texts in (("query", corpus.queries), ("passage", corpus.passages))
    }  # fmt: skip
    pools = {query: list(corpus.passages)[:7] for query in qrels or ()}
    return Dev(lists, qrels or {}, pools, rows)


def _evaluate(student, *devs):
    return evaluate(student, devs, student_temperature=0.1, teacher_temperature=0.3, chunk_tokens=100)


def _measure(student, *devs):
    return _evaluate(student, *devs)[0]


def _vectors(student, corpus):
    texts = {**corpus.queries, **corpus.passages}
    roles = ["query"] * len(corpus.queries) + ["passage"] * len(corpus.passages)
    return {
        key: torch.from_numpy(student.encode([text], role, token_budget=1000)[0]).double()
        for (key, text), role in zip(texts.items(), roles, strict=True)
    }


def test_dev_measures_are_means_over_the_queries_of_all_corpora(student, words):
    """Weighted by their dev queries, as CADET's general model weights its dev loss."""
    corpus = tiny_corpus(words)
    vectors, dev = _vectors(student, corpus), _dev(student, corpus)
    scores_BK = torch.stack(
        [torch.stack([vectors[p] @ vectors[q] for p in row])
         for q, row in zip(dev.lists.query_ids, dev.lists.passage_ids, strict=True)]
    )  # fmt: skip
    teacher_BK = torch.from_numpy(np.asarray(dev.lists.teacher_BK))
    by_size = {}
    for keep in (4, 1):
        by_size[keep] = _measure(student, _dev(student, corpus, keep))
        expected = oracles.listwise_kl(scores_BK[:keep], teacher_BK[:keep], 0.1, 0.3)
        assert by_size[keep]["dev_kl"] == pytest.approx(expected.item(), rel=1e-5)
    both = _measure(student, dev, _dev(student, corpus, 1))
    for name, value in both.items():
        assert value == pytest.approx((4 * by_size[4][name] + by_size[1][name]) / 5)


def test_the_teachers_order_is_followed_by_exponential_gains(student, words):
    """nDCG@10 by hand: gains exp(z / 0.5) of the teacher's standardised scores."""
    corpus = tiny_corpus(words)
    vectors, dev = _vectors(student, corpus), _dev(student, corpus)
    expected = []
    for query, row, teacher in zip(
        dev.lists.query_ids, dev.lists.passage_ids, dev.lists.teacher_BK, strict=True
    ):
        gains = np.exp((teacher - teacher.mean()) / teacher.std() / 0.5)
        order = sorted(range(len(row)), key=lambda n: -float(vectors[row[n]] @ vectors[query]))
        discounts = [1 / np.log2(rank + 2) for rank in range(len(row))]
        own = sum(gains[n] * d for n, d in zip(order, discounts, strict=True))
        best = sum(g * d for g, d in zip(sorted(gains, reverse=True), discounts, strict=True))
        expected.append(own / best)
    measures, by_query = _evaluate(student, dev)
    assert measures["teacher_ndcg@10"] == pytest.approx(np.mean(expected), rel=1e-6)
    assert by_query == pytest.approx(expected, rel=1e-6)  # nothing judged: this is what chooses


def test_a_list_that_is_shorter_than_others_counts_as_if_it_were_alone(student, words):
    corpus = tiny_corpus(words)
    dev, lengths = _dev(student, corpus), (4, 2, 3, 4)
    lists = dev.lists
    rows = [row[:length] for row, length in zip(lists.passage_ids, lengths, strict=True)]
    scores = [row[:length] for row, length in zip(lists.teacher_BK, lengths, strict=True)]
    ragged = replace(lists, passage_ids=rows, teacher_BK=rectangular(scores, -np.inf))
    measures, by_query = _evaluate(student, replace(dev, lists=ragged))
    one_by_one = [
        _evaluate(student, replace(dev, lists=Lists([q], [row], own[None], [[]])))
        for q, row, own in zip(lists.query_ids, rows, scores, strict=True)
    ]
    assert by_query == pytest.approx([values[0] for _, values in one_by_one], rel=1e-6)
    for name, value in measures.items():
        assert value == pytest.approx(np.mean([each[name] for each, _ in one_by_one]), rel=1e-5)


def test_judged_queries_are_ranked_over_their_pools(student, words):
    corpus = tiny_corpus(words)
    qrels = {"q1": {"p2": 1}, "q5": {"p3": 1, "p19": 1}}  # p19 is in no pool
    dev = _dev(student, corpus, qrels=qrels)
    vectors, expected = _vectors(student, corpus), []
    for query, relevant in qrels.items():
        order = sorted(dev.pools[query], key=lambda p: -float(vectors[p] @ vectors[query]))
        found = sum(1 / np.log2(rank + 2) for rank, p in enumerate(order) if p in relevant)
        expected.append(found / sum(1 / np.log2(rank + 2) for rank in range(len(relevant))))
    measures, by_query = _evaluate(student, dev)
    assert measures["dev_ndcg@10"] == pytest.approx(np.mean(expected), rel=1e-6)
    assert by_query == pytest.approx(expected, rel=1e-6)


def test_the_gain_is_of_the_measure_that_chooses():
    history = [
        {"epoch": 0.0, "dev_ndcg@10": 0.5, "teacher_ndcg@10": 0.1},
        {"epoch": 1.0, "dev_ndcg@10": 0.4, "teacher_ndcg@10": 0.9},
    ]
    assert gain(history, 1) == pytest.approx(-0.1) and gain(history, 0) == 0
    assert gain([{k: v for k, v in row.items() if k != "dev_ndcg@10"} for row in history], 1) == 0.8
