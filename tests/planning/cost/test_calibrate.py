"""Rates of the device at hand: one for each class that a plan asks for, kept in a file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import timm
import torch

from lbaccel.batch.plan import BatchPlan
from lbaccel.cli import main
from lbaccel.errors import InputError
from lbaccel.launch import calibration_file
from lbaccel.planning.cost import calibrate as module
from lbaccel.planning.cost.calibrate import calibrate
from lbaccel.planning.cost.devices import CARDS, find_device, read_calibration, write_calibration
from lbaccel.planning.cost.time_model import kernel_class
from lbaccel.planning.cost.update import Network, image_batch, trace_update
from lbaccel.update.normalization import has_batch_norm

MODELS = {"resnet18": {}, "mobilenetv2_100": {}, "vit_tiny_patch16_224": {"img_size": 32}}


@pytest.fixture(scope="module")
def device():
    return calibrate(torch.device("cpu"), seconds=1)


def classes(name, layout, precision):
    """What the time model asks for an update of the model."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10, **MODELS[name])
    network = Network(
        model=model,
        make_batch=image_batch(3, 32),
        optimizer=torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
        clips=True,
        memory_format=layout,
    )
    size = 2 if has_batch_norm(model) else None
    plan = BatchPlan(global_batch_size=2, micro_batch_size=2, norm_batch_size=size)
    kernels = trace_update(network, plan, precision=precision).kernels()
    return {kernel_class(k) for k in kernels}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_class_of_a_traced_model_has_a_rate(device, name, layout, precision):
    asked = classes(name, layout, precision)
    assert len(asked) > 5
    assert asked <= set(device.rates)


def test_what_is_measured_is_positive_and_finite(device):
    found = [*device.rates.values(), *device.flops.values()]
    found += [device.bandwidth, device.launch_seconds]
    assert all(math.isfinite(value) and value > 0 for value in found)
    assert set(device.flops) == {"fp32", "tf32", "half"}
    assert (device.name, device.kind, device.memory) == ("cpu", "cpu", None)
    assert device.source == "calibrated"


def test_a_rate_is_the_work_of_all_shapes_over_their_time_without_the_launches(monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(module, "_now", lambda device: float(next(ticks)))  # each call takes 1 s
    monkeypatch.setattr(module, "_num_samples", lambda device, seconds: 1)
    monkeypatch.setattr(module, "_MAX_ROUNDS", 1)
    monkeypatch.setattr(module, "_overhead", lambda device: 0.25)
    found = calibrate(torch.device("cpu"), seconds=1000)
    launch = 1 / module._LAUNCHES
    assert found.launch_seconds == 0.25
    tokens = 197
    products = [2 * tokens * width * 4 * width for width in (384, 768)] * 2
    attention = [2 * 2 * tokens * tokens * width for width in (384, 768)]
    taken = (1 - launch) * 6
    assert found.rates["matmul/fp32"] == pytest.approx(sum(products + attention) / taken)
    maps = [4 * (2 * width * side * side + 6 * width) for width, side in ((64, 112), (256, 14))]
    rows = [4 * (2 * tokens * width + 2 * width + 2 * tokens) for width in (384, 768)]
    # layer norm works on rows, which have one layout
    norms = {"contiguous": sum(maps + rows) / 4, "channels_last": sum(maps) / 2}
    for layout, per_second in norms.items():
        assert found.rates[f"norm/fp32/{layout}"] == pytest.approx(per_second / (1 - launch))
    convolutions = [2 * 64 * 56**2 * 64 * 9, 2 * 256 * 14**2 * 256 * 9, 2 * 512 * 7**2 * 512 * 9]
    stem = 2 * 64 * 112**2 * 3 * 49
    work, taken = sum(convolutions) + stem, (1 - launch) * 4
    assert found.rates["conv/half/channels_last"] == pytest.approx(work / taken)
    work = 2 * sum(convolutions) + stem  # backward: two products, but none for images
    assert found.rates["conv_backward/half/channels_last"] == pytest.approx(work / taken)
    assert found.bandwidth == pytest.approx(3 * 64 * 2**20 / (1 - launch))
    assert found.flops["fp32"] == pytest.approx(max(products) / (1 - launch))


def test_every_class_is_measured_when_there_is_no_time(device):
    assert set(calibrate(torch.device("cpu"), seconds=1e-9).rates) == set(device.rates)


def test_a_kernel_that_half_precision_lacks_has_no_rate_and_another_failure_stops():
    def fails():
        raise RuntimeError("not implemented for 'BFloat16'")

    assert module._warm(module._Probe("conv/half/contiguous", 1, fails)) is None
    with pytest.raises(RuntimeError, match="not implemented"):
        module._warm(module._Probe("conv/fp32/contiguous", 1, fails))


def test_the_file_gives_the_device_back_and_keeps_others(device, tmp_path):
    path = tmp_path / "folder" / "calibration.json"
    write_calibration(path, CARDS["H100"])
    write_calibration(path, device)
    assert find_device("cpu", path) == device
    assert read_calibration(path) == {"h100": CARDS["H100"], "cpu": device}


@pytest.mark.parametrize("text", ["{", "[]", '{"cpu": {"speed": 1}}', '{"cpu": 3}'])
def test_a_broken_file_is_named(text, tmp_path, capsys):
    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"calibration\.json"):
        read_calibration(path)
    assert main(["calibrate", "--device", "cpu", "--output", str(path)]) == 2
    assert str(path) in capsys.readouterr().err
    assert path.read_text() == text, "the user's file is kept"


