"""Merging beside mergekit: CPU time, wall time, memory, bytes per second and the difference of the results.

    python benchmarks/merge.py --quick --json FILE

Two fine-tunes and their base (Llama shape, random weights, bf16, in shards) are written once. Then every tool merges them in a process
of its own: task arithmetic, linear, TIES, DARE-TIES and Breadcrumbs, with the same meaning of the options in both (docs/merge.md).
Beside them `cp` of one model and a bare loop that reads three models, adds and writes: the least that a merge can take.
CPU seconds are given as they are and net of what the command takes to start (its imports); `ratios` are of the net ones.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import yaml
from measure import environment, machine, versions

SHAPES = {  # hidden, layers, intermediate, vocabulary
    "0.5B": (1024, 24, 4096, 65_536),
    "tiny": (64, 2, 128, 512),
}
WEIGHT, DENSITY, GAMMA = 0.5, 0.3, 0.01
# name: (mergekit's method, its options for each model, our method)
METHODS: dict[str, tuple[str, dict[str, float], Any]] = {
    "task_arithmetic": ("task_arithmetic", {"weight": WEIGHT}, "task_arithmetic"),
    "linear": ("linear", {"weight": WEIGHT}, "linear"),
    "ties": ("ties", {"weight": WEIGHT, "density": DENSITY}, {"method": "ties", "density": DENSITY, "scope": "tensor", "tie": "plus"}),
    "dare_ties": (
        "dare_ties", {"weight": WEIGHT, "density": DENSITY}, {"method": "dare", "density": DENSITY, "sign": "elect", "agg": "sum"},
    ),
    "breadcrumbs": (
        "breadcrumbs", {"weight": WEIGHT, "density": DENSITY, "gamma": GAMMA},
        {"method": "breadcrumbs", "keep": DENSITY, "drop_top": GAMMA, "scope": "tensor", "order": "fit", "scale": 1.0},
    ),
    # what users get by default here: the share of the whole update
    "ties_global": ("", {}, {"method": "ties", "density": DENSITY}),
}  # fmt: skip
QUICK = ("task_arithmetic", "ties", "dare_ties", "breadcrumbs")
RANDOM = {"dare_ties"}  # other random numbers, so other results

LOOP = """
import sys, torch
from pathlib import Path
from safetensors import safe_open
from safetensors.torch import save_file
torch.set_num_threads(int(sys.argv[5]))
base, a, b, out = (Path(x) for x in sys.argv[1:5])
out.mkdir()
for file in sorted(base.glob("*.safetensors")):
    with safe_open(file, "pt") as w, safe_open(a / file.name, "pt") as x, safe_open(b / file.name, "pt") as y:
        done = {}
        for name in w.keys():
            t = w.get_tensor(name).float()
            done[name] = (t + 0.5 * (x.get_tensor(name).float() - t) + 0.5 * (y.get_tensor(name).float() - t)).bfloat16()
    save_file(done, out / file.name)
"""


def build(folder: Path, shape: str) -> list[Path]:
    """base, a, b: model folders with random weights in shards."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, intermediate, vocabulary = SHAPES[shape]
    places = [folder / name for name in ("base", "a", "b")]
    if all((place / "done").is_file() for place in places):
        return places
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    limit = max(1, sum(s.numel() for s in shapes.values()) * 2 // 5)
    for place in places:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        config.save_pretrained(place)
    shards: list[list[str]] = [[]]
    room = limit
    for name, size in shapes.items():
        if room < size.numel() * 2 and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size.numel() * 2
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, members in zip(names, shards, strict=True):
        tensors: list[dict[str, Any]] = [{}, {}, {}]
        for name in members:
            draw = torch.Generator().manual_seed(hash_of(name))
            w = torch.randn(shapes[name], generator=draw) * 0.02
            tensors[0][name] = w.bfloat16()
            for k in (1, 2):
                tensors[k][name] = (w + 0.001 * torch.randn(shapes[name], generator=draw)).bfloat16()
        for place, part in zip(places, tensors, strict=True):
            save_file(part, place / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, members in zip(names, shards, strict=True) for name in members}}
    for place in places:
        (place / "model.safetensors.index.json").write_text(json.dumps(index))
        (place / "done").touch()
    return places


def hash_of(name: str) -> int:
    import zlib

    return zlib.crc32(name.encode())


