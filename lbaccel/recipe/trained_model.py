"""A trained model, from a run, one of its checkpoints, an export, or the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lbaccel.errors import InputError
from lbaccel.recipe.exported import HUB, from_hub, read_export
from lbaccel.recipe.options import Settings
from lbaccel.recipe.resume import read_run
from lbaccel.runs.checkpoints import fingerprint
from lbaccel.runs.folder import (
    ARCHITECTURE,
    CHECKPOINTS,
    CONFIG,
    MANIFEST,
    MODEL,
    follow_link,
    weights_file,
)
from lbaccel.runs.read import read_mapping
from lbaccel.runs.saved_weights import SavedWeights, checkpoint_of, network_of, read_checkpoint
from lbaccel.text import one_line


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A network with its weights, and all that images must go through before it.

    Args:
        path: as it was given.
        model: on the CPU, in evaluation mode.
        classes: a name for each output; those that the training data had no class for are
            `output 12`.
        num_named: the outputs that have a name of the training data: the first ones.
        preprocessing: img_size, num_channels, mean, std, interpolation, crop_pct, model, stem,
            decoder.
        sha256: of the file of the weights.
        update: that the weights were saved after; None where nothing says so.
        ema: whether they are the average of a run.
        run: its folder; None without one.
        settings: of the run; without one the defaults, or what an export says of its run.
        knows_data: whether `settings` say which images were held out.
        plan: of the run, flat, such as its micro-batch.
    """

    path: str
    model: nn.Module
    classes: tuple[str, ...]
    num_named: int
    preprocessing: Mapping[str, Any]
    sha256: str
    update: int | None
    ema: bool
    run: Path | None
    settings: Settings
    knows_data: bool
    plan: Mapping[str, Any]

    @property
    def upright(self) -> bool:
        """Whether photographs are turned as their EXIF entry says before the model sees them.

        A run of lbaccel from before there was the setting was trained on images as they are stored.
        """
        of_settings = self.settings.data.exif_orientation
        return bool(self.preprocessing.get("exif_orientation", of_settings))

    @property
    def described(self) -> str:
        """The network and its weights, in words."""
        average = ", the average of its weights" if self.ema else ""
        after = "" if self.update is None else f", weights after update {self.update:,}"
        return f"{self.preprocessing['model']}{after}{average}"


def read_trained(path: str | Path, *, ema: bool = False) -> TrainedModel:
    """The trained model at this place.

    Args:
        path: a run folder, whose best checkpoint is taken; a checkpoint, such as
            RUN/checkpoints/last; a folder of `lbaccel export`; or `hf-hub:OWNER/NAME`.
        ema: the average of the weights; of a run, that of its best averaged evaluation.

    Raises:
        InputError: it is none of these, or it is damaged.
        RunFailed: the hub can't be reached.
    """
    text = str(path)
    if text.startswith(HUB):
        return _exported(text, from_hub(text.removeprefix(HUB)), ema=ema)
    folder = follow_link(Path(text))
    if (folder / ARCHITECTURE).is_file():
        return _exported(text, folder, ema=ema)
    if (folder / MANIFEST).is_file():
        beside = folder.parent.parent
        in_run = folder.parent.name == CHECKPOINTS and (beside / CONFIG).is_file()
        found = read_checkpoint(folder, ema=ema)
        return _of_run(text, found, beside if in_run else None, ema=ema)
    if (folder / CONFIG).is_file():
        found = read_checkpoint(checkpoint_of(folder, ema=ema), ema=ema)
        return _of_run(text, found, folder, ema=ema)
    raise InputError(_neither(folder))


def _of_run(path: str, found: SavedWeights, run: Path | None, *, ema: bool) -> TrainedModel:
    plan = {} if run is None else read_mapping(run / CONFIG).get("plan")
    return TrainedModel(
        path=path,
        model=network_of(found.preprocessing, found.weights),
        classes=_each_output(found.classes, found.preprocessing["num_classes"]),
        num_named=len(found.classes),
        preprocessing=found.preprocessing,
        sha256=fingerprint(found.file)["sha256"],
        update=found.update,
        ema=ema,
        run=run,
        settings=Settings() if run is None else read_run(run),
        knows_data=run is not None,
        plan=plan if isinstance(plan, Mapping) else {},
    )


def _exported(path: str, folder: Path, *, ema: bool) -> TrainedModel:
    if ema:
        raise InputError(
            f"--ema: {path} holds one set of weights. Leave --ema out, or give the run."
        )
    found = read_export(folder)
    settings = found.settings or Settings()
    # timm's config.json has no place for the decoder; without a run there it is timm's own
    decoder = "pillow" if found.settings is None else settings.data.decoder_used
    return TrainedModel(
        path=path,
        model=found.model,
        classes=_each_output(found.classes, found.preprocessing["num_classes"]),
        num_named=len(found.classes),
        preprocessing={**found.preprocessing, "decoder": decoder},
        sha256=fingerprint(folder / weights_file(MODEL))["sha256"],
        update=None,
        ema=False,
        run=None,
        settings=settings,
        knows_data=found.settings is not None,
        plan={},
    )


def _each_output(names: list[str], num_outputs: int) -> tuple[str, ...]:
    return (*names, *(f"output {i}" for i in range(len(names), num_outputs)))


def _neither(path: Path) -> str:
    shown = one_line(str(path))
    kinds = "a run folder, a checkpoint in one, a folder of lbaccel export, or hf-hub:OWNER/NAME"
    if not path.exists():
        return f"{shown} does not exist. Give {kinds}."
    if path.is_file():
        folder = one_line(str(path.parent))
        return f"{shown} is a file. Give {kinds}; for this one perhaps {folder}."
    runs = sorted(path.glob(f"*/{CONFIG}"))
    if runs:
        newest = one_line(str(runs[-1].parent))
        return f"{shown} is no run folder. Give one of the {len(runs)} in it, such as {newest}."
    return f"{shown} holds none of {CONFIG}, {MANIFEST}, {ARCHITECTURE}. Give {kinds}."
