"""Filters: what is dropped repeats something that is kept, whatever the order of the rows."""

import random
import re
import unicodedata
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_ray.filters import near_duplicates, normalise, query_rejects
from retrieval_ray.sorting import sort_on_disk
from tests import oracles

# Long enough to stay (10 letters), and built of few pieces, so that many contain each other.
PIECES = ("lorem ipsum ", "dolor sit amet ", "ünïcode text ", "42 ", "Lorem, Ipsum! ", "x")
TEXTS = st.lists(st.sampled_from(PIECES), max_size=4).map("".join)
CORPORA = st.lists(TEXTS, max_size=10).map(lambda texts: [(f"p{i}", t) for i, t in enumerate(texts)])
LARGE = st.lists(TEXTS, min_size=12, max_size=60).map(
    lambda texts: [(f"p{i:02}", t) for i, t in enumerate(texts)]
)


def kept_of(corpus: list[tuple[str, str]]) -> dict[str, str]:
    dropped = {key for key, _, _ in near_duplicates(corpus)}
    return {key: normalise(text) for key, text in corpus if key not in dropped}


# --- normalise --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Café — NAÏVE, 42 times!\n\tüber ", "cafe naive times uber"),
        ("Ａｂｃ ﬁle", "abc file"),
        ("e\u0301a", "ea"),
        ("3.14 + 2^10 = ?", ""),
        ("snake_case and kebab-case", "snakecase and kebabcase"),
        ("東京、日本。", "東京日本"),
        ("", ""),
    ],
)
def test_normalise_leaves_bare_lower_case_words(text: str, expected: str) -> None:
    assert normalise(text) == expected


