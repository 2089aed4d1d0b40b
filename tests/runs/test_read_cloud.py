"""Runs on wandb's server: read through wandb's own client, whose wire has recorded answers."""

from __future__ import annotations

import argparse
import importlib.util
import json

import pytest
from wandb_server import Recorded, installed

from lbaccel.commands import compare as compare_command
from lbaccel.errors import InputError, RunFailed
from lbaccel.runs.folder import new_run_folder, write_config
from lbaccel.runs.read import Point, _inspect, load_run
from lbaccel.runs.read_cloud import load_wandb_cloud
from lbaccel.runs.tracking import start_trackers

CONFIG = {"model": "vit", "global_batch_size": 64, "seed": 0, "plan": {"equation": "64 = 64"}}


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    for name in ("CACHE", "DATA", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name.lower()))
    for name in ("ENTITY", "PROJECT", "BASE_URL", "API_KEY", "IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.chdir(tmp_path)


def a_run(id, *, name="a", state="finished", top=50.0, seed=0, **changed):
    """A run of lbaccel of two evaluations; the server fills a row's absent values with null."""
    rows = [
        {"_step": i, "update": i + 1, "samples_seen": 64 * (i + 1), "perf/seconds": 36 * (i + 1)}
        for i in range(4)
    ]
    for row in rows:
        evaluated = row["update"] % 2 == 0
        row["val/top1"] = top + row["update"] if evaluated else None
        row["train/loss"] = "NaN" if row["update"] == 3 else 1 / row["update"]
    summary = {"status": "done", "num_updates": 4, "samples_seen": 256, "_wandb": {"runtime": 9}}
    config = {**CONFIG, "seed": seed, "_wandb": {"cli_version": "0.31.0"}}
    return Recorded(
        id, name, state, **{"config": config, "summary": summary, "rows": rows, **changed}
    )


OTHER = Recorded("ddd", "bert", "finished", {"lr": 1}, {"loss": 1}, [{"_step": 0, "loss": 1}])


def command(*arguments):
    parser = argparse.ArgumentParser()
    compare_command.add_arguments(parser)
    return compare_command.run(parser.parse_args([str(argument) for argument in arguments]))


def test_a_project_is_read_page_by_page_without_what_others_logged(monkeypatch, capsys):
    project = [a_run("aaa"), OTHER, a_run("bbb", name="b"), a_run("ccc", name="c"), a_run("eee")]
    asked = installed(monkeypatch, {"me/flowers": project})
    runs = load_wandb_cloud("wandb:me/flowers")
    assert [one.name for one in runs] == ["a", "b", "c", "a"]
    assert [q for q in asked if q.startswith("runs")] == [f"runs after {i}" for i in (None, 2, 4)]
    assert capsys.readouterr().err == (
        "wandb:me/flowers: left out, since lbaccel did not log it: bert\n"
    )
    assert runs[0].source == "wandb-cloud"
    settings = {"model": "vit", "global_batch_size": 64, "seed": 0, "plan/equation": "64 = 64"}
    assert runs[0].config == settings
    assert "_wandb" not in runs[0].summary and runs[0].summary["status"] == "done"


def test_null_is_an_absent_value_and_nan_is_a_gap(monkeypatch):
    installed(monkeypatch, {"me/flowers": [a_run("aaa")]})
    (one,) = load_wandb_cloud("wandb:me/flowers/aaa")
    assert one.history["val/top1"] == tuple(Point(u, 64 * u, u / 100, 50.0 + u) for u in (2, 4))
    assert [p.value for p in one.history["train/loss"]] == [1.0, 0.5, None, 0.25]


def test_a_history_of_many_pages_is_read_whole(monkeypatch):
    rows = [{"_step": i, "update": i + 1, "train/loss": i / 4} for i in range(2500)]
    asked = installed(monkeypatch, {"me/flowers": [a_run("aaa", rows=rows)]})
    (one,) = load_wandb_cloud("wandb:me/flowers")
    assert [p.value for p in one.history["train/loss"]] == [i / 4 for i in range(2500)]
    assert len([q for q in asked if q.startswith("rows")]) == 3


@pytest.mark.parametrize(
    ("state", "summary", "status"),
    [
        ("crashed", None, "crashed"),
        ("crashed", {"status": "running", "samples_seen": 128}, "crashed"),
        ("running", {"status": "running", "samples_seen": 128}, "running"),
        ("failed", {"status": "failed", "exit_reason": "oom"}, "failed"),
        ("killed", {"status": "interrupted"}, "interrupted"),
        ("finished", {"status": "done"}, "done"),
        ("finished", {}, None),  # of a loop of your own, which says no status
    ],
)
def test_a_run_that_died_has_the_status_that_the_server_knows(monkeypatch, state, summary, status):
    installed(monkeypatch, {"me/flowers": [a_run("aaa", state=state, summary=summary)]})
    (one,) = load_wandb_cloud("wandb:me/flowers")
    assert one.summary.get("status") == status
    assert one.history["val/top1"][-1].value == 54.0


def test_a_run_that_crashed_before_its_first_line_is_a_row_of_dashes(monkeypatch, capsys):
    dead = a_run("bbb", name="b", state="crashed", summary=None, rows=[])
    installed(monkeypatch, {"me/flowers": [a_run("aaa"), dead]})
    assert command("wandb:me/flowers") == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if " b " in f" {line} ")
    assert "crashed" in row and row.split().count("-") >= 4


