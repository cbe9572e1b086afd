"""What the values of a config may be. Everything is checked before any work."""

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from operator import attrgetter
from typing import Any
from urllib.parse import urlsplit

from retrieval_ray.config import EMBEDDED, MODELS, Config, MoeConfig, TeacherConfig
from retrieval_ray.datasets import split_spec
from retrieval_ray.errors import UserError
from retrieval_ray.generator import EXTRACTIVE_KINDS
from retrieval_ray.negatives import NEGATIVES
from retrieval_ray.prompts import KINDS
from retrieval_ray.sampling import WAYS

ENGINES = ("vllm", "endpoint")
SOURCES = ("log", "extractive", "llm")
RETRIEVERS = ("dense", "bm25")
INDEXES = ("exact", "ivf", "ivfpq")
MARGIN_SCORES = ("dense", "teacher")
MEMBERS = (*EMBEDDED, *MODELS)
TEACHERS = ("embedded", "ensemble", "late", *MODELS)
TEACHER_ENGINES = ("transformers", "vllm")
PRECISIONS = ("float32", "bfloat16", "float16")
ROUTERS = ("released", "softmax", "expert_choice")
WHERE = ("intermediate", "output")
TRAINED = ("all", "experts")
MERGE_WEIGHTS = ("load", "uniform")
SEARCHES = ("grid", "random", "optuna")
TESTED = ("winner", "all")

_TINY, _MANY = 1e-9, math.inf
RANGES: dict[str, dict[str, tuple[float, float]]] = {  # of numbers; null stays allowed where it is
    "queries": {
        "max_queries": (1, _MANY), "max_words": (1, _MANY), "extractive_per_passage": (1, 3),
        "extractive_max": (0, _MANY),
    },
    "llm": {
        "passages": (1, _MANY), "exemplar_sets": (1, _MANY), "temperature": (0, 2), "top_p": (_TINY, 1),
        "max_tokens": (1, _MANY), "max_copied": (0, 1), "max_failed": (0, 1), "replicas": (1, _MANY),
        "concurrency": (1, _MANY), "timeout_seconds": (_TINY, _MANY), "retries": (0, _MANY),
        "tokens_per_second": (_TINY, _MANY),
    },
    "student": {"max_query_tokens": (1, _MANY), "max_passage_tokens": (1, _MANY)},
    "student.lora": {"r": (1, _MANY), "alpha": (_TINY, _MANY)},
    "retrieve": {
        "rrf_k": (0, _MANY), "nlist": (1, _MANY), "nprobe": (1, _MANY), "pq_bytes": (1, _MANY),
        "min_recall": (0, 1),
    },
    "teacher": {"max_tokens": (1, _MANY)},
    "reranker": {
        "max_queries": (1, _MANY), "negatives": (1, _MANY), "skip": (0, _MANY), "pool": (1, _MANY),
        "dev_queries": (0, _MANY), "epochs": (1, _MANY), "batch_lists": (1, _MANY),
        "learning_rate": (_TINY, 1), "warmup_share": (0, 0.99), "max_tokens": (8, _MANY),
        "checkpoint_minutes": (0, _MANY),
    },
    "groups": {
        "source_rank": (1, _MANY), "lower_percentile": (0, 100), "upper_percentile": (0, 100),
        "min_positive_percentile": (0, 100), "false_negative_ratio": (0, _MANY),
        "relative_margin": (0, 1), "absolute_margin": (0, _MANY),
    },
    "train": {
        "batch_queries": (1, _MANY), "dev_queries": (1, _MANY), "share": (_TINY, 1),
        "max_epochs": (0, _MANY), "patience": (1, _MANY),
        "learning_rate": (_TINY, 1), "weight_decay": (0, _MANY), "clip_norm": (_TINY, _MANY),
        "min_warmup_steps": (0, _MANY), "lr_floor": (0, 1), "teacher_temperature": (_TINY, _MANY),
        "student_temperature": (_TINY, _MANY), "infonce_temperature": (_TINY, _MANY),
        "chunk_tokens": (1, _MANY), "activation_gib": (0, _MANY),
        "passage_tokens": (1, _MANY), "list_sample": (2, _MANY), "checkpoint_minutes": (0, _MANY),
        "refresh_steps": (1, _MANY), "refresh_epochs": (_TINY, _MANY), "rounds": (1, _MANY),
    },
    "train.terms": {
        "kl": (0, _MANY), "infonce": (0, _MANY), "infonce_list": (0, _MANY), "margin_mse": (0, _MANY),
        "ranking": (0, _MANY), "clp": (0, _MANY),
    },
    "train.moe": {
        "experts": (0, 8), "top_k": (1, 2), "jitter": (0, 1), "balance_weight": (0, _MANY),
    },
    "merge": {"load_texts": (1, _MANY)},
    "sweep": {
        "samples": (1, _MANY), "seeds": (1, _MANY), "trials_at_once": (1, _MANY),
        "asha_epochs": (1, _MANY), "asha_factor": (1.1, _MANY),
    },
    "prices": {
        "worker_hour": (0, _MANY), "tokens_in_million": (0, _MANY), "tokens_out_million": (0, _MANY),
        "gib_month": (0, _MANY),
    },
    "compute": {
        "workers": (1, _MANY), "min_workers": (1, _MANY), "cpus_per_worker": (1, _MANY),
        "gpus_per_worker": (0, _MANY), "threads": (1, _MANY), "token_budget": (1, _MANY),
    },
}  # fmt: skip


