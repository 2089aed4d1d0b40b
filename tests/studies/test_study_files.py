"""A study's file: what it says at a scale, and one sentence for each fault."""

import copy

import pytest
import yaml

from lbaccel.errors import InputError
from lbaccel.studies.checks import tune_of
from lbaccel.studies.describe import describe, describe_runs
from lbaccel.studies.find import find_study, shipped
from lbaccel.studies.read import as_mapping, read_study, scales_in, study_of
from lbaccel.studies.spec import NORM, ArmBatch, ArmPair

SMALL = {
    "name": "mine",
    "settings": {
        "data": "folder:photos",
        "test_split": "val",
        "base_lr": 0.1,
        NORM: 32,
        "epochs": 2,
    },
    "arms": {"one": {"title": "as it is"}, "two": {"settings": {"base_lr": 0.2}}},
    "batches": [32, 64],
    "seeds": 2,
    "baseline": {"arm": "one", "batch": 32},
    "pairs": [["two", "one"]],
    "target": 90,
}


def written(tmp_path, **changed):
    path = tmp_path / "study.yaml"
    found = {**copy.deepcopy(SMALL), **changed}
    path.write_text(yaml.safe_dump({k: v for k, v in found.items() if v is not ...}))
    return path


def test_arms_batches_and_seeds_are_the_runs(tmp_path):
    study = read_study(written(tmp_path))
    names = [cell.name for cell in study.cells()]
    assert names[:4] == ["one-gbs32-seed0", "one-gbs64-seed0", "two-gbs32-seed0", "two-gbs64-seed0"]
    assert len(names) == 8
    assert study.cells()[3].settings == {
        **SMALL["settings"],
        "base_lr": 0.2,
        "global_batch_size": 64,
        "seed": 0,
    }
    assert study.pairs == (ArmPair("two", "one"),)
    assert study.baseline == ArmBatch("one", 32)


def test_layers_win_in_their_order_and_null_leaves_a_setting_out(tmp_path):
    arm = {"settings": {"epochs": 3}, "per_batch": {64: {"epochs": None, "base_lr": 0.4}}}
    study = read_study(written(tmp_path, arms={"one": arm}, pairs=...))
    small, large = (study.cell(ArmBatch("one", b), 0).settings for b in (32, 64))
    assert (small["epochs"], small["base_lr"]) == (3, 0.1)
    assert "epochs" not in large
    assert large["base_lr"] == 0.4


def test_a_network_without_batch_norm_is_stated_as_such_and_the_run_is_given_nothing(tmp_path):
    settings = {**SMALL["settings"], NORM: "none"}
    study = read_study(written(tmp_path, settings=settings))
    assert study.stated(ArmBatch("one", 32))[NORM] == "none"
    assert NORM not in study.cell(ArmBatch("one", 32), 0).settings


def test_a_scale_is_laid_on_top_and_may_take_a_few_arms(tmp_path):
    scales = {
        "paper": {},
        "small": {
            "settings": {"epochs": 1},
            "only": ["one"],
            "pairs": [],
            "arms": {"one": {"settings": {"momentum": 0.8}}},
        },
    }
    path = written(tmp_path, scales=scales)
    assert scales_in(path) == ["paper", "small"]
    paper, small = read_study(path, "paper"), read_study(path)
    assert [arm.name for arm in paper.arms] == ["one", "two"]
    assert (small.scale, [arm.name for arm in small.arms]) == ("small", ["one"])
    assert small.cells()[0].settings["epochs"] == 1
    assert small.cells()[0].settings["momentum"] == 0.8
    assert paper.cells()[0].settings["epochs"] == 2


def test_a_study_that_was_read_is_written_and_read_again_as_it_was(tmp_path):
    from lbaccel.runs.folder import plain

    for path in (written(tmp_path), *shipped().values()):
        for scale in scales_in(path) or [None]:
            study = read_study(path, scale)
            again = study_of(
                yaml.safe_load(yaml.safe_dump(plain(as_mapping(study)), sort_keys=False)), None
            )
            assert again == study, (path, scale)


