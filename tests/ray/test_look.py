"""What a doctor asks of a config, and what it does on one node. Starts no Ray."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from huggingface_hub.errors import GatedRepoError
from ray.exceptions import GetTimeoutError

from retrieval_ray.config import ComputeConfig
from retrieval_ray.config_file import load
from retrieval_ray.errors import UserError
from retrieval_ray.stages import doctor, look, profile

from .conftest import ROOT

pytestmark = pytest.mark.ray


def test_every_model_of_a_config_is_looked_for(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "student: {model: org/student}\n"
        "retrieve: {models: {gte: org/gte}, retrievers: [dense, gte, bm25]}\n"
        "queries: {sources: [llm]}\n"
        "llm: {model: org/llm, lora: org/adapter}\n"
        "teacher:\n"
        "  kind: ensemble\n"
        "  members:\n"
        "    - {kind: bm25}\n"
        "    - {kind: cross_encoder, model: org/cross, name: cross}\n"
        "    - {kind: listwise, model: served, url: 'http://localhost:1/v1'}\n"
    )
    assert doctor.models_of(load(str(config))) == {
        "student.model": ("org/student", False),
        "retrieve.models.gte.model": ("org/gte", False),
        "teacher.members[1].model (cross)": ("org/cross", True),
        "llm.model": ("org/llm", True),
        "llm.lora": ("org/adapter", True),
    }
    served = load(str(config), ["llm.engine=endpoint", "llm.url=http://localhost:1/v1", "llm.lora=null"])
    assert (
        not {"llm.model", "llm.lora"} & doctor.models_of(served).keys()
    )  # its files are the server's matter


def test_what_a_config_asks_of_a_cluster() -> None:
    settings = ["llm.model=org/llm", "llm.vllm={tensor_parallel_size: 2}", "compute.gpus_per_worker=1"]
    config = load(str(ROOT / "configs" / "cadet.yaml"), [*settings, "compute.workers=4", "llm.replicas=3"])
    asked = doctor.request_of(config)
    assert (asked.workers, asked.cpus, asked.gpus) == (4, 1, 1)
    assert (asked.engines, asked.engine_gpus, list(asked.vllm_keys)) == (3, 2, ["llm.engine"])
    elastic = load(str(ROOT / "configs" / "cpu.yaml"), ["compute.workers=4", "compute.min_workers=2",
                                                        "compute.gpus_per_worker=0"])  # fmt: skip
    asked = doctor.request_of(elastic)
    assert (asked.workers, asked.workers_key, asked.engines, list(asked.vllm_keys)) == (
        2, "compute.min_workers", 0, []
    )  # fmt: skip


def test_all_trials_of_a_sweep_are_looked_at(tmp_path: Path) -> None:
    config = load(
        str(ROOT / "configs" / "cpu.yaml"),
        [
            "sweep.space={student.model: [org/one, org/two], train.learning_rate: [0.1, 0.2]}",
            "sweep.collections={x: {dataset.path: /no/corpus}, y: {dataset.path: demo}}",
            "sweep.trials_at_once=8", "compute.workers=2", "compute.gpus_per_worker=0",
            "reranker.base=org/base",
        ],
    )  # fmt: skip
    assert doctor.models_of(config) == {
        "student.model": ("org/one", False),
        "student.model (org/two)": ("org/two", False),
        "reranker.base": ("org/base", False),
    }
    (problem,) = doctor._datasets(config)
    assert "/no/corpus" in problem.what
    asked = doctor.request_of(config)
    assert (asked.workers, asked.workers_key) == (16, "compute.workers x sweep.trials_at_once")


def test_a_place_is_written_read_and_cleared(tmp_path: Path) -> None:
    (tmp_path / "try").mkdir()
    (tmp_path / "try" / "driver").write_bytes(b"mark")
    place = look.place(str(tmp_path), "try", "node", b"mark")
    assert place.error is None and place.sees_driver and place.write > 0 and place.read > 0
    assert sorted(os.listdir(tmp_path / "try")) == ["driver", "node"]  # the driver looks for it, then clears
    assert not look.place(str(tmp_path), "try", "node", b"another").sees_driver
    assert not look.place(str(tmp_path / "own"), "try", "node", b"mark").sees_driver


def test_a_place_that_cannot_be_written_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "Not a directory" in str(look.place(str(tmp_path / "file"), "try", "node", b"").error)
    assert "Unrecognized filesystem" in str(look.place("foo://bar", "try", "node", b"").error)


def test_a_model_must_be_there_and_whole(student_folder: str, tmp_path: Path) -> None:
    found = look.model(student_folder, "student.model", False)
    assert found.error is None and len(found.sha) == 64
    assert look.model(student_folder, "teacher.model", True).sha == found.sha
    missing = look.model(str(tmp_path / "nowhere"), "teacher.members[1].model (cross)", True)
    assert str(missing.error).startswith("teacher.members[1].model: no model")
    cut = tmp_path / "cut"
    shutil.copytree(student_folder, cut)
    (weights,) = cut.rglob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "is not whole" in str(look.model(str(cut), "student.model", False).error)
    weights.unlink()
    adapter = look.model(str(cut), "llm.lora", True)
    assert "llm.lora: " in str(adapter.error) and "no adapter of peft's" in str(adapter.error)
    assert "no weights" in str(look.model(str(cut), "student.model", False).error)


class Hub:
    """Tells everybody the commit of a gated model."""

    def model_info(self, repository: str, revision: str | None) -> SimpleNamespace:
        return SimpleNamespace(sha="1" * 40)

    def auth_check(self, repository: str) -> None:
        if repository == "org/gated":
            raise GatedRepoError("ask first", response=SimpleNamespace(headers={}, request=None))
        if repository == "org/mirrored":
            raise OSError("no such question")


@pytest.mark.parametrize("key", ["llm.model", "llm.lora"])
def test_a_large_model_of_a_hub_must_be_open_to_this_node(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    for open_one in ("org/open", "org/mirrored"):
        assert look.model(open_one, key, True).sha == f"{open_one}@{'1' * 40}"
    found = look.model("org/gated", key, True)
    assert f"{key}: 'org/gated' is gated" in str(found.error) and "HF_TOKEN" in str(found.error)


@pytest.mark.parametrize(("key", "file"), [("llm.model", "config.json"), ("llm.lora", "adapter_config.json")])
def test_a_gated_model_that_lies_here_already_will_do(
    key: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def cached(repository: str, name: str, revision: str | None) -> str | object:
        asked.append((repository, name, revision))
        return f"/cache/{name}" if revision == "v2" else object()  # of what is known not to be there

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    assert look.model("org/gated@v2", key, True).error is None
    assert "is gated" in str(look.model("org/gated@v1", key, True).error)
    assert asked == [("org/gated", file, "v2"), ("org/gated", file, "v1")]


def test_a_large_model_at_a_url_is_listed_and_not_downloaded(
    student_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(student_folder, copy)
    monkeypatch.setattr(look, "resolve_model", None)  # which would download it
    found = look.model(f"file://{copy}", "teacher.model", True)
    assert found.error is None and found.sha == look.model(f"file://{copy}", "llm.model", True).sha
    (weights,) = copy.rglob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    assert look.model(f"file://{copy}", "teacher.model", True).sha != found.sha
    weights.unlink()
    missing = look.model(f"file://{copy}", "teacher.model", True)
    assert f"teacher.model: no model at '{copy}'" in str(missing.error)
    (copy / "config.json").write_text("{")
    weights.touch()
    assert "config.json' is not whole" in str(look.model(f"file://{copy}", "teacher.model", True).error)


def test_gpus_that_torch_cannot_use_are_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML counts them whatever CUDA their driver has."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for available, seen in ((False, 0), (True, 2)):
        torch = f"class cuda:\n    device_count = lambda: 2\n    is_available = lambda: {available}\n"
        (tmp_path / "torch.py").write_text(torch)
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        assert look._visible_gpus() == seen


def test_a_worker_with_gpus_that_finds_none_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all would be computed on the CPUs of machines that are paid for their GPUs."""
    on_cpu = {"device": "cpu", "precision": "float32", "threads": 2}
    task = SimpleNamespace(remote=lambda compute: None)
    monkeypatch.setattr(ray, "remote", lambda **resources: lambda function: task)
    monkeypatch.setattr(ray, "get", lambda reference: on_cpu)
    with pytest.raises(UserError, match=r"no GPU in a worker that was given 1: .*driver .*gpus_per_worker=0"):
        profile.resolve(ComputeConfig(gpus_per_worker=1), {}, on_cluster=True)
    found = profile.resolve(ComputeConfig(gpus_per_worker=0), {}, on_cluster=True)
    assert found.device == "cpu"


