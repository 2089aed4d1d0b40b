"""Reading runs: the folder and wandb's offline log tell the same story."""

import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import Accelerator

from lbaccel.errors import InputError, RunFailed
from lbaccel.runs.folder import new_run_folder, write_config, write_summary
from lbaccel.runs.read import Point, history_of, load_run, load_run_folder, load_wandb_offline
from lbaccel.runs.tracking import start_trackers


@pytest.fixture
def wandb_in_tmp(tmp_path, monkeypatch):
    for name in ("CACHE", "DATA", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name.lower()))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.chdir(tmp_path)


def write_lines(run, *rows):
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def train(run, updates, *, config, stop=True):
    """A training run without the training: the values are formulas of the update."""
    accelerator = Accelerator(cpu=True)
    line = start_trackers(
        accelerator, run, config=config, mode="offline", group="sweep", tags=["a", "b"]
    )
    for update in updates:
        where = {"update": update, "samples_seen": update * config["global_batch_size"]}
        loss = math.nan if update == 2 else 1 / (update + config["seed"])
        accelerator.log(
            {**where, "perf/seconds": update * 0.7, "train/loss": loss, "optim/lr": 0.1 / update},
            step=update,
        )
        if update % 2 == 0:
            accelerator.log({**where, "epoch": update / 2, "val/top1": update / 7}, step=update)
    accelerator.end_training()
    return line


def test_folder_and_wandb_offline_give_equal_histories(tmp_path, wandb_in_tmp, capfd):
    runs = [new_run_folder(tmp_path / "runs", f"tiny-{seed}") for seed in (1, 2)]
    for seed, run in enumerate(runs, start=1):
        config = {"model": "tiny", "global_batch_size": 64 * seed, "seed": seed, "betas": (0.9, 1)}
        config["plan"] = {"micro_batch_size": 32}
        write_config(run, config)
        line = train(run, range(1, 5), config=config)
        (folder,) = (run / "wandb").glob("offline-run-*")
        assert line == (
            f"wandb: offline (requested). This run: {folder}; "
            f"upload later with: wandb sync {run / 'wandb'}"
        )
    assert capfd.readouterr() == ("", ""), "wandb is not quiet"

    for seed, run in enumerate(runs, start=1):
        by_folder, by_wandb = load_run(run), load_run(run / "wandb")
        assert (by_folder.source, by_wandb.source) == ("folder", "wandb-offline")
        assert by_folder.history == by_wandb.history
        assert by_folder.config == by_wandb.config
        assert by_folder.name == by_wandb.name == run.name
        batch = 64 * seed
        assert by_folder.history["val/top1"] == tuple(
            Point(u, u * batch, u * 0.7 / 3600, u / 7) for u in (2, 4)
        )
        assert by_folder.history["train/loss"][1] == Point(2, 2 * batch, 2 * 0.7 / 3600, None)
        assert by_wandb.summary["val/top1"] == 4 / 7
        (folder,) = (run / "wandb").glob("offline-run-*")
        assert load_run(folder) == load_run(next(folder.glob("*.wandb"))) == by_wandb
        assert set(by_folder.history) == {"train/loss", "optim/lr", "val/top1"}


def test_a_resumed_run_is_one_run_in_both_sources(tmp_path, wandb_in_tmp):
    run = new_run_folder(tmp_path / "runs", "resumed")
    config = {"global_batch_size": 8, "seed": 5}
    write_config(run, config)
    train(run, range(1, 5), config=config)
    line = train(run, range(3, 7), config=config)  # back to the checkpoint of update 2
    assert len(list((run / "wandb").glob("offline-run-*"))) == 2
    by_folder, by_wandb = load_run(run), load_run(run / "wandb")
    assert by_folder.history == by_wandb.history
    assert [point.update for point in by_folder.history["train/loss"]] == [1, 2, 3, 4, 5, 6]
    # the printed line uploads both parts; wandb does those of one id in order of their start
    typed = shlex.split(line.partition("upload later with: ")[2])
    assert typed[:2] == ["wandb", "sync"]
    entry = [sys.executable, "-m", "wandb", "sync", "--dry-run", *typed[2:]]
    done = subprocess.run(entry, capture_output=True, text=True, timeout=120, check=True)
    assert "Would sync 2 run(s)" in done.stdout + done.stderr


