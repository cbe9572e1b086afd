"""Losses: tensors in, scalar out. Temperatures are required keywords.

Shapes: B queries, K passages of a query's own list (the positive first), J = K - 1 negatives, N different
passages of the whole batch. Every loss is a mean over queries, so a batch may be taken in blocks.
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
    included (arXiv 2505.19274; train_bge_listwise.py:171-183). Where a list is shorter than K, the teacher's
    scores are minus infinity and the student's count for nothing.
    """
    absent_BK = teacher_BK == -torch.inf
    teacher = torch.log_softmax(teacher_BK / teacher_temperature, dim=-1)
    logits_BK = (student_BK / student_temperature).masked_fill(absent_BK, -torch.inf)
    student = torch.log_softmax(logits_BK, dim=-1)
    return (teacher.exp() * (teacher - student).masked_fill(absent_BK, 0.0)).sum(dim=-1).mean()


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


def infonce_list(student_BK: Tensor, *, excluded_BK: Tensor, temperature: float) -> Tensor:
    """Contrastive loss of each query's positive, its list's first, over its own list; mean over queries.

    excluded_BK: True where a passage is left out; the positive never is (arXiv 2412.17364, whose batches
    are single lists).
    """
    left_out_BK = excluded_BK.clone()
    left_out_BK[:, 0] = False
    logits_BK = (student_BK / temperature).masked_fill(left_out_BK, -torch.inf)
    return -torch.log_softmax(logits_BK, dim=1)[:, 0].mean()


def margin_mse(
    student_BK: Tensor,
    teacher_BK: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """Squared difference of the margins of the positive over each negative, mean over all of them.

    MarginMSE (arXiv 2010.02666, eq. 4). Both margins are counted in their own temperature, so that
    normalised teacher scores and cosines share a scale; with both temperatures 1 it is the paper's.
    """
    student_BK, teacher_BK = student_BK / student_temperature, teacher_BK / teacher_temperature
    student = student_BK[:, :1] - student_BK[:, 1:]
    teacher = teacher_BK[:, :1] - teacher_BK[:, 1:]
    return (student - teacher).square().mean()


def ranking(student_BK: Tensor, teacher_BK: Tensor, *, temperature: float) -> Tensor:
    """Rank-only distillation: log(1 + e^{(c_j - c_i) / tau}) over pairs that the teacher puts i before j.

    RankNet (Burges et al., ICML 2005) against a teacher's permutation (arXiv 2304.09542, 4.2), mean over
    a list's ordered pairs, then over lists. Of the teacher only the order counts, a higher number being
    better. Unlike a likelihood of the whole permutation (ListMLE) it takes ties and half-ordered lists:
    a pair of equals asks for nothing.
    """
    before_BKK = (teacher_BK[:, :, None] > teacher_BK[:, None, :]).to(student_BK.dtype)
    behind_BKK = (student_BK[:, None, :] - student_BK[:, :, None]) / temperature
    pairs_B = before_BKK.sum(dim=(1, 2)).clamp(min=1)
    return ((before_BKK * torch.nn.functional.softplus(behind_BKK)).sum(dim=(1, 2)) / pairs_B).mean()


def clp(cosine_BJ: Tensor, there_BJ: Tensor) -> Tensor:
    """The contrastive learning penalty: 1 - cos(q*_k, d-_k), mean over a list's negatives, then over lists.

    It draws each negative toward the query that it does answer, without a temperature; gradients flow into
    both. As the code of arXiv 2412.17364 has it (modeling.py:353-357), batched; the code is right for
    batches of one query alone. Two forms are made of it by ``train.terms``:
    released, as published: (1 - w) * infonce_list + w * clp with w = 0.1 and InfoNCE's temperature 0.02;
    list, ours: kl + v * infonce + w * clp.
    The printed formula, -(1 - w) * (log softmax + w * (1 - sum of cosines)), is not offered: it pushes
    negatives away from the queries they answer, scales the penalty by (1 - w) once more, and sums where the
    code takes the mean.
    cosine_BJ: each of the J negatives with its own query. there_BJ: False where it has none.
    """
    there = there_BJ.to(cosine_BJ.dtype)
    return ((1 - cosine_BJ) * there).sum(dim=1).div(there.sum(dim=1).clamp(min=1)).mean()


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
