"""The folder of an export: made by timm, loaded by timm to see that it is right, then renamed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import timm
import torch
from huggingface_hub import ModelCard
from timm.data.config import resolve_model_data_config
from timm.models import load_checkpoint, save_for_hf
from torch import Tensor, nn

from lbaccel.errors import InputError, RunFailed, reading, way_out
from lbaccel.export import shareable
from lbaccel.export.model_card import Exported
from lbaccel.models import STEM_MARK, adapt_stem
from lbaccel.runs.folder import (
    ARCHITECTURE,
    CHECKPOINTS,
    CONFIG,
    MODEL,
    weights_file,
    written_beside,
)
from lbaccel.runs.saved_weights import network_of

CARD = "README.md"  # the name that the hub looks for
FILES = (CARD, ARCHITECTURE, CONFIG, weights_file(MODEL))
# of timm's description of its own weights: where they are and how they were made
_OF_OTHER_WEIGHTS = (
    *("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "tag"),
    *("license", "description", "origin_url", "paper_name", "paper_ids", "notes"),
    *("label_offset", "label_names", "label_descriptions", "custom_load"),
    *("test_input_size", "min_input_size", "test_crop_pct", "test_pool_size", "pool_size"),
)


def check_target(target: Path, run: Path, *, force: bool) -> None:
    """Stop where writing would cost anything but an earlier export.

    Raises:
        InputError: the folder is not empty and `force` was not given, or it holds other files, or
            files of these names that no export wrote.
    """
    checkpoints = (run / CHECKPOINTS).resolve()
    if checkpoints in (target, *target.parents):
        raise InputError(f"--to {target} lies among the run's checkpoints. Give another folder.")
    if target.exists() and not target.is_dir():
        raise InputError(f"--to {target} is a file. Give a folder.")
    there = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    foreign = [name for name in there if name not in FILES]
    if foreign:
        raise InputError(
            f"{target} holds {foreign[0]}, which no export wrote: it is not replaced. "
            "Give another folder with --to."
        )
    if there and not _is_export(target):
        raise InputError(
            f"{target} holds {there[0]}, and no {CARD} with the tag lbaccel: no export wrote it, "
            "and it is not replaced. Give another folder with --to."
        )
    if there and not force:
        raise InputError(f"{target} holds an export already. Add --force to replace it, or --to.")


def _is_export(folder: Path) -> bool:
    """Whether plain files are in the folder, and a card whose YAML has the tag lbaccel."""
    plain = all(path.is_file() and not path.is_symlink() for path in folder.iterdir())
    if not plain or not (folder / CARD).is_file():
        return False
    with reading(folder):
        lines = (folder / CARD).read_text(encoding="utf-8", errors="replace").splitlines()
    try:
        front = lines[: lines.index("---", 1)]
    except ValueError:  # no YAML in front
        return False
    return lines[0] == "---" and "- lbaccel" in front


def build(exported: Exported, weights: Mapping[str, Tensor]) -> nn.Module:
    """The run's own network in evaluation mode, with these weights in their dtype.

    Raises:
        InputError: timm here does not know the model, or builds another one.
    """
    return network_of(exported.preprocessing, weights)


def write_folder(
    target: Path,
    exported: Exported,
    model: nn.Module,
    *,
    card: ModelCard,
    license: str | None = None,
) -> None:
    """Write `FILES` beside `target`, load them with timm, and rename.

    Raises:
        RunFailed: timm does not load what was saved, or the disk refuses; `target` is as before.
    """
    try:
        with written_beside(target) as beside:
            _save(beside, exported, model, license=license)
            (beside / CARD).write_text(str(card), encoding="utf-8")
            settings = shareable.settings_yaml(exported.run.config)
            (beside / CONFIG).write_text(settings, encoding="utf-8")
            _check(beside, exported, model)
    except (OSError, safetensors.SafetensorError) as error:
        raise RunFailed(
            f"the export could not be written to {target}: {error}. An earlier export is kept. "
            f"{way_out(error, 'give another folder with --to')}"
        ) from error


def _save(folder: Path, exported: Exported, model: Any, *, license: str | None) -> None:
    pre = exported.preprocessing
    described = {k: v for k, v in model.pretrained_cfg.items() if k not in _OF_OTHER_WEIGHTS}
    described |= {key: pre[key] for key in ("mean", "std", "interpolation", "crop_pct")}
    described["input_size"] = (pre["num_channels"], pre["img_size"], pre["img_size"])
    described["crop_mode"] = "center"
    if license is not None:
        described["license"] = license
    if exported.small_stem:
        # Where only strides differ, plain timm would load these weights into another network in
        # silence: a name it does not know and a tensor too many stop it, each with what to call.
        described["architecture"] = f"lbaccel.models.adapt_stem({exported.model})"
        model.register_buffer(STEM_MARK, torch.ones(1, dtype=torch.uint8))
    model.pretrained_cfg = described
    save_for_hf(
        model,
        str(folder),
        model_config={"label_names": list(exported.classes)},
        model_args={k: v for k, v in exported.options.items() if k != "num_classes"},
        safe_serialization=True,
    )
    # timm 1.0.31 writes num_classes among the arguments too, beside which transformers 5.23 gives
    # its own, a TypeError; at the top of the file both read it.
    path = folder / ARCHITECTURE
    config = json.loads(path.read_text(encoding="utf-8"))
    config.get("model_args", {}).pop("num_classes", None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check(folder: Path, exported: Exported, model: nn.Module) -> None:
    """Load the folder as a user will; same weights, same logits to the bit, same preprocessing.

    Raises:
        RunFailed: it is not the same.
    """
    try:
        loaded = _load(folder, exported)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise RunFailed(_not_loaded(exported, reason)) from error
    model.float()  # what timm builds; a float64 file is rounded on loading
    own = {key: value for key, value in model.state_dict().items() if key != STEM_MARK}
    found = loaded.state_dict()
    differing = [k for k in own if k not in found or not _same(own[k], found[k])]
    if differing or own.keys() != found.keys():
        raise RunFailed(_not_loaded(exported, f"{[*differing, 'a name'][0]} differs"))
    pre = exported.preprocessing
    shape = (2, pre["num_channels"], pre["img_size"], pre["img_size"])
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if not _same(model(images), loaded.eval()(images)):
            raise RunFailed(_not_loaded(exported, "its logits differ"))
    if not exported.small_stem:
        config = resolve_model_data_config(loaded)
        same = (config["input_size"] == shape[1:], config["crop_pct"] == pre["crop_pct"])
        same += tuple(list(config[key]) == list(pre[key]) for key in ("mean", "std"))
        if not all(same):
            raise RunFailed(_not_loaded(exported, "its preprocessing differs"))


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit-equal, where NaN is NaN: a run that diverged can be exported."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _load(folder: Path, exported: Exported) -> nn.Module:
    if not exported.small_stem:
        return timm.create_model(f"local-dir:{folder}", pretrained=True)
    loaded = timm.create_model(exported.model, **exported.options)
    adapt_stem(loaded)
    load_checkpoint(loaded, str(folder / weights_file(MODEL)))
    return loaded


def _not_loaded(exported: Exported, reason: str) -> str:
    return (
        f"timm {timm.__version__} saves {exported.model} and does not load it as it was: {reason}. "
        "Nothing was written. The run's checkpoint can be loaded: timm.create_model("
        f"{exported.model!r}, ..., checkpoint_path='.../model.safetensors')."
    )
