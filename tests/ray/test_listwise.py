"""A listwise teacher behind a real endpoint: given pairs, and the main job with a loss of ranks alone."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from aiohttp import web

from retrieval_ray.config_file import load
from retrieval_ray.stages import job

from .chat import KEY, serving
from .conftest import ROOT, job_module, small_settings

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ADAPT, SCORE = (str(ROOT / "configs" / name) for name in ("cpu.yaml", "score.yaml"))


class Ranker:
    """Orders passages by how many of the query's words they hold, and says so in words of its own."""

    def __init__(self) -> None:
        self.asked = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked += 1
        body = await request.json()
        asked = body["messages"][-1]["content"]
        words = set(re.findall(r"Search query: (.*)", asked)[0].lower().split())
        passages = dict(re.findall(r"^\[(\d+)\] (.*)$", asked, flags=re.MULTILINE))

        def overlap(number: str) -> tuple[int, int]:
            return -len(words & set(passages[number].lower().replace(".", " ").split())), int(number)

        order = " > ".join(f"[{number}]" for number in sorted(passages, key=overlap))
        reply = {"role": "assistant", "content": f"By relevance: {order}"}
        return web.json_response({"choices": [{"message": reply, "finish_reason": "stop"}]})


@pytest.fixture
def ranker(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Ranker, list[str]]]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    served = Ranker()
    with serving(served) as url:
        yield served, [
            "teacher.kind=listwise", "teacher.model=ranker", f"teacher.url={url}", "teacher.window=8",
            "teacher.stride=4",
        ]  # fmt: skip


def test_given_pairs_get_their_ranks(
    ray_local: None, ranker: tuple[Ranker, list[str]], tmp_path: Path
) -> None:
    served, teacher = ranker
    pairs = tmp_path / "pairs.jsonl"
    texts = [
        " ".join(["silk"] * bool(n & 1) + ["wool"] * bool(n & 2) + ["salt"] * bool(n & 4)) + f" {n}"
        for n in range(8)
    ]
    rows = [
        {"query_id": q, "query": q, "passage": text} for q in ("silk wool salt", "wool") for text in texts
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"pairs={pairs}", *teacher, f"output_dir={tmp_path / 'out'}"]
    job_module("score").write(job.open_run(load(SCORE, settings), dry_run=False), None)
    found: dict[str, list[tuple[float, str]]] = {}
    for row in pq.read_table(tmp_path / "out" / "scores.parquet").to_pylist():
        found.setdefault(row["query_id"], []).append((row["score"], row["passage_id"]))
    assert {len(ranks) for ranks in found.values()} == {8} and served.asked == 2
    for ranks in found.values():
        assert sorted(score for score, _ in ranks) == [-8, -7, -6, -5, -4, -3, -2, -1]


def test_a_student_learns_from_orders_alone(
    ray_local: None,
    ranker: tuple[Ranker, list[str]],
    collection: Path,
    student_folder: str,
    tmp_path: Path,
) -> None:
    """The embedded signal is the words, which the order has; a second run asks the endpoint for nothing."""
    served, teacher = ranker
    settings = [
        *small_settings(collection, Path(student_folder), tmp_path / "out"), *teacher, "teacher.depth=16",
        "teacher.gate=false", "train.terms={kl: 0, infonce: 0, ranking: 1}",
    ]  # fmt: skip
    job_module("adapt").adapt(job.open_run(load(ADAPT, settings), dry_run=False), "train")
    store = tmp_path / "out" / "store"
    (fit,) = store.glob("train-*/fit.json")
    steps: list[dict[str, Any]] = json.loads(fit.read_text())["steps"]
    assert steps[-1]["ranking"] < steps[0]["ranking"] and "kl" not in steps[0]
    (groups,) = store.glob("groups-*/groups.parquet")
    for row in pq.read_table(groups).to_pylist():
        scores = row["teacher_scores"]
        assert len(set(scores)) == len(scores)  # an order has no ties
    asked = served.asked
    again = [*settings, f"output_dir={tmp_path / 'again'}", f"store={store}", "train.learning_rate=2e-3"]
    job_module("adapt").adapt(job.open_run(load(ADAPT, again), dry_run=False), "train")
    assert served.asked == asked > 0
