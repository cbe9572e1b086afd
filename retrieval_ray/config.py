"""Every option of a job and its default.

Defaults stand only here; YAML files hold differences (config_file.py), config_values.py says what may be.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf

from retrieval_ray.errors import UserError

EMBEDDED = ("late", "bm25", "dense")  # teachers that need no model but the student
MODELS = ("cross_encoder", "seq2seq", "yes_no", "listwise")  # teachers that need one of their own


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
    url: str | None = None  # of the endpoint of a listwise teacher; the rest, body too, as in llm
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
    kinds: list[str] | None = None  # of queries to train on, as log, title, question; null: all
    list_size: int = 20  # K: the positive and its negatives; with train.list_sample, at most so many
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

    def measured_by_similarity(self) -> bool:
        """Whether margins are measured on the dense retriever's scores."""
        margins = (self.relative_margin, self.absolute_margin)
        return self.margin_scores == "dense" and margins != (None, None)


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
    share: float = 1.0  # of the training lists, the first by hash; held-out ones stay as they are
    dev_share: float = 0.1  # of the training queries, held out for dev measures
    dev_queries: int = 500  # and about so many at most
    list_sample: int | None = None  # of each list, drawn anew each time; the KL takes all that a batch holds
    passage_tokens: int | None = None  # training reads passages only so far; null: the student's own
    chunk_tokens: int | None = None  # of one GradCache chunk, padding included; null: 2,048, on GPUs 8,192
    activation_gib: float | None = None  # that kept graphs may take; null: a share of what is free
    refresh_steps: int | None = None  # negatives are mined anew every so many steps; null: never
    refresh_epochs: float | None = None  # or of every so many epochs
    rounds: int = 1  # at most: the adapted student is the retriever of the next, while dev measures rise
    checkpoint_minutes: float = 5.0
    seed: int | None = None  # of training alone; null: the run's
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
    negatives: int = 4  # for each positive: judged as none, or mined from the fused run
    skip: int = 3  # first ranks of the run that no negative is taken from: unjudged answers hide there
    pool: int = 50  # ranks of the run that negatives come from, and that are reranked to measure
    dev_queries: int = 100  # of each dataset, held out to measure
    epochs: int = 1
    batch_lists: int = 6  # of a relevant passage and its negatives
    learning_rate: float = 2e-4  # for MiniLM; a larger base wants less
    warmup_share: float = 0.1
    max_tokens: int = 160  # of a pair
    checkpoint_minutes: float = 10.0


@dataclass
class MergeConfig:
    """Of jobs/merge.py, which makes a student with experts dense."""

    weights: str = "load"  # of the experts in the mean: load, as measured on the corpus; uniform
    load_texts: int = 2_000  # passages that the load is measured on
    evaluate: bool = True  # on the dataset's judged test queries, before and after


@dataclass
class SweepConfig:
    """Of jobs/sweep.py: what is tried, how, and what is reported."""

    question: str | None = None  # that the sweep's page answers
    space: dict[str, Any] = field(default_factory=dict)  # parameters, see sweeps.py
    search: str = "grid"  # grid | random | optuna
    samples: int = 16  # points of random and optuna
    seeds: int = 1  # every point is trained with the seeds seed, seed + 1, ...; the lists stay the same
    trials_at_once: int = 1
    asha_epochs: int | None = None  # that every trial gets before ASHA may stop it; null: none is stopped
    asha_factor: float = 3.0  # one of so many goes on at each of ASHA's rungs
    reference: dict[str, str] = field(
        default_factory=dict
    )  # the label of a parameter that others are set against
    test: str = "winner"  # whose quality on the test split is measured: winner | all
    collections: dict[str, Any] = field(default_factory=dict)  # {name: keys with dots}: each is swept alone


@dataclass
class PricesConfig:
    """What ``--dry-run`` counts money by, in your currency; null: that is left out."""

    worker_hour: float | None = None  # of one worker, with its GPUs
    tokens_in_million: float | None = None  # of an endpoint
    tokens_out_million: float | None = None
    gib_month: float | None = None  # of storage


@dataclass
class ComputeConfig:
    workers: int = 1
    min_workers: int | None = None  # elastic: with so many work goes on; null: with all of them
    logical_cpus: int = 8  # of the local cluster that a job starts itself
    cpus_per_worker: int = 1
    gpus_per_worker: float | None = None  # null: 1 where the cluster has GPUs; training takes whole ones
    autoscale: bool = False  # the cluster starts machines when asked (KubeRay): what it lacks is waited for
    precision: str | None = None  # float32 | bfloat16 | float16 (training: float32); null: probed
    threads: int | None = None  # per worker; null: the machine's cores shared out
    token_budget: int | None = None  # of one encoding batch, padding included; null: 2,048, on GPUs 16,384

    def fewest_workers(self) -> int:
        """With how many workers a job can begin."""
        return self.min_workers or self.workers


@dataclass
class TrackingConfig:
    """Who is told of a run beside TensorBoard, which always is; it changes no result."""

    mlflow: str | None = None  # tracking URI (http://host:5000, a database), or a folder; null: off
    wandb: str | None = None  # Weights & Biases: PROJECT or ENTITY/PROJECT; null: off


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
    sweep: SweepConfig = field(default_factory=SweepConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    prices: PricesConfig = field(default_factory=PricesConfig)
    pairs: str | None = None  # what jobs/score.py judges: a TREC run, or a table as jsonl or parquet
    seed: int = 0
    output_dir: str = "out/run"
    store: str | None = None  # null: inside output_dir

    def training_seed(self) -> int:
        """Of the order of batches, dropout, routers and LoRA."""
        return self.seed if self.train.seed is None else self.train.seed

    def encoded_of_a_list(self) -> int:
        """Passages of each list that a training step encodes."""
        return min(self.groups.list_size, self.train.list_sample or self.groups.list_size)

    def corpora(self) -> list[DatasetConfig]:
        """The corpora of this run, at least one."""
        return self.datasets or [self.dataset]


def to_dict(config: object) -> dict[str, Any]:
    """A config as plain values, for manifests and fingerprints."""
    container = OmegaConf.to_container(OmegaConf.structured(config), resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}
