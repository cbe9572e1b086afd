"""Extractive queries: stable ids, words of the passage itself, the most telling ones first."""

import math
import re
from collections import Counter

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_ray.generator import (
    EXTRACTIVE_KINDS,
    Written,
    document_frequencies,
    extractive,
    query_id_of,
)
from retrieval_ray.words import STOPWORDS, surface_words

WORDS = st.sampled_from("granite the quartz of magma basalt a mineral crystal and erosion".split())
SENTENCES = st.lists(WORDS, min_size=1, max_size=20).map(lambda words: " ".join(words) + ". ")
TEXTS = st.lists(SENTENCES, min_size=1, max_size=4).map("".join)
CORPORA = st.lists(TEXTS, min_size=1, max_size=5).map(
    lambda texts: [(f"p{n}", f"Title {n}", text) for n, text in enumerate(texts)]
)
Passage = tuple[str, str, str]


def written(passages: list[Passage], **options: tuple[str, ...]) -> list[Written]:
    frequencies, total = document_frequencies(f"{title} {text}" for _, title, text in passages)
    return list(extractive(passages, frequencies, total, **options))


def one(text: str, kind: str, *, title: str = "") -> str:
    """The query of a kind for a text, among other texts that share its stop words."""
    others = [(f"o{n}", "", f"filler passage number {n} about nothing") for n in range(9)]
    found = {w.kind: w.text for w in written([("p", title, text), *others]) if w.passage_id == "p"}
    return found.get(kind, "")


# --- ids --------------------------------------------------------------------------------------


def test_ids_are_those_of_earlier_runs() -> None:
    """Recorded with `printf '["p17","span","extractive-1"]' | sha256sum`, cut to 16 digits."""
    assert query_id_of("p17", "span", "extractive-1") == "span-6097db8a49a1356a"


@given(st.lists(st.tuples(st.text(), st.sampled_from(EXTRACTIVE_KINDS), st.text()), unique=True))
@settings(max_examples=100, deadline=None)
def test_ids_differ_for_every_passage_kind_and_version(keys: list[tuple[str, str, str]]) -> None:
    assert len({query_id_of(*key) for key in keys}) == len(keys)


@given(CORPORA)
@settings(max_examples=50, deadline=None)
def test_a_rerun_and_another_order_give_the_same_queries(passages: list[Passage]) -> None:
    first = written(passages)
    assert written(passages) == first
    assert sorted(written(passages[::-1]), key=lambda w: w.query_id) == sorted(
        first, key=lambda w: w.query_id
    )
    assert len({w.query_id for w in first}) == len(first)


@given(CORPORA)
@settings(max_examples=50, deadline=None)
def test_an_id_depends_on_the_passage_and_kind_not_on_the_other_passages(
    passages: list[Passage],
) -> None:
    alone = {(w.passage_id, w.kind): w.query_id for p in passages for w in written([p, p])}
    for query in written(passages):
        assert query.query_id == alone.get((query.passage_id, query.kind), query.query_id)
        assert query.query_id.startswith(f"{query.kind}-")


# --- kinds ------------------------------------------------------------------------------------


@given(CORPORA, st.lists(st.sampled_from(EXTRACTIVE_KINDS), unique=True).map(tuple))
@settings(max_examples=50, deadline=None)
def test_only_the_kinds_asked_for_are_written(passages: list[Passage], kinds: tuple[str, ...]) -> None:
    everything = [w for w in written(passages) if w.kind in kinds]
    assert sorted(written(passages, kinds=kinds), key=str) == sorted(everything, key=str)


def test_a_title_is_taken_as_it_stands_and_left_out_where_there_is_none() -> None:
    assert one("Some text.", "title", title="  On Growth  and Form ") == "On Growth  and Form"
    assert one("Some text.", "title", title="   ") == ""


@pytest.mark.parametrize("text", ["", "   ", "?!", "the of and a"])
def test_a_passage_that_says_nothing_gives_nothing(text: str) -> None:
    found = written([("p", "", text), ("q", "", "other words")])
    assert {w.passage_id for w in found} == {"q"}


# --- spans ------------------------------------------------------------------------------------


@given(CORPORA)
@settings(max_examples=100, deadline=None)
def test_a_span_is_verbatim_words_of_one_sentence(passages: list[Passage]) -> None:
    texts = {key: text for key, _, text in passages}
    for query in written(passages, kinds=("span",)):
        sentences = [" ".join(s.split()) for s in re.split(r"(?<=\.)\s+", texts[query.passage_id])]
        assert any(s.startswith(query.text) for s in sentences)
        assert 6 <= len(query.text.split()) <= 16


