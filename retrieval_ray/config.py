"""Every option of a job, its default, and the reading of ``FILE.yaml key=value ...``.

Defaults stand only here; YAML files hold differences. Unknown keys are errors.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from retrieval_ray.errors import UserError
from retrieval_ray.prompts import KINDS
from retrieval_ray.sampling import WAYS

ENGINES = ("vllm", "endpoint")
SOURCES = ("log", "extractive", "llm")
RETRIEVERS = ("dense", "bm25")
TEACHERS = ("embedded", "cross_encoder")
NEGATIVES = ("top", "spread")
ROUTERS = ("released", "softmax", "expert_choice")
WHERE = ("intermediate", "output")
TRAINED = ("all", "experts")
MERGE_WEIGHTS = ("load", "uniform")


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
    "retrieve": {"rrf_k": (0, _MANY)},
    "teacher": {"max_tokens": (1, _MANY)},
    "groups": {
        "source_rank": (1, _MANY), "lower_percentile": (0, 100), "upper_percentile": (0, 100),
        "min_positive_percentile": (0, 100), "false_negative_ratio": (0, _MANY),
    },
    "train": {
        "batch_queries": (1, _MANY), "dev_queries": (1, _MANY),
        "max_epochs": (0, _MANY), "patience": (1, _MANY),
        "learning_rate": (_TINY, 1), "weight_decay": (0, _MANY), "clip_norm": (_TINY, _MANY),
        "min_warmup_steps": (0, _MANY), "lr_floor": (0, 1), "teacher_temperature": (_TINY, _MANY),
        "student_temperature": (_TINY, _MANY), "infonce_temperature": (_TINY, _MANY),
        "infonce_weight": (0, _MANY), "chunk_tokens": (1, _MANY),
        "passage_tokens": (1, _MANY), "checkpoint_minutes": (0, _MANY),
    },
    "train.moe": {
        "experts": (0, 8), "top_k": (1, 2), "jitter": (0, 1), "balance_weight": (0, _MANY),
    },
    "merge": {"load_texts": (1, _MANY)},
    "compute": {
        "workers": (1, _MANY), "cpus_per_worker": (1, _MANY), "gpus_per_worker": (0, _MANY),
        "threads": (1, _MANY), "token_budget": (1, _MANY),
    },
}  # fmt: skip


@dataclass
class DatasetConfig:
    path: str = "demo"  # demo | folder | ir_datasets:ID | hf:ID
    split: str = "test"  # judged queries that are reported
    dev_split: str | None = None  # judged queries for choosing: a split, or a share like train:0.2
    log_split: str | None = None  # this corpus's own log, where several corpora are given
    relevance_threshold: int = 1  # judgements from here on are relevant (2 for TREC DL)
    max_queries: int | None = None  # of the test split, the first by hash
    titles: bool = True  # a passage's title stands before its text


@dataclass
class QueriesConfig:
    sources: list[str] | None = None  # of log, extractive, llm; null: log if there is one
    log_split: str | None = None  # its judgements are not read
    log_path: str | None = None  # a queries.jsonl of its own
    max_queries: int = 100_000  # training queries in all
    extractive_per_passage: int = 3  # title, salient span, key terms, in this order
    extractive_max: int = 2_000
    max_words: int = 64
    negatives: bool = False  # a query for each negative of the lists, for the contrastive learning penalty


@dataclass
class LlmConfig:
    """The LLM that writes queries, where ``queries.sources`` names ``llm``."""

    engine: str = "vllm"  # vllm, on this cluster's GPUs; endpoint: any OpenAI-compatible one
    model: str | None = None  # folder or hub id; for an endpoint the name it knows
    kinds: dict[str, int] = field(default_factory=dict)  # queries per passage; {}: one of each of the six
    passages: int = 100_000  # that queries are written for, at most
    sample: str = "uniform"  # uniform | length | title
    language: str | None = None  # of the queries; null: each passage's own
    exemplars: str | None = None  # a JSONL pool of your own; null: ours
    exemplar_sets: int | None = 32  # different draws per kind; null: one for every passage
    temperature: float = 0.8
    top_p: float = 1.0
    max_tokens: int = 64  # of a reply
    structured: bool = False  # replies as JSON, held to a schema
    max_copied: float = 0.7  # drop a query of whose words a larger share stands in the passage in one run
    max_failed: float = 0.02  # share of requests without a reply from which the stage is an error
    chat_template: dict[str, Any] = field(default_factory=dict)  # its arguments, as {enable_thinking: false}
    vllm: dict[str, Any] = field(default_factory=dict)  # engine arguments, as {tensor_parallel_size: 2}
    lora: str | None = None  # folder or hub id of an adapter for vLLM
    replicas: int | None = None  # vLLM engines; null: compute.workers
    url: str | None = None  # of the endpoint: http://host:8000/v1
    key_variable: str = "OPENAI_API_KEY"  # environment variable that holds the endpoint's key
    concurrency: int = 64  # requests in flight per worker
    timeout_seconds: float = 120.0
    retries: int = 6
    tokens_per_second: float | None = None  # of one engine, for the forecast; null: as measured before


@dataclass
class StudentConfig:
    model: str = "all-MiniLM-L6-v2"  # bundled; or a sentence-transformers folder or hub id
    query_prompt: str | None = None  # null: the model's own
    passage_prompt: str | None = None
    max_query_tokens: int | None = None  # null: the model's own
    max_passage_tokens: int | None = None
    trust_remote_code: bool = False


@dataclass
class RetrieveConfig:
    retrievers: list[str] = field(default_factory=lambda: ["dense", "bm25"])
    depth: int = 100  # passages kept per query and retriever
    rrf_k: int = 60


@dataclass
class TeacherConfig:
    kind: str = "embedded"  # embedded | cross_encoder
    model: str | None = None  # the cross-encoder
    weights: dict[str, float] | None = None  # late, bm25, dense; null: chosen on judged dev queries
    depth: int = 50  # passages of the fused run that are judged
    gate: bool = True  # false: train even where the teacher is worse than the student
    max_tokens: int = 512  # of a cross-encoder's pair
    trust_remote_code: bool = False


@dataclass
class GroupsConfig:
    list_size: int = 20  # K: the positive and its negatives
    negatives: str = "top"  # top: first in retrieval; spread: even steps of the teacher's order
    source_rank: int = 20  # a query's source must be retrieved this high by each retriever
    require_first: bool = True  # and the teacher must put it first
    lower_percentile: float = 1.0  # scores are scaled so that these become 0 and 1
    upper_percentile: float = 99.0
    min_positive_percentile: float | None = 25.0  # drop a query whose positive scores lower
    false_negative_ratio: float = 0.6  # the 60 % rule


@dataclass
class MoeConfig:
    """A mixture of experts in the student's feed-forward layers; it starts as the dense model."""

    experts: int = 0  # copies of a linear to start from; 0: none are added, a student's own stay
    top_k: int = 1  # experts a token
    router: str = "softmax"  # softmax: learns; released: as published; expert_choice: experts take tokens
    where: str = "intermediate"  # the feed-forward's first linear; output: its second
    layers: list[int] | None = None  # from 0; null: all
    jitter: float = 0.0  # share by which a router's inputs are shaken in training
    balance_weight: float = 0.0  # of the load-balancing loss
    train: str = "all"  # all | experts: experts and routers alone


