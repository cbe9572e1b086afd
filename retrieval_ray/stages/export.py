"""Writes a groups stage's lists as another library's training files, part by part."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow.compute as pc

from retrieval_ray import schema
from retrieval_ray.artifacts import Location, part_name
from retrieval_ray.errors import UserError
from retrieval_ray.export import (
    BY_ID,
    EQUAL_LENGTHS,
    FORMATS,
    Passage,
    ScoredList,
    common_length,
    cut,
    without,
)  # fmt: skip
from retrieval_ray.progress import say
from retrieval_ray.stages.collection import Grouped
from retrieval_ray.stages.ingest import some_passages
from retrieval_ray.stages.queries import queries_table

LISTS_PER_FILE = 10_000
FALSE_NEGATIVES = ("keep", "drop")
_OURS = ("train", "dev", "queries", "documents", "export.json")
_UNFINISHED = "unfinished"  # stands beside files of an export that has not ended


def target(form: str, out: str, false_negatives: str) -> Location:
    """Check the job's own keys; returns the folder to write into: new, empty, or of a killed export."""
    if form not in FORMATS:
        raise UserError(f"format: '{form}' is not one of {', '.join(FORMATS)}")
    if false_negatives not in FALSE_NEGATIVES:
        raise UserError(f"false_negatives: '{false_negatives}' is not one of {', '.join(FALSE_NEGATIVES)}")
    if not out:
        raise UserError("out: name the folder to write to, like out=exported")
    folder = Location.of(out)
    if folder.names() and _UNFINISHED not in folder.names():
        raise UserError(f"out: '{out}' is not empty; name another folder, or delete it")
    return folder


@contextmanager
def writing(folder: Location) -> Iterator[None]:
    """What is written meanwhile counts as unfinished until all is there; ``target`` takes such a folder.

    What a killed export left goes first: it may have been of another format, or of more lists.
    """
    (folder / _UNFINISHED).write(b"")
    for name in folder.names():
        if name in _OURS:
            (folder / name).remove()
    yield
    (folder / _UNFINISHED).remove()


def run(grouped: Grouped, form: str, folder: Location, *, drop: bool) -> None:
    """Write ``train/`` and ``dev/`` (JSON lines) and, last, ``export.json`` with what they hold.

    drop: leave out the negatives that training masks as suspected false ones. Formats with one column per
    negative get lists of one length (``export.common_length``).
    """
    facts: dict[str, Any] = {
        "format": form,
        "corpus": grouped.name,
        "groups": grouped.groups.content(),
        "scores": "the teacher's, normalised to [0, 1] per corpus and query kind",
        "false_negatives": "drop" if drop else "keep",
    }
    known: set[str] = set()
    for split in ("train", "dev"):
        rows = _rows(grouped, split)
        lengths = [len(_kept(row, drop)) for row in rows]
        if form in EQUAL_LENGTHS and rows:
            length = common_length(lengths)
            if not length:
                raise UserError(
                    f"format '{form}' needs negatives in every list, and no list of '{split}' has any left; "
                    "use false_negatives=keep, or another format"
                )
            if len(set(lengths)) > 1:
                shorter = sum(own < length for own in lengths)
                say(f"  {split}: lists are cut to {length} passages; {shorter:,} shorter ones are left out")
            rows = [row for row, own in zip(rows, lengths, strict=True) if own >= length]
            lengths = [length] * len(rows)
        facts[split] = {"lists": len(rows), "passages": sum(lengths)}
        for number, at in enumerate(range(0, len(rows), LISTS_PER_FILE)):
            part = list(_lists(grouped, rows[at : at + LISTS_PER_FILE], drop))
            if form in EQUAL_LENGTHS:
                part = [cut(row, length) for row in part]
            name = part_name("lists", number, "jsonl")
            _write(folder / split / name, (FORMATS[form](row) for row in part))
            if form in BY_ID:
                texts = {
                    p.passage_id: p.read for row in part for p in row.passages if p.passage_id not in known
                }
                known |= texts.keys()
                name = f"{split}-{name}"
                queries = ({"query_id": row.query_id, "text": row.query} for row in part)
                _write(folder / "queries" / name, queries)
                _write(
                    folder / "documents" / name,
                    ({"document_id": key, "text": text} for key, text in texts.items()),
                )
    (folder / "export.json").write_json(facts)
    say(f"  {facts['train']['lists']:,} training lists, {facts['dev']['lists']:,} held out: {folder.url}")


def _rows(grouped: Grouped, split: str) -> list[dict[str, Any]]:
    table = schema.check(grouped.groups.read("groups.parquet"), "groups", grouped.groups.folder.path)
    found: list[dict[str, Any]] = table.filter(pc.equal(table.column("split"), split)).to_pylist()
    return found


def _kept(row: dict[str, Any], drop: bool) -> list[str]:
    left_out = set(row["excluded_ids"]) if drop else set()
    return [p for p in row["passage_ids"] if p not in left_out]


def _lists(grouped: Grouped, rows: Sequence[dict[str, Any]], drop: bool) -> Iterator[ScoredList]:
    """The rows with their texts, which are looked up for these rows alone."""
    passages = some_passages(grouped.corpus, (p for row in rows for p in row["passage_ids"]))
    queries = queries_table(grouped.queries)
    columns = (queries.column(name).to_pylist() for name in ("query_id", "text"))
    texts = dict(zip(*columns, strict=True))
    for row in rows:
        whole = ScoredList(
            row["query_id"],
            texts[row["query_id"]],
            [Passage(p, *passages[p]) for p in row["passage_ids"]],
            row["teacher_scores"],
        )
        yield without(whole, set(row["excluded_ids"])) if drop else whole


def _write(location: Location, rows: Iterable[dict[str, Any]]) -> None:
    location.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
