"""The tables: their documented columns, and the check that names what is wrong."""

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_ray import schema
from retrieval_ray.errors import UserError

# As the architecture document lists them, and an LLM's replies; a change here is a change of every
# stage's interface.
COLUMNS = {
    "corpus": "passage_id title text",
    "queries": "query_id text kind language split passage_id generator",
    "replies": "query_id passage_id kind text error tokens_in tokens_out cut",
    "run": "retriever query_id passage_id rank score",
    "scores": "teacher query_id passage_id score",
    "groups": "corpus query_id kind split positive_id passage_ids teacher_scores excluded_ids",
    "rejects": "id stage reason detail",
    "qrels": "query_id passage_id relevance",
    "evaluation": "system query_id metric value",
}


def value_of(kind: pa.DataType) -> object:
    if pa.types.is_list(kind):
        return [value_of(kind.value_type)] * 2
    if pa.types.is_boolean(kind):
        return True
    return "a" if pa.types.is_string(kind) else 1


def row_of(name: str) -> dict[str, object]:
    return {f.name: value_of(f.type) for f in schema.TABLES[name]}


def test_tables_have_the_documented_columns() -> None:
    assert {name: " ".join(table.names) for name, table in schema.TABLES.items()} == COLUMNS


@pytest.mark.parametrize("name", COLUMNS)
def test_rows_survive_from_rows_and_check(name: str) -> None:
    rows = [row_of(name), row_of(name)]
    table = schema.check(schema.from_rows(name, rows), name)
    assert table.schema.equals(schema.TABLES[name])
    assert table.to_pylist() == rows


@pytest.mark.parametrize("name", COLUMNS)
def test_empty_table_has_the_schema_and_no_rows(name: str) -> None:
    assert schema.empty(name).num_rows == 0
    assert schema.empty(name).schema.equals(schema.TABLES[name])
    assert schema.from_rows(name, []).equals(schema.empty(name))


@given(name=st.sampled_from(sorted(COLUMNS)), data=st.data())
@settings(max_examples=50, deadline=None)
def test_check_puts_columns_in_order(name: str, data: st.DataObject) -> None:
    table = schema.from_rows(name, [row_of(name)])
    order = data.draw(st.permutations(table.column_names))
    assert schema.check(table.select(order), name).equals(table)


@given(
    name=st.sampled_from(sorted(COLUMNS)),
    extra=st.sets(st.sampled_from(["note", "label", "_id"])),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_check_names_missing_and_extra_columns(name: str, extra: set[str], data: st.DataObject) -> None:
    names = schema.TABLES[name].names
    missing = data.draw(st.sets(st.sampled_from(names), min_size=0 if extra else 1))
    table = schema.from_rows(name, [row_of(name)]).drop_columns(sorted(missing))
    for column in sorted(extra):
        table = table.append_column(column, pa.nulls(1, pa.string()))
    with pytest.raises(UserError) as caught:
        schema.check(table, name, "part-7.parquet")
    said = str(caught.value)
    assert name in said and "part-7.parquet" in said
    assert str([c for c in names if c in missing]) in said
    assert str(sorted(extra)) in said


def test_check_casts_what_can_be_cast() -> None:
    table = pa.table(
        {
            "query_id": pa.array(["q"], pa.large_string()),
            "passage_id": pa.array(["p"]).dictionary_encode(),
            "relevance": pa.array([2], pa.int64()),
        }
    )
    checked = schema.check(table, "qrels")
    assert checked.schema.equals(schema.TABLES["qrels"])
    assert checked.to_pylist() == [{"query_id": "q", "passage_id": "p", "relevance": 2}]


@pytest.mark.parametrize(
    "relevance", [pa.array(["high"]), pa.array([1.5]), pa.array([2**40]), pa.array([["x"]])]
)
def test_check_names_the_column_of_a_wrong_type(relevance: pa.Array) -> None:
    table = pa.table({"query_id": ["q"], "passage_id": ["p"], "relevance": relevance})
    with pytest.raises(UserError, match="relevance"):
        schema.check(table, "qrels", "test.parquet")


def test_check_refuses_a_column_that_stands_twice() -> None:
    table = schema.from_rows("qrels", [row_of("qrels")])
    table = table.append_column("query_id", table.column("query_id"))
    with pytest.raises(UserError, match="query_id"):
        schema.check(table, "qrels")


@pytest.mark.parametrize("change", [{"label": 1}, {"relevance": None, "rel": 1}])
def test_from_rows_refuses_unknown_keys(change: dict[str, object]) -> None:
    with pytest.raises(UserError, match="qrels"):
        schema.from_rows("qrels", [row_of("qrels"), row_of("qrels") | change])


@pytest.mark.parametrize("key", ["query_id", "passage_id", "relevance"])
def test_from_rows_refuses_a_missing_key(key: str) -> None:
    row = row_of("qrels")
    del row[key]
    with pytest.raises(UserError, match="qrels"):
        schema.from_rows("qrels", [row_of("qrels"), row])
