"""Training speed and memory of guidetune beside TRL, transformers.Trainer and guidance done the naive way, on one CPU.

    python benchmarks/train.py [--quick] [--shapes S M] [--only trl sft …] [--data rows.jsonl] [--json FILE]

Each measurement is a process of its own (`engines.py`) with the same threads, the same rows and the same environment, in which
idle threads sleep (OMP_WAIT_POLICY=PASSIVE), for everybody. Rounds of all engines are repeated in changing order, and ratios are
taken within a round. The main figure is tokens per CPU-second times the number of threads: what that many free cores would do,
also when other work shares them. Right after each measurement the same process measures the machine's plain bf16 matrix
products; shares of the limit are of that rate. FLOPs per token: `shapes.py`. The JSON is described in README.md.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data import EXPECTED, faults
from engines import ENGINES, EPOCHS
from measure import machine, run, spread, versions
from rich.console import Console
from rich.table import Table
from shapes import SHAPES

HERE = Path(__file__).resolve().parent
QUICK = ("trl", "trainer", "naive", "sft", "gift")
FULL = ("trl", "trl_packing_1", "trainer", "naive", "naive_trl", "sft", "gift")
# guidetune's steps are several times as short: more of them, so that everybody is measured over a like time and past first kernels.
OURS, OURS_MORE = ("sft", "gift"), 3
# shape: (warm-up steps, measured steps)
STEPS = {"tiny": (1, 2), "S": (3, 8), "M": (2, 4)}
QUICK_STEPS = {"tiny": (1, 2), "S": (2, 3), "M": (1, 2)}
GUIDED = ("naive", "naive_trl")
# ratio: (figure, over figure, what is divided)
RATIOS = {
    "sft_vs_trl": ("sft", "trl", "rate"),
    "sft_vs_trainer": ("sft", "trainer", "rate"),
    "gift3_vs_naive": ("gift3", "naive", "rate"),
    "gift3_vs_sft": ("sft", "gift3", "rate"),  # time per token of gift over that of sft
    "rss_vs_trl": ("sft", "trl", "peak_rss_mb"),
}
NAMES = {name: title for name, (title, _) in ENGINES.items() if name != "gift"} | {
    "teacher": "guidetune, teacher pass alone",
    "gift1": "guidetune, GIFT: teacher pass and 1 epoch",
    "gift3": f"guidetune, GIFT: teacher pass and {EPOCHS} epochs",
}


@dataclass
class Bench:
    """What was asked for and what has been measured so far."""

    given: argparse.Namespace
    data: dict[str, Any] = field(default_factory=dict)
    measurements: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def left(self) -> float:
        """Seconds until no further measurement may start."""
        return float("inf") if self.given.minutes is None else 60 * self.given.minutes - (time.monotonic() - self.began)

    def note(self, text: str) -> None:
        _say(text)
        self.notes.append(text)

    def prepare(self, work: Path) -> None:
        for name in self.given.shapes:
            options = ["--data", str(self.given.data.resolve())] if self.given.data else []
            found = run(
                HERE / "build.py",
                ["--shape", name, "--folder", str(work / name), "--rows", str(self.given.rows), "--seed", str(self.given.seed), *options],
                self.given.threads,
                self.given.timeout,
            )
            if "error" in found:
                raise SystemExit(f"the data of shape {name} could not be made: {found['error']}")
            self.data[name] = found
            _say(f"{name}: {_describe(found)}")
            if not self.given.data and SHAPES[name].vocab >= 32_000:
                for fault in faults(found):
                    self.note(f"{name}: the generated rows are not as long as they should be: {fault}")

    def measure(self, work: Path) -> None:
        """All rounds. What cannot run is noted once and left out of the rounds that follow."""
        failed: set[tuple[str, str]] = set()
        took: dict[tuple[str, str], float] = {}
        for number in range(self.given.rounds):
            for shape, engine in _order(self.given.shapes, self.given.only, number):
                if (shape, engine) in failed:
                    continue
                if self.left() < max(took.get((shape, engine), 0.0), 1.0):
                    self.note(f"round {number + 1}: no time left for {engine} {shape}")
                    continue
                warm, steps = self.given.steps or (QUICK_STEPS if self.given.quick else STEPS)[shape]
                if engine in OURS:
                    warm, steps = warm * OURS_MORE, steps * OURS_MORE
                load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
                out = run(
                    HERE / "engines.py",
                    [engine, "--shape", shape, "--folder", str(work / shape), "--warm", str(warm), "--steps", str(steps)]
                    + ["--threads", str(self.given.threads)],
                    self.given.threads,
                    min(self.given.timeout, max(self.left(), 1.0) + 60.0),
                    self.given.lock,
                )
                took[shape, engine] = out["process_s"]
                self.measurements.append({"round": number, "shape": shape, "engine": engine, "steps": steps, "load": load, **out})
                if "error" in out:
                    failed.add((shape, engine))
                    self.note(f"{engine} {shape} failed and is left out: {out['error']}")
                else:
                    rate = self.given.threads * out["tokens"] / out["cpu_s"]
                    _say(f"round {number + 1}: {shape} {engine} {rate:,.0f} tokens per {self.given.threads} CPU-s")
                self.write()

    def results(self) -> dict[str, Any]:
        figures = [f for m in self.measurements if "error" not in m for f in expand(m, self.given.threads)]
        by_shape = {shape: ratios(figures, shape) for shape in self.given.shapes}
        shares = {f"share_of_limit_{s}": v for s in self.given.shapes if (v := _values(figures, s, "sft", "share_of_limit"))}
        spreads = {name: spread(values) for name, values in {**by_shape[self.given.shapes[0]], **shares}.items()}
        return {
            "benchmark": "train",
            "at": self.at,
            "ratios": {name: s["median"] for name, s in spreads.items()},
            "spread": spreads,
            "by_shape": {
                shape: {
                    "ratios": {name: spread(values) for name, values in by_shape[shape].items()},
                    "figures": _summary(figures, shape),
                    "matmul_limit": _limits(self.measurements, shape),
                }
                for shape in self.given.shapes
            },
            "settings": self.settings(),
            "rows": self.data,
            "versions": versions(),
            "machine": machine(),
            "notes": self.notes,
            "seconds": round(time.monotonic() - self.began, 1),
            "cpu_seconds": round(sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]), 1),
            "measurements": self.measurements,
        }

    def settings(self) -> dict[str, Any]:
        """What was asked for, without the places of this machine."""
        asked = {k: v for k, v in vars(self.given).items() if k not in ("work", "json", "lock", "data")}
        data = self.given.data.name if self.given.data else "generated"
        return {**asked, "data": data, "omp_wait_policy": "PASSIVE", "guidetune_epochs": EPOCHS}

    def write(self) -> None:
        """After every measurement, beside and renamed: a stopped run keeps what it has."""
        from guidetune.artefacts import write_json

        self.given.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.given.json, self.results())


def expand(measurement: dict[str, Any], threads: int) -> Iterator[dict[str, Any]]:
    """The figures of one measurement; that of `gift` holds three: the teacher pass, with one epoch, and with all of them."""
    shape, share = SHAPES[measurement["shape"]], measurement["supervised_share"]
    student, teacher = shape.student_flops(share), shape.teacher_flops(share)
    name, first = measurement["engine"], measurement.get("first_epoch", {})
    spells = [(name, measurement, student + (teacher / EPOCHS if name in GUIDED else 0.0))]
    if name == "gift":
        guide = measurement["teacher"]
        one = {"tokens": first["tokens"], **{k: guide[k] + first[k] for k in ("cpu_s", "wall_s")}}
        spells = [("teacher", guide, teacher), ("gift1", one, student + teacher), ("gift3", measurement, student + teacher / EPOCHS)]
    for title, spell, flops in spells:
        rate = threads * spell["tokens"] / spell["cpu_s"]
        yield {
            "round": measurement["round"],
            "shape": measurement["shape"],
            "figure": title,
            "rate": rate,
            "tokens_per_s": spell["tokens"] / spell["wall_s"],
            "gflops": rate * flops / 1e9,
            "share_of_limit": rate * flops / 1e9 / measurement["limit"]["bf16_cpu"],
            "peak_rss_mb": measurement["peak_rss_mb"],
            "real_per_slot": measurement["real_per_slot"],
        }


def ratios(figures: list[dict[str, Any]], shape: str) -> dict[str, list[float]]:
    """Every ratio of `RATIOS`, one value per round in which both sides were measured."""
    at = {(f["round"], f["figure"]): f for f in figures if f["shape"] == shape}
    rounds = sorted({number for number, _ in at})
    out = {
        name: [at[r, over][what] / at[r, under][what] for r in rounds if (r, over) in at and (r, under) in at]
        for name, (over, under, what) in RATIOS.items()
    }
    return {name: values for name, values in out.items() if values}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _order(shapes: Iterable[str], engines: list[str], number: int) -> list[tuple[str, str]]:
    """Another engine begins each round, and every second round runs backwards."""
    start = number // 2 % len(engines)
    turned = engines[start:] + engines[:start]
    return [(shape, engine) for shape in shapes for engine in (turned[::-1] if number % 2 else turned)]


def _values(figures: list[dict[str, Any]], shape: str, figure: str, what: str) -> list[float]:
    return [f[what] for f in figures if f["shape"] == shape and f["figure"] == figure]


def _summary(figures: list[dict[str, Any]], shape: str) -> dict[str, dict[str, Any]]:
    present = [name for name in NAMES if _values(figures, shape, name, "rate")]
    kinds = ("rate", "tokens_per_s", "gflops", "share_of_limit", "peak_rss_mb", "real_per_slot")
    return {name: {kind: spread(_values(figures, shape, name, kind)) for kind in kinds} for name in present}


def _limits(measurements: list[dict[str, Any]], shape: str) -> dict[str, Any]:
    found = [m["limit"] for m in measurements if m["shape"] == shape and "limit" in m]
    return {name: spread([limit[name] for limit in found]) for name in found[0]} if found else {}


def _describe(found: dict[str, Any]) -> str:
    wanted = ", ".join(f"{k} {v}" for k, v in EXPECTED.items())
    return (
        f"{found['rows']:,} rows, {found['tokens']:,} tokens, median {found['median']:.0f}, p95 {found['p95']:.0f}, "
        f"supervised {found['supervised']:.2f} (an instruction set: {wanted})"
    )


def show(results: dict[str, Any], console: Console) -> None:
    """The table of each shape and the ratios."""
    threads = results["settings"]["threads"]
    for shape, found in results["by_shape"].items():
        limit = found["matmul_limit"]
        title = f"shape {shape}, {SHAPES[shape].parameters / 1e6:.0f} M weights"
        if limit:
            bf16, fp32 = (limit[name]["median"] for name in ("bf16_cpu", "fp32_cpu"))
            title += f"; plain products {bf16:.0f} (bf16), {fp32:.0f} (fp32) GFLOP per {threads} CPU-s"
        table = Table(title=title, title_justify="left")
        table.add_column("engine")
        for column in ("n", f"tokens / {threads} CPU-s", "range", "tokens/s", "peak MB", "real/slot", "GFLOP", "of limit", "x TRL"):
            table.add_column(column, justify="right")
        trl = found["figures"].get("trl")
        for name, f in found["figures"].items():
            rate = f["rate"]
            table.add_row(
                NAMES[name],
                str(rate["n"]),
                f"{rate['median']:,.0f}",
                f"{rate['min']:,.0f}–{rate['max']:,.0f}",
                f"{f['tokens_per_s']['median']:,.0f}",
                f"{f['peak_rss_mb']['median']:,.0f}",
                f"{f['real_per_slot']['median']:.2f}",
                f"{f['gflops']['median']:,.0f}",
                f"{f['share_of_limit']['median']:.0%}",
                f"{rate['median'] / trl['rate']['median']:.1f}" if trl else "",
            )
        console.print(table)
        for name, s in found["ratios"].items():
            console.print(f"  {name}: {s['median']:.3g} ({s['min']:.3g}–{s['max']:.3g}, {s['n']} rounds)", highlight=False)
    for note in results["notes"]:
        console.print(f"note: {note}", highlight=False)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="at most 8 minutes: few steps, no packing variants")
    size.add_argument("--full", action="store_true", help="the default: more steps, more engines, five rounds")
    parser.add_argument("--shapes", nargs="+", choices=list(STEPS), default=["S", "M"])
    parser.add_argument("--only", nargs="+", choices=list(ENGINES), metavar="NAME", help=f"some of: {', '.join(ENGINES)}")
    parser.add_argument("--rounds", type=int, help="repeats of everything (quick: 2, else 5)")
    parser.add_argument("--minutes", type=float, help="start no measurement after this time (quick: 7)")
    parser.add_argument("--steps", type=int, nargs=2, metavar=("WARM", "MEASURED"), help="optimiser steps, for all shapes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", type=Path, help="real rows instead of generated ones (any shape that guidetune reads)")
    parser.add_argument("--rows", type=int, default=2000, help="rows to prepare")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="keep rows and models here for the next run")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/train.json"), help="where the results go")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds after which one measurement is given up")
    parser.add_argument("--lock", type=Path, help="hold this file's lock during each measurement")
    given = parser.parse_args(argv)
    given.only = given.only or list(QUICK if given.quick else FULL)
    given.rounds = given.rounds or (2 if given.quick else 5)
    given.minutes = given.minutes or (7.0 if given.quick else None)
    if given.steps and min(given.steps) < 1:
        parser.error("--steps: at least one warm-up step and one measured step")
    return given


def main(argv: list[str] | None = None) -> int:
    bench = Bench(arguments(argv))
    status = 0
    with tempfile.TemporaryDirectory() as temporary:
        work = bench.given.work or Path(temporary)
        try:
            bench.prepare(work)
            bench.measure(work)
        except KeyboardInterrupt:
            bench.note("stopped; what was measured is kept")
            status = 130
    bench.write()
    show(bench.results(), Console(width=None if sys.stdout.isatty() else 160))
    print(f"results: {bench.given.json}")
    return status if bench.measurements and any("error" not in m for m in bench.measurements) else status or 1


if __name__ == "__main__":
    sys.exit(main())
