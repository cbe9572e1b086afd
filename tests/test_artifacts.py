"""Stage folders: whole parts or none, the manifest last, fingerprints of content."""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_ray.artifacts import (
    Location,
    Stage,
    bucket_count,
    bucket_of,
    digest,
    each,
    part_name,
    stage,
    under,
)

FILESYSTEMS = ("local", "url", "subtree", "mock", "fsspec")
TABLE = pa.table({"id": ["a", "b", "c"], "score": [0.5, -1.0, 2.0]})

# JSON values that are equal in Python exactly when they are the same JSON (no 1 == True == 1.0).
JSON = st.recursive(
    st.none() | st.integers(-9, 9) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)
IDENTITIES = st.dictionaries(st.text(max_size=3), JSON, max_size=4)


def location(kind: str, folder: Path) -> Location:
    if kind == "local":
        return Location.of(str(folder))
    if kind == "url":
        return Location.of(f"file://{folder}/")
    if kind == "subtree":
        folder.mkdir(exist_ok=True)
        return Location(pafs.SubTreeFileSystem(str(folder), pafs.LocalFileSystem()), "inner")
    if kind == "mock":
        return Location(pafs._MockFileSystem(), "store")
    memory = fsspec.filesystem("memory", skip_instance_cache=True)
    return Location(pafs.PyFileSystem(pafs.FSSpecHandler(memory)), str(folder))


