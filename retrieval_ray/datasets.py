"""Test collections of several formats -> tables: BEIR folders, parquet, ir_datasets, Hugging Face,
and the bundled demo.

A ``Source`` is three functions that yield raw rows; all checks are made once, in ``read_corpus``,
``read_judged`` and ``read_log``, whatever the format.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from retrieval_ray import schema
from retrieval_ray.errors import UserError

Passage = tuple[str, str, str, str]  # where it stands, id, title, text
Query = tuple[str, str, str]  # where it stands, id, text
Judgement = tuple[str, str, str, int]  # where it stands, query id, passage id, relevance


@dataclass(frozen=True)
class Source:
    """A collection: its corpus, its queries, the judgements of a split, and the ids of a split."""

    name: str
    corpus: Callable[[], Iterable[Passage]]
    queries: Callable[[str], Iterable[Query]]
    qrels: Callable[[str], Iterable[Judgement]]


@dataclass(frozen=True)
class Judged:
    """Judged queries of one split: texts by id, a qrels table, and what was wrong with them."""

    texts: dict[str, str]
    qrels: pa.Table
    warnings: list[str] = field(default_factory=list)
    rejects: pa.Table = field(default_factory=lambda: schema.empty("rejects"))


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


def read_corpus(source: Source) -> tuple[pa.Table, pa.Table]:
    """The corpus table sorted by passage_id, and the rejects (passages without any text).

    Raises ``UserError`` for an empty or duplicate id (both places named) and an empty corpus.
    """
    rows: dict[str, tuple[str, str, str]] = {}
    for where, passage_id, title, text in source.corpus():
        _check_id(where, passage_id, rows)
        rows[passage_id] = (where, title, text)
    kept = {key: row for key, row in rows.items() if row[1].strip() or row[2].strip()}
    if not kept:
        raise UserError(f"dataset '{source.name}': the corpus is empty")
    ids = sorted(kept)
    table = pa.table(
        {
            "passage_id": ids,
            "title": [kept[key][1] for key in ids],
            "text": [kept[key][2] for key in ids],
        },
        schema=schema.TABLES["corpus"],
    )
    return table, rejects_table(
        "corpus", [(key, "empty", rows[key][0]) for key in sorted(rows.keys() - kept.keys())]
    )


def read_judged(
    source: Source, split: str, passage_ids: set[str], *, max_queries: int | None = None
) -> Judged:
    """The judged queries of a split, or of a share of one (``train:0.2``), chosen by hash of the id.

    Judgements that name unknown queries or passages are dropped with a warning that counts them and
    names the first few. Raises ``UserError`` when none remain.
    """
    name, share = split_spec(split)
    texts, rejects = _texts(source, name)
    judged: dict[str, dict[str, int]] = {}
    unknown: list[str] = []
    for where, query_id, passage_id, relevance in source.qrels(name):
        if not in_share(query_id, share):
            continue
        if query_id not in texts:
            unknown.append(f"query '{query_id}' ({where})")
        elif passage_id not in passage_ids:
            unknown.append(f"passage '{passage_id}' ({where})")
        else:
            judged.setdefault(query_id, {})[passage_id] = relevance
    warnings = []
    if unknown:
        warnings.append(
            f"split '{split}': {len(unknown)} judgements name unknown ids and were dropped: "
            + ", ".join(unknown[:3])
            + (", ..." if len(unknown) > 3 else "")
        )
    with_relevant = {q for q, row in judged.items() if max(row.values()) > 0}
    if not with_relevant:
        raise UserError(
            f"dataset '{source.name}', split '{split}': no query with a relevant passage of this "
            "corpus remains" + (f". {warnings[0]}" if warnings else "")
        )
    chosen = sorted(with_relevant)
    if max_queries is not None and len(chosen) > max_queries:
        chosen = sorted(sorted(chosen, key=_hash_fraction)[:max_queries])
    qrels = schema.from_rows(
        "qrels",
        [
            {"query_id": q, "passage_id": p, "relevance": judged[q][p]}
            for q in chosen
            for p in sorted(judged[q])
        ],
    )
    return Judged({q: texts[q] for q in chosen}, qrels, warnings, rejects)


def read_log(source: Source, split: str, *, without: Iterable[str]) -> dict[str, str]:
    """The query texts of a split as an unlabelled log; its judgements say only who belongs to it.

    ``without``: ids of judged dev and test queries, which never enter the log.
    """
    name, share = split_spec(split)
    texts, _ = _texts(source, name)
    members = {query_id for _, query_id, _, _ in source.qrels(name)} & texts.keys()
    left_out = set(without)
    chosen = sorted(q for q in members - left_out if in_share(q, share))
    if not chosen:
        raise UserError(f"dataset '{source.name}': the log split '{split}' holds no queries")
    return {q: texts[q] for q in chosen}


def read_log_file(path: str) -> dict[str, str]:
    """A query log from a ``queries.jsonl`` of its own (``_id`` and ``text``)."""
    if not Path(path).is_file():
        raise UserError(f"queries.log_path: no such file: {path}")
    found: dict[str, tuple[str, str]] = {}
    for where, query_id, text in _jsonl_queries(Path(path)):
        _check_id(where, query_id, found)
        found[query_id] = (where, text)
    return {key: text for key, (_, text) in found.items()}


def split_spec(split: str) -> tuple[str, float]:
    """``train`` -> (train, 1.0); ``train:0.2`` -> (train, 0.2)."""
    name, _, share = split.partition(":")
    try:
        fraction = float(share) if share else 1.0
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        raise UserError(f"split '{split}': the share after ':' must lie in (0, 1]")
    return name, fraction


def in_share(query_id: str, share: float) -> bool:
    """Whether a query falls into a share of its split: decided by a hash of its id."""
    return share >= 1 or _hash_fraction(query_id) < share


def rejects_table(stage: str, rejects: Iterable[tuple[str, str, str]]) -> pa.Table:
    """(id, reason, detail) rows as a table of rejects."""
    return schema.from_rows(
        "rejects",
        [{"id": key, "stage": stage, "reason": why, "detail": what} for key, why, what in rejects],
    )


def _hash_fraction(query_id: str) -> float:
    return int(hashlib.sha256(query_id.encode()).hexdigest()[:13], 16) / 16**13


def _texts(source: Source, split: str) -> tuple[dict[str, str], pa.Table]:
    """Query texts by id; queries without text go to rejects."""
    texts: dict[str, tuple[str, str]] = {}
    for where, query_id, text in source.queries(split):
        _check_id(where, query_id, texts)
        texts[query_id] = (where, text)
    kept = {key: text for key, (_, text) in texts.items() if text.strip()}
    empty = [(key, "empty", texts[key][0]) for key in sorted(texts.keys() - kept.keys())]
    return kept, rejects_table("queries", empty)


def _check_id(where: str, key: str, earlier: dict[str, Any]) -> None:
    if not key:
        raise UserError(f"{where}: empty id")
    if key in earlier:
        raise UserError(f"{where}: id '{key}' stands already at {earlier[key][0]}")


# --- formats ---------------------------------------------------------------------------------


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


def _jsonl_queries(path: Path) -> Iterator[Query]:
    for where, row in _json_lines(path, ("_id", "text")):
        yield where, str(row["_id"]), str(row["text"] or "")


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
        return _jsonl_queries(here / ("log.jsonl" if split == "log" else "queries.jsonl"))

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
