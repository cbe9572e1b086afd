"""Vectors of every layer, against sentence-transformers and transformers themselves, text by text."""

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch.nn.functional import normalize

from retrieval_ray.experts import add_experts
from retrieval_ray.layers import layer_vectors
from retrieval_ray.moe import Layout
from retrieval_ray.student import Student
from tests.families import FAMILIES, texts_of_any_length

ROLES = ("query", "passage")


def _student(folder, precision="float32"):
    return Student(folder, precision=precision, device="cpu")


def _expected(model, texts, role):
    """One text at a time: transformers' own hidden states, given to the model's own pooling."""
    if model.tokenizer.pad_token is None:
        model.tokenizer.pad_token = "<unk>"
    prompt = model.prompts.get("query") if role == "query" else None
    found = []
    for text in texts:
        with torch.inference_mode():
            features = model.preprocess([text], prompt=prompt or None)
            inputs = {key: features[key] for key in ("input_ids", "attention_mask")}
            states = model[0].auto_model(**inputs, output_hidden_states=True).hidden_states
            found.append(
                [normalize(model[1]({**features, "token_embeddings": s})["sentence_embedding"])[0]
                 for s in states]
            )  # fmt: skip
    return [torch.stack(layer).numpy() for layer in zip(*found, strict=True)]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("family", ["bert, cls", *FAMILIES])
def test_each_layer_is_pooled_as_the_student_pools(make_student, make_family, words, family, role):
    folder = make_student(mode="cls") if family == "bert, cls" else make_family(family)
    texts, student = texts_of_any_length(words), _student(folder)
    found = layer_vectors(student, texts, role, token_budget=150)
    layers = _expected(SentenceTransformer(folder, device="cpu"), texts, role)
    assert list(found) == ["embeddings", *map(str, range(1, len(layers) - 1)), "final"]
    for vectors, expected in zip(found.values(), layers, strict=True):
        np.testing.assert_allclose(vectors, expected, atol=2e-5)
    assert np.array_equal(found["final"], student.encode(texts, role, token_budget=150))


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_experts_and_half_precision_show_their_layers_too(make_backbone, words, kind):
    texts = texts_of_any_length(words)
    student = _student(make_backbone(kind), "bfloat16")
    exact = layer_vectors(_student(make_backbone(kind)), texts, "passage", token_budget=150)
    add_experts(student.model, Layout(2))  # copies: what the dense student computes
    found = layer_vectors(student, texts, "passage", token_budget=150)
    assert found.keys() == exact.keys() == {"embeddings", "1", "final"}
    for name, vectors in found.items():
        assert (vectors * exact[name]).sum(axis=1).min() > 0.998, name
    assert np.array_equal(found["final"], student.encode(texts, "passage", token_budget=150))


def test_what_comes_behind_pooling_is_of_the_embedding_alone(make_student, words, tmp_path):
    from sentence_transformers.sentence_transformer.modules import Dense

    model = SentenceTransformer(make_student(normalize=False), device="cpu")
    model.append(Dense(32, 8))
    model.save(str(tmp_path / "dense"), create_model_card=False)
    found = layer_vectors(_student(str(tmp_path / "dense")), words[:5], "passage", token_budget=64)
    assert {name: vectors.shape[1] for name, vectors in found.items()} == {
        "embeddings": 32, "1": 32, "final": 8
    }  # fmt: skip


def test_a_backbone_that_hides_its_layers_has_its_embedding_alone(student_folder, words, monkeypatch):
    student = _student(student_folder)
    forward = student.model[0].auto_model.forward
    monkeypatch.setattr(
        student.model[0].auto_model,
        "forward",
        lambda **inputs: type(made := forward(**inputs))(last_hidden_state=made.last_hidden_state),
    )
    found = layer_vectors(student, words[:5], "passage", token_budget=64)
    assert list(found) == ["final"] and found["final"].shape == (5, 32)


def test_the_student_is_left_as_it_was(student_folder, words):
    student = _student(student_folder)
    layer_vectors(student, words[:3], "passage", token_budget=64)
    assert not student.model[0].auto_model.config.output_hidden_states
    assert not student.model[0]._forward_hooks
    assert "all_layer_embeddings" not in student.model(student.model.preprocess(["ba"]))
