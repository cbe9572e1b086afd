"""Configs: every YAML loads, unknown keys name the nearest known one, wrong values are errors."""

import gzip
import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from retrieval_ray.config import Config, DatasetConfig, StudentConfig, to_dict
from retrieval_ray.config_file import differences, load, with_values
from retrieval_ray.errors import UserError
from retrieval_ray.prompts import KINDS

ROOT = Path(__file__).resolve().parents[1]
YAMLS = sorted(
    p.relative_to(ROOT).as_posix() for where in ("", "sweeps/") for p in ROOT.glob(f"configs/{where}*.yaml")
)


def leaves(schema: Any = Config, prefix: str = "") -> list[str]:
    """Every option of the config, as ``section.name``."""
    found = []
    for f in fields(schema):
        inner = f.default_factory
        if is_dataclass(inner):
            found += [f"{prefix}{f.name}", *leaves(inner, f"{prefix}{f.name}.")]
        else:
            found.append(f"{prefix}{f.name}")
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An empty config file: all defaults."""
    file = tmp_path / "job.yaml"
    file.write_text("")
    return file


def error_of(path: Path, *overrides: str, text: str = "") -> str:
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load(str(path), overrides)
    return str(caught.value)


# --- what loads -------------------------------------------------------------------------------


@pytest.mark.parametrize("yaml", YAMLS)
def test_every_yaml_of_the_project_loads(yaml: str) -> None:
    assert load(str(ROOT / yaml)).corpora()


@pytest.mark.parametrize("yaml", YAMLS)
def test_every_yaml_of_the_project_is_differences_only(yaml: str) -> None:
    assert to_dict(load(str(ROOT / yaml))) != to_dict(Config())
    assert len((ROOT / yaml).read_text().splitlines()) <= 50


def test_an_empty_file_is_all_defaults(path: Path) -> None:
    assert load(str(path)) == Config()


@pytest.mark.parametrize("text", ["# nothing\n", "---\n", "null\n", "{}\n", "\ufeff"])
def test_a_file_that_says_nothing_is_all_defaults(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    assert load(str(path)) == Config()


def test_a_mark_at_the_start_is_read_over(path: Path) -> None:
    path.write_text("\ufeffseed: 5\n", encoding="utf-8")
    assert load(str(path)).seed == 5


def test_an_override_wins_over_the_file_and_the_file_over_the_default(path: Path) -> None:
    path.write_text("train: {max_epochs: 3, patience: 1}\nseed: 5\n")
    config = load(str(path), ["train.max_epochs=7", "dataset.path=/data"])
    assert (config.train.max_epochs, config.train.patience, config.seed) == (7, 1, 5)
    assert config.dataset.path == "/data"
    assert config.train.learning_rate == Config().train.learning_rate


def test_the_last_of_two_overrides_wins(path: Path) -> None:
    assert load(str(path), ["seed=1", "seed=2"]).seed == 2


def test_overrides_may_hold_lists_null_numbers_and_equal_signs(path: Path) -> None:
    config = load(
        str(path),
        [
            "queries.sources=[log,extractive]",
            "train.learning_rate=1e-3",
            "groups.min_positive_percentile=null",
            "teacher.weights.late=2",
            "dataset.path=a=b",
            "dataset.titles=false",
        ],
    )
    assert config.queries.sources == ["log", "extractive"]
    assert config.train.learning_rate == 0.001
    assert config.groups.min_positive_percentile is None
    assert config.teacher.weights == {"late": 2.0}
    assert config.dataset.path == "a=b"
    assert config.dataset.titles is False


def test_several_corpora_replace_the_one(path: Path) -> None:
    assert load(str(path)).corpora() == [DatasetConfig()]
    path.write_text("datasets:\n- path: a\n- {path: b, split: dev, titles: false}\n")
    assert load(str(path)).corpora() == [
        DatasetConfig(path="a"),
        DatasetConfig(path="b", split="dev", titles=False),
    ]


def test_configs_do_not_share_their_lists(path: Path) -> None:
    load(str(path)).retrieve.retrievers.append("x")
    assert load(str(path)).retrieve.retrievers == ["dense", "bm25"]


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "seed": st.integers(0, 99),
            "train": st.fixed_dictionaries(
                {}, optional={"max_epochs": st.integers(1, 9), "patience": st.integers(1, 5)}
            ),
            "dataset": st.fixed_dictionaries({}, optional={"titles": st.booleans()}),
        },
    )
)
@settings(max_examples=50, deadline=None)
def test_file_and_overrides_say_the_same(tmp_path_factory: Any, given: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "given.yaml"
    path.write_text(json.dumps(given))  # JSON is YAML
    from_file = load(str(path))
    path.write_text("")
    flat = [
        f"{key}={json.dumps(value)}" if not isinstance(value, dict) else f"{key}.{inner}={json.dumps(v)}"
        for key, value in given.items()
        for inner, v in (value.items() if isinstance(value, dict) else [("", None)])
    ]
    assert load(str(path), flat) == from_file


def test_to_dict_is_plain_and_loads_to_the_same_config(path: Path) -> None:
    path.write_text("teacher: {weights: {late: 1, bm25: 0.5}}\ndatasets: [{path: x}]\n")
    config = load(str(path), ["seed=3"])
    plain = to_dict(config)
    path.write_text(json.dumps(plain))
    assert load(str(path)) == config
    assert to_dict(config.train) == plain["train"]


# --- unknown keys -----------------------------------------------------------------------------


@pytest.mark.parametrize("key", leaves())
def test_a_misspelt_key_gives_the_right_one(path: Path, key: str) -> None:
    section, _, name = key.rpartition(".")
    typo = name + name[-1]
    dotted = f"{section}.{typo}" if section else typo
    said = error_of(path, f"{dotted}=1")
    assert f"'{dotted}'" in said
    assert f"'{key}'" in said


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("train.list_size", "groups.list_size"),
        ("teacher.list_size", "groups.list_size"),
        ("student.learning_rate", "train.learning_rate"),
        ("train.precision", "compute.precision"),
        ("compute.seed", "seed"),
        ("list_size", "groups.list_size"),
    ],
)
def test_a_key_in_the_wrong_section_gives_the_right_section(path: Path, wrong: str, right: str) -> None:
    assert f"'{right}'" in error_of(path, f"{wrong}=1")


def test_a_misspelt_key_of_one_of_several_corpora_says_which(path: Path) -> None:
    said = error_of(path, text="datasets:\n- path: a\n- {path: b, spilt: dev}\n")
    assert "'datasets[1].spilt'" in said and "'datasets[1].split'" in said


def test_a_key_like_no_other_gives_the_known_ones(path: Path) -> None:
    said = error_of(path, "train.qqqqq=1")
    assert "'train.qqqqq'" in said
    known = {key.split(".")[1] for key in leaves() if key.startswith("train.")}
    assert {"terms", "moe"} <= set(known) and all(key in said for key in known)


def test_the_terms_of_the_loss_are_those_that_can_be_computed() -> None:
    from retrieval_ray.objective import TERMS

    assert list(vars(Config().train.terms)) == list(TERMS)


def test_a_term_is_switched_on_by_its_weight(path: Path) -> None:
    terms = load(str(path), ["train.terms.ranking=0.5", "train.terms.infonce=0"]).train.terms
    assert (terms.kl, terms.infonce, terms.ranking) == (1.0, 0.0, 0.5)
    assert "'train.terms.ranking'" in error_of(path, "train.terms.rankings=1")
    assert "train.terms" in error_of(path, "train.terms.kl=0", "train.terms.infonce=0")
    assert "queries.negatives" in error_of(path, "train.terms.clp=0.1")


def test_the_recipes_of_clp_are_its_two_forms() -> None:
    """`released`: (1 - w) of the list's cross-entropy, w of the penalty; `list`: KL with both."""
    paper, laptop = (load(str(ROOT / "configs" / name)) for name in ("clp.yaml", "clp-cpu.yaml"))
    terms = {name: weight for name, weight in vars(paper.train.terms).items() if weight}
    assert terms == {"infonce_list": 0.9, "clp": 0.1} and paper.train.infonce_temperature == 0.02
    assert (paper.groups.list_size, paper.teacher.depth, paper.train.batch_queries) == (10, 10, 4)
    assert paper.train.list_sample == 5 and paper.groups.min_positive_percentile is None
    assert (paper.train.moe.router, paper.train.moe.train) == ("released", "experts")
    terms = {name: weight for name, weight in vars(laptop.train.terms).items() if weight}
    assert terms == {"kl": 1.0, "infonce": 0.1, "clp": 0.1}
    assert laptop.llm.model is None and laptop.student == StudentConfig() and laptop.dataset.path == "demo"


