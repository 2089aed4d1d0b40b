"""Sentences for arguments of `LargeBatch` that are of another kind than those it takes."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.scheduler import AcceleratedScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from lbaccel.batch.plan import BatchPlan, MicroBatch
from lbaccel.data.loader import Update, UpdateLoader
from lbaccel.errors import MISSING, InputError, kind_of
from lbaccel.noise.scale import NoiseScale
from lbaccel.update.accumulation import Agreement
from lbaccel.update.memory.budget import parse_memory
from lbaccel.update.normalization import GhostNorm
from lbaccel.update.plain_loop import check_prepared
from lbaccel.update.sharding.steps import MicroBatches

LOSS_FN = (
    "Write: def loss_fn(model, micro_batch): images, labels = micro_batch; return "
    "torch.nn.functional.cross_entropy(model(images), labels)"
)
_KNOWN = (
    *("clip_grad_norm", "bn_statistics", "seed", "drops", "noise_scale", "averages"),
    "allow_writes",
)
_OF_THE_PLAN = "it belongs to the plan. Use BatchPlan(global_batch_size=..., micro_batch_size=...)"
_OF_THE_ACCELERATOR = "it belongs to the Accelerator. Use Accelerator(mixed_precision=..., cpu=...)"
_OF_PREPARE = "it goes to prepare(). Use large_batch.prepare(model, optimizer, loader, scheduler)"
_INSTEAD = {
    **dict.fromkeys(("max_grad_norm", "max_norm", "gradient_clipping"), "use clip_grad_norm=..."),
    **dict.fromkeys(
        (
            *("gradient_accumulation_steps", "accumulation_steps", "batch_size", "world_size"),
            *("global_batch_size", "micro_batch_size", "norm_batch_size", "mix_pairs"),
        ),
        _OF_THE_PLAN,
    ),
    **dict.fromkeys(("mixed_precision", "cpu", "device"), _OF_THE_ACCELERATOR),
    **dict.fromkeys(("model", "optimizer", "loader", "scheduler", "ema"), _OF_PREPARE),
}
_CRITERIA = ("torch.nn.functional", "torch.nn.modules.loss", "timm.loss")
_ROLES = {
    "model": nn.Module,
    "optimizer": Optimizer,
    "loader": (UpdateLoader, DataLoader),
    "scheduler": (LRScheduler, AcceleratedScheduler),
}


def check_built(
    accelerator: Any, plan: Any, *, rest: Sequence[Any], unknown: Mapping[str, Any]
) -> None:
    """Stop at a LargeBatch that is not built from an Accelerator and a plan, in this order.

    Args:
        accelerator: the first argument.
        plan: the second.
        rest: what else was given by position.
        unknown: what was given by a name that there is not.

    Raises:
        InputError: any of them.
    """
    for name, value in unknown.items():
        near = difflib.get_close_matches(name, _KNOWN, n=1)
        instead = f"did you mean {near[0]}?" if near else f"known are {', '.join(_KNOWN)}."
        instead = f"{_INSTEAD[name]}." if name in _INSTEAD else instead
        raise InputError(f"LargeBatch({name}={kind_of(value)}): {instead}")
    shown = ", ".join(kind_of(v) for v in (accelerator, plan, *rest) if v is not MISSING)
    if not isinstance(accelerator, Accelerator):
        raise InputError(
            f"LargeBatch({shown}): the first argument is the Accelerator of your loop, which "
            "decides device, precision and processes, and the second the plan. Use "
            "LargeBatch(Accelerator(), plan), after from accelerate import Accelerator."
        )
    if not isinstance(plan, BatchPlan):
        size = plan if type(plan) is int and plan > 0 else "..."
        raise InputError(
            f"LargeBatch({shown}): the second argument is the plan. Use "
            f"BatchPlan(global_batch_size={size}, micro_batch_size=...)."
        )
    if rest:
        raise InputError(
            f"LargeBatch({shown}): two arguments go by position, the Accelerator and the plan. "
            "Model, optimizer and loader go to large_batch.prepare(model, optimizer, loader); "
            "give all else by its name."
        )


def check_options(
    clip_grad_norm: Any, drops: Any, noise_scale: Any, averages: Any, allow_writes: Any
) -> None:
    """Stop at options of another kind.

    Raises:
        InputError: a norm that is no number above 0, `drops` that can't be called, no `NoiseScale`,
            or names that are no list of texts.
    """
    number = isinstance(clip_grad_norm, (int, float)) and not isinstance(clip_grad_norm, bool)
    if clip_grad_norm is not None and not (number and clip_grad_norm > 0):
        raise InputError(f"clip_grad_norm={kind_of(clip_grad_norm)}: give a norm above 0, or None.")
    if drops is not None and not callable(drops):
        raise InputError(
            f"drops={kind_of(drops)}: it is called as drops(loss, update) after each attempt, and "
            "returns whether its gradient is dropped. Use LossDropout(...), or None."
        )
    if noise_scale is not None and not isinstance(noise_scale, NoiseScale):
        raise InputError(f"noise_scale={kind_of(noise_scale)}: use NoiseScale(...), or None.")
    for name, paths in (("averages", averages), ("allow_writes", allow_writes)):
        if isinstance(paths, str) or not (
            isinstance(paths, Iterable) and all(isinstance(path, str) for path in paths)
        ):
            example = [paths] if isinstance(paths, str) else ["head.centers"]
            raise InputError(
                f"{name}={kind_of(paths)}: give a list of names, such as {name}={example}."
            )


def host_bytes(host_memory: Any, plan: BatchPlan) -> int | None:
    """Bytes that the passes over BatchNorm of the whole batch may keep on the host.

    Raises:
        InputError: no size, or a plan that keeps nothing there.
    """
    if host_memory is None:
        return None
    if plan.norm_batch_size != "global":
        raise InputError(
            f"host_memory={kind_of(host_memory)} with norm_batch_size={plan.norm_batch_size!r}: "
            "nothing is kept on the host. Leave it out; norm_batch_size='global' reads it."
        )
    return parse_memory(host_memory)


def check_objects(
    model: Any, optimizer: Any, loader: Any, scheduler: Any, *, ema: Any, plan: BatchPlan
) -> None:
    """Stop at arguments of `prepare` that are none, in another order, or of another model or plan.

    Raises:
        InputError: any of them.
    """
    given = {"model": model, "optimizer": optimizer, "loader": loader, "scheduler": scheduler}
    objects = [value for value in given.values() if value is not MISSING and value is not None]
    for place, value in given.items():
        role = next((name for name, kind in _ROLES.items() if isinstance(value, kind)), place)
        if role != place:
            raise InputError(
                f"prepare({', '.join(map(kind_of, objects))}): the {role} stands in the place of "
                f"the {place}. Use prepare(model, optimizer, loader), and the scheduler fourth if "
                "there is one."
            )
    _check_place("model", model, isinstance(model, nn.Module), "a torch.nn.Module, built")
    _check_place(
        *("optimizer", optimizer, isinstance(optimizer, Optimizer)),
        "a torch.optim.Optimizer of model.parameters()",
    )
    _check_place(
        *("loader", loader, _yields_updates(loader)),
        "UpdateLoader(dataset, plan), or another iterable of Update",
    )
    _check_parameters(model, optimizer)
    _check_scheduler_of(optimizer, scheduler)
    _check_average(ema)
    check_prepared(loader, scheduler)
    _check_plan_of(loader, plan)


def _check_place(place: str, value: Any, is_right: bool, wanted: str) -> None:
    if not is_right:
        raise InputError(
            f"prepare() got {kind_of(value)} in the place of the {place}, which is {wanted}. "
            "Use prepare(model, optimizer, loader)."
        )


def _yields_updates(loader: Any) -> bool:
    if isinstance(loader, (type, str, Mapping, torch.Tensor)):
        return False
    if isinstance(loader, (list, tuple)):
        return all(isinstance(item, Update) for item in loader)
    return isinstance(loader, DataLoader) or hasattr(loader, "__iter__")  # `check_prepared` follows


def _check_parameters(model: nn.Module, optimizer: Optimizer) -> None:
    own = {id(p) for p in model.parameters()}
    steps = [p for group in optimizer.param_groups for p in group["params"]]
    foreign = [p for p in steps if id(p) not in own]
    if not foreign:
        return
    if len(foreign) == len(steps):
        raise InputError(
            f"prepare() got an optimizer that holds no parameter of the model ({kind_of(model)}): "
            "its steps would move nothing. Build it from this very model, "
            f"{type(optimizer).__name__}(model.parameters(), ...), after any copy of it."
        )
    shapes = ", ".join(str(tuple(p.shape)) for p in foreign[:3])
    raise InputError(
        f"prepare() got an optimizer that holds {len(foreign)} tensors beside the model's (shapes "
        f"{shapes}): ranks would not share their gradients, and the norm would miss them. Make "
        "them parameters of the model (model.temperature = nn.Parameter(...)), or step them with "
        "an optimizer of their own."
    )


def _check_scheduler_of(optimizer: Any, scheduler: Any) -> None:
    moves = getattr(scheduler, "optimizer", None)
    if isinstance(moves, Optimizer) and moves.param_groups is not optimizer.param_groups:
        raise InputError(
            f"prepare() got a {type(scheduler).__name__} of another optimizer: the learning rate "
            "of this one would never move. Build the scheduler from the optimizer that you give."
        )


def _check_average(ema: Any) -> None:
    if ema is None or (callable(getattr(ema, "update", None)) and not isinstance(ema, type)):
        return
    more = ""
    if hasattr(ema, "update_parameters"):
        more = " torch's AveragedModel has update_parameters() in its place."
    raise InputError(
        f"prepare(ema={kind_of(ema)}): the average of the weights needs update(model), which is "
        f"called after each update.{more} Use timm.utils.ModelEmaV3(model, decay=0.999)."
    )


def _check_plan_of(loader: Any, plan: BatchPlan) -> None:
    if not isinstance(loader, UpdateLoader):
        return
    own = plan.capped(len(loader.dataset))
    # the size of micro-batches may differ: it follows the memory
    for name in ("global_batch_size", "norm_batch_size", "mix_pairs", "world_size"):
        here, there = getattr(own, name), getattr(loader.plan, name)
        if here != there:
            raise InputError(
                f"the UpdateLoader has {name}={there!r}, and the LargeBatch {name}={here!r}. "
                "Give both the same BatchPlan."
            )


def check_loss_fn(loss_fn: Any) -> None:
    """Stop at a loss function that can't be called as `loss_fn(model, micro_batch)`.

    Raises:
        InputError: a loss, a criterion of logits and labels, or a function of other arguments.
    """
    function = loss_fn
    while isinstance(function, functools.partial):
        function = function.func
    if not callable(function) or isinstance(function, type):
        raise InputError(
            f"update() got {kind_of(loss_fn)} in the place of the loss function, which it calls "
            f"once a micro-batch. {LOSS_FN}."
        )
    home = function if isinstance(function, FunctionType) else type(function)
    if str(home.__module__).startswith(_CRITERIA):
        name = getattr(function, "__name__", type(function).__name__)
        raise InputError(
            f"update() got {name}, whose arguments are logits and labels: the loss function takes "
            f"the model and a micro-batch. {LOSS_FN}."
        )
    try:
        inspect.signature(loss_fn).bind(None, None)
    except TypeError as error:
        name = getattr(function, "__name__", type(function).__name__)
        raise InputError(
            f"update() calls its loss function with the model and a micro-batch, and {name} does "
            f"not take these two ({error}). {LOSS_FN}."
        ) from None
    except ValueError:  # a builtin that shows no signature
        return


def check_mode(norm: GhostNorm | None, plan: BatchPlan) -> None:
    """Stop where every BatchNorm layer is in eval mode and the plan says what it sees.

    Raises:
        InputError: statistics would be taken over nothing.
    """
    if norm is None or norm.frozen or not norm.layers or any(m.training for m in norm.layers):
        return
    raise InputError(
        "update() with the model in eval mode: BatchNorm would read its running statistics, and "
        f"the plan has norm_batch_size={plan.norm_batch_size}. Call model.train() after each "
        'evaluation, or use BatchPlan(norm_batch_size="frozen").'
    )


def check_search(loader: Any) -> None:
    """Stop at a search of the micro-batch over anything but an UpdateLoader.

    Raises:
        InputError: its next update can't be had in another size.
    """
    if not isinstance(loader, UpdateLoader):
        raise InputError(
            f"find_micro_batch_size() got {kind_of(loader)}, and takes the UpdateLoader that "
            "prepare() returned: find_micro_batch_size(loader, loss_fn)."
        )


def pairs_of(micro_batches: MicroBatches) -> Iterator[tuple[MicroBatch, Any]]:
    """The micro-batches of an update, each looked at before it is taken apart.

    Raises:
        InputError: one is no pair of a MicroBatch and its data, in an update made by hand.
    """
    for pair in micro_batches:
        if isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], MicroBatch):
            yield pair[0], pair[1]
            continue
        held = f" of {', '.join(map(kind_of, pair[:3]))}" if isinstance(pair, (tuple, list)) else ""
        raise InputError(
            f"this update holds {kind_of(pair)}{held} where it needs pairs (MicroBatch, data). "
            "Take updates from an UpdateLoader, or give Update(index, num_samples, "
            "zip(plan.partition(rank), batches))."
        )


def check_samples(agreement: Agreement, update: Update) -> None:
    """Stop at an update, made by hand, whose micro-batches are not its samples.

    Raises:
        InputError: the two numbers; the gradient would have another scale.
    """
    if not agreement.own_weights and agreement.weight != update.num_samples:
        raise InputError(
            f"Update(num_samples={update.num_samples}), and the micro-batches of all ranks hold "
            f"{agreement.weight:g} samples: the gradient would be scaled by their ratio. Give "
            f"num_samples={agreement.weight:g}."
        )
