"""HTML tables, and the style of our pages."""

import html
from collections.abc import Iterable, Sequence

_STYLE = """
body{font:16px/1.55 system-ui,sans-serif;color:#1c2128;max-width:928px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.7rem}h2{margin-top:2.4rem;font-size:1.3rem;border-bottom:1px solid #d0d7de}
h3{margin:2rem 0 .6rem;font-size:1.1rem}
table{border-collapse:collapse;margin:1rem 0 1.4rem;font-variant-numeric:tabular-nums}
td,th{padding:.3rem .9rem;text-align:right;border-bottom:1px solid #e4e8ec}
td:first-child,th:first-child{text-align:left}tr.marked{font-weight:600;background:#eef4ff}
.verdict{padding:.9rem 1.2rem;border-radius:8px;background:#eef4ff;font-size:1.1rem}
table.prose :is(td,th){text-align:left;vertical-align:top;font-size:.85rem;padding:.3rem .5rem}
.wide{overflow-x:auto}.wide td,.wide th{font-size:.85rem;padding:.3rem .5rem}
svg{display:block;max-width:100%;height:auto;margin-top:1rem}.note{color:#57606a;font-size:.9rem}
"""


def document(title: str, body: str) -> str:
    """A whole page; nothing of it is loaded from elsewhere."""
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'>"
        f"<title>retrieval_ray: {html.escape(title)}</title><style>{_STYLE}</style>{body}</html>\n"
    )


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
