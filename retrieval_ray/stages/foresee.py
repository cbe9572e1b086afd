"""What each job will do, out of its config and a look at its collections.

Where a stage is done already, what it found is taken for what was guessed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from retrieval_ray import amounts
from retrieval_ray.amounts import Workers
from retrieval_ray.config import Config, to_dict
from retrieval_ray.forecast import Work
from retrieval_ray.model_files import Model
from retrieval_ray.stages import given
from retrieval_ray.stages.context import STAGES, Context
from retrieval_ray.stages.judges import judges_of
from retrieval_ray.stages.known import Known, judged_corpus, look
from retrieval_ray.stages.rates import TEXTS, sampled
from retrieval_ray.stages.works import (
    encoding,
    kept,
    one_training,
    rates_of,
    retrieval,
    scoring,
    sizes_of,
    up_to,
    workers_of,
)


@dataclass(frozen=True)
class Foreseen:
    """The works of a job, where their rates come from, and what is to be said of an LLM."""

    works: list[Work]
    source: str
    lines: list[str]


def adapting(context: Context, until: str | None) -> Foreseen:
    """The main job, and those that do a part of it."""
    to = STAGES.index(until) if until else len(STAGES)
    corpora, judges = look(context, True), judges_of(context) if to >= STAGES.index("score") else []
    rates = rates_of(context, judges, corpora, sample=to >= STAGES.index("encode"))
    works = up_to(context, to, corpora, judges, rates)
    if to == len(STAGES):
        works.append(amounts.results(sizes_of(context.student)))
    return Foreseen([*works, *kept(context, works)], rates.source, _told(corpora))


def sweeping(context: Context, until: str | None, *, trials: Sequence[Config]) -> Foreseen:
    """Trials one after the other; until: where each ends. What they share is done by the first.

    Trials that differ in ``train`` alone, and in nothing there that makes other lists, share all but their
    training; others share at least something, so theirs is at most so much.
    """
    judges, corpora = judges_of(context), look(context, True)
    rates, to = rates_of(context, judges, corpora, sample=True), STAGES.index(until or "train")
    works: list[Work] = []
    begun: list[Any] = []
    for trial in trials:
        own = replace(context, config=trial)
        shared = {key: value for key, value in to_dict(trial).items() if key != "train"}
        shared["lists"] = [trial.encoded_of_a_list(), trial.train.dev_share, trial.train.dev_queries]
        if shared in begun:
            works.append(one_training(own, corpora, rates, ""))
            continue
        looked = corpora if not begun else look(replace(own, touched={}), False)  # not the first's counts
        works += up_to(own, to, looked, judges_of(own), rates)
        begun.append(shared)
    return Foreseen([*works, *kept(context, works)], rates.source, _told(corpora))


def teaching(context: Context, until: str | None) -> Foreseen:
    """The job that trains a cross-encoder."""
    config = context.config.reranker
    corpora = [
        judged_corpus(context, dataset, number) for number, dataset in enumerate(context.config.corpora())
    ]
    rates = rates_of(context, [], corpora, sample=True)
    workers, works = workers_of(context), []
    for known in corpora:
        works += [amounts.corpus(known.passages, known.row_bytes), amounts.queries(known.rows, at_most=True)]
        works += encoding(context, replace(known, at_most=True), rates)
        works.append(retrieval(context, known, rates, context.config.retrieve.retrievers))
    # Every judged pair and its negatives; some judgements say that a passage is no answer
    pairs = sum(known.training for known in corpora) * (1 + config.negatives)
    dev = sum(min(config.dev_queries, known.rows // 10) * config.pool for known in corpora)
    base = sizes_of(Model.of(config.base, "reranker.base"))
    rate = rates.of("encode-passage")
    works.append(amounts.reranker(pairs, config.epochs, dev, base, rate, Workers(1, workers.gpus)))
    works.append(amounts.results(base))
    return Foreseen(works, rates.source, [])


def judging(context: Context, until: str | None) -> Foreseen:
    """The job that judges given pairs."""
    judges = judges_of(context)
    count, pairs = given.some(context, TEXTS)
    texts = [pair.passage for pair in pairs]
    rates = sampled(context, judges, texts, [pair.query for pair in pairs], train=False)
    works: list[Work] = []
    for _ in {judge.kind == "listwise" for judge in judges}:  # laid out by query, and by passage
        size = sum(len(f"{pair.query}{pair.passage}".encode()) for pair in pairs) / max(1, len(pairs))
        works.append(Work("pairs", "pairs", "pairs", count, stored=count * size))
    each = 1 if not pairs else max(1, round(len(pairs) / len({pair.query for pair in pairs})))
    for judge in judges:
        queries = -(-count // each)
        works.append(scoring(context, judge, queries, count, each, rates, at_most=True, extra=0.0))
    return Foreseen([*works, *kept(context, works)], rates.source, [])


def merging(context: Context, until: str | None) -> Foreseen:
    """The job that makes a model dense: its load is measured, and its quality before and after."""
    config, corpora = context.config.merge, look(context, False)
    rates = rates_of(context, [], corpora, sample=True)
    works, student = [], sizes_of(context.student)
    for known in corpora:
        if config.weights == "load":
            read = min(config.load_texts, known.passages)
            works.append(amounts.encode("passage", read, student, rates.of("encode-passage"), Workers(),
                                        at_most=False, note=" for the load"))  # fmt: skip
        for note in (" with experts", " merged") if config.evaluate else ():
            for role, texts in (("passage", known.passages), ("query", known.test)):
                rate = rates.of(f"encode-{role}")
                works.append(amounts.encode(role, texts, student, rate, Workers(), at_most=False, note=note))
    works = [replace(work, stored=0.0) for work in works]  # all of it stays in memory
    return Foreseen([*works, amounts.results(student)], rates.source, [])


def _told(corpora: Sequence[Known]) -> list[str]:
    return [line for corpus in corpora if corpus.cost for line in corpus.cost.lines()]
