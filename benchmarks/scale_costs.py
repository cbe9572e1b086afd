"""What each stage costs on P passages, by the code's own formulas. Pure; scale.py makes the page of it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from retrieval_ray.artifacts import AT_ONCE, bucket_count
from retrieval_ray.stages import index

GIB, MIB = 2.0**30, 2.0**20


@dataclass(frozen=True)
class Case:
    """What is adapted, and how; the numbers of configs/cadet.yaml where it has some."""

    text_bytes: int = 600  # of a passage
    tokens: int = 150  # of a passage
    query_tokens: int = 12
    id_bytes: int = 10
    student: float = 85e6  # weights that a token goes through: bge-base, 12 layers of 768
    layers: int = 12
    dimension: int = 768
    teacher: float = 303e6  # bge-reranker-v2-m3, 24 layers of 1,024
    llm: float = 8.03e9  # Llama 3.1 8B
    written_for: int = 500_000  # passages; six queries each
    reply_tokens: int = 20
    queries: int = 2_000_000  # that are left for training
    depth: int = 100  # retrieve.depth
    pool: int = 20  # teacher.depth
    lists: int = 1_000_000  # that the teacher agrees with
    list_size: int = 20
    epochs: int = 3
    reported: int = 10_000  # judged queries, which the adapted student is asked again


@dataclass(frozen=True)
class Hardware:
    """What it runs on: the pools of cluster.yaml, filled."""

    l4: int = 16
    l4_bfloat16: float = 121e12  # FLOP/s
    l4_float32: float = 30.3e12
    l4_memory: float = 300e9  # bytes/s
    a100: int = 16
    a100_bfloat16: float = 312e12
    share: float = 0.4  # of these peaks that is reached
    decoded: int = 128  # replies that an engine writes at a time
    network: float = 0.5e9  # bytes/s of one node to the store, sustained
    answer: float = 0.1  # seconds until the store answers a request
    cache: float = 16 * GIB  # of a node's memory, for files that were read
    disk: float = 450e9  # of one node of the pool for generation: what its NVMe holds
    disk_read: float = 1e9  # bytes/s
    driver_memory: float = 64 * GIB


@dataclass(frozen=True)
class Cost:
    """Of one stage. hours: wall, on all the hardware; the rest in hours, bytes."""

    stage: str
    hours: float
    gpu_hours: float = 0.0
    gpu: str = "L4"
    driver_hours: float = 0.0  # of ``hours``: one process, which no further node helps
    waiting_hours: float = 0.0  # of ``hours``: for the store's answers, file by file
    stored: float = 0.0
    passing: float = 0.0  # stored for the time of the stage
    moved: float = 0.0  # from and to the store, all nodes together
    node_disk: float = 0.0  # copies on each node
    driver_memory: float = 0.0


def of_all(passages: int, case: Case, hardware: Hardware, rates: Mapping[str, float]) -> list[Cost]:
    """Every stage in the order of the pipeline; rates: see ``scale_measured``."""
    made: list[Callable[[int, Case, Hardware, Mapping[str, float]], Cost]] = [
        ingest, generate, encode, retrieve, score, groups, train, evaluate
    ]  # fmt: skip
    return [stage(passages, case, hardware, rates) for stage in made]


def parts(passages: int) -> int:
    """Files of the corpus, of its vectors, and of each teacher's scores."""
    return bucket_count(passages)


def vector_bytes(case: Case) -> float:
    """Of one passage: float16, its id, and where that ends."""
    return 2.0 * case.dimension + case.id_bytes + 4


