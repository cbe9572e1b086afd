"""Words of any language, for BM25 and for extracting queries.

Scripts written without spaces (Han, kana, Thai, Lao, Khmer, Burmese) have no words to split at;
their runs become overlapping character pairs, the usual choice where no dictionary is at hand.
"""

import functools
import unicodedata

import regex
import Stemmer
from bm25s.stopwords import STOPWORDS_EN

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_RUN = regex.compile(
    rf"(?P<unspaced>[{_UNSPACED}][{_UNSPACED}\p{{M}}ー]*)|[\p{{L}}\p{{N}}][\p{{L}}\p{{N}}\p{{M}}--[{_UNSPACED}]]*",
    regex.V1,
)
UNSPACED = regex.compile(rf"[{_UNSPACED}]")
_INVISIBLE = regex.compile(r"\p{Cf}")  # soft hyphens, joiners: no boundary of a word (UAX 29)
STOPWORDS = frozenset(STOPWORDS_EN)


def surface_words(text: str) -> list[str]:
    """Lower-cased words as they stand in the text; unspaced scripts give character pairs."""
    found: list[str] = []
    folded = _INVISIBLE.sub("", unicodedata.normalize("NFKC", text).lower())
    for match in _RUN.finditer(folded):
        run = match.group()
        if match.group("unspaced"):
            clusters = regex.findall(r"\X", run)  # a base character with its marks
            found += ["".join(clusters[i : i + 2]) for i in range(max(1, len(clusters) - 1))]
        else:
            found.append(run)
    return found


def terms(text: str) -> list[str]:
    """What BM25 indexes: words without English stop words, stemmed (Snowball English)."""
    stem = _stemmer()
    return [str(w) for w in stem.stemWords([w for w in surface_words(text) if w not in STOPWORDS])]


@functools.cache
def _stemmer() -> Stemmer.Stemmer:
    return Stemmer.Stemmer("english")
