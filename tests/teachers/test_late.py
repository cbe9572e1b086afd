"""Late interaction: the naive mean of maxima, and query vectors that may come from elsewhere."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from retrieval_ray.teachers.late import Late, late_interaction
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


def test_scores_are_those_of_the_students_token_vectors_in_the_order_of_the_pairs(student_folder, words):
    arguments = {"model": student_folder, "precision": "float32", "device": "cpu"}
    teacher = Late(arguments, token_budget=256)
    queries, passages = [" ".join(words[:3]), " ".join(words[7:9])], [" ".join(words[:9]), words[40], ""]
    pairs = [(q, p) for p in passages for q in queries] + [(queries[0], passages[1])]
    scores = teacher.score(*map(list, zip(*pairs, strict=True)))
    assert scores.dtype == np.float32 and scores[-1] == scores[2]
    for (query, passage), score in zip(pairs, scores, strict=True):
        query_TD, passage_TD = (
            teacher.student.token_vectors([text], role, token_budget=256)[0]
            for text, role in ((query, "query"), (passage, "passage"))
        )
        assert score == pytest.approx(oracles.late_interaction(query_TD, passage_TD), abs=2e-3)
    stored = dict(zip(queries, teacher.query_vectors(queries), strict=True))
    reading = Late(arguments, token_budget=256, query_tokens=lambda texts: [stored[t] for t in texts])
    assert np.array_equal(reading.score(*map(list, zip(*pairs, strict=True))), scores)


def test_a_call_holds_the_token_vectors_of_few_passages_and_scores_all(student_folder, words, monkeypatch):
    arguments = {"model": student_folder, "precision": "float32", "device": "cpu"}
    teacher = Late(arguments, token_budget=8)
    passages = [" ".join(words[n : n + 3 + n % 9]) for n in range(60)]
    queries = [words[n % 5] for n in range(60)]
    alone = [teacher.score([q], [p])[0] for q, p in zip(queries, passages, strict=True)]
    asked, whole = [], teacher.student.token_vectors

    def token_vectors(texts, role, *, token_budget):
        if role == "passage":
            asked.append(len(texts))
        return whole(texts, role, token_budget=token_budget)

    monkeypatch.setattr(teacher.student, "token_vectors", token_vectors)
    assert teacher.score(queries, passages) == pytest.approx(alone, abs=2e-3)
    assert sum(asked) == len(set(passages)) and max(asked) * 15 < 16 * 4 * 8
