"""Rank-only teachers: a language model that answers with an order, like "[2] > [1] > [3]".

A window moves over the pool from its back to its front, so that good passages are carried along to the
top (RankGPT, arXiv 2304.09542, section 3.2). What comes out is an order and nothing more: a passage's
score is minus its rank. It depends on the whole pool, so such a score belongs to (query, pool, passage).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Failure:
    """Why there is no reply, or no order. passing: another attempt may fare better."""

    reason: str
    detail: str
    passing: bool = False


Ask = Callable[[list[Messages]], list[str | Failure]]  # prompts -> replies

PROMPT_VERSION = 2
ORDERS_VERSION = 2  # of how replies are read
_MAX_WORDS = 300  # of a passage, as in RankGPT's code
_MAX_CHARACTERS = 2_400  # and of one whose language has no spaces between words, or that is no language
_THOUGHT = re.compile(r"<(?:think(?:ing)?|thought|reasoning)>")
_NAMED = re.compile(r"\[\s*(\d{1,6})\s*\]")
_CHAIN = re.compile(r"\d{1,6}(?:(?:\s*>\s*|,\s+)\d{1,6})+")  # numbers of a list, not those of a sentence
_SYSTEM = "You are an assistant that ranks passages by how well they answer a search query."


def windows(count: int, window: int, stride: int) -> list[tuple[int, int]]:
    """(first, after the last) of each window over ``count`` passages, from the back to the front."""
    found, end = [], count
    while count:
        found.append((max(0, end - window), end))
        if end <= window:
            break
        end -= stride
    return found


def prompt(query: str, passages: Sequence[str], max_words: int = _MAX_WORDS) -> Messages:
    """What the model is asked about one window; passages are numbered from 1."""
    listed = "\n".join(
        f"[{n}] {' '.join(text.split()[:max_words])[:_MAX_CHARACTERS]}"
        for n, text in enumerate(passages, start=1)
    )
    asked = (
        f"Search query: {query}\n\n{listed}\n\nRank the {len(passages)} passages above by relevance to the "
        f"search query: {query}\nList all identifiers, the most relevant first, in the form [2] > [1]. "
        "Answer with that list alone, without any explanation."
    )
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": asked}]


def parse_order(reply: str, count: int) -> tuple[list[int], bool] | Failure:
    """The positions 0 .. count-1 in the order of a reply, and whether it had to be repaired.

    Identifiers that are no passage and those that were named before are dropped; passages that are not
    named follow in their present order. Lists of numbers without brackets are read where no bracket is
    there; of a model that thinks aloud only what follows its thoughts. A reply that names no passage, as a
    refusal, is no order (``no_order``), nor is one that ends within thoughts (``thought``).
    """
    text = re.split(r"</(?:think(?:ing)?|thought|reasoning)>", reply)[-1]
    if _THOUGHT.search(text):
        return Failure("thought", reply[:200])
    named = _NAMED.findall(text) or re.findall(r"\d+", " ".join(_CHAIN.findall(text)))
    valid = [int(number) - 1 for number in named if 1 <= int(number) <= count]
    if not valid:
        return Failure("no_order", reply[:200])
    order = list(dict.fromkeys([*valid, *range(count)]))
    return order, [number + 1 for number in order] != list(map(int, named))


def rank(
    ask: Ask, queries: Sequence[str], pools: Sequence[Sequence[str]], *, window: int, stride: int
) -> tuple[list[list[int] | Failure], int]:
    """Each query's pool in the model's order, as positions, and how many replies had to be repaired.

    The pools come in the order of retrieval. All queries take their windows in step: one round asks for
    one window of each at once. A query ends with the first window that fails.
    """
    orders: list[list[int] | Failure] = [list(range(len(pool))) for pool in pools]
    repaired = 0
    plans = [windows(len(pool), window, stride) for pool in pools]
    for turn in range(max(map(len, plans), default=0)):
        asked: list[tuple[int, int, list[int]]] = []  # query, first place of its window, who stands there
        for n, plan in enumerate(plans):
            order = orders[n]
            if not isinstance(order, Failure) and turn < len(plan):
                first, after = plan[turn]
                asked.append((n, first, order[first:after]))
        replies = ask([prompt(queries[n], [pools[n][at] for at in part]) for n, _, part in asked])
        for (n, first, part), reply in zip(asked, replies, strict=True):
            order = orders[n]
            assert not isinstance(order, Failure)
            read = reply if isinstance(reply, Failure) else parse_order(reply, len(part))
            if isinstance(read, Failure):
                orders[n] = read
            else:
                order[first : first + len(part)] = [part[at] for at in read[0]]
                repaired += read[1]
    return orders, repaired
