"""The groups stage, a part of queries at a time, gives what a loop over whole tables gives. Starts no Ray."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from retrieval_ray import gate, groups, schema, trust
from retrieval_ray.artifacts import Location, Stage, digest, part_name, stage
from retrieval_ray.config import Config
from retrieval_ray.negatives import Margins
from retrieval_ray.stages import group, refresh, score, scores
from retrieval_ray.stages import trust as trusted
from retrieval_ray.stages.collection import Judged
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.profile import Profile
from retrieval_ray.stages.queries import query_row
from retrieval_ray.stages.scores import scores_table

PASSAGES = [f"p{n:02}" for n in range(60)]
DEPTH = 12


def written(store: Location, name: str, parts: dict[str, pa.Table], **facts: Any) -> Stage:
    made = stage(store, name, {"titles": True, "name": name})
    for part, table in parts.items():
        made.write(part, table)
    made.finish(list(parts), **facts)
    return made


def judged(store: Location, *, dev: bool) -> Judged:
    """240 training queries of three kinds in 4 parts, two retrievers, two teachers, some pairs unjudged."""
    rng = random.Random(3)
    rows = []
    for n in range(240):
        kind = ("question", "keywords", "log")[n % 3]
        source = None if kind == "log" else rng.choice(PASSAGES)
        rows.append(query_row(f"q{rng.randrange(10**6)}-{n}", f"text {n}", kind, "train", source, "x"))
    rows += [query_row(f"d{n}", f"dev {n}", "judged", "dev", None, "human") for n in range(12 if dev else 0)]
    parts = {part_name("queries", n, "parquet"): schema.from_rows("queries", rows[n::4]) for n in range(4)}
    if dev:
        found = [
            {"query_id": f"d{n}", "passage_id": p, "relevance": 1}
            for n in range(12)
            for p in PASSAGES[n : n + 2]
        ]
        parts["qrels-dev.parquet"] = schema.from_rows("qrels", found)
    queries = written(store, "queries", parts, buckets=4)
    runs: dict[str, pa.Table] = {}
    pairs = []
    for part in range(4):
        run = []
        for row in rows[part::4]:
            for retriever in ("dense", "bm25", "fused"):
                ranking = rng.sample(PASSAGES, 20 if row["query_id"] != rows[5]["query_id"] else 0)
                if ranking and row["passage_id"] and rng.random() < 0.9:
                    ranking = [p for p in ranking if p != row["passage_id"]]
                    ranking.insert(rng.randrange(6), str(row["passage_id"]))
                run += [
                    {
                        "retriever": retriever, "query_id": row["query_id"], "passage_id": p, "rank": rank,
                        "score": 1 - 0.01 * rank,
                    }
                    for rank, p in enumerate(ranking, start=1)
                ]  # fmt: skip
                if retriever == "fused":
                    pairs += [(row, p) for p in ranking[:DEPTH]]
        runs[part_name("run", part, "parquet")] = schema.from_rows("run", run)
    teachers: dict[str, Stage] = {}
    for name in ("late", "cross"):
        scored: list[list[tuple[str, str, float]]] = [[] for _ in range(3)]
        for row, p in pairs:
            best = 2.0 if p == row["passage_id"] else 0.0
            if row["query_id"] != rows[9]["query_id"] and rng.random() < 0.97:
                scored[int(p[1:]) % 3].append((str(row["query_id"]), p, rng.gauss(best, 1)))
        tables = {part_name("scores", n, "parquet"): scores_table(name, own) for n, own in enumerate(scored)}
        teachers[name] = written(store, f"score-{name}", tables)
    corpus = [{"passage_id": p, "title": "", "text": f"about {p}"} for p in PASSAGES]
    return Judged(
        "made", "test", 1,
        written(
            store, "corpus", {"corpus-0000000.arrow": schema.from_rows("corpus", corpus)},
            buckets=1, rows=len(corpus),
        ),  # fmt: skip
        None, queries, queries, queries, {}, {}, ("dense", "bm25"),
        written(store, "retrieve", runs, buckets=4), teachers,
    )  # fmt: skip


def expected(
    context: Context, made: Judged, weights: dict[str, float]
) -> tuple[list[Any], list[Any], list[Any]]:
    """Rows of the groups, (query_id, reason) of the rejects and readings, all tables held at once."""
    config, dev = context.config.groups, "qrels-dev.parquet" in made.queries.parts()
    fewest = context.config.train.list_sample or config.list_size
    rankings: dict[tuple[str, str], dict[str, float]] = {}
    for row in made.retrieved.read_all("run-").to_pylist():
        rankings.setdefault((row["retriever"], row["query_id"]), {})[row["passage_id"]] = row["score"]
    raw = {
        name: {(r["query_id"], r["passage_id"]): r["score"] for r in own.read_all("scores-").to_pylist()}
        for name, own in made.scores.items()
    }
    margins = Margins(config.relative_margin, None) if config.relative_margin else None
    rejects, readings, kinds = [], [], {}
    rows = sorted(made.queries.read_all("queries-").to_pylist(), key=lambda row: row["query_id"])
    rows = [row for row in rows if row["split"] == "train"]
    pools = {}
    for row in rows:
        q, dense = row["query_id"], rankings.get(("dense", row["query_id"]), {})
        ids = [
            p for p in list(rankings.get(("fused", q), {}))[:DEPTH] if all((q, p) in s for s in raw.values())
        ]
        if not ids:
            rejects.append((q, "nothing_retrieved"))
            continue
        combined = groups.combine({t: np.array([s[q, p] for p in ids]) for t, s in raw.items()}, weights)
        similar = np.array([dense.get(p, np.nan) for p in ids]) if margins else None
        floor = min(dense.values()) if margins else 0.0
        pools[q] = groups.Pool(q, row["kind"], row["passage_id"], ids, combined, similar, floor)
    for q, pool in pools.items():
        own = {r: list(rankings[r, q]) for r in made.retrievers}
        readings.append(trust.read(pool, own))
        problem = groups.inconsistency(
            pool, own, fewest=fewest, source_rank=config.source_rank,
            require_first=config.require_first,
        )  # fmt: skip
        if problem:
            rejects.append((q, problem[0]))
        else:
            kinds.setdefault(pool.kind, []).append(pool)
    survivors = []
    for kind in sorted(kinds):
        values = np.concatenate([pool.scores_N for pool in kinds[kind]])
        scale = groups.Scale.of(
            values, lower_percentile=config.lower_percentile, upper_percentile=config.upper_percentile,
            min_positive_percentile=config.min_positive_percentile,
        )  # fmt: skip
        for pool in kinds[kind]:
            ratio = config.false_negative_ratio
            one = groups.build(
                pool, scale, fewest=fewest, list_size=config.list_size, false_negative_ratio=ratio,
                negatives=config.negatives, margins=margins,
            )  # fmt: skip
            every = groups.build(
                pool, scale, fewest=1, list_size=len(pool.passage_ids), false_negative_ratio=ratio,
                negatives="top",
            )  # fmt: skip
            if isinstance(one, tuple):
                rejects.append((pool.query_id, one[0]))
            else:
                survivors.append((pool.source_id or pool.query_id, one, every))
    sources = sorted({s for s, _, _ in survivors}, key=lambda key: digest([context.config.seed, key]))
    train = context.config.train
    count = round(min(train.dev_share, train.dev_queries / len(survivors)) * len(sources))
    held_out = sources[: max(1, count)]
    lists = [
        group.row_of(
            "made", one if dev or source not in held_out else every, "dev" if source in held_out else "train"
        )
        for source, one, every in survivors
    ]
    return lists, rejects, readings


@pytest.mark.parametrize(("margin", "sample"), [(None, None), (0.95, None), (0.95, 2)])
@pytest.mark.parametrize("dev", [True, False])
def test_lists_rejects_and_readings_are_those_of_whole_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dev: bool, margin: float | None, sample: int | None
) -> None:
    monkeypatch.setattr(scores, "PAIRS", 700)  # several files for each teacher
    config = Config(output_dir=str(tmp_path))
    config.groups.list_size, config.groups.source_rank, config.teacher.depth = 4, 8, DEPTH
    config.groups.min_positive_percentile = 90.0
    config.groups.margin_scores, config.groups.relative_margin = "dense", margin
    config.train.dev_share, config.train.list_sample = 0.2, sample
    if sample:
        config.groups.list_size = DEPTH  # what the margins take away makes lists shorter
    context = Context(config, Location.of(str(tmp_path)), Profile("float32", "cpu", 1, 1024, 1))
    made = judged(context.store, dev=dev)
    grouped = group.run(context, made).groups
    facts = grouped.manifest()
    lists, rejects, readings = expected(context, made, facts["gate"]["weights"])
    table = schema.from_rows("groups", lists)
    assert grouped.read("groups.parquet").equals(table)
    assert len(set(table.column("split").to_pylist())) == 2 and table.num_rows > 60
    trained = grouped.read("groups.parquet").filter(pc.equal(table.column("split"), "train"))
    lengths = set(map(len, trained.column("passage_ids").to_pylist()))
    assert (lengths == {4}) if sample is None else (len(lengths) > 3 and lengths <= set(range(2, DEPTH + 1)))
    found = grouped.read("rejects.parquet").to_pylist()
    assert [(row["id"], row["reason"]) for row in found] == rejects
    reasons = {"nothing_retrieved", "not_retrieved", "not_judged", "not_first", "low_positive"}
    assert {reason for _, reason in rejects} >= reasons
    values = grouped.read("trust.parquet").to_pylist()
    by_reading = trusted.table(trusted.Findings(readings, [])).to_pylist()
    assert [row for row in values if row["metric"] != gate.METRIC] == by_reading
    assert facts["gate"]["queries"] == (12 if dev else 0)
    raw = made.scores["late"].read_all("scores-").column("score").to_pylist()
    assert facts["score_quantiles"]["late"] == np.quantile(raw, np.linspace(0, 1, 41)).tolist()
    assert sorted(grouped.folder.names()) == sorted([*grouped.parts(), "manifest.json"])


@pytest.mark.parametrize(("cosine", "near"), [(0.99, True), (0.0, False)])
def test_margins_see_what_an_approximate_index_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cosine: float, near: bool
) -> None:
    """A negative that no ranking has is as near as its cosine says, in first lists and in renewed ones."""
    config = Config(output_dir=str(tmp_path))
    config.groups.list_size, config.groups.source_rank, config.teacher.depth = 3, 8, DEPTH
    config.groups.margin_scores, config.groups.relative_margin = "dense", 0.95
    context = Context(config, Location.of(str(tmp_path)), Profile("float32", "cpu", 1, 1024, 1))
    made = judged(context.store, dev=False)
    exact = group.run(context, made)
    lists = exact.groups.read("groups.parquet").to_pylist()
    pairs = made.scores["late"].read_all("scores-").select(["query_id", "passage_id"])
    rows = [(row["query_id"], row["passage_id"], cosine) for row in pairs.to_pylist()]
    table = {part_name("scores", 0, "parquet"): scores_table("dense", rows)}
    cosines = written(context.store, "score-dense", table)
    trained = {row["query_id"]: row for row in lists if row["split"] == "train"}
    target = stage(context.store, "refresh", {"cosine": cosine})
    renewed = dict(refresh._renewed_lists(context, exact, exact, {"dense": cosines}, trained, target))
    assert renewed.keys() == trained.keys() and len(renewed) > 60
    for key, found in renewed.items():
        if near:
            assert isinstance(found, tuple) and found[0] == "few_negatives"
        else:
            assert isinstance(found, groups.Group) and found.passage_ids == trained[key]["passage_ids"]
    assert score.similarities(context, made) == {}  # search was exact
    monkeypatch.setattr(score, "_judged", lambda *given: cosines)
    config.retrieve.index = "ivf"
    context = replace(context, store=Location.of(str(tmp_path / "second")))
    found = group.run(context, made).groups
    assert found.read("groups.parquet").to_pylist() == ([] if near else lists)


@pytest.mark.parametrize(("passages", "size"), [(12, 12), (50, 50), (500, 50)])
def test_a_corpus_that_is_smaller_than_a_list_gives_all_of_it(
    tmp_path: Path, passages: int, size: int
) -> None:
    config = Config()
    config.groups.list_size = 50
    context = Context(config, Location.of(str(tmp_path)), Profile("float32", "cpu", 1, 1024, 1))
    found = group.lengths(context, written(context.store, "corpus", {}, rows=passages))
    assert found == {"fewest": size, "list_size": size}
    config.train.list_sample = 8
    assert group.lengths(context, written(context.store, "corpus", {}, rows=passages))["fewest"] == 8
