"""What a doctor does on one node: versions, source, storage, models, disks. The rest is in doctor.py."""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import retrieval_ray
from retrieval_ray.artifacts import Location, digest
from retrieval_ray.doctor import Found, Place, source_sha
from retrieval_ray.errors import UserError
from retrieval_ray.model_files import adapter_sha, by_revision, hub_id, resolve_model, weights_sha

SOURCE = Path(retrieval_ray.__file__).parent
_PACKAGES = (
    "ray", "torch", "transformers", "sentence-transformers", "numpy", "pyarrow", "faiss-cpu", "faiss-gpu",
    "vllm",
)  # fmt: skip
_FILE_MIB = 8
# device_count() counts also those whose driver is too old for this torch
_SEES_GPUS = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"


def look(
    name: str,
    has_gpus: bool,
    places: Mapping[str, tuple[str, str]],
    mark: bytes,
    models: Mapping[str, tuple[str, bool]],
) -> dict[str, Any]:
    """Everything that is asked of a node.

    places: (URL, folder to try there) by config key; mark: what the driver wrote there; models: as in
    ``doctor.models_of``.
    """
    store, spill = _folders()
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "source": source_sha(SOURCE),
        "source_folder": str(SOURCE),
        "visible_gpus": _visible_gpus() if has_gpus else 0,
        "storage": {key: place(url, folder, name, mark) for key, (url, folder) in places.items()},
        "models": {key: model(named, key, large) for key, (named, large) in models.items()},
        "object_store_folder": store,
        "spill_folder": spill,
        "spill_free": float(shutil.disk_usage(spill).free),
        "spill_error": _write_error(spill),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _visible_gpus() -> int:
    """By a process of its own: Ray may hide GPUs from one that has asked for none."""
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run([sys.executable, "-c", _SEES_GPUS], env=environment, capture_output=True, text=True)
    return int(done.stdout) if done.returncode == 0 else 0


def _folders() -> tuple[str, str]:
    """Where this node's objects lie, in memory and spilled: told by the command that started its raylet."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
    except OSError:
        words = []
    told = dict(word.lstrip("-").split("=", 1) for word in words if word.startswith("--") and "=" in word)
    spill = told.get("fallback_directory", tempfile.gettempdir())
    return told.get("plasma_directory", "/dev/shm"), spill if os.path.isdir(spill) else tempfile.gettempdir()


def _write_error(folder: str) -> str:
    """Why a file cannot be written there; empty where it can."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**20))
            file.flush()
    except OSError as error:
        return str(error)
    return ""


def place(url: str, folder: str, name: str, mark: bytes) -> Place:
    """Write as the stages do (whole, by an atomic move), read back, read what the driver wrote, delete."""
    data = np.random.default_rng().bytes(_FILE_MIB * 2**20)
    try:
        location = Location.of(url) / folder
        start = time.perf_counter()
        (location / name).write(data)
        written = time.perf_counter()
        same = (location / name).read() == data
        read = time.perf_counter()
        if not same:
            return Place(url, "what was read is not what was written")
        (location / f"{name}-deleted").write(mark)
        (location / f"{name}-deleted").remove()
        if (location / f"{name}-deleted").exists():
            return Place(url, "what was deleted is still there")
        driver = location / "driver"
        sees = driver.exists() and driver.read() == mark
    except Exception as error:  # whatever the filesystem raises is what the user must read
        return Place(url, str(error) or type(error).__name__)
    return Place(url, None, sees, True, _FILE_MIB / (written - start), _FILE_MIB / (read - written))


def model(name: str, key: str, large: bool) -> Found:
    """Find the model as a worker would; of one that lies here, look into every file of weights.

    large: it is not downloaded.
    """
    key = key.partition(" ")[0]
    try:
        if key == "llm.lora":
            sha = adapter_sha(name, key)
            _may_be_fetched(name, key)
            return Found(name, None, sha)
        if large and hub_id(name):
            sha = by_revision(name, key).sha
            _may_be_fetched(name, key)
            return Found(name, None, sha)
        if large and "://" in name:
            return Found(name, None, _listed(Location.of(name), key))
        folder = resolve_model(name, key)
        _open_weights(Path(folder))
        return Found(name, None, weights_sha(folder))
    except Exception as error:  # of files, a hub or an object store: the user must read it
        return Found(name, str(error) or type(error).__name__)


def _may_be_fetched(name: str, key: str) -> None:
    """Raises for a gated model that is closed to this node: the commit of one a hub tells to everybody.

    Not for one that lies here already, as in an image that was built with it.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError

    if (found := hub_id(name)) is None:
        return
    file = "adapter_config.json" if key == "llm.lora" else "config.json"
    if isinstance(try_to_load_from_cache(found[0], file, revision=found[1]), str):
        return
    try:
        HfApi().auth_check(found[0])
    except GatedRepoError as error:
        raise UserError(
            f"{key}: '{name}' is gated: accept its terms on the hub, and give every node the HF_TOKEN of "
            "the account that did"
        ) from error
    except Exception:  # a mirror that does not know the question
        return


def _listed(folder: Location, key: str) -> str:
    """A hash of the names and sizes of a model's files; of these many gigabytes only its config is read."""
    sizes = folder.sizes()
    if "config.json" not in sizes or not any(name.endswith(".safetensors") for name in sizes):
        raise UserError(f"{key}: no model at '{folder.url}': it needs a config.json and .safetensors files")
    try:
        (folder / "config.json").read_json()
    except ValueError as error:
        raise UserError(f"{key}: '{folder.url}/config.json' is not whole: {error}") from error
    return digest(sizes)


def _open_weights(folder: Path) -> None:
    """Raises where a file of weights is missing or cut short: its header says how long it must be."""
    from safetensors import safe_open

    files = sorted(folder.rglob("*.safetensors"))
    if not files:
        raise UserError(f"no weights in '{folder}': it has no .safetensors file")
    for file in files:
        try:
            with safe_open(file, framework="numpy") as weights:
                weights.keys()
        except Exception as error:
            raise UserError(f"'{file}' is not whole: {error}") from error
