"""GradCache against one backward through the whole batch, in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retrieval_ray.gradcache import embed_cached


def _model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 4), torch.nn.LayerNorm(4)
    ).double()


def _loss(vectors_ND):
    """Every row depends on every other, as with in-batch negatives."""
    return torch.logsumexp(vectors_ND @ vectors_ND.T / 0.3, dim=1).square().mean()


def _gradients(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def _plain(inputs):
    model = _model()
    vectors = model(inputs)
    _loss(vectors).backward()
    return vectors.detach(), _gradients(model)


def _cached(inputs, sizes, keep_bytes=0):
    model = _model()
    vectors, backward = embed_cached(inputs.split(sizes), model, keep_bytes=keep_bytes)
    leaf = vectors.requires_grad_()
    _loss(leaf).backward()
    backward(leaf.grad)
    return vectors.detach(), _gradients(model)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=7), st.integers(0, 1000), st.integers(0, 9000))
def test_any_cut_and_any_budget_give_the_gradient_of_the_whole_batch(sizes, seed, keep_bytes):
    inputs = torch.randn(sum(sizes), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for ours, plain in zip(_cached(inputs, sizes, keep_bytes), _plain(inputs), strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("keep_bytes", [500, 2000, 10**9])
def test_what_is_kept_changes_no_bit(keep_bytes):
    inputs, sizes = torch.randn(13, 5).double(), [4, 4, 3, 2]
    for ours, nothing_kept in zip(_cached(inputs, sizes, keep_bytes), _cached(inputs, sizes), strict=True):
        assert torch.equal(ours, nothing_kept)


@pytest.mark.parametrize("sizes", [[4, 4, 4, 1], [13], [1] * 13])
def test_a_short_last_chunk(sizes):
    inputs = torch.randn(13, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(_cached(inputs, sizes)[1], _plain(inputs)[1], atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize(("keep_bytes", "kept"), [(0, 1), (1023, 1), (1024, 2), (3500, 6), (10**9, 8)])
def test_graphs_are_kept_within_the_budget_and_go_one_by_one(keep_bytes, kept):
    """A chunk saves its 2 x 32 squares (512 bytes); every chunk but the kept is embedded twice."""
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    alive, most, passes = 0, 0, 0

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            nonlocal alive, most
            if x.requires_grad:
                alive += 1
                most = max(most, alive)
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        def backward(ctx, gradient):
            nonlocal alive
            alive -= 1
            return 2 * ctx.saved_tensors[0] * gradient

    def embed(chunk):
        nonlocal passes
        passes += 1
        return Watch.apply(chunk + weight)

    chunks = torch.randn(16, 32).double().split(2)
    vectors, backward = embed_cached(chunks, embed, keep_bytes=keep_bytes)
    assert not vectors.requires_grad
    assert (alive, passes) == (kept, 8)
    backward(torch.ones_like(vectors))
    assert (alive, most, passes) == (0, kept, 8 + 8 - kept)
    expected = 2 * (torch.cat(chunks) + 1).sum()
    torch.testing.assert_close(weight.grad, expected)


def test_without_gradients_no_graph_is_made():
    with torch.no_grad():
        vectors, _ = embed_cached(torch.randn(6, 5).double().split(2), lambda chunk: _model()(chunk))
    assert vectors.grad_fn is None


def test_gradients_add_to_what_is_there():
    inputs = torch.randn(4, 5).double()
    model = _model()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    vectors, backward = embed_cached(inputs.split(2), model)
    leaf = vectors.requires_grad_()
    _loss(leaf).backward()
    backward(leaf.grad)
    torch.testing.assert_close(_gradients(model), _plain(inputs)[1] + 1, atol=1e-11, rtol=1e-9)
