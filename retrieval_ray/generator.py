"""Writes queries for passages, without Ray. This module holds the kinds that need no model.

Every kind is a function from passages to ``Written`` rows; an LLM's queries are not written here yet.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import regex

from retrieval_ray.artifacts import digest
from retrieval_ray.words import STOPWORDS, UNSPACED, surface_words

EXTRACTIVE_VERSION = "extractive-2"
EXTRACTIVE_KINDS = ("title", "span", "keywords")
_SENTENCE_END = regex.compile(r"(?<=[.!?])\s+|(?<=[。！？\n])\s*")
_SPAN_WORDS = (6, 16)
_KEYWORDS = 5


@dataclass(frozen=True)
class Written:
    """One query written for one passage."""

    query_id: str
    passage_id: str
    kind: str
    text: str


def query_id_of(passage_id: str, kind: str, version: str) -> str:
    """Ids are hashes of passage, kind and prompt version, so a rerun gives the same ids."""
    return f"{kind}-{digest([passage_id, kind, version])[:16]}"


def document_frequencies(texts: Iterable[str]) -> tuple[Counter[str], int]:
    """In how many texts each word stands, and how many texts there are."""
    counts: Counter[str] = Counter()
    total = 0
    for text in texts:
        counts.update(set(surface_words(text)))
        total += 1
    return counts, total


def extractive(
    passages: Iterable[tuple[str, str, str]],
    frequencies: Mapping[str, int],
    total: int,
    *,
    kinds: Iterable[str] = EXTRACTIVE_KINDS,
) -> Iterator[Written]:
    """Queries cut out of the passage itself: its title, its most telling span, its key terms.

    passages: (passage_id, title, text). A kind that a passage cannot give is left out.
    """
    chosen = tuple(kinds)
    for passage_id, title, text in passages:
        found = {
            "title": title.strip(),
            "span": _salient_span(text, frequencies, total),
            "keywords": _key_terms(f"{title} {text}", frequencies, total),
        }
        for kind in chosen:
            if found[kind]:
                key = query_id_of(passage_id, kind, EXTRACTIVE_VERSION)
                yield Written(key, passage_id, kind, found[kind])


def _rarity(word: str, frequencies: Mapping[str, int], total: int) -> float:
    """Inverse document frequency; stop words and single characters say nothing."""
    if word in STOPWORDS or len(word) < 2:
        return 0.0
    return math.log((total + 1) / (frequencies.get(word, 0) + 1))


def _salient_span(text: str, frequencies: Mapping[str, int], total: int) -> str:
    """The sentence with the highest mean rarity of its words, cut to at most 16 words.

    In unspaced scripts the cut is by characters.
    """
    best, best_score = "", 0.0
    for sentence in _SENTENCE_END.split(text):
        words = surface_words(sentence)
        if len(words) < _SPAN_WORDS[0]:
            continue
        rarity = [_rarity(word, frequencies, total) for word in words]
        score = sum(rarity) / len(rarity)
        if score > best_score:
            best, best_score = sentence.strip(), score
    spaced = best.split()
    if len(spaced) >= _SPAN_WORDS[0] and not UNSPACED.search(best):
        return " ".join(spaced[: _SPAN_WORDS[1]])
    span = ""
    for cluster in regex.findall(r"\X", best):  # never a letter without its marks
        if len(span) + len(cluster) > 3 * _SPAN_WORDS[1]:
            break
        span += cluster
    return span


def _key_terms(text: str, frequencies: Mapping[str, int], total: int) -> str:
    """The five words with the highest tf-idf, in the order in which they first stand."""
    words = surface_words(text)
    counts = Counter(words)
    weights = {word: counts[word] * _rarity(word, frequencies, total) for word in counts}
    ranked = sorted((word for word in weights if weights[word] > 0), key=lambda w: (-weights[w], w))
    chosen = set(ranked[:_KEYWORDS])
    return " ".join(dict.fromkeys(word for word in words if word in chosen))
