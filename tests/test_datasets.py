"""Collections of every format give the same tables, and what is wrong in them is named."""

import json
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_ray import datasets, schema
from retrieval_ray.datasets import (
    Source,
    in_share,
    open_source,
    read_corpus,
    read_judged,
    read_log,
    read_log_file,
    rejects_table,
    split_spec,
)
from retrieval_ray.errors import UserError

CORPUS = [("d2", "Zwei", "text of two"), ("d1", "", "text of one\u2028more"), ("d10", "Ten", "")]
QUERIES = [("q1", "first question"), ("q2", "zweite „Frage“"), ("q3", "third"), ("q4", "fourth")]
QRELS = {
    "test": [("q1", "d1", 1), ("q1", "d2", 0), ("q2", "d10", 2)],
    "train": [("q3", "d1", 1), ("q4", "d2", 1)],
}
TABLE = [
    {"passage_id": "d1", "title": "", "text": "text of one\u2028more"},
    {"passage_id": "d10", "title": "Ten", "text": ""},
    {"passage_id": "d2", "title": "Zwei", "text": "text of two"},
]
JUDGED = [
    {"query_id": "q1", "passage_id": "d1", "relevance": 1},
    {"query_id": "q1", "passage_id": "d2", "relevance": 0},
    {"query_id": "q2", "passage_id": "d10", "relevance": 2},
]
IDS = {"d1", "d2", "d10"}


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_qrels(path: Path, rows: list[tuple[str, str, object]], header: bool = True) -> None:
    first = [("query-id", "corpus-id", "score")] if header else []
    write_lines(path, ["\t".join(map(str, row)) for row in [*first, *rows]])


def beir(folder: Path) -> Path:
    write_lines(folder / "corpus.jsonl", [{"_id": i, "title": t, "text": x} for i, t, x in CORPUS])
    write_lines(folder / "queries.jsonl", [{"_id": i, "text": x} for i, x in QUERIES])
    for split, rows in QRELS.items():
        write_qrels(folder / "qrels" / f"{split}.tsv", rows)
    return folder


def parquet(folder: Path) -> Path:
    """The twin: the columns as BEIR names them, and the judgements as parquet too."""
    (folder / "qrels").mkdir(parents=True)
    rows = [{"_id": i, "title": t, "text": x} for i, t, x in CORPUS]
    pq.write_table(pa.Table.from_pylist(rows), folder / "corpus.parquet")
    rows = [{"_id": i, "text": x} for i, x in QUERIES]
    pq.write_table(pa.Table.from_pylist(rows), folder / "queries.parquet")
    for split, judged in QRELS.items():
        rows = [{"query-id": q, "corpus-id": p, "score": s} for q, p, s in judged]
        pq.write_table(pa.Table.from_pylist(rows), folder / "qrels" / f"{split}.parquet")
    return folder


def own_parquet(folder: Path) -> Path:
    """The same in this package's own tables."""
    (folder / "qrels").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(TABLE), folder / "corpus.parquet")
    rows = [{"query_id": i, "text": x} for i, x in QUERIES]
    pq.write_table(pa.Table.from_pylist(rows), folder / "queries.parquet")
    names = schema.TABLES["qrels"].names
    for split, judged in QRELS.items():
        own = schema.from_rows("qrels", [dict(zip(names, row, strict=True)) for row in judged])
        pq.write_table(own, folder / "qrels" / f"{split}.parquet")
    return folder


