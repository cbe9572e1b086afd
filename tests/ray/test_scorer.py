"""What a worker of the score stage does with one part. Starts no Ray: the workers are called by hand."""

import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval_ray import schema
from retrieval_ray.artifacts import Location, Stage, bucket_of, part_name, stage
from retrieval_ray.config import Config
from retrieval_ray.contentcache import SCORE, ContentCache
from retrieval_ray.endpoint import Endpoint
from retrieval_ray.errors import UserError
from retrieval_ray.model_files import Model
from retrieval_ray.replies import Reply
from retrieval_ray.stages import pool, query_rows, score, score_lists
from retrieval_ray.stages.collection import Judged, Ranked, extend
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.judged_pools import judged_pools
from retrieval_ray.stages.judges import TeacherId
from retrieval_ray.stages.pool import Pairs
from retrieval_ray.stages.profile import Profile
from retrieval_ray.stages.retrieve import rankings_of
from retrieval_ray.stages.score import Scorer
from retrieval_ray.stages.score_lists import ListScorer
from retrieval_ray.stages.scores import write_part
from retrieval_ray.teachers.listwise import Failure


class Memory:
    """Pairs by part, in memory."""

    def __init__(self, parts: list[list[tuple[str, str]]]) -> None:
        self.parts = parts

    def read(self, number: int) -> Pairs:
        texts = self.parts[number]
        ids = [f"{number}-{n}" for n in range(len(texts))]
        return Pairs(
            [f"q{key}" for key in ids],
            [f"p{key}" for key in ids],
            [q for q, _ in texts],
            [p for _, p in texts],
            [],
        )


class Counting:
    """A teacher that notes what it is asked; it cannot read passages with "bad" in them."""

    asked: list[tuple[str, str]] = []

    def __init__(self) -> None:
        pass

    def score(self, queries: list[str], passages: list[str]) -> Any:
        if any("bad" in passage for passage in passages):
            raise ValueError("cannot read this")
        self.asked += list(zip(queries, passages, strict=True))
        return np.array(
            [np.inf if "endless" in p else len(q) + len(p) for q, p in zip(queries, passages, strict=True)]
        )


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Scorer, Stage]]:
    monkeypatch.setitem(score._ENGINES, "counting", Counting)
    monkeypatch.setattr(Counting, "asked", [])
    store = Location.of(str(tmp_path))

    def make_one(
        parts: list[list[tuple[str, str]]], name: str = "one", teacher: str = "t@1"
    ) -> tuple[Scorer, Stage]:
        target = stage(store, "score-counting", {"name": name})
        scorer = Scorer(teacher, Memory(parts), target, store, len(parts), "counting", {}, None)
        return scorer, target

    return make_one


def written(target: Stage, number: int, prefix: str = "scores") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = target.read(part_name(prefix, number, "parquet")).to_pylist()
    return rows


def test_pairs_that_cannot_be_judged_are_rejects_and_the_others_scores(make: Callable[..., Any]) -> None:
    part = [
        ("who", "silk"),
        ("who", "bad silk"),
        ("what", "endless"),
        ("what", "wool"),
        ("which", "bad wool"),
    ]
    scorer, target = make([part])
    facts = scorer.run({"number": 0})
    assert facts.pop("tokens") == 0  # this teacher has none
    assert facts == {"judged": 2, "cached": 0, "errors": {"failed": 2, "not_finite": 1}}
    assert [(row["query_id"], row["score"]) for row in written(target, 0)] == [("q0-0", 7), ("q0-3", 8)]
    rejects = {row["id"]: (row["reason"], row["detail"]) for row in written(target, 0, "rejects")}
    assert rejects == {
        "q0-1 p0-1": ("failed", "ValueError: cannot read this"),
        "q0-2 p0-2": ("not_finite", "the model's score is inf"),
        "q0-4 p0-4": ("failed", "ValueError: cannot read this"),
    }
    assert {row["stage"] for row in written(target, 0, "rejects")} == {"score"}


def test_each_different_pair_of_texts_is_judged_once_by_all_runs(make: Callable[..., Any]) -> None:
    part = [("who", "silk"), ("who", "wool"), ("who", "silk")]
    scorer, first = make([part])
    assert scorer.run({"number": 0})["judged"] == 2
    assert sorted(Counting.asked) == [("who", "silk"), ("who", "wool")]
    other, second = make([[*part, ("who", "salt")]], "another run")
    assert other.run({"number": 0})["judged"] == 1
    assert sorted(Counting.asked) == [("who", "salt"), ("who", "silk"), ("who", "wool")]
    scores = {row["passage_id"]: row["score"] for row in written(second, 0)}
    assert scores == {"p0-0": 7, "p0-1": 7, "p0-2": 7, "p0-3": 7}
    third, _ = make([part], "another teacher", "t@2")
    third.run({"number": 0})
    assert len(Counting.asked) == 5


