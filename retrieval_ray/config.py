"""Every option of a job, its default, and the reading of ``FILE.yaml key=value ...``.

Defaults stand only here; YAML files hold differences. Unknown keys are errors.
"""

import difflib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from retrieval_ray.errors import UserError
from retrieval_ray.negatives import NEGATIVES
from retrieval_ray.prompts import KINDS
from retrieval_ray.sampling import WAYS

ENGINES = ("vllm", "endpoint")
SOURCES = ("log", "extractive", "llm")
RETRIEVERS = ("dense", "bm25")
INDEXES = ("exact", "ivf", "ivfpq")
MARGIN_SCORES = ("dense", "teacher")
EMBEDDED = ("late", "bm25", "dense")  # teachers that need no model but the student
MODELS = ("cross_encoder", "seq2seq", "yes_no", "listwise")  # teachers that need one of their own
MEMBERS = (*EMBEDDED, *MODELS)
TEACHERS = ("embedded", "ensemble", "late", *MODELS)
TEACHER_ENGINES = ("transformers", "vllm")
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
    "student.lora": {"r": (1, _MANY), "alpha": (_TINY, _MANY)},
    "retrieve": {
        "rrf_k": (0, _MANY), "nlist": (1, _MANY), "nprobe": (1, _MANY), "pq_bytes": (1, _MANY),
        "min_recall": (0, 1),
    },
    "teacher": {"max_tokens": (1, _MANY)},
    "reranker": {
        "max_queries": (1, _MANY), "negatives": (1, _MANY), "skip": (0, _MANY), "pool": (1, _MANY),
        "dev_queries": (0, _MANY), "epochs": (1, _MANY), "batch_pairs": (1, _MANY),
        "learning_rate": (_TINY, 1), "warmup_share": (0, 0.99), "max_tokens": (8, _MANY),
        "checkpoint_minutes": (0, _MANY),
    },
    "groups": {
        "source_rank": (1, _MANY), "lower_percentile": (0, 100), "upper_percentile": (0, 100),
        "min_positive_percentile": (0, 100), "false_negative_ratio": (0, _MANY),
        "relative_margin": (0, 1), "absolute_margin": (0, _MANY),
    },
    "train": {
        "batch_queries": (1, _MANY), "dev_queries": (1, _MANY),
        "max_epochs": (0, _MANY), "patience": (1, _MANY),
        "learning_rate": (_TINY, 1), "weight_decay": (0, _MANY), "clip_norm": (_TINY, _MANY),
        "min_warmup_steps": (0, _MANY), "lr_floor": (0, 1), "teacher_temperature": (_TINY, _MANY),
        "student_temperature": (_TINY, _MANY), "infonce_temperature": (_TINY, _MANY),
        "chunk_tokens": (1, _MANY), "activation_gib": (0, _MANY),
        "passage_tokens": (1, _MANY), "checkpoint_minutes": (0, _MANY),
    },
    "train.terms": {
        "kl": (0, _MANY), "infonce": (0, _MANY), "infonce_list": (0, _MANY), "margin_mse": (0, _MANY),
        "ranking": (0, _MANY), "clp": (0, _MANY),
    },
    "train.moe": {
        "experts": (0, 8), "top_k": (1, 2), "jitter": (0, 1), "balance_weight": (0, _MANY),
    },
    "merge": {"load_texts": (1, _MANY)},
    "compute": {
        "workers": (1, _MANY), "min_workers": (1, _MANY), "cpus_per_worker": (1, _MANY),
        "gpus_per_worker": (0, _MANY), "threads": (1, _MANY), "token_budget": (1, _MANY),
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
    negatives: bool = False  # a query for each negative of the lists, for CLP; by llm.model where it is named


@dataclass
class LlmConfig:
    """The LLM that writes queries, where ``queries.sources`` names ``llm``; and those of negatives."""

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
    url: str | None = None  # of the endpoint: http://host:8000/v1 (who serves a model is not what it is)
    body: dict[str, Any] = field(default_factory=dict)  # fields of its requests; null leaves one of ours out
    key_variable: str = "OPENAI_API_KEY"  # environment variable that holds the endpoint's key
    concurrency: int = 64  # requests in flight per worker
    timeout_seconds: float = 120.0
    retries: int = 6
    tokens_per_second: float | None = None  # one engine, in and out together; null: as measured before


@dataclass
class LoraConfig:
    """Small additions to the student's layers, trained in place of its weights and merged at the end."""

    r: int | None = None  # their rank; null: no LoRA
    alpha: float | None = None  # they are scaled by alpha / r; null: twice r
    targets: list[str] | None = None  # layers by the end of their names, as q_proj; null: every linear one


@dataclass
class StudentConfig:
    model: str = "all-MiniLM-L6-v2"  # bundled; or a sentence-transformers folder or hub id
    query_prompt: str | None = None  # null: the model's own
    passage_prompt: str | None = None
    max_query_tokens: int | None = None  # null: the model's own
    max_passage_tokens: int | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)
    trust_remote_code: bool = False


