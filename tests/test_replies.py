"""Replies: a natural query passes as it stands; everything else is cleaned, or dropped with its reason."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from retrieval_ray.prompts import JSON_SCHEMA
from retrieval_ray.replies import Drop, is_copied, parse
from retrieval_ray.scripts import script_of, script_of_language
from retrieval_ray.words import surface_words

ENGLISH = "Granite is a coarse igneous rock that forms when magma cools slowly below the surface."
PASSAGES = {
    "en": ENGLISH,
    "ru": "Гранит образуется, когда магма медленно остывает под поверхностью Земли.",
    "ja": "花崗岩は、マグマが地下でゆっくりと冷えて固まった深成岩の一種である。",
    "zh": "花岗岩是岩浆在地表以下缓慢冷却凝固而形成的一种深成岩，质地坚硬。",
    "th": "หินแกรนิตเกิดจากการเย็นตัวอย่างช้า ๆ ของแมกมาใต้ผิวโลก",
    "ar": "يتكون الجرانيت عندما تبرد الصهارة ببطء تحت سطح الأرض.",
    "ko": "화강암은 마그마가 땅속 깊은 곳에서 천천히 식어 굳은 암석이다.",
    "hi": "ग्रेनाइट तब बनता है जब मैग्मा धरती के नीचे धीरे-धीरे ठंडा होता है।",
}
LANGUAGES = st.sampled_from([None, "en", "German", "ru", "ja", "zh", "Thai"])
OPENINGS = (
    "{",
    '{"query": ',
    "```",
    "<think>",
    "**",
    '"',
    "- ",
    "1. ",
    "Query: ",
    "Sure! ",
    "\u2028",
    "\x00",
)
REPLIES = st.lists(st.text(max_size=12) | st.sampled_from(OPENINGS), max_size=6).map("".join)


def read(
    reply: str, passage: str = ENGLISH, *, language: str | None = None, words: int = 64, copied: float = 0.7
) -> str | Drop:
    return parse(reply, passage, language=language, max_words=words, max_copied=copied)


def reason(reply: str, passage: str = ENGLISH, *, language: str | None = None) -> str:
    """The reason for which a reply is dropped, and the query itself where it is not."""
    found = read(reply, passage, language=language)
    return found if isinstance(found, str) else found[0]


# --- queries that must pass -------------------------------------------------------------------


@pytest.mark.parametrize(
    "query",
    [
        # apologies and impossibilities of users, not of models
        "sorry message in python",
        "sorry i love you lyrics",
        "sorry i can't talk right now iphone auto reply",
        "i'm sorry letter to girlfriend",
        "I'm sorry, but I don't want to be an emperor speech",
        "i'm afraid of flying",
        "I apologize for the inconvenience synonym",
        "unfortunately named towns",
        "unfortunately i cannot attend the meeting email template",
        "I can not boot my laptop",
        "I can't sleep at night",
        "i cannot connect to wifi",
        "I can't help falling in love chords",
        "i can't find the title of a book i read as a child",
        "i cannot answer the security question for my apple id",
        "i cannot create a query in access",
        "I can't write to my usb drive",
        "i can't come up with a title for my essay",
        "i can't copy the text from a pdf",
        "I am not able to install numpy",
        "I am unable to log in",
        "i won't be home for christmas song",
        "i couldn't care less or could care less",
        "as a large family how do we save money",
        "as a language teacher where can i work abroad",
        "As an AI engineer, what should I learn first?",
        "no question asked policy",
        "no title deed found for my house",
        "the passage of time quotes",
        "the passage of the stamp act",
        "there is no water passage to india",
        "there is trouble in the passage of my coolant",
        "none of the above meaning",
        # words that models begin with
        "here maps vs google maps",
        "here is the news bbc",
        "here's to you mrs robinson lyrics",
        "sure start centres near me",
        "of course i still love you droneship",
        "ok google not working",
        "okay to eat raw eggs while pregnant",
        "certainly synonym",
        "the query is slow in postgres",
        "the question is moot meaning",
        "the title is clear but the seller has a lien",
        "a question of trust book",
        "title of the first novel",
        "question mark in regex",
        "query optimizer hints in oracle",
        "claim for lost baggage",
        "based on a true story movies",
        "according to jim cast",
        "the user is not in the sudoers file",
        "i want to write a book",
        "we need to talk about kevin",
        "people also ask api",
        # what looks like markup, code or a list
        "C++",
        "42",
        "404",
        "E = mc²",
        "{} vs dict() in python",
        '{"a": 1} to dataframe',
        "__init__ vs __new__",
        "**kwargs and *args in python",
        "`git pull` vs `git fetch`",
        '"affect" or "effect"',
        "'to be' or 'not to be'",
        'monitor 24"',
        "«Война» и «мир»",
        "# in url",
        "#metoo",
        "-5 degrees celsius in fahrenheit",
        "1. FC Köln",
        "2. Weltkrieg Ursachen",
        "what does </think> mean in deepseek",
        "how to use 🙏 emoji",
        "json.dumps(obj, indent=2)",
        "user_id is null",
    ],
)
def test_a_natural_query_passes_as_it_stands(query: str) -> None:
    assert read(query, "", language=None) == query
    assert read(query, ENGLISH, language="en") == query or script_of(query) != "Latin"


@pytest.mark.parametrize(
    ("language", "query"),
    [
        ("ja", "花崗岩の成り立ち"),
        ("ja", "花崗岩形成"),  # Japanese may be written in Han alone
        ("ja", "Python pandas DataFrame 使い方"),
        ("ja", "申し訳ありません 英語"),
        ("zh", "花岗岩怎么形成"),
        ("zh", "docker compose restart policy 说明"),
        ("zh", "抱歉用英语怎么说"),
        ("th", "หินแกรนิตเกิดขึ้นได้อย่างไร"),
        ("th", "วิธีติดตั้ง Docker บน Ubuntu"),
        ("ar", "كيف يتكون الجرانيت"),
        ("ar", "تثبيت Docker على Ubuntu"),
        ("ko", "화강암 형성 과정"),
        ("ko", "죄송합니다 영어로"),
        ("ru", "как образуется гранит"),
        ("ru", "как установить PostgreSQL на Ubuntu"),
        ("ru", "извините или простите"),
        ("hi", "ग्रेनाइट कैसे बनता है"),
        ("en", "lo siento meaning"),
        ("en", "what does 你好 mean"),
        ("en", "β-amyloid and α-synuclein in dementia"),
        ("en", "es tut mir leid auf englisch"),
    ],
)
def test_a_natural_query_of_another_language_passes_as_it_stands(language: str, query: str) -> None:
    assert read(query, PASSAGES[language]) == query
    assert read(query, PASSAGES[language], language=language) == query


# --- what stands around a query ---------------------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    [
        "how is granite made",
        "  how   is\tgranite made \n",
        '"how is granite made"',
        "'how is granite made'",
        "“how is granite made”",
        "„how is granite made“",
        "«how is granite made»",
        "「how is granite made」",
        "`how is granite made`",
        "**how is granite made**",
        '**"how is granite made"**',
        "*how is granite made*",
        "## how is granite made",
        "- how is granite made",
        "* how is granite made",
        "• how is granite made",
        "1) how is granite made",
        "1. how is granite made\n2. what is granite",
        "Query: how is granite made",
        "Query: “how is granite made”",
        '"Query: how is granite made"',
        '"*“Query: ‘how is granite made’”*"',
        "**Question:** how is granite made",
        "**Question**: how is granite made",
        "**Question: how is granite made**",
        "Question:\nhow is granite made",
        "Search query:\n\nhow is granite made",
        "Question 1: how is granite made",
        "A possible search query: how is granite made",
        "Q: how is granite made",
        "Frage: how is granite made",
        "问题：how is granite made",
        "Question : how is granite made",
        "how is granite made\n\nThis query asks about the origin of granite.",
        "---\nhow is granite made\n---",
        "```\nhow is granite made\n```",
        "```text\nhow is granite made\n```",
        '{"query": "how is granite made"}',
        '{"query": "how is granite made", "why": "an origin"}',
        '```json\n{\n  "query": "how is granite made"\n}\n```',
        '{"query": "how is granite made\nor formed"}',
        '{"question": "how is granite made"}',
        '{"query": "\\"how is granite made\\""}',
        '{"query": "how is granite made"} This asks for its origin.',
        "<think>The user wants a query.</think>how is granite made",
        "<think>\nThe user wants\na query.\n</think>\n\nhow is granite made",
        "<think></think><think></think>how is granite made",
        "Okay, the template opened the thought.\nSo:\n</think>\n\nhow is granite made",
        '<think>x</think>\n**Query:** "how is granite made"',
        "\ufeffhow is granite made\u200b",
        "how is granite made\ufffd",
        "how is granite\x00made",
        "how is granite made\u2028or formed",
    ],
)
def test_only_the_query_is_left_of_a_reply(reply: str) -> None:
    assert read(reply) == "how is granite made"


def test_the_first_line_counts_because_the_prompt_ends_with_the_assistants_header() -> None:
    """The papers' code drops it: their template lacked the header, and the model wrote it itself."""
    assert read("granite origin\nhow is granite made") == "granite origin"


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("keywords: how to choose them", "how to choose them"),  # a label more often than a query
        ("Keywords: geology, rocks, magma", "geology, rocks, magma"),
        ("Title: 'Rocks' and 'stones'", "'Rocks' and 'stones'"),
        ('"the rock\'s origin"', "the rock's origin"),
        ("'the rock's origin'", "the rock's origin"),
        ("# How Granite Forms", "How Granite Forms"),
    ],
)
def test_labels_and_marks_go_and_what_belongs_to_the_query_stays(reply: str, expected: str) -> None:
    assert read(reply) == expected


