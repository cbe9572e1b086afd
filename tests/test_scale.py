"""docs/scale.md is what its script writes, and its formulas are the code's."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from retrieval_ray import amounts
from retrieval_ray.artifacts import bucket_count
from retrieval_ray.throughput import training_flops

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    import scale  # type: ignore[import-not-found]

    yield scale
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == ROOT / "benchmarks":
            del sys.modules[name]


def test_the_page_is_what_the_script_writes(scale: ModuleType) -> None:
    """If this fails: python benchmarks/scale.py --page"""
    assert (ROOT / "docs" / "scale.md").read_text(encoding="utf-8") == scale.page()


def test_forecasts_reckon_with_the_rates_that_were_measured() -> None:
    """If this fails: the constants of ``amounts`` are those of an earlier results/scale.json."""
    rates = json.loads((ROOT / "benchmarks" / "results" / "scale.json").read_text())["rates"]
    seconds = {"ingest_us": amounts.CORPUS, "row_us": amounts.ROW, "group_us": amounts.POOLED}
    lists = {"ingest_us": 1, "row_us": 1, "group_us": 20}
    for name, rate in seconds.items():
        assert rate.seconds == pytest.approx(rates[name] * 1e-6 / lists[name])
    stored = {
        "run_bytes": amounts.RUN_BYTES, "score_bytes": amounts.SCORE_BYTES, "pair_bytes": amounts.PAIR_BYTES,
        "index_bytes": amounts.INDEX_BYTES, "kept_score_bytes": amounts.KEPT_SCORE_BYTES,
        "kept_reply_bytes": amounts.KEPT_REPLY_BYTES, "list_bytes": 20 * amounts.LISTED_BYTES,
    }  # fmt: skip
    assert stored == {name: rates[name] for name in stored}


def test_every_size_has_every_stage_and_no_placeholder_is_left(scale: ModuleType) -> None:
    text = scale.page()
    for stage in ("ingest", "generate", "encode", "retrieve", "score", "groups", "train", "evaluate"):
        assert text.count(f"\n| {stage} |") == 3
    assert "{" not in text and "nan" not in text and "inf" not in text


def test_costs_grow_with_the_corpus_or_not_at_all(scale: ModuleType) -> None:
    rates = scale.result("scale")["rates"]
    small, large = (scale.of_all(size, scale.Case(), scale.Hardware(), rates) for size in (10**7, 10**9))
    for one, other in zip(small, large, strict=True):
        assert other.hours >= one.hours and other.moved >= one.moved and other.stored >= one.stored
        assert one.hours >= one.driver_hours + one.waiting_hours - 1e-9
    by_stage = {one.stage: (one, other) for one, other in zip(small, large, strict=True)}
    for stage in ("generate", "train"):
        one, other = by_stage[stage]
        assert one.gpu_hours == other.gpu_hours  # they depend on the queries alone
    for stage in ("ingest", "encode"):
        one, other = by_stage[stage]
        assert other.stored == pytest.approx(100 * one.stored)


def test_a_forward_pass_is_a_third_of_what_training_counts(scale: ModuleType, student_folder: str) -> None:
    """By ``retrieval_ray.throughput``, on a tiny student."""
    from scale_costs import Case, _forward  # type: ignore[import-not-found]
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(student_folder, device="cpu")
    encoder = model[0].auto_model
    tables = sum(m.weight.numel() for m in encoder.embeddings.modules() if hasattr(m, "num_embeddings"))
    matrices = sum(p.numel() for p in encoder.parameters() if p.dim() > 1) - tables
    case = Case(student=matrices, layers=2, dimension=32)
    assert _forward(case, 17) == pytest.approx(training_flops(model, [17]) / 3)


def test_parts_and_shards_are_the_stages_own(scale: ModuleType) -> None:
    from scale_costs import parts, shards_of  # type: ignore[import-not-found]

    assert parts(10**7) == bucket_count(10**7) == 32_768 and parts(10**9) == 65_536
    assert shards_of(10**8, blocks=1) == 64 and shards_of(10**6, blocks=1) == 8
    assert shards_of(10**7, blocks=245) < 64  # many queries: fewer rankings a query
