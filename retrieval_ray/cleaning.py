"""A chat model's reply -> the query in it: what stands around a query is taken off.

Nothing is judged here. Where a reply holds no query, what is left of it shows that, and ``checks`` tells.
"""

import json
from itertools import takewhile

import regex

_KEYWORDS = 5  # of a query, as the prompt asks
_TERM_WORDS = 5  # longer lines are no keyword

# --- what models say before a query; ``checks`` knows it too ------------------------------------

NOUN = r"(?:(?:search |user )?quer(?:y|ies)|questions?|claims?|titles?|key ?words?)"
ADJECTIVES = (
    r"(?:(?:an?|the|one|my|your|some|any|such|\d|five|possible|potential|natural|short|specific|suitable|"
    r"relevant|simple|concise|good|general|generated|following|search|user|example|sample|final) )*"
)
PASSAGE = r"(?:the|this) (?:(?:given|provided|above) )?passage"
SOURCE = rf"(?:based on|according to) (?:{PASSAGE}|(?:the|this) (?:(?:given|provided|above) )?text)\b"
SURE = r"(?:sure(?: thing)?|certainly|absolutely|of course|okay|ok|alright|got it|hm+)"
REASONING = r"(?:reasoning|rationale|thought process)\**\s*[:：]"
MAIN_IDEA = rf"(?:the )?main (?:idea|point|topic)(?: of {PASSAGE})?(?: is\b|\**\s*[:：])"
ANNOUNCEMENT = "|".join((
    rf"here(?:['’]?s| is| are) {ADJECTIVES}{NOUN}\b",
    r"here(?:['’]?s| is| are) [^\n]{0,120}?(?=[:：][ \t*_]*(?:\n|\Z))",
    r"here(?:['’]?s| is) what (?:some(?:one|body)|users?|an? \w+|they|you|i) (?:could|might|would|may)\b",
    r"here you (?:go|are)\s*(?=[:!.,])",
    r"how about\s*(?=[:：])",
    rf"(?:an?|the|one|my) {ADJECTIVES}{NOUN} for {PASSAGE} (?:is|are|(?:could|would|might) be)\b",
    r"(?:i(?:['’]d| would)? (?:think|believe|say|suggest|propose)(?: that)? )?"
    rf"(?:an?|the|one|my) {ADJECTIVES}{NOUN}\b[^:：\"“\n]{{0,60}} (?:is|are|be)\s*(?=[:：\"“])",
    r"(?:some(?:one|body)|users?|an? user) (?:could|might|would|may) (?:search|type|ask|enter|query)\b",
    r"i(?:['’]d| would) be (?:happy|glad) to (?:help|assist)\b",
    r"i(?:['’]ll| can| will) (?:help|assist)(?: you)? with (?:that|this)\b",
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
))  # fmt: skip
_ELSEWHERE = (  # what models write before a colon in other languages
    "frage|(?:such)?anfrage|titel|behauptung|stichw[oö]rter|schlüsselwörter|antwort|pregunta|consulta|"
    "título|afirmación|palabras clave|respuesta|requête|titre|mots[- ]clés|affirmation|réponse|domanda|"
    "titolo|parole chiave|risposta|pergunta|palavras-chave|resposta|вопрос|(?:поисковый )?запрос|"
    "заголовок|утверждение|ключевые слова|ответ|问题|問題|(?:搜索)?查询|查詢|标题|標題|关键词|關鍵詞|答案|"
    "質問|(?:検索)?クエリ|タイトル|キーワード|回答|질문|검색어|제목|키워드|답변|ال(?:سؤال|عنوان)|سؤال|عنوان|"
    "คำถาม|คำค้นหา"
)
_NAMED = (
    rf"(?:{ADJECTIVES}(?:{NOUN}|answer|output|response|reply)(?: for (?:the|this) passage)?(?: \d)?|q"
    rf"|{_ELSEWHERE})"
)
_LABEL = regex.compile(
    rf"\A(?:{_NAMED}\s*[:：]|\*\*{_NAMED}\*\*\s*[:：]|\*\*{_NAMED}\s*[:：]\s*\*\*"
    rf"|(?:#{{1,6}}[ \t]+|\*\*){_NAMED}(?:\*\*)?[ \t]*\n)\s*",  # a heading, which has a line of its own
    regex.I,
)
# Without marks, alone on the first line. Keywords may be such words themselves, each on a line of its own.
_TITLED = regex.compile(rf"\A(?:{NOUN}|{_ELSEWHERE})[ \t]*\n\s*", regex.I)
_TITLED_KEYWORDS = regex.compile(r"\Akey ?words?[ \t]*\n\s*", regex.I)
# What goes with an announcement: the rest up to a colon, an opening quote or the line's end.
_REST = r"""(?:[^:：\n"“«]{0,120}(?:[:：][*_]*|(?=["“«]))|[^\n]*\n)"""
_OPENING = regex.compile(
    r"\A[*_\s]*(?:"
    rf"(?:{SURE}[\s,.!:–—-]+)?(?:{SOURCE}[^,:\n]{{0,40}},\s*)?(?:{ANNOUNCEMENT}){_REST}"
    rf"|{MAIN_IDEA}(?:[^\n]*\n|[^\n]*?[.!?*]\s+(?=\**{_NAMED}\s*[:：]))"
    r"|(?:sure(?: thing)?|certainly|absolutely)!"
    # reasons on any number of lines before a label, or on one before the only other line
    rf"|(?:{REASONING}|(?:thoughts?|thinking|analysis|explanation)\**\s*[:：])"
    rf"(?:(?:[^\n]*\n\s*+)+?(?=[*_#]*[ \t]*{_NAMED}\**\s*[:：])|[^\n]*?[.!?*]\s+(?=\**{_NAMED}\s*[:：]))"
    rf"|{REASONING}[^\n]*\n\s*+(?=[^\n]*\Z)"
    rf"|{SURE}(?:[,.!]*[ \t]*|[,.!][^\n]{{0,120}}[:：][*_ \t]*)\n"
    r")\s*(?=.*\w)",  # where nothing follows, it stays, and tells what the reply is
    regex.S | regex.I,
)

