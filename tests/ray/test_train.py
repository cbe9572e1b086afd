"""The train stage's wiring: what Ray is asked and what the user is told. Starts no Ray."""

import pickle
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray.train
import torch

from retrieval_ray import schema
from retrieval_ray.artifacts import Location, stage
from retrieval_ray.batching import rectangular
from retrieval_ray.config import Config, DatasetConfig
from retrieval_ray.errors import TrainingStopped, UserError
from retrieval_ray.moe import Layout
from retrieval_ray.sources import Source
from retrieval_ray.stages import ingest, lists, train, trainer
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.profile import Profile
from retrieval_ray.stages.queries import query_row
from retrieval_ray.step import Lists
from tests.corpora import SETTINGS


def test_each_machines_going_is_passed_on_at_once_and_just_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def going(deadline: float | None, *nodes: str) -> SimpleNamespace:
        return SimpleNamespace(
            deadline_ms=deadline and int(1000 * (time.time() + deadline)), preempted_node_ids=list(nodes)
        )

    first, later = going(90.0, "a"), going(90.0, "a", "b")
    closing = SimpleNamespace(**{**vars(later), "deadline_ms": int(1000 * (time.time() + 5))})
    unlimited = going(None, "a", "b", "c")
    answers = iter([None, first, first, later, later, closing, closing, unlimited, unlimited])
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: next(answers))
    notice = trainer._preemption_notice()
    found = [notice() for _ in range(9)]
    assert found == [False, True, False, True, False, True, False, True, False]


def test_a_ray_without_notices_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ray.train, "get_preemption_info", raising=False)
    assert trainer._preemption_notice()() is False


def _lists(size: int) -> Lists:
    return Lists([f"q{n}" for n in range(size)], [["p"]] * size, np.zeros((size, 1)), [[]] * size)


def test_a_gpu_holds_one_rank_of_training() -> None:
    """NCCL refuses two, also where workers share GPUs to encode and to score."""
    asked = [(8, 0.0), (8, 1.0), (8, 0.5), (1, 0.25), (8, 2.0)]
    assert [trainer.training_workers(*each) for each in asked] == [8, 8, 4, 1, 8]


def test_settings_of_experts_want_experts(student_folder: str) -> None:
    made_of: dict[str, Any] = {
        "student": {"model": student_folder, "precision": "float32", "device": "cpu"},
        "lora": None, "shard": False, "layout": None, "only_experts": False, "seed": 0,
    }  # fmt: skip
    with pytest.raises(UserError, match=r"train\.moe\.jitter .* the student has none"):
        trainer._can_be_made(made_of, routed=True)
    trainer._can_be_made(made_of, routed=False)
    trainer._can_be_made({**made_of, "layout": Layout(2)}, routed=True)


def test_what_would_stop_training_again_is_no_failure_of_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray tries a worker's errors again; this one is a result, and an error for the driver."""

    def stopped(*given: object) -> None:
        raise TrainingStopped("3 steps of 4 were not finite")

    monkeypatch.setattr(trainer, "_train", stopped)
    found = trainer._train_worker({"folder": Location.of(str(tmp_path)), "settings": SETTINGS})
    assert isinstance(found, TrainingStopped) and str(found) == "3 steps of 4 were not finite"
    assert repr(pickle.loads(pickle.dumps(found))) == repr(found)  # so it travels


def test_a_step_too_large_for_its_gpu_is_tried_again_with_smaller_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def full(config: dict[str, Any]) -> None:
        tried.append((config["settings"].chunk_tokens, config["settings"].activation_share))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 14 GiB")

    monkeypatch.setattr(trainer, "_train", full)
    folder, told = Location.of(str(tmp_path)), []
    bar = SimpleNamespace(tell=SimpleNamespace(remote=told.append))
    config = {"folder": folder, "settings": replace(SETTINGS, chunk_tokens=2048), "bar": bar}
    for _ in range(3):
        with pytest.raises(UserError, match=r"train\.chunk_tokens below .* allocate 14 GiB"):
            trainer._train_worker(config)
    assert len(told) == 2 and "chunks of 512 tokens" in told[1]
    assert tried == [(2048, 1.0), (1024, 0.5), (512, 0.25)]
    assert trainer._smaller(SETTINGS, 5).chunk_tokens == SETTINGS.chunk_tokens < 512
    with pytest.raises(UserError):
        trainer._train_worker({**config, "settings": replace(SETTINGS, chunk_tokens=700)})
    assert tried[-1] == (700, 1.0)  # as told after the message
    trainer.remove_traces(folder)
    assert folder.names() == []


def test_a_trainings_end_that_is_final_reaches_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    why = TrainingStopped("3 steps of 4 were not finite")
    done = SimpleNamespace(fit=lambda: SimpleNamespace(return_value=why))
    monkeypatch.setattr(trainer, "_trainer", lambda *given: done)
    given: list[Any] = [None, [], None, Location.of(str(tmp_path)), None, None]
    with pytest.raises(TrainingStopped, match="3 steps of 4"):
        trainer.advance(*given)


def test_of_a_share_of_the_lists_no_smaller_batches_are_made(tmp_path: Path) -> None:
    config = Config()
    config.train.student_temperature, config.train.batch_queries, config.train.share = 0.1, 48, 0.1
    context = Context(config, Location.of(str(tmp_path)), Profile("float32", "cpu", 1, 1024, 1))
    corpora: list[Any] = [SimpleNamespace(name="c")]
    assert train._settings(context, corpora, [_lists(135)]).batch_queries == 48


