"""A plan that may keep activations in the host's memory: traced, said, and asked for alone."""

from __future__ import annotations

import json

import pytest

from lbaccel import cli, plan
from lbaccel.errors import InputError
from lbaccel.planning.cost.devices import CARDS, GIB, PCIE
from lbaccel.planning.cost.time_model import kernel_seconds
from lbaccel.planning.cost.trace import HOST_COPY, Kernel
from lbaccel.planning.text import lines
from lbaccel.update.pinned_host import pinned_bytes

pytestmark = pytest.mark.usefixtures("shared_traces")

CARD = CARDS["RTX 3060"]
CONTRACT = {
    "img_size": 224,
    "global_batch_size": 256,
    "num_classes": 10,
    "device": CARD,
    "micro_batch_size": 64,
    "norm_batch_size": 64,
    "memory_format": "contiguous",
    "compare": False,
}


def squeezed(**options):
    """Plans of a budget at which one ghost batch does not fit as it is."""
    plain = plan("resnet18", memory="8GiB", activation_checkpointing="none", **CONTRACT)
    fixed = sum(plain.breakdown[k] for k in ("weights", "gradients", "optimizer", "context"))
    budget = int((fixed + 0.7 * (plain.predicted_peak_gib - fixed)) * GIB)
    return plain, plan("resnet18", memory=budget, **CONTRACT | options)


def test_offload_is_taken_when_asked_and_needed_and_else_not():
    plain, without = squeezed(activation_checkpointing="none")
    assert not without.fits and without.activation_offload == ()
    _, found = squeezed(activation_checkpointing="none", activation_offload="auto")
    assert found.fits and found.activation_checkpointing == "none"
    assert found.predicted_peak_gib <= found.budget_gib < plain.predicted_peak_gib
    assert found.host_gib > 0 and found.activation_offload
    text = "\n".join(lines(found))
    first = found.activation_offload[0][0]
    assert f"activations of {first}" in text and f"({found.host_gib:.2f} GiB there)" in text
    shown = found.to_dict()["activation_offload"]
    assert shown == {
        "runs": [list(run) for run in found.activation_offload],
        "host_gib": found.host_gib,
    }
    generous = plan("resnet18", memory="8GiB", activation_offload="auto", **CONTRACT)
    assert generous.activation_offload == () and generous.activation_checkpointing == "none"


def test_with_recompute_allowed_the_plan_is_never_slower_than_without_offload():
    _, recomputed = squeezed()
    _, both = squeezed(activation_offload="auto")
    assert recomputed.activation_checkpointing == "segments" and recomputed.activation_offload == ()
    assert recomputed.fits and both.fits
    assert both.predicted_seconds_per_update <= recomputed.predicted_seconds_per_update


def test_the_hosts_memory_is_a_bound_like_the_devices():
    _, free = squeezed(activation_checkpointing="none", activation_offload="auto")
    bound = int(free.host_gib * GIB) + 1
    options = {"activation_checkpointing": "none", "activation_offload": "auto"}
    _, again = squeezed(host_memory=bound, **options)
    assert again.fits and again.host_gib * GIB <= bound
    _, little = squeezed(host_memory=2**20, **options)
    assert not little.fits
    _, shared = squeezed(host_memory="1MiB", activation_offload="auto")
    assert shared.fits and shared.host_gib <= 2**20 / GIB  # by recompute


def test_json_and_levers_of_a_card_say_bytes_time_and_the_host(capsys):
    flags = "--model resnet18 --img-size 224 --global-batch-size 256 --micro-batch-size 64"
    flags += " --memory 4GiB --num-classes 10 --memory-format contiguous"
    assert cli.main(["plan", *flags.split(), "--device", "RTX 3060", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["activation_offload"] == {"runs": [], "host_gib": 0.0}
    levers = [lever for lever in found["levers"] if lever["name"].startswith("activation offload")]
    assert [lever["name"] for lever in levers] == [
        "activation offload, 75% kept",
        "activation offload, 50% kept",
    ]
    less, more = levers
    assert 0 < less["gib_saved"] < more["gib_saved"] and 0 < less["time_pct"] < more["time_pct"]
    for lever in levers:
        assert lever["host_gib"] > 0 and not lever["changes_result"]
        assert f"{lever['host_gib']:.2f} GiB of the host at 25 GB/s" in lever["verdict"]
        copied = 4 * 2 * lever["host_gib"] * GIB / 25e9  # four micro-steps, there and back
        share = 100 * copied / found["predicted_seconds_per_update"]
        assert lever["time_pct"] == pytest.approx(share, rel=1e-6)


def test_a_cpu_has_nothing_to_offload_and_the_plan_says_so(capsys):
    flags = "--model resnet10t --img-size 64 --global-batch-size 64 --micro-batch-size 32"
    flags += " --memory 1GiB --num-classes 10 --memory-format contiguous --device cpu"
    assert cli.main(["plan", *flags.split(), "--activation-offload", "auto"]) == 0
    said = capsys.readouterr().out
    assert "note: activation offload: none. On a CPU the memory of the host is that of" in said
    assert "saves no memory on a CPU, whose memory is the host's: leave it" in said


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"activation_offload": "yes"}, "activation_offload='yes' is neither 'none' nor 'auto'"),
        ({"host_memory": "1GiB"}, "host_memory=1 GiB .*is read with activation_offload='auto'"),
        (
            {"activation_offload": "auto", "activation_checkpointing": "full"},
            "recomputes every block by itself",
        ),
        ({"activation_offload": "auto", "zero_stage": 3}, "zero_stage=3: DeepSpeed moves weights"),
        ({"activation_offload": "auto", "host_memory": "much"}, "is no size"),
        ({"activation_offload": "auto", "host_memory": 0}, "not a whole number of at least 1"),
    ],
)
def test_bad_input_is_one_sentence(options, says):
    with pytest.raises(InputError, match=says):
        plan("resnet18", memory="8GiB", **CONTRACT | options)


def test_a_copy_takes_the_seconds_of_the_cards_link_and_nothing_hides_it():
    copy = Kernel(HOST_COPY, 0, 10**9, 0, None, False)
    assert kernel_seconds(copy, CARDS["RTX 3060"]) == pytest.approx(1 / 25)
    assert kernel_seconds(copy, CARDS["RTX 4060"]) == pytest.approx(1 / 12.5)  # 8 lanes
    for (generation, lanes), rate in PCIE.items():
        carried = 2 ** (generation - 3) * 8e9 * lanes / 8 * 128 / 130  # GT/s, bits of a line code
        assert rate == pytest.approx(0.8 * carried, rel=0.02)


def test_pinned_bytes_are_the_next_power_of_two():
    assert [pinned_bytes(n) for n in (1, 2, 3, 1023, 1024, 1025)] == [1, 2, 4, 1024, 1024, 2048]
