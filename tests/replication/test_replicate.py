"""`lbaccel replicate`: what each source means, as formulas; and that the contract is one."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

import pytest
import tiny  # noqa: F401  registers lbaccel_tiny
import torch
import yaml
from timm.scheduler import create_scheduler_v2

from lbaccel import train
from lbaccel.batch.duration import Duration
from lbaccel.cli import main
from lbaccel.errors import InputError
from lbaccel.optim.schedules import make_schedule
from lbaccel.recipe.loss import Distillation, loss_of
from lbaccel.recipe.options import OPTIONS
from lbaccel.recipe.settings import read_settings
from lbaccel.replication.contract import Norms, contract_of, largest_gap
from lbaccel.replication.readers.plain import Said, read_plain
from lbaccel.replication.readers.timm_args import read_timm_args
from lbaccel.replication.readers.torchvision_flags import read_torchvision_flags, split_command
from lbaccel.replication.render import table, to_yaml
from lbaccel.replication.sources import norms_of

BN = Norms(53, (0.1,) * 53)

TIMM = {  # as timm's train.py writes it, its neutral keys left out
    "batch_size": 128,
    "grad_accum_steps": 2,
    "model": "resnet50",
    "opt": "sgd",
    "momentum": 0.9,
    "weight_decay": 2e-5,
    "sched": "cosine",
    "epochs": 100,
    "cooldown_epochs": 0,
    "warmup_epochs": 5,
    "warmup_lr": 1e-4,
    "warmup_prefix": True,
    "min_lr": 1e-6,
    "lr": None,
    "lr_base": 0.1,
    "lr_base_size": 256,
    "lr_base_scale": "",
    "sync_bn": False,
    "dist_bn": "reduce",
    "smoothing": 0.1,
    "mixup": 0.0,
    "cutmix": 0.0,
    "drop": 0.1,
    "drop_path": None,
    "clip_grad": 5.0,
    "clip_mode": "norm",
    "train_interpolation": "bicubic",
    "model_ema": False,
    "amp": False,
    "seed": 42,
    "data_dir": None,
    "dataset": "",
    "workers": 8,
}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"epochs": 1e10}, "must be at most 1,000,000"),
        ({"epochs": math.inf}, "must be at most 1,000,000"),
        ({"epochs": math.nan}, "must be at most 1,000,000"),
        ({"warmup_epochs": 1e10}, "must be at most 1,000,000"),
        ({"decay_epochs": 1e-9}, "at most 10,000 times"),
        ({"decay_epochs": 0.0}, "more than 0 epochs"),
    ],
)
def test_lengths_that_no_run_has_are_refused_before_a_list_is_made_of_them(keys, words):
    steps = {**TIMM, "sched": "step", "decay_epochs": 30, "warmup_prefix": False, **keys}
    with pytest.raises(InputError, match=words):
        read_timm_args(steps, gpus=1, origin="args.yaml")


def test_a_cosine_of_a_length_that_no_run_has_is_refused():
    with pytest.raises(InputError, match="must be at most 1,000,000"):
        read_timm_args({**TIMM, "epochs": 1e10}, gpus=1, origin="args.yaml")


RESNET50_V2 = """
# torchvision's recipe for ResNet-50's second weights
torchrun --nproc_per_node=8 train.py --model resnet50 --batch-size 128 --lr 0.5 \\
--lr-scheduler cosineannealinglr --lr-warmup-epochs 5 --lr-warmup-method linear \\
--auto-augment ta_wide --epochs 600 --random-erase 0.1 --weight-decay 0.00002 \\
--norm-weight-decay 0.0 --label-smoothing 0.1 --mixup-alpha 0.2 --cutmix-alpha 1.0 \\
--train-crop-size 176 --model-ema --val-resize-size 232 --ra-sampler --ra-reps 4
"""


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def timm_contract(gpus=4, norms=BN, **changed):
    return contract_of(read_timm_args(TIMM | changed, gpus=gpus, origin="args.yaml"), norms)


def torchvision_contract(flags, gpus=None, norms=BN):
    return contract_of(read_torchvision_flags(shlex.split(flags), gpus=gpus), norms)


def gaps(contract):
    return "\n".join(map(str, contract.gaps))


def multiplier(s, *, epoch_samples=1000):
    """The schedule of a contract, in epochs."""
    peak = s["base_lr"]
    if s["lr_scaling"] != "none":
        assert s["lr_scaling"] == "linear"
        peak *= s["global_batch_size"] / s["base_batch_size"]
    schedule = make_schedule(
        total=Duration(epochs=s["epochs"]),
        base_lr=s["base_lr"],
        peak_lr=peak,
        global_batch_size=100,
        num_samples=epoch_samples,
        decay=s["schedule"],
        warmup=s["warmup"],
        warmup_duration=Duration(epochs=s["warmup_epochs"]),
        start=s.get("warmup_start", "reference"),
        milestones=s.get("milestones", ()),
        gamma=s.get("gamma", 0.1),
        final_lr=s.get("final_lr", 0.0),
    )
    return lambda epoch: peak * schedule(epoch * epoch_samples)


# -- the batch and BatchNorm -----------------------------------------------------------------------


def test_timms_global_batch_counts_gpus_and_accumulation_and_batch_norm_sees_one_gpus_batch():
    s = timm_contract(gpus=4).settings
    assert s["global_batch_size"] == 128 * 4 * 2 and s["norm_batch_size"] == 128
    assert (1 - s["bn_momentum"]) ** 4 == pytest.approx(0.9, rel=1e-11)


def test_synchronised_batch_norm_sees_one_micro_batch_of_all_gpus_and_keeps_its_momentum():
    s = timm_contract(gpus=4, sync_bn=True).settings
    assert s["norm_batch_size"] == 128 * 4 and "bn_momentum" not in s


def test_a_network_without_batch_norm_has_no_norm_batch_size():
    s = timm_contract(norms=Norms(0)).settings
    assert "norm_batch_size" not in s and "bn_momentum" not in s


def test_momenta_that_differ_are_a_gap():
    found = timm_contract(norms=Norms(2, (0.1, 0.01)))
    assert "bn_momentum" not in found.settings and "not one number" in gaps(found)


def test_the_treatment_of_an_epochs_remainder_follows_the_loader():
    assert timm_contract(grad_accum_steps=1).settings["last_update"] == "drop"
    assert timm_contract(grad_accum_steps=2).settings["last_update"] == "keep"
    assert torchvision_contract("--epochs 3", gpus=2).settings["last_update"] == "keep"


# -- the learning rate -----------------------------------------------------------------------------


def test_timms_base_rate_scales_as_its_optimizer_says():
    s = timm_contract().settings
    assert (s["base_lr"], s["base_batch_size"], s["lr_scaling"]) == (0.1, 256, "linear")
    assert timm_contract(opt="lamb").settings["lr_scaling"] == "sqrt"
    assert timm_contract(opt="adamw").settings["lr_scaling"] == "sqrt"
    assert timm_contract(opt="lars").settings["lr_scaling"] == "linear"
    assert timm_contract(opt="adamw", lr_base_scale="linear").settings["lr_scaling"] == "linear"


def test_an_absolute_rate_is_that_of_the_recipes_own_batch():
    s = timm_contract(lr=0.7).settings
    assert (s["base_lr"], s["lr_scaling"], "base_batch_size" in s) == (0.7, "none", False)


def timms_rates(args, lr):
    """timm's own scheduler, read at the start of each epoch."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    keys = (
        "sched decay_epochs decay_milestones decay_rate min_lr warmup_lr warmup_epochs "
        "warmup_prefix cooldown_epochs"
    )
    options = {key: args[key] for key in keys.split() if key in args}
    scheduler, num_epochs = create_scheduler_v2(optimizer, num_epochs=args["epochs"], **options)
    rates = []
    for epoch in range(num_epochs):
        scheduler.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"warmup_epochs": 0, "warmup_prefix": False},
        {"sched": "step", "decay_epochs": 30, "warmup_prefix": False},
        {"sched": "step", "decay_epochs": 2.4, "decay_rate": 0.97, "warmup_prefix": False}
        | {"warmup_epochs": 2},
        {"sched": "step", "decay_epochs": 7, "warmup_prefix": True},
        {"sched": "multistep", "decay_milestones": [30, 60], "warmup_prefix": False},
        {"sched": "multistep", "decay_milestones": [30, 60], "warmup_prefix": True},
    ],
)
def test_at_the_start_of_every_epoch_the_rate_is_timms(changed):
    args = TIMM | {"decay_rate": 0.1} | changed
    s = timm_contract(**args).settings
    rates = timms_rates(args, lr=0.1 * 1024 / 256)
    assert s["epochs"] == len(rates)
    ours = multiplier(s)
    for epoch, rate in enumerate(rates):
        assert ours(epoch) == pytest.approx(rate, rel=1e-9), epoch


