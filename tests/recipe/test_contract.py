"""The contract is in the checkpoint: an edit of config.yaml is refused by name, or harmless."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from runs_of_recipe import newest, run, tensors, whole, without_contract

from lbaccel import InputError, train
from lbaccel.recipe.contract import CHANGEABLE, VALUES, names_allowed, read_contract
from lbaccel.recipe.options import OPTIONS
from lbaccel.recipe.resume import resolve
from lbaccel.recipe.settings import parse, read_settings

CONTRACT = [name for name, row in OPTIONS.items() if row.contract or name == "epochs"]
# Another value that can be read, for each setting.
OTHER = {
    **dict.fromkeys(("model", "checkpoint", "batch_decisions"), "other"),
    **dict.fromkeys(("mean", "std", "factor", "batch_sizes", "lr_factors", "milestones"), (1, 2)),
    **dict.fromkeys(("betas", "loss_dropout"), (0.5, 0.6)),
    "data": "cifar10",
    "model_kwargs": {"stem": 8},
    "zero_init_last": True,
    "auto_augment": "rand-m9",
    "class_weights": "balanced",
    **dict.fromkeys(("scale", "ratio"), (0.5, 1)),
    "optimizer": "adamw",
    "warmup_start": "zero",
    "norm_batch_size": "frozen",
    "lr_groups": "three",
}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    return run("--max-updates", 4, output=tmp_path_factory.mktemp("begun"))


def edited(begun, change, *, whole=True):
    """A copy of the run, with its config.yaml changed by a function of its content."""
    folder = Path("copy") / begun.name
    shutil.rmtree(folder, ignore_errors=True)
    heavy = () if whole else ("*.safetensors", "state.pt", "plots", "metrics*")
    shutil.copytree(begun, folder, symlinks=True, ignore=shutil.ignore_patterns(*heavy))
    path = folder / "config.yaml"
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return folder


def settings_of(folder, *flags):
    return resolve(read_settings(["--resume", str(folder), *flags])[0])


def other(name, value):
    """A value of the setting that is not this one."""
    if name in OTHER:
        return OTHER[name]
    row = OPTIONS[name]
    if row.choices:
        return next(choice for choice in row.choices if choice != value)
    if isinstance(value, bool) or isinstance(row.default, bool):
        return not value
    tried = (3, 0.5) if value in (None, "auto") else (value + 1, 0.5, 0.25)
    return next(number for number in tried if number != value and is_taken(row, number))


def is_taken(row, number):
    try:
        parse(row, number, "a test")
    except InputError:
        return False
    return True


@pytest.mark.parametrize("name", CONTRACT)
def test_an_edit_of_the_contract_is_refused_by_its_name(name, begun):
    def change(content):
        value = other(name, content[name])
        content[name] = list(value) if isinstance(value, tuple) else value

    folder = edited(begun, change, whole=False)
    with pytest.raises(InputError, match=rf"differs from the contract.*\b{name}: "):
        settings_of(folder)


@pytest.mark.parametrize("name", [*CONTRACT, "origin", "asked", "extensions", "data_identity"])
def test_a_lost_line_is_the_contract_s(name, begun):
    truth = settings_of(begun)
    found = settings_of(edited(begun, lambda content: content.pop(name), whole=False))
    assert found.values() | {"resume": 0} == truth.values() | {"resume": 0}
    for field in ("asked", "extensions", "identity"):
        assert getattr(found, field) == getattr(truth, field)


@pytest.mark.parametrize("wrong", [[1, [2]], {"a": 1}, "no such", True])
@pytest.mark.parametrize("name", CONTRACT)
def test_a_value_of_a_wrong_type_is_refused_by_its_name(name, wrong, begun):
    def change(content):
        content[name] = wrong

    kept = settings_of(begun).value(name)
    try:
        found = settings_of(edited(begun, change, whole=False))
    except InputError as error:
        assert name in str(error)
    else:  # another way to write the same
        assert found.value(name) == kept


def test_lines_that_are_for_people_are_passed_over(begun):
    def change(content):
        content |= {"origin": 5, "asked": "all", "data_identity": [], "plan": None}
        content |= {"extensions": "?", "changes": 1}

    found, truth = settings_of(edited(begun, change)), settings_of(begun)
    assert (found.asked, found.identity) == (truth.asked, truth.identity)


def test_an_edit_of_the_plan_goes_on(begun):
    folder = edited(begun, lambda content: content.update(micro_batch_size=16, workers=0))
    assert settings_of(folder).batch.micro_batch_size == 16


def test_the_command_line_says_it_and_a_lost_seed_ends_as_the_unbroken_run(begun, capsys):
    folder = edited(begun, lambda content: content.update(optimizer="adamw"))
    assert train.main(["--resume", str(folder)]) == 2
    assert "optimizer: adamw in place of sgd" in capsys.readouterr().err
    folder = edited(begun, lambda content: content.pop("seed"))
    assert train.main(["--resume", str(folder), "--max-updates", "100"]) == 0
    found, truth = tensors(folder), tensors(whole())
    assert all((found[key] == truth[key]).all() for key in truth)


def test_a_change_that_is_allowed_is_said_and_recorded_and_goes_on_without_the_flag(begun, capsys):
    folder = edited(begun, lambda content: content.update(label_smoothing=0.1, final_lr=0.01))
    resumed = ["--resume", str(folder), "--max-updates", "6"]
    assert train.main([*resumed, "--allow-changed", "label_smoothing"]) == 2
    assert "final_lr: 0.01 in place of 0. " in capsys.readouterr().err
    flags = ["--allow-changed", "label_smoothing", "--allow-changed", "final-lr"]
    assert train.main([*resumed, *flags]) == 0
    out = capsys.readouterr().out
    assert "label_smoothing is 0.1 from update 4 on, in place of 0" in out
    contract = read_contract(newest(folder))
    assert contract[VALUES]["final_lr"] == 0.01
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["changes"] == contract["changes"]
    assert config["changes"][1] == {
        "name": "label_smoothing",
        "before": 0.0,
        "after": 0.1,
        "update": 4,
    }
    assert train.main(["--resume", str(folder), "--max-updates", "100"]) == 0
    assert len(yaml.safe_load((folder / "config.yaml").read_text())["changes"]) == 2
    truth = tensors(whole())
    assert any((v != truth[k]).any() for k, v in tensors(folder).items())  # it has an effect


def test_a_change_may_be_typed_and_auto_finds_the_run_again(begun):
    folder = edited(begun, lambda content: None)
    (path,) = Path("copy").iterdir()
    typed = [*json.loads(json.dumps(settings_of(folder).asked))]
    assert typed and path == folder
    flags = ["--clip-grad-norm", "0.5", "--allow-changed", "clip_grad_norm"]
    found = settings_of(folder, *flags)
    assert found.optimizer.clip_grad_norm == 0.5 and found.asked["clip_grad_norm"] == 0.5
    with pytest.raises(InputError, match="this setting decides its result"):
        settings_of(folder, *flags[:2])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("label_smoothin", "Did you mean label_smoothing"),
        ("optimizer", "--checkpoint"),
        ("epochs", "--extend"),
        ("micro_batch_size", "no part of the contract"),
    ],
)
def test_what_no_resume_can_change_is_refused(words, says):
    with pytest.raises(InputError, match=says):
        names_allowed([words])
    with pytest.raises(InputError, match="Add --resume"):
        resolve(read_settings(["--allow-changed", "mixup"])[0])
    assert set(CONTRACT) >= CHANGEABLE


def test_a_damaged_contract_is_refused_by_the_checksums(begun, capsys):
    folder = edited(begun, lambda content: None)
    path = newest(folder) / "contract.json"
    path.write_text(path.read_text().replace('"seed": 4', '"seed": 5'))
    assert train.main(["--resume", str(newest(folder))]) == 2
    assert "contract.json is damaged" in capsys.readouterr().err


def test_a_damaged_contract_counts_for_nothing(begun):
    path = newest(edited(begun, lambda content: None)) / "contract.json"
    path.write_text(path.read_text().replace('"seed": 4', '"seed": 5'))
    with pytest.raises(InputError, match="damaged"):
        read_contract(path.parent)


def test_a_newest_checkpoint_that_is_refused_leaves_no_contract_that_nobody_compared(begun, capsys):
    folder = edited(begun, lambda content: content.update(label_smoothing=0.1))
    resumed = ["--resume", str(folder)]
    allowed = ["--allow-changed", "label_smoothing"]
    assert train.main([*resumed, *allowed, "--max-updates", "6"]) == 0
    (newest(folder) / "state.pt").write_bytes(b"damaged")
    capsys.readouterr()
    assert train.main([*resumed, "--max-updates", "8"]) == 2
    assert "to have the two compared" in capsys.readouterr().err
    older = ["--resume", str(folder / "checkpoints" / "update_000004"), "--max-updates", "8"]
    assert train.main(older) == 2
    assert "label_smoothing: 0.1 in place of 0" in capsys.readouterr().err
    assert train.main([*older, *allowed]) == 0


def test_a_run_of_before_says_that_its_contract_can_not_be_checked(begun, capsys):
    folder = edited(begun, lambda content: None)
    without_contract(folder)
    assert train.main(["--resume", str(folder), "--max-updates", "6"]) == 0
    assert "holds no contract, so config.yaml can't be checked" in capsys.readouterr().out
    assert read_contract(newest(folder)) is not None  # from here on it can be
