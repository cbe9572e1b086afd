"""What every stage of one run shares: the config, the store, the student, the numeric profile."""

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata

from retrieval_ray import __version__
from retrieval_ray.artifacts import Location, Stage
from retrieval_ray.config import Config, to_dict
from retrieval_ray.model_files import Model
from retrieval_ray.progress import say
from retrieval_ray.stages.claims import Claims
from retrieval_ray.stages.profile import Profile

_RECORDED = (
    "ray", "torch", "transformers", "sentence-transformers", "pyarrow", "numpy",
    "bm25s", "pytrec-eval-terrier",
)  # fmt: skip
STAGES = ("corpus", "generate", "queries", "encode", "retrieve", "score", "groups", "train", "evaluate")


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
    claims: Claims | None = None  # of a sweep's trial, which shares its store with others at the same time

    @functools.cached_property
    def student(self) -> Model:
        """The student. Raises ``UserError`` where the config's is nowhere."""
        config = self.config.student
        return self.chosen_student or Model.of(
            config.model, "student.model", trust_remote_code=config.trust_remote_code
        )

    def start(self, stage: Stage, label: str) -> bool:
        """Whether this stage must be worked on. Says so when it is reused.

        In a dry run a stage that is not finished ends the walk through the stages.
        """
        self.touched[stage.fingerprint] = stage
        if self.claims and not stage.finished():
            self.claims.take(stage.fingerprint)  # another trial may finish it meanwhile
        if stage.finished():
            if self.claims:
                self.claims.give_back(stage.fingerprint)
            if not self.quiet:
                say(f"{label}: done already ({stage.folder.path.rpartition('/')[2]})")
            self.planned.append(f"reuse  {label} ({stage.name}-{stage.fingerprint})")
            return False
        if self.dry_run:
            there = len([n for n in stage.folder.names() if not n.startswith(".")])
            self.planned.append(
                f"run    {label} ({stage.name}-{stage.fingerprint})"
                + (f", {there} parts there already" if there else "")
            )
            raise WouldRun
        say(label)
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
        **facts: object,
    ) -> None:
        """Write the stage's manifest, with the resolved config, wall time and library versions.

        rows: of the stage's table. worked: how many of them this run worked on (None: all of them); their
        rate is the stage's throughput. share: of the time since it started that was this stage's.
        """
        seconds = share * (time.monotonic() - self.started[stage.fingerprint])
        worked = rows if worked is None else worked
        stage.finish(
            parts,
            rows=rows,
            **facts,
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

    def with_student(self, student: Model) -> "Context":
        """The same run with another student (the adapted one, for evaluation)."""
        return replace(self, chosen_student=student)
