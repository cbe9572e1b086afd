"""The numeric profile: what decides the bits of a result beside its inputs."""

import os
from dataclasses import asdict, dataclass
from typing import Any

import ray
import torch

from retrieval_ray.config import ComputeConfig
from retrieval_ray.errors import UserError
from retrieval_ray.progress import say
from retrieval_ray.stages.cluster import gpus_per_worker
from retrieval_ray.student import default_token_budget, probe_precision


@dataclass(frozen=True)
class Profile:
    """Resolved once, by probing, then written down and read again when a run is resumed."""

    precision: str  # float32 | bfloat16 | float16
    device: str  # cpu | cuda
    threads: int  # per worker
    token_budget: int
    workers: int  # the training world size

    def numeric(self) -> dict[str, Any]:
        """The part that concerns single workers: their number changes no id and no rank."""
        return {key: value for key, value in asdict(self).items() if key != "workers"}


def resolve(
    compute: ComputeConfig, known: dict[str, Any], *, on_cluster: bool, asked: bool = True
) -> Profile:
    """The profile of a run: as told, else as written down in ``known``, else as probed.

    On a cluster a worker is probed: the driver's machine may have neither its GPUs nor its cores.
    asked: false for a plan where no worker is there yet: a machine would be started for it, so it is guessed.
    """
    device, precision = known.get("device"), compute.precision or known.get("precision")
    threads = compute.threads or (known.get("threads") if known.get("workers") == compute.workers else None)
    if not (device and precision and threads):
        probe = (_probe_worker if asked else _guess_worker) if on_cluster else _probe
        found = probe(compute)
        device, precision = device or found["device"], precision or found["precision"]
        threads = threads or found["threads"]
        say(f"numeric profile: {device}, {precision}, {threads} threads a worker")
    budget = compute.token_budget or known.get("token_budget") or default_token_budget(device)
    return Profile(precision, device, threads, budget, compute.workers)


def _probe(compute: ComputeConfig) -> dict[str, Any]:
    """A machine's device, the faster precision on it, and its cores shared out over the workers."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "device": device, "precision": probe_precision(device), "threads": max(1, cores // compute.workers),
    }  # fmt: skip


def _probe_worker(compute: ComputeConfig) -> dict[str, Any]:
    gpus = gpus_per_worker(compute)
    say(f"asking the cluster for a worker of {compute.cpus_per_worker} CPU, {gpus:g} GPU")
    task = ray.remote(num_cpus=compute.cpus_per_worker, num_gpus=gpus)(_probe)
    found: dict[str, Any] = ray.get(task.remote(compute))
    if gpus and found["device"] == "cpu":
        raise UserError(
            f"torch finds no GPU in a worker that was given {gpus:g}: its node's driver is too old for this "
            "torch, or this torch was built without CUDA (Dockerfile, EXTRAS=gpu). jobs/doctor.py names the "
            "nodes; mend them, or set compute.gpus_per_worker=0 to compute on CPUs"
        )
    return found | {"threads": compute.cpus_per_worker}  # what Ray set aside for it, not the whole machine


def _guess_worker(compute: ComputeConfig) -> dict[str, Any]:
    say("no node is up that could hold a worker: its device and precision are guessed")
    device = "cuda" if gpus_per_worker(compute) else "cpu"
    return {"device": device, "precision": "bfloat16", "threads": compute.cpus_per_worker}
