"""A small collection with a real signal, and the adapt job run on it in this process or another."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
_PLACES = "harbour mountain forest desert market island valley village river castle".split()
_THINGS = "copper wool salt timber glass honey silk barley marble amber iron cotton".split()
_PEOPLE = "fishermen miners weavers farmers merchants builders sailors potters".split()
_VERBS = "sell carry trade make store ship guard tax".split()


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """One local cluster for all tests of this folder that run in this process."""
    import ray

    os.environ.update(
        RAY_AUTH_MODE="disabled",
        RAY_USAGE_STATS_ENABLED="0",
        RAY_memory_monitor_refresh_ms="0",
        RAY_DATA_DISABLE_PROGRESS_BARS="1",
    )
    # The dashboard is what frees the workers of a trial that a sweep stopped.
    ray.init(num_cpus=8, include_dashboard=True, log_to_driver=False, logging_level="warning")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """640 passages (two parts) and 80 queries about who trades what where, as a BEIR folder."""
    folder = tmp_path_factory.mktemp("trade")
    rng = random.Random(7)
    seen: set[tuple[str, ...]] = set()
    while len(seen) < 640:
        seen.add(tuple(rng.choice(words) for words in (_PEOPLE, _VERBS, _THINGS, _PLACES)))
    passages = [
        (f"p{n}", f"{who} of the {place}", f"The {who} of the {place} {verb} {thing} every year. " * 2)
        for n, (who, verb, thing, place) in enumerate(sorted(seen))
    ]
    write_collection(
        folder,
        passages,
        {
            f"q{n}": (f"where do {who} {verb} {thing} {place}", f"p{8 * n}")
            for n, (who, verb, thing, place) in enumerate(sorted(seen)[::8])
        },
        {"train": range(48), "dev": range(48, 64), "test": range(64, 80)},
    )
    return folder


def write_collection(
    folder: Path,
    passages: list[tuple[str, str, str]],
    queries: dict[str, tuple[str, str]],
    splits: dict[str, range],
) -> None:
    """Write a BEIR folder."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    with (folder / "corpus.jsonl").open("w") as lines:
        for key, title, text in passages:
            lines.write(json.dumps({"_id": key, "title": title, "text": text}) + "\n")
    with (folder / "queries.jsonl").open("w") as lines:
        for key, (text, _) in queries.items():
            lines.write(json.dumps({"_id": key, "text": text}) + "\n")
    keys = list(queries)
    for split, numbers in splits.items():
        with (folder / "qrels" / f"{split}.tsv").open("w") as lines:
            lines.write("query-id\tcorpus-id\tscore\n")
            for n in numbers:
                lines.write(f"{keys[n]}\t{queries[keys[n]][1]}\t1\n")


def job_module(name: str) -> ModuleType:
    """A script of ``jobs/`` as a module."""
    spec = importlib.util.spec_from_file_location(f"jobs_{name}", ROOT / "jobs" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_settings(collection: Path, student: Path, output: Path) -> list[str]:
    """Overrides for a run of a minute on the small collection."""
    return [
        f"dataset.path={collection}",
        "dataset.dev_split=dev",
        "queries.log_split=train",
        f"student.model={student}",
        "groups.list_size=6",
        "teacher.depth=20",
        "train.max_epochs=2",
        "train.batch_queries=8",
        "train.learning_rate=1e-3",
        "train.chunk_tokens=512",
        "train.checkpoint_minutes=0",
        "compute.precision=float32",
        "compute.token_budget=1024",
        f"output_dir={output}",
    ]


def foreseen_rows(output: Path) -> dict[str, list[tuple[float, float]]]:
    """(foreseen, happened) of every finished stage of a run that a dry run went before, by the stage's name.

    Fails where a stage was foreseen and does not say so.
    """
    works = json.loads((output / "forecast.json").read_text())["works"]
    found: dict[str, list[tuple[float, float]]] = {}
    for path in (output / "store").glob("*/manifest.json"):
        facts = json.loads(path.read_text())
        name = "-".join(filter(None, (facts["stage"], facts["identity"].get("role"))))
        if name in {work["stage"] for work in works}:
            rows = facts["forecast"]["rows"]
            found.setdefault(name, []).append((rows["foreseen"], rows["happened"]))
    return found


def run_job(name: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a job as a user does."""
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