def hugging_face(folder: Path, *, beir_style: bool = False) -> str:
    """A hub repository as mteb lays it out, or as BeIR does (judgements in a repository beside)."""
    beir(folder / "raw")
    configs = [
        {"config_name": name, "data_files": [{"split": name, "path": f"{name}.jsonl"}]}
        for name in ("corpus", "queries")
    ]
    judged = [{"split": split, "path": f"{split}.jsonl"} for split in QRELS]
    home = Path(f"{folder}-qrels") if beir_style else folder
    for split, rows in QRELS.items():
        write_lines(
            home / f"{split}.jsonl",
            [{"query-id": q, "corpus-id": p, "score": float(s)} for q, p, s in rows],
        )
    both = [{"config_name": "default", "data_files": judged}]
    for name in ("corpus", "queries"):
        (folder / "raw" / f"{name}.jsonl").rename(folder / f"{name}.jsonl")
    readme = folder / "README.md"
    here = configs if beir_style else configs + both
    readme.write_text(f"---\nconfigs: {json.dumps(here)}\n---\n")
    if beir_style:
        (home / "README.md").write_text(f"---\nconfigs: {json.dumps(both)}\n---\n")
    return f"hf:{folder}"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face's loader reads local folders and keeps what it builds under tmp_path."""
    import datasets as hub
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub.disable_progress_bars()


class TinyDoc(NamedTuple):
    doc_id: str
    title: str
    text: str


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[str]:
    """A collection in ir_datasets' registry, made of its own formats and local files."""
    import ir_datasets
    from ir_datasets.datasets.base import Dataset
    from ir_datasets.formats import JsonlDocs, JsonlQueries, TrecQrels
    from ir_datasets.util import LocalDownload

    beir(tmp_path / "ir")

    def local(name: str) -> Any:
        return LocalDownload(tmp_path / "ir" / name)

    fields = {"doc_id": "_id", "title": "title", "text": "text"}
    docs = JsonlDocs(local("corpus.jsonl"), doc_cls=TinyDoc, mapping=fields)
    queries = JsonlQueries(local("queries.jsonl"), mapping={"query_id": "_id", "text": "text"})
    parts: dict[str, Any] = {"tiny-local": Dataset(docs, queries)}
    for split, rows in QRELS.items():
        write_lines(tmp_path / "ir" / f"{split}.qrels", [f"{q} 0 {p} {s}" for q, p, s in rows])
        qrels = TrecQrels(local(f"{split}.qrels"), {0: "no", 1: "yes", 2: "very"})
        parts[f"tiny-local/{split}"] = Dataset(docs, queries, qrels)
    parts["tiny-flat"] = parts["tiny-local/test"]  # a collection without splits below it
    for name, part in parts.items():
        ir_datasets.registry.register(name, part)
    yield "ir_datasets:tiny-local"
    for name in parts:
        ir_datasets.registry._registered.pop(name)


def check_collection(source: Source) -> None:
    table, rejects = read_corpus(source)
    assert schema.check(table, "corpus").to_pylist() == TABLE
    assert schema.check(rejects, "rejects").num_rows == 0
    judged = read_judged(source, "test", IDS)
    assert judged.texts == {"q1": "first question", "q2": "zweite „Frage“"}
    assert schema.check(judged.qrels, "qrels").to_pylist() == JUDGED
    assert judged.warnings == [] and judged.rejects.num_rows == 0
    assert read_log(source, "train", without=[]) == {"q3": "third", "q4": "fourth"}


# --- every format gives the same --------------------------------------------------------------


