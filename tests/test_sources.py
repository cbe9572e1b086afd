"""Collections of every format give the same tables, and what is wrong in their files is named."""

import gzip
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrieval_ray import schema
from retrieval_ray.datasets import read_corpus, read_judged, read_log, read_log_file
from retrieval_ray.errors import UserError
from retrieval_ray.sources import Source, open_source
from tests.beir import CORPUS, IDS, JUDGED, QRELS, QUERIES, TABLE, beir, said_of, write_lines, write_qrels


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


def test_a_mark_before_judgements_without_a_header_is_no_part_of_the_id(tmp_path: Path) -> None:
    folder = beir(tmp_path)
    (folder / "qrels" / "test.tsv").write_bytes(b"\xef\xbb\xbfq1\td1\t1\n")
    assert read_judged(open_source(str(folder)), "test", IDS).texts.keys() == {"q1"}


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


# --- what is wrong is named -------------------------------------------------------------------


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


def first_half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def with_a_broken_page(content: bytes) -> bytes:
    """The footer is whole, what stands before it is not."""
    return b"PAR1" + bytes(len(content) // 3) + content[len(content) // 3 + 4 :]


@pytest.mark.parametrize("name", ["corpus", "queries", "qrels/test"])
@pytest.mark.parametrize("spoil", [lambda content: b"", first_half, with_a_broken_page, lambda _: b"no" * 99])
def test_a_file_that_is_no_parquet_is_named(
    tmp_path: Path, name: str, spoil: Callable[[bytes], bytes]
) -> None:
    folder = parquet(tmp_path / "tiny")
    file = folder / f"{name}.parquet"
    file.write_bytes(spoil(file.read_bytes()))
    said = said_of(lambda: check_collection(open_source(str(folder))))
    assert str(file) in said and "not readable as Parquet" in said


@pytest.mark.parametrize(
    ("name", "column", "value"),
    [
        ("corpus", "_id", ["d1"]),
        ("corpus", "title", {"de": "Zwei"}),
        ("corpus", "text", ["one", "two"]),
        ("corpus", "text", b"bytes"),
        ("queries", "text", ["one", "two"]),
        ("qrels/test", "query-id", ["q1"]),
        ("qrels/test", "score", "high"),
        ("qrels/test", "score", [1]),
        ("qrels/test", "score", None),
        ("qrels/test", "score", float("nan")),
    ],
)
def test_a_column_of_a_wrong_type_names_file_row_and_column(
    tmp_path: Path, name: str, column: str, value: object
) -> None:
    folder = parquet(tmp_path / "tiny")
    file = folder / f"{name}.parquet"
    table = pq.read_table(file)
    wrong = pa.array([value] * table.num_rows)
    pq.write_table(table.set_column(table.schema.get_field_index(column), column, wrong), file)
    said = said_of(lambda: check_collection(open_source(str(folder))))
    assert f"{file}, row 1" in said and f"'{column}'" in said


def test_scores_that_are_numbers_as_text_are_read(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "tiny")
    file = folder / "qrels" / "test.parquet"
    table = pq.read_table(file)
    pq.write_table(table.set_column(2, "score", pa.array(["1.0", "0", "2"])), file)
    check_collection(open_source(str(folder)))


@pytest.mark.parametrize("key", ["_id", "title", "text"])
def test_a_list_where_text_must_be_names_file_line_and_key(tmp_path: Path, key: str) -> None:
    folder = beir(tmp_path)
    good = {"_id": "d1", "title": "", "text": "good"}
    write_lines(folder / "corpus.jsonl", [good, {**good, "_id": "d2", key: ["one", "two"]}])
    said = said_of(read_corpus, open_source(str(folder)))
    assert "corpus.jsonl, line 2" in said and f"'{key}'" in said


@pytest.mark.parametrize("pack", [gzip.compress, lambda text: bytes(range(255, 0, -1))])
def test_a_file_that_is_not_text_is_told_apart_from_bad_json(
    tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    folder = beir(tmp_path)
    for name in ("corpus.jsonl", "qrels/test.tsv"):
        (folder / name).write_bytes(pack((folder / name).read_bytes()))
    said = said_of(read_corpus, open_source(str(folder)))
    assert "corpus.jsonl, line 1" in said and "not UTF-8 text" in said
    assert "test.tsv, line 1" in said_of(read_judged, open_source(str(folder)), "test", IDS)


def test_a_judgement_of_any_length_is_the_users_error(tmp_path: Path) -> None:
    folder = beir(tmp_path)
    write_lines(folder / "qrels" / "test.tsv", ["x" * 200_000])
    assert "test.tsv, line 1" in said_of(read_judged, open_source(str(folder)), "test", IDS)


def test_folders_in_the_place_of_files_and_files_in_the_place_of_folders_are_named(tmp_path: Path) -> None:
    folder = beir(tmp_path / "tiny")
    said = said_of(open_source, str(folder / "corpus.jsonl"))
    assert "corpus.jsonl' is a file, not a folder" in said
    for name in ("queries.jsonl", "qrels/test.tsv", "corpus.jsonl"):
        (folder / name).unlink()
        (folder / name).mkdir()
    assert "it holds: corpus.jsonl/, qrels/, queries.jsonl/" in said_of(open_source, str(folder))
    write_lines(folder / "corpus.parquet", [])
    (folder / "queries.parquet").mkdir()
    source = open_source(str(folder))
    assert "queries.parquet: a folder, not a file" in said_of(read_judged, source, "test", IDS)
    assert said_of(lambda: list(source.qrels("test"))).endswith("there are: train")


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
