"""What a run leaves in its output folder: metrics.json, model, runs, report, a table on the screen."""

import tempfile
from collections import Counter
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from retrieval_ray import curves, report
from retrieval_ray.artifacts import Location, Stage
from retrieval_ray.gate import FOLDS
from retrieval_ray.metrics import METRICS, NO_DIFFERENCE, Difference, holm, mean, paired_difference
from retrieval_ray.model_card import model_card
from retrieval_ray.stages import drift, parity, tracking
from retrieval_ray.stages.collection import Grouped, Ranked
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.evaluate import trec_lines, values_of
from retrieval_ray.stages.trust import beside_of
from retrieval_ray.student import Student
from retrieval_ray.throughput import speed

Measures = dict[str, dict[str, dict[str, float]]]  # system -> query -> metric


@dataclass(frozen=True)
class Outcome:
    """One corpus's part of a finished run."""

    grouped: Grouped
    adapted: Ranked | None  # the collection as the trained model sees it
    evaluated: Stage
    drifted: Stage | None = None  # what training did to vectors, where there was any

    def seconds(self) -> dict[str, float]:
        """Wall time by stage, for what was run with the base model and with the trained one."""
        found: Counter[str] = Counter()
        for stage in [*self.grouped.stages(), self.evaluated]:
            found[stage.name] += stage.manifest()["seconds"]
        if self.adapted:
            for stage in (self.adapted.passages, self.adapted.query_vectors, self.adapted.retrieved):
                found[f"{stage.name}-adapted"] += stage.manifest()["seconds"]
        if self.drifted:
            found["drift"] += self.drifted.manifest()["seconds"]
        return {name: round(value, 3) for name, value in found.items()}


def write(context: Context, outcomes: list[Outcome], rounds: list[Stage]) -> Location:
    """Write everything; returns where metrics.json lies. rounds: of training, the last one's model counts."""
    trained = rounds[-1] if rounds else None
    output = Location.of(context.config.output_dir)
    (output / "metrics.json").remove()  # it is written last: until then nothing here counts as finished
    adapted = trained is not None and int(trained.manifest()["epoch"]) > 0
    documents = [_metrics(context, outcome, rounds, adapted) for outcome in outcomes]
    document = dict(documents[0])
    if len(documents) > 1:
        document["datasets"] = {d["dataset"]: d for d in documents}
    _write_models(context, output, trained, adapted, document)
    for outcome in outcomes:
        folder = output / "runs" if len(outcomes) == 1 else output / "runs" / outcome.grouped.name
        for system in documents[outcomes.index(outcome)]["systems"]:
            source = _source_of(system, adapted)
            lines = trec_lines(outcome.evaluated, source, f"retrieval_ray-{system}")
            (folder / f"{system}.trec").write(lines.encode())
    page = report.page(
        [
            report.Facts(
                metrics=d,
                gate=o.grouped.groups.manifest()["gate"],
                groups=o.grouped.groups.manifest(),
                queries=o.grouped.queries.manifest(),
                corpus=o.grouped.corpus.manifest(),
                per_query=_systems(values_of(o.evaluated), adapted),
                beside=beside_of(o.grouped.groups),
                parity=parity.run(context, o.grouped),
                drift=drift.facts_of(o.drifted) if o.drifted else None,
            )
            for d, o in zip(documents, outcomes, strict=True)
        ],
        fit=(trained.folder / "fit.json").read_json() if trained else None,
        training=trained.manifest() if trained else None,
        speed=speed(tracking.rows_of(trained.folder / "steps.jsonl")) if trained else None,
        rounds=len(rounds),
    )
    (output / "report.html").write(page.encode())
    (output / "metrics.json").write_json(document)
    tracking.finish(context, curves.results(document))
    _show(documents)
    return output / "metrics.json"


def _source_of(system: str, adapted: bool) -> str:
    """The evaluated run behind a reported system: what is returned is the candidate or the base."""
    if system == "adapted":
        return "candidate" if adapted else "base"
    return system


def _systems(values: Measures, adapted: bool) -> Measures:
    """Per-query metrics by reported system: base, adapted, the others, a candidate that lost."""
    found = {"base": values["base"], "adapted": values["candidate" if adapted else "base"]}
    found |= {system: values[system] for system in ("bm25", "teacher") if system in values}
    if "candidate" in values and not adapted:
        found["candidate"] = values["candidate"]
    return found