@given(REPLIES, LANGUAGES)
@example("<think>" * 3, None)
@example('{"a":' * 100_000, None)
@example('{"query": "\\ud83d"}', None)
@example("\ud83d granite", None)
def test_any_reply_gives_a_clean_line_or_a_reason(reply: str, language: str | None) -> None:
    found = read(reply, language=language)
    if isinstance(found, tuple):
        assert found[0] in {"empty", "refusal", "preamble", "too_long", "other_script", "copied"}
        assert len(found[1]) < 300
        return
    assert found == " ".join(found.split()) and any(character.isalnum() for character in found)
    found.encode()  # or no table can hold it
    assert read(found, language=language) == found  # read again, it is what it was


@given(st.text(alphabet="abcdefghij ", min_size=3, max_size=60).filter(str.strip))
def test_a_query_is_the_same_in_plain_text_in_quotes_and_in_the_structure_asked_for(query: str) -> None:
    plain = read(query)
    assert read(f'"{query.strip()}"') == plain
    assert list(JSON_SCHEMA["properties"]) == JSON_SCHEMA["required"] == ["query"]
    assert read(json.dumps({"query": query})) == plain


# --- what is no query -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "   \n ",
        "?!",
        "😀😀",
        "...",
        '""',
        "```\n```",
        "Query:",
        "<think>",
        "<think>The user wants a query, so I shall",  # cut before the thought ended
        "<think>\nOkay, the user\nwants",
        "<thinking>granite?",
        "the thought\n</think>",
        "{}",
        '{"query": ""}',
        '{"query": null}',
        '{"query": 5}',
        '{"query": ["a"]}',
        '{"query": "how is granite ma',  # cut before the object ended
        '```json\n{"query": "how is gran',
        '{"query',
        '{"passage": "a", "answer": "b"}',
    ],
)
def test_a_reply_without_a_query_is_empty(reply: str) -> None:
    assert read(reply) == ("empty", reply)