@pytest.mark.parametrize("write", [beir, parquet, own_parquet])
def test_a_folder_gives_its_tables(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    source = open_source(str(write(tmp_path / "tiny")))
    assert source.name == "tiny"
    check_collection(source)


def test_a_parquet_corpus_goes_with_tab_separated_judgements(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "tiny")
    for split, rows in QRELS.items():
        (folder / "qrels" / f"{split}.parquet").unlink()
        write_qrels(folder / "qrels" / f"{split}.tsv", rows)
    check_collection(open_source(str(folder)))


def test_ir_datasets_gives_its_tables(tiny: str) -> None:
    check_collection(open_source(tiny))


def test_an_ir_datasets_collection_without_splits_is_its_own_split(tiny: str) -> None:
    judged = read_judged(open_source("ir_datasets:tiny-flat"), "test", IDS)
    assert judged.qrels.to_pylist() == JUDGED


@pytest.mark.parametrize("beir_style", [False, True])
def test_hugging_face_gives_its_tables(tmp_path: Path, hub_cache: None, beir_style: bool) -> None:
    check_collection(open_source(hugging_face(tmp_path / "tiny", beir_style=beir_style)))


def test_hugging_face_sources_are_named_by_their_last_part(tmp_path: Path) -> None:
    assert open_source("hf:mteb/scifact").name == "scifact"


def test_the_demo_is_a_collection() -> None:
    source = open_source("demo")
    table, rejects = read_corpus(source)
    ids = set(table.column("passage_id").to_pylist())
    assert rejects.num_rows == 0 and table.num_rows == len(ids) > 4000
    test, dev = read_judged(source, "test", ids), read_judged(source, "dev", ids)
    assert test.warnings == dev.warnings == [] and not test.texts.keys() & dev.texts.keys()
    log = read_log(source, "log", without=[*test.texts, *dev.texts])
    assert len(log) >= 400 and not log.keys() & (test.texts.keys() | dev.texts.keys())
    with pytest.raises(UserError, match="dev, test and log"):
        read_judged(source, "train", ids)


# --- forms that files may have ----------------------------------------------------------------


def test_marks_blank_lines_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    folder = beir(tmp_path)
    for file in [*folder.glob("*.jsonl"), *folder.glob("qrels/*.tsv")]:
        text = file.read_text(encoding="utf-8").replace("\n", "\n\n").replace("\n", "\r\n")
        file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    check_collection(open_source(str(folder)))


def test_ids_that_are_numbers_become_text(tmp_path: Path) -> None:
    folder = beir(tmp_path)
    write_lines(folder / "corpus.jsonl", [{"_id": 7, "text": "seven"}, {"_id": 30, "text": "x"}])
    write_lines(folder / "queries.jsonl", [{"_id": 1, "text": 2024}])
    write_qrels(folder / "qrels" / "test.tsv", [("1", "7", "1.0")])
    source = open_source(str(folder))
    assert read_corpus(source)[0].column("passage_id").to_pylist() == ["30", "7"]
    judged = read_judged(source, "test", {"7", "30"})
    assert judged.texts == {"1": "2024"} and judged.qrels.num_rows == 1


def test_judgements_need_no_header_and_keep_quotes(tmp_path: Path) -> None:
    folder = beir(tmp_path)
    write_lines(folder / "queries.jsonl", [{"_id": '"q1', "text": "a"}, {"_id": "q2", "text": "b"}])
    write_qrels(folder / "qrels" / "test.tsv", [('"q1', "d1", 1), ("q2", "d2", 1)], header=False)
    assert read_judged(open_source(str(folder)), "test", IDS).texts == {'"q1': "a", "q2": "b"}


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


# --- what is wrong is named -------------------------------------------------------------------


def said_of(function: Callable[..., object], *arguments: object, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        '{"_id": "x", "text": ',
        "not json",
        "[1, 2]",
        "3",
        "null",
        '{"id": "x", "text": "t"}',
        '{"_id": "x"}',
        '{"_id": "x", "text": "t"} {"_id": "y", "text": "t"}',
    ],
)
def test_a_malformed_line_names_file_and_line(tmp_path: Path, line: str) -> None:
    folder = beir(tmp_path)
    good = {"_id": "d1", "title": "", "text": "good"}
    write_lines(folder / "corpus.jsonl", [good, "", line, {**good, "_id": "d2"}])
    said = said_of(read_corpus, open_source(str(folder)))
    assert str(folder / "corpus.jsonl") in said and "line 3" in said
    write_lines(folder / "queries.jsonl", [good, line])
    said = said_of(read_judged, open_source(str(folder)), "test", IDS)
    assert str(folder / "queries.jsonl") in said and "line 2" in said
    said = said_of(read_log_file, str(folder / "queries.jsonl"))
    assert str(folder / "queries.jsonl") in said and "line 2" in said


def test_bytes_that_are_no_utf8_name_file_and_line(tmp_path: Path) -> None:
    folder = beir(tmp_path)
    (folder / "corpus.jsonl").write_bytes(b'{"_id": "a", "text": "x"}\n{"_id": "b", "text": "\xe9"}\n')
    said = said_of(read_corpus, open_source(str(folder)))
    assert "corpus.jsonl" in said and "line 2" in said


