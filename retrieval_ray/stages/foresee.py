"""What the stages of each job will do, out of its config and a look at its collections.

Where a stage is done already, what it found is taken for what was guessed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from retrieval_ray import amounts
from retrieval_ray.amounts import Workers
from retrieval_ray.artifacts import Location
from retrieval_ray.config import Config, DatasetConfig, StudentConfig, to_dict
from retrieval_ray.datasets import judged_ids, passages_of, read_judged, read_log, read_log_file
from retrieval_ray.forecast import Rate, Work
from retrieval_ray.model_files import Model, resolve_model
from retrieval_ray.sources import open_source
from retrieval_ray.stages import forecast, given, layers, refresh
from retrieval_ray.stages.ask_vllm import devices
from retrieval_ray.stages.context import STAGES, Context, ledger_name
from retrieval_ray.stages.generate import wanted_of
from retrieval_ray.stages.ingest import passage_text
from retrieval_ray.stages.judges import Judge, judges_of
from retrieval_ray.stages.queries import sources_of
from retrieval_ray.stages.rates import TEXTS, Rates, found, sampled
from retrieval_ray.teachers.listwise import windows

_LOOKED_AT = 5_000  # passages whose mean length is taken


@dataclass(frozen=True)
class Foreseen:
    """The works of a job, where their rates come from, and what is to be said of an LLM."""

    works: list[Work]
    source: str
    lines: list[str]


@dataclass(frozen=True)
class Known:
    """One corpus before its first stage, or as far as its stages are done."""

    dataset: DatasetConfig
    name: str
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


def adapting(context: Context, until: str | None, *, sample: bool) -> Foreseen:
    """The main job, and those that do a part of it. sample: whether time may be spent on one."""
    judges, corpora = judges_of(context), _look(context, sample)
    to = STAGES.index(until) if until else len(STAGES)
    rates = _rates(context, judges, corpora, sample=sample and to >= STAGES.index("encode"))
    works = _up_to(context, to, corpora, judges, rates)
    if to == len(STAGES):
        works.append(amounts.results(_student(context.student)))
    return Foreseen([*works, *_kept(works)], rates.source, _told(corpora))


def sweeping(context: Context, until: str | None, *, sample: bool, trials: Sequence[Config]) -> Foreseen:
    """Trials one after the other; until: where each ends. What they share is done by the first.

    Trials that differ in ``train`` alone share all but their training; others share at least something, so
    theirs is at most so much.
    """
    judges, corpora = judges_of(context), _look(context, sample)
    rates, to = _rates(context, judges, corpora, sample=sample), STAGES.index(until or "train")
    works: list[Work] = []
    begun: list[Any] = []
    for trial in trials:
        own = replace(context, config=trial)
        shared = {key: value for key, value in to_dict(trial).items() if key != "train"}
        if shared in begun:
            works.append(_trained(own, corpora, rates, ""))
            continue
        looked = corpora if not begun else _look(own, False)
        works += _up_to(own, to, looked, judges_of(own), rates)
        begun.append(shared)
    return Foreseen([*works, *_kept(works)], rates.source, _told(corpora))


def teaching(context: Context, until: str | None, *, sample: bool) -> Foreseen:
    """The job that trains a cross-encoder."""
    config = context.config.reranker
    corpora = [
        _judged_corpus(context, dataset, number) for number, dataset in enumerate(context.config.corpora())
    ]
    rates = _rates(context, [], corpora, sample=sample)
    workers, works = _workers(context), []
    for known in corpora:
        works += [amounts.corpus(known.passages, known.row_bytes), amounts.queries(known.rows, at_most=True)]
        works += _read(context, replace(known, at_most=True), rates)
        works.append(_retrieved(context, known, rates, context.config.retrieve.retrievers))
    # Every judged pair and its negatives; some judgements say that a passage is no answer
    pairs = sum(known.training for known in corpora) * (1 + config.negatives)
    dev = sum(min(config.dev_queries, known.rows // 10) * config.pool for known in corpora)
    base = _student(Model.of(config.base, "reranker.base"))
    rate = rates.of("encode-passage")
    works.append(amounts.reranker(pairs, config.epochs, dev, base, rate, Workers(1, workers.gpus)))
    works.append(amounts.results(base))
    return Foreseen(works, rates.source, [])


def judging(context: Context, until: str | None, *, sample: bool) -> Foreseen:
    """The job that judges given pairs."""
    judges = judges_of(context)
    count, pairs = given.some(context, TEXTS)
    rates = found(context, judges)
    if sample:
        texts = [pair.passage for pair in pairs]
        rates = sampled(context, judges, texts, [pair.query for pair in pairs], train=False)
    works: list[Work] = []
    for _ in {judge.kind == "listwise" for judge in judges}:  # laid out by query, and by passage
        size = sum(len(f"{pair.query}{pair.passage}".encode()) for pair in pairs) / max(1, len(pairs))
        works.append(Work("pairs", "pairs", "pairs", count, stored=count * size))
    each = 1 if not pairs else max(1, round(len(pairs) / len({pair.query for pair in pairs})))
    for judge in judges:
        queries = count // each
        works.append(_scored(context, judge, queries, count, each, rates, at_most=True, extra=0.0))
    return Foreseen([*works, *_kept(works)], rates.source, [])


def merging(context: Context, until: str | None, *, sample: bool) -> Foreseen:
    """The job that makes a model dense: its load is measured, and its quality before and after."""
    config, corpora = context.config.merge, _look(context, False)
    rates = _rates(context, [], corpora, sample=sample)
    works, student = [], _student(context.student)
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


def _up_to(
    context: Context, to: int, corpora: Sequence[Known], judges: Sequence[Judge], rates: Rates
) -> list[Work]:
    """The works of the main job's stages, in their order, up to one of them."""
    made = _lists(context, corpora, judges, rates) | _training(context, corpora, judges, rates)
    return [work for name in STAGES[: to + 1] for work in made[name]]


