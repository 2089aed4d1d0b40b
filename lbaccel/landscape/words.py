"""A landscape and a sharpness in sentences."""

from __future__ import annotations

from lbaccel.landscape.folder import SURFACE
from lbaccel.landscape.result import Landscape
from lbaccel.landscape.sharpness import Sharpness
from lbaccel.runs.columns import columns
from lbaccel.text import one_line


def report(result: Landscape) -> str:
    """The whole text, without a line end at its end."""
    content = result.content
    data, first, second = content["data"], content["weights"], content["second"]
    lines = [f"model: {first['model']} ({first['path']})"]
    if second is not None:
        lines.append(f"second model, at x = 1: {second['path']}")
    lines.append(
        f"images: {data['num_samples']:,} of {data['description'].rstrip('.')} ({data['split']})"
    )
    lines += _in_words(result)
    num = sum(loss is None for loss, _ in result.points.values())
    if num:
        lines.append(f"at {num:,} of {len(result.points):,} points the loss is not finite")
    if result.folder is None:
        lines.append("no files were written: for them, add --output DIR")
    else:
        lines.append(f"files: {result.folder} ({SURFACE} and its pictures)")
    return "\n".join(map(one_line, lines))


def _in_words(result: Landscape) -> list[str]:
    found = [(loss, place) for place, (loss, _) in result.points.items() if loss is not None]
    if not found:
        return []
    lines = [_at("lowest loss", result, min(found)[1]), _at("highest loss", result, max(found)[1])]
    for x, name in ((0.0, "first model"), (1.0, "second model")):
        place = _place_of(result, x)
        if place is not None and (x == 0 or result.content["second"] is not None):
            lines.append(_at(name, result, place))
    height = barrier(result)
    if height is not None:
        lines.append(
            f"barrier: the loss between both models rises {height:.4g} above the straight line "
            "from one's loss to the other's, at most"
        )
    return lines


def barrier(result: Landscape) -> float | None:
    """The loss barrier between two models (Frankle et al. 2020, arXiv 1912.05671).

        max over 0 <= x <= 1 of  L(x, 0) - ((1 - x) L(0, 0) + x L(1, 0))

    None without a second model, without the points x = 0 and x = 1 at y = 0, or where a loss is not
    finite.
    """
    ends = [_place_of(result, 0.0), _place_of(result, 1.0)]
    if result.content["second"] is None or None in ends:
        return None
    first, last = (place for place in ends if place is not None)
    losses = [result.points[place][0] for place in range(first, last + 1)]
    if any(loss is None for loss in losses):
        return None
    known = [loss for loss in losses if loss is not None]
    xs = result.x.values[first % result.x.num : last % result.x.num + 1]
    return max(
        loss - ((1 - x) * known[0] + x * known[-1]) for x, loss in zip(xs, known, strict=True)
    )


def _place_of(result: Landscape, x: float) -> int | None:
    """The place of the point (x, 0); None where the grid has none."""
    if x not in result.x.values:
        return None
    if result.y is None:
        return result.x.values.index(x)
    if 0.0 not in result.y.values:
        return None
    return result.y.values.index(0.0) * result.x.num + result.x.values.index(x)


def _at(name: str, result: Landscape, place: int) -> str:
    loss, top1 = result.points[place]
    where = f"x = {result.x.values[place % result.x.num]:g}"
    if result.y is not None:
        where += f", y = {result.y.values[place // result.x.num]:g}"
    shown = "not finite" if loss is None else f"{loss:.4g}"
    return f"{name}: {shown} (top-1 {top1:.2f} %) at {where}"


def report_sharpness(found: Sharpness) -> str:
    """The three measures as text, without a line end at its end."""
    weights, data = found.content["weights"], found.content["data"]
    values, box, filters = found.eigenvalues, found.box, found.filters
    pairs = zip(values.values, values.residuals, strict=True)
    rows = [("Hessian eigenvalue", "residual"), *((f"{a:.5g}", f"{b:.2g}") for a, b in pairs)]
    spread = "" if filters.deviation is None else f" +- {filters.deviation:.2g}"
    rise = "not finite" if filters.mean is None else f"{filters.mean:.4g}{spread}"
    lost = len(filters.increases) - len(filters.finite)
    lines = [
        f"model: {weights['model']} ({weights['path']})",
        f"images: {data['num_samples']:,} of {data['description'].rstrip('.')} ({data['split']})",
        f"loss {found.loss:.4g}, top-1 {found.top1_pct:.2f} %",
        "",
        *columns(rows, "r"),
        f"({values.num_products} products of the Hessian; an eigenvalue lies within the residual)",
        f"Keskar's sharpness: {box.sharpness:.4g} (largest loss met in the box of epsilon "
        f"{box.epsilon:g}: {box.max_loss:.5g})",
        f"filter-normalised: the loss rises by {rise} at radius {filters.radius:g} "
        f"(mean and standard deviation of {len(filters.finite)} random directions)",
    ]
    if lost:
        lines.append(f"along {lost} more directions the loss is not finite")
    return "\n".join(map(one_line, lines))