@pytest.mark.parametrize(
    "reply",
    [
        "I'm sorry, but I can't assist with that.",
        "I’m sorry, but I can’t help with that request.",
        "I am sorry, but I cannot generate a question for this passage.",
        "Sorry, I can't provide that.",
        "Sorry, but I cannot create content that promotes violence",
        "I'm sorry, but",
        "I'm sorry.",
        "I'm afraid I can't do that.",
        "I apologize, but I cannot fulfill this request.",
        "Unfortunately, the passage does not contain enough information.",
        "Unfortunately, I don't have enough information to write a title.",
        "I cannot generate a question based on the passage.",
        "I cannot write a claim that promotes hatred.",
        "I can't help with that.",
        "I can not create a query from this passage",
        "I am unable to generate a search query for this passage.",
        "I'm unable to provide a title.",
        "I cannot fulfil your request.",
        "I don't see the passage in your message.",
        "I don't have access to the passage",
        "As an AI language model, I have no opinions.",
        "As an AI, I cannot judge this.",
        "As a large language model I cannot browse.",
        "The passage does not answer a question.",
        "The provided passage is too short to write a question.",
        "This passage contains no information.",
        "There is no relevant information in the passage.",
        "No question can be generated from this text.",
        "No query",
        "None.",
        "N/A",
        "Please provide the passage you would like a question for.",
        "You have not provided the passage.",
        '{"query": "I cannot generate a query for this passage."}',
        "<think>Hm.</think>I'm sorry, but I can't help with that.",
    ],
)
def test_a_refusal_is_dropped(reply: str) -> None:
    assert reason(reply) == "refusal"