@dataclass
class TrainConfig:
    batch_queries: int = 4096
    max_epochs: int = 30
    patience: int = 2
    learning_rate: float = 2e-4
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    min_warmup_steps: int = 10  # warm-up lasts this long, or half an epoch if that is longer
    lr_floor: float = 0.1  # linear decay ends at this share of the peak
    teacher_temperature: float = 0.2
    student_temperature: float | None = None  # null: calibrated on the untouched student
    infonce_temperature: float | None = None  # null: a fifth of the student's, as in the papers
    infonce_weight: float = 0.1
    dev_share: float = 0.1  # of the training queries, held out for dev measures
    dev_queries: int = 500  # and about so many at most
    passage_tokens: int | None = None  # training reads passages only so far; null: the student's own
    chunk_tokens: int = 8192  # of one GradCache chunk, padding included
    checkpoint_minutes: float = 5.0
    moe: MoeConfig = field(default_factory=MoeConfig)


@dataclass
class EvaluateConfig:
    systems: list[str] = field(default_factory=lambda: ["bm25", "teacher"])  # beside base, adapted
    exclude_same_id: bool = True  # BEIR: a passage whose id is the query's is left out


@dataclass
class MergeConfig:
    """Of jobs/merge.py, which makes a student with experts dense."""

    weights: str = "load"  # of the experts in the mean: load, as measured on the corpus; uniform
    load_texts: int = 2_000  # passages that the load is measured on
    evaluate: bool = True  # on the dataset's judged test queries, before and after


