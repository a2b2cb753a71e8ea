"""The teacher pass in float32, bfloat16 and int8: CPU seconds, and what fewer bits do to the guidance and to an adapter trained on it.

    python benchmarks/teacher.py [--json benchmarks/results/teacher-int8.json] [--rows 300 | --rows 0] [--tokens 16384] [--shapes S,M]

Speed is measured on random weights of the shapes S (256 x 8, vocabulary 32,000) and M (576 x 30, vocabulary 49,152), the effect on
the embedded world's instruct model, which has been trained. One thread; CPU seconds of the process, best of two passes.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from guidetune.artefacts import write_json
from guidetune.data.rows import EncodedRow, EncodedRows
from guidetune.guidance import GuideSettings, teach
from guidetune.models.int8 import to_int8

SHAPES = {
    "S": dict(hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4, vocab_size=32_000),
    "M": dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, vocab_size=49_152
    ),
}
WAYS = {"float32": ("float32", False), "bfloat16": ("bfloat16", False), "int8": ("float32", True), "int8 in bfloat16": ("bfloat16", True)}


def random_rows(tokens: int, vocab: int) -> EncodedRows:
    """Rows of instruction-data lengths (median about 134), two thirds supervised."""
    rng = np.random.default_rng(0)
    rows, total = [], 0
    while total < tokens:
        length = int(np.clip(rng.lognormal(4.9, 0.5), 16, 512))
        weight = np.zeros(length, np.float32)
        weight[length // 3 :] = 1
        rows.append(EncodedRow(f"r{len(rows)}", "x", rng.integers(3, vocab, length).astype(np.int32), weight))
        total += length
    return EncodedRows.from_rows(rows)


def timed(model: torch.nn.Module, rows: EncodedRows) -> float:
    best = float("inf")
    for _ in range(2):
        with tempfile.TemporaryDirectory() as work:
            before = os.times()
            teach(model, rows, GuideSettings(), Path(work))
            after = os.times()
        best = min(best, after.user + after.system - before.user - before.system)
    return best


def speed(name: str, tokens: int) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = SHAPES[name]
    rows = random_rows(tokens, shape["vocab_size"])
    found: dict[str, Any] = {"tokens": int(rows.lengths.sum())}
    for way, (dtype, int8) in WAYS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=getattr(torch, dtype)).eval()
        linear = sum(p.nbytes for n, p in model.model.named_parameters() if p.dim() == 2 and "embed" not in n)
        if int8:
            linear = sum(p.numel() for n, p in model.model.named_parameters() if p.dim() == 2 and "embed" not in n)
            to_int8(model)
        seconds = timed(model, rows)
        found[way] = {"cpu_s": round(seconds, 3), "tokens_per_cpu_s": round(found["tokens"] / seconds, 1), "linear_layers_mb": linear / 1e6}
        print(name, way, found[way], flush=True)
    return found


def effect(rows_limit: int) -> dict[str, Any]:
    """Guidance of the world's instruct model in fewer bits against float32, and the adapter that GIFT trains on it."""
    from safetensors.torch import load_file

    from guidetune import pipeline
    from guidetune.recipe import from_mapping

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        kept: dict[str, tuple[np.ndarray, dict[str, torch.Tensor]]] = {}
        for dtype in ("float32", "bfloat16", "int8"):
            recipe = from_mapping(
                {
                    "models": {"base": "world:base", "instruct": "world:instruct"},
                    "data": {"train": [{"path": "world:arithmetic", "limit": rows_limit}]},
                    "guide": {"dtype": dtype},
                    "tune": {
                        "params": {"method": "lora", "rank": 8, "alpha": 16, "dropout": 0.0},
                        "weights": ["gift"],
                        "lr": 1e-3,
                        "batch": 32,
                    },
                    "transfer": None,
                },
                Path(place),
            )
            out = pipeline.run(recipe, Path(place) / "runs" / dtype)
            log_prob = np.fromfile(out / "guidance/instruct/log_prob.f16", np.float16).astype(np.float32)
            weights = load_file(out / "adapter/adapter_model.safetensors")
            delta = {k: weights[k.replace("lora_A", "lora_B")] @ weights[k] for k in weights if "lora_A" in k}
            kept[dtype] = np.exp(log_prob), delta
        p, reference = kept["float32"]
        size = sum(float(d.square().sum()) for d in reference.values()) ** 0.5
        for dtype in ("bfloat16", "int8"):
            q, delta = kept[dtype]
            apart = sum(float((delta[k] - reference[k]).square().sum()) for k in reference) ** 0.5
            found[dtype] = {
                "tokens": len(p),
                "mean_abs_delta_p": float(np.abs(q - p).mean()),
                "p99_abs_delta_p": float(np.quantile(np.abs(q - p), 0.99)),
                "max_abs_delta_p": float(np.abs(q - p).max()),
                "correlation": float(np.corrcoef(p, q)[0, 1]),
                "adapter_relative_change": apart / size,
            }
            print(dtype, found[dtype], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "teacher-int8.json")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--shapes", default="S,M")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    from guidetune.pipeline import machine, versions

    # parts that are not measured now keep what the file has
    results: dict[str, Any] = json.loads(arguments.json.read_text()) if arguments.json.is_file() else {"speed": {}}
    results |= {"versions": versions(), "machine": machine()}
    for name in filter(None, arguments.shapes.split(",")):
        results["speed"][name] = speed(name, arguments.tokens)
        write_json(arguments.json, results)
    if arguments.rows:
        results["effect"] = effect(arguments.rows)
        write_json(arguments.json, results)


if __name__ == "__main__":
    main()
