"""Claims of papers: their files, how one is judged, and the verb."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guidetune import claims
from guidetune.errors import BadInput
from guidetune.recipe import arms

TEXT = """
paper: "1234.5678"
title: A paper
arms: [instruct, gift]
settings: {one: {}}
claims: [{relation: gift.task > instruct.task, margin: 0.1, reported: 2 against 1}]
"""


@pytest.mark.parametrize("name", claims.names())
def test_every_papers_file_is_sound(name: str) -> None:
    paper = claims.load(name)
    for setting in paper.settings:
        for quick in (False, True):
            made = arms(claims.recipe(paper, setting, quick), paper.arms)
            assert all(one.evaluate and one.evaluate.task and one.evaluate.general for one in made.values())
    assert all(claim.reported for claim in paper.claims)


@pytest.mark.parametrize(
    "change, expected",
    [
        ("gift.task > instruct.task", "gift.task > instruct.general|ARM.MEASURE"),
        ("gift.task >", "gift.task >=|ARM.MEASURE"),
        ("gift.task >", "gfit.task >|arms that are not run: gfit"),
        ("> instruct.task", "> 0.9 * instruct.task|only a gain is held against a share"),
        ("gift.task > instruct.task", "gift.gain < 0.9 * instruct.gain|only a gain is held against a share"),
        ("margin", "margn|claims.0.margn"),
    ],
)
def test_a_file_that_is_wrong_says_where(change: str, expected: str) -> None:
    new, message = expected.split("|")
    with pytest.raises(BadInput, match=message):
        claims.parse(TEXT.replace(change, new))
    with pytest.raises(BadInput, match=r"no claims of a paper 'gfit' \(did you mean 'gift'\?\)"):
        claims.load("gfit")


@pytest.mark.parametrize(
    "shares, relation, outcome",
    [
        ([0.30, 0.31, 0.29], "a.signal_low < b.signal_low", "holds"),
        ([0.30, 0.31, 0.29], "a.signal_low > b.signal_low", "reversed"),
        ([0.30, 0.90, 0.65], "a.signal_low < b.signal_low", "undecided"),
    ],
)
def test_a_claim_holds_when_its_whole_interval_does(tmp_path: Path, shares: list[float], relation: str, outcome: str) -> None:
    def entry(values: list[float]) -> dict:
        def one(low: float) -> dict:
            edges = [(0.0, 0.3, low), (0.3, 0.9, 0.1), (0.9, 1.0, 0.9 - low)]
            return {"status": "ok", "signal": [{"lo": lo, "hi": hi, "signal": share} for lo, hi, share in edges]}

        again = [{**one(v), "seed": 43 + k} for k, v in enumerate(values[1:])]
        return {**one(values[0]), "recipe": {"tune": {"seed": 42}}, "seeds": again}

    results = {"arms": {"a": entry(shares), "b": entry([0.70, 0.72, 0.71]), "c": {"status": "failed"}}}
    row = claims.judge(claims.Claim(relation=relation, reported="x"), "here", tmp_path, results)
    assert (row["outcome"], row["holds"], row["seeds"]) == (outcome, outcome == "holds", 3)
    assert row["values"]["a.signal_low"] == shares
    narrow = claims.Claim(relation=relation, margin=0.5, reported="x")
    assert not claims.judge(narrow, "here", tmp_path, results)["holds"]
    lost = claims.judge(claims.Claim(relation="a.task > c.task", reported="x"), "here", tmp_path, results)
    assert lost["outcome"] == "not measured" and not lost["holds"]


def _arm(folder: Path, name: str, rows: list[list[int]]) -> dict:
    """An arm's entry with items on disk; one row of right-or-wrong items per seed, of two tasks `t` and `g`."""
    from guidetune.artefacts import write_text_atomic

    entries = []
    for k, row in enumerate(rows):
        place = f"{name}/{k}"
        found: dict = {"status": "ok", "paths": {"evaluation": place}, "seed": 42 + k, "recipe": {"tune": {"seed": 42}} if k == 0 else None}
        for group, label in (("task", "t"), ("general", "g")):
            lines = [json.dumps({"id": str(i), "correct": value}) for i, value in enumerate(row)]
            write_text_atomic(folder / place / group / label / "items.jsonl", "\n".join(lines) + "\n")
            score = sum(row) / len(row)
            found[group] = {label: {"score": score, "n": len(row), "items": f"{label}/items.jsonl"}}
            found[f"{group}_mean"] = score
        entries.append(found)
    return {**entries[0], "seeds": entries[1:]}


def test_a_gain_is_held_against_a_share_of_another(tmp_path: Path) -> None:
    """Untuned .2, a .75 and .76, b .8: a has .55 and .56 of gain, .9 of b's .6 is .54, and .95 of it .57."""
    n = 1000
    untuned = [int(i < 200) for i in range(n)]
    arms_ = {
        "instruct": {**_arm(tmp_path, "i", [untuned]), "recipe": {}, "seed": None},
        "a": _arm(tmp_path, "a", [[int(i < 750) for i in range(n)], [int(i < 760) for i in range(n)]]),
        "b": _arm(tmp_path, "b", [[int(i < 800) for i in range(n)]] * 2),
    }
    for share, difference in ((0.9, 0.015), (0.95, -0.015)):
        claim = claims.Claim(relation=f"a.gain > {share} * b.gain", reported="x")
        row = claims.judge(claim, "here", tmp_path, {"arms": arms_})
        assert row["difference"] == pytest.approx(difference) and row["seeds"] == 2
        assert row["values"]["a.gain"] == pytest.approx([0.55, 0.56])
    named = claims.judge(claims.Claim(relation="b.g > a.g", reported="x"), "here", tmp_path, {"arms": arms_})
    assert named["difference"] == pytest.approx(0.045) and named["values"]["b.g"] == [0.8, 0.8]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gift", "somf", "grafting"])
def test_the_verb_checks_the_paper_and_ends_well_whatever_holds(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from tests.test_cli import ended

    file = tmp_path / "c.json"
    arguments = ["-q", "claims", name, "--quick", "--seeds", "1", "--json", str(file), "--out", str(tmp_path / "runs")]
    assert ended(arguments) == 0, capsys.readouterr().err
    found = json.loads(file.read_text())
    paper = claims.load(name)
    assert len(found["claims"]) == len(paper.claims) * len(paper.settings)
    for row in found["claims"]:
        assert {"relation", "holds", "seeds", "values", "margin"} <= row.keys() and row["outcome"] != "not measured"
    assert not all(row["holds"] for row in found["claims"])
    assert "quick: a few steps" in capsys.readouterr().out
