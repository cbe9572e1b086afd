"""What every stage of one run shares: the config, the store, the student, the numeric profile."""

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from typing import Any

import ray

from retrieval_ray import __version__
from retrieval_ray.artifacts import Location, Stage
from retrieval_ray.config import Config, to_dict
from retrieval_ray.errors import UserError
from retrieval_ray.progress import say

_RECORDED = (
    "ray", "torch", "transformers", "sentence-transformers", "pyarrow", "numpy",
    "bm25s", "pytrec-eval-terrier",
)  # fmt: skip
STAGES = ("corpus", "queries", "encode", "retrieve", "score", "groups", "train", "evaluate")


class WouldRun(Exception):
    """Raised in a dry run by the first stage that is not finished."""


@dataclass(frozen=True)
class Profile:
    """What decides the bits of a result beside its inputs; resolved once, then written down."""

    precision: str  # float32 | bfloat16
    device: str  # cpu | cuda
    threads: int  # per worker
    token_budget: int
    workers: int  # the training world size

    def numeric(self) -> dict[str, Any]:
        """The part that concerns single workers: their number changes no id and no rank."""
        return {key: value for key, value in asdict(self).items() if key != "workers"}


@dataclass(frozen=True)
class Model:
    """A student: where its folder lies and the hash of everything in it."""

    path: str
    sha: str


@dataclass
class Context:
    config: Config
    store: Location
    profile: Profile
    student: Model
    dry_run: bool = False
    planned: list[str] = field(default_factory=list)
    started: dict[str, float] = field(default_factory=dict)

    def start(self, stage: Stage, label: str) -> bool:
        """Whether this stage must be worked on. Says so when it is reused.

        In a dry run a stage that is not finished ends the walk through the stages.
        """
        if stage.finished():
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

    def finish(self, stage: Stage, parts: Sequence[str], **facts: object) -> None:
        """Write the stage's manifest, with the resolved config, wall time and library versions."""
        stage.finish(
            parts,
            **facts,
            seconds=round(time.monotonic() - self.started[stage.fingerprint], 3),
            config=to_dict(self.config),
            versions={"retrieval-ray": __version__} | {n: metadata.version(n) for n in _RECORDED},
        )

    def worker_resources(self) -> dict[str, float]:
        """Ray resources of one worker."""
        gpus = self.config.compute.gpus_per_worker
        if gpus is None:
            gpus = 1.0 if self.profile.device == "cuda" else 0.0
        return {"num_cpus": self.config.compute.cpus_per_worker, "num_gpus": gpus}

    def with_student(self, student: Model) -> "Context":
        """The same run with another student (the adapted one, for evaluation)."""
        return replace(self, student=student)


def connect(context: Context) -> None:
    """Join the cluster this job was submitted to, or start a local one.

    Raises ``UserError`` when the cluster cannot ever give what the workers ask for: Ray itself
    would wait for it silently and for ever.
    """
    compute = context.config.compute
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
    if not ray.is_initialized():
        if os.environ.get("RAY_ADDRESS"):
            ray.init(log_to_driver=False, logging_level="warning")
        else:
            ray.init(
                address="local",
                num_cpus=compute.logical_cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="warning",
            )
    there = ray.cluster_resources()
    gpus = context.worker_resources()["num_gpus"]
    needed = {
        # one for the driver of Ray Train, one to spare for Ray Data's own tasks
        "CPU": compute.workers * compute.cpus_per_worker + 2,
        "GPU": compute.workers * gpus,
    }
    for name, amount in needed.items():
        if amount > there.get(name, 0):
            raise UserError(
                f"compute.workers={compute.workers} needs {amount:g} {name} "
                f"({compute.cpus_per_worker} CPU, {gpus:g} GPU each, 2 CPU beside them), and the "
                f"cluster has {there.get(name, 0):g}. Lower compute.workers, or give the cluster more"
                + (" (a local one: compute.logical_cpus)" if name == "CPU" else "")
            )