def _look(context: Context, sample: bool) -> list[Known]:
    return [_corpus(context, dataset, n, sample) for n, dataset in enumerate(context.config.corpora())]


def _finished(context: Context, name: str, number: int) -> dict[str, Any] | None:
    """The manifest of the stage of this name that a run comes to for one corpus; None: not done yet."""
    own = [stage for stage in context.touched.values() if ledger_name(stage) == name and stage.finished()]
    return own[number].manifest() if number < len(own) else None


def _head(dataset: DatasetConfig) -> tuple[str, int, float, list[str]]:
    """Name, passages, the mean bytes of the first ones, and the texts of some."""
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
    return source.name, count, size / max(1, looked), texts


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
    name, count, row_bytes, texts = _head(dataset)
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
        generate = _generated(context, min(config.llm.passages, count), cost)
        training += int(generate.rows)
    training, at_most = min(training, config.queries.max_queries), True
    rows, lists = training + len(test) + len(dev), None
    if done := _finished(context, "queries", number):
        training, rows, at_most = int(done["train"]), int(done["rows"]), False
    if made := _finished(context, "groups", number):
        lists = (int(made["train"]), int(made["dev"]))
    return Known(
        dataset, name, count, row_bytes, texts, asked[:TEXTS], len(test), len(dev), rows, training, at_most,
        lists, generate, cost,
    )  # fmt: skip


def _judged_corpus(context: Context, dataset: DatasetConfig, number: int) -> Known:
    """Of the job that trains a teacher: judged queries alone. training: judged pairs."""
    name, count, row_bytes, texts = _head(dataset)
    judged = _judged(dataset, context.config.reranker.split, context.config.reranker.max_queries)
    done = _finished(context, "queries", number)
    rows = int(done["rows"]) if done else len(judged.texts)
    asked = list(judged.texts.values())[:TEXTS]
    return Known(
        dataset, name, count, row_bytes, texts, asked, 0, 0, rows, judged.qrels.num_rows, not done, None,
        None, None,
    )  # fmt: skip


