"""The corpus stage writes what a plain loop over the whole corpus gives. Starts no Ray."""

import random
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from retrieval_ray.artifacts import Location, Stage, bucket_of, part_name
from retrieval_ray.config import Config, DatasetConfig
from retrieval_ray.errors import UserError
from retrieval_ray.filters import normalise
from retrieval_ray.sorting import sort_on_disk
from retrieval_ray.sources import Source
from retrieval_ray.stages import ingest
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.profile import Profile
from tests import oracles

Passage = tuple[str, str, str]
WORDS = "silk wool salt amber honey iron cotton glass timber copper".split()


def source_of(passages: Callable[[], Iterator[Passage]]) -> Source:
    def corpus() -> Iterator[tuple[str, str, str, str]]:
        for row in passages():
            yield f"at {row[0]}", *row

    return Source("made", corpus, lambda split: [], lambda split: [])


def ingested(store: Path, passages: Callable[[], Iterator[Passage]], titles: bool = True) -> Stage:
    context = Context(Config(), Location.of(str(store)), Profile("float32", "cpu", 1, 1024, 1))
    return ingest.run(context, DatasetConfig(titles=titles), source_of(passages))


def some(count: int) -> list[Passage]:
    """Texts of few words, so that many repeat or contain each other; a few have no text at all."""
    rng = random.Random(5)
    return [
        (
            f"p{n:04}",
            rng.choice(["", "Trade", "Übersee"]),
            " ".join(rng.choices(WORDS, k=rng.randint(0, 6))),
        )
        for n in range(count)
    ]


@pytest.fixture
def small_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "sort_on_disk", partial(sort_on_disk, run_bytes=2**17))


@pytest.mark.usefixtures("small_runs")
@pytest.mark.parametrize("titles", [True, False])
def test_parts_and_rejects_are_those_of_a_plain_loop(tmp_path: Path, titles: bool) -> None:
    rows = some(1500)
    corpus = ingested(tmp_path, lambda: iter(rows), titles)
    kept = [row for row in rows if row[1] or row[2]]
    parts: list[list[Passage]] = [[] for _ in range(4)]
    for key, title, text in sorted(kept):
        parts[bucket_of(f"{title} {text}".strip() if titles else text, 4)].append((key, title, text))
    for number, part in enumerate(parts):
        table = corpus.read(part_name("corpus", number, "arrow"))
        assert [tuple(row.values()) for row in table.to_pylist()] == part
    normal = {key: normalise(text or title) for key, title, text in kept}
    long = {key: text for key, text in normal.items() if len(text) >= 10}
    dropped = [key for key, _ in oracles.near_duplicates(long)]
    expected = [(row[0], "empty") for row in rows if row not in kept]
    expected += [(key, "too_short") for key in sorted(normal.keys() - long.keys())]
    expected += [(key, "near_duplicate") for key in dropped]
    rejects = corpus.read("rejects.parquet").to_pylist()
    assert [(row["id"], row["reason"]) for row in rejects] == expected
    assert len({reason for _, reason in expected}) == 3
    assert corpus.manifest()["rows"] == len(kept)
    assert sorted(corpus.folder.names()) == sorted([*corpus.parts(), "manifest.json"])


@pytest.mark.usefixtures("small_runs")
def test_the_order_of_rows_changes_nothing_and_any_other_change_does(tmp_path: Path) -> None:
    rows = some(600)
    shuffled = random.Random(1).sample(rows, len(rows))
    one, other = (
        ingested(tmp_path / "a", lambda: iter(rows)),
        ingested(tmp_path / "b", lambda: iter(shuffled)),
    )
    assert (one.fingerprint, one.content()) == (other.fingerprint, other.content())
    changed = [("p0000", "Trade", "something else"), *rows[1:]]
    swapped = [(rows[1][0], *rows[0][1:]), (rows[0][0], *rows[1][1:]), *rows[2:]]
    for different in (changed, swapped, rows[1:]):
        assert ingested(tmp_path / "c", lambda rows=different: iter(rows)).fingerprint != one.fingerprint


def test_parts_without_a_passage_are_there(tmp_path: Path) -> None:
    rows = [(f"p{n}", "", "the very same text") for n in range(600)]
    corpus = ingested(tmp_path, lambda: iter(rows))
    assert sorted(corpus.read(name).num_rows for name in corpus.parts()[:2]) == [0, 600]
    assert corpus.manifest()["rejected"] == {"near_duplicate": 599}


def test_a_corpus_that_changes_while_it_is_read_is_not_stored(tmp_path: Path) -> None:
    readings = iter([some(100), some(101)])
    with pytest.raises(UserError, match="changed while it was read"):
        ingested(tmp_path, lambda: iter(next(readings)))
    assert not list(tmp_path.glob("*/manifest.json")) and not list(tmp_path.glob("*/.scratch-*"))


@pytest.mark.usefixtures("small_runs")
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """Three times the passages, over a MiB more of text: not a tenth of that more in memory."""

    def peak(count: int) -> int:
        def passages() -> Iterator[Passage]:
            for n in range(count):
                number = " ".join(WORDS[int(digit)] for digit in str(n * 7919 % count))
                yield f"p{n}", "", f"{number} made the beginning of it, and {number * 5} the end"

        tracemalloc.start()
        try:
            ingested(tmp_path / str(count), passages)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1_000)  # what is loaded on first use
    assert peak(6_000) - peak(2_000) < 200_000