@pytest.mark.parametrize(
    "reply",
    [
        "Here is a question",
        "Here is a question:\nHow is granite made?",
        "Here's a possible search query: how is granite made",
        "Here are 5 keywords:",
        "Here is my attempt:\nHow is granite made?",
        "Here's what someone might type: granite origin",
        "Here you go: how is granite made",
        "Sure!",
        "Sure! Here is a natural question:",
        "Sure, here's one",
        "Sure thing! How about: granite",
        "Certainly! I can help with that.",
        "Of course. Here is the title:",
        "Okay, so the user wants a query about granite.",
        "Okay, let's see.",
        "Alright, the user gave me a passage about rocks",
        "Hmm, let me think about granite",
        'A natural question would be: "How is granite made?"',
        "The question for this passage is how granite is made",
        'The query is "granite origin"',
        "One possible question that someone might ask is: how is granite made?",
        "Based on the passage, how is granite made?",
        "According to the passage, how is granite made?",
        "According to the provided text, what is granite?",
        "The passage states that granite is coarse.",
        "A user might search for granite origin",
        "We need to produce a query about granite.",
        "I need to write a short title that fits.",
        "The user wants a search query.",
    ],
)
def test_a_preamble_is_dropped(reply: str) -> None:
    assert reason(reply) == "preamble"


@pytest.mark.parametrize(
    ("language", "reply", "expected"),
    [
        ("es", "Lo siento, pero no puedo ayudar con eso.", "refusal"),
        ("fr", "Je suis désolé, mais je ne peux pas répondre.", "refusal"),
        ("de", "Es tut mir leid, aber ich kann dabei nicht helfen.", "refusal"),
        ("pt", "Desculpe, mas não posso ajudar.", "refusal"),
        ("it", "Mi dispiace, ma non posso aiutarti.", "refusal"),
        ("ru", "К сожалению, я не могу помочь.", "refusal"),
        ("zh", "很抱歉，我无法回答这个问题。", "refusal"),
        ("ja", "申し訳ありませんが、お答えできません。", "refusal"),
        ("ko", "죄송합니다만, 요청을 도와드릴 수 없습니다.", "refusal"),
        ("ar", "عذرًا، لا أستطيع المساعدة.", "refusal"),
        ("es", "Aquí tienes una pregunta:", "preamble"),
        ("fr", "Voici une question :", "preamble"),
        ("de", "Hier ist eine mögliche Suchanfrage:", "preamble"),
        ("ru", "Вот вопрос:", "preamble"),
        ("zh", "以下是一个问题：", "preamble"),
        ("zh", "好的，这是一个搜索查询：", "preamble"),
        ("ja", "以下は検索クエリです：", "preamble"),
        ("ko", "다음은 검색어입니다:", "preamble"),
        ("ar", "إليك سؤال:", "preamble"),
    ],
)
def test_refusals_and_preambles_of_other_languages_are_dropped(
    language: str, reply: str, expected: str
) -> None:
    assert reason(reply, PASSAGES.get(language, ENGLISH), language=language) == expected
    assert reason(f"{reply}\nx", PASSAGES.get(language, ENGLISH)) == expected


