"""The queries stage: from a log, from passages, from an LLM's replies; judged queries beside them."""

import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc

from retrieval_ray import schema
from retrieval_ray.artifacts import Stage, bucket_count, bucket_of, digest, part_name, stage
from retrieval_ray.config import DatasetConfig, QueriesConfig
from retrieval_ray.datasets import Judged, read_judged, read_log, read_log_file, rejects_table
from retrieval_ray.errors import UserError
from retrieval_ray.filters import Reject, folded, query_rejects
from retrieval_ray.generator import (
    EXTRACTIVE_KINDS,
    EXTRACTIVE_VERSION,
    Written,
    document_frequencies,
    extractive,
)
from retrieval_ray.progress import say
from retrieval_ray.replies import REPLIES_VERSION, parse
from retrieval_ray.sources import Source
from retrieval_ray.stages.collection import Collection
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.generate import replies_of
from retrieval_ray.stages.ingest import duplicates, judged_passages, passages, texts_of

VERSION = 4
_SHOWN = 5  # samples of each reason
Row = dict[str, object]


def sources_of(queries: QueriesConfig, dataset: DatasetConfig) -> list[str]:
    """Where training queries come from: as told, or the log where there is one, else extractive."""
    has_log = bool(dataset.log_split or queries.log_split or queries.log_path)
    if queries.sources is None:
        return ["log"] if has_log else ["extractive"]
    if "log" in queries.sources and not has_log:
        raise UserError(
            "queries.sources names 'log', and there is none: set queries.log_split or queries.log_path"
        )
    return list(queries.sources)


@dataclass(frozen=True)
class Asked:
    """What people asked of one corpus: judged queries by split, and a log; and which sources are wanted."""

    judged: dict[str, Judged]
    log: dict[str, str]
    sources: list[str]


def asked(context: Context, dataset: DatasetConfig, source: Source, corpus: Stage) -> Asked:
    """Read and check what people asked; before an LLM is, because what is wrong here ends the job."""
    sources = sources_of(context.config.queries, dataset)
    least = dataset.relevance_threshold

    def read(split: str, max_queries: int | None) -> Judged:
        known = judged_passages(corpus, source, split)
        return read_judged(source, split, known, max_queries=max_queries, relevance_threshold=least)

    test = read(dataset.split, dataset.max_queries)
    dev = read(dataset.dev_split, None) if dataset.dev_split else None
    overlap = test.texts.keys() & (dev.texts.keys() if dev else set())
    if overlap:
        raise UserError(
            f"dataset.dev_split and dataset.split share {len(overlap)} queries "
            f"(first: '{min(overlap)}'): choosing on what is reported proves nothing"
        )
    judged = {"test": test, **({"dev": dev} if dev else {})}
    for split in judged.values():
        for warning in split.warnings:
            say(f"warning: {warning}")
    log = _log(context.config.queries, dataset, source, judged) if "log" in sources else {}
    return Asked(judged, log, sources)


def run(
    context: Context,
    dataset: DatasetConfig,
    source: Source,
    corpus: Stage,
    asked: Asked,
    generated: Stage | None,
) -> Collection:
    """Collect the queries of one corpus: parts by content hash, qrels per split, rejects.

    generated: the generate stage, where an LLM is among the sources.
    """
    queries = _collect(context, source, corpus, asked, generated)
    return Collection(source.name, dataset.split, dataset.relevance_threshold, corpus, generated, queries)