def test_a_cosine_without_prefix_is_a_gap_whose_size_is_timms_own_difference():
    args = TIMM | {"warmup_prefix": False, "min_lr": 0.0}
    found = timm_contract(**args)
    ours, peak = multiplier(found.settings), 0.4
    theirs = timms_rates(args, lr=peak)
    differences = [abs(ours(e) - theirs[e]) / peak for e in range(5, 100)]
    size, epoch = largest_gap(5, 100)
    assert size == pytest.approx(max(differences), rel=1e-9)
    assert epoch == 5 + differences.index(max(differences))
    assert f"differ most at epoch {epoch}, by {size:.2%}" in gaps(found)


def test_steps_before_the_warmup_ends_are_put_to_its_end_and_said():
    found = timm_contract(sched="step", decay_epochs=2, epochs=9, warmup_prefix=False)
    assert found.settings["milestones"] == [5, 5, 6, 8]
    assert "before the warmup ends" in gaps(found)


@pytest.mark.parametrize(
    ("flags", "rate"),
    [
        ("--lr-scheduler steplr --lr-step-size 3 --lr-gamma 0.2", lambda e: 0.2 ** (e // 3)),
        ("--lr-scheduler exponentiallr --lr-gamma 0.9", lambda e: 0.9**e),
        (
            "--lr-scheduler cosineannealinglr --lr-min 0.02",
            lambda e: (0.02 + 0.48 * (1 + math.cos(math.pi * e / 8)) / 2) / 0.5,
        ),
    ],
)
@pytest.mark.parametrize("method", ["linear", "constant"])
def test_at_the_start_of_every_epoch_the_rate_is_torchvisions(flags, rate, method):
    command = f"{flags} --lr 0.5 --epochs 10 --lr-warmup-epochs 2 --lr-warmup-method {method}"
    ours = multiplier(torchvision_contract(command, gpus=2).settings)
    rise = [0.01, 0.01 + 0.99 / 2] if method == "linear" else [0.01, 0.01]
    for epoch in range(10):
        expected = rise[epoch] if epoch < 2 else rate(epoch - 2)
        assert ours(epoch) == pytest.approx(0.5 * expected, rel=1e-9), epoch


# -- the rest of the sources -----------------------------------------------------------------------


def test_timms_settings_of_the_same_meaning_keep_their_numbers():
    s = timm_contract(amp=True, amp_dtype="bfloat16", layer_decay=0.7, data_dir="/d").settings
    wanted = {
        "optimizer": "sgd",
        "momentum": 0.9,
        "weight_decay": 2e-5,
        "label_smoothing": 0.1,
        "drop_rate": 0.1,
        "clip_grad_norm": 5.0,
        "precision": "bf16",
        "layer_decay": 0.7,
        "seed": 42,
        "data": "folder:/d",
        "exif_orientation": False,
    }
    assert {key: s[key] for key in wanted} == wanted


def test_timms_arguments_of_the_network_are_carried_over_and_decide_its_batch_norms():
    kwargs = {"stem": 8, "widths": [8, 16, 32], "zero_init_last": False}
    contract = timm_contract(model="cifar_resnet8", model_kwargs=kwargs)
    assert contract.settings["model_kwargs"] == {**kwargs, "widths": (8, 16, 32)}
    assert "model_kwargs" not in gaps(contract)
    assert "model_kwargs" not in timm_contract(model_kwargs={}).settings
    said = "\n".join(table(contract))
    assert "model_kwargs: stem=8" in said and "widths=(8,16,32)" in said
    Path("args.yaml").write_text(to_yaml(contract))
    assert read_settings(["--config", "args.yaml"])[0].model.model_kwargs == {
        **kwargs,
        "widths": (8, 16, 32),
    }
    recipe = read_timm_args(
        TIMM | {"model": "cifar_resnet8", "model_kwargs": {"num_blocks": 2}},
        gpus=1,
        origin="args.yaml",
    )
    assert norms_of("cifar_resnet8", recipe).num_layers == 1 + 3 * 2 * 2
    with pytest.raises(InputError, match="num_classes: lbaccel sets it itself"):
        timm_contract(model_kwargs={"num_classes": 3})


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"bce_loss": True, "bce_sum": True}, "bce_sum true"),
        ({"reprob": 0.25, "remode": "const"}, "remode const, recount 1 of random erasing"),
        ({"vflip": 0.5}, "vflip 0.5"),
        ({"clip_mode": "agc"}, "clip_grad 5 with clip_mode agc"),
        ({"sched": "poly"}, "the decay poly"),
        ({"cooldown_epochs": 10}, "--epochs 115 --extend constant"),
        ({"mixup": 0.2}, "mixup_mode batch"),
        ({"opt_betas": [0.9, 0.95]}, "opt_betas 0.9 0.95"),
        ({"lr_k_decay": 2.0}, "lr_k_decay 2"),
        ({"dataset": "hfds/x"}, "dataset hfds/x"),
    ],
)
def test_what_the_contract_can_not_say_is_said(changed, words):
    before = gaps(timm_contract())
    assert words not in before and words in gaps(timm_contract(**changed))


