"""Models with experts as people use them: saved, loaded here and by plain sentence-transformers, merged."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer

import retrieval_ray
from retrieval_ray.errors import UserError
from retrieval_ray.experts import (
    add_experts,
    expert_load,
    merge_experts,
    prepare,
    train_only_experts,
)
from retrieval_ray.model_files import weights_sha
from retrieval_ray.moe import ROUTERS, WHERE, Layout, moe_layers
from retrieval_ray.student import Student

BACKBONES = ("bert", "xlm-roberta", "modernbert")


@pytest.fixture(scope="module")
def texts(words):
    rng = np.random.default_rng(3)
    return [" ".join(rng.choice(words, length)) for length in (1, 3, 9, 20, 40, 60, 7)]


def _student(folder):
    return Student(str(folder), precision="float32", device="cpu")


def _vectors(student, texts):
    return student.encode(texts, "passage", token_budget=10_000)


def _trained(folder, layout):
    """A student whose experts have moved apart."""
    student = _student(folder)
    add_experts(student.model, layout)
    torch.manual_seed(5)
    with torch.no_grad():
        for layer in moe_layers(student.model).values():
            for parameter in layer.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
    return student


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("kind", BACKBONES)
def test_saved_and_loaded_to_the_bit(make_backbone, texts, tmp_path, kind, router):
    layout = Layout(3, 2, router, WHERE[len(kind) % 2], layers=(1,) if kind == "bert" else None)
    student = _trained(make_backbone(kind), layout)
    vectors = _vectors(student, texts)
    student.save(str(tmp_path / "moe"))
    assert np.array_equal(_vectors(student, texts), vectors)  # still itself
    again = _student(tmp_path / "moe")
    assert next(iter(moe_layers(again.model).values())).layout == layout
    assert np.array_equal(_vectors(again, texts), vectors)
    again.save(str(tmp_path / "twice"))
    for name in ("moe.json", "moe.safetensors", "model.safetensors", "config.json", "modules.json"):
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "moe" / name).read_bytes(), name
    assert not list(tmp_path.rglob("*.bin"))

    ours = retrieval_ray.load(str(tmp_path / "moe"), device="cpu")
    plain = SentenceTransformer(str(tmp_path / "moe"), device="cpu", trust_remote_code=True)
    assert type(plain[0]).__module__.startswith("transformers_modules.")  # the folder's own code
    found = [np.asarray(model.encode(texts, batch_size=64)) for model in (ours, plain)]
    assert np.array_equal(found[0], found[1])
    np.testing.assert_allclose(found[0], vectors, atol=1e-5)


def test_without_being_told_plain_sentence_transformers_refuses(make_backbone, tmp_path):
    """Rather than loading the dense part of it in silence."""
    _trained(make_backbone("bert"), Layout(2)).save(str(tmp_path))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        SentenceTransformer(str(tmp_path), device="cpu")


def test_loading_runs_no_code_of_the_folder(make_backbone, texts, tmp_path):
    student = _trained(make_backbone("bert"), Layout(2))
    student.save(str(tmp_path))
    for name in ("moe.py", "moe_transformer.py"):
        (tmp_path / name).write_text("raise RuntimeError('code of the folder')")
    model = retrieval_ray.load(str(tmp_path), device="cpu")
    np.testing.assert_allclose(model.encode(texts), _vectors(student, texts), atol=1e-5)


@pytest.mark.slow
def test_the_folder_needs_nothing_of_this_package(make_backbone, texts, tmp_path):
    """In a process that cannot import retrieval_ray; and saved again there, it loads again."""
    student = _trained(make_backbone("xlm-roberta"), Layout(2, router="expert_choice"))
    student.save(str(tmp_path / "moe"))
    code = f"""
