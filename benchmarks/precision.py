"""Does the precision that this machine is fast in cost quality?

    python benchmarks/precision.py [--quick] [--data FOLDER] [--split NAME] [--teacher CROSS_ENCODER]

The student's retrieval, and its candidates reranked by the embedded teacher and by a cross-encoder if one is
named, each in float32 and in the precision that a run here would use (half, where it is fast), on judged
queries: of the demo, or of a collection. ``ratio`` is the worst nDCG@10 in that precision over that in
float32. Equal: each differs by .002 at most.
"""

from collections.abc import Mapping, Sequence

import torch
from measure import parser, report

from retrieval_ray.datasets import read_corpus, read_judged
from retrieval_ray.metrics import mean, per_query
from retrieval_ray.model_files import resolve_model
from retrieval_ray.search import search
from retrieval_ray.sources import open_source
from retrieval_ray.stages.ingest import passage_text
from retrieval_ray.student import Student, default_token_budget, probe_precision
from retrieval_ray.teachers.cross_encoder import CrossEncoder
from retrieval_ray.teachers.late import Late

Run = dict[str, Sequence[str]]  # passage ids, best first, by query id
ALLOWED = 0.002


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--data", default="demo", help="what dataset.path takes")
    arguments.add_argument("--split", default="test")
    arguments.add_argument("--model", default="all-MiniLM-L6-v2")
    arguments.add_argument("--teacher", help="a cross-encoder: folder or hub id")
    arguments.add_argument("--max-tokens", type=int, default=512, help="of the cross-encoder's pairs")
    arguments.add_argument("--depth", type=int, default=20, help="candidates a query")
    given = arguments.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    half, budget = probe_precision(device), default_token_budget(device)
    source = open_source(given.data)
    rows = read_corpus(source)[0].to_pylist()
    corpus = {row["passage_id"]: passage_text(row["title"], row["text"], titles=True) for row in rows}
    judged = read_judged(source, given.split, set(corpus), max_queries=400)
    qrels: dict[str, dict[str, int]] = {}
    for row in judged.qrels.to_pylist():
        qrels.setdefault(row["query_id"], {})[row["passage_id"]] = row["relevance"]
    if given.quick:
        kept = dict.fromkeys(passage for relevant in qrels.values() for passage in relevant)
        corpus = {key: corpus[key] for key in [*kept, *(key for key in corpus if key not in kept)][:1000]}
    folder = resolve_model(given.model, "--model")
    runs: dict[str, dict[str, Run]] = {"retrieval": {}, "embedded teacher": {}}
    for precision in dict.fromkeys(("float32", half)):
        student = Student(folder, precision=precision, device=device)
        vectors_PD = student.encode(list(corpus.values()), "passage", token_budget=budget)
        vectors_QD = student.encode(list(judged.texts.values()), "query", token_budget=budget)
        found = search([(list(corpus), vectors_PD)], vectors_QD, given.depth)
        order = [[passage for passage, _ in ranking] for ranking in found]
        runs["retrieval"][precision] = dict(zip(judged.texts, order, strict=True))
    pools = runs["retrieval"]["float32"]  # the same candidates for all
    for precision in runs["retrieval"]:
        late = Late({"model": folder, "precision": precision, "device": device}, token_budget=budget)
        runs["embedded teacher"][precision] = _reranked(late, pools, judged.texts, corpus)
        if given.teacher:
            teacher = CrossEncoder(
                resolve_model(given.teacher, "--teacher"),
                max_tokens=given.max_tokens, precision=precision, token_budget=budget, device=device,
            )  # fmt: skip
            again = _reranked(teacher, pools, judged.texts, corpus)
            runs.setdefault("cross-encoder", {})[precision] = again
    ndcg = {
        name: {p: mean(per_query(qrels, run))["ndcg@10"] for p, run in by_precision.items()}
        for name, by_precision in runs.items()
    }
    worst = min(ndcg.values(), key=lambda values: values[half] / values["float32"])
    report(
        "precision",
        quick=given.quick,
        ratio=worst[half] / worst["float32"],
        ours=worst[half],
        peer=worst["float32"],
        unit="ndcg@10",
        equal=all(abs(values[half] - values["float32"]) <= ALLOWED for values in ndcg.values()),
        ndcg=ndcg,
        precision=half,
        queries=len(judged.texts),
        passages=len(corpus),
        depth=given.depth,
        data=given.data.rstrip("/").rpartition("/")[2],
        model=given.model,
    )


def _reranked(
    teacher: Late | CrossEncoder, pools: Run, queries: Mapping[str, str], corpus: Mapping[str, str]
) -> Run:
    """Every query's candidates in the teacher's order, ties as they were retrieved."""
    pairs = [(query, passage) for query, pool in pools.items() for passage in pool]
    scores = iter(teacher.score([queries[q] for q, _ in pairs], [corpus[p] for _, p in pairs]))
    reranked: Run = {}
    for query, pool in pools.items():
        scored = [(next(scores), passage) for passage in pool]
        reranked[query] = [passage for _, passage in sorted(scored, key=lambda pair: -pair[0])]
    return reranked


if __name__ == "__main__":
    main()
