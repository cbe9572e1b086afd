"""What every job does around its work: arguments, one run per output folder, exit codes.

Exit code 0: done. 2: something the user can put right, in one message without a traceback. Anything
else is our fault and keeps its traceback.
"""

import argparse
import errno
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
from pyarrow.fs import FileType

from retrieval_ray.artifacts import Location, digest
from retrieval_ray.config import Config, to_dict
from retrieval_ray.config_file import load
from retrieval_ray.errors import UserError
from retrieval_ray.stages import cluster, tracking
from retrieval_ray.stages.context import EXECUTION_KEYS, STAGES, Context
from retrieval_ray.stages.profile import Profile, resolve

_RESULTS = ("metrics.json", "scores.json")  # written last by the jobs that have results
_USER_ERROR = re.compile(r"retrieval_ray\.errors\.UserError: (.+)")
_NO_SPACE = "No space left on device"


def main(
    work: Callable[..., str | None],
    description: str,
    *,
    keys: Mapping[str, str] | None = None,
    enter: Callable[..., Any] | None = None,
    **numbers: str,
) -> None:
    """Parse ``CONFIG.yaml [key=value ...] [--dry-run] [--until STAGE]`` and run the work.

    ``work(context, until)`` returns what is printed as the last line on standard output. numbers: further
    options that take a number, and keys: ``key=value`` of this job alone, which are no part of a run's
    config; both by name, with a word of help, and ``work`` gets those that are given by name. enter:
    ``enter(config, dry_run=...)`` makes what ``work`` gets as its context (None: ``open_run``).
    """
    own_keys = keys or {}
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", help="a YAML file of differences from the defaults")
    own_help = "; ".join(f"{name}={text}" for name, text in own_keys.items())
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=own_help or None)
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--until", choices=STAGES, help="stop when this stage is done")
    for name, text in numbers.items():
        parser.add_argument(f"--{name}", type=int, metavar="N", help=text)
    arguments = parser.parse_intermixed_args()
    given = {name: getattr(arguments, name) for name in numbers}
    pairs = [override.partition("=") for override in arguments.overrides]
    own = {name: value for name, _, value in pairs if name in own_keys}
    overrides = [override for override in arguments.overrides if override.partition("=")[0] not in own_keys]
    context = None
    try:
        config = load(arguments.config, overrides)
        dry_run = arguments.dry_run or any(value is not None for value in given.values())
        context = (enter or open_run)(config, dry_run=dry_run)
        last_line = work(context, arguments.until, **given, **own)
    except BaseException as error:
        if isinstance(context, Context):  # the doctor has none
            tracking.failed(context)
        message = explain(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    if last_line:
        print(last_line, flush=True)


def open_run(config: Config, *, profile: Profile | None = None, dry_run: bool) -> Context:
    """The context of a run: its config, its store and its numeric profile.

    The profile is probed once, or given, and written to ``output_dir/run.json``, for a run that is resumed.
    Raises ``UserError`` where the output folder holds another run's results, and where output or
    store cannot be a folder.
    """
    output = _folder("output_dir", config.output_dir, make=not dry_run)
    store = _folder("store", config.store, make=not dry_run) if config.store else output / "store"
    identity = identity_of(config)
    record = output / "run.json"
    known: dict[str, Any] = record.read_json() if record.exists() else {}
    # A run that never finished may be corrected; results are never overwritten by another run's.
    finished = any((output / name).exists() for name in _RESULTS)
    if known and finished and known["run"] != digest(identity):
        changed = sorted(_differences(known["config"], identity))
        raise UserError(
            f"output_dir '{config.output_dir}' holds another run's results "
            f"(different: {', '.join(changed[:5])}); choose another output_dir, or delete it"
        )
    if not known and finished:
        raise UserError(f"output_dir '{config.output_dir}' holds results of something else")
    on_cluster = cluster.given()
    if on_cluster and dry_run:
        cluster.connect(config.compute)
    elif on_cluster:
        cluster.join(config.compute)
    before = asdict(profile) if profile else known.get("profile", {})
    asked = not dry_run or not on_cluster or cluster.ready(config.compute)
    profile = resolve(config.compute, before, on_cluster=on_cluster, asked=asked)
    if not dry_run:
        record.write_json({"run": digest(identity), "config": identity, "profile": asdict(profile)})
    return Context(config, store, profile, dry_run=dry_run)


def identity_of(config: Config) -> dict[str, Any]:
    """What makes a run this run: all of its config but where and with what it is computed."""
    return {k: v for k, v in to_dict(config).items() if k not in EXECUTION_KEYS}


def explain(error: BaseException) -> str | None:
    """What the user can do about an error, or None where it is our fault."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        inner = getattr(cause, "cause", None)  # Ray's wrapper keeps the worker's own error here
        cause = inner if isinstance(inner, BaseException) else cause.__cause__
    for link in chain:
        # Ray's wrappers hold what a worker raised as text, when they do not hold it as the cause
        in_worker = _USER_ERROR.findall(str(link))
        if in_worker:
            return str(in_worker[-1])
        if isinstance(link, UserError):
            return str(link)
    for link in chain:
        if (isinstance(link, OSError) and link.errno == errno.ENOSPC) or _NO_SPACE in str(link):
            return (
                "disk full: no space is left where the store or Ray's temporary files lie. Free some "
                "space, or set store= to another disk, and run the same command again: finished parts "
                "are kept"
            )
        if isinstance(link, PermissionError) or (isinstance(link, OSError) and link.errno == errno.EROFS):
            return f"not permitted: {link}"
    return None


def _folder(key: str, url: str, *, make: bool) -> Location:
    try:
        location = Location.of(url)
        kind = location.filesystem.get_file_info(location.path).type
        if kind not in (FileType.Directory, FileType.NotFound):
            raise UserError(f"{key}: '{url}' is a file, not a folder; name another place")
        if make:
            location.filesystem.create_dir(location.path, recursive=True)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{key}: no folder can be made or reached at '{url}': {error}. Give a path that can be written "
            "to, or a URL that pyarrow knows (file://, s3://, gs://)"
        ) from error
    return location


def _differences(one: Any, other: Any, prefix: str = "") -> Sequence[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        return [
            name
            for key in sorted({*one, *other})
            for name in _differences(one.get(key), other.get(key), f"{prefix}{key}.")
        ]
    return [] if one == other else [prefix.rstrip(".")]
