"""Names of other tools: taken where they mean the same, refused with the difference where not."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields

import pytest

from lbaccel import cli
from lbaccel.errors import InputError
from lbaccel.recipe.bounds import Bounded, BoundedList
from lbaccel.recipe.options import OPTIONS
from lbaccel.recipe.other_names import NAMES, other_name
from lbaccel.recipe.settings import make_parser, read_settings
from lbaccel.recipe.values import flag_of, nearest_name, switch, words
from lbaccel.replication.readers.timm_keys import AT_DEFAULT, NEUTRAL, READ

FLAGS = {row.flag: row for row in OPTIONS.values()}
TAKEN = [name for name, row in NAMES.items() if row.ours]
REFUSED = [name for name, row in NAMES.items() if not row.ours and name[-1] != "="]
# of no meaning here at all, or decided before Python starts
WITHOUT_FLAG = {"device", "cuda", "gpu", "gpus"}
WITHOUT_FLAG |= {"no-cuda", "use-cpu", "deepspeed", "fsdp"}


def typed(name):
    return (
        f"-{name}" if len(name) < 3 and name not in ("lr", "wd", "bs", "aa", "dr") else f"--{name}"
    )


def error_of(*words):
    with pytest.raises(InputError) as caught:
        read_settings(list(words))
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_names_flags_that_there_are_and_none_of_ours(name):
    row = NAMES[name]
    assert name == name.strip("-") and "_" not in name
    assert (flag_of(name) in FLAGS) is False, "the flag is ours, so nobody reads this row"
    assert name[-1] != "=" or flag_of(name[:-1]) in FLAGS
    assert row.needs <= set(FLAGS) and bool(row.ours) != bool(row.hint)
    if row.value:
        assert row.value in FLAGS[row.ours].choices
    assert bool(row.needs) == (name not in WITHOUT_FLAG)


def a_value(row):
    """Text that a row takes and that is not its default."""
    if row.choices:
        return next(choice for choice in row.choices if choice != row.default)
    if isinstance(row.parse, BoundedList):
        return "0.25"
    if row.parse is switch:
        return "true"
    if not isinstance(row.parse, Bounded):
        return "word"
    return next(text for text in ("3", "0.25", "0.5") if within(row.parse, text))


def within(rule, text):
    try:
        rule(text)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("name", TAKEN)
def test_a_name_with_our_meaning_is_ours(name):
    row = NAMES[name]
    value = row.value or a_value(FLAGS[row.ours])
    ours, _ = read_settings([row.ours, value])
    others = [[typed(name)]] if row.value else [[typed(name), value], [f"{typed(name)}={value}"]]
    if row.value:
        others += [[typed(name), "True"], [f"{typed(name)}=true"]]
    for line in others:
        found, _ = read_settings(line)
        assert found == ours and found.given == {FLAGS[row.ours].name}, line
        assert read_settings([w[:2] + w[2:].replace("-", "_") for w in line])
    if row.value:
        assert f"Here it is {row.ours} {row.value}." in error_of(f"{typed(name)}=false")
        assert f"Here it is {row.ours} {row.value}." in error_of(typed(name), "False")


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_means_something_else_is_refused_with_the_difference(name):
    for line in ([typed(name)], [typed(name), "0.5"], [f"{typed(name)}=0.5"]):
        said = error_of(*line)
        assert said.startswith(f"unknown flag {typed(name)}. ")
        assert NAMES[name].said(line[-1].split("=")[-1] if line != [typed(name)] else "") in said
        assert "{" not in said and len(said) < 600


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["--lr", "0.1"], ["--base-lr 0.1 becomes 0.2 at 512 with SGD, and 0.141 with AdamW"]),
        (["--lr", "0.1"], ["type --base-lr 0.1 --lr-scaling none."]),
        (["--learning_rate=5e-4"], ["--base-lr 5e-4 becomes 0.001 at 512", "0.000707"]),
        (["--lr"], ["--base-lr X becomes 2 x X at 512"]),
        (["-b", "64"], ["64 on 4 GPUs without accumulation is --global-batch-size 256."]),
        (["--per_device_train_batch_size", "8"], ["is --global-batch-size 32"]),
        (["--gradient_accumulation_steps", "8"], ["8 steps of 64", "--global-batch-size 512"]),
        (["--batch", "16"], ["batch=16 is --global-batch-size 64"]),
        (["--batch", "48"], ["batch=48 is --global-batch-size 48"]),
        (["--batch", "24"], ["batch=24 is --global-batch-size 72"]),
        (["--batch", "96"], ["batch=96 is --global-batch-size 96"]),
        (["--batch", "5e-324"], ["--global-batch-size 64"]),
        (["--device", "cuda:1"], ["CUDA_VISIBLE_DEVICES=1"]),
        (["--lr", "x" * 5000], ["--base-lr 'xxx"]),
    ],
)
def test_the_difference_is_said_in_numbers(line, says):
    said = error_of(*line)
    for part in says:
        assert part in said
    assert len(said) < 1500


def test_a_hint_is_given_only_where_the_command_has_its_flags(capsys):
    for line, hinted in (
        (["plan", "--model", "m", "--global-batch-size", "8", "-b", "4"], True),
        (["compare", "run", "-b", "4"], False),
        (["schedule", "--lr", "0.1"], True),
        (["export", "run", "--lr", "0.1"], False),
        (["start", "photos", "--lr", "0.1"], True),
        (["lr-find", "--lr", "0.1"], True),
    ):
        assert cli.main(line) == 2
        said = capsys.readouterr().err
        assert ("--global-batch-size 16" in said or "--base-lr 0.1" in said) is hinted, line


# -- timm -----------------------------------------------------------------------------------------

SHORT = ("-b", "-vb", "-j", "--dr")
TIMM = [*(flag_of(key) for key in (READ | AT_DEFAULT).keys() | NEUTRAL), *SHORT]


@pytest.mark.parametrize("flag", sorted(TIMM))
def test_each_name_of_timm_is_ours_or_explained_or_answered_with_no_guess(flag):
    parser = make_parser()
    if flag in parser._option_string_actions:
        return
    if other_name(flag, known=FLAGS) is None:
        assert nearest_name(flag, FLAGS) == "", "a guess at what the user of timm means is wrong"
        assert flag[2:].replace("-", "_") not in READ, "lbaccel replicate translates it"


MOST = """
    --data-dir --model --pretrained --num-classes --img-size --batch-size --grad-accum-steps
    --opt --weight-decay --clip-grad --layer-decay --sched --lr --lr-base --warmup-lr
    --min-lr --epochs --warmup-epochs --decay-rate --aa --reprob --mixup --cutmix
    --smoothing --drop --drop-path --model-ema --model-ema-decay --amp --amp-dtype
    --torchcompile --channels-last --grad-checkpointing --workers --seed --output
    --experiment --log-wandb --resume --device