def test_timms_crops_colours_erasing_and_binary_loss_are_carried_over():
    changed = {
        "scale": [0.35, 1.0],
        "ratio": [0.8, 1.25],
        "hflip": 0.0,
        "color_jitter": 0.1,
        "reprob": 0.25,
        "bce_loss": True,
    }
    contract = timm_contract(**changed)
    wanted = {
        "scale": [0.35, 1.0],
        "ratio": [0.8, 1.25],
        "hflip": 0.0,
        "color_jitter": 0.1,
        "random_erasing": 0.25,
        "loss": "bce",
    }
    assert {key: contract.settings[key] for key in wanted} == wanted
    assert gaps(contract) == gaps(timm_contract())
    assert not wanted.keys() & timm_contract().settings.keys()  # at timm's defaults


def test_repeated_augmentation_is_carried_over_where_an_update_holds_whole_sets_of_copies():
    contract = timm_contract(aug_repeats=4.0)  # timm's flag is a float
    assert contract.settings["aug_repeats"] == 4 and gaps(contract) == gaps(timm_contract())
    assert "aug_repeats" not in timm_contract(aug_repeats=0).settings
    for number, words in (
        (3.0, "1024, which is no multiple of 3"),
        (1.5, "repeats each image the same number of times"),
    ):
        cut = timm_contract(aug_repeats=number)
        text = gaps(cut).replace("1024 samples, which", "1024, which")
        assert f"aug_repeats {number:g}" in text and words in text
        assert "aug_repeats" not in cut.settings
    assert "global_batch_size 1023 or 1026" in gaps(timm_contract(aug_repeats=3))
    one = torchvision_contract("--batch-size 8 --ra-sampler", gpus=2)
    assert "--ra-sampler --ra-reps 3" in gaps(one) and "aug_repeats" not in one.settings
    two = torchvision_contract("--batch-size 9 --ra-sampler", gpus=2)
    assert two.settings["aug_repeats"] == 3 and "--ra-sampler" not in gaps(two)


