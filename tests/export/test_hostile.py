"""A run folder that was edited to harm: its card shows text, and refuses wrong kinds."""

from __future__ import annotations

import json
import re
import shutil

import huggingface_hub
import pytest
import timm
import yaml
from markdown_it import MarkdownIt
from runs_of_recipe import newest, whole

from lbaccel import cli, models
from lbaccel.errors import InputError, RunFailed
from lbaccel.export import hub
from lbaccel.export.model_card import model_card
from lbaccel.export.read import read_exported
from lbaccel.export.write import FILES, check_target

TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUv"
EVIL = (
    "x`| <script>alert(1)</script> ![i](http://evil/a.png)\n\n# Owned\n```\n[l](http://evil)\x1b[2J"
)


@pytest.fixture
def run(tmp_path):
    shutil.copytree(whole("--max-updates", "2"), tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def edit(file, change):
    """Change a JSON or YAML file; the manifest of a checkpoint follows."""
    reads, writes = (yaml.safe_load, yaml.safe_dump) if file.suffix == ".yaml" else (
        json.loads, json.dumps)  # fmt: skip
    content = reads(file.read_text())
    content = change(content) or content
    file.write_text(writes(content))
    manifest = file.parent / "manifest.json"
    if manifest.exists() and file != manifest:
        import hashlib

        listed = json.loads(manifest.read_text())
        found = file.read_bytes()
        digest = hashlib.sha256(found).hexdigest()
        listed["files"][file.name] = {"bytes": len(found), "sha256": digest}
        manifest.write_text(json.dumps(listed))


def card_of(run):
    exported, _ = read_exported(run)
    return str(model_card(exported))


def fields(change, prefix=()):
    """Every text in a nested mapping, by its path."""
    for key, value in change.items():
        if isinstance(value, dict):
            yield from fields(value, (*prefix, key))
        else:
            yield (*prefix, key)


def put(content, path, value):
    for key in path[:-1]:
        content = content[key]
    content[path[-1]] = value


def html_of(card):
    """The page, without its YAML: raw HTML passes through, as on the hub."""
    body = card.split("\n---\n", 1)[1]
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(body)


def is_harmless(card):
    html = html_of(card)
    assert "<script" not in html and "<img" not in html and 'href="http://evil' not in html
    assert "<h1>Owned" not in html and "\x1b" not in card
    titles = re.findall(r"<h2>(.*?)</h2>", html)
    assert titles[0] == "Use" and titles[-1] == "Reproduce"
    for row in re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL):
        assert len(re.findall(r"<t[hd]", row)) == 2


def test_text_of_a_run_is_shown_as_text_in_every_field(run):
    """All at once where that is taken, since a card with all of them has each of them."""

    def plan(config):
        config["plan"]["equation"] = config["plan"]["activation_checkpointing"] = EVIL
        config["plan"]["memory_format"] = EVIL
        config["extensions"] = [[1.0, EVIL]]
        config["data"] = f"folder:{EVIL}"

    edit(run / "config.yaml", plan)
    edit(run / "summary.json", lambda s: s.update(status=EVIL))
    machine = {"command": f"lbaccel train '{EVIL}'", "git_commit": EVIL, "devices": [EVIL],
               "versions": {"torch": EVIL}, "platform": EVIL.replace("-", ""), "python": EVIL,
               "cuda": EVIL, "cpu_count": EVIL}  # fmt: skip
    edit(run / "env.json", lambda env: env.update(machine))
    line = {"update": 1, "plan": EVIL}
    (run / "resumes.jsonl").write_text(json.dumps(line) + "\n")
    edit(newest(run) / "preprocessing.json", lambda pre: pre.update(interpolation=EVIL))
    card = card_of(run)
    assert card.count("alert(1)") > 8
    is_harmless(card)


WRONG = (EVIL, -1, 1e400, True, [], {}, ["x"], [[1]], 10**400, 0.5, None)


# of the settings, those that the card computes with or that are text
# fmt: off
CARD = ("plan", "extensions", "data", "model", "optimizer", "schedule", "epochs", "loss_dropout",
        "norm_batch_size", "batch_schedule", "global_batch_size", "base_lr", "ema_decay")
# fmt: on


@pytest.mark.slow
@pytest.mark.parametrize("file", ["config.yaml", "summary.json", "env.json", "preprocessing.json",
                                  "manifest.json", "classes.json"])  # fmt: skip
