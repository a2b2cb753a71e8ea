"""The figures of the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from guidetune.report import numbers
from guidetune.report.figure import ARM_COLOURS, ARMS, INK, MUTED, PAPER, Palette, canvas, legend, place_labels, short, svg, wilson_ends

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "ARM_COLOURS",
    "Palette",
    "by_difficulty",
    "confidence_histogram",
    "forest",
    "gain_against_retention",
    "loss_curves",
    "run_dots",
    "sample_curves",
    "scale_sweep",
    "signal_shares",
    "skill_bars",
]


def gain_against_retention(points: Mapping[str, Mapping[str, Any]], palette: Palette, frontier: Sequence[str] = ()) -> str:
    """Scatter of task gain (y) against general retention relative to instruct (x); up and right is better.

    `points[arm]` = {"x", "y", "x_ci", "y_ci", "seeds"}; x is a ratio (1 = all kept), the intervals may be None, `seeds` are (x, y) of
    each training seed. `frontier` names the arms that no other beats on both axes, from left to right; they are joined by a stair.
    """
    with canvas(4.1) as figure:
        ax = figure.add_subplot()
        ax.grid(True)
        ax.axhline(0, color=MUTED, lw=0.9)
        ax.axvline(100, color=MUTED, lw=0.9)
        if len(frontier) > 1:
            stair = [points[name] for name in frontier]
            # Between two arms of the frontier nothing better than the worse of both coordinates has been reached.
            ax.step(
                [100 * p["x"] for p in stair], [p["y"] for p in stair], where="pre", color=INK, lw=1.1, ls=(0, (2, 2)), alpha=0.6, zorder=2
            )
        for name, point in points.items():
            x, y = 100 * point["x"], point["y"]
            x_ci, y_ci = point.get("x_ci"), point.get("y_ci")
            colour = palette.colour(name)
            for seed_x, seed_y in point.get("seeds") or ():
                ax.plot(
                    100 * seed_x,
                    seed_y,
                    marker=palette.marker(name),
                    ms=4,
                    mfc="none",
                    mec=colour,
                    mew=0.8,
                    alpha=0.75,
                    ls="none",
                    zorder=2,
                )
            xerr = [[max(0.0, x - 100 * x_ci[0])], [max(0.0, 100 * x_ci[1] - x)]] if x_ci else None
            yerr = [[max(0.0, y - y_ci[0])], [max(0.0, y_ci[1] - y)]] if y_ci else None
            ax.errorbar(
                x,
                y,
                xerr=xerr,
                yerr=yerr,
                color=colour,
                marker=palette.marker(name),
                ms=7,
                elinewidth=1.2,
                capsize=0,
                markeredgecolor=PAPER,
                markeredgewidth=0.8,
                linestyle="none",
                zorder=3,
            )
        ax.margins(x=0.1, y=0.12)
        ax.autoscale_view()
        low, high = ax.get_xlim()
        ax.set_xlim(low, max(high, 100 + 0.1 * (100 - low), 101))
        ax.set_xlabel("general skills kept, % of the instruct model's score")
        ax.set_ylabel("task gain over instruct")
        figure.get_layout_engine().execute(figure)
        _name_points(ax, points, palette)
        said = [
            f"{name}: {point['x']:.1%} kept, gain {numbers.signed(point['y'])}"
            + (f" {numbers.interval(point['y_ci'])}" if point["y_ci"] else "")
            for name, point in points.items()
        ]
        on_it = f" Not beaten on both: {', '.join(frontier)}." if frontier else ""
        return svg(
            figure,
            "tradeoff",
            "Task gain against general skills kept",
            "Scatter plot; up is more task gain, right is less forgetting; bars are 95 % intervals. " + "; ".join(said) + "." + on_it,
        )


def _name_points(ax: Axes, points: Mapping[str, Mapping[str, Any]], palette: Palette) -> None:
    """Every arm's name near its point, clear of markers, whiskers and other names; a thin line leads to one that stands far off."""
    per_point = ax.figure.dpi / 72

    def at(x: float, y: float) -> tuple[float, float]:
        px, py = ax.transData.transform((100 * x, y))
        return float(px) / per_point, float(py) / per_point

    anchors = [at(point["x"], point["y"]) for point in points.values()]
    things = [(x - 5, y - 5, x + 5, y + 5) for x, y in anchors]
    for point in points.values():
        if point.get("x_ci"):
            (left, y), (right, _) = at(point["x_ci"][0], point["y"]), at(point["x_ci"][1], point["y"])
            things.append((left, y - 1.5, right, y + 1.5))
        if point.get("y_ci"):
            (x, bottom), (_, top) = at(point["x"], point["y_ci"][0]), at(point["x"], point["y_ci"][1])
            things.append((x - 1.5, bottom, x + 1.5, top))
    (left, bottom), (right, top) = (ax.transAxes.transform(corner) / per_point for corner in ((0, 0), (1, 1)))
    (zero_x, zero_y) = at(1.0, 0.0)
    things += [(left, zero_y - 1, right, zero_y + 1), (zero_x - 1, bottom, zero_x + 1, top)]
    names = [short(name, 22) for name in points]
    widths = [5.6 * len(name) for name in names]
    corners = place_labels(anchors, widths, 10.5, things, (left, bottom, right, top))
    for name, label, wide, (x, y), corner in zip(points, names, widths, anchors, corners, strict=True):
        dx, dy = corner[0] - x, corner[1] - y
        nearest = (min(max(0.0, dx), dx + wide), min(max(0.0, dy), dy + 10.5))
        if math.hypot(*nearest) > 13:
            ax.annotate(
                "",
                (100 * points[name]["x"], points[name]["y"]),
                xytext=nearest,
                textcoords="offset points",
                arrowprops={"arrowstyle": "-", "lw": 0.7, "color": palette.colour(name), "shrinkA": 0, "shrinkB": 4},
                annotation_clip=False,
            )
        ax.annotate(
            label,
            (100 * points[name]["x"], points[name]["y"]),
            xytext=(dx, dy + 2),
            textcoords="offset points",
            color=palette.colour(name),
            weight="bold",
            ha="left",
            va="bottom",
            annotation_clip=False,
        )


