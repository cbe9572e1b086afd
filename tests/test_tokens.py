"""Token rows in a mapped file against a dict."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval_ray import tokens
from retrieval_ray.tokens import TokenRows, count_read, counting

TOKEN = st.integers(0, 2**31 - 1)


@pytest.mark.parametrize("at_once", [1, 3, 4096])
@given(table=st.dictionaries(st.text(max_size=5), st.lists(TOKEN, max_size=6), max_size=12), data=st.data())
def test_rows_are_those_of_a_dict(at_once, table, data):
    twice = data.draw(st.lists(st.sampled_from(sorted(table)), max_size=3)) if table else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "_AT_ONCE", at_once)
        rows = TokenRows([*twice, *table], lambda ids: [np.array(table[i], dtype=np.int64) for i in ids])
    assert {text_id: row.tolist() for text_id, row in rows.items()} == table
    with pytest.raises(KeyError):
        rows["a text that is not there"]


def test_every_text_is_tokenised_once_and_no_row_is_copied():
    seen = []

    def tokenize(ids):
        seen.extend(ids)
        return [np.arange(3)] * len(ids)

    rows = TokenRows(["b", "a", "b"], tokenize)
    assert seen == ["a", "b"]
    assert np.shares_memory(rows["a"], rows["a"]) and isinstance(rows["a"].base, np.memmap)


def test_what_teachers_read_is_counted_where_somebody_asks():
    count_read(5)  # nobody does
    with counting() as outer:
        count_read(3)
        with counting() as inner:
            count_read(4)
        count_read(1)
        assert (outer(), inner()) == (4, 4)
    count_read(7)
    assert outer() == 4
