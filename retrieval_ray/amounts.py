"""How much each stage of a job does and stores: one formula a stage, from what is known before it begins.

Bytes and seconds that no model decides were measured on 2 CPU cores: those of rows of tables by
``benchmarks/scale.py`` (docs/scale.md), those of a training query, a value and a lookup on the demo.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from retrieval_ray.batching import epoch_batches
from retrieval_ray.forecast import Rate, Work
from retrieval_ray.metrics import METRICS
from retrieval_ray.schedule import batch_size

RUN_BYTES, SCORE_BYTES, PAIR_BYTES, INDEX_BYTES = 7.1, 10.3, 18.1, 12.0  # of a row; of a passage
KEPT_SCORE_BYTES, KEPT_REPLY_BYTES = 23.0, 47.1
QUERY_BYTES = 57.0
REQUEST_TOKENS = 2690 / 4  # of a prompt with examples and passage, where none was counted
LISTED_BYTES, READING_BYTES = 187.0 / 20, 165.0  # of a passage of a list; of a query in the trust table
CORPUS = Rate(58.0e-6)  # a passage is read twice, sorted, compared, written
QUERIES = Rate(60e-6)
ROW = Rate(3.58e-6)  # of a shard's ranking: found, written, read, merged
LOOKED_UP = Rate(84e-6)  # a pair of BM25 or dense
POOLED = Rate(593e-6 / 20)  # a pair of a pool that is made twice and checked
VALUES = Rate(173e-6)


@dataclass(frozen=True)
class Workers:
    """Who does the work: how many, with how many GPUs each."""

    number: int = 1
    gpus: float = 0.0


@dataclass(frozen=True)
class Student:
    """What of a student decides sizes."""

    dimension: int
    layers: int
    bytes: float  # of its files of weights


def corpus(passages: int, row_bytes: float, rate: Rate = CORPUS) -> Work:
    """Every passage, by the driver; three columns of text, and where each of them ends."""
    return Work(
        "corpus", "corpus", "passages", passages, seconds=rate.of(passages),
        stored=passages * (row_bytes + 12),
    )  # fmt: skip


def generate(
    requests: int, asked: float, rate: Rate, workers: Workers, *,
    tokens_in: float, tokens_out: float, at_most: bool, paid: bool, label: str = "generate",
) -> Work:  # fmt: skip
    """asked: of the requests those that have no reply yet. A row of a reply is as long as a kept one."""
    return Work(
        "generate", label, "requests", requests, at_most, calls=asked, tokens_in=tokens_in,
        tokens_out=tokens_out, paid=paid, seconds=rate.of(asked, workers.number), workers=workers.number,
        gpus=workers.gpus, stored=requests * KEPT_REPLY_BYTES,
    )  # fmt: skip


def queries(rows: int, *, at_most: bool, rate: Rate = QUERIES, note: str = "") -> Work:
    """Training and judged queries; at most, because queries are dropped for what they say."""
    stored = rows * QUERY_BYTES
    return Work("queries", f"queries{note}", "queries", rows, at_most, seconds=rate.of(rows), stored=stored)


def encode(
    role: str, texts: int, student: Student, rate: Rate, workers: Workers, *, at_most: bool, note: str = ""
) -> Work:
    """One forward pass a text; float16 vectors, with an id and where it ends (some 24 bytes)."""
    plural = "passages" if role == "passage" else "queries"
    return Work(
        f"encode-{role}", f"encode {plural}{note}", plural, texts, at_most, calls=texts,
        tokens_in=texts * rate.tokens, seconds=rate.of(texts, workers.number), workers=workers.number,
        gpus=workers.gpus, stored=texts * (2 * student.dimension + 24),
    )  # fmt: skip


def search_seconds(
    passages: int, dimension: int, retrievers: Sequence[str], depth: int, *, flops: float, bm25: float
) -> float:
    """Of one query: a product with every vector, BM25's reading, and the rows that are kept.

    flops: a second of the worker's; bm25: seconds for one query and one passage.
    """
    dense = sum(name != "bm25" for name in retrievers)
    rows = (2 * dense + ("bm25" in retrievers)) * min(depth, passages)
    product = 2 * dimension * passages * dense / flops
    return product + ("bm25" in retrievers) * passages * bm25 + rows * (ROW.seconds or 0)


def retrieve(
    queries: int, passages: int, retrievers: int, depth: int, rate: Rate, workers: Workers, *,
    at_most: bool, note: str = "",
) -> Work:  # fmt: skip
    """The ranking of each retriever, and the fused one, of every query."""
    rows = queries * (retrievers + 1) * min(depth, passages)
    return Work(
        "retrieve", f"retrieve{note}", "queries", queries, at_most,
        seconds=rate.of(queries, workers.number), workers=workers.number, gpus=workers.gpus,
        stored=rows * RUN_BYTES,
    )  # fmt: skip


def pairs(queries: int, passages: int, depth: int) -> int:
    """Every query's pool: the head of its fused ranking, which is as long as the corpus allows."""
    return queries * min(depth, passages)


def looked_up(name: str, kind: str, pairs: int, *, at_most: bool, rate: Rate = LOOKED_UP) -> Work:
    """BM25 and dense scores come out of the retrieval."""
    return Work(
        f"score-{kind}", f"score {name}", "pairs", pairs, at_most, seconds=rate.of(pairs),
        stored=pairs * SCORE_BYTES,
    )  # fmt: skip


