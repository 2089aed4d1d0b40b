"""The planner's choice against the best of a grid, and against two habits, on this CPU.

lbaccel calibrate && python benchmarks/planner_choice.py --out FILE.json [--network NAME ...]

For each network a grid of plans is measured: micro-batches on a ladder x {no recompute, the
optimum at 75, 50 and 35 % of the activations, timm's own switch} x memory format. A plan's time is
the least process time of an update over the rounds, all plans in turn in one process with one
thread; its peak is the real allocator's, by the profiler's memory events. Then, for each budget:

- regret: time of the plan that `lbaccel.plan` chose over that of the fastest of the grid that fits;
- timm's switch with the largest micro-batch that fits, in the user's layout (contiguous);
- Accelerate's `find_executable_batch_size`, called as its documentation does: no recompute,
  contiguous, the first of its sizes that does not run out;
- the trials and the failures that Accelerate's finder needs, and Lightning's by its rule (doubled
  from 2 until it fails), against the planner's none.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import pickle
import platform
import time
import traceback
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import find_executable_batch_size
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import lbaccel
from lbaccel import BatchPlan, LargeBatch
from lbaccel.data.loader import Update
from lbaccel.planning.candidates import Candidate
from lbaccel.planning.cost.devices import device_at_hand
from lbaccel.planning.cost.update import Network, image_batch
from lbaccel.planning.estimate import Estimator
from lbaccel.planning.search import Pinned, Search
from lbaccel.update.checkpointing import apply_activation_checkpointing, apply_segments
from lbaccel.update.normalization import has_batch_norm

# network: pixels a side, samples an update, group
NETWORKS = {
    "resnet18": (96, 64, 16),
    "resnet50": (64, 64, 16),
    "mobilenetv2_100": (96, 64, 16),
    "efficientnet_b0": (64, 64, 16),
    "convnext_atto": (96, 64, 1),
    "vit_tiny_patch16_224": (224, 64, 1),
}
LADDER = (64, 48, 32, 16)
SHARES = (0.75, 0.5, 0.35)
LAYOUTS = ("contiguous", "channels_last")
GIB = 2**30


def contract(name: str) -> tuple[BatchPlan, int]:
    """The batch of a network, and its pixels."""
    size, batch, group = NETWORKS[name]
    n = group if has_batch_norm(timm.create_model(name)) else None
    return BatchPlan(global_batch_size=batch, micro_batch_size=n or 1, norm_batch_size=n), size


def updater(name: str, candidate: Candidate):
    """An update of `candidate` that can be repeated, and its model."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    batch, size = contract(name)
    torch.manual_seed(0)
    model: Any = timm.create_model(name, num_classes=100)
    if candidate.memory_format == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    if candidate.checkpointing == "full":
        apply_activation_checkpointing(model)
    elif candidate.checkpointing != "none":
        apply_segments(model, candidate.checkpointing)
    plan = BatchPlan(
        global_batch_size=batch.global_batch_size,
        micro_batch_size=candidate.micro_batch_size,
        norm_batch_size=batch.norm_batch_size,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    large_batch = LargeBatch(Accelerator(cpu=True), plan)
    model, optimizer, _ = large_batch.prepare(model, optimizer, [])

    def batches():
        for micro_batch in plan.partition():
            images = torch.randn(micro_batch.num_samples, 3, size, size)
            yield micro_batch, (images, torch.zeros(micro_batch.num_samples, dtype=torch.long))

    def loss_fn(model: Any, data: Any) -> Any:
        images, targets = data
        if candidate.memory_format == "channels_last":
            images = images.to(memory_format=torch.channels_last)
        return F.cross_entropy(model(images), targets)

    def run() -> float:
        update = Update(0, batch.global_batch_size, batches())
        before = time.process_time()
        large_batch.update(update, loss_fn)
        return time.process_time() - before

    return run, model


def in_child(function: Any, *args: Any) -> Any:
    """`function(*args)` in a fork, so that nothing is left of it; the parent runs no backward."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(pickle.dumps(function(*args)))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        content = pipe.read()
    os.waitpid(pid, 0)
    return pickle.loads(content)


def real_peak(name: str, candidate: Candidate) -> int:
    """Bytes of the real allocator in an update."""
    run, model = updater(name, candidate)
    gc.collect()
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    now = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return held + most


def measured_peak(name: str, candidate: Candidate) -> int:
    """`real_peak` in a child of its own."""
    return in_child(real_peak, name, candidate)


def search_of(name: str) -> Search:
    """The planner's search without a budget, for the optimum at a share of the activations."""
    batch, size = contract(name)
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    network = Network(model=model, make_batch=image_batch(3, size), optimizer=optimizer)
    return Search(Estimator(network, batch, device_at_hand(), "fp32"), 2**40, Pinned())


def grid(name: str) -> list[tuple[str, Candidate]]:
    """All plans of the grid with a word for each."""
    search, found = search_of(name), []
    for layout in LAYOUTS:
        for size in LADDER:
            found.append(("none", Candidate(size, layout)))
            found.append(("full", Candidate(size, layout, "full")))
            plain = search.estimator.estimate(Candidate(size, layout))
            assert plain.chain is not None
            for share in SHARES:
                budget = int(plain.chain.before + share * (plain.peak - plain.chain.before))
                choice = search._recomputed(layout, size, budget)
                if choice is not None:
                    found.append((f"{share:.0%}", choice.candidate))
    return list({c: (word, c) for word, c in found}.values())


def timed(name: str, candidates: list[Candidate], rounds: int) -> dict[Candidate, float]:
    """Least seconds of an update of each, in turn."""
    best = dict.fromkeys(candidates, float("inf"))
    for number in range(rounds):
        order = candidates if number % 2 == 0 else candidates[::-1]
        for candidate in order:
            run, _ = updater(name, candidate)
            if number == 0:
                run()  # oneDNN's own caches
            best[candidate] = min(best[candidate], run())
            del run
            gc.collect()
    return best


def planned(name: str, budget: int) -> tuple[Any, float]:
    """The planner's plan and the seconds that it took."""
    batch, size = contract(name)
    before = time.process_time()
    found = lbaccel.plan(
        name,
        img_size=size if "vit" not in name else None,
        global_batch_size=batch.global_batch_size,
        norm_batch_size=batch.norm_batch_size,
        num_classes=100,
        memory=budget,
        clip_grad_norm=False,
        compare=False,
    )
    return found, time.process_time() - before


def finder_trials(fits: Any, batch: int) -> tuple[list[int], int | None]:
    """The sizes that Accelerate's finder tries, and the one that runs."""
    tried: list[int] = []

    def attempt(batch_size: int) -> int:
        tried.append(batch_size)
        if not fits(batch_size):
            raise RuntimeError("CUDA out of memory.")
        return batch_size

    try:
        return tried, find_executable_batch_size(attempt, starting_batch_size=batch)()
    except RuntimeError:
        return tried, None


def lightning_trials(fits: Any, batch: int) -> tuple[int, int]:
    """Trials and failures of the BatchSizeFinder's "power" mode: 2, 4, 8, ... until it fails."""
    size, trials = 2, 0
    while size <= batch:
        trials += 1
        if not fits(size):
            return trials, 1
        size *= 2
    return trials, 0


def main() -> None:
    os.environ["LBACCEL_ESTIMATES"] = "off"  # planning is that of a first plan
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--network", nargs="*", default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--again", type=Path, help="a result file whose grid's times are taken")
    a = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(a.out.read_text()) if a.out.exists() else {}
    stored = json.loads(a.again.read_text()) if a.again else {}
    for name in a.network:
        if name in results or (stored and name not in stored):
            continue
        results[name] = again(name, stored[name], a.rounds) if stored else one(name, a.rounds)
        results["versions"] = {
            "torch": torch.__version__,
            "timm": timm.__version__,
            "cpu": platform.processor() or platform.machine(),
            "rates": device_at_hand().source,
        }
        a.out.write_text(json.dumps(results, indent=1))
        print(name, json.dumps(results[name]["budgets"]), flush=True)


