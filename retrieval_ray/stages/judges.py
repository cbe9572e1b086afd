"""Who judges: the teachers of a config, found once, and everything that decides their scores."""

from dataclasses import dataclass
from typing import Any

from retrieval_ray import bm25
from retrieval_ray.artifacts import Stage, digest
from retrieval_ray.config import MODELS, MemberConfig
from retrieval_ray.errors import UserError
from retrieval_ray.model_files import Model, by_revision
from retrieval_ray.stages.ask_vllm import devices
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.encode import student_arguments, student_identity
from retrieval_ray.student import TOKEN_VECTORS
from retrieval_ray.teachers import listwise, seq2seq, yes_no

# Of what each kind makes of two texts; a higher one, and nothing that was kept is taken for it.
_SCORES = {"cross_encoder": 1, "seq2seq": 1, "yes_no": 1}
_VLLM_EXECUTION = {  # engine arguments that change no score
    "gpu_memory_utilization", "max_num_seqs", "max_num_batched_tokens", "enable_prefix_caching",
    "enforce_eager", "disable_log_stats", "swap_space",
}  # fmt: skip


@dataclass(frozen=True)
class Judge:
    """One teacher of a run. model: None where it is the student, or needs none."""

    name: str
    config: MemberConfig
    model: Model | None

    @property
    def kind(self) -> str:
        return self.config.kind


@dataclass(frozen=True)
class TeacherId:
    """Everything that decides a score beside the two texts; as text, ``KIND@MODEL-SETTINGS``.

    A score is kept under this name and the texts, by every run of a store. ``ranks`` in the kind says that
    the scores are an order of the whole pool and nothing more. model: a commit with its repository, the
    beginning of a hash, a name: it may hold any character, so it cannot be read out of the text.
    """

    kind: str
    model: str
    settings: str

    def __str__(self) -> str:
        return f"{self.kind}@{self.model}-{self.settings}"


def judges_of(context: Context) -> list[Judge]:
    """The teachers of the config. Raises ``UserError`` where a model is nowhere."""
    return [Judge(name, member, _model(member)) for name, member in context.config.teacher.named().items()]


def _model(member: MemberConfig) -> Model | None:
    if not member.model:
        return None
    if member.kind == "listwise":  # of an endpoint only the name is known
        return Model(member.model, member.model)
    return by_revision(member.model, "teacher.model", trust_remote_code=member.trust_remote_code)


def arguments_of(context: Context, judge: Judge) -> dict[str, Any]:
    """What a worker passes to the class of this kind."""
    config, profile = judge.config, context.profile
    if judge.kind == "late":
        student = student_arguments(context)
        if judge.model is not None:
            student = {
                "model": judge.model.source,
                "precision": profile.precision,
                "device": profile.device,
                "max_passage_tokens": config.max_tokens,
                "trust_remote_code": config.trust_remote_code,
            }
        return {"student": student, "token_budget": profile.token_budget}
    assert judge.model is not None
    if judge.kind == "listwise":
        return _endpoint(context, judge)
    found: dict[str, Any] = {
        "model": judge.model.source,
        "max_tokens": config.max_tokens,
        "precision": profile.precision,
        "trust_remote_code": config.trust_remote_code,
        **_asked(config),
    }
    if config.engine == "vllm":
        return found | {"engine": _vllm(context, config), "on_gpu": profile.device == "cuda"}
    return found | {"token_budget": profile.token_budget, "device": profile.device}


def teacher_id(context: Context, judge: Judge, corpus: Stage | None) -> TeacherId:
    """A teacher's model and settings; corpus: whose words BM25 weighs."""
    config, profile = judge.config, context.profile
    if judge.kind == "bm25":
        assert corpus is not None
        return TeacherId("bm25", corpus.fingerprint, str(bm25.VERSION))
    if judge.kind == "listwise":
        versions = [listwise.PROMPT_VERSION, listwise.ORDERS_VERSION]
        order = [*versions, config.window, config.stride, _body(context, judge)]
        return TeacherId("listwise-ranks", str(config.model), digest(order)[:12])
    if judge.kind in MODELS:
        assert judge.model is not None
        asked = _asked(config) | (_engine(config) if config.engine == "vllm" else {})
        settings = [str(config.max_tokens), profile.precision, f"v{_SCORES[judge.kind]}"]
        settings += [digest(asked)[:12]] if asked else []
        return TeacherId(judge.kind, _short(judge.model), "-".join(settings))
    if judge.model is not None:
        settings = [profile.precision, str(config.max_tokens), f"v{TOKEN_VECTORS}"]
        return TeacherId("late", _short(judge.model), "-".join(settings))
    student = student_identity(context)
    settings = [f"{key}={student[key]!r}" for key in sorted(student) if key != "sha"]
    version = f"-v{TOKEN_VECTORS}" if judge.kind == "late" else ""
    return TeacherId(
        judge.kind, context.student.sha[:16], f"{profile.precision}-{'-'.join(settings)}{version}"
    )


def _asked(config: MemberConfig) -> dict[str, Any]:
    """What a teacher that reads a prompt is asked."""
    if config.kind == "seq2seq":
        return {
            "template": config.template or seq2seq.TEMPLATE,
            "tokens": list(config.tokens or seq2seq.TOKENS),
        }
    if config.kind == "yes_no":
        return {
            "template": config.template or yes_no.TEMPLATE,
            "tokens": list(config.tokens or yes_no.TOKENS),
            "instruction": yes_no.INSTRUCTION if config.instruction is None else config.instruction,
        }
    return {}


def _engine(config: MemberConfig) -> dict[str, Any]:
    kept = {key: value for key, value in sorted(config.vllm.items()) if key not in _VLLM_EXECUTION}
    return {"engine": config.engine, **kept}


def _vllm(context: Context, config: MemberConfig) -> dict[str, Any]:
    """Engine arguments: the user's, and a share of the GPU's memory where a worker has but a share of it.

    Raises ``UserError`` for an engine of more GPUs than a worker has: it would find only its own.
    """
    if context.profile.device != "cuda":
        return dict(config.vllm)
    own, needed = context.worker_resources()["num_gpus"], devices(config.vllm)
    if needed > max(1.0, own):
        raise UserError(
            f"teacher.vllm: an engine of {needed} GPUs needs compute.gpus_per_worker={needed}, not {own:g}"
        )
    defaults = {"gpu_memory_utilization": 0.9 * own} if 0 < own < 1 else {}
    return defaults | dict(config.vllm)


def _endpoint(context: Context, judge: Judge) -> dict[str, Any]:
    """Arguments of ``Endpoint`` for a listwise teacher: its own address, the rest as the config's llm."""
    llm = context.config.llm
    return {
        "url": str(judge.config.url),
        "body": _body(context, judge),
        "key_variable": llm.key_variable,
        "concurrency": llm.concurrency,
        "timeout_seconds": llm.timeout_seconds,
        "retries": llm.retries,
        "section": "teacher",
    }


def _body(context: Context, judge: Judge) -> dict[str, Any]:
    """What every request of a listwise teacher says beside its messages."""
    config, llm = judge.config, context.config.llm
    body: dict[str, Any] = {"model": config.model, "temperature": 0.0, "max_tokens": config.max_tokens}
    if llm.chat_template:
        body["chat_template_kwargs"] = dict(llm.chat_template)
    return body | dict(llm.body)


def _short(model: Model) -> str:
    """A commit with its repository, or the beginning of the hash of a folder's files."""
    return model.sha if "@" in model.sha else model.sha[:16]
