"""Damage to metrics.jsonl is named by line and update, and costs neither a resume nor a reader."""

from __future__ import annotations

import argparse

import pytest
from runs_of_recipe import differences, run, stopped_at, whole

from lbaccel.commands import advise, compare
from lbaccel.errors import InputError
from lbaccel.runs.metric_lines import faults, next_number, numbered, read_lines
from lbaccel.runs.tracking import keep_updates_until


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def written(folder, count=6):
    """A file of so many whole lines, of updates 10, 20, ..., and the lines."""
    lines = [
        numbered({"update": 10 * n, "samples_seen": 80 * n, "train/loss": 1 / n}, n)
        for n in range(1, count + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return lines


def found(folder, lines, end="\n"):
    path = folder / "metrics.jsonl"
    path.write_text("\n".join(lines) + end)
    return faults(read_lines(path))


def without(lines, *places):
    return [line for place, line in enumerate(lines) if place not in places]


def test_whole_lines_have_no_fault_and_a_torn_last_one_is_none(tmp_path):
    lines = written(tmp_path)
    assert found(tmp_path, lines) == []
    assert found(tmp_path, [*lines, lines[0][:30]], end="") == []
    assert found(tmp_path, [*lines, "\0" * 40], end="") == []
    assert found(tmp_path, [f"{line}\r" for line in lines]) == []


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda x: without(x, 2),
            ["a line is missing between line 2 (update 20) and line 3 (update 40)"],
        ),
        (
            lambda x: without(x, 0, 1),
            ["2 lines are missing between the first line and line 1 (update 30)"],
        ),
        (
            lambda x: [*x[:3], x[1], *x[3:]],
            [
                "line 4 (update 20) is there twice or out of order: it follows line 3 (update 30)",
                "a line is missing between line 4 (update 20) and line 5 (update 40)",
            ],
        ),
        (
            lambda x: [x[0].replace('"train/loss": 1.0', '"train/loss": 0.9'), *x[1:]],
            ["line 1 (update 10): its checksum does not fit"],
        ),
        (
            lambda x: [*x[:5], '{"update": 60, "train/loss": 0.1}'],
            ["line 6 (update 60) was not written by lbaccel, or its checksum was taken away"],
        ),
        (lambda x: [*x[:2], "\0" * 9, *x[3:]], ["line 3: not valid JSON"]),
        (lambda x: [*x[:2], x[2] + x[3], *x[4:]], ["line 3: not valid JSON", "a line is missing"]),
        (lambda x: [x[0], "[" * 100_000, *x[2:]], ["line 2: "]),
        (lambda x: [x[0], '{"update": -1}', *x[2:]], ["line 2: its 'update' is no count"]),
        (lambda x: [x[0], '{"update": 1.5}', *x[2:]], ["line 2: no integer 'update'"]),
        (
            lambda x: [x[0], f'{{"update": {10**400}}}', *x[2:]],
            ["line 2: its 'update' is no count"],
        ),
        (
            lambda x: [x[0], f'{{"update": 1, "val/top1": {10**400}}}', *x[2:]],
            ["line 2: its 'val/top1' is out of range"],
        ),
        (
            lambda x: [x[0], '{"update": 1, "samples_seen": "many"}', *x[2:]],
            ["line 2: its 'samples_seen' is no number from 0 on"],
        ),
    ],
)
def test_damage_is_named_by_line_and_update(tmp_path, damage, says):
    told = found(tmp_path, damage(written(tmp_path)))
    assert len(told) == len(says), told
    for sentence, words in zip(told, says, strict=True):
        assert words in sentence


def test_lines_of_before_are_followed_by_numbered_ones(tmp_path):
    old = ['{"update": 1, "train/loss": 2.0}', '{"update": 2, "train/loss": 1.0}']
    (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in old))
    number = next_number(read_lines(tmp_path / "metrics.jsonl"))
    new = numbered({"update": 3, "train/loss": 0.5}, number)
    assert found(tmp_path, [*old, new]) == []
    assert found(tmp_path, [old[0], new]) == [
        "a line is missing between line 1 (update 1) and line 2 (update 3)"
    ]
    (doubled,) = found(tmp_path, [old[0], old[1], old[1]])
    assert doubled == "line 3 (update 2) is there twice, first in line 2: the later counts"


def test_a_cut_keeps_what_can_not_be_read_beside(tmp_path):
    lines = written(tmp_path)
    path = tmp_path / "metrics.jsonl"
    for number in (1, 2):
        path.write_text("\n".join([lines[0], "damaged", *lines[2:]]) + "\n")
        before = path.read_bytes()
        told = keep_updates_until(tmp_path, 40)
        assert "line 2: not valid JSON" in told[0] and f"damaged-{number}.jsonl" in told[-1]
        assert path.read_text().splitlines() == [lines[0], *lines[2:4]]
        assert (tmp_path / f"metrics.damaged-{number}.jsonl").read_bytes() == before


# -- the commands ---------------------------------------------------------------------------------


def command(module, *arguments):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.run(parser.parse_args([str(argument) for argument in arguments]))


def test_compare_and_advise_name_gaps_beside_their_result(tmp_path, capsys):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(whole(), folder, symlinks=True)
    capsys.readouterr()
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], *lines[4:-2]]) + "\n")
    for module, more in ((compare, ()), (advise, ("--quick",))):
        assert command(module, folder, *more) == 0
        out, err = capsys.readouterr()
        assert "warning" not in out
        assert f"warning: {path}: a line is missing between line 3 (update 3)" in err
        assert "the lines end at update 11, and the run ended at update 12" in err
    path.write_text("nothing\n")
    with pytest.raises(InputError, match="Remove line 1"):
        command(compare, folder)


def test_a_resume_names_what_is_missing_and_goes_on_to_the_bit(capsys):
    folder = stopped_at(5)
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{}", lines[2]]) + "\n")
    capsys.readouterr()
    assert run("--resume", folder) == folder
    out = capsys.readouterr().out
    assert f"resume: {path}: line 2: no integer 'update'" in out
    assert "lines of update 4 to 5 are missing at its end" in out
    wrong = differences(folder, whole())
    assert len(wrong) == 1 and wrong[0].startswith("metrics")
    assert (folder / "metrics.damaged-1.jsonl").exists()
