"""The command line: one table of commands, one shape of a command, one end for all of them."""

from __future__ import annotations

import argparse
import errno
import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from lbaccel import cli
from lbaccel.errors import Diverged, InputError, RankFailed, RunFailed
from lbaccel.recipe import ending as endings
from lbaccel.recipe.ending import ending

HELP = """usage: lbaccel COMMAND ...

  train      train or finetune a timm backbone at a global batch that does not fit
  start      from a folder of photographs to a recipe, with a first figure on the way
  schedule   a batch-size schedule: batch, learning rate and updates from each epoch on
  lr-find    which learning rates a recipe bears at its global batch; changes nothing
  plan       does a batch fit, what is the fastest way to fit it, what would each lever buy
  configs    the launcher's files: list, copy, explain, or make them for a plan
  doctor     what is known to go wrong with this environment, config and script
  env        this machine and its versions, to paste into a bug report
  report     runs and studies as one page: the verdict, curves, tables, where each number is from
  compare    finished runs side by side: what differed, and what came of it
  study      arms x batch sizes x seeds as one: planned, run, gone on with, reported
  scaling    how far can the batch of one's own recipe grow: tuned rates, seeds, one page
  eval       a trained model judged on images with labels: figures, intervals, pictures
  predict    a trained model used on images without labels: classes and probabilities as CSV
  landscape  loss and accuracy around trained weights, or between two models: curve and surface
  sharpness  how sharp a minimum is: Hessian eigenvalues, and two measures of the loss around it
  export     a run as a folder that timm and the Hugging Face hub load, with a model card
  verify     a gradient check: is an update of this model the same however it is cut?
  transfer   a recipe's hyper-parameters moved to another global batch, each by its rule
  replicate  a recipe made for many GPUs, as the contract of one card
  advise     how large should the batch be, by the noise of a run's gradients
  calibrate  what this machine's device reaches in each class of kernel, for plans

lbaccel COMMAND --help says more.
lbaccel --print-completion SHELL prints completions for bash, zsh or tcsh.
"""
NEEDED_FIRST = {
    "schedule": "--batch-schedule RULE and --global-batch-size B and --num-samples N and "
    "--base-lr LR",
    "plan": "--model MODEL and --global-batch-size B",
    "configs": "one of ls, cp, validate, make",
    "report": "RUN_OR_STUDY",
    "compare": "RUN",
    "study": "one of ls, show, plan, run, report",
    "scaling": "--batches B,B,...",
    "eval": "RUN|CHECKPOINT|EXPORT",
    "predict": "RUN|CHECKPOINT|EXPORT|hf-hub:NAME and FILES|FOLDER|GLOB|-",
    "landscape": "CHECKPOINT",
    "sharpness": "CHECKPOINT",
    "export": "RUN",
    "verify": "--model NAME",
    "transfer": "--global-batch-size B",
    "advise": "RUN",
}
OTHERS = [name for name in cli.COMMANDS if name != "train"]


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_the_help_lists_every_command_with_its_line(arguments, capsys):
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == HELP


