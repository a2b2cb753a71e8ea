"""Several processes give the result of one: real launches of two gloo ranks. A launch that hangs is killed and fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from guidetune.engine import distributed
from guidetune.engine.distributed import balanced
from guidetune.errors import BadInput
from tests.conftest import ROOT
from tests.engine import ranks
from tests.pipeline.conftest import write_place

ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_"))},
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
}
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
TIGHT = ["--set", "tune.micro_tokens=64", "--set", "guide.batch_tokens=100", "--set", "evaluate.batch_tokens=100"]


def start(command: list[str], place: Path, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        cwd=place,
        env={**ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, timeout: float = 150) -> tuple[int, str, str]:
    """Exit code and output; everything the launch started is killed when it takes too long."""
    try:
        out, error = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, error = process.communicate()
        pytest.fail(f"the launch hangs\n{out[-2000:]}\n{error[-4000:]}")
    return process.returncode, out, error


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert a.keys() == b.keys()
    for name in a:
        scale = max(1.0, float(b[name].abs().max()))
        assert float((a[name] - b[name]).abs().max()) <= tolerance * scale, name


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("ranks-pair"))


@pytest.fixture(scope="module")
def single(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("single")
    for variant in ("plain", "full"):
        ranks.train(variant, out / f"began-with-one-{variant}", stop_at=8)  # the last checkpoint is of step 6
    shutil.copytree(out, out / "begun")
    ranks.main(out, pair)
    return out


@pytest.fixture(scope="module", params=["data-parallel", "fsdp2", pytest.param("fsdp2-ram", marks=pytest.mark.slow)])
def double(request: pytest.FixtureRequest, single: Path, pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("double")
    shutil.copytree(single / "begun", out, dirs_exist_ok=True)
    extra = {"data-parallel": {}, "fsdp2": FSDP2, "fsdp2-ram": {**FSDP2, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}}[request.param]
    code, _, error = finish(start([*TORCHRUN, "2", "-m", "tests.engine.ranks", str(out), str(pair)], ROOT, **extra))
    assert code == 0, error[-4000:]
    assert measured(out)["size"] == 2
    assert measured(out)["sharded"] == bool(extra)
    return out


def measured(out: Path, rank: int = 0) -> dict:
    return json.loads((out / f"rank{rank}" / "measured.json").read_text())


@pytest.mark.parametrize("variant", sorted(ranks.VARIANTS))
def test_two_processes_train_what_one_trains(single: Path, double: Path, variant: str) -> None:
    first, second = (load_file(double / f"rank{r}" / f"{variant}.safetensors") for r in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    close(first, load_file(single / "rank0" / f"{variant}.safetensors"))
    a, b = measured(single)[variant], measured(double)[variant]
    assert a["tokens"] == b["tokens"] and a["steps"] == b["steps"] == 12
    for key in ("loss_first", "loss_last"):
        assert a[key] == pytest.approx(b[key], rel=1e-5)
    assert [v["step"] for v in a["validation"]] == [v["step"] for v in b["validation"]]
    # before any step; sharded layers run through transformers' modules, whole ones through our own stack
    assert a["validation"][0]["validation_loss"] == pytest.approx(b["validation"][0]["validation_loss"], rel=1e-6)
    losses = [[v["validation_loss"] for v in m["validation"]] for m in (a, b)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert [s["signal"] for s in a["signal"]] == pytest.approx([s["signal"] for s in b["signal"]], abs=1e-5)
    lines = [[json.loads(x) for x in (out / variant / "metrics.jsonl").read_text().splitlines()] for out in (single, double)]
    assert [x["step"] for x in lines[0]] == [x["step"] for x in lines[1]]  # one writer


@pytest.mark.parametrize("variant", ["plain", "full"])
def test_a_run_goes_on_with_another_number_of_processes(single: Path, double: Path, tmp_path: Path, variant: str) -> None:
    undisturbed = load_file(single / "rank0" / f"{variant}.safetensors")
    close(load_file(double / "rank0" / f"one-to-two-{variant}.safetensors"), undisturbed)
    shutil.copytree(double / f"began-with-two-{variant}", tmp_path / "work")
    close(ranks.train(variant, tmp_path / "work")[0], undisturbed)


def test_a_failure_of_one_process_is_the_failure_of_all(single: Path, double: Path) -> None:
    messages = {measured(double, rank)["failure"].removeprefix("rank 1: ") for rank in range(2)}
    assert messages == {measured(single)["failure"]}
    assert "rows: r4" in messages.pop()


def test_guidance_is_bit_equal_and_evaluation_equal_item_by_item(single: Path, double: Path) -> None:
    assert (single / "guide/log_prob.f16").read_bytes() == (double / "guide/log_prob.f16").read_bytes()
    assert measured(single)["guide"] == measured(double)["guide"] == measured(double, 1)["guide"]
    assert measured(single)["evaluate"] == measured(double)["evaluate"] == measured(double, 1)["evaluate"]
    files = sorted(p.relative_to(single) for p in (single / "evaluation").rglob("items.jsonl"))
    assert len(files) == 2
    for file in files:
        assert (single / file).read_bytes() == (double / file).read_bytes()
    assert not list(double.rglob("outputs.jsonl*")) and not list(double.rglob("*.partial"))


def test_pieces_are_dealt_evenly_and_the_same_everywhere() -> None:
    costs = np.random.default_rng(0).integers(1, 400, 97).astype(float)
    owners = balanced(costs, 8)
    load = np.bincount(owners, weights=costs, minlength=8)
    assert load.max() <= 1.05 * load.mean()
    assert owners == balanced(costs, 8)
    assert balanced([3.0], 4) == [0] and balanced([], 4) == []


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version: 2"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "not supported"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "not supported"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "nowhere.json"}, "nowhere.json"),
        ({**ZERO3, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, "offload_param_device"),
    ],
)
def test_launches_that_are_not_supported_are_refused(asked: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match=words):
        distributed._sharding()


def test_deepspeeds_stage_decides_what_is_sharded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    for name, value in ZERO3.items():
        monkeypatch.setenv(name, value)
    assert distributed._sharding().fsdp_version == 2
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
    assert distributed._sharding() is None
    assert capsys.readouterr().err.count("does not use DeepSpeed's engine") == 2


# One process fails, or is killed, at the n-th call of a function.
DRIVER = """
import importlib, os, sys
target, count, rank, what = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
module, name = target.split(":")
owner = importlib.import_module(module)
real, seen = getattr(owner, name), [0]
def wrapped(*args, **kwargs):
    seen[0] += 1
    if seen[0] == count and os.environ["RANK"] == rank:
        if what == "raise":
            raise RuntimeError("the disk is on fire")
        os.kill(os.getpid(), int(what))
    return real(*args, **kwargs)
