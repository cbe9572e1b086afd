"""What is wrong with a cluster, from facts that were gathered on its nodes, and what to change.

Knows no Ray: ``stages/doctor.py`` gathers, this judges. What has ``stops`` ends a job sooner or later, or
spoils its result; the rest only makes it slow.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

GIB = 2**30
SLOWEST_NODES = 100.0  # MiB/s between nodes: about a gigabit network
SLOWEST_STORAGE = 20.0  # MiB/s of one node
LARGEST_SKEW = 2.0  # seconds: S3 refuses requests that are minutes off, logs are hard to read long before
LEAST_SPILL = 20 * GIB
LEAST_STORE = 1 * GIB
_SPARE_CPUS = 2  # one for the driver of Ray Train, one for Ray Data's own tasks
_OPEN_PORTS = (
    "Let nodes reach each other at all of Ray's ports: 6379 of the head, 8076 (--object-manager-port), "
    "--node-manager-port, and those of workers, 10002 to 19999 (--min-worker-port, --max-worker-port)"
)
_ONE_IMAGE = "Start every node from one image, by digest (docker.image in cluster.yaml)"


@dataclass(frozen=True)
class Place:
    """What a node made of a storage key: an error, or the speeds in MiB/s."""

    url: str
    error: str | None = None
    sees_driver: bool = True  # what the driver wrote
    seen_by_driver: bool = True  # what this node wrote
    write: float = 0.0
    read: float = 0.0


@dataclass(frozen=True)
class Found:
    """What a node made of a model's name: an error, or the hash of its files."""

    name: str
    error: str | None = None
    sha: str = ""


@dataclass(frozen=True)
class Node:
    """What one node said. Versions are None where a package is not installed; sizes in bytes."""

    name: str
    cpus: float
    gpus: float
    versions: Mapping[str, str | None]
    source: str  # hash of the package's files
    source_folder: str
    visible_gpus: int = 0  # by torch
    storage: Mapping[str, Place] = field(default_factory=dict)  # by config key
    models: Mapping[str, Found] = field(default_factory=dict)
    skew: float = 0.0  # seconds before the driver's clock, beyond what the asking took
    object_store: float = 0.0
    object_store_folder: str = "/dev/shm"
    spill_folder: str = ""
    spill_free: float = 0.0
    spill_error: str = ""  # why nothing can be written there
    fetched: float | None = None  # MiB/s, an object from another node; None: there is no other
    cut_off: str = ""  # what did not come through to it, and why


@dataclass(frozen=True)
class Pool:
    """Nodes of one kind that are there or may still come."""

    cpus: float
    gpus: float
    count: int


@dataclass(frozen=True)
class Request:
    """What the config asks of the cluster, and the names of the keys that say so."""

    workers: int
    cpus: float  # of one
    gpus: float
    workers_key: str = "compute.workers"
    engines: int = 0  # of vLLM
    engine_gpus: int = 0  # of one
    vllm_keys: Sequence[str] = ()  # that need vLLM


@dataclass(frozen=True)
class Problem:
    where: str
    what: str
    advice: str
    stops: bool = True


def problems(
    nodes: Sequence[Node],
    pools: Sequence[Pool] | None,
    request: Request,
    *,
    driver_source: str,
    silent: Mapping[str, str],
) -> list[Problem]:
    """Everything that is wrong, the worst first.

    pools: None where the cluster grows, nobody knows how far. driver_source: hash of the package's files
    that the driver runs. silent: nodes that could not be looked at, with what happened.
    """
    found = [
        Problem(name, f"could not be looked at: {why}", "Mend it (ray logs tells more), or take it out")
        for name, why in silent.items()
    ]
    found += [] if pools is None else _request(pools, request)
    found += _versions(nodes, driver_source)
    for node in nodes:
        found += [*_storage(node), *_models(node), *_machine(node)]
    found += [*_vllm(nodes, request), *_different_models(nodes)]
    return sorted(_together(found), key=lambda problem: not problem.stops)


def _together(found: Sequence[Problem]) -> list[Problem]:
    """The same problem of many nodes as one."""
    where: dict[Problem, list[str]] = {}
    for problem in found:
        where.setdefault(replace(problem, where=""), []).append(problem.where)
    return [replace(problem, where=_few(names)) for problem, names in where.items()]


