"""Small runs of the recipe for tests of resume: flags, and two runs compared to the bit."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import tiny  # noqa: F401  registers lbaccel_tiny
import torch
from PIL import Image
from places import shared_folder
from safetensors.torch import load_file

from lbaccel import LargeBatch, train

BASE = [
    *("--model", "lbaccel_tiny", "--global-batch-size", "256", "--epochs", "2", "--seed", "4"),
    *("--norm-batch-size", "16", "--drop-rate", "0.1", "--drop-path", "0.2"),
    *("--log-with", "run_folder", "--checkpoint-every", "2"),
]
NUM_UPDATES = 12  # 2 epochs of 1438 samples at 256, the last one wraps
# of the machine and of the plan, not of the contract
NOT_COMPARED = (
    *("perf/seconds", "perf/samples_per_second", "perf/samples_per_second_mean"),
    *("memory/peak_gib", "batch/micro", "check"),  # the last is a checksum of the others
)


def run(*flags, code=0, output="runs"):
    """The newest run folder after `lbaccel train` with these flags."""
    found = train.main([*BASE, "--output", str(output), *map(str, flags)])
    assert found == code, f"exit code {found}"
    folders = sorted(Path(output).iterdir()) if Path(output).exists() else []
    return folders[-1] if folders else None


def at_update(number, action):
    """Make this process act in its `number`-th update, in the middle of the accumulation."""
    plain, count = LargeBatch.update, [0]

    def update(self, *args):
        count[0] += 1
        if count[0] == number:
            action()
        return plain(self, *args)

    LargeBatch.update = update
    return lambda: setattr(LargeBatch, "update", plain)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def stopped_at(update, *flags, **options):
    """A run that Ctrl-C ended after that update."""
    undo = at_update(update, interrupt)
    try:
        return run(*flags, code=130, **options)
    finally:
        undo()


_whole: dict[tuple[str, ...], Path] = {}


def whole(*flags):
    """The folder of the unbroken run with these flags, run once a process: only to be read."""
    key = tuple(map(str, flags))
    if key not in _whole:
        _whole[key] = run(*flags, output=shared_folder("whole"))
    return _whole[key]


def make_images(root="images"):
    """A folder of two classes: 8 training and 3 validation pictures of each."""
    for split, count in (("train", 8), ("val", 3)):
        for label in ("cat", "dog"):
            folder = Path(root) / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8), (20 * i, 99, 7)).save(folder / f"{i}.png")


def break_inside(path):
    """Damage a PNG's pixels and keep its header and its end: no look from outside shows it."""
    content = bytearray(Path(path).read_bytes())
    content[content.index(b"IDAT") + 8] ^= 0xFF
    Path(path).write_bytes(content)


def check_refused(flags, says, capsys, folder):
    """Exit code 2, a message that holds `says`, and nothing written."""
    given = [*flags.split(), "--model", "lbaccel_tiny", "--output", str(folder / "runs")]
    assert train.main(given) == 2
    assert says in capsys.readouterr().err
    assert not (folder / "runs").exists()


def rows(folder):
    """The lines of metrics.jsonl without what a clock or a machine decides."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in NOT_COMPARED} for x in lines]


def newest(folder):
    """The newest checkpoint."""
    return max((folder / "checkpoints").glob("update_*"))


def without_contract(folder):
    """Make the checkpoints of a run those of a version that kept no contract in them."""
    for path in (folder / "checkpoints").glob("update_*"):
        (path / "contract.json").unlink()
        manifest = json.loads((path / "manifest.json").read_text())
        del manifest["files"]["contract.json"]
        (path / "manifest.json").write_text(json.dumps(manifest))


def tensors(folder):
    """Weights, averages and optimizer state of the newest checkpoint, by name."""
    last, found = newest(folder), {}
    for file in sorted(last.glob("*.safetensors")):
        found |= {f"{file.stem}.{k}": v for k, v in load_file(file).items()}
    state = torch.load(last / "state.pt", weights_only=True)["optimizer"]["state"]
    for i, entry in state.items():
        found |= {f"{i}.{k}": v for k, v in entry.items() if isinstance(v, torch.Tensor)}
    return found


def differences(found, truth):
    """What differs between two finished runs; empty where they are the same to the bit."""
    wrong = []
    if rows(found) != rows(truth):
        pairs = zip(rows(found), rows(truth), strict=False)
        first = next((a for a, b in pairs if a != b), "their number")
        wrong.append(f"metrics, first at {first}")
    ours, theirs = tensors(found), tensors(truth)
    if ours.keys() != theirs.keys():
        return [*wrong, "names of tensors"]
    wrong += [key for key, value in theirs.items() if not torch.equal(ours[key], value)]
    summaries = [json.loads((f / "summary.json").read_text()) for f in (found, truth)]
    keys = ("status", "num_updates", "samples_seen", "best_val_top1", "best_update", "val_top1")
    wrong += [key for key in keys if summaries[0].get(key) != summaries[1].get(key)]
    return wrong
