"""The balance loss against the formula of the paper, and chunk by chunk against the whole batch."""

import copy

import pytest
import torch
from torch import nn

from retrieval_ray.balance import Balance, balance_loss
from retrieval_ray.gradcache import embed_cached
from retrieval_ray.moe import Layout, Routing, moe_layers, upcycle, watch


def test_balance_by_hand():
    """Two experts, four tokens, three of which went to the first: 2 * (3/4 * 0.6 + 1/4 * 0.4)."""
    p = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.6, 0.4], [0.2, 0.8]])
    routing = Routing(torch.tensor([[3, 1]]), p.sum(0, keepdim=True), torch.tensor(4))
    assert float(balance_loss(routing)) == pytest.approx(2 * (0.75 * 0.6 + 0.25 * 0.4))
    even = Routing(torch.tensor([[2, 2]]), torch.tensor([[2.0, 2.0]]), torch.tensor(4))
    assert float(balance_loss(even)) == pytest.approx(1)
    collapsed = Routing(torch.tensor([[4, 0]]), torch.tensor([[4.0, 0.0]]), torch.tensor(4))
    both = Routing(*(torch.cat([getattr(r, f) for r in (even, collapsed)]) for f in
                     ("counts_LE", "probability_sums_LE")), torch.tensor(4))  # fmt: skip
    assert float(balance_loss(both)) == pytest.approx((1 + 2) / 2)


def _model(k):
    torch.manual_seed(0)
    model = nn.Sequential()
    for _ in range(2):
        layer = nn.ModuleDict({"Wi": nn.Linear(6, 6), "Wo": nn.Linear(6, 6)})
        model.append(nn.ModuleDict({"mlp": layer}))
    upcycle(model, Layout(4, k))
    with torch.no_grad():
        for layer in moe_layers(model).values():
            layer.weight_EOI += torch.randn_like(layer.weight_EOI)
    return model


def _embed(model, x):
    for layer in moe_layers(model).values():
        x = torch.tanh(layer(x))
    return x.mean(1)


def _mask(model, mask):
    for layer in moe_layers(model).values():
        layer.mask_BT = mask


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("chunks", [[slice(0, 6)], [slice(0, 4), slice(4, 6)]])
def test_chunks_add_up_to_the_batch(k, chunks):
    """Router gradients of InfoNCE-like loss + balance: one graph over all, or GradCache's two passes."""
    x = torch.randn(6, 5, 6, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(6, 5)
    mask[2:, 3:] = 0
    whole, cached = _model(k), _model(k)
    weight = 0.3

    _mask(whole, mask)
    with watch(whole) as seen:
        embeddings = _embed(whole, x)
        expected = balance_loss(seen())
    (embeddings @ embeddings.T).logsumexp(1).sum().add(weight * expected).backward()

    balance = Balance(cached, weight)

    def embed(part):
        _mask(cached, mask[part])
        return balance.embed(part.start, lambda: _embed(cached, x[part]))

    embeddings, backward = embed_cached(chunks, embed)
    balance.settle()
    assert balance.value == pytest.approx(float(expected.detach()))
    leaf = embeddings.detach().requires_grad_(True)
    (leaf @ leaf.T).logsumexp(1).sum().backward()
    backward(leaf.grad)
    for (name, p), q in zip(whole.named_parameters(), cached.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, msg=name)
    assert int(balance.routing.tokens) == int(mask.sum())
    assert (balance.routing.counts_LE.sum(1) == k * mask.sum()).all()


def test_ranks_share_their_counts():
    """Two ranks with a chunk each, and one without, have the gradients, added up, of one rank with both."""
    x = torch.randn(6, 5, 6, generator=torch.Generator().manual_seed(1))
    model = _model(1)
    ranks = [Balance(model, 1.0) for _ in range(3)]
    outputs = [
        balance.embed(0, lambda part=part: _embed(model, x[part]))
        for part, balance in zip([slice(0, 2), slice(2, 6)], ranks, strict=False)
    ]
    mine = {name: [getattr(b.routing, name) for b in ranks] for name in
            ("counts_LE", "probability_sums_LE", "tokens")}  # fmt: skip
    for rank, balance in enumerate(ranks):
        sums = {id(each[rank]): sum(each) for each in mine.values()}
        balance.settle(lambda t, sums=sums: sums[id(t)])
    assert ranks[0].value == ranks[1].value == ranks[2].value
    for output in outputs:
        output.backward(torch.zeros_like(output))
    found = {name: p.grad.clone() for name, p in model.named_parameters() if name.endswith("router_EI")}
    model.zero_grad(set_to_none=True)
    again = copy.deepcopy(model)
    with watch(again) as seen:
        _embed(again, x)
        balance_loss(seen()).backward()
    for name, p in again.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], p.grad)


def test_going_backward_before_the_counts_are_known_is_an_error():
    model = _model(1)
    output = Balance(model, 1.0).embed(0, lambda: _embed(model, torch.randn(2, 3, 6)))
    with pytest.raises(AssertionError, match="settle"):
        output.sum().backward()


def test_jitter_is_drawn_from_the_chunk_and_leaves_torchs_stream_alone():
    """GradCache's second pass must route as the first, whatever was drawn between."""
    model, x = _model(1), torch.randn(6, 5, 6)
    balance = Balance(model, 0.0, jitter=0.9, seed=(3, 1))
    outer = torch.get_rng_state()
    first = [balance.embed(number, lambda: _embed(model, x)) for number in (0, 1)]
    assert torch.equal(torch.get_rng_state(), outer)
    assert not torch.equal(*first) and not torch.equal(first[0], _embed(model, x))
    balance.settle()
    torch.manual_seed(77)
    assert torch.equal(balance.embed(1, lambda: _embed(model, x)), first[1])
    assert int(balance.routing.tokens) == 2 * 30  # what is embedded again counts no more
    other = Balance(model, 0.0, jitter=0.9, seed=(3, 2))
    assert not torch.equal(other.embed(0, lambda: _embed(model, x)), first[0])


def test_without_a_weight_the_load_is_counted_and_routers_are_left_alone():
    model, plain, x = _model(1), _model(1), torch.randn(2, 3, 6)
    balance = Balance(model, 0.0)
    output = balance.embed(0, lambda: _embed(model, x))
    output.sum().backward()  # no settle() is needed
    _embed(plain, x).sum().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) and (p.grad is None or torch.equal(p.grad, q.grad))
    assert (balance.routing.counts_LE.sum(1) == 6).all()
