"""One rank decides, or each does its own part: an error of one is an error of all."""

from __future__ import annotations

import io
from contextlib import redirect_stderr

import tiny  # noqa: F401  registers lbaccel_tiny
from accelerate import Accelerator
from forks import run_forked, values
from runs_of_recipe import break_inside, make_images

from lbaccel import InputError, RunFailed, train
from lbaccel.runs.ranks import decided, on_each_rank


def raised(do):
    try:
        return "ok", do()
    except Exception as error:
        return type(error).__name__, str(error)


def deciding(rank):
    accelerator = Accelerator(cpu=True)

    def fail(error):
        raise error

    return [
        raised(lambda: decided(accelerator, lambda: {"rank": rank})),
        raised(lambda: decided(accelerator, lambda: fail(InputError("no")))),
        raised(lambda: decided(accelerator, lambda: fail(RunFailed("over")))),
        raised(lambda: decided(accelerator, lambda: fail(ZeroDivisionError("by zero")))),
    ]


def test_the_main_process_decides_and_all_hear_an_error_too():
    first, second = values(run_forked(deciding, world_size=2, timeout=60))
    assert first[:3] == second[:3] == [
        ("ok", {"rank": 0}), ("InputError", "no"), ("RunFailed", "over"),
    ]  # fmt: skip
    assert first[3] == ("ZeroDivisionError", "by zero")
    assert second[3] == ("RunFailed", "ZeroDivisionError: by zero")


def each(rank):
    accelerator = Accelerator(cpu=True)

    def only_on(number, error):
        if rank == number:
            raise error
        return rank

    return [
        raised(lambda: on_each_rank(accelerator, lambda: rank)),
        raised(lambda: on_each_rank(accelerator, lambda: only_on(1, InputError("broken.png")))),
        raised(lambda: on_each_rank(accelerator, lambda: only_on(2, RunFailed("full")))),
        raised(lambda: on_each_rank(accelerator, lambda: only_on(1, KeyError("k")))),
    ]


def test_what_one_rank_can_not_do_stops_all_with_its_reason():
    found = values(run_forked(each, world_size=3, timeout=60))
    for rank, (ok, refused, failed, other) in enumerate(found):
        assert ok == ("ok", rank)
        assert refused == ("InputError", "broken.png")
        assert failed == ("RunFailed", "rank 2: full")
        expected = ("KeyError", "'k'") if rank == 1 else ("RunFailed", "rank 1: KeyError: 'k'")
        assert other == expected


FLAGS = [
    *("--model", "lbaccel_tiny", "--img-size", "8", "--data", "folder:images", "--workers", "0"),
    *("--global-batch-size", "8", "--micro-batch-size", "4", "--norm-batch-size", "4"),
    *("--log-with", "run_folder", "--max-updates", "2", "--output"),
]


def trained(rank, output):
    said = io.StringIO()
    with redirect_stderr(said):
        code = train.main([*FLAGS, output])
    return code, said.getvalue()


def test_a_validation_image_that_only_the_second_rank_reads_is_named_by_the_first(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    make_images("images")
    break_inside(tmp_path / "images/val/cat/1.png")  # index 1: of rank 1 alone
    (code, said), (other, silent) = values(
        run_forked(trained, str(tmp_path / "runs"), world_size=2, timeout=120)
    )
    assert (code, other) == (2, 2)
    assert "val/cat/1.png can't be read as an image" in said
    assert silent == "", "each error is printed once"
    (folder,) = (tmp_path / "runs").iterdir()
    assert f"--resume {folder}" in said or "No checkpoint was written." in said


def fails_alone(rank, output):
    """Rank 1 fails in an update of its own; it must know the run folder and its checkpoints."""
    from lbaccel.update.engine import LargeBatch

    plain, count = LargeBatch.update, [0]

    def update(self, *args):
        count[0] += 1
        if count[0] == 2 and rank == 1:
            from lbaccel.errors import RankFailed

            raise RankFailed("this rank alone.")
        return plain(self, *args)

    LargeBatch.update = update
    said = io.StringIO()
    with redirect_stderr(said):
        code = train.main([*FLAGS, output, "--checkpoint-every", "1"])
    return code, said.getvalue()


def test_a_rank_that_fails_alone_names_the_checkpoint_to_go_on_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_images("images")
    outcomes = run_forked(fails_alone, str(tmp_path / "runs"), world_size=2, timeout=60)
    code, said = outcomes[1].value  # the other rank loses its connection in a collective
    (folder,) = (tmp_path / "runs").iterdir()
    assert code == 1 and f"update_000001 is kept. To go on: lbaccel train --resume {folder}" in said
