"""`lbaccel configs`: ls, cp, validate, make."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lbaccel import cli, plan
from lbaccel.configs.make import choose_stage, launch_command
from lbaccel.errors import InputError
from lbaccel.planning.zero import explain_zero
from lbaccel.recipe.options import OPTIONS

pytestmark = pytest.mark.usefixtures("shared_traces")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def configs(*arguments) -> int:
    return cli.main(["configs", *map(str, arguments)])


def test_ls_has_a_line_for_each(capsys):
    assert configs("ls") == 0
    out, recipes = capsys.readouterr().out.split("\n\nrecipes that --config takes by name:\n")
    lines = out.splitlines()
    assert len(lines) == len(list((ROOT / "accelerate_configs").glob("*.yaml")))
    assert len(recipes.splitlines()) == len(list((ROOT / "recipes").glob("*.yaml")))
    assert any(line.startswith("zero2_offload  ZeRO-2 with the optimizer's") for line in lines)
    assert all(line.endswith(".") for line in lines)


def test_cp_copies_a_pair_and_says_how_to_launch_it(tmp_path, capsys):
    assert configs("cp", "zero2", "--to", tmp_path) == 0
    out = capsys.readouterr().out
    assert f"cd {tmp_path} && accelerate launch --config_file accelerate_configs/zero2.yaml" in out
    assert (tmp_path / "ds_configs" / "zero2.json").is_file()
    assert configs("cp", "zero2", "--to", tmp_path) == 2
    assert "Use --force to overwrite" in capsys.readouterr().err
    assert configs("cp", "zero2", "--to", tmp_path, "--force") == 0
    assert configs("cp", "zero4", "--to", tmp_path) == 2
    (tmp_path / "file").write_text("")
    assert configs("cp", "zero2", "--to", tmp_path / "file") == 2
    assert "can't write" in capsys.readouterr().err


def test_cp_copies_a_recipe_and_says_how_to_use_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert configs("cp", "finetune-small", "zero2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "lbaccel train --config finetune-small.yaml"
    assert "accelerate_configs/zero2.yaml" in lines
    copied, shipped = (
        Path(f, "finetune-small.yaml").read_text() for f in (tmp_path, ROOT / "recipes")
    )
    assert copied == shipped
    assert configs("cp", "finetune-small") == 2
    assert "finetune-small.yaml: there already. Use --force" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=str)
def test_validate_passes_every_shipped_yaml(path, in_root, capsys):
    assert configs("validate", path) == 0, capsys.readouterr().err


def test_validate_prints_every_auto_resolved_for_the_plan(in_root, capsys):
    sizes = ("--micro-batch-size", 64, "--global-batch-size", 4096, "--world-size", 2)
    files = ("accelerate_configs/zero3.yaml", "ds_configs/zero3.json")
    assert configs("validate", *files, *sizes, "--precision", "bf16") == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in out.splitlines() if line}
    assert rows["train_batch_size"] == "4096 micro-batch x accumulation x 2 ranks"
    assert rows["train_micro_batch_size_per_gpu"] == "64 code: the loader"
    assert rows["gradient_accumulation_steps"] == "32 code: Accelerator"
    assert rows["bf16.enabled"] == "true code"
    assert "auto" not in out.split("note:")[0]
    assert "global batch 4096 = 32 micro-batches x 64 samples x 2 ranks" in out
    assert '"gradient_clipping": "auto" is 1.0 in a script of your own' in out


@pytest.mark.parametrize(
    ("enabled", "flags", "say"),
    [
        ({"bf16": True}, (), "DeepSpeed's own, which rounds"),
        ({"bf16": "auto"}, ("--precision", "bf16"), "autocast over float32 weights"),
        ({"bf16": "auto"}, (), None),
        ({"fp16": True}, (), "lbaccel refuses fp16 under DeepSpeed"),
        ({"fp16": "auto"}, ("--precision", "fp16"), "lbaccel refuses fp16 under DeepSpeed"),
    ],
)
def test_validate_says_what_16_bits_mean_in_whose_script(enabled, flags, say, tmp_path, capsys):
    config = json.loads((ROOT / "ds_configs" / "zero1.json").read_text())
    config |= {key: {"enabled": value} for key, value in enabled.items()}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(config))
    assert configs("validate", path, *flags) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    found = [line for line in notes if "bf16" in line or "fp16" in line]
    assert len(found) == (say is not None) and all(say in line for line in found)


def test_validate_says_that_a_full_rectangle_is_not_the_update(in_root, capsys):
    sizes = ("--micro-batch-size", 121, "--global-batch-size", 8192)
    assert configs("validate", "ds_configs/zero1.json", *sizes) == 0
    # 68 micro-batches of at most 121: 68 * 121 = 8228
    assert "train_batch_size 8228 counts full micro-batches" in capsys.readouterr().out


def test_validate_refuses_a_json_without_accumulation_steps(tmp_path, capsys):
    """Trap 2: it means 1, and accelerate only logs that DeepSpeed's value is used."""
    config = json.loads((ROOT / "ds_configs" / "zero1.json").read_text())
    del config["gradient_accumulation_steps"]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(config))
    sizes = ("--micro-batch-size", 2, "--global-batch-size", 8)
    assert configs("validate", path, *sizes) == 2
    said = capsys.readouterr()
    assert "updates of 2 samples in place of 8" in said.err
    assert 'Type "gradient_accumulation_steps": "auto"' in said.err
    row = next(x for x in said.out.splitlines() if x.startswith("gradient_accumulation_steps"))
    assert "accelerate: it is not in the JSON" in row and "4 (code: Accelerator)" in row


