"""The model card of an exported run: what it is, how to load it, how it came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from timm import get_pretrained_cfg

from lbaccel.export import shareable, tables
from lbaccel.models import OWN_NETWORKS
from lbaccel.runs.read import Run
from lbaccel.text import in_code_block, in_code_span, in_markdown


@dataclass(frozen=True)
class Exported:
    """The content of an export: a run, and one of its checkpoints.

    Args:
        run: settings, summary and metrics.
        env: its env.json.
        resumes: the lines of its resumes.jsonl.
        preprocessing: of the checkpoint: model, outputs, channels, size, mean, std, stem.
        classes: names, in order of the outputs.
        update: that the weights were saved after.
        ema: whether the weights are the run's average.
        dtype: of the weights, in torch's name.
        options: what timm.create_model needs besides the name.
    """

    run: Run
    env: Mapping[str, Any]
    resumes: Sequence[Mapping[str, Any]]
    preprocessing: Mapping[str, Any]
    classes: Sequence[str]
    update: int
    ema: bool
    dtype: str
    options: Mapping[str, Any]

    @property
    def model(self) -> str:
        """timm's name of the network."""
        return self.preprocessing["model"]

    @property
    def small_stem(self) -> bool:
        """Whether plain timm would build another network of this name."""
        return self.preprocessing["stem"] == "small"

    @property
    def unfinished(self) -> str | None:
        """How the run stands, where it has not come to its end."""
        status = str(self.run.summary.get("status", "no summary: it runs, or was killed"))
        return None if status == "done" else status


def model_card(
    exported: Exported, *, license: str | None = None, repo_id: str | None = None
) -> ModelCard:
    """YAML for the hub, and sections; what the run folder does not hold is left out.

    Args:
        exported: what is described.
        license: the hub's name of one, such as apache-2.0.
        repo_id: where the folder will be uploaded to.
    """
    run, config = exported.run, exported.run.config
    front = ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "lbaccel"],
        license=license,
        metrics=["accuracy"] if "val/top1" in run.history else None,
        base_model=base_model(config),
    )
    batch = tables.global_batch_size(config)
    sections = {
        "Use": _use(exported, repo_id),
        "Data": tables.data(config, exported.preprocessing, num_classes=len(exported.classes)),
        "Contract": _titled("These settings decide the result.", tables.contract(run)),
        "Plan": _titled(
            "How the batch was fitted into memory. This does not affect the result: another plan "
            "gives the same update up to rounding.",
            tables.plan(config, exported.resumes),
        ),
        "Metrics": tables.metrics(run, update=exported.update, ema=exported.ema),
        "Hardware and versions": tables.hardware(exported.env),
        "Reproduce": _reproduce(exported),
    }
    title = f"# {in_markdown(exported.model)}" + (
        f" at a global batch of {batch:,}" if batch else ""
    )
    body = [f"## {name}\n\n{text}" for name, text in sections.items() if text]
    text = "\n\n".join([title, _what_it_is(exported), *body])
    return ModelCard(f"---\n{front.to_yaml()}\n---\n\n{text}\n")


def base_model(config: Mapping[str, Any]) -> str | None:
    """The hub's name of timm's weights that the run began with; None for fresh or other ones.

    >>> base_model({"model": "mobilenetv2_100", "pretrained": True})
    'timm/mobilenetv2_100.ra_in1k'
    """
    if not config.get("pretrained") or config.get("checkpoint") is not None:
        return None
    source = get_pretrained_cfg(str(config["model"]))
    if source is None or not source.hf_hub_id:
        return None
    if source.hf_hub_id.endswith("/"):
        return f"{source.hf_hub_id}{source.architecture}.{source.tag}"
    return source.hf_hub_id


def usage(exported: Exported, *, folder: str = ".", repo_id: str | None = None) -> str:
    """Python that builds `model` from the folder, or off the hub.

    With the stem for small images plain timm can't: `adapt_stem` comes before the weights.
    """
    if not exported.small_stem:
        source = f"hf-hub:{repo_id}" if repo_id else f"local-dir:{folder}"
        own = exported.model in OWN_NETWORKS
        first = (
            f"import timm\nimport lbaccel.networks  # {exported.model}\n" * own or "import timm\n"
        )
        return f"{first}\nmodel = timm.create_model({source!r}, pretrained=True).eval()"
    options = "".join(f", {key}={value!r}" for key, value in exported.options.items())
    imports = ["import timm", "from lbaccel.models import adapt_stem"]
    weights = repr(f"{folder}/model.safetensors")
    if repo_id:
        imports.append("from huggingface_hub import hf_hub_download")
        weights = f"hf_hub_download({repo_id!r}, 'model.safetensors')"
    return "\n".join([
        *imports,
        "",
        f"model = timm.create_model({exported.model!r}{options}).eval()",
        "adapt_stem(model)",
        f"timm.models.load_checkpoint(model, {weights})",
    ])  # fmt: skip