setattr(owner, name, wrapped)
from guidetune.cli import main
main(sys.argv[5:])
"""


def disturbed(place: Path, target: str, count: int, rank: int, what: str, **environment: str) -> tuple[int, str, str]:
    (place / "driver.py").write_text(DRIVER)
    command = [*TORCHRUN, "2", "driver.py", target, str(count), str(rank), what, "run", "recipe.yaml", *TIGHT, "--out", "runs/a"]
    return finish(start(command, place, **environment))


@pytest.fixture
def place(pair: Path, tmp_path: Path) -> Path:
    shutil.copytree(pair, tmp_path / "work")
    return tmp_path / "work"


@pytest.mark.parametrize("mode", [{}, pytest.param(FSDP2, marks=pytest.mark.slow)], ids=["data-parallel", "fsdp2"])
def test_an_error_of_one_process_ends_all_and_is_named(place: Path, mode: dict[str, str]) -> None:
    code, out, error = disturbed(place, "guidetune.engine.loop:_micro_batch", 2, 1, "raise", **mode)
    assert code != 0
    assert error.count("the disk is on fire") == 1
    assert "rank 1: RuntimeError: the disk is on fire" in error
    assert not (place / "runs/a/adapter").exists()


@pytest.mark.slow
def test_a_comparison_goes_on_after_an_arm_that_failed_on_one_process(place: Path) -> None:
    (place / "driver.py").write_text(DRIVER)
    command = [*TORCHRUN, "2", "driver.py", "guidetune.engine.loop:_micro_batch", "2", "1", "raise"]
    code, out, error = finish(start([*command, "compare", "recipe.yaml", "--arms", "instruct,sft,gift", *TIGHT, "--out", "runs/a"], place))
    assert code == 1 or "exitcode  : 1" in error
    assert "arm sft failed: rank 1: RuntimeError: the disk is on fire" in error
    arms = json.loads((place / "runs/a/results.json").read_text())["arms"]
    assert {name: arm["status"] for name, arm in arms.items()} == {"instruct": "ok", "sft": "failed", "gift": "ok"}
    assert out.count("report:") == 1


AT_ONCE = """
import sys
from pathlib import Path
from guidetune import pipeline
for place in sys.argv[1:]:
    for _ in range(500):
        pipeline._check_place(Path(place))
