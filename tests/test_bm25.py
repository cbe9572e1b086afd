"""BM25 against the formula and against bm25s' own retrieval; queries that know no word."""

import bm25s
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval_ray.bm25 import Bm25
from retrieval_ray.words import terms
from tests import oracles

VOCABULARY = ["tree", "river", "stone", "cloud", "lamp"]
TEXTS = st.lists(st.lists(st.sampled_from(VOCABULARY), max_size=8).map(" ".join), min_size=1, max_size=12)
QUERIES = st.lists(st.sampled_from([*VOCABULARY, "unknown", "the"]), max_size=6).map(" ".join)


def _ids(texts):
    return [f"p{99 - n}" for n in range(len(texts))]  # ids fall where positions rise


@given(TEXTS, QUERIES)
def test_scores_are_the_formula(texts, query):
    expected = [0.0] * len(texts)
    if any(texts):
        expected = oracles.bm25(terms(query), [terms(text) for text in texts])
    np.testing.assert_allclose(Bm25(_ids(texts), texts).score(query, _ids(texts)), expected, atol=1e-5)


@given(TEXTS, QUERIES, st.integers(1, 15))
def test_search_is_the_top_k_of_the_positive_scores_with_ties_by_id(texts, query, k):
    index = Bm25(_ids(texts), texts)
    scored = zip(_ids(texts), index.score(query, _ids(texts)), strict=True)
    assert index.search(query, k) == oracles.top_k([row for row in scored if row[1] > 0], k)


def test_search_finds_what_bm25s_retrieves():
    rng = np.random.default_rng(0)
    words = [f"word{letter}{other}" for letter in "abcdefgh" for other in "abcdefgh"]
    texts = [" ".join(rng.choice(words, rng.integers(5, 40))) for _ in range(200)]
    index, theirs = Bm25(_ids(texts), texts), bm25s.BM25()
    theirs.index([terms(text) for text in texts], show_progress=False)
    for _ in range(10):
        query = " ".join(rng.choice(words, 4))
        _, scores = theirs.retrieve([terms(query)], k=20, show_progress=False)
        found = index.search(query, 20)
        np.testing.assert_allclose([score for _, score in found], scores[0], rtol=1e-6)


@pytest.mark.parametrize("query", ["the of and", "", "   ", "?!", "zzzunknown", "the zzzunknown"])
def test_a_query_without_a_known_term_finds_nothing_and_scores_zero(query):
    index = Bm25(["a", "b"], ["a tree by the river", "stones"])
    assert index.search(query, 5) == []
    assert index.score(query, ["b", "a"]) == [0.0, 0.0]


@pytest.mark.parametrize("texts", [[], ["the of", ""], ["", "", ""]])
def test_a_corpus_without_a_single_term(texts):
    index = Bm25(_ids(texts), texts)
    assert index.search("tree", 3) == []
    assert index.score("tree", _ids(texts)) == [0.0] * len(texts)


def test_passages_without_terms_do_not_shift_the_others():
    index = Bm25(["empty", "tree", "the", "river"], ["", "tree", "the", "river"])
    assert [passage for passage, _ in index.search("river", 4)] == ["river"]
    assert index.score("tree", ["empty", "the", "river"]) == [0.0, 0.0, 0.0]


def test_inflected_words_and_capitals_meet():
    assert [p for p, _ in Bm25(["a", "b"], ["Rivers flowed", "a stone"]).search("flowing RIVER", 2)] == ["a"]


@pytest.mark.parametrize(
    ("texts", "query"),
    [
        (["แมวกินปลาในบ้าน", "รถไฟไปเชียงใหม่", "ฝนตกหนักมาก"], "รถไฟเชียงใหม่"),
        (["猫が魚を食べる", "新幹線は京都へ行く", "雨が強く降る"], "京都の新幹線"),
        (["猫吃鱼", "火车去北京", "今天下雨"], "北京火车"),
        (["고양이가 생선을 먹는다", "기차는 서울로 간다", "비가 온다"], "서울로 가는 기차는"),
    ],
)
def test_scripts_without_spaces_are_found(texts, query):
    found = Bm25(_ids(texts), texts).search(query, 3)
    assert found and found[0][0] == _ids(texts)[1]