# --- what models say after it -------------------------------------------------------------------

CANNOT = (
    r"(?:i['’]?m (?:unable|not able) to|(?:i|we) (?:cannot|can['’]?t|can not|won['’]?t|will not|could not"
    r"|couldn['’]?t|do not|don['’]?t|am (?:unable|not able) to|(?:will not|won['’]?t) be able to))"
)
_CLOSING = (
    r"\(?(?:please )?(?:let me know (?:if|whether|when|how|what)|feel free to|would you like (?:me|another)"
    r"|(?:i )?hope (?:this|that|it) (?:helps|works|meets|is)|is there (?:any|some)thing else"
    r"|(?:this|the) (?:query|question|claim|title) (?:is|asks|captures|covers|reflects|focuses|addresses)"
    r"|these keywords|(?:note|explanation|rationale|reasoning)\s*[:：])"
)
# After "I cannot" it stays: it helps to tell a refusal.
_CLOSED = regex.compile(rf"\A(?!{CANNOT}\b).*?(?<=[.?!\"”»*)])\K\s+{_CLOSING}.*\Z", regex.I)
_CLOSING_LINE = regex.compile(_CLOSING, regex.I)

# --- what chat templates and reasoning leave ----------------------------------------------------

_TOKEN = r"(?:<\|[\w ]{1,40}\|>|<｜[^<>]{1,40}｜>|</?s>|<(?:start|end)_of_turn>|<(?:bos|eos|pad)>|\[/?INST\])"
_HEADER = regex.compile(
    rf"\A\s*(?:{_TOKEN}\s*(?:(?:assistant|model)[ \t]*(?:[:\n]\s*|(?={_TOKEN})))?)*"
    r"(?:assistant[ \t]*[:\n]\s*)?",
    regex.I,
)
# In the middle of a line only where no space is before it: "what does <|endoftext|> mean" is a query.
_TURN_END = regex.compile(
    rf"(?:(?<!\s)\s*+{_TOKEN}(?=[ \t]*(?:\n|\Z|{_TOKEN}))|(?<=\S)(?:<\|[\w ]{{1,40}}\|>|<end_of_turn>)).*\Z",
    regex.S,
)
# Also where the template wrote the opening tag: then the closing one ends a line or a sentence, or stands
# close to what follows. A thought that does not end is left to be seen.
_THOUGHT = regex.compile(
    r"\A\s*<(think(?:ing)?|thought|reasoning)>.*?</\1>|\A(?!<think).*?</think(?:ing)?>[ \t]*(?:\n|\Z)"
    r"|\A(?:(?!</?think).)*?(?:[.!?…]\s*</think(?:ing)?>|(?<![\"'`“‘«(/])</think(?:ing)?>(?=[\w\"“«「*{¿<]))",
    regex.S | regex.I,
)
# OpenAI's harmony format: thoughts in one channel, the reply in another. Where its tokens were taken out,
# "analysisWe need ...assistantfinalHow is ..." is left.
_TO_CHANNEL = r"\A\s*(?:<\|start\|>\s*assistant\s*)?<\|channel\|>\s*"
_FINAL = regex.compile(
    rf"{_TO_CHANNEL}(?:(?:analysis|commentary)\b.*?<\|channel\|>\s*)?"
    r"final\b[^\n<]{0,40}(?:<\|constrain\|>[^\n<]{0,40})?<\|message\|>"
    r"|\A\s*(?:(?:analysis|commentary).*?)?assistantfinal(?:\s?json(?=\s*\{))?",
    regex.S,
)
_ANALYSIS = regex.compile(
    rf"{_TO_CHANNEL}(?:analysis|commentary)\b(?:[^\n<]{{0,40}}<\|message\|>)?"
    r"|\A\s*analysis(?=(?:We|I|They|The|User|Let|So|Need|Must|Okay|Passage|Main)\b)"
)