def skill_bars(scores: Mapping[str, Mapping[str, tuple[float, int]]], arms: Sequence[str], reference: str, palette: Palette) -> str:
    """One panel per arm, one bar per skill; a tick marks the instruct model's score. Whiskers: 95 % Wilson intervals.

    `scores[skill][arm]` = (score, n).
    """
    shown = [name for name in arms if name != reference] or list(arms)
    rows = math.ceil(len(shown) / 5)
    per_row = math.ceil(len(shown) / rows)
    skills = list(scores)
    unit = all(0 <= value <= 1 for cells in scores.values() for value, _ in cells.values())
    with canvas(rows * (0.75 + 0.225 * len(skills))) as figure:
        axes = figure.subplots(rows, per_row, sharey=True, sharex=True, squeeze=False)
        for ax in axes.flat[len(shown) :]:
            ax.set_visible(False)
        for ax, name in zip(axes.flat, shown, strict=False):
            ax.grid(True, axis="x")
            known = [(row, *scores[skill][name]) for row, skill in enumerate(skills) if name in scores[skill]]
            ax.barh([row for row, _, _ in known], [v for _, v, _ in known], height=0.62, color=palette.colour(name), alpha=0.82, lw=0)
            spans = [(row, *wilson_ends(value, n)) for row, value, n in known if unit and n > 1]
            if spans:
                ax.hlines(*zip(*spans, strict=True), color=INK, lw=0.8, alpha=0.75)
            before = [
                (scores[skill][reference][0], row - 0.42, row + 0.42) for row, skill in enumerate(skills) if reference in scores[skill]
            ]
            if before and name != reference:
                ax.vlines(*zip(*before, strict=True), color=INK, lw=1.6)
            ax.set_title(short(name, 22), color=palette.colour(name))
            ax.spines["left"].set_visible(False)
            ax.tick_params(axis="y", length=0)
            if unit:
                ax.set_xlim(0, 1.03)
                ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes[0][0].set_yticks(range(len(skills)), [short(skill, 26) for skill in skills])
        axes[0][0].set_ylim(len(skills) - 0.4, -0.6)
        mean = {
            name: numbers.score(
                sum(cells[name][0] for cells in scores.values() if name in cells) / max(1, sum(name in cells for cells in scores.values()))
            )
            for name in arms
        }
        return svg(
            figure,
            "skills",
            "General skills by arm",
            "Bars per skill and arm with a tick at the instruct model's score. Mean over skills: "
            + "; ".join(f"{k} {v}" for k, v in mean.items())
            + ".",
        )


