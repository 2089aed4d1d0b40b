"""What a process of `accelerate launch` resolves to; each rank appends a line to the file named."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs


def main(out: str) -> None:
    # accelerate chooses no backend for ZeRO on CPU ranks, and each would believe it is alone;
    # without DeepSpeed CPU ranks talk under cpu=True alone
    zero = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    handlers = [InitProcessGroupKwargs(backend="gloo")] if zero else []
    accelerator = Accelerator(cpu=not zero, kwargs_handlers=handlers)
    total = torch.tensor([accelerator.process_index + 1])
    dist.all_reduce(total)
    found = {
        "type": accelerator.distributed_type.value,
        "processes": accelerator.num_processes,
        "rank": accelerator.process_index,
        "local_rank": accelerator.local_process_index,
        "backend": dist.get_backend(),
        "sum_of_ranks": int(total),
    }
    if zero:
        found["config"] = {**accelerator.deepspeed_plugin.deepspeed_config, "steps_per_print": 0}
    with Path(out).open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(found) + "\n")
    accelerator.end_training()  # ends the process group


if __name__ == "__main__":
    main(sys.argv[1])
