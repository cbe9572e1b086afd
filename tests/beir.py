"""A tiny collection as a BEIR folder, and what its tables are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retrieval_ray.errors import UserError

CORPUS = [("d2", "Zwei", "text of two"), ("d1", "", "text of one\u2028more"), ("d10", "Ten", "")]
QUERIES = [("q1", "first question"), ("q2", "zweite „Frage“"), ("q3", "third"), ("q4", "fourth")]
QRELS = {
    "test": [("q1", "d1", 1), ("q1", "d2", 0), ("q2", "d10", 2)],
    "train": [("q3", "d1", 1), ("q4", "d2", 1)],
}
TABLE = [
    {"passage_id": "d1", "title": "", "text": "text of one\u2028more"},
    {"passage_id": "d10", "title": "Ten", "text": ""},
    {"passage_id": "d2", "title": "Zwei", "text": "text of two"},
]
JUDGED = [
    {"query_id": "q1", "passage_id": "d1", "relevance": 1},
    {"query_id": "q1", "passage_id": "d2", "relevance": 0},
    {"query_id": "q2", "passage_id": "d10", "relevance": 2},
]
IDS = {"d1", "d2", "d10"}


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_qrels(path: Path, rows: list[tuple[str, str, object]], header: bool = True) -> None:
    first = [("query-id", "corpus-id", "score")] if header else []
    write_lines(path, ["\t".join(map(str, row)) for row in [*first, *rows]])


def beir(folder: Path) -> Path:
    write_lines(folder / "corpus.jsonl", [{"_id": i, "title": t, "text": x} for i, t, x in CORPUS])
    write_lines(folder / "queries.jsonl", [{"_id": i, "text": x} for i, x in QUERIES])
    for split, rows in QRELS.items():
        write_qrels(folder / "qrels" / f"{split}.tsv", rows)
    return folder


def said_of(function: Callable[..., object], *arguments: object, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    return str(caught.value)