"""


def test_timms_own_parser_has_no_other_names():
    """The keys above are of its script: the ones that most command lines of timm's hold."""
    assert set(words(MOST)) <= set(TIMM)


# -- the others -----------------------------------------------------------------------------------


def of_hugging_face():
    from transformers import TrainingArguments

    return [field.name for field in fields(TrainingArguments)]


ULTRALYTICS = words("""
    task data epochs time patience batch imgsz save save_period cache device workers project name
    exist_ok pretrained verbose seed deterministic single_cls rect cos_lr close_mosaic resume amp
    fraction profile freeze multi_scale compile overlap_mask mask_ratio dropout val split lr0 lrf
    momentum weight_decay warmup_epochs warmup_momentum warmup_bias_lr box cls dfl pose kobj nbs
    hsv_h hsv_s hsv_v degrees translate scale shear perspective flipud fliplr bgr mosaic mixup
    cutmix copy_paste copy_paste_mode auto_augment erasing cfg tracker
""")
TORCHVISION = words("""
    data-path model device batch-size epochs workers opt lr momentum weight-decay norm-weight-decay
    bias-weight-decay transformer-embedding-decay label-smoothing mixup-alpha cutmix-alpha
    lr-scheduler lr-warmup-epochs lr-warmup-method lr-warmup-decay lr-step-size lr-gamma lr-min
    print-freq output-dir resume start-epoch cache-dataset sync-bn test-only auto-augment
    ra-magnitude augmix-severity random-erase amp world-size dist-url model-ema model-ema-steps
    model-ema-decay use-deterministic-algorithms interpolation val-resize-size val-crop-size
    train-crop-size clip-grad-norm ra-sampler ra-reps weights backend use-v2
""")


