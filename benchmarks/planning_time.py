"""How long a plan takes: processor seconds of `lbaccel.plan` for each network.

python benchmarks/planning_time.py [NETWORK ...] [--device cpu] [--repeats 2] [--json FILE]

Each plan runs in a process of its own, as `lbaccel plan` does, and the figure is the smallest of
`--repeats`; imports are not in it. "first" has nothing that an earlier plan kept, and "again" is
the same plan after it. `--before CHECKOUT` plans with the lbaccel of that folder too, in turn with
this one, and the last column says whether all plans are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

NETWORKS = (
    *("resnet50", "mobilenetv2_100", "efficientnet_b0", "convnext_tiny", "levit_128"),
    *("vit_base_patch16_224", "swin_tiny_patch4_window7_224"),
    *("swin_large_patch4_window7_224", "efficientnet_b7", "maxvit_large_tf_224"),
)
ONE = """
import json, sys, time
from lbaccel import plan
options = json.loads(sys.argv[1])
start = time.process_time()
found = plan(**options)
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "plan": found.to_dict()}))
"""


def planned(options, checkout, caches):
    """Seconds and plan, by the lbaccel in `checkout`, which keeps what it found in a folder."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    environment |= {f"LBACCEL_{what}": f"{caches}/{what}" for what in ("KERNELS", "ESTIMATES")}
    done = subprocess.run(
        [sys.executable, "-c", ONE, json.dumps(options)],
        env=environment, cwd=checkout, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def measured(options, before, repeats):
    """The least seconds of each arm, and whether all plans are the same."""
    here = Path(__file__).resolve().parent.parent
    arms = {} if before is None else {"before": before}
    arms |= {"first": here, "again": here}
    runs = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            # each checkout has caches of its own: what one keeps makes no "first" of the other
            caches = {arm: f"{folder}/{of == here}" for arm, of in arms.items()}
            runs.append({arm: planned(options, of, caches[arm]) for arm, of in arms.items()})
    row = {arm: min(run[arm]["seconds"] for run in runs) for arm in arms}
    plans = [found["plan"] for run in runs for found in run.values()]
    return row | {"same_plan": all(plan == plans[0] for plan in plans)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", default="8GiB")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--global-batch-size", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--before", type=Path, help="a checkout of an older lbaccel")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    import timm
    import torch

    print(
        f"{platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    )
    print(f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}")
    rows = []
    for name in arguments.networks:
        options = {
            "model": name,
            "global_batch_size": arguments.global_batch_size,
            "memory": arguments.memory,
            "device": arguments.device,
            "precision": arguments.precision,
        }
        row = {"network": name} | measured(options, arguments.before, arguments.repeats)
        rows.append(row)
        print("  ".join(f"{key} {value:.1f}" if isinstance(value, float) else f"{key} {value}"
                        for key, value in row.items()), flush=True)  # fmt: skip
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