@given(st.text(st.characters(max_codepoint=0x24F), max_size=30))
@settings(max_examples=100, deadline=None)
def test_normalise_twice_is_normalise_once(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert not re.search(r"\d|^ | $|  ", once)
    assert not any(unicodedata.category(c)[0] in "NPS" for c in once)


# --- near-duplicates --------------------------------------------------------------------------


@given(CORPORA)
@settings(max_examples=100, deadline=None)
def test_small_corpora_lose_what_the_quadratic_rule_drops(corpus: list[tuple[str, str]]) -> None:
    """With ten texts or fewer the window holds them all, so the rule is a double loop."""
    normal = {key: normalise(text) for key, text in corpus}
    left = {key: text for key, text in normal.items() if len(text) >= 10}
    for side in (lambda text: text, lambda text: text[::-1]):
        gone = {
            key
            for key, text in left.items()
            for other, longer in left.items()
            if (text == longer and other < key) or (side(text) < side(longer) and side(text) in side(longer))
        }
        left = {key: text for key, text in left.items() if key not in gone}
    assert kept_of(corpus) == left


@given(LARGE, st.integers(1, 2000))
@settings(max_examples=100, deadline=None)
def test_large_corpora_lose_what_windows_of_whole_lists_drop(
    tmp_path_factory: pytest.TempPathFactory, corpus: list[tuple[str, str]], run_bytes: int
) -> None:
    """In the same order and for the same keepers, sorted in memory or on disk."""
    normal = {key: normalise(text) for key, text in corpus}
    short = [(key, "too_short", f"{len(text)} letters") for key, text in normal.items() if len(text) < 10]
    dropped = oracles.near_duplicates({key: text for key, text in normal.items() if len(text) >= 10})
    expected = sorted(short) + [(key, "near_duplicate", keeper) for key, keeper in dropped]
    assert near_duplicates(corpus) == expected
    folder = str(tmp_path_factory.mktemp("runs"))
    sort = partial(sort_on_disk, folder=folder, run_bytes=run_bytes)
    assert near_duplicates(corpus, sort=sort) == expected


@given(CORPORA)
@settings(max_examples=100, deadline=None)
def test_no_kept_text_begins_or_ends_another(corpus: list[tuple[str, str]]) -> None:
    kept = kept_of(corpus)
    for key, text in kept.items():
        for other, longer in kept.items():
            assert key == other or not longer.startswith(text) and not longer.endswith(text)


@given(LARGE)
@settings(max_examples=50, deadline=None)
def test_every_dropped_text_is_contained_in_a_kept_one(corpus: list[tuple[str, str]]) -> None:
    normal = {key: normalise(text) for key, text in corpus}
    kept = kept_of(corpus)
    for key, reason, _ in near_duplicates(corpus):
        if reason == "near_duplicate":
            assert any(normal[key] in text for text in kept.values())
        else:
            assert reason == "too_short" and len(normal[key]) < 10
    assert all(len(text) >= 10 for text in kept.values())


@given(LARGE)
@settings(max_examples=50, deadline=None)
def test_of_every_text_at_most_one_copy_is_kept(corpus: list[tuple[str, str]]) -> None:
    kept = list(kept_of(corpus).values())
    assert len(set(kept)) == len(kept)


@given(LARGE, st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_the_order_of_rows_does_not_matter(corpus: list[tuple[str, str]], rng: random.Random) -> None:
    shuffled = list(corpus)
    rng.shuffle(shuffled)
    assert near_duplicates(shuffled) == near_duplicates(corpus)


@given(LARGE)
@settings(max_examples=50, deadline=None)
def test_each_row_is_rejected_once_and_names_the_row_it_repeats(
    corpus: list[tuple[str, str]],
) -> None:
    normal = {key: normalise(text) for key, text in corpus}
    rejects = near_duplicates(corpus)
    assert len({key for key, _, _ in rejects}) == len(rejects)
    for key, reason, detail in rejects:
        if reason == "near_duplicate":
            assert detail != key and normal[key] in normal[detail]


@pytest.mark.parametrize("copies", [2, 9, 10, 11, 40])
def test_exactly_one_copy_survives_that_with_the_smallest_id(copies: int) -> None:
    """Also where there are more copies than the window is wide."""
    corpus = [(f"p{n:02}", "The very same passage.") for n in range(copies)]
    random.Random(0).shuffle(corpus)
    corpus += [("other", "Something else altogether."), ("another", "And a third one, longer.")]
    assert set(kept_of(corpus)) == {"p00", "other", "another"}


def test_a_beginning_and_an_end_go_and_the_whole_stays() -> None:
    corpus = [
        ("whole", "Alpha beta gamma delta epsilon"),
        ("begins", "alpha beta gamma!"),
        ("ends", "Gamma, delta, epsilon."),
        ("apart", "alpha beta epsilon delta"),
        ("tiny", "1234567890 ab"),
    ]
    rejects = {key: (reason, detail) for key, reason, detail in near_duplicates(corpus)}
    assert rejects == {
        "begins": ("near_duplicate", "whole"),
        "ends": ("near_duplicate", "whole"),
        "tiny": ("too_short", "2 letters"),
    }


@pytest.mark.parametrize(("between", "dropped"), [(8, True), (9, False)])
def test_the_window_reaches_the_ninth_neighbour(between: int, dropped: bool) -> None:
    """A text that stands in the middle of another is found only as near as that, both ways."""
    corpus = [("in", "b" * 12), ("around", f"z {'b' * 12} z")]
    corpus += [(f"p{n}", f"c{'defghijkl'[n] * 12}c") for n in range(between)]
    assert ("in" not in kept_of(corpus)) == dropped


def test_ids_that_sort_behind_do_not_win_over_longer_texts() -> None:
    """The id only decides between equal texts; a contained text goes whatever its id."""
    corpus = [("a", "alpha beta gamma"), ("b", "alpha beta gamma delta"), ("c", "ALPHA beta gamma")]
    assert set(kept_of(corpus)) == {"b"}


def test_an_empty_corpus_loses_nothing() -> None:
    assert near_duplicates([]) == []


# --- queries ----------------------------------------------------------------------------------

QUERIES = st.lists(
    st.sampled_from(
        [
            "",
            "  ",
            "?!",
            "what is it",
            "What is it?",
            "WHAT  IS IT",
            "one two three four five",
            "42",
        ]
    )
).map(lambda texts: [(f"q{n}", text) for n, text in enumerate(texts)])


@given(QUERIES, st.lists(st.sampled_from(["what is IT!", "42"]), max_size=2))
@settings(max_examples=100, deadline=None)
def test_query_rejects_agree_with_a_plain_loop(queries: list[tuple[str, str]], taken: list[str]) -> None:
    def bare(text: str) -> list[str]:
        return re.findall(r"[a-z0-9]+", text.lower())

    seen = [bare(text) for text in taken]
    expected = []
    for key, text in queries:
        if not bare(text):
            expected.append((key, "empty"))
        elif len(text.split()) > 4:
            expected.append((key, "too_long"))
        elif bare(text) in seen:
            expected.append((key, "duplicate"))
        else:
            seen.append(bare(text))
    found = query_rejects(queries, max_words=4, taken=taken)
    assert [(key, reason) for key, reason, _ in found] == expected


def test_a_repetition_names_the_first_and_a_judged_text_says_so() -> None:
    queries = [
        ("a", "Wie geht es?"),
        ("b", "judged one"),
        ("c", "wie  geht's es"),
        ("d", "wie geht ES"),
    ]
    assert query_rejects(queries, max_words=9, taken=["Judged one!"]) == [
        ("b", "duplicate", "judged one (also a judged query)"),
        ("d", "duplicate", "wie geht ES (also a)"),
    ]


def test_a_dropped_query_is_not_what_a_later_one_repeats() -> None:
    queries = [("long", "a b c d"), ("same", "a b c d")]
    reasons = [reason for _, reason, _ in query_rejects(queries, max_words=3)]
    assert reasons == ["too_long", "too_long"]


def test_digits_tell_queries_apart() -> None:
    queries = [("a", "python 2"), ("b", "python 3"), ("c", "python"), ("d", "Python ３")]
    assert query_rejects(queries, max_words=9) == [("d", "duplicate", "Python ３ (also b)")]


def test_accents_do_not_tell_queries_apart() -> None:
    queries = [
        ("a", "résumé parsing"),
        ("b", "resume parsing"),
        ("c", "re\u0301sume\u0301 parsing"),
    ]
    assert [key for key, _, _ in query_rejects(queries, max_words=9)] == ["b", "c"]


def test_queries_of_other_scripts_are_neither_empty_nor_equal() -> None:
    queries = [
        ("a", "東京タワー"),
        ("b", "京都"),
        ("c", "กา"),
        ("d", "กี่"),
        ("e", "हिन्दी"),
        ("f", "हनद"),
    ]
    assert query_rejects(queries, max_words=9) == []
