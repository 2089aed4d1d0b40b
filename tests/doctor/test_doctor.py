"""`lbaccel doctor`: every check fires on its trap, and keeps quiet where it is mended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lbaccel import cli
from lbaccel.commands import doctor as command
from lbaccel.configs.make import deepspeed_config
from lbaccel.doctor.checks import CHECKS, diagnose
from lbaccel.doctor.facts import Environment, gather, this_environment
from lbaccel.doctor.script import read_script
from lbaccel.errors import InputError

ROOT = Path(__file__).parents[2]
GOOD = {
    "accelerate": "1.15.0",
    "deepspeed": "0.19.8",
    "transformers": "5.23.0",
    "torch": "2.15.0",
    "torchvision": "0.29.2",
    "ninja": "1.13.2",
}
GPUS = {"num_gpus": 2, "compiler": "/usr/bin/c++", "nvcc": "/usr/bin/nvcc"}
CPU = {**GPUS, "num_gpus": 0, "nvcc": None}
NO = "distributed_type: 'NO'\nnum_processes: 1\n"
ZERO = "distributed_type: DEEPSPEED\nnum_processes: 2\nnum_machines: 1\n"
FSDP = "distributed_type: FSDP\nnum_processes: 2\nnum_machines: 1\n"
FSDP2 = FSDP + "fsdp_config:\n  fsdp_version: 2\n  fsdp_cpu_ram_efficient_loading: false\n"
BLOCK = ZERO + "deepspeed_config:\n  zero_stage: 1\n"


def named(extra: str = "", top: str = "") -> str:
    return f"{ZERO}{top}deepspeed_config:\n  deepspeed_config_file: ds.json\n{extra}"


def json_of(stage: int = 1, offload: str = "none", zero: dict | None = None, **keys) -> dict:
    config = {**deepspeed_config(stage, offload), **keys}
    config["zero_optimization"] |= zero or {}
    return {key: value for key, value in config.items() if value is not None}


def script_of(*lines: str, accelerator: str = "Accelerator()") -> str:
    return "\n".join([f"accelerator = {accelerator}", *lines]) + "\n"


LBACCEL = "large_batch = LargeBatch(accelerator, plan)"
LOADERS = ("train = DataLoader(a, 32)", "val = DataLoader(b, 8)")
GLOO = 'h = InitProcessGroupKwargs(backend="gloo")'
SCHEDULER = "s = torch.optim.lr_scheduler.CosineAnnealingLR(o, 10)"
SEARCH = "@find_executable_batch_size(starting_batch_size=256)\ndef train(batch_size):"


def with_packages(**changed) -> dict:
    return {**GPUS, "packages": {**GOOD, **changed}}


# check: (what makes it fire, the same mended)
CASES: dict[str, tuple[dict, dict]] = {
    "deepspeed-missing": (
        {"ds": json_of(), "env": with_packages(deepspeed=None)},
        {"env": with_packages(deepspeed=None)},
    ),
    "transformers-missing": (
        {"ds": json_of(), "env": with_packages(transformers=None)},
        {"env": with_packages(transformers=None)},
    ),
    "compiler-missing": (
        {"ds": json_of(), "env": {**CPU, "compiler": None}},
        {"ds": json_of(), "env": {**GPUS, "compiler": None}},
    ),
    "ninja-missing": (
        {
            "ds": json_of(2, "optimizer", zero_force_ds_cpu_optimizer=True),
            "env": with_packages(ninja=None),
        },
        {"ds": json_of(2, "optimizer"), "env": with_packages(ninja=None)},
    ),
    "stale-build-lock": (
        {"env": {**GPUS, "stale_locks": ("caches/cpu_adam/lock",)}},
        {"env": GPUS},
    ),
    "deepspeed-without-nvcc": (
        {"env": {**with_packages(deepspeed="0.19.7"), "nvcc": None}},
        {"env": {**with_packages(), "nvcc": None}},
    ),
    "zero3-frozen-recompute": (
        {"ds": json_of(3), "env": with_packages(deepspeed="0.19.2")},
        {"ds": json_of(3), "env": with_packages(deepspeed="0.19.3")},
    ),
    "accelerate-old": (
        {"env": with_packages(accelerate="1.14.2")},
        {"env": with_packages(accelerate="1.15.0")},
    ),
    "torchvision-of-another-build": (
        {"env": with_packages(torch="2.15.0+cpu", torchvision="0.29.2")},
        {"env": with_packages(torch="2.15.0+cpu", torchvision="0.29.2+cpu")},
    ),
    "unquoted-no": ({"yaml": "distributed_type: NO\nnum_processes: 1\n"}, {"yaml": NO}),
    "one-process-in-silence": (
        {"yaml": "distributed_type: 'NO'\nuse_cpu: true\nnum_processes: 2\n"},
        {"yaml": "distributed_type: 'NO'\nuse_cpu: true\nnum_processes: 1\n"},
    ),
    "key-beside-json": (
        {"yaml": named(top="mixed_precision: bf16\n"), "ds": json_of()},
        {"yaml": named(), "ds": json_of()},
    ),
    "fsdp2-recompute": (
        {"yaml": FSDP2 + "  fsdp_activation_checkpointing: true\n"},
        {"yaml": FSDP2 + "  fsdp_activation_checkpointing: false\n"},
    ),
    "fsdp2-on-cpu": ({"yaml": FSDP2, "env": CPU}, {"yaml": FSDP2, "env": GPUS}),
    "zero3-init": (
        {"yaml": named("  zero3_init_flag: true\n"), "ds": json_of(3)},
        {"yaml": named("  zero3_init_flag: false\n"), "ds": json_of(3)},
    ),
    "block-clips-at-1": ({"yaml": BLOCK}, {"yaml": BLOCK + "  gradient_clipping: 0.0\n"}),
    "json-clips-at-1": (
        {"ds": json_of(), "script": script_of("accelerator.clip_grad_norm_(p, 5.0)")},
        {"ds": json_of(gradient_clipping=5.0), "script": script_of()},
    ),
    "hidden-size": (
        {"ds": json_of(3, zero={"stage3_param_persistence_threshold": "auto"})},
        {"ds": json_of(3)},
    ),
    "accumulation-fixed-in-json": (
        {"ds": json_of(gradient_accumulation_steps=None)},
        {"ds": json_of()},
    ),
    "optimizer-replaced": (
        {"ds": json_of(2, "optimizer", zero_force_ds_cpu_optimizer=None)},
        {"ds": json_of(2, "optimizer")},
    ),
    "bf16-of-deepspeed": (
        {"ds": json_of(bf16={"enabled": True}), "model": "resnet18"},
        {"ds": json_of(bf16={"enabled": "auto"}), "model": "resnet18"},
    ),
    "large-bucket": (
        {"ds": json_of(zero={"reduce_bucket_size": 500_000_000})},
        {"ds": json_of()},
    ),
    "recompute-in-json": (
        {"ds": json_of(activation_checkpointing={"partition_activations": True})},
        {"ds": json_of()},
    ),
    "universal-checkpoint": (
        {"ds": json_of(checkpoint={"load_universal": True})},
        {"ds": json_of(checkpoint={"load_universal": False})},
    ),
    "zero-on-one-device": (
        {"yaml": named().replace("processes: 2", "processes: 1"), "ds": json_of(2)},
        {"yaml": named().replace("processes: 2", "processes: 1"), "ds": json_of(2, "optimizer")},
    ),
    "unresolved": (
        {"ds": json_of(train_batch_size=7, train_micro_batch_size_per_gpu="4")},
        {"ds": json_of(train_batch_size=7)},
    ),
    "ragged-tail": (
        {"script": script_of("with accelerator.accumulate(model):", "    pass")},
        {"script": script_of(LBACCEL)},
    ),
    "scheduler-prepared": (
        {"script": script_of(SCHEDULER, "m, o, s = accelerator.prepare(m, o, s)")},
        {"script": script_of(SCHEDULER, "m, o = accelerator.prepare(m, o)")},
    ),
    "batch-norm-accumulated": (
        {
            "model": "resnet18",
            "script": script_of(accelerator="Accelerator(gradient_accumulation_steps=4)"),
        },
        {
            "model": "vit_tiny_patch16_224",
            "script": script_of(accelerator="Accelerator(gradient_accumulation_steps=4)"),
        },
    ),
    "batch-norm-recomputed": (
        {"model": "resnet18", "script": script_of("model.set_grad_checkpointing(True)")},
        {
            "model": "vit_tiny_patch16_224",
            "script": script_of("model.set_grad_checkpointing(True)"),
        },
    ),
    "one-rank-searches": (
        {"script": script_of(SEARCH, "    pass")},
        {"script": script_of("def train(batch_size):", "    pass")},
    ),
    "batch-drifts": (
        {"script": script_of(SEARCH, "    steps = 256 // batch_size")},
        {"script": script_of("steps = 256 // batch_size")},
    ),
    "divided-twice": (
        {
            "script": script_of(
                "loss = loss / gradient_accumulation_steps",
                "accelerator.backward(loss)",
                accelerator="Accelerator(gradient_accumulation_steps=4)",
            )
        },
        {
            "script": script_of(
                "loss = loss / gradient_accumulation_steps", "accelerator.backward(loss)"
            )
        },
    ),
    "wandb-mode-late": (
        {"script": 'wandb.init()\nos.environ["WANDB_MODE"] = "offline"\n'},
        {"script": 'os.environ["WANDB_MODE"] = "offline"\nwandb.init()\n'},
    ),
    "wandb-offline-resume": (
        {"script": 'wandb.init(mode="offline", id="a", resume="allow")\n'},
        {"script": 'wandb.init(mode="online", id="a", resume="allow")\n'},
    ),
    "automatic-naming": (
        {
            "script": script_of(
                "p = ProjectConfiguration(automatic_checkpoint_naming=True)",
                "accelerator.load_state(x)",
            )
        },
        {"script": script_of("p = ProjectConfiguration()", "accelerator.load_state(x)")},
    ),
    "smallest-loader": (
        {"ds": json_of(), "script": script_of(*LOADERS, "accelerator.prepare(m, train, val)")},
        {
            "ds": json_of(),
            "script": script_of(
                *LOADERS, "accelerator.prepare(m, train)", "accelerator.prepare(val)"
            ),
        },
    ),
    "no-batch-size": (
        {"ds": json_of(), "script": script_of("d = DataLoader(a, batch_sampler=b)")},
        {
            "ds": json_of(train_micro_batch_size_per_gpu=8),
            "script": script_of("d = DataLoader(a, batch_sampler=b)"),
        },
    ),
    "even-batches": (
        {"script": script_of("accelerator.gather(predicted)")},
        {"script": script_of("accelerator.gather_for_metrics(predicted)")},
    ),
    "silent-ranks": (
        {"script": f"{GLOO}\na = Accelerator(kwargs_handlers=[h])\n"},
        {"script": f"{GLOO}\na = Accelerator(cpu=True, kwargs_handlers=[h])\n"},
    ),
    "alone-under-zero": (
        {"ds": json_of(), "env": CPU, "script": script_of()},
        {"ds": json_of(), "env": CPU, "script": f"{GLOO}\na = Accelerator(kwargs_handlers=[h])\n"},
    ),
    "activation-budget": (
        {"script": "torch._functorch.config.activation_memory_budget = 0.5\n"},
        {"script": "torch._functorch.config.other = 0.5\n"},
    ),
}


@pytest.fixture
def look(tmp_path, monkeypatch):
    """Facts from texts, in a folder of their own."""
    monkeypatch.chdir(tmp_path)

    def look(*, yaml=None, ds=None, script=None, env=None, model=None):
        if yaml is not None:
            Path("a.yaml").write_text(yaml)
        if ds is not None:
            Path("ds.json").write_text(json.dumps(ds, indent=2))
        if script is not None:
            Path("train.py").write_text(script)
        facts = gather(
            Environment(**{"packages": GOOD, **(env or GPUS)}),
            yaml_path=None if yaml is None else Path("a.yaml"),
            json_path=None if ds is None else Path("ds.json"),
            script=None if script is None else read_script(Path("train.py")),
            model=model,
            has_batch_norm=None if model is None else command._has_batch_norm(model, None),
        )
        return diagnose(facts)

    return look


def test_every_check_has_a_case():
    assert sorted(CASES) == sorted(check.name for check in CHECKS)
    assert len({check.name for check in CHECKS}) == len(CHECKS)


@pytest.mark.parametrize("name", CASES)
def test_a_check_fires_on_its_trap_and_not_where_it_is_mended(name, look):
    trap, mended = CASES[name]
    (finding,) = [finding for finding in look(**trap) if finding.check == name]
    assert finding.where and finding.found and finding.consequence and finding.fix
    assert name not in {finding.check for finding in look(**mended)}


@pytest.mark.parametrize(
    ("name", "file", "word"),
    [
        ("hidden-size", "ds.json", '"stage3_param_persistence_threshold": "auto"'),
        ("fsdp2-recompute", "a.yaml", "fsdp_activation_checkpointing: true"),
        ("scheduler-prepared", "train.py", "prepare(m, o, s)"),
    ],
)
def test_a_finding_names_file_and_line(name, file, word, look):
    (finding,) = [f for f in look(**CASES[name][0]) if f.check == name]
    path, line = finding.where.split(":")
    assert path == file
    assert word in Path(path).read_text().splitlines()[int(line) - 1]


def test_what_is_missing_has_a_file_and_no_line(look):
    (finding,) = [
        finding
        for finding in look(**CASES["accumulation-fixed-in-json"][0])
        if finding.check == "accumulation-fixed-in-json"
    ]
    assert finding.where == "ds.json"


def test_an_old_trap_in_other_words_is_found_too(look):
    said = look(
        ds=json_of(gradient_accumulation_steps=1),
        script=script_of(accelerator="Accelerator(gradient_accumulation_steps=4)"),
    )
    (finding,) = [f for f in said if f.check == "accumulation-fixed-in-json"]
    assert finding.found == '"gradient_accumulation_steps": 1, and Accelerator() says 4'
    default = json_of()
    del default["zero_optimization"]["reduce_bucket_size"]
    (finding,) = [f for f in look(ds=default) if f.check == "large-bucket"]
    # DeepSpeed's default: 5e8 elements of 4 bytes
    assert f"{5e8 * 4 / 2**30:.2f} GiB" in finding.found
    block = BLOCK + "  gradient_clipping: 0.0\n  offload_optimizer_device: cpu\n"
    assert "optimizer-replaced" in {f.check for f in look(yaml=block)}
    late = script_of("accelerator.init_trackers(x)", 'os.environ["WANDB_MODE"] = "offline"')
    assert "wandb-mode-late" in {f.check for f in look(script=late)}


def test_lbaccels_own_loop_is_clean_under_every_shipped_config(look, monkeypatch):
    monkeypatch.chdir(ROOT)
    script = read_script(ROOT / "examples" / "finetune_lbaccel.py")
    for path in sorted((ROOT / "accelerate_configs").glob("*.yaml")):
        good = Environment(packages=GOOD, **GPUS)
        facts = gather(good, yaml_path=path, script=script, model="resnet50", has_batch_norm=True)
        assert diagnose(facts) == [], path.name


def test_a_batch_in_numbers_is_judged_where_the_plan_is_known(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(json_of(train_batch_size=256)))
    good = Environment(packages=GOOD, **GPUS)
    # 256 = 4 x 32 x 2
    sizes = {"global_batch_size": 256, "micro_batch_size": 4, "world_size": 2}
    assert diagnose(gather(good, json_path=path, **sizes)) == []
    (finding,) = diagnose(gather(good, json_path=path, **{**sizes, "global_batch_size": 512}))
    assert finding.check == "unresolved" and "256 is not 4 x 64 x 2 = 512" in finding.found


def test_a_script_is_read_and_never_run(tmp_path):
    path = tmp_path / "train.py"
    path.write_text("raise SystemExit('run!')\naccelerator.accumulate(x)\n")
    assert [call.line for call in read_script(path).on_accelerator("accumulate")] == [2]


def test_the_environment_is_read_without_importing_deepspeed():
    import sys

    before = "deepspeed" in sys.modules
    here = this_environment()
    assert here.packages["accelerate"] and here.version("torch") >= (2, 6)
    assert ("deepspeed" in sys.modules) is before


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture
def good_machine(monkeypatch):
    monkeypatch.setattr(
        "lbaccel.doctor.facts.this_environment", lambda: Environment(packages=GOOD, **GPUS)
    )


def doctor(*arguments) -> int:
    return cli.main(["doctor", *map(str, arguments)])


def test_exit_codes_are_0_clean_1_with_findings_2_for_bad_input(
    good_machine, tmp_path, monkeypatch, capsys
):
    assert doctor() == 0
    assert "no findings in" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    assert doctor("--config", "zero2") == 0, "a shipped config by its name, from any folder"
    capsys.readouterr()
    Path("train.py").write_text(script_of("with accelerator.accumulate(m):", "    pass"))
    assert doctor("--script", "train.py") == 1
    out = capsys.readouterr().out
    assert "train.py:2: accelerator.accumulate(...)   [ragged-tail]" in out
    assert "0.25 in place of 1.0" in out and "  type: large_batch.update" in out
    assert out.endswith(f"1 finding in {len(CHECKS)} checks\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config", "nothing.yaml"], "is no file"),
        (["--config", "zero9"], "no config is called"),
        (["--ds-config", "nothing.json"], "is no file"),
        (["--script", "nothing.py"], "is no file"),
        (["--script", "broken.py"], "is no Python"),
        (["--config", "broken.yaml"], "is no YAML"),
        (["--model", "resnet5000"], "is no timm model"),
        (["--global-batch-size", "64"], "Add --model"),
        (["--model", "resnet10t", "--global-batch-size", "0"], "--global-batch-size='0' is not"),
        (["--model", "resnet10t", "--memory", "8GiB"], "--memory is for a plan"),
    ],
)
def test_bad_input_is_answered(arguments, said, good_machine, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("broken.py").write_text("def :\n")
    Path("broken.yaml").write_text("a: [\n")
    assert doctor(*arguments) == 2
    assert said in capsys.readouterr().err


def test_json_has_findings_and_what_it_says(good_machine, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = json_of(2, "optimizer", zero_force_ds_cpu_optimizer=None)
    Path("ds.json").write_text(json.dumps(config))
    assert doctor("--ds-config", "ds.json", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    (finding,) = found["findings"]
    assert finding["check"] == "optimizer-replaced" and "7.85" in finding["consequence"]
    assert set(finding) == {"check", "where", "found", "consequence", "fix"}
    assert "CPU-Adam (minutes)" in found["says"][0]
    assert "nvcc: /usr/bin/nvcc" in found["says"][1]


def test_what_zero_can_do_is_said_before_the_run(good_machine, capsys):
    sizes = ("--global-batch-size", 256, "--micro-batch-size", 64, "--img-size", 64)
    network = ("--model", "resnet10t", "--device", "RTX 4060", "--memory", "4GiB")
    assert doctor(*network, *sizes, "--config", "zero2_offload") == 0
    out = capsys.readouterr().out
    assert "builds no operator for this config" in out
    assert "one device: ZeRO-1, 2 and 3 shard nothing" in out
    # 4 bytes x 4.9e6 parameters of state, less a buffer of the largest parameter
    assert "optimizer offload to the host saves 0.01 GiB of" in out
    assert "no stage divides them" in out


def test_an_unreadable_yaml_is_no_finding(look):
    with pytest.raises(InputError, match="unknown keys"):
        look(yaml=NO + "num_proceses: 2\n")
