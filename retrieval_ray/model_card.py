"""The README of a model folder: what it is, how it was made, what it is worth."""

from typing import Any

from retrieval_ray.metrics import METRICS


def model_card(base_model: str, teacher: str, metrics: dict[str, Any]) -> str:
    """A model card in Markdown, with the front matter that model hubs read.

    metrics: the document of metrics.json.
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
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
base_model: {base_model}
tags: [sentence-transformers, retrieval, retrieval-ray]
---
# {base_model} for `{metrics["dataset"]}`

{summary}

| system | {" | ".join(METRICS)} |
|---|{"---|" * len(METRICS)}
{rows}

```python
from sentence_transformers import SentenceTransformer
model = SentenceTransformer("path/to/this/folder")
scores = model.similarity(model.encode_query("a question"), model.encode_document(["a passage"]))
```

Made by retrieval_ray (listwise distillation as in arXiv 2502.19712 and 2505.19274):
- teacher: {teacher}, weights {metrics["gate"]["weights"]}
- training queries kept: {metrics["queries"]["kept"]}, rejected: {metrics["queries"]["rejected"]}
{details}"""
