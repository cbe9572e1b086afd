"""The works of the main job's stages, by config and corpora; ``foresee.py`` puts jobs together."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from retrieval_ray import amounts
from retrieval_ray.amounts import Workers
from retrieval_ray.artifacts import Location
from retrieval_ray.config import StudentConfig
from retrieval_ray.forecast import Rate, Work, left
from retrieval_ray.model_files import Model, resolve_model
from retrieval_ray.stages import layers, refresh
from retrieval_ray.stages.context import STAGES, Context
from retrieval_ray.stages.judges import Judge
from retrieval_ray.stages.known import Known, requests_of
from retrieval_ray.stages.rates import Rates, found, sampled
from retrieval_ray.teachers.listwise import windows

_MINING = ("encode", "retrieve", "score")
_sizes: dict[str, amounts.Student] = {}  # by the hash of a model's files, which may have to be fetched


def rates_of(context: Context, judges: Sequence[Judge], corpora: Sequence[Known], *, sample: bool) -> Rates:
    if not sample:
        return found(context, judges)
    texts = [text for corpus in corpora for text in corpus.texts]
    asked = [text for corpus in corpora for text in corpus.asked]
    return sampled(context, judges, texts, asked, train=True)


def workers_of(context: Context) -> Workers:
    return Workers(context.config.compute.workers, context.worker_resources()["num_gpus"])


def sizes_of(model: Model) -> amounts.Student:
    """Sizes of a model, out of its folder's files."""
    if model.sha not in _sizes:
        _sizes[model.sha] = _read_sizes(model)
    return _sizes[model.sha]


def _read_sizes(model: Model) -> amounts.Student:
    folder = Path(resolve_model(model.source, "student.model"))
    configs = [Location.of(str(path)).read_json() for path in sorted(folder.rglob("config.json"))]
    texts = [each.get("text_config", each) for each in configs]
    body: Mapping[str, Any] = next((each for each in texts if "hidden_size" in each), {})
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    return amounts.Student(
        int(body.get("hidden_size", 0)), int(body.get("num_hidden_layers", 0)), float(size)
    )


def encoding(
    context: Context, known: Known, rates: Rates, note: str = "", student: StudentConfig | None = None
) -> list[Work]:
    """Both sides of encoding. student: of a further retriever."""
    model = context.student if student is None else Model.of(student.model, "retrieve.models")
    of = "" if student is None else f" of {student.model}"
    sizes, workers = sizes_of(model), workers_of(context)
    sides = (("passage", known.passages, False), ("query", known.rows, known.at_most))
    return [
        amounts.encode(
            role, texts, sizes, rates.of(f"encode-{role}{of}"), workers, at_most=at_most, note=note
        )
        for role, texts, at_most in sides
    ]


def retrieval(
    context: Context, known: Known, rates: Rates, retrievers: Sequence[str], note: str = ""
) -> Work:
    depth, rate = context.config.retrieve.depth, Rate(None)
    if rates.flops:
        rate = Rate(
            amounts.search_seconds(
                known.passages, sizes_of(context.student).dimension, retrievers, depth,
                flops=rates.flops, bm25=rates.bm25,
            )
        )  # fmt: skip
    return amounts.retrieve(
        known.rows, known.passages, len(retrievers), depth, rate, workers_of(context), at_most=known.at_most,
        note=note,
    )  # fmt: skip


def scoring(
    context: Context, judge: Judge, queries: int, passages: int, pool: int, rates: Rates, *,
    at_most: bool, extra: float, note: str = "",
) -> Work:  # fmt: skip
    """One teacher on the pools of so many queries. extra: bytes that are laid out for it."""
    pairs, workers = queries * pool, workers_of(context)
    name = f"{judge.name}{note}"
    if judge.kind in ("bm25", "dense"):
        return amounts.looked_up(name, judge.kind, pairs, at_most=at_most)
    if judge.kind == "listwise":
        tokens, member = rates.of("encode-passage").tokens or 150.0, judge.config
        plan = windows(pool, member.window, member.stride)
        return amounts.listwise(
            name, queries, pool, plan, passage_tokens=tokens, max_tokens=member.max_tokens, at_most=at_most
        )
    calls, rate = pairs, rates.of(f"judge {judge.name}")
    rate = replace(rate, tokens=rate.tokens or rates.of("encode-passage").tokens)
    if judge.kind == "late":
        calls = amounts.late_texts(queries, passages, pairs)
        text, pair = rates.of(f"late {judge.name}"), rates.of("late pair")
        if rate.seconds is None and text.seconds is not None and pairs:
            rate = Rate(text.seconds * calls / pairs + (pair.seconds or 0.0), text.start, text.tokens)
    return amounts.score(
        name, judge.kind, pairs, calls, rate, workers, at_most=at_most, extra_bytes=extra
    )  # fmt: skip


