"""Arms in processes of their own: equal results, deaths, interruption."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from guidetune import pipeline
from guidetune.artefacts import read_json
from guidetune.comparison import jobs
from guidetune.errors import RunFailed
from guidetune.recipe import load
from tests.pipeline.conftest import _pair, place  # noqa: F401
from tests.pipeline.test_pipeline import equal, results, tensors

ARMS = ["instruct", "sft", "gift"]
LASTING = {"seconds", "guide_s", "tune_s", "transfer_s", "evaluate_s", "evaluate_wall_s", "peak_rss_mb", "created", "name", "scales_s"}


def lasting(found):
    """Results without what differs from run to run: times and memory."""
    if isinstance(found, dict):
        return {key: lasting(value) for key, value in found.items() if key not in LASTING}
    return [lasting(value) for value in found] if isinstance(found, list) else found


def workers(of: int) -> dict[str, psutil.Process]:
    """Living workers of a process, by the arm that they do."""
    found = {}
    for child in psutil.Process(of).children():
        try:
            command = child.cmdline()
            if "guidetune.comparison.jobs" in command:
                found[read_json(Path(command[-1]) / "order.json").get("arm", "")] = child
        except (psutil.Error, OSError, ValueError):
            continue
    return found


def test_a_worker_that_dies_or_fails_is_one_failed_order(tmp_path: Path) -> None:
    """The two orders cannot be done; one worker is killed before it finds out."""
    orders = [jobs.Order(name, {"arm": name}, name) for name in ("killed", "senseless")]
    killer = threading.Thread(target=kill_first, args=("killed",))
    killer.start()
    found = jobs.run(orders, 1, 1, tmp_path)
    killer.join()
    assert found["killed"].entry is None and "SIGKILL" in found["killed"].error and "fewer --jobs" in found["killed"].error
    assert found["senseless"].entry is None and "ended with code 1 and no result: KeyError" in found["senseless"].error
    assert not (tmp_path / jobs.FOLDER).exists()


def kill_first(arm: str) -> None:
    while arm not in (living := workers(os.getpid())):
        time.sleep(0.005)
    living[arm].send_signal(signal.SIGKILL)


@pytest.mark.slow
def test_arms_side_by_side_give_what_one_after_the_other_gives(place: Path, capfd: pytest.CaptureFixture) -> None:  # noqa: F811
    """One of them is killed; the others' results are those of a plain run, and the same command mends the rest."""
    import torch

    quick = ["tune.max_steps=3"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        plain = pipeline.compare(load(place / "recipe.yaml", quick), ARMS, place / "plain/a", seeds=2)
    finally:
        torch.set_num_threads(threads)
    killer = threading.Thread(target=kill_first, args=("gift",))
    killer.start()
    with pytest.raises(RunFailed, match="arm gift failed: its process was ended by SIGKILL"):
        pipeline.compare(load(place / "recipe.yaml", quick), ARMS, place / "apart/a", seeds=2, jobs=2)
    killer.join()
    one, other = (lasting(results(folder)["arms"]["sft"]) for folder in (plain, place / "apart/a"))
    for entry in (one, other):  # the correction is over the arms that there are
        entry.pop("over_seeds")
        for result in [*entry["task"].values(), *entry["general"].values(), *entry["seeds"][0]["task"].values()]:
            result.pop("vs_instruct")
        entry["seeds"][0].pop("general")
    assert one == other
    assert equal(tensors(plain / "arms/sft/adapter"), tensors(place / "apart/a/arms/sft/adapter"))
    said = capfd.readouterr().err
    assert "[sft] arm sft: plain tuning" in said and "[sft (seed 43)] arm sft, seed 43" in said
    pipeline.compare(load(place / "recipe.yaml", quick), ARMS, place / "apart/a", seeds=2, jobs=2)
    one, other = (lasting(results(folder)) for folder in (plain, place / "apart/a"))
    for found in (one, other):
        found["guidance"].pop("seconds", None)
    assert one == other
    assert equal(tensors(plain / "arms/gift/seeds/1/adapter"), tensors(place / "apart/a/arms/gift/seeds/1/adapter"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["interrupt", "kill"])
def test_nothing_is_left_running(place: Path, how: str) -> None:  # noqa: F811
    """Ctrl-C ends all arms with exit code 130; the workers of a killed command end by themselves."""
    command = [sys.executable, "-m", "guidetune", "compare", str(place / "recipe.yaml"), "--arms", "sft,gift", "--jobs", "2"]
    command += ["--set", "tune.epochs=3000", "--out", str(place / "runs/c")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "2"}
    parent = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        tuning = [place / f"runs/c/arms/{arm}/.adapter.partial/checkpoint.safetensors" for arm in ("sft", "gift")]
        while len(living := workers(parent.pid)) < 2 or not all(path.is_file() for path in tuning):
            assert parent.poll() is None, parent.stderr.read() if parent.stderr else ""
            time.sleep(0.05)
        assert {child.environ()["OMP_NUM_THREADS"] for child in living.values()} == {"1"}  # two threads, shared by two
        parent.send_signal(signal.SIGINT if how == "interrupt" else signal.SIGKILL)
        code = parent.wait(timeout=60)
        assert code == (130 if how == "interrupt" else -signal.SIGKILL)
        _, alive = psutil.wait_procs(list(living.values()), timeout=60)
        assert not alive
        assert all(path.is_file() for path in tuning)  # what the same command goes on from
    finally:
        for process in [*living.values(), psutil.Process(parent.pid) if parent.poll() is None else None]:
            if process is not None and process.is_running():
                process.kill()


def test_memory_decides_how_many_at_a_time(place: Path, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    from guidetune.recipe import arms

    recipe = load(place / "recipe.yaml", ["evaluate=null", "max_memory=64GB"])
    made = arms(recipe, ["sft", "graft", "gift"])
    job = pipeline._Job(recipe, place / "runs/m", "compare")
    assert job._room(made, 8) == (3, (64 * 10**9 // 3, True))
    need = job._tune_settings(made["sft"])[1]["bytes"]
    job._limit = (int(2.2 * need), True)
    assert job._room(made, 8)[0] == 2
    assert "memory: 2 arms at a time instead of 3" in capsys.readouterr().err
    job._limit = (int(1.5 * need), False)
    assert job._room(made, 8) == (1, (int(1.5 * need), False))
