"""The negatives stage: for every negative of the training lists, a query that it answers.

The contrastive learning penalty (arXiv 2412.17364) holds a negative near its own query. Queries that
were written for the passage already are taken; only for the others is one written, by the LLM where it is
named, and by extraction where it is not or gave none. Queries that are held out or judged are never among
them, by id or by text: what is measured is not trained on.
"""

from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from retrieval_ray import schema
from retrieval_ray.artifacts import Stage, stage
from retrieval_ray.datasets import rejects_table
from retrieval_ray.filters import Reject, folded
from retrieval_ray.generator import EXTRACTIVE_VERSION, document_frequencies, extractive
from retrieval_ray.progress import say
from retrieval_ray.prompts import KINDS
from retrieval_ray.stages import generate
from retrieval_ray.stages.collection import Grouped
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.ingest import passages
from retrieval_ray.stages.queries import queries_table, query_row, read_replies, reading, shared_titles

VERSION = 3
KIND = "question"  # of what is written anew
_ORDER = {kind: at for at, kind in enumerate((*KINDS, "title", "span", "keywords"))}


def run(context: Context, grouped: Grouped, earlier: Stage | None = None) -> Grouped:
    """One query for every negative of the training lists, as a queries table of split ``negative``.

    earlier: this stage's table of other lists; its queries are taken too, and no LLM is asked.
    """
    return replace(grouped, negatives=_negatives(context, grouped, earlier))


def _negatives(context: Context, grouped: Grouped, earlier: Stage | None) -> Stage:
    lists = grouped.groups.read("groups.parquet", ["split", "passage_ids"]).to_pylist()
    negatives = {passage for row in lists if row["split"] == "train" for passage in row["passage_ids"][1:]}
    table = queries_table(grouped.queries)
    measured = _measured(grouped, table)
    own = _first_of_each(table, measured)
    if earlier is not None:
        own = _first_of_each(earlier.read("queries.parquet"), measured) | own
    missing = negatives - own.keys()
    replies = None
    if earlier is None and context.config.llm.model and missing:
        replies = generate.run_for(context, f"negatives of {grouped.name}", grouped.corpus, missing, KIND)
    identity = {
        "version": VERSION,
        "groups": grouped.groups.content(),
        "queries": grouped.queries.content(),
        "replies": reading(context, replies),
        "extractive": EXTRACTIVE_VERSION,
        **({"earlier": earlier.content()} if earlier else {}),
    }
    target = stage(context.store, "negatives", identity)
    if not context.start(target, f"queries for {len(negatives):,} negatives of '{grouped.name}'"):
        return target
    rows = {passage: own[passage] for passage in negatives & own.keys()}
    rejects: list[Reject] = []
    if replies is not None:
        read, rejects = read_replies(context, grouped.corpus, replies)
        for row in read:
            if folded(str(row["text"])) in measured:
                rejects.append((str(row["query_id"]), "measured", str(row["text"])))
            else:
                rows[str(row["passage_id"])] = row
    rows |= _extracted(grouped.corpus, negatives - rows.keys(), measured)
    for passage in sorted(negatives - rows.keys()):
        rejects.append((passage, "no_query", "no query could be written for this passage"))
    found = [{**row, "split": "negative"} for _, row in sorted(rows.items())]
    target.write("queries.parquet", schema.from_rows("queries", found))
    target.write("rejects.parquet", rejects_table("negatives", rejects))
    say(f"  {len(negatives) - len(missing):,} had a query already, {len(missing):,} had none")
    context.finish(
        target,
        ["queries.parquet", "rejects.parquet"],
        rows=len(found),
        collection=grouped.name,
        reused=len(negatives) - len(missing),
        without=len(negatives - rows.keys()),
    )
    return target


def _measured(grouped: Grouped, queries: pa.Table) -> set[str]:
    """The texts, folded, of all queries that are judged or whose lists are held out."""
    lists = grouped.groups.read("groups.parquet", ["query_id", "split"])
    held_out = lists.filter(pc.equal(lists.column("split"), "dev")).column("query_id")
    judged = pc.invert(pc.equal(queries.column("split"), "train"))
    rows = queries.filter(pc.or_(judged, pc.is_in(queries.column("query_id"), value_set=held_out)))
    return {folded(text) for text in rows.column("text").to_pylist()}


def _first_of_each(queries: pa.Table, measured: set[str]) -> dict[str, dict[str, object]]:
    """The first query, in the order of kinds, that was written for each passage, but for those measured."""
    rows = [row for row in queries.to_pylist() if row["passage_id"] and folded(row["text"]) not in measured]
    rows.sort(key=lambda row: (_ORDER.get(row["kind"], len(_ORDER)), row["query_id"]))
    found: dict[str, dict[str, object]] = {}
    for row in rows:
        found.setdefault(row["passage_id"], row)
    return found


def _extracted(corpus: Stage, ids: set[str], measured: set[str]) -> dict[str, dict[str, object]]:
    frequencies, total = document_frequencies(f"{title} {text}" for _, title, text in passages(corpus))
    wanted = sorted(passages(corpus, ids))
    shared = shared_titles(corpus, (title for _, title, _ in wanted))
    found: dict[str, dict[str, object]] = {}
    for kind in ("span", "title", "keywords"):  # the most like a query first
        left = [passage for passage in wanted if passage[0] not in found]
        for w in extractive(left, frequencies, total, kinds=[kind]):
            if folded(w.text) not in measured and not (kind == "title" and folded(w.text) in shared):
                found[w.passage_id] = query_row(
                    w.query_id, w.text, w.kind, "negative", w.passage_id, EXTRACTIVE_VERSION
                )
    return found