def held_bytes(name: str) -> int:
    """Weights, gradients and optimizer state."""
    estimator = search_of(name).estimator
    return estimator.weight_bytes + estimator.gradient_bytes + estimator.state_bytes


def habits(name: str, budget: int) -> tuple[list[int], int | None, tuple[int, int]]:
    """What the two finders try at this budget; a size fits where its trace does."""
    estimator, unit = search_of(name).estimator, min(LADDER) if NETWORKS[name][2] > 1 else 1
    batch = NETWORKS[name][1]

    def fits(size: int) -> bool:
        whole = size // unit * unit
        return whole > 0 and estimator.estimate(Candidate(whole, "contiguous")).peak <= budget

    return *finder_trials(fits, batch), lightning_trials(fits, batch)


def again(name: str, stored: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Budgets anew for the planner as it is, with the times of a grid that was measured before.

    A plan that the grid lacks is measured in turn with the best of the grid that fits, and its
    ratio to that one counts.
    """
    plans = in_child(grid, name)
    times = {(g["micro_batch_size"], g["memory_format"], g["how"]): g for g in stored["grid"]}
    rows = {c: times[c.micro_batch_size, c.memory_format, word] for word, c in plans}
    found = {"grid": stored["grid"], "budgets": {}}
    for label, before in stored["budgets"].items():
        budget = int(before["budget_gib"] * GIB)
        plan, planning = in_child(planned, name, budget)
        how: Any = plan.activation_checkpointing
        how = plan.segments if how == "segments" else how
        candidate = Candidate(plan.micro_batch_size, plan.memory_format, how)
        allowed = [c for c in rows if rows[c]["peak_gib"] * GIB <= budget]
        best = min(allowed, key=lambda c: rows[c]["seconds"], default=None)
        row = rows.get(candidate)
        mine = row["seconds"] if row else None
        peak = row["peak_gib"] if row else in_child(real_peak, name, candidate) / GIB
        if mine is None and best is not None:
            fresh = in_child(timed, name, [candidate, best], rounds)
            mine = rows[best]["seconds"] * fresh[candidate] / fresh[best]
        scale = before["regret"] and mine and mine / _mine(before, rows, stored)
        found["budgets"][label] = before | {
            "peak_gib": peak,
            "predicted_gib": plan.predicted_peak_gib,
            "fits": plan.fits,
            "plan": f"{candidate.micro_batch_size} {candidate.memory_format} "
            f"{plan.activation_checkpointing}",
            "planning_seconds": planning,
            "best": f"{best.micro_batch_size} {best.memory_format} {rows[best]['how']}"
            if best
            else None,
            "regret": mine / rows[best]["seconds"] if best and mine else None,
        }
        for peer in ("over_timm_switch", "over_finder"):
            if before[peer] and scale:
                found["budgets"][label][peer] = before[peer] / scale
    return found


def _mine(before: dict[str, Any], rows: dict[Candidate, Any], stored: dict[str, Any]) -> float:
    """Seconds that the ratios of a stored budget were taken over."""
    size, layout, word = before["best"].split()
    best = next(
        g["seconds"]
        for g in stored["grid"]
        if (str(g["micro_batch_size"]), g["memory_format"], g["how"]) == (size, layout, word)
    )
    return before["regret"] * best


def one(name: str, rounds: int) -> dict[str, Any]:
    """Grid, budgets and peers of one network."""
    plans = in_child(grid, name)
    words = {candidate: word for word, candidate in plans}
    peaks = {candidate: measured_peak(name, candidate) for candidate in words}
    unit = min(LADDER)
    smallest = peaks[Candidate(unit, "contiguous")]
    held = in_child(held_bytes, name)
    budgets = {
        "tight": int(held + 0.7 * (smallest - held)),
        "one and a half": int(held + 1.5 * (smallest - held)),
        "four": int(held + 4.2 * (smallest - held)),
    }
    chosen: dict[str, Any] = {}
    for label, budget in budgets.items():
        found, seconds = in_child(planned, name, budget)
        how: Any = found.activation_checkpointing
        how = found.segments if how == "segments" else how
        candidate = Candidate(found.micro_batch_size, found.memory_format, how)
        chosen[label] = (candidate, found, seconds)
        words.setdefault(candidate, "chosen")
        if candidate not in peaks:
            peaks[candidate] = measured_peak(name, candidate)
    peers = {}
    for label, budget in budgets.items():
        tried, size, lightning = peers[label] = in_child(habits, name, budget)
        if size is not None and NETWORKS[name][2] == 1:
            words.setdefault(Candidate(size, "contiguous"), "finder")
            peaks.setdefault(Candidate(size, "contiguous"), 0)
    seconds = in_child(timed, name, list(words), rounds)
    found = {"grid": [], "budgets": {}}
    for candidate, word in words.items():
        found["grid"].append(
            {
                "micro_batch_size": candidate.micro_batch_size,
                "memory_format": candidate.memory_format,
                "how": word,
                "peak_gib": peaks[candidate] / GIB,
                "seconds": seconds[candidate],
            }
        )
    for label, budget in budgets.items():
        candidate, plan, planning = chosen[label]
        allowed = [c for c in words if 0 < peaks[c] <= budget and words[c] != "finder"]
        best = min(allowed, key=lambda c: seconds[c], default=None)
        full = [c for c in allowed if c.checkpointing == "full" and c.memory_format == "contiguous"]
        switch = max(full, key=lambda c: c.micro_batch_size, default=None)
        tried, size, lightning = peers[label]
        whole = None if size is None else max(size // unit * unit, 1)
        finder = Candidate(size if NETWORKS[name][2] == 1 else whole or 1, "contiguous")
        mine = seconds[candidate]
        found["budgets"][label] = {
            "budget_gib": budget / GIB,
            "fits": plan.fits,
            "peak_gib": peaks[candidate] / GIB,
            "predicted_gib": plan.predicted_peak_gib,
            "plan": f"{candidate.micro_batch_size} {candidate.memory_format} "
            f"{plan.activation_checkpointing}",
            "planning_seconds": planning,
            "regret": mine / seconds[best] if best else None,
            "best": f"{best.micro_batch_size} {best.memory_format} {words[best]}" if best else None,
            "over_timm_switch": seconds[switch] / mine if switch else None,
            "over_finder": seconds[finder] / mine if size and finder in seconds else None,
            "finder_trials": len(tried),
            "finder_ooms": len(tried) - (size is not None),
            "lightning_trials": lightning[0],
            "lightning_ooms": lightning[1],
        }
    return found


if __name__ == "__main__":
    main()