def test_a_run_of_the_cloud_stands_beside_the_same_run_here(tmp_path, monkeypatch, capsys):
    """What the tracker wrote offline is what the server would have: both give one Run."""
    from accelerate import Accelerator

    monkeypatch.delenv("WANDB_MODE", raising=False)
    folder = new_run_folder(tmp_path / "runs", "tiny")
    config = {**CONFIG, "betas": [0.9, 0.95], "warmup_epochs": 0.5}
    write_config(folder, config)
    accelerator = Accelerator(cpu=True)
    start_trackers(accelerator, folder, config=config, mode="offline")
    for update in (1, 2, 3):
        where = {"update": update, "samples_seen": 64 * update, "perf/seconds": 3.6 * update}
        accelerator.log({**where, "train/loss": 1 / update}, step=update)
        accelerator.log({**where, "val/top1": 10.0 * update}, step=update)
    accelerator.end_training()
    records = _inspect(next((folder / "wandb").glob("offline-run-*/run-*.wandb")))
    rows = [record["history"]["item"] for record in records if "history" in record]
    summary, logged = {}, {}
    for record in records:
        summary |= record.get("summary", {}).get("update", {})
        logged |= record.get("run", {}).get("config", {}).get("update", {})
    served = Recorded("abc", folder.name, "finished", logged, summary, rows)
    installed(monkeypatch, {"me/flowers": [served]})
    (cloud,) = load_wandb_cloud("wandb:me/flowers")
    here = load_run(folder)
    assert (cloud.name, cloud.history, cloud.config) == (here.name, here.history, here.config)
    assert command(folder, "wandb:me/flowers/abc") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == [folder.name, "1"] for line in lines)
    assert any(f"{folder.name} (2)" in line for line in lines)


def test_a_project_without_lbaccel_names_what_it_holds(monkeypatch):
    installed(monkeypatch, {"me/flowers": [OTHER], "me/empty": []})
    with pytest.raises(InputError, match=r"holds no run of lbaccel; it holds 1 others, such as be"):
        load_wandb_cloud("wandb:me/flowers")
    with pytest.raises(InputError, match=r"wandb:me/empty holds no run of lbaccel\. Give a proj"):
        load_wandb_cloud("wandb:me/empty")


@pytest.mark.parametrize("path", ["me/absent", "me/flowers/zzz"])
def test_what_the_server_does_not_have_is_one_sentence(monkeypatch, path):
    installed(monkeypatch, {"me/flowers": [a_run("aaa")]})
    with pytest.raises(RunFailed, match=rf"^wandb:{path} can't be read from wandb .* Check the "):
        load_wandb_cloud(f"wandb:{path}")


@pytest.mark.parametrize("path", ["", "flowers", "a/b/c/d", "me/", "a b/c"])
def test_another_form_says_what_to_type(path):
    with pytest.raises(InputError, match=r"names no project of wandb\. Type wandb:ENTITY/PROJECT"):
        load_wandb_cloud(f"wandb:{path}")


def test_without_a_login_or_without_wandb_it_says_what_to_type(monkeypatch):
    with pytest.raises(InputError, match=r"reading it needs a login\. Type: wandb login$"):
        load_wandb_cloud("wandb:me/flowers")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"reading it needs wandb\. Type: pip install 'wandb"):
        load_wandb_cloud("wandb:me/flowers")


def test_a_refused_key_is_one_sentence(monkeypatch):
    installed(monkeypatch, {})
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(
        InputError, match=r"did not accept the login \(.*\)\. Check .* type: wandb login --re"
    ):
        load_wandb_cloud("wandb:me/flowers")


def test_names_of_the_server_give_the_terminal_no_orders(monkeypatch, capsys):
    evil = a_run("aaa", name="a\x1b[2Jb")
    other = Recorded("ddd", "x\x1b[2J\ny", "finished", {}, {}, [])
    installed(monkeypatch, {"me/flowers": [evil, other]})
    assert command("wandb:me/flowers") == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err and len(captured.err.splitlines()) == 1


def test_a_folder_of_that_name_here_is_a_folder(tmp_path, capsys):
    folder = tmp_path / "wandb:me" / "flowers"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(json.dumps({"update": 1, "val/top1": 5.0}) + "\n")
    assert command("wandb:me/flowers") == 0
    assert "flowers" in capsys.readouterr().out
