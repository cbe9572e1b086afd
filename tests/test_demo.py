"""The bundled demo: a corpus made of Python's documentation, questions and a log of our own."""

import csv
import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_ray import demo
from retrieval_ray.demo.corpus import MIN_CHARS, WORDS_PER_PASSAGE, split
from retrieval_ray.filters import query_rejects

HERE = Path(demo.__file__).parent
# As a job has it: a fresh process. pytest itself replaces hooks that the corpus documents.
PRINT_CORPUS = """
import json
from retrieval_ray.demo.corpus import passages
print(json.dumps(list(passages())))
"""


def run(code: str, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )


def corpus_of(before: str = "", **variables: str) -> list[tuple[str, str, str]]:
    done = run(before + PRINT_CORPUS, **variables)
    assert done.returncode == 0, done.stderr
    return [tuple(row) for row in json.loads(done.stdout)]


def digest_of(corpus: list[tuple[str, str, str]]) -> str:
    return hashlib.sha256(json.dumps(corpus).encode()).hexdigest()


@pytest.fixture(scope="module")
def corpus() -> list[tuple[str, str, str]]:
    return corpus_of(PYTHONHASHSEED="1")


def texts_of(name: str) -> dict[str, str]:
    rows = [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]
    assert all(row.keys() == {"_id", "text"} for row in rows)
    assert len({row["_id"] for row in rows}) == len(rows)
    return {row["_id"]: row["text"] for row in rows}


def qrels_of(split_name: str) -> list[tuple[str, str, int]]:
    text = (HERE / f"{split_name}.tsv").read_text(encoding="utf-8")
    header, *rows = csv.reader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    assert header == ["query-id", "corpus-id", "score"]
    return [(query, passage, int(score)) for query, passage, score in rows]


# --- the corpus -------------------------------------------------------------------------------


def test_ids_are_unique_and_passages_are_many(corpus: list[tuple[str, str, str]]) -> None:
    ids = Counter(passage_id for passage_id, _, _ in corpus)
    assert max(ids.values()) == 1 and len(ids) > 4000


def test_every_passage_has_a_title_and_a_text_of_a_fair_length(
    corpus: list[tuple[str, str, str]],
) -> None:
    for passage_id, title, text in corpus:
        assert passage_id.partition("#")[0].removeprefix("topic:") == title
        assert 0 < len(text.split()) <= WORDS_PER_PASSAGE * 3 // 2
        assert text == " ".join(text.split())
        assert len(text) >= MIN_CHARS // 2 or "#" in passage_id or len(text.split()) > 2


def test_pieces_of_a_long_text_are_numbered_without_gaps(
    corpus: list[tuple[str, str, str]],
) -> None:
    ids = {passage_id for passage_id, _, _ in corpus}
    for passage_id in ids:
        name, _, number = passage_id.rpartition("#")
        if name:
            assert (name if number == "2" else f"{name}#{int(number) - 1}") in ids


def test_well_known_passages_are_there(corpus: list[tuple[str, str, str]]) -> None:
    texts = {passage_id: text for passage_id, _, text in corpus}
    assert "JSON" in texts["json.dumps"]
    assert "separator" in texts["str.split"]
    assert "context manager" in texts["topic:with"]
    assert {"sys.excepthook", "threading.excepthook"} <= texts.keys()


def test_no_passage_holds_an_address_or_a_path_of_this_machine(
    corpus: list[tuple[str, str, str]],
) -> None:
    """Such texts would differ on every run or machine."""
    for passage_id, _, text in corpus:
        assert not re.search(r" at 0x[0-9a-f]{6,}", text), passage_id
        assert sys.prefix not in text and str(Path.home()) + "/" not in text, passage_id


def test_another_hash_seed_gives_the_same_corpus(corpus: list[tuple[str, str, str]]) -> None:
    assert digest_of(corpus_of(PYTHONHASHSEED="4242")) == digest_of(corpus)