@pytest.mark.parametrize(
    ("weights", "alpha", "scale"),
    [
        ({}, 0.5, 2.0),
        ({"task_loss_weight": 0.3}, 0.7, 1.0),
        ({"distill_loss_weight": 3.0}, 0.75, 4.0),
        ({"distill_loss_weight": 0.4, "task_loss_weight": 0.6}, 0.4, 1.0),
    ],
)
def test_timms_teacher_is_carried_over_with_the_proportion_of_its_losses(weights, alpha, scale):
    """timm's own task, run on the same logits, is the contract's loss times a number."""
    from timm.task import LogitDistillationTask

    contract = timm_contract(kd_model_name="resnet18", kd_temperature=3.0, **weights)
    s = contract.settings
    assert s["teacher"] == "hf-hub:timm/resnet18.a1_in1k"
    assert (s["distill_alpha"], s["distill_temperature"]) == (pytest.approx(alpha), 3.0)
    assert ("weights of the loss that add up to" in gaps(contract)) == (scale != 1)

    class Net(torch.nn.Linear):
        pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}  # noqa: RUF012
        num_classes, in_chans = 5, 3

    torch.manual_seed(0)
    student, teacher = Net(6, 5), Net(6, 5)
    task = LogitDistillationTask(student, teacher, temperature=3.0, verbose=False, **weights)
    x, y = torch.randn(7, 6), torch.randint(5, (7,))
    ours = loss_of(
        "ce",
        dtype=torch.float32,
        memory_format="contiguous",
        label_smoothing=0.0,
        distillation=Distillation(
            lambda images: teacher(images).detach(), s["distill_alpha"], s["distill_temperature"]
        ),
    )
    theirs = task(x, y)["loss"].item()
    assert theirs == pytest.approx(scale * ours(student, (x, y))[0].item(), rel=1e-5)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"kd_distill_type": "feature"}, "kd_distill_type feature compares more than logits"),
        ({"kd_model_name": "no_such"}, "timm has no weights of no_such"),
        ({"bce_loss": True}, "lbaccel teaches beside cross-entropy"),
        ({"distill_loss_weight": 0.0}, "are no proportion"),
    ],
)
def test_a_teacher_that_can_not_be_carried_over_is_said(changed, words):
    contract = timm_contract(**{"kd_model_name": "resnet18"} | changed)
    assert words in gaps(contract) and "teacher" not in contract.settings


