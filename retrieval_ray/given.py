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
    ``queries`` and ``passages``; an id that is not given is the beginning of its text's hash. Any other
    name is a TREC run: ``qid Q0 docid rank score tag``. Raises ``UserError`` for a file that is not there
    or cannot be read.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"pairs: {'a folder, not a file' if file.is_dir() else 'no such file'}: {path}")
    readers = {".jsonl": _jsonl, ".parquet": _parquet}
    for where, row in readers.get(file.suffix, _trec)(file):
        yield _pair(where, row, queries, passages)


def _pair(where: str, row: Any, queries: Mapping[str, str], passages: Mapping[str, str]) -> Pair | Reject:
    if not isinstance(row, dict):
        return where, "malformed", str(row)[:300]
    values = {key: row.get(key) for key in _COLUMNS}
    if any(value is not None and not isinstance(value, str | int) for value in values.values()):
        return where, "malformed", "ids and texts must be text"
    whole = {
        # half a surrogate pair can be written nowhere
        key: None if value is None else str(value).encode("utf-8", "replace").decode()
        for key, value in values.items()
    }
    found: dict[str, str] = {}
    for name, known in (("query", queries), ("passage", passages)):
        key, text = whole[f"{name}_id"], whole[name]
        if text is None:
            if key is None:
                return where, "malformed", f"neither {name} nor {name}_id"
            text = known.get(key)
            if text is None:
                return where, f"unknown_{name}", key
        found[name] = text
        found[f"{name}_id"] = hashlib.sha256(text.encode()).hexdigest()[:16] if key is None else key
    return Pair(**found)


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
            for row in batch.to_pylist():
                number += 1
                yield f"{file.name}, row {number}", row
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"pairs: {file} is not readable as Parquet: {error}") from error


def _trec(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            fields = line.decode("utf-8", "replace").split()
            where = f"{file.name}, line {number}"
            if len(fields) == 6:
                # our own runs have the white space of an id percent-encoded
                yield where, {"query_id": unquote(fields[0]), "passage_id": unquote(fields[2])}
            elif fields:
                yield where, f"{len(fields)} fields, a line of a TREC run has 6"
