"""The arms table in the terminal, as Markdown and as CSV; the sentences; the model card."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from guidetune import report
from guidetune.errors import BadInput
from guidetune.evaluation.statistics import holm
from guidetune.report import numbers
from guidetune.report.findings import breakdown, compare_group, compare_task, comparisons, natural, signal_ends, verdicts


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict:
    from conftest import build_run

    run = build_run(tmp_path_factory.mktemp("tables") / "run", n=240)
    return json.loads((run / "results.json").read_text(encoding="utf-8"))


def terminal(results: dict, width: int = 80) -> str:
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width, color_system=None, legacy_windows=False).print(report.arms_table(results))
    return out.getvalue()


def test_the_terminal_table_fits_80_columns_with_nothing_cut(results: dict) -> None:
    text = terminal(results)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    text.replace("─", "-").encode("ascii")  # old Windows code pages can print it
    for name, arm in results["arms"].items():
        assert name in text
        for group in ("task", "general"):
            for label, result in arm[group].items():
                assert label in text
                assert f"{result['score']:.3f}".removeprefix("0") in text
                if name != "instruct":
                    pair = result["vs_instruct"]
                    assert f"{pair['kept']}/{pair['lost']}/{pair['gained']}" in text
                    assert f"{pair['diff']:+.3f}".replace("0.", ".") in text


def test_the_terminal_table_shows_failures_and_long_names(results: dict) -> None:
    arms = {f"an-arm-with-quite-a-long-name-{i}": arm for i, arm in enumerate(results["arms"].values())}
    text = terminal({"arms": {**arms, "broken": {"status": "failed", "error": "[red]no[/red] \x1b[2J space left"}, "idle": {}}})
    assert max(map(len, text.splitlines())) <= 80
    joined = "".join(text.split())
    assert "brokenfailed:[red]no[/red]␛[2Jspaceleft" in joined and "\x1b" not in text
    assert "idlenotevaluated" in joined


def test_markdown_and_csv_hold_the_same_rows(results: dict) -> None:
    lines = report.markdown(results).splitlines()
    rows = list(csv.DictReader(io.StringIO(report.csv_text(results))))
    assert len(lines) - 2 == len(rows) == 8
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    gift = next(row for row in rows if row["arm"] == "gift" and row["group"] == "task")
    pair = results["arms"]["gift"]["task"]["word_problems"]["vs_instruct"]
    assert float(gift["gain_vs_instruct"]) == pair["diff"] and float(gift["p"]) == pair["p"]
    assert (float(gift["gain_ci_low"]), float(gift["gain_ci_high"])) == tuple(pair["ci"])
    assert [int(gift[key]) for key in ("kept", "lost", "gained")] == [pair[key] for key in ("kept", "lost", "gained")]


def test_table_cells_cannot_break_out() -> None:
    arms = {"=1+1": {"task": {"a|b\nc<script>": {"score": 0.5, "n": 3}}}}
    line = report.markdown({"arms": arms}).splitlines()[2]
    assert r"a\|b c&lt;script&gt;" in line
    assert "\n'=1+1," in report.csv_text({"arms": arms})


def _result(diff: float, ci: list[float], p: float, score: float = 0.5, **more: object) -> dict:
    return {
        "score": score,
        "n": 200,
        "metric": "accuracy",
        "vs_instruct": {"diff": diff, "ci": ci, "p": p, "kept": 90, "lost": 5, "gained": 9},
        **more,
    }


def _said(task: dict, general: dict) -> dict[str, str]:
    instruct = {"task": {"t": {"score": 0.4, "n": 200}}, "general": {"g": {"score": 0.93, "n": 200}}}
    return {verdict.arm: verdict.text for verdict in verdicts({"arms": {"instruct": instruct, "gift": {"task": task, "general": general}}})}


def test_the_sentence_claims_what_the_test_allows() -> None:
    said = _said({"t": _result(0.12, [0.05, 0.18], 0.001, 0.52)}, {"g": _result(-0.02, [-0.05, 0.01], 0.21, 0.91)})["gift"]
    assert "0.400 → 0.520, +0.120 [0.050, 0.180] against instruct (p = .001, significant)" in said
    assert "0.930 → 0.910, −0.020 [−0.050, 0.010] against instruct (p = .21, not distinguishable at n = 200" in said
    assert "a loss of up to 0.050 is not excluded" in said


def _arms(*p_values: float) -> dict:
    instruct = {"task": {"t": {"score": 0.4, "n": 200}}}
    return {"instruct": instruct} | {f"arm {i}": {"task": {"t": _result(0.05, [0.0, 0.1], p)}} for i, p in enumerate(p_values)}


def test_a_result_that_falls_to_correction_over_the_arms_says_so() -> None:
    said = {verdict.arm: verdict for verdict in verdicts({"arms": _arms(0.04, 0.5, 0.001)})}
    assert "p = .040, significant alone, but not after Holm correction over the 3 arms" in said["arm 0"].text
    assert said["arm 0"].tone == "even" and said["arm 2"].tone == "better"
    assert "p = .040, significant)" in next(v.text for v in verdicts({"arms": _arms(0.04)}) if v.arm == "arm 0")


def test_the_stored_correction_comes_before_ones_own() -> None:
    arms = _arms(0.04, 0.5, 0.001)
    holm = comparisons({"arms": arms})
    assert [round(holm[f"arm {i}", "task", "t"].p_adjusted, 6) for i in range(3)] == [0.08, 0.5, 0.003]
    arms["arm 2"]["task"]["t"]["vs_instruct"] |= {"p_adjusted": 0.2, "mde": 0.11, "verdict": "not distinguishable"}
    stored = {"groups": {"task": {"arm 0": {"p_adjusted": 0.049}}}, "verdict": ["Nothing holds."]}
    known = comparisons({"arms": arms, "comparison": stored})
    assert known["arm 2", "task", "t"].p_adjusted == 0.2 and known["arm 2", "task", "t"].mde == 0.11
    assert (
        known["arm 0", "task", None].p_adjusted == 0.049 and known["arm 0", "task", "t"].p_adjusted == holm["arm 0", "task", "t"].p_adjusted
    )


def test_what_is_tested_over_seeds_is_what_is_shown() -> None:
    from guidetune.report.tables import records

    arms = _arms(0.001)
    test = {"diff": 0.02, "ci": [-0.04, 0.08], "p": 0.5, "p_adjusted": 0.7, "test": "t over seeds and items"}
    arms["arm 0"]["over_seeds"] = {"task": {"t": {"mean": 0.42, "sd": 0.03, "scores": [0.45, 0.39], "vs_instruct": test}}}
    _, row = records({"arms": arms})
    assert (row["score"], row["sd"], row["seeds"], row["ci_low"]) == (0.42, 0.03, 2, None)
    assert (row["gain_vs_instruct"], row["p"], row["p_adjusted"]) == (0.02, 0.5, 0.7)
    assert (row["kept"], row["lost"], row["gained"]) == (90, 5, 9), "counts of items are the first seed's"
    assert "0.420 ± 0.030" in report.markdown({"arms": arms}) and verdicts({"arms": arms})[1].tone != "better"


def test_the_sentence_follows_p_where_p_and_interval_disagree() -> None:
    assert "not distinguishable" in _said({"t": _result(0.05, [0.001, 0.1], 0.056)}, {})["gift"]


def test_smaller_is_better_turns_the_sign() -> None:
    part = compare_task(_result(-0.3, [-0.5, -0.1], 0.01, 1.2, metric="nll_per_token", higher_is_better=False))
    assert part is not None and part.gain == 0.3 and part.ci == (0.1, 0.5)
    assert "a smaller score is better" in _said({"t": _result(-0.3, [-0.5, -0.1], 0.01, 1.2, higher_is_better=False)}, {})["gift"]


def test_a_group_mean_adds_half_widths_in_squares() -> None:
    arm = {"task": {"a": _result(0.1, [0.04, 0.16], 0.001), "b": _result(0.2, [0.12, 0.28], 0.001)}}
    part = compare_group(arm, "task")
    assert part is not None and part.gain == pytest.approx(0.15)
    assert part.ci == pytest.approx((0.15 - 0.05, 0.15 + 0.05))  # sqrt(.06^2 + .08^2) / 2
    assert (part.n, part.tasks, part.kept, part.lost, part.gained) == (400, 2, 180, 10, 18)
    assert part.p is not None and part.p < 1e-6


def test_holm() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({}) == {}


def test_breakdown_signal_and_order() -> None:
    arm = {
        "general": {
            "a": {"score": 0.5, "n": 10, "by": {"skill": {"x": {"score": 1.0, "n": 4}}}},
            "b": {"score": 0.25, "n": 8, "by": {"skill": {"x": {"score": 0.5, "n": 4}}}},
            "c": {"score": 0.1, "n": 2},
        }
    }
    assert breakdown({"arms": {"gift": arm}}, "general", "skill") == {"x": {"gift": (0.75, 8)}, "c": {"gift": (0.1, 2)}}
    bins = [{"lo": 0.0, "hi": 0.3, "signal": 0.6}, {"lo": 0.3, "hi": 0.9, "signal": 0.3}, {"lo": 0.9, "hi": 1.0, "signal": 0.1}]
    assert signal_ends(bins) == pytest.approx((0.6, 0.1))
    assert signal_ends([{"lo": 0.0, "hi": 0.5, "signal": 0.6}, {"lo": 0.5, "hi": 1.0, "signal": 0.4}]) == (None, None)
    assert sorted(["10 steps", "9 steps", "easy"], key=natural) == ["9 steps", "10 steps", "easy"]


def test_numbers() -> None:
    assert [numbers.p_value(p) for p in (0.0001, 0.0123, 0.21, 1.0, None)] == ["p < .001", "p = .012", "p = .21", "p = 1", "no p-value"]
    assert [numbers.score(v) for v in (0.5, -0.00001, 37.384, float("nan"), None)] == ["0.500", "0.000", "37.38", "–", "–"]
    assert [numbers.signed(v) for v in (0.12, -0.12, 0.0)] == ["+0.120", "−0.120", "0.000"]
    assert [numbers.duration(s) for s in (0, 0.42, 38.2, 252, 11100)] == ["0 s", "0.42 s", "38 s", "4 min 12 s", "3 h 05 min"]


def _front(card: str) -> dict:
    import yaml

    return yaml.safe_load(card.split("---\n")[1])


def test_the_model_card_is_one_the_hub_reads(results: dict) -> None:
    from huggingface_hub import ModelCard

    hub = {**results, "models": {"base": "acme/base-1b", "instruct": "acme/instruct-1b"}}
    card = report.model_card(hub, "gift")
    data = ModelCard(card).data.to_dict()
    assert data["base_model"] == "acme/instruct-1b" and data["library_name"] == "transformers"
    assert {"guidetune", "lora", "gift", "arxiv:2605.01256"} <= set(data["tags"])
    pair = results["arms"]["gift"]["task"]["word_problems"]["vs_instruct"]
    for text in (
        "2605.01256",
        "acme/base-1b",
        numbers.signed(pair["diff"]),
        "3,921",
        "AutoModelForCausalLM",
        "power 1.0",
        "rank 16",
        "## Limits",
        "mean probability",
    ):
        assert text in card, text
    assert "graft" not in card.split("## Data")[0].split("# word", 1)[1]


def test_a_local_pair_leaves_base_model_out(results: dict) -> None:
    card = report.model_card(results, "gift")
    assert "base_model" not in _front(card)
    assert "world:instruct is not a Hub id" in card


def test_the_card_never_guesses_what_an_arm_did(results: dict) -> None:
    assert "every target token weighted alike" in report.model_card(results, "graft")
    assert "trained on the instruct model itself" in report.model_card(results, "sft")
    arms = {name: {key: value for key, value in arm.items() if key != "recipe"} for name, arm in results["arms"].items()}
    card = report.model_card({**results, "arms": arms}, "graft")
    assert "not recorded" in card and "weighted by gift" not in card and "gift" not in _front(card)["tags"]
    dotted = {**results, "arms": arms, "recipe": {**results["recipe"], "arms": {"graft": {"tune.weights": ["dft"]}}}}
    assert "weighted by dft" in report.model_card(dotted, "graft")


def test_the_card_of_a_bare_arm_and_of_none() -> None:
    card = report.model_card({"arms": {"gift": {}}}, "gift")
    assert "not evaluated" in card and "was forgotten is unknown" in card
    with pytest.raises(BadInput, match="no arm 'gfit'; they have: gift"):
        report.model_card({"arms": {"gift": {}}}, "gfit")


def test_importing_the_report_loads_nothing_heavy() -> None:
    import subprocess
    import sys

    code = "import sys, guidetune.report; print([m for m in ('torch', 'matplotlib', 'jinja2', 'numpy', 'rich') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert out.stdout.strip() == "[]"


def test_scores_over_seeds_are_shown_where_arms_were_repeated(tmp_path: Path) -> None:
    from guidetune.report import html, tables

    def result(score: float) -> dict:
        return {"score": score, "ci": [score, score], "n": 10}

    spread = {"mean": 0.5, "sd": 0.1, "scores": [0.4, 0.6]}
    results = {
        "arms": {
            "instruct": {"status": "ok", "task": {"t": result(0.3)}, "general": {}},
            "gift": {
                "status": "ok",
                "task": {"t": result(0.4)},
                "general": {},
                "over_seeds": {"n": 2, "task": {"t": spread}, "general": {}},
            },
        }
    }
    assert [(r.arm, r.mean, r.sd, r.scores) for r in tables.seed_rows(results)] == [
        ("instruct", 0.3, None, [0.3]),
        ("gift", 0.5, 0.1, [0.4, 0.6]),
    ]
    assert "0.500 ± 0.100" in tables.seeds_markdown(results)
    page = html.render(tmp_path, results)
    assert "Over seeds" in page and "0.400, 0.600" in page
    del results["arms"]["gift"]["over_seeds"]
    assert tables.seed_rows(results) == [] and "Over seeds" not in html.render(tmp_path, results)


def test_a_likelihood_is_not_averaged_with_accuracies() -> None:
    def result(score: float, diff: float, higher: bool) -> dict:
        paired = {"diff": diff, "ci": [diff - 0.1, diff + 0.1], "p": 0.5, "kept": 1, "lost": 0, "gained": 0}
        return {"score": score, "n": 10, "higher_is_better": higher, "vs_instruct": paired}

    arm = {"status": "ok", "task": {"accuracy": result(0.4, -0.02, True), "nll": result(9.7, -0.48, False)}}
    gain = compare_group(arm, "task")
    assert gain is not None and gain.gain == -0.02 and gain.tasks == 1
    del arm["task"]["accuracy"]
    alone = compare_group(arm, "task")
    assert alone is not None and alone.gain == 0.48  # a smaller likelihood loss is a gain
