"""The report's parts that can be read without a run; tests/ray/test_adapt.py looks at a whole page."""

from retrieval_ray.report import drops


def test_what_was_dropped_is_shown_with_samples_and_cannot_inject() -> None:
    page = drops(
        {"refusal": 2, "too_long": 1000},
        {"refusal": ["I'm sorry", "<script>alert(1)</script>"], "other": ["x"]},
    )
    assert page.index("too long<td>1,000") < page.index("refusal<td>2")  # the most frequent first
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "<script>" not in page
    assert "other" not in page


def test_nothing_dropped_needs_no_table() -> None:
    assert drops({}, {}) == ""
