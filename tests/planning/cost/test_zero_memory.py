"""What a rank holds under DeepSpeed's stages: the moments of an update, added up by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lbaccel import cli, plan
from lbaccel.errors import InputError
from lbaccel.planning.cost.zero_memory import Sizes, Zero, added_seconds, held
from lbaccel.recipe import auto_plan

pytestmark = pytest.mark.usefixtures("shared_traces")

MIB = 2**20
BUCKET = 4 * 5_000_000
SGD = Sizes(
    weights=330 * MIB,
    parameters=320 * MIB,
    gradients=320 * MIB,
    states=320 * MIB,
    largest=9 * MIB,
    temporaries=0.0,
)


def peak(zero: Zero, activations: int, *, world_size: int) -> int:
    traced = {"weights": SGD.weights, "gradients": SGD.gradients, "optimizer": SGD.states}
    found = held(zero, SGD, traced | {"activations": activations}, world_size=world_size)
    return sum(found.values())


@pytest.mark.parametrize("stage", [1, 2])
def test_with_many_activations_zero_1_and_2_hold_the_whole_gradient_and_a_flat_part(stage):
    found = peak(Zero(stage), 4096 * MIB, world_size=4)
    assert found == (330 + 80 + 80 + 320 + 4096) * MIB  # weights, copy, state, gradient


def test_with_few_activations_the_peak_is_the_one_reduction():
    assert peak(Zero(2), 0, world_size=4) == (330 + 80 + 80 + 320 + 80) * MIB
    assert peak(Zero(2), 0, world_size=64) == (330 + 5 + 5 + 320) * MIB + BUCKET  # of one bucket
    assert peak(Zero(0), 0, world_size=4) == (330 + 320 + 320 + 320) * MIB


def test_zero_3_holds_all_gathered_weights_at_the_peak():
    rest = (80 + 80 + 80 + 80) * MIB + BUCKET  # weights twice, gradient, state
    found = peak(Zero(3), 4096 * MIB, world_size=4)
    assert found == rest + (330 + 4096) * MIB + 3 * (BUCKET + 9 * MIB)


def test_more_ranks_leave_whole_what_no_stage_divides():
    whole = (330 + 320 + 4096) * MIB
    assert peak(Zero(2), 4096 * MIB, world_size=320 * MIB) == whole + 2


@pytest.mark.parametrize(("stage", "offload"), [(2, "optimizer"), (3, "optimizer+parameters")])
def test_offload_moves_the_states_to_the_host(stage, offload):
    traced = {"weights": SGD.weights, "gradients": SGD.gradients, "activations": 4096 * MIB}
    zero = Zero(stage, offload)
    found = held(zero, SGD, traced | {"optimizer": SGD.states}, world_size=4)
    assert found["optimizer"] == 0 and found["host"] >= (320 + 3 * 320) * MIB // 4


def test_zero_1_and_2_send_once_an_update_and_zero_3_in_every_micro_step():
    rates = {"world_size": 4, "link": 1.0, "host": 1.0, "step": 0.0}
    one, two, three = (added_seconds(Zero(stage), SGD, **rates) for stage in (1, 2, 3))
    assert one == two and one.micro_step == 0
    assert one.commit == (2 * 320 + 320) * MIB * 3 / 4  # all-reduce, and the weights gathered
    assert three.micro_step == (320 + 320) * MIB * 3 / 4 and three.commit == 0


def test_the_buckets_size_counts():
    few = held(Zero(2, bucket_size=5_000_000), SGD, {}, world_size=4)
    many = held(Zero(2, bucket_size=500_000_000), SGD, {}, world_size=4)
    # the bucket of 1.9 GiB is taken whole, and its one sum is a copy of the gradient
    assert sum(many.values()) - sum(few.values()) == 4 * 500_000_000 - 320 * MIB + 240 * MIB


def test_an_unknown_offload_is_refused():
    with pytest.raises(InputError, match="offload='nvme'"):
        Zero(3, "nvme")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        ({"stage": 1, "reduce_bucket_size": 7}, (1, "none", 7)),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, (2, "optimizer", 500_000_000)),
        (
            {
                "stage": 3,
                "reduce_bucket_size": 7,
                "offload_optimizer": {"device": "cpu"},
                "offload_param": {"device": "cpu"},
            },
            (3, "optimizer+parameters", 7),
        ),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, (3, "none", 500_000_000)),
        ({"stage": 1, "offload_optimizer": {"device": "cpu"}}, (1, "none", 500_000_000)),
        ({"stage": 3, "offload_param": {"device": "none"}}, (3, "none", 500_000_000)),
    ],
)
def test_the_recipe_plans_for_the_stage_that_it_runs_under(zero, expected):
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": zero})
    found = auto_plan._sharding(SimpleNamespace(deepspeed_plugin=plugin))
    assert tuple(found[k] for k in ("zero_stage", "offload", "reduce_bucket_size")) == expected
    assert auto_plan._sharding(SimpleNamespace(deepspeed_plugin=None)) == {}


def test_the_command_plans_for_a_stage(capsys):
    network = ["--model", "resnet10t", "--img-size", "64", "--num-classes", "10"]
    sizes = ["--global-batch-size", "256", "--world-size", "4", "--memory", "4GiB"]
    stage = ["--device", "RTX 4060", "--zero", "2", "--offload", "optimizer"]
    assert cli.main(["plan", *network, *sizes, *stage]) == 0
    out = capsys.readouterr().out
    assert "plan: ZeRO-2, optimizer offloaded; " in out
    assert "without ZeRO " in out and "ZeRO-2 (lbaccel: as ZeRO-1)" in out


def test_fp16_is_not_planned_under_a_stage_and_offers_none():
    given = {"img_size": 64, "global_batch_size": 256, "num_classes": 10, "memory": "4GiB"}
    given |= {"device": "RTX 4060", "precision": "fp16", "world_size": 2}
    with pytest.raises(InputError, match=r"precision=fp16 with zero_stage=1.*Use bf16"):
        plan("resnet10t", zero_stage=1, **given)
    assert not any("ZeRO" in lever.name for lever in plan("resnet10t", **given).levers)
