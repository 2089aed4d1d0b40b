"""The line that says where a command is: on a terminal, late enough, and taken away."""

from __future__ import annotations

import io
import sys

import pytest

from lbaccel import cli, plan
from lbaccel.errors import InputError
from lbaccel.runs import waiting as module
from lbaccel.runs.waiting import Waiting


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def as_terminal(monkeypatch):
    """Standard error from here on; pytest puts its own in place before each test."""
    found = Terminal()
    monkeypatch.setattr(sys, "stderr", found)
    return found


def test_a_line_comes_after_two_seconds_and_is_taken_away_whatever_happens(monkeypatch):
    terminal = as_terminal(monkeypatch)
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with pytest.raises(InputError), Waiting("plan") as waiting:
        waiting.say("one")
        assert terminal.getvalue() == ""
        now[0] = 102.5
        waiting.say("two")
        assert terminal.getvalue().endswith("plan: two (2 s) ")
        raise InputError("no")
    assert terminal.getvalue().endswith("\r\033[K")


def test_a_pipe_gets_nothing(capsys):
    with Waiting("plan", after=0.0) as waiting:
        waiting.say("one")
    assert capsys.readouterr().err == ""


def test_a_plan_says_each_candidate_before_it_is_traced():
    said: list[str] = []
    plan(
        "resnet10t", img_size=32, global_batch_size=64, memory="1GiB", device="RTX 3060",
        num_classes=10, compare=False, say=said.append,
    )  # fmt: skip
    assert len(said) > 1
    assert all("micro-batch" in line and "recompute" in line for line in said)


def test_the_command_leaves_no_line_behind(monkeypatch):
    terminal = as_terminal(monkeypatch)
    monkeypatch.setattr(Waiting.__init__, "__kwdefaults__", {"after": 0.0})
    line = "plan --model resnet10t --img-size 32 --global-batch-size 64 --device T4 --memory 1GiB"
    assert cli.main(line.split()) == 0
    assert "plan: micro-batch" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\033[K")
