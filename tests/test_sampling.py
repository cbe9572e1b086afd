"""Sampling of passages: capped, seeded, and evenly over strata as far as they go."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval_ray.sampling import STRATA, WAYS, sample

Passage = tuple[str, str, str]
CORPORA = st.lists(st.tuples(st.sampled_from(["", "a", "b", "c", "d"]), st.integers(0, 30)), max_size=40).map(
    lambda rows: [(f"p{n:02}", title, "x" * length) for n, (title, length) in enumerate(rows)]
)
SEEDS = st.integers(0, 3)


def filled(sizes: list[int], most: int) -> list[int]:
    """Water into vessels of these sizes, drop by drop, always into the lowest that is not full."""
    levels = [0] * len(sizes)
    for _ in range(min(most, sum(sizes))):
        at = min((level, at) for at, level in enumerate(levels) if level < sizes[at])[1]
        levels[at] += 1
    return sorted(levels)


@given(CORPORA, st.integers(1, 45), st.sampled_from(WAYS), SEEDS, st.randoms(use_true_random=False))
def test_a_sample_is_capped_and_the_same_in_every_run_and_order(
    passages: list[Passage], most: int, way: str, seed: int, rng: random.Random
) -> None:
    found = sample(passages, most, way=way, seed=seed)
    assert found == sorted(set(found)) and set(found) <= {key for key, _, _ in passages}
    assert len(found) == min(most, len(passages))
    shuffled = list(passages)
    rng.shuffle(shuffled)
    assert sample(shuffled, most, way=way, seed=seed) == found


@given(CORPORA, st.integers(1, 45), SEEDS)
def test_titles_give_equally_many_until_they_have_no_more(
    passages: list[Passage], most: int, seed: int
) -> None:
    sizes = Counter(title for _, title, _ in passages)
    titles = {key: title for key, title, _ in passages}
    taken = Counter(titles[key] for key in sample(passages, most, way="title", seed=seed))
    assert sorted(taken[title] for title in sizes) == filled(list(sizes.values()), most)


@pytest.mark.parametrize("letter", ["granite ", "花", "หิ"])
def test_every_tenth_of_the_lengths_gives_equally_many(letter: str) -> None:
    """In scripts without spaces too."""
    lengths = {f"p{n:04}": 1 + n for n in range(1000)}
    keys = list(lengths)
    random.Random(0).shuffle(keys)  # so that ids say nothing about lengths
    passages = [(key, "", letter * lengths[renamed]) for key, renamed in zip(keys, lengths, strict=True)]
    by_id = dict(zip(keys, lengths.values(), strict=True))
    found = sample(passages, 200, way="length", seed=0)
    assert Counter((by_id[key] - 1) * STRATA // 1000 for key in found) == dict.fromkeys(range(STRATA), 20)


def test_where_there_are_more_titles_than_room_small_and_large_ones_have_the_same_chance() -> None:
    passages = [
        (f"{size}-{n}-{at}", f"{size}-{n}", "") for size in (1, 9) for n in range(200) for at in range(size)
    ]
    found = Counter(key.split("-")[0] for key in sample(passages, 200, way="title", seed=0))
    assert 70 <= found["1"] <= 130  # 100 of a binomial with a deviation of 7


def test_a_uniform_sample_gives_every_passage_the_same_chance() -> None:
    passages = [(f"p{n}", "", "") for n in range(20)]
    taken = Counter(key for seed in range(400) for key in sample(passages, 5, way="uniform", seed=seed))
    assert len(taken) == 20 and sum(taken.values()) == 2000
    assert all(60 <= count <= 140 for count in taken.values())  # 100, with a deviation of 9


def test_titles_and_lengths_do_not_change_a_uniform_sample() -> None:
    plain = [(f"p{n}", "", "") for n in range(50)]
    other = [(key, f"t{n % 3}", "x" * n) for n, (key, _, _) in enumerate(plain)]
    assert sample(plain, 10, way="uniform", seed=1) == sample(other, 10, way="uniform", seed=1)


@given(CORPORA, st.integers(1, 20), st.sampled_from(["uniform", "title"]))
def test_a_new_passage_displaces_one_at_most(passages: list[Passage], most: int, way: str) -> None:
    before = set(sample(passages, most, way=way, seed=0))
    after = set(sample([*passages, ("new", "a", "text")], most, way=way, seed=0))
    assert len(before - after) <= 1 and len(after - before) <= 1


def test_another_seed_gives_another_sample() -> None:
    passages = [(f"p{n}", f"t{n % 4}", "x" * n) for n in range(100)]
    for way in WAYS:
        assert len({tuple(sample(passages, 10, way=way, seed=seed)) for seed in range(5)}) == 5


@pytest.mark.parametrize("passages", [[], [("p", "", "")]])
def test_an_unknown_way_is_an_error_whatever_the_passages(passages: list[Passage]) -> None:
    with pytest.raises(ValueError, match="'source' is not one of uniform, length, title"):
        sample(passages, 5, way="source", seed=0)