@given(CORPORA)
@settings(max_examples=100, deadline=None)
def test_the_span_begins_the_sentence_with_the_rarest_words(passages: list[Passage]) -> None:
    frequencies, total = document_frequencies(text for _, _, text in passages)
    for key, _, text in passages:
        scores = {}
        for sentence in re.split(r"(?<=\.)\s+", text):
            words = [w.strip(".") for w in sentence.split()]
            if len(words) >= 6:
                rare = [0 if w in STOPWORDS else math.log((total + 1) / (frequencies[w] + 1)) for w in words]
                scores[sentence] = sum(rare) / len(rare)
        best = max(scores.values(), default=0)
        found = [w.text for w in extractive([(key, "", text)], frequencies, total, kinds=("span",))]
        assert bool(found) == (best > 0)
        if found:
            begun = [score for s, score in scores.items() if s.startswith(found[0])]
            assert max(begun) == pytest.approx(best)


@pytest.mark.parametrize(
    "text",
    [
        "Call json.dumps with a circular structure and it raises ValueError. Short end.",
        "The circumference is roughly 3.14159 times the diameter of any planar circle.",
        "Visit www.example.org before installing the experimental quantum compiler package today.",
        "Rename archive.tar.gz after checksum validation completes without reporting corruption.",
    ],
)
def test_a_full_stop_inside_a_word_or_number_does_not_end_a_sentence(text: str) -> None:
    tokens, span = text.split(), one(text, "span").split()
    assert span and span == tokens[: len(span)]


@pytest.mark.parametrize(
    "text",
    [
        "東京は日本の首都であり、世界最大級の都市圏を形成している。富士山は日本で最も高い山である。",
        "北京是中华人民共和国的首都，也是全国的政治中心和文化中心。长城很长。",
        "กรุงเทพมหานครเป็นเมืองหลวงและนครที่มีประชากรมากที่สุดของประเทศไทย",
        "ភ្នំពេញជារាជធានីនិងជាទីក្រុងធំជាងគេនៃប្រទេសកម្ពុជា",
    ],
)
def test_unspaced_scripts_give_queries(text: str) -> None:
    span = one(text, "span")
    assert span and span in text and len(span) <= 48
    keywords = one(text, "keywords").split()
    assert len(keywords) == 5 and all(len(word) >= 2 for word in keywords)


def test_a_long_thai_text_with_phrase_spaces_is_cut_by_characters() -> None:
    """Thai puts spaces between phrases, not words; sixteen phrases are no query."""
    phrases = [f"{a}{b}ภาษาไทยที่ยาวมาก" for a in "กขคงจ" for b in "ชซดตถ"]
    assert 0 < len(one(" ".join(phrases), "span")) <= 48


def test_a_cut_in_an_unspaced_script_leaves_no_letter_without_its_mark() -> None:
    for start in range(3):
        text = "ก" * start + "ที่" * 30
        span = one(text, "span")
        assert span and clusters(text)[: len(clusters(span))] == clusters(span)


def clusters(text: str) -> list[str]:
    """Letters with their marks."""
    return list(regex.findall(r"\X", text))


# --- keywords ---------------------------------------------------------------------------------


@given(CORPORA)
@settings(max_examples=100, deadline=None)
def test_keywords_are_the_five_best_by_tf_idf_in_the_order_of_the_text(
    passages: list[Passage],
) -> None:
    frequencies, total = document_frequencies(f"{title} {text}" for _, title, text in passages)
    given_texts = {key: surface_words(f"{title} {text}") for key, title, text in passages}
    found = {w.passage_id: w.text.split() for w in written(passages, kinds=("keywords",))}
    for key, words in given_texts.items():
        weight = {
            w: words.count(w) * math.log((total + 1) / (frequencies[w] + 1))
            for w in words
            if w not in STOPWORDS and len(w) > 1
        }
        useful = {w: v for w, v in weight.items() if v > 0}
        chosen = found.get(key, [])
        assert len(chosen) == min(5, len(useful)) and set(chosen) <= useful.keys()
        assert chosen == sorted(chosen, key=words.index)
        worst = min((useful[w] for w in chosen), default=0.0)
        assert all(v <= worst for w, v in useful.items() if w not in chosen)


@given(st.lists(TEXTS))
@settings(max_examples=50, deadline=None)
def test_document_frequencies_count_texts_not_words(texts: list[str]) -> None:
    counts, total = document_frequencies(texts)
    assert total == len(texts)
    assert counts == Counter(
        {w: sum(w in surface_words(t) for t in texts) for t in texts for w in surface_words(t)}
    )