def test_an_llm_that_writes_for_negatives_alone_is_checked_too(path: Path) -> None:
    told = ("queries.negatives=true", "llm.model=m", "llm.engine=endpoint")
    assert "llm.url" in error_of(path, *told)
    assert load(str(path), [*told, "llm.url=http://localhost:8000/v1"]).queries.sources is None


@given(st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_no_unknown_key_is_accepted(tmp_path_factory: Any, key: str) -> None:
    path = tmp_path_factory.getbasetemp() / "unknown.yaml"
    path.write_text("")
    for section in ("", "train.", "dataset."):
        if f"{section}{key}" not in leaves():
            with pytest.raises(UserError, match="unknown config key"):
                load(str(path), [f"{section}{key}=1"])


# --- files that are no config -----------------------------------------------------------------


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere.yaml"):
        load(str(tmp_path / "nowhere.yaml"))


@pytest.mark.parametrize(
    "text",
    [
        "- a\n- b\n",
        "3\n",
        "train: [\n",
        "seed: 1\nseed: 2\n",
        "train: null\n",
        "train: 3\n",
        "datasets: null\n",
        "datasets: [3]\n",
        "datasets: {path: x}\n",
        "teacher: {weights: [1]}\n",
        "queries: {sources: log}\n",
        "seed: ${nowhere}\n",
        "seed: {a: 1}\n",
    ],
)
def test_a_file_of_the_wrong_form_is_named(path: Path, text: str) -> None:
    assert path.name in error_of(path, text=text)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00\x01", b"\x00\x01", gzip.compress(b"seed: 1\n", mtime=0)])
def test_a_file_that_is_not_text_is_named(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(UserError, match=path.name):
        load(str(path))


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a folder, not a config file"):
        load(str(tmp_path))


def test_a_list_is_told_what_stands_at_the_top_level(path: Path) -> None:
    assert "keys at the top level" in error_of(path, text="- a\n- b\n")


@pytest.mark.parametrize("override", ["train.max_epochs", "--help", ""])
def test_an_override_without_an_equal_sign_is_named(path: Path, override: str) -> None:
    assert f"'{override}'" in error_of(path, override)


def test_an_override_of_a_list_entry_is_an_error_of_the_user(path: Path) -> None:
    assert "datasets" in error_of(path, "datasets.0.path=x")


# --- wrong values -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        "seed=abc",
        "seed=1.5",
        "seed=null",
        "dataset.titles=maybe",
        "dataset.path=null",
        "groups.list_size=many",
        "groups.list_size=null",
        "train.learning_rate=fast",
        "teacher.weights.late=heavy",
        "compute.workers=true",
        "retrieve.retrievers=null",
        "dataset=demo",
    ],
)
def test_a_value_of_the_wrong_type_names_its_key(path: Path, override: str) -> None:
    assert override.partition("=")[0] in error_of(path, override)


