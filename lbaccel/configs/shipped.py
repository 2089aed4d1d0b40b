"""The YAML and JSON files that come with lbaccel: where they are, and copies of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from lbaccel.errors import InputError
from lbaccel.runs.folder import atomic_write_bytes
from lbaccel.runs.outputs import what_is_there

YAML_FOLDER, JSON_FOLDER = "accelerate_configs", "ds_configs"
PACKAGE = Path(__file__).parent.parent


@dataclass(frozen=True)
class Shipped:
    """One config: the launcher's YAML, and the DeepSpeed JSON that it names, if it names one."""

    name: str
    yaml: Path
    json: Path | None

    @property
    def use(self) -> str:
        """When to use it: the first line of the YAML."""
        with self.yaml.open(encoding="utf-8") as lines:
            return next(lines).removeprefix("#").strip()

    @property
    def files(self) -> list[Path]:
        """The YAML, and the JSON where there is one."""
        return [self.yaml] if self.json is None else [self.yaml, self.json]


def folder(name: str) -> Path:
    """A folder of shipped files: inside an installed package, beside it in a source checkout.

    >>> folder("ds_configs").name
    'ds_configs'
    """
    for home in (PACKAGE, PACKAGE.parent):
        if (home / name).is_dir():
            return home / name
    raise AssertionError(f"{name} is neither in {PACKAGE} nor beside it")


def shipped() -> list[Shipped]:
    """Every config that comes with lbaccel, by name.

    >>> [config.name for config in shipped()][:3]
    ['cpu', 'fsdp2', 'multi_gpu']
    """
    found: list[Shipped] = []
    for path in sorted(folder(YAML_FOLDER).glob("*.yaml")):
        block = yaml.safe_load(path.read_text(encoding="utf-8")).get("deepspeed_config") or {}
        named = block.get("deepspeed_config_file")
        json = None if named is None else folder(JSON_FOLDER) / Path(named).name
        found.append(Shipped(path.stem, path, json))
    return found


def find(name: str) -> Shipped:
    """The config of that name.

    Raises:
        InputError: there is none.

    >>> find("zero1").json.name
    'zero1.json'
    """
    known = {config.name: config for config in shipped()}
    if name not in known:
        near = difflib.get_close_matches(name.removesuffix(".yaml"), known, n=1)
        hint = near[0] if near else "ls"
        raise InputError(
            f"no config is called {name!r}; there are {', '.join(known)}. "
            + (f"Use {hint}." if near else "`lbaccel configs ls` says what each is for.")
        )
    return known[name]


def copy(
    configs: Sequence[Shipped], to: Path, *, recipes: Sequence[Path] = (), force: bool = False
) -> list[Path]:
    """Copy configs into `to/accelerate_configs` and `to/ds_configs`, recipes into `to`.

    Returns the files written.

    The folders are kept because a YAML names its JSON from where it is launched: from `to`.

    Raises:
        InputError: a file that is there already, unless `force`; a place that can't be written.
    """
    files = {path: to / path.parent.name / path.name for c in configs for path in c.files}
    files |= {path: to / path.name for path in recipes}
    return write({target: path.read_bytes() for path, target in files.items()}, force=force)


def write(files: dict[Path, bytes], *, force: bool) -> list[Path]:
    """Write all files, or none where one is there already.

    Raises:
        InputError: a file that is there already, unless `force`; a link or a folder in its place,
            in every case; a place that can't be written.
    """
    for path in files:
        if (found := what_is_there(path)) is not None:
            raise InputError(f"{path} can't be written: {found}. Use another --to DIR.")
    there = [str(path) for path in files if path.exists()]
    if there and not force:
        raise InputError(
            f"{', '.join(there)}: there already. Use --force to overwrite, or another --to DIR."
        )
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_bytes(path, content)
    except OSError as error:
        raise InputError(f"can't write: {error}. Use another --to DIR.") from error
    return list(files)


def launch_lines(configs: Sequence[Shipped], to: Path) -> Iterator[str]:
    """How to launch each, from the folder that its paths start in."""
    prefix = "" if to.resolve() == Path.cwd() else f"cd {to} && "
    for config in configs:
        yield (
            f"{prefix}accelerate launch --config_file {YAML_FOLDER}/{config.yaml.name} "
            "-m lbaccel.train"
        )
