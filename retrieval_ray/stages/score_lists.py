"""Listwise teachers: an endpoint's model orders the pool of each query; its ranks are the scores.

An order depends on the whole pool, so it is kept under the query and all texts of its pool, in their order
of retrieval; a pool that gains a passage is ordered anew.
"""

import asyncio
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from retrieval_ray.artifacts import Location, Stage
from retrieval_ray.contentcache import ContentCache
from retrieval_ray.endpoint import Endpoint
from retrieval_ray.filters import Reject
from retrieval_ray.prompts import Request
from retrieval_ray.stages import pool
from retrieval_ray.stages.encode import part_texts
from retrieval_ray.stages.pool import Pairs
from retrieval_ray.stages.scores import write_part
from retrieval_ray.teachers.listwise import Failure, Messages, rank

ORDER = pa.list_(pa.int32())  # positions in the pool, best first
_AT_ONCE = 64  # queries that take their windows together, and are then kept


@dataclass(frozen=True)
class PooledByQuery:
    """The pools of a part of queries, each in the order of retrieval."""

    heads: pool.Heads
    pool: Stage

    def read(self, number: int) -> Pairs:
        """Pairs of part ``number`` of the queries. Of the corpus only parts that hold some are opened."""
        corpus = self.heads.ranked.corpus
        queries = dict(zip(*part_texts(self.heads.ranked.queries, number, "query"), strict=True))
        table = self.heads.part(number)
        query_ids, passage_ids = (table.column(c).to_pylist() for c in ("query_id", "passage_id"))
        wanted = set(passage_ids)
        _, buckets = pool.buckets_of(self.pool, sorted(wanted))
        texts: dict[str, str] = {}
        for part in pool.corpus_parts(self.pool, set(buckets.tolist())):
            found = zip(*part_texts(corpus, part, "passage"), strict=True)
            texts.update((key, text) for key, text in found if key in wanted)
        return Pairs(
            query_ids, passage_ids, [queries[q] for q in query_ids], [texts[p] for p in passage_ids], []
        )


class ListScorer:
    """Orders the pools of one part of queries.

    A part of which some request failed in a way that may pass is not written; it returns how many queries
    are ``open`` and the last ``error``, and a later run asks for these alone.
    """

    def __init__(
        self,
        teacher_id: str,
        endpoint: dict[str, Any],
        window: int,
        stride: int,
        source: Any,
        target: Stage,
        store: Location,
        parts: int,
    ) -> None:
        self.teacher_id, self.source, self.target, self.parts = teacher_id, source, target, parts
        self.windows = {"window": window, "stride": stride}
        self.endpoint = Endpoint(**endpoint)  # one for all parts, so that it learns of a dead server
        self.cache = ContentCache(store / "orders", teacher_id, ORDER)
        self.read = self.written = 0  # tokens of the part in hand

    def run(self, part: dict[str, Any]) -> dict[str, Any]:
        number = int(part["number"])
        pairs = self.source.read(number)
        rows_of: dict[str, list[int]] = {}
        for row, query_id in enumerate(pairs.query_ids):
            rows_of.setdefault(query_id, []).append(row)
        texts = {q: pairs.queries[rows[0]] for q, rows in rows_of.items()}
        pools = {q: [pairs.passages[row] for row in rows] for q, rows in rows_of.items()}
        keys = {q: self.cache.key(texts[q], json.dumps(pools[q])) for q in rows_of}
        known = self.cache.read(number, self.parts)
        new = list({keys[q]: q for q in rows_of if keys[q] not in known}.values())
        self.endpoint.answered = self.endpoint.answered or bool(known)
        failed: dict[bytes, Failure] = {}
        judged = repaired = 0
        self.read, self.written = 0, 0
        for start in range(0, len(new), _AT_ONCE):
            some = new[start : start + _AT_ONCE]
            orders, count = rank(
                self._ask, [texts[q] for q in some], [pools[q] for q in some], **self.windows
            )
            repaired += count
            found: dict[bytes, list[int]] = {}
            for q, order in zip(some, orders, strict=True):
                if isinstance(order, Failure):
                    failed[keys[q]] = order
                else:
                    found[keys[q]] = order
            self.cache.write(number, self.parts, list(found), list(found.values()))
            known.update(found)
            judged += sum(map(len, found.values()))
        if waiting := [failure for failure in failed.values() if failure.passing]:
            return {
                "judged": judged, "cached": 0, "open": len(waiting), "error": waiting[-1].detail,
                "tokens": self.read, "tokens_out": self.written,
            }  # fmt: skip
        scored: list[tuple[str, str, float]] = []
        rejects: list[Reject] = []
        for q, rows in rows_of.items():
            ids = [pairs.passage_ids[row] for row in rows]
            if keys[q] in known:
                scored += [(q, ids[at], -float(rank)) for rank, at in enumerate(known[keys[q]], start=1)]
            else:
                why = failed[keys[q]]
                rejects += [(f"{q} {p}", why.reason, why.detail) for p in ids]
        write_part(self.target, number, self.teacher_id, scored, rejects)
        return {
            "judged": judged,
            "cached": len(scored) - judged,
            "repaired": repaired,
            "tokens": self.read,
            "tokens_out": self.written,
            "errors": dict(Counter(reason for _, reason, _ in rejects)),
        }

    def _ask(self, prompts: list[Messages]) -> list[str | Failure]:
        return asyncio.run(self._replies(prompts))

    async def _replies(self, prompts: list[Messages]) -> list[str | Failure]:
        requests = [Request(str(n), "", "order", messages, 0) for n, messages in enumerate(prompts)]
        found: dict[int, str | Failure] = {}
        async for reply in self.endpoint.replies(requests):
            self.read, self.written = self.read + reply.tokens_in, self.written + reply.tokens_out
            if reply.text is None:
                outcome: str | Failure = Failure("no_reply", str(reply.error), passing=not reply.refused)
            elif reply.cut:  # its end is missing, and may be that of thoughts
                outcome = Failure("cut", reply.text[-200:])
            else:
                outcome = reply.text
            found[int(reply.query_id)] = outcome
        return [found[n] for n in range(len(prompts))]
