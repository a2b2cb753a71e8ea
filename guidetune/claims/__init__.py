"""A paper's claims, held against what the embedded world measures.

A paper is one file here, found by its name: `gift.yaml`. It lists relations (`gift.task > graft.task`), the settings of the world they
are asked in, and what the paper reports. A claim holds when the whole 95 % interval of the difference, over seeds and items, lies above
its margin. What does not hold is reported as such; nothing is tuned so that it does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from guidetune import yaml12
from guidetune.errors import BadInput
from guidetune.registry import nearest, option_problems

if TYPE_CHECKING:
    from rich.table import Table

    from guidetune.recipe import Recipe

MEASURES = ("task", "general", "signal_low", "signal_high")
RELATION = re.compile(rf"([\w.+=-]+?)\.({'|'.join(MEASURES)})\s*([<>])\s*([\w.+=-]+?)\.({'|'.join(MEASURES)})")


class Side(NamedTuple):
    arm: str
    measure: str

    def __str__(self) -> str:
        return f"{self.arm}.{self.measure}"


class Claim(BaseModel):
    """`left > right` by more than `margin`; `<` is the same with the sides exchanged."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    relation: str = Field(description="ARM.MEASURE > ARM.MEASURE, or <; measures: task, general, signal_low, signal_high.")
    margin: float = Field(0.0, description="The difference has to be larger; a negative one asks for `no worse than by so much`.")
    reported: str = Field(description="What the paper reports, in its own figures.")

    @field_validator("relation")
    @classmethod
    def _readable(cls, relation: str) -> str:
        found = RELATION.fullmatch(relation.strip())
        if found is None or found[2] != found[5]:
            raise ValueError(f"write ARM.MEASURE > ARM.MEASURE with one of {', '.join(MEASURES)} on both sides")
        return relation.strip()

    @property
    def sides(self) -> tuple[Side, Side]:
        """(the one that is said to be larger, the other)."""
        found = RELATION.fullmatch(self.relation)
        assert found is not None
        left, right = Side(found[1], found[2]), Side(found[4], found[5])
        return (left, right) if found[3] == ">" else (right, left)


class Paper(BaseModel):
    """One file of this folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    paper: str = Field(description="arXiv id.")
    title: str
    arms: list[str] = Field(min_length=2)
    settings: dict[str, dict[str, Any]] = Field(min_length=1, description="Name -> the keys of the world's demo recipe that it changes.")
    quick: list[str] = Field([], description="Overrides that make everything short.")
    unequal_budget: bool = Field(False, description="The arms see different numbers of rows by their nature.")
    claims: list[Claim] = Field(min_length=1)


def names() -> list[str]:
    """Every paper there is, from the file names."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))


def load(name: str) -> Paper:
    """The claims of a paper.

    Raises:
        BadInput: there is no such paper, or its file is not as it should be.
    """
    if name not in names():
        raise BadInput(f"no claims of a paper {name!r}{nearest(name, names())}")
    return parse((Path(__file__).parent / f"{name}.yaml").read_text(encoding="utf-8"), f"{name}.yaml")


def parse(text: str, file: str = "claims") -> Paper:
    """`load` for text in memory."""
    try:
        tree = yaml12.load(text)
        paper = Paper.model_validate(tree)
    except yaml.YAMLError as error:
        raise BadInput(f"{file}: not valid YAML: {error}") from None
    except ValidationError as error:
        raise BadInput([f"{file}: {problem}" for problem in option_problems(Paper, error)]) from None
    asked = {side.arm for claim in paper.claims for side in claim.sides}
    if missing := sorted(asked - set(paper.arms)):
        raise BadInput(f"{file}: the claims name arms that are not run: {', '.join(missing)}")
    return paper


def recipe(paper: Paper, setting: str, quick: bool = False) -> Recipe:
    """The recipe of a setting: the demo's, with the setting's changes."""
    from guidetune import world
    from guidetune.recipe import arms
    from guidetune.recipe import load as load_recipe

    overrides = [f"{key}={yaml.safe_dump(value, default_flow_style=True).strip()}" for key, value in paper.settings[setting].items()]
    loaded = load_recipe(Path(world.__file__).parent / "demo.yaml", [f"name={setting}", *overrides, *(paper.quick if quick else ())])
    arms(loaded, paper.arms)
    return loaded