def test_a_value_of_any_kind_in_any_field_is_shown_or_refused(file, run):
    """No traceback but that of an InputError, and no card that does harm."""
    path = run / file if (run / file).exists() else newest(run) / file
    original = path.read_text()
    content = (yaml.safe_load if path.suffix == ".yaml" else json.loads)(original)
    if isinstance(content, dict):
        places = [p for p in fields(content) if p[0] in CARD or path.suffix == ".json"]
        places = [p for p in places if p[0] != "files"]
    else:
        places = [(0,), ()]
    refused = 0
    for place in places:
        for value in WRONG:

            def change(found, place=place, value=value):
                if not place:
                    return value if isinstance(value, (list, dict)) else [value]
                put(found, place, value)
                return found

            edit(path, change)
            try:
                is_harmless(card_of(run))
            except (InputError, RunFailed) as error:
                refused += 1
                assert str(error)
            path.write_text(original)
    assert refused


@pytest.mark.parametrize("change, says", [
    ({"img_size": 10**9}, "img_size=1000000000, and lbaccel writes a whole number from 1 to"),
    ({"num_channels": "3); import os"}, "num_channels='3[)]; import os', and lbaccel writes"),
    ({"num_classes": 10**12}, "num_classes=1000000000000, and the weights have at most"),
    ({"mean": [0.5, 0.5]}, r"mean=\[0.5, 0.5\], which is not a finite number for each of the 1"),
    ({"std": [0]}, r"std=\[0\], which is not a number above 0"),
    ({"exif_orientation": 1}, "exif_orientation=1, and lbaccel writes true or false"),
    ({"decoder": "slow"}, "decoder='slow', and lbaccel writes fast or draft or pillow"),
    ({"crop_pct": "1"}, "crop_pct='1', and lbaccel writes a number above 0"),
])  # fmt: skip
def test_preprocessing_that_is_not_of_its_kind_is_named(change, says, run):
    edit(newest(run) / "preprocessing.json", lambda pre: pre.update(change))
    with pytest.raises(InputError, match=f"preprocessing.json gives {says}"):
        read_exported(run)


def test_compare_shows_a_summary_of_wrong_kinds(run, capsys):
    for value in WRONG:
        edit(run / "summary.json", lambda s, v=value: s.update(
            seconds=v, num_updates=v, samples_seen=v, peak_gib=v))  # fmt: skip
        assert cli.main(["compare", str(run), str(run), "--metric", "train/loss"]) == 0
        assert "\x1b" not in capsys.readouterr().out


def export_like(folder, card):
    folder.mkdir()
    for name in FILES:
        (folder / name).write_text("mine")
    (folder / "README.md").write_text(card)
    return folder


@pytest.mark.parametrize("card", [
    "mine", "", "---\nlibrary_name: timm\n---\ntrained by lbaccel\n- lbaccel\n", "- lbaccel\n---\n",
])  # fmt: skip
def test_force_replaces_no_folder_that_only_looks_like_an_export(card, run, tmp_path):
    target = export_like(tmp_path / "repository", card)
    with pytest.raises(InputError, match="no export wrote it, and it is not replaced"):
        check_target(target, run, force=True)


@pytest.mark.parametrize("name", FILES)
def test_force_replaces_no_link_and_no_folder(name, run, tmp_path):
    target = export_like(tmp_path / "out", "---\ntags:\n- lbaccel\n---\n")
    check_target(target, run, force=True)
    (target / name).rename(tmp_path / "mine")
    with pytest.raises(InputError, match="not replaced") if name == "README.md" else (
        _nothing_raised()):  # fmt: skip
        check_target(target, run, force=True)
    (target / name).symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match="not replaced"):
        check_target(target, run, force=True)


def _nothing_raised():
    from contextlib import nullcontext

    return nullcontext()


@pytest.mark.parametrize("token", [TOKEN, "of-another-form"])
def test_a_hubs_answer_that_repeats_the_token_is_printed_without_it(token, tmp_path, monkeypatch):
    class Api:
        def __init__(self, **_): ...

        def create_repo(self, *_, **__):
            raise OSError(f"403 for \x1b[2J Bearer {token} at https://me:{token}@hub/x")

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(RunFailed, match="403 for") as caught:
        hub.push(tmp_path, "a/b", title="x")
    assert token not in str(caught.value) and "\x1b" not in str(caught.value)


@pytest.mark.parametrize("kind", [OSError, RuntimeError])
def test_a_model_that_the_hub_refuses_is_said_without_the_token(kind, monkeypatch):
    def refuse(*_, **__):
        raise kind(f"pretrained: 401 for {TOKEN} and of-another-form")

    monkeypatch.setattr(timm, "create_model", refuse)
    monkeypatch.setattr(models, "get_token", lambda: "of-another-form")
    with pytest.raises((RunFailed, InputError), match="401 for") as caught:
        models.create_backbone("resnet18", num_classes=10, pretrained=True)
    assert TOKEN not in str(caught.value) and "of-another-form" not in str(caught.value)
