"""Collections -> tables: the checks on what a ``Source`` gives, made once for every format."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from retrieval_ray import schema
from retrieval_ray.artifacts import digest
from retrieval_ray.errors import UserError
from retrieval_ray.sources import Source, jsonl_queries

Share = tuple[float, float]  # of a split: from, to


@dataclass(frozen=True)
class Judged:
    """Judged queries of one split: texts by id, a qrels table, and what was wrong with them."""

    texts: dict[str, str]
    qrels: pa.Table
    warnings: list[str] = field(default_factory=list)
    rejects: pa.Table = field(default_factory=lambda: schema.empty("rejects"))


@dataclass(frozen=True)
class Survey:
    """What one reading of a corpus found.

    content: a hash of all passages that have text, the same in any order of rows; rejects: the others.
    """

    passages: int
    content: str
    rejects: pa.Table


def survey(source: Source) -> Survey:
    """Read a corpus once, check it, and hold none of it: 16 bytes a passage, at the end.

    Raises ``UserError`` for an empty or duplicate id (both places named) and an empty corpus.
    """
    ids, total, count = array("Q"), 0, 0
    empty = []
    try:
        for where, passage_id, title, text in source.corpus():
            if not passage_id.strip():
                raise UserError(f"{where}: empty id")
            ids.append(_hash64(passage_id))
            if _has_text(title, text):
                count += 1
                total += row_hash(passage_id, title, text)
            else:
                empty.append((passage_id, "empty", where))
    except UserError:
        _refuse_repeated(source, ids)  # what is wrong in an earlier row is told first
        raise
    _refuse_repeated(source, ids)
    if not count:
        raise UserError(f"dataset '{source.name}': the corpus is empty")
    return Survey(count, content_of(total), rejects_table("corpus", sorted(empty)))


def passages_of(source: Source) -> Iterator[tuple[str, str, str]]:
    """(passage_id, title, text) of what has text, in the source's order; ``survey`` has checked it."""
    for _, passage_id, title, text in source.corpus():
        if _has_text(title, text):
            yield passage_id, title, text


def row_hash(passage_id: str, title: str, text: str) -> int:
    """A passage as a number; a corpus is the sum of its passages."""
    return int(digest([passage_id, title, text]), 16)


def content_of(total: int) -> str:
    """The hash of a corpus: the sum of ``row_hash`` over its passages, modulo 2^256.

    A sum is the same in any order of rows, and no two ids are the same.
    """
    return f"{total % 2**256:064x}"


def read_corpus(source: Source) -> tuple[pa.Table, pa.Table]:
    """The whole corpus table sorted by passage_id, and the rejects; raises what ``survey`` raises."""
    found = survey(source)
    columns = zip(*sorted(passages_of(source)), strict=True)
    return pa.table([list(column) for column in columns], schema=schema.TABLES["corpus"]), found.rejects


