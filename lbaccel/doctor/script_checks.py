"""Checks of the training script, by its syntax tree."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from lbaccel.doctor.check import Check
from lbaccel.doctor.facts import Facts
from lbaccel.doctor.script import Call, Script, dotted

Cases = Iterator[tuple[str, str]]
SCHEDULER = re.compile(r"(LR|Scheduler|Warmup\w*|create_scheduler\w*|get_\w*schedule\w*)$")
LOADERS = ("DataLoader", "create_loader", "StatefulDataLoader")
RECOMPUTE = ("set_grad_checkpointing", "checkpoint_sequential", "checkpoint", "checkpoint_seq")


def _script(facts: Facts) -> Script | None:
    """The script, where it is not one of lbaccel's own updates."""
    return None if facts.script is None or facts.script.uses_lbaccel else facts.script


def _accumulate(facts: Facts) -> Cases:
    if script := _script(facts):
        for call in script.on_accelerator("accumulate"):
            yield facts.in_script(call.line), "accelerator.accumulate(...)"


def _scheduler_prepared(facts: Facts) -> Cases:
    if script := _script(facts):
        for call in script.on_accelerator("prepare", "prepare_scheduler"):
            for name in call.argument_names:
                made = script.made_by.get(name)
                if made is not None and SCHEDULER.search(made.last):
                    yield facts.in_script(call.line), f"the scheduler {name!r} in prepare()"


def _batch_norm_accumulated(facts: Facts) -> Cases:
    script = _script(facts)
    if script is None or not facts.has_batch_norm or not script.accumulates:
        return
    if not script.calls_of("convert_batch_norm", "freeze_batch_norm_2d"):
        lines = script.on_accelerator("accumulate") or script.calls_of("Accelerator")
        where = facts.in_script(lines[0].line) if lines else script.path
        yield where, f"accumulation with {facts.model}, which has BatchNorm"


def _batch_norm_recomputed(facts: Facts) -> Cases:
    script = _script(facts)
    if script and facts.has_batch_norm and not script.calls_of("freeze_batch_norm_2d"):
        for call in _recomputes(script):
            yield facts.in_script(call.line), f"{call.name}(...) with {facts.model}'s BatchNorm"


def _recomputes(script: Script) -> Iterator[Call]:
    for call in script.calls_of(*RECOMPUTE):
        on = call.node.args[:1]
        off = bool(on) and isinstance(on[0], ast.Constant) and on[0].value is False
        if call.last != "set_grad_checkpointing" or not off:
            yield call


def _one_rank_searches(facts: Facts) -> Cases:
    for line in _mentions(facts, "find_executable_batch_size"):
        yield facts.in_script(line), "find_executable_batch_size"


def _mentions(facts: Facts, name: str) -> list[int]:
    """Lines on which a name is called or decorates a function."""
    if facts.script is None:
        return []
    lines = {call.line for call in facts.script.calls_of(name)}
    for node in ast.walk(facts.script.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines |= {d.lineno for d in node.decorator_list if dotted(d).split(".")[-1] == name}
    return sorted(lines)


def _batch_drifts(facts: Facts) -> Cases:
    if not _mentions(facts, "find_executable_batch_size") or facts.script is None:
        return
    for node in ast.walk(facts.script.tree):
        if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.FloorDiv):
            continue
        if dotted(node.right).endswith("batch_size"):
            yield facts.in_script(node.lineno), f"{ast.unparse(node)}, rounded down"


def _divided_twice(facts: Facts) -> Cases:
    script = _script(facts)
    if script is None or not script.accumulates or not script.on_accelerator("backward"):
        return
    for node in ast.walk(script.tree):
        if isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.Div):
            right = node.right if isinstance(node, ast.BinOp) else node.value
            left = node.left if isinstance(node, ast.BinOp) else node.target
            steps = dotted(right).split(".")[-1]
            if "loss" in ast.unparse(left) and re.search(r"accum\w*", steps):
                yield facts.in_script(node.lineno), f"{ast.unparse(node)}, and accelerator.backward"


