"""Plots as inline SVG that follow the page's theme: no colour is fixed, every figure has a title and a description.

matplotlib draws with placeholder colours, which are then replaced by the page's CSS variables (with a fallback that is readable on white
and on black), so one file serves light, dark and print.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from guidetune.report import numbers
from guidetune.report.text import clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 7.6  # inches; the page scales the drawing to its column
# Placeholder -> (CSS variable, fallback). The fallbacks keep contrast >= 3 on white and on black, for a drawing copied out of the page.
_INK, _MUTED, _GRID, _PAPER = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
_THEME = {_INK: ("ink", "#767676"), _MUTED: ("muted", "#767676"), _GRID: ("grid", "#8888"), _PAPER: ("paper", "#0000")}
ARM_COLOURS = ("#767676", "#c8591f", "#8f7300", "#2f7fc1", "#1f8a63", "#9a62c7", "#c74a8f", "#1a8a96", "#9a6a45")
_ARMS = [f"#0a0c{i:02x}" for i in range(len(ARM_COLOURS))]
_THEME |= {mark: (f"arm-{i}", colour) for i, (mark, colour) in enumerate(zip(_ARMS, ARM_COLOURS, strict=True))}
_MARKERS = "osD^vPX*p"
_DASHES: list[Any] = ["-", (0, (5, 2)), (0, (1.5, 1.5)), "-", (0, (6, 2, 1.5, 2)), (0, (3, 1.5)), (0, (8, 2)), (0, (1, 1)), "-"]


class Palette:
    """A fixed colour, marker and dash for every arm; 0 is the instruct model's. Beyond eight arms colours repeat with other markers."""

    def __init__(self, names: Sequence[str], reference: str) -> None:
        others = [name for name in names if name != reference]
        self._index = {name: 1 + i % (len(ARM_COLOURS) - 1) for i, name in enumerate(others)} | {reference: 0}
        self._order = {name: i for i, name in enumerate([reference, *others])}

    def index(self, name: str) -> int:
        return self._index.get(name, 0)

    def colour(self, name: str) -> str:
        return _ARMS[self.index(name)]

    def marker(self, name: str) -> str:
        return _MARKERS[self._order.get(name, 0) % len(_MARKERS)]

    def dash(self, name: str) -> Any:
        return _DASHES[self._order.get(name, 0) % len(_DASHES)]


@contextmanager
def _canvas(height: float, width: float = WIDTH) -> Iterator[Figure]:
    import matplotlib
    from matplotlib.figure import Figure

    settings: dict[str, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "guidetune",
        "text.parse_math": False,
        "font.family": "DejaVu Sans",
        "font.size": 8.2,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _MUTED,
        "xtick.color": _MUTED,
        "ytick.color": _MUTED,
        "xtick.labelcolor": _INK,
        "ytick.labelcolor": _INK,
        "axes.linewidth": 0.7,
        "axes.titlesize": 8.6,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": False,
        "grid.color": _GRID,
        "grid.linewidth": 0.6,
        "xtick.major.size": 3,
        "ytick.major.size": 0,
        "xtick.major.width": 0.7,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "legend.fontsize": 8.2,
        "axes.unicode_minus": True,
        "figure.constrained_layout.use": True,
        "axes.formatter.useoffset": False,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
    }
    # A warning here is about a glyph that the measuring font lacks; the reader's browser has its own fonts.
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Figure(figsize=(width, height))


