"""Whether a text that an LLM wrote is a query that can be used: text in, reason to drop it out."""

import unicodedata

import regex

from retrieval_ray.cleaning import (
    ADJECTIVES,
    ANNOUNCEMENT,
    CANNOT,
    MAIN_IDEA,
    NOUN,
    PASSAGE,
    REASONING,
    SOURCE,
    SURE,
)
from retrieval_ray.scripts import script_of, scripts_of_language, written_in
from retrieval_ray.words import UNSPACED, surface_words

_HEAD = 500  # characters of a passage that tell its script
_WORD_CHARACTERS = 12  # for each word that is allowed
_LEAST_COPIED = 5  # words: shorter queries share their words with the passage by nature
_STUCK = regex.compile(r"(\p{L}{1,3}?)\1{29}")  # "aaaa..." or "hahaha...", thirty times


def _begins(*alternatives: str) -> regex.Pattern[str]:
    return regex.compile(rf"\A(?:{'|'.join(alternatives)})", regex.I)


_THOUGHT = _begins(r"<(?:think(?:ing)?|thought|reasoning)>")
# Said before a query that did not come, or instead of one: what ``clean`` could take off is gone.
_PREAMBLE = _begins(
    rf"{SURE}\s*"
    r"(?:\Z|[,.!:–—-]+\s*(?:\Z|(?:here|i|let|so|the user|we|below|now)\b)"
    rf"|here(?:['’]?s| is| are) {ADJECTIVES}{NOUN}\b)",
    ANNOUNCEMENT,
    MAIN_IDEA,
    REASONING,
    rf"{NOUN}\Z",
    SOURCE,
    rf"{PASSAGE} (?:states|says|describes|discusses|explains|mentions|suggests|supports|is about)\b",
    r"(?:we|i) (?:need|have|want) to (?:write|produce|generate|create|output|come up with) "
    rf"{ADJECTIVES}{NOUN} (?:for|about|that|based)\b",
    r"(?:so,? )?the user (?:wants|is asking|has provided|provided|gave)\b",
)
# "I can not boot my laptop" is a query, so a refusal is told by what cannot be done, not by "I cannot".
_WRITE = (
    r"(?:generate|write|create|provide|produce|formulate|offer|come up with|craft|compose|suggest|answer"
    r"|extract|derive|fulfil?l?|complete|process)"
)
_WRITTEN = rf"(?:{ADJECTIVES}(?:{NOUN}|content|response|material)|(?:this|that|your) request)"
_HARMFUL = (
    r"(?:(?:explicit|sexual(?:ly)?|graphic|hateful|harmful|illegal|dangerous|violent|offensive|abusive"
    r"|inappropriate|discriminatory|pornographic|adult|unethical|criminal)(?:,? or |,? and |, | )){1,4}"
)
_ADVICE = r"(?:advice|diagnos[ie]s|guidance|counsel|recommendations)"
_KNOWLEDGE = r"(?:information|guidance|instructions|assistance|advice|details|resources|support|help)"
_TOPIC = r"(?:topic|subject|matter|theme|issue|person|individual)s?"
_PROFESSIONAL = (
    r"(?:(?:medical|legal|financial|professional|investment|tax|health|psychological)"
    r"(?:,? or |,? and |, | ))+"
)
_TAKE_PART = r"(?:engage|participate|take part) in"
_TALK = r"(?:conversation|discussion|dialogue|behaviou?r|role-?play|activit)(?:s|y|ies)?"
_ENDED = r"\s*(?:[.,;:!]|\Z)"
_HELP = (
    r"(?:(?:assist|help)(?: you)? with (?:that|this|your request|(?:creat|generat|writ)ing)"
    r"|comply with (?:that|this|your))\b"
)
_SORRY = (
    r"(?:(?:i['’]?m|i am) (?:(?:so|very|really) )?(?:sorry|afraid)|sorry|(?:my )?apologies|i apologi[sz]e"
    r"|unfortunately|regrettably)(?: for (?:the|any) \w+)?"
)
_MORE = r"(?:some )?(?:more|additional|further)"
_REFUSAL = _begins(
    rf"{CANNOT} {_HELP}",
    rf"{CANNOT} {_WRITE} {_WRITTEN}\s*"
    rf"(?:[.,;:!]|\Z|(?:for|from|about|on|using|based on) {PASSAGE}|(?:for|based on) (?:this|that|such)\b"
    r"|that (?:is|would|could|promotes?|contains?|depicts?|involves?)\b)",
    rf"{CANNOT} {_WRITE} (?:this|that|it|one|anything)\s*(?:[.,;:!]|\Z)",
    rf"{CANNOT} (?:{_WRITE}|share) (?:any |you )?{_HARMFUL}"
    rf"(?:content|material|text|language|stories|responses?|{NOUN})"
    rf"(?:{_ENDED}| (?:that|about|involving|or)\b)",
    # "I can't provide information about my employer" tells of the user's own affairs
    rf"{CANNOT} (?:{_WRITE}|give|share)(?: you)?(?: with)? (?:any |detailed |specific )*"
    rf"{_KNOWLEDGE}(?:(?:,|,? or|,? and) {_KNOWLEDGE})* (?:on|about|regarding|for|related to|concerning) "
    rf"(?:how (?:to|one)\b|{_HARMFUL}\w|(?:this|that|such)\b"
    r"|(?:(?!\b(?:my|me|our|us)\b)[^.?!])*[.!](?:\s|\Z))",
    rf"{CANNOT} (?:provide|offer|give)(?: you)?(?: with)? (?:any |specific |personal(?:i[sz]ed)? )*"
    rf"{_PROFESSIONAL}{_ADVICE}(?:{_ENDED}| (?:on|about|regarding|or)\b)",
    rf"{CANNOT} (?:write|talk|speak|comment|{_WRITE} {_WRITTEN}) (?:about|on) "
    rf"(?:this|that|such|these|those)(?: (?:\w+ )?{_TOPIC}\b|[.!])",
    rf"{CANNOT} {_TAKE_PART} (?:any )?(?:{_HARMFUL})?{_TALK} (?:that|which) "
    r"(?:is|are|could|can|may|might|would|promot|glorif|involv|encourag|contain|depict|dehumani|incit)",
    rf"{CANNOT} {_TAKE_PART} {_HARMFUL}{_TALK}{_ENDED}",
    rf"{CANNOT} [^?]*[.!] (?:is there (?:some|any)thing else (?:i can|you)"
    r"|(?:can|could|may) i (?:help|assist) (?:you )?with\b"
    r"|i(?:['’]d| would) be (?:happy|glad) to|i(?:['’]m| am) (?:just |only )?an ai\b)",
    rf"{CANNOT} (?:engage (?:in|with)|discuss|support|promote|condone|encourage) "
    r"(?:this|that|such|(?:harmful|hateful|illegal|violent) \w+)\b",
    r"(?:i['’]m|i am|i do not feel|i don['’]t feel) (?:not )?comfortable "
    rf"(?:writing|creating|generating|providing|producing|answering) (?:{_WRITTEN}|this|that|about)\b",
    rf"i (?:must|have to|need to) (?:respectfully )?(?:decline|refuse)\s*(?:[.,;!]|\Z"
    rf"|to {_WRITE} {_WRITTEN})",
    rf"it (?:is|would) not (?:be )?(?:appropriate|possible|ethical)(?: for me)? to {_WRITE} {_WRITTEN}\b",
    rf"{_SORRY}(?:[.!,]?\s*but|[.,!])\Z",
    rf"{_SORRY}[,.:;!–—-]*\s*(?:but |that )?{CANNOT} (?:{_WRITE}|{_HELP}|continue|do that|have enough)\b",
    rf"{_SORRY}[,.:;!–—-]*\s*(?:but |that )?(?:{PASSAGE}|no {NOUN} can|as an? ai)\b",
    rf"{_SORRY}[,.:;!–—-]*\s*(?:but )?there (?:is|are) (?:no|not)\b.*\b(?:passage|information)\b",
    r"as an? (?:ai|artificial intelligence|(?:large )?language model)(?: (?:language )?(?:model|assistant))?"
    r"(?:,| i\b)",
    rf"(?:i|we|please|you|there|it|no)\b.{{0,120}}?\b{PASSAGE}\b(?! (?:of|to|through)\b)",
    r"no passage (?:was|is|has been|provided)\b",
    rf"{PASSAGE}(?: provided| given)? (?:does not|doesn['’]?t|cannot|is too|is not|isn['’]?t|lacks"
    r"|contains (?:no|only)|provides no|appears|seems)\b",
    rf"no {ADJECTIVES}{NOUN} (?:can|could) be (?:generated|written|created|formed|derived|formulated)\b",
    r"(?:there (?:(?:is|was) (?:not |in)|(?:is|was)n['’]t )|not |in)(?:enough|sufficient) (?:\w+ )?"
    r"(?:context|information|details?|content|text)(?: (?:here|provided|given|available|in \w+ \w+))? "
    rf"(?:for me )?to {_WRITE} (?:{_WRITTEN}|(?:this|one)\b)"
    rf"(?:{_ENDED}| (?:for|from|about|on|based|that)\b)",
    r"(?:not enough|insufficient|no) (?:context|information)(?:[.!]|(?: was)? (?:provided|given)[.!]?\Z)",
    rf"\[?(?:n/a|none|null|undefined|no|not applicable"
    rf"|no {ADJECTIVES}{NOUN}(?: (?:available|found|possible))?)[.!]?\]?\Z",
    # what is asked of the user instead; "could you please provide proof of identity" asks somebody else
    r"(?:please|(?:could|can|would|will) you(?: please)?|(?:could|can) i (?:please )?have|i need) "
    r"(?:(?:provide|share|send|paste|supply|give)(?: me)?(?: with)? )?(?:"
    r"(?:the|a|an|more|your)(?: \w+){0,2}? passage\b"
    rf"|(?:the|your|{_MORE})(?: \w+)? (?:text|context|document|article|content|details|information)"
    r"\s*(?:[?.!,]|\Z|(?:you|so|for me)\b|(?:of|about|from|in) the passage\b))",
    rf"i(?: would|['’]d)? (?:need|require) {_MORE} context (?:to|in order|before|about|from)\b",
    rf"i(?: would|['’]d)? (?:need|require) {_MORE} (?:information|details?) (?:in order )?"
    rf"(?:to|before i can) {_WRITE} {_WRITTEN}\b",
    r"(?:it (?:seems|looks|appears) (?:like |that )?)?you (?:have not|haven['’]t|did not|didn['’]t) "
    r"(?:provide|share|include|give)d?n? (?:the|a|any|your)(?: \w+)? "
    r"(?:passage|text|context|document|article|content)\b",
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


def no_query(text: str) -> str | None:
    """Why a text is no query at all: ``empty``, ``thought``, ``refusal`` or ``preamble``."""
    if not any(character.isalnum() for character in text):
        return "empty"
    for reason, pattern in (("thought", _THOUGHT), ("refusal", _REFUSAL), ("preamble", _PREAMBLE)):
        if pattern.match(text):
            return reason
    return None


def is_too_long(query: str, max_words: int) -> bool:
    """Whether a query has more words than that, or more than twelve characters for each that is allowed.

    Pairs of characters count a quarter of a word.
    """
    if len(query) > _WORD_CHARACTERS * max_words or len(query.split()) > max_words:
        return True
    return len(surface_words(query)) > 4 * max_words


def is_repetitive(query: str) -> bool:
    """Whether a query says the same again and again, as a model does that has lost its way.

    More than half of its words are a phrase said three times or more in a row, or one word nine times or
    more ("bye bye bye" is a song). Or it has twenty words or more, and not even a third of them differ. In
    scripts without spaces, where words are pairs of characters, twice as many make a phrase or a lot.
    """
    words = surface_words(query)
    scale = 2 if UNSPACED.search(query) else 1
    if _STUCK.search(query) or len(words) >= 20 * scale and 3 * len(set(words)) <= len(words):
        return True
    for phrase in range(1, len(words) // 3 + 2):
        run = phrase  # words up to this one that are the phrase again and again
        for at in range(phrase, len(words)):
            run = run + 1 if words[at] == words[at - phrase] else phrase
            if 2 * run > len(words):
                one_word = len(set(words[at - phrase : at])) < 2 * scale
                if run >= (9 * scale if one_word else 3 * phrase - scale + 1):
                    return True
    return False


def in_other_script(query: str, passage: str, language: str | None) -> str | None:
    """In which script a query is and in which it should be, where they differ.

    It should be in one of the language's (None: the passage's). A language that is not known asks for none.
    """
    if language:
        wanted = set(scripts_of_language(language) or ())
    else:
        wanted = written_in(passage[:_HEAD])
        if wanted & {"Han", "Kana"}:
            wanted |= {"Han", "Kana"}  # Japanese may be written in Han alone
    written = written_in(query)
    if not written or not wanted or written & wanted:
        return None
    return f"{script_of(query)}, not {' or '.join(sorted(wanted))}"


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
