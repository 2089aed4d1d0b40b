"""The files behind `--config`: the user's own, or lbaccel's recipes by their names (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lbaccel.configs.shipped import folder
from lbaccel.errors import InputError, brief
from lbaccel.recipe.values import nearest_name
from lbaccel.runs.columns import columns

RECIPES = "recipes"  # a folder of YAML files: inside an installed package, else at the top


@dataclass(frozen=True)
class ConfigFile:
    """A file of settings.

    Attributes:
        path: where it lies.
        origin: of its values, as `--print-config` and a run's config.yaml say it.
        note: a sentence for the user; "" is none.
    """

    path: Path
    origin: str
    note: str = ""


def recipes() -> dict[str, Path]:
    """Name to file of each recipe that comes with lbaccel.

    >>> list(recipes())[:2]
    ['finetune-large', 'finetune-small']
    """
    return {path.stem: path for path in sorted(folder(RECIPES).glob("*.yaml"))}


def find_config(text: str) -> ConfigFile:
    """The file that `--config TEXT` means; one in the current folder goes before a recipe.

    Raises:
        InputError: a plain name of neither a file nor a recipe.

    >>> find_config("finetune-small").origin
    'recipe finetune-small'
    """
    path = Path(text)
    if path.suffix or len(path.parts) != 1:
        return ConfigFile(path, text)
    known = recipes()
    own = next((p for p in (path, Path(f"{text}.yaml")) if text in known and p.is_file()), None)
    if own is not None:
        note = f"--config {text}: {own} of this folder is read, not lbaccel's recipe of that name"
        return ConfigFile(own, str(own), note)
    if _is_there(path):
        return ConfigFile(path, text)
    if text in known:
        return ConfigFile(known[text], f"recipe {text}")
    near = nearest_name(text, known)
    raise InputError(
        f"--config {brief(text)} is neither a file here nor a recipe of lbaccel.{near} "
        f"Recipes: {', '.join(known)}."
    )


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # such as a name that is too long
        return False


def listed() -> str:
    """The recipes with their first lines, for a help."""
    rows = []
    for name, path in recipes().items():
        with path.open(encoding="utf-8") as lines:
            rows.append((f"  {name}", next(lines).removeprefix("#").strip()))
    return "\n".join(["", "recipes that --config takes by name:", *columns(rows), ""])
