"""Gathers what ``retrieval_ray.doctor`` judges: one task on each node, and objects sent between them."""

import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from retrieval_ray import sweeps
from retrieval_ray.artifacts import Location
from retrieval_ray.config import Config, RerankerConfig
from retrieval_ray.config_file import with_values
from retrieval_ray.doctor import Node, Problem, Request, counted, problems, report, source_sha
from retrieval_ray.errors import UserError
from retrieval_ray.progress import say
from retrieval_ray.sources import open_source
from retrieval_ray.stages import cluster, sweep
from retrieval_ray.stages.ask_vllm import devices
from retrieval_ray.stages.look import SOURCE, look

_OBJECT_MIB = 32
_PATIENCE = 900.0  # seconds for a node to answer: it may have to start, and to download models
_MOMENT = 60.0  # the same, of one that has answered


@dataclass(frozen=True)
class Visit:
    """What a doctor is called with."""

    config: Config
    dry_run: bool


def ready(config: Config, *, dry_run: bool) -> Visit:
    """In place of a run: writes nothing of its own into the output folder."""
    return Visit(config, dry_run)


def examine(config: Config) -> tuple[str, bool]:
    """Look at every node of the cluster; the report, and whether nothing stands in the way of a job."""
    cluster.connect(config.compute)
    alive = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: str(node["NodeID"]))
    say(f"looking at {counted(len(alive), 'node')}")
    nodes, silent = _nodes(config, alive)
    source, request = source_sha(SOURCE), request_of(config)
    pools = cluster.pools(config.compute, request.gpus)
    found = _datasets(config) + problems(nodes, pools, request, driver_source=source, silent=silent)
    return report(nodes, found), not any(problem.stops for problem in found)


def configs_of(config: Config) -> list[Config]:
    """The config; of a sweep those of its trials, as far as they are known before."""
    if not config.sweep.space:
        return [config]
    alone: dict[str, Any] = {"sweep.collections": {}}
    collections = [{**values, **alone} for values in config.sweep.collections.values()] or [alone]
    found = []
    for own in (with_values(config, values) for values in collections):
        found += [plan.config for plan in sweep.plans(own, sweeps.space_of(own.sweep.space))] or [own]
    return found


def models_of(config: Config) -> dict[str, tuple[str, bool]]:
    """Every model that workers load, by its key: (name, whether it is large and not to be downloaded now)."""
    found: dict[str, tuple[str, bool]] = {}
    for key, model in (each for trial in configs_of(config) for each in _models(trial).items()):
        found[key if found.get(key, model) == model else f"{key} ({model[0]})"] = model
    return found


def _models(config: Config) -> dict[str, tuple[str, bool]]:
    named = {"student.model": (config.student.model, False)}
    named |= {f"retrieve.models.{name}.model": (m.model, False) for name, m in config.retrieve.models.items()}
    for number, (name, member) in enumerate(config.teacher.named().items()):
        if member.model and member.kind != "listwise":  # of an endpoint only the name is known
            several = config.teacher.kind == "ensemble"
            key = f"teacher.members[{number}].model" if several else "teacher.model"
            named[f"{key} ({name})" if several else key] = (member.model, True)
    if config.llm.model and config.llm.engine == "vllm":
        named["llm.model"] = (config.llm.model, True)
        named |= {"llm.lora": (config.llm.lora, True)} if config.llm.lora else {}
    if config.reranker.base != RerankerConfig.base:
        named["reranker.base"] = (config.reranker.base, False)
    return named


def request_of(config: Config) -> Request:
    """What the config asks of a cluster."""
    compute, llm = config.compute, config.llm
    engines = "llm" in (config.queries.sources or []) and llm.engine == "vllm"
    gpus = cluster.gpus_per_worker(compute)
    keys = ["llm.engine"] * engines + ["teacher.engine"] * any(
        member.engine == "vllm" for member in config.teacher.named().values()
    )
    trials = config.sweep.trials_at_once if config.sweep.space else 1
    workers_key = "compute.workers" if compute.min_workers is None else "compute.min_workers"
    return Request(
        workers=trials * compute.fewest_workers(),
        cpus=compute.cpus_per_worker,
        gpus=gpus,
        workers_key=workers_key if trials == 1 else f"{workers_key} x sweep.trials_at_once",
        engines=(llm.replicas or compute.workers) if engines and gpus else 0,
        engine_gpus=devices(llm.vllm),
        vllm_keys=keys,
    )


def _has(node: Mapping[str, Any], name: str) -> float:
    return float(node["Resources"].get(name, 0.0))


def _datasets(config: Config) -> list[Problem]:
    """The corpora, which the driver alone reads."""
    found = []
    every = (dataset.path for trial in configs_of(config) for dataset in trial.corpora())
    for path in dict.fromkeys(every):
        try:
            open_source(path)
        except UserError as error:
            found.append(Problem("driver", str(error), "Put the corpus where the head node sees it"))
    return found


