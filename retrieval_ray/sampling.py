"""Which passages queries are written for: uniform, or evenly over strata; capped and seeded."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence

STRATA = 10  # of `length`: tenths of the passages by their number of words
WAYS = ("uniform", "length", "title")


def sample(passages: Sequence[tuple[str, str, str]], most: int, *, way: str, seed: int) -> list[str]:
    """Ids of at most ``most`` passages, sorted.

    passages: (passage_id, title, text). ``uniform``: every passage alike. ``length``: as many from each
    tenth of the lengths. ``title``: as many from each title, for corpora whose passages are pieces of
    titled documents of unequal size. A stratum that has too few gives all it has, and the others more.
    Within a stratum the order is that of a seeded hash of the id, so new passages displace few.
    """
    if len(passages) <= most:
        return sorted(passage_id for passage_id, _, _ in passages)
    strata: dict[str, list[str]] = defaultdict(list)
    if way == "uniform":
        strata[""] = [passage_id for passage_id, _, _ in passages]
    elif way == "title":
        for passage_id, title, _ in passages:
            strata[title].append(passage_id)
    elif way == "length":
        by_length = sorted((len(text.split()), passage_id) for passage_id, _, text in passages)
        for at, (_, passage_id) in enumerate(by_length):
            strata[str(at * STRATA // len(by_length))].append(passage_id)
    else:
        raise ValueError(f"way of sampling '{way}' is not one of {', '.join(WAYS)}")
    for name, ids in strata.items():
        strata[name] = sorted(ids, key=lambda passage_id: _hash(seed, passage_id))
    chosen: list[str] = []
    # The smallest strata first: what they cannot give is shared among those that remain.
    waiting = sorted(strata, key=lambda name: (len(strata[name]), _hash(seed, name)))
    for at, name in enumerate(waiting):
        share = (most - len(chosen)) // (len(waiting) - at)
        chosen += strata[name][:share]
    return sorted(chosen)


def _hash(seed: int, key: str) -> str:
    return hashlib.sha256(f"{seed}\0{key}".encode()).hexdigest()