def test_a_pair_that_failed_once_is_tried_again_and_its_reject_goes(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    part = [("who", "silk"), ("who", "bad silk")]
    scorer, target = make([part])
    scorer.run({"number": 0})
    assert len(written(target, 0, "rejects")) == 1
    monkeypatch.setattr(Counting, "score", lambda self, q, p: np.full(len(q), 2.0, dtype=np.float32))
    scorer.run({"number": 0})
    assert [row["score"] for row in written(target, 0)] == [7, 2]
    assert target.missing([part_name("rejects", 0, "parquet")])


def test_a_teacher_that_dies_writes_no_part_it_did_not_judge(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though each part holds but a few pairs; what was finished stays, and a rerun judges the rest."""
    parts = [[("who", "silk")], [("who", "wool"), ("who", "salt")]]
    scorer, target = make(parts)
    scorer.run({"number": 0})

    def dead(self: Any, queries: Any, passages: Any) -> Any:
        raise RuntimeError("the engine has died")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="the engine has died"):
        patch.setattr(Counting, "score", dead)
        scorer.run({"number": 1})
    assert target.missing([part_name("scores", n, "parquet") for n in range(2)]) == ["scores-0000001.parquet"]
    fresh, _ = make(parts)
    assert fresh.run({"number": 1})["judged"] == 2


def test_concurrent_writers_of_one_cache_lose_and_break_nothing(make: Callable[..., Any]) -> None:
    parts = [[(f"q{n % 7}", f"passage {part} {n}") for n in range(60)] for part in range(4)]
    scorers = [make(parts, f"run {n}") for n in range(4)]

    def work(scorer: Scorer) -> None:
        for number in range(4):
            scorer.run({"number": number})

    threads = [threading.Thread(target=work, args=(scorer,)) for scorer, _ in scorers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tables = [[written(target, number) for number in range(4)] for _, target in scorers]
    assert tables[0] == tables[1] == tables[2] == tables[3]
    cache = ContentCache(scorers[0][0].cache.folder, "unused", SCORE)
    cache.folder = scorers[0][0].cache.folder
    assert sum(len(cache.read(number, 4)) for number in range(4)) == 240
    fresh, _ = make(parts, "one more")
    assert [fresh.run({"number": number})["judged"] for number in range(4)] == [0] * 4


def test_a_worker_reads_its_own_part_alone(make: Callable[..., Any]) -> None:
    scorer, _ = make([[("a", "b")], [("c", "d")]])
    scorer.run({"number": 1})
    assert Counting.asked == [("c", "d")]


# --- the pool by passage --------------------------------------------------------------------------


@pytest.fixture
def ranked(tmp_path: Path) -> Ranked:
    """40 passages in 4 parts, 12 queries in 2, everyone's fused ranking of 10."""
    store, rng = Location.of(str(tmp_path)), np.random.default_rng(0)
    passages = {f"p{n}": f"passage {n}" for n in range(40)}
    queries = {f"q{n}": f"query {n}" for n in range(12)}
    corpus = stage(store, "corpus", {"titles": True})
    for number in range(4):
        rows = [
            {"passage_id": p, "title": "", "text": t}
            for p, t in passages.items()
            if bucket_of(t, 4) == number
        ]
        corpus.write(part_name("corpus", number, "arrow"), schema.from_rows("corpus", rows))
    corpus.finish([part_name("corpus", n, "arrow") for n in range(4)], buckets=4)
    texts, retrieved = stage(store, "queries", {}), stage(store, "retrieve", {})
    for number in range(2):
        own = [q for q, t in queries.items() if bucket_of(t, 2) == number]
        blank = {"kind": "log", "language": None, "split": "train", "passage_id": None, "generator": "x"}
        rows = [{"query_id": q, "text": queries[q], **blank} for q in own]
        texts.write(part_name("queries", number, "parquet"), schema.from_rows("queries", rows))
        run = [
            {"retriever": name, "query_id": q, "passage_id": f"p{p}", "rank": rank, "score": -rank}
            for name in ("dense", "fused")
            for q in own
            for rank, p in enumerate(rng.permutation(40)[:10], start=1)
        ]
        retrieved.write(part_name("run", number, "parquet"), schema.from_rows("run", run))
    texts.finish([part_name("queries", n, "parquet") for n in range(2)], buckets=2, rows=12)
    retrieved.finish([part_name("run", n, "parquet") for n in range(2)], buckets=2)
    return Ranked("small", "test", 1, corpus, None, texts, corpus, texts, {}, {}, ("dense",), retrieved)


def laid_out(ranked: Ranked, store: Path, depth: int, files: list[list[int]], parts: int = 4) -> Stage:
    target = stage(Location.of(str(store)), "pool", {"files": files, "parts": parts})
    pool._write_index(ranked.corpus, target, parts)
    for number, own in enumerate(files):
        pool._Layer(pool.Heads(ranked, depth, 5, None), target).run({"number": number, "queries": own})
    names = ["index.arrow", *(part_name("pairs", n, "parquet") for n in range(len(files)))]
    target.finish(names, buckets=parts, corpus_buckets=4)
    return target


@pytest.mark.parametrize(("files", "parts"), [([[0, 1]], 4), ([[0], [1]], 4), ([[0], [1]], 16)])
def test_every_pair_lies_with_its_passage(
    ranked: Ranked, tmp_path: Path, files: list[list[int]], parts: int
) -> None:
    target = laid_out(ranked, tmp_path, 6, files, parts)
    expected = set()
    for number in range(2):
        for row in ranked.retrieved.read(part_name("run", number, "parquet")).to_pylist():
            if row["retriever"] == "fused" and row["rank"] <= 6:
                expected.add((row["query_id"], row["passage_id"]))
    assert len(expected) == 72
    found = set()
    for number in range(parts):
        pairs = pool.read(target, ranked.corpus, number)
        for q, p, query, passage, (part, row) in zip(
            pairs.query_ids, pairs.passage_ids, pairs.queries, pairs.passages, pairs.places, strict=True
        ):
            assert bucket_of(passage, parts) == number and (q, p) not in found
            assert (query, passage) == (f"query {q[1:]}", f"passage {p[1:]}")
            table = ranked.queries.read(part_name("queries", part, "parquet"))
            assert table.column("query_id")[row].as_py() == q
            found.add((q, p))
    assert found == expected


def test_parts_are_cut_finer_where_queries_are_many() -> None:
    assert pool._parts(4, pool.PER_PART * 4) == 4
    assert pool._parts(4, pool.PER_PART * 4 + 1) == 8
    assert pool._parts(16, 40_000_000) == 8192  # two million queries of 5,000 passages
    assert pool._parts(1, 10**12) == 65_536


def test_a_query_whose_source_is_not_retrieved_is_not_judged(ranked: Ranked, tmp_path: Path) -> None:
    """By any retriever, in its own first five; only the rule's own naive form is asked."""
    runs = [ranked.retrieved.read(part_name("run", number, "parquet")).to_pylist() for number in range(2)]
    dense = {
        (r["query_id"], r["passage_id"]): r["rank"] for run in runs for r in run if r["retriever"] == "dense"
    }
    first = {q: p for (q, p), rank in dense.items() if rank == 1}
    late = {q: p for (q, p), rank in dense.items() if rank == 6}
    sources = {q: (late if n % 2 else first)[q] for n, q in enumerate(sorted(first)[:8])}  # of four no source
    queries = stage(Location.of(str(tmp_path)), "queries", {"with": "sources"})
    for number in range(2):
        name = part_name("queries", number, "parquet")
        rows = ranked.queries.read(name).to_pylist()
        queries.write(
            name, schema.from_rows("queries", [{**r, "passage_id": sources.get(r["query_id"])} for r in rows])
        )
    queries.finish([part_name("queries", n, "parquet") for n in range(2)], buckets=2, rows=12)
    heads = pool.Heads(replace(ranked, queries=queries), 6, 5, None)
    judged = {q for number in range(2) for q in heads.part(number).column("query_id").to_pylist()}
    assert judged == first.keys() - {q for q, p in sources.items() if dense[q, p] > 5} and len(judged) == 8
    tests = replace(heads, ranked=replace(ranked, queries=queries, retrievers=("dense", "bm25")))
    assert not {q for n in range(2) for q in tests.part(n).column("query_id").to_pylist()} & sources.keys()


def test_passages_whose_hashes_are_the_same_are_told_apart(
    ranked: Ranked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def few(ids: list[str]) -> Any:
        return np.array([int(key[1:]) % 3 for key in ids], dtype=np.uint64)

    exact = laid_out(ranked, tmp_path, 6, [[0, 1]])
    monkeypatch.setattr(pool, "_hashes", few)
    target = laid_out(ranked, tmp_path / "few", 6, [[0, 1]])
    for number in range(4):
        one, other = (pool.read(each, ranked.corpus, number) for each in (exact, target))
        assert sorted(set(zip(one.query_ids, one.passage_ids, strict=True))) == sorted(
            set(zip(other.query_ids, other.passage_ids, strict=True))
        )


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4)), max_size=12))
def test_rows_of_queries_are_those_asked_for(tmp_path_factory: Any, places: list[tuple[int, int]]) -> None:
    store = Location.of(str(tmp_path_factory.getbasetemp() / "rows"))
    table = stage(store, "encode", {})
    for number in range(2):
        name = part_name("vectors", number, "arrow")
        if table.missing([name]):
            vectors = pa.FixedSizeListArray.from_arrays(
                pa.array(np.arange(10, dtype=np.float16) + 100 * number), 2
            )
            table.write(name, pa.table({"vector": vectors}))
    found = query_rows.QueryRows(table, "vectors").take(places, "vector")
    assert found.keys() == set(places)
    for part, row in places:
        assert found[part, row].as_py() == [100 * part + 2 * row, 100 * part + 2 * row + 1]


