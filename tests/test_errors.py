from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from lbaccel import BatchPlan, InputError, LargeBatch, UpdateLoader, verify
from lbaccel.cli import main
from lbaccel.data.augment import GroupMix, KeyedImages
from lbaccel.data.sources import open_source
from lbaccel.data.split import split_by_hash
from lbaccel.errors import check_seed
from lbaccel.randomness.masks import KeyedRandomness
from lbaccel.verification.ddp.against import verify_against_ddp

PLAN = BatchPlan(global_batch_size=4, micro_batch_size=2)
BATCH = (torch.zeros(4, 2), torch.zeros(4, 1))


def mse(model, micro_batch):
    return F.mse_loss(model(micro_batch[0]), micro_batch[1])


ENTRIES = {
    "LargeBatch": lambda seed: LargeBatch(Accelerator(cpu=True), PLAN, seed=seed),
    "KeyedRandomness": lambda seed: KeyedRandomness(seed, torch.device("cpu")),
    "UpdateLoader": lambda seed: UpdateLoader([0] * 8, PLAN, seed=seed),
    "GroupMix": lambda seed: GroupMix(3, mixup=0.2, seed=seed),
    "KeyedImages": lambda seed: KeyedImages(None, (0.5,), (0.5,), seed=seed),  # type: ignore
    "split": lambda seed: split_by_hash(
        "abcd", [0] * 4, classes=["x"], val_fraction=0.25, seed=seed
    ),
    "open_source": lambda seed: open_source("digits", seed=seed),
    "verify": lambda seed: verify(torch.nn.Linear(2, 1), mse, BATCH, seed=seed),
    "verify_against_ddp": lambda seed: verify_against_ddp(
        torch.nn.Linear(2, 1), mse, BATCH, gpus=2, seed=seed
    ),
}


@pytest.mark.parametrize("seed", [2**64, 0.5, 1.0, -1, True, np.float64(2), "0", None])
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_seed_that_is_no_whole_number_of_64_bits_is_refused_by_name(entry, seed):
    with pytest.raises(InputError, match=r"^seed=.* is not a whole number from 0 to 2\^64 - 1"):
        ENTRIES[entry](seed)


@pytest.mark.parametrize("seed", [2**64 - 1, 2**63, 0, np.int64(7), np.uint64(2**63)])
def test_every_seed_of_64_bits_is_taken_as_it_is(seed):
    assert check_seed("seed", seed) == int(seed)
    for entry in ("LargeBatch", "UpdateLoader", "GroupMix", "split"):
        ENTRIES[entry](seed)


def test_the_largest_seeds_of_64_bits_draw_other_samples():
    orders = []
    for seed in (0, 2**63, 2**64 - 1):
        loader = UpdateLoader(list(range(64)), PLAN, seed=seed)
        orders.append(tuple(int(x) for update in loader for _, data in update for x in data))
    assert len(set(orders)) == 3


@pytest.mark.parametrize(("seed", "says"), [(2**64, "--seed='1844674"), (-1, "--seed='-1'")])
def test_verify_on_the_command_line_refuses_a_seed_by_its_flag(seed, says, capsys):
    assert main(["verify", "--model", "resnet10t", f"--seed={seed}"]) == 2
    assert says in capsys.readouterr().err
