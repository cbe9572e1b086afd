"""An LLM's reply -> a query, cleaned; or a reason to drop it."""

import json
import unicodedata
from dataclasses import dataclass

import regex

from retrieval_ray.scripts import script_of, script_of_language, written_in
from retrieval_ray.words import UNSPACED, surface_words

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
    cut: bool = False  # at the limit of tokens, so it may lack its end


# --- what stands around a query -----------------------------------------------------------------

# Thoughts, also where the reply ended before they did, or where the template wrote the opening tag.
_THOUGHT = regex.compile(
    r"\A\s*<(think(?:ing)?|thought|reasoning)>.*?(?:</\1>|\Z)|\A.*?</think(?:ing)?>[ \t]*(?:\n|\Z)",
    regex.S | regex.I,
)
_FENCE = regex.compile(r"\A```(?:\w*[ \t]*\n)?(.*?)(?:```.*)?\Z", regex.S)
_OBJECT = regex.compile(r'\A\{\s*"(?:\w*\Z|\w+"\s*(?::|\Z))')
_INVISIBLE = regex.compile(r"[\p{Cc}\p{Cs}\u200b\u2060\ufeff\ufffd]")
_NOUN = r"(?:(?:search |user )?quer(?:y|ies)|questions?|claims?|titles?|key ?words?)"
_ADJECTIVES = (
    r"(?:(?:an?|the|one|my|your|some|any|such|\d|five|possible|potential|natural|short|specific|suitable|"
    r"relevant|simple|concise|good|general|generated|following|search|user|example|sample) )*"
)
_ELSEWHERE = (  # what models write before a colon in other languages
    "frage|(?:such)?anfrage|titel|behauptung|stichw[oö]rter|schlüsselwörter|pregunta|consulta|título|"
    "afirmación|palabras clave|requête|titre|mots[- ]clés|affirmation|domanda|titolo|parole chiave|"
    "pergunta|palavras-chave|вопрос|(?:поисковый )?запрос|заголовок|утверждение|ключевые слова|"
    "问题|問題|(?:搜索)?查询|查詢|标题|標題|关键词|關鍵詞|質問|(?:検索)?クエリ|タイトル|キーワード|"
    "질문|검색어|제목|키워드|ال(?:سؤال|عنوان)|سؤال|عنوان|คำถาม|คำค้นหา"
)
_NAMED = rf"(?:{_ADJECTIVES}{_NOUN}(?: for (?:the|this) passage)?(?: \d)?|q|{_ELSEWHERE})"
_LABEL = regex.compile(
    rf"\A(?:{_NAMED}\s*[:：]|\*\*{_NAMED}\*\*\s*[:：]|\*\*{_NAMED}\s*[:：]\s*\*\*)\s*", regex.I
)
# "1. Weltkrieg" is no list; a list goes on with its second line. "# in url" is no heading.
_BULLET = regex.compile(
    r"\A(?:[-*•·–]\s+|\d{1,2}\)\s+|1\.\s+(?=.*\n\s*2\.)|#{1,6}\s+(?=[\p{Lu}*])|#{2,6}\s+)", regex.S
)
_EMPHASIS = regex.compile(r"\A(\*{1,3})(?!\s)([^*]+)(?<!\s)\1\Z")
_QUOTES = {
    '""', "''", "``", "“”", "””", "„“", "„”", "‘’", "’’", "‚‘", "«»", "»«", "‹›", "›‹", "「」", "『』",
}  # fmt: skip
_APOSTROPHE = regex.compile(r"(?<=\p{L})['’](?=\p{L})")

# --- what is no query ---------------------------------------------------------------------------


def _begins(*alternatives: str) -> regex.Pattern[str]:
    return regex.compile(rf"\A(?:{'|'.join(alternatives)})", regex.I)


