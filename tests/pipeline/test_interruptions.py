"""`kill -9` and Ctrl-C in every stage, then the same command: the result is that of an undisturbed run, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# Runs the real command in a real process, which sends itself the signal at the n-th call of a function.
DRIVER = """
import importlib, os, sys
target, count, sign = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
module, name = target.split(":")
owner = importlib.import_module(module)
*path, name = name.split(".")
for part in path:
    owner = getattr(owner, part)
real, seen = getattr(owner, name), [0]
def wrapped(*args, **kwargs):
    seen[0] += 1
    if seen[0] == count:
        os.kill(os.getpid(), sign)
    return real(*args, **kwargs)
setattr(owner, name, wrapped)
from guidetune.cli import main
main(sys.argv[4:])
"""
COMMAND = ["compare", "recipe.yaml", "--arms", "instruct,gift", "--out", "runs/a"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def interrupted(place: Path, target: str, count: int, sign: int) -> subprocess.CompletedProcess:
    arguments = [sys.executable, "-c", DRIVER, target, str(count), str(int(sign)), *COMMAND]
    return subprocess.run(arguments, cwd=place, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def plain(place: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "guidetune", *COMMAND], cwd=place, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


def outcome(place: Path) -> dict:
    """What must be the same: weights, scores, losses, ledger; not the times."""
    run = place / "runs/a"
    results = json.loads((run / "results.json").read_text())
    arms = {}
    for name, arm in results["arms"].items():
        scores = {g: {k: (t["score"], t["ci"], t["n"]) for k, t in arm[g].items()} for g in ("task", "general")}
        arms[name] = [scores, arm.get("tune", {}).get("loss_last"), arm.get("tune", {}).get("tokens"), arm.get("signal")]
    files = {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.rglob("*.safetensors"))}
    losses = [json.loads(line).get("loss") for line in (run / "arms/gift/metrics.jsonl").read_text().splitlines()]
    return {"arms": arms, "files": files, "losses": losses, "ledger": results["ledger"], "guidance": results["guidance"]["mean_confidence"]}


def plain_outcome(run: Path) -> dict:
    """`outcome` of a single run's folder."""
    results = json.loads((run / "results.json").read_text())
    scores = {
        name: {g: {k: (t["score"], t["ci"], t["n"]) for k, t in arm[g].items()} for g in ("task", "general")}
        for name, arm in results["arms"].items()
    }
    files = {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.rglob("*.safetensors"))}
    files |= {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.rglob("*.f16"))}
    losses = [json.loads(line).get("loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {"scores": scores, "files": files, "losses": losses, "ledger": results["ledger"], "tune": results["arms"]["gift"]["signal"]}


@pytest.fixture(scope="module")
def undisturbed(_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    place = tmp_path_factory.mktemp("undisturbed") / "work"
    shutil.copytree(_pair, place)
    done = plain(place)
    assert done.returncode == 0, done.stderr
    return outcome(place)


CASES = [
    ("prepare", "guidetune.data.rows:RowWriter.write_many", 1),
    ("guide", "guidetune.engine.forward:head_nll", 1),
    ("tune", "guidetune.engine.loop:_accumulate", 6),
    ("tune-checkpoint", "guidetune.engine.checkpoint:SafetensorsWriter.write", 40),
    ("transfer", "guidetune.weightspace.apply:_write_update", 5),
    ("evaluate", "guidetune.evaluation.generation:_Decoder._advance", 5),
    ("publish-adapter", "guidetune.artefacts:publish", 5),
    ("report", "guidetune.report:write", 1),
]


def check(place: Path, undisturbed: dict, target: str, count: int, sign: int, code: int) -> None:
    broken = interrupted(place, target, count, sign)
    assert broken.returncode == code, f"{target} was not reached: {broken.stderr[-2000:]}"
    run = place / "runs/a"
    # nothing unfinished stands under a final name
    for folder in [*run.rglob("adapter"), *run.rglob("model")]:
        assert (folder / "manifest.json").is_file() and json.loads((folder / "manifest.json").read_text())["fingerprint"]
    again = plain(place)
    assert again.returncode == 0, again.stderr
    assert outcome(place) == undisturbed
    left = [p for p in run.rglob("*.partial")]
    assert not left, left


def test_kill_in_tune_continues_bit_equal(place: Path, undisturbed: dict) -> None:
    check(place, undisturbed, "guidetune.engine.loop:_accumulate", 5, signal.SIGKILL, -signal.SIGKILL)


def test_ctrl_c_in_tune_says_how_to_continue(place: Path, undisturbed: dict) -> None:
    broken = interrupted(place, "guidetune.engine.loop:_accumulate", 5, signal.SIGINT)
    assert broken.returncode == 130
    assert "same command" in broken.stderr and "Traceback" not in broken.stderr
    assert plain(place).returncode == 0
    assert outcome(place) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "target", "count"), CASES, ids=[c[0] for c in CASES])
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl-c"])
def test_interrupted_in_every_stage(place: Path, undisturbed: dict, stage: str, target: str, count: int, sign: int) -> None:
    check(place, undisturbed, target, count, sign, -signal.SIGKILL if sign == signal.SIGKILL else 130)
