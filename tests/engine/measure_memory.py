"""Measured against estimated memory, each case in a process of its own.

    python -m tests.engine.measure_memory            all cases, as a table
    python -m tests.engine.measure_memory CASE       one case: prints JSON (what the tests call)

Run it after a change to layers, adapters, attention or head: KEEPING, FRUGAL, SCRATCH and HEAD_SCRATCH in engine/memory.py are what it
sets. What the operations themselves hold needs no table: it is counted anew from the code that runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TINY = dict(hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=6, vocab_size=1024)
S = dict(hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4, vocab_size=32_000)
WIDE = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=9, num_key_value_heads=3, vocab_size=8_192)
LORA = {"method": "lora", "rank": 16, "alpha": 32}

# name -> (model, dtype, params or None for a teacher pass, micro_tokens, row length, gradient checkpointing)
CASES: dict[str, tuple[dict[str, int], str, Any, int, int, bool]] = {
    "tiny-lora": (TINY, "float32", LORA, 4096, 256, False),
    "S-lora": (S, "bfloat16", LORA, 2048, 256, False),
    "S-lora-recompute": (S, "bfloat16", LORA, 4096, 256, True),
    "S-lora-short": (S, "float32", LORA, 1024, 128, False),
    "S-full": (S, "float32", "full", 1024, 256, False),
    "S-last-mlp": (S, "float32", {"method": "full", "trainable": [r"layers\.7\.mlp"]}, 4096, 256, False),
    "wide-lora": (WIDE, "bfloat16", LORA, 1024, 512, False),
    "wide-full-recompute": (WIDE, "float32", "full", 1024, 512, True),
    "S-teach": (S, "bfloat16", None, 8192, 256, False),
}


def measure(name: str) -> dict[str, Any]:
    """Peak resident memory of two steps (or a teacher pass), and what the estimate says beforehand."""
    from guidetune import threads

    threads.settle()
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from guidetune import registry
    from guidetune.data.rows import EncodedRow, EncodedRows
    from guidetune.engine import TuneSettings, fit, memory
    from guidetune.guidance import GuideSettings, teach

    shape, dtype, params, tokens, length, recompute = CASES[name]
    config = LlamaConfig(**shape)
    method = None if params is None else registry.build("params", params)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    outline = memory.Outline.shaped(empty, getattr(torch, dtype), method)
    if method is None:
        estimate = memory.pass_estimate(outline, "teach", tokens, length)
    else:
        estimate = memory.tune_estimate(outline, tokens, length, recompute)

    rng = np.random.default_rng(0)
    weight = np.ones(length, np.float32)
    weight[0] = 0
    count = 2 * tokens // length * (2 if method is not None else 1)
    vocab = shape["vocab_size"]
    rows = EncodedRows.from_rows([EncodedRow(f"r{i}", "x", rng.integers(3, vocab, length).astype(np.int32), weight) for i in range(count)])
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with tempfile.TemporaryDirectory() as work:
        if method is None:
            teach(model, rows, GuideSettings(batch_tokens=tokens), Path(work))
        else:
            settings = TuneSettings(
                batch=count // 2, max_steps=2, micro_tokens=tokens, gradient_checkpointing=recompute, checkpoint_every=1
            )
            began = os.times()
            fit(method.attach(model), rows, settings, work=Path(work))
            spent = os.times()
    status = Path("/proc/self/status").read_text()
    # of this process alone: the resource module's figure starts at the parent's
    measured = int(status.split("VmHWM:")[1].split()[0]) * 1024
    cpu = 0.0 if method is None else spent.user + spent.system - began.user - began.system
    return {"measured": measured, "estimated": estimate.total, "parts": dict(estimate.parts), "cpu": cpu}


def run(name: str) -> dict[str, Any]:
    """`measure` in a fresh process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.measure_memory", name],
        cwd=Path(__file__).resolve().parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def line(name: str, found: dict[str, Any]) -> str:
    parts = ", ".join(f"{part} {size / 1e6:.0f}" for part, size in found["parts"].items() if size)
    ratio = found["estimated"] / found["measured"]
    return f"{name:<22} measured {found['measured'] / 1e6:6.0f} MB  estimated {found['estimated'] / 1e6:6.0f} MB ({ratio:.2f})  {parts}"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
    else:
        for case in CASES:
            print(line(case, run(case)), flush=True)
