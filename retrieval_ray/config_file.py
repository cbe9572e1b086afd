"""The reading of ``FILE.yaml key=value ...`` into a config. Unknown keys are errors."""

import difflib
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from retrieval_ray.config import Config, DatasetConfig, MemberConfig, StudentConfig
from retrieval_ray.config_values import check
from retrieval_ray.errors import UserError

_LISTED = {"datasets": DatasetConfig, "members": MemberConfig}


def load(path: str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file of differences, then ``key=value`` overrides; check keys and values.

    Raises ``UserError`` for a missing file, an unknown key (with the nearest known one), or a value
    that cannot be what it must be.
    """
    if not Path(path).is_file():
        what = "a folder, not a config file" if Path(path).is_dir() else "no such config file"
        raise UserError(f"{what}: {path}")
    try:
        given: Any = OmegaConf.load(path)
        if not isinstance(given, DictConfig):
            raise UserError(f"{path}: needs keys at the top level, like dataset: or seed:, not a list")
        for override in overrides:
            if "=" not in override:
                raise UserError(f"'{override}' is not of the form key=value")
        given = OmegaConf.merge(given, OmegaConf.from_dotlist(list(overrides)))
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {error}") from error
    except UserError:
        raise
    except Exception as error:  # yaml's own errors have no common public base here
        raise UserError(f"{path}: not readable as YAML: {error}") from error
    plain: Any = OmegaConf.to_container(given)
    _reject_unknown(plain, Config, "")
    given = OmegaConf.create(_with_models(plain))
    for f in fields(Config):
        if is_dataclass(f.default_factory) and not isinstance(plain.get(f.name, {}), dict):
            first = fields(f.default_factory)[0].name
            raise UserError(f"{path}: {f.name}: needs keys of its own, like {f.name}.{first}=...")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), given)
        config: Config = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]} (key '{error.full_key}')") from error
    except TypeError as error:  # a list where a mapping must stand, or the other way round
        raise UserError(f"{path}: {error} (one of {', '.join(given)})") from error
    check(config)
    return config


def _reject_unknown(given: Any, schema: Any, prefix: str) -> None:
    if not isinstance(given, dict):
        return
    known = {f.name: f for f in fields(schema)}
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
            elsewhere = [k for k in _all_keys(Config, "") if k.rpartition(".")[2] == key]
            everywhere = difflib.get_close_matches(f"{prefix}{key}", _all_keys(Config, ""), n=1)
            hint = next(iter([*elsewhere, *(f"{prefix}{n}" for n in near), *everywhere]), None)
            raise UserError(
                f"unknown config key '{prefix}{key}'"
                + (f"; did you mean '{hint}'?" if hint else f"; known keys: {', '.join(known)}")
            )
        factory = known[key].default_factory
        if is_dataclass(factory):
            _reject_unknown(value, factory, f"{prefix}{key}.")
        elif prefix + key == "retrieve.models" and isinstance(value, dict):
            for name, entry in value.items():
                _reject_unknown(entry, StudentConfig, f"retrieve.models.{name}.")
        elif key in _LISTED and isinstance(value, list):
            for number, entry in enumerate(value):
                _reject_unknown(entry, _LISTED[key], f"{prefix}{key}[{number}].")


def _with_models(plain: Any) -> Any:
    """``retrieve.models: {gte: ID}`` written out as ``{gte: {model: ID}}``."""
    retrieve = plain.get("retrieve")
    models = retrieve.get("models") if isinstance(retrieve, dict) else None
    if not isinstance(models, dict):
        return plain
    whole = {name: {"model": entry} if isinstance(entry, str) else entry for name, entry in models.items()}
    return {**plain, "retrieve": {**retrieve, "models": whole}}


def _all_keys(schema: Any, prefix: str) -> list[str]:
    keys = []
    for f in fields(schema):
        if is_dataclass(f.default_factory):
            keys += _all_keys(f.default_factory, f"{prefix}{f.name}.")
        else:
            keys.append(f"{prefix}{f.name}")
    return keys