def _svg(figure: Figure, name: str, title: str, description: str) -> str:
    """The figure as an inline <svg>: theme variables for colours, page fonts, ids that are unique on the page, title and description."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'(?<![\w-])id="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(?:xlink:)?href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r"font: ((?:[\w.%-]+ )*?[\d.]+px) [^;\"]+", r"font: \1 var(--sans, sans-serif)", text)
    text = re.sub(r"font-family: [^;\"]+", "font-family: var(--sans, sans-serif)", text)
    for mark, (variable, fallback) in _THEME.items():
        text = text.replace(mark, f"var(--{variable}, {fallback})")
    text = re.sub(r"(-?\d+\.\d{3})\d+", r"\1", text)  # a thousandth of a point is finer than any screen
    text = re.sub(r"\n\s*", "\n", text)
    view = re.search(r'viewBox="([^"]+)"', text)
    head = (
        f'<svg class="plot" role="img" viewBox="{view.group(1) if view else ""}" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{escape(clean(title))}</title><desc id="{name}-d">{escape(clean(description))}</desc>'
    )
    return clean(re.sub(r"<svg\b[^>]*>", lambda _: head, text, count=1))


def _key(name: str) -> str:
    """A legend label; matplotlib leaves out those that start with an underscore, so a hair space goes before it."""
    label = _short(name, 22)
    return f"\u200a{label}" if label.startswith("_") else label


def _wilson(share: float, n: int) -> tuple[float, float]:
    from guidetune.evaluation.statistics import wilson  # numpy is not needed to import this package

    return wilson(share * n, n)


def _short(label: str, limit: int = 28) -> str:
    label = " ".join(clean(label).split())
    return label if len(label) <= limit else label[: limit - 1] + "…"


def _spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions as near as possible to `wanted` that keep `gap` between neighbours."""
    placed = list(wanted)
    order = sorted(range(len(placed)), key=lambda i: placed[i])
    for _ in range(200):
        moved = False
        for below, above in zip(order, order[1:], strict=False):
            short = gap - (placed[above] - placed[below])
            if short > 1e-6:
                placed[below] -= short / 2
                placed[above] += short / 2
                moved = True
        if not moved:
            break
    return placed


def gain_against_retention(points: Mapping[str, Mapping[str, Any]], palette: Palette) -> str:
    """Scatter of task gain (y) against general retention relative to instruct (x); up and right is better.

    `points[arm]` = {"x", "y", "x_ci", "y_ci"}; x is a ratio (1 = all kept), the intervals may be None.
    """
    with _canvas(3.7) as figure:
        ax = figure.add_subplot()
        ax.grid(True)
        ax.axhline(0, color=_MUTED, lw=0.9)
        ax.axvline(100, color=_MUTED, lw=0.9)
        for name, point in points.items():
            x, y = 100 * point["x"], point["y"]
            x_ci, y_ci = point.get("x_ci"), point.get("y_ci")
            xerr = [[max(0.0, x - 100 * x_ci[0])], [max(0.0, 100 * x_ci[1] - x)]] if x_ci else None
            yerr = [[max(0.0, y - y_ci[0])], [max(0.0, y_ci[1] - y)]] if y_ci else None
            ax.errorbar(
                x,
                y,
                xerr=xerr,
                yerr=yerr,
                color=palette.colour(name),
                marker=palette.marker(name),
                ms=7,
                elinewidth=1.2,
                capsize=0,
                markeredgecolor=_PAPER,
                markeredgewidth=0.8,
                linestyle="none",
                zorder=3,
            )
        ax.margins(x=0.12, y=0.16)
        ax.autoscale_view()
        low, high = ax.get_xlim()
        ax.set_xlim(low, max(high, 100 + 0.14 * (100 - low), 101))
        ax.set_xlabel("general skills kept, % of the instruct model's score")
        ax.set_ylabel("task gain over instruct")
        figure.draw_without_rendering()
        _name_points(ax, {name: (100 * point["x"], point["y"]) for name, point in points.items()}, palette)
        said = [
            f"{name}: {point['x']:.1%} kept, gain {numbers.signed(point['y'])}"
            + (f" {numbers.interval(point['y_ci'])}" if point["y_ci"] else "")
            for name, point in points.items()
        ]
        return _svg(
            figure,
            "tradeoff",
            "Task gain against general skills kept",
            "Scatter plot; up is more task gain, right is less forgetting; bars are 95 % intervals. " + "; ".join(said) + ".",
        )


def _name_points(ax: Axes, points: Mapping[str, tuple[float, float]], palette: Palette) -> None:
    """The arm's name beside its point, moved up or down where names would overlap, on the left where the right edge is near."""
    names = list(points)
    pixels = [ax.transData.transform(points[name]) for name in names]
    right_edge = ax.transAxes.transform((1, 1))[0]
    per_point = ax.figure.dpi / 72
    sides = [1 if x + (9 + 5.5 * min(len(name), 22)) * per_point < right_edge else -1 for name, (x, _) in zip(names, pixels, strict=True)]
    # Just above the horizontal bar of its own point, so that no whisker runs through a name.
    heights = _spread([y + 7 * per_point for _, y in pixels], 11 * per_point)
    for name, (_, y), side, height in zip(names, pixels, sides, heights, strict=True):
        ax.annotate(
            _short(name, 22),
            points[name],
            xytext=(7 * side, (height - y) / per_point),
            textcoords="offset points",
            color=palette.colour(name),
            weight="bold",
            ha="left" if side > 0 else "right",
            va="center",
            annotation_clip=False,
        )


