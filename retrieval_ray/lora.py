"""LoRA (arXiv 2106.09685) through peft: of a student, low-rank additions to linear layers are trained."""

from collections.abc import Callable, Sequence

import torch

from retrieval_ray.errors import UserError
from retrieval_ray.student import Student


def add_lora(
    student: Student, *, r: int, alpha: float | None, targets: Sequence[str] | None, seed: int
) -> Callable[[], None]:
    """Freeze a student and give its linear layers additions ``alpha / r * B A`` of rank ``r``.

    alpha: None: twice r. targets: endings of layers' names, as ``q_proj``; None: every linear layer of the
    backbone. seed: A is drawn from it (B is 0), so that all ranks begin alike.
    Returns the function that merges the additions into the weights: afterwards the student is an ordinary
    one, and anybody loads what it saves. Raises ``UserError`` where no layer has such a name.
    """
    import peft

    for parameter in student.model.parameters():
        parameter.requires_grad = False
    config = peft.LoraConfig(
        r=r, lora_alpha=2 * r if alpha is None else alpha, target_modules=list(targets or ()) or "all-linear"
    )
    devices = [student.device] if student.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        try:
            wrapped = peft.get_peft_model(student.model[0].auto_model, config)
        except ValueError as error:
            raise UserError(f"student.lora.targets: {error}") from error
    student.model.eval()

    def merge() -> None:
        wrapped.merge_and_unload()

    return merge