def _judgements(
    context: Context, known: Known, judges: Sequence[Judge], rates: Rates, note: str = ""
) -> list[Work]:
    """Every teacher on the pools; the first that needs them laid out by passage has them laid out."""
    works: list[Work] = []
    pool = min(context.config.teacher.depth, known.passages)
    laid_out = amounts.pool_bytes(known.rows * pool, known.passages)
    for judge in judges:
        extra = 0.0 if judge.kind == "bm25" else laid_out
        laid_out -= extra
        if judge.kind == "late":  # token vectors of the queries, in float16
            tokens, size = rates.of("encode-query").tokens, sizes_of(judge.model or context.student)
            extra += 2.0 * known.rows * tokens * size.dimension
        work = scoring(
            context,
            judge,
            known.rows,
            known.passages,
            pool,
            rates,
            at_most=known.at_most,
            extra=0.0,
            note=note,
        )
        works.append(replace(work, stored=work.stored + extra))
    return works


def up_to(
    context: Context, to: int, corpora: Sequence[Known], judges: Sequence[Judge], rates: Rates
) -> list[Work]:
    """The works of the main job's stages, in their order, up to one of them; nothing else is asked for."""
    works = before_training(context, corpora, judges, rates, STAGES[: to + 1])
    if to >= STAGES.index("train"):
        works += training(context, corpora, judges, rates)
    return works + (_after(context, corpora, rates) if to >= STAGES.index("evaluate") else [])


def before_training(
    context: Context, corpora: Sequence[Known], judges: Sequence[Judge], rates: Rates,
    stages: Sequence[str], note: str = "",
) -> list[Work]:  # fmt: skip
    """Of the stages before the training lists and of these, those named, in their order."""

    def of(stage: str, known: Known) -> list[Work]:
        if stage == "corpus":
            return [amounts.corpus(known.passages, known.row_bytes)]
        if stage == "generate":
            return [known.generate] if known.generate else []
        if stage == "queries":
            return [amounts.queries(known.rows, at_most=known.at_most)]
        if stage == "encode":
            return _encodings(context, known, rates, note)
        if stage == "retrieve":
            return [retrieval(context, known, rates, context.config.retrieve.retrievers, note)]
        if stage == "score":
            return _judgements(context, known, judges, rates, note)
        return _lists(context, known, note) if stage == "groups" else []

    return [work for stage in stages for known in corpora for work in of(stage, known)]


def _encodings(context: Context, known: Known, rates: Rates, note: str) -> list[Work]:
    """By the student and by every further retriever."""
    works = encoding(context, known, rates, note)
    for name, student in context.config.retrieve.models.items():
        works += encoding(context, known, rates, f" with {name}{note}", student)
    return works


def _lists(context: Context, known: Known, note: str) -> list[Work]:
    pool = min(context.config.teacher.depth, known.passages)
    groups = amounts.groups(known.training, pool, _longest(context, known), at_most=True)
    works = [replace(groups, label=f"groups{note}")]
    return works + (_answered(context, known) if context.config.queries.negatives else [])


def _longest(context: Context, known: Known) -> int:
    """Passages of a list: no more than are judged."""
    config = context.config
    return min(config.groups.list_size, config.teacher.depth, known.passages)