def shards_of(passages: int, blocks: int) -> int:
    """How many shards that many blocks of queries search."""
    size = max(index._SHARD_PARTS, -(-parts(passages) // index._MOST_SHARDS))
    cut = [range(at, min(at + size, parts(passages))) for at in range(0, parts(passages), size)]
    return len(index.joined(cut, passages, blocks))


def ingest(passages: int, case: Case, hardware: Hardware, rates: Mapping[str, float]) -> Cost:
    """Read twice, sorted on disk, near-duplicates found; all in the driver."""
    driver = passages * rates["ingest_us"] / 1e6
    stored = passages * rates["corpus_bytes"]
    waiting = 3 * parts(passages) * hardware.answer / AT_ONCE  # written, read for duplicates, hashed
    moved = 2 * passages * case.text_bytes + 3 * stored
    return Cost(
        "ingest", _hours(driver + waiting + moved / hardware.network), driver_hours=_hours(driver),
        waiting_hours=_hours(waiting), stored=stored, passing=3.0 * passages * case.text_bytes, moved=moved,
        driver_memory=17.0 * passages + 200 * MIB,
    )  # fmt: skip


def generate(passages: int, case: Case, hardware: Hardware, rates: Mapping[str, float]) -> Cost:
    """Prompts read at the speed of products, replies written at that of memory; no prefix is reused."""
    requests = 6 * case.written_for
    prompt = rates["prompt_characters"] / 4
    reading = 2 * case.llm * prompt * requests / (hardware.share * hardware.l4_bfloat16)
    writing = 2 * case.llm * case.reply_tokens * requests / (hardware.decoded * hardware.l4_memory)
    # Which passages: the driver reads the corpus twice. Then by each worker: texts, kept replies, the part
    one = parts(passages) * hardware.answer
    waiting = 2 * one / AT_ONCE + 5 * one / hardware.l4
    driver = passages * rates["text_us"] / 1e6
    gpu = reading + writing
    return Cost(
        "generate", _hours(gpu / hardware.l4 + waiting + driver), gpu_hours=_hours(gpu),
        driver_hours=_hours(driver), waiting_hours=_hours(waiting),
        stored=2 * requests * rates["kept_reply_bytes"], moved=2 * passages * rates["corpus_bytes"],
    )  # fmt: skip


def encode(passages: int, case: Case, hardware: Hardware, rates: Mapping[str, float]) -> Cost:
    """A forward pass over every passage."""
    gpu = passages * _forward(case, case.tokens) / (hardware.share * hardware.l4_bfloat16)
    stored = passages * vector_bytes(case)
    waiting = parts(passages) * hardware.answer * (2 / hardware.l4 + 1 / AT_ONCE)
    hashed = stored / hardware.network  # by the driver
    moved = passages * rates["corpus_bytes"] + 2 * stored
    return Cost(
        "encode", _hours(gpu / hardware.l4 + waiting + hashed), gpu_hours=_hours(gpu),
        driver_hours=_hours(hashed), waiting_hours=_hours(waiting), stored=stored, moved=moved,
    )  # fmt: skip


def retrieve(
    passages: int, case: Case, hardware: Hardware, rates: Mapping[str, float], *, joined: bool = True
) -> Cost:
    """Exact search in float32, shard by shard, each for blocks of 8,192 queries; then merged.

    joined: shards are searched together where queries are many.
    """
    vectors = passages * vector_bytes(case)
    blocks = math.ceil(bucket_count(case.queries) / 16)
    shards = shards_of(passages, blocks if joined else 1)
    product = 2.0 * case.dimension * passages * case.queries / (hardware.share * hardware.l4_float32)
    rows = case.queries * shards * (2 * case.depth + 1)
    work = product + rows * rates["row_us"] / 1e6  # a worker's GPU waits while it writes rows
    copying = vectors / hardware.network  # every node searches something of every shard
    again = 1 if vectors / shards < hardware.cache else math.ceil(blocks / hardware.l4)
    reading = again * vectors / hardware.disk_read
    passing = rows * rates["run_bytes"]
    stored = 2 * case.queries * case.depth * rates["run_bytes"]
    files = shards * bucket_count(case.queries)
    waiting = files * 2 * hardware.answer / hardware.l4 + parts(passages) * hardware.answer / AT_ONCE
    return Cost(
        "retrieve", _hours(max(work / hardware.l4, reading) + copying + waiting), gpu_hours=_hours(work),
        waiting_hours=_hours(waiting), stored=stored, passing=passing,
        moved=hardware.l4 * vectors + 2 * passing + stored, node_disk=vectors,
    )  # fmt: skip


def score(passages: int, case: Case, hardware: Hardware, rates: Mapping[str, float]) -> Cost:
    """The pools laid out by part of the corpus, then one forward pass of the teacher a pair."""
    pairs = case.queries * case.pool
    length = case.tokens + case.query_tokens
    gpu = pairs * 2 * case.teacher * length / (hardware.share * hardware.l4_bfloat16)
    driver = passages * rates["index_us"] / 1e6
    one = parts(passages) * hardware.answer
    # Read ahead: ids, row counts, hashes; by each worker: manifest, texts, kept scores, two writes
    waiting = 4 * one / AT_ONCE + 6 * one / hardware.l4
    layout = passages * rates["index_bytes"] + pairs * rates["pair_bytes"]  # of which every node has a copy
    stored = layout + pairs * (rates["score_bytes"] + rates["kept_score_bytes"])
    copying = layout / hardware.network
    return Cost(
        "score", _hours(gpu / hardware.l4 + driver + waiting + copying), gpu_hours=_hours(gpu),
        driver_hours=_hours(driver), waiting_hours=_hours(waiting), stored=stored,
        moved=passages * rates["corpus_bytes"] + 2 * stored + (hardware.l4 - 1) * layout, node_disk=layout,
        driver_memory=32.0 * passages,
    )  # fmt: skip


def groups(passages: int, case: Case, hardware: Hardware, rates: Mapping[str, float]) -> Cost:
    """Pools made twice, in the driver; scores lie in as many files as the corpus."""
    pairs = case.queries * case.pool
    driver = case.queries * rates["group_us"] / 1e6
    waiting = 2 * parts(passages) * hardware.answer / AT_ONCE
    held = 28.0 * pairs + case.lists * case.list_size * (50.0 + case.id_bytes)
    return Cost(
        "groups", _hours(driver + waiting), driver_hours=_hours(driver), waiting_hours=_hours(waiting),
        stored=case.lists * rates["list_bytes"], passing=pairs * rates["score_bytes"] * 2,
        moved=2 * pairs * rates["score_bytes"], driver_memory=held,
    )  # fmt: skip


def train(passages: int, case: Case, hardware: Hardware, rates: Mapping[str, float]) -> Cost:
    """Cached gradients: forward twice, backward once; each worker finds its texts in the whole corpus."""
    tokens = case.list_size * _forward(case, case.tokens) + _forward(case, case.query_tokens)
    flops = 4 * tokens * case.lists * case.epochs  # forward twice, backward as much as two forwards
    gpu = flops / (hardware.share * hardware.a100_bfloat16)
    vectors = passages * vector_bytes(case)
    driver = passages * (rates["vector_us"] + rates["text_us"]) / 1e6  # temperatures; texts
    corpus = passages * rates["corpus_bytes"]
    waiting = 2 * parts(passages) * hardware.answer / AT_ONCE
    copying = (vectors + corpus) / hardware.network
    held = case.lists * case.list_size * 2.0 * case.dimension  # vectors of the lists, for the temperatures
    return Cost(
        "train", _hours(gpu / hardware.a100 + driver + waiting + copying), gpu_hours=_hours(gpu), gpu="A100",
        driver_hours=_hours(driver + copying), waiting_hours=_hours(waiting), stored=4.0 * case.student * 3,
        moved=vectors + hardware.a100 * corpus, driver_memory=held,
    )  # fmt: skip


def evaluate(passages: int, case: Case, hardware: Hardware, rates: Mapping[str, float]) -> Cost:
    """Encoding and search once more, with the adapted student; it is asked what is reported alone."""
    case = replace(case, queries=case.reported)
    once, again = (stage(passages, case, hardware, rates) for stage in (encode, retrieve))
    return Cost(
        "evaluate", once.hours + again.hours, gpu_hours=once.gpu_hours + again.gpu_hours,
        driver_hours=once.driver_hours, waiting_hours=once.waiting_hours + again.waiting_hours,
        stored=once.stored + again.stored, passing=again.passing, moved=once.moved + again.moved,
        node_disk=again.node_disk,
    )  # fmt: skip


def _forward(case: Case, tokens: int) -> float:
    """FLOP of the student's forward pass, as ``retrieval_ray.throughput`` counts them."""
    return 2.0 * case.student * tokens + 4.0 * case.layers * case.dimension * tokens**2


def _hours(seconds: float) -> float:
    return seconds / 3600
