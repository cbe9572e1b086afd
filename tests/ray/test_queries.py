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
def test_extracted_queries_are_of_passages_in_a_seeded_order_of_the_sorted_corpus(
    tmp_path: Path, most: int
) -> None:
    rng = random.Random(1)
    rows = [
        (
            f"{rng.choice('aé東')}{n}",
            rng.choice(["", "A title here", "a Title, here", f"Title {n}"]),
            f"{' '.join(rng.choices(WORDS, k=rng.randint(1, 20)))}. {' '.join(rng.choices(WORDS, k=3))}",
        )
        for n in range(1200)
    ]
    corpus = ingested(tmp_path, lambda: iter(rows), titles=False)
    assert len(duplicates(corpus)) > 10
    usable = [row for row in sorted(rows) if row[0] not in duplicates(corpus)]
    usable = random.Random(7).sample(usable, min(most, len(usable)))
    frequencies, total = document_frequencies(f"{title} {text}" for _, title, text in rows)
    expected = [w for w in extractive(usable, frequencies, total) if w.text.lower()[:7] != "a title"][:most]
    found = _extracted(QueriesConfig(extractive_max=most), corpus, 7)
    assert found == expected and {w.kind for w in found} == {"title", "span", "keywords"}
    if most == 30:
        assert len(found) == 30  # other passages fill the places of titles that are shared


def test_a_title_that_only_a_copy_shares_is_a_query(tmp_path: Path) -> None:
    rng = random.Random(2)
    texts = [" ".join(rng.choices(WORDS, k=20)) for _ in range(24)]
    titles = ["One fox", "Two", "two!"] + [""] * 21
    rows = [(f"p{n}", title, text) for n, (title, text) in enumerate(zip(titles, texts, strict=True))]
    rows.append(("copy", "One fox", f"{texts[0]}!"))
    corpus = ingested(tmp_path, lambda: iter(rows), titles=False)
    (copy,) = duplicates(corpus)
    found = [w for w in _extracted(QueriesConfig(), corpus, 7) if w.kind == "title"]
    assert {"p0", "copy"} == {copy, *(w.passage_id for w in found)} and [w.text for w in found] == ["One fox"]