def by_difficulty(panels: Mapping[str, Mapping[str, Mapping[str, tuple[float, int]]]], arms: Sequence[str], palette: Palette) -> str:
    """A panel per task, a bar per arm and level of difficulty with its 95 % Wilson interval; `panels[task][level][arm]` = (score, n)."""
    present = [name for name in arms if any(name in cells for levels in panels.values() for cells in levels.values())]
    unit = all(0 <= v <= 1 for levels in panels.values() for cells in levels.values() for v, _ in cells.values())
    with canvas(2.7 * len(panels) + 0.2) as figure:
        axes = figure.subplots(len(panels), 1, sharey=True, squeeze=False)[:, 0]
        each = 0.84 / max(1, len(present))
        for ax, (task, levels) in zip(axes, panels.items(), strict=True):
            ax.grid(True, axis="y")
            for order, name in enumerate(present):
                known = [(i - 0.42 + each * (order + 0.5), *cells[name]) for i, cells in enumerate(levels.values()) if name in cells]
                ax.bar([x for x, _, _ in known], [y for _, y, _ in known], width=each * 0.9, color=palette.colour(name), alpha=0.82, lw=0)
                spans = [(x, *wilson_ends(y, n)) for x, y, n in known if unit and n > 1]
                if spans:
                    ax.vlines(*zip(*spans, strict=True), color=INK, lw=0.8, alpha=0.75)
            counts = [max(n for _, n in cells.values()) for cells in levels.values()]
            ax.set_xticks(range(len(levels)), [f"{short(level, 14)}\nn = {n}" for level, n in zip(levels, counts, strict=True)])
            ax.tick_params(axis="x", length=0)
            ax.set_xlim(-0.5, len(levels) - 0.5)
            if len(panels) > 1:
                ax.set_title(short(task, 60))
            ax.set_ylabel("score")
        axes[-1].set_xlabel("difficulty")
        if unit:
            axes[0].set_ylim(0, 1.02)
        legend(figure, present, palette, line=False)
        said = [
            f"{task}: "
            + "; ".join(
                f"{name} " + ", ".join(f"{level} {numbers.score(cells[name][0])}" for level, cells in levels.items() if name in cells)
                for name in present
            )
            for task, levels in panels.items()
        ]
        return svg(figure, "difficulty", "Task score by difficulty", " ".join(said))


