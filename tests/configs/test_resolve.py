"""Configs as accelerate resolves them: its own `prepare` is the reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, patch_environment

from lbaccel.configs.claims import ScriptArguments
from lbaccel.configs.launcher import launch
from lbaccel.configs.make import deepspeed_config
from lbaccel.configs.resolve import read_json, resolve
from lbaccel.errors import InputError

ROOT = Path(__file__).parents[2]
MICRO, WORLD = 4, 2
MISSING = object()
STEPS = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"


class Reached(Exception):
    """Stands for `deepspeed.initialize`: carries what it would have got."""


def accelerates(config, *, code=1, plugin=None, environment=None, precision=None, world=WORLD):
    """What accelerate's own `prepare` hands to DeepSpeed, caught at its door."""
    deepspeed = pytest.importorskip("deepspeed")
    model = torch.nn.Linear(2, 2)
    data = torch.utils.data.TensorDataset(torch.zeros(8, 2))
    loader = torch.utils.data.DataLoader(data, batch_size=MICRO)

    def initialize(**arguments):
        raise Reached(arguments["config_params"])

    with pytest.MonkeyPatch.context() as patch, patch_environment(**(environment or {})):
        patch.setattr(deepspeed, "initialize", initialize)
        patch.setattr(Accelerator, "num_processes", property(lambda _: world))
        patch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        accelerator = Accelerator(
            gradient_accumulation_steps=code,
            mixed_precision=precision,
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config, **(plugin or {})),
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(Reached) as reached:
            accelerator.prepare(model, optimizer, loader)
    return {k: v for k, v in reached.value.args[0].items() if k != "steps_per_print"}


def a_config(steps=MISSING, **keys):
    config = {**deepspeed_config(1), **keys}
    del config["gradient_accumulation_steps"]
    return config if steps is MISSING else {**config, "gradient_accumulation_steps": steps}


def said_by(who: str) -> tuple[ScriptArguments, dict[str, str]]:
    """4 accumulation steps, said in one of three places; Accelerator's own default is 1."""
    code = 4 if who == "code" else 1
    plugin = {"gradient_accumulation_steps": 4} if who == "plugin" else {}
    script = ScriptArguments(
        micro_batch_size=MICRO, gradient_accumulation_steps=code, plugin=plugin
    )
    return script, {STEPS: "4"} if who == "env" else {}


@pytest.mark.parametrize("who", ["plugin", "code", "env"])
@pytest.mark.parametrize(
    ("steps", "expected"), [("auto", 4), (8, 8), (MISSING, 1)], ids=["auto", "8", "missing"]
)
def test_the_matrix_of_accumulation_steps_comes_out_as_in_accelerate(who, steps, expected):
    script, environment = said_by(who)
    found = resolve(a_config(steps), script, world_size=WORLD, environment=environment)
    assert not found.problems
    assert found.batch == (MICRO, expected, MICRO * expected * WORLD)
    reference = accelerates(
        a_config(steps),
        code=script.gradient_accumulation_steps,
        plugin=script.plugin,
        environment=environment,
    )
    assert dict(found.config) == reference
    (row,) = (row for row in found.rows if row.key == "gradient_accumulation_steps")
    places = {"plugin": "code: DeepSpeedPlugin", "code": "code: Accelerator"}
    place = places.get(who, f"environment: {STEPS}")
    winners = {4: place, 8: "JSON", 1: "accelerate: it is not in the JSON"}
    assert row.decided_by == winners[expected]
    assert (f"4 ({place})" in row.over) is (expected != 4)


@pytest.mark.parametrize("who", ["plugin", "code", "env"])
def test_steps_as_text_are_a_clear_error_where_accelerate_trips_over_its_own_arithmetic(who):
    script, environment = said_by(who)
    found = resolve(a_config("8"), script, world_size=WORLD, environment=environment)
    (problem,) = found.problems
    assert '"gradient_accumulation_steps": "8" is no whole number' in problem
    assert 'Type "gradient_accumulation_steps": "auto".' in problem
    with pytest.raises(TypeError, match="//: 'str' and 'int'"):
        accelerates(
            a_config("8"),
            code=script.gradient_accumulation_steps,
            plugin=script.plugin,
            environment=environment,
        )


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_every_shipped_json_resolves_as_in_accelerate(name, precision):
    config = read_json(ROOT / "ds_configs" / f"{name}.json")
    script = ScriptArguments(
        micro_batch_size=MICRO, gradient_accumulation_steps=16, mixed_precision=precision
    )
    found = resolve(config, script, world_size=WORLD)
    assert not found.problems
    assert found.batch == (4, 16, 128)
    assert "auto" not in json.dumps(dict(found.config))
    assert dict(found.config) == accelerates(config, code=16, precision=precision)
    values = {row.key: (row.value, row.decided_by) for row in found.rows}
    assert values["bf16.enabled"] == (precision == "bf16", "code")
    assert values["gradient_clipping"] == (1.0, "accelerate")


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_what_make_writes_is_what_is_shipped(name):
    offload = {"zero2_offload": "optimizer", "zero3_offload": "optimizer+parameters"}
    made = deepspeed_config(int(name[4]), offload.get(name, "none"))
    assert made == json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())


