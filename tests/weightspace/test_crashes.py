"""A transfer that is killed, interrupted or out of disk leaves nothing under the final name, and the same command then succeeds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from guidetune.errors import BadInput, RunFailed
from guidetune.weightspace import apply
from guidetune.weightspace.apply import transfer
from tests.models.pairs import make_adapter, make_pair

ROOT = Path(__file__).resolve().parents[2]

# Stops in the middle of the weights, for the test to strike.
SLOW = """
import sys, time
from pathlib import Path
from guidetune.weightspace.apply import transfer
from guidetune.weightspace.sources import LoraDelta

rows, calls = LoraDelta.rows, []

def slow(self, name, start, stop):
    calls.append(name)
    if len(calls) >= 9:
        Path(sys.argv[4]).touch()
        time.sleep(3)  # each: a signal is answered between two pieces
    return rows(self, name, start, stop)

LoraDelta.rows = slow
transfer(sys.argv[1], sys.argv[2], sys.argv[3], max_shard="16KB")
"""

LIMITED = """
import resource, sys
from guidetune.errors import RunFailed
from guidetune.weightspace.apply import transfer
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
try:
    transfer(sys.argv[1], sys.argv[2], sys.argv[3])
except RunFailed as error:
    print(error)
    sys.exit(1)
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("llama")
    base, instruct = make_pair(root)
    return instruct, make_adapter(base, root / "adapter")


def start(script: str, *args: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, args)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_then_run_again(llama: tuple[Path, Path], tmp_path: Path, how: signal.Signals) -> None:
    instruct, adapter = llama
    out, mark = tmp_path / "out", tmp_path / "mark"
    process = start(SLOW, adapter, instruct, out, mark)
    try:
        deadline = time.monotonic() + 100
        while not mark.exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-2000:]
            time.sleep(0.05)
        process.send_signal(how)
        process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode != 0
    assert not out.exists() and any((tmp_path / ".out.partial").glob("*.safetensors"))
    result = transfer(adapter, instruct, out, max_shard="16KB")
    assert not result.reused and not (tmp_path / ".out.partial").exists()
    transfer(adapter, instruct, tmp_path / "clean", max_shard="16KB")
    for file in (tmp_path / "clean").glob("*.safetensors"):
        assert file.read_bytes() == (out / file.name).read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
def test_file_size_limit(llama: tuple[Path, Path], tmp_path: Path) -> None:
    instruct, adapter = llama
    process = start(LIMITED, adapter, instruct, tmp_path / "out")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 1, stderr[-2000:]
    assert "largest size allowed" in stdout
    assert not (tmp_path / "out").exists() and not list((tmp_path / ".out.partial").glob("*.safetensors"))
    transfer(adapter, instruct, tmp_path / "out")


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of 160 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(place)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a small file system here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_full_disk(llama: tuple[Path, Path], tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    instruct, adapter = llama
    with pytest.raises(BadInput, match="GB free; make room"):
        transfer(adapter, instruct, small_disk / "out")
    assert not list(small_disk.iterdir())
    # Another program fills the disk after the check, while the weights are written.
    (small_disk / "other").write_bytes(b"x" * 90_000)
    monkeypatch.setattr(apply, "_check_space", lambda out, total: None)
    with pytest.raises(RunFailed, match="disk filled up.*make room and run again"):
        transfer(adapter, instruct, small_disk / "out", max_shard="20KB")
    assert not (small_disk / "out").exists() and not list(small_disk.rglob("*.safetensors"))
    (small_disk / "other").unlink()
    transfer(adapter, instruct, small_disk / "out", max_shard="20KB")
    assert (small_disk / "out" / "transfer.json").is_file()


def test_full_disk_while_adapters_and_deltas_are_written(llama: tuple[Path, Path], tmp_path: Path, small_disk: Path) -> None:
    from guidetune.weightspace.adapters import extract
    from guidetune.weightspace.plan import MergePlan, merge

    instruct, adapter = llama
    base = instruct.parent / "base"
    (small_disk / "other").write_bytes(b"x" * 130_000)
    sources = [{"adapter": str(adapter)}]
    for write in (
        lambda: extract(instruct, base, small_disk / "out", rank=30),
        lambda: merge(MergePlan.model_validate({"anchor": str(base), "sources": sources, "write": "adapter"}), small_disk / "out"),
        lambda: merge(MergePlan.model_validate({"anchor": str(base), "sources": sources, "write": "delta"}), small_disk / "out"),
    ):
        with pytest.raises(RunFailed, match="disk filled up.*make room and run again"):
            write()
        assert not (small_disk / "out").exists() and not list(small_disk.rglob("*.safetensors"))


def test_a_target_changed_on_disk_is_noticed(llama: tuple[Path, Path], tmp_path: Path) -> None:
    """The check of the written weights reads the file again."""
    instruct, adapter = llama
    from guidetune.models.checkpoint import Checkpoint
    from guidetune.weightspace.sources import LoraDelta
    from guidetune.weightspace.verify import _weights

    transfer(adapter, instruct, tmp_path / "out", verify="none")
    file = tmp_path / "out" / "model.safetensors"
    clean = file.read_bytes()
    for name in ("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"):
        with Checkpoint(tmp_path / "out") as written:
            place = written.tensors[name].start
        file.write_bytes(clean[:place] + bytes([clean[place] ^ 1]) + clean[place + 1 :])
        with Checkpoint(tmp_path / "out") as written, Checkpoint(instruct) as target:
            plan = apply.make_plan(LoraDelta(adapter), target, 1.0, "auto", "nearest", 0)
            with pytest.raises(RunFailed, match=name):
                _weights(plan, written)
    file.write_bytes(clean)
    assert torch.isfinite(load_file(file)["model.norm.weight"]).all()
