"""The merge stage: a student with experts made dense, and the loss of quality that costs, measured."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrieval_ray.artifacts import Location
from retrieval_ray.config import DatasetConfig
from retrieval_ray.datasets import read_corpus, read_judged
from retrieval_ray.errors import UserError
from retrieval_ray.experts import expert_load, merge_experts
from retrieval_ray.metrics import mean, paired_difference, per_query
from retrieval_ray.model_card import merged_card
from retrieval_ray.moe import moe_layers
from retrieval_ray.progress import say
from retrieval_ray.runs import without_ids
from retrieval_ray.search import search
from retrieval_ray.sources import open_source
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.encode import student_arguments
from retrieval_ray.stages.evaluate import CUT
from retrieval_ray.stages.ingest import passage_text
from retrieval_ray.student import Student

PerQuery = dict[str, dict[str, float]]


def run(context: Context) -> Location:
    """Write ``model/``, the dense model with a card, and ``merge.json``; returns where the latter lies.

    Raises ``UserError`` for a student without experts.
    """
    config = context.config
    torch.set_num_threads(context.profile.threads)
    if (
        context.profile.device == "cuda" and not torch.cuda.is_available()
    ):  # the driver's machine may have none
        context = replace(context, profile=replace(context.profile, device="cpu"))
    student = Student(**student_arguments(context))
    backbone = student.model[0].auto_model
    if not moe_layers(backbone):
        raise UserError(f"student.model: '{config.student.model}' has no experts to merge")
    layout = vars(next(iter(moe_layers(backbone).values())).layout)
    output = Location.of(config.output_dir)
    (output / "merge.json").remove()  # it is written last
    datasets = {d.path: d for d in config.corpora()}
    passages = {path: _passages(dataset) for path, dataset in datasets.items()}

    load_LE = None
    if config.merge.weights == "load":
        texts = [text for rows in passages.values() for text in _spread(rows, config.merge.load_texts)]
        say(f"the experts' load on {len(texts)} passages")
        load_LE = expert_load(student, texts, token_budget=context.profile.token_budget)
    names = list(moe_layers(backbone))
    before = _measured(context, student, datasets, passages, "with experts")
    merge_experts(student.model, load_LE)
    after = _measured(context, student, datasets, passages, "merged")
    document: dict[str, Any] = {
        "student": config.student.model,
        "experts": layout,
        "weights": config.merge.weights,
        "load": None if load_LE is None else dict(zip(names, _shares(load_LE), strict=True)),
        "datasets": {
            name: {
                "split": datasets[name].split,
                "queries_judged": len(before[name]),
                "before": mean(before[name]),
                "after": mean(after[name]),
                "delta": _delta(before[name], after[name], config.seed),
            }
            for name in before
        },
    }
    with tempfile.TemporaryDirectory() as local:
        student.save(local)
        (output / "model").remove()
        Location.of(local).copy_to(output / "model")
    (output / "model" / "README.md").write(merged_card(document).encode())
    (output / "merge.json").write_json(document)
    for name, found in document["datasets"].items():
        say(
            f"'{name}': nDCG@10 {found['before']['ndcg@10']:.4f} with experts, "
            f"{found['after']['ndcg@10']:.4f} merged"
        )
    return output / "merge.json"


def _passages(dataset: DatasetConfig) -> dict[str, str]:
    """What the student reads of each passage, by id."""
    table, _ = read_corpus(open_source(dataset.path))
    return {
        row["passage_id"]: passage_text(row["title"], row["text"], titles=dataset.titles)
        for row in table.to_pylist()
    }


def _spread(rows: Mapping[str, str], count: int) -> list[str]:
    """So many texts at even steps of the corpus's order, or all."""
    texts = list(rows.values())
    return [texts[i] for i in np.linspace(0, len(texts) - 1, min(count, len(texts))).astype(int)]


def _measured(
    context: Context,
    student: Student,
    datasets: Mapping[str, DatasetConfig],
    passages: Mapping[str, Mapping[str, str]],
    note: str,
) -> dict[str, PerQuery]:
    """Metrics per dataset and judged test query, with the vectors that the pipeline would store."""
    if not context.config.merge.evaluate:
        return {}
    found = {}
    budget = context.profile.token_budget
    for name, dataset in datasets.items():
        say(f"evaluation on '{name}', {note}")
        rows = passages[name]
        judged = read_judged(
            open_source(dataset.path),
            dataset.split,
            set(rows),
            max_queries=dataset.max_queries,
            relevance_threshold=dataset.relevance_threshold,
        )
        qrels: dict[str, dict[str, int]] = {}
        for row in judged.qrels.to_pylist():
            qrels.setdefault(row["query_id"], {})[row["passage_id"]] = row["relevance"]
        vectors_ND = student.encode(list(rows.values()), "passage", token_budget=budget).astype(np.float16)
        queries_QD = student.encode(list(judged.texts.values()), "query", token_budget=budget)
        rankings = search([(list(rows), vectors_ND)], queries_QD.astype(np.float16), CUT + 1)
        ranked = {
            query: [p for p, _ in without_ids(ranking, _left_out(context, query))[:CUT]]
            for query, ranking in zip(judged.texts, rankings, strict=True)
        }
        found[name] = per_query(qrels, ranked, relevance_threshold=dataset.relevance_threshold)
    return found


def _left_out(context: Context, query_id: str) -> set[str]:
    return {query_id} if context.config.evaluate.exclude_same_id else set()


def _shares(load_LE: Tensor) -> list[list[float]]:
    counts_LE = load_LE.double()
    shares: list[list[float]] = (counts_LE / counts_LE.sum(dim=1, keepdim=True)).tolist()
    return shares


def _delta(before: PerQuery, after: PerQuery, seed: int) -> dict[str, Any]:
    queries = sorted(before)
    d = paired_difference(
        [before[q]["ndcg@10"] for q in queries], [after[q]["ndcg@10"] for q in queries], seed=seed
    )
    return {"ndcg@10": {"mean": d.mean, "ci95": [d.low, d.high], "p": d.p}}
