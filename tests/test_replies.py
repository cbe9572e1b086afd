"""Replies: a natural query passes as it stands; everything else is cleaned, or dropped with its reason."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from retrieval_ray import demo
from retrieval_ray.checks import is_copied, is_repetitive, is_too_long
from retrieval_ray.prompts import JSON_SCHEMA, KINDS
from retrieval_ray.replies import Drop, parse
from retrieval_ray.scripts import script_of
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
PIECES = (
    "{", '{"query": ', "[", '["', "```", "<think>", "</think>", "<|eot_id|>", "assistant", "<b>", "</b>", "_",
    "**", '"', "“", "- ", "1. ", "2. ", ", ", "\n", "\n\n", "\u2028", "\x00", "Query: ", "Sure! ",
    "I cannot ", "Here is a question: ", "Main idea: ", "Let me know if ", "granite ",
    "<|channel|>analysis<|message|>", "<|channel|>final<|message|>", "analysisWe ", "assistantfinal",
    "Title\n", "<query>", "</query>", "Reasoning: ", " | ", " • ", "\r", "i can't provide ",
)  # fmt: skip
REPLIES = st.lists(st.text(max_size=12) | st.sampled_from(PIECES), max_size=8).map("".join)
REASONS = {
    "empty", "thought", "refusal", "preamble", "cut", "too_long", "repetitive", "other_script", "copied",
}  # fmt: skip


def read(
    reply: str,
    passage: str = ENGLISH,
    *,
    kind: str = "question",
    language: str | None = None,
    words: int = 64,
    copied: float = 0.7,
    cut: bool = False,
) -> str | Drop:
    return parse(reply, passage, kind=kind, language=language, max_words=words, max_copied=copied, cut=cut)


def reason(
    reply: str,
    passage: str = ENGLISH,
    *,
    kind: str = "question",
    language: str | None = None,
    cut: bool = False,
) -> str:
    """The reason for which a reply is dropped, and the query itself where it is not."""
    found = read(reply, passage, kind=kind, language=language, cut=cut)
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
        "I can't log in to my account",
        "i won't write that off meaning",
        "I can't do this anymore lyrics",
        "i have to decline a job offer politely",
        "i am not comfortable writing in cursive",
        "Could you please provide proof of identity online?",
        "can you share a document in google docs with view only",
        "could you send money with western union",
        "please provide a valid email address error",
        "i need more information to apply for a passport",
        "i need more space on my iphone",
        "you didn't include a return address usps",
        "it is not possible to create a folder in onedrive",
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
        "i can't provide information about my previous employer",
        "I can't provide information about my employer.",
        "i cannot provide information requested by the dmv",
        "we cannot provide instructions in braille",
        "i can't give advice to my friends",
        "i can't provide medical certificate for sick leave",
        "i cannot provide medical records to my insurance",
        "i can't give legal advice disclaimer",
        "i can't provide financial information for mortgage",
        "i can't create explicit mappings in automapper",
        "i cannot create graphic material in unity",
        "i cannot create content type in sharepoint",
        "I can't share adult content on discord",
        "i can't write about myself",
        "i can't write about that in my essay",
        "i can't talk about it lyrics",
        "i can't engage the clutch",
        "I can't engage in conversations at work",
        "i can't participate in discussions on canvas",
        "i can't hear you. can you hear me now meme",
        "there is not enough space on the disk",
        "there is not enough memory to create a new folder",
        "there is not enough information to create a profile linkedin",
        "not enough context switches linux",
        "insufficient information synonym",
        "no context meaning",
        "no information available on caller id",
        "null pointer exception",
        "undefined is not a function",
        "no man's sky",
        "no.1 ladies detective agency",
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
        "main idea of plato's republic",
        "reasoning and logic: an introduction",
        "analysis: why rome fell",
        "thinking, fast and slow",
        "thought process model",
        "analysisexception spark",
        "analysis of assistant final exam scores",
        "final channel of the analysis",
        "title ix",
        "query plan",
        "question of the day",
        "i think a good question is half an answer quote",
        "i'd say a question of taste",
        "here's what you need to know about granite",
        "let me know synonym",
        "assistant manager salary",
        "answer key for chapter 4",
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
        "what does <|endoftext|> mean",
        "what does <|channel|> final <|message|> mean",
        "what is '</think>' in deepseek",
        "regex to remove <think>...</think>from output",
        "split on </think> in python",
        "<query> element in solr config",
        "<query>/<filter> in elasticsearch",
        "<title> vs <h1>",
        "<title>foo</title> not shown in browser",
        "<answer> tag",
        "what does </query> close",
        "title tag <title>foo</title>",
        # what repeats itself
        "New York New York",
        "new york new york lyrics",
        "knock knock who's there knock knock",
        "Buffalo buffalo Buffalo buffalo buffalo buffalo Buffalo buffalo",
        "bye bye bye lyrics",
        "location location location",
        "na na na na na na na na batman",
        "tick tock tick tock",
        "had had had had in a sentence",
        "is it true that the more the more the merrier",
        "aaaaaaaaaah",
        "100000000000000000000000000000000000 in words",
        # in other kinds than keywords
        "granite | rocks",
        "granite • rocks",
        "grep foo | sort | uniq",
        "is a < b < c allowed in python",
        "List<String> to String[] java",
        "vector<vector<int>> c++",
        "<b> vs <strong> in html",
        "how to use <br> in html",
        "2**3**2 in python",
        "what does **/test/** match in gitignore",
        '["a", "b"] to pandas column',
        "[object Object] in javascript",
        "how to use 🙏 emoji",
        "json.dumps(obj, indent=2)",
        "user_id is null",
    ],
)
def test_a_natural_query_passes_as_it_stands(query: str) -> None:
    assert read(query, "", language=None) == query
    assert read(query, ENGLISH, language="en") == query or script_of(query) != "Latin"


@pytest.mark.parametrize("name", ["log.jsonl", "queries.jsonl"])
def test_every_query_that_people_wrote_for_the_demo_passes(name: str) -> None:
    lines = (Path(demo.__file__).parent / name).read_text().splitlines()
    queries = [" ".join(json.loads(line)["text"].split()) for line in lines]
    assert len(queries) > 500
    assert [query for query in queries if read(query, "", language="en") != query] == []


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
        "how is granite made\rIt cools.",
        "how is granite made\r\n\r\nIt cools.",
        # other quotes and markup
        "« how is granite made »",
        "„how is granite made”",
        "‹how is granite made›",
        "《how is granite made》",
        "``how is granite made``",
        "``how is granite made''",
        '"how is granite made".',
        "### how is granite made",
        "__how is granite made__",
        "how is **granite** made",
        "<b>how is granite made</b>",
        "how is <em>granite</em> made",
        "<p><b>how is granite made</b></p>",
        "<question>\nhow is granite made\n</question>",
        "<query>how is granite made",
        "<query>\nhow is granite made",
        "<query>how is granite made</query>",
        "<query>how is granite made</query> This query asks for its origin.",
        "<query>how is granite made</query>\nIt cools.",
        "<search_query>how is granite made",
        "<title>how is granite made",
        "how is granite made</query>",
        "Here is the query: <query>how is granite made</query>",
        # labels and headings
        "Query\nhow is granite made",
        "Question\n\nhow is granite made",
        "Claim\n\nhow is granite made",
        "Keywords\n\nhow is granite made",
        "Title\r\n\r\nhow is granite made",
        "Search query\nhow is granite made",
        "Frage\n\nhow is granite made",
        "Answer: how is granite made",
        "**Answer:** how is granite made",
        "Final answer: how is granite made",
        "**Title**\nhow is granite made",
        "### Search query\n\nhow is granite made",
        # alternatives: the first one
        "- how is granite made\n- what is granite",
        "1) how is granite made\n2) what is granite",
        '["how is granite made"]',
        '["how is granite made", "what is granite"]',
        '[{"query": "how is granite made"}]',
        '{"queries": ["how is granite made", "what is granite"]}',
        '{"query": ["how is granite made"]}',
        # what a template leaves
        "assistant\n\nhow is granite made",
        "assistant: how is granite made",
        "<|start_header_id|>assistant<|end_header_id|>\n\nhow is granite made<|eot_id|>",
        "<|im_start|>assistant\nhow is granite made<|im_end|>\n<|im_start|>user\nand you",
        "<start_of_turn>model\nhow is granite made<end_of_turn>",
        "<s> how is granite made </s>",
        "how is granite made</s>",
        "how is granite made<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nwhat is granite",
        "how is granite made<｜end▁of▁sentence｜>",
        "<|channel|>analysis<|message|>Rocks.<|end|><|start|>assistant<|channel|>final<|message|>"
        "how is granite made<|return|>",
        "<|channel|>analysis<|message|>So\nrocks.<|channel|>commentary<|message|>Hm.<|channel|>final "
        '<|constrain|>json<|message|>{"query": "how is granite made"}',
        "<|start|>assistant<|channel|>final<|message|>how is granite made",
        "analysisWe need a query.\nRocks.assistantfinalhow is granite made",
        "analysis We need a query. assistantfinal how is granite made",
        'assistantfinal json{"query": "how is granite made"}',
        "thinking...</think>how is granite made",
        "So rocks</think>how is granite made",
        "So, rocks.\nFine. </think> how is granite made",
        'So rocks</think>"how is granite made"',
        # what is said before
        "I think a good question is: how is granite made",
        'I\'d say a natural question would be "how is granite made"',
        "Reasoning: it is about rocks.\nQuestion: how is granite made",
        "**Reasoning:** it is about rocks\nand magma\n\n**Question:** how is granite made",
        "Reasoning: it is about rocks. Question: how is granite made",
        "Reasoning: it is about rocks\n\nhow is granite made",
        "Analysis: it is about rocks\nQuery: how is granite made",
        "Here is a question:\n\nhow is granite made",
        "**Here is a question:**\n**how is granite made**",
        "Here is a question: how is granite made",
        "Here's a possible search query: how is granite made",
        "Here is my attempt:\nhow is granite made",
        "Here's what someone might type: how is granite made",
        "Here you go: how is granite made",
        "Sure! how is granite made",
        "Sure.\nhow is granite made",
        "Sure! Here's one:\nhow is granite made",
        "Sure, I'd be happy to help! Here is a question:\n\nhow is granite made",
        "Sure thing! How about: how is granite made",
        "Based on the passage, here is a question: how is granite made",
        'A natural question would be: "how is granite made"',
        'The query is "how is granite made"',
        "One possible question that someone might ask is: how is granite made",
        "A user might ask: how is granite made",
        "Main idea: magma cools slowly.\nQuestion: how is granite made",
        "**Main idea:** Magma cools slowly. **Question:** how is granite made",
        "The main idea of the passage is that magma cools.\n\nhow is granite made",
        "Voici une question :\nhow is granite made",
        "Hier ist eine mögliche Suchanfrage: how is granite made",
        "以下是一个问题：\nhow is granite made",
        # and after
        "how is granite made\nLet me know if you want another.",
        "how is granite made\n\nNote: I kept it general.",
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


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\t", "\u00a0"])
def test_only_line_feeds_and_returns_end_a_line(separator: str) -> None:
    for kind in set(KINDS) - {"keywords"}:
        assert read(f"how is{separator}granite made", kind=kind) == "how is granite made"


def test_a_label_alone_is_none_of_the_keywords() -> None:
    assert read("Keywords\n\ngranite, magma", kind="keywords") == "granite, magma"
    assert read("Query\nIndex\nTable", kind="keywords") == "Query, Index, Table"


@pytest.mark.parametrize(
    "after",
    [
        "Let me know if you want another.",
        "(Note: the passage says more.)",
        "I hope this helps!",
        "This question asks about its origin.",
        "Would you like another?",
    ],
)
def test_what_is_said_after_a_query_on_its_line_goes(after: str) -> None:
    assert read(f"How is granite made? {after}") == "How is granite made?"
    assert read(f'"How is granite made?" {after}') == "How is granite made?"
    assert read(f"granite {after}") == f"granite {after}"  # no sentence ends before it


@given(REPLIES, LANGUAGES, st.sampled_from(KINDS), st.booleans())
@example("<think>" * 3, None, "title", False)
@example('{"a":' * 100_000, None, "title", False)
@example("[" * 900 + '"a"' + "]" * 900, None, "title", False)
@example('{"query": "\\ud83d"}', None, "title", False)
@example("\ud83d granite", None, "title", False)
@example("a," * 5_000, None, "keywords", False)
def test_any_reply_gives_a_clean_line_or_a_reason(
    reply: str, language: str | None, kind: str, cut: bool
) -> None:
    found = read(reply, kind=kind, language=language, cut=cut)
    if isinstance(found, tuple):
        assert found[0] in REASONS - (set() if cut else {"cut"})
        assert len(found[1]) < 300
        return
    assert found == " ".join(found.split()) and any(character.isalnum() for character in found)
    found.encode()  # or no table can hold it
    assert read(found, kind=kind, language=language) == found  # read again, it is what it was


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
        "[]",
        "<|eot_id|>",
        "assistant\n",
        "the thought\n</think>",
        "{}",
        '{"query": ""}',
        '{"query": null}',
        '{"query": 5}',
        '{"query": [5]}',
        '["how is granite ma',
        '{"query": "how is granite ma',  # cut before the object ended
        '```json\n{"query": "how is gran',
        '{"query',
        '{"passage": "a", "answer": "b"}',
    ],
)
def test_a_reply_without_a_query_is_empty(reply: str) -> None:
    assert read(reply) == ("empty", reply)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "reply",
    [
        "<think>",
        "<think>The user wants a query, so I shall",
        "<think>\nOkay, the user\nwants",
        "<thinking>granite?",
        "<|im_start|>assistant\n<think>\nOkay",
        "<think>Granite.</think>\n<think>No, magma, or",
        "<|channel|>analysis<|message|>We need a query",
        "<|start|>assistant<|channel|>analysis<|message|>Rocks.<|end|>",
        "analysisWe need to write a query.",
    ],
)
def test_a_thought_that_does_not_end_holds_no_query(reply: str, kind: str, cut: bool) -> None:
    assert reason(reply, kind=kind, cut=cut) == "thought"


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
        "I won't write that.",
        "I will not be able to provide that.",
        "I can't discuss this topic.",
        "I don't feel comfortable writing about that.",
        "I'm not comfortable generating a question for this.",
        "I must decline.",
        "I must respectfully decline to write a claim about this.",
        "It is not appropriate for me to write a title.",
        "Could you please provide the passage?",
        "Can you share the text you want a question for?",
        "Could you provide more context?",
        "Please provide more context.",
        "Please share the full text so I can help.",
        "I need a passage.",
        "I need more context to write a question.",
        "I would need more context before I can answer.",
        "I need more information to write a suitable title.",
        "You haven't provided a passage.",
        "It seems you didn't include the text.",
        "I can't provide information or guidance on illegal or harmful activities.",
        "I can't provide information or guidance on illegal or harmful activities, including drugs",
        "I cannot provide information on how to make bombs.",
        "I can’t provide instructions on how to pick a lock",
        "I cannot provide guidance on that",
        "I can't create explicit content.",
        "I cannot generate explicit content. Is there something else I can help you with?",
        "I can't create content that promotes violence or illegal acts",
        "I can't generate sexually explicit material.",
        "I can't write about that topic.",
        "I can't write about this sensitive subject",
        "I can't talk about that.",
        "I can't engage in conversations that promote hate.",
        "I can't engage in explicit conversations.",
        "I can’t provide medical advice.",
        "I cannot provide legal or financial advice.",
        "I can't give personalized medical advice about that",
        "I can't tell that story. Is there anything else I can help you with?",
        "I can't depict that. Can I help you with something else?",
        "There is not enough context to generate a question.",
        "There isn't enough information in the text to write a claim.",
        "There is insufficient information provided to create a title.",
        "Not enough context to write a question",
        "Insufficient context.",
        "null",
        "undefined",
        "No.",
        '{"query": "null"}',
        '{"query": "I cannot generate a query for this passage."}',
        "<think>Hm.</think>I'm sorry, but I can't help with that.",
    ],
)
def test_a_refusal_is_dropped(reply: str) -> None:
    assert reason(reply) == "refusal"
    assert reason(reply, kind="keywords") == "refusal"


@pytest.mark.parametrize(
    "reply",
    [
        "Here is a question",
        "Here is a question:",
        "Here are 5 keywords:",
        "**Here is a title:**",
        "Here is the output:",
        "Sure!",
        "Sure! Here is a natural question:",
        "Sure, here's one",
        "Sure thing! How about:",
        "Certainly! I can help with that.",
        "Of course. Here is the title:",
        "Okay, so the user wants a query about granite.",
        "Okay, let's see.",
        "Alright, the user gave me a passage about rocks",
        "Hmm, let me think about granite",
        "The question for this passage is how granite is made",
        "Based on the passage, how is granite made?",
        "According to the passage, how is granite made?",
        "According to the provided text, what is granite?",
        "The passage states that granite is coarse.",
        "The main idea of the passage is that granite is coarse.",
        "Main idea: granite is coarse",
        "A user might search for granite origin",
        "We need to produce a query about granite.",
        "I need to write a short title that fits.",
        "The user wants a search query.",
        "I think a good question is:",
        "Reasoning: the passage is about rocks",
        "**Reasoning**: rocks\nand magma\nand lava",
        "Title",
    ],
)
def test_a_preamble_and_no_query_after_it_is_dropped(reply: str) -> None:
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
    query = PASSAGES.get(language, ENGLISH).split("，")[0]
    after = read(f"{reply}\n{query}", PASSAGES.get(language, ENGLISH), copied=1)
    assert after == query if expected == "preamble" else after[0] == "refusal"


# --- keywords ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    [
        "granite, igneous rock, magma",
        "granite,igneous rock,magma",
        "granite; igneous rock; magma",
        "granite\nigneous rock\nmagma",
        "granite | igneous rock | magma",
        "| granite | igneous rock | magma |",
        "granite • igneous rock • magma",
        "• granite • igneous rock • magma",
        "• granite, • igneous rock, • magma",
        "granite · igneous rock · magma",
        "• granite\n• igneous rock\n• magma",
        "granite |\nigneous rock |\nmagma",
        "granite;igneous rock;magma",
        "Keywords\n\n• granite\n• igneous rock\n• magma",
        "<keyword>granite</keyword>, <keyword>igneous rock</keyword>, <keyword>magma</keyword>",
        "granite\n\nigneous rock\n\nmagma",
        "granite,\nigneous rock,\nmagma",
        "granite, igneous rock,\nmagma",
        "- granite\n- igneous rock\n- magma",
        "* granite\n* igneous rock, magma",
        "1. granite\n2. igneous rock\n3. magma",
        "1) **granite**\n2) **igneous rock**\n3) **magma**",
        "Keywords: granite, igneous rock, magma",
        "**Keywords:**\n- granite\n- igneous rock\n- magma",
        "## Keywords\ngranite\nigneous rock\nmagma",
        "Here are three keywords:\n\n1. granite\n2. igneous rock\n3. magma",
        '"granite", "igneous rock", "magma"',
        '"granite, igneous rock, magma"',
        '["granite", "igneous rock", "magma"]',
        '{"query": "granite, igneous rock, magma"}',
        '{"keywords": ["granite", "igneous rock", "magma"]}',
        "granite, igneous rock, Granite, magma, magma",
        "granite, igneous rock, magma\n\nThese keywords are general terms.",
        "granite\nigneous rock\nmagma\nLet me know if you need more",
        "granite\nigneous rock\nmagma\nI chose the terms that people would search for",
        "- granite\n- igneous rock\n- magma\n\nThe first one is the most general",
        "granite, igneous rock, magma\nhow is granite made",
    ],
)
def test_keywords_are_one_query_however_they_are_laid_out(reply: str) -> None:
    assert read(reply, kind="keywords") == "granite, igneous rock, magma"


def test_commas_in_numbers_separate_no_keywords() -> None:
    assert read("1,500 metres race, running", kind="keywords") == "1,500 metres race, running"
    assert read("running, 1,500", kind="keywords", cut=True) == "running"


def test_bars_and_dots_within_a_word_separate_no_keywords() -> None:
    assert read("a|b, p || q", kind="keywords") == "a|b, p || q"
    assert read("卡尔·马克思、资本论", PASSAGES["zh"], kind="keywords") == "卡尔·马克思, 资本论"


def test_keywords_of_other_languages_are_separated_by_their_commas() -> None:
    assert read("花岗岩、岩浆；深成岩", PASSAGES["zh"], kind="keywords") == "花岗岩, 岩浆, 深成岩"
    assert read("صخر، صهارة", PASSAGES["ar"], kind="keywords") == "صخر, صهارة"


@given(st.lists(st.text(alphabet="abcdefgh", min_size=1, max_size=4), min_size=1, max_size=9))
def test_the_first_five_different_keywords_count(terms: list[str]) -> None:
    expected = ", ".join(list(dict.fromkeys(terms))[:5])
    for reply in (", ".join(terms), "\n".join(f"- {term}" for term in terms), json.dumps(terms)):
        assert read(reply, kind="keywords", copied=1) == expected


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"keywords"}))
def test_of_lines_of_another_kind_the_first_counts(kind: str) -> None:
    for reply in ("granite\nmagma", "- granite\n- magma", "1. granite\n2. magma", '["granite", "magma"]'):
        assert read(reply, kind=kind) == "granite"


# --- replies that were cut --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "reply",
    [
        "how is granite",
        "\nhow is granite",
        "how is granite made?",  # or more was to come
        "Here is a question:\nhow is",
        "Sure! how is",
        "Query: how is gran",
        "assistant\nhow is gran",
        "**how is granite",
        "```\nhow is",
        '{"query": "how is granite',
        "<think>Rocks.</think>\nhow is",
        "Title\n\nhow is",
        "Reasoning: rocks\nQuestion: how is",
        "<query>how is",
        "",
    ],
)
def test_a_query_that_was_cut_is_dropped(kind: str, reply: str) -> None:
    assert read(reply, kind=kind, cut=True) == ("cut", reply)


@pytest.mark.parametrize(
    "reply",
    [
        "how is granite made\n",
        "how is granite made\n\nThis query asks for",
        "Here is a question:\n\nhow is granite made\n\nLet me kn",
        "```\nhow is granite made\n``",
        "1. how is granite made\n2. what is granite\n3. how",
        "- how is granite made\n- what is",
        '{"query": "how is granite made"}\n\nIt asks',
    ],
)
def test_a_query_before_the_line_that_was_cut_is_whole(reply: str) -> None:
    for kind in set(KINDS) - {"keywords"}:
        assert read(reply, kind=kind, cut=True) == "how is granite made"


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("granite, igneous rock, mag", "granite, igneous rock"),
        ("granite, igneous rock,", "granite, igneous rock"),
        ("Keywords: granite, igne", "granite"),
        ("- granite\n- igneous rock\n- mag", "granite, igneous rock"),
        ("granite\nigneous rock\nmag", "granite, igneous rock"),
        ("granite, igneous rock\n\nThese keywords, which", "granite, igneous rock"),
        ("a, b, c, d, e, f, g", "a, b, c, d, e"),
        ("花岗岩、岩浆、深", "花岗岩, 岩浆"),
        ("granite | igneous rock | mag", "granite, igneous rock"),
        ("• granite • igneous rock • mag", "granite, igneous rock"),
    ],
)
def test_of_keywords_that_were_cut_the_last_one_goes(reply: str, expected: str) -> None:
    passage = PASSAGES["zh"] if "花" in reply else ENGLISH
    assert read(reply, passage, kind="keywords", cut=True) == expected


@given(st.lists(st.text(alphabet="abcdefgh", min_size=1, max_size=6), min_size=2, max_size=5, unique=True))
def test_wherever_keywords_are_cut_only_whole_ones_are_left(terms: list[str]) -> None:
    whole = ", ".join(terms)
    for at in range(len(whole)):
        found = read(whole[:at], kind="keywords", cut=True)
        left = found.split(", ") if isinstance(found, str) else []
        assert left == terms[: whole[:at].count(",")]
        assert left or found == ("cut", whole[:at])


def test_a_refusal_that_was_cut_is_a_refusal() -> None:
    assert reason("I'm sorry, but I can't help with that. The pass", cut=True) == "refusal"


# --- length -----------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 24))
def test_a_query_of_more_words_than_allowed_is_too_long(most: int, words: int) -> None:
    query = " ".join(f"w{n}" for n in range(words))
    found = read(query, words=most)
    assert found == (query if words <= most else ("too_long", query))


def test_where_there_are_no_spaces_pairs_of_characters_are_counted() -> None:
    """Four for each word that is allowed: a text of 41 characters has 40 pairs."""
    query = "".join(map(chr, range(0x4E00, 0x4E00 + 41)))
    assert read(query, PASSAGES["zh"], words=10) == query
    assert read(f"{query}花", PASSAGES["zh"], words=10) == ("too_long", f"{query}花")


@given(st.integers(1, 20))
def test_a_word_that_is_allowed_has_twelve_characters(most: int) -> None:
    query = "abcdefghijkl" * most
    assert not is_too_long(query, most) and is_too_long(f"{query}m", most)


def test_one_long_word_is_too_long() -> None:
    assert read("A" * 2_000) == ("too_long", "A" * 200)


# --- repetitions ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "query",
    [
        "Who sells copper " * 20,
        "Who sells copper? Who sells copper? Who sells copper?",
        "trade guilds trade guilds trade guilds",
        "Tell me who sells copper, who sells copper, who sells copper",
        "granite " * 9,
        "the big rock big the rock the big rock the the rock big rock the the rock big rock the",
        "A" * 500,
        "ha" * 50,
        "什么是花岗岩" * 3,
        "花" * 30,
    ],
)  # fmt: skip
def test_a_query_that_says_the_same_again_and_again_is_dropped(query: str) -> None:
    assert read(query, "") == ("repetitive", query.strip()[:200])


@pytest.mark.parametrize(
    "query", ["哈哈哈哈", "谢谢谢谢", "恭喜恭喜恭喜你歌词", "もしもし もしもし", "加油加油加油"]
)
def test_a_word_without_spaces_may_be_said_often(query: str) -> None:
    assert read(query, "") == query


@given(
    st.integers(2, 6), st.integers(1, 6), st.integers(0, 12), st.integers(0, 12), st.sampled_from([" ", ", "])
)
def test_a_phrase_three_times_in_more_than_half_of_the_query_is_too_often(
    length: int, times: int, before: int, after: int, between: str
) -> None:
    phrase = " ".join(f"p{n}" for n in range(length))
    query = between.join(
        [*(f"b{n}" for n in range(before)), *[phrase] * times, *(f"a{n}" for n in range(after))]
    )
    words = before + length * times + after
    few = words >= 20 and 3 * (before + length + after) <= words
    assert is_repetitive(query) == (few or (times >= 3 and 2 * length * times > words))


@given(st.lists(st.integers(0, 99), unique=True, max_size=64))
def test_different_words_are_no_repetition(numbers: list[int]) -> None:
    words = [f"w{number}" for number in numbers]
    assert not is_repetitive(" ".join(words))
    assert not is_repetitive(" ".join(words * 2))


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


@pytest.mark.parametrize("language", ["sr", "Serbian", "kk"])
def test_a_language_of_several_scripts_may_be_written_in_each(language: str) -> None:
    for query in ("kako nastaje granit", "како настаје гранит"):
        assert read(query, ENGLISH, language=language) == query
    assert reason("花岗岩怎么形成", language=language) == "other_script"


def test_of_several_languages_each_may_be_written() -> None:
    for query in ("how is granite made", "как образуется гранит"):
        assert read(query, language="English or Russian") == query
    assert reason("花岗岩怎么形成", language="English or Russian") == "other_script"
    assert (
        read("granite kaise banta hai", PASSAGES["hi"], language="Romanized Hindi")
        == "granite kaise banta hai"
    )


def test_a_subtag_says_which_of_the_scripts() -> None:
    assert read("kako nastaje granit", language="sr-Latn") == "kako nastaje granit"
    assert reason("како настаје гранит", language="sr-Latn") == "other_script"
    assert reason("kako nastaje granit", language="sr-Cyrl") == "other_script"


@pytest.mark.parametrize("language", ["xx", "tlh", "Klingon"])
@pytest.mark.parametrize("query", ["how is granite made", "как образуется гранит", "花岗岩怎么形成"])
def test_no_script_is_asked_of_a_language_that_is_not_known(language: str, query: str) -> None:
    assert read(query, PASSAGES["th"], language=language) == query


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