def _answered(context: Context, known: Known) -> list[Work]:
    """A query for each negative of the lists, at most one a passage; by the LLM where it is named."""
    most = min(known.passages, known.training * (_longest(context, known) - 1))
    works = [Work("negatives", "negatives", "queries", most, True, stored=most * amounts.QUERY_BYTES)]
    if context.config.llm.model:
        works.insert(0, requests_of(context, most, None, label="generate for negatives"))
    return works


def training(context: Context, corpora: Sequence[Known], judges: Sequence[Judge], rates: Rates) -> list[Work]:
    """Training in its rounds."""
    train = context.config.train
    works: list[Work] = []
    for number in range(train.rounds):
        note = f", round {number + 1}" if number else ""
        if number:  # the student of the last round retrieves, and judges; other teachers have judged much
            again = before_training(context, corpora, judges, rates, (*_MINING, "groups"), note)
            works += [replace(work, at_most=True) for work in again]
        one = one_training(context, corpora, rates, note)
        works.append(one)
        if (between := _between(context, one)) is not None:
            often = amounts.refreshes(one.rows, between)
            works += _refreshed(context, corpora, judges, rates, often)
    return works


def _after(context: Context, corpora: Sequence[Known], rates: Rates) -> list[Work]:
    """What the adapted student is measured with."""
    config, after = context.config, list[Work]()
    for known in corpora:
        note, systems = ", adapted", 2 + len(config.evaluate.systems)
        asked = replace(known, rows=known.test, at_most=False)
        after.append(amounts.queries(asked.rows, at_most=False, note=", reported"))
        after += [*encoding(context, asked, rates, note), retrieval(context, asked, rates, ["dense"], note)]
        after.append(amounts.evaluate(known.test, systems, config.retrieve.depth, at_most=True))
        passages, queries = min(layers.PASSAGES, known.passages), min(layers.QUERIES, known.test)
        rate, student = rates.of("encode-passage"), sizes_of(context.student)
        after.append(amounts.drift(queries, passages, student, rate, workers_of(context)))
    return after


def one_training(context: Context, corpora: Sequence[Known], rates: Rates, note: str) -> Work:
    config, train = context.config, context.config.train
    lists, dev_texts = [], 0
    for known in corpora:
        dev = (
            known.lists[1]
            if known.lists
            else amounts.held_out(known.training, train.dev_share, train.dev_queries)
        )
        all_of_it = known.lists[0] if known.lists else known.training - dev
        lists.append(max(1, round(train.share * all_of_it)))
        pool = min(config.teacher.depth, known.passages)
        length = _longest(context, known) if known.dev else pool  # without judged queries, whole pools
        texts = dev * (1 + length) + known.dev * (1 + pool)
        dev_texts += min(texts, known.passages + known.rows)
    return amounts.train(
        lists, train.batch_queries, train.max_epochs, config.encoded_of_a_list(), dev_texts,
        sizes_of(context.student), rates.of("train"), rates.of("dev"), workers_of(context), share=train.share,
        note=note,
    )  # fmt: skip


def _between(context: Context, one: Work) -> int | None:
    per_epoch = max(1, int(one.rows) // context.config.train.max_epochs)
    return refresh.steps_between(context.config.train, per_epoch)


def _refreshed(
    context: Context, corpora: Sequence[Known], judges: Sequence[Judge], rates: Rates, often: int
) -> list[Work]:
    """Encoding, search and judging once more for every refresh, beside training; one line of the table."""
    parts = before_training(context, corpora, judges, rates, _MINING)
    return [
        replace(
            work, stage="refresh", label="refresh", unit="times", rows=0 if number else often, at_most=True,
            calls=often * work.calls, tokens_in=often * work.tokens_in, tokens_out=often * work.tokens_out,
            seconds=None if work.seconds is None else often * work.seconds, stored=often * work.stored,
        )
        for number, work in enumerate(parts)
    ]  # fmt: skip


def kept(context: Context, works: Sequence[Work]) -> list[Work]:
    """What scores by models and replies take once more, by content."""
    works = left(works, context.ledger.seen)
    judged = [w for w in works if w.stage.startswith("score-") and w.calls]
    pairs = sum(work.rows for work in judged)
    replies = sum(work.calls for work in works if work.stage == "generate")
    return [amounts.kept(pairs, replies)] if pairs or replies else []
