"""The index of runs: what it says of folders, that it can be lost, and that deleting touches nothing else."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from guidetune import runs
from guidetune.cli import app
from guidetune.errors import BadInput


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(runs.HOME, str(tmp_path / "home"))
    return tmp_path / "home"


def write_run(folder: Path, right: list[int], lr: float = 1e-4, arm: str = "gift", question: str = "q", seconds: float = 3.0) -> Path:
    """A finished comparison as the pipeline leaves it: two arms with one task of right-or-wrong items."""
    arms: dict[str, Any] = {}
    for name, values in (("instruct", [0] * len(right)), (arm, right)):
        items = folder / "arms" / name / "evaluation" / "task" / "quiz"
        items.mkdir(parents=True)
        lines = [{"id": str(i), "prompt": f"{question} {i}", "reference": i, "correct": one} for i, one in enumerate(values)]
        (items / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (items / "manifest.json").write_text(json.dumps({"fingerprint": "0" * 32}))
        score = sum(values) / len(values)
        result = {
            "score": score,
            "ci": [0, 1],
            "n": len(values),
            "metric": "accuracy",
            "higher_is_better": True,
            "items": "quiz/items.jsonl",
        }
        arms[name] = {"status": "ok", "task": {"quiz": result}, "general": {}, "task_mean": score, "general_mean": None}
        arms[name]["paths"] = {"evaluation": f"arms/{name}/evaluation"}
    recipe = {"name": folder.name, "models": {"base": "b", "instruct": "i"}, "tune": {"lr": lr, "weights": [{"method": "gift"}]}}
    results = {"name": folder.name, "kind": "compare", "created": "2026-11-20T10:00:00+0000", "recipe": recipe, "arms": arms}
    (folder / "results.json").write_text(json.dumps({**results, "seconds": seconds}))
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder


def test_a_run_registers_itself_and_its_end(tmp_path: Path) -> None:
    for error, status in ((None, "ok"), (ValueError("bad\nluck"), "failed"), (KeyboardInterrupt(), "interrupted")):
        folder = tmp_path / status
        folder.mkdir()
        runs.started(folder, "run", status)
        assert [run.status for run in runs.every() if run.folder == str(folder)] == ["running"]
        runs.ended(folder, error)
        (run,) = [run for run in runs.every() if run.folder == str(folder)]
        assert (run.status, run.name, run.kind) == (status, status, "run") and run.seconds is not None and run.seconds < 60
        assert run.error == {"ok": None, "failed": "bad", "interrupted": "KeyboardInterrupt"}[status]


def test_a_killed_run_shows_as_interrupted_also_when_its_number_lives_on(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from guidetune import runs\n"
    code += "runs.started(Path(sys.argv[1]), 'run', 'x'); print(1, flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"1\n"
    assert runs.every()[0].status == "running"
    with pytest.raises(BadInput, match="is at work"):
        runs.delete(runs.pick(str(tmp_path)))
    process.kill()
    deadline = time.monotonic() + 10
    while runs.every()[0].status == "running" and time.monotonic() < deadline:  # a zombie until it is waited for: dead all the same
        time.sleep(0.02)
    assert runs.every()[0].status == "interrupted"
    process.wait()
    assert runs.every()[0].status == "interrupted"
    mark = json.loads((tmp_path / runs.MARK).read_text())
    # the number belongs to another process now, this one
    (tmp_path / runs.MARK).write_text(json.dumps({**mark, "pid": os.getpid(), "process_started": time.time() - 1e5}))
    assert runs.every()[0].status == "interrupted"
    runs.ended(tmp_path)  # did not begin it, so has nothing to say of its end
    assert json.loads((tmp_path / runs.MARK).read_text())["status"] == "running"


@pytest.mark.parametrize("harm", ["lost", "broken", "emptied", "another version"])
def test_an_index_that_is_lost_or_broken_is_made_again(tmp_path: Path, home: Path, harm: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "a", [1, 0])
    runs.remember(folder)
    file = home / "runs.sqlite"
    for suffix in ("-wal", "-shm"):
        file.with_name(file.name + suffix).unlink(missing_ok=True)
    if harm == "lost":
        file.unlink()
    elif harm == "broken":
        file.write_bytes(b"SQLite format 3\0" + os.urandom(4096))
    elif harm == "emptied":
        file.write_bytes(b"")
    else:
        with sqlite3.connect(file) as index:
            index.execute("DROP TABLE runs")
            index.execute("CREATE TABLE runs (what TEXT)")
            index.execute("PRAGMA user_version=99")
        index.close()
    assert [run.folder for run in runs.every()] == [str(folder)]
    assert ("made again" in capsys.readouterr().err) == (harm == "broken")


def test_no_fault_of_the_index_reaches_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(runs.HOME, str(tmp_path / "file" / "home"))  # a folder that cannot be made, also by root
    folder = write_run(tmp_path / "a", [1])
    runs.started(folder, "run", "a")
    runs.ended(folder)
    assert capsys.readouterr().err.count("could not be entered in the index") == 1
    assert runs.describe(folder).status == "ok"  # type: ignore[union-attr]
    runs.started(tmp_path / "file" / "no" / "folder", "run", "b")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "runs").mkdir()
    (tmp_path / "b").rename(tmp_path / "runs" / "a")
    assert [run.name for run in runs.every()] == ["a"] and "cannot be used" in capsys.readouterr().err, "found without an index"
    with pytest.raises(BadInput, match=runs.HOME):
        runs.scan([tmp_path])


def test_many_processes_at_once_lose_nothing(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"r{i}", [1]) for i in range(12)]
    code = "import sys; from pathlib import Path; from guidetune import runs\n"
    code += "for f in sys.argv[1:]: runs.started(Path(f), 'run', 'x'); runs.ended(Path(f))"

    def work(part: list[Path]) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, *map(str, part)], capture_output=True, text=True)

    with ThreadPoolExecutor(4) as pool:
        for done in pool.map(work, [folders[i::4] for i in range(4)]):
            assert done.returncode == 0 and done.stderr == ""
    assert sorted(run.folder for run in runs.every()) == sorted(map(str, folders))


def test_scan_filters_and_orders(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a", [1, 0, 0, 0], seconds=9)
    write_run(tmp_path / "runs" / "deep" / "b", [1, 1, 0, 0], arm="sft")
    (tmp_path / "runs" / "not-a-run").mkdir()
    (tmp_path / "runs" / "not-a-run" / "results.json").write_text('{"some": "thing"}')
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "runs" / "a")
    assert [Path(run.folder).name for run in runs.scan([tmp_path])] == ["a", "b"]
    names = lambda **options: [run.name for run in runs.select(runs.every(), **options)]  # noqa: E731
    assert names(sort="task") == ["b", "a"] and names(sort="task", reverse=True) == ["a", "b"]
    assert names(sort="seconds") == ["a", "b"] and names(sort="name") == ["a", "b"]
    assert names(arm="sft") == ["b"] and names(name="[a]") == ["a"] and names(status=["failed"]) == [] and names(since="2026-11-21") == []
    with pytest.raises(BadInput, match="did you mean 'failed'"):
        names(status=["faild"])
    assert runs.pick("b").name == runs.pick(runs.pick("b").id[:5]).name == "b"


def test_diff_shows_the_keys_that_differ_and_tests_only_equal_items(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", [1] * 9 + [0])
    b = write_run(tmp_path / "b", [0] * 9 + [0], lr=5e-5)
    other = write_run(tmp_path / "c", [0] * 10, question="another", arm="sft")
    one, two, three = (runs.describe(folder) for folder in (a, b, other))
    assert one and two and three
    found = runs.diff(one, two)
    assert found.keys == [("name", "a", "b"), ("tune.lr", 1e-4, 5e-5)]
    gift = next(pair for pair in found.pairs if pair.arms == ("gift", "gift"))
    assert gift.test is not None and gift.test["diff"] == pytest.approx(0.9) and gift.test["p"] == pytest.approx(2 / 2**9)
    crossed = runs.diff(one, three)  # no tuned arm in common, one of each: they are compared, and the equal ids do not deceive
    pair = next(pair for pair in crossed.pairs if pair.arms == ("gift", "sft"))
    assert pair.test is None and "not the same items (0 in common" in pair.why
    with pytest.raises(BadInput, match="has no arm 'sft'"):
        runs.diff(one, three, ("sft", "sft"))


def test_delete_removes_the_run_and_nothing_else(tmp_path: Path) -> None:
    treasure = tmp_path / "treasure"
    treasure.mkdir()
    (treasure / "x").write_text("keep")
    folder = write_run(tmp_path / "a", [1])
    (folder / "arms" / "link").symlink_to(treasure)
    (folder / "my notes.txt").write_text("keep")
    (folder / "data").mkdir()  # the user's own, with a name that a stage would use
    (folder / "data" / "rows.jsonl").write_text("keep")
    link = tmp_path / "link"
    link.symlink_to(folder)
    runs.scan([tmp_path])
    for wrong, why in ((link, "is a link"), (treasure, "not a run folder")):
        with pytest.raises(BadInput, match=why):
            runs.delete(runs.pick(str(wrong)) if wrong == link else runs.Run(str(wrong), "run", "x", "ok"))
    left = runs.delete(runs.pick(str(folder)))
    assert sorted(path.name for path in left) == ["data", "my notes.txt"] == sorted(os.listdir(folder))
    assert (treasure / "x").read_text() == "keep" and (folder / "data" / "rows.jsonl").exists() and runs.every() == []
    gone = write_run(tmp_path / "b", [1])
    runs.remember(gone)
    assert runs.delete(runs.pick("b")) == [] and not gone.exists()


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["runs", *arguments])


def test_the_verbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "a", [1, 1, 1, 0])
    write_run(tmp_path / "runs" / "b", [0, 0, 1, 0], lr=3e-5)
    assert "2 runs found" in command("scan").stdout
    listed = json.loads(command("list", "--json", "--sort", "task").stdout)
    assert [run["name"] for run in listed] == ["a", "b"]
    shown = command("diff", "a", listed[1]["id"]).stdout
    assert "3e-05" in shown and "0.750" in shown and "+0.500" in shown
    assert ".750" in command("show", "a").stdout
    refused = command("delete", "a")
    assert refused.exit_code == 2 and "--yes" in refused.stderr and (tmp_path / "runs" / "a").is_dir()
    assert command("delete", "a", "--yes").exit_code == 0 and not (tmp_path / "runs" / "a").exists()
    assert (tmp_path / "runs" / "b").is_dir()
