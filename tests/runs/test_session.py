"""A run saved and restored: parts of later versions, its rate, its length."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from runs_of_recipe import BASE, newest, rows, run

from lbaccel import InputError, train
from lbaccel.batch.stream import UpdateStream
from lbaccel.launch import unsupported_platform
from lbaccel.runs import session
from lbaccel.runs.length import Length
from lbaccel.runs.log import RunLog
from lbaccel.runs.notices import Circumstances, LossNotices


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def without(folder, name):
    """The newest checkpoint as a version wrote it that did not have this part."""
    path = newest(folder) / "state.pt"
    state = torch.load(path, weights_only=True)
    del state[name]
    torch.save(state, path)
    manifest = newest(folder) / "manifest.json"
    content = json.loads(manifest.read_text())
    from lbaccel.runs.checkpoints import fingerprint

    content["files"]["state.pt"] = fingerprint(path)
    manifest.write_text(json.dumps(content))


def test_a_part_of_a_later_version_starts_afresh_and_is_named(monkeypatch, capsys):
    folder = run("--max-updates", 5)
    without(folder, "log")
    capsys.readouterr()
    assert train.main([*BASE, "--output", "runs", "--resume", str(folder)]) == 2
    assert "holds the state of" in capsys.readouterr().err  # an old part that is missing
    monkeypatch.setitem(session.SINCE, "log", "9.9")
    more = ["--max-updates", "12"]
    assert train.main([*BASE, "--output", "runs", "--resume", str(folder), *more]) == 0
    assert "is older than lbaccel 9.9: log starts afresh" in capsys.readouterr().out
    assert json.loads((folder / "summary.json").read_text())["num_updates"] == 12


def test_a_part_that_this_run_does_not_have_is_refused(capsys):
    folder = run("--max-updates", 5)
    path = newest(folder)
    state = torch.load(path / "state.pt", weights_only=True)
    parts = {name: SimpleNamespace(load_state_dict=None) for name in state if name != "log"}
    saved = session.Session(SimpleNamespace(), None, None, parts)
    with pytest.raises(InputError, match="holds the state of"):
        saved.restore(path, say=print)


def result(update, *, num_samples=10, stream):
    return SimpleNamespace(
        num_updates=update,
        num_samples=num_samples,
        samples_seen=update * num_samples,
        loss=1.0,
        grad_norm=1.0,
        dropped=False,
        micro_batch_size=5,
        sums={},
    )


def log_of(stream, *, log_every):
    length = Length(SimpleNamespace(stream=stream), epochs=2)
    return RunLog(
        stream,
        log_every=log_every,
        eval_every=1.0,
        length=length,
        notices=LossNotices(Circumstances(10, 8, None, False, False, 0.1)),
    )


def test_the_rate_of_a_line_is_that_of_its_updates_and_the_mean_that_of_the_run():
    stream = UpdateStream(10, 100)
    log = log_of(stream, log_every=2)
    lines = []
    for update, seconds in enumerate([1.0, 3.0, 0.25, 0.25], start=1):
        line = log.after_update(result(update, stream=stream), lr=0.1, seconds=seconds)
        lines += [] if line is None else [line]
    rates = [line["perf/samples_per_second"] for line in lines]
    assert rates == [pytest.approx(20 / 4), pytest.approx(20 / 0.5)]
    means = [line["perf/samples_per_second_mean"] for line in lines]
    assert means == [pytest.approx(20 / 4), pytest.approx(40 / 4.5)]


def test_a_resume_within_a_line_goes_on_with_its_seconds():
    stream = UpdateStream(10, 100)
    log, again = (log_of(stream, log_every=2) for _ in range(2))
    assert log.after_update(result(1, stream=stream), lr=0.1, seconds=4.0) is None
    again.load_state_dict(log.state_dict())
    line = again.after_update(result(2, stream=stream), lr=0.1, seconds=1.0)
    assert line["perf/samples_per_second"] == pytest.approx(20 / 5)
    old = {k: v for k, v in log.state_dict().items() if k != "window_seconds"}  # of 0.1
    again.load_state_dict(old)
    assert again.window_seconds == 0.0


def test_both_rates_are_in_the_metrics_of_a_run():
    folder = run("--max-updates", 3)
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    names = {"perf/samples_per_second", "perf/samples_per_second_mean"}
    assert all(names <= line.keys() for line in lines if "train/loss" in line)
    assert rows(folder)


@pytest.mark.parametrize(
    ("epochs", "max_updates", "limit", "planned", "stop_at"),
    [(2, None, None, 20, 20), (2, 7, None, 20, 7), (2, 70, None, 20, 20), (2, 7, 2, 20, 2)],
)
def test_the_length_is_the_shortest_of_what_was_asked(epochs, max_updates, limit, planned, stop_at):
    loader = SimpleNamespace(stream=UpdateStream(10, 100))
    length = Length(loader, epochs=epochs, max_updates=max_updates)
    if limit is not None:
        length.limit(limit)
    assert (length.planned, length.stop_at) == (planned, stop_at)


def test_the_length_follows_a_rule_that_measures_its_gain():
    loader = SimpleNamespace(stream=UpdateStream(40, 100))
    gaining = SimpleNamespace(finished=False, num_updates=0, most_updates=20)
    length = Length(loader, epochs=2, gaining=gaining, base_batch_size=10)
    assert length.planned == 4 * loader.stream.num_updates(2)  # at least one of the base batch each
    gaining.most_updates = 25  # updates were dropped, which gain nothing
    assert length.planned == 25
    gaining.finished, gaining.num_updates = True, 6
    assert (length.planned, length.stop_at) == (6, 6)


def test_a_platform_that_nobody_ran_is_named_in_a_sentence(monkeypatch, capsys):
    assert unsupported_platform("linux") is None and unsupported_platform("darwin") is None
    monkeypatch.setattr(train, "unsupported_platform", lambda: unsupported_platform("win32"))
    run("--dry-run")
    assert "not run on win32 by its developers" in capsys.readouterr().out