# --- length -----------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 24))
def test_a_query_of_more_words_than_allowed_is_too_long(most: int, words: int) -> None:
    query = " ".join(f"w{n}" for n in range(words))
    found = read(query, words=most)
    assert found == (query if words <= most else ("too_long", query))


def test_where_there_are_no_spaces_pairs_of_characters_are_counted() -> None:
    """Four for each word that is allowed: a text of 41 characters has 40 pairs."""
    query = "花" * 41
    assert read(query, PASSAGES["zh"], words=10) == query
    assert read(f"{query}花", PASSAGES["zh"], words=10) == ("too_long", f"{query}花")


# --- scripts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("language", PASSAGES)
@pytest.mark.parametrize("other", PASSAGES)
def test_a_query_must_be_in_the_script_that_is_asked(language: str, other: str) -> None:
    related = {language, other} == {"ja", "zh"}
    query = {key: passage.split("，")[0] for key, passage in PASSAGES.items()}[other]
    found = read(query, PASSAGES[language], copied=1)
    assert (found == query) == (language == other or related)
    found = read(query, ENGLISH, language=language, copied=1)
    # Han alone may be Japanese; kana are no Chinese.
    assert (found == query) == (language == other or (language, other) == ("ja", "zh"))
    assert found == query or found[0] == "other_script"


@pytest.mark.parametrize(
    ("language", "reply"),
    [
        ("en", "如何在 Ubuntu 上安装 Docker"),  # most letters are Latin, most words are not
        ("en", "как установить PostgreSQL на Ubuntu"),
        ("zh", "how to install docker on ubuntu"),
        ("ja", "granite formation"),
        ("th", "granite หิน is formed when magma cools slowly under the surface of the earth"),
    ],
)
def test_terms_of_another_script_do_not_make_the_query(language: str, reply: str) -> None:
    assert reason(reply, PASSAGES[language]) == "other_script"
    assert reason(reply, PASSAGES[language], language=language) == "other_script"


def test_a_passage_in_two_scripts_may_be_asked_about_in_both() -> None:
    passage = "def f(): return 1  # 返回数字一 let x = read(file)  # 读取文件内容"
    assert read("返回数字的函数", passage) == "返回数字的函数"
    assert read("函数 read file", passage) == "函数 read file"


@pytest.mark.parametrize("text", ["", "42", "?!", "😀", "2 + 2"])
def test_a_text_without_letters_has_no_script_and_fits_every_one(text: str) -> None:
    assert script_of(text) is None
    assert read("how is granite made", text) == "how is granite made"
    assert read("42", PASSAGES["th"]) == "42"


@pytest.mark.parametrize(
    ("script", "languages"),
    [
        ("Latin", "en de fr es vi sw English German Spanish tr-TR sr-Latn az_Latn"),
        ("Cyrillic", "ru uk bg rus rus_Cyrl Russian macedonian русский sr-Cyrl uz-Cyrl"),
        ("Arabic", "ar fa ur ar-EG fas Persian arabic العربية kk-Arab"),
        ("Han", "zh zh-Hant zho_Hans Chinese 中文 yue"),
        ("Kana", "ja jpn_Jpan Japanese"),
        ("Hangul", "ko Korean 한국어"),
        ("Devanagari", "hi mr Hindi Marathi नेपाली"),
        ("Thai", "th Thai ไทย"),
        (None, "sr Serbian kk uz Kazakh mn"),  # written in several
    ],
)
def test_the_script_of_a_language(script: str | None, languages: str) -> None:
    assert {language: script_of_language(language) for language in languages.split()} == dict.fromkeys(
        languages.split(), script
    )


