"""The run folder: what is written, that it is strict, whole and inside its root."""

import csv
import json
import math
import os
import platform
import socket
import subprocess
import sys
from urllib.parse import urlsplit

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from lbaccel.errors import InputError, RunFailed
from lbaccel.runs import folder as run_folder
from lbaccel.runs.environment import write_env
from lbaccel.runs.folder import (
    atomic_write_text,
    new_run_folder,
    write_config,
    write_summary,
)
from lbaccel.runs.metric_lines import CHECK, faults, read_lines
from lbaccel.runs.tracking import RunFolderTracker, start_trackers, wandb_mode

KEYS = ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL")


@pytest.fixture
def no_wandb_environment(tmp_path, monkeypatch):
    for key in KEYS:
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def rows_of(run):
    refuse = pytest.fail  # a NaN literal is not JSON
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert faults(read_lines(run / "metrics.jsonl")) == []
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    return [{key: value for key, value in row.items() if key != CHECK} for row in rows]


def started(run):
    tracker = RunFolderTracker("project", run=run)
    tracker.start()
    return tracker


def test_each_call_gives_a_new_folder_even_within_one_second(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "_timestamp", lambda: "20260102-030405")
    folders = [new_run_folder(tmp_path / "runs", "vit") for _ in range(3)]
    names = ["20260102-030405-vit" + suffix for suffix in ("", "-2", "-3")]
    assert [folder.name for folder in folders] == names
    assert all(folder.is_dir() for folder in folders)


@pytest.mark.parametrize(
    "name", ["../../escape", "/etc/passwd", "a\0b", "..\\x", "a/../../b", "é ü"]
)
def test_no_name_leads_out_of_the_root(tmp_path, name):
    root = tmp_path / "runs"
    try:
        folder = new_run_folder(root, name)
    except InputError:
        assert not any(character.isascii() and character.isalnum() for character in name)
    else:
        assert folder.resolve().parent == root.resolve()


def test_a_name_without_a_letter_is_an_input_error_that_says_what_to_type(tmp_path):
    with pytest.raises(InputError, match=r"name='\.\./' .* Use a name such as"):
        new_run_folder(tmp_path, "../")


def test_a_root_that_is_a_file_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot hold run folders"):
        new_run_folder(tmp_path / "file", "vit")


