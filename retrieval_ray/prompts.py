"""Six kinds of queries: what an LLM is asked, for one passage.

The kinds are CADET's (arXiv 2505.19274 and 2502.19712): question, claim, title, keywords, and what a
user would type, without examples (``user_query``) and with them (``user_query_few_shot``). The words
are ours. Exemplars stand as earlier turns of the conversation, so the reply needs no marks around it;
instructions stand in the first user turn, because some chat templates know no system role. What many
prompts share comes first: what all kinds are told, the kind's own instruction, exemplars, and last the
passage, so an engine that keeps prefixes computes all but the passage once for every passage that draws
the same exemplars.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from retrieval_ray.errors import UserError
from retrieval_ray.generator import query_id_of

PROMPT_VERSION = "prompts-2"
EXEMPLARS = 3  # shown in a prompt, as in the papers' code
PASSAGE_CHARS = 2048  # the papers' cut
Messages = list[dict[str, str]]

_START = (
    "You help to build a search engine. You will be given passages. For each, first find its main idea, "
    "which you keep to yourself; then"
)
_ALONE = "make sense on its own to someone who has not seen the passage"
_COMMON = (
    f"Use fewer than 20 words. It must {_ALONE}, and must not repeat long pieces of the passage's wording."
)
_TASKS = {
    "question": f"write one natural question about it that the passage answers directly. {_COMMON}",
    "claim": "write one specific claim about it, a single sentence that could be checked and that the "
    f"passage supports directly. {_COMMON}",
    "title": f"write one short title for it, which fits what the passage directly deals with. {_COMMON}",
    "keywords": "write up to 5 keywords or short phrases for it, separated by commas. Prefer general terms "
    f"to phrases copied from the passage, and repeat none. Each must {_ALONE}.",
    "user_query": "write one query about it as somebody would casually type or say it to a search engine: a "
    "phrase that names the topic, a brief description, or a question. The passage answers it directly, but "
    f"they do not know its wording. {_COMMON}",
    "user_query_few_shot": "write one natural search query about it that the passage answers directly, in "
    f"the manner of the examples. {_COMMON}",
}
KINDS = tuple(_TASKS)
# The column of the pool that shows a kind; user_query is shown nothing.
_SHOWN = {
    "question": "question", "claim": "claim", "title": "title", "keywords": "keywords",
    "user_query_few_shot": "query",
}  # fmt: skip
_NAMES = {
    "question": "question", "claim": "claim", "title": "title", "keywords": "keywords",
    "user_query": "query", "user_query_few_shot": "query",
}  # fmt: skip


@dataclass(frozen=True)
class Pool:
    """Exemplars to draw from: rows of a passage and what was written for it, and the rows' digest."""

    rows: tuple[Mapping[str, str], ...]
    sha: str

    def draw(
        self, kind: str, passage_id: str, *, seed: int, sets: int | None, passage: str = ""
    ) -> list[tuple[str, str]]:
        """(passage, reply) exemplars for a prompt of this kind: the same in every run.

        passage: the text that is asked about; an exemplar about it would tell the answer and is replaced.
        sets: how many different draws there are for a kind; fewer are kept longer in an engine's
        prefix cache. None: every passage has a draw of its own, as in the papers' code.
        """
        column = _SHOWN.get(kind)
        if column is None:
            return []
        number = _number(f"{seed}\0{kind}\0{passage_id}")
        number = number if sets is None else number % sets
        usable = [row for row in self.rows if row.get(column, "").strip()]
        drawn = random.Random(f"{seed}-{kind}-{number}").sample(usable, min(EXEMPLARS, len(usable)))
        if any(_about(row["passage"], passage) for row in drawn):
            usable = [row for row in usable if not _about(row["passage"], passage)]
            drawn = random.Random(f"{seed}-{kind}-{number}").sample(usable, min(EXEMPLARS, len(usable)))
        return [(row["passage"], row[column]) for row in drawn]


