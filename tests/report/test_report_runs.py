"""Runs side by side: what differs, what may be subtracted, and what is refused. Exports and the verb."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import build_run, every_field
from test_report_html import HOSTILE, Page

from guidetune import report
from guidetune.errors import BadInput
from guidetune.evaluation.statistics import paired
from guidetune.report import runs, samples

ARMS = ("instruct", "sft", "gift")


def _changed(name: str, **tune: Any) -> Any:
    def change(results: dict) -> None:
        results["name"] = name
        results["created"] = "2026-12-01T09:14:00+00:00"
        results["recipe"]["name"] = name
        results["recipe"]["tune"] |= tune
        results["versions"]["torch"] = "2.14.0"

    return change


def _harder(item: dict) -> None:
    """Another gift: every fourth item that it had right is lost."""
    if item["id"].endswith(("0", "4", "8")):
        item["correct"] = 0


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("two")
    return (
        build_run(folder / "a", arms=ARMS, n=80),
        build_run(folder / "b", arms=ARMS, n=80, change=_changed("slower", lr=1e-4), rewrite=_harder),
    )


def _items(run: Path, arm: str, label: str = "word_problems", group: str = "task") -> dict[str, float]:
    lines = (run / "arms" / arm / "evaluation" / group / f"{label}.jsonl").read_text(encoding="utf-8").split("\n")
    return {item["id"]: item["correct"] for item in map(json.loads, filter(None, lines))}


def test_the_same_items_are_paired_and_the_recipes_difference_is_named(two: tuple[Path, Path]) -> None:
    page = runs.page(two)
    assert page["names"] == ["word-problems-gift", "slower"]
    assert page["recipe"] == [("tune.lr", ["0.0004", "0.0001"])]
    assert ("versions.torch", ["2.13.0", "2.14.0"]) in page["surroundings"]
    line = next(line for line in page["lines"] if (line.arm, line.label) == ("gift", "word_problems"))
    old, new = _items(two[0], "gift"), _items(two[1], "gift")
    expected = paired([new[key] for key in old], list(old.values()))
    part = line.cells[1].against
    assert part is not None and (part.gain, part.p, part.lost, part.gained) == (
        expected["diff"], expected["p"], expected["lost"], expected["gained"]
    )  # fmt: skip
    assert part.lost > 5 and part.gained == 0 and part.p_adjusted is not None and part.p_adjusted >= part.p
    text = report.write_comparison(two).read_text(encoding="utf-8")
    shown = Page(text)
    assert shown.problems == [] and not shown.all("script")
    assert "The recipes differ in 1 key: tune.lr." in shown.words and "slower against word-problems-gift, 6 paired tests" in shown.words


def test_other_items_and_other_settings_are_not_subtracted(two: tuple[Path, Path], tmp_path: Path) -> None:
    fewer = build_run(tmp_path / "fewer", arms=ARMS, n=60, change=_changed("fewer"))
    cells = [line.cells[1] for line in runs.lines(runs.read([two[0], fewer]))]
    assert cells and all(cell.against is None and cell.reason == "other items" for cell in cells)

    def keyed(run: Path, **key: Any) -> Path:
        for path in run.glob("arms/*/evaluation/*/*.jsonl"):
            folder = path.parent / path.stem
            folder.mkdir()
            path = path.rename(folder / "items.jsonl")
            manifest = {"fingerprint": "f", "key": {"items": "same", "temperature": 0.0, "seed": 1, "code": "old"} | key}
            (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        results = json.loads((run / "results.json").read_text(encoding="utf-8"))
        for arm in results["arms"].values():
            arm["fingerprint"] = str(arm["description"])
            for group in ("task", "general"):
                for label, result in arm[group].items():
                    result["items"] = f"{label}/items.jsonl"
        (run / "results.json").write_text(json.dumps(results), encoding="utf-8")
        return run

    def reasons(**key: Any) -> set[tuple[bool, str, str]]:
        folder = tmp_path / f"k{len(list(tmp_path.iterdir()))}"
        other = keyed(build_run(folder, arms=ARMS, n=80, change=_changed("other"), rewrite=key.pop("rewrite", None)), **key)
        return {(c.against is not None, c.reason, c.note) for line in runs.lines(runs.read([first, other])) for c in line.cells[1:]}

    first = keyed(build_run(tmp_path / "first", arms=ARMS, n=80))
    assert reasons() == {(True, "", "")}
    assert reasons(seed=2) == {(True, "", "")}, "a greedy answer does not depend on the seed"
    assert reasons(temperature=0.7) == {(False, "other settings: temperature 0.0 and 0.7", "")}
    assert reasons(chat="c") == {(False, "other settings: chat template", "")}
    ((ok, reason, note),) = reasons(items="digest of another version")
    assert ok and not reason and note.startswith("ids, prompts and references of the items are the same")
    assert reasons(code="new") == {(True, "", "other version of the evaluation's code, which scores instruct the same, item by item")}
    changed = reasons(code="new", rewrite=_harder)
    assert changed and all(not ok and "scores the same model (instruct) differently on" in reason for ok, reason, _ in changed)


def test_an_arm_that_the_first_run_lacks_is_compared_with_the_next(two: tuple[Path, Path], tmp_path: Path) -> None:
    without = build_run(tmp_path / "without", arms=("instruct",), n=80, change=_changed("without"))
    page = runs.page([without, *two])
    line = next(line for line in page["lines"] if (line.arm, line.label) == ("gift", "word_problems"))
    assert [cell.to for cell in line.cells] == ["", "", "word-problems-gift"] and line.cells[2].against is not None
    assert page["sentences"][1].startswith("slower against without, 2 paired tests"), "only those against the first run are counted as its"


def test_what_cannot_be_compared_is_refused_all_at_once(two: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput) as error:
        runs.read([two[0], tmp_path / "gone", two[0]])
    assert "gone holds no results.json" in str(error.value) and "is given twice" in str(error.value)
    with pytest.raises(BadInput, match="at least two"):
        runs.read([two[0]])
    with pytest.raises(BadInput, match="is a folder"):
        report.write_comparison(two, tmp_path)


def test_runs_without_a_task_in_common_say_so(two: tuple[Path, Path], tmp_path: Path) -> None:
    def change(results: dict) -> None:
        for arm in results["arms"].values():
            arm["general"] = {}

    other = build_run(tmp_path / "other", arms=ARMS, n=20, tasks=("something_else",), change=change)
    said = runs.page([two[0], other])["sentences"]
    assert said[0].startswith("The runs have no task in common")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "results.json").write_text('{"arms": {"gift": null}, "recipe": null}', encoding="utf-8")
    assert Page(report.write_comparison([other, bare]).read_text(encoding="utf-8")).problems == []


def test_an_evaluation_alone_has_a_page_and_can_be_set_beside_another(two: tuple[Path, Path], tmp_path: Path) -> None:
    result = json.loads((two[0] / "results.json").read_text(encoding="utf-8"))["arms"]["gift"]["task"]["word_problems"]
    for name in ("one", "other"):
        path = tmp_path / name / "word_problems" / "items.jsonl"
        path.parent.mkdir(parents=True)
        path.write_bytes((two[0] / result["items"]).read_bytes())
        tasks = {"word_problems": {**result, "items": "word_problems/items.jsonl", "vs_instruct": None}}
        (tmp_path / name / "results.json").write_text(json.dumps({"model": "models/mine", "tasks": tasks}), encoding="utf-8")
    text = report.write(tmp_path / "one").read_text(encoding="utf-8")
    assert "models/mine" in text and f"{result['score']:.3f}" in text and "guidetune evaluation" in text
    (line,) = runs.lines(runs.read([tmp_path / "one", tmp_path / "other"]))
    assert line.cells[1].against is not None and line.cells[1].against.gain == 0 and line.cells[1].against.p == 1


def test_every_table_is_exported_as_csv_and_markdown(tmp_path: Path, two: tuple[Path, Path]) -> None:
    def change(results: dict) -> None:
        every_field(results)
        results["arms"]["gift"]["description"] = HOSTILE
        results["ledger"]["dropped"][f"=HYPERLINK({HOSTILE})"] = 3

    run = build_run(tmp_path / "run", n=40, change=change)
    report.write(run, export=tmp_path / "tables")
    report.write_comparison(two, tmp_path / "two.html", tmp_path / "both")
    names = {path.stem for path in (tmp_path / "tables").glob("*.csv")}
    assert names == {
        "arms", "verdict", "tests", "notes", "pairs",
        "seeds", "gain-and-retention", "scales", "skills", "difficulty", "samples", "confidence",
        "signal", "gained-and-lost", "loss", "ledger", "dropped", "transfer", "costs", "budget", "provenance",
    }  # fmt: skip
    assert {path.stem for path in (tmp_path / "both").glob("*.md")} == {"runs", "scores", "recipe-differences", "surroundings", "costs"}
    for path in [*(tmp_path / "tables").glob("*.csv"), *(tmp_path / "both").glob("*.csv")]:
        rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"))))
        assert len(rows) > 1 and {len(row) for row in rows} == {len(rows[0])}, path
        assert not [cell for row in rows for cell in row if cell[:1] in ("=", "@")]
        table = path.with_suffix(".md").read_text(encoding="utf-8").splitlines()[2:]
        assert len(table) == len(rows) + 1 and {line.replace("\\|", "").count("|") for line in table} == {len(rows[0]) + 1}, path
        assert "<script" not in "".join(table)
    flips = list(csv.DictReader(open(tmp_path / "tables" / "gained-and-lost.csv", encoding="utf-8")))
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    for arm in ("sft", "graft", "gift"):  # every item, not only those on the page
        counts = results["arms"][arm]["task"]["word_problems"]["vs_instruct"]
        told = [row["change"] for row in flips if (row["arm"], row["task"]) == (arm, "word_problems")]
        assert (told.count("gained"), told.count("lost")) == (counts["gained"], counts["lost"])


def test_the_verb_writes_a_page_and_a_comparison(two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from guidetune import cli

    def ends_with(code: int, *arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main(["report", *arguments])
        assert ended.value.code == code
        return "".join(capsys.readouterr())

    said = ends_with(0, str(two[0]), "--out", str(tmp_path / "page.html"), "--export", str(tmp_path / "tables"))
    assert f"report: {tmp_path / 'page.html'}" in said and (tmp_path / "tables" / "arms.csv").is_file()
    assert f"report: {two[0].parent / 'comparison.html'}" in ends_with(0, *map(str, two))
    assert "holds no results.json" in ends_with(2, str(tmp_path / "nothing"))


def test_separators_inside_an_answer_do_not_break_its_line(tmp_path: Path) -> None:
    """U+2028 and U+0085 end a line for str.splitlines, not for JSON lines."""
    from guidetune.evaluation.evaluate import paired_results

    item = {"id": "a", "output": "one\u2028two\x85three\x1cfour", "correct": 1}
    (tmp_path / "items.jsonl").write_text(json.dumps(item, ensure_ascii=False) + "\n", encoding="utf-8")
    result = {"items": "items.jsonl", "metric": "accuracy", "higher_is_better": True}
    assert paired_results(tmp_path, result, tmp_path, result)["kept"] == 1
    assert [item["id"] for _, item in samples.read_lines(tmp_path / "items.jsonl")] == ["a"]
