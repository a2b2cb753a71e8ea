"""What `guidetune data` says about a set, and its limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from guidetune import cli
from guidetune.data.figures import check, figures
from guidetune.data.language import language_of
from guidetune.data.prepare import PrepareSettings, prepare
from guidetune.errors import BadInput
from tests.data.chats import chat_of


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("What is the capital of the country?", "en"),
        ("¿Cuál es la capital de los países que no están en el mapa?", "es"),
        ("Quelle est la capitale de ce pays, et pour qui est-ce que les routes", "fr"),
        ("Was ist die Hauptstadt, und wie ist es mit dem Rest der Welt?", "de"),
        ("Столица страны", "Cyrillic"),
        ("ما هي عاصمة البلاد", "Arabic"),
        ("東京は日本の首都です", "ja"),
        ("北京是中国的首都", "zh"),
        ("서울은 한국의 수도", "ko"),
        ("2 + 2 = 4", "none"),
        ("", "none"),
        ("zorp blick", "Latin"),
    ],
)
def test_languages(text: str, language: str) -> None:
    assert language_of(text) == language


def rows(count: int) -> list[dict[str, Any]]:
    labels = ["yes"] * 9 + ["no"]
    out = [{"q": f"is {k * 7919 % 9973} more than {k * 104729 % 9967} or not?", "a": labels[k % 10]} for k in range(count)]
    out[1] = {"q": "is the weather in the north of the country as good as it was in all of last year or not?", "a": "yes"}
    out[2] = {"q": "is the weather in the north of the country as good as it was in all of last year, or not?", "a": "yes"}
    return out


OPERATIONS: list[Any] = [
    {"method": "template", "templates": {"t": {"user": "{q}", "assistant": "{a}"}, "u": {"user": "Say: {q}", "assistant": "{a}"}}},
    {"method": "sample", "n": 50},
]


def test_figures_of_a_set(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows(60), {"q": "no answer"}]))
    spec = {"path": "x.jsonl", "tags": {"language": "en"}}
    done = prepare([spec], OPERATIONS, chat_of("chatml"), PrepareSettings(max_dropped=1), tmp_path / "out", tmp_path)
    found = figures(done.path, ["is 0 more than 0 or not?", "other"])
    assert found["rows"]["used"] == 50 and found["dropped"] == {
        "all": 11,
        "faults": 1,
        "reasons": {"not sampled": 10, "no template fits": 1},
    }
    part = found["labels"]["x"]
    assert part["labels"] == 2 and sum(part["counts"].values()) == 50 and 0.3 < part["balance"] < 0.7
    assert found["columns"]["language"] == {"en": 1.0} and len(found["columns"]["template"]) == 2
    assert found["near_duplicates"]["rows"] <= 1 and found["without_stop_token"] == 0 and found["languages"]["en"] == 1.0
    assert found["diversity"]["answers distinct-1"] == 2 / 50 and 0 < found["diversity"]["spread"] < 1
    json.dumps(found, allow_nan=False)
    check(found, {"dropped": 1, "leaks": None, "duplicates": 0.5})
    with pytest.raises(BadInput, match="1 of 61 rows are dropped for a fault of theirs, more than --max-dropped 0"):
        check(found, {"dropped": 0})
    with pytest.raises(BadInput, match="nothing to measure it with"):
        check({**found, "leaks": {}}, {"leaks": 0})


def test_limits_and_json_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows(20), {"q": "no answer"}]))
    operations = json.dumps([OPERATIONS[0] | {"choose": "u"}, {"method": "mix", "rows": 30}])
    (tmp_path / "r.yaml").write_text(
        f"models: {{base: 'world:base', instruct: 'world:instruct'}}\ndata:\n  train: [x.jsonl]\n  operations: {operations}\n"
    )

    def said(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["-q", "data", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "run"), "--show", "1", *arguments])
        out = capsys.readouterr()
        return int(ended.value.code or 0), out.out, out.err

    code, out, err = said("--json", str(tmp_path / "f.json"), "--max-dropped", "0.5")
    assert code == 0, err
    assert "no template fits" in out and "x: rows 20, draws 30, share 1.0" in out and "after: user: Say: is 0 more than 0 or not?" in out
    assert "labels of x: 2 (yes" in out
    found = json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))
    assert [part["method"] for part in found["operations"]] == ["template", "mix"] and found["rows"]["made"] == 10
    code, out, err = said("--max-dropped", "0", "--max-duplicates", "0")
    assert code == 2 and "more than --max-dropped 0" in err and "more than --max-duplicates 0" in err and "Traceback" not in err
    assert said("--max-dropped", "many")[0] == 2
