"""Prompts: six kinds, exemplars drawn alike in every run, what is common first; and the pool we ship."""

import hashlib
import json
import os
import tomllib
from collections import Counter
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval_ray import prompts
from retrieval_ray.errors import UserError
from retrieval_ray.prompts import (
    EXEMPLARS,
    KINDS,
    PASSAGE_CHARS,
    PROMPT_VERSION,
    Pool,
    Request,
    Wanted,
    messages,
    read_pool,
)
from retrieval_ray.replies import parse

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = {"question": "question", "claim": "claim", "title": "title", "keywords": "keywords",
           "user_query_few_shot": "query"}  # fmt: skip
POOL = read_pool(None)
PASSAGES = [(f"p{n}", f"Passage number {n} about granite.") for n in range(40)]
MIXES = st.dictionaries(st.sampled_from(KINDS), st.integers(0, 3), max_size=6)


def wanted(
    kinds: dict[str, int] | None = None,
    *,
    language: str | None = None,
    sets: int | None = None,
    seed: int = 0,
) -> Wanted:
    return Wanted(kinds or dict.fromkeys(KINDS, 1), POOL, language, sets, seed)


def told(request: Request) -> str:
    """What the model reads, as a chat template lays it out: one turn after the other."""
    return "".join(f"<{turn['role']}>{turn['content']}" for turn in request.messages)


def prefix(request: Request) -> str:
    """Everything before the passage that the query is for."""
    return told(request).rpartition("Passage: ")[0]


def row(**columns: object) -> str:
    return json.dumps({"passage": "A passage.", **columns}, ensure_ascii=False)


# --- what is asked ----------------------------------------------------------------------------


def test_there_are_six_kinds() -> None:
    assert KINDS == ("question", "claim", "title", "keywords", "user_query", "user_query_few_shot")


ALL = (
    "find its main idea",
    "on its own to someone who has not seen the passage",
    "as plain text on one line",
)
SENTENCES = ("Use fewer than 20 words", "not repeat long pieces of the passage's wording", "directly")
CONSTRAINTS = {
    "question": (
        "write one natural question", "the passage answers directly", "Reply with the question alone",
    ),
    "claim": ("write one specific claim", "the passage supports directly", "Reply with the claim alone"),
    "title": ("write one short title", "the passage directly deals with", "Reply with the title alone"),
    "keywords": (
        "write up to 5 keywords", "separated by commas", "repeat none",
        "Prefer general terms to phrases copied from the passage", "Reply with the keywords alone",
    ),
    "user_query": (
        "write one query", "casually type or say", "names the topic, a brief description, or a question",
        "The passage answers it directly", "do not know its wording", "Reply with the query alone",
    ),
    "user_query_few_shot": (
        "write one natural search query", "the passage answers directly", "in the manner of the examples",
        "Reply with the query alone",
    ),
}  # fmt: skip


def instruction_of(kind: str, *, structured: bool = False) -> str:
    first = messages(kind, "Text.", [], language=None, structured=structured)[0]["content"]
    return first.removesuffix("\n\nPassage: Text.")