@pytest.mark.parametrize("field", ["_id", "title", "text"])
def test_a_lone_surrogate_names_file_and_line(tmp_path: Path, field: str) -> None:
    """Valid JSON, and common in crawled text (half an emoji), but no table can hold it."""
    folder = beir(tmp_path)
    row = json.dumps({"_id": "a", "title": "t", "text": "x"} | {field: "bad \ud83d end"})
    write_lines(folder / "corpus.jsonl", [{"_id": "b", "text": "x"}, row])
    said = said_of(read_corpus, open_source(str(folder)))
    assert "corpus.jsonl" in said and "line 2" in said


@pytest.mark.parametrize(
    "line", ["q1\td1", "q1 d1 1", "q1\td1\tyes", "q1\td1\t1\tx", "q1\td1\t", "q1\td1\tinf"]
)
def test_a_malformed_judgement_names_file_and_line(tmp_path: Path, line: str) -> None:
    folder = beir(tmp_path)
    write_lines(folder / "qrels" / "test.tsv", ["query-id\tcorpus-id\tscore", "q1\td1\t1", line])
    said = said_of(read_judged, open_source(str(folder)), "test", IDS)
    assert "test.tsv" in said and "line 3" in said


def test_judgements_that_are_no_utf8_name_the_file(tmp_path: Path) -> None:
    folder = beir(tmp_path)
    (folder / "qrels" / "test.tsv").write_bytes(b"q1\td1\t1\nq\xe9\td1\t1\n")
    assert "test.tsv" in said_of(read_judged, open_source(str(folder)), "test", IDS)


def test_a_duplicate_passage_id_names_both_places(tmp_path: Path) -> None:
    folder = beir(tmp_path)
    row = {"_id": "d1", "text": "x"}
    write_lines(folder / "corpus.jsonl", [row, {"_id": "d2", "text": "y"}, row])
    said = said_of(read_corpus, open_source(str(folder)))
    assert "'d1'" in said and "line 1" in said and "line 3" in said


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


def test_an_empty_id_in_parquet_names_its_row(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "tiny")
    rows = [{"_id": "d1", "text": "x"}, {"_id": None, "text": "y"}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "corpus.parquet")
    said = said_of(read_corpus, open_source(str(folder)))
    assert "row 2" in said and "empty id" in said


@pytest.mark.parametrize("dropped", ["_id", "text"])
def test_a_parquet_file_without_a_column_names_it(tmp_path: Path, dropped: str) -> None:
    folder = parquet(tmp_path / "tiny")
    table = pq.read_table(folder / "corpus.parquet")
    pq.write_table(table.drop_columns([dropped]), folder / "corpus.parquet")
    said = said_of(read_corpus, open_source(str(folder)))
    assert "corpus.parquet" in said and dropped in said


def test_parquet_judgements_without_a_column_name_it(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "tiny")
    table = pa.table({"query-id": ["q1"], "corpus-id": ["d1"]})
    pq.write_table(table, folder / "qrels" / "test.parquet")
    said = said_of(read_judged, open_source(str(folder)), "test", IDS)
    assert "test.parquet" in said and "score" in said


