"""Stage folders: a name and a fingerprint, atomic parts, the manifest written last.

A folder without ``manifest.json`` is unfinished. Parts are written to a temporary name and moved,
so a part that can be seen is whole. Works on any ``pyarrow.fs`` filesystem.
"""

import getpass
import hashlib
import io
import json
import os
import tempfile
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from filelock import FileLock

Facts = dict[str, Any]
_OBJECT_STORES = ("s3", "gcs", "abfs")
_SCHEMES = {"gcs": "gs"}  # where a URL does not begin with the filesystem's name
_PIECE = 1 << 22  # bytes
AT_ONCE = 16  # files that are read together where many are read
MOST_BUCKETS = 65_536  # each a file, and an object store takes its time to answer for each
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def digest(value: object) -> str:
    """SHA-256 of the canonical JSON of a value: the same for the same content in any key order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def bucket_of(key: str, buckets: int) -> int:
    """The bucket of a key among a power of two: the low bits of its hash.

    Low bits, so that bucket ``b`` of ``n`` is the union of buckets ``b`` and ``b + n`` of ``2n``.
    """
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "big") % buckets


def bucket_count(rows: int, rows_per_bucket: int = 512) -> int:
    """How many buckets a table is cut into: the power of two that gives about that many rows.

    Never more than ``MOST_BUCKETS``, over which they hold more rows instead.
    """
    count = 1
    while count * rows_per_bucket < rows and count < MOST_BUCKETS:
        count *= 2
    return count


def each(
    function: Callable[[_Item], _Result], items: Iterable[_Item], *, at_once: int = AT_ONCE
) -> Iterator[_Result]:
    """What the function returns for each item, in their order, several at work at a time.

    For the reading of many small files: an object store takes tens of milliseconds to answer, and answers
    many at a time. At most twice ``at_once`` results are held.
    """
    waiting: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(at_once) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == 2 * at_once:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@dataclass(frozen=True)
class Location:
    """A folder on some filesystem, picklable, made from a path or URL (``s3://...``)."""

    filesystem: pafs.FileSystem
    path: str

    @classmethod
    def of(cls, url: str) -> "Location":
        if "://" in url:
            filesystem, path = pafs.FileSystem.from_uri(url)
            return cls(filesystem, path.rstrip("/"))
        return cls(pafs.LocalFileSystem(), os.path.abspath(url))

    def __truediv__(self, name: str) -> "Location":
        return Location(self.filesystem, f"{self.path}/{name}")

    @property
    def url(self) -> str:
        """What a person is told: a path, or a URL."""
        kind = self.filesystem.type_name
        return self.path if self.is_local else f"{_SCHEMES.get(kind, kind)}://{self.path}"

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def exists(self) -> bool:
        return bool(self.filesystem.get_file_info(self.path).type != pafs.FileType.NotFound)

    def names(self) -> list[str]:
        """Names of the entries of this folder, sorted; none where it does not exist."""
        selector = pafs.FileSelector(self.path, allow_not_found=True)
        return sorted(entry.base_name for entry in self.filesystem.get_file_info(selector))

    def sizes(self) -> dict[str, int]:
        """Bytes of every file under this folder, by its path from here; one listing."""
        selector = pafs.FileSelector(self.path, recursive=True, allow_not_found=True)
        files = (info for info in self.filesystem.get_file_info(selector) if info.type == pafs.FileType.File)
        return {info.path[len(self.path) + 1 :]: int(info.size) for info in files}

    def read(self) -> bytes:
        with self.filesystem.open_input_stream(self.path) as stream:
            return bytes(stream.read())

    def write(self, data: bytes) -> None:
        """Write a whole file or nothing."""
        self.write_pieces([data])

    def write_pieces(self, pieces: Iterable[bytes]) -> None:
        """Write a whole file, piece by piece, or nothing.

        On disks to a temporary name in the same folder, then moved; an object store shows an object
        only when all of it has arrived, and cannot move.
        """
        if self.filesystem.type_name in _OBJECT_STORES:
            stream = self.filesystem.open_output_stream(self.path)
            try:
                for piece in pieces:
                    stream.write(piece)
            except BaseException:
                stream.close()  # pyarrow cannot break an upload off: what has arrived is an object now
                self.remove()
                raise
            stream.close()
            return
        folder, _, name = self.path.rpartition("/")
        self.filesystem.create_dir(folder, recursive=True)
        temporary = f"{folder}/.{name}.{uuid.uuid4().hex}.tmp"
        try:
            with self.filesystem.open_output_stream(temporary) as stream:
                for piece in pieces:
                    stream.write(piece)
            self.filesystem.move(temporary, self.path)
        except BaseException:
            if self.filesystem.get_file_info(temporary).type == pafs.FileType.File:
                self.filesystem.delete_file(temporary)
            raise

    def remove(self) -> None:
        """Delete the folder or file if it is there."""
        kind = self.filesystem.get_file_info(self.path).type
        if kind == pafs.FileType.Directory:
            self.filesystem.delete_dir(self.path)
        elif kind == pafs.FileType.File:
            self.filesystem.delete_file(self.path)

    def copy_to(self, target: "Location") -> None:
        """Copy this folder's files (recursively) into the target folder."""
        target.filesystem.create_dir(target.path, recursive=True)
        pafs.copy_files(
            self.path,
            target.path,
            source_filesystem=self.filesystem,
            destination_filesystem=target.filesystem,
        )

    def near(self, content: str) -> "Location":
        """This file on this machine's own disk: itself, or a copy named by its content's hash.

        Copies stay among the temporary files of this user, for whoever reads the same bytes again.
        """
        if self.is_local:
            return self
        folder = os.path.join(tempfile.gettempdir(), f"retrieval_ray-{getpass.getuser()}")
        os.makedirs(folder, mode=0o700, exist_ok=True)
        copy = Location.of(folder) / f"{content}.{self.path.rpartition('.')[2]}"
        if not copy.exists():
            with FileLock(f"{copy.path}.lock"):  # one process of the machine fetches it for all
                if not copy.exists():
                    copy.write_pieces(self.pieces())
        return copy

    def pieces(self) -> Iterator[bytes]:
        """The file's bytes, some megabytes at a time."""
        with self.filesystem.open_input_stream(self.path) as stream:
            while piece := stream.read(_PIECE):
                yield piece

    def read_json(self) -> Any:
        return json.loads(self.read())

    def write_json(self, value: object) -> None:
        self.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())

    def read_table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Read ``.parquet`` or ``.arrow``; a local ``.arrow`` file is memory-mapped, not read."""
        if self.path.endswith(".parquet"):
            return pq.read_table(self.path, filesystem=self.filesystem, columns=columns)
        if self.is_local:
            table = pa.ipc.open_file(pa.memory_map(self.path)).read_all()
        else:
            table = pa.ipc.open_file(pa.BufferReader(self.read())).read_all()
        return table.select(columns) if columns is not None else table

    def write_table(self, table: pa.Table) -> None:
        """Write ``.parquet`` (compressed) or ``.arrow`` (uncompressed IPC, can be mapped)."""
        buffer = io.BytesIO()
        if self.path.endswith(".parquet"):
            pq.write_table(table, buffer, compression="zstd")
        else:
            with pa.ipc.new_file(buffer, table.schema) as writer:
                writer.write_table(table.combine_chunks())
        self.write(buffer.getvalue())


def under(url: str, name: str) -> str:
    """The path or URL of an entry of this folder; what stands behind a URL's ``?`` stays behind."""
    folder, mark, options = url.partition("?") if "://" in url else (url, "", "")
    return f"{folder.rstrip('/')}/{name}{mark}{options}"


