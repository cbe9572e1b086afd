"""What a sweep tries and what its trials say, against naive loops and made-up trials with known answers."""

import importlib
import itertools
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_ray import sweeps
from retrieval_ray.artifacts import digest
from retrieval_ray.config import Config, to_dict
from retrieval_ray.config_file import load, with_values
from retrieval_ray.datasets import split_spec
from retrieval_ray.errors import UserError
from retrieval_ray.metrics import holm, paired_difference
from retrieval_ray.sweeps import Choices, Range, Setting, Trial

SPACE = sweeps.space_of(
    {
        "train.terms.clp": [0, 0.1],
        "loss": {"kl": {"train.terms.infonce": 0}, "both": {}, "infonce": {"train.terms.kl": 0}},
    }
)


def trial(
    point: dict[str, Any],
    before: list[float],
    after: list[float],
    *,
    seed: int = 0,
    status: str = "done",
    queries: str = "dev",
) -> Trial:
    """A trial of one epoch with these values of its dev queries before and after."""
    history = [
        {"epoch": float(n), "dev_ndcg@10": float(np.mean(row))} for n, row in enumerate([before, after])
    ]
    gain = history[1]["dev_ndcg@10"] - history[0]["dev_ndcg@10"]
    changes = np.subtract(after, before).tolist()
    return Trial(f"{point}{seed}", point, seed, status, gain, 1, "dev_ndcg@10", history, changes, queries)


# --- the space and its points -----------------------------------------------------------------


def test_a_grid_holds_every_combination_once_in_the_order_given() -> None:
    found = sweeps.points(SPACE, "grid", 1, 0)
    assert found == [
        {"train.terms.clp": clp, "loss": loss}
        for clp, loss in itertools.product(["0", "0.1"], ["kl", "both", "infonce"])
    ]


def test_a_point_sets_what_its_labels_say() -> None:
    point = {"train.terms.clp": "0.1", "loss": "infonce"}
    assert sweeps.settings(SPACE, point) == {"train.terms.clp": 0.1, "train.terms.kl": 0}
    terms = with_values(Config(), {**sweeps.settings(SPACE, point), "queries.negatives": True}).train.terms
    assert (terms.clp, terms.kl, terms.infonce) == (0.1, 0, 0.1)


def test_values_keep_their_kind_and_lists_and_null_have_labels() -> None:
    space = sweeps.space_of({"groups.kinds": [None, ["title", "log"]], "train.dropout": [True, False]})
    points = sweeps.points(space, "grid", 1, 0)
    assert [p["groups.kinds"] for p in points] == ["null", "null", "title+log", "title+log"]
    values = [sweeps.settings(space, point) for point in points]
    assert values[0] == {"groups.kinds": None, "train.dropout": True}
    assert values[3] == {"groups.kinds": ["title", "log"], "train.dropout": False}


@given(st.integers(0, 1000), st.floats(1e-6, 1e3), st.floats(1.01, 1e4), st.booleans())
@settings(max_examples=100, deadline=None)
def test_draws_stay_in_their_range_and_are_the_same_for_a_seed(
    seed: int, low: float, ratio: float, log: bool
) -> None:
    space: sweeps.Space = {
        "x": Range(low, low * ratio, log),
        "n": Range(1, 8),
        "k": Choices({"a": {}, "b": {}}),
    }
    points = sweeps.points(space, "random", 8, seed)
    assert points == sweeps.points(space, "random", 8, seed)
    for point in points:
        assert low * (1 - 1e-9) <= point["x"] <= low * ratio * (1 + 1e-9)
        assert isinstance(point["n"], int) and 1 <= point["n"] <= 8 and point["k"] in ("a", "b")


def test_draws_over_few_points_repeat_none() -> None:
    points = sweeps.points({"k": SPACE["loss"]}, "random", 100, 3)
    assert sorted(point["k"] for point in points) == ["both", "infonce", "kl"]


def test_logarithmic_draws_are_as_often_in_every_decade() -> None:
    drawn = [p["x"] for p in sweeps.points({"x": Range(1e-4, 1.0, log=True)}, "random", 2000, 1)]
    counts = np.histogram(np.log10(drawn), bins=4, range=(-4, 0))[0]
    assert counts.min() > 420 and counts.sum() == 2000  # 500 +- 4 standard deviations


