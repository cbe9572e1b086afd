"""Losses: tensors in, scalar out. Temperatures are required keywords.

Shapes: B queries, K passages of a query's own list, N different passages of the whole batch.
"""

import torch
from torch import Tensor


def listwise_kl(
    student_BK: Tensor,
    teacher_BK: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """Forward KL from teacher to student over each query's own list, mean over queries.

    KL( softmax(t / tau_t) || softmax(c / tau_s) ), no tau^2 factor, suspected false negatives
    included (arXiv 2505.19274; train_bge_listwise.py:171-183).
    """
    teacher = torch.log_softmax(teacher_BK / teacher_temperature, dim=-1)
    student = torch.log_softmax(student_BK / student_temperature, dim=-1)
    return (teacher.exp() * (teacher - student)).sum(dim=-1).mean()


def infonce(
    scores_BN: Tensor,
    positive_B: Tensor,
    *,
    excluded_BN: Tensor,
    counts_N: Tensor,
    temperature: float,
) -> Tensor:
    """Contrastive loss over every passage of the batch, mean over queries.

    -log( e^{c_ip / tau} / sum_j m_ij n_j e^{c_ij / tau} ), with n_j = how many lists of the batch
    hold passage j (the papers' candidates are all lists' rows, so a passage in two lists counts
    twice), and m_ij = 0 where j is excluded for query i. Query i's own positive always counts,
    exactly once (arXiv 2505.19274; train_bge_listwise.py:186-263).

    positive_B: index of each query's positive among N. excluded_BN: True where masked by id.
    """
    own_BN = torch.zeros_like(excluded_BN)
    own_BN[torch.arange(len(positive_B)), positive_B] = True
    weight_BN = torch.where(own_BN, 0.0, counts_N.to(scores_BN.dtype).log())
    logits_BN = scores_BN / temperature
    candidates_BN = (logits_BN + weight_BN).masked_fill(excluded_BN & ~own_BN, -torch.inf)
    positive = logits_BN.gather(1, positive_B[:, None]).squeeze(1)
    return (torch.logsumexp(candidates_BN, dim=1) - positive).mean()


def calibrate_temperature(student_BK: Tensor, teacher_BK: Tensor, *, teacher_temperature: float) -> float:
    """The student temperature at which the untouched student is nearest to the teacher.

    Minimises listwise_kl over tau_s by golden-section search on log tau_s in [0.005, 2]. Only
    tau_s: the minimum over both temperatures runs off to infinity.
    """

    def kl(log_tau: float) -> float:
        tau = float(torch.tensor(log_tau).exp())
        return float(
            listwise_kl(
                student_BK.double(),
                teacher_BK.double(),
                student_temperature=tau,
                teacher_temperature=teacher_temperature,
            )
        )

    low, high = float(torch.tensor(0.005).log()), float(torch.tensor(2.0).log())
    shrink = (5**0.5 - 1) / 2
    while high - low > 1e-3:
        left, right = high - shrink * (high - low), low + shrink * (high - low)
        if kl(left) < kl(right):
            high = right
        else:
            low = left
    return float(torch.tensor((low + high) / 2).exp())