def score(
    name: str, kind: str, pairs: int, calls: int, rate: Rate, workers: Workers, *,
    at_most: bool, extra_bytes: float = 0.0,
) -> Work:  # fmt: skip
    """A model reads each pair once; of late interaction each text (``late_texts``).

    extra_bytes: what is laid out for it alone. Pairs that the store has a score for cost nothing, so the
    calls are at most so many.
    """
    return Work(
        f"score-{kind}", f"score {name}", "pairs", pairs, at_most, calls=calls, tokens_in=calls * rate.tokens,
        seconds=rate.of(pairs, workers.number), workers=workers.number, gpus=workers.gpus,
        stored=pairs * SCORE_BYTES + extra_bytes,
    )  # fmt: skip


def late_texts(queries: int, passages: int, pairs: int) -> int:
    """Texts that late interaction encodes: every query, and a passage once for all its pairs."""
    return queries + min(passages, pairs)


def pool_bytes(pairs: int, passages: int) -> float:
    """Pairs laid out by part of the corpus, once for all teachers, and where each passage stands."""
    return pairs * PAIR_BYTES + passages * INDEX_BYTES


def listwise(
    name: str, queries: int, pool: int, plan: Sequence[tuple[int, int]], *,
    passage_tokens: float, max_tokens: int, at_most: bool,
) -> Work:  # fmt: skip
    """An endpoint orders a window of the pool at a time; instructions take some 150 tokens, a place 5.

    plan: (first, after the last) of each window.
    """
    calls = queries * len(plan)
    places = queries * sum(end - start for start, end in plan)
    return Work(
        "score-listwise", f"score {name}", "pairs", queries * pool, at_most, calls=calls,
        tokens_in=150 * calls + places * passage_tokens, tokens_out=min(calls * max_tokens, 5 * places),
        paid=True, seconds=None, stored=queries * pool * SCORE_BYTES,
    )  # fmt: skip


def groups(training: int, pool: int, list_size: int, *, at_most: bool) -> Work:
    """A list for each training query that the teacher agrees with, by the driver."""
    return Work(
        "groups", "groups", "lists", training, at_most, seconds=POOLED.of(training * pool),
        stored=training * (list_size * LISTED_BYTES + READING_BYTES),
    )  # fmt: skip


def held_out(lists: int, share: float, most: int) -> int:
    """Lists for dev measures: of single sources; queries of one passage stay together."""
    return max(1, round(min(share, most / max(1, lists)) * lists)) if lists else 0


def train(
    lists: Sequence[int], batch: int, epochs: int, list_size: int, dev_texts: int, student: Student,
    rate: Rate, reading: Rate, workers: Workers, *, share: float = 1.0, note: str = "",
) -> Work:  # fmt: skip
    """Every list once an epoch, forward twice and backward; dev texts forward, before and after each.

    lists: of each corpus, a share of those whose number decides the batch's size. rate: of one text there and
    back; reading: of one forward. At most, because training stops early, a text that stands in several lists
    of a batch is encoded once, and a teacher that is found wanting may not teach.
    """
    size = batch_size([round(count / share) for count in lists], batch)
    steps = epochs * len(epoch_batches(lists, size, seed=0, epoch=1))
    there_and_back, forward = epochs * sum(lists) * (list_size + 1), (epochs + 1) * dev_texts
    seconds = rate.of(there_and_back, workers.number)
    more = Rate(reading.seconds).of(forward, workers.number)
    return Work(
        "train", f"train{note}", "steps", steps, True, calls=there_and_back + forward,
        tokens_in=there_and_back * rate.tokens + forward * reading.tokens,
        seconds=None if seconds is None or more is None else seconds + more, workers=workers.number,
        gpus=workers.gpus, stored=student.bytes,
    )  # fmt: skip


def refreshes(steps: float, between: int) -> int:
    """How often negatives are mined anew: every so many steps, but for the last."""
    return sum(0 < start and start + between < steps for start in range(0, int(steps), between))


def evaluate(queries: int, systems: int, depth: int, *, at_most: bool) -> Work:
    """Every metric of every judged query and system, and their rankings, by the driver."""
    values = queries * systems * len(METRICS)
    return Work(
        "evaluate", "evaluate", "values", values, at_most, seconds=VALUES.of(values),
        stored=queries * systems * min(depth, 100) * 8.5,
    )  # fmt: skip


def drift(queries: int, passages: int, student: Student, rate: Rate, workers: Workers) -> Work:
    """A sample read by the student before and after; a vector for each of its layers, in float32."""
    texts, rows = 2 * (queries + passages), student.layers + 1
    return Work(
        "drift", "drift", "layers", rows, True, calls=texts, tokens_in=texts * rate.tokens,
        seconds=rate.of(texts, workers.number), workers=workers.number, gpus=workers.gpus,
        stored=texts * rows * student.dimension * 4.0,
    )  # fmt: skip


def reranker(pairs: int, epochs: int, dev_pairs: int, student: Student, rate: Rate, workers: Workers) -> Work:
    """A cross-encoder on one worker: each pair forward and backward, three times a forward pass."""
    calls = pairs * epochs + dev_pairs
    return Work(
        "reranker", "train teacher", "pairs", pairs, True, calls=calls, tokens_in=calls * rate.tokens,
        seconds=rate.of(3 * pairs * epochs + dev_pairs), gpus=workers.gpus, stored=student.bytes,
    )  # fmt: skip


def kept(pairs: float, replies: float) -> Work:
    """Scores and replies once more by content, for every run of the store."""
    return Work(
        "kept", "kept by content", "rows", pairs + replies, True,
        stored=pairs * KEPT_SCORE_BYTES + replies * KEPT_REPLY_BYTES,
    )  # fmt: skip


def results(student: Student) -> Work:
    """The model in the output folder."""
    return Work("results", "results", "model", 1, stored=student.bytes)
