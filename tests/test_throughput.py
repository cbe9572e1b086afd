"""Counted operations against torch's own counter."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from retrieval_ray.experts import add_experts
from retrieval_ray.moe import Layout
from retrieval_ray.student import Student
from retrieval_ray.throughput import matmul_limit, speed, training_flops


def test_the_formula_is_what_torch_counts(student_folder):
    student = Student(student_folder, precision="float32", device="cpu")
    student.model[0].auto_model.set_attn_implementation("eager")  # torch counts no fused attention on CPUs
    rows = [np.array([2, *[7] * 22, 3])] * 5
    with FlopCounterMode(display=False) as counter:
        student.embed(rows, "passage").sum().backward()
    counted = counter.get_total_flops()
    pooler = 6 * 32 * 32 * 120  # which no sequence of tokens goes through
    assert training_flops(student.model, [24] * 5) - pooler == pytest.approx(counted, rel=0.02)


def test_the_limit_is_a_rate():
    limit = matmul_limit(torch.device("cpu"), "float32")
    assert 1e8 < limit < 1e15


@pytest.mark.parametrize(("experts", "k"), [(4, 1), (4, 2), (1, 1)])
def test_of_experts_a_token_is_counted_through_those_that_it_goes_through(student_folder, experts, k):
    """The dense model's work, the first linear of both layers k times, and the routers'."""
    student = Student(student_folder, precision="float32", device="cpu")
    dense = training_flops(student.model, [24] * 5)
    add_experts(student.model, Layout(experts, k))
    more = 6 * 120 * 2 * ((k - 1) * 32 * 64 + experts * 32)
    assert training_flops(student.model, [24] * 5) == pytest.approx(dense + more)


def test_speed_is_the_median_of_steps_and_shares_are_of_all_time():
    columns = {
        "seconds": (1.0, 3.0, 4.0), "data_seconds": (0.25, 0.25, 0.5), "forward_seconds": (0.5, 2.5, 3.0),
        "tokens_per_second": (80.0, 20.0, 40.0), "matmul_share": (0.5, 0.125, 0.25),
    }  # fmt: skip
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    shares = {"data": 0.125, "forward": 0.75}
    assert speed(rows) == {"tokens_per_second": 40.0, "matmul_share": 0.25, "shares": shares}
    assert speed([]) is None