def _request(pools: Sequence[Pool], request: Request) -> list[Problem]:
    found = []
    fitting = room(pools, request.cpus, request.gpus)
    each = f"{request.cpus:g} CPU and {request.gpus:g} GPU each"
    largest = max(pools, key=lambda pool: (pool.gpus, pool.cpus), default=Pool(0, 0, 0))
    size = f"the largest node has {largest.cpus:g} CPU and {largest.gpus:g} GPU"
    if not fitting:
        advice = f"Lower compute.cpus_per_worker or compute.gpus_per_worker, or add larger nodes; {size}"
        found.append(Problem("cluster", f"no node can ever hold a worker ({each})", advice))
    elif fitting < request.workers:
        what = f"{request.workers} workers ({each}) do not fit: {fitting} do, whole ones on each node"
        found.append(Problem("cluster", what, f"Set {request.workers_key}={fitting}, or add nodes; {size}"))
    elif sum(p.count * p.cpus for p in pools) < request.workers * request.cpus + _SPARE_CPUS:
        what = f"no {_SPARE_CPUS} CPUs are left beside {request.workers} workers ({each})"
        advice = f"Lower compute.cpus_per_worker or {request.workers_key}: Ray's own tasks need some"
        found.append(Problem("cluster", what, advice))
    engines = room(pools, request.engine_gpus, request.engine_gpus)
    if request.engines > engines:
        what = f"{request.engines} vLLM engines of {request.engine_gpus} GPU do not fit: {engines} do"
        advice = "Lower llm.replicas or llm.vllm.tensor_parallel_size, or add nodes"
        found.append(Problem("cluster", what, advice))
    return found


def room(pools: Sequence[Pool], cpus: float, gpus: float) -> int:
    """How many workers the nodes hold, each worker whole on one of them."""
    return sum(pool.count * fit(pool, cpus, gpus) for pool in pools)


def fit(pool: Pool, cpus: float, gpus: float) -> int:
    """How many workers one node of the pool holds; five fifths of a GPU are one, whatever floats say."""
    asked = ((pool.cpus, cpus), (pool.gpus, gpus))
    return min((int(have / need + 1e-6) for have, need in asked if need > 0), default=0)


def _versions(nodes: Sequence[Node], driver_source: str) -> list[Problem]:
    found = []
    names = sorted({name for node in nodes for name in node.versions})
    for name in names:
        # vLLM is for GPUs: nodes without may be without it
        asked = [node for node in nodes if name != "vllm" or node.gpus]
        by = _by([(node.versions.get(name) or "none", node.name) for node in asked])
        if len(by) > 1:
            found.append(Problem("cluster", f"{name} differs: {_listed(by)}", _ONE_IMAGE))
    by = _by([(driver_source[:12], "driver"), *((node.source[:12], node.name) for node in nodes)])
    if len(by) > 1:
        folders = sorted({f"{node.source_folder} on {node.name}" for node in nodes})
        advice = (
            "Submit the source with the job (ray job submit --working-dir .), or build the image anew. "
            f"It was imported from {', '.join(folders[:4])}"
        )
        found.append(Problem("cluster", f"retrieval_ray's source differs: {_listed(by)}", advice))
    return found


def _storage(node: Node) -> list[Problem]:
    found = []
    for key, place in node.storage.items():
        other = f"Set {key}= to a URL (s3://, gs://) or to a path on a filesystem that all nodes mount"
        if place.error:
            remote = "://" in place.url
            role = "give every node a role or credentials for it, and the right endpoint" if remote else other
            found.append(Problem(node.name, f"{key}: '{place.url}': {place.error}", role))
        elif not (place.sees_driver and place.seen_by_driver):
            what = f"{key}: '{place.url}' is another folder here than on the driver's node"
            found.append(Problem(node.name, what, other))
        elif min(place.write, place.read) < SLOWEST_STORAGE:
            what = f"{key}: slow: {place.write:,.0f} MiB/s written, {place.read:,.0f} read"
            advice = f"Put {key} into the cluster's own region, or on a faster filesystem"
            found.append(Problem(node.name, what, advice, stops=False))
    return found


def _models(node: Node) -> list[Problem]:
    return [
        Problem(
            node.name,
            f"{key}: {str(found.error).removeprefix(f'{key}: ')}",
            f"Set {key}= to a folder that all nodes mount, a URL (s3://...), or a hub id that all can reach",
        )
        for key, found in node.models.items()
        if found.error
    ]


def _different_models(nodes: Sequence[Node]) -> list[Problem]:
    different = []
    for key in sorted({key for node in nodes for key in node.models}):
        there = [(node.models[key], node.name) for node in nodes if key in node.models]
        by = _by([(found.sha[:12], name) for found, name in there if not found.error])
        if len(by) > 1:
            advice = f"Name one commit in {key} (id@revision), or one folder that all nodes mount"
            different.append(Problem("cluster", f"{key}: other files on other nodes: {_listed(by)}", advice))
    return different


