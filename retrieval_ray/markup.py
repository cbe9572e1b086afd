"""HTML tables."""

import html
from collections.abc import Iterable, Sequence


def prose(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts."""
    return cells(head, rows, marked="").replace("<table>", "<table class=prose>")


def cells(head: Sequence[str], rows: Iterable[Sequence[str]], *, marked: str) -> str:
    """A table; the row that begins with ``marked`` stands out."""
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(
        f"<tr{' class=marked' * (row[0] == marked)}>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{top}</tr>{body}</table>"
