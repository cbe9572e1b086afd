"""Experts against a loop over tokens, and against the dense model that they start as."""

import copy
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from retrieval_ray import moe
from retrieval_ray.experts import add_experts
from retrieval_ray.moe import (
    ROUTERS,
    WHERE,
    Layout,
    MoELinear,
    casts_kept,
    expert_choice,
    feed_forwards,
    freeze_all_but_experts,
    jittering,
    moe_layers,
    released,
    softmax,
    upcycle,
    watch,
)
from retrieval_ray.student import Student

BACKBONES = ("bert", "xlm-roberta", "modernbert")
LAYOUTS = [
    Layout(experts, k, router)
    for experts, k, router in itertools.product((1, 2, 5, 8), (1, 2), ROUTERS)
    if k <= experts
]


@pytest.fixture(scope="module")
def texts(words):
    rng = np.random.default_rng(3)
    return [" ".join(rng.choice(words, length)) for length in (1, 3, 9, 20, 40, 60, 7, 7)]


def _student(folder):
    return Student(folder, precision="float32", device="cpu")


def _vectors(student, texts, budget=300):
    return student.encode(texts, "passage", token_budget=budget)


def _part(student, scale=0.3):
    """Experts moved apart, so that it matters which one a token gets."""
    torch.manual_seed(5)
    with torch.no_grad():
        for layer in moe_layers(student.model[0].auto_model).values():
            for parameter in layer.parameters():
                parameter += scale * torch.randn_like(parameter)


def _layer(layout, inputs=6, outputs=4, seed=0, bias=True):
    torch.manual_seed(seed)
    layer = MoELinear(nn.Linear(inputs, outputs, bias=bias), layout)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += torch.randn_like(parameter)
    return layer


# --- it starts as the dense model ---------------------------------------------------------------------


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("kind", BACKBONES)
def test_copies_compute_what_the_dense_model_does(make_backbone, texts, kind, where):
    untouched = _student(make_backbone(kind))
    dense = _vectors(untouched, texts)
    for layout in LAYOUTS:
        student = copy.deepcopy(untouched)
        add_experts(student.model, replace(layout, where=where), seed=1)
        assert len(moe_layers(student.model[0].auto_model)) == 2
        vectors = _vectors(student, texts)
        np.testing.assert_allclose(vectors, dense, atol=1e-6, err_msg=str(layout))
        if layout.experts == 1:
            assert np.array_equal(vectors, dense), layout


@pytest.mark.parametrize("router", ROUTERS)
def test_one_expert_has_the_dense_layers_gradient(router):
    torch.manual_seed(0)
    dense = nn.Linear(6, 4)
    layer = MoELinear(copy.deepcopy(dense), Layout(1, 1, router))
    x = torch.randn(2, 5, 6, requires_grad=True)
    again = x.detach().clone().requires_grad_(True)
    weights = torch.randn(2, 5, 4)
    (dense(x) * weights).sum().backward()
    (layer(again) * weights).sum().backward()
    torch.testing.assert_close(layer.weight_EOI.grad[0], dense.weight.grad)
    torch.testing.assert_close(layer.bias_EO.grad[0], dense.bias.grad)
    torch.testing.assert_close(again.grad, x.grad)


def test_only_the_chosen_layers_get_experts(make_backbone):
    student = _student(make_backbone("bert"))
    add_experts(student.model, Layout(2, layers=(1,), where="output"))
    assert list(moe_layers(student.model[0].auto_model)) == ["encoder.layer.1.output.dense"]


@pytest.mark.parametrize(
    ("kind", "where", "name"),
    [
        ("bert", "intermediate", "encoder.layer.0.intermediate.dense"),
        ("xlm-roberta", "output", "encoder.layer.0.output.dense"),
        ("modernbert", "intermediate", "layers.0.mlp.Wi"),
        ("modernbert", "output", "layers.0.mlp.Wo"),
    ],
)
def test_the_feed_forwards_linears_are_found_and_no_others(make_backbone, kind, where, name):
    """Not the attention's output, which BERT calls ``output.dense`` too."""
    found = feed_forwards(_student(make_backbone(kind)).model[0].auto_model, where)
    assert len(found) == 2 and found[0][0] == name


