"""The figures of a page in docs/results out of a study, and its numbers as one small file.

python benchmarks/study_figures.py FOLDER --save docs/results/studies/NAME.json --call PATH=cifar10
python benchmarks/study_figures.py docs/results/studies/NAME.json --figures docs/results/studies

The first line takes the results out of the folder of `lbaccel study run`: what `lbaccel study
report --json` prints, with curves of fewer points. The second draws from that file alone:
NAME.png (accuracy against batch size, the difference to the baseline beside the source's own, and
updates to the target) and NAME_curves.png (validation accuracy over samples and over updates).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lbaccel.runs.figures import new_figure, save
from lbaccel.runs.thin import kept
from lbaccel.studies.results import study_result

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "osD^vP*"
POINTS = 40  # of a curve of training in the file
Result = Mapping[str, Any]
Panel = Callable[[Any, Result], None]


def read(source: Path, called: Sequence[str]) -> dict[str, Any]:
    """The numbers of a study's folder or of a file of them, its paths under other names."""
    text = source.read_text() if source.is_file() else json.dumps(study_result(source))
    for pair in called:
        old, _, new = pair.partition("=")
        text = text.replace(old, new)
    return json.loads(text)


def write(result: dict[str, Any], path: Path) -> None:
    """The numbers with at most POINTS of each training curve, a line a run.

    The settings that a study gives all have one origin, its file: that is left out.
    """
    for run in result["runs"]:
        if run["provenance"]:
            run["provenance"].pop("origin", None)
        run["noise"] = [run["noise"][i] for i in kept([row[2] for row in run["noise"]], POINTS)]
        for name, points in (run["history"] or {}).items():
            if name.startswith("train/") and len(points) > POINTS:
                at = kept([point[-1] for point in points], POINTS)
                run["thinned"].setdefault(name, len(points))
                run["history"][name] = [points[i] for i in at]
    rest = {key: value for key, value in result.items() if key != "runs"}
    runs = ",\n".join(json.dumps(run) for run in result["runs"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{json.dumps(rest, indent=1)[:-2]},\n "runs": [\n{runs}\n]}}\n')


def rows_of(result: Result, arm: str) -> list[dict[str, Any]]:
    return [row for row in result["table"] if row["arm"] == arm and row["mean"] is not None]


def over_batches(axes: Any, batches: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [f"{batch:,}" for batch in batches])
    axes.minorticks_off()
    axes.set_xlabel("global batch size")
    axes.grid(alpha=0.3)


def accuracy(axes: Any, result: Result) -> None:
    """Each arm's mean and its interval over seeds, each seed as a dot."""
    for i, arm in enumerate(result["arms"]):
        rows = rows_of(result, arm["name"])
        if not rows:
            continue
        x, mean = [row["batch"] for row in rows], [row["mean"] for row in rows]
        half = [row["half_width"] or 0.0 for row in rows]
        look = {"color": COLORS[i], "marker": MARKERS[i], "markersize": 5}
        axes.errorbar(x, mean, yerr=half, capsize=3, lw=1.4, label=arm["title"], **look)
        seeds = [(row["batch"], value) for row in rows for value in row["each"].values()]
        axes.scatter(*zip(*seeds, strict=True), s=8, color=COLORS[i], alpha=0.5)
    over_batches(axes, result["batches"])
    axes.set_ylabel(f"{result['metric']} (%), median of the last {result['last']}")
    axes.set_title("accuracy, 95 % intervals over seeds", fontsize=9)
    axes.legend(fontsize=8)