def test_the_plugin_without_a_json_clips_at_1_in_silence():
    """A YAML block without gradient_clipping: 2.2533 in place of 2.7864 (traps)."""
    script = ScriptArguments(micro_batch_size=MICRO, gradient_accumulation_steps=2)
    environment = {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}
    found = resolve(None, script, world_size=WORLD, environment=environment)
    assert found.config["gradient_clipping"] == 1.0
    assert found.config["zero_optimization"]["stage"] == 1
    assert dict(found.config) == accelerates(None, code=2, environment=environment)
    values = {row.key: row.decided_by for row in found.rows}
    assert values["gradient_clipping"] == "accelerate"
    assert values["zero_optimization.stage"] == ("environment: ACCELERATE_DEEPSPEED_ZERO_STAGE")


def problem(config, **script) -> str:
    asked = {"micro_batch_size": 4, "gradient_accumulation_steps": 2, **script}
    found = resolve(config, ScriptArguments(**asked), world_size=2)
    (only,) = found.problems
    return only


@pytest.mark.parametrize(
    ("key", "size"),
    [
        ("reduce_bucket_size", "5000000"),
        ("stage3_prefetch_bucket_size", "5000000"),
        ("stage3_param_persistence_threshold", "100000"),
    ],
)
def test_auto_that_asks_for_a_hidden_size_is_named(key, size):
    config = deepspeed_config(3)
    config["zero_optimization"][key] = "auto"
    said = problem(config)
    assert "model.config.hidden_size" in said and said.endswith(f'Type "{key}": {size}.')


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"train_batch_size": 100}, r"train_batch_size 100 is not 4 x 2 x 2 = 16"),
        ({"train_micro_batch_size_per_gpu": "4"}, r'"4" is no whole number'),
        ({"train_micro_batch_size_per_gpu": True}, r"true is no whole number"),
        ({"gradient_clipping": "1"}, r'Type "gradient_clipping": 0.0 for none'),
        ({"bf16": {"enabled": "yes"}}, r'Type true, false or "auto"'),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, r"both enabled"),
        ({"optimizer": {"type": "Adam", "params": {"lr": 0.1}}}, r"Take 'optimizer' out"),
        ({"scheduler": {"type": "WarmupLR", "params": {"a": 1}}}, r"Take 'scheduler' out"),
        ({"prescale_gradients": "auto"}, r'"prescale_gradients": "auto".*nobody fills it in'),
    ],
)
def test_what_accelerate_or_deepspeed_would_stop_at_is_said_with_the_line_to_type(keys, said):
    import re

    assert re.search(said, problem({**deepspeed_config(1), **keys}))


def test_a_json_without_zero_or_sizes_is_told_what_to_add():
    assert 'Type "zero_optimization": {"stage": 1}.' in problem({"train_batch_size": "auto"})
    bare = {"zero_optimization": {"stage": 1}}
    assert "neither train_batch_size nor" in problem(bare)


def test_precision_in_json_against_code_is_an_error():
    config = {**deepspeed_config(1), "fp16": {"enabled": True}}
    assert "cannot be set to `bf16`" in problem(config, mixed_precision="bf16")


def test_whole_numbers_that_fit_are_kept_and_the_third_is_derived():
    config = {**deepspeed_config(1), "train_batch_size": 64}
    del config["train_micro_batch_size_per_gpu"]
    script = ScriptArguments(micro_batch_size=4, gradient_accumulation_steps=8)
    assert resolve(config, script, world_size=2).batch == (4, 8, 64)
    config = {**deepspeed_config(1), "train_micro_batch_size_per_gpu": 16}
    found = resolve(config, script, world_size=2)
    assert found.batch == (16, 8, 256)
    (row,) = (row for row in found.rows if row.key == "train_micro_batch_size_per_gpu")
    assert (row.decided_by, row.over) == ("JSON", "4 (code: the loader)")


def test_a_variable_that_is_no_number_is_said():
    script = ScriptArguments(micro_batch_size=4, gradient_accumulation_steps=8)
    found = resolve(deepspeed_config(1), script, world_size=1, environment={STEPS: "many"})
    assert f"unset {STEPS}" in found.problems[0]


# -- the launcher ---------------------------------------------------------------------------------


def a_yaml(tmp_path, text="", **keys) -> Path:
    path = tmp_path / "a.yaml"
    base = {"distributed_type": "DEEPSPEED", "num_processes": 2, "num_machines": 1, **keys}
    path.write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in base.items()) + text)
    return path