# --- markup -------------------------------------------------------------------------------------

_FENCE = regex.compile(r"\A```(?:\w*[ \t]*\n)?(.*?)(?:```.*)?\Z", regex.S)
_CUT_JSON = regex.compile(r'\A(?:\{\s*"(?:\w*\Z|\w+"\s*(?::|\Z))|\[\s*(?:"|\{\s*"))')
_WRAPPER = regex.compile(r"\A<([a-z_]+)>\s*((?:(?!</?\1>).)+?)\s*</\1>\Z", regex.S | regex.I)
# Of a tag that is not closed, or with more behind it; but "<query> element in xml", "<title> tag".
_TAG = r"(?:(?:search_|user_)?(?:query|question)|claim|keywords|answer)"
_TAGGED = (
    (
        rf"\A<({_TAG}|title)>\s*((?:(?!</?\1>).)*?)\s*</\1>(?:[ \t]*(?:\n|\Z)|\s+{_CLOSING}).*\Z",
        r"\2",
    ),
    (rf"\A<(?:{_TAG}|title)>(?!.*</?(?:{_TAG}|title)>)(?:[ \t]*\n\s*|(?=[\w\"“«「*¿]))", ""),
    (rf"\A<{_TAG}>(?!.*</?{_TAG}>)[ \t]+(?=(?-i:\p{{Lu}}))", ""),
    (rf"\A((?:(?!</?{_TAG}>).)*[^\s<>\"'`])</{_TAG}>[ \t]*(?:\n.*)?\Z", r"\1"),
)
_TAGS = tuple((regex.compile(pattern, regex.S | regex.I), inside) for pattern, inside in _TAGGED)
# "1. Weltkrieg" is no list; a list goes on with its second line. "# in url" is no heading.
_BULLET = regex.compile(
    r"\A(?:[-*•·–]\s+|\d{1,2}\)\s+|1\.\s+(?=.*\n\s*2\.)|#{1,6}\s+(?=[\p{Lu}*])|#{2,6}\s+)", regex.S
)
_ITEM = regex.compile(r"\A(?:[-*•·–]|\d{1,2}[.)])\s+")
_SEPARATORS = ",;、，；،"
# Not the comma of 1,000; nor a bar or dot within a word.
_SEPARATOR = regex.compile(rf"(?<!\d),|,(?!\d)|[{_SEPARATORS[1:]}]|(?<!\S)[|•·](?!\S)")
_KEYWORD_END = regex.compile(rf"\n|{_SEPARATOR.pattern}")
_MARKUP = (
    (regex.compile(r"\A(\*{1,3})(?!\s)([^*]+)(?<!\s)\1\Z"), r"\2"),
    (regex.compile(r"(?<![\w*])\*\*([\p{L}\p{N}\"“][^*]*)(?<!\s)\*\*(?![\w*])"), r"\1"),
    (regex.compile(r"\A(_{1,2})([^\s_][^_]*\s[^_]*)(?<!\s)\1\Z"), r"\2"),  # but __init__
    (regex.compile(r"\A``([^`]+)(?:``|'')\Z"), r"\1"),
    (
        regex.compile(
            r"<(b|i|u|em|strong|mark|code|small|span|sub|sup|p|q|keyword|h[1-6])>((?:(?!</?\1>).)*)</\1>",
            regex.I,
        ),
        r"\2",
    ),
)
_QUOTES = {
    '""', "''", "``", "“”", "””", "„“", "„”", "‘’", "’’", "‚‘", "«»", "»«", "‹›", "›‹", "「」", "『』",
    "《》", "〈〉", "〝〟", "＂＂",
}  # fmt: skip
_STOPPED = tuple(marks[1] + stop for marks in _QUOTES for stop in ".,")
_APOSTROPHE = regex.compile(r"(?<=\p{L})['’](?=\p{L})")
_LINE_END = regex.compile(r"\r\n?|\n")  # Unicode's other separators are blanks
_INVISIBLE = regex.compile(r"[\p{Cc}\p{Cs}\u200b\u2060\ufeff\ufffd]")


