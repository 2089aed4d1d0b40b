"""The studies that come with lbaccel, files of one's own, and folders of results (no torch)."""

from __future__ import annotations

from pathlib import Path

from lbaccel.errors import InputError, brief
from lbaccel.recipe.values import nearest_name
from lbaccel.studies.folder import STUDY, is_study

LIBRARY = Path(__file__).parent / "library"


def shipped() -> dict[str, Path]:
    """Name to file of each study that comes with lbaccel.

    >>> "simulated-workers" in shipped()
    True
    """
    return {path.parent.name: path for path in sorted(LIBRARY.glob(f"*/{STUDY}"))}


def find_study(text: str) -> Path:
    """The file that NAME|FILE of a command means; that of a folder of results is its study.

    Raises:
        InputError: neither a study of lbaccel, nor a file, nor a folder of results.
    """
    known, path = shipped(), Path(text)
    if text in known:
        return known[text]
    try:
        if is_study(path):
            return path / STUDY
        if path.is_file():
            return path
    except OSError:  # such as a name that is too long
        pass
    near = nearest_name(text, known)
    raise InputError(
        f"{brief(text)} is neither a study of lbaccel, nor a file, nor a folder of a study's "
        f"results.{near} lbaccel study ls lists those that come with it."
    )
