"""The formats of test collections: BEIR folders, parquet, ir_datasets, Hugging Face, the bundled demo.

A ``Source`` is three functions that yield raw rows, whatever the format; ``datasets.py`` checks them.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from retrieval_ray.errors import UserError

Passage = tuple[str, str, str, str]  # where it stands, id, title, text
Query = tuple[str, str, str]  # where it stands, id, text
Judgement = tuple[str, str, str, int]  # where it stands, query id, passage id, relevance
Row = dict[str, Any]
_NEEDED = {"_id", "text"}  # of a passage and of a query
_BATCH = 1024  # rows of Parquet held at a time


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
        what = f"'{path}' is a file, not a folder" if folder.exists() else f"no folder '{path}'"
        raise UserError(
            f"dataset.path: {what}. Give a BEIR folder (corpus.jsonl, queries.jsonl, "
            "qrels/SPLIT.tsv), the same as parquet, ir_datasets:ID, hf:ID, or demo"
        )
    for suffix in ("jsonl", "parquet"):
        if (folder / f"corpus.{suffix}").is_file():
            return _folder(folder, suffix)
    there = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in folder.iterdir())
    raise UserError(
        f"dataset.path: '{path}' holds neither a file corpus.jsonl nor a file corpus.parquet; it holds: "
        + (", ".join(there[:8]) or "nothing")
    )


def jsonl_queries(path: Path) -> Iterator[Query]:
    """The queries of a ``queries.jsonl`` (``_id`` and ``text``).

    Raises ``UserError`` for a missing file, and for a line that is not such an object.
    """
    for where, row in _json_lines(path):
        yield _query(where, row)


def _json_lines(path: Path) -> Iterator[tuple[str, Row]]:
    _check_file(path)
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line.decode("utf-8-sig"))
                json.dumps(row, ensure_ascii=False).encode()  # no half of a surrogate pair
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{where}: not UTF-8 text; is the file packed, or saved in another encoding? ({error})"
                ) from error
            except ValueError as error:
                raise UserError(f"{where}: not valid JSON: {error}") from error
            if not isinstance(row, dict) or not _NEEDED <= row.keys():
                raise UserError(f"{where}: needs an object with the keys _id and text")
            yield where, row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    _check_file(path)
    try:
        with pq.ParquetFile(path) as file:
            rows = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(_BATCH))
            for number, row in enumerate(rows, start=1):
                yield f"{path}, row {number}", row
    except (pa.ArrowException, ValueError, OSError) as error:
        raise UserError(
            f"{path}: not readable as Parquet; was it cut off, or is it another format? ({error})"
        ) from error


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: a folder, not a file" if path.is_dir() else f"no such file: {path}")


def _passage(where: str, row: Row) -> Passage:
    return where, _text(where, row, "_id"), _text(where, row, "title"), _text(where, row, "text")


def _query(where: str, row: Row) -> Query:
    return where, _text(where, row, "_id"), _text(where, row, "text")


def _judgement(where: str, row: Row) -> Judgement:
    for query, passage, score in (
        ("query-id", "corpus-id", "score"),
        ("query_id", "passage_id", "relevance"),
    ):
        if {query, passage, score} <= row.keys():
            try:
                relevance = int(float(row[score]))
            except (TypeError, ValueError, OverflowError) as error:
                raise UserError(f"{where}: '{score}' must be a number, not {row[score]!r}") from error
            return where, _text(where, row, query), _text(where, row, passage), relevance
    raise UserError(f"{where}: needs the columns query-id, corpus-id, score; has {sorted(row)}")


def _text(where: str, row: Row, key: str) -> str:
    """A value as text: numbers are written out, null and a missing one are empty."""
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str | int | float):
        raise UserError(f"{where}: '{key}' must be text, not of type {type(value).__name__}")
    return str(value)


def _folder(folder: Path, suffix: str) -> Source:
    def rows(name: str) -> Iterator[tuple[str, Row]]:
        path = folder / f"{name}.{suffix}"
        if suffix == "jsonl":
            yield from _json_lines(path)
            return
        own = "passage_id" if name == "corpus" else "query_id"
        for where, row in _parquet_rows(path):
            if "_id" not in row and own in row:
                row["_id"] = row[own]
            if not _NEEDED <= row.keys():
                raise UserError(f"{path}: needs the columns _id and text; has {', '.join(row)}")
            yield where, row

    def corpus() -> Iterator[Passage]:
        for where, row in rows("corpus"):
            yield _passage(where, row)

    def queries(split: str) -> Iterator[Query]:
        for where, row in rows("queries"):
            yield _query(where, row)

    def qrels(split: str) -> Iterator[Judgement]:
        tsv, parquet = folder / "qrels" / f"{split}.tsv", folder / "qrels" / f"{split}.parquet"
        if tsv.is_file():
            yield from _tsv_qrels(tsv)
        elif parquet.is_file():
            for where, row in _parquet_rows(parquet):
                yield _judgement(where, row)
        else:
            there = sorted(p.stem for p in (folder / "qrels").glob("*.*") if p.is_file())
            raise UserError(
                f"dataset '{folder.name}' has no split '{split}': no {tsv}; there are: "
                + (", ".join(there) or "none")
            )

    return Source(folder.resolve().name, corpus, queries, qrels)


def _tsv_qrels(path: Path) -> Iterator[Judgement]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            row = line.rstrip("\n").split("\t")
            if not line.strip() or (number == 1 and row[-1].strip().lower() == "score"):
                continue
            where = f"{path}, line {number}"
            try:
                query_id, passage_id, relevance = row
                line.encode()
                score = float(relevance)
                if not score.is_integer():
                    raise ValueError(relevance)
                yield where, query_id, passage_id, int(score)
            except (ValueError, OverflowError) as error:
                raise UserError(
                    f"{where}: needs query-id, corpus-id and a whole number as score, tab-separated"
                ) from error


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

    def load(name: str, config: str | None, split: str) -> Iterator[tuple[str, Row]]:
        where = f"hf:{name} (config {config}, split {split})"
        try:
            rows = datasets.load_dataset(name, config, split=split)
        except (ValueError, FileNotFoundError, ConnectionError) as error:
            raise UserError(f"{where}: {error}") from error
        return ((f"{where}, row {number}", row) for number, row in enumerate(rows, start=1))

    def one_split(config: str) -> Iterator[tuple[str, Row]]:
        for where, row in load(dataset_id, config, config):
            if "text" not in row:
                raise UserError(f"{where}: no column 'text'; has {sorted(row)}")
            yield where, {"_id": row.get("id"), **row}

    def corpus() -> Iterator[Passage]:
        for where, row in one_split("corpus"):
            yield _passage(where, row)

    def queries(split: str) -> Iterator[Query]:
        for where, row in one_split("queries"):
            yield _query(where, row)

    def qrels(split: str) -> Iterator[Judgement]:
        try:
            rows = load(dataset_id, "default", split)
        except UserError:
            rows = load(f"{dataset_id}-qrels", None, split)
        for where, row in rows:
            yield _judgement(where, row)

    return Source(dataset_id.rstrip("/").rpartition("/")[2], corpus, queries, qrels)
