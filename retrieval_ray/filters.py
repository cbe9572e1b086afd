"""Keep a row, or drop it with a reason: near-duplicates, copies, lengths, empty texts."""

import unicodedata
from collections.abc import Iterable

import regex

Reject = tuple[str, str, str]  # id, reason, detail

_NOT_A_LETTER = regex.compile(r"[\p{N}\p{P}\p{S}]+")
_WINDOW = 9  # sorted neighbours that are compared (CADET corpora_deduplication.py)
_MIN_CHARS = 10


def normalise(text: str) -> str:
    """NFKC, no accents, lower case, no digits or punctuation, single spaces (CADET 1.1)."""
    decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text))
    bare = "".join(c for c in decomposed if not unicodedata.combining(c)).lower()
    return " ".join(_NOT_A_LETTER.sub("", bare).split())


def near_duplicates(texts: Iterable[tuple[str, str]]) -> list[Reject]:
    """Passages that another passage contains, and passages too short to say anything.

    CADET's rule: sort the normalised texts and drop one that is a prefix-side substring of any of
    the next nine; repeat on reversed strings, which brings suffixes together. One copy of an exact
    duplicate survives: the one with the smallest id.

    texts: (id, text) pairs. Returns (id, ``near_duplicate`` or ``too_short``, the id it repeats).
    """
    normal = {key: normalise(text) for key, text in texts}
    rejects = [
        (key, "too_short", f"{len(text)} letters")
        for key, text in sorted(normal.items())
        if len(text) < _MIN_CHARS
    ]
    dropped = {key for key, _, _ in rejects}
    for reverse in (False, True):
        rows = [(text[::-1] if reverse else text, key) for key, text in normal.items() if key not in dropped]
        rows.sort(key=lambda row: row[1], reverse=True)  # of equal texts the smallest id stays last
        rows.sort(key=lambda row: row[0])
        for at, (text, key) in enumerate(rows):
            for other, keeper in rows[at + 1 : at + 1 + _WINDOW]:
                if text in other:
                    rejects.append((key, "near_duplicate", keeper))
                    dropped.add(key)
                    break
    return rejects


def query_rejects(
    queries: Iterable[tuple[str, str]], *, max_words: int, taken: Iterable[str] = ()
) -> list[Reject]:
    """Training queries to drop: empty, too long, or a repetition of an earlier or a taken one.

    queries: (id, text) in order of preference; taken: texts of judged queries, which a log must
    not hold. Texts are compared folded (case, accents and punctuation apart), digits kept.
    """
    seen = {_fold(text): "a judged query" for text in taken}
    rejects: list[Reject] = []
    for key, text in queries:
        folded = _fold(text)
        if not folded:
            rejects.append((key, "empty", ""))
        elif len(text.split()) > max_words:
            rejects.append((key, "too_long", f"{len(text.split())} words, at most {max_words}"))
        elif folded in seen:
            rejects.append((key, "duplicate", f"{text} (also {seen[folded]})"))
        else:
            seen[folded] = key
    return rejects


def _fold(text: str) -> str:
    text = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    text = regex.sub(r"(?<=[\p{Latin}\p{Greek}\p{Cyrillic}])\p{Mn}+", "", text)
    return " ".join(regex.findall(r"[\p{L}\p{N}\p{M}]+", unicodedata.normalize("NFKC", text).lower()))
