"""Activation offload on a real link: seconds, peaks and bits with and without, beside the plan.

python benchmarks/gpu/activation_offload.py [--results FILE] [--seconds S] [--dry]

Each case is one network at one micro-batch, as it is and with the activations of its whole chain
on the host. `predicted` is what the planner says of both; `equal` says whether the losses of all
micro-steps are the same to the bit (cuDNN deterministic; the tests compare weights as well). `link`
is what a copy of 256 MiB of pinned memory reaches, in bytes a second there and back. On a CPU
(--dry) nothing is moved, so the two are alike: it proves that the script ends and writes what the
page reads.

Lines are appended to FILE (default: $OUT/activation_offload.jsonl); a rerun skips what is there.
"""

from __future__ import annotations

import time

START = time.monotonic()  # imports count

import sys  # noqa: E402
from dataclasses import dataclass, replace  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from children import run_cases  # noqa: E402

from lbaccel import plan  # noqa: E402
from lbaccel.batch.plan import BatchPlan  # noqa: E402
from lbaccel.models import create_backbone  # noqa: E402
from lbaccel.planning.candidates import Candidate  # noqa: E402
from lbaccel.planning.cost.devices import GIB, device_at_hand  # noqa: E402
from lbaccel.planning.cost.update import classification_loss  # noqa: E402
from lbaccel.planning.estimate import Estimator  # noqa: E402
from lbaccel.planning.measure import measure  # noqa: E402
from lbaccel.planning.network import Trained, network_of, random_images  # noqa: E402


@dataclass(frozen=True)
class Case:
    network: str
    img_size: int
    micro_batch_size: int
    precision: str


def cases(dry: bool) -> list[Case]:
    if dry:
        return [Case("resnet10t", 32, 16, "fp32")]
    return [
        Case(network, 224, size, precision)
        for network, size in (("resnet50", 128), ("vit_base_patch16_224", 64))
        for precision in ("bf16", "fp32")
    ]


def run(case: Case, where: str) -> dict[str, Any]:
    torch.backends.cudnn.deterministic = True
    device = device_at_hand(torch.device(where))
    norm = case.micro_batch_size if case.network.startswith("resnet") else None
    found = plan(
        case.network, img_size=case.img_size, global_batch_size=2 * case.micro_batch_size,
        micro_batch_size=case.micro_batch_size, norm_batch_size=norm, device=device,
        activation_checkpointing="none", memory_format="contiguous", num_classes=10,
        precision=case.precision, optimizer="sgd", compare=False,
    )  # fmt: skip
    runs, moved = _with_offload(case, device, norm)
    offloaded = replace(found, activation_offload=runs)
    model = create_backbone(case.network, num_classes=10, img_size=case.img_size)
    rows: dict[str, Any] = {}
    for name, one, peak, seconds in (
        ("plain", found, found.predicted_peak_gib, found.predicted_seconds_per_update),
        ("offload", offloaded, moved.peak / GIB, 2 * moved.micro_step_seconds),
    ):
        losses: list[Any] = []

        def loss_fn(model: Any, micro_batch: Any, losses: list[Any] = losses) -> Any:
            loss = classification_loss(model, micro_batch)
            losses.append(loss.detach())
            return loss

        images = random_images(3, case.img_size)
        seen = measure(one, model, images, loss_fn=loss_fn, optimizer="sgd")
        rows[name] = {
            "predicted_peak_gib": peak,
            "predicted_seconds": seconds,
            "peak_reserved_gib": seen.peak_reserved_gib,
            "peak_allocated_gib": seen.peak_allocated_gib,
            "seconds": 2 * seen.seconds_per_micro_step,
            "losses": [float(loss) for loss in losses],
        }
    equal = rows["plain"]["losses"] == rows["offload"]["losses"]
    host = moved.host_bytes / GIB
    return {**rows, "equal": equal, "host_gib": host, "link": _link(where), "moves": bool(runs)}


def _with_offload(case: Case, device: Any, norm: Any) -> tuple[Any, Any]:
    """The whole chain as one run, and what the planner says of it."""
    trained = Trained(
        model=case.network, img_size=case.img_size, num_classes=10, arguments={},
        optimizer="sgd", make_batch=None, loss_fn=classification_loss, teacher=None, clips=True,
        precision=case.precision,  # type: ignore[arg-type]
    )  # fmt: skip
    size = case.micro_batch_size
    batch = BatchPlan(global_batch_size=2 * size, micro_batch_size=size, norm_batch_size=norm)
    network = network_of(trained, device)
    estimator = Estimator(network, batch, device, case.precision)  # type: ignore[arg-type]
    runs = (tuple(unit.name for unit in estimator.units),)
    return runs, estimator.estimate(Candidate(size, offload=runs))


def _link(where: str) -> list[float]:
    if where == "cpu":
        return []
    num_bytes = 2**28
    host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    rates = []
    for to, of in ((host, there), (there, host)):
        for _ in range(2):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            to.copy_(of, non_blocking=True)
            end.record()
            torch.cuda.synchronize()
        rates.append(num_bytes / (start.elapsed_time(end) / 1e3))
    return rates


def table(rows: dict[Case, dict[str, Any]]) -> str:
    lines = [
        f"{'network':<24}{'':<6}{'micro':>6}{'':>9}{'peak GiB':>10}{'predicted':>11}{'s':>9}"
        f"{'predicted':>11}{'bits':>7}"
    ]
    for case, row in rows.items():
        for name in ("plain", "offload"):
            one = row[name]
            peak = one["peak_reserved_gib"] or one["peak_allocated_gib"]
            lines.append(
                f"{case.network:<24}{case.precision:<6}{case.micro_batch_size:>6}{name:>9}"
                f"{peak:>10.2f}{one['predicted_peak_gib']:>11.2f}{one['seconds']:>9.3f}"
                f"{one['predicted_seconds']:>11.3f}{'equal' if row['equal'] else 'differ':>7}"
            )
        if row["link"]:
            lines.append(f"  link: {', '.join(f'{rate / 1e9:.1f} GB/s' for rate in row['link'])}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_cases("activation_offload", cases, run, table, start=START))
