"""The publishable part of a run: settings and command without paths, trackers and machine."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from lbaccel.recipe.options import OPTIONS, Settings, is_read

_PROGRAMS = {"__main__.py": "lbaccel", "train.py": "lbaccel train"}


def without_folders(text: str) -> str:
    """The last part of a path, or of the path behind `folder:` and its like; other text as it is.

    >>> without_folders("folder:/home/me/flowers/"), without_folders("resnet50.a1_in1k")
    ('folder:flowers', 'resnet50.a1_in1k')
    >>> without_folders("hf:owner/flowers"), without_folders("hf:/home/me/flowers")
    ('hf:owner/flowers', 'hf:flowers')
    >>> without_folders("hf-hub:timm/resnet18.a1_in1k"), without_folders("/home/me/runs/teacher")
    ('hf-hub:timm/resnet18.a1_in1k', 'teacher')
    """
    if re.match(r"(hf:|hf-hub:|timm:hfds/)[\w-]+/[\w.-]+(:[\w-]+)?$", text):  # a name of the hub's
        return text
    form, colon, path = text.partition(":")
    if not colon or len(form) < 2:  # C:\\data is a path
        form, colon, path = "", "", text
    parts = [part for part in re.split(r"[\\/]+", path) if part not in ("", ".", "..", "~")]
    if len(parts) < 2 and not re.search(r"[\\/]", path):
        return text
    return form + colon + (parts[-1] if parts else "")


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run's `config.yaml` that another machine can use; paths lose their folders.

    A setting that nothing reads beside the others is left out: a new run would refuse it. So is
    `max_minutes` beside the epochs that were fitted to it.

    >>> settings({"data": "folder:/data/flowers", "output": "runs", "seed": 3, "wandb_name": "a"})
    {'data': 'folder:flowers', 'seed': 3}
    """
    of_recipe = {name: value for name, value in config.items() if name in OPTIONS}
    if "epochs" in of_recipe:  # those that were fitted to the minutes
        of_recipe.pop("max_minutes", None)
    whole = Settings().with_values(of_recipe)
    return {
        name: _portable(name, value) if isinstance(value, str) else value
        for name, value in of_recipe.items()
        if not OPTIONS[name].private and is_read(OPTIONS[name], whole)
    }


def settings_yaml(config: Mapping[str, Any]) -> str:
    """`settings` as the YAML of `lbaccel train --config`."""
    return yaml.safe_dump(settings(config), sort_keys=False, allow_unicode=True)


def command(line: str) -> str:
    """A command line without the flags of a machine or an account; paths lose their folders.

    >>> command("/opt/bin/lbaccel train --data folder:/data/flowers --wandb-tags a b --seed 3")
    'lbaccel train --data folder:flowers --seed 3'
    """
    try:
        words = shlex.split(line)
    except ValueError:  # an open quote: not written by lbaccel
        return ""
    if not words:
        return ""
    program = without_folders(words[0])
    kept = shlex.split(_PROGRAMS.get(program, program))
    return shlex.join([*kept, *_kept(words[1:])])


def _portable(name: str, value: str) -> str:
    """A value of an option without the folders of a path; one of its choices is none."""
    of_choice = name in OPTIONS and value in (OPTIONS[name].choices or ())
    return value if of_choice else without_folders(value)


def _kept(words: Iterable[str]) -> list[str]:
    kept: list[str] = []
    private, name = False, ""
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            name = flag[2:].replace("-", "_")
            private = name in OPTIONS and OPTIONS[name].private
            word = flag + equals + _portable(name, value)
        else:
            word = _portable(name, word)
        if not private:
            kept.append(word)
    return kept
