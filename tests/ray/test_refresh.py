"""Negatives mined anew while training goes on, and rounds of the whole method, on a small collection."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import retrieval_ray
from retrieval_ray.artifacts import Stage
from retrieval_ray.config_file import load
from retrieval_ray.moe import moe_layers
from retrieval_ray.stages import job, refresh, train

from .conftest import ROOT, job_module, small_settings

pytestmark = [pytest.mark.ray, pytest.mark.slow]
CONFIG = str(ROOT / "configs" / "cpu.yaml")
EPOCHS = [
    "train.max_epochs=3", "train.patience=3", "train.refresh_epochs=1", "teacher.gate=false",
    "queries.negatives=true", "train.terms.clp=0.1",
]  # fmt: skip


def adapt(settings: list[str]) -> dict[str, Any]:
    context = job.open_run(load(CONFIG, settings), dry_run=False)
    job_module("adapt").adapt(context, None)
    metrics: dict[str, Any] = json.loads(Path(context.config.output_dir, "metrics.json").read_text())
    return metrics


def stages(output: Path, name: str) -> list[Path]:
    return sorted(path.parent for path in (output / "store").glob(f"{name}-*/manifest.json"))


def manifest(stage: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((stage / "manifest.json").read_text())
    return facts


@pytest.fixture(scope="module")
def refreshed(ray_local: None, collection: Path, student_folder: str, tmp_path_factory) -> Path:  # type: ignore[no-untyped-def]
    """Three epochs; the third trains on what the student retrieved after the first."""
    output = tmp_path_factory.mktemp("refresh") / "out"
    adapt([*small_settings(collection, Path(student_folder), output), *EPOCHS])
    return output


def test_a_refresh_changes_negatives_and_nothing_else(refreshed: Path) -> None:
    (groups,), (renewed,) = stages(refreshed, "groups"), stages(refreshed, "refresh")
    before = pq.read_table(groups / "groups.parquet").to_pylist()
    after = pq.read_table(renewed / "groups.parquet").to_pylist()
    assert [(r["query_id"], r["split"], r["kind"]) for r in before] == [
        (r["query_id"], r["split"], r["kind"]) for r in after
    ]
    new = common = kept_out = 0
    for old, now in zip(before, after, strict=True):
        if old["split"] == "dev":
            assert old == now
            continue
        assert len(set(now["passage_ids"])) == len(now["passage_ids"]) == len(old["passage_ids"])
        suspected = set(old["excluded_ids"]) - {now["positive_id"]}
        assert suspected <= set(now["excluded_ids"]) and now["positive_id"] not in now["excluded_ids"]
        kept_out += len(suspected)
        score = dict(zip(old["passage_ids"], old["teacher_scores"], strict=True))
        for passage, value in zip(now["passage_ids"], now["teacher_scores"], strict=True):
            if passage in score:  # normalised as in the first round: the same score
                assert value == pytest.approx(score[passage], abs=1e-12)
                common += 1
            else:
                new += 1
    facts = manifest(renewed)
    lists = sum(row["split"] == "train" for row in before)
    assert facts["renewed"] == lists and facts["kept"] == {}
    assert new > 0 and common > lists and kept_out > 0
    negatives = [
        set(now["passage_ids"][1:]) - set(old["passage_ids"])
        for old, now in zip(before, after, strict=True)
        if old["split"] == "train"
    ]
    share = sum(map(len, negatives)) / lists / 5  # lists of 6
    assert facts["new_negatives"] == pytest.approx(share, abs=1e-4)


def test_every_new_negative_has_the_query_that_it_answers(refreshed: Path) -> None:
    """The same as before for a passage that was a negative before."""
    lists = [*stages(refreshed, "groups"), *stages(refreshed, "refresh")]
    found = {}
    for stage in stages(refreshed, "negatives"):
        rows = pq.read_table(stage / "queries.parquet").to_pylist()
        found["earlier" in manifest(stage)["identity"]] = {row["passage_id"]: row["text"] for row in rows}
    wanted = [
        {
            passage
            for row in pq.read_table(stage / "groups.parquet").to_pylist()
            if row["split"] == "train"
            for passage in row["passage_ids"][1:]
        }
        for stage in lists
    ]
    first, second = found[False], found[True]
    assert [set(first), set(second)] == wanted and set(second) - set(first)
    assert all(second[passage] == first[passage] for passage in set(second) & set(first))


def test_only_pairs_of_training_lists_that_are_new_are_judged(refreshed: Path) -> None:
    (groups,) = stages(refreshed, "groups")
    trained = {
        row["query_id"]
        for row in pq.read_table(groups / "groups.parquet").to_pylist()
        if row["split"] == "train"
    }
    by_stage = {}
    for stage in stages(refreshed, "score-late"):
        rows = [row for part in sorted(stage.glob("scores-*")) for row in pq.read_table(part).to_pylist()]
        by_stage[stage] = {(row["query_id"], row["passage_id"]): row["score"] for row in rows}
    first, second = sorted(by_stage.values(), key=len, reverse=True)
    assert {query for query, _ in second} == trained < {query for query, _ in first}
    assert all(first[pair] == score for pair, score in second.items() if pair in first)
    (facts,) = [manifest(s) for s in by_stage if by_stage[s] is second]
    assert facts["rows_this_run"] == len(second.keys() - first.keys()) > 0
    assert facts["from_cache"] == len(second.keys() & first.keys())


def test_training_uses_a_refresh_from_the_step_it_is_for(refreshed: Path) -> None:
    (trained,), (renewed,) = stages(refreshed, "train"), stages(refreshed, "refresh")
    facts = manifest(trained)
    steps = json.loads((trained / "fit.json").read_text())["steps"]
    (row,) = facts["refreshes"]
    epoch = len(steps) // 3
    assert (row["mined_at"], row["used_from"]) == (epoch, 2 * epoch)
    assert row["corpora"]["trade0"]["renewed"] == manifest(renewed)["renewed"]
    assert not [p.name for p in trained.iterdir() if p.name.startswith(("snapshot", "checkpoint", "ray"))]
    page = (refreshed / "report.html").read_text()
    assert f"<td>{epoch}</td><td>{2 * epoch}</td><td>trade0</td>" in page


def test_a_run_killed_while_it_mines_ends_with_the_same_model(
    refreshed: Path, collection: Path, student_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*small_settings(collection, Path(student_folder), tmp_path / "out"), *EPOCHS]
    judge = refresh.score.run

    def killed(context: Any, ranked: Any, judges: Any, groups: Any = None) -> Any:
        if groups is not None:
            raise RuntimeError("killed while it mined")
        return judge(context, ranked, judges)

    with monkeypatch.context() as patched:
        patched.setattr(refresh.score, "run", killed)
        with pytest.raises(RuntimeError, match="killed while it mined"):
            adapt(settings)
    adapt(settings)
    parts = [manifest(*stages(output, "train"))["parts"] for output in (refreshed, tmp_path / "out")]
    assert {k: v for k, v in parts[0].items() if k.endswith(".safetensors")} == {
        k: v for k, v in parts[1].items() if k.endswith(".safetensors")
    }


def test_the_adapted_student_is_the_retriever_and_teacher_of_the_next_round(
    ray_local: None, collection: Path, student_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rounds help, as told here; the third does not, so the second's student counts, with its experts."""
    output, asked = tmp_path / "out", []

    def improved(trained: Stage) -> bool:
        if trained not in asked:
            asked.append(trained)
        return len(asked) < 3

    monkeypatch.setattr(train, "improved", improved)
    settings = small_settings(collection, Path(student_folder), output)
    metrics = adapt(
        [*settings, "teacher.gate=false", "train.rounds=5", "train.max_epochs=1", "train.moe.experts=2"]
    )
    assert metrics["training"]["rounds"] == 2
    assert "This is round 2" in (output / "report.html").read_text()
    rounds = [stage.manifest() for stage in asked]
    assert len(rounds) == len(stages(output, "train")) == 3
    for stage in asked:
        layers = moe_layers(retrieval_ray.load((stage.folder / "candidate").path))
        assert [layer.layout.experts for layer in layers.values()] == [2, 2]
    starts = [facts["identity"]["student"]["sha"] for facts in rounds]
    ends = [train.candidate(stage).sha for stage in asked]
    assert starts[1:] == ends[:-1] and len(set(starts)) == 3
    teachers = {manifest(path)["teacher"].partition("-")[0] for path in stages(output, "score-late")}
    assert teachers == {f"late@{sha[:16]}" for sha in starts}  # judged by its own token vectors