@pytest.mark.parametrize(
    ("override", "known"),
    [
        ("queries.sources=[log,guess]", ["log", "extractive", "llm"]),
        ("llm.engine=oracle", ["vllm", "endpoint"]),
        ("llm.sample=best", ["uniform", "length", "title"]),
        ("llm.kinds={riddle: 1}", list(KINDS)),
        ("retrieve.retrievers=[dense,colbert]", ["dense", "bm25"]),
        ("teacher.kind=oracle", ["embedded", "ensemble", "cross_encoder", "seq2seq", "yes_no", "listwise"]),
        ("evaluate.systems=[bm25,human]", ["bm25", "teacher"]),
        ("train.moe.router=hash", ["released", "softmax", "expert_choice"]),
        ("train.moe.where=attention", ["intermediate", "output"]),
        ("train.moe.train=router", ["all", "experts"]),
        ("merge.weights=best", ["load", "uniform"]),
        ("compute.precision=float64", ["float32", "bfloat16", "float16"]),
        ("teacher.weights.splade=1", ["late", "bm25", "dense"]),
    ],
)
def test_an_unknown_choice_lists_the_known_ones(path: Path, override: str, known: list[str]) -> None:
    said = error_of(path, override)
    assert override.partition("=")[0].removesuffix(".splade") in said
    assert all(choice in said for choice in known)


