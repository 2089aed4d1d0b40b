"""Distillation: how far the answers of a network are from those of a teacher, sample by sample."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def distance_to_teacher(logits: Tensor, answers: Tensor, *, temperature: float) -> Tensor:
    """T^2 KL(softmax(v / T) || softmax(z / T)) of each sample.

    With the logits z of the network, `answers` v of the teacher and T = `temperature`. Gradients of
    the softened cross-entropy shrink as 1 / T^2; the factor keeps the share of the two parts of a
    loss where T changes (Hinton, Vinyals and Dean 2015, "Distilling the knowledge in a neural
    network", arXiv 1503.02531, section 2). The entropy of the teacher, which the divergence has and
    their cross-entropy has not, has no gradient.

    Args:
        logits: floating [n, C], which the gradient goes to.
        answers: logits of the teacher [n, C], of the same classes in the same order.
        temperature: T, above 0.

    Returns:
        [n], in the dtype of `logits`.

    >>> import torch
    >>> z = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    >>> distance_to_teacher(z, z, temperature=4.0)
    tensor([0., 0.])
    """
    ours = F.log_softmax(logits / temperature, dim=1)
    theirs = F.log_softmax(answers.to(logits.dtype) / temperature, dim=1)
    distance = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=1)
    return distance * temperature**2