# --- lists ----------------------------------------------------------------------------------------

ENDPOINT = {
    "url": "http://localhost:1", "body": {}, "key_variable": "K", "concurrency": 4, "timeout_seconds": 1.0,
    "retries": 0,
}  # fmt: skip


@pytest.fixture
def score_lists_of(ranked: Ranked, tmp_path: Path) -> Callable[[], Stage]:
    """A function that runs the listwise score stage to its end."""
    pairs = laid_out(ranked, tmp_path, 6, [[0, 1]])
    store = Location.of(str(tmp_path))
    profile = Profile(precision="float32", device="cpu", threads=1, token_budget=1024, workers=1)

    def run() -> Stage:
        context = Context(Config(), store, profile, Model("/student", "a" * 64))
        target = stage(store, "score-listwise", {})
        source = score_lists.PooledByQuery(pool.Heads(ranked, 6, 5, None), pairs)
        arguments = {
            "teacher_id": "listwise-ranks@x", "endpoint": ENDPOINT, "window": 20, "stride": 10,
            "source": source, "target": target, "store": store, "parts": 2,
        }  # fmt: skip
        if context.start(target, "lists"):
            teacher = TeacherId("listwise-ranks", "x", "1")
            score.score_parts(context, "lists", ListScorer, arguments, target, teacher, 2, "c", light=True)
        return target

    return run