def through(path: Path, config=None, *, flags=(), environment=None, steps=2, precision=None):
    started = launch(path, flags=flags, environment=environment or {})
    script = ScriptArguments(
        micro_batch_size=4, gradient_accumulation_steps=steps, mixed_precision=precision
    )
    return started, resolve(config, script, world_size=started.world_size, launch=started)


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_every_shipped_pair_resolves(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = ROOT / "accelerate_configs" / f"{name}.yaml"
    config = read_json(ROOT / "ds_configs" / f"{name}.json")
    flags = ("--num_processes", "2", "--mixed_precision", "bf16")
    started, found = through(path, config, flags=flags)
    assert (started.distributed_type, started.world_size) == ("DEEPSPEED", 2)
    assert not started.problems and not found.problems
    assert found.batch == (4, 2, 16)
    decided = {row.key: (row.value, row.decided_by) for row in (*started.rows, *found.rows)}
    assert decided["num_processes"] == (2, "command line")
    assert decided["bf16.enabled"] == (True, "command line")
    assert decided["fp16.enabled"] == (False, "command line")


@pytest.mark.parametrize(
    "key", ["gradient_accumulation_steps", "gradient_clipping", "zero_stage", "mixed_precision"]
)
def test_a_key_beside_deepspeed_config_file_is_named_with_its_place(key, tmp_path):
    values = {"mixed_precision": "bf16", "zero_stage": 2, "gradient_clipping": 1.0}
    block = {"deepspeed_config_file": "x.json", "zero3_init_flag": False}
    keys = {key: values.get(key, 4)}
    if key == "mixed_precision":
        path = a_yaml(tmp_path, deepspeed_config=block, **keys)
    else:
        path = a_yaml(tmp_path, deepspeed_config={**block, **keys})
    _, found = through(path, deepspeed_config(1))
    (said,) = found.problems
    assert said.startswith(f"the YAML has {key} beside deepspeed_config_file")
    if key == "mixed_precision":
        _, found = through(path, deepspeed_config(1), flags=("--mixed_precision", "bf16"))
        assert not found.problems, "on the command line it works"


def test_the_order_is_code_then_command_line_then_yaml_then_environment(tmp_path):
    block = {"gradient_accumulation_steps": 4, "zero_stage": 1, "gradient_clipping": 0.5}
    path = a_yaml(tmp_path, deepspeed_config=block, mixed_precision="bf16")
    environment = {STEPS: "16", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}
    flags = ("--gradient_accumulation_steps", "8")

    def row(key, **how):
        _, found = through(path, environment=environment, **how)
        assert not found.problems
        (row,) = (row for row in found.rows if row.key == key)
        return row.value, row.decided_by

    assert row("gradient_accumulation_steps", flags=flags) == (8, "command line")
    assert row("gradient_accumulation_steps") == (4, "YAML")
    assert row("gradient_clipping") == (0.5, "YAML")
    assert row("bf16.enabled") == (True, "YAML")
    assert row("bf16.enabled", flags=("--mixed_precision", "no")) == (False, "command line")
    assert row("bf16.enabled", precision="no") == (False, "code")
    device = "zero_optimization.offload_optimizer.device"
    variable = "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"
    assert row(device) == ("cpu", f"environment: {variable}")


def test_use_cpu_with_several_processes_starts_one_and_says_so(tmp_path):
    keys = {"distributed_type": "NO", "use_cpu": True}
    started = launch(a_yaml(tmp_path, **keys), environment={})
    assert started.world_size == 1
    (said,) = started.problems
    assert "num_processes is 2, but accelerate starts 1 process: use_cpu is true" in said
    assert "torchrun --nproc_per_node 2" in said
    one = launch(a_yaml(tmp_path, **{**keys, "num_processes": 1}), environment={})
    assert not one.problems


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("distributed_type: NO\n", "Type distributed_type: 'NO'."),
        ("distributed_type: [\n", "is no YAML"),
        ("- a\n", "holds no keys"),
        ("num_processes: 1\n", "`distributed_type` must be specified"),
        ("distributed_type: 'NO'\nnum_proceses: 1\n", "unknown keys"),
        ("distributed_type: NOPE\n", "accelerate refuses it"),
        ("distributed_type: MULTI_GPU\n", "manually pass in `--num_processes`"),
    ],
)
def test_a_yaml_that_can_not_be_used_is_said(text, said, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=said.replace("(", r"\(").replace("[", r"\[")):
        launch(path, environment={})


def test_an_unknown_flag_of_the_launcher_is_said(tmp_path):
    with pytest.raises(InputError, match="accelerate launch --num_procs 4"):
        launch(a_yaml(tmp_path), flags=("--num_procs", "4"), environment={})
