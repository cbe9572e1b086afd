"""What vLLM is told, looked at without starting it or Ray."""

import json
from pathlib import Path
from typing import Any

import pytest

from retrieval_ray.config import LlmConfig
from retrieval_ray.errors import UserError
from retrieval_ray.model_files import BUNDLED, Model, hub_id
from retrieval_ray.prompts import JSON_SCHEMA, Request, Wanted, read_pool
from retrieval_ray.stages import ask_vllm, generate

from .llm import make_llm


def test_engine_arguments_are_passed_through_over_our_defaults() -> None:
    given = {"tensor_parallel_size": 2, "quantization": "fp8", "enable_prefix_caching": False}
    engine = ask_vllm.engine_arguments(LlmConfig(vllm=given, lora="team/adapter"), on_gpu=True)
    assert engine == {"seed": 0, "enable_lora": True, "distributed_executor_backend": "mp", **given}
    assert ask_vllm.engine_arguments(LlmConfig(), on_gpu=True) == {"enable_prefix_caching": True, "seed": 0}
    own = ask_vllm.engine_arguments(LlmConfig(vllm={"dtype": "bfloat16"}), on_gpu=False)
    assert own["dtype"] == "bfloat16" and own["enforce_eager"]


def test_rows_carry_sampling_seed_and_adapter() -> None:
    config = LlmConfig(temperature=0.3, max_tokens=9, structured=True, lora="team/adapter")
    params = ask_vllm.sampling(config)
    assert json.loads(params["structured_outputs"]["json"]) == JSON_SCHEMA
    row = ask_vllm._Preprocess(params, config.lora, seeds=True)({"seed": 5})
    assert row["sampling_params"] == {**params, "seed": 5} and row["model"] == "team/adapter"
    plain = ask_vllm._Preprocess(ask_vllm.sampling(LlmConfig()), None, seeds=False)({"seed": 5})
    assert "seed" not in plain["sampling_params"] and "model" not in plain
    assert "structured_outputs" not in plain["sampling_params"]


@pytest.mark.parametrize(("written", "cut"), [(8, False), (9, True)])
def test_a_reply_as_long_as_it_may_be_counts_as_cut(written: int, cut: bool) -> None:
    row = {"key": "00", "query_id": "q", "number": 3, "generated_text": "a b", "num_input_tokens": 7}
    reply = ask_vllm._normalised(ask_vllm._ReplyRow(9)({**row, "num_generated_tokens": written}))
    assert reply["cut"] is cut and reply["tokens_out"] == written and reply["error"] is None


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.7}, {"top_p": 0.9}, {"max_tokens": 63}, {"structured": True},
        {"chat_template": {"enable_thinking": False}}, {"vllm": {"quantization": "fp8"}},
        {"vllm": {"dtype": "bfloat16"}}, {"engine": "endpoint"},
    ],
)  # fmt: skip
def test_what_changes_a_reply_changes_the_generators_name(change: dict[str, Any]) -> None:
    model = Model("/models/writer", "a" * 64)
    own = generate.generator(LlmConfig(), model)
    assert generate.generator(LlmConfig(**change), model) != own
    assert generate.generator(LlmConfig(), Model("/models/writer", "b" * 64)) != own


def test_an_adapter_is_known_by_its_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="adapter_config.json"):
        generate.generator(LlmConfig(lora=str(tmp_path)), Model("/models/writer", "a" * 64))
    (tmp_path / "adapter_config.json").write_text("{}")
    names = []
    for weights in (b"one", b"other"):
        (tmp_path / "adapter_model.safetensors").write_bytes(weights)
        names.append(generate.generator(LlmConfig(lora=str(tmp_path)), Model("/models/writer", "a" * 64)))
    assert names[0] != names[1]


def test_how_a_reply_is_computed_does_not() -> None:
    model = Model("/models/writer", "a" * 64)
    how = {"tensor_parallel_size": 4, "gpu_memory_utilization": 0.8, "download_dir": "/fast"}
    own = generate.generator(LlmConfig(), model)
    assert generate.generator(LlmConfig(vllm=how, replicas=7), model) == own
    served = [
        generate.generator(LlmConfig(engine="endpoint", url=url, concurrency=n, retries=n), model)
        for url, n in (("http://a/v1", 1), ("http://b/v1", 9))
    ]
    assert served[0] == served[1]
    with_body = LlmConfig(engine="endpoint", body={"max_completion_tokens": 50})
    assert generate.generator(with_body, model) != served[0]


@pytest.mark.parametrize(
    ("there", "engine", "replicas", "fits"),
    [
        ({"GPU": 4.0, "CPU": 16.0}, {"tensor_parallel_size": 2}, 2, True),
        ({"GPU": 3.0, "CPU": 16.0}, {"tensor_parallel_size": 2}, 2, False),
        ({"CPU": 16.0}, {}, 1, False),
        ({"GPU": 8.0, "CPU": 5.0}, {}, 4, False),
        ({"GPU": 8.0, "CPU": 16.0}, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, 2, True),
    ],
)
def test_gpus_that_are_not_there_are_named_at_once(
    there: dict[str, float],
    engine: dict[str, int],
    replicas: int,
    fits: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "somewhere")  # vLLM is the cluster's matter then
    if fits:
        ask_vllm._check(engine, replicas, there, on_gpu=True)
    else:
        with pytest.raises(UserError, match=r"llm\.replicas.*the cluster has"):
            ask_vllm._check(engine, replicas, there, on_gpu=True)


def test_the_chat_template_is_applied_once_and_ends_with_the_assistants_header(tmp_path: Path) -> None:
    prompts = ask_vllm.Prompts(str(make_llm(tmp_path)), {}, trust_remote_code=False)
    wanted = Wanted({"question": 1}, read_pool(None), None, 4, seed=0)
    (request,) = wanted.requests([("p1", "Silk is sold at the harbour.")])
    ids = prompts.ids(request)
    tokenizer: Any = prompts.tokenizer
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    text = tokenizer.decode(ids)
    assert text.endswith("Silk is sold at the harbour.</s><|assistant|>")
    assert text.count("<|user|>") == 4 and text.count("<|assistant|>") == 4  # three exemplars, and the reply


def test_a_model_without_chat_template_is_the_users_error(tmp_path: Path) -> None:
    folder = make_llm(tmp_path)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        ask_vllm.Prompts(str(folder), {}, trust_remote_code=False)


def test_template_arguments_reach_the_template(tmp_path: Path) -> None:
    folder = make_llm(tmp_path)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if enable_thinking is false %}no thoughts{% endif %}")
    request = Request("q", "p", "question", [{"role": "user", "content": "x"}], 0)
    prompts = ask_vllm.Prompts(str(folder), {"enable_thinking": False}, trust_remote_code=False)
    assert prompts.tokenizer.decode(prompts.ids(request)).endswith("no thoughts")


def test_what_lies_on_a_hub_is_told_apart(tmp_path: Path) -> None:
    folder = tmp_path / "model@home"
    folder.mkdir()
    assert hub_id(str(folder)) is hub_id(BUNDLED) is hub_id("s3://bucket/model") is None
    assert hub_id("team/model") == ("team/model", None)
    assert hub_id("team/model@0123abc") == ("team/model", "0123abc")