@pytest.mark.parametrize(
    ("kind", "constraint"),
    [
        (kind, constraint)
        for kind in KINDS
        for constraint in (*ALL, *CONSTRAINTS[kind], *(SENTENCES if kind != "keywords" else ()))
    ],
)
def test_a_prompt_states_every_constraint_of_its_kind(kind: str, constraint: str) -> None:
    assert constraint in instruction_of(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_asks_for_no_other_kind(kind: str) -> None:
    others = {words[0] for other, words in CONSTRAINTS.items() if other != kind}
    assert not any(asked in instruction_of(kind) for asked in others)
    assert ("casually" in instruction_of(kind)) == (kind == "user_query")
    assert ("comma" in instruction_of(kind)) == (kind == "keywords")
    assert ("examples" in instruction_of(kind)) == (kind == "user_query_few_shot")


@pytest.mark.parametrize("kind", KINDS)
def test_the_main_idea_is_found_first_and_is_not_the_reply(kind: str) -> None:
    first = instruction_of(kind)
    assert first.index("main idea, which you keep to yourself") < first.index(CONSTRAINTS[kind][0])
    assert first.index(CONSTRAINTS[kind][0]) < first.index("alone, as plain text")


def test_what_all_kinds_are_told_comes_first() -> None:
    shared = os.path.commonprefix([instruction_of(kind) for kind in KINDS])
    assert shared.endswith("then write ") and len(shared) > 100


@pytest.mark.parametrize("kind", KINDS)
def test_a_structured_reply_is_asked_for_and_shown_as_json(kind: str) -> None:
    asked = f"{instruction_of(kind).rpartition('alone, ')[0]}alone, "
    assert instruction_of(kind, structured=True) == asked + 'as plain text in JSON: {"query": "..."}.'
    exemplars = POOL.draw(kind, "p", seed=0, sets=None)
    plain = messages(kind, "Text.", exemplars, language=None)
    shown = messages(kind, "Text.", exemplars, language=None, structured=True)
    assert [json.loads(turn["content"]) for turn in shown[1::2]] == [
        {"query": turn["content"]} for turn in plain[1::2]
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_a_conversation_that_ends_with_the_passage(kind: str) -> None:
    """Without a system turn, which some chat templates refuse, and with turns that alternate."""
    request = next(r for r in wanted().requests([("p", "Basalt\n is  dark.")]) if r.kind == kind)
    shown = 0 if kind == "user_query" else 3
    assert [turn["role"] for turn in request.messages] == ["user", "assistant"] * shown + ["user"]
    assert request.messages[-1]["content"].endswith("Passage: Basalt is dark.")
    rows = {(example["passage"], example.get(COLUMNS.get(kind, ""))) for example in POOL.rows}
    for ask, reply in zip(request.messages[:-1:2], request.messages[1::2], strict=True):
        assert (ask["content"].rpartition("Passage: ")[2], reply["content"]) in rows
    asked = [turn["content"] for turn in request.messages if turn["role"] == "user"]
    assert asked[0].startswith(f"{instruction_of(kind)}\n\nPassage: ")  # and is said once
    assert all(content.startswith("Passage: ") for content in asked[1:])


@given(st.text(min_size=1), st.integers(0, 40))
def test_a_passage_is_one_line_of_at_most_2048_of_its_characters(piece: str, times: int) -> None:
    passage = piece * times * 100
    last = messages("title", passage, [], language=None)[-1]["content"]
    instruction, asked = last.split("\n\n", 1)
    assert asked == "Passage: " + " ".join(passage[:2048].split())
    assert messages("title", passage[:PASSAGE_CHARS], [], language=None)[-1]["content"] == last
    assert "\n" not in instruction


@pytest.mark.parametrize("kind", KINDS)
def test_the_language_is_asked_for_where_the_prompt_begins(kind: str) -> None:
    exemplars = POOL.draw(kind, "p", seed=0, sets=None)
    german = messages(kind, "Text.", exemplars, language="German")
    own = messages(kind, "Text.", exemplars, language=None)
    assert "Write it in the language 'German'." in german[0]["content"]
    assert "Write it in the passage's language." in own[0]["content"]
    assert german[1:] == own[1:]


# --- exemplars --------------------------------------------------------------------------------


@given(st.sampled_from(KINDS), st.text(), st.integers(), st.none() | st.integers(1, 40))
def test_exemplars_are_three_rows_of_the_pool_the_same_each_time(
    kind: str, passage_id: str, seed: int, sets: int | None
) -> None:
    drawn = POOL.draw(kind, passage_id, seed=seed, sets=sets)
    assert drawn == Pool(tuple(dict(row) for row in POOL.rows), "").draw(
        kind, passage_id, seed=seed, sets=sets
    )
    column = COLUMNS.get(kind, "")
    assert set(drawn) <= {(row["passage"], row.get(column)) for row in POOL.rows}
    assert len(set(drawn)) == (0 if kind == "user_query" else EXEMPLARS)


@pytest.mark.parametrize("kind", COLUMNS)
def test_every_passage_has_its_draw_of_as_many_as_there_are_sets(kind: str) -> None:
    def draws(sets: int | None, seed: int = 0) -> list[tuple[tuple[str, str], ...]]:
        return [tuple(POOL.draw(kind, f"p{n}", seed=seed, sets=sets)) for n in range(200)]

    assert len(set(draws(1))) == 1
    assert len(set(draws(4))) == 4
    assert len(set(draws(None))) > 150  # of 20 * 19 * 18 ordered threes
    assert {pair for draw in draws(None) for pair in draw} == {
        (r["passage"], r[COLUMNS[kind]]) for r in POOL.rows
    }
    assert draws(None, seed=1) != draws(None) and draws(4, seed=1) != draws(4)


def test_the_kinds_are_shown_different_exemplars() -> None:
    drawn = {tuple(passage for passage, _ in POOL.draw(kind, "p", seed=0, sets=None)) for kind in COLUMNS}
    assert len(drawn) == len(COLUMNS)


@pytest.mark.parametrize("sets", [None, 4])
def test_no_passage_is_shown_its_own_answer(sets: int | None) -> None:
    """A pool from a query log holds passages of the corpus, before which a title may stand there."""
    rows = tuple({"passage": f"passage number {n} of six", "query": f"query {n}"} for n in range(6))
    pool = Pool(rows, "")
    for n in range(6):
        for key in range(40):
            text = f"Title passage  number {n} of\nsix"
            drawn = pool.draw("user_query_few_shot", f"p{key}", seed=0, sets=sets, passage=text)
            own = pool.draw("user_query_few_shot", f"p{key}", seed=0, sets=sets)
            assert len(set(drawn)) == EXEMPLARS and f"query {n}" not in dict(drawn).values()
            assert drawn == own or f"query {n}" in dict(own).values()


def test_a_pool_that_is_too_small_shows_what_it_has() -> None:
    pool = Pool(({"passage": "A", "query": "a"}, {"passage": "B", "title": "b", "query": " "}), "")
    assert pool.draw("user_query_few_shot", "p", seed=0, sets=None) == [("A", "a")]
    assert pool.draw("title", "p", seed=0, sets=None) == [("B", "b")]
    assert pool.draw("question", "p", seed=0, sets=None) == []


def test_few_shot_queries_need_something_to_show() -> None:
    pool = Pool(({"passage": "A", "title": "a"},), "")
    with pytest.raises(UserError, match="llm.exemplars: no row has 'query'"):
        Wanted({"title": 1, "user_query_few_shot": 2}, pool, None, None, 0)
    assert Wanted({"title": 1, "question": 1, "user_query_few_shot": 0}, pool, None, None, 0).kinds


# --- requests ---------------------------------------------------------------------------------


@given(MIXES, st.integers(0, 5))
def test_every_passage_gets_as_many_of_each_kind_as_wanted(kinds: dict[str, int], passages: int) -> None:
    asked = Wanted(kinds, POOL, None, 4, 0).requests(PASSAGES[:passages])
    expected = {(key, kind): n for key, _ in PASSAGES[:passages] for kind, n in kinds.items() if n}
    assert Counter((request.passage_id, request.kind) for request in asked) == expected
    assert len({request.query_id for request in asked}) == len(asked)
    assert len({request.question() for request in asked}) == len(asked)
    assert all(0 <= request.seed < 2**31 for request in asked)


@given(st.permutations(PASSAGES[:6]), st.none() | st.integers(1, 4))
def test_a_request_does_not_depend_on_the_others_or_their_order(
    passages: list[tuple[str, str]], sets: int | None
) -> None:
    together = wanted(sets=sets).requests(passages)
    assert together == wanted(sets=sets).requests(PASSAGES[:6])
    alone = [request for passage in passages for request in wanted(sets=sets).requests([passage])]
    assert sorted(alone, key=str) == sorted(together, key=str)


def test_more_queries_of_a_kind_leave_those_before_as_they_were() -> None:
    one, three = (wanted({"claim": count}).requests(PASSAGES) for count in (1, 3))
    assert {r.query_id for r in one} < {r.query_id for r in three}
    assert {r.question() for r in one} < {r.question() for r in three}


def test_the_prompts_are_those_of_earlier_runs() -> None:
    """Another text of the prompts, another drawing or another pool needs another PROMPT_VERSION.

    Ids, messages and seeds of eight passages. Recorded; when it changes, raise the version and record.
    """
    asked = wanted(dict.fromkeys(KINDS, 2), sets=32, seed=7).requests(PASSAGES[:8])
    said = json.dumps([[r.query_id, r.messages, r.seed] for r in asked])
    found = hashlib.sha256(said.encode()).hexdigest()[:16]
    assert (PROMPT_VERSION, found) == ("prompts-2", "646a69307c9f111a")


def test_the_version_of_the_prompts_is_part_of_an_id(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {request.query_id for request in wanted().requests(PASSAGES)}
    monkeypatch.setattr(prompts, "PROMPT_VERSION", "prompts-next")
    after = {request.query_id for request in wanted().requests(PASSAGES)}
    assert len(before) == len(after) == 6 * len(PASSAGES) and not before & after


def test_what_a_reply_depends_on_is_in_the_question() -> None:
    """Replies are kept by it: none may be taken for that of another prompt."""
    first = wanted().requests(PASSAGES[:1])
    for other in (
        wanted(language="German").requests(PASSAGES[:1]),
        wanted(seed=1).requests(PASSAGES[:1]),
        wanted().requests([("p0", "Another text.")]),
    ):
        assert not {r.question() for r in first} & {r.question() for r in other}


# --- prefixes ---------------------------------------------------------------------------------


def test_the_passage_is_the_last_thing_that_is_said() -> None:
    for request in wanted().requests(PASSAGES):
        text = dict(PASSAGES)[request.passage_id]
        assert told(request) == f"{prefix(request)}Passage: {text}"


def test_prompts_with_the_same_exemplars_share_all_but_the_passage_and_stand_together() -> None:
    asked = wanted(sets=4).requests(PASSAGES)
    runs = [key for key, _ in groupby(asked, key=prefix)]
    assert len(runs) == len(set(runs)) == 5 * 4 + 1  # four draws of five kinds, and user_query
    for kind in KINDS:
        assert [r.kind for r in asked].count(kind) == len(PASSAGES)


def test_all_prompts_of_a_kind_share_the_instruction_at_least() -> None:
    asked = wanted(sets=None).requests(PASSAGES)
    for kind in KINDS:
        shared = os.path.commonprefix([told(request) for request in asked if request.kind == kind])
        instruction = messages(kind, "", [], language=None)[0]["content"].partition("\n\n")[0]
        assert shared.startswith(f"<user>{instruction}\n\nPassage: ") and len(instruction) > 200


# --- a pool of one's own ----------------------------------------------------------------------


def test_a_pool_of_ones_own_is_read(tmp_path: Path) -> None:
    """From a log, for instance: passages and queries. A line separator inside a text ends no line."""
    path = tmp_path / "pool.jsonl"
    lines = [row(query="how\u2028so \x85", source="log"), "", row(query="größe", title="Größe"), ""]
    path.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    pool = read_pool(str(path), "German")
    assert [dict(r) for r in pool.rows] == [json.loads(lines[0]), json.loads(lines[2])]
    assert [reply for _, reply in pool.draw("title", "p", seed=0, sets=None)] == ["Größe"]


def test_a_pool_is_known_by_what_it_holds(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    for path, query in zip(paths, ("one", "one", "two"), strict=True):
        path.write_text(row(query=query))
    first, second, third = (read_pool(str(path)).sha for path in paths)
    assert first == second != third != POOL.sha


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "holds no exemplars"),
        ("\n \n", "holds no exemplars"),
        (f"{row(query='a')}\n{{", "line 2: not valid JSON"),
        (f"{row(query='a')}\n\n[1]", "line 3: an exemplar needs 'passage' and one of claim, keywords,"),
        (row(), "line 1: an exemplar needs"),
        (row(query="  "), "line 1: an exemplar needs"),
        (row(user_query="a"), "line 1: an exemplar needs"),
        (row(passage=" ", query="a"), "line 1: an exemplar needs"),
        (row(query=5), "line 1: .* all of them texts"),
        (row(query="a", title=None), "line 1: .* all of them texts"),
    ],
)
def test_a_pool_that_cannot_be_used_is_the_users_error(content: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=says):
        read_pool(str(path))


def test_a_pool_that_is_not_there_or_not_text_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="llm.exemplars: no such file: .*nowhere"):
        read_pool(str(tmp_path / "nowhere.jsonl"))
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(row(query="größe").encode("latin-1"))
    with pytest.raises(UserError, match="latin.jsonl: not UTF-8"):
        read_pool(str(latin))


