"""Given pairs: what each format says, and every row that cannot be a pair with its reason."""

import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrieval_ray.errors import UserError
from retrieval_ray.given import Pair, ids_without_text, read_pairs

QUERIES, PASSAGES = {"q1": "who sells silk", "7": "seven"}, {"p1": "silk is sold here", "p 2": "spaced"}


def read(path, queries=QUERIES, passages=PASSAGES):
    return list(read_pairs(str(path), queries, passages))


def test_a_trec_run(tmp_path):
    path = tmp_path / "run.trec"
    path.write_text(
        "q1 Q0 p1 1 9.5 tag\n\nq1 Q0 p%202 2 9.4 tag\nq9 Q0 p1 1 3 tag\nq1 Q0 p9 1 3 tag\nq1 p1\n"
    )
    assert read(path) == [
        Pair("q1", "p1", "who sells silk", "silk is sold here"),
        Pair("q1", "p 2", "who sells silk", "spaced"),
        ("run.trec, line 4", "unknown_query", "q9"),
        ("run.trec, line 5", "unknown_passage", "p9"),
        ("run.trec, line 6", "malformed", "2 fields, a line of a TREC run has 6"),
    ]


def test_a_table_of_texts_as_jsonl(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"query": "a", "passage": "b"},
        {"query_id": 7, "passage_id": "p1", "passage": "another text"},
        {"query": "a \ud83d", "passage": ""},
        {"query": None, "passage": "b"},
        {"query": ["a"], "passage": "b"},
        {"query": True, "passage": "b"},
        [1],
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n" + "\n")
    found = read(path)
    sha = {text: hashlib.sha256(text.encode()).hexdigest()[:16] for text in ("a", "b", "a ?", "")}
    assert found[:3] == [
        Pair(sha["a"], sha["b"], "a", "b"),
        Pair("7", "p1", "seven", "another text"),  # a text that is given counts
        Pair(sha["a ?"], sha[""], "a ?", ""),
    ]
    assert [row[1] for row in found[3:]] == ["malformed"] * 5
    assert found[3][2] == "neither query nor query_id" and found[7][0] == "pairs.jsonl, line 8"


def test_parquet_and_other_columns(tmp_path):
    path = tmp_path / "run.parquet"
    table = pa.table(
        {"retriever": ["x", "x"], "query_id": ["q1", "7"], "passage_id": ["p1", None], "rank": [1, 2]}
    )
    pq.write_table(table, path)
    assert read(path) == [
        Pair("q1", "p1", "who sells silk", "silk is sold here"),
        ("run.parquet, row 2", "malformed", "neither passage nor passage_id"),
    ]
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match="not readable as Parquet"):
        read(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "nowhere.trec")
    with pytest.raises(UserError, match="a folder"):
        read(tmp_path)


def test_ids_of_a_run_are_taken_as_they_stand_before_they_are_decoded(tmp_path):
    path = tmp_path / "run.trec"
    path.write_text("AC%2FDC Q0 p%2520x%20y 1 9.5 tag\nAC%2FDC Q0 p%201 2 9.4 tag\n")
    queries, passages = {"AC%2FDC": "raw", "AC/DC": "decoded"}, {"p%20x y": "one", "p 1": "two"}
    assert read(path, queries, passages) == [
        Pair("AC%2FDC", "p%20x y", "raw", "one"),
        Pair("AC%2FDC", "p 1", "raw", "two"),
    ]
    assert ids_without_text(str(path)) == (
        {"AC%2FDC", "AC/DC"},
        {"p%2520x%20y", "p%20x y", "p%201", "p 1"},
    )


def test_an_id_stands_for_one_text(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"query_id": 1, "passage_id": "p", "query": "a", "passage": "x"},
        {"query_id": 1, "passage_id": "p", "query": "b", "passage": "x"},
        {"query_id": 1, "passage_id": "p", "query": "a", "passage": "y"},
        {"query_id": 1, "passage_id": "p", "query": "a", "passage": "x"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pair = Pair("1", "p", "a", "x")
    assert read(path) == [
        pair,
        ("pairs.jsonl, line 2", "conflicting", "query_id 1 stood for another text before"),
        ("pairs.jsonl, line 3", "conflicting", "passage_id p stood for another text before"),
        pair,
    ]
    assert ids_without_text(str(path)) == (set(), set())


def test_a_parquet_row_that_is_not_utf_8_is_malformed(tmp_path):
    path = tmp_path / "pairs.parquet"
    broken = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.array([0, 2, 3], pa.int32()).buffers()[1], pa.py_buffer(b"\xff\xfea")]
    )
    pq.write_table(pa.table({"query": broken, "passage": ["x", "y"]}), path)
    malformed, pair = read(path)
    assert malformed[:2] == ("pairs.parquet, row 1", "malformed") and "not UTF-8" in malformed[2]
    assert (pair.query, pair.passage) == ("a", "y")
