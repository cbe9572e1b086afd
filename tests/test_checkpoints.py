"""Checkpoint files: what the safetensors library reads of them, and what a kill may leave."""

import threading

import pytest
import safetensors.torch
import torch

from retrieval_ray import checkpoints
from retrieval_ray.artifacts import Location
from retrieval_ray.checkpoints import (
    load_checkpoint,
    load_weights,
    newest,
    save_checkpoint,
    save_weights,
    step_of,
)
from retrieval_ray.student import Student


@pytest.fixture
def student(student_folder):
    return Student(student_folder, precision="float32", device="cpu")


def _stepped(student, seed):
    """AdamW after one step with a random gradient."""
    torch.manual_seed(seed)
    optimiser = torch.optim.AdamW(student.model.parameters(), lr=1e-2)
    for parameter in student.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimiser.step()
    return optimiser


def _moments(student, optimiser):
    named = student.model.named_parameters()
    return {(n, kind): v for n, p in named for kind, v in optimiser.state[p].items()}


def test_the_library_reads_the_file(tmp_path):
    tensors = {
        "a": torch.randn(3, 5, dtype=torch.float64).T,  # not contiguous
        "half": torch.randn(7).to(torch.bfloat16),
        "scalar": torch.tensor(3.0),
        "whole": torch.arange(4),
    }
    checkpoints._write(tensors, Location.of(str(tmp_path / "x.safetensors")))
    found = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_what_was_saved_comes_back(student, student_folder, tmp_path):
    folder, optimiser = Location.of(str(tmp_path)), _stepped(student, 1)
    save_checkpoint(student, optimiser, {"step": 7}, folder, "00000007-001")
    other = Student(student_folder, precision="float32", device="cpu")
    resumed = torch.optim.AdamW(other.model.parameters(), lr=1e-2)
    assert load_checkpoint(other, resumed, folder) == {"step": 7}
    ours, theirs = student.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = _moments(student, optimiser), _moments(other, resumed)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert any(kind == "step" and value.shape == () for (_, kind), value in theirs.items())


def test_two_are_kept_and_half_of_one_is_none(student, tmp_path):
    folder, optimiser = Location.of(str(tmp_path)), _stepped(student, 1)
    assert load_checkpoint(student, optimiser, folder) is None
    for step in range(4):
        save_checkpoint(student, optimiser, {"step": step}, folder, f"0000000{step}-001")
    left = [f"checkpoint-0000000{step}-001.{kind}" for step in (2, 3) for kind in ("json", "safetensors")]
    assert folder.names() == left
    (folder / "checkpoint-00000004-001.safetensors").write(b"half of")  # then it was killed
    assert load_checkpoint(student, optimiser, folder) == {"step": 3}
    assert newest(folder) == folder / left[-1] and step_of(folder) == 3


def test_a_write_that_breaks_off_leaves_nothing(student, tmp_path, monkeypatch):
    true, asked = checkpoints._bytes, []

    def fails(tensor):
        asked.append(tensor)
        if len(asked) == 3:
            raise OSError("no space")
        return true(tensor)

    monkeypatch.setattr(checkpoints, "_bytes", fails)
    with pytest.raises(OSError, match="no space"):
        save_weights(student, Location.of(str(tmp_path / "best.safetensors")))
    assert list(tmp_path.iterdir()) == [] and len(asked) == 3  # they are taken one by one
    monkeypatch.undo()
    save_weights(student, Location.of(str(tmp_path / "best.safetensors")))
    before = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    _stepped(student, 2)
    load_weights(student, Location.of(str(tmp_path / "best.safetensors")))
    assert all(torch.equal(before[name], tensor) for name, tensor in student.model.state_dict().items())


def test_a_rank_waits_for_what_its_machine_does_not_show_yet(student, tmp_path, monkeypatch):
    there, late = Location.of(str(tmp_path / "there")), Location.of(str(tmp_path / "late"))
    save_weights(student, there)
    monkeypatch.setattr("retrieval_ray.checkpoints.world", lambda: (1, 2))
    comes = threading.Timer(0.2, lambda: (tmp_path / "there").rename(tmp_path / "late"))
    comes.start()
    load_weights(student, late)
    comes.join()
    monkeypatch.setattr("retrieval_ray.checkpoints._SEEN_SECONDS", 0.1)
    with pytest.raises(OSError, match="rank 0 sees this file, rank 1 does not"):
        load_weights(student, there)
