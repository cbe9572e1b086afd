"""What the engines of the generate stage share: which requests are open, and the keeping of replies."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from retrieval_ray.artifacts import Location, Stage, digest
from retrieval_ray.contentcache import REPLY, ContentCache
from retrieval_ray.prompts import Request, Wanted
from retrieval_ray.replies import Reply
from retrieval_ray.stages.encode import part_texts
from retrieval_ray.stages.meter import count

Block = dict[str, Any]  # `number` of a corpus part and some `passages` of it


@dataclass(frozen=True)
class Asking:
    """The requests of a generate stage, and the replies that came so far."""

    corpus: Stage
    target: Stage
    store: Location
    generator: str  # everything that decides a reply beside the messages
    wanted: Wanted
    buckets: int
    collection: str  # what its requests are counted on

    def requests(self, block: Block) -> list[tuple[bytes, Request]]:
        """All requests for these passages with their keys, in order."""
        chosen, cache = set(block["passages"]), self._cache()
        ids, texts = part_texts(self.corpus, int(block["number"]), "passage")
        passages = ((key, text) for key, text in zip(ids, texts, strict=True) if key in chosen)
        # The question holds the passage, so there is no other text to the key.
        return [(cache.key(r.question(), ""), r) for r in self.wanted.requests(passages)]

    def open(self, block: Block) -> list[tuple[bytes, Request]]:
        """Those that have no reply yet."""
        known = self._known(block)
        return [(key, request) for key, request in self.requests(block) if key not in known]

    def answered(self, block: Block) -> bool:
        """Whether anything was ever answered about these passages' part."""
        return bool(self._known(block))

    def keep(self, number: int, replies: Iterable[tuple[bytes, Reply]]) -> None:
        """Commit replies: what was answered for ever, what failed for the rest of this run."""
        answered: list[tuple[bytes, Reply]] = []
        failed: dict[str, str] = {}
        for key, reply in replies:
            if reply.text is None:
                failed[reply.query_id] = reply.error or "no reply"
            else:
                answered.append((key, reply))
        replied = [reply for _, reply in answered]
        count(
            "generate",
            self.collection,
            rows=len(replied) + len(failed),
            tokens={"in": sum(r.tokens_in for r in replied), "out": sum(r.tokens_out for r in replied)},
            errors={"no_reply": len(failed)},
        )
        self._cache().write(
            number,
            self.buckets,
            [key for key, _ in answered],
            [
                {name: getattr(reply, name) for name in ("text", "tokens_in", "tokens_out", "cut")}
                for reply in replied
            ],
        )
        if failed:
            name = f"failed-{number:07d}-{digest(failed)[:12]}.parquet"
            table = pa.table({"query_id": list(failed), "error": list(failed.values())})
            self.target.write(name, table)

    def replies(self, block: Block) -> list[tuple[Request, Reply]]:
        """Every request with its reply, or with the error that it met last."""
        known, errors = self._known(block), self.failures(int(block["number"]))
        found = []
        for key, request in self.requests(block):
            row = known.get(key)
            if row is None:
                error = errors.get(request.query_id, "no reply")
                found.append((request, Reply(request.query_id, None, error, 0, 0)))
            else:
                found.append((request, Reply(request.query_id, error=None, **row)))
        return found

    def forget_failures(self) -> None:
        """Remove what an earlier run noted: its requests are asked again."""
        for name in self.target.folder.names():
            if name.startswith("failed-"):
                (self.target.folder / name).remove()

    def failures(self, number: int | None = None) -> dict[str, str]:
        """The errors of this run by query_id, of one part or of all."""
        errors: dict[str, str] = {}
        for name in self.target.folder.names():
            if name.startswith("failed-" if number is None else f"failed-{number:07d}-"):
                table = self.target.read(name)
                columns = (table.column(c).to_pylist() for c in ("query_id", "error"))
                errors.update(zip(*columns, strict=True))
        return errors

    def _known(self, block: Block) -> dict[bytes, Any]:
        return self._cache().read(int(block["number"]), self.buckets)

    def _cache(self) -> ContentCache:
        return ContentCache(self.store / "replies", self.generator, REPLY)


def blocks_of(part: Block, passages: int) -> list[Block]:
    """A part cut into blocks of so many passages."""
    ids: Sequence[str] = part["passages"]
    return [{**part, "passages": ids[at : at + passages]} for at in range(0, len(ids), passages)]