@pytest.mark.parametrize(
    ("name", "near"), [("tarin", " Did you mean train?"), ("xyz", ""), ("--modle", "")]
)
def test_an_unknown_command_is_one_line_with_the_nearest_one(name, near, capsys):
    assert cli.main([name]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: no command '{name}'.{near} lbaccel --help lists them.\n"
    assert not captured.out


@pytest.mark.parametrize("name", OTHERS)
def test_a_command_is_a_module_of_its_name_with_two_functions(name):
    module, _ = cli.COMMANDS[name]
    assert module == f"commands.{name.replace('-', '_')}"
    command = import_module(f"lbaccel.{module}")
    assert list(inspect.signature(command.add_arguments).parameters) == ["parser"]
    assert len(inspect.signature(command.run).parameters) == 1
    parser = argparse.ArgumentParser(prog=f"lbaccel {name}")
    command.add_arguments(parser)
    assert parser.format_help().startswith("usage: lbaccel ")


@pytest.mark.parametrize("name", [name for name in OTHERS if name != "lr-find"])
def test_a_flag_that_a_command_does_not_have_is_refused(name, capsys):
    assert cli.main([name, *NEEDED.get(name, []), "--no-such-flag"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: unknown flag --no-such-flag.")
    whole = " --help all " if name in ("start", "scaling") else " --help "
    assert line.endswith(f"{whole}lists all of its flags.")


@pytest.mark.parametrize("name", list(NEEDED_FIRST))
def test_what_a_command_can_not_do_without_is_asked_for_in_one_line(name, capsys):
    assert cli.main([name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: lbaccel {name} needs {NEEDED_FIRST[name]}.")


NEEDED = {  # flags without which argparse stops earlier
    "eval": ["RUN"],
    "landscape": ["RUN"],
    "sharpness": ["RUN"],
    "report": ["RUN"],
    "predict": ["RUN", "FILE"],
    "start": ["FOLDER"],
    "schedule": [
        "--batch-schedule",
        "lrd",
        "--global-batch-size",
        "8",
        "--num-samples",
        "9",
        "--base-lr",
        "1",
    ],
    "plan": ["--model", "resnet10t", "--global-batch-size", "8"],
    "configs": ["ls"],
    "study": ["ls"],
    "scaling": ["--batches", "64,128"],
    "compare": ["run"],
    "export": ["run"],
    "verify": ["--model", "resnet10t"],
    "transfer": ["--global-batch-size", "8"],
    "advise": ["run"],
}

FULL = OSError(errno.ENOSPC, "No space left on device", "runs/x")
ENDS = [
    (InputError("B is 0"), 2, "error: B is 0"),
    (RunFailed("no memory"), 1, "run failed: no memory"),
    (Diverged("nan"), 1, "run failed: nan"),
    (KeyboardInterrupt(), 130, "interrupted."),
    (KeyboardInterrupt("Nothing was written."), 130, "interrupted. Nothing was written."),
    (FULL, 1, f"run failed: {FULL}. Free some space, or write to another place."),
]
ENDS += [
    (
        error := OSError(number, "no", "file"),
        1,
        f"run failed: {error}. Make the place readable and writable, or write to another place.",
    )
    for number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)
]


def raising(error):
    def body():
        raise error

    return body


@pytest.mark.parametrize("error, code, line", ENDS, ids=lambda value: str(value)[:30])
def test_each_error_has_one_line_and_one_code(error, code, line, capsys, monkeypatch):
    left = []
    monkeypatch.setattr(endings, "end_process_group", lambda: left.append(True))
    assert ending(raising(error)) == code
    captured = capsys.readouterr()
    assert captured.err == line + "\n" and not captured.out and left == [True]


def test_a_body_gives_its_own_code_and_where_else_to_write_is_the_command_s(capsys):
    assert [ending(lambda code=code: code) for code in (None, 0, 1)] == [0, 0, 1]
    assert ending(raising(FULL), elsewhere="give another --output") == 1
    assert capsys.readouterr().err.endswith("Free some space, or give another --output.\n")
    assert ending(raising(KeyboardInterrupt()), interrupted="Nothing was written.") == 130
    assert capsys.readouterr().err == "interrupted. Nothing was written.\n"


@pytest.mark.parametrize("error", [KeyError("s"), FileNotFoundError(2, "no such file", "x")])
def test_a_defect_of_ours_keeps_its_traceback_and_leaves_the_process_group(error, monkeypatch):
    left = []
    monkeypatch.setattr(endings, "end_process_group", lambda: left.append(True))
    with pytest.raises(type(error)):
        ending(raising(error))
    assert left == [True]


def test_the_first_rank_alone_prints_unless_only_another_knows(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert ending(raising(InputError("all know"))) == 2
    assert capsys.readouterr().err == ""
    assert ending(raising(RankFailed("only I know"))) == 1
    assert capsys.readouterr().err == "run failed: only I know\n"


@pytest.mark.parametrize("name", OTHERS)
def test_every_command_ends_there(name, capsys, monkeypatch):
    """A full disk inside any command is one sentence, and Ctrl-C has its code."""
    module = f"lbaccel.{cli.COMMANDS[name][0]}"
    for error, code in ((FULL, 1), (KeyboardInterrupt(), 130)):
        monkeypatch.setattr(f"{module}.run", lambda _, error=error: raising(error)())
        assert cli.main([name, *NEEDED.get(name, [])]) == code
        (line,) = capsys.readouterr().err.splitlines()
        assert "Free some space" in line or line == "interrupted."


# -- completions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", cli.SHELLS)
@pytest.mark.parametrize("typed", ["--print-completion {}", "--print-completion={}"])
def test_a_shell_is_told_all_commands_and_flags(shell, typed, capsys):
    assert cli.main(typed.format(shell).split()) == 0
    script = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert name in script
    for flag in ("global-batch-size", "print-config", "fail-below", "num-updates", "curvature"):
        assert flag in script
    assert "channels_last" in script  # a choice


def test_bash_completes_a_command_a_flag_and_a_choice(tmp_path):
    script = tmp_path / "lbaccel.bash"
    script.write_text(cli.completion("bash"))

    def completed(*words):
        lines = (
            f"source {script}",
            f"COMP_WORDS=(lbaccel {' '.join(words)} ''); COMP_CWORD={len(words) + 1}",
            f"COMP_WORDS[{len(words)}]={words[-1]!r}; COMP_CWORD={len(words)}",
            "_shtab_lbaccel; printf '%s\\n' \"${COMPREPLY[@]}\"",
        )
        done = subprocess.run(
            ["bash", "-c", "\n".join(lines)], capture_output=True, text=True, check=False
        )
        return done.stdout.split()

    assert completed("pred") == ["predict"]
    assert "--global-batch-size" in completed("train", "--glo")
    assert completed("lr-find", "--curv") == ["--curvature-samples"]
    assert "--img-size" in completed("lr-find", "--img")


@pytest.mark.parametrize("arguments", [[], ["fish"], ["bash", "zsh"]])
def test_another_shell_is_refused(arguments, capsys):
    assert cli.main(["--print-completion", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "bash" in line and "zsh" in line and "tcsh" in line


def test_without_shtab_the_line_to_type_is_said(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["--print-completion", "bash"]) == 2
    assert capsys.readouterr().err.endswith("pip install shtab\n")


def test_the_help_imports_no_command_and_nothing_heavy():
    code = (
        "import sys; from lbaccel import cli; cli.main(['--help']); "
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'numpy', 'timm', 'shtab'}"
        " | {m for m in sys.modules if m.startswith('lbaccel.commands')}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_flags_of_no_command_import_torch():
    """`--help`, a mistyped flag and `configs ls` answer at once: torch alone takes seconds."""
    code = (
        "import sys; from lbaccel import cli\n"
        "for name in set(cli.COMMANDS) - {'train'}:\n"
        "    cli.parser_of(name)\n"
        "    heavy = sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'timm', 'numpy'})\n"
        "    assert not heavy, (name, heavy)\n"
        "assert cli.main(['configs', 'ls']) == 0 and 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- the README -----------------------------------------------------------------------------------


def test_the_readme_lists_every_command_once_and_no_other():
    readme = Path(__file__).parents[2] / "README.md"
    listed = re.findall(r"^\| `lbaccel ([a-z-]+)` \|", readme.read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(cli.COMMANDS)
