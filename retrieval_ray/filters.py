"""Keep a row, or drop it with a reason: near-duplicates, copies, lengths, empty texts."""

import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from typing import TypeVar

import regex

Reject = tuple[str, str, str]  # id, reason, detail
Sort = Callable[[Iterable[tuple[str, str]]], Iterable[tuple[str, str]]]
_Row = TypeVar("_Row")

_NOT_A_LETTER = regex.compile(r"[\p{N}\p{P}\p{S}]+")
_WINDOW = 9  # sorted neighbours that are compared (CADET corpora_deduplication.py)
_MIN_CHARS = 10


def normalise(text: str) -> str:
    """NFKC, no accents, lower case, no digits or punctuation, single spaces (CADET 1.1)."""
    decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text))
    bare = "".join(c for c in decomposed if not unicodedata.combining(c)).lower()
    return " ".join(_NOT_A_LETTER.sub("", bare).split())


def near_duplicates(texts: Iterable[tuple[str, str]], *, sort: Sort = sorted) -> list[Reject]:
    """Passages that another passage contains, and passages too short to say anything.

    CADET's rule: sort the normalised texts and drop one that is a prefix-side substring of any of
    the next nine; repeat on reversed strings, which brings suffixes together. One copy of an exact
    duplicate survives: the one with the smallest id.

    texts: (id, text) pairs, of which only ``sort`` holds more than ten at a time. Returns (id,
    ``near_duplicate`` or ``too_short``, the id it repeats).
    """
    short: list[Reject] = []
    contained: list[Reject] = []

    def long_enough() -> Iterator[tuple[str, str]]:
        for key, text in texts:
            normal = normalise(text)
            if len(normal) < _MIN_CHARS:
                short.append((key, "too_short", f"{len(normal)} letters"))
            else:
                yield normal, key

    def reversed_rest(rows: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        for (text, key), following in _with_following(_smallest_id_last(sort(rows))):
            keeper = next((other for longer, other in following if text in longer), None)
            if keeper is None:
                yield text[::-1], key
            else:
                contained.append((key, "near_duplicate", keeper))

    for _ in reversed_rest(reversed_rest(long_enough())):
        pass
    return sorted(short) + contained


def _smallest_id_last(rows: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Sorted (text, id) rows with the ids of equal texts turned around."""
    for text, same in groupby(rows, key=itemgetter(0)):
        ids = [key for _, key in same]
        yield from ((text, key) for key in reversed(ids))


def _with_following(rows: Iterable[_Row]) -> Iterator[tuple[_Row, deque[_Row]]]:
    """Each row and the nine, near the end fewer, that come next."""
    window: deque[_Row] = deque()
    for row in rows:
        window.append(row)
        if len(window) > _WINDOW:
            yield window.popleft(), window
    while window:
        yield window.popleft(), window


def query_rejects(
    queries: Iterable[tuple[str, str]], *, max_words: int, taken: Iterable[str] = ()
) -> list[Reject]:
    """Training queries to drop: empty, too long, or a repetition of an earlier or a taken one.

    queries: (id, text) in order of preference; taken: texts of judged queries, which a log must
    not hold. Texts are compared folded (case, accents and punctuation apart), digits kept.
    """
    seen = {folded(text): "a judged query" for text in taken}
    rejects: list[Reject] = []
    for key, text in queries:
        plain = folded(text)
        if not plain:
            rejects.append((key, "empty", ""))
        elif len(text.split()) > max_words:
            rejects.append((key, "too_long", f"{len(text.split())} words, at most {max_words}"))
        elif plain in seen:
            rejects.append((key, "duplicate", f"{text} (also {seen[plain]})"))
        else:
            seen[plain] = key
    return rejects


def folded(text: str) -> str:
    """What a text is compared by: without case, accents and punctuation."""
    text = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    text = regex.sub(r"(?<=[\p{Latin}\p{Greek}\p{Cyrillic}])\p{Mn}+", "", text)
    return " ".join(regex.findall(r"[\p{L}\p{N}\p{M}]+", unicodedata.normalize("NFKC", text).lower()))