FAULTS = {
    "no norm": ({"settings": {"data": "digits"}}, "arm one at batch 32 states no norm_batch_size"),
    "no study": ({"name": ...}, "name is None, and has to be text"),
    "name": ({"name": "../x"}, "is no word"),
    "no arms": ({"arms": {}}, "it has no arms"),
    "arm's name": ({"arms": {"a/b": {}}}, "is no word"),
    "unknown": ({"armz": {}}, "unknown entry 'armz'. Entries: arms,"),
    "of an arm": ({"arms": {"one": {"lr": 1}}}, "arm one has an unknown entry 'lr'"),
    "no batches": ({"batches": []}, "batches [] : give".replace(" :", ":")),
    "order": ({"batches": [64, 32]}, "each larger than the one before"),
    "0 seeds": ({"seeds": 0}, "seeds 0: a study has 1 to 1000"),
    "seeds": ({"seeds": [1, 1]}, "different whole numbers"),
    "true seeds": ({"seeds": True}, "seeds is True, and has to be a list"),
    "setting": ({"settings": {"base_lrr": 1}}, "no setting 'base_lrr'. Did you mean base_lr?"),
    "seed": ({"settings": {"seed": 1}}, "seed is no setting of a study"),
    "baseline": ({"baseline": {"arm": "one", "batch": 7}}, "baseline one at 7 is no run"),
    "pair": ({"pairs": [["two", "three"]]}, "there is no arm 'three'"),
    "part": ({"settings": {NORM: "batch / 7"}}, "is no whole number of samples there"),
    "a long batch": ({"arms": {"one": {"per_batch": {"9" * 5000: {}}}}}, "a whole number from 1"),
    "per batch": ({"arms": {"one": {"per_batch": {7: {}}}}}, "per_batch names 7"),
    "tune": ({"tune": "base_lr"}, "is no grid"),
    "tune norm": ({"tune": f"{NORM} 16,32"}, "is no hyper-parameter"),
    "tune fixed": ({"tune": "base_lr x 1,2", "fixed": ["base_lr"]}, "no grid may move it"),
    "tune what is not": ({"tune": "betaz x 1,2"}, "there is no setting 'betaz'"),
    "tune factors of nothing": ({"tune": "clip_grad_norm x 1,2"}, "states no number for"),
    "only": ({"only": [["one"]]}, "only is ['one'], and has to be text"),
    "expected": ({"expected": {"on": {32: 90.0}}}, "expected: there is no arm 'on'"),
    "long name": ({"arms": {"a" * 300: {}}}, "of at most 80 characters"),
    "huge target": ({"target": 10**400}, "has to be a number"),
    "fixed": ({"fixed": ["bogus"]}, "fixed: there is no setting 'bogus'"),
    "itself": ({"pairs": [["one", "one"]]}, "one is compared with itself"),
    "pair's batch": (
        {"pairs": [{"arm": "one", "against": "two", "batch": 9}]},
        "one at 9 is no run of the study",
    ),
    "landscapes": (
        {"landscapes": [{"arm": "one", "batch": 32}, {"arm": "one", "batch": 32, "x": "0:1:3"}]},
        "one-gbs32-1d is there twice",
    ),
    "metric": ({"metric": "val/top_1"}, "none of an evaluation: val/top1"),
    "target's metric": ({"target": {"metric": "train/loss", "value": 1}}, "none of an evaluation"),
    "spread": ({"spread": -1}, "a number above 0"),
    "target": ({"target": "high"}, "target is 'high', and has to be a mapping"),
    "too many": ({"batches": list(range(1, 2000)), "seeds": 1000, "baseline": None}, "at most"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_sentence_that_names_the_entry(fault, tmp_path):
    changed, says = FAULTS[fault]
    if "pairs" not in changed:
        changed = {"pairs": ..., **changed}
    with pytest.raises(InputError) as raised:
        read_study(written(tmp_path, **changed))
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["[1, 2", "- 1", "a: &a [*a]", "", "name: 3", "\x00"])
def test_a_file_of_anything_is_one_sentence(text, tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as raised:
        read_study(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_scale_that_is_not_there_is_named_with_those_that_are(tmp_path):
    with pytest.raises(InputError, match="it has paper"):
        read_study(written(tmp_path, scales={"paper": {}}), "smoke")
    with pytest.raises(InputError, match="Leave --scale out"):
        read_study(written(tmp_path), "smoke")


@pytest.mark.parametrize("text", ["base_lr x 1", "base_lr x 0,1", "lr=1,2", "a x 1,1", ""])
def test_a_grid_needs_two_different_numbers_above_0(text):
    with pytest.raises(InputError, match="is no grid"):
        tune_of(text)


def test_a_grid_of_values_and_one_of_factors():
    assert tune_of("base-lr 0.2,0.1").at(5.0) == (0.1, 0.2)
    assert tune_of("--base-lr x 2 4").at(5.0) == (10.0, 20.0)
    assert str(tune_of("base_lr x 0.5,1")) == "base_lr x 0.5,1"
    third = tune_of(f"base_lr x {1 / 3!r},1")
    assert tune_of(str(third)) == third


def test_a_study_is_found_by_name_file_and_folder(tmp_path):
    path = written(tmp_path)
    assert find_study(str(path)) == find_study(str(tmp_path)) == path
    assert find_study("trivial") == shipped()["trivial"]
    with pytest.raises(InputError, match="Did you mean trivial"):
        find_study("trivia1")
    with pytest.raises(InputError, match="neither"):
        find_study("x" * 5000)


EVERY = [(name, scale) for name, path in shipped().items() for scale in scales_in(path)]


def test_each_shipped_study_has_the_three_scales():
    assert len(shipped()) >= 12
    assert {scale for _, scale in EVERY} == {"paper", "small", "smoke"}
    assert len(EVERY) == 3 * len(shipped())


@pytest.mark.parametrize("name", shipped())
def test_the_readme_of_a_shipped_study_is_its_description(name):
    """Write them anew: python -m lbaccel study show NAME > README.md of its folder."""
    path = shipped()[name]
    text = describe({scale: read_study(path, scale) for scale in scales_in(path)})
    assert (path.parent / "README.md").read_text() == text


@pytest.mark.parametrize(("name", "scale"), EVERY)
def test_each_arm_of_a_shipped_study_can_run_and_states_its_norm_batch(name, scale):
    from lbaccel.studies.outlook import check_cells

    study = read_study(shipped()[name], scale)
    check_cells(study)
    assert study.source is not None
    assert study.source.title
    assert all(cell.settings[NORM] for cell in study.cells())
    assert NORM in describe_runs(study)


@pytest.mark.parametrize("name", shipped())
def test_the_small_scale_keeps_250_updates_and_three_seeds(name):
    from lbaccel.studies.outlook import _length, settings_of

    study = read_study(shipped()[name], "small")
    assert len(study.seeds) == 3
    assert len(study.batches) >= 1
    if name == "finetune-224":  # 800 photographs: its file says how few updates it has
        assert "too few to judge" in study.note
        return
    for cell in study.cells():
        found = _length(cell, settings_of(cell), 10_000)
        grows = "batch_schedule" in cell.settings
        assert grows or found.num_updates >= 250, cell.name


# The table of update counts of the thesis (reference E), ceil(50000 / B) an epoch.
UPDATES = {
    "lrd-128": 78_200,
    "bsi-128": 28_613,
    "bsi2-256": 20_429,
    "bsi2-512": 10_255,
    "bsi2-1024": 5_198,
    "lrd2-2048": 5_000,
    "bsi2-2048": 2_699,
    "bsi224-2048": 2_617,
    "bsi2-4096": 1_429,
    "bsi2-8192": 774,
    "mixed": 50_531,
    "lrd2-50000": 200,
    "fast-8192": 3_666,
    "fast-50000": 2_536,
    "instant-8192": 3_320,
    "lrd2-8192": 1_400,
}


def test_the_paper_scale_of_batch_increase_has_the_sources_update_counts():
    from lbaccel.studies.outlook import _length, settings_of

    study = read_study(shipped()["batch-increase"], "paper")
    cells = [cell for cell in study.cells() if cell.seed == 0]
    found = {c.arm: _length(c, settings_of(c), 50_000).num_updates for c in cells}
    assert found == UPDATES


def test_loss_dropout_at_paper_scale_has_the_sources_updates():
    from lbaccel.studies.outlook import _length, settings_of

    study = read_study(shipped()["loss-dropout"], "paper")
    cell = study.cells()[0]
    assert _length(cell, settings_of(cell), 50_000).num_updates == 46_771