@pytest.mark.parametrize(
    "override",
    [
        "groups.list_size=1",
        "teacher.depth=19",
        "retrieve.depth=99",
        "retrieve.retrievers=[bm25]",
        "retrieve.retrievers=[]",
        "teacher.kind=cross_encoder",
        "train.dev_share=0",
        "train.dev_share=1",
        "compute.workers=0",
        "compute.logical_cpus=0",
        "compute.logical_cpus=7",
        "compute.cpus_per_worker=-1",
        "compute.min_workers=2",
        "compute.min_workers=0",
        "student.lora.r=0",
        "student.lora.alpha=8",
        "student.lora.targets=[q_proj]",
        "compute.token_budget=0",
        "llm.kinds={question: 0}",
        "llm.kinds={question: -1, title: 2}",
        "llm.max_copied=1.5",
        "llm.concurrency=0",
    ],
)
def test_values_that_contradict_each_other_name_the_key(path: Path, override: str) -> None:
    section, _, rest = override.partition(".")
    named = "teacher.model" if rest.startswith("kind=") else override.partition("=")[0]
    assert named in error_of(path, override)


def test_lora_needs_its_package(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert load(str(path), ["student.lora.r=8"]).student.lora.r == 8
    assert "student.lora.targets" in error_of(path, "student.lora={r: 8, targets: []}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install" in error_of(path, "student.lora.r=8")


def test_experts_are_off_until_they_are_asked_for(path: Path) -> None:
    assert load(str(path)).train.moe.experts == 0
    moe = load(str(path), ["train.moe.experts=8", "train.moe.top_k=2", "train.moe.layers=[0,3]"]).train.moe
    assert (moe.experts, moe.top_k, moe.layers) == (8, 2, [0, 3])
    assert "train.moe.top_k" in error_of(path, "train.moe.experts=1", "train.moe.top_k=2")
    assert load(str(path), ["train.moe.balance_weight=0.01"])
    for router in ("released", "expert_choice"):
        said = error_of(path, "train.moe.balance_weight=0.01", f"train.moe.router={router}")
        assert "train.moe.balance_weight" in said


def test_the_choices_of_experts_are_those_there_are() -> None:
    from retrieval_ray import config_values, moe

    assert config_values.ROUTERS == tuple(moe.ROUTERS) and config_values.WHERE == moe.WHERE
    assert config_values.RANGES["train.moe"]["experts"] == (0, moe.MAX_EXPERTS)
    assert config_values.RANGES["train.moe"]["top_k"] == (1, moe.MAX_TOP_K)


def test_an_llm_must_be_named_and_an_endpoint_must_have_an_address(path: Path) -> None:
    assert "llm.model" in error_of(path, "queries.sources=[llm]")
    named = ["queries.sources=[llm]", "llm.model=writer"]
    load(str(path), named)
    assert "llm.url" in error_of(path, *named, "llm.engine=endpoint")
    said = error_of(path, *named, "llm.engine=endpoint", "llm.url=http://me:topsecret@host/v1")
    assert "llm.url" in said and "topsecret" not in said
    assert "llm.body" in error_of(path, *named, "llm.url=http://x", "llm.body={messages: []}")
    config = load(str(path), [*named, "llm.engine=endpoint", "llm.url=http://x/v1", "llm.kinds={title: 2}"])
    assert config.llm.kinds == {"title": 2}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("output_dir", "s3://AKIA:topsecret@lake/run"),
        ("store", "s3://AKIA:topsecret@lake/store"),
        ("teacher.url", "https://topsecret@host/v1"),
        ("student.model", "https://topsecret@host/model"),
        ("datasets", "[{path: 'hdfs://me:topsecret@host/corpus'}]"),
    ],
)
def test_no_address_holds_a_secret(path: Path, key: str, value: str) -> None:
    """All of a config stands in every manifest."""
    said = error_of(path, f"{key}={value}")
    assert "no password or token here" in said and key in said and "topsecret" not in said
    load(str(path), ["output_dir=hdfs://me@host/run", "student.model=some/model@revision"])


def test_too_few_logical_cpus_are_told_why(path: Path) -> None:
    assert "starve each other" in error_of(path, "compute.logical_cpus=7")
    assert load(str(path), ["compute.logical_cpus=8"]).compute.logical_cpus == 8


def test_bm25_can_only_be_evaluated_where_it_retrieves(path: Path) -> None:
    assert "evaluate.systems" in error_of(path, "retrieve.retrievers=[dense]")
    assert load(str(path), ["retrieve.retrievers=[dense]", "evaluate.systems=[teacher]"])