def _generated(context: Context, passages: int, cost: forecast.Cost | None) -> Work:
    """An LLM's requests: as counted on a sample, or at most, one of each kind a passage."""
    config = context.config.llm
    engines = Workers(config.replicas or context.config.compute.workers, 0.0)
    if config.engine == "vllm" and context.profile.device == "cuda":
        engines = replace(engines, gpus=float(devices(config.vllm)))
    paid = config.engine == "endpoint"
    requests = sum(wanted_of(context).kinds.values()) * passages
    if cost is None:
        return amounts.generate(
            requests, requests, Rate(None), engines, tokens_in=0, tokens_out=requests * config.max_tokens,
            at_most=True, paid=paid,
        )  # fmt: skip
    asked = cost.requests * (1 - cost.kept)
    seconds = None
    if cost.gpu_hours is not None:  # of all engines together
        seconds = cost.gpu_hours * 3600 / devices(config.vllm) / max(1.0, asked)
    return amounts.generate(
        cost.requests, asked, Rate(seconds), engines, tokens_in=cost.tokens_in, tokens_out=cost.tokens_out,
        at_most=False, paid=paid,
    )  # fmt: skip


def _rates(context: Context, judges: Sequence[Judge], corpora: Sequence[Known], *, sample: bool) -> Rates:
    if not sample:
        return found(context, judges)
    texts = [text for corpus in corpora for text in corpus.texts]
    asked = [text for corpus in corpora for text in corpus.asked]
    return sampled(context, judges, texts, asked, train=True)


def _workers(context: Context) -> Workers:
    return Workers(context.config.compute.workers, context.worker_resources()["num_gpus"])


def _student(model: Model) -> amounts.Student:
    """Sizes of a model, out of its folder's files."""
    folder = Path(resolve_model(model.source, "student.model"))
    configs = [Location.of(str(path)).read_json() for path in sorted(folder.rglob("config.json"))]
    texts = [each.get("text_config", each) for each in configs]
    body: Mapping[str, Any] = next((each for each in texts if "hidden_size" in each), {})
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    return amounts.Student(
        int(body.get("hidden_size", 0)), int(body.get("num_hidden_layers", 0)), float(size)
    )


def _read(
    context: Context, known: Known, rates: Rates, note: str = "", student: StudentConfig | None = None
) -> list[Work]:
    """Both sides of encoding. student: of a further retriever."""
    model = context.student if student is None else Model.of(student.model, "retrieve.models")
    of = "" if student is None else f" of {student.model}"
    sizes, workers = _student(model), _workers(context)
    sides = (("passage", known.passages, False), ("query", known.rows, known.at_most))
    return [
        amounts.encode(
            role, texts, sizes, rates.of(f"encode-{role}{of}"), workers, at_most=at_most, note=note
        )
        for role, texts, at_most in sides
    ]


def _retrieved(
    context: Context, known: Known, rates: Rates, retrievers: Sequence[str], note: str = ""
) -> Work:
    depth, rate = context.config.retrieve.depth, Rate(None)
    if rates.flops:
        rate = Rate(
            amounts.search_seconds(
                known.passages, _student(context.student).dimension, retrievers, depth,
                flops=rates.flops, bm25=rates.bm25,
            )
        )  # fmt: skip
    return amounts.retrieve(
        known.rows, known.passages, len(retrievers), depth, rate, _workers(context), at_most=known.at_most,
        note=note,
    )  # fmt: skip


