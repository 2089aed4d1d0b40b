"""One real update on fake tensors: forward, loss, backward, accumulation, clipping, step."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from lbaccel.batch.plan import BatchPlan, MicroBatch
from lbaccel.planning.cost.known_calls import KnownCalls, fake_like, fake_tensors
from lbaccel.planning.cost.trace import Recorder, Trace, Workspace
from lbaccel.randomness.masks import KeyedRandomness
from lbaccel.update import accumulation, coupled
from lbaccel.update.accumulation import LossFn
from lbaccel.update.distillation import distance_to_teacher
from lbaccel.update.embeddings import Coupled, Embed
from lbaccel.update.memory.reserve import state_tensors
from lbaccel.update.normalization import convert_batch_norm

Precision = Literal["fp32", "bf16", "fp16"]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

MakeBatch = Callable[[int], Any]
"""Number of samples -> a micro-batch of so many, made with torch's factory functions."""


def image_batch(num_channels: int, img_size: int) -> MakeBatch:
    """Micro-batches as the recipe's loader gives them: float32 images and int64 classes."""

    def make(num_samples: int) -> tuple[Tensor, Tensor]:
        images = torch.empty(num_samples, num_channels, img_size, img_size)
        return images, torch.zeros(num_samples, dtype=torch.long)

    return make