def test_values_on_the_edge_are_accepted(path: Path) -> None:
    config = load(
        str(path),
        [
            "groups.list_size=2",
            "teacher.depth=2",
            "retrieve.depth=100",
            "train.dev_share=0.01",
            "compute.token_budget=1",
            "teacher.kind=cross_encoder",
            "teacher.model=x",
        ],
    )
    assert (config.groups.list_size, config.teacher.depth, config.retrieve.depth) == (2, 2, 100)


@pytest.mark.parametrize(
    "override",
    [
        "dataset.max_queries=0",
        "dataset.max_queries=-1",
        "dataset.split=train:2",
        "dataset.dev_split=train:x",
        "queries.sources=[]",
        "queries.max_queries=0",
        "queries.max_words=0",
        "queries.extractive_per_passage=0",
        "queries.extractive_per_passage=4",
        "queries.extractive_max=-1",
        "student.max_query_tokens=0",
        "student.max_passage_tokens=-1",
        "retrieve.rrf_k=-1",
        "teacher.weights={late: -1}",
        "teacher.weights={late: 0, bm25: 0}",
        "teacher.max_tokens=0",
        "groups.source_rank=0",
        "groups.lower_percentile=-1",
        "groups.upper_percentile=101",
        "groups.upper_percentile=1",
        "groups.min_positive_percentile=101",
        "groups.false_negative_ratio=-0.1",
        "train.batch_queries=0",
        "train.max_epochs=-1",
        "train.patience=-1",
        "train.learning_rate=0",
        "train.learning_rate=nan",
        "train.weight_decay=-1",
        "train.clip_norm=0",
        "train.min_warmup_steps=-1",
        "train.lr_floor=2",
        "train.teacher_temperature=0",
        "train.student_temperature=0",
        "train.infonce_temperature=-1",
        "train.terms.infonce=-1",
        "train.chunk_tokens=0",
        "train.checkpoint_minutes=-1",
        "train.moe.experts=9",
        "train.moe.experts=-1",
        "train.moe.top_k=0",
        "train.moe.top_k=3",
        "train.moe.layers=[]",
        "train.moe.layers=[1,1]",
        "train.moe.layers=[-1]",
        "train.moe.jitter=1.1",
        "train.moe.balance_weight=-1",
        "merge.load_texts=0",
        "compute.threads=0",
        "compute.gpus_per_worker=-1",
        "compute.gpus_per_worker=1.5",
    ],
)
def test_a_value_that_cannot_be_what_it_must_be_names_its_key(path: Path, override: str) -> None:
    said = error_of(path, override)
    assert override.partition("=")[0] in said


def test_further_dense_retrievers_by_name_or_with_keys_of_their_own(tmp_path):
    path = tmp_path / "models.yaml"
    path.write_text(
        "retrieve:\n  retrievers: [dense, bm25, gte, bge]\n"
        "  models: {gte: some/gte, bge: {model: some/bge, query_prompt: 'find: '}}\n"
    )
    models = load(str(path)).retrieve.models
    assert models["gte"] == StudentConfig(model="some/gte")
    assert models["bge"] == StudentConfig(model="some/bge", query_prompt="find: ")
    with pytest.raises(UserError, match=r"retrieve\.models\.bge\.prompt"):
        load(str(path), ["retrieve.models.bge.prompt=x"])
    with pytest.raises(UserError, match=r"'gte' is not used"):
        load(str(path), ["retrieve.retrievers=[dense,bge]"])
    with pytest.raises(UserError, match="each only once"):
        load(str(path), ["retrieve.retrievers=[dense,gte,bge,gte]"])
    for name in ("dense", "bm25", "fused", "a-b"):
        with pytest.raises(UserError, match=rf"'{name}' cannot be a retriever's name"):
            load(
                str(path),
                [f"retrieve.models.{name}=some/model", f"retrieve.retrievers=[dense,gte,bge,{name}]"],
            )


# --- teachers -----------------------------------------------------------------------------------


