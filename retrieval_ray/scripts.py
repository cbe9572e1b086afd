"""Which script a text is written in, and which one a language is written in."""

import functools
from collections import Counter

import regex

from retrieval_ray.words import surface_words

_CODES = {
    "Cyrillic": "ru rus uk ukr be bel bg bul mk mkd ky kir tg tgk", "Greek": "el ell gre",
    "Arabic": "ar ara arb fa fas per ur urd ps pus ckb ug uig", "Hebrew": "he heb yi yid",
    "Devanagari": "hi hin mr mar ne nep sa san", "Bengali": "bn ben as asm", "Tamil": "ta tam",
    "Telugu": "te tel", "Kannada": "kn kan", "Malayalam": "ml mal", "Gujarati": "gu guj", "Oriya": "or ori",
    "Gurmukhi": "pa pan", "Sinhala": "si sin", "Thai": "th tha", "Lao": "lo lao", "Khmer": "km khm",
    "Myanmar": "my mya bur", "Tibetan": "bo bod dz dzo", "Hangul": "ko kor", "Han": "zh zho chi yue",
    "Kana": "ja jpn", "Georgian": "ka kat geo", "Armenian": "hy hye arm", "Ethiopic": "am amh ti tir",
    "Thaana": "dv div",
}  # fmt: skip
_NAMES = {
    "Cyrillic": "russian ukrainian belarusian bulgarian macedonian kyrgyz tajik", "Greek": "greek",
    "Arabic": "arabic persian farsi dari urdu pashto uyghur", "Hebrew": "hebrew yiddish",
    "Devanagari": "hindi marathi nepali sanskrit", "Bengali": "bengali bangla assamese",
    "Tamil": "tamil", "Telugu": "telugu", "Kannada": "kannada", "Malayalam": "malayalam",
    "Gujarati": "gujarati", "Oriya": "odia oriya", "Gurmukhi": "punjabi", "Sinhala": "sinhala sinhalese",
    "Thai": "thai", "Lao": "lao", "Khmer": "khmer", "Myanmar": "burmese", "Tibetan": "tibetan dzongkha",
    "Hangul": "korean", "Han": "chinese mandarin cantonese", "Kana": "japanese", "Georgian": "georgian",
    "Armenian": "armenian", "Ethiopic": "amharic tigrinya", "Thaana": "dhivehi divehi",
}  # fmt: skip
# Written in more than one script: nothing can be asked of them.
_SEVERAL = set(
    "sr srp serbian bs bos bosnian kk kaz kazakh uz uzb uzbek az aze azerbaijani mn mon mongolian "
    "ku kur kurdish tt tat tatar sd snd sindhi ha hausa".split()
)
_SUBTAGS = {"latn": "Latin", "cyrl": "Cyrillic", "arab": "Arabic", "deva": "Devanagari"}
_SCRIPT_OF = {word: script for t in (_CODES, _NAMES) for script, words in t.items() for word in words.split()}
_LETTER = regex.compile(
    r"(?P<Latin>\p{Latin})|(?P<Kana>[\p{Hiragana}\p{Katakana}])|"
    + "|".join(rf"(?P<{name}>\p{{{name}}})" for name in _CODES if name != "Kana")
)


def script_of(text: str) -> str | None:
    """The script of most words of a text; None where it has no letters."""
    counts = _scripts(text)
    return max(counts, key=lambda name: counts[name]) if counts else None


def script_of_language(language: str) -> str | None:
    """The script of a language, given as a name or a code; None where it has several.

    Latin where nothing else is known: a language of another script must be known by name, by code, or by
    its own name for itself ("日本語").
    """
    code, *subtags = regex.split(r"[-_]", language.lower())
    keys = [code, *regex.findall(r"\w{4,}", language.lower())]  # "Simplified Chinese"
    known = [_SUBTAGS[tag] for tag in subtags if tag in _SUBTAGS]
    known += [_SCRIPT_OF[key] for key in keys if key in _SCRIPT_OF]
    if known:
        return known[0]
    return None if _SEVERAL.intersection(keys) else script_of(language)


def written_in(text: str) -> set[str | None]:
    """The scripts that a text counts as written in.

    Latin names and terms stand in texts of every language ("как установить PostgreSQL на Ubuntu"), so a
    fifth of the words is enough for another script, while Latin must have half.
    """
    counts = _scripts(text)
    least = {"Latin": 0.5 * counts.total()}
    return {name for name, count in counts.items() if count >= least.get(name, 0.2 * counts.total())}


def _scripts(text: str) -> Counter[str]:
    """How many words of a text are in each script. With any kana in it, Han is Japanese too."""
    counts: Counter[str] = Counter()
    for word in surface_words(text):
        found = [script for letter in word if (script := _script_of_letter(letter))]
        if found:
            counts["Kana" if "Kana" in found else found[0]] += 1
    if counts["Kana"]:
        counts["Kana"] += counts.pop("Han", 0)
    return +counts


@functools.cache
def _script_of_letter(letter: str) -> str | None:
    found = _LETTER.match(letter)
    return found.lastgroup if found else None
