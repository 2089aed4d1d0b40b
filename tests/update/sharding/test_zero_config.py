"""What is settled with DeepSpeed's configuration before anything trains; no DeepSpeed needed."""

from __future__ import annotations

import base64
import json

import pytest
import timm.optim
import torch
from torch import nn

from lbaccel import BatchPlan, InputError
from lbaccel.update.sharding.precision import check_precision, float32_inside
from lbaccel.update.sharding.steps import filled, skeleton, with_last
from lbaccel.update.sharding.zero_config import check_elementwise, settle_config

AUTO = "auto"
BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
PLAN = BatchPlan(global_batch_size=48, micro_batch_size=8, world_size=2)
RAGGED = BatchPlan(global_batch_size=46, micro_batch_size=8, world_size=2)


def settled(config=None, *, plan=PLAN, clip=None, optimizer=torch.optim.SGD, model=None, zero=None):
    model = model or nn.Linear(2, 2)
    config = {**dict.fromkeys((*BATCH, "gradient_clipping"), AUTO), **(config or {})}
    config["zero_optimization"] = {"stage": 2, **(zero or {})}
    made = optimizer(model.parameters(), lr=0.1)
    settle_config(config, model, made, plan=plan, clip_grad_norm=clip)
    return config


@pytest.mark.parametrize("plan", [PLAN, RAGGED], ids=["whole", "ragged"])
def test_auto_is_the_plans_and_the_product_is_what_deepspeed_demands(plan):
    config = settled(plan=plan)
    assert [config[key] for key in BATCH] == [8 * 3 * 2, 8, 3]


def test_accelerates_silent_1_is_made_the_plans_number():
    assert settled({"gradient_accumulation_steps": 1})["gradient_accumulation_steps"] == 3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gradient_accumulation_steps", 4),
        ("train_micro_batch_size_per_gpu", 16),
        ("train_batch_size", 64),
    ],
)
def test_a_number_that_contradicts_the_plan_is_refused(key, value):
    with pytest.raises(InputError, match=rf'"{key}": {value} .*global batch 48.*"{key}": "auto"'):
        settled({key: value})


@pytest.mark.parametrize("key", BATCH)
def test_a_number_that_is_the_plans_is_taken(key):
    value = dict(zip(BATCH, (48, 8, 3), strict=True))[key]
    assert settled({key: value})[key] == value


@pytest.mark.parametrize(("clip", "value"), [(None, 0.0), (0.5, 0.5)])
def test_auto_clipping_is_the_users_and_never_1(clip, value):
    assert settled(clip=clip)["gradient_clipping"] == value
    assert settled({"gradient_clipping": value}, clip=clip)["gradient_clipping"] == value


@pytest.mark.parametrize(
    ("clip", "value", "say"), [(None, 1.0, "--clip-grad-norm 1"), (0.5, 0.0, "no --clip-grad-norm")]
)
def test_clipping_that_contradicts_is_refused(clip, value, say):
    with pytest.raises(InputError, match=rf'"gradient_clipping": {value}.*{say}'):
        settled({"gradient_clipping": value}, clip=clip)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_an_offload_that_would_replace_the_optimizer_names_the_line_to_write(optimizer):
    zero = {"offload_optimizer": {"device": "cpu"}}
    rule = rf'DeepSpeedCPUAdam in place of {optimizer.__name__}.*cpu_optimizer": false'
    with pytest.raises(InputError, match=rule):
        settled(zero=zero, optimizer=optimizer)
    settled({"zero_force_ds_cpu_optimizer": False}, zero=zero, optimizer=optimizer)
    settled(zero={"offload_optimizer": {"device": "none"}}, optimizer=optimizer)


def test_auto_buckets_need_a_hidden_size_and_a_number_is_offered():
    with pytest.raises(
        InputError, match=r'"reduce_bucket_size": "auto".*"reduce_bucket_size": \d+'
    ):
        settled(zero={"reduce_bucket_size": AUTO})


@pytest.mark.parametrize("section", ["optimizer", "scheduler"])
def test_a_second_optimizer_or_scheduler_is_refused(section):
    with pytest.raises(InputError, match=rf'"{section}" section.*Take the section out'):
        settled({section: {"type": "Adam"}})


def test_float64_is_refused_as_deepspeed_sums_in_float32():
    with pytest.raises(InputError, match=r"float64.*--precision fp32"):
        settled(model=nn.Linear(2, 2).double())