import json, sys
sys.modules["retrieval_ray"] = None
from sentence_transformers import SentenceTransformer
model = SentenceTransformer({str(tmp_path / "moe")!r}, device="cpu", trust_remote_code=True)
model.save({str(tmp_path / "again")!r}, create_model_card=False)
model = SentenceTransformer({str(tmp_path / "again")!r}, device="cpu", trust_remote_code=True)
print(json.dumps(model.encode(json.loads(sys.argv[1])).tolist()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(texts)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(json.loads(done.stdout.splitlines()[-1]), _vectors(student, texts), atol=1e-5)
    np.testing.assert_allclose(
        _vectors(_student(tmp_path / "again"), texts), _vectors(student, texts), atol=1e-6
    )


def test_a_dense_model_is_loaded_as_it_is(student_folder, texts):
    model = retrieval_ray.load(student_folder, device="cpu")
    plain = SentenceTransformer(student_folder, device="cpu")
    assert type(model) is SentenceTransformer and type(model[0]) is Transformer
    assert np.array_equal(model.encode(texts), plain.encode(texts))
    with pytest.raises(UserError, match="no model"):
        retrieval_ray.load("no/such-model")


def test_the_main_files_hold_a_dense_model(make_backbone, tmp_path):
    """The mean of the experts, under the names of the original architecture."""
    student = _trained(make_backbone("bert"), Layout(3))
    student.save(str(tmp_path))
    original = load_file(Path(make_backbone("bert")) / "model.safetensors")
    dense = load_file(tmp_path / "model.safetensors")
    assert {name: t.shape for name, t in dense.items()} == {name: t.shape for name, t in original.items()}
    name = "encoder.layer.0.intermediate.dense"
    experts = load_file(tmp_path / "moe.safetensors")[f"{name}.weight_EOI"]
    torch.testing.assert_close(dense[f"{name}.weight"], experts.mean(0))


def test_files_that_do_not_belong_together_are_an_error(make_backbone, tmp_path):
    _trained(make_backbone("bert"), Layout(3)).save(str(tmp_path))
    layout = json.loads((tmp_path / "moe.json").read_text())
    for change in ({"experts": 2}, {"layers": [0]}, {"where": "output"}):
        (tmp_path / "moe.json").write_text(json.dumps(layout | change))
        with pytest.raises(UserError, match="do not belong together"):
            _student(tmp_path)
    (tmp_path / "moe.safetensors").unlink()
    with pytest.raises(UserError, match=r"no moe\.safetensors"):
        _student(tmp_path)


def test_a_student_with_experts_goes_on_with_them(make_backbone, texts, tmp_path):
    layout = Layout(3, 1, "softmax")
    student = _trained(make_backbone("bert"), layout)
    student.save(str(tmp_path))
    for given in (None, layout, Layout(3, layers=(0, 1))):
        again = _student(tmp_path)
        prepare(again.model, given, only_experts=True, seed=3)
        assert np.array_equal(_vectors(again, texts), _vectors(student, texts))
        assert {n.rpartition(".")[2] for n, p in again.model.named_parameters() if p.requires_grad} == {
            "weight_EOI", "bias_EO", "router_EI",
        }  # fmt: skip
    for other in (Layout(2), Layout(3, where="output"), Layout(3, layers=(0,)), Layout(3, router="released")):
        with pytest.raises(UserError, match="other experts already"):
            prepare(_student(tmp_path).model, other, only_experts=False, seed=3)


def test_what_cannot_have_experts_is_the_users_error(make_backbone):
    student = _student(make_backbone("bert"))
    with pytest.raises(UserError, match=r"train\.moe\.experts"):
        train_only_experts(student.model)
    with pytest.raises(UserError, match="no layer 9"):
        add_experts(student.model, Layout(2, layers=(9,)))
    assert type(student.model[0]) is Transformer


@pytest.mark.parametrize("router", ROUTERS)
def test_merged_it_is_a_model_of_the_original_architecture(make_backbone, texts, tmp_path, router):
    folder = make_backbone("modernbert")
    student = _trained(folder, Layout(3, 1, router))
    load_LE = expert_load(student, texts, token_budget=10_000)
    expected = {name: layer.merged(load_LE[n]) for n, (name, layer) in
                enumerate(moe_layers(student.model[0].auto_model).items())}  # fmt: skip
    merge_experts(student.model, load_LE)
    student.save(str(tmp_path))
    plain = SentenceTransformer(str(tmp_path), device="cpu")
    assert type(plain[0].auto_model).__name__ == "ModernBertModel"
    assert not moe_layers(plain)
    for name, linear in expected.items():
        torch.testing.assert_close(plain[0].auto_model.get_submodule(name).weight, linear.weight)
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in Path(folder).iterdir()} | {"2_Normalize"}


def test_merging_copies_gives_the_dense_model_back(make_backbone, texts):
    dense, student = (_student(make_backbone("bert")) for _ in range(2))
    add_experts(student.model, Layout(5, 2))
    merge_experts(student.model)
    np.testing.assert_allclose(_vectors(student, texts), _vectors(dense, texts), atol=1e-6)


def test_the_hash_is_of_the_experts_too(make_backbone, tmp_path):
    _trained(make_backbone("bert"), Layout(2)).save(str(tmp_path / "one"))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    content = (tmp_path / "two" / "moe.json").read_text()
    (tmp_path / "two" / "moe.json").write_text(content.replace('"softmax"', '"released"'))
    assert weights_sha(str(tmp_path / "one")) != weights_sha(str(tmp_path / "two"))
