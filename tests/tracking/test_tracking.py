"""Trackers are told everything once, and nothing they do reaches the run."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from accelerate.tracking import GeneralTracker

from guidetune import tracking
from guidetune.errors import BadInput
from guidetune.registry import build, method
from guidetune.tracking import TrackedRun, Tracker, tracked


class ToFile(GeneralTracker):
    """A tracker that needs no package: one JSON line for each call."""

    name = "recorder"
    requires_logging_directory = True

    def __init__(self, path: Path, run: TrackedRun, fails: str) -> None:
        super().__init__()
        self.path, self.run_id, self.fails = path, run.id, fails
        self.note("open", arm=run.arm)
        if run.fresh:
            self.note("configure", values=dict(run.config))

    @property
    def tracker(self) -> ToFile:
        return self

    def note(self, call: str, **values: Any) -> None:
        if self.fails == call:
            raise SystemExit(f"no {call} today") if call == "log" else ConnectionError(f"no {call} today")
        if self.fails == f"hang in {call}":
            threading.Event().wait(30)
        with open(self.path, "a") as file:
            file.write(json.dumps({"call": call, "id": self.run_id, **values}) + "\n")

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.note("log", values=values, step=step)

    def finish(self) -> None:
        self.note("finish")


@method(kind="tracker", name="recorder", summary="For tests.")
class Recorder(Tracker):
    packages: ClassVar[tuple[str, ...]] = ()
    path: str = ""
    fails: str = ""

    def open(self, run: TrackedRun) -> GeneralTracker:
        return ToFile(Path(self.path), run, self.fails)


def calls(path: Path, which: str) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, path.read_text().splitlines()) if row["call"] == which]


def write_metrics(path: Path, steps: range, validate: tuple[int, ...] = ()) -> None:
    with open(path, "a") as file:
        for step in steps:
            file.write(json.dumps({"step": step, "loss": 10.0 - step, "lr": 1e-3}) + "\n")
            if step in validate:
                file.write(json.dumps({"step": step, "validation_loss": 5.0}) + "\n")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "EVERY", 0.02)


def follow(tmp_path: Path, steps: range, config: Mapping[str, Any] | None = None, tracker: Tracker | None = None, **options: Any) -> None:
    one = tracker or Recorder(path=str(tmp_path / "calls"), **options)
    with tracked([one], "job", "gift", tmp_path, tmp_path / "metrics.jsonl", config or {"tune.lr": 1e-3}) as results:
        write_metrics(tmp_path / "metrics.jsonl", steps, validate=(2, 4))
        results["evaluate/task/quiz"] = 0.5


def test_every_step_is_logged_once_also_when_a_run_is_continued(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        with tracked([Recorder(path=str(tmp_path / "calls"))], "job", "gift", tmp_path, tmp_path / "metrics.jsonl", {"tune.lr": 1e-3}):
            write_metrics(tmp_path / "metrics.jsonl", range(1, 4), validate=(2,))
            with open(tmp_path / "metrics.jsonl", "a") as file:
                file.write('{"step": 4, "lo')  # a line that is being written
            raise KeyboardInterrupt
    (tmp_path / "metrics.jsonl").write_text("")
    write_metrics(tmp_path / "metrics.jsonl", range(1, 3), validate=(2,))  # the checkpoint was older than what was logged
    follow(tmp_path, range(3, 6))
    logged = calls(tmp_path / "calls", "log")
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 5, 5]
    assert logged[1]["values"] == {"train/loss": 8.0, "train/lr": 1e-3, "validation/loss": 5.0}
    assert logged[-1]["values"] == {"evaluate/task/quiz": 0.5}
    assert len({row["id"] for row in logged}) == 1 and len(calls(tmp_path / "calls", "configure")) == 1
    follow(tmp_path, range(0))
    assert len(calls(tmp_path / "calls", "log")) == 6, "a finished run has nothing new to say"
    follow(tmp_path, range(0), config={"tune.lr": 2e-3})
    assert calls(tmp_path / "calls", "open")[-1]["arm"] == "gift.2", "another recipe is another tracker run"
    assert len(calls(tmp_path / "calls", "finish")) == 4


@pytest.mark.parametrize("fails", ["open", "configure", "log", "finish", "hang in log", "hang in open"])
def test_a_tracker_that_fails_is_given_up_with_a_warning(
    tmp_path: Path, fails: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "LAST", 0.3)
    good = Recorder(path=str(tmp_path / "good"))
    bad = Recorder(path=str(tmp_path / "bad"), fails=fails)
    with (
        tracked([bad], "job", "a", tmp_path, tmp_path / "metrics.jsonl", {}),
        tracked([good], "job", "b", tmp_path, tmp_path / "metrics.jsonl", {}),
    ):
        write_metrics(tmp_path / "metrics.jsonl", range(1, 4))
    said = capsys.readouterr().err
    assert ("has not finished" if "hang" in fails else f"has stopped: no {fails} today") in said and "the run goes on" in said
    assert [row["step"] for row in calls(tmp_path / "good", "log")] == [1, 2, 3]


def test_what_cannot_work_is_refused_before_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Missing(Recorder):
        packages: ClassVar[tuple[str, ...]] = ("no_such_package_anywhere",)

    with pytest.raises(BadInput, match="no_such_package_anywhere is not installed.*guidetune\\[track\\]"):
        tracking.check([Missing()])
    with pytest.raises(BadInput, match="recorder is named twice"):
        tracking.check([Recorder(), Recorder()])
    for name in ("WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    online = build("tracker", {"method": "wandb", "mode": "online"})
    assert online.obstacle() is not None
    assert build("tracker", "wandb").mode == "offline", "nothing leaves the machine unless asked"


def test_a_run_tells_its_trackers_what_stands_in_its_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from guidetune import pipeline
    from guidetune.recipe import load

    recipe = load(place / "recipe.yaml").model_copy(
        update={"track": [Recorder(path=str(place / "calls"))], "evaluate": None, "transfer": None}
    )
    out = pipeline.run(recipe, place / "run")
    logged = calls(place / "calls", "log")
    steps = {row["step"]: row["values"] for row in logged[:-1]}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {row["step"]: row["loss"] for row in lines if "loss" in row} == {
        s: v["train/loss"] for s, v in steps.items() if "train/loss" in v
    }
    assert {row["step"] for row in lines if "validation_loss" in row} == {s for s, v in steps.items() if "validation/loss" in v} == {0, 9}
    results = json.loads((out / "results.json").read_text())
    assert logged[-1]["values"]["guidance/mean_confidence"] == results["guidance"]["mean_confidence"]
    assert logged[-1]["values"]["cost/steps"] == 9
    (config,) = calls(place / "calls", "configure")
    assert config["values"]["tune.weights.0.method"] == "gift" and config["values"]["tune.params.rank"] == 4
    before = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    failing = recipe.model_copy(update={"track": [Recorder(path=str(place / "x"), fails="log")]})
    again = pipeline.run(failing, place / "again")
    assert (again / "adapter" / "adapter_model.safetensors").read_bytes() == before
    assert "has stopped: no log today" in capsys.readouterr().err


# The trackers themselves, where they are installed


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (extra `track`)")


def test_tensorboard_files_hold_the_curves(tmp_path: Path) -> None:
    needs("tensorboard")
    for steps in (range(1, 4), range(4, 7)):
        follow(tmp_path, steps, tracker=build("tracker", "tensorboard"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(tmp_path / "tracking" / "tensorboard" / "gift"))
    read.Reload()
    assert [(one.step, one.value) for one in read.Scalars("train/loss")] == [(step, 10.0 - step) for step in range(1, 7)]
    assert [one.step for one in read.Scalars("validation/loss")] == [2, 4]
    assert read.Scalars("evaluate/task/quiz")[0].value == 0.5 and "recipe/text_summary" in read.Tags()["tensors"]


def wandb_records(path: Path) -> list[Any]:
    """The records of an offline run: a 7-byte header, then LevelDB's log format (blocks of 32 KB; checksum, length, type)."""
    from wandb.proto import wandb_internal_pb2

    raw, found, part, at = path.read_bytes(), [], b"", 7
    while at + 7 <= len(raw):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", raw[at : at + 7])
        part += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            found.append(record)
            part = b""
    return found


