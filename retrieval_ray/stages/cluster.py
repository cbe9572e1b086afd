"""The Ray cluster of a job: the one it was submitted to, or a local one that it starts itself."""

import logging
import math
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import ray
from omegaconf import OmegaConf
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from retrieval_ray.config import ComputeConfig
from retrieval_ray.doctor import Pool, fit, room
from retrieval_ray.errors import UserError

_AMOUNTS = {"CPU": attrgetter("cpus"), "GPU": attrgetter("gpus")}  # of a pool's nodes
_ANSWER_SECONDS = 20.0
_LAUNCHED = "~/ray_bootstrap_config.yaml"  # what Ray's launcher leaves on the head that it starts


def given() -> bool:
    """Whether this job runs on a cluster that is there already."""
    return bool(os.environ.get("RAY_ADDRESS"))


def join(
    compute: ComputeConfig, gpus: float | None = None, *, trials: int = 1, dashboard: bool = False
) -> None:
    """Join the given cluster, or start a local one, and check that it can hold the workers.

    gpus: of one worker; None: what the cluster offers. trials: runs at the same time, each with workers of
    its own. dashboard: of a local cluster, on this machine alone.
    Raises ``UserError`` when the cluster cannot ever give what the workers ask for: Ray itself would wait
    for it silently and for ever.
    """
    connect(compute, dashboard=dashboard)
    _check(compute, gpus_per_worker(compute) if gpus is None else gpus, trials)


def connect(compute: ComputeConfig, *, dashboard: bool = False) -> None:
    """Join the given cluster, or start a local one."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its C++ side warns of what Ray Data itself does
    for name in ("ray.data", "ray._private.authentication"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if ray.is_initialized():
        return
    local = {} if given() else {"address": "local", "num_cpus": compute.logical_cpus}
    _reach()
    try:
        ray.init(
            **local,
            include_dashboard=None if given() else dashboard,
            log_to_driver=False,
            logging_level="error",
        )
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        raise UserError(
            f"Ray: {error}. If something answers there, is it a head of the same Ray version, and the token "
            "the same (RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or the file ~/.ray/auth_token)?"
        ) from error


def _reach() -> None:
    """Raises ``UserError`` where nothing answers at the given address: Ray would try for many minutes."""
    host, _, port = os.environ.get("RAY_ADDRESS", "").rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():  # none, or a word like auto
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"RAY_ADDRESS: no cluster answers at {host}:{port} ({error}); start one there, or unset "
            "RAY_ADDRESS for one of this job's own"
        ) from error


def beside_me() -> NodeAffinitySchedulingStrategy:
    """On this process's node, which is lost with it: for small actors that a whole job hangs on."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def gpus_per_worker(compute: ComputeConfig) -> float:
    """As told; else one where the cluster has GPUs, or can get some."""
    if compute.gpus_per_worker is not None:
        return compute.gpus_per_worker
    return 1.0 if offered(compute).get("GPU", 0) else 0.0


def offered(compute: ComputeConfig) -> dict[str, float]:
    """What the cluster has of each resource, or may grow to.

    A cluster that takes its machines when they are asked for has none when a job begins. How far it grows
    is known of one that Ray's launcher started; of others nothing is asked (``compute.autoscale``).
    """
    there, (types, nodes) = dict(ray.cluster_resources()), node_types()
    most = {
        name: math.inf if compute.autoscale else sum(of(p) * p.count for p in _fullest(types, nodes, of))
        for name, of in _AMOUNTS.items()
    }
    return {name: max(there.get(name, 0.0), most.get(name, 0.0)) for name in {*there, *most}}


def node_types() -> tuple[list[Pool], int]:
    """The kinds of nodes that Ray's launcher may start, and how many of all together; none on other clusters.

    Read where the driver runs, on the head: Ray itself does not tell (ray#63012).
    """
    path = Path(_LAUNCHED).expanduser()
    if not given() or not path.is_file():
        return [], 0
    config: Any = OmegaConf.to_container(OmegaConf.load(path))
    types = [
        Pool(
            float(kind["resources"].get("CPU", 0)), float(kind["resources"].get("GPU", 0)),
            int(kind.get("max_workers", 0)),
        )
        for kind in config["available_node_types"].values()
    ]  # fmt: skip
    return types, int(config["max_workers"])


def _fullest(types: Sequence[Pool], nodes: int, worth: Callable[[Pool], float]) -> list[Pool]:
    """So many nodes, those first that are worth most."""
    kept = []
    for pool in sorted(types, key=worth, reverse=True):
        kept.append(replace(pool, count=min(pool.count, nodes)))
        nodes -= kept[-1].count
    return kept


def pools(compute: ComputeConfig, gpus: float) -> list[Pool] | None:
    """The nodes that are there, or may still come; None where nobody knows how many these are.

    Of those that may come, as many as may be there together: the ones that hold most workers, with so many
    GPUs each.
    """
    if compute.autoscale:
        return None
    types, nodes = node_types()
    if not types:
        return _nodes()
    return _fullest(types, nodes, lambda pool: fit(pool, compute.cpus_per_worker, gpus))


def ready(compute: ComputeConfig) -> bool:
    """Whether a node is up that can hold a worker, busy or not: asking for one starts no machine then."""
    return room(_nodes(), compute.cpus_per_worker, gpus_per_worker(compute)) > 0


def _nodes() -> list[Pool]:
    """What is there."""
    there = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Pool(float(has.get("CPU", 0)), float(has.get("GPU", 0)), 1) for has in there]


def _check(compute: ComputeConfig, gpus: float, trials: int) -> None:
    there, workers = offered(compute), compute.fewest_workers()
    key = "compute.workers" if compute.min_workers is None else "compute.min_workers"
    at_once = f" x sweep.trials_at_once={trials}" if trials > 1 else ""
    lower = f"sweep.trials_at_once or {key}" if trials > 1 else key
    needed = {
        # one for the driver of Ray Train, one to spare for Ray Data's own tasks
        "CPU": trials * workers * compute.cpus_per_worker + 2,
        "GPU": trials * workers * gpus,
    }
    for name, amount in needed.items():
        if amount > there.get(name, 0):
            raise UserError(
                f"{key}={workers}{at_once} needs {amount:g} {name} "
                f"({compute.cpus_per_worker} CPU, {gpus:g} GPU each, 2 CPU beside them), and the "
                f"cluster has at most {there.get(name, 0):g}. Lower {lower}, or give the cluster more"
                + (" (a local one: compute.logical_cpus)" if name == "CPU" else "")
            )
    nodes = pools(compute, gpus)
    if nodes is not None and (fitting := room(nodes, compute.cpus_per_worker, gpus)) < trials * workers:
        raise UserError(
            f"{key}={workers}{at_once}: of workers of {compute.cpus_per_worker} CPU and {gpus:g} GPU, each "
            f"whole on one node, the cluster's nodes hold {fitting}. Lower {lower}, or "
            "compute.cpus_per_worker"
        )
