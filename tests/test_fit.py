"""The training loop on a tiny model, without Ray."""

from dataclasses import replace

import pytest
import torch

from retrieval_ray.artifacts import Location
from retrieval_ray.fit import fit
from retrieval_ray.student import Student
from tests.corpora import SETTINGS, Killed, kill_at, tiny_corpus


@pytest.fixture
def corpus(words):
    return tiny_corpus(words)


def _fit(folder, corpus, target, settings=SETTINGS, **more):
    student = Student(folder, precision="float32", device="cpu")
    progress = fit(student, [corpus], settings, Location.of(str(target)), **more)
    return progress, {name: p.detach().clone() for name, p in student.model.named_parameters()}


def test_a_run_killed_and_resumed_drops_the_same_and_ends_with_the_same_weights(
    student_folder, corpus, tmp_path
):
    whole, weights = _fit(student_folder, corpus, tmp_path / "whole")

    with pytest.raises(Killed):
        _fit(student_folder, corpus, tmp_path / "broken", on_step=kill_at(4))
    torch.manual_seed(99)
    resumed, again = _fit(student_folder, corpus, tmp_path / "broken")
    assert (resumed.steps, resumed.history) == (whole.steps, whole.history)
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_what_graphs_may_take_changes_no_bit_of_the_weights(student_folder, corpus, tmp_path):
    ends = [
        _fit(student_folder, corpus, tmp_path / str(most), replace(SETTINGS, activation_bytes=most))
        for most in (None, 0)
    ]
    assert ends[0][0].steps == ends[1][0].steps
    assert all(torch.equal(ends[0][1][name], ends[1][1][name]) for name in ends[0][1])


def test_dropout_is_off_unless_asked_for(student_folder, corpus, tmp_path):
    first = {}
    for dropout in (False, True):
        progress, _ = _fit(
            student_folder, corpus, tmp_path / str(dropout), replace(SETTINGS, dropout=dropout)
        )
        first[dropout] = progress.steps[0]["kl"]
    assert abs(first[False] - first[True]) > 1e-4


def test_every_step_says_its_terms_and_where_its_time_went(student_folder, corpus, tmp_path):
    progress, _ = _fit(student_folder, corpus, tmp_path)
    assert len(progress.steps) == len(progress.speed) == progress.step
    for row, speed in zip(progress.steps, progress.speed, strict=True):
        assert row["loss"] == pytest.approx(row["kl"] + 0.1 * row["infonce"])
        parts = sum(speed[name] for name in ("data", "forward", "loss", "backward", "communication"))
        assert 0 < parts <= speed["seconds"]
        assert speed["tokens_per_second"] * speed["seconds"] == pytest.approx(row["tokens"])
        assert 0 < speed["matmul_share"] < 1