def test_wandb_offline_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("wandb")
    for name in ("XDG_CONFIG_HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    tracker = build("tracker", {"method": "wandb", "mode": "offline", "project": "trial", "tags": ["quick"]})
    for steps in (range(1, 4), range(4, 6)):
        follow(tmp_path, steps, tracker=tracker)
    files = sorted((tmp_path / "tracking" / "wandb").glob("offline-run-*/*.wandb"))
    records = [wandb_records(path) for path in files]
    runs = [next(one.run for one in part if one.WhichOneof("record_type") == "run") for part in records]
    assert len({run.run_id for run in runs}) == 1 and {(run.project, run.run_group, run.display_name) for run in runs} == {
        ("trial", "job", "job/gift")
    }
    logged: dict[str, list[Any]] = {}
    for one in (one for part in records for one in part if one.WhichOneof("record_type") == "history"):
        for item in one.history.item:
            logged.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
    assert logged["train/loss"] == [9.0, 8.0, 7.0, 6.0, 5.0] and logged["evaluate/task/quiz"] == [0.5]
    assert "tune.lr" in {item.key or "/".join(item.nested_key) for run in runs for item in run.config.update}


def test_trackio_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    needs("trackio")
    if "trackio" in sys.modules:
        pytest.skip("trackio reads its folder when it is imported, and it was")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "db"))
    for steps in (range(1, 4), range(4, 6)):
        follow(tmp_path, steps, tracker=build("tracker", {"method": "trackio", "project": "trial"}))
    import sqlite3

    with sqlite3.connect(tmp_path / "db" / "trial.db") as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
        (config,) = database.execute("SELECT config FROM configs").fetchall()
    losses = [json.loads(metrics)["train/loss"] for _, _, metrics in rows if "train/loss" in json.loads(metrics)]
    assert losses == [9.0, 8.0, 7.0, 6.0, 5.0] and len({name for name, _, _ in rows}) == 1 and b"tune.lr" in config[0]
    assert capsys.readouterr().out == "" and os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
