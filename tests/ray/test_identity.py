"""What a stage and a cached score are named after: all that changes them, and nothing else.

Starts no Ray: the stages are asked for their names and do no work.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from retrieval_ray import schema
from retrieval_ray.artifacts import Location, Stage, stage
from retrieval_ray.config import (
    EMBEDDED,
    ComputeConfig,
    Config,
    DatasetConfig,
    LoraConfig,
    MemberConfig,
    MoeConfig,
    TermsConfig,
    TrackingConfig,
)
from retrieval_ray.contentcache import SCORE, ContentCache
from retrieval_ray.errors import UserError
from retrieval_ray.model_files import Model
from retrieval_ray.sources import Source
from retrieval_ray.stages import encode, ingest, judges, score, train
from retrieval_ray.stages import profile as profiles
from retrieval_ray.stages.collection import Collection, Grouped, Ranked, extend
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.judges import Judge, arguments_of, teacher_id
from retrieval_ray.stages.profile import Profile, resolve

TEXTS = [f"passage number {n} on ba co di" for n in range(24)]
CROSS_ENCODER = Model("/models/judge", "c" * 64)
TEACHERS = {"late", "bm25", "dense", "cross_encoder"}
Change = Callable[[Context], Context]


def corpus_of(context: Context, texts: list[str], *, titles: bool = True) -> Stage:
    rows = [("somewhere", f"p{n}", "a title", text) for n, text in enumerate(texts)]
    source = Source("small", lambda: rows, lambda split: [], lambda split: [])
    return ingest.run(context, DatasetConfig(titles=titles), source)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    profile = Profile(precision="float32", device="cpu", threads=1, token_budget=1024, workers=1)
    return Context(Config(), Location.of(str(tmp_path)), profile, Model("/models/student", "a" * 64))


@pytest.fixture
def names(context: Context, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    """A function that gives the fingerprints of both encode stages and the ids of all teachers."""
    others = {}
    for name in ("queries", "retrieve"):
        others[name] = stage(context.store, name, {})
        others[name].finish([])

    def of(run: Context, corpus: Stage, judge: Model = CROSS_ENCODER) -> dict[str, str]:
        monkeypatch.setattr(Context, "start", lambda *_: False)
        encoded = encode.run(run, Collection("small", "test", 1, corpus, None, others["queries"]))
        ranked = extend(encoded, Ranked, retrievers=("dense",), retrieved=others["retrieve"])
        members = {kind: MemberConfig(kind=kind) for kind in EMBEDDED}
        members["cross_encoder"] = run.config.teacher
        judges = [
            Judge(name, replace(member, kind=name), judge if name == "cross_encoder" else None)
            for name, member in members.items()
        ]
        scored = score.run(run, ranked, judges).scores
        monkeypatch.undo()
        teachers = {name: str(done.identity["teacher"]) for name, done in scored.items()}
        return {
            "passages": encoded.passages.fingerprint,
            "queries": encoded.query_vectors.fingerprint,
            **teachers,
        }

    return of


def changed(one: dict[str, str], other: dict[str, str]) -> set[str]:
    assert one.keys() == other.keys() == {"passages", "queries"} | TEACHERS
    return {name for name in one if one[name] != other[name]}


def student(**values: Any) -> Change:
    return lambda run: replace(run, config=replace(run.config, student=replace(run.config.student, **values)))


def teacher(**values: Any) -> Change:
    return lambda run: replace(run, config=replace(run.config, teacher=replace(run.config.teacher, **values)))


def tracking(*values: str) -> Change:
    return lambda run: replace(run, config=replace(run.config, tracking=TrackingConfig(*values)))


def profile(**values: Any) -> Change:
    return lambda run: replace(run, profile=replace(run.profile, **values))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (student(query_prompt="query: "), {"queries", "late", "dense"}),
        (student(passage_prompt="passage: "), {"passages", "late", "dense"}),
        (student(max_query_tokens=8), {"queries", "late", "dense"}),
        (student(max_passage_tokens=8), {"passages", "late", "dense"}),
        (lambda run: run.with_student(Model("/models/student", "b" * 64)),
         {"passages", "queries", "late", "dense"}),
        (teacher(max_tokens=256), {"cross_encoder"}),
        (profile(precision="bfloat16"), {"passages", "queries", "late", "dense", "cross_encoder"}),
        # where a model lies and how many workers there are changes no number
        (lambda run: run.with_student(Model("/elsewhere", "a" * 64)), set()),
        (profile(workers=4), set()),
        (teacher(depth=60), set()),
        (tracking("http://host:5000", "project"), set()),  # nor who is told of it
    ],
)  # fmt: skip
def test_the_models_settings(
    context: Context, names: Callable[..., dict[str, str]], change: Change, expected: set[str]
) -> None:
    corpus = corpus_of(context, TEXTS)
    assert changed(names(context, corpus), names(change(context), corpus)) == expected


def test_the_cross_encoders_weights(context: Context, names: Callable[..., dict[str, str]]) -> None:
    corpus = corpus_of(context, TEXTS)
    before = names(context, corpus)
    assert changed(before, names(context, corpus, Model("/models/judge", "d" * 64))) == {"cross_encoder"}
    assert changed(before, names(context, corpus, Model("/elsewhere", "c" * 64))) == set()


def test_the_corpus(context: Context, names: Callable[..., dict[str, str]]) -> None:
    """BM25 weighs words by the whole corpus; the other teachers see one passage, which is in the key."""
    before = names(context, corpus_of(context, TEXTS))
    for other in (
        corpus_of(context, [*TEXTS[:-1], "another text"]),
        corpus_of(context, [*TEXTS, "one more"]),
        corpus_of(context, TEXTS, titles=False),
    ):
        assert changed(before, names(context, other)) == {"passages", "bm25"}


def test_teachers_that_differ_share_no_score(context: Context, names: Callable[..., dict[str, str]]) -> None:
    corpus = corpus_of(context, TEXTS)
    runs = [context, student(query_prompt="query: ")(context), teacher(max_tokens=256)(context)]
    ids = {found for run in runs for name, found in names(run, corpus).items() if name in TEACHERS}
    assert len(ids) == 4 + 2 + 1
    caches = [ContentCache(context.store / "scores", one, SCORE) for one in ids]
    assert len({cache.folder.path for cache in caches}) == len({cache.key("q", "p") for cache in caches}) == 7


def test_the_token_budget_is_as_told_or_as_written_down_or_the_devices_own() -> None:
    known = {"device": "cpu", "precision": "float32", "threads": 2, "workers": 1}

    def budget(compute: ComputeConfig, **more: int) -> int:
        return resolve(compute, known | more, on_cluster=False).token_budget

    assert budget(ComputeConfig()) == 2048
    assert budget(ComputeConfig(), token_budget=777) == 777
    assert budget(ComputeConfig(token_budget=55), token_budget=777) == 55
    assert resolve(ComputeConfig(), known | {"device": "cuda"}, on_cluster=False).token_budget == 16_384


@pytest.mark.parametrize("gpus", [0.0, 1.0])
def test_a_plan_for_workers_that_are_not_there_guesses_and_starts_none(
    monkeypatch: pytest.MonkeyPatch, gpus: float
) -> None:
    monkeypatch.setattr(profiles, "gpus_per_worker", lambda compute: gpus)
    monkeypatch.setattr(profiles.ray, "remote", None)
    compute = ComputeConfig(workers=4, cpus_per_worker=7)
    found = resolve(compute, {}, on_cluster=True, asked=False)
    device = "cuda" if gpus else "cpu"
    assert (found.device, found.precision, found.threads, found.workers) == (device, "bfloat16", 7, 4)
    told = resolve(replace(compute, precision="float32"), {}, on_cluster=True, asked=False)
    assert told.precision == "float32"


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        ({"max_tokens": 256}, {"cross_encoder", "seq2seq", "yes_no", "listwise", "late"}),
        ({"template": "{query} {passage}"}, {"seq2seq", "yes_no"}),
        ({"tokens": ["a", "b"]}, {"seq2seq", "yes_no"}),
        ({"instruction": "Be strict"}, {"yes_no"}),
        ({"window": 10, "stride": 5}, {"listwise"}),
        ({"url": "http://elsewhere/v1", "name": "other", "trust_remote_code": True}, set()),
    ],
)
def test_what_a_teacher_is_asked(context: Context, change: dict[str, Any], kinds: set[str]) -> None:
    found = set()
    for kind in ("cross_encoder", "seq2seq", "yes_no", "listwise", "late"):
        member = MemberConfig(kind=kind, model="judge")
        ids = [
            str(teacher_id(context, Judge(kind, replace(member, **more), CROSS_ENCODER), None))
            for more in ({}, change)
        ]
        if ids[0] != ids[1]:
            found.add(kind)
        assert ids[0].startswith(kind)
    assert found == kinds


def test_how_a_score_is_computed_is_in_no_name_but_its_precision(context: Context) -> None:
    """Nor is the machine: a laptop's scores are a cluster's."""
    for kind in ("cross_encoder", "seq2seq", "yes_no", "late"):
        for model in (CROSS_ENCODER, None) if kind == "late" else (CROSS_ENCODER,):
            judge = Judge(kind, MemberConfig(kind=kind, model="judge"), model)

            def named(judge: Judge = judge, **changed: Any) -> str:
                return str(teacher_id(profile(**changed)(context), judge, None))

            assert named() == named(threads=7, token_budget=99, workers=5, device="cuda")
            assert named() != named(precision="bfloat16")


@pytest.mark.parametrize("kind", ["cross_encoder", "seq2seq", "yes_no"])
def test_scores_that_another_version_kept_are_not_taken(
    context: Context, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = Judge(kind, MemberConfig(kind=kind, model="judge"), CROSS_ENCODER)
    before = str(teacher_id(context, judge, None))
    monkeypatch.setitem(judges._SCORES, kind, judges._SCORES[kind] + 1)
    assert str(teacher_id(context, judge, None)) != before


def test_what_a_listwise_endpoint_is_sent_is_in_its_name(context: Context) -> None:
    judge = Judge("x", MemberConfig(kind="listwise", model="judge", url="http://x"), CROSS_ENCODER)

    def of(**values: Any) -> tuple[str, dict[str, Any]]:
        config = replace(context.config, llm=replace(context.config.llm, **values))
        run = replace(context, config=config)
        return str(teacher_id(run, judge, None)), arguments_of(run, judge)["body"]

    plain, template = of(), of(chat_template={"enable_thinking": False})
    other = of(body={"max_tokens": None, "max_completion_tokens": 9})
    assert len({plain[0], template[0], other[0]}) == 3
    assert template[1] == plain[1] | {"chat_template_kwargs": {"enable_thinking": False}}
    assert other[1] == plain[1] | {"max_tokens": None, "max_completion_tokens": 9}
    assert of(concurrency=1, temperature=0.1)[0] == plain[0]


def test_engine_arguments_that_change_no_score_are_not_in_its_name(context: Context) -> None:
    def named(**engine: Any) -> str:
        member = MemberConfig(kind="yes_no", model="judge", engine="vllm", vllm=engine)
        return str(teacher_id(context, Judge("yes_no", member, CROSS_ENCODER), None))

    other = MemberConfig(kind="yes_no", model="judge")
    assert named() != str(teacher_id(context, Judge("yes_no", other, CROSS_ENCODER), None))
    assert named() == named(gpu_memory_utilization=0.5, max_num_seqs=8)
    assert named() != named(quantization="fp8")


def test_a_prompt_that_is_the_kinds_own_may_be_said_or_not(context: Context) -> None:
    from retrieval_ray.teachers import yes_no

    said = MemberConfig(kind="yes_no", template=yes_no.TEMPLATE, tokens=["yes", "no"])
    ids = {
        teacher_id(context, Judge("x", m, CROSS_ENCODER), None) for m in (said, MemberConfig(kind="yes_no"))
    }
    assert len(ids) == 1


def test_a_commit_stands_for_the_files_of_a_model_on_a_hub(context: Context) -> None:
    model = Model("team/judge@abc", "team/judge@abc")
    found = teacher_id(context, Judge("x", MemberConfig(), model), None)
    assert found.model == "team/judge@abc" and str(found).startswith("cross_encoder@team/judge@abc-512-")


def test_an_engine_on_gpus_gets_what_its_worker_has(context: Context) -> None:
    def engine(gpus: float, **given: Any) -> dict[str, Any]:
        compute = replace(context.config.compute, gpus_per_worker=gpus)
        run = replace(profile(device="cuda")(context), config=replace(context.config, compute=compute))
        member = MemberConfig(kind="yes_no", model="judge", engine="vllm", vllm=given)
        found: dict[str, Any] = arguments_of(run, Judge("x", member, CROSS_ENCODER))["engine"]
        return found

    assert engine(1) == {} and engine(2, tensor_parallel_size=2) == {"tensor_parallel_size": 2}
    assert engine(0.5) == {"gpu_memory_utilization": 0.45}
    assert engine(0.5, gpu_memory_utilization=0.3) == {"gpu_memory_utilization": 0.3}
    with pytest.raises(UserError, match="compute.gpus_per_worker=2"):
        engine(1, tensor_parallel_size=2)


def compute(**values: Any) -> Change:
    return lambda run: replace(run, config=replace(run.config, compute=replace(run.config.compute, **values)))


def trained(run: Context, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(Context, "start", lambda *_: False)
    return train.run(run, [], []).fingerprint


def test_training_is_named_after_its_workers_unless_they_may_come_and_go(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of workers decides the last bits of sums; an elastic run may go on with any number."""
    fixed = [trained(profile(workers=n)(context), monkeypatch) for n in (1, 2)]
    elastic = [
        trained(profile(workers=most)(compute(workers=most, min_workers=least)(context)), monkeypatch)
        for least, most in ((1, 2), (1, 4), (3, 4))
    ]
    assert len(set(fixed)) == 2 and len(set(elastic)) == 1 and not set(fixed) & set(elastic)