@pytest.mark.parametrize(
    ("given_space", "named"),
    [
        ({}, "sweep.space"),
        ({"a.b": []}, "a.b"),
        ({"a.b": 3}, "a.b"),
        ({"a.b": [1, 1]}, "twice"),
        ({"a.b": {"low": 2, "high": 1}}, "low"),
        ({"a.b": {"low": 0, "high": 1, "log": True}}, "log"),
        ({"a.b": {"low": "x", "high": 1}}, "low"),
        ({"a.b": {"kl": 3}}, "a.b"),
    ],
)
def test_a_space_that_is_none_is_an_error_that_names_it(given_space: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        sweeps.space_of(given_space)


def test_a_grid_over_a_range_is_an_error() -> None:
    with pytest.raises(UserError, match="random or optuna"):
        sweeps.points({"train.learning_rate": Range(1e-5, 1e-3)}, "grid", 1, 0)


# --- what trials say --------------------------------------------------------------------------


def test_settings_are_ranked_by_the_mean_over_seeds_and_unfinished_ones_come_last() -> None:
    kl, both, clp = (
        {"train.terms.clp": c, "loss": x} for c, x in (("0", "kl"), ("0", "both"), ("0.1", "kl"))
    )
    ranked = sweeps.ranked(
        [
            trial(kl, [0.1], [0.9], seed=0),
            trial(both, [0.1], [0.4], seed=0),
            trial(kl, [0.1], [0.0], seed=1),
            trial(both, [0.1], [0.7], seed=1),
            trial(clp, [0.0], [1.0], seed=0),
            Trial("clp1", clp, 1, "failed"),
        ]
    )
    assert [setting.point for setting in ranked] == [both, kl, clp]
    assert ranked[0].gain == pytest.approx(0.45) and ranked[1].gain == pytest.approx(0.35)
    assert ranked[2].gain == -math.inf and ranked[0].name() == "train.terms.clp=0, loss=both"


def test_the_effect_of_a_level_is_the_mean_change_per_query_of_its_trials() -> None:
    rng = np.random.default_rng(5)
    base_Q = rng.uniform(0, 1, 40)
    trials = []
    for point in sweeps.points(SPACE, "grid", 1, 0):
        lift = 0.05 if point["loss"] == "both" else 0.0
        trials.append(trial(point, base_Q.tolist(), (base_Q + lift + rng.normal(0, 0.01, 40)).tolist()))
    found = sweeps.effects(SPACE, trials, {"loss": "kl"})
    assert list(found) == ["train.terms.clp", "loss"]
    assert [level.label for level in found["loss"]] == ["kl", "both", "infonce"]
    by_label = {}
    for loss in ("kl", "both", "infonce"):
        own = [t for t in trials if t.point["loss"] == loss]
        by_label[loss] = np.mean([t.changes for t in own], axis=0)
    kl, both, infonce = found["loss"]
    assert both.trials == 2 and both.gain.mean == pytest.approx(by_label["both"].mean())
    assert kl.against is None and both.against is not None and infonce.against is not None
    raw = {x: paired_difference(by_label["kl"], by_label[x]) for x in ("both", "infonce")}
    adjusted = holm({x: d.p for x, d in raw.items()})
    assert both.against.mean == pytest.approx(raw["both"].mean) and both.against.p == adjusted["both"]
    assert both.against.p < 0.01 < infonce.against.p


@pytest.mark.parametrize("size", [4, 6])
def test_levels_with_other_dev_queries_are_not_set_against_each_other(size: int) -> None:
    """Not where they are as many either."""
    space: sweeps.Space = {"k": Choices({"a": {}, "b": {}})}
    one = trial({"k": "a"}, [0.0] * 4, [0.1] * 4, queries="one")
    other = trial({"k": "b"}, [0.0] * size, [0.3] * size, queries="other")
    a, b = sweeps.effects(space, [one, other], {})["k"]
    assert (a.gain.mean, b.gain.mean) == (pytest.approx(0.1), pytest.approx(0.3))
    assert a.against is None and b.against is None
    assert not sweeps.comparable([one, other]) and sweeps.comparable(
        [one, Trial("x", {"k": "b"}, 0, "failed")]
    )


def test_the_gain_of_several_trials_is_the_mean_over_queries_of_their_means() -> None:
    trials = [trial({"k": "a"}, [0.0, 0.2], [0.4, 0.2]), trial({"k": "a"}, [0.0, 0.2], [0.0, 0.8], seed=1)]
    found = sweeps.gain_of(trials)
    assert found is not None and found.mean == pytest.approx((0.2 + 0.3) / 2)
    assert found.low == pytest.approx(0.2) and found.high == pytest.approx(0.3)
    assert sweeps.gain_of([Trial("x", {"k": "b"}, 0, "failed")]) is None


def test_a_point_is_of_a_space_that_has_its_labels_and_numbers() -> None:
    space: sweeps.Space = {"k": Choices({"a": {}, "b": {}}), "x": Range(1e-4, 1e-2, log=True)}
    assert sweeps.holds(space, {"k": "a", "x": 1e-3})
    for other in ({"k": "c", "x": 1e-3}, {"k": "a", "x": 1e-1}, {"k": "a"}, {"k": "a", "x": 1e-3, "y": 1}):
        assert not sweeps.holds(space, other)


def test_calls_needed_and_made_are_counted_by_stage() -> None:
    first, second = (Trial(f"t{n}", {"k": str(n)}, 0, "done") for n in range(2))
    first.calls.update({"f1": ["score", 100, 60], "f2": ["generate", 10, 10]})
    second.calls.update({"f1": ["score", 100, 0], "f3": ["score", 40, 5]})
    assert sweeps.saved([first, second], "score") == (240, 65)
    assert sweeps.saved([first, second], "generate") == (10, 10)


def test_the_leaderboard_has_a_row_a_trial_and_a_column_a_parameter() -> None:
    point = {"train.terms.clp": "0", "loss": "kl"}
    done = trial(point, [0.2, 0.2], [0.3, 0.5])
    table = sweeps.leaderboard(
        SPACE, [done, Trial("b", {**point, "loss": "both"}, 0, "failed", error="x")], {done.name: 0.4}
    )
    one, other = table.to_pylist()
    assert (one["rank"], one["trial"], one["loss"], one["test_ndcg@10"]) == (1, done.name, "kl", 0.4)
    assert one["gain"] == pytest.approx(0.2) and one["low"] <= 0.2 <= one["high"]
    assert (other["rank"], other["status"], other["gain"], other["error"]) == (2, "failed", None, "x")


def test_a_setting_without_trials_has_a_name() -> None:
    assert Setting({"a": "x", "train.learning_rate": 1e-4}, []).name() == "a=x, train.learning_rate=0.0001"


# --- the sweeps that are shipped --------------------------------------------------------------

ROOT = Path(__file__).parents[1]
SHIPPED = {
    "lambda": 5, "threshold": 9, "experts": 12, "query_kinds": 13, "loss": 7, "negatives": 9, "scale": 3,
    "teachers": 3, "query_source": 3, "ablation": 9, "replication": 7,
    "recipe": 9, "teacher_mixes": 5,
}  # fmt: skip


def test_every_shipped_sweep_is_looked_at() -> None:
    assert {path.stem for path in (ROOT / "configs" / "sweeps").glob("*.yaml")} == SHIPPED.keys()


@pytest.mark.parametrize("name", SHIPPED)
def test_every_point_of_a_shipped_sweep_is_a_config_of_its_own(name: str) -> None:
    config = load(str(ROOT / "configs" / "sweeps" / f"{name}.yaml"))
    space = sweeps.space_of(config.sweep.space)
    points = sweeps.points(space, config.sweep.search, config.sweep.samples, config.seed)
    configs = [with_values(config, sweeps.settings(space, point)) for point in points]
    assert len(configs) == SHIPPED[name]
    assert config.sweep.question and config.sweep.question.endswith("?")
    assert len({digest(to_dict(each)) for each in configs}) == len(configs)
    for parameter, reference in config.sweep.reference.items():
        assert reference in {point[parameter] for point in points}


def test_the_replications_collections_are_configs_with_other_dev_and_test_queries() -> None:
    config = load(str(ROOT / "configs" / "sweeps" / "replication.yaml"))
    assert set(config.sweep.collections) == {"scifact", "covidqa", "cosqa", "medquad", "squad"}
    for name, values in config.sweep.collections.items():
        own = with_values(config, {**values, "sweep.collections": {}})
        assert own.dataset.path.endswith(f"/{name}") and own.dataset.dev_split
        assert own.dataset.max_queries == 1000
        (split, part), (dev_split, dev_part) = map(split_spec, (own.dataset.split, own.dataset.dev_split))
        assert split != dev_split or part[0] >= dev_part[1]
        assert own.sweep.seeds == (3 if name in ("scifact", "covidqa", "cosqa") else 1)


def benchmark(name: str) -> ModuleType:
    """A script of ``benchmarks/`` as a module."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_the_replications_summary_is_computed_from_what_each_collection_found() -> None:
    def collection(base: float, teacher: float, default: float, kl: float) -> dict[str, Any]:
        def figures(ndcg: float) -> dict[str, Any]:
            return {"ndcg@10": ndcg, "delta": ndcg - base, "ci95": [-0.1, 0.1], "p": 0.5}

        rows = [
            {"point": {"variant": name}, "seeds": 1, "teacher": figures(teacher), "returned": figures(ndcg),
             "candidate": {**figures(ndcg - 0.01), "p_holm": 0.25},
             "against_reference": {"delta": 0.125, "ci95": [0.1, 0.2], "p": 0.02, "p_holm": 0.04}}
            for name, ndcg in (("default", default), ("kl", kl))
        ]  # fmt: skip
        return {"base": {"ndcg@10": base}, "queries": 10, "settings": rows}

    module = benchmark("replication")
    found = module.summary({"a": collection(0.4, 0.6, 0.5, 0.55), "b": collection(0.5, 0.4, 0.5, 0.45)})
    assert found["mean_gain"] == pytest.approx(0.05) and found["share_of_lead"] == pytest.approx(0.5)
    assert found["share_of_lead_by_collection"] == {"a": pytest.approx(0.5)}
    assert found["collections"]["a"]["default"]["ndcg@10"] == 0.5  # what is returned
    assert found["collections"]["a"]["kl"]["ndcg@10"] == pytest.approx(0.54)  # the trained model itself
    lines = module.table(found).splitlines()
    assert len([line for line in lines if line.startswith("| a |")]) == 2
    assert "p 0.25)" in next(line for line in lines if line.startswith("| a |"))
    assert "| a | +0.1250 (+0.1000 to +0.2000, p 0.04) |" in lines
    assert lines[-1] == "Mean gain of the default: +0.0500. Share of the lead closed: 50%; a 50%."
    assert module.compared(found) == (pytest.approx(0.5), pytest.approx(0.45))
    lacking = {"a": collection(0.4, 0.6, 0.5, 0.55), "b": collection(0.5, 0.4, 0.5, 0.45)}
    del lacking["a"]["settings"][1]  # kl failed on the first collection
    lines = module.table(module.summary(lacking)).splitlines()
    assert lines[4].endswith("| default | kl |") and any(line.endswith("| failed |") for line in lines)
    assert "| a | – |" in lines
    del lacking["b"]["settings"][0]
    with pytest.raises(SystemExit, match="b: the default failed"):
        module.summary(lacking)


def test_the_table_of_teachers_has_each_as_judge_and_the_student_that_it_trained() -> None:
    def figures(ndcg: float) -> dict[str, Any]:
        return {"ndcg@10": ndcg, "delta": ndcg - 0.4, "ci95": [-0.1, 0.1], "p": 0.5}

    rows = [
        {"point": {"teacher": name}, "teacher": figures(judge), "candidate": figures(student)}
        for name, judge, student in (("embedded", 0.6, 0.45), ("one domain", 0.7, 0.5))
    ]
    module = benchmark("teachers")
    document = module.summary({"covidqa": {"base": {"ndcg@10": 0.4}, "queries": 10, "settings": rows}})
    found = document["collections"]["covidqa"]
    assert found["teachers"]["one domain"]["as judge"]["ndcg@10"] == 0.7
    assert found["teachers"]["one domain"]["its student"]["delta"] == pytest.approx(0.1)
    lines = module.table(document).splitlines()
    assert lines[-2].startswith("| covidqa | 10 | 0.4000 | embedded | 0.6000 (+0.2000, ")
    assert lines[-1].startswith("| covidqa | 10 | 0.4000 | one domain | 0.7000 (+0.3000, ")
    assert module.compared(document) == (0.5, 0.4)


def test_a_sweeps_script_ends_with_its_json_and_writes_nothing_when_quick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = benchmark("tested")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    collection = tmp_path / "sweep" / "covidqa"
    collection.mkdir(parents=True)
    (collection / "test.json").write_text(json.dumps({"settings": [{"seeds": 1}, {"seeds": 2}]}))
    monkeypatch.setattr(sys, "argv", ["name.py", str(tmp_path / "sweep"), "--quick"])
    module.write(
        "name", None, lambda found: {"collections": found}, lambda _: "a table", lambda _: (0.5, 0.4)
    )
    *above, last = capsys.readouterr().out.splitlines()
    said = json.loads(last)
    assert above == ["a table"] and not (tmp_path / "results").exists()
    assert (said["benchmark"], said["ratio"], said["equal"]) == ("name", 1.25, False)
    assert said["collections"]["covidqa"]["settings"][1] == {"seeds": 2}
    monkeypatch.setattr(sys, "argv", ["name.py", str(tmp_path), "--quick"])
    with pytest.raises(SystemExit, match="run the sweep first"):
        module.write("name", None, dict, str, lambda _: (1.0, 1.0))