def check(config: Config) -> None:
    """Raises ``UserError``, which names the key, for a value that cannot be."""

    def need(condition: bool, message: str) -> None:
        if not condition:
            raise UserError(message)

    for key, chosen, known in (
        ("queries.sources", config.queries.sources or [], SOURCES),
        ("llm.engine", [config.llm.engine], ENGINES),
        ("llm.kinds", list(config.llm.kinds), KINDS),
        ("llm.sample", [config.llm.sample], WAYS),
        ("retrieve.retrievers", config.retrieve.retrievers, (*RETRIEVERS, *config.retrieve.models)),
        ("retrieve.index", [config.retrieve.index], INDEXES),
        ("teacher.kind", [config.teacher.kind], TEACHERS),
        ("groups.negatives", [config.groups.negatives], tuple(NEGATIVES)),
        ("groups.margin_scores", [config.groups.margin_scores], MARGIN_SCORES),
        ("train.moe.router", [config.train.moe.router], ROUTERS),
        ("train.moe.where", [config.train.moe.where], WHERE),
        ("train.moe.train", [config.train.moe.train], TRAINED),
        ("merge.weights", [config.merge.weights], MERGE_WEIGHTS),
        ("evaluate.systems", config.evaluate.systems, ("bm25", "teacher")),
        ("groups.kinds", config.groups.kinds or [], ("log", *EXTRACTIVE_KINDS, *KINDS)),
        ("sweep.search", [config.sweep.search], SEARCHES),
        ("sweep.test", [config.sweep.test], TESTED),
        ("compute.precision", [config.compute.precision or "float32"], PRECISIONS),
    ):
        for value in chosen:
            need(value in known, f"{key}: '{value}' is not one of {', '.join(known)}")
    need("dense" in config.retrieve.retrievers, "retrieve.retrievers: 'dense' must be among them")
    for name in config.retrieve.models:
        need(
            name.isidentifier() and name not in (*RETRIEVERS, "fused", "exact"),
            f"retrieve.models: '{name}' cannot be a retriever's name; letters, digits and _ can, and none of "
            "dense, bm25, fused, exact",
        )
        need(
            name in config.retrieve.retrievers,
            f"retrieve.models: '{name}' is not used; add it to retrieve.retrievers",
        )
    need(
        len(set(config.retrieve.retrievers)) == len(config.retrieve.retrievers),
        "retrieve.retrievers: each only once",
    )
    _check_teacher(config.teacher)
    need(
        config.reranker.skip < config.reranker.pool <= config.retrieve.depth,
        "reranker.pool: must be more than reranker.skip and at most retrieve.depth",
    )
    need(config.groups.kinds != [], "groups.kinds: name at least one kind, or null")
    need(config.groups.list_size >= 2, "groups.list_size: a list needs a positive and a negative")
    need(
        config.teacher.depth >= config.encoded_of_a_list(),
        "teacher.depth: must be at least groups.list_size, or train.list_sample where that is lower, or no "
        "list can be filled",
    )
    need(
        config.retrieve.depth >= max(100, config.teacher.depth),
        "retrieve.depth: must be at least 100 (recall@100 looks so far) and at least teacher.depth",
    )
    need(
        config.evaluate.systems.count("bm25") == 0 or "bm25" in config.retrieve.retrievers,
        "evaluate.systems: bm25 needs 'bm25' in retrieve.retrievers",
    )
    terms = config.train.terms
    need(any(vars(terms).values()), "train.terms: one weight must be more than 0")
    need(
        terms.clp == 0 or config.queries.negatives,
        "train.terms.clp: needs a query for every negative; set queries.negatives=true",
    )
    for key in ("alpha", "targets"):
        need(
            config.student.lora.r is not None or getattr(config.student.lora, key) is None,
            f"student.lora.{key}: has no effect without student.lora.r",
        )
    need(config.student.lora.targets != [], "student.lora.targets: name at least one layer, or null")
    need(
        config.train.refresh_steps is None or config.train.refresh_epochs is None,
        "train.refresh_steps: not together with train.refresh_epochs",
    )
    need(0 < config.train.dev_share < 1, "train.dev_share: must lie between 0 and 1")
    for section, ranges in RANGES.items():
        for key, (low, high) in ranges.items():
            value = getattr(attrgetter(section)(config), key)
            need(value is None or low <= value <= high, f"{section}.{key}: must lie in [{low}, {high}]")
    _check_moe(config.train.moe, need)
    need(
        config.train.moe.experts == 0 or config.student.lora.r is None,
        "train.moe.experts: not together with student.lora",
    )
    need(
        config.compute.fewest_workers() <= config.compute.workers,
        "compute.min_workers: must not be more than compute.workers",
    )
    gpus = config.compute.gpus_per_worker or 0
    need(
        gpus <= 1 or gpus == int(gpus),
        f"compute.gpus_per_worker: {gpus} is neither a whole number nor a share of one GPU",
    )
    need(
        config.compute.logical_cpus >= 8,
        "compute.logical_cpus: must be at least 8: on fewer, streaming stages starve each other. They are "
        "places for tasks, not cores; 8 are right on a machine with fewer cores too",
    )
    need(
        config.groups.lower_percentile < config.groups.upper_percentile,
        "groups.lower_percentile: must be lower than groups.upper_percentile",
    )
    sources = config.queries.sources
    need(
        sources is None or (sources != [] and len(set(sources)) == len(sources)),
        "queries.sources: name at least one, each once, or null",
    )
    if "llm" in (sources or []):
        need(bool(config.llm.model), "llm.model: queries.sources names 'llm', so a model must be named")
    if "llm" in (sources or []) or (config.queries.negatives and config.llm.model):
        need(
            config.llm.engine != "endpoint" or bool(config.llm.url),
            "llm.url: an endpoint needs its address, like http://localhost:8000/v1",
        )
        need("messages" not in config.llm.body, "llm.body: the messages are made from the prompts")
    need(
        min(config.llm.kinds.values(), default=1) >= 0 and sum(config.llm.kinds.values() or [1]) > 0,
        "llm.kinds: numbers of queries per passage must not be negative, and one must be more than 0",
    )
    need(
        config.sweep.search != "optuna" or config.sweep.seeds == 1,
        "sweep.seeds: Optuna learns from single trials, so 1; repeat its best with a grid of its own",
    )
    epochs = config.sweep.asha_epochs
    need(
        epochs is None or (epochs <= config.train.max_epochs and config.train.rounds == 1),
        "sweep.asha_epochs: at most train.max_epochs, and only with train.rounds=1: ASHA counts epochs",
    )
    need(config.train.seed is None or config.train.seed >= 0, "train.seed: must not be negative")
    need(config.seed >= 0, "seed: must not be negative")
    for key in ("mlflow", "wandb"):  # and so their packages are named
        need(
            getattr(config.tracking, key) is None or importlib.util.find_spec(key) is not None,
            f"tracking.{key}: needs the package {key}: pip install -c constraints.txt -e '.[tracking]'",
        )
    for key, text in _texts(vars(config)):
        need(
            not _names_someone(text),
            f"{key}: no password or token here, it would stand in manifests; put it into the environment: "
            f"{config.llm.key_variable} for an endpoint (llm.key_variable), MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        )
    for number, corpus in enumerate(config.corpora()):
        where = f"datasets[{number}]" if config.datasets else "dataset"
        need(
            corpus.max_queries is None or corpus.max_queries >= 1, f"{where}.max_queries: must be at least 1"
        )
        for key in ("split", "dev_split", "log_split"):
            try:
                split_spec(getattr(corpus, key) or "")
            except UserError as error:
                raise UserError(f"{where}.{key}: {error}") from error
    need(
        config.student.lora.r is None or importlib.util.find_spec("peft") is not None,
        "student.lora: needs the package peft: pip install -c constraints.txt -e '.[lora]'",
    )


def _check_teacher(teacher: TeacherConfig) -> None:
    def need(condition: bool, message: str) -> None:
        if not condition:
            raise UserError(message)

    need(
        bool(teacher.members) == (teacher.kind == "ensemble"),
        "teacher.members: an ensemble needs them"
        if teacher.kind == "ensemble"
        else "teacher.members: they are read of teacher.kind=ensemble alone",
    )
    need(
        not teacher.model or teacher.kind not in ("embedded", "ensemble"),
        f"teacher.model: not read of teacher.kind={teacher.kind}; name a kind of model, like cross_encoder",
    )
    named = teacher.named()
    for number, member in enumerate(named.values()):
        where = f"teacher.members[{number}]" if teacher.kind == "ensemble" else "teacher"
        need(
            member.kind in MEMBERS,
            f"{where}.kind: '{member.kind}' is not one of {', '.join(MEMBERS)}",
        )
        need(
            member.kind not in MODELS or bool(member.model),
            f"{where}.model: a {member.kind} teacher needs a model (folder or hub id)",
        )
        need(member.max_tokens >= 1, f"{where}.max_tokens: must be at least 1")
        need(
            member.engine in TEACHER_ENGINES,
            f"{where}.engine: '{member.engine}' is not one of {', '.join(TEACHER_ENGINES)}",
        )
        need(
            member.engine == "transformers" or member.kind == "yes_no",
            f"{where}.engine: only a yes_no teacher runs on vllm",
        )
        need(
            member.tokens is None or len(member.tokens) in (1, 2),
            f"{where}.tokens: one token, whose logit is the score, or two, whose logits are subtracted",
        )
        need(
            member.template is None
            or all(member.template.count(f"{{{key}}}") == 1 for key in ("query", "passage")),
            f"{where}.template: must hold {{query}} and {{passage}}, each once",
        )
        need(
            member.kind != "listwise" or bool(member.url),
            f"{where}.url: a listwise teacher needs an endpoint's address, like http://localhost:8000/v1",
        )
        need(
            1 <= member.stride < member.window,
            f"{where}.stride: must be at least 1 and less than window, or windows do not meet",
        )
    for name in teacher.weights or {}:
        need(name in named, f"teacher.weights: '{name}' is not one of {', '.join(named)}")
    weights = teacher.weights
    need(
        weights is None or (min(weights.values(), default=0) >= 0 and sum(weights.values()) > 0),
        "teacher.weights: must not be negative, and one must be more than 0",
    )


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text of a config, with its key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from _texts(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _texts(part, f"{key}[{number}]")
    elif is_dataclass(value):
        yield from _texts(vars(value), key)


def _names_someone(text: str) -> bool:
    """Whether it is an address with a password, or, where a user may be a token, with a user."""
    try:
        address = urlsplit(text)
        token = address.username and address.scheme in ("http", "https", "s3", "gs")
        return bool(address.password or token)
    except ValueError:  # no address
        return False


def _check_moe(moe: MoeConfig, need: Callable[[bool, str], None]) -> None:
    need(
        moe.experts == 0 or moe.top_k <= moe.experts,
        "train.moe.top_k: must not be more than train.moe.experts",
    )
    layers = moe.layers
    need(
        layers is None or (layers != [] and len(set(layers)) == len(layers) and min(layers) >= 0),
        "train.moe.layers: name at least one layer, each once, counted from 0, or null",
    )
    need(
        moe.balance_weight == 0 or moe.router == "softmax",
        "train.moe.balance_weight: only the router 'softmax' learns to share; expert_choice shares by "
        "itself, and 'released' is kept as it was published",
    )
