"""Names and answers from outside, as they reach a terminal, a table, a picture or a page."""

from __future__ import annotations

import json

import pytest
import yaml

from lbaccel import cli
from lbaccel.errors import InputError, RunFailed
from lbaccel.recipe.ending import ending
from lbaccel.runs.columns import columns
from lbaccel.runs.progress import Progress
from lbaccel.text import in_code_block, in_code_span, in_markdown, printable, without_tokens

ORDERS = "\x1b[2J\x1b]0;owned\x07\r\x9b31m\u202e\x00\u2028\ud800"


def has_orders(text):
    return any((ord(c) < 32 and c not in "\n\t") or c in "\x7f\x9b\u202e\u2028\ud800" for c in text)


def test_control_characters_are_shown_and_all_others_stay():
    shown = printable(ORDERS + "\x7f")
    assert not has_orders(shown) and r"\x1b[2J" in shown and r"\u202e" in shown
    shown.encode()
    for plain in ("chat noir\n\tété", "日本語", "עברית عربى", "👩‍🔬", "C:\\x"):
        assert printable(plain) == plain


def test_tokens_and_passwords_are_left_out_and_names_stay():
    token = "something-else"
    text = without_tokens(f"no {token} for hf_AbCdEfGhIjKlMnOp at https://me:pw@host/a", token)
    assert text == "no hf_*** for hf_*** at https://***@host/a"
    for plain in ("hf-hub:timm/x", "hf_hub_download", "me@host https://huggingface.co/a"):
        assert without_tokens(plain) == plain


@pytest.mark.parametrize("error", [InputError, RunFailed, KeyboardInterrupt])
def test_the_last_line_of_a_command_gives_a_terminal_no_orders(error, capsys):
    def body():
        raise error(f"a file called {ORDERS}, token hf_AbCdEfGhIjKlMnOp")

    assert ending(body) in (1, 2, 130)
    said = capsys.readouterr().err
    assert r"\x1b[2J" in said and not has_orders(said) and "AbCd" not in said


def test_a_table_pads_what_it_shows():
    assert columns([("a\x1b", "b"), ("cc", "d")]) == [r"a\x1b  b", "cc     d"]


def test_notes_of_a_run_are_printable(capsys):
    progress = object.__new__(Progress)
    progress.is_main_process = True
    progress.note(f"classes: {ORDERS}")
    assert not has_orders(capsys.readouterr().err)


@pytest.fixture
def hostile(tmp_path):
    """A run whose name, metrics and settings are made to be printed."""
    run = tmp_path / "run$\\frac$\x1b[2J`<b>"
    run.mkdir()
    row = {"update": 1, "samples_seen": 8, "val/top1": 5.0, "x$^\x1b[2J": 1.0}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (run / "config.yaml").write_text(yaml.safe_dump({"model": ORDERS[:-1] + "|<b>", "k\x1b": 1}))
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (other / "config.yaml").write_text(yaml.safe_dump({"model": "m", "k\x1b": 1}))
    return [str(run), str(other)]


def test_compare_shows_hostile_runs_in_text_markdown_and_a_picture(hostile, tmp_path, capsys):
    metric = ["--metric", "x$^\x1b[2J"]
    for more in ([], ["--md"], metric, ["--plot", str(tmp_path / "a.png")],
                 [*metric, "--plot", str(tmp_path / "b.svg")]):  # fmt: skip
        assert cli.main(["compare", *hostile, *more]) == 0
        out = capsys.readouterr().out
        assert r"\x1b" in out and not has_orders(out)
        if more == ["--md"]:
            assert "<b>" not in out.replace("\\<b\\>", "") and r"\|" in out
            assert len({line.replace("\\|", "").count("|") for line in out.splitlines()[-4:]}) == 1


def test_markdown_of_a_name_is_the_name():
    assert in_markdown("![a](x) <b>\n# `c` \\") == r"\!\[a\](x) \<b\> \# \`c\` " + "\\\\"
    assert in_code_span("a`\nb") == "`a' b`" and in_code_span("") == "` `"
    block = in_code_block("bash", "ls\n```\n# out")
    assert block == "````bash\nls\n```\n# out\n````"
