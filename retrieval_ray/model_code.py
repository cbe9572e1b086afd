"""Models whose code lies in another repository than their weights: both put together in one folder.

A config may name a class as ``org/implementation--file.Class``; transformers would fetch that file in every
process, at no commit in particular. Here the code lies beside the model's files in a folder that names no
other repository: the libraries load it like any local model, and the hash of its files covers the code.
"""

import atexit
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrieval_ray.artifacts import Location
from retrieval_ray.errors import UserError

CONFIGS = ("config.json", "tokenizer_config.json", "modules.json")  # that name classes
_ELSEWHERE = re.compile(r'"([\w.-]+/[\w.-]+)--(\w+\.\w+)"')


@dataclass(frozen=True)
class WithCode:
    """A model and the repositories of its code, each pinned to its commit (``id@commit``)."""

    model: str | Location
    code: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.model} with the code of {', '.join(self.code)}"


Source = str | Location | WithCode


def repositories(folder: Path) -> list[str]:
    """The repositories in which a model's configs say that its code lies."""
    return sorted({name for _, text in _configs(folder) for name, _ in _ELSEWHERE.findall(text)})


def put_together(folder: Path, code: Mapping[str, Path]) -> str:
    """A temporary folder of links to the model's files, with the code beside the configs that name it.

    code: by repository, its folder. Raises ``UserError`` where two repositories have different files of one
    name; over the model's own file goes that of the repository it names.
    """
    parent = tempfile.mkdtemp(prefix="retrieval_ray-model-")
    atexit.register(shutil.rmtree, parent, ignore_errors=True)
    made = Path(parent) / "model"  # transformers keeps code by the folder's name and the files' content
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            _link(path, made / path.relative_to(folder))
    taken: dict[Path, bytes] = {}
    for relative, text in _configs(folder):
        (made / relative).unlink()
        (made / relative).write_text(_ELSEWHERE.sub(r'"\2"', text), encoding="utf-8")
        for repository in sorted({name for name, _ in _ELSEWHERE.findall(text)}):
            for path in sorted(code[repository].rglob("*.py")):
                target = (made / relative).parent / path.relative_to(code[repository])
                if taken.setdefault(target, path.read_bytes()) != path.read_bytes():
                    raise UserError(
                        f"'{folder}': its code lies in several repositories that have different files "
                        f"'{target.name}' (the second is {repository}); put what it needs into one folder"
                    )
                _link(path, target)
    return str(made)


def _configs(folder: Path) -> Iterator[tuple[Path, str]]:
    """The configs that name other repositories: their path in the folder, and their text."""
    for path in sorted(folder.rglob("*.json")):
        if path.name in CONFIGS:
            text = path.read_text(encoding="utf-8")
            if _names_code(text):
                yield path.relative_to(folder), text


def _names_code(text: str) -> bool:
    try:
        found: Any = json.loads(text)
    except ValueError:  # whoever loads the model says what is wrong with it
        return False
    named = found.get("auto_map") if isinstance(found, dict) else found
    return bool(_ELSEWHERE.search(json.dumps(named)))


def _link(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    target.symlink_to(path.resolve())
