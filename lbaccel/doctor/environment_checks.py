"""Checks of what is installed, and of what DeepSpeed needs to build."""

from __future__ import annotations

from collections.abc import Iterator

from lbaccel.doctor.check import Check
from lbaccel.doctor.facts import Facts

Cases = Iterator[tuple[str, str]]


def replaces_optimizer(facts: Facts) -> bool:
    """Whether accelerate puts DeepSpeed's CPU optimizer in the place of the script's."""
    config = facts.resolved.config if facts.resolved else {}
    device = config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    return device not in (None, "none") and config.get("zero_force_ds_cpu_optimizer", True)


def builds(facts: Facts) -> list[str]:
    """DeepSpeed's operators that are compiled at the first start."""
    found: list[str] = []
    if facts.deepspeed and facts.environment.num_gpus == 0:
        found.append("shared-memory communication between CPU ranks (about 30 s)")
    if facts.deepspeed and replaces_optimizer(facts):
        found.append("CPU-Adam (minutes)")
    return found


def _missing(package: str, facts: Facts) -> Cases:
    if facts.deepspeed and facts.environment.packages.get(package) is None:
        yield "environment", f"a DeepSpeed config, and {package} is not installed"


def _deepspeed(facts: Facts) -> Cases:
    yield from _missing("deepspeed", facts)


def _transformers(facts: Facts) -> Cases:
    yield from _missing("transformers", facts)


def _compiler(facts: Facts) -> Cases:
    if builds(facts) and facts.environment.compiler is None:
        yield "environment", f"no C++ compiler, and DeepSpeed builds {', '.join(builds(facts))}"


def _ninja(facts: Facts) -> Cases:
    if builds(facts) and facts.environment.packages.get("ninja") is None:
        yield "environment", f"no ninja, and DeepSpeed builds {', '.join(builds(facts))}"


def _nvcc(facts: Facts) -> Cases:
    here = facts.environment
    old = () < here.version("deepspeed") < (0, 19, 8)
    if old and here.num_gpus > 0 and here.nvcc is None:
        yield "environment", f"deepspeed {here.packages['deepspeed']} on a GPU machine without nvcc"


def _frozen_recompute(facts: Facts) -> Cases:
    config = facts.resolved.config if facts.resolved else {}
    stage = config.get("zero_optimization", {}).get("stage")
    if stage == 3 and () < facts.environment.version("deepspeed") < (0, 19, 3):
        yield "environment", f"ZeRO-3 by deepspeed {facts.environment.packages['deepspeed']}"


def _stale_lock(facts: Facts) -> Cases:
    for path in facts.environment.stale_locks:
        yield path, "the lock of a build that no process of this machine does any more"


def _accelerate(facts: Facts) -> Cases:
    if () < facts.environment.version("accelerate") < (1, 15):
        yield "environment", f"accelerate {facts.environment.packages['accelerate']}"


def _torchvision(facts: Facts) -> Cases:
    packages = facts.environment.packages
    torch, torchvision = packages.get("torch") or "", packages.get("torchvision")
    if torch.endswith("+cpu") and torchvision is not None and not torchvision.endswith("+cpu"):
        yield "environment", f"torch {torch} beside torchvision {torchvision}"


CHECKS = (
    Check(
        "deepspeed-missing",
        "accelerate launch stops: DeepSpeed is not installed",
        'pip install "lbaccel[deepspeed]"',
        _deepspeed,
    ),
    Check(
        "transformers-missing",
        "accelerate 1.15 stops with PackageNotFoundError: transformers, whatever zero3_init_flag "
        "says",
        "pip install transformers",
        _transformers,
    ),
    Check(
        "compiler-missing",
        "the first start fails at building the operator",
        "apt-get install g++   (and export TORCH_EXTENSIONS_DIR=FOLDER keeps what is built)",
        _compiler,
    ),
    Check(
        "ninja-missing",
        "the first start stops: Unable to JIT load ... due to ninja not being installed",
        "pip install ninja",
        _ninja,
    ),
    Check(
        "deepspeed-without-nvcc",
        "accelerate's unwrap_model imports deepspeed wherever it is installed, and versions before "
        "0.19.8 crash without nvcc (read, not run)",
        'pip install "deepspeed>=0.19.8"',
        _nvcc,
    ),
    Check(
        "zero3-frozen-recompute",
        "before 0.19.3 a recompute frees frozen parameters that it still reads: --train head and "
        "its kin with --activation-checkpointing stop at CheckpointError (read, DeepSpeed's pull "
        "request 8148). From 0.19.3 on they stay gathered until the backward of their block ends, "
        "and none is left after an update (measured with 0.19.8)",
        'pip install "deepspeed>=0.19.8"   (or --activation-checkpointing none)',
        _frozen_recompute,
    ),
    Check(
        "stale-build-lock",
        "every start that loads this operator waits without end, and without a word; a build on "
        "another host or in another container that shares the folder can't be seen from here",
        "rm {where}",
        _stale_lock,
    ),
    Check(
        "accelerate-old",
        "before 1.15 find_executable_batch_size drops reduce_batch_size_fn, and there is no "
        "register_tracker_class",
        'pip install "accelerate>=1.15"',
        _accelerate,
    ),
    Check(
        "torchvision-of-another-build",
        "import torchvision fails: operator torchvision::nms does not exist",
        "pip install --force-reinstall torch torchvision   (both from PyPI)",
        _torchvision,
    ),
)