@pytest.mark.parametrize(
    ("names", "least"),
    [(of_hugging_face, 35), (lambda: ULTRALYTICS, 28), (lambda: TORCHVISION, 30)],
)
def test_a_name_of_another_tool_is_ours_or_explained_or_gets_no_guess(names, least):
    told = 0
    for flag in map(flag_of, names()):
        if flag in FLAGS or other_name(flag, known=FLAGS) is not None:
            told += 1
        else:
            assert nearest_name(flag, FLAGS) == "", flag
    assert told >= least


# -- guesses --------------------------------------------------------------------------------------

UNRELATED = words("""
    verbose quiet debug port host server user name token tokenizer prompt temperature nodes
    node backend strategy profile banana hello world foo bar baz qux cache folds metric
    metrics callbacks hidden layers heads depth width dim vocab beam language audio video
    text sentence question sparse quantize prune onnx tensorrt jit cluster queue partition
    account mail notify email gradient hessian tune trials sampler study plotly dashboard
    browser open close yes force clean delete remove update install version about license
    copyright author date time year month cpu threads cores nice priority lock wait retry
    timeout proxy ssl cert key password login logout left right up down top bottom color
    font size theme dark light zoom rotate crop blur sharpen translate shear degrees mosaic
    perspective hue saturation iou conf boxes masks keypoints tracker save load start stop
    pause step steps iters iterations total ratio decay alpha beta lambda teacher student
    distill pseudo semi self contrastive queue-size projection augment
""")


@pytest.mark.parametrize("word", UNRELATED)
def test_a_word_of_another_world_gets_no_guess(word):
    """Only a flag that holds the very word may be named."""
    for candidates in (list(FLAGS), list(cli.COMMANDS)):
        guess = nearest_name(f"--{word}", candidates)
        guessed = re.sub(r" Did you mean -*(.*)\?", r"\1", guess)
        assert not guess or guessed.startswith(word), guess


@pytest.mark.parametrize("name", OPTIONS)
def test_a_slip_of_the_pen_is_answered_with_the_flag_that_was_meant(name):
    """A letter left out in the middle, or two swapped."""
    flag = flag_of(name)
    middle = 2 + (len(flag) - 2) // 2
    swapped = flag[:middle] + flag[middle + 1 : middle + 2] + flag[middle] + flag[middle + 2 :]
    for slip in {flag[:middle] + flag[middle + 1 :], swapped} - set(FLAGS):
        if len(name) > 4 and "--" not in slip[2:] and other_name(slip, known=FLAGS) is None:
            assert nearest_name(slip, FLAGS) == f" Did you mean {flag}?", slip


def test_the_commands_people_type_elsewhere(capsys):
    for word, near in (
        ("val", "eval"),
        ("evaluate", ""),
        ("tarin", "train"),
        ("predcit", "predict"),
    ):
        assert cli.main([word]) == 2
        said = capsys.readouterr().err
        assert (f"Did you mean {near}?" in said) if near else ("Did you mean" not in said)


