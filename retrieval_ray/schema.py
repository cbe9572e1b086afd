"""The tables that stages talk through: their columns, and the check at every edge."""

import pyarrow as pa

from retrieval_ray.errors import UserError

_TEXT = pa.string()

TABLES: dict[str, pa.Schema] = {
    "corpus": pa.schema([("passage_id", _TEXT), ("title", _TEXT), ("text", _TEXT)]),
    "queries": pa.schema(
        [
            ("query_id", _TEXT),
            ("text", _TEXT),
            ("kind", _TEXT),  # log, judged, title, span, keywords, ...
            ("language", _TEXT),
            ("split", _TEXT),  # train, dev, test
            ("passage_id", _TEXT),  # the passage it was written from; null for a log
            ("generator", _TEXT),
        ]
    ),
    "replies": pa.schema(
        [
            ("query_id", _TEXT),
            ("passage_id", _TEXT),
            ("kind", _TEXT),
            ("text", _TEXT),  # as it came; null where there was an error
            ("error", _TEXT),
            ("tokens_in", pa.int64()),
            ("tokens_out", pa.int64()),
            ("cut", pa.bool_()),  # at the limit of tokens
        ]
    ),
    "run": pa.schema(
        [
            ("retriever", _TEXT),
            ("query_id", _TEXT),
            ("passage_id", _TEXT),
            ("rank", pa.int32()),  # 1 is best
            ("score", pa.float64()),
        ]
    ),
    "scores": pa.schema(
        [
            ("teacher", _TEXT),
            ("query_id", _TEXT),
            ("passage_id", _TEXT),
            ("score", pa.float32()),  # raw: never squashed, never relative to a list
        ]
    ),
    "groups": pa.schema(
        [
            ("corpus", _TEXT),
            ("query_id", _TEXT),
            ("kind", _TEXT),
            ("split", _TEXT),  # train, dev
            ("positive_id", _TEXT),
            ("passage_ids", pa.list_(_TEXT)),  # K of them, the positive first
            ("teacher_scores", pa.list_(pa.float32())),  # normalised to [0, 1]
            ("excluded_ids", pa.list_(_TEXT)),  # every judged passage over the limit, beyond K too
        ]
    ),
    "rejects": pa.schema([("id", _TEXT), ("stage", _TEXT), ("reason", _TEXT), ("detail", _TEXT)]),
    "qrels": pa.schema([("query_id", _TEXT), ("passage_id", _TEXT), ("relevance", pa.int32())]),
    "evaluation": pa.schema(
        [("system", _TEXT), ("query_id", _TEXT), ("metric", _TEXT), ("value", pa.float64())]
    ),
}


def check(table: pa.Table, name: str, where: str = "") -> pa.Table:
    """Return the table with exactly the columns and types of ``TABLES[name]``, in their order.

    Raises ``UserError`` that names the missing and the extra columns, or the one with a wrong type.
    """
    schema = TABLES[name]
    missing = [column for column in schema.names if column not in table.column_names]
    extra = [column for column in table.column_names if column not in schema.names]
    at = f" in {where}" if where else ""
    twice = sorted({column for column in table.column_names if table.column_names.count(column) > 1})
    if twice:
        raise UserError(f"table '{name}'{at}: columns {twice} stand more than once")
    if missing or extra:
        raise UserError(
            f"table '{name}'{at}: missing columns {missing}, unexpected columns {extra}; "
            f"it needs exactly {schema.names}"
        )
    columns = []
    for column in schema:
        try:
            columns.append(table.column(column.name).cast(column.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise UserError(f"table '{name}'{at}, column '{column.name}': {error}") from error
    return pa.table(columns, schema=schema)


def from_rows(name: str, rows: list[dict[str, object]]) -> pa.Table:
    """Build a table of ``TABLES[name]`` from dicts; an unknown or missing key is an error."""
    schema = TABLES[name]
    for row in rows:
        if row.keys() != set(schema.names):
            raise UserError(f"table '{name}': a row has keys {sorted(row)}, needs {schema.names}")
    return pa.Table.from_pylist(rows, schema=schema)


def empty(name: str) -> pa.Table:
    """The table with no rows."""
    return TABLES[name].empty_table()
