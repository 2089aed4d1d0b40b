"""The recipe's settings: one table of options, read from defaults, a YAML file and flags."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lbaccel.documents import Malformed, yaml_in
from lbaccel.errors import InputError, brief
from lbaccel.optim.scaling import find_rule
from lbaccel.recipe.bounds import Bounded, BoundedList
from lbaccel.recipe.command_line import CommandParser
from lbaccel.recipe.options import GROUPS, OPTIONS, TITLES, Settings, is_read
from lbaccel.recipe.other_names import other_name
from lbaccel.recipe.presets import find_config, listed
from lbaccel.recipe.values import (
    Option,
    nearest_name,
    nearest_word,
    numbers,
    shown,
    switch,
    word_or_numbers,
    words,
)

PLAN, ORIGIN, ASKED, EXTENSIONS = "plan", "origin", "asked", "extensions"
IDENTITY, CHANGES, TEACHER = "data_identity", "changes", "teacher_weights"
BEFORE = {name: row.before for name, row in OPTIONS.items() if row.before is not None}
ADDED = (
    PLAN,
    ORIGIN,
    ASKED,
    EXTENSIONS,
    IDENTITY,
    CHANGES,
    TEACHER,
)  # to the settings, in config.yaml of a run folder

EPILOG = """examples:
  lbaccel train
      a small ResNet on handwritten digits at global batch 512, in two minutes on a CPU
  lbaccel train --data folder:flowers --model mobilenetv2_100 --pretrained \\
      --global-batch-size 512 --micro-batch-size 8 --norm-batch-size frozen
      finetune at 224 px on the memory of 8 images
  accelerate launch --config_file accelerate_configs/multi_gpu.yaml -m lbaccel.train \\
      --config recipe.yaml --global-batch-size 4096
      the settings of a file on several GPUs, one of them changed
"""


def make_parser(prog: str = "lbaccel train", *, beside: Iterable[str] = ()) -> CommandParser:
    """The command line of the recipe; a flag that was not typed is absent from its result."""
    parser = CommandParser(
        prog=prog,
        description="Train or finetune a timm backbone at a global batch that does not fit.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        beside=beside,
        lists=f"{prog} --help and lbaccel train --help all list its flags." if beside else "",
        argument_default=argparse.SUPPRESS,
    )
    add_recipe(parser)
    return parser


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Declare all that `lbaccel train` takes: files of settings, and the settings."""
    parser.add_argument(
        "--config",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="YAML files of these settings, or names of recipes; later ones win, and flags",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print each value and its origin, and stop"
    )
    add_options(parser)


def add_options(parser: argparse.ArgumentParser, *, without: Collection[str] = ()) -> None:
    """Declare the flags of the recipe; one that was not typed is absent from the result."""
    for name, rows in GROUPS.items():
        group = parser.add_argument_group(TITLES.get(name, name))
        for row in rows:
            if row.name not in without:
                _add_option(group, row)
    if isinstance(parser, CommandParser):
        parser.rare = {n for n, row in OPTIONS.items() if not (row.common or n in without)}
        parser.below = listed


def typed_options(typed: Mapping[str, Any]) -> dict[str, Any]:
    """The options among the values that a parser with `add_options` gives."""
    return {name: typed[name] for name in OPTIONS if name in typed}


def _add_option(group: Any, row: Option) -> None:
    default = row.shown or (
        " ".join(row.default) if isinstance(row.default, tuple) else row.default
    )
    text = f"{row.help} (default: {default})".replace("%", "%%")
    common = {"dest": row.name, "help": text, "default": argparse.SUPPRESS}
    if row.parse is switch:
        group.add_argument(row.flag, nargs="?", const=True, metavar="BOOL", **common)
    elif row.repeatable:
        group.add_argument(row.flag, nargs="+", action="extend", metavar="X", **common)
    elif row.parse in (numbers, words) or isinstance(row.parse, BoundedList):
        group.add_argument(row.flag, nargs="+", metavar="X", **common)
    else:
        choices = "{" + ",".join(row.choices) + "}" if row.choices else "X"
        group.add_argument(row.flag, metavar=choices, **common)


