"""Words of any language: whole ones between spaces, character pairs where there are no spaces."""

import unicodedata

import bm25s
import pytest
import Stemmer
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_ray.words import STOPWORDS, surface_words, terms

LATIN = st.text("abcdefghijklmnopqrstuvwxyzäöüßéñçœæþ", min_size=1, max_size=8)
CYRILLIC = st.text("абвгдеёжзийклмнопрстуфхцчшщъыьэюя", min_size=1, max_size=8)
HINDI = st.lists(
    st.tuples(st.sampled_from("कखगघचजतदनपबमयरलवसह"), st.sampled_from(["", "ा", "ि", "ी", "ं", "्"])).map(
        "".join
    ),
    min_size=1,
    max_size=5,
).map("".join)
HANGUL = st.text("가나다라마바사아자차카타파하한국어", min_size=1, max_size=5)
DIGITS = st.text("0123456789", min_size=1, max_size=4)
SPACED = st.one_of(LATIN, CYRILLIC, HINDI, HANGUL, DIGITS)
BETWEEN = st.sampled_from([" ", "  ", "\n", ", ", ". ", " - ", "/", "(", ") ", "?! ", "।  ", "…"])


@given(st.lists(st.tuples(SPACED, BETWEEN)))
@settings(max_examples=100, deadline=None)
def test_words_between_spaces_and_punctuation_come_back_whole(parts: list[tuple[str, str]]) -> None:
    text = "".join(word + between for word, between in parts)
    assert surface_words(text) == [unicodedata.normalize("NFKC", word) for word, _ in parts]


@given(st.text("東京都日本語山川𠮷ひらがなカタカナ", min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_unspaced_text_gives_its_character_pairs(run: str) -> None:
    pairs = [a + b for a, b in zip(run, run[1:], strict=False)]
    assert surface_words(run) == (pairs or [run])


@given(st.lists(st.sampled_from(["กา", "ที่", "น้ำ", "ไ", "ม่", "รู้", "ษ"]), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_thai_marks_stay_with_their_letter(syllables: list[str]) -> None:
    """No pair begins with a mark, and every letter of the text stands in some pair."""
    text = "".join(syllables)
    found = surface_words(text)
    assert all(not unicodedata.category(word[0]).startswith("M") for word in found)
    joined = found[0] + "".join(
        word[len(before) - len(_first(before)) :] for before, word in zip(found, found[1:], strict=False)
    )
    assert joined == unicodedata.normalize("NFKC", text)


def _first(pair: str) -> str:
    """The first letter of a pair with its marks."""
    end = 1
    while end < len(pair) and unicodedata.category(pair[end]).startswith("M"):
        end += 1
    return pair[:end]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ภาษาไทย", ["ภา", "าษ", "ษา", "าไ", "ไท", "ทย"]),
        ("ที่นี่", ["ที่นี่"]),  # two letters, four marks
        ("か゚き", ["か゚き"]),  # a mark without a script of its own
        ("ພາສາລາວ", None),  # Lao
        ("ភាសាខ្មែរ", None),  # Khmer
        ("မြန်မာ", None),  # Burmese
        ("コーヒーを飲む", ["コー", "ーヒ", "ヒー", "ーを", "を飲", "飲む"]),
        ("日 本", ["日", "本"]),  # a space is a boundary even there
        ("ABC日本語12", ["abc", "日本", "本語", "12"]),
        ("日", ["日"]),
        ("हिन्दी में लिखा", ["हिन्दी", "में", "लिखा"]),
        ("தமிழ் மொழி", ["தமிழ்", "மொழி"]),
        ("العَرَبِيَّة لغة", ["العَرَبِيَّة", "لغة"]),
        ("한국어 단어", ["한국어", "단어"]),
    ],
)
def test_words_of_many_scripts(text: str, expected: list[str] | None) -> None:
    found = surface_words(text)
    assert found == expected if expected else len(found) > 1
    assert all(unicodedata.category(word[0])[0] in "LN" for word in found)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("ｶﾞｷﾞｸﾞ", "ガギグ"),  # half-width kana
        ("Ｆｕｌｌ１２", "full12"),  # full-width Latin
        ("ﬁle", "file"),  # ligature
        ("e\u0301te\u0301", "été"),  # letter and mark, or one character
        ("①②", "12"),
        ("Ⅳ", "iv"),
        ("STRAẞE", "straße"),
        ("नि\u0915\u093c", "निक़"),  # nukta apart, or together
    ],
)
def test_texts_that_nfkc_makes_equal_have_equal_words(text: str, same: str) -> None:
    assert surface_words(text) == surface_words(same) != []


@given(st.text(max_size=40))
@settings(max_examples=100, deadline=None)
def test_every_word_stands_in_the_folded_text(text: str) -> None:
    folded = unicodedata.normalize("NFKC", text).lower()
    at = 0
    for word in surface_words(text):
        at = folded.index(word, at)  # in this order; pairs overlap, so only the start moves
        assert word and not any(c.isspace() for c in word)


@given(st.text(max_size=40))
@settings(max_examples=100, deadline=None)
def test_every_letter_and_digit_stands_in_a_word(text: str) -> None:
    folded = unicodedata.normalize("NFKC", text).lower()
    letters = {c for c in folded if unicodedata.category(c)[0] in "LN"}
    assert letters == {c for word in surface_words(text) for c in word if unicodedata.category(c)[0] in "LN"}


@pytest.mark.parametrize("text", ["", "   ", "?!", "…—«»", "\u0301", "☃ ➜"])
def test_texts_without_letters_have_no_words(text: str) -> None:
    assert surface_words(text) == [] == terms(text)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("co\u00adoperate", "cooperate"),  # soft hyphen, as texts cut out of PDFs have them
        ("क्\u200dया", "क्या"),  # zero-width joiner
        ("ශ්\u200dරී", "ශ්රී"),  # Sinhala writes it in common words
        ("\ufeffword", "word"),
    ],
)
def test_invisible_characters_do_not_cut_a_word(text: str, same: str) -> None:
    """Unicode's word boundaries (UAX 29, rule WB4) pass over format characters."""
    assert surface_words(text) == surface_words(same)


# --- terms ------------------------------------------------------------------------------------


def test_terms_are_stemmed_and_have_no_stop_words() -> None:
    assert terms("The runners of the Cats; and DOGS running!") == ["runner", "cat", "dog", "run"]
    assert terms("the of and") == []
    assert terms("東京 retrieval") == ["東京", "retriev"]


@given(st.lists(st.sampled_from([*sorted(STOPWORDS), "Retrieval", "dogs", "flies", "running", "BM25", "42"])))
@settings(max_examples=100, deadline=None)
def test_terms_are_those_of_bm25s_on_plain_english(words: list[str]) -> None:
    """bm25s's own tokenizer leaves one-letter words out; all these are longer or stop words."""
    text = " ".join(words)
    stemmer = Stemmer.Stemmer("english")
    [theirs] = bm25s.tokenize([text], stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False)
    assert terms(text) == list(theirs)


def test_stop_words_of_the_upper_case_are_left_out() -> None:
    assert "the" in STOPWORDS
    assert terms("THE The the tHe") == []