def test_the_command_writes_and_prints_a_table(tmp_path, capsys):
    path = tmp_path / "new" / "file.json"
    command = ["calibrate", "--device", "cpu", "--seconds", "1e-6", "--output", str(path)]
    assert main(command) == 0
    out = capsys.readouterr().out.splitlines()
    found = find_device("cpu", path)
    rows = {line.split()[0]: line for line in out[1:-1]}
    assert set(rows) == {*found.rates, "bandwidth", "launch"}
    number = rows["matmul/fp32"].split()[1].replace(",", "")
    assert float(number) == pytest.approx(found.rates["matmul/fp32"] / 1e9, abs=0.05)
    ends = {line.index(line.split()[1]) + len(line.split()[1]) for line in rows.values()}
    assert len(ends) == 1, "the columns are not aligned"
    assert out[-1] == f"written to {path}"


def test_the_default_file_is_the_users_and_json_stands_alone(device, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LBACCEL_CALIBRATION", str(tmp_path / "mine.json"))
    asked = []

    def measure(which, *, seconds):
        asked.append((which.type, seconds))
        return device

    monkeypatch.setattr(module, "calibrate", measure)
    assert main(["calibrate", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed.pop("file") == str(tmp_path / "mine.json")
    assert printed == vars(device)
    assert find_device("cpu", tmp_path / "mine.json") == device
    assert asked == [("cuda" if torch.cuda.is_available() else "cpu", 10.0)]


def test_the_users_file_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("LBACCEL_CALIBRATION", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert calibration_file() == tmp_path / ".cache/lbaccel/calibration.json"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert calibration_file() == tmp_path / "caches/lbaccel/calibration.json"
    monkeypatch.setenv("LBACCEL_CALIBRATION", "~/rates.json")
    assert calibration_file() == tmp_path / "rates.json"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "tpu"], "device='tpu'"),
        (["--seconds", "0"], "--seconds='0' is not a finite number above 0"),
        (["--seconds", "nan"], "--seconds='nan' is not"),
        (["--output", "{folder}"], "can't be written"),
        (["--output", "{folder}/file/calibration.json"], "can't be written"),
    ],
)
def test_bad_input_stops_before_the_measurement(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "calibrate", lambda *a, **k: pytest.fail("measured"))
    (tmp_path / "file").touch()
    filled = [text.replace("{folder}", str(tmp_path)) for text in arguments]
    default = [] if "--output" in filled else ["--output", str(tmp_path / "new.json")]
    assert main(["calibrate", *filled, *default]) == 2
    assert said in capsys.readouterr().err
    assert [p.name for p in Path(tmp_path).iterdir()] == ["file"]


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(InputError, match="device='meta'"):
        calibrate(torch.device("meta"))
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="device='cuda'"):
            calibrate(torch.device("cuda"))