@pytest.fixture(params=FILESYSTEMS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    return location(request.param, tmp_path / "store")


def reordered(value: Any) -> Any:
    """The same JSON with the keys of every object in reverse order."""
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    return [reordered(item) for item in value] if isinstance(value, list) else value


# --- digests, buckets, names ------------------------------------------------------------------


@given(JSON)
@settings(max_examples=100, deadline=None)
def test_digest_does_not_depend_on_key_order(value: Any) -> None:
    assert digest(value) == digest(reordered(value))


@given(JSON, JSON)
@settings(max_examples=100, deadline=None)
def test_digest_is_equal_exactly_for_equal_content(one: Any, other: Any) -> None:
    assert (digest(one) == digest(other)) == (one == other)
    assert digest([one, other]) != digest([other, one]) or one == other


def test_digest_is_the_one_that_stores_were_built_with() -> None:
    """SHA-256 of compact, key-sorted UTF-8 JSON; another one would orphan every existing store."""
    recorded = "99d384bcceb172977f6eaf4ef3a0327d9228fb58de31d042ba9c21853129253a"
    assert digest({"b": "ü", "a": [1, None]}) == recorded  # of `printf '{"a":[1,null],"b":"ü"}'`


@given(st.text(), st.integers(0, 12))
@settings(max_examples=100, deadline=None)
def test_a_bucket_splits_into_two_when_buckets_double(key: str, bits: int) -> None:
    buckets = 2**bits
    coarse, fine = bucket_of(key, buckets), bucket_of(key, 2 * buckets)
    assert 0 <= coarse < buckets
    assert fine in (coarse, coarse + buckets)


def test_buckets_are_even() -> None:
    sizes = Counter(bucket_of(f"passage {n}", 16) for n in range(16_000))
    assert sorted(sizes) == list(range(16))
    assert max(sizes.values()) < 1200 and min(sizes.values()) > 800  # 6 standard deviations


def test_buckets_stay_where_stores_have_them() -> None:
    """The low 10 bits of what `b2sum -l 32` prints. Another hash would move every row."""
    recorded = [0x1271CF25 % 1024, 0x9F371732 % 1024, 0xCE47DFBA % 1024]
    assert [bucket_of(key, 1024) for key in ("", "p17", "日本")] == recorded


@given(st.integers(0, 10**7), st.integers(1, 5000))
@settings(max_examples=100, deadline=None)
def test_bucket_count_is_the_smallest_power_of_two_that_is_enough(rows: int, per: int) -> None:
    powers = [2**n for n in range(25)]
    assert bucket_count(rows, per) == min(65_536, next(n for n in powers if n * per >= rows))


@given(st.lists(st.integers(0, 2**18), unique=True))
@settings(max_examples=100, deadline=None)
def test_part_names_sort_as_numbers_do(numbers: list[int]) -> None:
    """2**18 parts of 512 rows are 134 million passages."""
    names = [part_name("vectors", number, "arrow") for number in sorted(numbers)]
    assert names == sorted(names) and len(set(names)) == len(numbers)


# --- locations --------------------------------------------------------------------------------


def test_a_location_of_a_path_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Location.of("out/run").path == str(tmp_path / "out" / "run")
    assert Location.of("out/run").is_local
    assert not location("mock", tmp_path).is_local


def test_a_file_url_and_a_path_are_the_same_place(tmp_path: Path) -> None:
    (Location.of(f"file://{tmp_path}") / "a").write(b"x")
    assert (Location.of(str(tmp_path)) / "a").read() == b"x"


@pytest.mark.parametrize("kind", ["local", "url", "subtree"])
def test_a_location_travels_to_workers(kind: str, tmp_path: Path) -> None:
    there = pickle.loads(pickle.dumps(location(kind, tmp_path / "store")))
    (there / "a").write(b"x")
    assert (location(kind, tmp_path / "store") / "a").read() == b"x"


def test_bytes_json_and_tables_come_back(store: Location) -> None:
    (store / "deep" / "er" / "a.bin").write(b"\x00\xff")
    (store / "a.json").write_json({"grüße": ["日本", 1.5, None]})
    assert (store / "deep" / "er" / "a.bin").read() == b"\x00\xff"
    assert (store / "a.json").read_json() == {"grüße": ["日本", 1.5, None]}
    for suffix in ("parquet", "arrow"):
        (store / f"t.{suffix}").write_table(TABLE)
        assert (store / f"t.{suffix}").read_table().equals(TABLE)
        assert (store / f"t.{suffix}").read_table(["score"]).equals(TABLE.select(["score"]))
    assert store.names() == ["a.json", "deep", "t.arrow", "t.parquet"]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_tables_of_many_chunks_and_of_no_rows_come_back(store: Location, suffix: str) -> None:
    many = pa.concat_tables([TABLE, TABLE.slice(0, 0), TABLE])
    for table in (many, TABLE.slice(0, 0)):
        (store / f"t.{suffix}").write_table(table)
        assert (store / f"t.{suffix}").read_table().equals(table)


def test_names_exists_and_remove(store: Location) -> None:
    assert store.names() == [] and not (store / "a").exists()
    (store / "a").remove()  # nothing there: nothing happens
    (store / "a" / "x").write(b"1")
    (store / "b").write(b"2")
    assert (store / "a").exists() and (store / "b").exists() and store.names() == ["a", "b"]
    (store / "a").remove()
    (store / "b").remove()
    assert store.names() == []


@pytest.mark.parametrize("kind", FILESYSTEMS)
def test_copy_to_carries_a_folder_to_another_filesystem(kind: str, tmp_path: Path) -> None:
    source = location(kind, tmp_path / "source")
    (source / "model" / "weights").write(b"w" * 1000)
    (source / "model" / "sub" / "config").write(b"c")
    for target in (location("local", tmp_path / "copy"), location("mock", tmp_path)):
        (source / "model").copy_to(target / "model")
        assert (target / "model" / "weights").read() == b"w" * 1000
        assert (target / "model" / "sub" / "config").read() == b"c"


def test_a_local_arrow_file_is_mapped_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Location.of(str(tmp_path)) / "t.arrow"
    place.write_table(pa.table({"text": ["x" * 100] * 20_000}))  # 2 MB
    monkeypatch.setattr(Location, "read", lambda self: pytest.fail("the file was read"))
    before = pa.total_allocated_bytes()
    table = place.read_table()
    assert table.num_rows == 20_000
    assert pa.total_allocated_bytes() - before < 100_000


# --- whole or nothing -------------------------------------------------------------------------


class Broken:
    """A filesystem that records its moves and fails in the middle: for the tests below."""

    def __init__(self, inner: pafs.FileSystem, fails: str = "") -> None:
        self.inner, self.fails, self.moved = inner, fails, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def open_output_stream(self, path: str) -> Any:
        if self.fails == "write":
            with self.inner.open_output_stream(path) as stream:
                stream.write(b"half of it")
            raise OSError("disk full")
        return self.inner.open_output_stream(path)

    def move(self, source: str, target: str) -> None:
        if self.fails == "move":
            raise OSError("connection lost")
        self.inner.move(source, target)
        self.moved.append(target.rpartition("/")[2])


@pytest.mark.parametrize("fails", ["write", "move"])
@pytest.mark.parametrize("old", [None, b"the old content"])
def test_a_failed_write_changes_nothing(store: Location, fails: str, old: bytes | None) -> None:
    if old is not None:
        (store / "a").write(old)
    broken = Location(Broken(store.filesystem, fails), store.path)  # type: ignore[arg-type]
    with pytest.raises(OSError):
        (broken / "a").write(b"the new content")
    assert store.names() == ([] if old is None else ["a"])  # no half file, nothing left over
    if old is not None:
        assert (store / "a").read() == old


def test_a_killed_write_leaves_no_part_that_can_be_seen(tmp_path: Path) -> None:
    code = f"""
import os, signal
import pyarrow.fs as pafs
from retrieval_ray.artifacts import Location

class Killed:
    inner = pafs.LocalFileSystem()
    def __getattr__(self, name):
        return getattr(self.inner, name)
    def open_output_stream(self, path):
        stream = self.inner.open_output_stream(path)
        stream.write(b"half of it")
        stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)

(Location(Killed(), {str(tmp_path / "n-1")!r}) / "p-00000.arrow").write(b"all of it")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    left = os.listdir(tmp_path / "n-1")
    assert left and all(name.startswith(".") for name in left)
    here = Stage("n", "1", {}, Location.of(str(tmp_path / "n-1")))
    assert here.missing(["p-00000.arrow"]) == ["p-00000.arrow"] and not here.finished()
    here.write("p-00000.arrow", TABLE)
    here.finish(["p-00000.arrow"])
    assert here.parts() == ["p-00000.arrow"] and here.read_all("p").equals(TABLE)


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    place = Location.of(str(tmp_path)) / "a"
    whole = [bytes([n]) * 200_000 for n in range(60)]
    place.write(whole[0])
    seen: list[bytes] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.append(place.read())

    reader = threading.Thread(target=read)
    reader.start()
    for data in whole:
        place.write(data)
    done.set()
    reader.join()
    assert all(data in whole for data in seen)


def test_writers_of_the_same_part_do_not_harm_each_other(tmp_path: Path) -> None:
    place = Location.of(str(tmp_path)) / "t.parquet"
    threads = [threading.Thread(target=place.write_table, args=(TABLE,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert place.read_table().equals(TABLE) and os.listdir(tmp_path) == ["t.parquet"]


def test_the_processes_of_a_machine_fetch_a_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "pairs.arrow").write_bytes(b"bytes")
    fetched = []

    def pieces(location: Location) -> list[bytes]:
        fetched.append(location.path)
        time.sleep(0.05)  # so that every other thread comes before the copy is there
        return [b"by", b"tes"]

    monkeypatch.setattr(Location, "pieces", pieces)
    far = Location(pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()), "pairs.arrow")
    with ThreadPoolExecutor(8) as pool:
        copies = list(pool.map(lambda _: far.near("0123"), range(8)))
    assert len(fetched) == 1 and {copy.read() for copy in copies} == {b"bytes"}
    assert copies[0].is_local and copies[0].path.endswith("0123.arrow")
    assert far.near("4567").path != copies[0].path and len(fetched) == 2


# --- stages -----------------------------------------------------------------------------------


@given(IDENTITIES)
@settings(max_examples=100, deadline=None)
def test_fingerprint_does_not_depend_on_key_order_or_place(identity: dict[str, Any]) -> None:
    here, there = Location.of("/tmp/a"), Location(pafs._MockFileSystem(), "b")
    one, other = stage(here, "score", identity), stage(there, "score", reordered(identity))
    assert one.fingerprint == other.fingerprint
    assert one.folder.path == f"/tmp/a/score-{one.fingerprint}"


@given(IDENTITIES, IDENTITIES)
@settings(max_examples=100, deadline=None)
def test_fingerprint_differs_where_the_identity_differs(one: dict[str, Any], other: dict[str, Any]) -> None:
    store = Location.of("/tmp/a")
    same = stage(store, "score", one).folder.path == stage(store, "score", other).folder.path
    assert same == (one == other)
    assert stage(store, "score", one).folder.path != stage(store, "train", one).folder.path


@given(st.lists(st.integers(), max_size=40), st.integers(1, 5))
def test_each_gives_every_result_in_order(items: list[int], at_once: int) -> None:
    assert list(each(lambda item: item * 2, items, at_once=at_once)) == [item * 2 for item in items]


def test_each_works_on_several_at_a_time_and_never_runs_far_ahead() -> None:
    """Three wait for one another, so all three must be at work; and it takes no more than it may hold."""
    together, taken = threading.Barrier(3), []

    def items() -> Any:
        for number in range(30):
            taken.append(number)
            yield number

    def work(number: int) -> int:
        together.wait(timeout=60)
        return number

    for number in each(work, items(), at_once=3):
        assert len(taken) <= number + 6


def test_each_raises_what_the_function_raises() -> None:
    results = each(lambda item: 1 // item, [2, 1, 0, 1])
    assert next(results) == 0 and next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_a_stage_is_finished_when_its_manifest_is_there(store: Location) -> None:
    here = stage(store, "score", {"seed": 1, "teacher": "late@1"})
    assert not here.finished() and here.missing(["b", "a"]) == ["b", "a"]
    here.write("s-00001.parquet", TABLE.slice(1))
    here.write("s-00000.parquet", TABLE.slice(0, 1))
    here.write("other.arrow", TABLE)
    assert not here.finished()
    assert here.missing(["s-00002.parquet", "s-00000.parquet"]) == ["s-00002.parquet"]
    here.finish(["other.arrow", "s-00001.parquet", "s-00000.parquet"], rows=3, reasons={"x": 2})
    assert stage(store, "score", {"teacher": "late@1", "seed": 1}).finished()
    assert here.parts() == ["other.arrow", "s-00000.parquet", "s-00001.parquet"]
    assert here.read_all("s-").equals(TABLE)  # in the order of the names, not of writing
    assert here.read_all("s-", ["id"]).equals(TABLE.select(["id"]))
    facts = here.manifest()
    assert facts["rows"] == 3 and facts["reasons"] == {"x": 2}
    assert facts["stage"] == "score" and facts["identity"] == {"seed": 1, "teacher": "late@1"}
    assert facts["fingerprint"] == here.fingerprint and here.content() == facts["content"]
    json.dumps(facts)


def test_scratch_is_on_this_machines_disk_and_gone_afterwards(store: Location) -> None:
    here = stage(store, "score", {})
    with here.scratch() as folder:
        Path(folder, "some").write_text("some")
        beside = os.path.dirname(folder) == here.folder.path
        assert beside == store.is_local
    assert not os.path.exists(folder) and here.folder.names() == []


def test_the_manifest_is_written_last(store: Location) -> None:
    watched = Broken(store.filesystem)
    here = stage(Location(watched, store.path), "score", {})  # type: ignore[arg-type]
    for number in range(3):
        here.write(part_name("s", number, "parquet"), TABLE)
    assert "manifest.json" not in watched.moved
    here.finish([part_name("s", number, "parquet") for number in range(3)])
    assert watched.moved.index("manifest.json") == len(watched.moved) - 1 == 3


def test_finish_refuses_a_part_that_is_not_there(store: Location) -> None:
    here = stage(store, "score", {})
    here.write("s-00000.parquet", TABLE)
    with pytest.raises(OSError):
        here.finish(["s-00000.parquet", "s-00001.parquet"])
    assert not here.finished()


def test_a_finish_that_fails_leaves_the_stage_unfinished(store: Location) -> None:
    here = stage(store, "score", {})
    here.write("s-00000.parquet", TABLE)
    broken = Location(Broken(store.filesystem, "move"), here.folder.path)  # type: ignore[arg-type]
    with pytest.raises(OSError):
        Stage("score", here.fingerprint, {}, broken).finish(["s-00000.parquet"])
    assert not here.finished()
    here.finish(["s-00000.parquet"])
    assert here.finished()


@given(st.permutations(range(4)), st.integers(0, 4))
@settings(max_examples=25, deadline=None)
def test_content_is_the_same_after_any_interruption(order: list[int], cut: int) -> None:
    names = [part_name("s", number, "parquet") for number in range(4)]
    straight = stage(location("mock", Path()), "score", {})
    resumed = stage(location("mock", Path()), "score", {})
    for number in range(4):
        straight.write(names[number], TABLE.slice(0, number))
    for number in order[:cut]:
        resumed.write(names[number], TABLE.slice(0, number))
    for name in resumed.missing(names):
        resumed.write(name, TABLE.slice(0, names.index(name)))
    straight.finish(names)
    resumed.finish(names[::-1])
    assert straight.manifest() == resumed.manifest()


def test_content_changes_with_any_byte_and_any_part(store: Location) -> None:
    contents = set()
    for number, parts in enumerate([["a"], ["a", "b"], ["b"]]):
        for table in (TABLE, TABLE.slice(1)):
            here = stage(store, "score", {"n": number, "rows": table.num_rows})
            for part in parts:
                here.write(f"{part}.parquet", table)
            here.finish([f"{part}.parquet" for part in parts])
            contents.add(here.content())
    assert len(contents) == 6


def test_an_entry_of_a_folder_goes_before_a_urls_options() -> None:
    assert under("out/run/", "best") == "out/run/best" and under("what?", "best") == "what?/best"
    assert under("s3://lake/run?region=x&scheme=http", "best") == "s3://lake/run/best?region=x&scheme=http"