def test_one_teacher_several_and_the_embedded_ones_by_name(path: Path) -> None:
    assert list(load(str(path)).teacher.named()) == ["late", "bm25", "dense"]
    alone = load(
        str(path), ["teacher.kind=yes_no", "teacher.model=x", "teacher.max_tokens=99"]
    ).teacher.named()
    assert list(alone) == ["yes_no"] and alone["yes_no"].max_tokens == 99
    path.write_text(
        "teacher:\n  kind: ensemble\n  weights: {cross_encoder: 1, small: 2}\n  members:\n"
        "  - {model: a}\n  - {model: b}\n  - {model: c, name: small, max_tokens: 64}\n  - {kind: bm25}\n"
    )
    named = load(str(path)).teacher.named()
    assert list(named) == ["cross_encoder", "cross_encoder-2", "small", "bm25"]
    assert [member.model for member in named.values()] == ["a", "b", "c", None]
    assert named["small"].max_tokens == 64


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("kind: ensemble", "teacher.members"),
        ("kind: cross_encoder, model: x, members: [{kind: late}]", "teacher.members"),
        ("kind: ensemble, members: [{kind: oracle}]", "teacher.members[0].kind"),
        ("kind: ensemble, members: [{kind: late}, {kind: seq2seq}]", "teacher.members[1].model"),
        ("kind: ensemble, members: [{kind: late}, {kind: late, name: late}]", "two of them are named 'late'"),
        ("kind: ensemble, members: [{kind: late, modell: x}]", "teacher.members[0].modell"),
        ("kind: ensemble, members: [{kind: late}], weights: {dense: 1}", "teacher.weights"),
        ("kind: ensemble, members: [{kind: late}], model: x", "teacher.model"),
        ("model: x", "teacher.model"),
        ("kind: yes_no", "teacher.model"),
        ("kind: cross_encoder, model: x, engine: vllm", "teacher.engine"),
        ("kind: yes_no, model: x, engine: oracle", "teacher.engine"),
        ("kind: yes_no, model: x, tokens: [a, b, c]", "teacher.tokens"),
        ("kind: yes_no, model: x, tokens: []", "teacher.tokens"),
        ("kind: yes_no, model: x, template: 'only {query}'", "teacher.template"),
        ("kind: listwise, model: x", "teacher.url"),
        ("kind: listwise, model: x, url: 'http://x', window: 5, stride: 5", "teacher.stride"),
        (
            "kind: ensemble, members: [{kind: cross_encoder, model: x, max_tokens: 0}]",
            "teacher.members[0].max_tokens",
        ),
    ],
)
def test_what_is_wrong_with_a_teacher_is_named(path: Path, text: str, key: str) -> None:
    assert key in error_of(path, text=f"teacher: {{{text}}}\n")


# --- files with a base, values set by key, and what a file must say -----------------------------


def test_a_base_gives_way_to_the_file_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("seed: 3\ntrain: {max_epochs: 7, patience: 1}\n")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "two.yaml").write_text("base: ../one.yaml\ntrain: {max_epochs: 5}\n")
    config = load(str(tmp_path / "deep" / "two.yaml"), ["train.patience=4"])
    assert (config.seed, config.train.max_epochs, config.train.patience) == (3, 5, 4)


def test_a_base_that_is_nowhere_or_leads_back_is_an_error(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("base: two.yaml\n")
    with pytest.raises(UserError, match=r"two.yaml \(base of .*one.yaml\)"):
        load(str(one))
    two.write_text("base: one.yaml\n")
    with pytest.raises(UserError, match="leads back"):
        load(str(one))


def test_values_set_by_key_are_those_of_an_override() -> None:
    values = {"train.terms.clp": 0.5, "queries.negatives": True, "groups.kinds": ["log", "title"]}
    overrides = ["train.terms.clp=0.5", "queries.negatives=true", "groups.kinds=[log,title]"]
    path = str(ROOT / "configs" / "cpu.yaml")
    assert with_values(load(path), values) == load(path, overrides)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"train.terms.clip": 1}, "train.terms.clp"),
        ({"train.term.clp": 1}, "train.term.clp"),
        ({"seed.x": 1}, "seed.x"),
        ({"train.terms.clp": 0.1}, "queries.negatives"),
        ({"groups.list_size": "many"}, "groups.list_size"),
    ],
)
def test_values_that_cannot_be_are_errors_that_name_them(values: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        with_values(Config(), values)


@pytest.mark.parametrize("name", YAMLS)
def test_a_file_of_the_differences_gives_the_same_config(name: str, tmp_path: Path) -> None:
    config = load(str(ROOT / name))
    again = tmp_path / "again.yaml"
    again.write_text(OmegaConf.to_yaml(differences(config)))
    assert load(str(again)) == config