def test_what_the_process_did_before_does_not_change_the_corpus(
    corpus: list[tuple[str, str, str]],
) -> None:
    """Ray replaces sys.excepthook, torch inspect.getfile, pytest threading.excepthook."""
    before = """
import asyncio.subprocess, ctypes.util, email.mime.text, sys, threading, warnings
import numpy, pyarrow, torch.package
def hook(*arguments):
    "A hook of somebody else, which says something of its own and at some length."
sys.excepthook = threading.excepthook = sys.unraisablehook = warnings.showwarning = hook
"""
    changed = set(corpus_of(before)) ^ set(corpus)
    assert {passage_id for passage_id, _, _ in changed} == set()


def test_a_python_without_docstrings_has_the_corpus_or_says_why_not() -> None:
    code = """
from retrieval_ray.demo.corpus import passages
from retrieval_ray.errors import UserError
try:
    print(len(list(passages())))
except UserError as error:
    print(error)
"""
    said = run(code, "-OO").stdout
    assert "-OO" in said or int(said) > 4000


@given(
    st.lists(st.lists(st.sampled_from(["a", "bb", "ccc"]), max_size=40), max_size=6),
    st.integers(2, 20),
)
@settings(max_examples=100, deadline=None)
def test_split_keeps_every_word_in_order_in_pieces_of_bounded_length(
    paragraphs: list[list[str]], words: int
) -> None:
    text = "\n\n".join(" ".join(paragraph) for paragraph in paragraphs)
    pieces = split(text, words)
    assert " ".join(pieces).split() == text.split()
    assert all(0 < len(piece.split()) <= words * 3 // 2 for piece in pieces)


def test_split_cuts_between_paragraphs_where_it_can() -> None:
    assert split("a b c\n\nd e\n\nf g h", 5) == ["a b c d e", "f g h"]
    assert split("one\n \nword", 5) == ["one word"]
    assert split("  \n\n ", 5) == []


# --- questions and log ------------------------------------------------------------------------


def test_there_are_enough_questions_and_log_queries() -> None:
    dev, test = ({query for query, _, _ in qrels_of(name)} for name in ("dev", "test"))
    assert len(dev) >= 100 and len(test) >= 300 and len(texts_of("log.jsonl")) >= 400
    assert not dev & test
    assert dev | test == texts_of("queries.jsonl").keys()


@pytest.mark.parametrize("split_name", ["dev", "test"])
def test_every_judged_passage_is_in_the_corpus(corpus: list[tuple[str, str, str]], split_name: str) -> None:
    ids = {passage_id for passage_id, _, _ in corpus}
    assert {passage for _, passage, _ in qrels_of(split_name)} - ids == set()


@pytest.mark.parametrize("split_name", ["dev", "test"])
def test_every_question_has_a_relevant_passage_and_no_judgement_twice(split_name: str) -> None:
    rows = qrels_of(split_name)
    assert max(Counter((query, passage) for query, passage, _ in rows).values()) == 1
    assert {query for query, _, score in rows if score > 0} == {query for query, _, _ in rows}


def test_ids_of_the_log_and_of_the_questions_are_apart() -> None:
    assert not texts_of("log.jsonl").keys() & texts_of("queries.jsonl").keys()


def test_no_text_stands_twice_and_none_of_the_log_is_judged() -> None:
    """Compared as the filter of training queries compares: case and punctuation aside."""
    both = {**texts_of("queries.jsonl"), **texts_of("log.jsonl")}
    assert len(set(both.values())) == len(both)
    assert query_rejects(both.items(), max_words=64) == []


def test_no_question_is_a_copy_of_its_passage(corpus: list[tuple[str, str, str]]) -> None:
    passages = {passage_id: text.lower() for passage_id, _, text in corpus}
    questions = texts_of("queries.jsonl")
    for query, passage, _ in [*qrels_of("dev"), *qrels_of("test")]:
        assert questions[query].lower() not in passages[passage]