def read_settings(
    argv: Sequence[str], *, prog: str = "lbaccel train", beside: Iterable[str] = ()
) -> tuple[Settings, bool]:
    """The settings, and whether --print-config was given; flags win over YAML.

    Args:
        argv: the command line, without the name of the command.
        prog: the command, for errors and --help.
        beside: further flags of the command, which it reads itself.

    Raises:
        InputError: an unknown flag or key (with the nearest that exists), or a value of no use.
    """
    typed = vars(make_parser(prog, beside=beside).parse_args(argv))
    configs, show = typed.pop("config", ()), typed.pop("print_config", False)
    settings = from_configs(configs)
    return under_a_batch_schedule(layered(settings, typed, origin="flag")), show


def from_configs(texts: Sequence[str], *, defaults_too: bool = False) -> Settings:
    """The settings of the files that --config names, a later one on top of those before.

    Args:
        texts: paths, or names of recipes.
        defaults_too: a file asks for a default that it names (null and [] apart); else it does not.

    Raises:
        InputError: see `find_config` and `from_file`.
    """
    settings = Settings()
    for text in texts:
        found = find_config(text)
        settings = from_file(
            found.path, under=settings, origin=found.origin, defaults_too=defaults_too
        )
        if found.note:
            settings = replace(settings, notes=(*settings.notes, found.note))
    return settings


def from_file(
    path: Path,
    *,
    of_a_run: bool = False,
    under: Settings | None = None,
    origin: str | None = None,
    defaults_too: bool = False,
) -> Settings:
    """The settings of a YAML file on top of others; of a run, where it is so or says it.

    A file that names a default, as a run folder's config.yaml does, asks for nothing by it.

    Args:
        path: the file.
        of_a_run: it is a run folder's.
        under: the other settings; None are the defaults.
        origin: of its values, in place of the path.
        defaults_too: see `from_configs`.
    """
    content, where, below = read_file(path), origin or str(path), under or Settings()
    options = options_in(content, path)
    if PLAN in content:  # a run: its epochs are those that were fitted
        options.pop("max_minutes", None)
    settings = layered(below, options, origin=where)
    added = {}
    if of_a_run or PLAN in content:  # what a run of before did not name has its own value
        added = {n: v for n, v in BEFORE.items() if n not in options}
        if not of_a_run:  # a new run would refuse what nothing reads
            added = {n: v for n, v in added.items() if is_read(OPTIONS[n], settings)}
        settings = layered(settings, added, origin=where)
    before = content.get(ORIGIN)
    origins = before.items() if isinstance(before, Mapping) else ()
    by_default = {name for name, said in origins if said == "default"}
    nothing = (None, ())
    asked = {
        name
        for name in {*options, *added} - by_default
        if (value := settings.value(name)) != OPTIONS[name].default
        or (defaults_too and value not in nothing)
    }
    return replace(settings, given=(below.given - {*options, *added}) | asked)


def layered(settings: Settings, layer: Mapping[str, Any], *, origin: str) -> Settings:
    """The settings with those of a layer on top, which are text or YAML's values.

    A length of the layer takes the place of the other kind of length below it.
    """
    values = {name: parse(OPTIONS[name], raw, origin) for name, raw in layer.items()}
    settings = _without_other_length(settings, values, origin=origin)
    return replace(
        settings.with_values(values),
        origins={**settings.origins, **dict.fromkeys(values, origin)},
        given=settings.given | values.keys(),
    )


_LENGTHS = (frozenset({"max_minutes"}), frozenset({"epochs", "max_updates"}))


def _without_other_length(
    settings: Settings, values: Mapping[str, Any], *, origin: str
) -> Settings:
    for mine, other in (_LENGTHS, _LENGTHS[::-1]):
        replaced = sorted(other & settings.given)
        if replaced and mine & values.keys() and not other & values.keys():
            said = " and ".join(
                f"{n} {shown(settings.value(n))} ({settings.origin(n)})" for n in replaced
            )
            by = " and ".join(sorted(mine & values.keys()))
            return replace(
                settings.with_values({name: OPTIONS[name].default for name in replaced}),
                origins={k: v for k, v in settings.origins.items() if k not in replaced},
                given=settings.given - set(replaced),
                notes=(*settings.notes, f"{by} ({origin}) takes the place of {said}"),
            )
    return settings


