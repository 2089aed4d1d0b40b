"""All that decides a landscape: models, images, axes, directions, and the folder of its files."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lbaccel.landscape import folder as files
from lbaccel.landscape.axes import Axis
from lbaccel.landscape.directions import cosine, length, random_direction
from lbaccel.landscape.network import MovedNetwork
from lbaccel.landscape.result import Landscape
from lbaccel.landscape.surface import Plane
from lbaccel.product.judged import Judged
from lbaccel.recipe.trained_model import TrainedModel
from lbaccel.runs.environment import versions
from lbaccel.runs.folder import checkpoint_name, strict_json

CPU = torch.device("cpu")
LANDSCAPES = "landscapes"  # in a run folder


@dataclass(frozen=True, eq=False)
class Work:
    """The models, images, axes and directions of a landscape."""

    first: TrainedModel
    second: TrainedModel | None
    judged: Judged
    axes: tuple[Axis, Axis | None]
    options: dict[str, Any]  # direction, norm, ignore, seed

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that decides the surface, but for rounding."""
        x, y = self.axes
        return {
            "x": _described(x),
            "y": None if y is None else _described(y),
            **self.options,
            "weights": _weights(self.first),
            "second": None if self.second is None else _weights(self.second),
            "data": {
                "split": self.judged.split,
                "fingerprint": self.judged.identity["fingerprint"],
                "num_samples": len(self.judged.images),
            },
        }

    @cached_property
    def plane(self) -> Plane:
        """Origin and directions, on the CPU."""
        direction, random = self.options["direction"], dict(self.options)
        random.pop("direction")
        origin = MovedNetwork(self.first.model, device=CPU).tensors(direction)
        drawn = [
            random_direction(origin, axis=axis, **random)
            for axis in (0, 1)
            if self.axes[axis] is not None and (axis == 1 or self.second is None)
        ]
        if self.second is None:
            return Plane(origin, drawn[0], drawn[1] if drawn[1:] else None)
        ends = MovedNetwork(self.second.model, device=CPU).tensors(direction)
        ends = {name: tensor.to(origin[name].dtype) for name, tensor in ends.items()}
        return Plane(origin, ends, drawn[0] if drawn else None, between=True)

    def places(self) -> list[tuple[float, float]]:
        """(x, y) of each point, row by row."""
        x, y = self.axes
        return [(a, b) for b in ((0.0,) if y is None else y.values) for a in x.values]

    def result(self, points: files.Points, folder: Path | None) -> Landscape:
        """The landscape with all that `landscape.json` says."""
        plane, identity = self.plane, self.identity
        along = plane.x
        if plane.between:
            along = {name: end - plane.origin[name] for name, end in plane.x.items()}
        more = {
            "lengths": {"x": length(along), "y": None if plane.y is None else length(plane.y)},
            "cosine": None if plane.y is None else cosine(along, plane.y),
            "versions": versions(),
        }
        content = identity | more
        content["weights"] = described_model(self.first)
        content["second"] = None if self.second is None else described_model(self.second)
        about = {"data": self.judged.data, "description": self.judged.description}
        content["data"] = identity["data"] | about
        x, y = self.axes
        return Landscape(x, y, dict(sorted(points.items())), content, folder)


def _weights(trained: TrainedModel) -> dict[str, Any]:
    return {"sha256": trained.sha256, "ema": trained.ema}


def described_model(trained: TrainedModel) -> dict[str, Any]:
    """A model as the files of a landscape have it."""
    named = {"path": trained.path, "model": trained.preprocessing["model"]}
    return named | _weights(trained) | {"update": trained.update}


def _described(axis: Axis) -> dict[str, Any]:
    return {**asdict(axis), "values": list(axis.values)}


def folder_of(work: Work, output: str | Path | None) -> Path | None:
    """`output`, or a folder of this landscape alone in that of the run; None without a run."""
    if output is not None:
        return Path(output)
    if work.first.run is None:
        return None
    digest = hashlib.sha256(strict_json(work.identity).encode()).hexdigest()[:8]
    parts = [checkpoint_name(work.first.update or 0), work.judged.split]
    kind = "curve" if work.axes[1] is None else "plane"
    parts += ["to-second"] * (work.second is not None) + [kind, digest]
    return work.first.run / LANDSCAPES / "-".join(parts)
