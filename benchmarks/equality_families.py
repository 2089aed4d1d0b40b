"""One update of a network of each timm family, whole and cut, with dropout as shipped.

python benchmarks/equality_families.py --results FILE [--share 1/2]
python benchmarks/equality_families.py --results FILE --report docs/results/equality_families.md

Per network, in float64 on a CPU: the gradient of the whole batch in plain torch (ghost batches one
after the other, masks keyed by sample) against that of plans (single groups, ragged, and single
groups recomputed). The control beside it is the same whole batch with its images multiplied by
1 + 2^-52: what one rounding error of the input does to the gradient of this network.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from lbaccel.errors import InputError
from lbaccel.update.normalization import has_batch_norm
from lbaccel.verification.copies import aside, float64_copy
from lbaccel.verification.reference import reference
from lbaccel.verification.updates import Subject, learned, planned

SAMPLES, GHOST, CLASSES, SEED = 6, 2, 7, 0
# family: network, image size (0: its own)
NETWORKS: dict[str, tuple[str, int]] = {
    "beit": ("beit_base_patch16_224", 0),
    "byoanet": ("halonet_h1", 0),
    "byobnet": ("test_byobnet", 96),
    "cait": ("cait_xxs24_224", 0),
    "coat": ("coat_tiny", 0),
    "convit": ("convit_tiny", 0),
    "convmixer": ("convmixer_768_32", 96),
    "convnext": ("test_convnext", 96),
    "cpubone": ("cpubone_nano", 96),
    "crossvit": ("crossvit_tiny_240", 0),
    "cspnet": ("cs3darknet_focus_s", 96),
    "cspnext": ("cspnext_tiny", 96),
    "davit": ("davit_tiny", 96),
    "deit": ("deit_tiny_patch16_224", 0),
    "densenet": ("densenet121", 96),
    "dla": ("dla46x_c", 96),
    "dpn": ("dpn48b", 96),
    "edgenext": ("edgenext_xx_small", 96),
    "efficientformer": ("efficientformer_l1", 0),
    "efficientformer_v2": ("efficientformerv2_s0", 0),
    "efficientnet": ("test_efficientnet", 96),
    "efficientvim": ("efficientvim_m1", 96),
    "efficientvit_mit": ("efficientvit_b0", 96),
    "efficientvit_msra": ("efficientvit_m0", 0),
    "eva": ("vit_tiny_patch16_dinov3_qkvb", 0),
    "fasternet": ("fasternet_t0", 96),
    "fastvit": ("fastvit_t8", 96),
    "focalnet": ("focalnet_tiny_srf", 96),
    "gcvit": ("gcvit_xxtiny", 0),
    "ghostnet": ("ghostnet_050", 96),
    "hardcorenas": ("hardcorenas_b", 96),
    "hgnet": ("hgnetv2_b0", 96),
    "hiera": ("hiera_tiny_224", 0),
    "hrnet": ("hrnet_w18_small", 96),
    "iformer": ("iformer_t", 96),
    "inception_next": ("inception_next_atto", 96),
    "inception_v3": ("inception_v3", 0),
    "lcnetv2": ("lcnetv2_small", 96),
    "levit": ("levit_128s", 0),
    "lowformer": ("lowformer_b0", 96),
    "mambaout": ("test_mambaout", 96),
    "maxxvit": ("maxxvit_rmlp_nano_rw_256", 128),
    "metaformer": ("poolformerv2_s12", 96),
    "mlp_mixer": ("gmlp_ti16_224", 0),
    "mobilenetv3": ("lcnet_035", 96),
    "mobilevit": ("mobilevit_xxs", 96),
    "mvitv2": ("mvitv2_tiny", 0),
    "nest": ("nest_tiny", 0),
    "nextvit": ("nextvit_small", 96),
    "nfnet": ("test_nfnet", 96),
    "pit": ("pit_ti_224", 0),
    "pvt_v2": ("pvt_v2_b0", 96),
    "rdnet": ("rdnet_tiny", 96),
    "regnet": ("regnetx_002", 96),
    "repghost": ("repghostnet_050", 96),
    "repvit": ("repvit_m1", 96),
    "res2net": ("res2next50", 96),
    "resnest": ("resnest14d", 96),
    "resnet": ("test_resnet", 96),
    "resnetv2": ("resnetv2_18", 96),
    "rexnet": ("rexnet_100", 96),
    "selecsls": ("selecsls42", 96),
    "senet": ("legacy_seresnet18", 96),
    "sequencer": ("sequencer2d_s", 0),
    "shvit": ("shvit_s1", 96),
    "sknet": ("skresnet18", 96),
    "starnet": ("starnet_s050", 96),
    "swiftformer": ("swiftformer_xs", 0),
    "swin_transformer": ("swin_tiny_patch4_window7_224", 0),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", 0),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", 0),
    "tiny_vit": ("tiny_vit_5m_224", 96),
    "tnt": ("tnt_s_legacy_patch16_224", 0),
    "tresnet": ("tresnet_m", 96),
    "twins": ("twins_svt_small", 0),
    "visformer": ("visformer_tiny", 0),
    "vision_transformer": ("test_vit", 0),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", 0),
    "vision_transformer_relpos": ("vit_relpos_small_patch16_224", 64),
    "vitamin": ("vitamin_small_224", 0),
    "volo": ("volo_d1_224", 0),
    "vovnet": ("ese_vovnet19b_slim_dw", 96),
    "xception": ("legacy_xception", 0),
    "xception_aligned": ("xception41p", 0),
    "xcit": ("xcit_nano_12_p8_224", 0),
}
RATES = {"drop_path_rate": 0.2}  # beside what the network has by itself


def cross_entropy(model: Any, micro_batch: Any) -> Tensor:
    """The mean loss; networks with a distillation head give two outputs."""
    out = model(micro_batch[0])
    if isinstance(out, tuple):
        return sum(F.cross_entropy(o, micro_batch[1]) for o in out) / len(out)  # type: ignore
    return F.cross_entropy(out, micro_batch[1])


def built(name: str, size: int) -> tuple[torch.nn.Module, int, bool]:
    """The network, the side of its images, and whether drop-path could be asked for."""
    ways: list[dict[str, Any]] = [{"img_size": size}, {}] if size else [{}]
    for options in ways:
        for rates in (RATES, {}):
            try:
                torch.manual_seed(SEED)
                model = timm.create_model(name, num_classes=CLASSES, **options, **rates)
            except (TypeError, AssertionError, RuntimeError):
                continue
            own = timm.get_pretrained_cfg(name)
            side = size or (own.input_size[1] if own else 224)
            return model, side, bool(rates)
    raise RuntimeError(f"{name} can't be built")


def difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    """|a - b| / |b| over all gradients as one vector."""
    top = sum(float((x - y).square().sum()) for x, y in _pairs(a, b))
    bottom = sum(float(y.square().sum()) for _, y in _pairs(a, b))
    return (top / bottom) ** 0.5


def _pairs(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    assert {n for n, g in a.items() if g is None} == {n for n, g in b.items() if g is None}
    return [(a[n], b[n]) for n in a if a[n] is not None]


def measured(name: str, size: int) -> dict[str, Any]:
    """The errors of a network, its control, and how many masks an update draws."""
    model, side, drops = built(name, size)
    norm = GHOST if has_batch_norm(model) else None
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randn(SAMPLES, 3, side, side, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    with aside(model):
        twin = float64_copy(model.train())
        subject = learned(Subject(twin, cross_entropy, (images, labels), SAMPLES, norm, SEED))
        truth = reference(subject)
        nudged = reference(replace(subject, batch=(images * (1 + 2.0**-52), labels)))
        unit = subject.unit
        errors: dict[str, float | str] = {}
        for title, size_of, recompute in (
            ("single", unit, False),
            ("ragged", 2 * unit if unit > 1 else 4, False),
            ("recomputed", unit, True),
        ):
            try:
                found = planned(subject, subject.plan(size_of), checkpointing=recompute)
            except InputError as error:
                errors[title] = f"not run: {error}"
                continue
            errors[title] = difference(found.gradients, truth.gradients)
        layouts = subject.layouts
    return {
        "name": name,
        "side": side,
        "norm": norm,
        "drop_path": drops,
        "masks": None if layouts is None else len(layouts.places),
        "without_samples": None
        if layouts is None
        else sum(p.known and p.dim is None for p in layouts.places),
        "not_known": [] if layouts is None else list(layouts.not_known),
        "errors": errors,
        "control": difference(nudged.gradients, truth.gradients),
    }


def run(results: Path, share: str) -> None:
    """Measure what is not in the file yet; each row is written at once."""
    part, parts = (int(n) for n in share.split("/"))
    done = (
        {json.loads(line)["family"] for line in results.read_text().splitlines()}
        if (results.exists())
        else set()
    )
    for number, (family, (name, size)) in enumerate(NETWORKS.items()):
        if family in done or number % parts != part - 1:
            continue
        start = time.monotonic()
        try:
            row = measured(name, size)
        except Exception as error:
            row = {"name": name, "failed": f"{type(error).__name__}: {error}"[:300]}
        row |= {"family": family, "seconds": round(time.monotonic() - start, 1)}
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


def report(results: Path) -> str:
    """The page."""
    rows = sorted((json.loads(line) for line in results.read_text().splitlines()),
                  key=lambda row: row["family"])  # fmt: skip
    ran = [row for row in rows if "errors" in row]
    numbers = [e for row in ran for e in row["errors"].values() if not isinstance(e, str)]
    gaps = [
        e / max(row["control"], 2.0**-52)
        for row in ran for e in row["errors"].values() if not isinstance(e, str)
    ]  # fmt: skip
    titles = ("single", "ragged", "recomputed")
    lines = [
        "| family | network, side | ghost batch | masks (of no sample) | " + " | ".join(titles)
        + " | one ulp |",
        "|---" * 8 + "|",
    ]  # fmt: skip
    for row in ran:
        cells = [row["errors"].get(t) for t in titles]
        shown = ["not run" if isinstance(c, str) else f"{c:.0e}" for c in cells]
        masks = f"{row['masks']} ({row['without_samples']})"
        lines.append(
            f"| {row['family']} | {row['name']}, {row['side']} px | {row['norm'] or '-'} | {masks}"
            f" | {' | '.join(shown)} | {row['control']:.0e} |"
        )
    failed = [
        f"- {row['family']}, {row['name']}: {row['failed']}" for row in rows if "failed" in row
    ]
    reasons = sorted({c for row in ran for c in row["errors"].values() if isinstance(c, str)})
    return HEAD.format(
        count=len(ran),
        families=len({row["family"] for row in ran}),
        cells=len(numbers),
        largest=f"{max(numbers):.1e}",
        gap=f"{max(gaps):.0f}",
        drops=sum(row["drop_path"] for row in ran),
        masked=sum(bool(row["masks"]) for row in ran),
        cpu=platform.processor() or platform.machine(),
        versions=f"Python {platform.python_version()}, torch {torch.__version__}, timm "
        f"{timm.__version__}, accelerate {accelerate.__version__}",
        table="\n".join(lines),
        failed="\n".join(failed) or "None failed.",
        reasons="\n".join(f"- {reason}" for reason in reasons) or "None.",
    )  # fmt: skip


HEAD = """# The equality matrix over timm's families

    OMP_NUM_THREADS=1 python benchmarks/equality_families.py --results FILE
    python benchmarks/equality_families.py --results FILE --report docs/results/equality_families.md

{versions}, a shared CPU of two cores ({cpu}). Float64, seed 0.

One network of each of {families} modules of timm ({count} networks), randomly initialised, with its
dropout as shipped and drop-path 0.2 where the network takes it ({drops} do; {masked} draw masks).
One update of 6 samples, BatchNorm over ghost batches of 2. Relative error of the whole gradient
against the whole batch in plain torch, for micro-batches of one ghost batch or sample, of a ragged
cut, and of one ghost batch or sample recomputed. The last column is the control: the whole batch
again, its images multiplied by 1 + 2^-52.

Largest error of {cells} cells: {largest}; at most {gap} times the control of its network (at least
one rounding error).

{table}

## Failed

{failed}

## Not run

{reasons}
"""


def main() -> None:
    """Measure, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--share", default="1/1")
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.report:
        args.report.write_text(report(args.results))
    else:
        run(args.results, args.share)


if __name__ == "__main__":
    main()
