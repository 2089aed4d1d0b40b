"""Progress lines: the place in the run, the time left, and how many lines there are."""

from __future__ import annotations

import io
import re
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest

from lbaccel.batch.stream import UpdateStream
from lbaccel.runs.length import Length
from lbaccel.runs.pace import clock_time
from lbaccel.runs.progress import Progress

MARKS = ("JPY_PARENT_PID", "COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE", "CI")


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


class Run:
    """Updates on a clock of its own: each takes `seconds(update, its samples)`."""

    def __init__(self, stream, *, epochs, done=0):
        self.stream, self.done, self.clock = stream, done, Clock()
        self.length = Length(SimpleNamespace(stream=stream), epochs=epochs)
        self.progress = Progress(self.length, True, clock=self.clock)
        self.times = []

    def go(self, seconds, *, until=None):
        for update in range(self.done + 1, (until or self.length.stop_at) + 1):
            self.clock.now += seconds(update, self.stream.span(update - 1)[1])
            self.times.append(self.clock.now - 1000)
            seen = self.stream.samples_seen(update)
            self.progress.show(update, {"epoch": seen / self.stream.num_samples})
        return self


def lines(capsys):
    return {
        int(re.match(r"update (\d+)/", line)[1]): line.split("  ")[0]
        for line in capsys.readouterr().out.splitlines()
    }


def test_a_line_says_the_share_and_the_time_left(capsys):
    run = Run(UpdateStream(10, 100), epochs=51).go(lambda update, n: 7.0)
    said = lines(capsys)
    assert run.length.stop_at == 510
    assert said[1] == "update 1/510, 0 %"  # of one update nothing is known yet
    assert said[2] == f"update 2/510, 0 %, {clock_time(508 * 7)} left" and "59:16" in said[2]
    for update, line in list(said.items())[1:-1]:
        left = clock_time((510 - update) * 7)
        assert line == f"update {update}/510, {100 * update // 510} %, {left} left"
    assert said[510] == "update 510/510, 100 %"


def test_what_comes_once_in_the_first_update_is_not_taken_for_the_pace(capsys):
    Run(UpdateStream(10, 100), epochs=10).go(lambda update, n: 300.0 if update == 1 else 6.0)
    said = lines(capsys)
    seventh = min(update for update in said if update > 2)
    assert said[seventh].endswith(f"{clock_time((100 - seventh) * 6)} left")


def test_after_a_resume_only_this_process_s_pace_counts(capsys):
    Run(UpdateStream(10, 100), epochs=51, done=400).go(lambda update, n: 7.0)
    said = lines(capsys)
    assert said[401] == "update 401/510, 78 %"
    assert said[402] == f"update 402/510, 78 %, {clock_time(108 * 7)} left"


def test_where_the_batch_grows_samples_are_counted(capsys):
    stream = UpdateStream(10, 1000, growth=((2, 100), (4, 500)))
    run = Run(stream, epochs=6)
    assert run.length.stop_at == 200 + 20 + 4
    run.go(lambda update, n: 0.5 * n)
    said = lines(capsys)
    assert len(said) > 20
    for update, line in list(said.items())[1:-1]:
        done = stream.samples_seen(update)
        left = clock_time(0.5 * (6000 - done))
        assert line == f"update {update}/224, {100 * done // 6000} %, {left} left"
    assert any(update > 200 for update in said)


def test_evaluations_count_in_proportion(capsys):
    """Each tenth update takes 50 seconds more: 6 on average from the second epoch on."""
    Run(UpdateStream(10, 100), epochs=100).go(lambda update, n: 51.0 if update % 10 == 0 else 1.0)
    for update, line in lines(capsys).items():
        if 200 < update < 1000:
            told = re.search(r"(?:(\d+):)?(\d+):(\d\d) left", line).groups()
            hours, minutes, seconds = (int(part or 0) for part in told)
            left = 3600 * hours + 60 * minutes + seconds
            assert abs(left - 6 * (1000 - update)) <= 0.05 * 6000


@pytest.mark.parametrize(
    ("hours", "seconds", "most"), [(0.02, 0.05, 16), (2, 3.0, 70), (10, 10.0, 120), (72, 60.0, 500)]
)
def test_lines_are_limited_by_time_and_not_by_updates(hours, seconds, most, capsys):
    updates = round(3600 * hours / seconds)
    run = Run(UpdateStream(10, 10), epochs=updates).go(lambda update, n: seconds)
    said = list(lines(capsys))
    times = [run.times[update - 1] for update in said]
    assert said[0] == 1 and said[-1] == updates
    gaps = [b - a for a, b in pairwise(times)]
    assert len(said) <= most and max(gaps) <= 600 + seconds
    assert min(gaps[:-1]) > 5 - 1e-6


def test_a_short_run_has_its_first_and_its_last_line(capsys):
    Run(UpdateStream(10, 10), epochs=400).go(lambda update, n: 0.001)
    assert list(lines(capsys)) == [1, 400]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def terminal(monkeypatch):
    """In place of stderr for the rest of the test, without the marks of a notebook."""
    for name in (*MARKS, "TERM"):
        monkeypatch.delenv(name, raising=False)
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


def test_a_terminal_has_a_bar_with_the_same_time_left(monkeypatch, capsys):
    screen = terminal(monkeypatch)
    run = Run(UpdateStream(10, 100), epochs=51, done=400).go(lambda update, n: 7.0, until=402)
    assert run.progress.bar.postfix.startswith(f"left={clock_time(108 * 7)}")
    run.progress.close()
    assert "402/510" in screen.getvalue() and "update" not in capsys.readouterr().out


@pytest.mark.parametrize(("name", "value"), [*((n, "1") for n in MARKS), ("TERM", "dumb")])
def test_a_notebook_and_a_continuous_integration_keep_no_bar(name, value, monkeypatch, capsys):
    screen = terminal(monkeypatch)
    monkeypatch.setenv(name, value)
    run = Run(UpdateStream(10, 100), epochs=2).go(lambda update, n: 7.0)
    assert run.progress.bar is None and not screen.getvalue()
    assert "update 20/20, 100 %" in capsys.readouterr().out