@dataclass
class ComputeConfig:
    workers: int = 1
    logical_cpus: int = 8  # of the local cluster that a job starts itself
    cpus_per_worker: int = 1
    gpus_per_worker: float | None = None  # null: 1 where the cluster has GPUs
    precision: str | None = None  # float32 | bfloat16; null: probed
    threads: int | None = None  # per worker; null: the machine's cores shared out
    token_budget: int = 16_384  # of one encoding batch, padding included


@dataclass
class Config:
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    datasets: list[DatasetConfig] = field(default_factory=list)  # several corpora; else `dataset`
    queries: QueriesConfig = field(default_factory=QueriesConfig)
    llm: LlmConfig = field(default_factory=LlmConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    retrieve: RetrieveConfig = field(default_factory=RetrieveConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    groups: GroupsConfig = field(default_factory=GroupsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    seed: int = 0
    output_dir: str = "out/run"
    store: str | None = None  # null: inside output_dir

    def corpora(self) -> list[DatasetConfig]:
        """The corpora of this run, at least one."""
        return self.datasets or [self.dataset]


def load(path: str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file of differences, then ``key=value`` overrides; check keys and values.

    Raises ``UserError`` for a missing file, an unknown key (with the nearest known one), or a value
    that cannot be what it must be.
    """
    if not Path(path).is_file():
        what = "a folder, not a config file" if Path(path).is_dir() else "no such config file"
        raise UserError(f"{what}: {path}")
    try:
        given: Any = OmegaConf.load(path)
        if not isinstance(given, DictConfig):
            raise UserError(f"{path}: needs keys at the top level, like dataset: or seed:, not a list")
        for override in overrides:
            if "=" not in override:
                raise UserError(f"'{override}' is not of the form key=value")
        given = OmegaConf.merge(given, OmegaConf.from_dotlist(list(overrides)))
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {error}") from error
    except UserError:
        raise
    except Exception as error:  # yaml's own errors have no common public base here
        raise UserError(f"{path}: not readable as YAML: {error}") from error
    plain: Any = OmegaConf.to_container(given)
    _reject_unknown(plain, Config, "")
    for f in fields(Config):
        if is_dataclass(f.default_factory) and not isinstance(plain.get(f.name, {}), dict):
            first = fields(f.default_factory)[0].name
            raise UserError(f"{path}: {f.name}: needs keys of its own, like {f.name}.{first}=...")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), given)
        config: Config = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]} (key '{error.full_key}')") from error
    except TypeError as error:  # a list where a mapping must stand, or the other way round
        raise UserError(f"{path}: {error} (one of {', '.join(given)})") from error
    _check_values(config)
    return config


def to_dict(config: object) -> dict[str, Any]:
    """A config as plain values, for manifests and fingerprints."""
    container = OmegaConf.to_container(OmegaConf.structured(config), resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _reject_unknown(given: Any, schema: Any, prefix: str) -> None:
    if not isinstance(given, dict):
        return
    known = {f.name: f for f in fields(schema)}
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
            elsewhere = [k for k in _all_keys(Config, "") if k.rpartition(".")[2] == key]
            everywhere = difflib.get_close_matches(f"{prefix}{key}", _all_keys(Config, ""), n=1)
            hint = next(iter([*elsewhere, *(f"{prefix}{n}" for n in near), *everywhere]), None)
            raise UserError(
                f"unknown config key '{prefix}{key}'"
                + (f"; did you mean '{hint}'?" if hint else f"; known keys: {', '.join(known)}")
            )
        factory = known[key].default_factory
        if is_dataclass(factory):
            _reject_unknown(value, factory, f"{prefix}{key}.")
        elif key == "datasets" and isinstance(value, list):
            for number, entry in enumerate(value):
                _reject_unknown(entry, DatasetConfig, f"datasets[{number}].")


def _all_keys(schema: Any, prefix: str) -> list[str]:
    keys = []
    for f in fields(schema):
        if is_dataclass(f.default_factory):
            keys += _all_keys(f.default_factory, f"{prefix}{f.name}.")
        else:
            keys.append(f"{prefix}{f.name}")
    return keys


def _check_values(config: Config) -> None:
    def need(condition: bool, message: str) -> None:
        if not condition:
            raise UserError(message)

    for key, chosen, known in (
        ("queries.sources", config.queries.sources or [], SOURCES),
        ("llm.engine", [config.llm.engine], ENGINES),
        ("llm.kinds", list(config.llm.kinds), KINDS),
        ("llm.sample", [config.llm.sample], WAYS),
        ("retrieve.retrievers", config.retrieve.retrievers, RETRIEVERS),
        ("teacher.kind", [config.teacher.kind], TEACHERS),
        ("groups.negatives", [config.groups.negatives], NEGATIVES),
        ("train.moe.router", [config.train.moe.router], ROUTERS),
        ("train.moe.where", [config.train.moe.where], WHERE),
        ("train.moe.train", [config.train.moe.train], TRAINED),
        ("merge.weights", [config.merge.weights], MERGE_WEIGHTS),
        ("evaluate.systems", config.evaluate.systems, ("bm25", "teacher")),
        ("compute.precision", [config.compute.precision or "float32"], ("float32", "bfloat16")),
    ):
        for value in chosen:
            need(value in known, f"{key}: '{value}' is not one of {', '.join(known)}")
    need("dense" in config.retrieve.retrievers, "retrieve.retrievers: 'dense' must be among them")
    need(
        config.teacher.kind != "cross_encoder" or bool(config.teacher.model),
        "teacher.model: a cross_encoder teacher needs a model (folder or hub id)",
    )
    need(
        set(config.teacher.weights or {}) <= {"late", "bm25", "dense"},
        "teacher.weights: the embedded teachers are late, bm25 and dense",
    )
    need(config.groups.list_size >= 2, "groups.list_size: a list needs a positive and a negative")
    need(
        config.teacher.depth >= config.groups.list_size,
        "teacher.depth: must be at least groups.list_size, or no list can be filled",
    )
    need(
        config.retrieve.depth >= max(100, config.teacher.depth),
        "retrieve.depth: must be at least 100 (recall@100 looks so far) and at least teacher.depth",
    )
    need(
        config.evaluate.systems.count("bm25") == 0 or "bm25" in config.retrieve.retrievers,
        "evaluate.systems: bm25 needs 'bm25' in retrieve.retrievers",
    )
    need(0 < config.train.dev_share < 1, "train.dev_share: must lie between 0 and 1")
    for section, ranges in RANGES.items():
        for key, (low, high) in ranges.items():
            value = getattr(attrgetter(section)(config), key)
            need(value is None or low <= value <= high, f"{section}.{key}: must lie in [{low}, {high}]")
    _check_moe(config.train.moe, need)
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
        need(
            config.llm.engine != "endpoint" or bool(config.llm.url),
            "llm.url: an endpoint needs its address, like http://localhost:8000/v1",
        )
    need(
        min(config.llm.kinds.values(), default=1) >= 0 and sum(config.llm.kinds.values() or [1]) > 0,
        "llm.kinds: numbers of queries per passage must not be negative, and one must be more than 0",
    )
    need(config.seed >= 0, "seed: must not be negative")
    weights = config.teacher.weights
    need(
        weights is None or (min(weights.values(), default=0) >= 0 and sum(weights.values()) > 0),
        "teacher.weights: must not be negative, and one must be more than 0",
    )
    for number, corpus in enumerate(config.corpora()):
        where = f"datasets[{number}]" if config.datasets else "dataset"
        need(
            corpus.max_queries is None or corpus.max_queries >= 1, f"{where}.max_queries: must be at least 1"
        )
        for key in ("split", "dev_split", "log_split"):
            share = (getattr(corpus, key) or "").partition(":")[2] or "1"
            number_like = share.replace(".", "", 1).isdigit()
            need(
                number_like and 0 < float(share) <= 1,
                f"{where}.{key}: the share after ':' must lie in (0, 1]",
            )


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
