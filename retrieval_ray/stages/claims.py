"""Who works on which stage, where runs share a store at the same time: one does, the others wait."""

import asyncio
from dataclasses import dataclass
from typing import Any

import ray


@ray.remote(num_cpus=0)
class Owners:
    """The run that each stage, by its fingerprint, belongs to until it gives it back, and what runs say."""

    def __init__(self) -> None:
        self.owners: dict[str, str] = {}
        self.ended: set[str] = set()  # runs; a question of theirs may still be waiting
        self.changed = asyncio.Condition()
        self.lines: list[str] = []
        self.refused: dict[str, str] = {}

    async def refuse(self, owner: str, why: str) -> None:
        """A run cannot be, however often it is tried: the user must mend something."""
        self.refused[owner] = why

    async def refusal(self, owner: str) -> str | None:
        """Why a run cannot be."""
        return self.refused.get(owner)

    async def tell(self, line: str) -> None:
        """What a run has to say, for ``told``."""
        self.lines.append(line)

    async def told(self) -> list[str]:
        """What was told since this was asked last."""
        lines, self.lines = self.lines, []
        return lines

    async def take(self, fingerprint: str, owner: str) -> None:
        """Wait until the stage is nobody's or one's own, and take it."""
        async with self.changed:
            await self.changed.wait_for(
                lambda: owner in self.ended or self.owners.get(fingerprint, owner) == owner
            )
            if owner not in self.ended:
                self.owners[fingerprint] = owner

    async def give_back(self, owner: str, fingerprint: str | None) -> None:
        """One stage of a run, or, where it came to an end, all that it held."""
        async with self.changed:
            if fingerprint is None:
                self.ended.add(owner)
            for key in [k for k, o in self.owners.items() if o == owner and fingerprint in (None, k)]:
                del self.owners[key]
            self.changed.notify_all()


@dataclass(frozen=True)
class Claims:
    """One run's hold on stages. owners: the handle of an ``Owners`` that all runs of the store share."""

    owners: Any
    owner: str

    def take(self, fingerprint: str) -> None:
        """Wait until nobody else works on this stage."""
        ray.get(self.owners.take.remote(fingerprint, self.owner))

    def give_back(self, fingerprint: str | None = None) -> None:
        """This stage; None: everything."""
        ray.get(self.owners.give_back.remote(self.owner, fingerprint))