def _metrics(context: Context, outcome: Outcome, rounds: list[Stage], adapted: bool) -> dict[str, Any]:
    systems = _systems(values_of(outcome.evaluated), adapted)
    queries = sorted(systems["base"])
    differences = {
        metric: paired_difference(
            [systems["base"][q][metric] for q in queries],
            [systems["adapted"][q][metric] for q in queries],
            seed=context.config.seed,
        )
        if adapted
        else NO_DIFFERENCE
        for metric in METRICS
    }
    adjusted = holm({metric: d.p for metric, d in differences.items()})
    groups, written = outcome.grouped.groups.manifest(), outcome.grouped.queries.manifest()
    rejected: Counter[str] = Counter(written["rejected"]) + Counter(groups["rejected"])
    return {
        "dataset": outcome.grouped.name,
        "split": outcome.grouped.split,
        "queries_judged": len(queries),
        "systems": {system: mean(values) for system, values in systems.items()},
        "delta": {metric: _difference(d) | {"p_holm": adjusted[metric]} for metric, d in differences.items()},
        "decision": "adapted" if adapted else "base",
        "gate": groups["gate"],
        "queries": {"kept": groups["kept"], "rejected": dict(sorted(rejected.items()))},
        "exclude_same_id": context.config.evaluate.exclude_same_id,
        "training": _training(rounds),
        "seconds": outcome.seconds()
        | ({"train": sum(each.manifest()["seconds"] for each in rounds)} if rounds else {}),
    }


def _difference(d: Difference) -> dict[str, Any]:
    return {"mean": d.mean, "ci95": [d.low, d.high], "p": d.p}


def _training(rounds: list[Stage]) -> dict[str, Any] | None:
    if not rounds:
        return None
    manifest = rounds[-1].manifest()
    keys = ("epoch", "candidate_epoch", "temperatures", "batch_queries", "queries", "refreshes")
    return {key: manifest[key] for key in keys} | {
        "skipped_steps": len(manifest["skipped"]),
        "rounds": len(rounds),
    }


def _write_models(
    context: Context,
    output: Location,
    trained: Stage | None,
    adapted: bool,
    document: dict[str, Any],
) -> None:
    """``model/`` is what the run returns; ``candidate/`` a trained model that lost to the base."""
    for name in ("model", "candidate"):
        (output / name).remove()
    if trained is not None:
        (trained.folder / "candidate").copy_to(output / ("model" if adapted else "candidate"))
    if not adapted:
        with tempfile.TemporaryDirectory() as local:
            config = context.config.student
            Student(
                context.student.source,
                precision="float32",
                device="cpu",
                query_prompt=config.query_prompt,
                passage_prompt=config.passage_prompt,
                trust_remote_code=config.trust_remote_code,
            ).save(local)
            Location.of(local).copy_to(output / "model")
    teacher = context.config.teacher
    card = model_card(
        context.config.student.model,
        f"{teacher.kind} {teacher.model or ''}".strip(),
        document,
        experts=(output / "model" / "moe.json").exists(),
    )
    (output / "model" / "README.md").write(card.encode())


def _show(documents: list[dict[str, Any]]) -> None:
    """The table at the end, on standard output."""
    console = Console(highlight=False, width=100)
    for document in documents:
        table = Table(title=f"{document['dataset']} ({document['split']})", title_justify="left")
        table.add_column("system")
        for metric in METRICS:
            table.add_column(metric, justify="right")
        for system, values in document["systems"].items():
            table.add_row(system, *(f"{values[metric]:.4f}" for metric in METRICS))
        console.print(table)
        if document["gate"]["passed"] is None:
            console.print("the teacher is unproven on this corpus: no judged dev queries (dataset.dev_split)")
        delta = document["delta"]["ndcg@10"]
        if document["decision"] == "adapted":
            console.print(
                f"adapted against base, ndcg@10: {delta['mean']:+.4f} "
                f"(95 % interval {delta['ci95'][0]:+.4f} to {delta['ci95'][1]:+.4f}, p = {delta['p']:.2g})"
            )
        else:
            console.print(f"returned: the base model. {why_base(document)}")


def why_base(document: dict[str, Any]) -> str:
    """Why a run ended with the base model."""
    if document["training"] is None:
        found, d = document["gate"], document["gate"]["difference"]
        few = (
            f"; {found['queries']} are too few to fit and try its weights" if found["queries"] < FOLDS else ""
        )
        return (
            f"The teacher is not proven better than the student on {found['queries']} judged dev queries "
            f"({d['mean']:+.4f}, 95 % interval {d['low']:+.4f} to {d['high']:+.4f}{few}), so nothing was "
            "trained (teacher.gate=false trains all the same)."
        )
    return "No trained epoch was better than the untouched model on the dev queries."