def test_weights_of_16_bits_are_refused():
    with pytest.raises(InputError, match=r"'weight' is bfloat16.*model\.float\(\)"):
        settled(model=nn.Linear(2, 2).bfloat16())


ON, AUTO_ON = {"enabled": True}, {"enabled": AUTO}


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """Name a JSON as a launcher does."""

    def name(config, *, coded=False):
        text = json.dumps({"zero_optimization": {"stage": 2}, **config})
        path = tmp_path / "ds.json"
        path.write_text(text)
        named = base64.urlsafe_b64encode(text.encode()).decode() if coded else str(path)
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", named)

    monkeypatch.delenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", raising=False)
    return name


@pytest.mark.parametrize("coded", [False, True], ids=["path", "base64"])
def test_bf16_that_the_json_itself_enables_is_refused_and_auto_is_autocast(launched, coded):
    filled = {"bf16": ON, "fp16": {"enabled": False}}
    launched({"bf16": ON}, coded=coded)
    with pytest.raises(InputError, match=r'own bf16.*Write "auto".*--mixed_precision bf16'):
        check_precision(filled)
    launched({"bf16": AUTO_ON}, coded=coded)
    check_precision(filled)
    launched({}, coded=coded)
    check_precision(filled)


def test_bf16_of_a_plugin_made_in_code_is_autocast(launched):
    check_precision({"bf16": ON})


@pytest.mark.parametrize(
    ("config", "say"),
    [
        ({"fp16": ON}, r"fp16 under DeepSpeed.*--precision bf16.*DDP"),
        ({"torch_autocast": {**ON, "dtype": "bfloat16"}}, r"number of ranks.*section out"),
        ({"communication_data_type": "bf16"}, r"communication_data_type.*Take it out"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, r"grad_accum_dtype.*Take it out"),
        ({"data_types": {"buffer_dtype": "bf16"}}, r"buffer_dtype.*Take it out"),
    ],
)
def test_what_would_round_sums_weights_or_buffers_is_refused(launched, config, say):
    with pytest.raises(InputError, match=say):
        check_precision(config)


def test_sums_in_float32_may_be_said():
    check_precision({"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}})


def test_deepspeed_reads_float32_while_the_accelerator_says_what_was_asked():
    config = {"bf16": {"enabled": True}}
    with pytest.raises(ZeroDivisionError), float32_inside(config):
        assert config["bf16"]["enabled"] is False
        raise ZeroDivisionError
    assert config["bf16"]["enabled"] is True


ELEMENTWISE = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "Lion": lambda p: timm.optim.Lion(p, lr=0.1),
}
WHOLE = {
    "Lars": lambda p: timm.optim.Lars(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Lamb": lambda p: timm.optim.Lamb(p, lr=0.1),
    "Adafactor": lambda p: timm.optim.Adafactor(p, lr=0.1),
    "Muon": lambda p: torch.optim.Muon(p, lr=0.1),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_an_optimizer_of_elements_may_be_handed_a_flat_vector(name):
    optimizer = ELEMENTWISE[name]([nn.Parameter(torch.ones(2, 2))])
    before = optimizer.state_dict()
    check_elementwise(optimizer, stage=1)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]


@pytest.mark.parametrize("name", WHOLE)
def test_an_optimizer_of_whole_parameters_is_refused_under_zero(name):
    groups = [
        {"params": [nn.Parameter(torch.ones(2, 2))], "weight_decay": weight_decay}
        for weight_decay in (0.0, 0.1)
    ]
    optimizer = WHOLE[name](groups)
    with pytest.raises(InputError, match=rf"{name} under ZeRO-1.*sgd.*adamw.*DDP"):
        check_elementwise(optimizer, stage=1)


def test_a_skeleton_has_no_weights_until_it_is_filled():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[0].register_buffer("table", torch.arange(3.0), persistent=False)
    empty = skeleton(model)
    assert all(p.is_meta for p in empty.parameters())
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    twin = filled(empty, weights, dict(model.named_buffers()))
    x = torch.randn(4, 3)
    assert torch.equal(twin(x), model(x))
    twin[1].running_mean += 1
    assert not torch.equal(twin[1].running_mean, model[1].running_mean)
    assert torch.equal(twin[0].table, model[0].table)


def test_the_last_of_one_and_of_none():
    assert list(with_last([])) == []
    assert list(with_last([(1, 2)])) == [((1, 2), True)]
