"""The reference: one update of the whole batch in plain torch, one forward and one backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from lbaccel.batch.plan import MicroBatch, NormBatchSize
from lbaccel.errors import InputError, RunFailed
from lbaccel.verification.copies import described
from lbaccel.verification.updates import (
    Result,
    Subject,
    masks_of,
    move_along,
    result_of,
    stirred_states,
    whole_loss,
)


def reference(subject: Subject) -> Result:
    """Two updates of the whole batch in plain torch: one forward, one backward each.

    Of lbaccel it uses the keyed masks alone, without which dropout could not be compared. With
    `norm_batch_size`, each BatchNorm layer runs its ghost batches one after the other, and moves
    its statistics by the textbook's rule.

    Raises:
        InputError: the loss function fails, or returns no loss.
        RunFailed: the loss or a gradient is not finite.
    """
    model = subject.fresh()
    _without_checkpointing(model)
    first = _update(subject, model, 0)
    move_along(model, first.gradients)
    return replace(first, after=_update(subject, model, 1))


def _update(subject: Subject, model: nn.Module, index: int) -> Result:
    n = subject.num_samples
    move_statistics = _run_ghost_batches_in_turn(model, subject.norm_batch_size, n)
    randomness = masks_of(subject)
    before = stirred_states()
    with randomness.update(index), randomness.forward(MicroBatch(0, (n,))):
        try:
            out = whole_loss(subject, model, randomness)
            loss = out[0] if isinstance(out, tuple) else out
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                kind = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss)
                raise InputError(
                    f"the loss function returned {kind}: it must return the mean loss of the "
                    "batch, a scalar that requires grad (reduction='mean'), or (loss, weight)."
                )
            _check_leaves(loss, model)
            move_statistics()  # before a recompute of the model's own could add to them
            loss.backward()
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"the loss function failed on the whole batch of {n} samples, in float64 on the "
                f"CPU: {described(error)}. It is called as loss_fn(model, batch) and must take "
                "device and dtype from the batch that it gets."
            ) from error
    result = result_of(subject, model, float(loss.detach()), before)
    if not math.isfinite(result.loss) or not all(
        g is None or bool(torch.isfinite(g).all()) for g in result.gradients.values()
    ):
        raise RunFailed(
            f"the loss of the whole batch is {result.loss}, or a gradient of it is not finite, so "
            "there is nothing to compare. Give verify() weights and samples of a finite loss."
        )
    if all(g is None for g in result.gradients.values()):
        raise InputError(
            "the loss has no gradient with respect to any parameter of the model: loss_fn(model, "
            "batch) must use the model that it is given, and the model must train something."
        )
    return result


def _check_leaves(loss: Tensor, model: nn.Module) -> None:
    """Stop at a parameter that is not the model's: before the backward could write to it."""
    own = {id(p) for p in model.parameters()}
    todo: list[Any] = [loss.grad_fn]
    met: set[Any] = set()
    outside: list[tuple[int, ...]] = []
    while todo:
        node = todo.pop()
        if node is None or node in met:
            continue
        met.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter) and id(leaf) not in own:
            outside.append(tuple(leaf.shape))
        todo += [next_node for next_node, _ in node.next_functions]
    if outside:
        raise InputError(
            f"the loss depends on {len(outside)} parameters outside the model (shapes "
            f"{outside[:3]}): an update neither scales nor sums their gradients over the ranks. "
            "Use the model that loss_fn is given, not another one, and make parameters of the "
            "loss (a temperature, logit_scale) parameters of the model."
        )


def _without_checkpointing(model: nn.Module) -> None:
    hook: Any = getattr(model, "set_grad_checkpointing", None)
    if hook is not None:
        try:
            hook(False)
        except (AssertionError, TypeError):  # a family without support has nothing switched on
            return


def _run_ghost_batches_in_turn(
    model: nn.Module, norm_batch_size: NormBatchSize, num_samples: int
) -> Callable[[], None]:
    """Patch the layers of a copy; what is returned moves their statistics after the forward."""
    count = -(-num_samples // norm_batch_size) if isinstance(norm_batch_size, int) else 1
    sizes = [num_samples // count + (ghost < num_samples % count) for ghost in range(count)]
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, _BatchNorm)]
    seen: dict[Any, list[list[tuple[Tensor, Tensor]]]] = {}
    for name, layer in layers if norm_batch_size is not None else ():
        if norm_batch_size == "frozen":
            layer.training = False  # its children (timm: drop, act) stay
        elif layer.training:
            seen[layer] = []
            layer.forward = _in_turn(layer, name, sizes, num_samples, seen[layer])

    @torch.no_grad()
    def move() -> None:
        for layer, calls in seen.items():
            for ghost in range(len(sizes)):
                for moments in calls:
                    move_running(layer, *moments[ghost])

    return move


def _in_turn(layer: Any, name: str, sizes: Any, num_samples: int, calls: Any) -> Any:
    def forward(x: Tensor) -> Tensor:
        tokens, rest = divmod(len(x), num_samples)  # rows of a sample, one after the other
        if rest or not tokens or (tokens > 1 and x.ndim != 2):
            raise InputError(
                f"BatchNorm layer {name!r} got {len(x)} rows where the batch holds {num_samples} "
                "samples: ghost batches are cut by sample. Use norm_batch_size='frozen' "
                "(--norm-batch-size frozen) for this loss."
            )
        parts = x.split([size * tokens for size in sizes])
        outs = [
            F.batch_norm(p, None, None, layer.weight, layer.bias, True, 0.0, layer.eps)
            for p in parts
        ]
        dims = [d for d in range(x.ndim) if d != 1]
        calls.append([(p.detach().mean(dims), p.detach().var(dims)) for p in parts])
        y = torch.cat(outs)
        return layer.act(layer.drop(y)) if hasattr(layer, "act") else y

    return forward


def move_running(layer: Any, mean: Tensor, variance: Tensor) -> None:
    """The textbook's rule, r <- (1 - m) r + m s, with the unbiased variance."""
    if layer.running_mean is None:
        return
    layer.num_batches_tracked += 1
    m = layer.momentum
    m = 1.0 / float(layer.num_batches_tracked) if m is None else m
    layer.running_mean.copy_((1 - m) * layer.running_mean + m * mean)
    layer.running_var.copy_((1 - m) * layer.running_var + m * variance)
