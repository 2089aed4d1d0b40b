"""A file that the system refuses to read is one sentence with its path and the reason."""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path

import pytest
from torch import nn

from lbaccel.configs import launcher, resolve
from lbaccel.doctor import facts, script
from lbaccel.errors import CannotRead
from lbaccel.models import read_weights
from lbaccel.recipe import settings
from lbaccel.recipe.resume import newest_run, read_run
from lbaccel.runs import saved_weights, session
from lbaccel.runs.read import read_mapping, read_metrics
from lbaccel.runs.tracking import RunFolderTracker, keep_updates_until

NO_DATA = Path("/proc/self/mem")  # a file to `is_file`, and an error of the device to whoever reads
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs a file that gives EIO")


def of_run(read):
    """Readers that take a folder and know the name of their file."""
    return lambda path: read(path.parent)


def start(path):
    RunFolderTracker("test", run=path.parent).start()


def finish(path):
    path.unlink()
    tracker = RunFolderTracker("test", run=path.parent)
    tracker.start()
    path.unlink()
    path.symlink_to(NO_DATA)
    tracker.finish()


READERS = {
    "read_weights, safetensors": ("weights.safetensors", read_weights),
    "read_weights, torch": ("weights.pth", read_weights),
    "load_weights": (
        "model.safetensors",
        of_run(partial(session.load_weights, model=nn.Linear(1, 1))),
    ),
    "a recipe": ("recipe.yaml", settings.read_yaml),
    "read_run": ("config.yaml", of_run(read_run)),
    "keep_updates_until": ("metrics.jsonl", of_run(partial(keep_updates_until, update=1))),
    "a tracker that starts": ("metrics.jsonl", start),
    "a tracker that ends": ("metrics.jsonl", finish),
    "a line for a resume": ("resumes.jsonl", lambda path: session._add_line(path, "{}")),
    "read_metrics": ("metrics.jsonl", read_metrics),
    "read_mapping": ("summary.json", read_mapping),
    "a launcher's YAML": ("zero2.yaml", launcher.read_yaml),
    "DeepSpeed's JSON": ("zero2.json", resolve.read_json),
    "doctor's YAML": ("zero2.yaml", facts._raw),
    "doctor's line": ("zero2.json", lambda path: facts._line(str(path), "zero")),
    "a script": ("train.py", script.read_script),
    "a checkpoint's JSON": ("preprocessing.json", lambda path: saved_weights._json(path, dict)),
}


@pytest.mark.parametrize("name", READERS)
def test_a_file_that_the_system_refuses_to_read_is_named_with_the_reason(name, tmp_path):
    file, read = READERS[name]
    path = tmp_path / file
    path.symlink_to(NO_DATA)
    reason = "(Input/output error|No such device.*)"  # the second is of a file that is mapped
    with pytest.raises(
        CannotRead, match=rf"^{re.escape(str(path))} can't be read: {reason}\. Give"
    ):
        read(path)


def test_a_run_whose_settings_can_not_be_read_is_not_passed_over(tmp_path):
    """It may be the one to go on with: beside it a second run would begin."""
    manifest = tmp_path / "run/checkpoints/update_000001/manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")
    (tmp_path / "run/config.yaml").symlink_to(NO_DATA)
    with pytest.raises(CannotRead, match=r"run/config\.yaml can't be read: Input/output error"):
        newest_run(tmp_path, {})
