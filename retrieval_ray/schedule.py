"""How large a batch and how high a learning rate: the numbers of CADET (arXiv 2505.19274), as formulas."""

from collections.abc import Sequence

LEAST_STEPS = 8  # an epoch's worth of a small corpus: the batch is scaled down to this


def batch_size(sizes: Sequence[int], wanted: int) -> int:
    """Queries of a batch: as wanted, or fewer where the corpora together would not fill 8 batches.

    The papers' code drops what does not fill a batch, so a corpus with fewer queries than one trains
    zero steps. sizes: training queries of each corpus.
    """
    return max(1, min(wanted, sum(sizes) // LEAST_STEPS))


def learning_rate_scale(
    step: int, *, steps_per_epoch: int, steps: int, min_warmup_steps: int, floor: float
) -> float:
    """Share of the peak learning rate at a step (from 0).

    Linear warm-up over half an epoch, or ``min_warmup_steps`` if that is more, then linear decay towards 0
    at ``steps``, held at ``floor``.
    """
    warmup = max(min_warmup_steps, steps_per_epoch // 2)
    if step < warmup:
        return (step + 1) / warmup
    return max(floor, 1 - (step - warmup) / max(1, steps - warmup))