def test_noise_and_routers_are_those_of_the_seed():
    layout = Layout(3)

    def made(seed, noise):
        torch.manual_seed(0)
        model = nn.ModuleDict({"mlp": nn.ModuleDict({"Wi": nn.Linear(6, 8), "Wo": nn.Linear(4, 6)})})
        dense = model["mlp"]["Wi"].weight.detach().clone()
        upcycle(model, layout, seed=seed, noise=noise)
        return model["mlp"]["Wi"], dense

    quiet, dense = made(0, 0.0)
    assert torch.equal(quiet.weight_EOI, dense.expand(3, -1, -1))
    one, again, other = made(1, 0.1)[0], made(1, 0.1)[0], made(2, 0.1)[0]
    assert torch.equal(one.weight_EOI, again.weight_EOI) and torch.equal(one.router_EI, again.router_EI)
    assert not torch.equal(one.weight_EOI, other.weight_EOI)
    assert not torch.equal(one.weight_EOI[0], one.weight_EOI[1])
    moved = (one.weight_EOI.detach() - dense).std() / dense.std()
    assert 0.07 < float(moved) < 0.13


# --- a loop over tokens ---------------------------------------------------------------------------------


def _loop_gates(router, logits_TE, k):
    """Each token's gates, as {token: {expert: gate}}, for the T tokens of one text."""
    tokens, experts = logits_TE.shape
    p_TE = np.exp(logits_TE) / np.exp(logits_TE).sum(1, keepdims=True)
    if router == "expert_choice":
        taken = {t: [] for t in range(tokens)}
        for e in range(experts):
            ranked = sorted(range(tokens), key=lambda t: (-p_TE[t, e], t))
            for t in ranked[: -(-tokens * k // experts)]:
                taken[t].append(e)
    else:
        taken = {t: list(np.argsort(-logits_TE[t])[:k]) for t in range(tokens)}
    return {
        t: {e: p_TE[t, e] / sum(p_TE[t, f] for f in chosen) for e in chosen} for t, chosen in taken.items()
    }


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_layer_is_a_loop_over_tokens(layout, bias):
    layer = _layer(layout, bias=bias)
    lengths = [5, 1, 3, 7]
    x_BTI = torch.randn(4, 7, 6)
    layer.mask_BT = torch.tensor([[t < n for t in range(7)] for n in lengths]).long()
    with torch.no_grad():
        out = layer(x_BTI).numpy()
        w, r, x = layer.weight_EOI.numpy(), layer.router_EI.numpy(), x_BTI.numpy()
        b = layer.bias_EO.numpy() if bias else np.zeros((layout.experts, 4), dtype=np.float32)
        for text, length in enumerate(lengths):
            gates = _loop_gates(layout.router, x[text, :length] @ r.T, layout.top_k)
            for t in range(length):
                expected = sum((g * (w[e] @ x[text, t] + b[e]) for e, g in gates[t].items()), np.zeros(4))
                if not gates[t]:
                    expected = layer.dense(x_BTI[text, t]).numpy()
                np.testing.assert_allclose(out[text, t], expected, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradients_are_those_of_a_sum_over_experts(layout):
    """The same gates on every expert's output of every token, by autograd alone."""
    layer = _layer(layout)
    layer.mask_BT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    x, weights = torch.randn(2, 5, 6, requires_grad=True), torch.randn(2, 5, 4)
    (layer(x) * weights).sum().backward()
    found = {name: p.grad.clone() if p.grad is not None else None for name, p in layer.named_parameters()}
    found_x = x.grad.clone()
    layer.zero_grad(set_to_none=True)
    x.grad = None
    logits = x @ layer.router_EI.T
    taken, gates = ROUTERS[layout.router](logits, layer.mask_BT.bool(), layout.top_k)
    every = torch.einsum("bti,eoi->bteo", x, layer.weight_EOI) + layer.bias_EO
    out = (every * gates[..., None]).sum(2)
    if layer.dense is not None:
        out = out + layer.dense(x) * (~taken.any(-1) & layer.mask_BT.bool())[..., None]
    (out * weights).sum().backward()
    torch.testing.assert_close(found_x, x.grad)
    for name, parameter in layer.named_parameters():
        zero = torch.zeros_like(parameter)  # no gradient is one of zero
        expected = zero if parameter.grad is None else parameter.grad
        torch.testing.assert_close(zero if found[name] is None else found[name], expected, msg=name)


# --- routing ------------------------------------------------------------------------------------------


@st.composite
def batches(draw):
    experts = draw(st.integers(1, 8))
    k = draw(st.integers(1, min(2, experts)))
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    seed = draw(st.integers(0, 2**16))
    scale = draw(st.sampled_from([0.0, 1.0, 30.0, 1e4]))  # ties, ordinary, and far beyond what exp() holds
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(len(lengths), max(lengths), experts, generator=generator)
    mask = torch.tensor([[t < n for t in range(max(lengths))] for n in lengths])
    return logits, mask, k


@given(batches())
def test_gates_of_a_token_sum_to_one_and_stand_where_it_was_taken(batch):
    logits, mask, k = batch
    for name, router in ROUTERS.items():
        taken, gates = router(logits, mask, k)
        assert torch.isfinite(gates).all() and (gates >= 0).all()
        assert not gates[~taken].any()
        total = gates.sum(-1)[taken.any(-1)]
        torch.testing.assert_close(total, torch.ones_like(total))
        if name != "expert_choice":
            assert (taken.sum(-1) == k).all()


@given(batches())
def test_expert_choice_takes_each_experts_share_of_each_text_and_no_padding(batch):
    logits, mask, k = batch
    taken, _ = expert_choice(logits, mask, k)
    assert not taken[~mask].any()
    share = torch.ceil(mask.sum(1) * k / logits.shape[-1]).long()
    assert (taken.sum(1) == share[:, None]).all()


@given(batches())
def test_gradients_of_routers_are_finite(batch):
    logits, mask, k = batch
    for router in ROUTERS.values():
        leaf = logits.clone().requires_grad_(True)
        taken, gates = router(leaf, mask, k)
        if gates.requires_grad:
            (gates * torch.arange(gates.numel()).view_as(gates)).sum().backward()
            assert torch.isfinite(leaf.grad).all()


def test_released_gates_by_hand():
    logits = torch.log(torch.tensor([[[1.0, 2.0, 6.0]]]))
    mask = torch.ones(1, 1, dtype=torch.bool)
    torch.testing.assert_close(released(logits, mask, 2)[1], torch.tensor([[[0, 2 / 8, 6 / 8]]]))
    torch.testing.assert_close(released(logits, mask, 1)[1], torch.tensor([[[0.0, 0.0, 1.0]]]))


def test_softmax_gates_by_hand():
    """Values as if renormalised; the gradient that of p over all experts, divided by a constant."""
    logits = torch.log(torch.tensor([[[1.0, 2.0, 6.0]]])).requires_grad_(True)
    _, gates = softmax(logits, torch.ones(1, 1, dtype=torch.bool), 1)
    torch.testing.assert_close(gates.detach(), torch.tensor([[[0.0, 0.0, 1.0]]]))
    gates[0, 0, 2].backward()
    p = torch.tensor([1 / 9, 2 / 9, 6 / 9])
    expected = p[2] * (torch.tensor([0.0, 0.0, 1.0]) - p) / p[2]
    torch.testing.assert_close(logits.grad[0, 0], expected)


@pytest.mark.parametrize(
    ("router", "k", "learns"),
    [("released", 1, False), ("released", 2, True), ("softmax", 1, True), ("softmax", 2, True),
     ("expert_choice", 1, True)],
)  # fmt: skip
def test_which_routers_have_a_gradient(router, k, learns):
    layer = _layer(Layout(4, k, router))
    layer(torch.randn(2, 9, 6)).square().sum().backward()
    gradient = layer.router_EI.grad
    assert (gradient is not None and bool(gradient.any())) == learns


@pytest.mark.parametrize("kind", BACKBONES)
def test_no_batch_mate_and_no_padding_changes_an_embedding(make_backbone, texts, kind):
    student = _student(make_backbone(kind))
    add_experts(student.model, Layout(4, 1, "expert_choice"))
    _part(student)
    together = _vectors(student, texts, budget=10_000)  # one batch, padded to the longest
    alone = np.concatenate([_vectors(student, [text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_expert_choice_is_indifferent_to_how_padding_lies():
    layer = _layer(Layout(3, 2, "expert_choice"))
    x = torch.randn(1, 5, 6)
    with torch.no_grad():
        plain = layer(x)
        layer.mask_BT = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0]])
        padded = layer(torch.cat([torch.randn(1, 2, 6), x, torch.randn(1, 1, 6)], dim=1))
        torch.testing.assert_close(padded[:, 2:7], plain)


def test_a_mask_that_does_not_fit_is_an_error():
    layer = _layer(Layout(2))
    layer.mask_BT = torch.ones(2, 3)
    with pytest.raises(ValueError, match="attention mask"):
        layer(torch.randn(1, 6, 6))


# --- jitter, load, what trains ------------------------------------------------------------------------


def test_jitter_shakes_routing_in_training_alone_and_follows_torchs_seed():
    layer = _layer(Layout(4))
    x = torch.randn(3, 50, 6)
    with torch.no_grad():
        still = layer(x)
        with jittering(layer, 0.5):
            drawn = []
            for seed in (1, 1, 2):
                torch.manual_seed(seed)
                drawn.append(layer(x))
        assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
        assert not torch.equal(drawn[0], still)
        assert torch.equal(layer(x), still)


def test_jitter_leaves_dropout_off(make_backbone):
    student = _student(make_backbone("bert"))
    add_experts(student.model, Layout(2))
    with jittering(student.model, 0.1):
        training = {name for name, module in student.model.named_modules() if module.training}
        assert training == set(moe_layers(student.model))
    assert not any(module.training for module in student.model.modules())


@pytest.mark.parametrize("router", ROUTERS)
def test_the_load_counts_real_tokens(make_backbone, texts, router):
    student = _student(make_backbone("xlm-roberta"))
    add_experts(student.model, Layout(4, 2, router))
    tokens = sum(len(row) for row in student.tokenize(texts, "passage"))
    backbone = student.model[0].auto_model
    loads = []
    for budget in (50, 10_000):  # other batches, other padding
        with watch(backbone) as seen:
            _vectors(student, texts, budget)
            loads.append(seen())
    assert int(loads[0].tokens) == tokens
    assert torch.equal(loads[0].counts_LE, loads[1].counts_LE)
    assert loads[0].counts_LE.shape == (2, 4)
    if router != "expert_choice":
        assert (loads[0].counts_LE.sum(1) == 2 * tokens).all()
    torch.testing.assert_close(loads[0].probability_sums_LE.sum(1), torch.full((2,), float(tokens)))
    assert all(layer.seen is None for layer in moe_layers(backbone).values())


@pytest.mark.parametrize("router", ROUTERS)
def test_only_experts_and_routers_train_if_so_told(make_backbone, router):
    backbone = _student(make_backbone("bert")).model[0].auto_model
    upcycle(backbone, Layout(2, 1, router, layers=(0,)))
    freeze_all_but_experts(backbone)
    at = "encoder.layer.0.intermediate.dense"
    trainable = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert trainable == {f"{at}.{name}" for name in ("weight_EOI", "bias_EO", "router_EI")}


def test_bfloat16_runs_and_routes_in_float32(make_backbone, texts):
    exact = _student(make_backbone("bert"))
    half = Student(make_backbone("bert"), precision="bfloat16", device="cpu")
    for student in (exact, half):
        add_experts(student.model, Layout(4, 2))
    assert np.abs(_vectors(half, texts) - _vectors(exact, texts)).max() < 0.1
    rows = half.tokenize(texts, "passage")
    half.embed(rows, "passage").sum().backward()
    layer = next(iter(moe_layers(half.model).values()))
    assert layer.weight_EOI.grad.dtype == torch.float32


def test_a_corpus_is_encoded_with_the_router_of_training(make_backbone, texts, monkeypatch):
    """Rounded to bfloat16, these two rows are the same, and all tokens would go to the first expert."""
    student = Student(make_backbone("bert"), precision="bfloat16", device="cpu")
    add_experts(student.model, Layout(2, 1))
    routers = []
    true = moe._Route.apply

    def seen(x, router_EI, shake):
        routers.append(router_EI.detach().clone())
        return true(x, router_EI, shake)

    with torch.no_grad():
        for layer in moe_layers(student.model).values():
            layer.router_EI[1] = layer.router_EI[0] * (1 + 2**-12)
    monkeypatch.setattr(moe._Route, "apply", seen)
    _vectors(student, texts)
    assert routers and all(not torch.equal(*router_EI) for router_EI in routers)


# --- merging, and what cannot be ----------------------------------------------------------------------


def test_merging_is_the_weighted_mean():
    layer = _layer(Layout(3))
    load = torch.tensor([1, 0, 3])
    merged = layer.merged(load)
    torch.testing.assert_close(merged.weight, (layer.weight_EOI[0] + 3 * layer.weight_EOI[2]) / 4)
    torch.testing.assert_close(merged.bias, (layer.bias_EO[0] + 3 * layer.bias_EO[2]) / 4)
    torch.testing.assert_close(layer.merged().weight, layer.weight_EOI.mean(0))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"experts": 0}, "experts"),
        ({"experts": 9}, "experts"),
        ({"experts": 1, "top_k": 2}, "top_k"),
        ({"experts": 4, "top_k": 3}, "top_k"),
        ({"experts": 4, "router": "hash"}, "released, softmax, expert_choice"),
        ({"experts": 4, "where": "attention"}, "intermediate, output"),
    ],
)
def test_layouts_that_cannot_be(fields, said):
    with pytest.raises(ValueError, match=said):
        Layout(**fields)