def _vllm(nodes: Sequence[Node], request: Request) -> list[Problem]:
    """Nodes with GPUs must have it where it is asked for; where there are none, some node must."""
    with_gpus = [node for node in nodes if node.gpus]
    without = [node for node in with_gpus or nodes if not node.versions.get("vllm")]
    enough = not with_gpus and len(without) < len(nodes)
    if enough or not request.vllm_keys:
        return []
    what = f"vLLM is not installed, and {' and '.join(request.vllm_keys)} asks for it"
    advice = "Install the gpu extra (EXTRAS=gpu in Dockerfile), or set llm.engine=endpoint"
    return [Problem(node.name, what, advice) for node in without]


def _machine(node: Node) -> list[Problem]:
    found = []
    if node.visible_gpus < node.gpus:
        what = f"Ray counts {node.gpus:g} GPU, torch sees {node.visible_gpus}"
        advice = "Take an image with a CUDA build of torch (Dockerfile, EXTRAS=gpu), or a newer GPU driver"
        found.append(Problem(node.name, what, advice))
    if abs(node.skew) > LARGEST_SKEW:
        what = f"its clock is {node.skew:+.1f} s from the driver's"
        found.append(Problem(node.name, what, "Run a time service (chrony) on every node"))
    if node.cut_off:
        found.append(Problem(node.name, node.cut_off, _OPEN_PORTS))
    if node.fetched is not None and node.fetched < SLOWEST_NODES:
        what = f"{node.fetched:,.0f} MiB/s from another node"
        advice = "Put all nodes into one zone, with 10 Gbit/s or more: training across nodes needs it"
        found.append(Problem(node.name, what, advice, stops=False))
    if not node.object_store_folder.startswith("/dev/shm"):
        what = f"the object store lies on a disk ({node.object_store_folder})"
        advice = "Give the container shared memory: --shm-size, or a volume in memory at /dev/shm"
        found.append(Problem(node.name, what, advice, stops=False))
    if node.object_store < LEAST_STORE:
        what = f"an object store of {node.object_store / GIB:.1f} GiB"
        advice = "Start it with a larger --object-store-memory, and /dev/shm to hold it"
        found.append(Problem(node.name, what, advice, stops=False))
    if node.spill_error:
        what = f"nothing can be written where objects are spilled ({node.spill_folder}): {node.spill_error}"
        advice = "Give Ray's user the right to write there, or name another --object-spilling-directory"
        found.append(Problem(node.name, what, advice))
    elif node.spill_free < LEAST_SPILL:
        what = f"{node.spill_free / GIB:.1f} GiB free where objects are spilled ({node.spill_folder})"
        advice = "Start Ray with --object-spilling-directory on a larger disk"
        found.append(Problem(node.name, what, advice, stops=False))
    return found


def report(nodes: Sequence[Node], found: Sequence[Problem]) -> str:
    """A table of the nodes, then each problem with what to change."""
    rows = [
        [
            node.name,
            f"{node.cpus:g}",
            f"{node.gpus:g}",
            " ".join(node.versions.get(name) or "-" for name in ("python", "ray", "torch")),
            node.source[:8],
            *(_speeds(node.storage.get(key)) for key in ("output_dir", "store")),
            "-" if node.fetched is None else f"{node.fetched:,.0f}",
            f"{node.object_store / GIB:.1f}",
            f"{node.spill_free / GIB:.0f}",
            f"{node.skew:+.2f}",
        ]
        for node in nodes
    ]
    head = [
        "node", "CPU", "GPU", "python, ray, torch", "source", "output_dir w/r", "store w/r", "net",
        "objects GiB", "spill GiB", "clock s",
    ]  # fmt: skip
    lines = [table(head, rows), "w/r, net: MiB/s of one node, written and read, and from another node"]
    for problem in found:
        lines += ["", f"{'PROBLEM' if problem.stops else 'warning'} {problem.where}: {problem.what}"]
        lines.append(f"  {problem.advice}")
    stopping = sum(problem.stops for problem in found)
    amounts = {"node": len(nodes), "problem": stopping, "warning": len(found) - stopping}
    lines += ["", ", ".join(counted(count, what) for what, count in amounts.items())]
    return "\n".join(lines)


def counted(count: int, what: str) -> str:
    """Like 1 node, 2 nodes."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as what they hold."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def source_sha(folder: Path) -> str:
    """One hash over the source files below a folder."""
    state = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        state.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    return state.hexdigest()


def _speeds(place: Place | None) -> str:
    if place is None:
        return "-"
    return "failed" if place.error else f"{place.write:,.0f}/{place.read:,.0f}"


def _by(pairs: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """Names by value, the most frequent value first."""
    by: dict[str, list[str]] = {}
    for value, name in pairs:
        by.setdefault(value, []).append(name)
    return dict(sorted(by.items(), key=lambda item: (-len(item[1]), item[0])))


def _listed(by: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{value} ({_few(names)})" for value, names in by.items())


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
