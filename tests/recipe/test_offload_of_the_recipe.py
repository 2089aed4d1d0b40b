"""`--activation-offload`: what the recipe takes, says, keeps in the run, and refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import timm
import torch
import yaml
from accelerate.utils import DistributedType
from runs_of_recipe import differences, run, stopped_at, whole

from lbaccel import train
from lbaccel.errors import InputError
from lbaccel.planning.cost.devices import CARDS, GIB
from lbaccel.recipe import auto_plan
from lbaccel.recipe.auto_plan import Chosen, Workload
from lbaccel.recipe.options import OPTIONS, Settings
from lbaccel.update.offload import _Offload


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_on_a_cpu_it_is_none_with_a_line_and_the_run_is_the_same(capsys):
    truth = whole()
    capsys.readouterr()
    found = run("--activation-offload", "auto", output="asked")
    said = capsys.readouterr().out
    assert said.count("activation offload: none. On a CPU the memory of the host is that of") == 1
    assert not differences(found, truth)
    config = yaml.safe_load((found / "config.yaml").read_text())
    assert config["activation_offload"] == "auto" and config["plan"]["activation_offload"] == []


def test_a_resume_may_change_it():
    truth = whole()
    folder = stopped_at(4)
    assert run("--resume", folder, "--activation-offload", "auto") == folder
    assert not differences(folder, truth)
    row = OPTIONS["activation_offload"]
    assert row.plan and not row.contract


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--compile"], "--activation-offload auto with --compile: torch.compile decides itself"),
        (["--activation-checkpointing", "full"], "every block is recomputed, and keeps nothing"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_sentence(flags, says, capsys):
    assert train.main(["--data", "digits", "--activation-offload", "auto", *flags]) == 2
    assert says in capsys.readouterr().err


def test_an_unknown_value_is_refused(capsys):
    assert train.main(["--data", "digits", "--activation-offload", "some"]) == 2
    assert "--activation-offload" in capsys.readouterr().err


def accelerator(kind="cuda", distributed=DistributedType.NO, stage=None):
    zero = {"zero_optimization": {"stage": stage}}
    plugin = None if stage is None else SimpleNamespace(deepspeed_config=zero)
    return SimpleNamespace(
        device=torch.device(kind),
        distributed_type=distributed,
        deepspeed_plugin=plugin,
        num_processes=1,
    )


def asked(**values):
    return Settings().with_values({"activation_offload": "auto", **values}).batch


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (accelerator(distributed=DistributedType.FSDP), "FSDP"),
        (accelerator(distributed=DistributedType.DEEPSPEED, stage=3), "ZeRO-3"),
    ],
)
def test_sharded_weights_refuse_it(where, name):
    with pytest.raises(InputError, match=rf"--activation-offload auto under {name}, which moves"):
        auto_plan.with_offload_settled(asked(), where, say=print)
    plain = Settings().batch
    assert auto_plan.with_offload_settled(plain, where, say=print) is plain


def test_on_a_card_the_plan_is_asked_and_its_offload_applied(monkeypatch):
    where = accelerator()
    batch = asked(micro_batch_size=64, norm_batch_size=64, memory="1300MiB")
    assert auto_plan.with_offload_settled(batch, where, say=print) is batch
    assert auto_plan.wants_plan(batch)
    monkeypatch.setattr(auto_plan, "_device", lambda device: CARDS["RTX 3060"])
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10)
    work = Workload(
        model,
        Settings().optimizer,
        largest_batch=256,
        norm_batch_size=64,
        mix_pairs=False,
        image_shape=(3, 224, 224),
        dtype=torch.float32,
        precision="fp32",
    )
    chosen, line = auto_plan._plan(batch, work, where)
    assert chosen.offload and chosen.checkpointing == "none" and chosen.micro_batch_size == 64
    count = sum(map(len, chosen.offload))
    assert f"{count} modules offloaded ({chosen.host_gib:.2f} GiB of the host)" in line
    assert chosen.predicted_peak_gib <= 1300 * 2**20 / GIB
    said = []
    auto_plan.apply(model, chosen, norm_batch_size=64, say=said.append)
    assert said[-1].startswith(f"activation offload: the activations of {count} modules lie on")
    moved = {
        name
        for name, module in model.named_modules()
        if isinstance(getattr(getattr(module.forward, "func", None), "__self__", None), _Offload)
    }
    assert moved == {name for run in chosen.offload for name in run}


def test_a_plan_without_need_says_that_nothing_is_offloaded(monkeypatch):
    monkeypatch.setattr(auto_plan, "_device", lambda device: CARDS["RTX 3060"])
    batch = asked(micro_batch_size=8, norm_batch_size=8, memory="8GiB")
    model = timm.create_model("test_resnet", num_classes=10)
    work = Workload(
        model, Settings().optimizer, largest_batch=16, norm_batch_size=8, mix_pairs=False,
        image_shape=(3, 32, 32), dtype=torch.float32, precision="fp32",
    )  # fmt: skip
    chosen, line = auto_plan._plan(batch, work, accelerator())
    assert chosen.offload == () and "nothing offloaded" in line


def test_recompute_and_offload_are_applied_in_this_order():
    model = timm.create_model("resnet18", num_classes=10)
    chosen = Chosen(
        8, "segments", (("layer1.0", "layer1.1"),), "contiguous", offload=(("layer1.0",),)
    )
    said = []
    auto_plan.apply(model, chosen, norm_batch_size=32, say=said.append)
    assert [line.split(":")[0] for line in said] == [
        "activation checkpointing",
        "activation offload",
    ]


def test_under_global_norm_recompute_is_said_to_do_nothing():
    model = timm.create_model("resnet18", num_classes=10)
    for checkpointing, warned in (("none", False), ("full", True)):
        said = []
        chosen = Chosen(8, checkpointing, (), "contiguous")
        auto_plan.apply(model, chosen, norm_batch_size="global", say=said.append)
        assert any("do nothing with --norm-batch-size global" in line for line in said) is warned
