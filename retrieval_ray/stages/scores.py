"""The scores table of a stage: written part by part, read by teacher and pair."""

import pyarrow as pa
import pyarrow.parquet as pq

from retrieval_ray import schema
from retrieval_ray.artifacts import Stage, part_name
from retrieval_ray.datasets import rejects_table
from retrieval_ray.filters import Reject
from retrieval_ray.stages.collection import Judged


def scores_of(judged: Judged) -> dict[str, dict[tuple[str, str], float]]:
    """Raw scores by teacher and (query_id, passage_id); a pair that could not be judged is not there."""
    found = {}
    for teacher, scores in judged.scores.items():
        table = scores.read_all("scores-", ["query_id", "passage_id", "score"])
        q, p, s = (table.column(c).to_pylist() for c in ("query_id", "passage_id", "score"))
        found[teacher] = dict(zip(zip(q, p, strict=True), s, strict=True))
    return found


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