def under_a_batch_schedule(settings: Settings) -> Settings:
    """Other defaults with --batch-schedule: its rates are as they are written, nothing decays.

    Raises:
        InputError: a scaling rule was asked for, and no batch that the rate was tuned at.
    """
    if settings.batch.batch_schedule is None:
        return settings
    others: dict[str, Any] = {"schedule": "constant", "warmup": "none", "last_update": "keep"}
    if settings.origin("warmup_epochs") != "default":
        del others["warmup"]
    rate = settings.rate
    if settings.origin("base_lr") != "default":
        others["base_batch_size"] = settings.batch.global_batch_size
        rule = find_rule(rate.lr_scaling)  # none under auto
        if rule is not None and rule.samples is not None:  # it names its own
            del others["base_batch_size"]
        elif (
            rule is not None
            and "base_batch_size" in rule.reads
            and settings.origin("base_batch_size") == "default"
        ):
            raise InputError(
                f"--lr-scaling {rule.name} with --batch-schedule has no reference batch: say at "
                f"how many samples --base-lr {shown(rate.base_lr)} was tuned, --base-batch-size "
                "256, or leave --lr-scaling out, where it is the rate of the first batch."
            )
    return settings.with_values(
        {name: value for name, value in others.items() if settings.origin(name) == "default"}
    )


def show_settings(settings: Settings, *, given_alone: bool = False) -> str:
    """A line a setting, or each that was given: name, value, origin; aligned."""
    names = [name for name in OPTIONS if not given_alone or name in settings.given]
    rows = [(name, str(settings.value(name)), settings.origin(name)) for name in names]
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return "\n".join(f"{n:<{widths[0]}}  {v:<{widths[1]}}  {o}".rstrip() for n, v, o in rows)


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a file, unparsed; what a run folder adds to its own is left out.

    Raises:
        InputError: as `read_file`, or an option that there is not.
    """
    return options_in(read_file(path), path)


def read_file(path: Path) -> dict[Any, Any]:
    """The mapping in a YAML file.

    Raises:
        CannotRead: the system refuses.
        InputError: no YAML, no mapping, or more than `yaml_in` reads.
    """
    try:
        content = yaml_in(path)
    except Malformed as error:
        raise InputError(f"--config {path} is no YAML: {error}.") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"--config {path} holds no mapping; write lines such as 'epochs: 10'.")
    return content


def options_in(content: Mapping[Any, Any], path: Path) -> dict[str, Any]:
    """The options of such a mapping, unparsed, by their names.

    Raises:
        InputError: a name that is none; the text says what it is here, or the nearest one.
    """
    layer = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name in ADDED:
            continue
        if name not in OPTIONS:
            raise InputError(
                f"--config {path}: unknown key {brief(key)}.{_meant(name, value)} "
                "lbaccel train --help all lists them all."
            )
        layer[name] = value
    return layer


def _meant(name: str, value: Any) -> str:
    """A sentence on an unknown key: ours for it, or the nearest; with a space before it."""
    other = other_name(name, known=[row.flag for row in OPTIONS.values()])
    if other is None:
        return nearest_name(name, OPTIONS)
    shown = brief(value).strip("'")
    return f" {other.said(shown)}"


def parse(option: Option, raw: Any, origin: str) -> Any:
    """The value of a setting from text or YAML.

    Raises:
        InputError: it is of no use; the text names the flag, or the key and its file.
    """
    where = option.flag if origin == "flag" else f"{option.name} in {origin}"
    if raw is None or (option.may_be_none and raw == "none" and "none" not in option.choices):
        if option.may_be_none:
            return None
        raise InputError(f"{where} is empty; leave it out for its default, {option.default!r}.")
    if option.says_where:
        return option.parse(raw, where=where)
    is_list = option.parse is numbers or isinstance(option.parse, BoundedList)
    if isinstance(raw, list) and is_list:
        raw = [part for item in raw for part in str(item).replace(",", " ").split()]
        if not raw and origin == "flag":
            raise InputError(f"{where} is empty; give it a number, or leave it out.")
    try:
        many = is_list or option.parse in (words, word_or_numbers)
        if isinstance(raw, (list, dict)) and not many:
            raise ValueError("one value")
        if isinstance(raw, bool) and option.parse is not switch:  # YAML's yes, no, on, off
            raise ValueError("no truth value")
        value = option.parse(raw)
    except (ValueError, TypeError, OverflowError):
        kind = "one word or path"
        if isinstance(option.parse, (Bounded, BoundedList)):
            kind = option.parse.rule
        elif option.parse in (numbers, switch, words):
            kind = {numbers: "numbers", switch: "true or false", words: "words"}[option.parse]
        raise InputError(f"{where}={brief(raw)} is not {kind}.") from None
    if option.choices and value not in option.choices:
        near = nearest_word(str(value), option.choices)
        raise InputError(f"{where}={brief(value)} is not one of {', '.join(option.choices)}.{near}")
    return value