@dataclass(frozen=True)
class Stage:
    """One stage's folder in the store: ``<name>-<fingerprint>/``."""

    name: str
    fingerprint: str
    identity: Mapping[str, Any]
    folder: Location

    def finished(self) -> bool:
        return (self.folder / "manifest.json").exists()

    def manifest(self) -> Facts:
        facts: Facts = (self.folder / "manifest.json").read_json()
        return facts

    def content(self) -> str:
        """What this stage wrote, as one hash: the identity that stages downstream build on."""
        return str(self.manifest()["content"])

    def missing(self, parts: Iterable[str]) -> list[str]:
        there = set(self.folder.names())
        return [part for part in parts if part not in there]

    def write(self, part: str, table: pa.Table) -> None:
        (self.folder / part).write_table(table)

    def read(self, part: str, columns: Sequence[str] | None = None) -> pa.Table:
        return (self.folder / part).read_table(columns)

    def read_all(self, prefix: str, columns: Sequence[str] | None = None) -> pa.Table:
        """All parts whose name begins with the prefix, in the order of their names."""
        parts = [name for name in self.parts() if name.startswith(prefix)]
        return pa.concat_tables(each(lambda part: self.read(part, columns), parts))

    def parts(self) -> list[str]:
        return list(self.manifest()["parts"])

    @contextmanager
    def scratch(self) -> Iterator[str]:
        """A folder for temporary files: beside the parts, where their disk is this machine's."""
        beside = self.folder.path if self.folder.is_local else None
        if beside:
            os.makedirs(beside, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".scratch-", dir=beside) as folder:
            yield folder

    def reopen(self) -> None:
        """Make a finished stage unfinished, without its parts: they are to be written anew."""
        parts = self.parts()
        (self.folder / "manifest.json").remove()
        for part in parts:
            (self.folder / part).remove()

    def finish(self, parts: Sequence[str], **facts: object) -> None:
        """Write the manifest: the stage is done. ``parts`` are hashed as they lie on disk."""
        names = sorted(parts)
        files = [self.folder / part for part in names]  # a disk is read one by one: less is held
        hashed = map(_sha256, files) if self.folder.is_local else each(_sha256, files)
        hashes = dict(zip(names, hashed, strict=True))
        manifest = {
            "stage": self.name,
            "fingerprint": self.fingerprint,
            "identity": self.identity,
            "content": digest(hashes),
            "parts": hashes,
            **facts,
        }
        (self.folder / "manifest.json").write_json(manifest)


def stage(store: Location, name: str, identity: Mapping[str, Any]) -> Stage:
    """The folder for this stage with this identity.

    ``identity`` is everything that changes the result (config values, the contents of upstream
    stages, weights, the numeric profile) and nothing else (no paths, no number of actors).
    """
    fingerprint = digest({"stage": name, **identity})[:16]
    return Stage(name, fingerprint, identity, store / f"{name}-{fingerprint}")


def part_name(prefix: str, number: int, suffix: str) -> str:
    """``vectors-0000007.arrow``: zero-padded, so that names sort as numbers do."""
    return f"{prefix}-{number:07d}.{suffix}"


def _sha256(location: Location) -> str:
    state = hashlib.sha256()
    for piece in location.pieces():
        state.update(piece)
    return state.hexdigest()
