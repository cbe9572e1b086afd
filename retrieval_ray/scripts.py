"""Which script a text is written in, and which ones a language is written in."""

import functools
from collections import Counter

import regex

from retrieval_ray.words import surface_words

# The languages of each script by their ISO 639 codes (all of 639-1 that have one of these scripts, the most
# frequent of 639-2) and English names. A language in several lines may be written in each of them.
_LANGUAGES = {
    "Latin": """
        aa af ak an ay az bi bm br bs ca ch co cs cy da de ee en eo es et eu ff fi fj fo fr fy ga gd
        gl gn gv ha ho hr ht hu hz ia id ie ig ik io is it jv kg ki kj kk kl kr ku kw la lb lg li ln
        lt lu lv mg mh mi ms mt na nb nd ng nl nn no nr nv ny oc oj om pl pt qu rm rn ro rw sc se sg
        sh sk sl sm sn so sq sr ss st su sv sw tk tl tn to tr ts tt tw ty uz ve vi vo wa wo xh yo za
        zu
        afr alb aze baq bos bre cat ceb ces cze cym dan deu dut eng epo est eus fao fil fin fra fre
        ger gla gle glg hau hrv hun ibo ice ind isl ita jav kaz kin kur lat lav lit ltz mao may mlg
        mlt mri msa nld nno nob nor nya oci orm pol por que ron rum run slk slo slv smo sna som sot
        spa sqi srp sun swa swe tgl tsn tuk tur uzb vie wel wol xho yor zul
        afrikaans albanian azerbaijani basque bosnian breton catalan cebuano chichewa corsican
        croatian czech danish deutsch dutch english esperanto español estonian faroese filipino
        finnish flemish français french frisian gaelic galician german hausa hawaiian hungarian
        icelandic igbo indonesian irish italian italiano javanese kazakh kinyarwanda kurdish latin
        latvian lithuanian luxembourgish malagasy malay maltese maori māori nederlands norwegian
        occitan oromo polish polski português portuguese quechua romanian samoan serbian sesotho
        shona slovak slovene slovenian somali spanish sundanese swahili swedish tagalog turkish
        turkmen uzbek vietnamese welsh wolof xhosa yoruba zulu
        hinglish spanglish taglish""",
    "Cyrillic": """
        ab av az ba be bg bs ce cu cv kk kv ky mk mn os ru sh sr tg tk tt uk uz
        aze bak bel bos bul chv kaz kir mac mkd mon rus srp tat tgk tuk ukr uzb
        azerbaijani bashkir belarusian bosnian bulgarian chechen chuvash kazakh kyrgyz macedonian
        mongolian russian serbian tajik tatar turkmen ukrainian uzbek""",
    "Arabic": """
        ar az fa ha kk ks ku ps sd ug ur
        ara arb aze ckb fas hau kas kaz kur per prs pus snd uig urd
        arabic azerbaijani dari farsi hausa kashmiri kazakh kurdish pashto persian sindhi sorani
        uighur urdu uyghur""",
    "Devanagari": """
        bh hi ks mr ne pi sa sd
        bho hin kas mai mar nep san snd
        bhojpuri hindi kashmiri maithili marathi nepali pali sanskrit sindhi""",
    "Han": "zh ja zho chi cmn yue jpn chinese mandarin cantonese japanese 日本語",  # kana may be absent
    "Kana": "ja jpn japanese 日本語", "Hangul": "ko kor korean",
    "Greek": "el ell gre greek", "Hebrew": "he iw yi heb yid hebrew yiddish",
    "Georgian": "ka kat geo georgian", "Armenian": "hy hye arm armenian",
    "Bengali": "bn as ben asm bengali bangla assamese", "Gurmukhi": "pa pan punjabi",
    "Gujarati": "gu guj gujarati", "Oriya": "or ori odia oriya", "Tamil": "ta tam tamil",
    "Telugu": "te tel telugu", "Kannada": "kn kan kannada", "Malayalam": "ml mal malayalam",
    "Sinhala": "si sin sinhala sinhalese", "Thaana": "dv div dhivehi divehi", "Thai": "th tha thai",
    "Lao": "lo lao", "Khmer": "km khm khmer cambodian", "Myanmar": "my mya bur burmese",
    "Tibetan": "bo dz bod tib dzo tibetan dzongkha", "Mongolian": "mn mon mongolian", "Yi": "ii iii nuosu",
    "Ethiopic": "am ti amh tir amharic tigrinya",
}  # fmt: skip
_SCRIPTS_OF: dict[str, frozenset[str]] = {}
for _script, _languages in _LANGUAGES.items():
    for _language in _languages.split():
        _SCRIPTS_OF[_language] = _SCRIPTS_OF.get(_language, frozenset()) | {_script}
