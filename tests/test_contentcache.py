"""The content cache: shared by corpora cut differently, safe under concurrent writers."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval_ray.artifacts import Location, bucket_of
from retrieval_ray.contentcache import REPLY, SCORE, ContentCache

TEXTS = [f"passage {n}" for n in range(64)]


@pytest.fixture
def store(tmp_path):
    return Location.of(str(tmp_path))


def _scores(store, teacher):
    return ContentCache(store / "scores", teacher, SCORE)


def _fill(cache, buckets, texts=TEXTS, score=float):
    for bucket in range(buckets):
        held = [n for n, text in enumerate(texts) if bucket_of(text, buckets) == bucket]
        cache.write(bucket, buckets, [cache.key("q", texts[n]) for n in held], [score(n) for n in held])


def test_what_is_written_is_read_back_as_float32(store):
    cache = _scores(store, "teacher")
    keys = [cache.key("q", "a"), cache.key("q", "b")]
    cache.write(0, 1, keys, [0.1, -1e30])
    assert cache.read(0, 1) == {keys[0]: float(np.float32(0.1)), keys[1]: float(np.float32(-1e30))}
    assert all(len(key) == 16 for key in keys)


@pytest.mark.parametrize("written", [1, 2, 8, 32])
@pytest.mark.parametrize("read", [1, 4, 16])
def test_corpora_cut_into_other_numbers_of_buckets_share_scores(store, written, read):
    cache = _scores(store, "teacher")
    _fill(cache, written)
    known = [_scores(store, "teacher").read(bucket, read) for bucket in range(read)]
    for n, text in enumerate(TEXTS):
        assert known[bucket_of(text, read)][cache.key("q", text)] == float(n)


def test_a_read_does_not_open_what_cannot_belong_to_it(store):
    cache = _scores(store, "teacher")
    _fill(cache, 8)
    for bucket in range(4):
        expected = {cache.key("q", t) for t in TEXTS if bucket_of(t, 4) == bucket}
        assert cache.read(bucket, 4).keys() == expected


def test_another_teacher_sees_nothing(store):
    _fill(_scores(store, "teacher"), 2)
    other = _scores(store, "teacher v2")
    assert other.read(0, 2) == {} and other.read(1, 2) == {}
    assert other.key("q", "p") != _scores(store, "teacher").key("q", "p")


@given(st.tuples(st.text(), st.text(), st.text()), st.tuples(st.text(), st.text(), st.text()))
def test_keys_are_equal_only_for_equal_teacher_query_and_passage(first, second):
    def key(teacher, query, passage):
        return _scores(Location.of("/nowhere"), teacher).key(query, passage)

    assert (key(*first) == key(*second)) == (first == second)


@given(st.text(min_size=1, max_size=8))
def test_moving_characters_between_the_texts_gives_another_key(text):
    teachers = [_scores(Location.of("/nowhere"), t) for t in ("", "t")]
    keys = {cache.key(text[:cut], text[cut:]) for cache in teachers for cut in range(len(text) + 1)}
    assert len(keys) == 2 * (len(text) + 1)


def test_concurrent_writers_lose_nothing(store):
    """Eight writers at once, the same parts and different ones, while others read."""

    def work(writer):
        cache = _scores(store, "teacher")
        _fill(cache, 4, TEXTS[: 8 * (writer + 1)])
        return [cache.read(bucket, 4) for bucket in range(4)]

    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(work, [0, 0, 1, 2, 3, 5, 7, 7]))
    cache = _scores(store, "teacher")
    known = {key: score for b in range(4) for key, score in cache.read(b, 4).items()}
    assert known == {cache.key("q", text): float(n) for n, text in enumerate(TEXTS)}
    assert all(known[key] == score for parts in seen for part in parts for key, score in part.items())


def test_an_unfinished_write_is_not_read(store):
    cache = _scores(store, "teacher")
    cache.write(0, 1, [cache.key("q", "a")], [1.0])
    (cache.folder / "1/0" / ".half.parquet.abc.tmp").write(b"PAR1 and no more")
    assert cache.read(0, 1) == {cache.key("q", "a"): 1.0}


def test_writing_a_part_again_adds_no_file(store):
    cache = _scores(store, "teacher")
    keys = [cache.key("q", "a"), cache.key("q", "b")]
    cache.write(0, 1, keys, [1.0, 2.0])
    cache.write(0, 1, keys[::-1], [2.0, 1.0])
    cache.write(0, 1, [], [])
    assert len((cache.folder / "1/0").names()) == 1
    assert cache.read(0, 1) == {keys[0]: 1.0, keys[1]: 2.0}


def test_replies_are_kept_whole(store):
    cache = ContentCache(store / "replies", "llm", REPLY)
    replies = [
        {"text": "où? \n«là»", "tokens_in": 300, "tokens_out": 9, "cut": True},
        {"text": "", "tokens_in": 2**40, "tokens_out": 0, "cut": False},
    ]
    keys = [cache.key("prompt", "a"), cache.key("prompt", "b")]
    cache.write(0, 1, keys, replies)
    assert cache.read(0, 1) == dict(zip(keys, replies, strict=True))