class Watch(threading.Thread):
    """Largest resident and anonymous memory of a process and its children, looked at fifty times a second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.rss, self.anonymous, self.over = pid, 0, 0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.02):
            rss = anonymous = 0
            for pid in self._tree(self.pid):
                try:
                    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
                except OSError:
                    continue
                found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "RssAnon"))}
                rss += int(found.get("VmRSS", 0))
                anonymous += int(found.get("RssAnon", 0))
            self.rss, self.anonymous = max(self.rss, rss), max(self.anonymous, anonymous)

    def _tree(self, pid: int) -> list[int]:
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
        except OSError:
            children = []
        return [pid, *(p for child in children for p in self._tree(int(child)))]


def measured(command: list[str], threads: int, timeout: float) -> dict[str, Any]:
    """CPU and wall seconds and memory of a command."""
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        process = subprocess.Popen(command, env=environment(threads), stdout=log, stderr=subprocess.STDOUT)
        watch = Watch(process.pid)
        watch.start()
        timer = threading.Timer(timeout, process.kill)
        timer.start()
        _, status, used = os.wait4(process.pid, 0)
        timer.cancel()
        watch.over.set()
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - began
        if process.returncode:
            log.seek(0)
            return {"error": log.read().decode("utf-8", "replace")[-400:].strip() or f"exit {process.returncode}"}
    return {
        "cpu_s": round(used.ru_utime + used.ru_stime, 2),
        "user_s": round(used.ru_utime, 2),
        "wall_s": round(wall, 2),
        "peak_rss_mb": watch.rss // 1024,
        "peak_anonymous_mb": watch.anonymous // 1024,
    }


def difference(a: Path, b: Path) -> dict[str, float]:
    """Largest difference between two models, and the share of values that are not the same."""
    from safetensors import safe_open

    worst, unequal, count = 0.0, 0, 0
    where = {}
    for file in sorted(b.glob("*.safetensors")):
        with safe_open(file, "pt") as part:
            where.update(dict.fromkeys(part.keys(), file))
    for file in sorted(a.glob("*.safetensors")):
        with safe_open(file, "pt") as one:
            for name in one.keys():  # noqa: SIM118 (not a dict)
                with safe_open(where[name], "pt") as other:
                    x, y = one.get_tensor(name), other.get_tensor(name)
                apart = x != y
                unequal += int(apart.sum())
                count += x.numel()
                if bool(apart.any()):
                    worst = max(worst, float((x.float() - y.float()).abs().max()))
    return {"largest": worst, "share_unequal": unequal / max(count, 1)}


def plans(folder: Path, models: list[Path], name: str) -> tuple[Path, Path]:
    """mergekit's plan and ours."""
    theirs, each, ours = METHODS[name]
    base, *tuned = models
    mergekit: dict[str, Any] = {"merge_method": theirs, "dtype": "float32", "out_dtype": "bfloat16"}
    mergekit["models"] = [{"model": str(m), "parameters": each} for m in tuned]
    if theirs != "linear":
        mergekit["base_model"] = str(base)
    own = {"anchor": str(base), "sources": [{"model": str(m), "weight": each.get("weight", WEIGHT)} for m in tuned], "method": ours}
    places = folder / f"{name}.mergekit.yaml", folder / f"{name}.yaml"
    for place, plan in zip(places, (mergekit, own), strict=True):
        place.write_text(yaml.safe_dump(plan))
    return places


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, four methods; at most 6 minutes")
    parser.add_argument("--shape", choices=list(SHAPES), default="0.5B")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS))
    parser.add_argument("--rounds", type=int, help="quick: 1, else 3")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mergekit", default="mergekit-yaml", help="mergekit's command")
    parser.add_argument("--work", type=Path, help="keep the models here for the next run")
    parser.add_argument("--timeout", type=float, default=900.0)
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/merge.json"))
    given = parser.parse_args()
    methods = given.methods or (list(QUICK) if given.quick else list(METHODS))
    rounds = given.rounds or (1 if given.quick else 3)
    theirs = shutil.which(given.mergekit)
    guidetune = [sys.executable, "-m", "guidetune"]
    with tempfile.TemporaryDirectory(dir=given.work) as scratch:
        models = build(given.work or Path(scratch), given.shape)
        size = sum(f.stat().st_size for f in models[0].glob("*.safetensors"))
        print(
            f"{given.shape}: {size / 1e9:.2f} GB a model; " + (f"mergekit: {theirs}" if theirs else "mergekit is not installed"), flush=True
        )
        rows: list[dict[str, Any]] = []

        def add(tool: str, method: str, command: list[str], **more: Any) -> dict[str, Any]:
            found = {"tool": tool, "method": method, **measured(command, given.threads, given.timeout), **more}
            rows.append(found)
            shown = found.get("error") or f"{found['cpu_s']:.1f} CPU-s, {found['wall_s']:.1f} s, {found['peak_anonymous_mb']} MB anonymous"
            print(f"{tool} {method}: {shown}", flush=True)
            given.json.parent.mkdir(parents=True, exist_ok=True)
            given.json.write_text(json.dumps(summary(rows, size, given), indent=1))
            return found

        for number in range(rounds):
            out = Path(scratch) / "out"
            # what a command takes before it touches a weight: its imports
            if theirs:
                add("mergekit", "start", [str(Path(theirs).parent / "python"), "-c", "import mergekit.scripts.run_yaml"])
            own = "from guidetune.weightspace import plan, verify; import transformers.models.llama.modeling_llama"
            add("guidetune", "start", [sys.executable, "-c", own])
            add("cp", "copy", ["cp", "-r", str(models[0]), str(out)])
            shutil.rmtree(out)
            add("bare loop", "task_arithmetic", [sys.executable, "-c", LOOP, *map(str, models), str(out), str(given.threads)])
            shutil.rmtree(out, ignore_errors=True)
            for name in methods:
                mergekit_plan, our_plan = plans(Path(scratch), models, name)
                ours, mk = Path(scratch) / "ours", Path(scratch) / "mk"
                add("guidetune", name, [*guidetune, "merge", str(our_plan), "--out", str(ours), "--verify", "none"])
                if theirs and METHODS[name][0]:
                    add("mergekit", name, [theirs, str(mergekit_plan), str(mk), "--no-copy-tokenizer"])
                    if number == 0 and name not in RANDOM and mk.is_dir() and ours.is_dir():
                        rows[-1]["difference"] = difference(ours, mk)
                shutil.rmtree(ours, ignore_errors=True)
                shutil.rmtree(mk, ignore_errors=True)
    final = summary(rows, size, given)
    given.json.write_text(json.dumps(final, indent=1))
    print_table(final)
    print(f"results: {given.json}")