# -- key=value ------------------------------------------------------------------------------------


def test_words_as_ultralytics_has_them_are_flags():
    line = ["data=folder:photos", "epochs=10", "imgsz=96", "--seed", "3", "pretrained=True"]
    found, _ = read_settings(line)
    assert (found.data.data, found.rate.epochs, found.data.img_size) == ("folder:photos", 10.0, 96)
    assert found.run.seed == 3 and found.model.pretrained is True
    found, _ = read_settings(["--dry-run", "base_lr=0.1", "--pretrained", "epochs=2"])
    assert found.run.dry_run and found.rate.base_lr == 0.1 and found.model.pretrained


def test_a_word_that_a_flag_takes_stays_its_value(tmp_path, monkeypatch):
    found, _ = read_settings(["--wandb-tags", "a", "epochs=3", "--wandb-name", "seed=4"])
    assert found.run.wandb_tags == ("a", "epochs=3") and found.run.wandb_name == "seed=4"
    assert found.rate.epochs == 20 and found.run.seed == 0
    assert "--milestones" in error_of("--milestones", "30", "epochs=90")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("seed: 5\n")
    found, _ = read_settings(["--config", "c.yaml", "epochs=3"])
    assert found.rate.epochs == 3 and found.run.seed == 5


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("lr0=0.01", "unknown flag --lr0. Elsewhere the rate"),
        ("batch=16", "batch=16 is --global-batch-size 64"),
        ("epoch=3", "does not read 'epoch=3'. Did you mean --epochs?"),
        ("mixup=0.15", "mixup of ultralytics is a probability, --mixup is alpha"),
        ("cutmix=0.15", "cutmix of ultralytics is a probability, --cutmix is alpha"),
        ("mosaic=1.0", "does not read 'mosaic=1.0'. lbaccel train --help"),
        ("epochs=many", "--epochs='many' is not a number"),
    ],
)
def test_a_word_of_that_kind_that_is_none_of_ours_is_refused(word, says):
    assert says in error_of(word)


def test_a_positional_argument_goes_first_and_is_no_flag(monkeypatch):
    from lbaccel.recipe.command_line import CommandParser

    parser = CommandParser(prog="lbaccel x")
    parser.add_argument("data")
    parser.add_argument("--epochs")
    assert vars(parser.parse_args(["epochs=3"])) == {"data": "epochs=3", "epochs": None}
    assert vars(parser.parse_args(["here", "epochs=3"])) == {"data": "here", "epochs": "3"}
    assert vars(parser.parse_args(["epochs=3", "epochs=4"])) == {"data": "epochs=3", "epochs": "4"}
    many = CommandParser(prog="lbaccel y")
    many.add_argument("files", nargs="+")
    many.add_argument("--epochs")
    assert vars(many.parse_args(["a", "epochs=3"])) == {"files": ["a", "epochs=3"], "epochs": None}


def test_a_required_flag_may_be_typed_so():
    from lbaccel.recipe.command_line import CommandParser

    parser = CommandParser(prog="lbaccel x")
    parser.add_argument("--model", required=True)
    assert parser.parse_args(["model=resnet50"]) == argparse.Namespace(model="resnet50")


def test_a_key_of_a_file_is_explained_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text, says in (
        ("lr: 0.1", "unknown key 'lr'. Elsewhere the rate"),
        ("batch_size: 64", "64 on 4 GPUs without accumulation is --global-batch-size 256"),
        ("opt: adamw", "unknown key 'opt'. Here it is --optimizer."),
        ("bf16: true", "unknown key 'bf16'. Here it is --precision bf16."),
        ("data_dir: photos", "Type --data folder:photos."),
        ("xyzzy: 8", "unknown key 'xyzzy'. lbaccel train --help all lists them all."),
    ):
        (tmp_path / "c.yaml").write_text(text)
        assert says in error_of("--config", "c.yaml")
