"""Standard output that is closed, full or of few characters: on the real command line."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest
from command_lines import STARTER, environment, finished, started

from lbaccel.recipe.output import SteadyText

SCHEDULE = ["schedule", "--global-batch-size", "64", "--epochs", "3", "--num-samples", "6400"]
TRAIN = [
    *("train", "--model", "lbaccel_tiny", "--global-batch-size", "512", "--epochs", "1"),
    *("--norm-batch-size", "16", "--log-with", "run_folder", "--output", "runs"),
]


def shell(line, folder, *, command, **more):
    """Run `line` in sh, where "$@" is lbaccel with these arguments."""
    return subprocess.run(
        ["sh", "-c", line, "sh", sys.executable, "-c", STARTER, *command],
        cwd=folder,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=300,
    )


def done(folder):
    (run,) = (folder / "runs").iterdir()
    return json.loads((run / "summary.json").read_text())["status"] == "done"


def broken_pipe():
    """A text stream whose reader has gone, and its raw descriptor."""
    reader, writer = os.pipe()
    os.close(reader)
    return io.TextIOWrapper(io.BufferedWriter(io.FileIO(writer, "w")), encoding="ascii")


def test_a_broken_stream_is_said_once_and_written_on(capsys):
    stream = broken_pipe()  # owns the buffer, and closes it at its end
    steady = SteadyText(stream, name="stdout")
    for _ in range(3):
        print("x" * 100_000, file=steady, flush=True)
    err = capsys.readouterr().err
    assert err.count("standard output can't be written (Broken pipe); the command goes on") == 1
    steady.close()


def test_what_the_encoding_does_not_have_is_escaped():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    steady = SteadyText(stream, name="stdout")
    print("é \udcff", file=steady, flush=True)
    assert raw.getvalue() == b"\\xe9 \\udcff\n"
    steady.close()


LINES = {
    "the reader ends early": '"$@" | true',
    "closed": '"$@" >&-',
    "both closed": '"$@" >&- 2>&-',
    "all closed": '"$@" <&- >&- 2>&-',
    "full": '"$@" > /dev/full',
    "both full": '"$@" > /dev/full 2>&1',
}


@pytest.mark.slow
@pytest.mark.parametrize("line", LINES)
def test_a_run_goes_on_without_its_output(line, tmp_path):
    found = shell(LINES[line], tmp_path, command=TRAIN)
    assert found.returncode == 0, found.stderr
    assert "Traceback" not in found.stderr and "Exception ignored" not in found.stderr
    assert done(tmp_path)
    said = found.stderr.count("standard output can't be written")
    assert said == (line in ("the reader ends early", "full"))


@pytest.mark.slow
@pytest.mark.parametrize("line", ['"$@" | true', '"$@" >&-', '"$@" > /dev/full 2>&1'])
def test_an_error_ends_in_its_code_without_output(line, tmp_path):
    found = shell(line, tmp_path, command=["train", "--model", "nonsuch"])
    assert "Traceback" not in found.stderr
    assert found.returncode == (0 if "|" in line else 2)  # a pipe's code is that of `true`


@pytest.mark.slow
def test_no_home_no_place_for_temporary_files_and_few_characters(tmp_path):
    folder = tmp_path / "später"
    folder.mkdir()
    environment_of_cron = {
        "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "TMPDIR": "/nonsuch",
    }  # fmt: skip
    found = shell('unset HOME; exec "$@"', folder, command=TRAIN, **environment_of_cron)
    assert found.returncode == 0, found.stderr
    assert "Traceback" not in found.stderr and done(folder)


@pytest.mark.slow
def test_a_closed_terminal_ends_a_run_in_good_order(tmp_path):
    """The terminal goes: writes to it fail with EIO, which is no error of the disk."""
    leader, follower = os.openpty()
    flags = [*TRAIN, "--epochs", "30"]
    with started(
        "-c", STARTER, *flags, cwd=tmp_path, stdout=follower, stderr=follower, stdin=follower
    ) as process:
        os.close(follower)
        assert os.read(leader, 4096)  # it has begun to speak
        os.close(leader)
        code, _ = finished(process)
    assert code == 0 and done(tmp_path)