def _scored(
    context: Context, judge: Judge, queries: int, passages: int, pool: int, rates: Rates, *,
    at_most: bool, extra: float, note: str = "",
) -> Work:  # fmt: skip
    """One teacher on the pools of so many queries. extra: bytes that are laid out for it."""
    pairs, workers = queries * pool, _workers(context)
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
            tokens, size = rates.of("encode-query").tokens, _student(judge.model or context.student)
            extra += 2.0 * known.rows * tokens * size.dimension
        work = _scored(
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


def _lists(
    context: Context, corpora: Sequence[Known], judges: Sequence[Judge], rates: Rates, note: str = ""
) -> dict[str, list[Work]]:
    """Everything up to the training lists, by stage."""
    config = context.config
    made: dict[str, list[Work]] = {name: [] for name in STAGES}
    for known in corpora:
        pool = min(config.teacher.depth, known.passages)
        made["corpus"].append(amounts.corpus(known.passages, known.row_bytes))
        made["generate"] += [known.generate] if known.generate else []
        made["queries"].append(amounts.queries(known.rows, at_most=known.at_most))
        made["encode"] += _read(context, known, rates, note)
        for name, student in config.retrieve.models.items():
            made["encode"] += _read(context, known, rates, f" with {name}{note}", student)
        made["retrieve"].append(_retrieved(context, known, rates, config.retrieve.retrievers, note))
        made["score"] += _judgements(context, known, judges, rates, note)
        groups = amounts.groups(known.training, pool, config.groups.list_size, at_most=True)
        made["groups"].append(replace(groups, label=f"groups{note}"))
        if config.queries.negatives:
            made["groups"] += _answered(context, known)
    return made


def _answered(context: Context, known: Known) -> list[Work]:
    """A query for each negative of the lists, at most one a passage; by the LLM where it is named."""
    most = min(known.passages, known.training * (context.config.groups.list_size - 1))
    works = [Work("negatives", "negatives", "queries", most, True, stored=most * amounts.QUERY_BYTES)]
    if context.config.llm.model:
        asked = _generated(context, most, None)
        requests = replace(asked, rows=most, calls=most, label="generate for negatives")
        tokens = most * context.config.llm.max_tokens
        works.insert(0, replace(requests, tokens_out=tokens, stored=most * amounts.KEPT_REPLY_BYTES))
    return works


def _training(
    context: Context, corpora: Sequence[Known], judges: Sequence[Judge], rates: Rates
) -> dict[str, list[Work]]:
    """Training in its rounds, and what follows it, by stage."""
    config, train = context.config, context.config.train
    works: list[Work] = []
    for number in range(train.rounds):
        note = f", round {number + 1}" if number else ""
        if number:  # the student of the last round retrieves, and judges; other teachers have judged much
            again = _lists(context, corpora, judges, rates, note)
            works += [
                replace(work, at_most=True)
                for name in ("encode", "retrieve", "score", "groups")
                for work in again[name]
            ]
        one = _trained(context, corpora, rates, note)
        works.append(one)
        if (between := _between(context, corpora, one)) is not None:
            often = amounts.refreshes(one.rows, between)
            works.append(_refreshed(context, corpora, judges, rates, often))
    after: list[Work] = []
    for known in corpora:
        note, systems = ", adapted", 2 + len(config.evaluate.systems)
        after += [*_read(context, known, rates, note), _retrieved(context, known, rates, ["dense"], note)]
        after.append(amounts.evaluate(known.test, systems, config.retrieve.depth, at_most=True))
        passages, queries = min(layers.PASSAGES, known.passages), min(layers.QUERIES, known.test)
        rate, student = rates.of("encode-passage"), _student(context.student)
        after.append(amounts.drift(queries, passages, student, rate, _workers(context)))
    return {"train": works, "evaluate": after}


def _trained(context: Context, corpora: Sequence[Known], rates: Rates, note: str) -> Work:
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
        length = config.groups.list_size if known.dev else pool  # without judged queries, whole pools
        texts = dev * (1 + length) + known.dev * (1 + pool)
        dev_texts += min(texts, known.passages + known.rows)
    return amounts.train(
        lists, train.batch_queries, train.max_epochs, config.groups.list_size, dev_texts,
        _student(context.student), rates.of("train"), rates.of("dev"), _workers(context), note=note,
    )  # fmt: skip


def _between(context: Context, corpora: Sequence[Known], one: Work) -> int | None:
    per_epoch = max(1, int(one.rows) // context.config.train.max_epochs)
    return refresh.steps_between(context.config.train, per_epoch)


def _refreshed(
    context: Context, corpora: Sequence[Known], judges: Sequence[Judge], rates: Rates, often: int
) -> Work:
    """Encoding, search and judging once more for every refresh, beside training; as one line."""
    again = _lists(context, corpora, judges, rates)
    parts = [work for name in ("encode", "retrieve", "score") for work in again[name]]
    workers = _workers(context)
    known = all(work.seconds is not None for work in parts)
    return Work(
        "refresh", "refresh", "times", often, True, calls=often * sum(work.calls for work in parts),
        tokens_in=often * sum(work.tokens_in for work in parts),
        seconds=often * sum(work.seconds or 0.0 for work in parts) if known else None,
        workers=workers.number, gpus=workers.gpus, stored=often * sum(work.stored for work in parts),
    )  # fmt: skip


def _kept(works: Sequence[Work]) -> list[Work]:
    """What scores by models and replies take once more, by content."""
    judged = [w for w in works if w.stage.startswith("score-") and w.calls]
    pairs = sum(work.rows for work in judged)
    replies = sum(work.calls for work in works if work.stage == "generate")
    return [amounts.kept(pairs, replies)] if pairs or replies else []
