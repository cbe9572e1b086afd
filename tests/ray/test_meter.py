"""What Ray's exporter shows of a run, against what its manifests say."""

import json
import re
import shutil
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest

from retrieval_ray.artifacts import Location
from retrieval_ray.config_file import load
from retrieval_ray.stages import job, meter, pipeline

from .conftest import ROOT, small_settings

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SAMPLE = re.compile(r"^(ray_retrieval_ray_\w+)\{(.*)\} (\S+)$", re.MULTILINE)
TAG = re.compile(r'(\w+)="([^"]*)"')
Counts = Counter[tuple[str, ...]]


def scraped(collection: str) -> Counts:
    """Sums over workers, by metric and tags, as Prometheus would take them from every node."""
    import ray

    found: Counts = Counter()
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for name, labels, value in SAMPLE.findall(urllib.request.urlopen(url, timeout=30).read().decode()):
            tags = dict(TAG.findall(labels))
            if tags["collection"] == collection:
                own = [tags[key] for key in ("stage", "direction", "reason") if key in tags]
                found[name, *own] += float(value)
    return found


def settled(collection: str, expected: Counts) -> Counts:
    """What is scraped once processes have reported, which they do every few seconds."""
    for _ in range(30):
        found = scraped(collection)
        if all(found[key] >= number for key, number in expected.items()):
            break
        time.sleep(2)
    return found


def test_every_stage_counts_what_its_manifest_says(
    ray_local: None, collection: Path, student_folder: str, tmp_path: Path
) -> None:
    shutil.copytree(collection, tmp_path / "metered")
    settings = [
        *small_settings(tmp_path / "metered", Path(student_folder), tmp_path / "run"),
        "train.max_epochs=1",
    ]
    context = job.open_run(load(str(ROOT / "configs" / "cpu.yaml"), settings), dry_run=False)
    pipeline.run(context, None)
    expected: Counts = Counter()
    store = Location.of(str(tmp_path / "run" / "store"))
    for folder in store.names():
        if not (store / folder / "manifest.json").exists():  # what the store keeps by content
            continue
        manifest = (store / folder / "manifest.json").read_json()
        expected["ray_retrieval_ray_rows_total", manifest["stage"]] += manifest["rows_this_run"]
        for reason, number in manifest.get("rejected", {}).items():
            expected["ray_retrieval_ray_errors_total", manifest["stage"], reason] += number
    assert {stage for _, stage, *_ in expected} >= {
        "corpus", "queries", "encode", "retrieve", "score-late", "groups", "train", "evaluate",
    }  # fmt: skip
    (trained,) = (tmp_path / "run" / "store").glob("train-*")
    steps = [json.loads(line) for line in (trained / "steps.jsonl").read_text().splitlines()]
    expected["ray_retrieval_ray_tokens_total", "train", "in"] = sum(int(row["tokens"]) for row in steps)
    found = settled("metered", expected)
    for stage, fewest in {"encode": 640, "score-late": 640, "query-tokens": 80}.items():
        assert found.pop(("ray_retrieval_ray_tokens_total", stage, "in")) > fewest
    assert found == expected


def test_what_is_counted_before_there_is_a_cluster_is_counted_later(
    ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    with monkeypatch.context() as before:
        before.setattr(ray, "is_initialized", lambda: False)
        meter.count("corpus", "early", rows=5, errors={"duplicate": 2})
    meter.count("corpus", "early", rows=7)
    expected: Counts = Counter(
        {
            ("ray_retrieval_ray_rows_total", "corpus"): 12,
            ("ray_retrieval_ray_errors_total", "corpus", "duplicate"): 2,
        }
    )
    assert settled("early", expected) == expected


def test_a_part_counts_by_what_its_worker_returned(ray_local: None) -> None:
    part = {"judged": 3, "errors": {"no_reply": 1}, "tokens": 40, "tokens_out": 6}
    meter.Counted("score-listwise", "asked", rows="judged").part(part)
    expected: Counts = Counter(
        {
            ("ray_retrieval_ray_rows_total", "score-listwise"): 3,
            ("ray_retrieval_ray_errors_total", "score-listwise", "no_reply"): 1,
            ("ray_retrieval_ray_tokens_total", "score-listwise", "in"): 40,
            ("ray_retrieval_ray_tokens_total", "score-listwise", "out"): 6,
        }
    )
    assert settled("asked", expected) == expected
