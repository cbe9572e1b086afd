"""The score stage: every pair once, whoever judges; what cannot be judged stops nothing."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrieval_ray.artifacts import Stage
from retrieval_ray.config_file import load
from retrieval_ray.stages import job
from retrieval_ray.stages.ingest import passage_text, passages
from retrieval_ray.stages.queries import queries_table
from retrieval_ray.stages.retrieve import FUSED, rankings_of
from retrieval_ray.student import Student
from retrieval_ray.teachers.cross_encoder import CrossEncoder
from tests import oracles

from .conftest import ROOT, job_module, small_settings

pytestmark = [pytest.mark.ray, pytest.mark.slow]
CONFIG = str(ROOT / "configs" / "cpu.yaml")


def run(settings: list[str], until: str = "groups") -> Path:
    """The main job in this process; returns the store."""
    context = job.open_run(load(CONFIG, settings), dry_run=False)
    job_module("adapt").adapt(context, until)
    return Path(context.store.path)


def stages(store: Path, name: str) -> list[Stage]:
    from retrieval_ray.artifacts import Location

    found = []
    for manifest in sorted(store.glob(f"{name}-*/manifest.json")):
        facts = json.loads(manifest.read_text())
        if facts["stage"] == name:
            where = Location.of(str(manifest.parent))
            found.append(Stage(name, facts["fingerprint"], facts["identity"], where))
    return found


def only(store: Path, name: str) -> Stage:
    (found,) = stages(store, name)
    return found


def rows(stage: Stage, prefix: str = "scores-") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = stage.read_all(prefix).to_pylist()
    return found


def cached(store: Path) -> list[bytes]:
    import pyarrow.parquet as pq

    files = store.glob("scores/*/*/*/*.parquet")
    return [key for file in files for key in pq.read_table(file).column("key").to_pylist()]


@pytest.fixture(scope="module")
def settings(
    collection: Path, student_folder: str, cross_encoder_folder: str, tmp_path_factory: Any
) -> list[str]:
    output = tmp_path_factory.mktemp("score") / "out"
    member = f"{{kind: cross_encoder, model: {cross_encoder_folder}, max_tokens: 64}}"
    return [
        *small_settings(collection, Path(student_folder), output),
        "teacher.kind=ensemble",
        f"teacher.members=[{member}, {{kind: late}}, {{kind: bm25}}, {{kind: dense}}]",
        "compute.workers=2",
        "compute.threads=1",
    ]


@pytest.fixture(scope="module")
def store(ray_local: None, settings: list[str]) -> Path:
    return run(settings)


@pytest.fixture(scope="module")
def pooled(store: Path) -> set[tuple[str, str]]:
    """The pairs as the rankings have them."""
    rankings = rankings_of(only(store, "retrieve"), FUSED)
    return {(q, p) for q, ranking in rankings.items() for p, _ in ranking[:20]}


@pytest.mark.parametrize("name", ["cross_encoder", "late", "bm25", "dense"])
def test_every_teacher_judges_exactly_the_heads_of_the_fused_rankings(
    store: Path, pooled: set[tuple[str, str]], name: str
) -> None:
    stage = only(store, f"score-{name}")
    pairs = [(row["query_id"], row["passage_id"]) for row in rows(stage)]
    assert len(pairs) == len(set(pairs)) == stage.manifest()["rows"] and set(pairs) == pooled
    assert stage.manifest()["rejected"] == {}


def texts_of(store: Path) -> tuple[dict[str, str], dict[str, str]]:
    table = queries_table(only(store, "queries"))
    queries = dict(zip(*(table.column(c).to_pylist() for c in ("query_id", "text")), strict=True))
    texts = passages(only(store, "corpus"))
    return queries, {key: passage_text(title, text, titles=True) for key, title, text in texts}


def test_scores_are_those_of_the_models_by_themselves(
    store: Path, student_folder: str, cross_encoder_folder: str
) -> None:
    queries, passages = texts_of(store)
    sample = rows(only(store, "score-cross_encoder"))[::53]
    asked = [queries[r["query_id"]] for r in sample], [passages[r["passage_id"]] for r in sample]
    teacher = CrossEncoder(cross_encoder_folder, max_tokens=64, device="cpu")
    np.testing.assert_allclose([r["score"] for r in sample], teacher.score(*asked), atol=1e-4)

    student = Student(student_folder, precision="float32", device="cpu")
    for name, atol in (("dense", 2e-3), ("late", 2e-3)):
        for row in rows(only(store, f"score-{name}"))[::211]:
            query, passage = queries[row["query_id"]], passages[row["passage_id"]]
            if name == "dense":
                expected = float(
                    student.encode([query], "query", token_budget=512)[0]
                    @ student.encode([passage], "passage", token_budget=512)[0]
                )
            else:
                expected = oracles.late_interaction(
                    student.token_vectors([query], "query", token_budget=512)[0],
                    student.token_vectors([passage], "passage", token_budget=512)[0],
                )
            assert row["score"] == pytest.approx(expected, abs=atol)


def test_weights_are_chosen_among_all_members_of_the_ensemble(store: Path) -> None:
    weights = only(store, "groups").manifest()["gate"]["weights"]
    assert weights.keys() == {"cross_encoder", "late", "bm25", "dense"}
    assert sum(weights.values()) == pytest.approx(1)


def test_a_teacher_alone_is_judged_once_for_an_ensemble_too(
    store: Path, settings: list[str], cross_encoder_folder: str, tmp_path: Path
) -> None:
    before = cached(store)
    run(
        [
            *settings, "teacher.kind=cross_encoder", "teacher.members=[]", "teacher.max_tokens=64",
            f"teacher.model={cross_encoder_folder}", f"store={store}", f"output_dir={tmp_path}",
        ],
        "score",
    )  # fmt: skip
    assert len(stages(store, "score-cross_encoder")) == 1  # the very same stage
    assert before and sorted(cached(store)) == sorted(before)


def test_only_new_queries_and_passages_are_judged(
    store: Path, settings: list[str], collection: Path, pooled: set[tuple[str, str]], tmp_path: Path
) -> None:
    more, shared = tmp_path / "trade", tmp_path / "store"
    shutil.copytree(collection, more)
    shutil.copytree(store, shared)
    with (more / "corpus.jsonl").open("a") as lines:
        for n in range(5):
            lines.write(
                json.dumps({"_id": f"new{n}", "title": "sailors", "text": f"The sailors sell honey {n}"})
                + "\n"
            )
    with (more / "queries.jsonl").open("a") as lines:
        lines.write(json.dumps({"_id": "qnew", "text": "who sells honey"}) + "\n")
    with (more / "qrels" / "test.tsv").open("a") as lines:
        lines.write("qnew\tnew0\t1\n")
    run([*settings, f"dataset.path={more}", f"store={shared}", f"output_dir={tmp_path / 'out'}"], "score")
    (newer,) = [
        s
        for s in stages(shared, "score-cross_encoder")
        if s.fingerprint != only(store, "score-cross_encoder").fingerprint
    ]
    facts = newer.manifest()
    old = {(q, p) for q, p in pooled}
    now = {(row["query_id"], row["passage_id"]) for row in rows(newer)}
    assert facts["rows_this_run"] == len(now - old) and facts["from_cache"] == len(now & old)
    assert len(now & old) > 1000 > len(now - old) > 0
    assert max(Counter(cached(shared)).values()) == 1  # no pair of texts was judged twice
