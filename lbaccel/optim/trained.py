"""Which parameters of a network are trained; the rest is frozen."""

from __future__ import annotations

from torch import nn

from lbaccel.errors import InputError
from lbaccel.optim.groups import head_of

METHODS = ("full", "head", "head+norms", "bias+head")
FREEZES_NORM = ("head", "bias+head")  # the layers that normalise are as they were


def train_only(model: nn.Module, method: str) -> str | None:
    """Let only a method's parameters require a gradient; a line that counts them.

    "head" is the classifier that `get_classifier()` names; "head+norms" adds the gain and bias of
    each normalisation layer (Frankle et al. 2021, arXiv 2003.00152), "bias+head" each bias (BitFit,
    Ben Zaken et al. 2022, arXiv 2106.10199). Buffers are not touched.

    Args:
        model: of timm, or with `get_classifier()`.
        method: one of `METHODS`; "full" changes nothing and returns None.

    Raises:
        InputError: a model that does not tell its classifier.

    >>> import timm
    >>> train_only(timm.create_model("resnet10t", num_classes=5), "head")
    'trains 2,565 of 4,925,053 parameters (head)'
    """
    if method == "full":
        return None
    chosen = head_of(model)
    if not chosen:
        raise InputError(
            f"--train {method}: {type(model).__name__} does not tell its classifier "
            "(get_classifier() has no parameters). Use --train full."
        )
    if method == "head+norms":
        chosen |= {id(p) for m in model.modules() if _normalises(m) for p in m.parameters(False)}
    elif method == "bias+head":
        chosen |= {id(p) for n, p in model.named_parameters() if n.endswith("bias") and p.ndim == 1}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    every = sum(p.numel() for p in model.parameters())
    return f"trains {trained:,} of {every:,} parameters ({method})"


def _normalises(module: nn.Module) -> bool:
    """Whether a layer is a normalisation, of torch or timm: by its name, as timm's have no base."""
    return "norm" in type(module).__name__.lower()
