"""The pages: `report.html` of a run, and the page that puts several runs side by side. No script, no network, nothing outside the file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guidetune.artefacts import write_text_atomic
from guidetune.errors import BadInput
from guidetune.report import numbers, runs, sections, sheets
from guidetune.report.text import clean

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"
MAX_BYTES = 2_900_000


def write(run: Path, out: Path | None = None, export: Path | None = None) -> Path:
    """Write a run's page (`run/report.html`, or `out`) from `run/results.json` and the files it names, and return its path.

    Parts that a run does not have (a failed arm, no evaluation, no guidance) are named as missing on the page. `export` is a folder for
    every table of the page as CSV and Markdown.

    Raises:
        BadInput: `run` holds no readable results.json, or a place cannot be written to.
    """
    run = Path(run)
    results = read_results(run)
    values = sections.page(run, results)
    target = save(out or run / "report.html", _fitted(run, results, values))
    if export is not None:
        sheets.export(sheets.of_page(values, results), Path(export))
    return target


def write_comparison(folders: Sequence[Path], out: Path | None = None, export: Path | None = None) -> Path:
    """Write the page that puts several runs side by side (`comparison.html` beside the first, or `out`), and return its path.

    Raises:
        BadInput: fewer than two runs, one given twice or without results, or a place that cannot be written to.
    """
    values = runs.page(folders)
    target = save(out or Path(folders[0]).resolve().parent / "comparison.html", render_template("runs.html.j2", values))
    if export is not None:
        sheets.export(runs.sheets(values), Path(export))
    return target


def save(target: Path, text: str) -> Path:
    """Write a page, whole or not at all. Raises BadInput where it cannot be written."""
    target = Path(target)
    if target.is_dir():
        raise BadInput(f"{target} is a folder; name the file to write, e.g. {target / 'report.html'}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(target, text)
    except OSError as error:
        raise BadInput(f"cannot write {target}: {error.strerror or error}; choose another --out") from None
    return target


def render(run: Path, results: Mapping[str, Any]) -> str:
    """The page as text; `run` is the folder that relative paths in `results` start from."""
    return _fitted(run, results, sections.page(run, results))


def _fitted(run: Path, results: Mapping[str, Any], values: dict[str, Any]) -> str:
    """The page; where it would be larger than `MAX_BYTES`, with fewer items in its browser."""
    text = render_template("report.html.j2", values)
    if (excess := len(text.encode("utf-8")) - MAX_BYTES) > 0:
        start = text.index('<section id="items">')
        taken = len(text[start : text.index("</section>", start)].encode("utf-8"))
        room = max(0.0, 0.8 * (taken - 1.2 * excess))  # what an item will take is an estimate
        text = render_template("report.html.j2", values | sections.browser(run, results, room))
    return text


def render_template(template: str, values: Mapping[str, Any]) -> str:
    """A page of this package from its template; the style is put into it."""
    from markupsafe import Markup

    style = Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))
    return _environment().get_template(template).render(style=style, **values).lstrip()


@cache
def _environment() -> Environment:
    """Templates that escape everything and fail on anything that is not there."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def shown(value: Any) -> Any:
        if isinstance(value, Markup):
            return value
        return clean(value) if isinstance(value, str) else numbers.any_value(value) if isinstance(value, (float, type(None))) else value

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=shown,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "score": numbers.score,
        "signed": numbers.signed,
        "interval": numbers.interval,
        "p": numbers.p_value,
        "stars": numbers.stars,
        "tied": _tied,
        "percent": numbers.percent,
        "count": numbers.count,
        "duration": numbers.duration,
        "memory": numbers.memory,
        "size": numbers.size,
        "weight": numbers.weight,
    }
    return environment


def _tied(text: str) -> str:
    """Numbers kept on one line with what they belong to: no break inside `p < .001`, `0.93 → 0.91` or `[0.05, 0.18]`."""
    text = re.sub(r"\b([pn]) ([=<]) ", "\\1\u00a0\\2\u00a0", text).replace(" → ", "\u00a0→\u00a0")
    return re.sub(r"\[(\S+), (\S+)\]", "[\\1,\u00a0\\2]", text)


def read_results(run: Path) -> dict[str, Any]:
    """results.json of a run folder.

    Raises:
        BadInput: there is none, or it cannot be read.
    """
    path = run / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        raise BadInput(f"{run} holds no results.json; give the folder of a finished run, e.g. runs/NAME") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {path}: {error}; start the run again to write it anew") from None
    if not isinstance(results, dict):
        raise BadInput(f"{path} holds a {type(results).__name__}, not an object; start the run again to write it anew")
    return _as_run(results)


def _as_run(results: dict[str, Any]) -> dict[str, Any]:
    """Results of `guidetune eval` in the shape of a run with one arm."""
    if "arms" in results or not isinstance(results.get("tasks"), Mapping):
        return results
    arm = {"status": "ok", "task": results["tasks"], "general": {}, "fingerprint": results.get("fingerprint")}
    return {**results, "kind": "eval", "arms": {str(results.get("model") or "model"): arm}}
