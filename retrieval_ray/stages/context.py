"""What every stage of one run shares: the config, the store, the student, the numeric profile."""

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import Any

from retrieval_ray import __version__
from retrieval_ray.artifacts import Location, Stage, under
from retrieval_ray.config import Config, to_dict
from retrieval_ray.forecast import Ledger
from retrieval_ray.model_files import Model
from retrieval_ray.progress import say
from retrieval_ray.stages import meter
from retrieval_ray.stages.claims import Claims
from retrieval_ray.stages.profile import Profile

_RECORDED = (
    "ray", "torch", "transformers", "sentence-transformers", "pyarrow", "numpy",
    "bm25s", "pytrec-eval-terrier",
)  # fmt: skip
STAGES = ("corpus", "generate", "queries", "encode", "retrieve", "score", "groups", "train", "evaluate")


# Of a config: where and how a run is made and who is told, not what it is.
EXECUTION_KEYS = ("output_dir", "store", "compute", "tracking", "prices")


class WouldRun(Exception):
    """Raised in a dry run by the first stage that is not finished."""


@dataclass
class Context:
    config: Config
    store: Location
    profile: Profile
    chosen_student: Model | None = None  # None: the config's
    dry_run: bool = False
    quiet: bool = False  # nothing is said of what is done already
    planned: list[str] = field(default_factory=list)
    started: dict[str, float] = field(default_factory=dict)
    touched: dict[str, Stage] = field(default_factory=dict)  # every stage that was asked for, by fingerprint
    ledger: Ledger = field(default_factory=Ledger)
    claims: Claims | None = None  # of a sweep's trial, which shares its store with others at the same time
    trial: str | None = None  # what a sweep calls this run
    telling: dict[str, Any] = field(default_factory=dict)  # see tracking.py: of this process's runs
    silenced: set[str] = field(default_factory=set)  # trackers that cannot be told

    @functools.cached_property
    def student(self) -> Model:
        """The student. Raises ``UserError`` where the config's is nowhere."""
        config = self.config.student
        return self.chosen_student or Model.of(
            config.model, "student.model", trust_remote_code=config.trust_remote_code
        )

    def store_url(self) -> str:
        """The store as a config names it, for another run; a URL with the options it was given with."""
        if self.store.is_local:
            return self.store.url
        return self.config.store or under(self.config.output_dir, "store")

    def start(self, stage: Stage, label: str) -> bool:
        """Whether this stage must be worked on. Says so when it is reused.

        In a dry run a stage that is not finished ends the walk through the stages.
        """
        known = stage.fingerprint in self.touched
        self.touched[stage.fingerprint] = stage
        if self.claims and not stage.finished():
            self.claims.take(stage.fingerprint)  # another trial may finish it meanwhile
        if stage.finished():
            if self.claims:
                self.claims.give_back(stage.fingerprint)
            if not known:
                self.ledger.reused(ledger_name(stage))
                self.planned.append(f"reuse  {label} ({stage.name}-{stage.fingerprint})")
                if not self.quiet:
                    say(f"{label}: done already ({stage.folder.path.rpartition('/')[2]})")
            return False
        if self.dry_run:
            there = len([n for n in stage.folder.names() if not n.startswith(".")])
            self.planned.append(
                f"run    {label} ({stage.name}-{stage.fingerprint})"
                + (f", {there} parts there already" if there else "")
            )
            raise WouldRun
        say(label)
        self.ledger.begun(ledger_name(stage), stage.fingerprint)
        self.started[stage.fingerprint] = time.monotonic()
        return True

    def finish(
        self,
        stage: Stage,
        parts: Sequence[str],
        *,
        rows: int,
        worked: int | None = None,
        share: float = 1.0,
        busy: float | None = None,
        collection: str | None = None,
        **facts: object,
    ) -> None:
        """Write the stage's manifest, with the resolved config, wall time and library versions.

        rows: of the stage's table. worked: how many of them this run worked on (None: all of them); their
        rate is the stage's throughput. share: of the time since it started that was this stage's. busy:
        seconds that workers were at work on these, added up, where that is known; their start is not in it.
        collection: the stage's rows and rejects are counted on it now (meter.py); None: they were as they
        were made, or are nobody's.
        """
        seconds = share * (time.monotonic() - self.started[stage.fingerprint])
        worked = rows if worked is None else worked
        if collection is not None:
            rejected = facts.get("rejected")
            meter.count(
                stage.name, collection, rows=worked, errors=rejected if isinstance(rejected, dict) else None
            )
        sizes = stage.folder.sizes()
        size = sum(sizes[part] for part in parts)
        happened: dict[str, float] = {"rows": rows}
        if worked == rows:  # else an earlier run took time and tokens too
            happened["seconds"] = round(seconds, 3)
            tokens = facts.get("tokens")
            if isinstance(tokens, dict):
                happened |= {"tokens_in": tokens["in"], "tokens_out": tokens["out"]}
        foreseen = self.ledger.ended(stage.fingerprint, size, happened)
        if foreseen:
            facts["forecast"] = foreseen
        if busy is not None:
            facts["busy_seconds"] = round(busy, 3)
        stage.finish(
            parts,
            rows=rows,
            **facts,
            bytes=size,
            seconds=round(seconds, 3),
            rows_this_run=worked,
            rows_per_second=round(worked / max(seconds, 1e-9), 3),
            config=to_dict(self.config),
            versions={"retrieval-ray": __version__} | {n: metadata.version(n) for n in _RECORDED},
        )
        if self.claims:
            self.claims.give_back(stage.fingerprint)

    def worker_resources(self) -> dict[str, float]:
        """Ray resources of one worker."""
        gpus = self.config.compute.gpus_per_worker
        if gpus is None:
            gpus = 1.0 if self.profile.device == "cuda" else 0.0
        return {"num_cpus": self.config.compute.cpus_per_worker, "num_gpus": gpus}

    def anew(self, **changes: Any) -> "Context":
        """Another walk through the stages, with these fields changed, that has met none of them yet."""
        return replace(self, **{"planned": [], "started": {}, "touched": {}, "ledger": Ledger(), **changes})

    def with_student(self, student: Model) -> "Context":
        """The same run with another student (the adapted one, for evaluation)."""
        return replace(self, chosen_student=student)


def ledger_name(stage: Stage) -> str:
    """What a stage is called in forecasts: by its name; of encoding, also by whose texts."""
    role = stage.identity.get("role")
    return f"{stage.name}-{role}" if role else stage.name
