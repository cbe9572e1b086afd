"""Queries cut out of a corpus that is read part by part. Starts no Ray."""

import random
from pathlib import Path

import pytest

from retrieval_ray.config import QueriesConfig
from retrieval_ray.generator import document_frequencies, extractive
from retrieval_ray.stages.ingest import duplicates
from retrieval_ray.stages.queries import _extracted
from tests.ray.test_ingest import WORDS, ingested


@pytest.mark.parametrize("most", [30, 100_000])
def test_extracted_queries_are_of_a_seeded_sample_of_the_sorted_corpus(tmp_path: Path, most: int) -> None:
    rng = random.Random(1)
    rows = [
        (
            f"{rng.choice('aé東')}{n}",
            rng.choice(["", "A title here"]),
            f"{' '.join(rng.choices(WORDS, k=rng.randint(1, 20)))}. {' '.join(rng.choices(WORDS, k=3))}",
        )
        for n in range(1200)
    ]
    corpus = ingested(tmp_path, lambda: iter(rows), titles=False)
    assert len(duplicates(corpus)) > 10
    usable = [row for row in sorted(rows) if row[0] not in duplicates(corpus)]
    if most // 3 < len(usable):
        usable = sorted(random.Random(7).sample(usable, most // 3))
    frequencies, total = document_frequencies(f"{title} {text}" for _, title, text in rows)
    expected = list(extractive(usable, frequencies, total))[:most]
    assert _extracted(QueriesConfig(extractive_max=most), corpus, 7) == expected