def test_any_kana_makes_a_text_japanese() -> None:
    assert [script_of(text) for text in ("花", "花の", "東京タワー", "花岗岩的形成")] == [
        "Han", "Kana", "Kana", "Han"
    ]  # fmt: skip


def test_a_language_may_be_named_in_more_words_than_one() -> None:
    assert script_of_language("Simplified Chinese") == "Han"
    assert script_of_language("Egyptian Arabic") == "Arabic"
    assert script_of_language("Te reo Māori") == "Latin"  # `te` is Telugu, as a code alone


def test_no_script_is_asked_of_a_language_that_has_several() -> None:
    for query in ("kako nastaje granit", "како настаје гранит"):
        assert read(query, ENGLISH, language="sr") == query


# --- copies -----------------------------------------------------------------------------------


def copied_share(query: str, passage: str) -> float:
    """The longest run of the query's words in the passage, naively, as a share of the query."""
    words, there = surface_words(query), surface_words(passage)
    longest = 0
    for at in range(len(words)):
        for start in range(len(there)):
            length = 0
            while (
                at + length < len(words)
                and start + length < len(there)
                and words[at + length] == there[start + length]
            ):
                length += 1
            longest = max(longest, length)
    return longest / len(words) if words else 0.0


LETTERS = st.lists(st.sampled_from("abcdefgh"), max_size=12)
SHARES = st.sampled_from([0.0, 0.2, 0.5, 0.6, 0.7, 1.0]) | st.floats(0, 1)


@given(LETTERS, st.integers(0, 12), LETTERS, LETTERS, SHARES)
def test_a_copy_is_a_longer_run_of_the_passage_than_the_share_allows(
    passage: list[str], run: int, before: list[str], after: list[str], most: float
) -> None:
    query = [*before[:4], *passage[:run], *after[:4]]
    expected = len(query) >= 5 and copied_share(" ".join(query), " ".join(passage)) > most
    assert is_copied(" ".join(query), " ".join(passage), most) == expected


@pytest.mark.parametrize("words", range(5, 60))
def test_a_share_that_is_just_reached_is_no_copy(words: int) -> None:
    """Where 0.58 * 50 is 28.999..., 29 words of 50 are still not more than the share."""
    passage = " ".join(f"w{n}" for n in range(words))
    for run in range(1, words + 1):
        query = " ".join([*passage.split()[:run], *(f"x{n}" for n in range(words - run))])
        assert not is_copied(query, passage, run / words)
        assert is_copied(query, passage, (run - 0.5) / words)


def test_case_and_punctuation_do_not_hide_a_copy() -> None:
    query = "a coarse, igneous ROCK that forms when magma cools"
    assert read(query) == ("copied", query)
    assert read(query, ENGLISH.replace("igneous", "ig\u00adneous")) == ("copied", query)
    assert read("an igneous rock formed by slow cooling of magma") == (
        "an igneous rock formed by slow cooling of magma"
    )
    assert read(query, copied=1.0) == query


def test_a_name_is_no_copy_of_its_passage() -> None:
    for name, passage in (
        ("Grand Canyon of the", "The Grand Canyon of the Colorado"),
        ("東京スカイツリー", "東京スカイツリーは東京都墨田区にある電波塔である。"),
        ("中华人民共和国", "中华人民共和国成立于一九四九年。"),
    ):
        assert read(name, passage) == name
    long = "東京スカイツリーは東京都墨田区にある"
    assert read(long, f"{long}電波塔である。") == ("copied", long)
