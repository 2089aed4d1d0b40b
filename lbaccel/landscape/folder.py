"""The folder of a landscape: its points, one file of a rank, until the surface is whole.

`landscape.json` says from the start which landscape the folder holds, so that another one is
refused; a killed process loses no point but the one that it was at.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from lbaccel.documents import Malformed, json_in, json_of, text_of
from lbaccel.errors import InputError
from lbaccel.product.files import check_folder
from lbaccel.runs.folder import LOCK, WRITER, atomic_write_text, strict_json
from lbaccel.text import one_line

MADE_BY = "lbaccel landscape"
SURFACE, TABLE = "landscape.json", "surface.csv"
CURVE, CONTOURS, RELIEF = "curve.png", "contours.png", "relief.png"
PICTURES = (CURVE, CONTOURS, RELIEF)
_PART = re.compile(r"points-\d{5}\.jsonl")

Points = dict[int, tuple[float | None, float]]
"""A point's place, row by row (x runs first), to its loss (None: not finite) and top-1 in %."""


class _Names:
    """The names of all files of such a folder."""

    def __contains__(self, name: object) -> bool:
        return name in (SURFACE, TABLE, *PICTURES, LOCK, WRITER) or bool(_PART.fullmatch(str(name)))


def check_own(folder: Path) -> None:
    """Stop where the folder holds anything but a landscape, whole or not; nothing is written.

    Raises:
        InputError: it holds other files, or it can't be written to.
    """
    left = {LOCK, WRITER}  # by a process that was killed at once
    if (
        folder.is_dir()
        and not folder.is_symlink()
        and left >= {path.name for path in folder.iterdir()}
    ):
        return
    names: Any = _Names()
    check_folder(folder, files=names, record=SURFACE, made_by=MADE_BY, kind="landscape")


def open_folder(folder: Path, identity: Mapping[str, Any]) -> Points:
    """The points that are there; the folder, empty or absent, becomes that of this landscape.

    The files of ranks are read into `landscape.json`, and removed.

    Args:
        folder: which `check_own` let pass.
        identity: of the landscape: all that decides its surface.

    Raises:
        InputError: another landscape, or a damaged one; nothing is changed.
    """
    found = _read(folder, identity) if (folder / SURFACE).is_file() else {}
    if len(found) == num_points(identity):
        return found
    for part in _parts(folder):
        found |= _points_in(part, num=num_points(identity))
    write_surface(folder, identity, found)
    remove_parts(folder)
    return found


def remove_parts(folder: Path) -> None:
    """Remove the files of ranks, whose points stand in `landscape.json`."""
    for part in _parts(folder):
        part.unlink()


def _parts(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if _PART.fullmatch(path.name))


def num_points(identity: Mapping[str, Any]) -> int:
    """Of the grid."""
    y = identity["y"]
    return identity["x"]["num"] * (1 if y is None else y["num"])


def points_file(folder: Path, rank: int) -> IO[str]:
    """The file that a rank adds its points to, open; see `add_point`."""
    folder.mkdir(parents=True, exist_ok=True)  # another machine may not see that of the first rank
    return (folder / f"points-{rank:05}.jsonl").open("w", encoding="utf-8")


def add_point(file: IO[str], place: int, loss: float | None, top1_pct: float) -> None:
    """Write a point, so that it outlives this process."""
    line = {"point": place, "loss": loss, "top1_pct": top1_pct}
    file.write(strict_json(line) + "\n")
    file.flush()


