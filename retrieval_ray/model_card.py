"""The README of a model folder: what it is, how it was made, what it is worth."""

from typing import Any

from retrieval_ray.metrics import METRICS


def model_card(base_model: str, teacher: str, metrics: dict[str, Any], *, experts: bool = False) -> str:
    """A model card in Markdown, with the front matter that model hubs read.

    metrics: the document of metrics.json. experts: whether the model has some, and so code of its own.
    """
    delta = metrics["delta"]["ndcg@10"]
    adapted = metrics["decision"] == "adapted"
    rows = "\n".join(
        f"| {system} | " + " | ".join(f"{values[metric]:.4f}" for metric in METRICS) + " |"
        for system, values in metrics["systems"].items()
    )
    summary = (
        f"Adapted to the corpus `{metrics['dataset']}` by listwise distillation; "
        f"nDCG@10 {delta['mean']:+.4f} against the base model on {metrics['queries_judged']} judged "
        f"queries (95 % interval {delta['ci95'][0]:+.4f} to {delta['ci95'][1]:+.4f}, p = {delta['p']:.2g})."
        if adapted
        else "The base model, unchanged: no trained model was better on this corpus."
    )
    training = metrics["training"]
    details = (
        f"- epoch {training['epoch']}, temperatures {training['temperatures']}, "
        f"batches of {training['batch_queries']} queries\n"
        if adapted
        else ""
    )
    return f"""{_front_matter(base_model)}# {base_model} for `{metrics["dataset"]}`

{summary}

| system | {" | ".join(METRICS)} |
|---|{"---|" * len(METRICS)}
{rows}

{_usage(experts)}
Made by retrieval_ray (listwise distillation as in arXiv 2502.19712 and 2505.19274):
- teacher: {teacher}, weights {metrics["gate"]["weights"]}
- training queries kept: {metrics["queries"]["kept"]}, rejected: {metrics["queries"]["rejected"]}
{details}"""


def merged_card(merge: dict[str, Any]) -> str:
    """The card of a model whose experts were merged. merge: the document of merge.json."""
    layout = merge["experts"]
    rows = "\n".join(_merged_row(name, found) for name, found in merge["datasets"].items())
    loss = (
        f"| nDCG@10 | with experts | merged | difference (95 % interval) |\n|---|---|---|---|\n{rows}\n"
        if rows
        else "What this costs in quality was not measured.\n"
    )
    how = {"load": "weighted by the tokens that each takes", "uniform": "all alike"}[merge["weights"]]
    return f"""{_front_matter(merge["student"])}# {merge["student"]}, made dense

The {layout["experts"]} experts of each layer (router `{layout["router"]}`, in `{layout["where"]}`) became
their mean, {how}: a model of the original architecture, with no code of its own.

{loss}
{_usage(experts=False)}"""


def _merged_row(name: str, found: dict[str, Any]) -> str:
    d = found["delta"]["ndcg@10"]
    return (
        f"| {name} ({found['split']}, {found['queries_judged']} queries) "
        f"| {found['before']['ndcg@10']:.4f} | {found['after']['ndcg@10']:.4f} "
        f"| {d['mean']:+.4f} ({d['ci95'][0]:+.4f} to {d['ci95'][1]:+.4f}, p = {d['p']:.2g}) |"
    )


def _front_matter(base_model: str) -> str:
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
base_model: {base_model}
tags: [sentence-transformers, retrieval, retrieval-ray]
---
"""


def _usage(experts: bool) -> str:
    load = 'SentenceTransformer("path/to/this/folder")'
    note = ""
    if experts:
        load = 'SentenceTransformer("path/to/this/folder", trust_remote_code=True)'
        note = (
            "Its feed-forward layers have experts, whose code lies in this folder; "
            '`retrieval_ray.load("path/to/this/folder")` needs no such trust.\n\n'
        )
    return f"""{note}```python
from sentence_transformers import SentenceTransformer
model = {load}
scores = model.similarity(model.encode_query("a question"), model.encode_document(["a passage"]))
```
"""