def _thin(points: Sequence[tuple[float, float]], limit: int = 240) -> list[tuple[float, float]]:
    """At most `limit` points: neighbours averaged."""
    if len(points) <= limit:
        return list(points)
    size = len(points) / limit
    groups = [points[int(i * size) : max(int((i + 1) * size), int(i * size) + 1)] for i in range(limit)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def loss_curves(curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], palette: Palette) -> str:
    """Training loss (left) and validation loss (right) by step; `curves[arm]` = {"train": [(step, loss)], "validation": [...]}."""
    kinds = [kind for kind in ("train", "validation") if any(curve.get(kind) for curve in curves.values())]
    with canvas(2.9) as figure:
        axes = figure.subplots(1, len(kinds), squeeze=False)[0]
        for ax, kind in zip(axes, kinds, strict=True):
            ax.grid(True, axis="y")
            for order, (name, curve) in enumerate(curves.items()):
                points = _thin(curve.get(kind) or [])
                if not points:
                    continue
                few = len(points) <= 24
                ax.plot(
                    [x for x, _ in points],
                    [y for _, y in points],
                    color=palette.colour(name),
                    lw=1.5 if few else 1.1,
                    ls=palette.dash(name) if few else "-",
                    marker=palette.marker(name),
                    ms=4.5,
                    markeredgecolor=PAPER,
                    markeredgewidth=0.5,
                    markevery=None if few else (6 * order, max(1, len(points) // 9)),
                )
            ax.set_title("training" if kind == "train" else kind)
            ax.set_xlabel("optimiser step")
        axes[0].set_ylabel("loss per target token")
        legend(figure, list(curves), palette)
        said = []
        for name, curve in curves.items():
            for kind in kinds:
                points = curve.get(kind) or []
                if points:
                    (_, first), (steps, last) = points[0], points[-1]
                    said.append(f"{name} {'training' if kind == 'train' else kind} {first:.3g} to {last:.3g} over {steps:.0f} steps")
        return svg(figure, "loss", "Loss curves", "; ".join(said) + ".")


def confidence_histogram(edges: Sequence[float], counts: Sequence[float], mean: float | None, below: float | None) -> str:
    """Histogram of the teacher's probability of the target tokens; the mean is marked, the part below .05 is shaded."""
    total = sum(counts) or 1
    with canvas(2.5) as figure:
        ax = figure.add_subplot()
        ax.grid(True, axis="y")
        widths = [b - a for a, b in zip(edges, edges[1:], strict=False)]
        ax.bar(
            edges[:-1],
            [100 * n / total for n in counts],
            width=[0.94 * w for w in widths],
            align="edge",
            color=ARMS[3],
            alpha=0.85,
            lw=0,
        )
        ax.axvspan(edges[0], min(0.05, edges[-1]), color=ARMS[1], alpha=0.2, lw=0, zorder=0)
        top = ax.get_ylim()[1]
        if mean is not None:
            ax.axvline(mean, color=INK, lw=1.2, ls=(0, (4, 2)))
            ax.annotate(
                f"mean {mean:.3f}",
                (mean, top),
                xytext=(5 if mean < 0.8 else -5, -4),
                textcoords="offset points",
                va="top",
                weight="bold",
                ha="left" if mean < 0.8 else "right",
            )
        if below is not None:
            ax.annotate(
                f"{numbers.percent(below)} below .05",
                (min(0.05, edges[-1]), top),
                xytext=(5, -4 if mean is None or mean > 0.3 else -18),
                textcoords="offset points",
                va="top",
                color=ARMS[1],
                weight="bold",
            )
        ax.set_xlim(edges[0], edges[-1])
        ax.set_xlabel("teacher's probability of the target token")
        ax.set_ylabel("% of target tokens")
        said = "; ".join(f"{a:.2f} to {b:.2f}: {n / total:.1%}" for a, b, n in zip(edges, edges[1:], counts, strict=False))
        return svg(figure, "confidence", "Teacher confidence in the target tokens", f"Histogram. {said}.")


def signal_shares(shares: Mapping[str, Sequence[Mapping[str, float]]], palette: Palette) -> str:
    """Share of the learning signal per teacher-confidence bin: bars per arm, and in grey the share of tokens in that bin.

    share(b) = sum_{t in b} w_t l_t / sum_t w_t l_t (arXiv 2605.01256); `shares[arm]` = [{"lo", "hi", "tokens", "signal"}].
    """
    bins = max(shares.values(), key=len)
    tokens = [float(numbers.finite(part.get("tokens")) or 0) for part in bins]
    everything = sum(tokens)
    with canvas(2.9) as figure:
        ax = figure.add_subplot()
        ax.grid(True, axis="y")
        if everything:
            ax.bar(range(len(bins)), [100 * n / everything for n in tokens], width=0.9, color=MUTED, alpha=0.22, lw=0)
        each = 0.8 / len(shares)
        for order, (name, parts) in enumerate(shares.items()):
            at = {(round(part["lo"], 6), round(part["hi"], 6)): part["signal"] for part in parts}
            heights = [100 * at.get((round(part["lo"], 6), round(part["hi"], 6)), 0) for part in bins]
            left = [i - 0.4 + each * (order + 0.5) for i in range(len(bins))]
            ax.bar(left, heights, width=each * 0.92, color=palette.colour(name), alpha=0.9, lw=0, zorder=3)
        ax.set_xticks(range(len(bins)), [f"{part['lo']:.2g}–{part['hi']:.2g}" for part in bins])
        ax.tick_params(axis="x", length=0)
        ax.set_xlabel("teacher confidence (grey: share of the tokens)")
        ax.set_ylabel("% of the learning signal")
        legend(figure, list(shares), palette, line=False)
        said = [
            f"{name}: " + ", ".join(f"{part['lo']:.2g} to {part['hi']:.2g} {part['signal']:.1%}" for part in parts)
            for name, parts in shares.items()
        ]
        return svg(figure, "signal", "Learning signal by teacher confidence", "Grouped bars. " + "; ".join(said) + ".")


def sample_curves(panels: Mapping[str, Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]], palette: Palette) -> str:
    """Score against the number of samples k: a row per task; columns Avg@k, pass@k, maj@k; `panels[task][measure][arm]` = [(k, score)]."""
    measures = list(dict.fromkeys(measure for by_measure in panels.values() for measure in by_measure))
    with canvas(2.4 * len(panels) + 0.3) as figure:
        axes = figure.subplots(len(panels), len(measures), sharex=True, sharey="row", squeeze=False)
        names = list(dict.fromkeys(name for by in panels.values() for curves in by.values() for name in curves))
        for row, (task, by_measure) in zip(axes, panels.items(), strict=True):
            for ax, measure in zip(row, measures, strict=True):
                ax.grid(True, axis="y")
                ticks = sorted({k for curves in by_measure.get(measure, {}).values() for k, _ in curves})
                for name, curve in by_measure.get(measure, {}).items():
                    ax.plot(
                        [k for k, _ in curve],
                        [value for _, value in curve],
                        color=palette.colour(name),
                        ls=palette.dash(name),
                        marker=palette.marker(name),
                        ms=4.5,
                        lw=1.4,
                        markeredgecolor=PAPER,
                        markeredgewidth=0.5,
                    )
                if ticks:
                    ax.set_xscale("log", base=2)
                    shown = ticks if len(ticks) <= 6 else [k for k in ticks if k & (k - 1) == 0]
                    ax.set_xticks(shown, [str(k) for k in shown])
                    ax.minorticks_off()
                ax.set_title(f"{measure}@k" if len(panels) == 1 else f"{short(task, 20)}, {measure}@k")
        for ax in axes[-1]:
            ax.set_xlabel("samples k")
        for ax in axes[:, 0]:
            ax.set_ylabel("score")
        legend(figure, names, palette)
        said = [
            f"{task}, {measure}@k, {name}: " + ", ".join(f"{k} {numbers.score(value)}" for k, value in curve)
            for task, by_measure in panels.items()
            for measure, curves in by_measure.items()
            for name, curve in curves.items()
        ]
        return svg(figure, "curves", "Score by number of samples", "; ".join(said) + ".")


def scale_sweep(sweeps: Mapping[str, Mapping[str, Any]], palette: Palette) -> str:
    """Three views of a sweep over merge scales: task score, general score, and one against the other; the chosen scale is ringed.

    `sweeps[arm]` = {"chosen": scale or None, "validation": [(scale, task, general)], "test": the same}; validation is drawn dashed.
    """
    views = (("task", 0, 1), ("general skills", 0, 2), ("task against general", 2, 1))
    with canvas(3.1) as figure:
        axes = figure.subplots(1, 3, squeeze=False)[0]
        for ax, (title, across, up) in zip(axes, views, strict=True):
            ax.grid(True)
            ax.set_title(title)
            ax.set_xlabel("general skills" if across else "scale of the merged change")
            for name, sweep in sweeps.items():
                for split, style in (("validation", (0, (3, 2))), ("test", "-")):
                    known = [point for point in sweep[split] if point[across] is not None and point[up] is not None]
                    if not known:
                        continue
                    last = split == "test"
                    ax.plot(
                        [point[across] for point in known],
                        [point[up] for point in known],
                        color=palette.colour(name),
                        ls=style,
                        lw=1.5 if last else 1.0,
                        marker=palette.marker(name),
                        ms=5 if last else 3.5,
                        mfc=palette.colour(name) if last else "none",
                        markeredgewidth=0.8,
                    )
                    for point in known:
                        if sweep["chosen"] is not None and abs(point[0] - sweep["chosen"]) < 1e-9:
                            ax.plot(point[across], point[up], marker="o", ms=11, mfc="none", mec=palette.colour(name), mew=1.3, ls="none")
                        if across and last and (point in (known[0], known[-1]) or point[0] == sweep["chosen"]):
                            ax.annotate(
                                f"{point[0]:g}", (point[across], point[up]), xytext=(5, 4), textcoords="offset points", fontsize=6.8
                            )
        axes[0].set_ylabel("mean score")
        axes[2].set_ylabel("task")
        legend(figure, list(sweeps), palette)
        said = []
        for name, sweep in sweeps.items():
            measured = any(point[1] is not None or point[2] is not None for point in sweep["test"])
            told = ", ".join(
                f"{scale:g}: task {numbers.score(task)}, general {numbers.score(general)}"
                for scale, task, general in sweep["test" if measured else "validation"]
            )
            said.append(f"{name} (chosen: {'none' if sweep['chosen'] is None else format(sweep['chosen'], 'g')}): {told}")
        return svg(figure, "scales", "Scores by merge scale", "; ".join(said) + ".")


def run_dots(
    rows: Sequence[tuple[str, Sequence[tuple[float, tuple[float, float] | None] | None]]], runs: Sequence[str], palette: Palette
) -> str:
    """One line per measure and arm, one mark per run with its 95 % interval; `rows` = [(label, a (score, ci) or None per run)]."""
    with canvas(0.9 + 0.26 * len(rows) + 0.02 * len(rows) * len(runs)) as figure:
        ax = figure.add_subplot()
        ax.grid(True, axis="x")
        for line, (_, cells) in enumerate(rows):
            for order, (run, cell) in enumerate(zip(runs, cells, strict=True)):
                if cell is None:
                    continue
                y = line + 0.5 * ((order + 0.5) / len(runs) - 0.5)
                if cell[1]:
                    ax.hlines(y, *cell[1], color=palette.colour(run), lw=1.2)
                ax.plot(
                    cell[0],
                    y,
                    marker=palette.marker(run),
                    color=palette.colour(run),
                    ms=5,
                    ls="none",
                    markeredgecolor=PAPER,
                    markeredgewidth=0.5,
                )
        ax.set_yticks(range(len(rows)), [short(label, 40) for label, _ in rows])
        ax.set_ylim(len(rows) - 0.4, -0.6)
        ax.set_xlabel("score")
        legend(figure, runs, palette)
        said = [
            f"{label}: " + ", ".join(f"{run} {numbers.score(cell[0])}" for run, cell in zip(runs, cells, strict=True) if cell)
            for label, cells in rows
        ]
        return svg(figure, "runs", "Scores of every run", "; ".join(said) + ".")


def forest(gain: float, ci: tuple[float, float] | None, reach: float, arm: int) -> str:
    """A difference and its interval on a line from -reach to +reach with a mark at zero: one row of a forest plot, as inline SVG."""
    wide, high = 90.0, 16.0

    def at(value: float) -> float:
        return round(wide / 2 + (wide / 2 - 5) * max(-1.0, min(1.0, value / reach)), 2)

    said = f"{numbers.signed(gain)} {numbers.interval(ci) if ci else ''}".strip()
    colour = f"var(--arm-{arm}, {ARM_COLOURS[arm]})"
    bar = f'<path d="M{at(ci[0])} 8H{at(ci[1])}" stroke="{colour}" stroke-width="2"/>' if ci else ""
    return (
        f'<svg class="forest" role="img" aria-label="{escape(said)}" viewBox="0 0 {wide:g} {high:g}" width="{wide:g}" height="{high:g}">'
        f'<path d="M{wide / 2:g} 0V{high:g}" stroke="var(--muted, #767676)" stroke-width="1"/>{bar}'
        f'<circle cx="{at(gain)}" cy="8" r="2.8" fill="{colour}"/></svg>'
    )
