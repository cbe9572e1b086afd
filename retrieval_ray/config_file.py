"""The reading of ``FILE.yaml key=value ...`` into a config. Unknown keys are errors."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from retrieval_ray.config import Config, DatasetConfig, MemberConfig, StudentConfig, to_dict
from retrieval_ray.config_values import check
from retrieval_ray.errors import UserError

_LISTED = {"datasets": DatasetConfig, "members": MemberConfig}


def load(path: str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file of differences, then ``key=value`` overrides; check keys and values.

    ``base: FILE`` at the top of a file names another, beside it, whose differences come first.
    Raises ``UserError`` for a missing file, an unknown key (with the nearest known one), or a value
    that cannot be what it must be.
    """
    given: Any = _read(path)
    try:
        for override in overrides:
            if "=" not in override:
                raise UserError(f"'{override}' is not of the form key=value")
        given = OmegaConf.merge(given, OmegaConf.from_dotlist(list(overrides)))
        plain: Any = OmegaConf.to_container(given, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {error}") from error
    return _typed(plain, path)


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with these values, whose keys have dots; checked as a file's are.

    A value that is a list or a mapping takes the old one's place.
    """
    plain: Any = to_dict(config)
    for key, value in values.items():
        section, *names = plain, *key.split(".")
        for name in names[:-1]:
            section = section.get(name) if isinstance(section, dict) else None
        if not isinstance(section, dict):
            raise UserError(f"unknown config key '{key}'")
        section[names[-1]] = value
    return _typed(plain, f"config with {', '.join(values)}")


def differences(config: Config) -> dict[str, Any]:
    """What a YAML file must say to give this config: everything that is not a default."""

    def of(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for key, value in values.items():
            known = defaults.get(key)
            if isinstance(value, dict) and isinstance(known, dict) and known:
                value = of(value, known)
                if not value:
                    continue
            elif value == known:
                continue
            found[key] = value
        return found

    return of(to_dict(config), to_dict(Config()))


def _read(path: str, seen: Sequence[str] = ()) -> DictConfig:
    """A file with its base's differences under its own. seen: the files that led here."""
    if not Path(path).is_file():
        what = "a folder, not a config file" if Path(path).is_dir() else "no such config file"
        named = f" (base of {seen[-1]})" if seen else ""
        raise UserError(f"{what}: {path}{named}")
    try:
        given: Any = OmegaConf.load(path)
    except Exception as error:  # yaml's own errors have no common public base here
        raise UserError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(given, DictConfig):
        raise UserError(f"{path}: needs keys at the top level, like dataset: or seed:, not a list")
    base = given.pop("base", None)
    if base is None:
        return given
    file = str((Path(path).parent / str(base)).resolve())
    if file in seen:
        raise UserError(f"{path}: its base is {base}, which leads back to it")
    merged = OmegaConf.merge(_read(file, [*seen, str(Path(path).resolve())]), given)
    assert isinstance(merged, DictConfig)
    return merged


def _typed(plain: Any, path: str) -> Config:
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
            same = [k for k in _all_keys(Config, "") if k.rpartition(".")[2] == key]
            elsewhere = sorted(same, key=lambda known: known.count("."))
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
