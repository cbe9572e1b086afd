"""A tiny corpus with lists to train on."""

import numpy as np
import torch

from retrieval_ray.fit import Settings
from retrieval_ray.objective import Objective
from retrieval_ray.step import Lists
from retrieval_ray.training_data import CorpusData

SETTINGS = Settings(
    objective=Objective({"kl": 1.0, "infonce": 0.1}, 0.1, 0.3, 0.05),
    batch_queries=4,
    max_epochs=2,
    patience=5,
    learning_rate=1e-3,
    weight_decay=0.01,
    clip_norm=1.0,
    min_warmup_steps=1,
    lr_floor=0.1,
    passage_tokens=16,
    chunk_tokens=100,
    activation_bytes=None,
    dropout=True,
    checkpoint_seconds=0.0,  # after every step
    seed=0,
)


class Killed(Exception):
    pass


def kill_at(last):
    """An ``on_step`` that ends training after a step."""

    def kill(step, total, terms):
        if step == last:
            raise Killed

    return kill


def tiny_corpus(words, train=10, name="tiny"):
    """20 passages, lists of 4 for ``train`` queries, and 4 lists held out."""
    rng = np.random.default_rng(0)
    passages = {f"p{n}": " ".join(rng.choice(words, rng.integers(3, 30))) for n in range(20)}
    queries = {f"q{n}": " ".join(rng.choice(words, 4)) for n in range(train + 4)}

    def lists(names):
        rows = [[str(p) for p in rng.choice(list(passages), 4, replace=False)] for _ in names]
        return Lists(names, rows, rng.random((len(names), 4)), [[] for _ in names])

    names = list(queries)
    return CorpusData(name, lists(names[:train]), lists(names[train:]), passages, queries, {}, {})


def assert_near(weights, expected, most):
    """Trained weights that differ by rounding alone.

    A key's bias has no gradient, softmax does not see it; what Adam makes of rounding there is left out.
    """
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        if not name.endswith(".key.bias"):
            torch.testing.assert_close(weights[name], weight, atol=most, rtol=0, msg=name)
