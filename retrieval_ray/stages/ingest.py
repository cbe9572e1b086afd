"""The corpus stage: a collection's passages -> Arrow parts by content hash, near-duplicates marked."""

from collections import Counter
from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.compute as pc

from retrieval_ray import schema
from retrieval_ray.artifacts import Stage, bucket_count, bucket_of, digest, part_name, stage
from retrieval_ray.config import DatasetConfig
from retrieval_ray.datasets import read_corpus, rejects_table
from retrieval_ray.errors import UserError
from retrieval_ray.filters import near_duplicates
from retrieval_ray.sources import Source
from retrieval_ray.stages.context import Context

VERSION = 2
DEDUP = "dedup"  # rejects of this stage stay in the corpus: only training leaves them out


def passage_text(title: str, text: str, *, titles: bool) -> str:
    """What the student and the teachers read: the title before the text, or the text alone."""
    return f"{title} {text}".strip() if titles else text


def corpus_table(corpus: Stage) -> pa.Table:
    """All passages of a corpus stage, in the order of its parts."""
    return schema.check(corpus.read_all("corpus-"), "corpus", corpus.folder.path)


def texts_by_id(corpus: Stage) -> dict[str, str]:
    """What the models read of each passage."""
    titles = bool(corpus.identity["titles"])
    return {
        passage_id: passage_text(title, text, titles=titles)
        for passage_id, title, text in _rows(corpus_table(corpus))
    }


def some_passages(corpus: Stage, ids: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Title and text of these passages alone, read part by part; no title where models read none."""
    titles, wanted = bool(corpus.identity["titles"]), pa.array(sorted(set(ids)), pa.string())
    found = {}
    for name in corpus.parts():
        if name.startswith("corpus-"):
            table = corpus.read(name)
            for passage_id, title, text in _rows(
                table.filter(pc.is_in(table.column("passage_id"), value_set=wanted))
            ):
                found[passage_id] = (title if titles else "", text)
    return found


def _rows(table: pa.Table) -> Iterator[tuple[str, str, str]]:
    return zip(*(table.column(name).to_pylist() for name in ("passage_id", "title", "text")), strict=True)


def duplicates(corpus: Stage) -> set[str]:
    """Passages that training never sees: near-duplicates and passages too short to say anything.

    They stay in the corpus, so that evaluation is on the whole collection.
    """
    rejects = corpus.read("rejects.parquet", ["id", "stage"])
    return set(rejects.filter(pc.equal(rejects.column("stage"), DEDUP)).column("id").to_pylist())


def run(context: Context, dataset: DatasetConfig, source: Source) -> Stage:
    """Read, check and store the corpus; identity is its content, so row order changes nothing."""
    table, rejects = read_corpus(source)
    smallest = context.config.groups.list_size
    if table.num_rows < smallest:
        raise UserError(
            f"dataset '{source.name}': {table.num_rows} passages are fewer than "
            f"groups.list_size={smallest}; lower it or give a larger corpus"
        )
    rows = table.to_pylist()
    identity = {
        "version": VERSION,
        "name": source.name,
        "titles": dataset.titles,
        "passages": digest([[r["passage_id"], r["title"], r["text"]] for r in rows]),
    }
    target = stage(context.store, "corpus", identity)
    if not context.start(target, f"corpus '{source.name}': {len(rows):,} passages"):
        return target
    buckets = bucket_count(len(rows))
    parts: list[list[dict[str, object]]] = [[] for _ in range(buckets)]
    for row in rows:
        text = passage_text(row["title"], row["text"], titles=dataset.titles)
        parts[bucket_of(text, buckets)].append(row)
    for number, part in enumerate(parts):
        target.write(part_name("corpus", number, "arrow"), schema.from_rows("corpus", part))
    dropped = near_duplicates((row["passage_id"], row["text"] or row["title"]) for row in rows)
    rejects = pa.concat_tables([rejects, rejects_table(DEDUP, dropped)])
    target.write("rejects.parquet", rejects)
    context.finish(
        target,
        [part_name("corpus", n, "arrow") for n in range(buckets)] + ["rejects.parquet"],
        rows=len(rows),
        buckets=buckets,
        rejected=dict(Counter(rejects.column("reason").to_pylist())),
    )
    return target
