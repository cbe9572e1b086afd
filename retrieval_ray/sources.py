"""The formats of test collections: BEIR folders, parquet, ir_datasets, Hugging Face, the bundled demo.

A ``Source`` is three functions that yield raw rows, whatever the format; ``datasets.py`` checks them.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from retrieval_ray.errors import UserError

Passage = tuple[str, str, str, str]  # where it stands, id, title, text
Query = tuple[str, str, str]  # where it stands, id, text
Judgement = tuple[str, str, str, int]  # where it stands, query id, passage id, relevance


@dataclass(frozen=True)
class Source:
    """A collection: its corpus, its queries, and the judgements of a split."""

    name: str
    corpus: Callable[[], Iterable[Passage]]
    queries: Callable[[str], Iterable[Query]]
    qrels: Callable[[str], Iterable[Judgement]]


def open_source(path: str) -> Source:
    """The collection at a path: ``demo``, a folder, ``ir_datasets:ID`` or ``hf:ID``.

    Raises ``UserError`` where there is none.
    """
    if path == "demo":
        return _demo()
    if path.startswith("ir_datasets:"):
        return _ir_datasets(path.removeprefix("ir_datasets:"))
    if path.startswith("hf:"):
        return _hugging_face(path.removeprefix("hf:"))
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(
            f"dataset.path: no folder '{path}'. Give a BEIR folder (corpus.jsonl, queries.jsonl, "
            "qrels/SPLIT.tsv), the same as parquet, ir_datasets:ID, hf:ID, or demo"
        )
    for suffix in ("jsonl", "parquet"):
        if (folder / f"corpus.{suffix}").is_file():
            return _folder(folder, suffix)
    raise UserError(f"dataset.path: '{path}' holds neither corpus.jsonl nor corpus.parquet")


def jsonl_queries(path: Path) -> Iterator[Query]:
    """The queries of a ``queries.jsonl`` (``_id`` and ``text``).

    Raises ``UserError`` for a missing file, and for a line that is not such an object.
    """
    for where, row in _json_lines(path, ("_id", "text")):
        yield where, str(row["_id"]), str(row["text"] or "")


def _json_lines(path: Path, required: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
                json.dumps(row, ensure_ascii=False).encode()  # no half of a surrogate pair
            except ValueError as error:  # bad JSON or bad UTF-8
                raise UserError(f"{where}: not valid JSON: {error}") from error
            if not isinstance(row, dict) or not set(required) <= row.keys():
                raise UserError(f"{where}: needs an object with the keys {', '.join(required)}")
            if row["_id"] is None:
                raise UserError(f"{where}: empty id")
            yield where, row


def _folder(folder: Path, suffix: str) -> Source:
    def rows(name: str, required: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
        path = folder / f"{name}.{suffix}"
        if suffix == "jsonl":
            yield from _json_lines(path, required)
            return
        if not path.is_file():
            raise UserError(f"no such file: {path}")
        for number, row in enumerate(pq.read_table(path).to_pylist(), start=1):
            own = "passage_id" if name == "corpus" else "query_id"
            if "_id" not in row and own in row:
                row["_id"] = row[own]
            if not set(required) <= row.keys():
                raise UserError(f"{path}: needs the columns {', '.join(required)}")
            if row["_id"] is None:
                raise UserError(f"{path}, row {number}: empty id")
            yield f"{path}, row {number}", row

    def corpus() -> Iterator[Passage]:
        for where, row in rows("corpus", ("_id", "text")):
            yield where, str(row["_id"]), str(row.get("title") or ""), str(row["text"] or "")

    def queries(split: str) -> Iterator[Query]:
        for where, row in rows("queries", ("_id", "text")):
            yield where, str(row["_id"]), str(row["text"] or "")

    def qrels(split: str) -> Iterator[Judgement]:
        tsv, parquet = folder / "qrels" / f"{split}.tsv", folder / "qrels" / f"{split}.parquet"
        if tsv.is_file():
            yield from _tsv_qrels(tsv)
        elif parquet.is_file():
            for number, row in enumerate(pq.read_table(parquet).to_pylist(), start=1):
                yield (f"{parquet}, row {number}", *_judgement_of(row, str(parquet)))
        else:
            there = sorted(p.stem for p in (folder / "qrels").glob("*.*"))
            raise UserError(
                f"dataset '{folder.name}' has no split '{split}': no {tsv}; there are: "
                + (", ".join(there) or "none")
            )

    return Source(folder.resolve().name, corpus, queries, qrels)


def _tsv_qrels(path: Path) -> Iterator[Judgement]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as lines:
        for number, row in enumerate(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE), 1):
            if not row or (number == 1 and row[-1].strip().lower() == "score"):
                continue
            where = f"{path}, line {number}"
            try:
                query_id, passage_id, relevance = row
                "".join(row).encode()
                yield where, query_id, passage_id, int(float(relevance))
            except (ValueError, OverflowError) as error:
                raise UserError(f"{where}: needs query-id, corpus-id and a score, tab-separated") from error


def _judgement_of(row: dict[str, Any], where: str) -> tuple[str, str, int]:
    for query, passage, score in (
        ("query-id", "corpus-id", "score"),
        ("query_id", "passage_id", "relevance"),
    ):
        if {query, passage, score} <= row.keys():
            return str(row[query]), str(row[passage]), int(row[score])
    raise UserError(f"{where}: needs the columns query-id, corpus-id, score; has {sorted(row)}")


def _demo() -> Source:
    from retrieval_ray.demo.corpus import passages

    here = Path(str(resources.files("retrieval_ray.demo")))

    def corpus() -> Iterator[Passage]:
        for passage_id, title, text in passages():
            yield f"the demo corpus, {passage_id}", passage_id, title, text

    def queries(split: str) -> Iterator[Query]:
        return jsonl_queries(here / ("log.jsonl" if split == "log" else "queries.jsonl"))

    def qrels(split: str) -> Iterator[Judgement]:
        if split == "log":  # not judged: the ids alone
            return ((where, key, "", 0) for where, key, _ in queries("log"))
        if split not in ("dev", "test"):
            raise UserError(f"the demo has the splits dev, test and log, not '{split}'")
        return _tsv_qrels(here / f"{split}.tsv")

    return Source("demo", corpus, queries, qrels)


def _ir_datasets(dataset_id: str) -> Source:
    """``ir_datasets:beir/scifact``: corpus of that id, queries and qrels of ``ID/SPLIT``."""
    try:
        import ir_datasets
    except ImportError as error:
        raise UserError("ir_datasets ids need: pip install 'retrieval-ray[hub]'") from error

    def load(name: str) -> Any:
        try:
            return ir_datasets.load(name)
        except KeyError as error:
            raise UserError(f"ir_datasets knows no '{name}'") from error

    def of_split(split: str, needed: str) -> Any:
        try:
            found = ir_datasets.load(f"{dataset_id}/{split}")
        except KeyError:
            found = load(dataset_id)  # a collection without splits below it
        if not getattr(found, f"has_{needed}")():
            raise UserError(f"ir_datasets '{dataset_id}', split '{split}': no {needed}")
        return found

    def corpus() -> Iterator[Passage]:
        for doc in load(dataset_id).docs_iter():
            title = str(getattr(doc, "title", "") or "")
            text = str(doc.text if hasattr(doc, "text") else doc.default_text())
            yield f"ir_datasets {dataset_id}", str(doc.doc_id), title, text

    def queries(split: str) -> Iterator[Query]:
        for query in of_split(split, "queries").queries_iter():
            text = query.text if hasattr(query, "text") else query.default_text()
            yield f"ir_datasets {dataset_id}/{split}", str(query.query_id), str(text)

    def qrels(split: str) -> Iterator[Judgement]:
        for row in of_split(split, "qrels").qrels_iter():
            where = f"ir_datasets {dataset_id}/{split}"
            yield where, str(row.query_id), str(row.doc_id), int(row.relevance)

    return Source(dataset_id, corpus, queries, qrels)


def _hugging_face(dataset_id: str) -> Source:
    """``hf:mteb/scifact`` (configs corpus, queries, default) or ``hf:BeIR/scifact`` (+ ``-qrels``)."""
    try:
        import datasets
    except ImportError as error:
        raise UserError("Hugging Face ids need: pip install 'retrieval-ray[hub]'") from error

    def load(name: str, config: str | None, split: str) -> Iterable[dict[str, Any]]:
        try:
            rows: Iterable[dict[str, Any]] = datasets.load_dataset(name, config, split=split)
            return rows
        except (ValueError, FileNotFoundError, ConnectionError) as error:
            raise UserError(f"hf:{name} (config {config}, split {split}): {error}") from error

    def one_split(config: str) -> Iterator[dict[str, Any]]:
        for row in load(dataset_id, config, config):
            if "text" not in row:
                raise UserError(f"hf:{dataset_id}, {config}: no column 'text'; has {sorted(row)}")
            yield row

    def id_of(row: dict[str, Any]) -> str:
        return str(row.get("_id", row.get("id", "")))

    def corpus() -> Iterator[Passage]:
        for row in one_split("corpus"):
            where = f"hf:{dataset_id}, corpus"
            yield where, id_of(row), str(row.get("title") or ""), str(row["text"] or "")

    def queries(split: str) -> Iterator[Query]:
        for row in one_split("queries"):
            yield f"hf:{dataset_id}, queries", id_of(row), str(row["text"] or "")

    def qrels(split: str) -> Iterator[Judgement]:
        try:
            rows = load(dataset_id, "default", split)
        except UserError:
            rows = load(f"{dataset_id}-qrels", None, split)
        for row in rows:
            yield (f"hf:{dataset_id}, {split}", *_judgement_of(dict(row), f"hf:{dataset_id}"))

    return Source(dataset_id.rstrip("/").rpartition("/")[2], corpus, queries, qrels)