def _collect(context: Context, source: Source, corpus: Stage, asked: Asked, generated: Stage | None) -> Stage:
    config, judged, log, sources = context.config.queries, asked.judged, asked.log, asked.sources
    identity = {
        "version": VERSION,
        "corpus": corpus.content(),
        "judged": digest({s: [j.texts, j.qrels.to_pylist()] for s, j in judged.items()}),
        "log": digest(log),
        "sources": sources,
        "extractive": [EXTRACTIVE_VERSION, config.extractive_per_passage, config.extractive_max],
        "llm": reading(context, generated),
        "max": [config.max_queries, config.max_words],
        "seed": context.config.seed,
    }
    target = stage(context.store, "queries", identity)
    if not context.start(target, f"queries of '{source.name}' from {' and '.join(sources)}"):
        return target

    rows: list[Row] = []
    if "log" in sources:
        rows += [query_row(key, text, "log", "train", None, "log") for key, text in log.items()]
    if "extractive" in sources:
        rows += [
            query_row(w.query_id, w.text, w.kind, "train", w.passage_id, EXTRACTIVE_VERSION)
            for w in _extracted(config, corpus, context.config.seed)
        ]
    rejects: list[Reject] = []
    if generated is not None:
        read, rejects = read_replies(context, corpus, generated)
        rows += read
    rejects += query_rejects(
        ((str(row["query_id"]), str(row["text"])) for row in rows),
        max_words=config.max_words,
        taken=[text for split in judged.values() for text in split.texts.values()],
    )
    dropped = {key for key, _, _ in rejects}
    rows = [row for row in rows if row["query_id"] not in dropped]
    if len(rows) > config.max_queries:
        keep = random.Random(context.config.seed).sample(range(len(rows)), config.max_queries)
        over = sorted(set(range(len(rows))) - set(keep))
        rejects += [(str(rows[i]["query_id"]), "over_max_queries", "") for i in over]
        rows = [rows[i] for i in sorted(keep)]
    if not rows:
        reasons = Counter(reason for _, reason, _ in rejects)
        raise UserError(
            f"dataset '{source.name}': no training query is left of {len(rejects)} "
            f"({', '.join(f'{n} {reason}' for reason, n in reasons.most_common())})"
        )
    train_rows = len(rows)
    for name, split in judged.items():
        rows += [query_row(key, text, "judged", name, None, "human") for key, text in split.texts.items()]
    write_tables(context, target, rows, judged, rejects_table("queries", rejects), train_rows, source.name)
    return target


def queries_table(queries: Stage) -> pa.Table:
    """All queries of a queries stage, in the order of its parts."""
    return schema.check(queries.read_all("queries-"), "queries", queries.folder.path)


def query_texts(queries: Stage, ids: Iterable[str]) -> dict[str, str]:
    """The texts of these queries."""
    table, wanted = queries_table(queries), pa.array(sorted(set(ids)), pa.string())
    table = table.filter(pc.is_in(table.column("query_id"), value_set=wanted))
    return dict(zip(*(table.column(name).to_pylist() for name in ("query_id", "text")), strict=True))


def qrels_of(queries: Stage, split: str) -> dict[str, dict[str, int]]:
    """The judgements of ``dev`` or ``test``; empty where the split is not judged."""
    part = f"qrels-{split}.parquet"
    found: dict[str, dict[str, int]] = {}
    if part in queries.parts():
        for row in queries.read(part).to_pylist():
            found.setdefault(row["query_id"], {})[row["passage_id"]] = row["relevance"]
    return found


def _log(
    config: QueriesConfig, dataset: DatasetConfig, source: Source, judged: Mapping[str, Judged]
) -> dict[str, str]:
    log: dict[str, str] = {}
    split = dataset.log_split or config.log_split
    if split:
        log |= read_log(source, split, without=[q for j in judged.values() for q in j.texts])
    if config.log_path:
        log |= {f"log:{key}": text for key, text in read_log_file(config.log_path).items()}
    return dict(sorted(log.items()))


def _extracted(config: QueriesConfig, corpus: Stage, seed: int) -> list[Written]:
    """Extractive queries of passages in a seeded order, near-duplicates left out.

    A title that other passages have too is no query: which of them it asks for, nothing tells.
    """
    left_out = duplicates(corpus)
    ids = corpus.read_all("corpus-", ["passage_id"]).column("passage_id")
    ids = ids.filter(pc.invert(pc.is_in(ids, value_set=pa.array(sorted(left_out), pa.string())))).sort()
    order = random.Random(seed).sample(range(len(ids)), min(len(ids), config.extractive_max))
    drawn = ids.take(pa.array(order, pa.int64())).to_pylist()
    read = {passage[0]: passage for passage in passages(corpus, drawn)}
    shared = shared_titles(corpus, (title for _, title, _ in read.values()))
    frequencies, total = document_frequencies(f"{title} {text}" for _, title, text in passages(corpus))
    kinds = EXTRACTIVE_KINDS[: config.extractive_per_passage]
    written = extractive((read[key] for key in drawn), frequencies, total, kinds=kinds)
    telling = (w for w in written if w.kind != "title" or folded(w.text) not in shared)
    return list(islice(telling, config.extractive_max))


