"""What the groups stage writes down of its teacher: a table by query, figures and samples to report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from retrieval_ray import gate, schema, trust
from retrieval_ray.artifacts import Stage
from retrieval_ray.stages.collection import Judged
from retrieval_ray.stages.ingest import passage_text, some_passages
from retrieval_ray.stages.queries import qrels_of, query_texts
from retrieval_ray.stages.retrieve import rankings_of

_SHOWN = 8
_LENGTH = 240  # characters of a sample


@dataclass(frozen=True)
class Findings:
    """Readings of all pools of training queries, and teacher beside student on judged dev queries."""

    readings: Sequence[trust.Reading]
    beside: Sequence[trust.Beside]


def table(findings: Findings) -> pa.Table:
    """Everything by query, as an evaluation table: agreement by retriever, the rest under ``teacher``."""
    rows: list[tuple[str, str, str, float]] = []
    for r in findings.readings:
        rows += [("teacher", r.query_id, "spread", r.spread), ("teacher", r.query_id, "gap", r.gap)]
        rows.append(("teacher", r.query_id, "source_rank" if r.has_source else "first_rank", float(r.rank)))
        for retriever, (tau, overlap) in r.agreement.items():
            rows.append((retriever, r.query_id, "tau", tau))
            rows.append((retriever, r.query_id, f"overlap@{trust.HEAD}", overlap))
    for b in findings.beside:
        rows += [
            ("student", b.query_id, gate.METRIC, b.student),
            ("teacher", b.query_id, gate.METRIC, b.teacher),
        ]
    columns = list(zip(*rows, strict=True)) if rows else [()] * 4
    of = schema.TABLES["evaluation"]
    return pa.table([pa.array(values, f.type) for values, f in zip(columns, of, strict=True)], schema=of)


def beside_of(groups: Stage) -> dict[str, tuple[float, float]]:
    """nDCG@10 of (student, teacher) by judged dev query, out of a finished groups stage."""
    found: dict[str, dict[str, float]] = {}
    for row in groups.read("trust.parquet").to_pylist():
        if row["metric"] == gate.METRIC:
            found.setdefault(row["query_id"], {})[row["system"]] = row["value"]
    return {q: (row["student"], row["teacher"]) for q, row in found.items()}


def facts(
    judged: Judged, findings: Findings, pools: Mapping[str, gate.JudgedPool], weights: gate.Weights
) -> dict[str, Any]:
    """Figures and samples for the manifest.

    pools: of the judged dev queries; weights: the teacher's, which order the samples' passages.
    """
    inverted = trust.most_inverted(findings.readings, _SHOWN)
    lost = trust.heaviest_losses(findings.beside, _SHOWN)
    qrels = qrels_of(judged.queries, "dev") if lost else {}
    rankings = rankings_of(judged.retrieved, "dense", [row.query_id for row in lost]) if lost else {}
    student = {q: [p for p, _ in row] for q, row in rankings.items()}
    orders = {
        row.query_id: gate.rerank(pools[row.query_id], weights) for row in lost if row.query_id in pools
    }
    relevant = {row.query_id: _relevant(qrels[row.query_id], student.get(row.query_id, [])) for row in lost}
    ids = {p for r in inverted for p in (r.anchor_id, r.best_id)} | set(relevant.values())
    ids |= {order[0] for order in orders.values() if order}
    passages = some_passages(judged.corpus, ids)
    texts = query_texts(judged.queries, [*(r.query_id for r in inverted), *(row.query_id for row in lost)])

    def shown(passage_id: str | None) -> str:
        title, text = passages.get(passage_id or "", ("", ""))
        return _cut(passage_text(title, text, titles=True))

    differences = [row.difference for row in findings.beside]
    return {
        "dev": {
            "queries": len(differences),
            "better": sum(d > 0 for d in differences),
            "worse": sum(d < 0 for d in differences),
        },
        "losses": [
            {
                "query": _cut(texts[row.query_id]),
                "student": row.student,
                "teacher": row.teacher,
                "relevant": shown(relevant[row.query_id]),
                "student_rank": _rank(student.get(row.query_id, []), relevant[row.query_id]),
                "teacher_rank": _rank(orders.get(row.query_id, []), relevant[row.query_id]),
                "teacher_first": shown(next(iter(orders.get(row.query_id, [])), None)),
            }
            for row in lost
        ],
        "agreement": trust.agreement(findings.readings),
        "kinds": trust.by_kind(findings.readings),
        "inverted": [
            {
                "query": _cut(texts[r.query_id]),
                "kind": r.kind,
                "anchor": "source" if r.has_source else "retriever's first",
                "anchor_text": shown(r.anchor_id),
                "rank": r.rank,
                "depth": r.depth,
                "gap": r.gap,
                "best_text": shown(r.best_id),
            }
            for r in inverted
        ],
    }


def _relevant(judgements: Mapping[str, int], ranking: Sequence[str]) -> str:
    """The most relevant passage; of several the one that the student ranks highest."""
    place = {p: n for n, p in enumerate(ranking)}
    return min(judgements, key=lambda p: (-judgements[p], place.get(p, len(place)), p))


def _rank(ranking: Sequence[str], passage_id: str) -> int | None:
    return ranking.index(passage_id) + 1 if passage_id in ranking else None


def _cut(text: str) -> str:
    return text if len(text) <= _LENGTH else text[: _LENGTH - 1] + "…"
