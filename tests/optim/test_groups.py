"""Groups with rates of their own keep their ratios through scaling, schedules and resumes."""

from __future__ import annotations

import json
import math

import pytest
import recipes
import timm
import torch
from runs_of_recipe import BASE

from lbaccel import train
from lbaccel.batch.plan import UpdateStream
from lbaccel.errors import InputError
from lbaccel.optim.groups import apply_lr_scale, reference_lr, scale_optimizer
from lbaccel.optim.optimizers import create_optimizer
from lbaccel.optim.scheduler import lr_scheduler

N = 1000


def build(model, *flags, batch=100):
    """Optimizer and scheduler as the recipe makes them, and each parameter's group by name."""
    stream = UpdateStream(batch, N)
    optimizer, schedule, rate = recipes.optimizer_of(
        recipes.settings_of(*flags), model, stream=stream
    )
    values = rate.as_asked() | {"lr": rate.lr}
    return optimizer, lr_scheduler(optimizer, schedule, samples_per_update=batch), values


def by_name(model, optimizer):
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: g for g in optimizer.param_groups for p in g["params"]}
    assert found.keys() == set(names.values())
    assert len(found) == sum(len(g["params"]) for g in optimizer.param_groups)  # each once
    return found


def three_of(name, blocks):
    """The factor of a parameter by its name: classifier 1, the blocks given 0.6, the rest 0.4."""
    if name.startswith(("classifier", "head.fc", "head.weight", "head.bias", "head_dist")):
        return 1.0
    return 0.6 if name.startswith(blocks) else 0.4


LAST_FIVE = {
    # the network of "large_batch_training" (2021), part 3: its last convolution and norm go with
    # the last block
    "mobilenetv2_100": (
        *("blocks.4.2", "blocks.5.0", "blocks.5.1", "blocks.5.2", "blocks.6.0"),
        *("conv_head", "bn2"),
    ),
    "convnext_atto": (  # stages.3 has two blocks
        *("stages.2.blocks.3", "stages.2.blocks.4", "stages.2.blocks.5", "stages.3"),
        "head.norm",
    ),
    "vit_tiny_patch16_224": (*(f"blocks.{i}." for i in (7, 8, 9, 10, 11)), "norm."),
    "deit_tiny_distilled_patch16_224": (*(f"blocks.{i}." for i in (7, 8, 9, 10, 11)), "norm."),
}


@pytest.mark.parametrize("name", LAST_FIVE)
def test_three_groups_are_the_classifier_the_last_five_blocks_and_the_rest(name):
    model = timm.create_model(name, num_classes=10)
    optimizer, _, values = build(model, "--lr-groups", "three", "--warmup", "none")
    blocks = LAST_FIVE[name]
    for key, group in by_name(model, optimizer).items():
        assert group["lr"] == pytest.approx(values["lr"] * three_of(key, blocks), rel=1e-12), key
    rates = {round(g["lr"] / values["lr"], 9) for g in optimizer.param_groups}
    assert rates == {1.0, 0.6, 0.4}


def test_a_head_at_ten_times_the_rate_leaves_the_rest_and_the_weight_decay_as_they_are():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    plain = by_name(model, create_optimizer(model, "sgd", lr=0.1, weight_decay=0.03))
    groups = by_name(
        model,
        apply_lr_scale(
            create_optimizer(model, "sgd", lr=0.1, weight_decay=0.03, head_lr_scale=10.0)
        ),
    )
    for name, group in groups.items():
        expected = 1.0 if name.startswith("head.") else 0.1
        assert group["lr"] == pytest.approx(expected, rel=1e-12), name
        assert group["weight_decay"] == plain[name]["weight_decay"], name
    assert {g["weight_decay"] for g in groups.values()} == {0.0, 0.03}
    assert groups["pos_embed"]["weight_decay"] == 0.0  # the model's own no_weight_decay


def test_a_head_scale_multiplies_layer_decay():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    flags = {"lr": 0.1, "weight_decay": 0.03, "layer_decay": 0.5}
    plain = by_name(model, apply_lr_scale(create_optimizer(model, "adamw", **flags)))
    ten = apply_lr_scale(create_optimizer(model, "adamw", **flags, head_lr_scale=10.0))
    for name, group in by_name(model, ten).items():
        factor = 10.0 if name.startswith("head.") else 1.0
        assert group["lr"] == pytest.approx(plain[name]["lr"] * factor, rel=1e-12), name
    depth = len({round(g["lr"], 12) for g in plain.values()})
    assert depth == 14  # stem, 12 blocks, head


