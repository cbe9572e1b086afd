"""What trackers are told of a training's log, of results and of a config."""

import json

import pytest

from retrieval_ray.config import Config
from retrieval_ray.config_file import differences, with_values
from retrieval_ray.curves import Row, after, curves, parameters, results

STEPS = [
    {"step": 1.0, "lr": 0.5, "norm": 2.0, "loss": 3.0, "kl": 2.5, "tokens_per_second": 90.0, "seconds": 2.0},
    {"step": 3.0, "lr": 1.0, "norm": 1.0, "loss": 2.0, "kl": 1.5, "tokens_per_second": 80.0, "seconds": 2.0},
]
LOG = [{**row, "time": 100.0 + row["step"]} for row in STEPS]  # step 2 was not finite
EPOCHS = [
    {"epoch": 0.0, "step": 0.0, "dev_ndcg@10": 0.25, "teacher_ndcg@10": 0.5},
    {"epoch": 1.0, "step": 3.0, "dev_ndcg@10": 0.5, "teacher_ndcg@10": 0.75},
]


def test_curves_are_the_log_by_other_names() -> None:
    found = curves(LOG, EPOCHS, learning_rate=0.01, start=10)
    first = {
        "learning_rate": 0.005, "grad_norm": 2.0, "loss": 3.0, "kl": 2.5, "tokens_per_second": 90.0,
        "seconds": 2.0,
    }  # fmt: skip
    assert found["train"][0] == Row(11, 101.0, {f"train/{name}": value for name, value in first.items()})
    assert [row.step for row in found["train"]] == [11, 13]
    assert found["dev"] == [
        Row(10, 99.0, {"dev/ndcg_at_10": 0.25, "dev/teacher_ndcg_at_10": 0.5}),  # as training began
        Row(13, 103.0, {"dev/ndcg_at_10": 0.5, "dev/teacher_ndcg_at_10": 0.75}),
    ]


def test_only_what_is_new_is_told() -> None:
    found = curves(LOG, EPOCHS, learning_rate=1.0)
    assert after(found, {}) == found
    new = after(found, {"train": 3, "dev": 0})  # told between the step's checkpoint and the epoch's
    assert new == {"train": [], "dev": found["dev"][1:]}


def test_results_of_one_corpus_and_of_several() -> None:
    one = {
        "dataset": "a",
        "systems": {"base": {"ndcg@10": 0.3}, "adapted": {"ndcg@10": 0.4}},
        "delta": {"ndcg@10": {"mean": 0.1, "ci95": [0.0, 0.2], "p": 0.03}},
    }
    assert results(one) == {
        "test/base/ndcg_at_10": 0.3,
        "test/adapted/ndcg_at_10": 0.4,
        "test/delta/ndcg_at_10": 0.1,
        "test/p/ndcg_at_10": 0.03,
    }
    two = results({**one, "datasets": {"a": one, "b": {**one, "dataset": "b"}}})
    assert len(two) == 8 and two["test/b/adapted/ndcg_at_10"] == 0.4
    (other, *_) = results({**one, "datasets": {"a": {**one, "dataset": "my corpus (v2)"}}})
    assert other == "test/my corpus _v2_/base/ndcg_at_10"  # names that every tracker takes


def test_parameters_are_the_differences_from_the_defaults() -> None:
    config = with_values(Config(), {"train.max_epochs": 3, "teacher.kind": "late", "groups.kinds": ["log"]})
    told = {"train.max_epochs": "3", "teacher.kind": "late", "groups.kinds": "['log']"}
    assert parameters(differences(config)) == told


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            {"llm": {"url": "https://me:hunter2@host:8000/v1?key=hunter2"}},
            {"llm.url": "https://host:8000/v1"},
        ),
        (
            {"teacher": {"members": [{"url": "http://hunter2@h/v1"}]}},
            {"teacher.members.0.url": "http://h/v1"},
        ),
        ({"llm": {"body": {"api_key": "hunter2"}}}, {"llm.body.api_key": "(not told)"}),
        ({"llm": {"vllm": {"hf_token": "hunter2"}}}, {"llm.vllm.hf_token": "(not told)"}),
        ({"llm": {"key_variable": "MY_KEY"}}, {"llm.key_variable": "MY_KEY"}),  # where it is, not what
        ({"llm": {"max_tokens": 64}}, {"llm.max_tokens": "64"}),
        ({"llm": {"kinds": {}}}, {"llm.kinds": "{}"}),
    ],
)
def test_no_secret_is_told(given, told) -> None:
    assert parameters(given) == told
    assert "hunter2" not in json.dumps(parameters(given))