def test_a_policy_takes_timms_colour_jitter_away():
    assert "color_jitter" not in timm_contract(aa="rand-m9", color_jitter=0.1).settings
    assert timm_contract(color_jitter=None).settings["color_jitter"] == 0.0


def test_unknown_keys_are_listed_and_missing_ones_named_with_their_default():
    recipe = read_timm_args(TIMM | {"my_key": 3}, gpus=1, origin="args.yaml")
    assert recipe.unknown == ("my_key: 3",)
    assert "mixup_mode batch" in recipe.assumed and "seed 42" not in recipe.assumed


def test_torchvisions_resnet50_recipe():
    contract = contract_of(read_torchvision_flags(split_command(RESNET50_V2), gpus=None), BN)
    s = contract.settings
    alpha = (1 - 0.99998) * 8 * 128 * 32 / 600
    assert s["ema_decay"] == pytest.approx((1 - alpha) ** (1 / 32), rel=1e-11)
    assert s["ema_norm"] == "average"  # its buffers are averaged with the weights
    assert s["warmup_start"] == 0.01 * 0.5
    assert s["crop_pct"] == pytest.approx(224 / 232, rel=1e-5)
    wanted = {
        "model": "resnet50",
        "global_batch_size": 8 * 128,
        "norm_batch_size": 128,
        "base_lr": 0.5,
        "lr_scaling": "none",
        "epochs": 600,
        "warmup": "gradual",
        "warmup_epochs": 5,
        "schedule": "cosine",
        "optimizer": "momentum",  # torch's SGD, without Nesterov
        "weight_decay": 2e-5,
        "decay_all": False,
        "label_smoothing": 0.1,
        "mixup": 0.2,
        "cutmix": 1.0,
        "img_size": 176,
        "precision": "fp32",
        "interpolation": "bilinear",
        "random_erasing": 0.1,
    }
    assert {key: s[key] for key in wanted} == wanted
    assert s["aug_repeats"] == 4
    left = ("--auto-augment ta_wide", "--random-erase 0.1")
    for flag in (*left, "--val-crop-size 224"):
        assert f"not carried over: {flag}" in gaps(contract)


@pytest.mark.parametrize(("warmup", "ours"), [(False, "first"), (True, "power")])
def test_timms_average_begins_as_it_does_there(warmup, ours):
    contract = timm_contract(model_ema=True, model_ema_warmup=warmup)
    assert contract.settings["ema_warmup"] == ours
    assert "average" not in gaps(contract) and "ema" not in gaps(contract)


def test_the_statistics_of_an_average_are_averages_where_there_is_batchnorm():
    assert timm_contract(model_ema=True).settings["ema_norm"] == "average"
    assert "ema_norm" not in timm_contract(model_ema=True, norms=Norms(0)).settings
    assert "ema_norm" not in timm_contract().settings


