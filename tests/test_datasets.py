"""Collections become tables, and what is wrong in them is named."""

import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_ray import datasets, schema, sources
from retrieval_ray.datasets import (
    in_share,
    read_corpus,
    read_judged,
    read_log,
    read_log_file,
    rejects_table,
    split_spec,
    survey,
)
from retrieval_ray.errors import UserError
from retrieval_ray.sources import Source, open_source
from tests.beir import CORPUS, IDS, TABLE, beir, said_of, write_lines, write_qrels

# --- the corpus -------------------------------------------------------------------------------


def test_a_passage_may_lack_a_title_or_a_text_but_not_both(tmp_path: Path) -> None:
    folder = beir(tmp_path)
    rows = [
        {"_id": "a", "text": "only text"},
        {"_id": "b", "title": "only title", "text": ""},
        {"_id": "c", "title": None, "text": None},
        {"_id": "d", "title": " ", "text": "\n"},
    ]
    write_lines(folder / "corpus.jsonl", rows)
    table, rejects = read_corpus(open_source(str(folder)))
    assert table.column("passage_id").to_pylist() == ["a", "b"]
    found = {row["id"]: row for row in rejects.to_pylist()}
    assert found.keys() == {"c", "d"}
    assert all(row["stage"] == "corpus" and row["reason"] == "empty" for row in found.values())
    assert "line 3" in found["c"]["detail"] and "corpus.jsonl" in found["c"]["detail"]


@given(st.permutations(range(len(CORPUS))))
@settings(max_examples=6, deadline=None)
def test_the_order_of_rows_does_not_matter(order: list[int]) -> None:
    rows = [("somewhere", *CORPUS[n]) for n in order]
    source = Source("tiny", lambda: rows, lambda split: [], lambda split: [])
    assert read_corpus(source)[0].to_pylist() == TABLE


def test_a_duplicate_passage_id_names_both_places(tmp_path: Path) -> None:
    folder = beir(tmp_path)
    row = {"_id": "d1", "text": "x"}
    write_lines(folder / "corpus.jsonl", [row, {"_id": "d2", "text": "y"}, row])
    said = said_of(read_corpus, open_source(str(folder)))
    assert "'d1'" in said and "line 1" in said and "line 3" in said


@given(
    st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f", ""]), min_size=1, max_size=7), st.integers(1, 8)
)
@settings(max_examples=100, deadline=None)
def test_what_is_wrong_first_is_told(ids: list[str], broken: int) -> None:
    """Repeated ids are found at the end of a reading, and told as if they were found at once."""

    def corpus() -> Iterator[tuple[str, str, str, str]]:
        for number, key in enumerate(ids, start=1):
            if number == broken:
                raise UserError(f"row {number} is broken")
            yield f"row {number}", key, "", "text"

    def first_wrong() -> str | None:
        for number, key in enumerate(ids, start=1):
            if number == broken:
                return f"row {number} is broken"
            if not key:
                return f"row {number}: empty id"
            if key in ids[: number - 1]:
                return f"row {number}: id '{key}' stands already at row {ids.index(key) + 1}"
        return None

    source = Source("tiny", corpus, lambda split: [], lambda split: [])
    if first_wrong() is None:
        assert survey(source).passages == len(ids)
    else:
        assert said_of(survey, source) == first_wrong()


def test_ids_whose_hashes_are_the_same_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "_hash64", len)
    rows = [(f"row {n}", *row) for n, row in enumerate(CORPUS)]
    source = Source("tiny", lambda: rows, lambda split: [], lambda split: [])
    assert read_corpus(source)[0].to_pylist() == TABLE


def test_a_duplicate_query_id_names_both_places(tmp_path: Path) -> None:
    folder = beir(tmp_path)
    rows = [{"_id": "q1", "text": "x"}, {"_id": "q1", "text": "y"}]
    write_lines(folder / "queries.jsonl", rows)
    for function, arguments in ((read_judged, ("test", IDS)), (read_log, ("train",))):
        options = {"without": []} if function is read_log else {}
        said = said_of(function, open_source(str(folder)), *arguments, **options)
        assert "'q1'" in said and "line 1" in said and "line 2" in said


@pytest.mark.parametrize("empty", ["", None])
def test_an_empty_id_names_its_place(tmp_path: Path, empty: str | None) -> None:
    folder = beir(tmp_path)
    rows = [{"_id": "d1", "text": "x"}, {"_id": empty, "text": "y"}]
    write_lines(folder / "corpus.jsonl", rows)
    said = said_of(read_corpus, open_source(str(folder)))
    assert "line 2" in said and "empty id" in said
    write_lines(folder / "queries.jsonl", rows)
    assert "line 2" in said_of(read_judged, open_source(str(folder)), "test", IDS)


