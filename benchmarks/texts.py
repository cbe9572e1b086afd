"""Texts to measure on: a collection of yours, or words of the demo in lengths like SciFact's."""

import json
from pathlib import Path

import numpy as np

from retrieval_ray.demo.corpus import passages

# Words of a SciFact passage with its title, at the quantiles 0, .05, ..., 1 (5,183 passages).
SCIFACT_WORDS = [
    33,
    108,
    127,
    140,
    151,
    158,
    164,
    170,
    182,
    194,
    204,
    213,
    222,
    235,
    249,
    260,
    270,
    283,
    309,
    356,
    1541,
]
# and of its 1,109 claims
SCIFACT_QUERY_WORDS = [3, 6, 7, 8, 8, 9, 10, 10, 10, 11, 12, 12, 13, 13, 14, 15, 16, 18, 19, 21, 39]


def passage_texts(count: int, data: str | None = None) -> list[str]:
    """That many passages, the first of a folder in BEIR layout (over again, if it has fewer) or made up."""
    if data is None:
        return _made(count, SCIFACT_WORDS, seed=0)
    with (Path(data) / "corpus.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]
    texts = [f"{row.get('title') or ''} {row['text']}".strip() for row in rows]
    return [texts[n % len(texts)] for n in range(count)]


def query_texts(count: int, data: str | None = None) -> list[str]:
    """That many queries, likewise."""
    if data is None:
        return _made(count, SCIFACT_QUERY_WORDS, seed=1)
    with (Path(data) / "queries.jsonl").open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line, _ in zip(lines, range(count), strict=False)]
    return [texts[n % len(texts)] for n in range(count)]


def _made(count: int, quantiles: list[int], *, seed: int) -> list[str]:
    """Runs of the demo's own words, the lengths drawn from these quantiles."""
    words = " ".join(text for _, _, text in passages()).split()
    rng = np.random.default_rng(seed)
    places = rng.uniform(0, len(quantiles) - 1, count)
    lengths = np.interp(places, range(len(quantiles)), quantiles).astype(int)
    starts = rng.integers(0, len(words) - max(quantiles), count)
    return [" ".join(words[start : start + length]) for start, length in zip(starts, lengths, strict=True)]