# --- the pool that we ship --------------------------------------------------------------------


@pytest.mark.parametrize("language", [None, "en", "EN", "German", "xx", "../en", "de/../en"])
def test_where_a_language_has_no_pool_ours_is_in_english(language: str | None) -> None:
    assert read_pool(None, language) == POOL


@pytest.mark.parametrize("kind", COLUMNS)
def test_our_pool_shows_every_kind_at_least_twelve_different_replies(kind: str) -> None:
    column = COLUMNS[kind]
    pairs = [(r["passage"], r[column]) for r in POOL.rows if column in r]
    assert len({reply for _, reply in pairs}) == len({passage for passage, _ in pairs}) == len(pairs) >= 12
    for passage, reply in pairs:
        assert 0 < len(reply.split()) < 20
        assert len(passage) <= PASSAGE_CHARS  # or the reply may be about what was cut
        assert parse(reply, passage, kind=kind, language=None, max_words=64, max_copied=0.7) == reply
        assert parse(reply, passage, kind=kind, language="en", max_words=64, max_copied=0.7) == reply


def test_our_exemplars_are_what_their_kind_says() -> None:
    for example in POOL.rows:
        assert example["question"].endswith("?") and not example["title"].endswith((".", "?"))
        assert example["claim"].endswith(".")
        words = [word.strip() for word in example["keywords"].split(",")]
        assert 2 <= len(words) == len(set(words)) <= 5
        assert example["query"] == example["query"].lower()  # as it is typed
        assert len({example[column] for column in COLUMNS.values()}) == 5


def test_the_pool_is_in_the_package_and_the_client_among_its_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    shipped = project["tool"]["setuptools"]["package-data"]["retrieval_ray"]
    package = ROOT / "retrieval_ray"
    found = {path for pattern in shipped for path in package.glob(pattern)}
    assert found >= set((package / "exemplars").iterdir()) and len(found) >= 2
    assert any(name.startswith("aiohttp") for name in project["project"]["dependencies"])
