"""An LLM's reply -> a query, cleaned; or a reason to drop it."""

import json
from dataclasses import dataclass

import regex

from retrieval_ray.words import surface_words

REPLIES_VERSION = "replies-1"
Drop = tuple[str, str]  # reason, detail


@dataclass(frozen=True)
class Reply:
    """What came back for a request: a text, or an error that concerns this request alone."""

    query_id: str
    text: str | None
    error: str | None
    tokens_in: int
    tokens_out: int


_THOUGHT = regex.compile(r"\A.*?</think>", regex.S)
_LABEL = regex.compile(
    r"\A(?:[-*•]\s+|\d{1,2}[.)]\s+)?(?:\*\*)?(?:search query|user query|query|question|claim|title|keywords)"
    r"(?:\*\*)?\s*[:：]\s*(?:\*\*)?\s*|\A(?:[-*•]|\d{1,2}[.)])\s+",
    regex.I,
)
_NOUN = r"(?:search query|query|question|claim|title|keywords?)"
_PREAMBLE = regex.compile(
    r"\A(?:"
    r"(?:sure|certainly|of course|absolutely|okay|ok)\b[\s,.!:-]*(?:\Z|(?:here|i)\b)"
    r"|here(?:['’]s| is| are)\b"
    rf"|(?:the|a|one) (?:(?:following|possible|natural|short|specific) )*{_NOUN}"
    r"(?:(?: for (?:this|the) passage)(?: is| are| (?:could|would|might) be)\b|(?: is| are)\s*[:\"“])"
    r"|based on (?:the|this) passage\b"
    r")",
    regex.I,
)
_REFUSAL = regex.compile(
    r"\A(?:"
    r"i(?:['’]?m| am) (?:sorry|unable|not able|afraid)|sorry\b|i apologi[sz]e"
    r"|i (?:cannot|can['’]?t|can not|won['’]?t|could not|couldn['’]?t) "
    r"|as an? (?:ai|artificial|large|language)\b"
    r"|(?:unfortunately|regrettably),? (?:i|the passage|this passage)\b"
    r"|(?:the|this) passage (?:does not|doesn['’]?t|cannot|is too|contains no)\b"
    rf"|no {_NOUN} (?:can|could)\b"
    r")",
    regex.I,
)
_QUOTES = ('""', "''", "“”", "‘’", "«»", "„“", "「」", "『』", "``")
_SCRIPTS = {
    "Cyrillic": "ru uk be bg sr mk kk ky mn tg", "Greek": "el", "Arabic": "ar fa ur ps ckb sd ug",
    "Hebrew": "he yi", "Devanagari": "hi mr ne sa", "Bengali": "bn as", "Tamil": "ta", "Telugu": "te",
    "Kannada": "kn", "Malayalam": "ml", "Gujarati": "gu", "Gurmukhi": "pa", "Sinhala": "si", "Thai": "th",
    "Lao": "lo", "Khmer": "km", "Myanmar": "my", "Hangul": "ko", "Han": "zh", "Kana": "ja",
    "Georgian": "ka", "Armenian": "hy", "Ethiopic": "am ti",
}  # fmt: skip
_LANGUAGES = {
    "russian": "ru", "ukrainian": "uk", "bulgarian": "bg", "greek": "el", "arabic": "ar", "persian": "fa",
    "farsi": "fa", "urdu": "ur", "hebrew": "he", "hindi": "hi", "bengali": "bn", "tamil": "ta",
    "telugu": "te", "thai": "th", "korean": "ko", "chinese": "zh", "japanese": "ja", "georgian": "ka",
    "armenian": "hy", "amharic": "am",
}  # fmt: skip
_LETTER_CLASSES = {
    name: regex.compile(
        r"[\p{Han}\p{Hiragana}\p{Katakana}ー]" if name == "Kana" else rf"\p{{{name}}}"
    )
    for name in (*_SCRIPTS, "Latin")
}  # fmt: skip
_LEAST_COPIED = 5  # words: shorter queries share their words with the passage by nature


def script_of(text: str) -> str | None:
    """The script of most letters of a text; None where it has no letters."""
    counts = {name: len(found.findall(text)) for name, found in _LETTER_CLASSES.items()}
    kana = len(regex.findall(r"[\p{Hiragana}\p{Katakana}]", text))
    counts["Kana"] = counts["Kana"] if kana else 0
    name, most = max(counts.items(), key=lambda item: item[1])
    return name if most else None


def script_of_language(language: str) -> str:
    """The script a language is written in; Latin for those that are not known to have another."""
    code = _LANGUAGES.get(language.lower(), regex.split(r"[-_]", language.lower())[0])
    return next((script for script, codes in _SCRIPTS.items() if code in codes.split()), "Latin")


def parse(reply: str, passage: str, *, language: str | None, max_words: int, max_copied: float) -> str | Drop:
    """The query in a reply, cleaned; or (reason, detail) to drop it.

    Reasons: ``empty``, ``refusal``, ``preamble``, ``too_long`` (more than ``max_words`` words),
    ``other_script`` than the language's (None: the passage's), ``copied``: more than the share
    ``max_copied`` of its words are one unbroken run of the passage's words. The reply's first line
    counts (the papers' code drops it, because their prompts lacked the assistant's header).
    """
    query = _clean(reply)
    if not any(character.isalnum() for character in query):
        return "empty", reply[:200]
    if _REFUSAL.match(query):
        return "refusal", query[:200]
    if _PREAMBLE.match(query):
        return "preamble", query[:200]
    if len(query.split()) > max_words or len(surface_words(query)) > 4 * max_words:
        return "too_long", query[:200]
    wanted = script_of_language(language) if language else script_of(passage)
    written = script_of(query)
    related = {wanted, written} <= {"Han", "Kana"}  # Japanese may be written in Han alone
    if wanted and written and written != wanted and not related:
        return "other_script", f"{written}, not {wanted}: {query[:200]}"
    if is_copied(query, passage, max_copied):
        return "copied", query[:200]
    return query


def is_copied(query: str, passage: str, max_copied: float) -> bool:
    """Whether one unbroken run of more than this share of the query's words stands in the passage.

    Queries of fewer than five words share them with the passage by nature and never count.
    """
    words = surface_words(query)
    run = int(max_copied * len(words)) + 1
    if len(words) < _LEAST_COPIED or run > len(words):
        return False
    spaced = f" {' '.join(surface_words(passage))} "
    return any(f" {' '.join(words[at : at + run])} " in spaced for at in range(len(words) - run + 1))


def _clean(reply: str) -> str:
    text = _THOUGHT.sub("", reply).strip()
    if text.startswith("{"):
        try:
            row = json.loads(text)
            text = str(row["query"]) if isinstance(row, dict) and "query" in row else text
        except ValueError:
            pass
    text = next((line for line in text.splitlines() if line.strip()), "")
    text = " ".join(text.split())
    text = _LABEL.sub("", text).strip().removesuffix("**")
    if len(text) > 1 and text[0] + text[-1] in _QUOTES:
        text = text[1:-1]
    return str(text.strip())