def test_torchvisions_average_never_has_a_negative_decay_and_its_optimizers_are_timms():
    flags = "--model-ema --model-ema-decay 0.9 --model-ema-steps 1 --epochs 1"
    assert torchvision_contract(flags, gpus=8).settings["ema_decay"] == 0.0
    assert torchvision_contract("--opt sgd_nesterov", gpus=2).settings["optimizer"] == "sgd"
    assert torchvision_contract(f"{flags} --data-path d", gpus=8).settings["exif_orientation"] is (
        False
    )
    s = torchvision_contract("--opt adamw --wd 0.3 --amp", gpus=2).settings
    assert (s["optimizer"], s["weight_decay"], s["decay_all"]) == ("adamw", 0.3, True)
    assert s["precision"] == "fp16" and "momentum" not in s


def test_torchvisions_names_are_networks_of_timm():
    import timm

    from lbaccel.replication.readers.torchvision_names import MODELS

    assert not set(MODELS.values()) - set(timm.list_models())


def write_accelerate(deepspeed=None, **changed):
    content = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED" if deepspeed is not None else "MULTI_GPU",
        "num_processes": 8,
        "mixed_precision": "bf16",
        **changed,
    }
    if deepspeed is not None:
        Path("ds.json").write_text(json.dumps(deepspeed))
        content["deepspeed_config"] = {"deepspeed_config_file": "ds.json"}
    Path("a.yaml").write_text(yaml.safe_dump(content))


def replicated(*flags, code=0):
    """The YAML that the command writes."""
    Path("out.yaml").unlink(missing_ok=True)
    assert main(["replicate", *flags, "--no-plan", "--out", "out.yaml"]) == code
    return yaml.safe_load(Path("out.yaml").read_text()) if code == 0 else None


JSON = {
    "train_micro_batch_size_per_gpu": 16,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": "auto",
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "weight_decay": 0.05}},
}


def test_an_accelerate_yaml_with_its_json(capsys):
    write_accelerate(JSON, odd_key=1)
    s = replicated("a.yaml", "--model", "resnet18", "--epochs", "10")
    wanted = {
        "global_batch_size": 16 * 4 * 8,
        "norm_batch_size": 16,
        "clip_grad_norm": 1.0,
        "optimizer": "adamw",
        "base_lr": 0.001,
        "weight_decay": 0.05,
        "decay_all": True,
        "precision": "bf16",
    }
    assert {key: s[key] for key in wanted} == wanted
    shown = capsys.readouterr().out
    assert "ZeRO stage 2" in shown and "unknown key, not read: odd_key: 1" in shown


@pytest.mark.parametrize(
    ("block", "json_clipping", "norm"),
    [
        ({"zero_stage": 2}, None, 1.0),  # accelerate's silent default
        ({"zero_stage": 2, "gradient_clipping": 0.3}, None, 0.3),
        (None, "auto", 1.0),
        (None, 0.5, 0.5),
        (None, 0.0, None),
        (None, "missing", None),
    ],
)
def test_the_clipping_that_is_in_effect(block, json_clipping, norm):
    if block is not None:
        write_accelerate(distributed_type="DEEPSPEED", deepspeed_config=block)
    else:
        kept = {k: v for k, v in JSON.items() if k != "gradient_clipping"}
        write_accelerate(
            kept if json_clipping == "missing" else kept | {"gradient_clipping": json_clipping}
        )
    batch = ["--per-gpu-batch", "16"] if block is not None else []
    s = replicated("a.yaml", "--model", "resnet18", *batch)
    assert s.get("clip_grad_norm") == norm


def test_deepspeeds_steps_become_epochs_where_the_set_is_known(capsys):
    warmup = {"warmup_min_lr": 0.0, "warmup_max_lr": 0.2, "warmup_num_steps": 100}
    scheduler = {"type": "WarmupLR", "params": {**warmup, "warmup_type": "linear"}}
    write_accelerate(JSON | {"scheduler": scheduler})
    known = ("--model", "resnet18", "--epochs", "10")
    s = replicated("a.yaml", *known, "--num-samples", "25600")
    assert s["warmup_epochs"] == 100 * 512 / 25600 and s["schedule"] == "constant"
    assert s["base_lr"] == 0.2  # DeepSpeed writes it over the optimizer's
    replicated("a.yaml", *known)
    assert "--num-samples and --epochs turn its steps" in " ".join(capsys.readouterr().out.split())