def _mode_too_late(facts: Facts) -> Cases:
    if facts.script is None:
        return
    starts = facts.script.on_accelerator("init_trackers")
    starts += [call for call in facts.script.calls_of("init") if call.receiver == "wandb"]
    first = min((call.line for call in starts), default=None)
    for line, value in facts.script.assigned("os.environ[WANDB_MODE]"):
        if first is not None and line > first:
            yield facts.in_script(line), f"WANDB_MODE={value!r} set after wandb.init (line {first})"


def _offline_resume(facts: Facts) -> Cases:
    if facts.script is None:
        return
    offline = facts.environment.variables.get("WANDB_MODE") == "offline"
    offline |= any(v == "offline" for _, v in facts.script.assigned("os.environ[WANDB_MODE]"))
    for call in facts.script.calls_of("init"):
        resumes = call.receiver == "wandb" and call.keyword("resume") in ("allow", "must", True)
        if resumes and (offline or call.keyword("mode") == "offline"):
            yield facts.in_script(call.line), "wandb.init(resume=...) offline"


def _automatic_naming(facts: Facts) -> Cases:
    if facts.script is None or not facts.script.calls_of("load_state"):
        return
    for call in facts.script.calls_of("ProjectConfiguration"):
        if call.keyword("automatic_checkpoint_naming"):
            yield facts.in_script(call.line), "automatic_checkpoint_naming=True with load_state"


def _smallest_loader(facts: Facts) -> Cases:
    if facts.script is None or not facts.deepspeed:
        return
    if facts.keys.get("train_micro_batch_size_per_gpu", "auto") != "auto":
        return
    if any(
        c.keyword("is_train_batch_min") is False for c in facts.script.calls_of("DeepSpeedPlugin")
    ):
        return
    for call in facts.script.on_accelerator("prepare"):
        loaders = [name for name in call.argument_names if _is_loader(facts.script, name)]
        if len(loaders) > 1:
            yield facts.in_script(call.line), f"the loaders {', '.join(loaders)} in one prepare()"


def _is_loader(script: Script, name: str) -> bool:
    made = script.made_by.get(name)
    return made is not None and made.last in LOADERS


def _no_batch_size(facts: Facts) -> Cases:
    if facts.script is None or not facts.deepspeed:
        return
    if facts.keys.get("train_micro_batch_size_per_gpu", "auto") != "auto":
        return
    for call in facts.script.calls_of(*LOADERS):
        if call.keyword("batch_sampler") is not None:
            yield facts.in_script(call.line), "a loader with a batch_sampler, and micro-batch auto"


def _even_batches(facts: Facts) -> Cases:
    script = facts.script
    if script is None:
        return
    configured = script.calls_of("DataLoaderConfiguration", "join_uneven_inputs")
    if any(call.keyword("even_batches") is False for call in configured):
        return
    for call in script.on_accelerator("gather"):
        yield facts.in_script(call.line), "accelerator.gather(...) of what a prepared loader gives"


def _silent_ranks(facts: Facts) -> Cases:
    if facts.script is None or facts.deepspeed:
        return
    for call in facts.script.calls_of("InitProcessGroupKwargs"):
        if call.keyword("backend") != "gloo":
            continue
        for accelerator in facts.script.calls_of("Accelerator"):
            if accelerator.keyword("cpu") in (None, False):
                yield facts.in_script(accelerator.line), "backend gloo without cpu=True"


def _alone_under_zero(facts: Facts) -> Cases:
    script = facts.script
    if script is None or not facts.deepspeed or facts.environment.num_gpus > 0:
        return
    handlers = script.calls_of("InitProcessGroupKwargs")
    if script.calls_of("Accelerator") and not any(c.keyword("backend") == "gloo" for c in handlers):
        line = script.calls_of("Accelerator")[0].line
        yield facts.in_script(line), "CPU ranks of DeepSpeed without the gloo backend"


