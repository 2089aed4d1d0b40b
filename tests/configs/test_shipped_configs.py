"""The shipped YAML and JSON files: accelerate takes them, a wheel carries them, figures hold."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import timm
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin, DistributedType
from setuptools import find_packages

from lbaccel.configs import shipped as module
from lbaccel.configs.shipped import copy, find, folder, shipped
from lbaccel.errors import InputError
from lbaccel.recipe.presets import find_config

ROOT = Path(__file__).parents[2]
ZERO = ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
TYPES = {
    "cpu": DistributedType.NO,
    "single_gpu": DistributedType.NO,
    "multi_gpu": DistributedType.MULTI_GPU,
    "multi_node": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    **dict.fromkeys(ZERO, DistributedType.DEEPSPEED),
}
# bytes a parameter in fp32: weights, gradients, and SGD's momentum
WEIGHTS, GRADIENTS, MOMENTUM = 4, 4, 4
FOUR_GPUS = 3 / 4
SAVED = {
    # DDP's buckets are a copy of the gradient, and DeepSpeed has one of a rank's own weights
    "zero1": FOUR_GPUS * MOMENTUM + GRADIENTS - WEIGHTS / 4,
    "zero2": FOUR_GPUS * MOMENTUM + GRADIENTS - WEIGHTS / 4,
    # gathered weights are whole at the peak, and a rank's own part is held twice
    "zero3": FOUR_GPUS * (MOMENTUM + GRADIENTS) + GRADIENTS - WEIGHTS / 2,
    "fsdp2": FOUR_GPUS * (MOMENTUM + GRADIENTS + WEIGHTS),
    "zero2_offload": MOMENTUM,
    "zero3_offload": MOMENTUM + GRADIENTS,
}
HIDDEN_SIZE_KEYS = (
    "reduce_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
)


@pytest.fixture(scope="module")
def parameters() -> dict[str, int]:
    found = {}
    for title, name in (("ResNet-50", "resnet50"), ("ViT-B", "vit_base_patch16_224")):
        with torch.device("meta"):
            found[title] = sum(p.numel() for p in timm.create_model(name).parameters())
    return found


def config(name: str) -> dict:
    return json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())


def test_every_config_of_the_issue_is_shipped_and_no_json_is_left_over():
    assert {c.name for c in shipped()} == set(TYPES)
    named = {c.json.name for c in shipped() if c.json}
    assert named == {path.name for path in (ROOT / "ds_configs").glob("*.json")}
    assert named == {f"{name}.json" for name in ZERO}


@pytest.mark.parametrize("name", sorted(TYPES))
def test_accelerates_own_loader_takes_it(name):
    loaded = load_config_from_file(str(ROOT / "accelerate_configs" / f"{name}.yaml"))
    assert loaded.distributed_type == TYPES[name]
    assert loaded.use_cpu is (name == "cpu")
    assert (loaded.num_machines, loaded.machine_rank) == (2 if name == "multi_node" else 1, 0)
    if name in ZERO:
        assert loaded.mixed_precision is None
        assert set(loaded.deepspeed_config) == {"deepspeed_config_file", "zero3_init_flag"}
        assert loaded.deepspeed_config["deepspeed_config_file"] == f"ds_configs/{name}.json"


@pytest.mark.parametrize("name", ["cpu", "single_gpu"])
def test_no_is_quoted(name):
    text = (ROOT / "accelerate_configs" / f"{name}.yaml").read_text()
    assert "distributed_type: 'NO'" in text
    assert yaml.safe_load(text)["distributed_type"] == "NO"


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.stem)
def test_the_hidden_size_keys_are_whole_numbers(path):
    """`auto` asks for `model.config.hidden_size`, which no timm model has: it does not start."""
    block = json.loads(path.read_text())["zero_optimization"]
    asked = HIDDEN_SIZE_KEYS if block["stage"] == 3 else HIDDEN_SIZE_KEYS[:1]
    assert {key for key in HIDDEN_SIZE_KEYS if key in block} == set(asked)
    assert all(type(block[key]) is int for key in asked)


@pytest.mark.parametrize("name", ZERO)
def test_what_depends_on_the_plan_is_auto_and_what_replaces_the_optimizer_is_off(name):
    found = config(name)
    batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert {found[key] for key in (*batch, "gradient_clipping")} == {"auto"}
    assert found["bf16"] == found["fp16"] == {"enabled": "auto"}
    offloads = {k: v["device"] for k, v in found["zero_optimization"].items() if "offload_" in k}
    expected = {
        "zero2_offload": {"offload_optimizer": "cpu"},
        "zero3_offload": {"offload_optimizer": "cpu", "offload_param": "cpu"},
    }
    assert offloads == expected.get(name, {})
    keys = ("zero_force_ds_cpu_optimizer", "zero_allow_untested_optimizer")
    assert [found.get(key) for key in keys] == ([False, True] if offloads else [None, None])
    assert "optimizer" not in found and "scheduler" not in found


@pytest.mark.parametrize("name", ZERO)
def test_accelerates_plugin_takes_the_json(name):
    plugin = DeepSpeedPlugin(hf_ds_config=str(ROOT / "ds_configs" / f"{name}.json"))
    assert plugin.zero_stage == int(name[4])
    assert plugin.hf_ds_config.is_offload() is name.endswith("offload")
    plugin.set_mixed_precision("bf16")
    assert plugin.deepspeed_config["bf16"] == {"enabled": True}
    assert plugin.deepspeed_config["fp16"] == {"enabled": False}


@pytest.mark.parametrize("name", sorted(SAVED))
def test_the_figures_in_the_comments_are_bytes_times_parameters(name, parameters):
    text = (ROOT / "accelerate_configs" / f"{name}.yaml").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("# Saves"))
    stated = dict(re.findall(r"(ResNet-50|ViT-B) ([\d.]+) GiB", line))
    expected = {k: f"{SAVED[name] * n / 2**30:.2f}" for k, n in parameters.items()}
    assert stated == expected
    assert any(line.startswith("# Costs: ") for line in text.splitlines())
    if name in ZERO:
        readme = (ROOT / "ds_configs" / "README.md").read_text()
        (row,) = (line for line in readme.splitlines() if line.startswith(f"| `{name}.json`"))
        assert f"= {' / '.join(expected.values())} GiB" in row
        assert all(f"{n:,}" in readme for n in parameters.values())


def test_a_source_checkout_has_them_once_at_its_top():
    assert folder("accelerate_configs") == ROOT / "accelerate_configs"
    assert folder("ds_configs") == ROOT / "ds_configs"
    assert not (ROOT / "lbaccel" / "accelerate_configs").exists()


def test_a_wheel_carries_them_and_every_package(tmp_path, monkeypatch):
    leftovers = shutil.ignore_patterns(".git", "__pycache__", "*.egg-info", "build")

    def left_out(folder, names):  # `lbaccel/runs` is a package, `runs` at the top is not
        return {*leftovers(folder, names), *({"runs", "tests"} if Path(folder) == ROOT else ())}

    shutil.copytree(ROOT, tmp_path / "source", ignore=left_out)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    command += ["--no-index", "-w", str(tmp_path), str(tmp_path / "source")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    installed = tmp_path / "site" / "lbaccel"
    for name, pattern in (
        ("accelerate_configs", "*.yaml"),
        ("ds_configs", "*.json"),
        ("recipes", "*.yaml"),
    ):
        ours = {p.name: p.read_bytes() for p in (ROOT / name).glob(pattern)}
        assert {p.name: p.read_bytes() for p in (installed / name).iterdir()} == ours
    for path in (ROOT / "lbaccel/report").glob("*.*[!y]"):  # template, style and script of a page
        assert (installed / "report" / path.name).read_bytes() == path.read_bytes()
    packages = {p.parent.relative_to(tmp_path / "site") for p in installed.rglob("__init__.py")}
    assert {".".join(p.parts) for p in packages} == set(find_packages(str(ROOT), ("tests*",)))
    assert not [p for p in (tmp_path / "site").iterdir() if not p.name.startswith("lbaccel")]
    monkeypatch.setattr(module, "PACKAGE", installed)
    assert folder("ds_configs") == installed / "ds_configs"
    assert find_config("finetune-small").path == installed / "recipes" / "finetune-small.yaml"
    assert {c.name for c in shipped()} == set(TYPES)


def test_a_copy_is_byte_equal_keeps_its_path_and_overwrites_nothing(tmp_path, monkeypatch):
    written = copy([find("zero2"), find("cpu")], tmp_path)
    assert {str(p.relative_to(tmp_path)) for p in written} == {
        "accelerate_configs/zero2.yaml",
        "ds_configs/zero2.json",
        "accelerate_configs/cpu.yaml",
    }
    assert all(p.read_bytes() == (ROOT / p.relative_to(tmp_path)).read_bytes() for p in written)
    monkeypatch.chdir(tmp_path)
    loaded = load_config_from_file("accelerate_configs/zero2.yaml")
    assert Path(loaded.deepspeed_config["deepspeed_config_file"]).is_file()
    mine = tmp_path / "ds_configs" / "zero2.json"
    mine.write_text("mine")
    with pytest.raises(InputError, match=r"zero2.json: there already. Use --force"):
        copy([find("zero1"), find("zero2")], tmp_path)
    assert mine.read_text() == "mine"
    assert not (tmp_path / "ds_configs" / "zero1.json").exists(), "all or none"
    copy([find("zero2")], tmp_path, force=True)
    assert mine.read_bytes() == (ROOT / "ds_configs" / "zero2.json").read_bytes()


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(InputError, match=r"no config is called 'zero2_ofload'.*Use zero2_offload"):
        find("zero2_ofload")
    with pytest.raises(InputError, match="lbaccel configs ls"):
        find("qqq")
