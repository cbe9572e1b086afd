"""Which scores in a store are held beside this run's; no cluster is started."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from retrieval_ray import schema
from retrieval_ray.artifacts import Location, Stage, stage
from retrieval_ray.stages import parity
from retrieval_ray.stages.collection import Judged
from retrieval_ray.stages.judges import TeacherId

pytestmark = [pytest.mark.ray]


def _retrieved(store: Location, queries: str, profile: str) -> Stage:
    made = stage(store, "retrieve", {"corpus": "c", "queries": queries, "passages": profile})
    made.write("run-0.parquet", schema.from_rows("run", [
        {"retriever": "fused", "query_id": queries + profile, "passage_id": "a", "rank": 1, "score": 1.0}
    ]))  # fmt: skip
    made.finish(["run-0.parquet"])
    return made


def _scored(store: Location, model: str, settings: str, retrieved: Stage, scores: dict[str, float]) -> Stage:
    teacher = str(TeacherId("cross_encoder", model, settings))
    made = stage(store, "score-cross_encoder", {"teacher": teacher, "retrieved": retrieved.content()})
    rows: list[dict[str, Any]] = [
        {"teacher": teacher, "query_id": "q", "passage_id": p, "score": s} for p, s in scores.items()
    ]
    made.write("scores-0000000.parquet", schema.from_rows("scores", rows))
    made.finish(["scores-0000000.parquet"], teacher=teacher, model=model, settings=settings, rows=len(rows))
    return made


def test_of_many_pairs_the_same_parts_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four parts against eight, in which part 1 of four lies in 1 and 5."""
    store = Location.of(str(tmp_path))
    stages = []
    for parts, offset in ((4, 0.0), (8, 0.5)):
        made = stage(store, "score", {"parts": parts})
        names = [f"scores-{number:07d}.parquet" for number in range(parts)]
        for number, name in enumerate(names):
            rows: list[dict[str, Any]] = [
                {"teacher": "t", "query_id": "q", "passage_id": f"p{n:02d}", "score": n + offset}
                for n in range(number, 32, parts)
            ]
            made.write(name, schema.from_rows("scores", rows))
        made.finish(names, rows=32)
        stages.append(made)
    monkeypatch.setattr(parity, "_PAIRS", 14)
    for own, other, apart in ((*stages, 0.5), (*reversed(stages), -0.5)):
        one, another = parity._shared(own, other)
        assert [int(score) for score in one] == [n for n in range(32) if n % 4 < 2]
        assert (another - one).tolist() == [apart] * 16


def test_the_same_weights_on_the_same_data_are_compared_and_nothing_else(tmp_path: Path) -> None:
    store = Location.of(str(tmp_path))
    ours, theirs = _retrieved(store, "same", "float32"), _retrieved(store, "same", "bfloat16")
    elsewhere = _retrieved(store, "others", "float32")
    m3 = "BAAI/bge-reranker-v2-m3@0123abcd"
    own = _scored(store, m3, "512-float32", ours, {"a": 1.0, "b": 2.0, "c": 4.0})
    _scored(store, m3, "512-bfloat16", theirs, {"a": 1.25, "b": 2.0, "d": 9.0})
    _scored(store, m3, "512-int8", theirs, {"d": 9.0})  # no pair in common
    _scored(store, "BAAI/bge-reranker-v2-gemma@0123abcd", "512-bfloat16", ours, {"a": 7.0})  # another model
    _scored(store, "BAAI/bge-reranker-v2-m3@4567abcd", "512-bfloat16", ours, {"a": 7.0})  # another commit
    _scored(store, m3, "512-float16", elsewhere, {"a": 7.0})  # other queries
    old = stage(store, "score-cross_encoder", {"teacher": f"cross_encoder@{m3}-256-float32"})
    old.finish([], teacher=f"cross_encoder@{m3}-256-float32")  # written before models stood in manifests
    unfinished = stage(store, "score-cross_encoder", {"teacher": "cross_encoder@aa-1", "retrieved": "x"})
    unfinished.folder.filesystem.create_dir(unfinished.folder.path)
    anything: Any = own
    judged = Judged(
        name="n", split="test", relevance_threshold=1, corpus=anything, generated=None, queries=anything,
        passages=anything, query_vectors=anything, more_passages={}, more_query_vectors={},
        retrievers=("dense",), retrieved=ours, scores={"cross_encoder": own},
    )  # fmt: skip
    context: Any = SimpleNamespace(store=store)
    (found,) = parity.run(context, judged)
    assert (found["ours"], found["theirs"]) == (
        f"cross_encoder@{m3}-512-float32", f"cross_encoder@{m3}-512-bfloat16"
    )  # fmt: skip
    assert (found["pairs"], found["largest"], found["mean"], found["rank_correlation"]) == (
        2,
        0.25,
        0.125,
        pytest.approx(1.0),
    )