def test_validate_takes_what_the_script_says(in_root, capsys):
    sizes = ("--micro-batch-size", 2, "--global-batch-size", 8)
    assert configs("validate", "ds_configs/zero1.json", *sizes, "--accelerator-steps", 3) == 2
    assert "came out as 3, the plan has 4" in capsys.readouterr().err


def test_validate_reads_the_environment_and_says_so(in_root, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    sizes = ("--micro-batch-size", 2, "--global-batch-size", 8)
    assert configs("validate", "accelerate_configs/zero1.yaml", "--world-size", 1, *sizes) == 2
    assert "environment: ACCELERATE_GRADIENT_ACCUMULATION_STEPS" in capsys.readouterr().out


def test_validate_takes_flags_of_the_launcher(in_root, capsys):
    flags = "--num_processes 4 --gradient_accumulation_steps 16"
    assert configs("validate", "accelerate_configs/zero1.yaml", "--launch", flags) == 0
    row = next(
        x for x in capsys.readouterr().out.splitlines() if x.startswith("gradient_accumulation")
    )
    assert row.split()[1:] == ["16", "command", "line"]


def test_validate_refuses_checkpointing_with_other_masks_under_fsdp2(tmp_path, in_root, capsys):
    text = (ROOT / "accelerate_configs" / "fsdp2.yaml").read_text()
    path = tmp_path / "fsdp2.yaml"
    path.write_text(
        text.replace("activation_checkpointing: false", "activation_checkpointing: true")
    )
    assert configs("validate", path) == 2
    assert "wrong by 47 %" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["nothing.yaml"], "is no file"),
        (["nothing.json"], "is no file"),
        (["README.md"], "neither .yaml nor .json"),
        (["ds_configs/zero1.json", "ds_configs/zero2.json"], "one at a time"),
        (["accelerate_configs/zero1.yaml", "ds_configs/zero2.json"], "names ds_configs/zero1.json"),
        (["accelerate_configs/cpu.yaml", "ds_configs/zero2.json"], "does not name"),
        (["ds_configs/zero1.json", "--launch", "--num_processes 2"], "flags for a YAML"),
        (["ds_configs/zero1.json", "--micro-batch-size", "0"], "--micro-batch-size='0'"),
    ],
)
def test_validate_answers_bad_input(files, said, in_root, capsys):
    assert configs("validate", *files) == 2
    assert said in capsys.readouterr().err


