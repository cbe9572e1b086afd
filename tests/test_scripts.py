"""The scripts of texts and of languages, against Unicode's names of letters and against lists of codes."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval_ray.scripts import script_of, scripts_of_language, written_in

LATIN = (
    "af az bs ca cs cy da de en eo es et eu fi fo fr fy ga gd gl ha hr ht hu id ig is it jv ku la lb ln lt "
    "lv mg mi ms mt nb nl nn no ny oc om pl pt qu rm ro rw sk sl sm sn so sq sr st su sv sw tk tl tn to tr "
    "uz vi wo xh yo zu"
)


@pytest.mark.parametrize(
    ("scripts", "languages"),
    [
        ("Latin", "en de fr es it pt nl pl tr vi sw id fi hu ro cs eng deu fra spa English German Spanish"),
        (
            "Latin",
            "pt-BR en_US es-419 sr-Latn sr-Latn-RS az_Latn zh-Latn Brazilian-Portuguese Deutsch français",
        ),
        ("Cyrillic", "ru uk bg be mk ky rus rus_Cyrl Russian macedonian русский sr-Cyrl uz-Cyrl"),
        ("Arabic", "ar fa ur ps ar-EG fas Persian arabic العربية kk-Arab pa-Arab"),
        ("Han", "zh zh-CN zh-Hant zh-Hant-HK zho_Hans Chinese Mandarin 中文 yue"),
        ("Han Kana", "ja ja-JP jpn_Jpan Japanese 日本語"),
        ("Hangul", "ko ko-KR kor_Hang ko-Kore Korean 한국어"),
        ("Devanagari", "hi mr ne Hindi Marathi नेपाली ks-Deva"),
        ("Thai", "th th-TH Thai ไทย"),
        ("Greek", "el ell Greek Ελληνικά"),
        ("Cyrillic Latin", "sr sr-RS Serbian bs Bosnian tk tt"),
        ("Arabic Cyrillic Latin", "kk Kazakh az"),
        ("Cyrillic Mongolian", "mn Mongolian"),
        ("Arabic Latin", "ku ha"),
    ],
)
def test_the_scripts_of_a_language(scripts: str, languages: str) -> None:
    expected = frozenset(scripts.split())
    assert {name: scripts_of_language(name) for name in languages.split()} == dict.fromkeys(
        languages.split(), expected
    )


@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("Simplified Chinese", "Han"),
        ("Egyptian Arabic", "Arabic"),
        ("English (US)", "Latin"),
        ("Serbian (Cyrillic)", "Cyrillic"),
        ("Kazakh in Latin letters", "Latin"),
        ("Te reo Māori", "Latin"),  # `te` is Telugu, as a code alone
        (" EN ", "Latin"),
        ("Romanized Hindi", "Latin"),
        ("romanised Hindi", "Latin"),
        ("Hindi (romanized)", "Latin"),
        ("Roman Urdu", "Latin"),
        ("Chinese (Pinyin)", "Latin"),
        ("Japanese (romaji)", "Latin"),
        ("Hinglish", "Latin"),
        ("Cyrillic Serbian", "Cyrillic"),
        ("Romanian", "Latin"),
        ("Simplified and Traditional Chinese", "Han"),
        ("English or Russian", "Latin Cyrillic"),
        ("English and Russian", "Latin Cyrillic"),
        ("English, Hindi or Russian", "Latin Devanagari Cyrillic"),
        ("en/ru", "Latin Cyrillic"),
        ("en, ru", "Latin Cyrillic"),
        ("Romanized Hindi or Russian", "Latin Cyrillic"),
        ("Serbian (Cyrillic and Latin)", "Latin Cyrillic"),
        ("English or Klingon", "Latin"),
        ("or", "Oriya"),  # a code, and no word between two languages
        ("or-IN", "Oriya"),
    ],
)
def test_a_language_may_be_named_in_more_words_than_one(name: str, script: str) -> None:
    assert scripts_of_language(name) == frozenset(script.split())


@pytest.mark.parametrize("language", ["xx", "qqq", "xx-XX", "Klingon", "", "-", "42", "12-34", "xx or yy"])
def test_a_language_that_is_not_known_has_no_script(language: str) -> None:
    assert scripts_of_language(language) is None


@pytest.mark.parametrize("code", LATIN.split())
def test_latin_is_known_of_a_language_and_not_assumed(code: str) -> None:
    scripts = scripts_of_language(code)
    assert scripts is not None and "Latin" in scripts


@given(st.text())
def test_any_name_has_known_scripts_or_none(name: str) -> None:
    scripts = scripts_of_language(name)
    assert scripts is None or scripts


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", "how granite forms"), ("ru", "как образуется гранит"), ("ja", "花崗岩の成り立ち"),
        ("ja", "花崗岩形成"), ("zh", "花岗岩怎么形成"), ("ko", "화강암 형성 과정"), ("th", "หินแกรนิต"),
        ("ar", "كيف يتكون الجرانيت"), ("fa", "گرانیت چگونه"), ("he", "גרניט"), ("hi", "ग्रेनाइट कैसे"),
        ("bn", "গ্রানাইট"), ("ta", "கருங்கல்"), ("te", "గ్రానైట్"), ("kn", "ಗ್ರಾನೈಟ್"), ("ml", "ഗ്രാനൈറ്റ്"),
        ("gu", "ગ્રેનાઈટ"), ("pa", "ਗ੍ਰੇਨਾਈਟ"), ("si", "කළුගල්"), ("el", "γρανίτης"), ("ka", "გრანიტი"),
        ("hy", "գրանիտ"), ("am", "ጥቁር ድንጋይ"), ("km", "ថ្មក្រានីត"), ("lo", "ຫີນ"), ("my", "ကျောက်"),
        ("bo", "རྡོ"), ("sr", "гранит"), ("sr", "granit"), ("vi", "đá hoa cương"), ("tr", "nasıl oluşur"),
    ],
)  # fmt: skip
def test_a_text_is_written_in_a_script_of_its_language(language: str, text: str) -> None:
    scripts = scripts_of_language(language)
    assert scripts is not None and written_in(text) <= scripts and written_in(text)
    assert script_of(text) in scripts


@given(st.sampled_from(["LATIN", "GREEK", "CYRILLIC", "HEBREW", "THAI", "GEORGIAN", "HANGUL"]), st.data())
def test_a_letters_script_is_that_of_its_name(script: str, data: st.DataObject) -> None:
    """By the names of Unicode's characters, for the blocks in which letters stand under their script."""
    block = {
        "LATIN": (0x41, 0x17F), "GREEK": (0x391, 0x3C9), "CYRILLIC": (0x410, 0x44F), "HEBREW": (0x5D0, 0x5EA),
        "THAI": (0xE01, 0xE2E), "GEORGIAN": (0x10D0, 0x10F0), "HANGUL": (0xAC00, 0xD7A3),
    }[script]  # fmt: skip
    letter = chr(data.draw(st.integers(*block)))
    if unicodedata.name(letter, "").startswith(script):
        assert (script_of(letter) or "").upper() == script


def test_any_kana_makes_a_text_japanese() -> None:
    assert [script_of(text) for text in ("花", "花の", "東京タワー", "花岗岩的形成")] == [
        "Han", "Kana", "Kana", "Han"
    ]  # fmt: skip