@pytest.mark.parametrize(
    ("sizes", "batch", "said"),
    [
        ([40_000], 4096, []),
        ([800], 100, ["800 training queries are fewer than 8 batches of 4096; batches of 100 are used"]),
        ([40_000, 90], 4096, ["'c1' has 90 training queries, fewer than a batch of 4096: one short batch"]),
        ([40_000, 0], 4096, ["'c1' has 0 training queries, fewer than a batch of 4096: nothing is learned"]),
    ],
)
def test_a_corpus_of_few_queries_is_trained_on_and_said_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sizes: list[int], batch: int, said: list[str]
) -> None:
    config = Config()
    config.train.student_temperature = 0.1
    context = Context(config, Location.of(str(tmp_path)), Profile("float32", "cpu", 1, 1024, 1))
    corpora = [SimpleNamespace(name=f"c{n}") for n in range(len(sizes))]
    settings = train._settings(context, corpora, [_lists(size) for size in sizes])  # type: ignore[arg-type]
    assert settings.batch_queries == batch
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(lines) == len(said) and all(part in line for part, line in zip(said, lines, strict=True))


def test_the_temperature_of_lists_of_several_lengths_is_that_of_each_list_s_own_passages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two corpora, found by trying temperatures on one list after the other."""
    rng = np.random.default_rng(4)
    vectors = {
        key: vector / np.linalg.norm(vector)
        for key, vector in zip([*"abcdefg", "q1", "q2", "q3"], rng.standard_normal((10, 5)), strict=True)
    }
    seen = SimpleNamespace(of=lambda ids: np.array([vectors[key] for key in ids], dtype=np.float32))
    monkeypatch.setattr(lists, "Vectors", SimpleNamespace(all=lambda stage: seen))
    rows = [["a", "b", "c"], ["d", "e"], list("abcdefg")]
    teacher = [rng.random(len(row)) for row in rows]
    parts = [
        Lists(["q1", "q2"], rows[:2], rectangular(teacher[:2], -np.inf), [[], []]),
        Lists(["q3"], rows[2:], teacher[2][None], [[]]),
    ]
    corpora: Any = [SimpleNamespace(passages=None, query_vectors=None)] * 2
    found = lists.calibrated(corpora, parts, 0.3)

    def kl(temperature: float) -> float:
        total = 0.0
        for query, row, own in zip(("q1", "q2", "q3"), rows, teacher, strict=True):
            student = np.exp(np.array([vectors[p] @ vectors[query] for p in row]) / temperature)
            wanted = np.exp(own / 0.3)
            student, wanted = student / student.sum(), wanted / wanted.sum()
            total += float((wanted * np.log(wanted / student)).sum())
        return total

    tried = np.geomspace(0.005, 2, 2000)
    assert found == pytest.approx(tried[np.argmin([kl(t) for t in tried])], rel=0.01)


def test_negatives_are_told_the_queries_that_they_answer(tmp_path: Path) -> None:
    """By the negatives stage's table, where there is one; a passage without a query stays without."""
    store = Location.of(str(tmp_path))
    groups, negatives = stage(store, "groups", {}), stage(store, "negatives", {})

    def listed(query: str, split: str, *passages: str) -> dict[str, object]:
        return {
            "corpus": "c", "query_id": query, "kind": "log", "split": split, "positive_id": passages[0],
            "passage_ids": list(passages), "teacher_scores": [1.0] * len(passages), "excluded_ids": [],
        }  # fmt: skip

    rows = [
        listed("a", "train", "p1", "p2", "p3"),
        listed("b", "train", "p2", "p1", "p4", "p3"),
        listed("c", "dev", "p2", "p1", "p4"),
    ]
    groups.write("groups.parquet", schema.from_rows("groups", rows))
    written = [query_row(f"q-{p}", f"what is {p}?", "span", "negative", p, "us") for p in ("p1", "p2", "p4")]
    negatives.write("queries.parquet", schema.from_rows("queries", written))
    found = lists.lists_of(groups, "train", negatives)
    assert found.negative_query_ids == [["q-p2", None], ["q-p1", "q-p4", None]]
    assert found.teacher_BK.tolist() == [[1, 1, 1, -np.inf], [1] * 4]  # filled up to the longest
    assert lists.lists_of(groups, "train").negative_query_ids is None

    queries = stage(store, "queries", {})
    queries.write("queries-00000.parquet", schema.from_rows("queries", [
        query_row("a", "an a", "log", "train", None, "log"),
        query_row("q-p1", "what is p1?", "span", "train", "p1", "us"),
    ]))  # fmt: skip
    queries.finish(["queries-00000.parquet"])
    source = Source(
        "c", lambda: [("", f"p{n}", "", f"text {n}") for n in range(1, 30)], lambda s: [], lambda s: []
    )
    profile = Profile("float32", "cpu", 1, 1024, 1)
    corpus = ingest.run(Context(Config(), store, profile), DatasetConfig(), source)
    grouped = SimpleNamespace(
        name="c", corpus=corpus, queries=queries, retrieved=None, groups=groups, negatives=negatives
    )
    data = lists.data_of(grouped, 10)  # type: ignore[arg-type]
    assert data.queries == {"a": "an a", **{f"q-{p}": f"what is {p}?" for p in ("p1", "p2", "p4")}}
    assert data.passages == {f"p{n}": f"text {n}" for n in range(1, 5)}  # of 29: those that lists name
    assert data.train.negative_query_ids == found.negative_query_ids and data.dev.negative_query_ids is None