def read_pool(path: str | None, language: str | None = None) -> Pool:
    """A pool of exemplars: a JSONL file of one's own, else ours (English where the language has none).

    A row has ``passage`` and one or more of ``question``, ``claim``, ``title``, ``keywords`` and
    ``query``. Raises ``UserError`` where a row has not, with its line.
    """
    if path is not None and not Path(path).is_file():
        what = "a folder, not a JSONL file" if Path(path).is_dir() else "no such file"
        raise UserError(f"llm.exemplars: {what}: {path}")
    if path is not None:
        try:
            where, text = path, Path(path).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8: {error}") from error
    else:
        folder = resources.files("retrieval_ray") / "exemplars"
        own = folder / f"{(language or 'en').lower()}.jsonl"
        chosen = own if own.is_file() else folder / "en.jsonl"
        where, text = str(chosen), chosen.read_text(encoding="utf-8")
    rows: list[Mapping[str, str]] = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand in a text
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}, line {number}: not valid JSON: {error}") from error
        shown = set(_SHOWN.values())
        fit = isinstance(row, dict) and all(isinstance(value, str) for value in row.values())
        there = {name for name, value in row.items() if value.strip()} if fit else set()
        if "passage" not in there or not shown & there:
            raise UserError(
                f"{where}, line {number}: an exemplar needs 'passage' and one of "
                f"{', '.join(sorted(shown))}, all of them texts"
            )
        rows.append(row)
    if not rows:
        raise UserError(f"{where}: holds no exemplars")
    return Pool(tuple(rows), hashlib.sha256(text.encode()).hexdigest())


@dataclass(frozen=True)
class Request:
    """One reply that is wanted."""

    query_id: str
    passage_id: str
    kind: str
    messages: Messages
    seed: int

    def question(self) -> str:
        """Everything that the model is told, as one text."""
        return json.dumps([self.messages, self.seed], ensure_ascii=False)


@dataclass(frozen=True)
class Wanted:
    """What is to be written for every passage.

    kinds: how many queries of each. language: see ``messages``. sets: see ``Pool.draw``. Raises
    ``UserError`` where few-shot queries are wanted of a pool that has none to show.
    """

    kinds: Mapping[str, int]
    pool: Pool
    language: str | None
    sets: int | None
    seed: int
    structured: bool = False

    def __post_init__(self) -> None:
        few_shot = "user_query_few_shot"
        if self.kinds.get(few_shot) and not self.pool.draw(few_shot, "", seed=0, sets=None):
            raise UserError(f"llm.exemplars: no row has 'query', which llm.kinds.{few_shot} shows")

    def requests(self, passages: Iterable[tuple[str, str]]) -> list[Request]:
        """The requests for (passage_id, text) pairs; those with the same prefix stand together."""
        found: list[tuple[str, Request]] = []
        for passage_id, text in passages:
            for kind, count in self.kinds.items():
                shown = self.pool.draw(kind, passage_id, seed=self.seed, sets=self.sets, passage=text)
                turns = messages(kind, text, shown, language=self.language, structured=self.structured)
                for number in range(count):
                    version = PROMPT_VERSION if number == 0 else f"{PROMPT_VERSION}.{number}"
                    query_id = query_id_of(passage_id, kind, version)
                    seed = _number(f"{self.seed}\0{query_id}") % 2**31
                    prefix = f"{kind}\0{json.dumps(shown)}"
                    found.append((prefix, Request(query_id, passage_id, kind, turns, seed)))
        return [request for _, request in sorted(found, key=lambda pair: (pair[0], pair[1].query_id))]


def messages(
    kind: str,
    passage: str,
    exemplars: Sequence[tuple[str, str]],
    *,
    language: str | None,
    structured: bool = False,
) -> Messages:
    """The conversation whose next turn is the query. The passage is cut to 2,048 characters.

    language: of the query, as one would say it ("German") or as a code; None: the passage's own.
    structured: the reply is to be JSON (``JSON_SCHEMA``), and the exemplars show it so.
    """
    wanted = f"in the language '{language}'" if language else "in the passage's language"
    form = 'as plain text in JSON: {"query": "..."}' if structured else "as plain text on one line"
    instruction = f"{_START} {_TASKS[kind]} Write it {wanted}. Reply with the {_NAMES[kind]} alone, {form}."
    turns: Messages = []
    for text, written in exemplars:
        reply = json.dumps({"query": written}, ensure_ascii=False) if structured else written
        turns += [{"role": "user", "content": _ask(text)}, {"role": "assistant", "content": reply}]
    turns.append({"role": "user", "content": _ask(passage)})
    turns[0] = {"role": "user", "content": f"{instruction}\n\n{turns[0]['content']}"}
    return turns


def _about(exemplar: str, passage: str) -> bool:
    """Whether the one text holds the other: titles may stand before a passage of the corpus."""
    one, other = " ".join(exemplar.split()), " ".join(passage.split())
    return bool(one and other) and (one in other or other in one)


def _number(key: str) -> int:
    return int(hashlib.sha256(key.encode()).hexdigest()[:15], 16)


def _ask(passage: str) -> str:
    return f"Passage: {' '.join(passage[:PASSAGE_CHARS].split())}"


JSON_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"query": {"type": "string", "minLength": 3, "maxLength": 300}},
    "required": ["query"],
    "additionalProperties": False,
}  # of a reply, where structured output is asked for