def test_training_is_named_after_its_lora(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    before = trained(context, monkeypatch)
    names = {
        trained(student(lora=LoraConfig(**lora))(context), monkeypatch)
        for lora in ({"r": 4}, {"r": 8}, {"r": 8, "alpha": 8.0}, {"r": 8, "targets": ["q_proj"]})
    }
    assert len(names) == 4 and before not in names


def train_settings(**values: Any) -> Change:
    return lambda run: replace(run, config=replace(run.config, train=replace(run.config.train, **values)))


def test_training_is_named_after_its_experts(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    two = MoeConfig(experts=2)
    wanted = [
        MoeConfig(),
        two,
        *(replace(two, **more) for more in ({"jitter": 0.1}, {"balance_weight": 0.1}, {"train": "experts"})),
    ]
    names = {trained(train_settings(moe=moe)(context), monkeypatch) for moe in wanted}
    assert len(names) == 5


def test_training_is_named_after_the_queries_of_negatives_where_clp_reads_them(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    def done(name: str, **content: Any) -> Stage:
        made = stage(context.store, name, content)
        made.write("queries.parquet", schema.from_rows("queries", []) if not content else schema.empty("run"))
        made.finish(["queries.parquet"])
        return made

    other = done("other")
    monkeypatch.setattr(Context, "start", lambda *_: False)

    def name_of(negatives: Stage | None, clp: float) -> str:
        grouped = Grouped(
            "small",
            "test",
            1,
            other,
            None,
            other,
            other,
            other,
            {},
            {},
            ("dense",),
            other,
            {},
            other,
            negatives,
        )
        run = train_settings(terms=TermsConfig(clp=clp))(context)
        return train.run(run, [grouped], []).fingerprint

    one, two = done("negatives"), done("negatives", other=True)
    assert name_of(one, 0.1) != name_of(two, 0.1)
    assert name_of(one, 0.0) == name_of(two, 0.0) == name_of(None, 0.0)
