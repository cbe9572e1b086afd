"""A sentence-transformers model given experts, and made dense again."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from retrieval_ray.errors import UserError
from retrieval_ray.moe import Layout, feed_forwards, freeze_all_but_experts, moe_layers, watch
from retrieval_ray.student import Student

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def add_experts(model: "SentenceTransformer", layout: Layout, *, seed: int = 0, noise: float = 0.0) -> None:
    """Upcycle the model's transformer in place; a model that has these experts already keeps them.

    Raises ``UserError`` for a model that cannot have them, and for one with other experts.
    """
    from sentence_transformers.sentence_transformer.modules import Transformer

    from retrieval_ray.moe_transformer import MoETransformer

    module = model[0]
    there = moe_layers(module.auto_model)
    if there:
        has = next(iter(there.values())).layout
        linears = [name for name, _ in feed_forwards(module.auto_model, layout.where)]
        wanted = linears if layout.layers is None else [linears[n] for n in layout.layers if n < len(linears)]
        if replace(has, layers=None) != replace(layout, layers=None) or set(wanted) != set(there):
            raise UserError(
                f"train.moe: the student has other experts already ({has}); set train.moe.experts=0 to go on "
                "training those, or make it dense first (jobs/merge.py)"
            )
        return
    if type(module) is not Transformer:
        raise UserError(f"train.moe: {type(module).__name__} is not sentence-transformers' own Transformer")
    module.__class__ = MoETransformer  # the same module; it now also tells its experts about padding
    try:
        module.give_experts(layout, seed=seed, noise=noise)
    except ValueError as error:
        module.__class__ = Transformer
        raise UserError(f"train.moe: {error}") from error


def prepare(model: "SentenceTransformer", layout: Layout | None, *, only_experts: bool, seed: int) -> None:
    """What training starts from: experts added where a layout is given, and the rest frozen if so told."""
    if layout is not None:
        add_experts(model, layout, seed=seed)
    if only_experts:
        train_only_experts(model)


def train_only_experts(model: "SentenceTransformer") -> None:
    """Freeze what is neither expert nor router. Raises ``UserError`` for a model without experts."""
    if not moe_layers(model[0].auto_model):
        raise UserError("train.moe.train: 'experts', and the student has none; set train.moe.experts")
    model.requires_grad_(False)
    freeze_all_but_experts(model[0].auto_model)


def expert_load(student: Student, passages: Sequence[str], *, token_budget: int) -> Tensor:
    """counts_LE: how many of the passages' tokens each expert of each layer takes, padding left out."""
    with watch(student.model[0].auto_model) as seen:
        student.encode(passages, "passage", token_budget=token_budget)
        return seen().counts_LE


def merge_experts(model: "SentenceTransformer", weights_LE: Tensor | None = None) -> None:
    """Make the model dense, in place: each layer's experts become their mean.

    weights_LE: of each layer's experts, as their measured load; None: all alike.
    """
    from sentence_transformers.sentence_transformer.modules import Transformer

    module = model[0]
    for number, (name, layer) in enumerate(moe_layers(module.auto_model).items()):
        module.auto_model.set_submodule(
            name, layer.merged(None if weights_LE is None else weights_LE[number])
        )
    module.__class__ = Transformer