@pytest.mark.parametrize("rows", [[], [{"_id": "a", "text": " "}]])
def test_an_empty_corpus_is_an_error(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    folder = beir(tmp_path / "tiny")
    write_lines(folder / "corpus.jsonl", rows)
    said = said_of(read_corpus, open_source(str(folder)))
    assert "tiny" in said and "empty" in said


# --- judgements -------------------------------------------------------------------------------


def test_judgements_of_unknown_ids_are_dropped_counted_and_named(tmp_path: Path) -> None:
    folder = beir(tmp_path)
    rows = [("q1", "d1", 1), ("q9", "d1", 1), ("q1", "d8", 1), ("q9", "d9", 1), ("q2", "d7", 1)]
    write_qrels(folder / "qrels" / "test.tsv", rows)
    judged = read_judged(open_source(str(folder)), "test", IDS)
    assert judged.qrels.to_pylist() == [{"query_id": "q1", "passage_id": "d1", "relevance": 1}]
    assert judged.texts.keys() == {"q1"}
    [warning] = judged.warnings
    assert "4 judgements" in warning and "'q9'" in warning and "'d8'" in warning
    assert "line 3" in warning and "'d7'" not in warning and warning.endswith("...")


@pytest.mark.parametrize(
    "rows", [[], [("q9", "d1", 1)], [("q1", "d9", 1)], [("q1", "d1", 0), ("q2", "d2", -1)]]
)
def test_a_split_without_any_relevant_judgement_is_an_error(
    tmp_path: Path, rows: list[tuple[str, str, object]]
) -> None:
    folder = beir(tmp_path / "tiny")
    write_qrels(folder / "qrels" / "test.tsv", rows)
    said = said_of(read_judged, open_source(str(folder)), "test", IDS)
    assert "tiny" in said and "test" in said
    assert ("1 judgements" in said) == any("9" in q + p for q, p, _ in rows)


def test_queries_without_text_go_to_rejects(tmp_path: Path) -> None:
    folder = beir(tmp_path)
    write_lines(
        folder / "queries.jsonl",
        [{"_id": "q1", "text": "x"}, {"_id": "q2", "text": " "}, {"_id": "q3", "text": None}],
    )
    judged = read_judged(open_source(str(folder)), "test", IDS)
    assert judged.texts == {"q1": "x"}
    assert [(r["id"], r["reason"]) for r in judged.rejects.to_pylist()] == [
        ("q2", "empty"),
        ("q3", "empty"),
    ]
    assert "queries.jsonl, line 2" in judged.rejects.to_pylist()[0]["detail"]


def many(count: int = 2000) -> Source:
    """A collection of many queries, each judged once, in every split."""
    queries = [("somewhere", f"q{n}", f"text {n}") for n in range(count)]
    judged = [("somewhere", f"q{n}", "d1", 1) for n in range(count)]
    return Source("many", list, lambda split: queries, lambda split: judged)


def test_max_queries_of_a_larger_number_hold_those_of_a_smaller() -> None:
    chosen = [set(read_judged(many(200), "test", {"d1"}, max_queries=n).texts) for n in (1, 5, 50, 200)]
    assert [len(c) for c in chosen] == [1, 5, 50, 200]
    assert chosen[0] < chosen[1] < chosen[2] < chosen[3]
    by_hash = sorted((f"q{n}" for n in range(200)), key=lambda q: sha256(q.encode()).digest())
    assert chosen[1] == set(by_hash[:5])
    assert len(read_judged(many(20), "test", {"d1"}, max_queries=99).texts) == 20


def test_max_queries_leaves_the_judgements_of_the_chosen_alone() -> None:
    judged = read_judged(many(50), "test", {"d1"}, max_queries=7)
    assert set(judged.qrels.column("query_id").to_pylist()) == judged.texts.keys()


# --- shares and logs --------------------------------------------------------------------------


def test_a_share_is_the_one_that_earlier_runs_had() -> None:
    """Recorded from SHA-256 of the id: 0x0.<the first 13 hexadecimal digits> below 0.2."""
    recorded = [4, 5, 7, 15, 17, 18, 19]
    assert [n for n in range(20) if in_share(f"q{n}", (0, 0.2))] == recorded


@given(st.lists(st.text()), st.floats(0.01, 1), st.floats(0.01, 1))
@settings(max_examples=100, deadline=None)
def test_a_larger_share_holds_the_smaller(ids: list[str], one: float, other: float) -> None:
    small, large = sorted((one, other))
    assert {i for i in ids if in_share(i, (0, small))} <= {i for i in ids if in_share(i, (0, large))}
    assert all(in_share(i, (0, 1)) for i in ids)


def test_a_share_of_a_split_is_about_that_large_and_always_the_same() -> None:
    judged = read_judged(many(), "train:0.2", {"d1"})
    assert 300 < len(judged.texts) < 500  # 400 +- 5.6 standard deviations
    assert read_judged(many(), "train:0.2", {"d1"}).texts == judged.texts
    assert judged.texts.keys() == {f"q{n}" for n in range(2000) if in_share(f"q{n}", (0, 0.2))}
    assert read_log(many(), "train:0.2", without=[]) == judged.texts


@pytest.mark.parametrize(
    "split", ["train:0", "train:1.1", "train:-1", "train:x", "train:nan", "train:0.5-0.5", "train:0.9-0.2"]
)
def test_a_share_outside_of_0_to_1_is_an_error(split: str) -> None:
    assert f"'{split}'" in said_of(split_spec, split)
    assert f"'{split}'" in said_of(read_judged, many(2), split, {"d1"})


def test_a_split_may_carry_a_share() -> None:
    assert split_spec("train") == ("train", (0, 1))
    assert split_spec("train:0.25") == ("train", (0, 0.25))
    assert split_spec("a/b:1") == ("a/b", (0, 1))
    assert split_spec("train:0.25-1") == ("train", (0.25, 1))


def test_a_share_and_the_rest_are_the_whole_split() -> None:
    parts = [
        read_judged(many(), split, {"d1"}).texts for split in ("train:0.3", "train:0.3-0.5", "train:0.5-1")
    ]
    assert sum(map(len, parts)) == 2000 and all(parts)
    assert set().union(*parts) == read_judged(many(), "train", {"d1"}).texts.keys()


def test_a_log_holds_no_judged_dev_or_test_query() -> None:
    dev = read_judged(many(), "train:0.2", {"d1"}).texts
    log = read_log(many(), "train", without=dev)
    assert not log.keys() & dev.keys() and len(log) + len(dev) == 2000
    assert read_log(many(), "train:0.2", without=["q1"]).keys() == dev.keys() - {"q1"}


def test_a_log_is_the_queries_of_its_split_whatever_their_judgements_say(tmp_path: Path) -> None:
    folder = beir(tmp_path)
    rows = [("q4", "nowhere", 0), ("q9", "d1", 1), ("q3", "d1", -1)]
    write_qrels(folder / "qrels" / "train.tsv", rows)
    log = read_log(open_source(str(folder)), "train", without=["q3"])
    assert log == {"q4": "fourth"}


def test_an_empty_log_is_an_error(tmp_path: Path) -> None:
    source = open_source(str(beir(tmp_path / "tiny")))
    said = said_of(read_log, source, "train", without=["q3", "q4"])
    assert "tiny" in said and "train" in said


def test_a_log_file_is_read_and_checked(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "log.jsonl", [{"_id": "a", "text": "x"}, {"_id": 2, "text": "y"}])
    assert read_log_file(str(path)) == {"a": "x", "2": "y"}
    write_lines(path, [{"_id": "a", "text": "x"}, {"_id": "a", "text": "y"}])
    said = said_of(read_log_file, str(path))
    assert "'a'" in said and "line 2" in said and "line 1" in said
    write_lines(path, [{"_id": "", "text": "x"}])
    assert "line 1" in said_of(read_log_file, str(path))


def lines_run(function: Callable[[], object], files: set[str]) -> int:
    """How many lines of some source files run while the function does."""
    count = 0

    def trace(frame: Any, event: str, _: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace if frame.f_code.co_filename in files else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


def test_reading_a_log_file_takes_work_in_proportion_to_its_lines(tmp_path: Path) -> None:
    files = {datasets.__file__, sources.__file__}
    work = []
    for count in (100, 400):
        rows = [{"_id": str(n), "text": "x"} for n in range(count)]
        path = write_lines(tmp_path / f"{count}.jsonl", rows)
        work.append(lines_run(lambda path=path: read_log_file(str(path)), files))
    assert work[1] < 5 * work[0]


def test_rejects_become_a_table() -> None:
    table = schema.check(rejects_table("dedup", [("a", "empty", "line 1")]), "rejects")
    assert table.to_pylist() == [{"id": "a", "stage": "dedup", "reason": "empty", "detail": "line 1"}]