def _nodes(config: Config, alive: Sequence[Mapping[str, Any]]) -> tuple[list[Node], dict[str, str]]:
    """What each node says, and why others say nothing, by name."""
    urls = {"output_dir": config.output_dir} | ({"store": config.store} if config.store else {})
    mark = uuid.uuid4().bytes
    # A path is meant as the driver reads it, wherever a worker's own folder is
    absolute = {key: url if "://" in url else os.path.abspath(url) for key, url in urls.items()}
    places = {key: (url, f".doctor-{mark.hex()}-{key}") for key, url in absolute.items()}
    made = []  # folders that were not there
    for url, name in places.values():
        try:
            made += [] if Location.of(url).exists() else [url]
            (Location.of(url) / name / "driver").write(mark)
        except Exception as error:  # said by the nodes, which meet the same
            say(f"  '{url}' cannot be written from here: {error}")
    looking = ray.remote(num_cpus=0, max_retries=0)(look)
    asked = {
        _on(looking, node).remote(_name(node), bool(_has(node, "GPU")), places, mark, models_of(config)): node
        for node in alive
    }
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_PATIENCE)
    said: list[tuple[Mapping[str, Any], dict[str, Any]]] = []
    silent = {_name(node): f"no answer in {_PATIENCE:.0f} s" for node in asked.values()}
    for reference in answered:
        name = _name(asked[reference])
        try:
            said.append((asked[reference], ray.get(reference)))
            del silent[name]
        except Exception as error:  # of whatever kind: this node is not fit for work
            silent[name] = _last_line(error)
    said.sort(key=lambda each: _name(each[0]))
    seen = {key: _names(url, name) for key, (url, name) in places.items()}
    nodes = []
    for (node, facts), (before, _) in zip(said, [*said[-1:], *said[:-1]], strict=True):
        kept = {
            key: replace(place, seen_by_driver=_name(node) in seen[key]) if not place.error else place
            for key, place in facts.pop("storage").items()
        }
        nodes.append(
            Node(
                name=_name(node),
                cpus=_has(node, "CPU"),
                gpus=_has(node, "GPU"),
                object_store=_has(node, "object_store_memory"),
                storage=kept,
                **_reach(node, before),
                **facts,
            )
        )
    for url, name in places.values():
        try:
            (Location.of(url) / name).remove()
            if url in made and not Location.of(url).names():
                Location.of(url).remove()
        except Exception as error:
            say(f"  '{url}/{name}' could not be removed: {error}")
    return nodes, silent


def _on(task: Any, node: Mapping[str, Any]) -> Any:
    return task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerHostname']}-{node['NodeID'][:6]}"


def _names(url: str, name: str) -> set[str]:
    try:
        return set((Location.of(url) / name).names())
    except Exception:  # said by the nodes
        return set()


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def _reach(node: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """What ``Node`` says of a node's clock, and of the way from the one before it, where that is another."""
    try:
        skew = _skew(node)
        return {"skew": skew, "fetched": None if before is node else _fetched(node, before)}
    except Exception as error:  # of whatever kind: a job would meet it too
        why = f"no answer in {_MOMENT:.0f} s" if isinstance(error, TimeoutError) else _last_line(error)
        return {"cut_off": f"no task of the driver's, or no object of {_name(before)}, came through: {why}"}


def _clock() -> float:
    return time.time()


def _skew(node: Mapping[str, Any]) -> float:
    """Seconds by which a node's clock is surely ahead of this one's: what the asking took is left out."""
    task = ray.remote(num_cpus=0)(_clock)
    best, error = 0.0, float("inf")
    for _ in range(3):
        start = time.time()
        there = ray.get(_on(task, node).remote(), timeout=_MOMENT)
        end = time.time()
        if (end - start) / 2 < error:
            best, error = there - (start + end) / 2, (end - start) / 2
    return float(np.sign(best) * max(0.0, abs(best) - error))


def _hold() -> Any:
    return np.random.default_rng().integers(0, 2**60, _OBJECT_MIB * 2**17)


def _fetch(held: Sequence[Any]) -> float:
    start = time.perf_counter()
    ray.get(held[0])
    return _OBJECT_MIB / (time.perf_counter() - start)


def _fetched(node: Mapping[str, Any], before: Mapping[str, Any]) -> float:
    """MiB/s at which a node gets an object that lies on another."""
    held = _on(ray.remote(num_cpus=0)(_hold), before).remote()
    if not ray.wait([held], timeout=_MOMENT, fetch_local=False)[0]:
        raise TimeoutError
    return float(ray.get(_on(ray.remote(num_cpus=0)(_fetch), node).remote([held]), timeout=_MOMENT))
