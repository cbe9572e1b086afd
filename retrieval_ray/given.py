"""Pairs that somebody gives to be judged: a TREC run, or a table as jsonl or parquet."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from retrieval_ray.errors import UserError
from retrieval_ray.filters import Reject


@dataclass(frozen=True)
class Pair:
    """A pair to judge."""

    query_id: str
    passage_id: str
    query: str
    passage: str


_COLUMNS = ("query_id", "passage_id", "query", "passage")


def read_pairs(path: str, queries: Mapping[str, str], passages: Mapping[str, str]) -> Iterator[Pair | Reject]:
    """The pairs of a file in its order; a row that cannot be one as (id, reason, detail).

    ``.jsonl`` and ``.parquet``: columns query_id or query, passage_id or passage, others are not looked
    at (so our own run and scores tables will do). A text that is given counts, else that of its id in
    ``queries`` and ``passages``; an id that is not given is the beginning of its text's hash. An id stands
    for one text: rows that give it another are ``conflicting``. Any other name is a TREC run: ``qid Q0 docid
    rank score tag``. Memory: two hashes of each different id. Raises ``UserError`` for a file that is not
    there or cannot be read.
    """
    known: dict[str, Mapping[str, str]] = {"query": queries, "passage": passages}
    texts: dict[str, dict[int, int]] = {name: {} for name in known}  # by name: hash of id -> hash of text
    encoded = _is_run(path)
    for where, row in _rows(path):
        found = _pair(where, row, known, encoded=encoded)
        if isinstance(found, Pair):
            for name, seen in texts.items():
                key, text = getattr(found, f"{name}_id"), getattr(found, name)
                if seen.setdefault(hash(key), hash(text)) != hash(text):
                    found = (where, "conflicting", f"{name}_id {key} stood for another text before")
                    break
        yield found


def ids_without_text(path: str) -> tuple[set[str], set[str]]:
    """The ids of queries and of passages that some row of the file names without their text."""
    found: dict[str, set[str]] = {"query": set(), "passage": set()}
    encoded = _is_run(path)
    for _, row in _rows(path):
        values = _values(row) if isinstance(row, dict) else None
        if values is not None:
            for name, ids in found.items():
                key = values[f"{name}_id"]
                if values[name] is None and key is not None:
                    ids |= {key, unquote(key)} if encoded else {key}
    return found["query"], found["passage"]


def _is_run(path: str) -> bool:
    """Whether it is a TREC run, whose ids may be percent-encoded, as white space is in our own runs."""
    return Path(path).suffix not in (".jsonl", ".parquet")


def _rows(path: str) -> Iterator[tuple[str, Any]]:
    """Where each row stands, and the row; what is no row as text that says why."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"pairs: {'a folder, not a file' if file.is_dir() else 'no such file'}: {path}")
    return {".jsonl": _jsonl, ".parquet": _parquet}.get(file.suffix, _trec)(file)


def _pair(where: str, row: Any, known: Mapping[str, Mapping[str, str]], *, encoded: bool) -> Pair | Reject:
    """encoded: an id that is not known may be one that is, percent-encoded."""
    if not isinstance(row, dict):
        return where, "malformed", str(row)[:300]
    values = _values(row)
    if values is None:
        return where, "malformed", "ids and texts must be text"
    found: dict[str, str] = {}
    for name, texts in known.items():
        key, text = values[f"{name}_id"], values[name]
        if text is None:
            if key is None:
                return where, "malformed", f"neither {name} nor {name}_id"
            if encoded and key not in texts:
                key = unquote(key)
            if key not in texts:
                return where, f"unknown_{name}", key
            text = texts[key]
        found[name] = text
        found[f"{name}_id"] = hashlib.sha256(text.encode()).hexdigest()[:16] if key is None else key
    return Pair(**found)


def _values(row: dict[str, Any]) -> dict[str, str | None] | None:
    """The columns that count, as text; None where one is something else."""
    values = {key: row.get(key) for key in _COLUMNS}
    if any(isinstance(v, bool) or not isinstance(v, str | int | None) for v in values.values()):
        return None
    return {
        # half a surrogate pair can be written nowhere
        key: None if value is None else str(value).encode("utf-8", "replace").decode()
        for key, value in values.items()
    }


def _jsonl(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{file.name}, line {number}"
                try:
                    yield where, json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:
                    yield where, f"not JSON: {error}"


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        table = pq.ParquetFile(file)
        there = [name for name in _COLUMNS if name in table.schema_arrow.names]
        number = 0
        for batch in table.iter_batches(columns=there):
            for row in _pylist(batch):
                number += 1
                yield f"{file.name}, row {number}", row
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"pairs: {file} is not readable as Parquet: {error}") from error


def _pylist(batch: pa.RecordBatch) -> Iterator[Any]:
    """The rows; one whose bytes are no UTF-8 as text that says so."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for at in range(batch.num_rows):
            try:
                yield batch.slice(at, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield f"not UTF-8: {error}"


def _trec(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            fields = line.decode("utf-8", "replace").split()
            where = f"{file.name}, line {number}"
            if len(fields) == 6:
                yield where, {"query_id": fields[0], "passage_id": fields[2]}
            elif fields:
                yield where, f"{len(fields)} fields, a line of a TREC run has 6"
