"""A published study at a larger scale on one GPU, within a stated number of minutes.

python benchmarks/gpu/studies.py --data parquet:FOLDER [--minutes 9] [--jobs 6] [--study FILE]

It is `lbaccel study run` with an end: after so many minutes each run saves where it is and stops.
The results lie in $OUT/study (or --output DIR); the next call on the same folder goes on. At the
end, or with what there is, it prints the report. The hardware stands in each run's env.json.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
GRACE = 40.0  # seconds in which runs save and the report is written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="such as parquet:FOLDER with CIFAR-10")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--jobs", type=int, default=6, help="runs at a time on the one GPU")
    parser.add_argument("--study", default=str(HERE / "simulated_workers.yaml"))
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", ".")) / "study")
    parser.add_argument("--without-gpu", action="store_true", help="to try the script")
    a = parser.parse_args()
    start = time.monotonic()
    if not a.without_gpu:
        from children import cuda_or_exit

        cuda_or_exit()
    command = [sys.executable, "-m", "lbaccel", "study"]
    line = [*command, "run", a.study, "--output", str(a.output), "--jobs", str(a.jobs)]
    worker = subprocess.Popen([*line, "--data", a.data])
    try:
        code = worker.wait(timeout=max(1.0, 60 * a.minutes - GRACE - (time.monotonic() - start)))
    except subprocess.TimeoutExpired:
        worker.send_signal(signal.SIGTERM)  # each run ends after its update, with a checkpoint
        code = worker.wait()
    report = subprocess.run([*command, "report", str(a.output), "--md"], check=False)
    return code or report.returncode


if __name__ == "__main__":
    sys.exit(main())