@pytest.mark.parametrize("rows", [[], [{"_id": "a", "text": " "}]])
def test_an_empty_corpus_is_an_error(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    folder = beir(tmp_path / "tiny")
    write_lines(folder / "corpus.jsonl", rows)
    said = said_of(read_corpus, open_source(str(folder)))
    assert "tiny" in said and "empty" in said


def test_missing_folders_files_and_splits_are_named(tmp_path: Path) -> None:
    assert "nowhere" in said_of(open_source, str(tmp_path / "nowhere"))
    assert "corpus.jsonl" in said_of(open_source, str(tmp_path))
    folder = beir(tmp_path / "tiny")
    said = said_of(read_judged, open_source(str(folder)), "dev", IDS)
    assert "'dev'" in said and "test, train" in said
    (folder / "queries.jsonl").unlink()
    assert "queries.jsonl" in said_of(read_judged, open_source(str(folder)), "test", IDS)
    assert "log.jsonl" in said_of(read_log_file, str(tmp_path / "log.jsonl"))


def test_ir_datasets_names_what_it_does_not_know(tiny: str) -> None:
    assert "no-such-set" in said_of(read_corpus, open_source("ir_datasets:no-such-set"))
    said = said_of(read_judged, open_source(tiny), "dev", IDS)  # the collection has no judgements
    assert "dev" in said and "qrels" in said


def test_hugging_face_names_what_it_does_not_know(tmp_path: Path, hub_cache: None) -> None:
    place = hugging_face(tmp_path / "tiny")
    said = said_of(read_judged, open_source(place), "dev", IDS)
    assert "tiny" in said and "dev" in said
    assert "nowhere" in said_of(read_corpus, open_source(f"hf:{tmp_path}/nowhere"))


def test_hugging_face_rows_without_a_text_are_an_error_of_the_user(tmp_path: Path, hub_cache: None) -> None:
    place = hugging_face(tmp_path / "tiny")
    write_lines(tmp_path / "tiny" / "corpus.jsonl", [{"_id": "d1", "body": "x"}])
    assert "text" in said_of(read_corpus, open_source(place))


@pytest.mark.parametrize(("path", "package"), [("ir_datasets:x", "ir_datasets"), ("hf:x", "datasets")])
def test_without_the_extra_packages_the_way_to_get_them_is_told(
    monkeypatch: pytest.MonkeyPatch, path: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert "retrieval-ray[hub]" in said_of(open_source, path)


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
    assert [n for n in range(20) if in_share(f"q{n}", 0.2)] == recorded


@given(st.lists(st.text()), st.floats(0.01, 1), st.floats(0.01, 1))
@settings(max_examples=100, deadline=None)
def test_a_larger_share_holds_the_smaller(ids: list[str], one: float, other: float) -> None:
    small, large = sorted((one, other))
    assert {i for i in ids if in_share(i, small)} <= {i for i in ids if in_share(i, large)}
    assert all(in_share(i, 1.0) for i in ids)


def test_a_share_of_a_split_is_about_that_large_and_always_the_same() -> None:
    judged = read_judged(many(), "train:0.2", {"d1"})
    assert 300 < len(judged.texts) < 500  # 400 +- 5.6 standard deviations
    assert read_judged(many(), "train:0.2", {"d1"}).texts == judged.texts
    assert judged.texts.keys() == {f"q{n}" for n in range(2000) if in_share(f"q{n}", 0.2)}
    assert read_log(many(), "train:0.2", without=[]) == judged.texts


@pytest.mark.parametrize("split", ["train:0", "train:1.1", "train:-1", "train:x", "train:nan"])
def test_a_share_outside_of_0_to_1_is_an_error(split: str) -> None:
    assert f"'{split}'" in said_of(split_spec, split)
    assert f"'{split}'" in said_of(read_judged, many(2), split, {"d1"})


def test_a_split_may_carry_a_share() -> None:
    assert split_spec("train") == ("train", 1.0)
    assert split_spec("train:0.25") == ("train", 0.25)
    assert split_spec("a/b:1") == ("a/b", 1.0)


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


def lines_run(function: Callable[[], object], file: str) -> int:
    """How many lines of a source file run while the function does."""
    count = 0

    def trace(frame: Any, event: str, _: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace if frame.f_code.co_filename == file else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


def test_reading_a_log_file_takes_work_in_proportion_to_its_lines(tmp_path: Path) -> None:
    work = []
    for count in (100, 400):
        rows = [{"_id": str(n), "text": "x"} for n in range(count)]
        path = write_lines(tmp_path / f"{count}.jsonl", rows)
        work.append(lines_run(lambda path=path: read_log_file(str(path)), datasets.__file__))
    assert work[1] < 5 * work[0]


def test_rejects_become_a_table() -> None:
    table = schema.check(rejects_table("dedup", [("a", "empty", "line 1")]), "rejects")
    assert table.to_pylist() == [{"id": "a", "stage": "dedup", "reason": "empty", "detail": "line 1"}]