def test_an_atomic_write_that_fails_leaves_the_old_file_and_nothing_beside_it(
    tmp_path, monkeypatch
):
    path = tmp_path / "summary.json"
    atomic_write_text(path, "old")

    def full_disk(_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        atomic_write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_config_is_read_back_as_it_was_with_tuples_as_lists(tmp_path):
    config = {"model": "resnet18", "base_lr": 1e-5, "betas": (0.9, 0.95), "plan": {"world_size": 2}}
    write_config(tmp_path, config)
    read = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert read == {**config, "betas": [0.9, 0.95]}
    assert list(read) == list(config)


def test_a_summary_holds_no_nan(tmp_path):
    write_summary(tmp_path, {"status": "diverged", "val_loss": math.nan, "grads": [math.inf, 1.0]})
    text = (tmp_path / "summary.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "status": "diverged",
        "val_loss": None,
        "grads": [None, 1.0],
    }


def test_env_names_versions_command_seed_and_commit_but_not_the_host(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    monkeypatch.setattr(socket, "gethostname", lambda: "secret-host")
    monkeypatch.setattr(platform, "node", lambda: "secret-host")
    write_env(tmp_path, seed=3, argv=["train.py", "--name", "two words"])
    env = json.loads((tmp_path / "env.json").read_text())
    assert env["git_commit"] == head.stdout.strip()
    assert env["command"] == "train.py --name 'two words'"
    assert env["seed"] == 3
    assert env["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"accelerate", "wandb", "numpy", "timm", "torchvision"} <= set(env["versions"])
    assert env["devices"]
    assert "secret-host" not in json.dumps(env)
    assert not any("host" in key for key in env)


def test_env_has_no_commit_outside_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    write_env(tmp_path, seed=None)
    assert json.loads((tmp_path / "env.json").read_text())["git_commit"] is None


def test_a_line_is_on_disk_before_the_run_ends(tmp_path):
    tracker = started(tmp_path)
    tracker.log({"update": 1, "samples_seen": 64, "train/loss": 2.5}, step=1)
    assert rows_of(tmp_path) == [{"update": 1, "samples_seen": 64, "train/loss": 2.5}]
    tracker.finish()


def test_nan_infinity_tensors_and_numpy_become_strict_json(tmp_path):
    tracker = started(tmp_path)
    values = {"train/loss": math.nan, "val/loss": -math.inf, "optim/lr": torch.tensor(0.5)}
    tracker.log(values, step=7)
    tracker.log({"train/loss": torch.tensor(math.nan)}, step=8)
    tracker.finish()
    assert rows_of(tmp_path) == [
        {"update": 7, "train/loss": None, "val/loss": None, "optim/lr": 0.5},
        {"update": 8, "train/loss": None},
    ]


def test_a_line_without_an_update_is_refused(tmp_path):
    tracker = started(tmp_path)
    with pytest.raises(InputError, match="step=update"):
        tracker.log({"train/loss": 1.0})
    tracker.finish()


def test_the_csv_has_all_columns_and_missing_values_are_empty(tmp_path):
    tracker = started(tmp_path)
    tracker.log({"update": 1, "train/loss": 2.0})
    tracker.log({"update": 2, "val/top1": 0.25})
    tracker.finish()
    tracker.finish()  # Accelerator.end_training may be called twice
    with (tmp_path / "metrics.csv").open() as file:
        assert list(csv.DictReader(file)) == [
            {"update": "1", "train/loss": "2.0", "val/top1": ""},
            {"update": "2", "train/loss": "", "val/top1": "0.25"},
        ]


@pytest.mark.parametrize(
    ("tail", "updates"),
    [('{"update": 2, "tra', [1, 3]), ('{"update": 2}', [1, 2, 3]), ("", [1, 3])],
)
def test_a_resumed_run_is_not_glued_to_a_line_that_a_crash_cut(tmp_path, tail, updates):
    (tmp_path / "metrics.jsonl").write_text('{"update": 1}\n' + tail)
    tracker = started(tmp_path)
    tracker.log({"update": 3})
    tracker.finish()
    assert [row["update"] for row in rows_of(tmp_path)] == updates


def test_the_config_of_the_recipe_is_not_overwritten(tmp_path):
    tracker = started(tmp_path)
    tracker.store_init_configuration({"model": "first"})
    tracker.store_init_configuration({"model": "second"})
    tracker.finish()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"model": "first"}


def test_accelerate_knows_the_tracker_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert LOGGER_TYPE_TO_CLASS["run_folder"] is RunFolderTracker
    accelerator = Accelerator(cpu=True, log_with="run_folder")
    accelerator.init_trackers("mine", config={"seed": 0})
    accelerator.log({"train/loss": 1.0}, step=1)
    accelerator.end_training()
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.endswith("-mine")
    assert rows_of(run) == [{"update": 1, "train/loss": 1.0}]
    assert yaml.safe_load((run / "config.yaml").read_text()) == {"seed": 0}


@pytest.mark.usefixtures("no_wandb_environment")
def test_the_requested_mode_wins_then_the_environment_then_the_key(monkeypatch):
    assert wandb_mode(None) == ("offline", "not logged in")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert wandb_mode(None) == ("online", "API key found")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode(None) == ("disabled", "WANDB_MODE")
    assert wandb_mode("offline") == ("offline", "requested")


@pytest.mark.usefixtures("no_wandb_environment")
def test_a_key_in_netrc_counts_for_its_own_host_only(tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    assert wandb_mode(None)[0] == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert wandb_mode(None)[0] == "offline"
    (tmp_path / "netrc").write_text("machine\n")
    assert wandb_mode(None)[0] == "offline"


@pytest.mark.usefixtures("no_wandb_environment")
def test_a_key_that_wandb_login_wrote_for_its_own_server_counts(tmp_path, monkeypatch):
    urls = pytest.importorskip("wandb.sdk.lib.urls")
    host = urlsplit(urls.DEFAULT_BASE_URL).netloc  # the one that `wandb login` writes
    (tmp_path / "netrc").write_text(f"machine {host} login user password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    assert wandb_mode(None) == ("online", "API key found")
    monkeypatch.setenv("WANDB_BASE_URL", urls.DEFAULT_BASE_URL)
    assert wandb_mode(None)[0] == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://api.wandb.ai")
    assert wandb_mode(None)[0] == "offline"


@pytest.mark.usefixtures("no_wandb_environment")
def test_an_unknown_mode_names_where_it_came_from(monkeypatch):
    with pytest.raises(InputError, match=r"'of' \(requested\) is not one of online, offline"):
        wandb_mode("of")
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    with pytest.raises(InputError, match=r"'dryrun' \(WANDB_MODE\)"):
        wandb_mode(None)


def test_an_unknown_tracker_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="log_with tensorbord is not one of run_folder, wandb"):
        start_trackers(Accelerator(cpu=True), tmp_path, config={}, log_with=("tensorbord",))


def test_starting_twice_is_an_input_error(tmp_path):
    accelerator = Accelerator(cpu=True)
    start_trackers(accelerator, tmp_path, config={}, log_with=("run_folder",))
    with pytest.raises(InputError, match="twice"):
        start_trackers(accelerator, tmp_path, config={}, log_with=("run_folder",))
    accelerator.end_training()


class ListTracker(GeneralTracker):
    name = "list"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.logged = []

    @property
    def tracker(self):
        return self.logged

    def log(self, values, step=None, **kwargs):
        self.logged.append((step, values))


def test_trackers_that_the_accelerator_was_built_with_stay(tmp_path):
    theirs = ListTracker()
    accelerator = Accelerator(cpu=True, log_with=[theirs])
    start_trackers(accelerator, tmp_path, config={}, log_with=("run_folder",))
    accelerator.log({"train/loss": 1.0}, step=1)
    accelerator.end_training()
    assert theirs.logged == [(1, {"train/loss": 1.0})]
    assert rows_of(tmp_path) == [{"update": 1, "train/loss": 1.0}]


@pytest.mark.parametrize(
    "arguments", ['("run_folder",)', '("run_folder", "wandb"), mode="disabled"']
)
def test_wandb_is_not_imported_where_it_does_not_log(tmp_path, arguments):
    program = f"""
import sys
from pathlib import Path
from accelerate import Accelerator
from lbaccel.runs.tracking import start_trackers
accelerator = Accelerator(cpu=True)
print(start_trackers(accelerator, Path({str(tmp_path)!r}), config={{}}, log_with={arguments}))
accelerator.log({{"train/loss": 1.0}}, step=1)
accelerator.end_training()
assert "wandb" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("None", "wandb: disabled (requested).")
    assert rows_of(tmp_path) == [{"update": 1, "train/loss": 1.0}]


def test_a_process_that_is_not_the_main_one_writes_nothing(tmp_path):
    class OtherRank:
        trackers = ()
        is_main_process = False

    assert start_trackers(OtherRank(), tmp_path, config={}, log_with=("run_folder",)) is None
    assert list(tmp_path.iterdir()) == []


def test_a_wandb_that_cannot_start_says_to_go_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def refused(**_):
        raise wandb.errors.CommError("no route to host")

    monkeypatch.setattr(wandb, "init", refused)
    accelerator = Accelerator(cpu=True)
    with pytest.raises(RunFailed, match=r"no route to host\. Use wandb mode offline"):
        start_trackers(accelerator, tmp_path, config={}, mode="online")
    accelerator.end_training()
    assert not (tmp_path / "metrics.jsonl").exists()
