"""Plots as inline SVG that follow the page's theme: no colour is fixed, every figure has a title and a description.

matplotlib draws with placeholder colours, which are then replaced by the page's CSS variables (with a fallback that is readable on white
and on black), so one file serves light, dark and print.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from guidetune.report.text import clean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 7.6  # inches; the page scales the drawing to its column
# Placeholder -> (CSS variable, fallback). The fallbacks keep contrast >= 3 on white and on black, for a drawing copied out of the page.
INK, MUTED, GRID, PAPER = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
_THEME = {INK: ("ink", "#767676"), MUTED: ("muted", "#767676"), GRID: ("grid", "#8888"), PAPER: ("paper", "#0000")}
ARM_COLOURS = (
    "#767676",
    "#c8591f",
    "#8f7300",
    "#2f7fc1",
    "#1f8a63",
    "#9a62c7",
    "#c74a8f",
    "#1a8a96",
    "#9a6a45",
    "#5f8a1f",
    "#5f6fd0",
    "#c9464f",
)
ARMS = [f"#0a0c{i:02x}" for i in range(len(ARM_COLOURS))]
_THEME |= {mark: (f"arm-{i}", colour) for i, (mark, colour) in enumerate(zip(ARMS, ARM_COLOURS, strict=True))}
_MARKERS = "osD^vPX*phd<"
_DASHES: list[Any] = [
    "-",
    (0, (5, 2)),
    (0, (1.5, 1.5)),
    "-",
    (0, (6, 2, 1.5, 2)),
    (0, (3, 1.5)),
    (0, (8, 2)),
    (0, (1, 1)),
    "-",
    (0, (4, 1, 1, 1, 1, 1)),
    (0, (2, 3)),
    (0, (10, 3)),
]


class Palette:
    """A fixed colour, marker and dash for every arm; 0 is the instruct model's. Beyond eleven arms they repeat."""

    def __init__(self, names: Sequence[str], reference: str) -> None:
        others = [name for name in names if name != reference]
        self._index = {name: 1 + i % (len(ARM_COLOURS) - 1) for i, name in enumerate(others)} | {reference: 0}
        self._order = {name: i for i, name in enumerate([reference, *others])}

    def index(self, name: str) -> int:
        return self._index.get(name, 0)

    def colour(self, name: str) -> str:
        return ARMS[self.index(name)]

    def marker(self, name: str) -> str:
        return _MARKERS[self._order.get(name, 0) % len(_MARKERS)]

    def dash(self, name: str) -> Any:
        return _DASHES[self._order.get(name, 0) % len(_DASHES)]


@contextmanager
def canvas(height: float, width: float = WIDTH) -> Iterator[Figure]:
    """An empty figure, `height` by `width` inches, with the page's typography."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: dict[str, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "guidetune",
        "text.parse_math": False,
        "font.family": "DejaVu Sans",
        "font.size": 8.2,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": MUTED,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "axes.linewidth": 0.7,
        "axes.titlesize": 8.6,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": False,
        "grid.color": GRID,
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


def svg(figure: Figure, name: str, title: str, description: str) -> str:
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
    label = short(name, 22)
    return f"\u200a{label}" if label.startswith("_") else label


def short(label: str, limit: int = 28) -> str:
    """A label that fits: one line, at most `limit` characters."""
    label = " ".join(clean(label).split())
    return label if len(label) <= limit else label[: limit - 1] + "…"


def legend(figure: Figure, names: Sequence[str], palette: Palette, line: bool = True) -> None:
    """The arms above the drawing."""
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


def wilson_ends(share: float, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a share of n items."""
    from guidetune.evaluation.statistics import wilson  # numpy is not needed to import this package

    return wilson(share * n, n)


Box = tuple[float, float, float, float]  # left, bottom, right, top


def _overlap(one: Box, two: Box) -> float:
    wide, high = min(one[2], two[2]) - max(one[0], two[0]), min(one[3], two[3]) - max(one[1], two[1])
    return wide * high if wide > 0 and high > 0 else 0.0


def place_labels(
    anchors: Sequence[tuple[float, float]], widths: Sequence[float], height: float, obstacles: Sequence[Box], frame: Box
) -> list[tuple[float, float]]:
    """Lower left corners for labels of `widths` by `height` near their anchors, clear of obstacles and of each other where that can be.

    Each label takes the cheapest of some sixty places around its anchor: cost = 20 x area shared with labels + area shared with
    obstacles + 50 x area outside the frame + distance; repeated until nobody moves. All in one unit, e.g. points.
    """

    def places(i: int) -> Iterator[tuple[float, Box]]:
        (x, y), wide = anchors[i], widths[i]
        for far in (6.0, 11.0, 18.0, 28.0, 40.0, 54.0, 70.0):
            for dx, dy in ((1, 0.6), (-1, 0.6), (1, -0.6), (-1, -0.6), (0, 1), (0, -1), (1, 0), (-1, 0)):
                left = x + far * dx - (wide if dx < 0 else wide / 2 if dx == 0 else 0)
                bottom = y + far * dy - (height if dy < 0 else height / 2 if dy == 0 else 0)
                yield far, (left, bottom, left + wide, bottom + height)

    def cost(i: int, far: float, box: Box, others: dict[int, Box]) -> float:
        outside = wide_area - _overlap(box, frame) if (wide_area := (box[2] - box[0]) * (box[3] - box[1])) else 0.0
        crowded = sum(_overlap(box, other) for j, other in others.items() if j != i)
        return 20 * crowded + sum(_overlap(box, thing) for thing in obstacles) + 50 * outside + far

    chosen: dict[int, Box] = {}
    for _ in range(8):
        before = dict(chosen)
        for i in range(len(anchors)):
            chosen[i] = min(places(i), key=lambda place, i=i: cost(i, *place, chosen))[1]
        if chosen == before:
            break
    return [chosen[i][:2] for i in range(len(anchors))]