_PASSAGE = r"(?:the|this) (?:(?:given|provided|above) )?passage"
_PREAMBLE = _begins(
    r"(?:sure(?: thing)?|certainly|absolutely)!",
    r"(?:sure|certainly|of course|absolutely|okay|ok|alright|got it|hm+)\s*"
    r"(?:\Z|[,.!:–—-]+\s*(?:\Z|(?:here|i|let|so|the user|we|below|now)\b)"
    rf"|here(?:['’]?s| is| are) {_ADJECTIVES}{_NOUN}\b)",
    rf"here(?:['’]?s| is| are) (?:{_ADJECTIVES}{_NOUN}\b|.*[:：]\Z)",
    r"here(?:['’]?s| is| are) what (?:some(?:one|body)|users?|an? \w+|they|you|i)\b",
    r"here you (?:go|are)\s*[:!.,]",
    rf"(?:an?|the|one|my) {_ADJECTIVES}{_NOUN} for {_PASSAGE} (?:is|are|(?:could|would|might) be)\b",
    rf"(?:an?|the|one|my) {_ADJECTIVES}{_NOUN}\b[^:：\"“]{{0,60}} (?:is|are|be)\s*[:：\"“]",
    rf"(?:based on|according to) (?:{_PASSAGE}|(?:the|this) (?:(?:given|provided|above) )?text)\b",
    rf"{_PASSAGE} (?:states|says|describes|discusses|explains|mentions|suggests|supports|is about)\b",
    r"(?:some(?:one|body)|users?|an? user) (?:could|might|would|may) (?:search|type|ask|enter|query)\b",
    r"(?:we|i) (?:need|have|want) to (?:write|produce|generate|create|output|come up with) "
    rf"{_ADJECTIVES}{_NOUN} (?:for|about|that|based)\b",
    r"the user (?:wants|is asking|has provided|provided)\b",
    # and in other languages
    r"voici (?:\S+ ){0,3}(?:requête|question|titre|affirmation|mots)",
    r"hier (?:ist|sind) (?:\S+ ){0,3}(?:frage|(?:such)?anfrage|titel|behauptung|stichw|schlüsselw)",
    r"aquí (?:está|están|tienes|hay) (?:\S+ ){0,3}(?:pregunta|consulta|título|afirmación|palabras)",
    r"aqui est(?:á|ão) (?:\S+ ){0,3}(?:pergunta|consulta|título|palavras)",
    r"ecco (?:\S+ ){0,3}(?:domanda|titolo|affermazione|parole)",
    r"вот (?:\S+ ){0,3}(?:вопрос|запрос|заголовок|утверждение|ключевые)",
    r"(?:好的?[，,。！!]\s*)?(?:以下|下面|这|這)(?:是|为|為).{0,12}(?:问题|問題|查询|查詢|标题|標題|关键词|關鍵詞)",
    r"以下[はがのに].{0,12}(?:質問|クエリ|タイトル|キーワード)",
    r"다음은 .{0,12}(?:질문|검색어|제목|키워드)",
    r"(?:إليك|فيما يلي|هذا هو) .{0,12}(?:سؤال|عنوان|استعلام)",
)
# "I can not boot my laptop" is a query, so a refusal is told by what cannot be done, not by "I cannot".
_CANNOT = (
    r"(?:i['’]?m (?:unable|not able) to|(?:i|we) (?:cannot|can['’]?t|can not|won['’]?t|will not|could not"
    r"|couldn['’]?t|do not|don['’]?t|am (?:unable|not able) to))"
)
_WRITE = (
    r"(?:generate|write|create|provide|produce|formulate|offer|come up with|craft|compose|suggest|answer"
    r"|extract|derive|fulfil?l?|complete|process)"
)
_HELP = (
    r"(?:(?:assist|help)(?: you)? with (?:that|this|your request|(?:creat|generat|writ)ing)"
    r"|comply with (?:that|this|your))\b"
)
_SORRY = (
    r"(?:(?:i['’]?m|i am) (?:(?:so|very|really) )?(?:sorry|afraid)|sorry|(?:my )?apologies|i apologi[sz]e"
    r"|unfortunately|regrettably)(?: for (?:the|any) \w+)?"
)
_REFUSAL = _begins(
    rf"{_CANNOT} {_HELP}",
    rf"{_CANNOT} {_WRITE} (?:{_ADJECTIVES}(?:{_NOUN}|content|response)|(?:this|that|your) request)\s*"
    rf"(?:[.,;:!]|\Z|(?:for|from|about|on|using|based on) {_PASSAGE}|(?:for|based on) (?:this|that|such)\b"
    r"|that (?:is|would|could|promotes?|contains?|depicts?|involves?)\b)",
    rf"{_SORRY}(?:[.!,]?\s*but|[.,!])\Z",
    rf"{_SORRY}[,.:;!–—-]*\s*(?:but |that )?{_CANNOT} (?:{_WRITE}|{_HELP}|continue|do that|have enough)\b",
    rf"{_SORRY}[,.:;!–—-]*\s*(?:but |that )?(?:{_PASSAGE}|no {_NOUN} can|as an? ai)\b",
    rf"{_SORRY}[,.:;!–—-]*\s*(?:but )?there (?:is|are) (?:no|not)\b.*\b(?:passage|information)\b",
    r"as an? (?:ai|artificial intelligence|(?:large )?language model)(?: (?:language )?(?:model|assistant))?"
    r"(?:,| i\b)",
    rf"(?:i|we|please|you|there|it|no)\b.{{0,120}}?\b{_PASSAGE}\b(?! (?:of|to|through)\b)",
    r"no passage (?:was|is|has been|provided)\b",
    r"please provide (?:a|the|me with (?:a|the)) (?:passage|text)\b",
    rf"{_PASSAGE}(?: provided| given)? (?:does not|doesn['’]?t|cannot|is too|is not|isn['’]?t|lacks"
    r"|contains (?:no|only)|provides no|appears|seems)\b",
    rf"no {_ADJECTIVES}{_NOUN} (?:can|could) be (?:generated|written|created|formed|derived|formulated)\b",
    rf"\[?(?:n/a|none|not applicable|no {_ADJECTIVES}{_NOUN}(?: (?:available|found|possible))?)[.!]?\]?\Z",
    # and in other languages
    r"lo siento,? (?:pero )?(?:no (?:puedo|es posible)|el (?:texto|pasaje))",
    r"(?:je suis )?désolée?,? (?:mais )?(?:je ne (?:peux|suis)|le (?:texte|passage))",
    r"(?:es )?tut mir leid,? (?:aber )?(?:ich kann|der (?:text|abschnitt)|die passage)",
    r"(?:mi dispiace|spiacente),? (?:ma )?non posso",
    r"(?:desculpe|sinto muito|lamento),? (?:mas )?não posso",
    r"(?:к сожалению|извините|простите),? (?:но )?(?:я не могу|в (?:тексте|отрывке))",
    r"(?:很|非常)?(?:抱歉|对不起|對不起)[，,。！! ]*(?:但是?)?"
    r"(?:我|作为|作為|该|該|这段|這段|无法|無法|不能)",
    r"(?:大変)?申し訳(?:ありません|ございません)[がけ、。]",
    r"죄송(?:합니다만?|하지만)[.,!]? ?(?:저는|이 |해당|제공|요청|도와)",
    r"(?:عذر[ًا]+|آسف|أعتذر)[،,]? (?:لا|لكن|ولكن)",
)
_HEAD = 500  # characters of a passage that tell its script
_LEAST_COPIED = 5  # words: shorter queries share their words with the passage by nature


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
    wanted = {script_of_language(language)} if language else written_in(passage[:_HEAD])
    if "Kana" in wanted or ("Han" in wanted and not language):
        wanted = {*wanted, "Kana", "Han"}  # Japanese may be written in Han alone
    written = written_in(query)
    if written and wanted and None not in wanted and not written & wanted:
        names = " or ".join(sorted(str(name) for name in wanted))
        return "other_script", f"{script_of(query)}, not {names}: {query[:200]}"
    if is_copied(query, passage, max_copied):
        return "copied", query[:200]
    return query