def serve(monkeypatch: pytest.MonkeyPatch, answer: Callable[[str], Reply]) -> list[str]:
    """An endpoint that gives ``answer(query)``; returns what it was asked, as it comes."""
    asked: list[str] = []

    async def replies(self: Any, requests: Any) -> Any:
        for request in requests:
            query = re.findall("Search query: (.*)", request.messages[-1]["content"])[0]
            asked.append(query)
            yield replace(answer(query), query_id=request.query_id)

    monkeypatch.setattr(Endpoint, "replies", replies)
    return asked


def fine(text: str = "[2] > [1] > [3] > [4] > [5] > [6]", **more: Any) -> Reply:
    return Reply("", text, None, 0, 0, **more)


def test_a_part_with_failures_that_may_pass_is_open_until_a_later_run_asks_for_them(
    score_lists_of: Callable[[], Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    def troubled(query: str) -> Reply:
        return Reply("", None, "HTTP 503: busy", 0, 0) if query in ("query 3", "query 4") else fine()

    asked = serve(monkeypatch, troubled)
    with pytest.raises(UserError, match=r"2 queries have no reply.*HTTP 503: busy.*same command again"):
        score_lists_of()
    assert len(asked) == 12
    asked = serve(monkeypatch, lambda query: fine())
    target = score_lists_of()
    assert sorted(asked) == ["query 3", "query 4"]
    assert target.manifest()["rows"] == 72 and target.manifest()["rejected"] == {}


def test_replies_that_are_no_order_are_rejects_and_repairs_are_counted(
    score_lists_of: Callable[[], Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = {"query 1": fine("I cannot."), "query 2": fine("[2] > [1]", cut=True), "query 3": fine("[2]")}
    serve(monkeypatch, lambda query: odd.get(query, fine()))
    facts = score_lists_of().manifest()
    assert facts["rejected"] == {"no_order": 6, "cut": 6} and facts["rows"] == 60
    assert facts["repaired"] == 1


def test_where_nothing_was_judged_no_part_is_taken_for_done(
    score_lists_of: Callable[[], Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, lambda query: Reply("", None, "HTTP 400: no such field", 0, 0, refused=True))
    with pytest.raises(UserError, match=r"no pair could be judged.*no such field"):
        score_lists_of()
    serve(monkeypatch, lambda query: fine())
    assert score_lists_of().manifest()["rows"] == 72


def test_a_listwise_teacher_keeps_orders_by_pool(
    ranked: Ranked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = laid_out(ranked, tmp_path, 6, [[0, 1]])
    shown = []

    def ask(self: Any, prompts: list[Any]) -> list[str | Failure]:
        """The highest number first; query 3 gets no reply."""
        replies: list[str | Failure] = []
        for messages in prompts:
            text = messages[-1]["content"]
            shown.append(text)
            found = re.findall(r"^\[(\d+)\] passage (\d+)$", text, flags=re.M)
            order = sorted(found, key=lambda pair: -int(pair[1]))
            refused = Failure("no_reply", "HTTP 400: no")
            replies.append(refused if "query: query 3\n" in text else " > ".join(f"[{n}]" for n, _ in order))
        return replies

    monkeypatch.setattr(ListScorer, "_ask", ask)
    store = Location.of(str(tmp_path))

    def run(depth: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, int]]:
        source = score_lists.PooledByQuery(pool.Heads(ranked, depth, 5, None), target)
        out = stage(store, "score-listwise", {"depth": depth, "calls": len(shown)})
        worker = ListScorer("listwise-ranks@x", ENDPOINT, 20, 10, source, out, store, 2)
        facts = [worker.run({"number": number}) for number in range(2)]
        rejects = [
            row
            for number in range(2)
            if not out.missing([part_name("rejects", number, "parquet")])
            for row in written(out, number, "rejects")
        ]
        counts = {key: sum(f[key] for f in facts) for key in ("judged", "cached")}
        return [row for number in range(2) for row in written(out, number)], rejects, counts

    rows, rejects, counts = run(6)
    assert counts == {"judged": 66, "cached": 0} and len(shown) == 12
    by_query: dict[str, list[tuple[float, int]]] = {}
    for row in rows:
        by_query.setdefault(row["query_id"], []).append((-row["score"], int(row["passage_id"][1:])))
    assert len(by_query) == 11 and "q3" not in by_query
    for ranks in by_query.values():
        assert [rank for rank, _ in sorted(ranks)] == [1, 2, 3, 4, 5, 6]
        numbers = [number for _, number in sorted(ranks)]
        assert numbers == sorted(numbers, reverse=True)
    assert {row["id"].split()[0] for row in rejects} == {"q3"} and len(rejects) == 6
    assert {(row["reason"], row["detail"]) for row in rejects} == {("no_reply", "HTTP 400: no")}

    again, _, counts = run(6)
    assert again == rows and counts == {"judged": 0, "cached": 66}
    assert len(shown) == 13  # only the query that had no reply was asked again
    run(5)
    assert len(shown) == 13 + 12  # other pools: an order says nothing of them
    assert {row["teacher"] for row in rows} == {"listwise-ranks@x"}


# --- downstream -----------------------------------------------------------------------------------


def test_a_pair_that_some_teacher_could_not_judge_is_in_no_pool(ranked: Ranked, tmp_path: Path) -> None:
    rankings = rankings_of(ranked.retrieved, "fused")
    heads = {q: [p for p, _ in ranking[:6]] for q, ranking in rankings.items()}
    missing = {"one": ("q1", heads["q1"][2]), "other": ("q5", heads["q5"][0])}
    stages = {}
    for name, left_out in missing.items():
        stages[name] = stage(Location.of(str(tmp_path)), f"score-{name}", {})
        rows = [(q, p, 1.0) for q, own in heads.items() for p in own if (q, p) != left_out]
        write_part(stages[name], 0, name, rows, [])
        stages[name].finish([part_name("scores", 0, "parquet")])
    judged = extend(ranked, Judged, scores=stages)
    pools = judged_pools(judged, 6)
    for query_id, own in heads.items():
        left = [p for p in own if (query_id, p) not in missing.values()]
        assert list(pools[query_id].passage_ids) == left
        assert {len(scores) for scores in pools[query_id].teachers.values()} == {len(left)}
    assert len(pools["q1"].passage_ids) == len(pools["q5"].passage_ids) == 5