def test_wandb_writes_into_the_run_folder_after_the_working_folder_changed(
    tmp_path, wandb_in_tmp, monkeypatch
):
    """One process of wandb serves all runs of ours, and keeps its own working folder."""
    for place in ("first", "second"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        line = train(Path("runs"), [1], config={"global_batch_size": 8, "seed": 5})
        (folder,) = (tmp_path / place / "runs" / "wandb").glob("offline-run-*")
        assert list(folder.glob("run-*.wandb"))
        assert line is not None and f"This run: runs/wandb/{folder.name}; " in line


def test_a_wandb_folder_with_two_runs_asks_for_one(tmp_path):
    for name in ("a", "b"):
        folder = tmp_path / "wandb" / f"offline-run-20260101_00000{name}-{name}"
        folder.mkdir(parents=True)
        (folder / f"run-{name}.wandb").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds 2 runs \(a, b\), one is needed"):
        load_wandb_offline(tmp_path / "wandb")


def test_a_reader_of_wandb_that_fails_is_named(tmp_path, monkeypatch):
    (tmp_path / "run-x.wandb").write_bytes(b"")
    old = subprocess.CompletedProcess([], 2, stdout="", stderr="No such command 'inspect'.")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: old)
    with pytest.raises(RunFailed, match=r"run-x\.wandb: .*No such command 'inspect'"):
        load_wandb_offline(tmp_path / "run-x.wandb")


def test_rows_of_one_update_are_one_row_and_the_later_value_counts():
    rows = [
        {"update": 3, "samples_seen": 30, "train/loss": 1.0, "perf/seconds": 36},
        {"update": 3, "samples_seen": 30, "train/loss": 2.0, "val/loss": 4.0, "perf/seconds": 72},
    ]
    hours = 72 / 3600
    assert history_of(rows) == {
        "train/loss": (Point(3, 30, hours, 2.0),),
        "val/loss": (Point(3, 30, hours, 4.0),),
    }


def test_a_resume_replaces_what_was_logged_from_its_first_update_on():
    rows = [{"update": u, "train/loss": float(u)} for u in (1, 2, 3, 4)]
    rows += [{"update": u, "train/loss": 10.0 * u} for u in (3,)]
    values = [(p.update, p.value) for p in history_of(rows)["train/loss"]]
    assert values == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_text_and_truth_values_are_no_metrics_but_nan_is_a_gap():
    rows = [{"update": 1, "note": "hi", "flag": True, "a/x": None, "b/x": "NaN", "_step": 1}]
    gap = (Point(1, None, None, None),)
    assert history_of(rows) == {"a/x": gap, "b/x": gap}


def test_a_last_line_that_a_crash_cut_is_left_out(tmp_path):
    run = write_lines(tmp_path / "run", {"update": 1, "train/loss": 2.0})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"update": 2, "train/lo')
    assert [p.update for p in load_run(run).history["train/loss"]] == [1]


@pytest.mark.parametrize(
    "broken", ['{"update": 2, "tr', "[1]", '{"samples_seen": 3}', '{"update": "2"}', "", "7"]
)
def test_any_other_broken_line_is_named_by_file_and_number(tmp_path, broken):
    run = write_lines(tmp_path / "run", {"update": 1})
    with (run / "metrics.jsonl").open("a") as file:
        file.write(broken + '\n{"update": 3}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: "):
        load_run(run)


def test_a_crashed_run_without_config_and_summary_can_be_read(tmp_path):
    run = load_run_folder(write_lines(tmp_path / "run", {"update": 1, "train/loss": 2.0}))
    assert (run.name, run.config, run.summary) == ("run", {}, {})


def test_config_and_summary_are_flat(tmp_path):
    run = write_lines(tmp_path / "run", {"update": 1})
    write_config(run, {"seed": 0, "plan": {"micro_batch_size": 8}})
    write_summary(run, {"status": "done", "val_top1": 0.5})
    assert load_run(run).config == {"seed": 0, "plan/micro_batch_size": 8}
    assert load_run(run).summary == {"status": "done", "val_top1": 0.5}


@pytest.mark.parametrize(
    ("name", "text"), [("config.yaml", "a: [1"), ("config.yaml", "- 1"), ("summary.json", "{")]
)
def test_a_broken_config_or_summary_is_named(tmp_path, name, text):
    run = write_lines(tmp_path / "run", {"update": 1})
    (run / name).write_text(text)
    with pytest.raises(InputError, match=name):
        load_run(run)


def test_what_is_no_run_folder_says_what_to_type(tmp_path):
    with pytest.raises(InputError, match="There is no such folder"):
        load_run(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="a run folder holds one"):
        load_run(tmp_path / "empty")
    write_lines(tmp_path / "run", {"update": 1})
    with pytest.raises(InputError, match=r"holds 1 run folders: use .*/\*"):
        load_run(tmp_path)


@pytest.mark.parametrize("file", ["metrics.jsonl", "config.yaml", "summary.json"])
def test_a_file_that_can_not_be_read_is_named_with_the_reason(file, tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"update": 1}\n')
    for name in ("config.yaml", "summary.json"):
        (tmp_path / name).write_text("{}")
    for reader in ("read_text", "read_bytes", "open"):
        plain = getattr(Path, reader)

        def denied(self, *rest, plain=plain, **options):
            if self.name == file:
                raise PermissionError(13, "Permission denied", str(self))
            return plain(self, *rest, **options)

        monkeypatch.setattr(Path, reader, denied)
    with pytest.raises(InputError, match=rf"/{file} can't be read: Permission denied"):
        load_run_folder(tmp_path)