def difference(axes: Any, result: Result) -> None:
    """Points above the baseline with their paired interval, and the source's beside them."""
    base = result["baseline"]
    named = {(row["arm"], row["batch"]): row["expected"] for row in result["table"]}
    at_base = named.get((base["arm"], base["batch"]))
    for i, arm in enumerate(result["arms"]):
        own = [
            one
            for one in result["comparisons"]
            if one["arm"] == arm["name"]
            and one["low"] is not None
            and (one["against_arm"], one["against_batch"]) == (base["arm"], base["batch"])
        ]
        if own:
            y = [one["difference"] for one in own]
            ends = [[d - one["low"], one["high"] - d] for d, one in zip(y, own, strict=True)]
            axes.errorbar(
                [one["batch"] for one in own], y, yerr=list(zip(*ends, strict=True)), capsize=3,
                lw=1.4, color=COLORS[i], marker=MARKERS[i], markersize=5, label=arm["title"],
            )  # fmt: skip
        source = [
            (batch, value - at_base)
            for (name, batch), value in named.items()
            if name == arm["name"] and value is not None and at_base is not None
        ]
        if source:
            axes.plot(
                *zip(*source, strict=True), ls=":", lw=1.2, color=COLORS[i], marker=MARKERS[i],
                markersize=5, mfc="white", label=f"{arm['title']}, the source",
            )  # fmt: skip
    axes.axhspan(-0.5, 0.5, color="grey", alpha=0.15, lw=0)
    axes.axhline(0, color="black", lw=0.8)
    over_batches(axes, result["batches"])
    axes.set_ylabel(f"points above batch {base['batch']:,}")
    axes.set_title("difference to the baseline, paired by seed", fontsize=9)
    axes.legend(fontsize=7)


def to_target(axes: Any, result: Result) -> None:
    """Updates to the target, log-log, with perfect scaling and the fitted bend."""
    titles = {arm["name"]: arm["title"] for arm in result["arms"]}
    for i, arm in enumerate(result["to_target"]):
        whole = [point for point in arm["points"] if point["mean"] is not None]
        cut = [p for p in arm["points"] if p["mean"] is None and p["mean_met"] is not None]
        if not whole:
            continue
        x, y = [p["batch"] for p in whole], [p["mean"] for p in whole]
        axes.plot(x, [y[0] * x[0] / b for b in x], ls=":", lw=1, color=COLORS[i])
        fit, label = arm["fit"], titles[arm["arm"]]
        if fit:
            at = [x[0] * (x[-1] / x[0]) ** (k / 40) for k in range(41)]
            bend = [fit["min_updates"] * (1 + fit["critical_batch"] / b) for b in at]
            axes.plot(at, bend, ls="--", lw=1.2, color=COLORS[i])
            label += f" (critical batch {fit['critical_batch']:,.0f})"
        axes.plot(x, y, MARKERS[i], color=COLORS[i], markersize=5, label=label)
        marks = [p["mean_met"] for p in cut]
        axes.plot([p["batch"] for p in cut], marks, MARKERS[i], color=COLORS[i], mfc="white")
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
    over_batches(axes, result["batches"])
    aim = result["target"]
    axes.set_ylabel(f"updates to {aim['metric']} of {aim['value']:g}")
    axes.set_title("updates to target; hollow: not by all seeds", fontsize=9)
    axes.legend(fontsize=7)


def beside_baseline(axes: Any, result: Result) -> None:
    """Each arm's points above the baseline, its paired interval, and each seed as a dot."""
    titles = {arm["name"]: arm["title"] for arm in result["arms"]}
    updates = {row["arm"]: row["updates"] for row in result["table"]}
    base = result["baseline"]["arm"]
    own = [one for one in result["comparisons"] if one["against_arm"] == base and one["n"] > 1]
    for place, one in enumerate(reversed(own)):
        ends = [[one["difference"] - one["low"]], [one["high"] - one["difference"]]]
        axes.errorbar(one["difference"], place, xerr=ends, fmt="o", color=COLORS[0], capsize=4)
        dots = list(one["per_seed"].values())
        axes.scatter(dots, [place + 0.18] * len(dots), s=10, color=COLORS[1], zorder=3)
    named = [f"{titles[one['arm']]} ({updates[one['arm']]:,.0f} updates)" for one in own]
    axes.set_yticks(range(len(own)), list(reversed(named)))
    axes.set_ylim(-0.5, len(own) - 0.3)
    axes.axvspan(-0.5, 0.5, color="grey", alpha=0.15, lw=0)
    axes.axvline(0, color="black", lw=0.8)
    if max(abs(one["high"]) for one in own) > 4:
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xticks(
            [-1, -0.5, 0, 0.5, 1, 2, 5, 8], ["-1", "-0.5", "0", "0.5", "1", "2", "5", "8"]
        )
    axes.set_xlabel(
        f"points of {result['metric']} above {titles[base]} ({updates[base]:,.0f} updates)"
    )
    axes.grid(alpha=0.3, axis="x")