def _legend(figure: Figure, names: Sequence[str], palette: Palette, line: bool = True) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Line2D([], [], color=palette.colour(name), marker=palette.marker(name), ls=palette.dash(name), lw=1.5, ms=4.5, label=_key(name))
        if line
        else Patch(color=palette.colour(name), label=_key(name))
        for name in names
    ]
    figure.legend(
        handles=handles, loc="outside upper left", ncols=min(len(handles), 6), handlelength=2.6 if line else 1.2, columnspacing=1.6
    )


def skill_bars(scores: Mapping[str, Mapping[str, tuple[float, int]]], arms: Sequence[str], reference: str, palette: Palette) -> str:
    """One panel per arm, one bar per skill; a tick marks the instruct model's score. Whiskers: 95 % Wilson intervals.

    `scores[skill][arm]` = (score, n).
    """
    shown = [name for name in arms if name != reference] or list(arms)
    per_row = min(len(shown), 4)
    rows = math.ceil(len(shown) / per_row)
    skills = list(scores)
    unit = all(0 <= value <= 1 for cells in scores.values() for value, _ in cells.values())
    with _canvas(rows * (0.75 + 0.225 * len(skills))) as figure:
        axes = figure.subplots(rows, per_row, sharey=True, sharex=True, squeeze=False)
        for ax in axes.flat[len(shown) :]:
            ax.set_visible(False)
        for ax, name in zip(axes.flat, shown, strict=False):
            ax.grid(True, axis="x")
            for row, skill in enumerate(skills):
                cell = scores[skill].get(name)
                if cell:
                    ax.barh(row, cell[0], height=0.62, color=palette.colour(name), alpha=0.82, lw=0)
                    if unit and cell[1] > 1:
                        ax.hlines(row, *_wilson(*cell), color=_INK, lw=0.8, alpha=0.75)
                before = scores[skill].get(reference)
                if before and name != reference:
                    ax.vlines(before[0], row - 0.42, row + 0.42, color=_INK, lw=1.6)
            ax.set_title(_short(name, 22), color=palette.colour(name))
            ax.spines["left"].set_visible(False)
            ax.tick_params(axis="y", length=0)
            if unit:
                ax.set_xlim(0, 1.03)
                ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes[0][0].set_yticks(range(len(skills)), [_short(skill, 26) for skill in skills])
        axes[0][0].set_ylim(len(skills) - 0.4, -0.6)
        mean = {
            name: numbers.score(
                sum(cells[name][0] for cells in scores.values() if name in cells) / max(1, sum(name in cells for cells in scores.values()))
            )
            for name in arms
        }
        return _svg(
            figure,
            "skills",
            "General skills by arm",
            "Bars per skill and arm with a tick at the instruct model's score. Mean over skills: "
            + "; ".join(f"{k} {v}" for k, v in mean.items())
            + ".",
        )