def write_surface(
    folder: Path, identity: Mapping[str, Any], points: Points, more: Mapping[str, Any] | None = None
) -> None:
    """Write `landscape.json`: what the landscape is of, and its points.

    The file is JSON, an object with the entries

    - `made_by`: "lbaccel landscape"; `complete`: whether all points are there;
    - `x`, `y`: `{"low", "high", "num", "values": [num]}`; `y` is null for a curve;
    - `loss`, `top1_pct`: the surface, [x.num] for a curve and [y.num][x.num] with `y`. Mean
      cross-entropy, and right predictions in %. Where a point is not computed yet both are null;
      where the loss is not finite it alone is null;
    - `direction` (weights, states), `norm` (filter, layer, weight), `ignore` (biasbn, none) and
      `seed`; the last three are null where no direction is random;
    - `weights`, `second`: of each model `{"sha256", "ema"}`, and with it, once complete, `path`,
      `model`, `update`; `second` is null where x is a random direction, and else x = 1;
    - `data`: `{"split", "fingerprint", "num_samples"}`, and with it, once complete, `data` and
      `description`;
    - `lengths`: `{"x", "y"}`, the Euclidean norm of each direction, and `cosine`, that of the angle
      between both or null; `versions`. These stand there once complete.
    """
    num, width = num_points(identity), identity["x"]["num"]
    rows = [
        [points.get(i, (None, None)) for i in range(j, j + width)] for j in range(0, num, width)
    ]
    both = [[[point[k] for point in row] for row in rows] for k in (0, 1)]
    if identity["y"] is None:
        both = [rows[0] for rows in both]
    content = {"made_by": MADE_BY, "complete": len(points) == num, **identity, **(more or {})}
    content |= {"loss": both[0], "top1_pct": both[1]}
    atomic_write_text(folder / SURFACE, strict_json(content, indent=1) + "\n")


def write_table(folder: Path, identity: Mapping[str, Any], points: Points) -> None:
    """Write `surface.csv`: x, y where there is one, loss (empty where not finite), top1_pct."""
    x, y = identity["x"]["values"], identity["y"]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["x", *(["y"] if y else []), "loss", "top1_pct"])
    for place in sorted(points):
        loss, top1 = points[place]
        beside = [y["values"][place // len(x)]] if y else []
        writer.writerow([x[place % len(x)], *beside, "" if loss is None else loss, top1])
    atomic_write_text(folder / TABLE, file.getvalue())


def _read(folder: Path, identity: Mapping[str, Any]) -> Points:
    """The points in `landscape.json`, which must be of this landscape."""
    shown = one_line(str(folder))
    try:
        content = json_in(folder / SURFACE)
        before = {name: _like(content[name], now) for name, now in identity.items()}
    except (Malformed, KeyError, TypeError) as error:
        raise InputError(_damaged(shown)) from error
    other = [name for name, now in identity.items() if before[name] != now]
    if other:
        raise InputError(
            f"--output {shown} holds another landscape: {', '.join(map(_told, other))} "
            f"{'differs' if len(other) == 1 else 'differ'}. Give another folder."
        )
    try:
        losses, shares = (
            content[name] if identity["y"] is None else [v for row in content[name] for v in row]
            for name in ("loss", "top1_pct")
        )
        pairs = list(zip(losses, shares, strict=True))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(_damaged(shown)) from error
    sound = all(_is_point(loss, share) or (loss is share is None) for loss, share in pairs)
    if not sound or len(pairs) != num_points(identity):
        raise InputError(_damaged(shown))
    return {i: (loss, share) for i, (loss, share) in enumerate(pairs) if share is not None}


def _like(value: Any, now: Any) -> Any:
    """Of a mapping the entries that the identity has too."""
    if isinstance(now, Mapping) and isinstance(value, Mapping):
        return {name: value[name] for name in now}
    return value


def _told(name: str) -> str:
    names = {
        "weights": "the checkpoint",
        "second": "the second checkpoint",
        "data": "the images",
        "x": "--x",
        "y": "--y",
    }
    return names.get(name, f"--{name}")


def _damaged(shown: str) -> str:
    return (
        f"{shown}/{SURFACE} is damaged: it is no surface as lbaccel landscape writes it. Remove "
        "the folder, or give another one with --output."
    )


def _points_in(part: Path, *, num: int) -> Points:
    """The points in a file of a rank; the line that a kill cut off is computed again."""
    found: Points = {}
    for line in text_of(part).splitlines():
        try:
            content = json_of(line, part)
            place, loss, share = (content[key] for key in ("point", "loss", "top1_pct"))
        except (Malformed, KeyError, TypeError):
            continue
        is_place = type(place) is int and 0 <= place < num
        if is_place and _is_point(loss, share):
            found[place] = (loss, share)
    return found


def _is_point(loss: Any, share: Any) -> bool:
    return type(share) is float and 0 <= share <= 100 and (loss is None or type(loss) is float)