def clean(reply: str, kind: str) -> str:
    """The query in a reply, on one line and without what stands around it.

    Of several lines or a list's items the first one counts; of keywords all are taken, up to five.
    """
    before = ""
    text: str = _LINE_END.sub("\n", reply)
    while text != before:  # a label in quotes, quotes in a label ...
        before, text = text, _unwrapped(text, kind)
    return text


def finished(reply: str, kind: str) -> str:
    """What is whole in a reply that was cut: all lines but the last one; of keywords all but the last."""
    ends = (_KEYWORD_END if kind == "keywords" else _LINE_END).finditer(reply)
    return reply[: max((end.end() for end in ends), default=0)]


def _unwrapped(text: str, kind: str) -> str:
    """The line that counts, without one layer of what stands around it."""
    text = _ANALYSIS.sub("<think>", _FINAL.sub("", text))
    text = _TURN_END.sub("", _HEADER.sub("", text))
    text = _THOUGHT.sub("", text).strip()
    text = _in_json(_FENCE.sub(r"\1", text).strip()).strip()
    text = _WRAPPER.sub(r"\2", text)
    for tag, inside in _TAGS:
        text = tag.sub(inside, text)
    text = _LABEL.sub("", _OPENING.sub("", text))
    text = (_TITLED_KEYWORDS if kind == "keywords" else _TITLED).sub("", text)
    lines = _lines(text)
    if kind == "keywords":
        lines = [_keywords(lines)]
    lines = _lines(_LABEL.sub("", _BULLET.sub("", "\n".join(lines))))
    return _bare(_CLOSED.sub("", lines[0])) if lines else ""


def _lines(text: str) -> list[str]:
    """The lines that say something, without what cannot be seen."""
    lines = (" ".join(_INVISIBLE.sub(" ", line).split()) for line in _LINE_END.split(text))
    return [line for line in lines if any(character.isalnum() for character in line)]


def _keywords(lines: list[str]) -> str:
    """The keywords of a list, of short lines, or of the first line alone: five at most, none twice."""
    listed = list(takewhile(_ITEM.match, lines))
    if len(listed) > 1:
        lines = [_ITEM.sub("", line) for line in listed]
    elif lines:
        first, *rest = lines
        goes_on = first[-1] in f"{_SEPARATORS}|" or (_is_term(first) and not _SEPARATOR.search(first))
        lines = [first, *takewhile(_is_term, rest)] if goes_on else [first]
    found: dict[str, str] = {}
    for line in lines:
        for part in _SEPARATOR.split(_bare(line)):
            if item := _bare(part.strip()):
                found.setdefault(item.casefold(), item)
    return ", ".join(list(found.values())[:_KEYWORDS])


def _is_term(line: str) -> bool:
    """Whether a line may hold keywords, and is no sentence about them."""
    short = all(len(item.split()) <= _TERM_WORDS for item in _SEPARATOR.split(line))
    return short and line[-1] not in ".!?:" and not _CLOSING_LINE.match(line)


def _bare(line: str) -> str:
    """A line without markup and without one pair of quotes around it."""
    for pattern, plain in _MARKUP:
        line = pattern.sub(plain, line)
    quoted = line[:-1] if line.endswith(_STOPPED) else line
    if len(quoted) < 2 or quoted[0] + quoted[-1] not in _QUOTES:
        return line
    inside = quoted[1:-1]
    apart = _APOSTROPHE.sub("", inside)
    return line if quoted[0] in apart or quoted[-1] in apart else inside.strip()


def _in_json(text: str) -> str:
    """The texts in a JSON object or list, a line for each; nothing where it is cut off or holds none."""
    if not text.startswith(("{", "[")):
        return text
    try:
        held, end = json.JSONDecoder(strict=False).raw_decode(text)
        found = "\n".join(_texts(held))
    except (ValueError, RecursionError):
        return "" if _CUT_JSON.match(text) else text
    # Behind '["a", "b"] to dataframe' is no list of queries.
    alone = not text[end:].partition("\n")[0].strip() or (isinstance(held, dict) and "query" in held)
    if found and alone:
        return found
    return "" if end == len(text) else text


def _texts(held: object) -> list[str]:
    """Those of a list, of an object's ``query``, or of the one thing that it holds."""
    if isinstance(held, dict):
        held = held.get("query", next(iter(held.values())) if len(held) == 1 else None)
    if isinstance(held, list):
        return [text for item in held for text in _texts(item)]
    return [held] if isinstance(held, str) else []