def by_difficulty(panels: Mapping[str, Mapping[str, Mapping[str, tuple[float, int]]]], arms: Sequence[str], palette: Palette) -> str:
    """Score against difficulty, one panel per task, one line per arm; `panels[task][level][arm]` = (score, n)."""
    with _canvas(2.9) as figure:
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        present = [name for name in arms if any(name in cells for levels in panels.values() for cells in levels.values())]
        unit = all(0 <= v <= 1 for levels in panels.values() for cells in levels.values() for v, _ in cells.values())
        for ax, (task, levels) in zip(axes, panels.items(), strict=True):
            ax.grid(True, axis="y")
            for order, name in enumerate(present):
                shift = 0.06 * (order - (len(present) - 1) / 2)  # whiskers beside each other, not on top
                known = [(i + shift, *cells[name]) for i, cells in enumerate(levels.values()) if name in cells]
                ax.plot(
                    [x for x, _, _ in known],
                    [y for _, y, _ in known],
                    color=palette.colour(name),
                    ls=palette.dash(name),
                    marker=palette.marker(name),
                    ms=5,
                    lw=1.6,
                    markeredgecolor=_PAPER,
                    markeredgewidth=0.6,
                    zorder=3,
                )
                if unit:
                    for x, y, n in known:
                        ax.vlines(x, *_wilson(y, n), color=palette.colour(name), lw=1, alpha=0.7)
            counts = [max(n for _, n in cells.values()) for cells in levels.values()]
            ax.set_xticks(range(len(levels)), [f"{_short(level, 14)}\nn = {n}" for level, n in zip(levels, counts, strict=True)])
            ax.set_xlim(-0.5, len(levels) - 0.5)
            if len(panels) > 1:
                ax.set_title(_short(task, 30))
            ax.set_xlabel("difficulty")
        axes[0].set_ylabel("score")
        if unit:
            axes[0].set_ylim(-0.02, 1.02)
        _legend(figure, present, palette)
        said = [
            f"{task}: "
            + "; ".join(
                f"{name} " + ", ".join(f"{level} {numbers.score(cells[name][0])}" for level, cells in levels.items() if name in cells)
                for name in present
            )
            for task, levels in panels.items()
        ]
        return _svg(figure, "difficulty", "Task score by difficulty", " ".join(said))


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
    with _canvas(2.9) as figure:
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
                    markeredgecolor=_PAPER,
                    markeredgewidth=0.5,
                    markevery=None if few else (6 * order, max(1, len(points) // 9)),
                )
            ax.set_title("training" if kind == "train" else kind)
            ax.set_xlabel("optimiser step")
        axes[0].set_ylabel("loss per target token")
        _legend(figure, list(curves), palette)
        said = []
        for name, curve in curves.items():
            for kind in kinds:
                points = curve.get(kind) or []
                if points:
                    (_, first), (steps, last) = points[0], points[-1]
                    said.append(f"{name} {'training' if kind == 'train' else kind} {first:.3g} to {last:.3g} over {steps:.0f} steps")
        return _svg(figure, "loss", "Loss curves", "; ".join(said) + ".")


def confidence_histogram(edges: Sequence[float], counts: Sequence[float], mean: float | None, below: float | None) -> str:
    """Histogram of the teacher's probability of the target tokens; the mean is marked, the part below .05 is shaded."""
    total = sum(counts) or 1
    with _canvas(2.5) as figure:
        ax = figure.add_subplot()
        ax.grid(True, axis="y")
        widths = [b - a for a, b in zip(edges, edges[1:], strict=False)]
        ax.bar(
            edges[:-1],
            [100 * n / total for n in counts],
            width=[0.94 * w for w in widths],
            align="edge",
            color=_ARMS[3],
            alpha=0.85,
            lw=0,
        )
        ax.axvspan(edges[0], min(0.05, edges[-1]), color=_ARMS[1], alpha=0.2, lw=0, zorder=0)
        top = ax.get_ylim()[1]
        if mean is not None:
            ax.axvline(mean, color=_INK, lw=1.2, ls=(0, (4, 2)))
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
                color=_ARMS[1],
                weight="bold",
            )
        ax.set_xlim(edges[0], edges[-1])
        ax.set_xlabel("teacher's probability of the target token")
        ax.set_ylabel("% of target tokens")
        said = "; ".join(f"{a:.2f} to {b:.2f}: {n / total:.1%}" for a, b, n in zip(edges, edges[1:], counts, strict=False))
        return _svg(figure, "confidence", "Teacher confidence in the target tokens", f"Histogram. {said}.")


def signal_shares(shares: Mapping[str, Sequence[Mapping[str, float]]], palette: Palette) -> str:
    """Share of the learning signal per teacher-confidence bin: bars per arm, and in grey the share of tokens in that bin.

    share(b) = sum_{t in b} w_t l_t / sum_t w_t l_t (arXiv 2605.01256); `shares[arm]` = [{"lo", "hi", "tokens", "signal"}].
    """
    bins = max(shares.values(), key=len)
    tokens = [float(numbers.finite(part.get("tokens")) or 0) for part in bins]
    everything = sum(tokens)
    with _canvas(2.9) as figure:
        ax = figure.add_subplot()
        ax.grid(True, axis="y")
        if everything:
            ax.bar(range(len(bins)), [100 * n / everything for n in tokens], width=0.9, color=_MUTED, alpha=0.22, lw=0)
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
        _legend(figure, list(shares), palette, line=False)
        said = [
            f"{name}: " + ", ".join(f"{part['lo']:.2g} to {part['hi']:.2g} {part['signal']:.1%}" for part in parts)
            for name, parts in shares.items()
        ]
        return _svg(figure, "signal", "Learning signal by teacher confidence", "Grouped bars. " + "; ".join(said) + ".")


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