"""


def test_two_processes_may_look_at_the_run_folder_at_once(tmp_path: Path) -> None:
    (tmp_path / "look.py").write_text(AT_ONCE)
    (tmp_path / "file").write_text("in the way")
    code, _, error = finish(start([*TORCHRUN, "2", "look.py", "runs/a", "file/a"], tmp_path))
    assert "cannot write to file/a" in error and "runs/a" not in error, error[-4000:]
    assert code != 0 and not list((tmp_path / "runs/a").iterdir())


@pytest.mark.slow
def test_killed_with_two_processes_then_finished_with_one(place: Path) -> None:
    command = [sys.executable, "-m", "guidetune", "run", "recipe.yaml", *TIGHT, "--out"]
    assert finish(start([*command, "runs/undisturbed"], place))[0] == 0
    assert disturbed(place, "guidetune.engine.loop:_micro_batch", 9, 1, str(int(signal.SIGKILL)))[0] != 0
    assert (place / "runs/a/.adapter.partial/checkpoint.safetensors").is_file()
    assert finish(start([*command, "runs/a"], place))[0] == 0
    close(*(load_file(place / f"runs/{name}/adapter/adapter_model.safetensors") for name in ("a", "undisturbed")))


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("mode", [{}, FSDP2], ids=["data-parallel", "fsdp2"])
def test_ctrl_c_and_sigterm_keep_a_checkpoint_and_end_all(place: Path, sign: signal.Signals, mode: dict[str, str]) -> None:
    endless = ["--set", "tune.epochs=3000", "--set", "tune.checkpoint_every=null"]
    launch = start([*TORCHRUN, "2", "-m", "guidetune", "run", "recipe.yaml", *TIGHT, *endless, "--out", "runs/a"], place, **mode)
    metrics = place / "runs/a/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() and launch.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    if launch.poll() is not None:  # it ended by itself: show what it said
        pytest.fail(f"ended before the first step: {finish(launch)}")
    os.kill(launch.pid, sign)  # the launcher passes it on
    code, _, error = finish(launch, 60)
    assert code != 0 and error.count("interrupted. What is finished is kept") == 1, error[-4000:]
    assert (place / "runs/a/.adapter.partial/checkpoint.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu.yaml", "fsdp2_one_node.yaml", "zero3"])
def test_a_launched_recipe_gives_the_results_of_one_process(place: Path, config: str) -> None:
    arguments = ["-m", "guidetune", "compare", "recipe.yaml", "--arms", "instruct,gift", *TIGHT, "--out"]
    assert finish(start([sys.executable, *arguments, "one/a"], place))[0] == 0
    examples = ROOT / "examples/accelerate"
    if config == "zero3":  # accelerate's own launcher starts it only where DeepSpeed is installed
        code, out, error = finish(start([*TORCHRUN, "2", *arguments, "two/a"], place, **ZERO3, ACCELERATE_USE_CPU="true"))
    else:
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(examples / config), "--num_processes", "2"]
        launcher += ["--main_process_port", "0"]
        code, out, error = finish(start([*launcher, *arguments, "two/a"], place))
    assert code == 0, error[-4000:]
    assert out.count("report:") == 1 and error.count("rows read") == 1  # rank 0 alone speaks
    close(*(load_file(place / f"{n}/a/arms/gift/adapter/adapter_model.safetensors") for n in ("two", "one")))
    same = [p.relative_to(place / "one") for p in (place / "one/a/arms/instruct").rglob("items.jsonl")]
    for file in [*same, Path("a/guidance/instruct/log_prob.f16"), Path("a/data/rows.arrow")]:
        assert (place / "one" / file).read_bytes() == (place / "two" / file).read_bytes()
    results = [json.loads((place / f"{n}/a/results.json").read_text()) for n in ("one", "two")]
    for arm in ("instruct", "gift"):
        for group in ("task", "general"):
            a, b = ({k: t["score"] for k, t in r["arms"][arm][group].items()} for r in results)
            assert a == pytest.approx(b, rel=1e-4)
    assert not list((place / "two").rglob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp_several_nodes.yaml", "fsdp2_several_nodes.yaml"])
def test_two_launchers_as_on_two_machines(place: Path, config: str) -> None:
    arguments = ["-m", "guidetune", "run", "recipe.yaml", *TIGHT, "--out"]
    assert finish(start([sys.executable, *arguments, "one/a"], place))[0] == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "examples/accelerate" / config)]
    launcher += ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port, "--machine_rank"]
    machines = [start([*launcher, str(number), *arguments, "two/a"], place) for number in range(2)]
    for number, (code, out, error) in enumerate([finish(machine) for machine in machines]):
        assert code == 0, error[-4000:]
        assert out.count("report:") == (1 if number == 0 else 0)
    close(*(load_file(place / f"{n}/a/adapter/adapter_model.safetensors") for n in ("two", "one")))


def test_a_verb_without_shared_work_runs_once(place: Path) -> None:
    code, out, error = finish(start([*TORCHRUN, "2", "-m", "guidetune", "methods", "gift"], place))
    assert code == 0, error
    assert out.count("paper") == 1 or out.count("gift (token_weights)") == 1


@pytest.mark.parametrize("config", sorted(p.name for p in (ROOT / "examples/accelerate").glob("*.yaml")))
def test_the_shipped_configs_are_accelerates_own(config: str) -> None:
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    loaded = load_config_from_file(str(ROOT / "examples/accelerate" / config))
    assert isinstance(loaded, ClusterConfig)
    assert loaded.num_processes >= 2
    kind = loaded.distributed_type.value
    assert (kind == "FSDP") == bool(loaded.fsdp_config) and (kind == "DEEPSPEED") == bool(loaded.deepspeed_config)
    if loaded.fsdp_config:
        assert loaded.fsdp_config["fsdp_version"] == 2
