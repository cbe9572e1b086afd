"""The Grafana dashboard, against the metrics that we count and those that Ray's own dashboards show."""

import json
import re
from importlib import util
from pathlib import Path
from typing import Any

import pytest

from retrieval_ray.stages import meter

ROOT = Path(__file__).resolve().parents[1]
DASHBOARD: dict[str, Any] = json.loads((ROOT / "configs/grafana/retrieval_ray.json").read_text())
OURS = {f"ray_{name}_total": {"stage", "collection", *more} for name, _, more in meter.METRICS}
METRIC = re.compile(r"\bray_\w+")
COUNTER = re.compile(r"(\w*)\(?(ray_retrieval_ray_\w+)\{[^}]*\}(?:\[([^]]*)\])?")


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]


def test_every_metric_of_ours_is_shown_and_none_that_is_not() -> None:
    named = {name for text in expressions() for name in METRIC.findall(text) if "retrieval_ray" in name}
    assert named == OURS.keys()


def test_sums_are_by_tags_that_the_metric_has() -> None:
    for text in expressions():
        names = METRIC.findall(text)
        if names[0] in OURS:
            tags = {tag for group in re.findall(r"by \(([^)]*)\)", text) for tag in group.split(", ")}
            assert tags <= set.intersection(*(OURS[name] for name in names)), text


def test_what_has_left_the_cluster_stays_in_the_totals() -> None:
    """Each counter of ours is shown as a rate, or by the most that it was."""
    counters = [found for text in expressions() for found in COUNTER.findall(text)]
    assert {name for _, name, _ in counters} == OURS.keys()
    assert {(how, time) for how, _, time in counters} == {
        ("rate", "$__rate_interval"), ("max_over_time", "$__range"),
    }  # fmt: skip


def test_the_others_are_those_of_rays_own_dashboards() -> None:
    folder = util.find_spec("ray.dashboard.modules.metrics.dashboards")
    if folder is None or folder.submodule_search_locations is None:
        pytest.skip("Ray keeps its dashboards elsewhere")
    panels = Path(folder.submodule_search_locations[0]) / "default_dashboard_panels.py"
    known = set(METRIC.findall(panels.read_text()))
    others = {name for text in expressions() for name in METRIC.findall(text)} - OURS.keys()
    assert {"ray_node_gpus_utilization", "ray_node_cpu_utilization", "ray_object_store_memory"} <= others
    assert others <= known


def test_every_variable_is_defined_and_every_panel_has_a_place_of_its_own() -> None:
    named = set(re.findall(r"\$\{?([A-Za-z]\w*)", json.dumps(DASHBOARD["panels"])))
    assert named == {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
