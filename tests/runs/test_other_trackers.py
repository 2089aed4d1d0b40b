"""Accelerate's other trackers beside the run folder: started, told the settings, fed, finished."""

from __future__ import annotations

import json
from pathlib import Path

import accelerate.tracking
import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from runs_of_recipe import run

from lbaccel.errors import InputError, RunFailed
from lbaccel.runs import other_trackers
from lbaccel.runs.other_trackers import OURS, check_tracker, tracker_names
from lbaccel.runs.tracking import start_trackers


class Recorded(GeneralTracker):
    """A tracker that writes what it is told into files below its folder."""

    name = "tensorboard"
    requires_logging_directory = True
    fails = False

    def __init__(self, run_name, logging_dir):
        super().__init__()
        self.folder = Path(logging_dir, run_name)

    @property
    def tracker(self):
        return self.folder

    def start(self):
        if self.fails:
            raise ConnectionError("no server\nat all")
        self.folder.mkdir(parents=True)
        (self.folder / "told").write_text("started\n")

    def tell(self, *what):
        with (self.folder / "told").open("a") as file:
            file.write(json.dumps(what) + "\n")

    def store_init_configuration(self, values):
        self.tell("settings", values)

    def log(self, values, step=None, **kwargs):
        self.tell("log", values, step)

    def finish(self):
        self.tell("finished")


@pytest.fixture
def recorded(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Recorded)
    monkeypatch.setattr(other_trackers, "get_available_trackers", lambda: ["tensorboard"])
    monkeypatch.setattr(Recorded, "fails", False)
    return Recorded


def test_a_run_of_the_recipe_feeds_it_beside_the_run_folder(recorded):
    folder = run("--log-with", "run_folder", "tensorboard", "--max-updates", "2")
    (told,) = folder.glob("tensorboard/*/told")
    first, settings, *lines, last = told.read_text().splitlines()
    assert first == "started" and json.loads(last) == ["finished"]
    kind, values = json.loads(settings)
    assert kind == "settings" and values["global_batch_size"] == 256
    assert all(isinstance(value, (bool, int, float, str)) for value in values.values())
    logged = [json.loads(line) for line in lines]
    assert {step for _, _, step in logged} == {1, 2}
    ours = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [values["train/loss"] for _, values, _ in logged if "train/loss" in values]
    assert losses == [row["train/loss"] for row in ours if "train/loss" in row]


def test_all_of_accelerates_can_be_named():
    assert tracker_names()[:2] == OURS
    named = {str(getattr(name, "value", name)) for name in accelerate.tracking.LOGGER_TYPE_TO_CLASS}
    assert {"tensorboard", "mlflow", "comet_ml", "aim", "clearml", "dvclive"} <= named
    assert named <= set(tracker_names())


def test_one_that_is_not_installed_names_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(other_trackers, "get_available_trackers", list)
    with pytest.raises(InputError, match=r"--log-with comet_ml needs .*: pip install comet-ml$"):
        check_tracker("comet_ml", where="--log-with")
    with pytest.raises(InputError, match=r"mlflw is not one of .* Did you mean mlflow\?"):
        check_tracker("mlflw", where="--log-with")


def test_one_that_does_not_start_is_a_sentence_and_ends_nothing_else(recorded, tmp_path):
    recorded.fails = True
    accelerator = Accelerator(cpu=True)
    with pytest.raises(
        RunFailed, match=r"tensorboard did not start \(ConnectionError: no server a"
    ):
        start_trackers(
            accelerator, tmp_path / "r", config={}, log_with=("tensorboard", "run_folder")
        )
    assert accelerator.trackers == []
    accelerator.end_training()
