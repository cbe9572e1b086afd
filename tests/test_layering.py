"""Who may import whom: jobs -> stages -> middle -> core -> schema, errors; Ray in the first two.

Read from the source by ``ast``, so an import inside a function counts too.
"""

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "retrieval_ray"
BASE = {"schema", "errors"}
MIDDLE = {
    "student",
    "teachers",
    "step",
    "fit",
    "training_data",
    "plots",
    "plots_drift",
    "layers",
    "checkpoints",
    "selection",
    "sharding",
    "lora",
    "report",
    "report_sweep",
    "report_training",
    "report_drift",
    "plots_sweep",
    "search",
    "ivf",
    "bm25",
    "model_card",
    "experts",
}
LEVELS = (
    "base",
    "core",
    "middle",
    "stages",
    "jobs",
)  # each may import itself and what stands before


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_of(path): path.read_text(encoding="utf-8")
    for folder in (PACKAGE, "jobs")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
CORE = [name for name in SOURCES if not name.startswith(("jobs", f"{PACKAGE}.stages"))]


def imported(name: str, source: str) -> set[str]:
    """The full names of what a module imports; for ``from a import b``, both ``a`` and ``a.b``."""
    found: set[str] = set()
    package = name if f"{name}.__init__" in SOURCES else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*up, *([node.module] if node.module else [])] if node.level else [])
            base = base or str(node.module)
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found.add(str(node.args[0].value))
    return found


def own(name: str) -> set[str]:
    """The modules of this project that a module imports."""
    known = imported(name, SOURCES[name]) & SOURCES.keys()
    packages = {m for m in known if any(other.startswith(f"{m}.") for other in SOURCES)}
    named = {m for m in packages if not any(other.startswith(f"{m}.") for other in known)}
    return (known - packages) | named


def level(name: str) -> int:
    if name.startswith("jobs"):
        return LEVELS.index("jobs")
    inner = name.removeprefix(f"{PACKAGE}.").split(".")[0]
    if inner == "stages":
        return LEVELS.index("stages")
    return LEVELS.index("base" if inner in BASE else "middle" if inner in MIDDLE else "core")


def top(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import ray.data as rd", {"ray.data"}),
        ("def f():\n    from ray import train", {"ray", "ray.train"}),
        ("from . import schema", {"retrieval_ray", "retrieval_ray.schema"}),
        ("from .stages.context import Context", {
            "retrieval_ray.stages.context", "retrieval_ray.stages.context.Context"
        }),
        ("import importlib\nimportlib.import_module('ray')", {"importlib", "ray"}),
        ("x = 'import ray'", set()),
    ],
)  # fmt: skip
def test_the_reading_of_imports_sees_every_form(source: str, expected: set[str]) -> None:
    assert imported(f"{PACKAGE}.losses", source) == expected


def test_there_are_modules_on_every_level() -> None:
    assert {level(name) for name in SOURCES} == set(range(len(LEVELS)))
    assert {f"{PACKAGE}.{name}" for name in BASE | MIDDLE} <= SOURCES.keys()


@pytest.mark.parametrize("name", CORE)
def test_ray_and_vllm_are_imported_under_stages_and_jobs_alone(name: str) -> None:
    assert not top(imported(name, SOURCES[name])) & {"ray", "vllm"}


@pytest.mark.parametrize("name", SOURCES)
def test_imports_go_one_way(name: str) -> None:
    upwards = {other for other in own(name) if level(other) > level(name)}
    assert upwards == set()


@pytest.mark.parametrize("name", [name for name in SOURCES if not name.startswith("jobs")])
def test_nothing_in_the_package_imports_jobs(name: str) -> None:
    assert "jobs" not in top(imported(name, SOURCES[name]))


def test_nothing_imports_the_tests_or_benchmarks() -> None:
    for name, source in SOURCES.items():
        assert not top(imported(name, source)) & {"tests", "oracles", "benchmarks", "conftest"}


def test_no_two_modules_import_each_other() -> None:
    """Not in a ring of any length either."""
    graph = {name: own(name) - {name} for name in SOURCES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the ring


@pytest.mark.parametrize("name", CORE)
def test_core_functions_take_values_not_configs(name: str) -> None:
    assert f"{PACKAGE}.config" not in own(name) or name.startswith(f"{PACKAGE}.config")


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_core_imports_without_ray_and_vllm() -> None:
    run(f"""
import importlib, sys
sys.modules["ray"] = sys.modules["vllm"] = None
for name in {CORE!r}:
    importlib.import_module(name)
""")


def test_the_training_step_imports_with_torch_and_transformers_alone() -> None:
    """A GPU machine with nothing else on it must be able to time the step."""
    run(f"""
import importlib, sys
for name in ("ray", "vllm", "faiss", "bm25s", "matplotlib", "ir_datasets"):
    sys.modules[name] = None
importlib.import_module("{PACKAGE}.step")
""")


def test_imports_alone_print_nothing_and_load_no_optional_package() -> None:
    """But for the one that is a sentence-transformers module, which others import only where they need it."""
    light = [name for name in CORE if name != f"{PACKAGE}.moe_transformer"]
    code = f"""
import importlib, sys
for name in {light!r}:
    importlib.import_module(name)
print(sorted({{"datasets", "ir_datasets", "ray", "vllm", "pydoc_data"}} & sys.modules.keys()))
"""
    assert run(code) == "[]\n"