def test_a_layout_is_json():
    layout = Layout(4, layers=(0, 1))
    assert json.loads(json.dumps(vars(layout)))["layers"] == [0, 1]


def test_models_that_cannot_be_upcycled(make_backbone):
    with pytest.raises(ValueError, match="no feed-forward"):
        upcycle(nn.Sequential(nn.Linear(3, 3)), Layout(2))
    backbone = _student(make_backbone("bert")).model[0].auto_model
    with pytest.raises(ValueError, match="no layer 2, 7; there are 2"):
        upcycle(backbone, Layout(2, layers=(0, 2, 7)))
    upcycle(backbone, Layout(2, layers=(0,)))
    with pytest.raises(ValueError, match="already"):
        upcycle(backbone, Layout(2))


def test_kept_casts_are_of_the_weights_as_they_are_and_end_with_the_context():
    torch.manual_seed(0)
    layer, x = MoELinear(torch.nn.Linear(6, 8), Layout(3), noise=1.0), torch.randn(2, 5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        with casts_kept(layer):
            assert torch.equal(layer(x), expected) and torch.equal(layer(x), expected)
            (kept,) = layer.casts.values()
            assert kept.dtype == torch.bfloat16 and torch.equal(kept, layer.weight_EOI.bfloat16())
            expected.sum().backward()
        assert layer.casts is None
        with torch.no_grad():
            layer.weight_EOI.zero_()
        assert not torch.equal(layer(x), expected)