def draw_overview(result: Result, path: Path) -> None:
    if len(result["batches"]) == 1 and len(result["arms"]) > 1:
        figure = new_figure(8.0, 1.2 + 0.55 * len(result["arms"]))
        beside_baseline(figure.add_subplot(), result)
        save(figure, path)
        return
    panels: list[Panel] = []
    if len(result["batches"]) > 1:
        panels += [accuracy, difference]
        panels += [to_target] if any(one["points"] for one in result["to_target"]) else []
    if not panels:
        return
    figure = new_figure(4.6 * len(panels), 4.2)
    for place, panel in enumerate(panels):
        panel(figure.add_subplot(1, len(panels), place + 1), result)
    save(figure, path)


def strands_of(result: Result) -> list[tuple[str, list[tuple[str, list[dict[str, Any]]]]]]:
    """Columns with the runs of each colour: an arm with its batches, or all arms in one."""
    columns = []
    for arm in result["arms"]:
        own = [run for run in result["runs"] if run["arm"] == arm["name"] and run["history"]]
        batches = sorted({run["batch"] for run in own})
        strands = [(f"{b:,}", [run for run in own if run["batch"] == b]) for b in batches]
        columns.append((arm["title"], strands))
    if all(len(strands) < 2 for _, strands in columns):
        return [("", [(name, of[0][1]) for name, of in columns if of])]
    return columns


def draw_curves(result: Result, path: Path) -> None:
    """Validation accuracy over samples and over updates: each seed thin, their mean thick."""
    from matplotlib.ticker import FuncFormatter

    columns, metric = strands_of(result), result["metric"]
    across = len(columns) > 1
    shape = (2, len(columns)) if across else (1, 2)
    figure = new_figure(4.4 * shape[1] + 0.4, 3.4 * shape[0])
    grid = figure.subplots(*shape, sharey=True, squeeze=False)
    for column, (title, strands) in enumerate(columns):
        for row, (place, label) in enumerate(((1, "samples seen"), (0, "updates"))):
            axes = grid[row][column] if across else grid[0][row]
            for i, (name, runs) in enumerate(strands):
                # a run that was stopped before its first evaluation has none
                curves = [run["history"][metric] for run in runs if metric in run["history"]]
                for curve in curves:
                    axes.plot(
                        [p[place] for p in curve], [p[3] for p in curve], color=COLORS[i], lw=0.5,
                        alpha=0.6,
                    )  # fmt: skip
                points = [
                    (each[0][place], sum(p[3] for p in each) / len(each))
                    for each in zip(*curves, strict=False)
                    if None not in [p[3] for p in each]
                ]
                axes.plot(*zip(*points, strict=True), color=COLORS[i], lw=1.6, label=name)
            axes.set_xlabel(label)
            axes.grid(alpha=0.3)
            if row == 1:
                axes.set_xscale("log")
            else:
                axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:,.0f} k"))
                axes.set_title(title, fontsize=9)
            if axes is grid[0][0]:
                axes.set_ylabel(f"{metric} (%)")
                axes.legend(fontsize=8, title="global batch size" if across else None)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="a study's folder, or a file of --save")
    parser.add_argument("--save", type=Path, help="write the numbers to this file")
    parser.add_argument("--call", action="append", default=[], metavar="PATH=NAME")
    parser.add_argument("--figures", type=Path, help="draw into this folder")
    a = parser.parse_args()
    result = read(a.source, a.call)
    if a.save is not None:
        write(result, a.save)
    if a.figures is not None:
        draw_overview(result, a.figures / f"{result['name']}.png")
        draw_curves(result, a.figures / f"{result['name']}_curves.png")


if __name__ == "__main__":
    main()
