"""Which passages queries are written for: uniform, or evenly over strata; capped and seeded."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable

STRATA = 10  # of `length`: tenths of the passages by their number of characters
WAYS = ("uniform", "length", "title")


def sample(passages: Iterable[tuple[str, str, str]], most: int, *, way: str, seed: int) -> list[str]:
    """Ids of at most ``most`` passages, sorted.

    passages: (passage_id, title, text). ``uniform``: every passage alike. ``length``: as many from each
    tenth of the lengths. ``title``: as many from each title, for corpora whose passages are pieces of
    titled documents of unequal size. A stratum that has too few gives all it has, and the others more.
    Within a stratum the order is that of a seeded hash of the id, so new passages displace few.
    """
    strata: dict[str, list[str]] = defaultdict(list)
    if way == "uniform":
        strata[""] = [passage_id for passage_id, _, _ in passages]
    elif way == "title":
        for passage_id, title, _ in passages:
            strata[title].append(passage_id)
    elif way == "length":
        # Characters: a text in Chinese or Thai has no spaces to count words by.
        by_length = sorted((len(text), passage_id) for passage_id, _, text in passages)
        for at, (_, passage_id) in enumerate(by_length):
            strata[str(at * STRATA // len(by_length))].append(passage_id)
    else:
        raise ValueError(f"way of sampling '{way}' is not one of {', '.join(WAYS)}")
    # In turns: the first passage of every stratum, then the second ... In the last turn, for which there
    # may not be room, a hash decides who goes first: neither the large strata nor the small ones.
    turns: list[tuple[int, str, str]] = []
    for name, ids in strata.items():
        ranked = sorted(ids, key=lambda passage_id: _hash(seed, passage_id))
        own = _hash(seed, name)
        turns += [(turn, own, passage_id) for turn, passage_id in enumerate(ranked[:most])]
    return sorted(passage_id for _, _, passage_id in sorted(turns)[:most])


def _hash(seed: int, key: str) -> str:
    return hashlib.sha256(f"{seed}\0{key}".encode()).hexdigest()
