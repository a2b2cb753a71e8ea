"""Training speed and memory of guidetune beside TRL on one GPU: Llama shapes of 1 and 8 billion weights.

    python benchmarks/gpu.py [--shapes 1b 8b] [--only sft trl …] [--json FILE]
    python benchmarks/gpu.py --tiny --device cpu          the whole script with a tiny shape, to see that it works

The weights are random and made on the device, in bf16; rows as in `train.py`. One process per shape and engine; the clock waits
for the device. Model FLOPs utilisation is the useful work of `shapes.py` over the rate of plain bf16 matrix products, measured
in the same process. TRL runs in several settings, because which one is best depends on memory and on whether flash attention
is installed; a setting that cannot run is reported with its reason.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from engines import EPOCHS, Job, guidetune_gift, guidetune_sft, measured, trl_sft
from measure import machine, matmul_limit, run, spread, versions
from rich.console import Console
from rich.table import Table
from shapes import SHAPES

from guidetune.errors import BadInput

FLASH = "flash_attention_2"
PACK = 4096
MICRO_ROWS = 8  # rows of a TRL micro-batch; the rest of the optimiser batch is accumulated


def trl_padded(job: Job) -> dict[str, Any]:
    """Padded batches without checkpointing: TRL's fastest setting that needs no further package, where it fits."""
    rows = min(MICRO_ROWS, job.batch)
    return trl_sft(
        job,
        bf16=True,
        gradient_checkpointing=False,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=max(1, job.batch // rows),
    )


def trl_packed(job: Job, checkpointing: bool) -> dict[str, Any]:
    """Packed, padding-free, one optimiser step of about as many tokens as the other engines' batches.

    Raises:
        BadInput: flash attention is not installed; packed rows would need a dense mask.
    """
    if find_spec("flash_attn") is None:
        raise BadInput("flash-attn is not installed: packed rows would be masked densely, which nobody should use")
    job.attention = FLASH
    tokens = job.batch * float(job.rows.lengths.mean())
    packs = max(1, round(tokens / PACK))
    return trl_sft(
        job,
        bf16=True,
        packing=True,
        max_length=PACK,
        gradient_checkpointing=checkpointing,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=packs,
    )


ENGINES: dict[str, tuple[str, Callable[[Job], dict[str, Any]]]] = {
    "sft": ("guidetune, plain fine-tuning", guidetune_sft),
    "gift": (f"guidetune, GIFT: teacher pass and {EPOCHS} epochs", guidetune_gift),
    "trl": ("TRL SFTTrainer, its defaults, bf16", partial(trl_sft, bf16=True)),
    "trl_padded": ("TRL, no checkpointing", trl_padded),
    "trl_packed": ("TRL, packing, flash attention, no checkpointing", partial(trl_packed, checkpointing=False)),
    "trl_packed_checkpointing": ("TRL, packing, flash attention", partial(trl_packed, checkpointing=True)),
}


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """In the measuring process: one engine on one shape."""
    import torch

    cuda = given.device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        raise BadInput(f"no GPU is usable here for --device {given.device}")
    with tempfile.TemporaryDirectory() as scratch:
        job = Job(
            SHAPES[given.shapes[0]],
            given.work,
            Path(scratch),
            *given.steps,
            device=given.device,
            random=True,
            options={"micro_tokens": given.micro_tokens},
        )
        out = measured(ENGINES[given.measure][1], job, given.threads)
    if cuda:
        out["peak_allocated_mb"] = round(torch.cuda.max_memory_allocated() / 1024**2)
        out["peak_reserved_mb"] = round(torch.cuda.max_memory_reserved() / 1024**2)
        out["device"] = torch.cuda.get_device_name()
    limit = matmul_limit(given.threads, device=given.device)["bf16_wall"]
    shape, share = job.shape, out["supervised_share"]
    flops = shape.student_flops(share) + (shape.teacher_flops(share) / EPOCHS if given.measure == "gift" else 0.0)
    rate = out["tokens"] / out["wall_s"]
    return {
        **out,
        "tokens_per_s": round(rate, 1),
        "tflops": round(rate * flops / 1e12, 4),
        "limit_tflops": round(limit / 1e3, 4),
        "mfu": round(rate * flops / 1e9 / limit, 4),
    }


def summary(measurements: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per shape and engine, over the rounds: tokens/s, MFU, memory; and our rate over TRL's fastest setting of the same round."""
    good = [m for m in measurements if "error" not in m]
    out: dict[str, dict[str, Any]] = {}
    for shape in dict.fromkeys(m["shape"] for m in good):
        mine = [m for m in good if m["shape"] == shape]
        out[shape] = {
            engine: {
                kind: spread([m[kind] for m in mine if m["engine"] == engine])
                for kind in ("tokens_per_s", "mfu", "tflops", "limit_tflops", "peak_rss_mb", "peak_allocated_mb")
                if all(kind in m for m in mine if m["engine"] == engine)
            }
            for engine in dict.fromkeys(m["engine"] for m in mine)
        }
        ratios = []
        for number in dict.fromkeys(m["round"] for m in mine):
            rates = {m["engine"]: m["tokens_per_s"] for m in mine if m["round"] == number}
            trl = [rate for engine, rate in rates.items() if engine.startswith("trl")]
            if trl and "sft" in rates:
                ratios.append(rates["sft"] / max(trl))
        if ratios:
            out[shape]["sft_vs_best_trl"] = spread(ratios)
    return out


def show(results: dict[str, Any], console: Console) -> None:
    table = Table(title=f"training on {results['device']}", title_justify="left")
    for column in ("shape", "engine", "tokens/s", "TFLOP/s", "MFU", "peak MB"):
        table.add_column(column, justify="left" if column in ("shape", "engine") else "right")
    for shape, engines in results["summary"].items():
        for engine, f in engines.items():
            if engine in ENGINES:
                memory = f.get("peak_allocated_mb", f["peak_rss_mb"])
                table.add_row(
                    shape,
                    ENGINES[engine][0],
                    f"{f['tokens_per_s']['median']:,.0f}",
                    f"{f['tflops']['median']:.3g}",
                    f"{f['mfu']['median']:.1%}",
                    f"{memory['median']:,.0f}",
                )
    console.print(table)
    for m in results["measurements"]:
        if "error" in m:
            console.print(f"  {m['shape']} {m['engine']}: {m['error']}", highlight=False)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["1b", "8b"])
    parser.add_argument("--tiny", action="store_true", help="the tiny shape only")
    parser.add_argument("--only", nargs="+", choices=list(ENGINES), default=list(ENGINES), metavar="NAME", help=", ".join(ENGINES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs=2, metavar=("WARM", "MEASURED"), default=[3, 8])
    parser.add_argument("--micro-tokens", type=int, default=8192, help="tokens of guidetune's micro-batches")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=1200.0)
    parser.add_argument("--work", type=Path, help="keep the rows here for the next run")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/gpu.json"))
    parser.add_argument("--measure", choices=list(ENGINES), help=argparse.SUPPRESS)  # a measuring process
    given = parser.parse_args(argv)
    if given.tiny:
        given.shapes = ["tiny"]
    return given


def compare(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All shapes, engines and rounds; the results are written after each measurement."""
    from guidetune.artefacts import write_json

    asked = {k: v for k, v in vars(given).items() if k not in ("work", "json", "measure")}
    results: dict[str, Any] = {"benchmark": "gpu", "at": datetime.now(UTC).isoformat(timespec="seconds"), "device": given.device}
    results |= {"settings": asked, "versions": versions(), "machine": machine(), "rows": {}, "summary": {}, "measurements": []}
    given.json.parent.mkdir(parents=True, exist_ok=True)
    threads, failed = given.threads, set()
    for shape in given.shapes:
        options = ["--shape", shape, "--folder", str(work / shape), "--rows", str(given.rows), "--seed", str(given.seed), "--rows-only"]
        results["rows"][shape] = run(Path(__file__).with_name("build.py"), options, threads, given.timeout)
    for number in range(given.rounds):
        for shape in given.shapes:
            for engine in given.only[::-1] if number % 2 else given.only:
                if (shape, engine) in failed:
                    continue
                options = ["--measure", engine, "--shapes", shape, "--work", str(work / shape), "--device", given.device]
                options += ["--steps", *map(str, given.steps), "--micro-tokens", str(given.micro_tokens), "--threads", str(threads)]
                out = run(Path(__file__), options, threads, given.timeout)
                if "error" in out:
                    failed.add((shape, engine))
                results["device"] = out.get("device", results["device"])
                results["measurements"].append({"round": number, "shape": shape, "engine": engine, **out})
                results["summary"] = summary(results["measurements"])
                write_json(given.json, results)
                print(f"round {number + 1}: {shape} {engine} {out.get('error') or out['tokens_per_s']}", file=sys.stderr, flush=True)
    return results


def main(argv: list[str] | None = None) -> int:
    given = arguments(argv)
    if given.measure:
        try:
            print(json.dumps(measure(given)))
        except (BadInput, ImportError) as error:
            print(json.dumps({"error": str(error)}))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        results = compare(given, given.work or Path(temporary))
    show(results, Console(width=None if sys.stdout.isatty() else 140))
    print(f"results: {given.json}")
    return 0 if any("error" not in m for m in results["measurements"]) else 1


if __name__ == "__main__":
    sys.exit(main())
