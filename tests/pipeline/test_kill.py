"""Fifty `kill -9` at random moments of a run of all stages, and resuming under other settings of memory: the result does not change."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from guidetune import pipeline
from guidetune.recipe import load
from tests.pipeline.test_interruptions import plain_outcome
from tests.pipeline.test_pipeline import tensors

KILLS = 50
TICK = os.sysconf("SC_CLK_TCK")


def start(place: Path, out: Path) -> int:
    """The pipeline in a forked child: everything is imported, nothing has run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the threads that Python warns of are asleep
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        quiet = os.open(place / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        pipeline.run(load(place / "recipe.yaml"), out)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def spent(pid: int) -> float:
    """CPU seconds of a living child: moments are drawn in them, so that a busy machine changes nothing."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def run_until(pid: int, moment: float) -> bool:
    """Kill the child when it has used `moment` CPU seconds; False when it had finished before (with success)."""
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return False
        if spent(pid) >= moment:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            return os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        time.sleep(0.002)


def stage_in_work(out: Path) -> str:
    """The first stage that has not been published."""
    for name, mark in [
        ("start", ".pair.json"),
        ("prepare", "data/manifest.json"),
        ("guide", "guidance/instruct/manifest.json"),
        ("evaluate instruct", "arms/instruct/evaluation/general/loss/manifest.json"),
        ("tune", "adapter/manifest.json"),
        ("transfer", "model/manifest.json"),
        ("evaluate", "evaluation/general/loss/manifest.json"),
        ("report", "report.html"),
    ]:
        if not (out / mark).is_file():
            return name
    return "end"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="needs /proc")
def test_fifty_kills_change_nothing(place: Path, capsys: pytest.CaptureFixture) -> None:
    # what a child would spend most of its time on importing
    import matplotlib.pyplot  # noqa: F401
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    import guidetune.engine.loop
    import guidetune.evaluation.evaluate
    import guidetune.report
    import guidetune.weightspace.apply  # noqa: F401

    out = place / "runs/a"

    def fresh() -> None:
        for folder in ("runs", "world"):
            shutil.rmtree(place / folder, ignore_errors=True)

    began = time.process_time() + os.times().children_user
    pid = start(place, out)
    whole = 0.0
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        whole = spent(pid)
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(done[1]) == 0, (place / "log.txt").read_text()[-2000:]
    undisturbed = plain_outcome(out)
    fresh()

    rng = random.Random(20)
    kills, finished, seen = 0, 0, Counter()
    while kills < KILLS:
        # a run that has been hit in its report has been through everything: it is let finish, and another one begins
        moment = 1e9 if stage_in_work(out) == "report" and seen["report"] > finished else rng.uniform(0.0, 0.6 * whole)
        if run_until(start(place, out), moment):
            kills += 1
            seen[stage_in_work(out)] += 1
            # nothing unfinished stands under a final name
            for folder in (out / "adapter", out / "model"):
                assert not folder.exists() or (folder / "manifest.json").is_file()
            continue
        assert plain_outcome(out) == undisturbed
        finished += 1
        fresh()
    assert not run_until(start(place, out), 1e9)
    assert plain_outcome(out) == undisturbed
    left = [p for p in place.rglob("*") if p.name.endswith((".part", ".partial", ".old")) or p.name.startswith(".writable")]
    assert not left, left
    with capsys.disabled():
        cpu = time.process_time() + os.times().children_user - began
        print(f"\n{kills} kills over {finished + 1} runs, {cpu:.0f} CPU seconds; in: {dict(seen)}")
    assert finished >= 2 and len(seen) >= 5


@contextmanager
def dying_at(monkeypatch: pytest.MonkeyPatch, step: int) -> Iterator[None]:
    """Die without any clean-up at the given optimiser step (the last checkpoint is of the step before)."""
    from guidetune.engine import loop

    class Killed(BaseException):
        pass

    real, calls = loop._accumulate, []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            raise Killed
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_accumulate", dies)
        with pytest.raises(Killed):
            yield


BEFORE = ["evaluate=null", "transfer=null", "tune.params.dropout=0.1", "tune.lr=1e-3", "tune.micro_tokens=200"]


@pytest.mark.parametrize("change", ["tune.micro_tokens=40", "tune.gradient_checkpointing=true", "threads"])
def test_resuming_under_other_settings_of_memory(place: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pipeline.run(load(place / "recipe.yaml", BEFORE), place / "runs/whole")
    out = place / "runs/broken"
    with dying_at(monkeypatch, 5):
        pipeline.run(load(place / "recipe.yaml", BEFORE), out)
    assert (out / ".adapter.partial/checkpoint.safetensors").is_file()
    threads = torch.get_num_threads()
    try:
        if change == "threads":
            torch.set_num_threads(2)
        pipeline.run(load(place / "recipe.yaml", BEFORE if change == "threads" else [*BEFORE, change]), out)
    finally:
        torch.set_num_threads(threads)
    a, b = tensors(whole / "adapter"), tensors(out / "adapter")
    assert a.keys() == b.keys() and len((out / "metrics.jsonl").read_text().splitlines()) == 11  # 9 steps, 2 validations
    worst = max(float((a[name] - b[name]).abs().max()) for name in a)
    assert worst <= 1e-6, worst
