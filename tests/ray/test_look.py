"""What a doctor asks of a config, and what it does on one node. Starts no Ray."""

import os
import shutil
from pathlib import Path

import pytest

from retrieval_ray.config_file import load
from retrieval_ray.stages import doctor, look

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


def test_a_disk_that_takes_no_file_says_why(tmp_path: Path) -> None:
    assert look._write_error(str(tmp_path)) == "" and not os.listdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert "Not a directory" in look._write_error(str(tmp_path / "file"))