@pytest.mark.parametrize(
    "flags",
    [("--head-lr-scale", 10), ("--lr-groups", "three"), ("--layer-decay", 0.7)],
    ids=lambda flags: flags[0],
)
def test_ratios_hold_through_warmup_cosine_and_two_resumes(flags):
    flags = (*flags, "--epochs", 4, "--warmup-epochs", 1, "--base-lr", 0.1, "--global-batch-size")
    flags = (*flags, 100, "--base-batch-size", 50)

    def fresh():
        torch.manual_seed(0)
        model = timm.create_model("mobilenetv2_100", num_classes=10)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        return model, *build(model, *flags)

    _, optimizer, scheduler, _ = fresh()
    factors = [g.get("lr_scale", 1.0) for g in optimizer.param_groups]
    assert len(set(factors)) > 1
    warmup, total, base, peak = N, 4 * N, 0.1, 0.2
    for update in range(40):
        if update in (5, 25):  # within the warmup, and within the cosine
            states = optimizer.state_dict(), scheduler.state_dict()
            _, optimizer, scheduler, _ = fresh()
            for _ in range(2):
                optimizer.load_state_dict(states[0])
                scheduler.load_state_dict(states[1])
            apply_lr_scale(optimizer)
        s = 100 * update
        lr = base + (peak - base) * s / warmup
        if s >= warmup:
            lr = peak * (1 + math.cos(math.pi * (s - warmup) / (total - warmup))) / 2
        found = [g["lr"] for g in optimizer.param_groups]
        assert found == pytest.approx([lr * f for f in factors], rel=1e-10)
        assert reference_lr(optimizer) == pytest.approx(lr, rel=1e-10)
        optimizer.step()
        scheduler.step()


def test_the_recipe_logs_the_rate_without_the_head_s_factor_and_resumes_with_it(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    flags = [
        *BASE,
        "--model",
        "test_resnet",
        "--head-lr-scale",
        "10",
        "--warmup",
        "none",
        "--base-lr",
        "0.01",
    ]
    assert train.main([*flags, "--max-updates", "2"]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert train.main(["--resume", str(folder), "--max-updates", "6"]) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [line["optim/lr"] for line in lines if "optim/lr" in line]
    truth = [0.01 * (1 + math.cos(math.pi * u / 12)) / 2 for u in range(6)]
    assert found == pytest.approx(truth, rel=1e-12)
    newest = max((folder / "checkpoints").glob("update_*"))
    state = torch.load(newest / "state.pt", weights_only=True)["optimizer"]
    rates = sorted({g["lr"] / g["lr_scale"] for g in state["param_groups"]})
    assert rates == pytest.approx([rates[0]] * len(rates), rel=1e-12)
    assert {g["lr_scale"] for g in state["param_groups"]} == {1.0, 10.0}


def test_legw_s_warmup_is_saved_as_asked_so_that_a_run_from_its_settings_is_the_same():
    """The values go to config.yaml, which a resume reads."""
    model = timm.create_model("test_resnet", num_classes=3)
    flags = ("--lr-scaling", "legw", "--warmup-epochs", 1, "--base-batch-size", 25)
    flags = (*flags, "--base-lr", 0.1, "--warmup-start", "zero", "--epochs", 20)
    optimizer, scheduler, values = build(model, *flags, batch=100)
    assert (values["lr_scaling"], values["warmup_epochs"]) == ("legw", 1)
    for _ in range(20):  # half of 4 epochs of 10 updates
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.1 * 2 / 2] * 2, rel=1e-12)


# -- scale_optimizer ------------------------------------------------------------------------------


def two_groups():
    head, body = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    return torch.optim.SGD([{"params": [body]}, {"params": [head], "lr": 1.0}], lr=0.1)