def shared_titles(corpus: Stage, titles: Iterable[str]) -> set[str]:
    """Those of these titles, folded, that several passages have which are no near-duplicates."""
    found, left_out = dict.fromkeys(map(folded, titles), 0), duplicates(corpus)
    for key, title, _ in passages(corpus):
        if (title := folded(title)) in found and key not in left_out:
            found[title] += 1
    return {title for title, count in found.items() if count > 1}


def reading(context: Context, generated: Stage | None) -> list[object] | None:
    """What decides which queries are read out of an LLM's replies."""
    if generated is None:
        return None
    llm = context.config.llm
    return [generated.content(), REPLIES_VERSION, llm.language, llm.max_copied]


def read_replies(context: Context, corpus: Stage, generated: Stage) -> tuple[list[Row], list[Reject]]:
    """The queries in an LLM's replies, and the replies that hold none, with the reason."""
    config, replies = context.config, replies_of(generated)
    texts = texts_of(corpus, (row["passage_id"] for row in replies))
    rows: list[Row] = []
    rejects: list[Reject] = []
    for row in replies:
        if row["text"] is None:
            rejects.append((row["query_id"], "no_reply", row["error"] or ""))
            continue
        query = parse(
            row["text"],
            texts[row["passage_id"]],
            kind=row["kind"],
            language=config.llm.language,
            max_words=config.queries.max_words,
            max_copied=config.llm.max_copied,
            cut=row["cut"],
        )
        if isinstance(query, str):
            writer = f"llm:{config.llm.model}"
            rows.append(query_row(row["query_id"], query, row["kind"], "train", row["passage_id"], writer))
        else:
            rejects.append((row["query_id"], *query))
    return rows, rejects


def query_row(query_id: str, text: str, kind: str, split: str, passage_id: str | None, generator: str) -> Row:
    return {
        "query_id": query_id,
        "text": text,
        "kind": kind,
        "language": None,
        "split": split,
        "passage_id": passage_id,
        "generator": generator,
    }


def write_tables(
    context: Context,
    target: Stage,
    rows: list[Row],
    judged: Mapping[str, Judged],
    rejects: pa.Table,
    train_rows: int,
    collection: str,
) -> None:
    """Finish a queries stage: parts by content hash, the judgements of each split, rejects."""
    ids = [str(row["query_id"]) for row in rows]
    if len(set(ids)) != len(ids):
        twice = sorted({key for key in ids if ids.count(key) > 1})[:3]
        raise UserError(f"query ids stand in the log and in a judged split: {', '.join(twice)}")
    buckets = bucket_count(len(rows))
    parts: list[list[Row]] = [[] for _ in range(buckets)]
    for row in sorted(rows, key=lambda row: str(row["query_id"])):
        parts[bucket_of(str(row["text"]), buckets)].append(row)
    names = [part_name("queries", number, "parquet") for number in range(buckets)]
    for name, part in zip(names, parts, strict=True):
        target.write(name, schema.from_rows("queries", part))
    for split, found in judged.items():
        target.write(f"qrels-{split}.parquet", found.qrels)
        names.append(f"qrels-{split}.parquet")
        known = set(zip(*(rejects.column(c).to_pylist() for c in ("id", "reason")), strict=True))
        new = [(row["id"], row["reason"]) not in known for row in found.rejects.to_pylist()]
        rejects = pa.concat_tables([rejects, found.rejects.filter(pa.array(new, pa.bool_()))])
    target.write("rejects.parquet", rejects)
    context.finish(
        target,
        [*names, "rejects.parquet"],
        rows=len(rows),
        collection=collection,
        buckets=buckets,
        train=train_rows,
        rejected=dict(Counter(rejects.column("reason").to_pylist())),
        samples=_samples(rejects),
        warnings=[warning for split in judged.values() for warning in split.warnings],
    )


def _samples(rejects: pa.Table) -> dict[str, list[str]]:
    """A few rejects of each reason, for the report."""
    found: dict[str, list[str]] = {}
    for reason, detail in zip(*(rejects.column(c).to_pylist() for c in ("reason", "detail")), strict=True):
        if detail and len(found.setdefault(reason, [])) < _SHOWN:
            found[reason].append(detail[:200])
    return found