def check(paper: Paper, out: Path, seeds: int = 5, quick: bool = False, jobs: int = 1) -> dict[str, Any]:
    """Run the comparisons (what is finished in `out` is reused) and test every claim in every setting; also in `out/claims.json`.

    Returns:
        `paper, title, seeds, quick` and `claims`, a list of `{relation, setting, holds, outcome, seeds, values, difference, ci, p, margin,
        reported, test}`. `values`: each side's scores by seed. `outcome`: `holds`; `reversed`, when the whole interval lies below the
        margin; `undecided`. A claim about an arm that failed is `not measured`.

    Raises:
        BadInput: as `pipeline.compare`.
    """
    from guidetune.artefacts import read_json, write_json
    from guidetune.errors import RunFailed
    from guidetune.pipeline import compare

    recipes = {setting: recipe(paper, setting, quick) for setting in paper.settings}  # what is wrong is said before the first run
    rows: list[dict[str, Any]] = []
    for setting, one in recipes.items():
        folder = out / setting
        try:
            compare(one, paper.arms, folder, seeds, jobs=jobs, unequal_budget=paper.unequal_budget)
        except RunFailed:
            if not (folder / "results.json").is_file():
                raise
        results = read_json(folder / "results.json")
        rows += [judge(claim, setting, folder, results) for claim in paper.claims]
    checked = {"paper": paper.paper, "title": paper.title, "seeds": seeds, "quick": quick, "claims": rows}
    write_json(out / "claims.json", checked)
    return checked


def judge(claim: Claim, setting: str, folder: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """One claim against the results of a comparison."""
    sides = claim.sides
    row: dict[str, Any] = {"relation": claim.relation, "setting": setting, "holds": False, "outcome": "not measured"}
    row |= {"seeds": 0, "values": {}, "difference": None, "ci": None, "p": None, "margin": claim.margin, "reported": claim.reported}
    entries = [results["arms"].get(side.arm, {}) for side in sides]
    if any(entry.get("status") != "ok" for entry in entries):
        return {**row, "test": "an arm failed"}
    from guidetune.comparison.contrasts import shared_seeds

    repeats = shared_seeds(*entries)
    values = [[_value(one, side.measure) for one in ones] for side, ones in zip(sides, repeats, strict=True)]
    if any(value is None for side in values for value in side):
        return {**row, "test": "not measured"}
    found = _difference(sides[0].measure, folder, entries, values)
    low, high = found["ci"] or (found["diff"], found["diff"])
    outcome = "holds" if low > claim.margin else "reversed" if high < claim.margin else "undecided"
    return row | {
        "holds": outcome == "holds",
        "outcome": outcome,
        "seeds": max(map(len, values)),
        "values": {str(side): side_values for side, side_values in zip(sides, values, strict=True)},
        "difference": found["diff"],
        "ci": found["ci"],
        "p": found["p"],
        "test": found["test"],
    }


def _value(entry: Mapping[str, Any], measure: str) -> float | None:
    from guidetune.report.findings import signal_ends

    if measure in ("task", "general"):
        return entry.get(f"{measure}_mean")
    low, high = signal_ends(entry.get("signal"))
    return low if measure == "signal_low" else high


def _difference(
    measure: str, folder: Path, entries: Sequence[Mapping[str, Any]], values: Sequence[Sequence[float | None]]
) -> dict[str, Any]:
    """left - right with its interval: over seeds and items for scores; over seeds for shares of the signal, which have no items."""
    from guidetune.comparison.contrasts import compare_group_of
    from guidetune.evaluation.statistics import over_seeds

    if measure in ("task", "general"):
        return compare_group_of(folder, entries[0], entries[1], measure)
    x, y = [[float(value or 0)] * 2 for value in values[0]], [[float(value or 0)] * 2 for value in values[1]]
    if max(len(x), len(y)) > 1:  # two equal "items": no spread over items, so the test is over seeds alone
        return {**over_seeds(x, y), "test": "t over seeds"}
    return {"diff": x[0][0] - y[0][0], "ci": None, "p": None, "test": "one seed: no test"}


def table(checked: Mapping[str, Any]) -> Table:
    """The findings for the terminal."""
    from rich.table import Table

    from guidetune.report import numbers

    shown = Table(
        box=None, pad_edge=False, header_style="bold", title=f"{checked['title']} (arXiv {checked['paper']})", title_justify="left"
    )
    for heading in ("setting", "relation", "outcome", "difference", "95 % interval", "seeds", "the paper"):
        shown.add_column(heading, overflow="fold")
    for row in checked["claims"]:
        margin = f" (by more than {row['margin']:+g})" if row["margin"] else ""
        shown.add_row(
            row["setting"],
            row["relation"] + margin,
            row["outcome"],
            numbers.signed(row["difference"]),
            numbers.interval(row["ci"]),
            str(row["seeds"]),
            row["reported"],
        )
    if checked["quick"]:
        shown.caption = "quick: a few steps on a few items, which says nothing about the claims"
    return shown
