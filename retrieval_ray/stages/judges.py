"""Who judges: the teachers of a config, found once, and everything that decides their scores."""

from dataclasses import dataclass
from typing import Any

from retrieval_ray import bm25
from retrieval_ray.artifacts import Stage
from retrieval_ray.config import MODELS, MemberConfig
from retrieval_ray.model_files import Model, by_revision
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.encode import student_arguments, student_identity


@dataclass(frozen=True)
class Judge:
    """One teacher of a run. model: None where it is the student, or needs none."""

    name: str
    config: MemberConfig
    model: Model | None

    @property
    def kind(self) -> str:
        return self.config.kind


def judges_of(context: Context) -> list[Judge]:
    """The teachers of the config. Raises ``UserError`` where a model is nowhere."""
    found = []
    for name, member in context.config.teacher.named().items():
        found.append(
            Judge(name, member, by_revision(member.model, "teacher.model") if member.model else None)
        )
    return found


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
    return {
        "model": judge.model.source,
        "max_tokens": config.max_tokens,
        "precision": profile.precision,
        "token_budget": profile.token_budget,
        "device": profile.device,
        "trust_remote_code": config.trust_remote_code,
    }


def teacher_id(context: Context, judge: Judge, corpus: Stage | None) -> str:
    """Everything that decides a score beside the two texts; corpus: whose words BM25 weighs."""
    config, profile = judge.config, context.profile
    if judge.kind == "bm25":
        assert corpus is not None
        return f"bm25@{corpus.fingerprint}-{bm25.VERSION}"
    numbers = "-".join(map(str, profile.numeric().values()))
    if judge.kind in MODELS:
        assert judge.model is not None
        return f"{judge.kind}@{_short(judge.model)}-{config.max_tokens}-{profile.precision}"
    if judge.model is not None:
        return f"late@{_short(judge.model)}-{numbers}-{config.max_tokens}"
    student = student_identity(context)
    settings = "-".join(f"{key}={student[key]!r}" for key in sorted(student) if key != "sha")
    return f"{judge.kind}@{context.student.sha[:16]}-{numbers}-{settings}"


def _short(model: Model) -> str:
    """A commit with its repository, or the beginning of the hash of a folder's files."""
    return model.sha if "@" in model.sha else model.sha[:16]