def summary(rows: list[dict[str, Any]], size: int, given: argparse.Namespace) -> dict[str, Any]:
    """Medians, net CPU seconds and the ratios."""

    def median(tool: str, method: str, key: str) -> float | None:
        found = [row[key] for row in rows if row["tool"] == tool and row["method"] == method and key in row]
        return statistics.median(found) if found else None

    starts = {tool: median(tool, "start", "cpu_s") or 0.0 for tool in ("guidetune", "mergekit")}
    starts_wall = median("guidetune", "start", "wall_s") or 0.0
    table = []
    for tool, method in dict.fromkeys((row["tool"], row["method"]) for row in rows if row["method"] != "start"):
        if (cpu := median(tool, method, "cpu_s")) is None:
            continue
        wall = median(tool, method, "wall_s")
        table.append({
            "tool": tool, "method": method, "cpu_s": cpu, "net_cpu_s": round(max(cpu - starts.get(tool, 0.0), 0.01), 2), "wall_s": wall,
            "peak_rss_mb": median(tool, method, "peak_rss_mb"), "peak_anonymous_mb": median(tool, method, "peak_anonymous_mb"),
            "mb_per_s": round((2 if tool == "cp" else 4) * size / 1e6 / wall, 1) if wall else None,
        })  # fmt: skip
    at = {(row["tool"], row["method"]): row for row in table}
    ratios: dict[str, Any] = {}
    for name in METHODS:
        ours, theirs = at.get(("guidetune", name)), at.get(("mergekit", name))
        if ours and theirs:
            ratios[f"{name}_vs_mergekit"] = round(theirs["net_cpu_s"] / ours["net_cpu_s"], 2)
            ratios[f"{name}_vs_mergekit_with_start"] = round(theirs["cpu_s"] / ours["cpu_s"], 2)
    loop, own = at.get(("bare loop", "task_arithmetic")), at.get(("guidetune", "task_arithmetic"))
    if loop and own:  # the loop's own imports take about as long as ours
        ratios["bare_loop_share"] = round(loop["wall_s"] / own["wall_s"], 2)
    ours_all = [row["peak_anonymous_mb"] for row in table if row["tool"] == "guidetune"]
    if ours_all:
        ratios["peak_anonymous_mb"] = max(ours_all)
    differences = {row["method"]: row["difference"] for row in rows if "difference" in row}
    return {
        "ratios": ratios, "table": table, "difference": differences, "start_cpu_s": starts, "start_wall_s": starts_wall,
        "bytes_of_a_model": size, "threads": given.threads, "machine": machine(), "versions": versions(), "measurements": rows,
    }  # fmt: skip


def print_table(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{found['bytes_of_a_model'] / 1e9:.2f} GB a model, {found['threads']} threads")
    for name in ("tool", "method", "CPU-s", "net", "wall s", "MB/s", "peak MB", "anonymous MB"):
        table.add_column(name, justify="left" if name in ("tool", "method") else "right")
    for row in found["table"]:
        keys = ("tool", "method", "cpu_s", "net_cpu_s", "wall_s", "mb_per_s", "peak_rss_mb", "peak_anonymous_mb")
        table.add_row(*(str(row[key]) for key in keys))
    Console(width=120).print(table)
    for name, value in found["ratios"].items():
        print(f"  {name}: {value}")


if __name__ == "__main__":
    main()