@dataclass
class RetrieveConfig:
    retrievers: list[str] = field(default_factory=lambda: ["dense", "bm25"])  # and names of `models`
    models: dict[str, StudentConfig] = field(default_factory=dict)  # further dense ones: {gte: FOLDER or id}
    depth: int = 100  # passages kept per query and retriever
    rrf_k: int = 60
    index: str = "exact"  # exact | ivf | ivfpq: approximate, for very large corpora
    nlist: int | None = None  # clusters; null: about 4 times the root of the passages
    nprobe: int | None = None  # clusters searched; null: a sixteenth, at least 8
    pq_bytes: int | None = None  # per passage, of ivfpq; null: a byte for four dimensions
    min_recall: float = 0.95  # of an index against exact search on a sample of queries: under it, a warning


@dataclass
class MemberConfig:
    """One teacher; ``teacher.members`` lists several."""

    kind: str = "cross_encoder"  # late | bm25 | dense | cross_encoder | seq2seq | yes_no | listwise
    name: str | None = None  # what teacher.weights calls it; null: its kind, numbered where it is there twice
    model: str | None = None  # folder or hub id; for late null: the student; for listwise an endpoint's name
    max_tokens: int = 512  # of a pair, template included; of a listwise teacher's reply
    template: str | None = (
        None  # of seq2seq and yes_no, with {query}, {passage}, {instruction}; null: its own
    )
    instruction: str | None = None  # what stands for {instruction}; null: the kind's own
    tokens: list[str] | None = None  # one: its logit; two: their difference; null: the kind's own
    engine: str = "transformers"  # of yes_no: transformers | vllm
    vllm: dict[str, Any] = field(default_factory=dict)  # its engine arguments
    url: str | None = None  # of the endpoint of a listwise teacher; the rest of it as in llm
    window: int = 20  # passages that a listwise teacher orders at a time
    stride: int = 10  # by which its window moves, from the back to the front
    trust_remote_code: bool = False


@dataclass
class TeacherConfig(MemberConfig):
    """The teacher: a kind of ``MemberConfig``, or ``embedded`` (late, bm25, dense), or ``ensemble``."""

    kind: str = "embedded"  # embedded | ensemble | late | cross_encoder | seq2seq | yes_no | listwise
    members: list[MemberConfig] = field(default_factory=list)  # of an ensemble
    weights: dict[str, float] | None = None  # by name; null: chosen on judged dev queries
    depth: int = 50  # passages of the fused run that are judged
    gate: bool = True  # false: train even where the teacher is worse than the student

    def named(self) -> dict[str, MemberConfig]:
        """Every single teacher by its name, in the order given."""
        if self.kind == "embedded":
            return {kind: MemberConfig(kind=kind) for kind in EMBEDDED}
        members = self.members if self.kind == "ensemble" else [self]
        found: dict[str, MemberConfig] = {}
        for member in members:
            name, count = member.name or member.kind, 2
            while name in found and not member.name:
                name, count = f"{member.kind}-{count}", count + 1
            if name in found:
                raise UserError(f"teacher.members: two of them are named '{name}'")
            found[name] = member
        return found


@dataclass
class GroupsConfig:
    list_size: int = 20  # K: the positive and its negatives
    negatives: str = "top"  # of retrieval; spread | stratified: even steps of the teacher's order | score
    relative_margin: float | None = None  # a negative scores at most positive x (1 - this); NV-Retriever: .05
    absolute_margin: float | None = None  # a negative scores at most positive - this; NV-Retriever: .05
    margin_scores: str = "dense"  # whose: dense (similarity, as in NV-Retriever) | teacher (normalised)
    source_rank: int = 20  # a query's source must be retrieved this high by each retriever
    require_first: bool = True  # and the teacher must put it first
    lower_percentile: float = 1.0  # scores are scaled so that these become 0 and 1
    upper_percentile: float = 99.0
    min_positive_percentile: float | None = 25.0  # drop a query whose positive scores lower
    false_negative_ratio: float = 0.6  # the 60 % rule