# What says the script beside the language: ISO 15924's codes, as in zh-Hant, and words.
_SUBTAGS = {
    "latn": "Latin", "latin": "Latin", "cyrl": "Cyrillic", "cyrillic": "Cyrillic", "arab": "Arabic",
    "deva": "Devanagari", "grek": "Greek", "hebr": "Hebrew", "beng": "Bengali", "taml": "Tamil",
    "telu": "Telugu", "knda": "Kannada", "mlym": "Malayalam", "gujr": "Gujarati", "orya": "Oriya",
    "guru": "Gurmukhi", "sinh": "Sinhala", "thai": "Thai", "laoo": "Lao", "khmr": "Khmer", "mymr": "Myanmar",
    "tibt": "Tibetan", "kore": "Hangul", "hang": "Hangul", "yiii": "Yi", "hani": "Han", "hans": "Han",
    "hant": "Han", "jpan": "Han Kana", "hrkt": "Kana", "hira": "Kana", "kana": "Kana", "geor": "Georgian",
    "armn": "Armenian", "ethi": "Ethiopic", "thaa": "Thaana", "mong": "Mongolian",
    "roman": "Latin", "romanized": "Latin", "romanised": "Latin", "romanization": "Latin",
    "transliterated": "Latin", "pinyin": "Latin", "romaji": "Latin", "rōmaji": "Latin",
}  # fmt: skip
_BETWEEN = regex.compile(r"\s+(?:or|and)\s+|\s*[,/&+;|]\s*")  # languages; "or" alone is Oriya
_LETTER = regex.compile(
    r"(?P<Kana>[\p{Hiragana}\p{Katakana}])|"
    + "|".join(rf"(?P<{name}>\p{{{name}}})" for name in _LANGUAGES if name != "Kana")
)


def script_of(text: str) -> str | None:
    """The script of most words of a text; None where it has no letters."""
    counts = _scripts(text)
    return max(counts, key=lambda name: counts[name]) if counts else None


def scripts_of_language(language: str) -> frozenset[str] | None:
    """The scripts that a language may be written in; None where the language is not known.

    language: a code, alone or with subtags ("pt-BR", "zh_Hant"), of which the script's has the last word
    ("sr-Latn"); an English name ("Simplified Chinese", "Serbian (Cyrillic)"); or a name in the language's
    own letters, if they are not Latin ones. "Romanized Hindi" and "Chinese (Pinyin)" are in Latin letters.
    Of several languages ("English or Russian") the scripts of all that are known.
    """
    several = [name for name in _BETWEEN.split(language.lower()) if name.strip()]
    if len(several) > 1:
        return frozenset[str]().union(*(scripts_of_language(name) or () for name in several)) or None
    pieces = regex.findall(r"[\p{L}\p{M}\p{N}]+", language.lower())
    for at, tag in enumerate(pieces):
        if tag in _SUBTAGS and (at or len(tag) > 4):  # "thai" alone is the language
            return frozenset(_SUBTAGS[tag].split())
    # A code stands first and alone: the "Te" of "Te reo Māori" is not Telugu.
    code = regex.split(r"[-_]", language.lower())[0].strip()
    for key in (code, *(piece for piece in pieces if len(piece) > 3)):
        if key in _SCRIPTS_OF:
            return _SCRIPTS_OF[key]
    own = script_of(language)
    return None if own in (None, "Latin") else frozenset({own})


def written_in(text: str) -> set[str]:
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
