"""A sweep's page and its answers, from made-up trials."""

import re
from dataclasses import replace

import numpy as np

from retrieval_ray import report_sweep, sweeps
from retrieval_ray.metrics import Difference
from retrieval_ray.report_sweep import OnTest
from retrieval_ray.sweeps import Trial

from .test_sweeps import SPACE, trial


def trials(lift: float = 0.05) -> list[Trial]:
    rng = np.random.default_rng(2)
    base_Q = rng.uniform(0, 1, 60)
    found = []
    for point in sweeps.points(SPACE, "grid", 1, 0):
        raised = base_Q + (lift if point["loss"] == "both" else -0.01) + rng.normal(0, 0.01, 60)
        found.append(trial(point, base_Q.tolist(), raised.tolist()))
    return found


def page(found: list[Trial], tested: dict[str, OnTest] | None = None) -> str:
    return report_sweep.page(
        "sweep",
        "Which <loss>?",
        SPACE,
        found,
        {"loss": "kl"},
        base=0.5,
        tested=tested or {},
        drifts={},
        judged=True,
    )


def test_the_answer_names_the_best_setting_and_what_differs_clearly() -> None:
    settings, effects = sweeps.ranked(trials()), sweeps.effects(SPACE, trials(), {"loss": "kl"})
    best, clp, loss = report_sweep.answer(settings, effects)
    assert "loss=both" in best and "+0.0" in best
    assert clp == "train.terms.clp: no level differs clearly from 0 on these dev queries."
    assert loss.startswith("loss, against kl: both +0.06") and "infonce" not in loss


def test_where_nothing_gains_the_base_model_is_said_to_be_kept() -> None:
    settings = sweeps.ranked(trials(lift=-0.05))
    assert any("base model is kept" in line for line in report_sweep.answer(settings, {}))


def test_the_page_is_whole_and_loads_nothing() -> None:
    html = page(
        [*trials(), Trial("z", {"train.terms.clp": "0", "loss": "kl"}, 9, "failed", error="no <GPU>")]
    )
    assert html.count("<svg") == 4  # two effects, parallel coordinates, curves
    assert "Which &lt;loss&gt;?" in html and "no &lt;GPU&gt;" in html
    assert not re.search(r"""<(script|link|img|iframe)|(src|href)=["']?https?:""", html)
    assert "nDCG@10 (test)" not in html


def test_test_figures_stand_where_they_were_measured_alone() -> None:
    best = sweeps.ranked(trials())[0].name()
    html = page(trials(), {best: OnTest(0.6123, Difference(0.1123, 0.05, 0.17, 0.004), 1)})
    assert html.count("0.6123") == 1 and "+0.1123 (+0.0500 to +0.1700)" in html and "1 of 1" in html
    assert html.count("<td>–</td><td>–</td><td>–</td><td>–</td>") == 5


def test_settings_measured_on_other_dev_queries_come_with_a_warning() -> None:
    found = [replace(each, queries=str(n)) for n, each in enumerate(trials())]
    first, *rest = report_sweep.answer(sweeps.ranked(found), sweeps.effects(SPACE, found, {}))
    assert first.startswith("These settings were not measured on the same dev queries")
    assert not any("against" in line for line in rest)