def test_what_does_not_come_through_is_waited_for_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the driver's tasks and of another node's objects."""
    nodes = [{"NodeManagerHostname": name, "NodeID": name * 7} for name in ("a", "b")]

    class Task:
        def __init__(self, function: Any, node: Any) -> None:
            self.function, self.node = function, node

        def remote(self, *arguments: Any) -> "Task":
            return self

    def get(task: Task, *, timeout: float) -> float:
        assert timeout == 60
        if task.function == stuck:
            raise GetTimeoutError("not ready")
        return 1.0

    monkeypatch.setattr(ray, "remote", lambda **resources: lambda function: function)
    monkeypatch.setattr(doctor, "_on", Task)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", lambda tasks, **how: (tasks, []))
    stuck: Any = None
    assert doctor._reach(nodes[1], nodes[0])["fetched"] == 1.0
    assert doctor._reach(nodes[1], nodes[1])["fetched"] is None  # no other
    for which in (doctor._clock, doctor._fetch):
        stuck = which
        (why,) = doctor._reach(nodes[1], nodes[0]).values()
        assert "object of a-aaaaaa" in why and why.endswith("no answer in 60 s")
    monkeypatch.setattr(ray, "wait", lambda tasks, **how: ([], tasks))
    stuck = None
    assert doctor._reach(nodes[1], nodes[0]).keys() == {"cut_off"}


def test_a_disk_that_takes_no_file_says_why(tmp_path: Path) -> None:
    assert look._write_error(str(tmp_path)) == "" and not os.listdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert "Not a directory" in look._write_error(str(tmp_path / "file"))