def classification_loss(model: Any, micro_batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of (images, classes)."""
    images, targets = micro_batch
    return F.cross_entropy(model(images), targets)


def taught_loss(answers: Callable[[Tensor], Tensor]) -> LossFn:
    """`classification_loss` beside the distance to a teacher, as the recipe's loss has it.

    Args:
        answers: images to the logits of the teacher, without a gradient.
    """

    def loss_fn(model: Any, micro_batch: tuple[Tensor, Tensor]) -> Tensor:
        images, targets = micro_batch
        of_teacher = answers(images)
        logits = model(images)
        apart = distance_to_teacher(logits, of_teacher, temperature=4.0)
        return 0.5 * F.cross_entropy(logits, targets) + 0.5 * apart.mean()

    return loss_fn


@dataclass(frozen=True, kw_only=True)
class Network:
    """The trained network and its loss, for the tracer, which neither runs nor changes them."""

    model: nn.Module  # on any device, "meta" included
    make_batch: MakeBatch
    loss_fn: LossFn = classification_loss
    embed: Embed | None = None  # makes the rows that the loss of the whole batch compares
    teacher: nn.Module | None = None  # answers the images too; the loss is then `taught_loss`
    optimizer: torch.optim.Optimizer | None = None  # over the parameters of `model`
    clips: bool = False
    memory_format: Literal["contiguous", "channels_last"] = "contiguous"


def trace_update(
    network: Network,
    plan: BatchPlan,
    *,
    precision: Precision = "fp32",
    device_type: str = "cpu",
    workspace: Workspace | None = None,
    change: Callable[[nn.Module, Recorder], object] | None = None,
    states: Sequence[Tensor] | None = None,
    known: KnownCalls | None = None,
    num_rows: int | None = None,
) -> Trace:
    """Run an update of `plan` on fake tensors and record it; no memory, no device, no change.

    At most two micro-steps are run: from the second on they are alike.

    Args:
        network: model, data and optimizer.
        plan: the largest micro-batches of its first rank are run.
        precision: of the forward pass, by autocast.
        device_type: "cpu" or "cuda", whose autocast rules hold; the tensors are the CPU's.
        workspace: of a kernel, see `Workspace`.
        change: done to the fake copy of the model before it runs, such as checkpointing.
        states: those of the optimizer, where the caller has them (`state_tensors`).
        known: the calls of other traces with this workspace.
        num_rows: that a loss with `embed` gets; default: the samples of `plan`.

    Raises:
        Exception: whatever the model raises on fake tensors.
    """
    mode = fake_tensors(known, allow_non_fake_inputs=True)
    if states is None:
        states = [] if network.optimizer is None else state_tensors(network.optimizer)
    recorder = Recorder(workspace)
    with mode, ExitStack() as around:
        if torch.get_default_device().type != "cpu":
            around.enter_context(torch.device("cpu"))
        model = _fake_copy(network.model, network.memory_format)
        taught = _with_teacher(network, recorder, precision)
        norm = convert_batch_norm(model, plan.norm_batch_size)
        norm.device_type = device_type
        randomness = KeyedRandomness(0, torch.device("cpu"))
        randomness.call_number = _outside(randomness.call_number)
        if change is not None:
            change(model, recorder)
        if precision in AUTOCAST:
            _autocast_forward(model, AUTOCAST[precision])
            if device_type == "cuda":  # around the backward pass too, which may recompute
                around.enter_context(_float_on_cuda())
        model.train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        for tensor in (*model.parameters(), *model.buffers()):
            recorder.watch(tensor, "weights")
        if device_type == "cpu":  # they lie on the host
            recorder.trace.random_state = torch.get_rng_state().nbytes
            around.enter_context(_random_states_watched(recorder))
        held = [fake_like(state) for state in states]
        for tensor in held:
            recorder.watch(tensor, "optimizer")
        around.enter_context(recorder)
        norm.begin()
        before = torch.get_rng_state()  # as the scope of the masks keeps it, to go back to
        with randomness.update(0), _cast_weights_once(precision):
            _accumulate(
                model,
                taught,
                plan,
                recorder=recorder,
                scopes=(norm, randomness),
                num_rows=num_rows or plan.global_batch_size,
            )
        del before
        for parameter in parameters:
            if parameter.grad is not None:
                recorder.watch(parameter.grad, "gradients")
        recorder.mark("commit")
        total = accumulation.gradient_norm(parameters)
        if network.clips:
            accumulation.clip_gradients(parameters, total, 1.0)
        if not norm.over_all:  # its commit reads how many values there were, and takes no memory
            norm.commit()
    return recorder.trace


def _accumulate(
    model: nn.Module,
    network: Network,
    plan: BatchPlan,
    *,
    recorder: Recorder,
    scopes: Sequence[accumulation.Scope],
    num_rows: int,
) -> None:
    """The micro-steps of the trace; with `embed` in two passes, and the loss between them."""

    def batches(mark: str) -> Iterator[tuple[MicroBatch, Any]]:
        return _batches(network.make_batch, plan, recorder, mark)

    if network.embed is None:
        accumulation.accumulate(
            model,
            batches("micro-step"),
            _in_layout(network, network.loss_fn),
            num_samples=plan.global_batch_size,
            scopes=scopes,
        )
        return

    def loss_fn(model: Any, rows: Any) -> Any:
        recorder.mark("loss")
        return network.loss_fn(model, rows)

    coupled.accumulate(
        model,
        batches("preview"),
        Coupled(loss_fn, _in_layout(network, network.embed), trial=True),
        again=lambda: batches("micro-step"),
        num_samples=num_rows,
        scopes=scopes,
    )


def _with_teacher(network: Network, recorder: Recorder, precision: str) -> Network:
    """The network with the loss of its teacher, where it has one: a fake copy, and recorded."""
    if network.teacher is None:
        return network
    teacher = _fake_copy(network.teacher, network.memory_format).eval().requires_grad_(False)
    if precision in AUTOCAST:
        _autocast_forward(teacher, AUTOCAST[precision])
    for tensor in (*teacher.parameters(), *teacher.buffers()):
        recorder.watch(tensor, "teacher")

    @torch.no_grad()
    def answers(images: Tensor) -> Tensor:
        return teacher(images)

    return replace(network, loss_fn=taught_loss(answers))


def _in_layout(network: Network, function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A function of images in the network's layout, turned where the recipe turns them."""
    if network.memory_format == "contiguous":
        return function
    return lambda model, micro_batch: function(model, _to_channels_last(micro_batch))


def _to_channels_last(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(memory_format=torch.channels_last) if value.ndim == 4 else value
    if isinstance(value, dict):
        return {key: _to_channels_last(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_to_channels_last(item) for item in value)
    return value


def _batches(
    make: MakeBatch, plan: BatchPlan, recorder: Recorder, mark: str
) -> Iterator[tuple[MicroBatch, Any]]:
    for number, micro_batch in enumerate(plan.partition()[:2]):
        recorder.mark(f"{mark} {number}")
        yield micro_batch, make(micro_batch.num_samples)


def _fake_copy(model: nn.Module, memory_format: str) -> nn.Module:
    """A copy whose parameters and buffers are fake CPU tensors; the model keeps its own."""

    def fake(t: Tensor) -> Tensor:
        turned = memory_format == "channels_last" and t.ndim == 4
        layout = torch.channels_last if turned else torch.preserve_format
        return fake_like(t, layout)

    memo: dict[int, Any] = {id(b): fake(b) for b in model.buffers()}
    memo |= {
        id(value): fake(value)
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor)
    }
    memo |= {id(p): nn.Parameter(fake(p), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def _outside(call: Callable[[], int]) -> Callable[[], int]:
    """`call` on real tensors: a fake one has no value to read."""

    def real() -> int:
        with unset_fake_temporarily():
            return call()

    return real


@contextmanager
def _random_states_watched(recorder: Recorder) -> Iterator[None]:
    """Record the random states that `torch.utils.checkpoint` keeps; no kernel makes them."""
    plain, thread = torch.get_rng_state, threading.get_ident()

    def watched() -> Tensor:
        with unset_fake_temporarily():
            state = plain()
        if threading.get_ident() == thread:
            recorder.watch(state)
        return state

    torch.get_rng_state = watched
    try:
        yield
    finally:
        torch.get_rng_state = plain


def _autocast_forward(model: nn.Module, dtype: torch.dtype) -> None:
    """As `accelerator.prepare`: run the forward under autocast, and give float32 outputs."""
    plain = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", dtype=dtype):
            return _to_float(plain(*args, **kwargs))

    model.forward = forward


_FLOAT_ON_CUDA = (
    *("layer_norm", "group_norm", "softmax", "log_softmax", "softmin", "softplus", "normalize"),
    *("cross_entropy", "nll_loss", "binary_cross_entropy_with_logits", "mse_loss", "l1_loss"),
    *("exp", "expm1", "log", "log1p", "log2", "log10", "pow", "rsqrt", "reciprocal", "norm"),
    *("sum", "prod", "cumsum", "cumprod", "cosine_similarity", "__pow__", "__rpow__"),
)


@contextmanager
def _float_on_cuda() -> Iterator[None]:
    """CUDA's autocast computes these in float32, where the CPU's leaves the dtype as it is.

    pytorch.org/docs/stable/amp.html, "CUDA Ops that can autocast to float32". The functions are
    replaced meanwhile: a torch function mode is off in what a backward pass recomputes.
    """
    missing = object()
    homes: tuple[Any, ...] = (torch, Tensor, F)
    found = [(home, name) for home in homes for name in _FLOAT_ON_CUDA if hasattr(home, name)]
    kept = [(home, name, vars(home).get(name, missing)) for home, name in found]
    for home, name in found:
        setattr(home, name, _in_float(getattr(home, name)))
    try:
        yield
    finally:
        for home, name, value in kept:
            if value is missing:  # inherited
                delattr(home, name)
            else:
                setattr(home, name, value)


def _in_float(call: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(call)
    def cast(*args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, _to_float, (args, kwargs))
        return call(*args, **kwargs)

    return cast


def _to_float(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _to_float(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_to_float(item) for item in value)
    return value


@contextmanager
def _cast_weights_once(precision: str) -> Iterator[None]:
    """Keep autocast's cast weights over the micro-steps, as `LargeBatch` does."""
    with torch.autocast("cpu", enabled=False, dtype=torch.bfloat16):
        yield


__all__: Sequence[str] = ("Network", "classification_loss", "image_batch", "trace_update")
