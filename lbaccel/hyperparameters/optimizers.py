"""The properties of an optimizer that the sheet needs, by name (no torch); tests measure timm's."""

from __future__ import annotations

import re

from lbaccel.errors import InputError

# Weight decay as a term of the gradient, before any normalisation.
_COUPLED = re.compile(
    r"(fused|bnb)?(sgd|nesterov|momentum)(8bit)?|c?sgdp|adam|fusedadam|bnbadam(8bit)?|adamax|"
    r"nadam|nadamlegacy|radam|radamlegacy|adagrad|adadelta|c?rmsprop(tf)?|c?adopt|madgrad|"
    r"novograd|fusednovograd"
)
# Inside the update whose norm the trust ratio takes: the published recipes keep it.
_IN_TRUST_RATIO = re.compile(r"n?lar[sc]|c?lambc?|fusedlamb")
# The optimizers that Malladi et al. derive their rule for, and AdamW.
_ADAM = re.compile(r"(fused|bnb)?c?adamw?c?(legacy)?(8bit)?")
_RMSPROP = re.compile(r"c?rmsprop(tf)?[wc]?")

DECAYS = ("auto", "coupled", "decoupled")


def decay_of(optimizer: str, decay: str = "auto") -> str:
    """How weight decay enters: "coupled", "decoupled", or "trust ratio" (LARS, LAMB).

    Raises:
        InputError: "auto" for an empty name.

    >>> decay_of("sgd"), decay_of("adamw"), decay_of("lamb")
    ('coupled', 'decoupled', 'trust ratio')
    """
    if decay != "auto":
        return decay
    name = _bare(optimizer)
    if _COUPLED.fullmatch(name):
        return "coupled"
    return "trust ratio" if _IN_TRUST_RATIO.fullmatch(name) else "decoupled"


def is_adam(optimizer: str) -> bool:
    """Whether Malladi's rule for betas and epsilon was derived for it.

    >>> is_adam("AdamW"), is_adam("lamb")
    (True, False)
    """
    return bool(_ADAM.fullmatch(_bare(optimizer)))


def is_rmsprop(optimizer: str) -> bool:
    """RMSProp, torch's or TensorFlow's."""
    return bool(_RMSPROP.fullmatch(_bare(optimizer)))


def _bare(optimizer: str) -> str:
    name = optimizer.strip().lower().removeprefix("lookahead_")
    if not name:
        raise InputError("optimizer='' names no optimizer. Use a name such as 'sgd' or 'adamw'.")
    return name