def test_validate_looks_for_the_json_from_where_it_is_launched(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert configs("validate", ROOT / "accelerate_configs" / "zero2.yaml") == 2
    assert "starts in the folder that you launch from" in capsys.readouterr().err


MADE = ("--model", "resnet10t", "--img-size", 64, "--num-classes", 10, "--device", "RTX 4060")
MADE += ("--micro-batch-size", 64, "--activation-checkpointing", "none")  # pinned: faster
MADE += ("--memory-format", "contiguous")


@pytest.mark.parametrize(
    "batch",
    [pytest.param(2048), *(pytest.param(b, marks=pytest.mark.slow) for b in (4096, 8192, 16384))],
)
def test_make_writes_a_pair_that_validates_for_its_plan(batch, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ("--global-batch-size", batch, "--memory", "2GiB", "--world-size", 2)
    assert configs("make", *MADE, *arguments) == 0
    out = capsys.readouterr().out
    name = f"resnet10t-gbs{batch}-zero1"
    files = (f"accelerate_configs/{name}.yaml", f"ds_configs/{name}.json")
    assert all(f"\n{path}\n" in out for path in files)
    loaded = yaml.safe_load(Path(files[0]).read_text())
    assert loaded["num_processes"] == 2
    command = out.splitlines()[-1]
    flags = dict(zip(*[iter(shlex.split(command)[6:])] * 2, strict=True))
    assert flags["--global-batch-size"] == str(batch)
    micro = flags["--micro-batch-size"]
    assert f"x {micro} samples x 2 ranks" in out
    sizes = ("--global-batch-size", batch, "--micro-batch-size", micro)
    assert configs("validate", *files, *sizes) == 0
    assert configs("make", *MADE, *arguments) == 2, "nothing is overwritten"
    assert "Use --force" in capsys.readouterr().err


def test_make_says_before_the_run_that_one_device_shards_nothing(tmp_path, capsys):
    arguments = ("--global-batch-size", 256, "--memory", "2GiB", "--to", tmp_path)
    assert configs("make", *MADE, *arguments, "--offload", "optimizer") == 0
    out = capsys.readouterr().out
    assert "one device: ZeRO-1, 2 and 3 shard nothing" in out
    assert "GiB with ZeRO-2 and optimizer on the host, and without ZeRO takes 0.0" in out
    name = "resnet10t-gbs256-zero2_offload"
    assert f"cd {tmp_path} && accelerate launch --config_file accelerate_configs/{name}" in out
    config = json.loads((tmp_path / "ds_configs" / f"{name}.json").read_text())
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert config["zero_force_ds_cpu_optimizer"] is False
    header = (tmp_path / "accelerate_configs" / f"{name}.yaml").read_text()
    assert "# one device: ZeRO-1, 2 and 3 shard nothing" in header


def test_make_writes_nothing_where_nothing_fits(tmp_path, capsys):
    arguments = ("--global-batch-size", 256, "--memory", "520MiB", "--to", tmp_path)
    assert configs("make", *MADE, *arguments) == 1
    assert "Nothing is written. Use --memory" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_stage_and_an_offload_that_do_not_go_together_are_refused():
    with pytest.raises(InputError, match=r"--zero 1 has no --offload optimizer.*Use --zero 2"):
        choose_stage(1, "optimizer", world_size=2)
    with pytest.raises(InputError, match=r"Use --zero 3\."):
        choose_stage(2, "optimizer+parameters", world_size=1)
    assert choose_stage(None, "optimizer+parameters", world_size=1) == 3


@pytest.fixture(scope="module")
def four():
    return plan(
        "resnet10t",
        img_size=64,
        global_batch_size=256,
        memory="4GiB",
        device="RTX 4060",
        world_size=4,
        num_classes=10,
    )


def test_zero_is_explained_with_what_saves_more(four):
    first, second, third, fourth = explain_zero(four)
    assert first.startswith("4 devices, ") and "GiB a device with DDP" in first
    assert "reduces once an update under ZeRO-1 and 2" in second
    saved = next(lever for lever in four.levers if lever.name.startswith("ZeRO-3"))
    assert f"ZeRO-3 saves {saved.gib_saved:.2f} GiB ({saved.time_pct:+.1f} % time)" in first
    assert third.startswith("optimizer offload to the host saves")
    assert "no stage divides them; " in fourth and fourth.endswith("% time")


def test_the_launch_line_has_only_flags_of_the_recipe(four):
    four = replace(four, zero_stage=1)
    flags = {part for part in shlex.split(launch_command(four, img_size=64)) if "--" in part}
    known = {f"--{option.name.replace('_', '-')}" for option in OPTIONS.values()}
    assert flags - {"--config_file"} <= known
    segments = replace(four, activation_checkpointing="segments", segments=(("a",),))
    command = launch_command(segments)
    assert "--activation-checkpointing auto --memory-format" in command
    assert command.endswith("--memory 4GiB")