@dataclass
class TermsConfig:
    """Weights of the loss's terms; 0 leaves a term out."""

    kl: float = 1.0  # of the teacher's distribution over a list and the student's
    infonce: float = 0.1  # the positive against every passage of the batch, across workers
    infonce_list: float = 0.0  # the positive against its own list
    margin_mse: float = 0.0  # of the positive's lead over each negative
    ranking: float = 0.0  # RankNet on the teacher's order alone
    clp: float = 0.0  # each negative near the query it does answer; needs queries.negatives


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
    terms: TermsConfig = field(default_factory=TermsConfig)
    dropout: bool = False  # the student's own, while training
    shard: bool = False  # FSDP2: the student's weights spread over the workers, where it fits on none
    dev_share: float = 0.1  # of the training queries, held out for dev measures
    dev_queries: int = 500  # and about so many at most
    passage_tokens: int | None = None  # training reads passages only so far; null: the student's own
    chunk_tokens: int | None = None  # of one GradCache chunk, padding included; null: 2,048, on GPUs 8,192
    activation_gib: float | None = None  # that kept graphs may take; null: a share of what is free
    checkpoint_minutes: float = 5.0
    moe: MoeConfig = field(default_factory=MoeConfig)


@dataclass
class EvaluateConfig:
    systems: list[str] = field(default_factory=lambda: ["bm25", "teacher"])  # beside base, adapted
    exclude_same_id: bool = True  # BEIR: a passage whose id is the query's is left out


@dataclass
class RerankerConfig:
    """A cross-encoder trained by ``jobs/teacher.py`` on the judged pairs of ``datasets``."""

    base: str = "all-MiniLM-L6-v2"  # where it starts: an encoder's folder or hub id
    split: str = "train"  # of each dataset: judged queries to learn from; those of its ``split`` are left out
    max_queries: int | None = None  # of each dataset, the first by hash
    negatives: int = 4  # mined for each positive, from the fused run
    skip: int = 3  # first ranks of the run that no negative is taken from: unjudged answers hide there
    pool: int = 50  # ranks of the run that negatives come from, and that are reranked to measure
    dev_queries: int = 100  # of each dataset, held out to measure
    epochs: int = 1
    batch_pairs: int = 32
    learning_rate: float = 3e-5
    warmup_share: float = 0.1
    max_tokens: int = 256  # of a pair
    checkpoint_minutes: float = 10.0


@dataclass
class MergeConfig:
    """Of jobs/merge.py, which makes a student with experts dense."""

    weights: str = "load"  # of the experts in the mean: load, as measured on the corpus; uniform
    load_texts: int = 2_000  # passages that the load is measured on
    evaluate: bool = True  # on the dataset's judged test queries, before and after


@dataclass
class ComputeConfig:
    workers: int = 1
    min_workers: int | None = None  # elastic: with so many work goes on; null: with all of them
    logical_cpus: int = 8  # of the local cluster that a job starts itself
    cpus_per_worker: int = 1
    gpus_per_worker: float | None = None  # null: 1 where the cluster has GPUs
    precision: str | None = None  # float32 | bfloat16; null: probed
    threads: int | None = None  # per worker; null: the machine's cores shared out
    token_budget: int | None = None  # of one encoding batch, padding included; null: 4,096, on GPUs 16,384

    def fewest_workers(self) -> int:
        """With how many workers a job can begin."""
        return self.min_workers or self.workers


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
    reranker: RerankerConfig = field(default_factory=RerankerConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    pairs: str | None = None  # what jobs/score.py judges: a TREC run, or a table as jsonl or parquet
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
    given = OmegaConf.create(_with_models(plain))
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


_LISTED = {"datasets": DatasetConfig, "members": MemberConfig}


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
        elif prefix + key == "retrieve.models" and isinstance(value, dict):
            for name, entry in value.items():
                _reject_unknown(entry, StudentConfig, f"retrieve.models.{name}.")
        elif key in _LISTED and isinstance(value, list):
            for number, entry in enumerate(value):
                _reject_unknown(entry, _LISTED[key], f"{prefix}{key}[{number}].")


def _with_models(plain: Any) -> Any:
    """``retrieve.models: {gte: ID}`` written out as ``{gte: {model: ID}}``."""
    retrieve = plain.get("retrieve")
    models = retrieve.get("models") if isinstance(retrieve, dict) else None
    if not isinstance(models, dict):
        return plain
    whole = {name: {"model": entry} if isinstance(entry, str) else entry for name, entry in models.items()}
    return {**plain, "retrieve": {**retrieve, "models": whole}}


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
        ("compute.precision", [config.compute.precision or "float32"], ("float32", "bfloat16")),
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
        need(
            not urlsplit(config.llm.url or "").password,
            "llm.url: no password here, it would stand in manifests; put a key into the environment variable "
            f"{config.llm.key_variable} (llm.key_variable)",
        )
        need("messages" not in config.llm.body, "llm.body: the messages are made from the prompts")
    need(
        min(config.llm.kinds.values(), default=1) >= 0 and sum(config.llm.kinds.values() or [1]) > 0,
        "llm.kinds: numbers of queries per passage must not be negative, and one must be more than 0",
    )
    need(config.seed >= 0, "seed: must not be negative")
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
