"""Every pair judged once: raw scores keyed by teacher and the two texts, shared by all runs.

A part of work commits one immutable file, named by what it holds, so concurrent writers cannot harm
each other and a part is in the cache whole or not at all. Files lie in folders ``n-b``: the scores of
passages whose text falls in bucket ``b`` of ``n``. Because bucket ``b`` of ``n`` is the union of
buckets ``b`` and ``b + n`` of ``2n``, corpora cut into different numbers of parts share scores.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from retrieval_ray.artifacts import Location, digest


class ScoreCache:
    """The cache of one teacher, under a store. ``teacher_id`` holds everything that decides a score."""

    def __init__(self, store: Location, teacher_id: str) -> None:
        self.folder = store / "scores" / digest(teacher_id)[:16]
        self._teacher = teacher_id.encode()

    def key(self, query: str, passage: str) -> bytes:
        """16 bytes that stand for (teacher, query text, passage text)."""
        state = hashlib.blake2b(digest_size=16)
        for piece in (self._teacher, query.encode(), passage.encode()):
            state.update(len(piece).to_bytes(8, "big") + piece)
        return state.digest()

    def read(self, bucket: int, buckets: int) -> dict[bytes, float]:
        """Every score known for passages of bucket ``bucket`` of ``buckets``."""
        known: dict[bytes, float] = {}
        for name in self.folder.names():
            count, at = (int(piece) for piece in name.split("-"))
            smaller = min(count, buckets)
            if at % smaller != bucket % smaller:
                continue
            for part in (self.folder / name).names():
                if part.endswith(".parquet"):
                    table = (self.folder / name / part).read_table()
                    keys, scores = (table.column(c).to_pylist() for c in ("key", "score"))
                    known.update(zip(keys, scores, strict=True))
        return known

    def write(self, bucket: int, buckets: int, keys: Sequence[bytes], scores: Sequence[float]) -> None:
        """Commit one part's new scores."""
        if not keys:
            return
        table = pa.table(
            {"key": pa.array(keys, pa.binary(16)), "score": np.asarray(scores, dtype=np.float32)}
        )
        name = hashlib.sha256(b"".join(sorted(keys))).hexdigest()[:16]
        (self.folder / f"{buckets}-{bucket}" / f"{name}.parquet").write_table(table)