def _titled(title: str, table: str) -> str:
    return f"{title}\n\n{table}" if table else ""


def _what_it_is(exported: Exported) -> str:
    config, num_classes = exported.run.config, len(exported.classes)
    num_outputs = exported.preprocessing["num_classes"]
    weights = "the exponential average of the weights" if exported.ema else "the weights"
    named = f", of which {num_classes} are named" if num_classes != num_outputs else ""
    text = (
        f"A [timm](https://github.com/huggingface/pytorch-image-models) "
        f"{in_code_span(exported.model)} of {num_outputs} outputs{named}, trained by "
        f"lbaccel: {weights} after update {exported.update:,}."
    )
    if config.get("checkpoint") is not None:
        text += " Training began with weights of a file."
    elif "pretrained" in config:
        kind = "timm's pretrained" if config["pretrained"] else "fresh"
        base = base_model(config)
        text += f" Training began with {kind} weights" + (
            f" ({in_code_span(base)})." if base else "."
        )
    if exported.unfinished is not None:
        text += f"\n\n**The run is not finished** ({in_markdown(exported.unfinished)})."
    if exported.dtype == "float64":
        text += "\n\nThe weights are stored in float64; timm rounds them to float32 on loading."
    return text


def _use(exported: Exported, repo_id: str | None) -> str:
    pre = exported.preprocessing
    size, mode = (pre["img_size"],) * 2, "RGB" if pre["num_channels"] == 3 else "L"
    parts = ["In this folder:"]
    imports, config = [], "timm.data.resolve_model_data_config(model)"
    if exported.small_stem:
        parts = [
            "The stem is that for small images (`lbaccel.models.adapt_stem`), which plain timm "
            "does not build: it refuses this folder, as `local-dir:`, as `hf-hub:` and as a "
            "`checkpoint_path`. With lbaccel installed, in this folder:"
        ]
        imports = ["import json", "from pathlib import Path"]
        config = "timm.data.resolve_data_config(pretrained_cfg=config)"
    names = ["import torch", "from PIL import Image"]
    code = [*imports, *names, usage(exported)]
    if exported.small_stem:
        code.append("config = json.loads(Path('config.json').read_text())['pretrained_cfg']")
    code += [
        f"transform = timm.data.create_transform(**{config})",
        "",
        f"image = Image.new({mode!r}, {size})  # yours: Image.open(...).convert({mode!r})",
        "with torch.no_grad():",
        "    probabilities = model(transform(image)[None]).softmax(1)",
        "print(probabilities.topk(1))  # config.json has the classes: label_names",
    ]
    parts.append(in_code_block("python", "\n".join(code)))
    if repo_id:
        parts += ["Off the hub:", in_code_block("python", usage(exported, repo_id=repo_id))]
    return "\n\n".join(parts)


def _reproduce(exported: Exported) -> str:
    config, env = exported.run.config, exported.env
    notes = ["on any number of processes, with any micro-batch that fits."]
    if ":" in str(config.get("data", "")):
        notes.append("Set `data` in config.yaml to where your images lie.")
    if config.get("checkpoint") is not None:
        notes.append("Set `checkpoint` to the file of weights that training begins with.")
    for before, how in config.get("extensions") or []:
        notes.append(
            f"This run was extended at {before:g} epochs ({in_code_span(f'--extend {how}')}), "
            f"which one command does not repeat: run it with `--epochs {before:g}`, then resume it."
        )
    parts = [in_code_block("bash", "lbaccel train --config config.yaml"), " ".join(notes)]
    line = shareable.command(str(env.get("command") or ""))
    if line:
        parts += ["It was started by", in_code_block("bash", line)]
        if env.get("git_commit"):
            parts.append(f"at git commit {in_code_span(env['git_commit'])}.")
    return "\n\n".join(parts)
