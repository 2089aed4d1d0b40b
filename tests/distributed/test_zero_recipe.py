"""The very command of the README on CPU ranks: accelerate launch with a DeepSpeed config."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

from lbaccel import train
from lbaccel.models import adapt_stem

pytest.importorskip("deepspeed", reason="not run: pip install 'lbaccel[deepspeed]'")

ROOT = Path(__file__).parent.parent.parent
FLAGS = [
    *("--data", "digits", "--epochs", "2", "--log-with", "run_folder", "--checkpoint-every", "3"),
    *("--drop-rate", "0.1", "--activation-checkpointing", "full"),
]


def write_configs(folder: Path, stage: int) -> Path:
    ds = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 1000},
    }
    (folder / "ds.json").write_text(json.dumps(ds))
    accelerate = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "use_cpu": False,
        "num_machines": 1,
        "machine_rank": 0,
        "deepspeed_config": {
            "deepspeed_config_file": str(folder / "ds.json"),
            "zero3_init_flag": False,
        },
    }
    (folder / "zero.yaml").write_text(yaml.safe_dump(accelerate))
    return folder / "zero.yaml"


def launch(config: Path, num_processes: int, *flags: str, folder: Path) -> str:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--num_processes", str(num_processes), "--main_process_port", "0"]
    done = subprocess.run(
        [*command, "-m", "lbaccel.train", *flags],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        },
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout


def metrics(run: Path, key: str) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row[key] for row in map(json.loads, lines) if key in row]


@pytest.mark.slow
def test_zero_3_trains_as_one_process_does_and_its_checkpoint_goes_on_without_it(tmp_path):
    config = write_configs(tmp_path, 3)
    launch(config, 3, *FLAGS, "--max-updates", "3", folder=tmp_path)
    (run,) = (tmp_path / "runs").iterdir()
    whole = load_file(run / "checkpoints" / "last" / "model.safetensors")
    model = timm.create_model("resnet10t", num_classes=10, in_chans=1)
    adapt_stem(model)
    model.load_state_dict(whole)  # every tensor in its whole shape
    assert train.main(["--resume", str(run), "--max-updates", "6"]) == 0

    assert train.main([*FLAGS, "--output", str(tmp_path / "plain")]) == 0
    (plain,) = (tmp_path / "plain").iterdir()
    losses, truth = metrics(run, "train/loss"), metrics(plain, "train/loss")
    assert len(losses) == len(truth) == 6
    assert losses[:3] == pytest.approx(truth[:3], rel=1e-4)
    assert losses == pytest.approx(truth, rel=0.05)  # float32 trajectories part slowly
    assert metrics(run, "val/top1")[-1] > 80 and torch.isfinite(whole["conv1.0.weight"]).all()