def read_judged(
    source: Source,
    split: str,
    passage_ids: set[str],
    *,
    max_queries: int | None = None,
    relevance_threshold: int = 1,
) -> Judged:
    """The judged queries of a split, or of a share of one (``split_spec``), chosen by hash of the id.

    passage_ids: those of the corpus, or at least those of them that ``judged_ids`` names.

    Judgements that name unknown queries or passages are dropped with a warning that counts them and
    names the first few. Raises ``UserError`` when none remain, or none reaches ``relevance_threshold``.
    """
    name, share = split_spec(split)
    texts, rejects = _texts(source, name)
    judged: dict[str, dict[str, int]] = {}
    unknown: list[str] = []
    twice: list[str] = []
    for where, query_id, passage_id, relevance in source.qrels(name):
        if not in_share(query_id, share):
            continue
        if query_id not in texts:
            unknown.append(f"query '{query_id}' ({where})")
        elif passage_id not in passage_ids:
            unknown.append(f"passage '{passage_id}' ({where})")
        else:
            row = judged.setdefault(query_id, {})
            if row.get(passage_id, relevance) != relevance:
                twice.append(f"'{query_id}' and '{passage_id}' ({where})")
            row[passage_id] = relevance
    warnings = []
    if unknown:
        warnings.append(
            f"split '{split}': {len(unknown)} judgements name unknown ids and were dropped: "
            + ", ".join(unknown[:3])
            + (", ..." if len(unknown) > 3 else "")
        )
    if twice:
        warnings.append(
            f"split '{split}': {len(twice)} pairs are judged twice and differently; the last judgement "
            f"counts: {', '.join(twice[:3])}" + (", ..." if len(twice) > 3 else "")
        )
    with_relevant = {q for q, row in judged.items() if max(row.values()) > 0}
    if len(with_relevant) < len(judged):
        left_out = sorted(judged.keys() - with_relevant)
        warnings.append(
            f"split '{split}': {len(left_out)} queries have no passage judged more than 0 and are "
            f"left out: {', '.join(left_out[:3])}" + (", ..." if len(left_out) > 3 else "")
        )
    if not with_relevant:
        raise UserError(
            f"dataset '{source.name}', split '{split}': no query with a relevant passage of this "
            "corpus remains" + (f". {warnings[0]}" if warnings else "")
        )
    if all(max(judged[q].values()) < relevance_threshold for q in with_relevant):
        raise UserError(
            f"dataset '{source.name}', split '{split}': no judgement reaches "
            f"dataset.relevance_threshold={relevance_threshold}; lower it"
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


def judged_ids(source: Source, split: str) -> set[str]:
    """The passages that judgements of a split name, whether they are in the corpus or not."""
    return {passage_id for _, _, passage_id, _ in source.qrels(split_spec(split)[0])}


def read_log(source: Source, split: str, *, without: Iterable[str]) -> dict[str, str]:
    """The query texts of a split as an unlabelled log; its judgements say only who belongs to it.

    ``without``: ids of judged dev and test queries, which never enter the log. Raises ``UserError``
    when no query remains.
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
    """A query log from a ``queries.jsonl`` of its own (``_id`` and ``text``).

    Raises ``UserError`` for a missing file, a malformed line, an empty or duplicate id.
    """
    if not Path(path).is_file():
        raise UserError(f"queries.log_path: no such file: {path}")
    found: dict[str, tuple[str, str]] = {}
    for where, query_id, text in jsonl_queries(Path(path)):
        _check_id(where, query_id, found)
        found[query_id] = (where, text)
    return {key: text for key, (_, text) in found.items()}


def split_spec(split: str) -> tuple[str, Share]:
    """``train`` -> (train, (0, 1)); ``train:0.2`` -> (train, (0, 0.2)), and ``train:0.2-1`` is the rest.

    Raises ``UserError`` for a share that is not in [0, 1], or empty.
    """
    name, _, share = split.partition(":")
    first, dash, second = share.partition("-")
    try:
        low, high = (float(first), float(second)) if dash else (0.0, float(first or 1))
    except ValueError:
        low, high = 0.0, 0.0
    if not 0 <= low < high <= 1:
        raise UserError(
            f"split '{split}': what stands after ':' is a share like 0.2, or the part from one share to "
            "another, like 0.2-1, and must lie in (0, 1]"
        )
    return name, (low, high)


def in_share(query_id: str, share: Share) -> bool:
    """Whether a query falls into a share of its split: decided by a hash of its id."""
    low, high = share
    return low <= _hash_fraction(query_id) < high


def rejects_table(stage: str, rejects: Iterable[tuple[str, str, str]]) -> pa.Table:
    """(id, reason, detail) rows as a table of rejects."""
    rows = list(rejects)
    ids, reasons, details = zip(*rows, strict=True) if rows else ((), (), ())
    columns = [ids, [stage] * len(rows), reasons, details]
    return pa.table([list(column) for column in columns], schema=schema.TABLES["rejects"])


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


def _has_text(title: str, text: str) -> bool:
    return bool(title.strip() or text.strip())


def _hash64(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def _refuse_repeated(source: Source, ids: "array[int]") -> None:
    """Where hashes of ids are the same, read again and tell of the first row whose id stands already."""
    ordered = np.sort(np.frombuffer(ids, dtype=np.uint64))
    suspects = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if suspects:
        earlier: dict[str, tuple[str]] = {}
        for where, passage_id, _, _ in source.corpus():
            if _hash64(passage_id) in suspects:
                _check_id(where, passage_id, earlier)
                earlier[passage_id] = (where,)


def _check_id(where: str, key: str, earlier: dict[str, Any]) -> None:
    if not key.strip():
        raise UserError(f"{where}: empty id")
    if key in earlier:
        raise UserError(f"{where}: id '{key}' stands already at {earlier[key][0]}")