def rates(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize(("rule", "factor"), [("linear", 8.0), ("sqrt", 8**0.5), ("none", 1.0)])
def test_scaling_an_optimizer_twice_scales_it_once(rule, factor):
    sizes = {"base_batch_size": 256, "global_batch_size": 2048, "rule": rule}
    optimizer = two_groups()
    for _ in range(2):
        assert scale_optimizer(optimizer, **sizes) is optimizer
    assert rates(optimizer) == pytest.approx([0.1 * factor, factor], rel=1e-14)


def test_a_resume_scales_nothing_twice_in_either_order():
    sizes = {"base_batch_size": 256, "global_batch_size": 2048}
    state = scale_optimizer(two_groups(), **sizes).state_dict()
    for first in (True, False):
        optimizer = two_groups()
        if first:
            scale_optimizer(optimizer, **sizes)
        optimizer.load_state_dict(state)
        scale_optimizer(optimizer, **sizes)
        assert rates(optimizer) == pytest.approx([0.8, 8.0], rel=1e-14)


@pytest.mark.parametrize("rule", ["linear", "sqrt", "power"])
def test_scaling_goes_on_from_the_batch_it_stands_at(rule):
    exponent = 0.7 if rule == "power" else None
    options = {"base_batch_size": 256, "rule": rule, "exponent": exponent}
    steps, once = two_groups(), two_groups()
    for batch in (512, 384, 4096):
        scale_optimizer(steps, **options, global_batch_size=batch)
    scale_optimizer(once, **options, global_batch_size=4096)
    assert rates(steps) == pytest.approx(rates(once), rel=1e-13)


def test_a_rate_per_n_samples_scales_an_optimizer_once_too():
    options = {"base_batch_size": 512, "rule": "per-512"}
    optimizer = two_groups()
    for batch in (2048, 2048, 1024):
        scale_optimizer(optimizer, **options, global_batch_size=batch)
    assert rates(optimizer) == pytest.approx([0.2, 2.0], rel=1e-14)


def test_scaling_under_a_scheduler_or_by_an_unknown_rule_is_refused_and_changes_nothing():
    optimizer = two_groups()
    with pytest.raises(InputError, match="rule='linaer' is not one of"):
        scale_optimizer(optimizer, base_batch_size=1, global_batch_size=2, rule="linaer")
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    with pytest.raises(InputError, match="before the scheduler is built"):
        scale_optimizer(optimizer, base_batch_size=256, global_batch_size=512)
    assert rates(optimizer) == [0.1, 1.0]


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"lr_groups": "three", "layer_decay": 0.7}, "both say the learning rate of each block"),
        ({"lr_groups": "three", "head_lr_scale": 10.0}, "both say the classifier's"),
        ({"betas": (0.9, 0.99)}, "--betas 0.9 0.99: sgd has none"),
        ({"eps": 1e-8}, "--eps 1e-08: sgd has none"),
        ({"optimizer": "adan", "betas": (0.9, 0.99)}, "adan has 3 of them"),
    ],
)
def test_settings_that_would_be_dropped_or_contradict_are_refused(flags, text):
    model = timm.create_model("test_resnet", num_classes=3)
    name = flags.pop("optimizer", "sgd")
    with pytest.raises(InputError, match=text):
        create_optimizer(model, name, lr=0.1, weight_decay=1e-4, **flags)


def test_a_model_that_tells_no_classifier_or_no_blocks_is_refused():
    plain = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match="Linear does not tell its classifier"):
        create_optimizer(plain, "sgd", lr=0.1, weight_decay=0.0, head_lr_scale=10.0)
    plain.get_classifier = lambda: plain
    with pytest.raises(InputError, match="has no group_matcher"):
        create_optimizer(plain, "sgd", lr=0.1, weight_decay=0.0, lr_groups="three")


def test_betas_and_eps_reach_the_optimizer():
    model = timm.create_model("test_resnet", num_classes=3)
    flags = ["--optimizer", "adamw", "--betas", "0.8,0.97", "--eps", "3e-9", "--warmup", "none"]
    optimizer, _, _ = build(model, *flags)
    assert {(g["betas"], g["eps"]) for g in optimizer.param_groups} == {((0.8, 0.97), 3e-9)}
    with pytest.raises(InputError, match=r"--betas=.*, each a number of at least 0 and below 1"):
        build(model, "--optimizer", "adamw", "--betas", "0.9,1")


def test_groups_that_share_one_tensor_as_their_rate_are_scaled_once_each():
    """torch gives all groups the tensor that it was given, as capturable optimizers need it."""
    lr = torch.tensor(0.1, dtype=torch.float64)
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr_scale": 0.5} for _ in range(3)]
    optimizer = torch.optim.Adam(groups, lr=lr)
    scale_optimizer(optimizer, base_batch_size=256, global_batch_size=1024)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.4] * 3)
    apply_lr_scale(optimizer)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.2] * 3)
    assert float(lr) == 0.1