def test_an_offloaded_optimizer_that_accelerate_replaced_is_said(capsys):
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    kept = {k: v for k, v in JSON.items() if k != "optimizer"} | {"zero_optimization": zero}
    write_accelerate(kept)
    replicated("a.yaml", "--model", "resnet18", "--lr", "0.1", "--optimizer", "sgd")
    assert "DeepSpeedCPUAdam" in capsys.readouterr().out
    write_accelerate(kept | {"zero_force_ds_cpu_optimizer": False})
    replicated("a.yaml", "--model", "resnet18", "--lr", "0.1", "--optimizer", "sgd")
    assert "DeepSpeedCPUAdam" not in capsys.readouterr().out


def test_plain_numbers():
    said = Said(per_gpu_batch=64, global_batch_size=1024, sync_bn=False, lr=0.4, epochs=30.0)
    s = contract_of(read_plain(said, gpus=8), BN).settings
    assert (s["global_batch_size"], s["norm_batch_size"]) == (1024, 64)
    assert (s["base_lr"], s["lr_scaling"], s["epochs"]) == (0.4, "none", 30.0)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--per-gpu-batch 64", "does not say on how many GPUs it ran"),
        ("--gpus 8", "there is no source"),
        ("--per-gpu-batch 1 --gpus 8 --model resnet18", "a per-GPU batch of 1 with BatchNorm"),
        ("--per-gpu-batch 64 --gpus 8 --global-batch-size 256", "is smaller than 8 GPUs x"),
        ("--per-gpu-batch 64 --gpus 2 --global-batch-size 192", "is not 2 GPUs x"),
        ("--per-gpu-batch 64 --gpus 0", "--gpus='0' is not a whole number"),
        ("--per-gpu-batch 64 --gpus 2 --model resnet51", "is no timm model"),
        ("--gpus 4 -- torchrun --nproc_per_node=8 train.py", "contradicts --nproc_per_node=8"),
        ("--gpus 4 -- train.py --world-size 2", "contradicts --world-size 2"),
        ("--gpus 4 -- --batchsize 3", "--batchsize is no flag of torchvision's"),
        ("--gpus 4 -- --opt lamb", "--opt lamb is none of sgd"),
        ("--gpus 4 -- --lr-scheduler cosinelr", "Did you mean cosineannealinglr?"),
        ("--gpus 4 --lr 0.1 -- --epochs 2", "--lr 0.1: the command says it itself"),
        ("--gpus 4 -- --model resnet51", "--model NAME"),
        ("--gpus 4 nowhere.yaml", "nowhere.yaml can't be read: No such file"),
        ("--gpus 4 list.yaml", "list.yaml holds no mapping"),
        ("--gpus 4 other.yaml", "its keys are a"),
        ("--gpus 4 prose.txt", "prose.txt is of no known kind"),
        ("--gpus 4 broken.json", "broken.json is no JSON"),
        ("--gpus 4 short.yaml", "short.yaml has no model, epochs, sched, lr or lr_base"),
        ("--gpus 4 a.yaml", "--gpus 4 contradicts num_processes: 8"),
        ("a.yaml --per-gpu-batch 8", "--per-gpu-batch 8 contradicts a.yaml with ds.json"),
        ("total.json --gpus 4", "train_batch_size 100 in total.json is not"),
        ("typed.yaml --gpus 4", "typed.yaml holds a value of another type"),
        ("block.yaml --gpus 4", "block.yaml holds a value of another type"),
        ("timm.yaml --gpus 4 --epochs 3", "--epochs 3: timm.yaml says it itself"),
    ],
)
def test_a_source_of_no_use_says_what_to_type(flags, words, capsys):
    write_accelerate(JSON)
    Path("list.yaml").write_text("[1, 2]")
    Path("other.yaml").write_text("a: 1")
    Path("prose.txt").write_text("no flags here")
    Path("broken.json").write_text("{")
    Path("short.yaml").write_text("batch_size: 8\nopt: sgd\n")
    Path("total.json").write_text(json.dumps(JSON | {"train_batch_size": 100}))
    Path("timm.yaml").write_text(yaml.safe_dump(TIMM))
    Path("typed.yaml").write_text(yaml.safe_dump(TIMM | {"lr": "fast"}))
    Path("block.yaml").write_text("distributed_type: DEEPSPEED\ndeepspeed_config: ds.json\n")
    assert main(["replicate", "--no-plan", *shlex.split(flags)]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: "), error


def test_a_file_is_not_written_over(capsys):
    Path("out.yaml").write_text("epochs: 3\n")
    flags = ["replicate", "--per-gpu-batch", "8", "--gpus", "2", "--no-plan", "--out", "out.yaml"]
    assert main(flags) == 2 and "--force to write over it" in capsys.readouterr().err
    assert main([*flags, "--force"]) == 0
    assert yaml.safe_load(Path("out.yaml").read_text())["global_batch_size"] == 16


def test_rates_that_are_none_are_refused():
    with pytest.raises(InputError, match="a learning rate is a number above 0"):
        timm_contract(lr=-1.0)


# -- the contract is one that lbaccel train takes --------------------------------------------------


def test_the_yaml_of_every_source_is_accepted_by_the_recipes_own_reader():
    Path("args.yaml").write_text(yaml.safe_dump(TIMM))
    Path("flags.txt").write_text(RESNET50_V2)
    write_accelerate(JSON)
    for flags in (
        ["args.yaml", "--gpus", "8"],
        ["flags.txt"],
        ["a.yaml", "--model", "convnext_tiny"],
        ["--per-gpu-batch", "32", "--gpus", "4", "--sync-bn", "yes", "--lr", "0.1"],
    ):
        content = replicated(*flags)
        settings, _ = read_settings(["--config", "out.yaml"])
        assert set(content) <= set(OPTIONS)
        for name, value in content.items():
            assert settings.origin(name) == "out.yaml"
            assert settings.value(name) == (tuple(value) if isinstance(value, list) else value)


def test_every_gap_is_a_comment_of_the_yaml_and_a_line_of_the_table(capsys):
    Path("flags.txt").write_text(RESNET50_V2)
    replicated("flags.txt")
    shown, text = capsys.readouterr().out, Path("out.yaml").read_text()
    plain = " ".join(text.replace("#", " ").split())
    found = contract_of(read_torchvision_flags(split_command(RESNET50_V2), gpus=8), BN)
    assert len(found.gaps) >= 8
    for gap in found.gaps:
        words = str(gap).replace("-", "").split()
        for place in (plain, " ".join(shown.split())):
            assert "".join(words) in place.replace(" ", "").replace("-", "")


def test_the_contract_trains(capsys):
    """Two updates of the digits, with every setting that the source implied."""
    args = TIMM | {"model": "lbaccel_tiny", "batch_size": 16, "model_ema": True, "img_size": 8}
    Path("args.yaml").write_text(yaml.safe_dump(args))
    s = replicated("args.yaml", "--gpus", "4", "--data", "digits")
    assert (s["global_batch_size"], s["norm_batch_size"]) == (128, 16)
    assert train.main(["--config", "out.yaml", "--dry-run", "--workers", "0"]) == 0
    shown = capsys.readouterr().out
    assert "global batch 128" in shown and "BatchNorm over 16 samples (8 groups)" in shown
    assert "dry run: 2 updates done" in shown


def test_a_plan_for_the_contract_follows_it(capsys):
    flags = "--per-gpu-batch 16 --gpus 4 --model lbaccel_tiny --img-size 8 --lr 0.3"
    assert main(["replicate", *shlex.split(flags), "--memory", "1GiB", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "global batch 64 = " in shown and "lr 0.3" in shown


def test_the_plan_of_a_contract_with_a_teacher_counts_it(capsys):
    args = TIMM | {"model": "lbaccel_tiny", "batch_size": 16, "img_size": 8}
    said = []
    for more in ({}, {"kd_model_name": "resnet18"}):
        Path("args.yaml").write_text(yaml.safe_dump(args | more))
        flags = ["args.yaml", "--gpus", "4", "--memory", "1GiB", "--device", "cpu"]
        assert main(["replicate", *flags]) == 0
        said.append(capsys.readouterr().out)
    assert " teacher 0.04" in said[1] and "teacher" not in said[0]  # 11.7 M weights
    assert "teacher: hf-hub:timm/resnet18.a1_in1k" in said[1]