def is_copied(query: str, passage: str, max_copied: float) -> bool:
    """Whether one unbroken run of more than this share of the query's words stands in the passage.

    Queries of fewer than five words share them with the passage by nature and never count; in scripts
    without spaces, where words are pairs of characters, fewer than ten.
    """
    words = surface_words(query)
    run = next((run for run in range(1, len(words) + 1) if run / len(words) > max_copied), None)
    if run is None or len(words) < _LEAST_COPIED * (2 if UNSPACED.search(query) else 1):
        return False
    # What stands in every run is looked for first: to find the passage's words takes most of the time.
    plain = regex.sub(r"\p{Cf}", "", unicodedata.normalize("NFKC", passage).lower())
    if any(word not in plain for word in words[len(words) - run : run]):
        return False
    spaced = f" {' '.join(surface_words(passage))} "
    return any(f" {' '.join(words[at : at + run])} " in spaced for at in range(len(words) - run + 1))


def _clean(reply: str) -> str:
    text, before = reply, ""
    while text != before:  # a label in quotes, quotes in a label ...
        before, text = text, _unwrapped(text)
    return text


def _unwrapped(text: str) -> str:
    """The first line that says something, without one layer of what stands around it."""
    text = _THOUGHT.sub("", text).strip()
    text = _in_object(_FENCE.sub(r"\1", text).strip())
    text = _LABEL.sub("", _BULLET.sub("", text))
    lines = (" ".join(_INVISIBLE.sub(" ", line).split()) for line in text.splitlines())
    text = next((line for line in lines if any(character.isalnum() for character in line)), "")
    text = _EMPHASIS.sub(r"\2", text)
    inside = text[1:-1]
    apart = _APOSTROPHE.sub("", inside)
    quoted = text[:1] + text[-1:] in _QUOTES and text[0] not in apart and text[-1] not in apart
    return inside.strip() if quoted and len(text) > 1 else text


def _in_object(text: str) -> str:
    """The query in a JSON object; nothing where the object is cut off or holds none."""
    if not text.startswith("{"):
        return text
    try:
        row, end = json.JSONDecoder(strict=False).raw_decode(text)
    except (ValueError, RecursionError):
        return "" if _OBJECT.match(text) else text
    held = row.get("query", next(iter(row.values())) if len(row) == 1 else None)
    if isinstance(held, str):
        return held
    return "" if end == len(text) else text
