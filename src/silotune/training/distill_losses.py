"""Distances between two models' predictions and attentions: the arithmetic of distillation.

Pure functions of tensors. The file knows neither models nor batches: the caller decides which rows
count, which side learns and how the parts are weighted. Hinton et al. 2015, "Distilling
the Knowledge in a Neural Network", arXiv:1503.02531; Zhang et al. 2018, "Deep Mutual Learning",
arXiv:1706.00384; Wu et al. 2022, "Communication-efficient Federated Learning via Knowledge
Distillation" (FedKD), arXiv:2108.13323. `published_loss` keeps the formula of FedKD-LoRA as its
authors released it, for comparison only.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def kl(target: Tensor, given: Tensor, *, temperature: float = 1.0, top_k: int = 0) -> Tensor:
    """How much worse `given` predicts than `target` does: T² · mean over rows of KL(p_t || p_g).

    Zero if both predict the same, never negative except for rounding, and unaffected by a constant
    added to a row, because both sides go through log-softmax first.

    Args:
        target: Logits to learn from, (num, classes), finite, num >= 1. Detached: no gradient.
        given: Logits that learn, same shape.
        temperature: T > 0; both are divided by it. T² keeps the gradient's size when T grows.
        top_k: Compare only the `target`'s top_k classes of each row, both renormalised over them.
            0, or at least `classes`, compares all.

    Returns:
        A scalar in nats, float32 at least.

    Reference:
        Hinton et al. 2015, section 2, where T² is explained. arXiv:1503.02531
    """
    # a last dimension of 1 would broadcast and look like a result
    assert target.shape == given.shape, f"logits {tuple(target.shape)}, {tuple(given.shape)}"
    target = target.detach()
    if 0 < top_k < target.shape[-1]:
        target, kept = target.topk(top_k, dim=-1)  # both (num, top_k)
        given = given.gather(-1, kept)
    log_target = torch.log_softmax(_at_least_float32(target) / temperature, dim=-1)
    log_given = torch.log_softmax(_at_least_float32(given) / temperature, dim=-1)
    rows = (log_target.exp() * (log_target - log_given)).sum(dim=-1)  # (num,)
    return temperature**2 * rows.mean()


def mutual(student: Tensor, teacher: Tensor, *, temperature: float, top_k: int = 0) -> Tensor:
    """Pull each side towards the other's current prediction: the sum of `kl` in both directions.

    Args:
        student: Logits, (num, classes). Learns from the teacher.
        teacher: Logits, same shape. Learns from the student.
        temperature: As in `kl`.
        top_k: As in `kl`; each term keeps the top classes of the side it learns from.

    Returns:
        A scalar in nats. Each side's gradient comes only from its own term.

    Reference:
        Zhang et al. 2018, the mimicry losses of two networks, here with a temperature.
        arXiv:1706.00384
    """
    to_student = kl(teacher, student, temperature=temperature, top_k=top_k)
    to_teacher = kl(student, teacher, temperature=temperature, top_k=top_k)
    return to_student + to_teacher


def layer_map(num_student: int, num_teacher: int) -> tuple[tuple[int, int], ...]:
    """Which student layer is compared with which teacher layer: last with last, evenly spread.

    No layer has two partners. All layers of the shallower model are used, so a student
    that is deeper than its teacher has some layers without a partner.

    Args:
        num_student: Layers of the student, >= 1.
        num_teacher: Layers of the teacher, >= 1.

    Returns:
        Pairs (student layer, teacher layer), counted from 0, increasing in both.

    >>> layer_map(3, 6)
    ((0, 1), (1, 3), (2, 5))
    >>> layer_map(2, 5)
    ((0, 1), (1, 4))
    >>> layer_map(4, 2)
    ((1, 0), (3, 1))
    """
    assert min(num_student, num_teacher) >= 1, "a model has layers"
    num_pairs = min(num_student, num_teacher)
    # integers: layer n of num_pairs ends at n/num_pairs of the depth, without a rounding tie
    return tuple(
        (n * num_student // num_pairs - 1, n * num_teacher // num_pairs - 1)
        for n in range(1, num_pairs + 1)
    )


def attention_gap(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    pairs: Iterable[tuple[int, int]],
    mask: Tensor | None,
) -> Tensor:
    """Sum over pairs of layers of the mean squared difference of attention probabilities.

    Args:
        student: One tensor per layer, (batch, heads, length, length): rows ask, columns answer.
        teacher: The same for the teacher. If its number of heads differs, both are averaged over
            their heads. Detached: no gradient.
        pairs: (student layer, teacher layer), for example from `layer_map`.
        mask: True at real positions, (batch, length), bool. Only pairs of two real positions count
            in the mean. None if nothing is padded.

    Returns:
        A scalar without unit, float32 at least; 0 without pairs.

    Reference:
        Wu et al. 2022, the attention part of the adaptive hidden loss; there the teacher follows
        the student too. arXiv:2108.13323
    """
    gaps = (_layer_gap(student[s], teacher[t].detach(), mask) for s, t in pairs)
    return sum(gaps, start=torch.zeros(()))


def _layer_gap(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    student, teacher = _at_least_float32(student), _at_least_float32(teacher)
    if student.shape[1] != teacher.shape[1]:
        # the heads of two models have no common order, but their averages can be compared
        student, teacher = student.mean(dim=1, keepdim=True), teacher.mean(dim=1, keepdim=True)
    assert student.shape == teacher.shape, f"{tuple(student.shape)}, {tuple(teacher.shape)}"
    difference = student - teacher
    if mask is None:
        return difference.square().mean()
    real = mask[:, None, :, None] & mask[:, None, None, :]  # (batch, 1, length, length)
    # filled before squaring: a padded query may attend to nothing, and 0 · NaN is NaN
    total = difference.masked_fill(~real, 0.0).square().sum()
    return total / (real.sum() * difference.shape[1])


def joint_loss(ce_student: Tensor, ce_teacher: Tensor, distance: Tensor) -> Tensor:
    """Both task losses, plus the distance of the two at FedKD's adaptive weight.

    While the task losses are large, neither side is worth imitating, so the pull is weak. The
    weight is a number without a gradient: otherwise a larger task loss would pay off.

    Args:
        ce_student: Mean cross entropy of the student, a scalar in nats, >= 0.
        ce_teacher: The same of the teacher.
        distance: Weighted sum of `mutual` and `attention_gap`, a scalar.

    Returns:
        CE_s + CE_t + distance / (CE_s + CE_t), the denominator detached.

    Reference:
        Wu et al. 2022, the adaptive losses; there each model has its own sum.
        arXiv:2108.13323
    """
    tasks = ce_student + ce_teacher
    # 1e-8: both may fit their labels perfectly, which must not divide by zero
    return tasks + distance / (tasks.detach() + 1e-8)


def published_loss(
    ce_student: Tensor,
    ce_teacher: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_attentions: Sequence[Tensor],
    teacher_attentions: Sequence[Tensor],
    pairs: Iterable[tuple[int, int]],
) -> Tensor:
    """The loss of FedKD-LoRA as released, faults included: for comparison, not for use.

    With C = CE_s + CE_t it is C + ATT/(C + 1) + [K(t̄, s) + K(s̄, t)]/(C̄ + 1): a bar means
    detached, ATT is the plain mean squared error of attentions, K is `published_term`.

    What is wrong with it (`joint_loss` over `mutual` and `attention_gap` fixes all of this):

    - K takes raw logits and is not a divergence. Two sides that predict the same but differ by a
      constant are penalised for it, and if they agree to the last bit the gradient is exp(s)/B
      per logit, not 0: the student rests only at s = t - 1, the teacher only at t = s - 1, so
      together they drift down and never rest. One K alone is often negative; the sum of both
      values, Σ (exp(s) - exp(t))(s - t)/B, is not, so a log of the loss hides the fault.
    - ATT's denominator carries a gradient that rewards a larger task loss.
    - Attentions are not detached, so the teacher is pulled towards the student's, and padded
      positions count in their mean.

    Args:
        ce_student: Mean cross entropy of the student, a scalar in nats.
        ce_teacher: The same of the teacher.
        student_logits: (batch, classes).
        teacher_logits: (batch, classes).
        student_attentions: One per layer, (batch, heads, length, length). Empty: ATT is 0.
        teacher_attentions: The same, with the same number of heads.
        pairs: (student layer, teacher layer). The release steps down from the last layers by
            num_teacher // num_student, which is `layer_map` if the depths divide.

    Returns:
        A scalar.
    """
    tasks = ce_student + ce_teacher
    attention = ce_student.new_zeros(())
    if student_attentions:
        for s, t in pairs:
            attention = attention + F.mse_loss(student_attentions[s], teacher_attentions[t])
    terms = published_term(teacher_logits.detach(), student_logits)
    terms = terms + published_term(student_logits.detach(), teacher_logits)
    return tasks + attention / (tasks + 1) + terms / (tasks.detach() + 1)


def published_term(a: Tensor, b: Tensor) -> Tensor:
    """K(a, b) of `published_loss`: (1/B) Σ exp(b)(b - a) on raw logits, which is not a divergence.

    On log-probabilities it would be KL(p_b || p_a). On logits it can be negative, even if both
    predict the same.

    Args:
        a: Logits, (batch, classes); the released code detaches this side.
        b: Logits, same shape; this side learns.

    >>> a, b = torch.tensor([[3.0, 1.0]]), torch.tensor([[2.0, 0.0]])  # one softmax
    >>> round(published_term(a, b).item(), 2), round(published_term(b, a).item(), 2)
    (-8.39, 22.8)
    >>> abs(kl(a, b).item()) < 1e-6
    True
    """
    return F.kl_div(a, b, reduction="batchmean", log_target=True)


def _at_least_float32(tensor: Tensor) -> Tensor:
    # bf16 keeps 8 bits: differences of log-probabilities would be mostly rounding
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
