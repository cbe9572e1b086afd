"""The scores table of a stage: written part by part, read by teacher and pair."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from retrieval_ray import schema
from retrieval_ray.artifacts import Location, Stage, each, part_name
from retrieval_ray.datasets import rejects_table
from retrieval_ray.filters import Reject
from retrieval_ray.stages.collection import Judged
from retrieval_ray.stages.pool import PAIRS

Raw = dict[tuple[str, str], float]  # by (query_id, passage_id)
_PAIR = ("query_id", "passage_id", "score")


def scores_of(judged: Judged, queries: Iterable[str] | None = None) -> dict[str, Raw]:
    """Raw scores by teacher of these queries, or of all; a pair that could not be judged is not there."""
    wanted = None if queries is None else pa.array(sorted(set(queries)), pa.string())
    found: dict[str, Raw] = {}
    for teacher, scores in judged.scores.items():
        found[teacher] = {}
        for table in _tables(scores):
            if wanted is not None:
                table = table.filter(pc.is_in(table.column("query_id"), value_set=wanted))
            found[teacher] |= _by_pair(table)
    return found


def all_scores(scores: Stage, columns: Sequence[str] = _PAIR) -> pa.Table:
    """These columns of all raw scores of a teacher."""
    return pa.concat_tables(_tables(scores, columns))


def some_scores(scores: Stage, share: tuple[int, int]) -> pa.Table:
    """Raw scores of the first ``share[0]`` of ``share[1]`` parts, or of what these are in a stage cut finer.

    Parts are powers of two, and part b of n holds what lies in b, b + n, b + 2 n ... of a multiple.
    """
    first, of = share
    names = [part_name("scores", n, "parquet") for n in range(part_count(scores)) if n % of < first]
    return pa.concat_tables(each(lambda name: scores.read(name, list(_PAIR)), names))


def part_count(scores: Stage) -> int:
    """How many parts the scores are cut into."""
    return sum(name.startswith("scores-") for name in scores.parts())


class ByQuery:
    """Raw scores by part of the queries table.

    They lie by part of the corpus, so they are turned around once, on disk: files of about a million
    pairs, each sorted by part of queries. Memory: one such file, and an index of the query ids.
    """

    def __init__(self, queries: Stage, scores: Mapping[str, Stage], folder: str) -> None:
        """folder: for temporary files, about as large as the scores."""
        self._parts = int(queries.manifest()["buckets"])
        names = [part_name("queries", number, "parquet") for number in range(self._parts)]
        ids = [queries.read(name, ["query_id"]).column("query_id") for name in names]
        self._part_Q = np.repeat(np.arange(self._parts), [len(column) for column in ids])
        self._ids = pa.chunked_array([chunk for column in ids for chunk in column.chunks], pa.string())
        self._files = {
            teacher: [
                self._turn(table, f"{folder}/{at}-{number}.arrow")
                for number, table in enumerate(_blocks(judged))
            ]
            for at, (teacher, judged) in enumerate(scores.items())
        }

    def part(self, number: int) -> dict[str, Raw]:
        """The scores of the queries of part ``number``, by teacher."""
        found: dict[str, Raw] = {}
        for teacher, files in self._files.items():
            found[teacher] = {}
            for path, starts in files:
                table = Location.of(path).read_table()
                found[teacher] |= _by_pair(table.slice(starts[number], starts[number + 1] - starts[number]))
        return found

    def _turn(self, table: pa.Table, path: str) -> tuple[str, list[int]]:
        """Write the table by part of queries; where it lies, and where each part begins."""
        part_N = self._part_Q[pc.index_in(table.column("query_id"), value_set=self._ids).to_numpy()]
        order = np.argsort(part_N, kind="stable")
        with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table.take(order).combine_chunks())
        return path, np.searchsorted(part_N[order], np.arange(self._parts + 1)).tolist()


def _tables(scores: Stage, columns: Sequence[str] = _PAIR) -> Iterator[pa.Table]:
    names = [name for name in scores.parts() if name.startswith("scores-")]
    return each(lambda name: scores.read(name, list(columns)), names)


def _blocks(scores: Stage) -> Iterator[pa.Table]:
    """The parts in blocks of about a million pairs."""
    held: list[pa.Table] = []
    for table in _tables(scores):
        held.append(table)
        if sum(map(len, held)) >= PAIRS:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)


def _by_pair(table: pa.Table) -> Raw:
    queries, passages, scores = (table.column(name).to_pylist() for name in _PAIR)
    return dict(zip(zip(queries, passages, strict=True), scores, strict=True))


def write_part(
    target: Stage, number: int, teacher: str, rows: list[tuple[str, str, float]], rejects: list[Reject]
) -> None:
    """Write one part: the rejects first, so that where scores are, all of the part is."""
    if rejects:
        target.write(rejects_name(number), rejects_table("score", sorted(rejects)))
    else:  # what an earlier attempt could not judge
        (target.folder / rejects_name(number)).remove()
    target.write(part_name("scores", number, "parquet"), scores_table(teacher, rows))


def scores_table(teacher: str, rows: list[tuple[str, str, float]]) -> pa.Table:
    """(query_id, passage_id, score) rows as a scores table."""
    ordered = sorted(rows)
    return pa.table(
        {
            "teacher": [teacher] * len(ordered),
            "query_id": [row[0] for row in ordered],
            "passage_id": [row[1] for row in ordered],
            "score": pa.array([row[2] for row in ordered], pa.float32()),
        },
        schema=schema.TABLES["scores"],
    )


def rejects_name(number: int) -> str:
    """The part of rejects beside a part of scores; it is there where some pair has no score."""
    return part_name("rejects", number, "parquet")


def row_count(target: Stage, name: str) -> int:
    """The rows of a Parquet part, from its footer."""
    with target.folder.filesystem.open_input_file(f"{target.folder.path}/{name}") as file:
        return int(pq.read_metadata(file).num_rows)
