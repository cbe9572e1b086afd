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


def _cached(inputs, sizes):
    model = _model()
    vectors, backward = embed_cached(inputs.split(sizes), model)
    leaf = vectors.requires_grad_()
    _loss(leaf).backward()
    backward(leaf.grad)
    return vectors.detach(), _gradients(model)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=7), st.integers(0, 1000))
def test_any_cut_gives_the_gradient_of_the_whole_batch(sizes, seed):
    inputs = torch.randn(sum(sizes), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for ours, plain in zip(_cached(inputs, sizes), _plain(inputs), strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("sizes", [[4, 4, 4, 1], [13], [1] * 13])
def test_a_short_last_chunk(sizes):
    inputs = torch.randn(13, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(_cached(inputs, sizes)[1], _plain(inputs)[1], atol=1e-11, rtol=1e-9)


def test_only_one_chunk_has_a_graph_at_a_time():
    """The first pass keeps none; the second has freed a chunk's before it starts the next."""
    model, alive, seen = _model(), [], []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            alive.pop()
            return gradient

    def embed(chunk):
        seen.append(torch.is_grad_enabled())
        if torch.is_grad_enabled():
            assert not alive
            alive.append(chunk)
        return Watch.apply(model(chunk))

    vectors, backward = embed_cached(torch.randn(6, 5).double().split(2), embed)
    assert not vectors.requires_grad
    backward(torch.ones_like(vectors))
    assert seen == [False] * 3 + [True] * 3 and not alive


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
