"""LoRA: what is trained, what is kept, and what is saved."""

from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from sentence_transformers import SentenceTransformer

from retrieval_ray.artifacts import Location
from retrieval_ray.errors import UserError
from retrieval_ray.fit import fit
from retrieval_ray.lora import add_lora
from retrieval_ray.student import Student
from tests.corpora import SETTINGS, Killed, kill_at, tiny_corpus
from tests.families import texts_of_any_length

pytest.importorskip("peft")

ONCE = replace(SETTINGS, max_epochs=1, dropout=False, learning_rate=1e-2)


@pytest.fixture(params=["xlm-r", "decoder, padded left"])
def folder(request, make_family):
    return make_family(request.param)


@pytest.fixture(scope="module")
def texts(words):
    return texts_of_any_length(words)


def _student(folder):
    return Student(folder, precision="float32", device="cpu")


def _fitted(folder, words, target, **more):
    student = _student(folder)
    merge = add_lora(student, r=4, alpha=8.0, targets=None, seed=0)
    progress = fit(student, [tiny_corpus(words)], ONCE, Location.of(str(target)), **more)
    return student, merge, progress


def _parameters(student):
    return {name: p.detach().clone() for name, p in student.model.named_parameters()}


def test_lora_begins_as_the_student_and_leaves_its_weights_alone(folder, texts, words, tmp_path):
    plain, fresh = _student(folder), _student(folder)
    merge = add_lora(fresh, r=4, alpha=None, targets=None, seed=0)
    before = _parameters(fresh)
    expected = plain.encode(texts, "query", token_budget=200)
    np.testing.assert_allclose(fresh.encode(texts, "query", token_budget=200), expected, atol=1e-6)
    student, _, _ = _fitted(folder, words, tmp_path)
    after = _parameters(student)
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert moved and all(".lora_" in name for name in moved)
    small = sum(p.numel() for p in student.model.parameters() if p.requires_grad)
    assert small < 0.5 * sum(p.numel() for p in plain.model.parameters())
    assert np.abs(student.encode(texts, "query", token_budget=200) - expected).max() > 1e-3
    merge()


def test_merged_and_saved_it_is_an_ordinary_model(folder, texts, words, tmp_path):
    student, merge, _ = _fitted(folder, words, tmp_path / "training")
    vectors = {role: student.encode(texts, role, token_budget=200) for role in ("query", "passage")}
    merge()
    student.save(str(tmp_path / "saved"))
    names = {path.name for path in (tmp_path / "saved").rglob("*")}
    assert not any("adapter" in name for name in names)
    weights = safetensors.torch.load_file(tmp_path / "saved" / "model.safetensors")
    assert weights.keys() == safetensors.torch.load_file(f"{folder}/model.safetensors").keys()
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    theirs = {"query": plain.encode_query(texts), "passage": plain.encode_document(texts)}
    for role, expected in vectors.items():
        np.testing.assert_allclose(theirs[role], expected, atol=1e-5)


def test_a_killed_run_goes_on_to_the_same_bits_from_small_checkpoints(folder, words, tmp_path):
    whole, _, _ = _fitted(folder, words, tmp_path / "whole")
    with pytest.raises(Killed):
        _fitted(folder, words, tmp_path / "broken", on_step=kill_at(2))
    newest = sorted((tmp_path / "broken").glob("checkpoint-*"))[-1]
    assert all(".lora_" in name for name in safetensors.torch.load_file(newest))
    resumed, _, _ = _fitted(folder, words, tmp_path / "broken")
    ours, theirs = _parameters(resumed), _parameters(whole)
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())


def test_every_rank_draws_the_same_additions(folder):
    torch.manual_seed(1)
    one, other = _student(folder), _student(folder)
    for student in (one, other):
        add_lora(student, r=2, alpha=None, targets=None, seed=3)
    ours, theirs = _parameters(one), _parameters(other)
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())


def test_layers_are_named_by_their_ends(make_family):
    student = _student(make_family("decoder, padded left"))
    add_lora(student, r=2, alpha=None, targets=["q_proj", "v_proj"], seed=0)
    trained = {name.split(".")[-4] for name, p in student.model.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "v_proj"}
    with pytest.raises(UserError, match=r"student\.lora\.targets.*query_projection"):
        add_lora(_student(make_family("xlm-r")), r=2, alpha=None, targets=["query_projection"], seed=0)
