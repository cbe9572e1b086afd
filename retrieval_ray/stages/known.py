"""What is known of a corpus and its queries before a job's first stage, or as far as its stages are done."""

from dataclasses import dataclass, replace
from typing import Any

from retrieval_ray import amounts
from retrieval_ray.amounts import Workers
from retrieval_ray.config import DatasetConfig
from retrieval_ray.datasets import judged_ids, passages_of, read_judged, read_log, read_log_file
from retrieval_ray.forecast import Rate, Work
from retrieval_ray.sources import open_source
from retrieval_ray.stages import forecast
from retrieval_ray.stages.ask_vllm import devices
from retrieval_ray.stages.context import Context, ledger_name
from retrieval_ray.stages.generate import wanted_of
from retrieval_ray.stages.ingest import passage_text
from retrieval_ray.stages.queries import sources_of
from retrieval_ray.stages.rates import TEXTS

_LOOKED_AT = 5_000  # passages whose mean length is taken


@dataclass(frozen=True)
class Known:
    """One corpus before its first stage, or as far as its stages are done."""

    passages: int
    row_bytes: float  # of a passage
    texts: list[str]  # some, as models read them
    asked: list[str]  # some queries
    test: int  # judged queries that are reported
    dev: int
    rows: int  # of the queries table
    training: int
    at_most: bool  # whether the last two are
    lists: tuple[int, int] | None  # for training and held out, where they are there
    generate: Work | None
    cost: forecast.Cost | None


def look(context: Context, sample: bool) -> list[Known]:
    return [_corpus(context, dataset, n, sample) for n, dataset in enumerate(context.config.corpora())]


def _finished(context: Context, name: str, number: int) -> dict[str, Any] | None:
    """The manifest of the stage of this name that a run comes to for one corpus; None: not done yet."""
    own = [stage for stage in context.touched.values() if ledger_name(stage) == name and stage.finished()]
    return own[number].manifest() if number < len(own) else None


def _head(dataset: DatasetConfig) -> tuple[int, float, list[str]]:
    """Passages, the mean bytes of the first ones, and the texts of some."""
    source = open_source(dataset.path)
    count, size, looked = 0, 0, 0
    texts: list[str] = []
    for passage_id, title, text in passages_of(source):
        count += 1
        if looked < _LOOKED_AT:
            looked += 1
            size += len(f"{passage_id}{title}{text}".encode())
        if len(texts) < TEXTS:
            texts.append(passage_text(title, text, titles=dataset.titles))
    return count, size / max(1, looked), texts


def _judged(dataset: DatasetConfig, split: str, most: int | None) -> Any:
    source = open_source(dataset.path)
    return read_judged(
        source,
        split,
        judged_ids(source, split),
        max_queries=most,
        relevance_threshold=dataset.relevance_threshold,
    )


def _corpus(context: Context, dataset: DatasetConfig, number: int, sample: bool) -> Known:
    config = context.config
    count, row_bytes, texts = _head(dataset)
    source = open_source(dataset.path)
    test = _judged(dataset, dataset.split, dataset.max_queries).texts
    dev = _judged(dataset, dataset.dev_split, None).texts if dataset.dev_split else {}
    sources, training, asked = sources_of(config.queries, dataset), 0, list(test.values())
    if "log" in sources:
        split, path = dataset.log_split or config.queries.log_split, config.queries.log_path
        log = read_log(source, split, without={*test, *dev}) if split else {}
        log = log | (read_log_file(path) if path else {})
        training, asked = len(log), [*log.values(), *asked]
    if "extractive" in sources:
        training += min(config.queries.extractive_max, config.queries.extractive_per_passage * count)
    cost, generate = None, None
    if "llm" in sources:
        if sample:
            cost = forecast.of(context, sorted(passages_of(source)), titles=dataset.titles)
        each = sum(wanted_of(context).kinds.values())
        generate = requests_of(context, each * min(config.llm.passages, count), cost)
        training += int(generate.rows)
    training, at_most = min(training, config.queries.max_queries), True
    rows, lists = training + len(test) + len(dev), None
    if done := _finished(context, "queries", number):
        training, rows, at_most = int(done["train"]), int(done["rows"]), False
    if made := _finished(context, "groups", number):
        lists = (int(made["train"]), int(made["dev"]))
    return Known(
        count, row_bytes, texts, asked[:TEXTS], len(test), len(dev), rows, training, at_most,
        lists, generate, cost,
    )  # fmt: skip


def judged_corpus(context: Context, dataset: DatasetConfig, number: int) -> Known:
    """Of the job that trains a teacher: judged queries alone. training: judged pairs."""
    count, row_bytes, texts = _head(dataset)
    judged = _judged(dataset, context.config.reranker.split, context.config.reranker.max_queries)
    done = _finished(context, "queries", number)
    rows = int(done["rows"]) if done else len(judged.texts)
    asked = list(judged.texts.values())[:TEXTS]
    return Known(
        count, row_bytes, texts, asked, 0, 0, rows, judged.qrels.num_rows, not done, None,
        None, None,
    )  # fmt: skip


def requests_of(
    context: Context, requests: int, cost: forecast.Cost | None, *, label: str = "generate"
) -> Work:
    """An LLM's requests: as counted on a sample; where none was, at most so many."""
    config = context.config.llm
    engines = Workers(config.replicas or context.config.compute.workers, 0.0)
    if config.engine == "vllm" and context.profile.device == "cuda":
        engines = replace(engines, gpus=float(devices(config.vllm)))
    paid = config.engine == "endpoint"
    if cost is None:
        return amounts.generate(
            requests, requests, Rate(None), engines, tokens_in=requests * amounts.REQUEST_TOKENS,
            tokens_out=requests * config.max_tokens, at_most=True, paid=paid, label=label,
        )  # fmt: skip
    asked = cost.requests * (1 - cost.kept)
    seconds = None
    if cost.gpu_hours is not None:  # of all engines together
        seconds = cost.gpu_hours * 3600 / devices(config.vllm) / max(1.0, asked)
    return amounts.generate(
        cost.requests, asked, Rate(seconds), engines, tokens_in=cost.tokens_in, tokens_out=cost.tokens_out,
        at_most=False, paid=paid,
    )  # fmt: skip