def _budget(facts: Facts) -> Cases:
    if facts.script is None:
        return
    for node in ast.walk(facts.script.tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if dotted(target).endswith("activation_memory_budget"):
                    yield facts.in_script(node.lineno), "torch's activation_memory_budget"


CHECKS = (
    Check(
        "ragged-tail",
        "the last group of an epoch is divided by the full number of steps: its gradient was 0.25 "
        "in place of 1.0 (1 micro-batch of 4)",
        "large_batch.update(update, loss_fn), or weigh by samples yourself",
        _accumulate,
    ),
    Check(
        "scheduler-prepared",
        "it steps once a process an update: 2 ranks, 3 updates, 6 steps of the schedule",
        "leave it out of prepare(); if accelerator.sync_gradients: scheduler.step(); and "
        "accelerator.register_for_checkpointing(scheduler)",
        _scheduler_prepared,
    ),
    Check(
        "batch-norm-accumulated",
        "accumulation is not the large batch: gradient off by 62 % (resnet18, 4 x 4 in place of "
        "16), and running statistics forget as many times faster as there are micro-batches",
        "convert_batch_norm(model, 32) and LargeBatch, or a network without BatchNorm",
        _batch_norm_accumulated,
    ),
    Check(
        "batch-norm-recomputed",
        "statistics move twice an update: num_batches_tracked 2 in 19 of 20 layers (resnet18), "
        "running mean off by 0.9; gradients tell nothing of it",
        "apply_activation_checkpointing(model)   (from lbaccel)",
        _batch_norm_recomputed,
    ),
    Check(
        "one-rank-searches",
        "a rank that runs out of memory alone leaves the others hanging in their collective",
        "large_batch.update(...): the ranks agree on a smaller micro-batch",
        _one_rank_searches,
    ),
    Check(
        "batch-drifts",
        "the batch shrinks with the search: asked for 256, it trains at 230, 207, ... 135",
        "BatchPlan(global_batch_size=...): the global batch stays",
        _batch_drifts,
    ),
    Check(
        "divided-twice",
        "accelerator.backward divides by the steps already: the gradient is too small by that "
        "factor",
        "accelerator.backward(loss)",
        _divided_twice,
    ),
    Check(
        "wandb-mode-late",
        "after the first wandb.init of a process it has no effect",
        'wandb.init(mode="offline"), or init_trackers(init_kwargs={"wandb": {"mode": "offline"}})',
        _mode_too_late,
    ),
    Check(
        "wandb-offline-resume",
        "offline it does nothing: run.resumed is False and run.step 0",
        "keep the run's id and step in your checkpoint, and log with step=num_updates",
        _offline_resume,
    ),
    Check(
        "automatic-naming",
        "it starts at 0 again after load_state and dies: Checkpoint directory ... already exists",
        'accelerator.save_state("checkpoints/update_000500"), and no automatic naming',
        _automatic_naming,
    ),
    Check(
        "smallest-loader",
        "DeepSpeed's micro-batch is the smallest of all loaders, the one of the evaluation too "
        "(is_train_batch_min)",
        "prepare the loader of the evaluation in a call of its own, after the first",
        _smallest_loader,
    ),
    Check(
        "no-batch-size",
        "prepare() stops: at least one of the dataloaders has None as batch size",
        '"train_micro_batch_size_per_gpu": N',
        _no_batch_size,
    ),
    Check(
        "even-batches",
        "the last batch is filled up with samples seen before: metrics count them twice",
        "accelerator.gather_for_metrics(...)",
        _even_batches,
    ),
    Check(
        "silent-ranks",
        "num_processes is 2 and the type NO: the model is not wrapped, each rank trains alone, and "
        "nothing is said",
        "Accelerator(cpu=True)",
        _silent_ranks,
    ),
    Check(
        "alone-under-zero",
        "every rank believes that it is alone (num_processes 1), and DeepSpeed stops: "
        "train_batch_size is not equal to micro_batch_per_gpu * gradient_acc_step * world_size",
        'Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])',
        _alone_under_zero,
    ),
    Check(
        "activation-budget",
        "wrong gradients with dropout, in silence: pytorch issue 190717, open (read, not run)",
        "plan with lbaccel.plan and apply_segments(model, segments)",
        _budget,
    ),
)
