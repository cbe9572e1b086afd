"""The corpus stage: a collection's passages -> Arrow parts by content hash, near-duplicates marked."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from retrieval_ray import schema
from retrieval_ray.artifacts import Stage, bucket_count, bucket_of, each, part_name, stage
from retrieval_ray.config import DatasetConfig
from retrieval_ray.datasets import content_of, judged_ids, passages_of, rejects_table, row_hash, survey
from retrieval_ray.errors import UserError
from retrieval_ray.filters import near_duplicates
from retrieval_ray.sorting import sort_on_disk
from retrieval_ray.sources import Source
from retrieval_ray.stages.context import Context

VERSION = 3
Passage = tuple[str, str, str]  # passage_id, title, text
DEDUP = "dedup"  # rejects of this stage stay in the corpus: only training leaves them out


def passage_text(title: str, text: str, *, titles: bool) -> str:
    """What the student and the teachers read: the title before the text, or the text alone."""
    return f"{title} {text}".strip() if titles else text


def passages(corpus: Stage, ids: Iterable[str] | None = None) -> Iterator[Passage]:
    """All passages, or these alone, read part by part in the order of the parts."""
    wanted = None if ids is None else frozenset(ids)

    def read(name: str) -> pa.Table:
        table = schema.check(corpus.read(name), "corpus", corpus.folder.path)
        if wanted is None:
            return table
        # Not is_in, which lays out the whole of its value set anew for every part
        here = table.column("passage_id").to_pylist()
        return table.filter(pa.array([key in wanted for key in here], pa.bool_()))

    for table in each(read, [name for name in corpus.parts() if name.startswith("corpus-")]):
        yield from _rows(table)


def judged_passages(corpus: Stage, source: Source, split: str) -> set[str]:
    """Those of the corpus that judgements of a split name: what ``read_judged`` must know of it."""
    return {key for key, _, _ in passages(corpus, judged_ids(source, split))}


def texts_of(corpus: Stage, ids: Iterable[str]) -> dict[str, str]:
    """What the models read of these passages."""
    titles = bool(corpus.identity["titles"])
    return {key: passage_text(title, text, titles=titles) for key, title, text in passages(corpus, ids)}


def some_passages(corpus: Stage, ids: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Title and text of these passages alone; no title where models read none."""
    titles = bool(corpus.identity["titles"])
    return {key: (title if titles else "", text) for key, title, text in passages(corpus, ids)}


def _rows(table: pa.Table) -> Iterator[Passage]:
    return zip(*(table.column(name).to_pylist() for name in ("passage_id", "title", "text")), strict=True)


def duplicates(corpus: Stage) -> set[str]:
    """Passages that training never sees: near-duplicates and passages too short to say anything.

    They stay in the corpus, so that evaluation is on the whole collection.
    """
    rejects = corpus.read("rejects.parquet", ["id", "stage"])
    return set(rejects.filter(pc.equal(rejects.column("stage"), DEDUP)).column("id").to_pylist())


def run(context: Context, dataset: DatasetConfig, source: Source) -> Stage:
    """Read, check and store the corpus; identity is its content, so row order changes nothing.

    The source is read twice and never held: rows are sorted into their parts on disk (``sort_on_disk``).
    Memory, whatever the corpus: two sorts at a time, about 200 MiB; 17 bytes a passage to find repeated ids;
    the rejects. Room on disk beside the corpus, until the stage is done: three times its text.
    """
    found = survey(source)
    smallest = context.config.encoded_of_a_list()
    if found.passages < smallest:
        raise UserError(
            f"dataset '{source.name}': {found.passages} passages are fewer than "
            f"groups.list_size or train.list_sample, {smallest}; lower these or give a larger corpus"
        )
    identity = {
        "version": VERSION,
        "name": source.name,
        "titles": dataset.titles,
        "passages": found.content,
    }
    target = stage(context.store, "corpus", identity)
    if not context.start(target, f"corpus '{source.name}': {found.passages:,} passages"):
        return target
    buckets = bucket_count(found.passages)
    names = [part_name("corpus", number, "arrow") for number in range(buckets)]
    with target.scratch() as folder:
        sort = partial(sort_on_disk, folder=folder)
        _write_parts(target, source, names, sort)
        dropped = near_duplicates(
            ((key, text or title) for key, title, text in _stored(target, names)), sort=sort
        )
    rejects = pa.concat_tables([found.rejects, rejects_table(DEDUP, dropped)])
    target.write("rejects.parquet", rejects)
    context.finish(
        target,
        [*names, "rejects.parquet"],
        rows=found.passages,
        collection=source.name,
        buckets=buckets,
        rejected=dict(Counter(rejects.column("reason").to_pylist())),
    )
    return target


def _write_parts(target: Stage, source: Source, names: list[str], sort: Callable[..., Iterator[Any]]) -> None:
    """Every passage to the part of its text, by passage_id."""
    titles = bool(target.identity["titles"])
    total = 0

    def with_bucket() -> Iterator[tuple[int, str, str, str]]:
        nonlocal total
        for passage_id, title, text in passages_of(source):
            total += row_hash(passage_id, title, text)
            yield bucket_of(passage_text(title, text, titles=titles), len(names)), passage_id, title, text

    def tables() -> Iterator[tuple[str, pa.Table]]:
        empty = dict.fromkeys(names)
        for number, rows in groupby(sort(with_bucket()), key=itemgetter(0)):
            yield names[number], _table([row[1:] for row in rows])
            del empty[names[number]]
        yield from ((name, _table([])) for name in empty)

    def write(part: tuple[str, pa.Table]) -> None:
        target.write(*part)

    # Only an object store is waited for; parts that wait are parts that memory holds
    for _ in map(write, tables()) if target.folder.is_local else each(write, tables()):
        pass
    if content_of(total) != target.identity["passages"]:
        raise UserError(f"dataset '{source.name}': the corpus was changed while it was read; run again")


def _table(rows: list[Passage]) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else ((), (), ())
    return pa.table([list(column) for column in columns], schema=schema.TABLES["corpus"])


def _stored(target: Stage, names: list[str]) -> Iterator[Passage]:
    for name in names:
        yield from _rows(target.read(name))
