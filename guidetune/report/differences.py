"""What `guidetune merge diff` shows: tables for the terminal, and a page with plots of how two models differ by depth and by module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guidetune.artefacts import write_json
from guidetune.report import numbers
from guidetune.report.figure import ARMS, INK, MUTED, PAPER, Palette, canvas, legend, short, svg
from guidetune.report.html import render_template, save
from guidetune.report.sheets import Sheet, export

if TYPE_CHECKING:
    from rich.table import Table

    from guidetune.weightspace.diff import Difference

# key, heading, panel of the plot by depth (or none), model whose colour it has; with a base and without
WITH_BASE = [
    ("norm_a", "‖A − M‖", None, "A"), ("relative_a", "‖A − M‖ / ‖M‖", "size of the change", "A"),
    ("norm_b", "‖B − M‖", None, "B"), ("relative_b", "‖B − M‖ / ‖M‖", "size of the change", "B"),
    ("cosine", "cosine", "agreement", "cosine"), ("sign_agreement", "signs agree", "agreement", "signs agree"),
    ("rank_a", "effective rank, A − M", "effective rank", "A"), ("rank_b", "effective rank, B − M", "effective rank", "B"),
]  # fmt: skip
WITHOUT = [
    ("norm_a", "‖A‖", None, "A"), ("norm_b", "‖B‖", None, "B"), ("norm_difference", "‖A − B‖", None, "A"),
    ("relative_difference", "‖A − B‖ / ‖A‖", "size of the difference", "A"), ("changed", "changed", None, "A"),
    ("cosine", "cosine", "agreement", "cosine"), ("sign_agreement", "signs agree", "agreement", "signs agree"),
    ("rank_difference", "effective rank, A − B", "effective rank", "A"),
]  # fmt: skip


def _columns(found: Difference) -> list[tuple[str, str, str | None, str]]:
    return WITHOUT if found.base is None else WITH_BASE


def tables(found: Difference) -> list[Table]:
    """The summary for the terminal: by layer, and by kind of module."""
    from rich.table import Table

    shown = []
    for by, rows in (("layer", found.layers), ("kind", [*found.kinds, {"kind": "all", **found.all}])):
        table = Table(box=None, pad_edge=False, header_style="bold", title=_title(found) if by == "layer" else None, title_justify="left")
        table.add_column(by)
        table.add_column("tensors", justify="right")
        for _, heading, *_ in _columns(found):
            table.add_column(heading, justify="right")
        for row in rows:
            table.add_row(_label(row[by]), str(row["tensors"]), *(numbers.any_value(row.get(key)) for key, *_ in _columns(found)))
        shown.append(table)
    if found.left_out:
        some = "; ".join(f"{name}: {why}" for name, why in list(found.left_out.items())[:3])
        shown[-1].caption = f"left out: {len(found.left_out)} tensors ({some})"
    return shown


def write(found: Difference, folder: Path) -> Path:
    """`diff.html` with the plots, `diff.json`, and the tables as CSV and Markdown; returns the page.

    Raises:
        BadInput: the folder cannot be written to.
    """
    keys = [key for key, *_ in _columns(found)]
    sheets = []
    for name, title, first, rows in (
        ("tensors", "Tensors", ["name", "layer", "kind", "shape"], found.tensors),
        ("layers", "By layer", ["layer", "tensors"], found.layers),
        ("kinds", "By kind of module", ["kind", "tensors"], found.kinds),
    ):
        values = [["x".join(map(str, row[k])) if k == "shape" else row.get(k) for k in (*first, *keys)] for row in rows]
        sheets.append(Sheet(name, title, [*first, *keys], values))
    export(sheets, folder)
    write_json(folder / "diff.json", found.as_dict())
    return save(folder / "diff.html", page(found))


def page(found: Difference) -> str:
    """The page as text; nothing outside the file is needed to show it."""
    from markupsafe import Markup

    headings = [heading for _, heading, *_ in _columns(found)]

    def cells(row: Mapping[str, Any]) -> list[str]:
        return [numbers.any_value(row.get(key)) for key, *_ in _columns(found)]

    plots = [plot for plot in (by_depth(found), by_module(found)) if plot is not None]
    return render_template(
        "diff.html.j2",
        {
            "title": f"{Path(found.a).name} and {Path(found.b).name}",
            "models": [(letter, spec) for letter, spec in (("A", found.a), ("B", found.b), ("M", found.base)) if spec is not None],
            "plots": [Markup(plot) for plot in plots],
            "headings": headings,
            "parts": [
                ("by layer", "layer", [(_label(row["layer"]), row["tensors"], cells(row)) for row in found.layers]),
                ("by kind of module", "kind", [(_label(row["kind"]), row["tensors"], cells(row)) for row in found.kinds]),
            ],
            "whole": ("all", found.all["tensors"], cells(found.all)),
            "tensors": [(row["name"], " × ".join(map(str, row["shape"])) or "scalar", cells(row)) for row in found.tensors],
            "left_out": list(found.left_out.items()),
        },
    )


def by_depth(found: Difference) -> str | None:
    """Size, agreement and effective rank of the changes by layer, a panel each; None for a model without layers."""
    rows = [row for row in found.layers if row["layer"] is not None]
    lines = [(panel, name, [(row["layer"], row[key]) for row in rows if row.get(key) is not None])
             for key, _, panel, name in _columns(found) if panel is not None]  # fmt: skip
    lines = [line for line in lines if line[2]]
    if not lines:
        return None
    panels = list(dict.fromkeys(panel for panel, *_ in lines))
    names = list(dict.fromkeys(name for _, name, _ in lines))
    palette = Palette(names, "")
    with canvas(2.7) as figure:
        axes = dict(zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True))
        for panel, ax in axes.items():
            ax.grid(True, axis="y")
            ax.set_title(panel)
            ax.set_xlabel("layer")
            ax.xaxis.get_major_locator().set_params(integer=True)
            if panel == "agreement":
                ax.axhline(0, color=MUTED, lw=0.9)
        for panel, name, points in lines:
            axes[panel].plot(
                [x for x, _ in points], [y for _, y in points], color=palette.colour(name), ls=palette.dash(name), lw=1.5,
                marker=palette.marker(name), ms=4.5, markeredgecolor=PAPER, markeredgewidth=0.5,
            )  # fmt: skip
        for panel, ax in axes.items():
            if panel != "agreement":
                ax.set_ylim(bottom=0)
        legend(figure, names, palette)
        said = [f"{panel}, {name}: {points[0][1]:.3g} in layer {points[0][0]} to {points[-1][1]:.3g} in layer {points[-1][0]}"
                for panel, name, points in lines]  # fmt: skip
        return svg(figure, "depth", "The models by layer", "; ".join(said) + ".")


def by_module(found: Difference) -> str | None:
    """Layers against kinds of module: with a base the cosine of the changes, without the relative difference; a cell is a tensor."""
    key, heading = ("relative_difference", "‖A − B‖ / ‖A‖") if found.base is None else ("cosine", "cosine of A − M and B − M")
    cells = {(row["layer"], row["kind"]): row[key] for row in found.tensors if row["layer"] is not None and row[key] is not None}
    if not cells:
        return None
    depths, kinds = sorted({layer for layer, _ in cells}), list(dict.fromkeys(kind for _, kind in cells))
    top = max(abs(value) for value in cells.values()) or 1.0
    with canvas(0.9 + 0.2 * len(kinds)) as figure:
        from matplotlib.patches import Rectangle

        ax = figure.add_subplot()
        for (layer, kind), value in cells.items():
            x, y = depths.index(layer), kinds.index(kind)
            colour = ARMS[3] if value >= 0 else ARMS[1]
            ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, alpha=min(1.0, abs(value) / top), lw=0))
            if len(depths) <= 12:
                ax.text(x, y, f"{value:.2g}", ha="center", va="center", color=INK, fontsize=7.4)
        ax.set_xlim(-0.5, len(depths) - 0.5)
        ax.set_ylim(len(kinds) - 0.5, -0.5)
        ax.set_yticks(range(len(kinds)), [short(kind) for kind in kinds])
        step = max(1, len(depths) // 16)
        ax.set_xticks(range(0, len(depths), step), [str(depth) for depth in depths[::step]])
        ax.set_xlabel("layer")
        ax.set_title(heading)
        ax.spines["left"].set_visible(False)
        ax.spines["bottom"].set_visible(False)
        low, high = min(cells, key=lambda cell: cells[cell]), max(cells, key=lambda cell: cells[cell])
        said = [f"{what} {cells[cell]:.3g}: {cell[1]} in layer {cell[0]}" for what, cell in (("lowest", low), ("highest", high))]
        return svg(figure, "modules", f"{heading} by layer and kind of module", "; ".join(said) + ".")


def extracted(result: Mapping[str, Any]) -> Table:
    """What `guidetune merge extract` kept, by kind of module, and what it left out."""
    from rich.table import Table

    from guidetune.weightspace.diff import kind_of

    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for name, tensor in result["tensors"].items():
        kinds.setdefault(kind_of(name), []).append(tensor)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("kind", "modules", "ranks", "change kept, % of its square", "residual, share of its norm"):
        table.add_column(heading, justify="left" if heading == "kind" else "right")
    for kind, tensors in kinds.items():
        ranks = [tensor["rank"] for tensor in tensors]
        square = sum(tensor["norm"] ** 2 for tensor in tensors)
        rest = sum((tensor["residual"] * tensor["norm"]) ** 2 for tensor in tensors)
        kept = numbers.percent(sum(tensor["kept"] * tensor["norm"] ** 2 for tensor in tensors) / square, 2)
        span = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
        table.add_row(kind, str(len(tensors)), span, kept, numbers.any_value((rest / square) ** 0.5))
    lines = [f"residual of the whole difference: {numbers.any_value(result['residual'])} of its norm"]
    lines += [f"left out: {name} ({part['reason']}, norm {numbers.any_value(part['norm'])})" for name, part in result["left_out"].items()][
        :8
    ]
    table.caption, table.caption_justify = "\n".join(lines), "left"
    return table


def _title(found: Difference) -> str:
    return f"A = {found.a}, B = {found.b}" + (f", M = {found.base}" if found.base is not None else "")


def _label(key: Any) -> str:
    return "outside the layers" if key is None else str(key)
