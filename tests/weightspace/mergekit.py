"""What mergekit makes of three tiny fine-tunes: the values in `golden/mergekit.json`, and the same merges in our own words.

    python -m tests.weightspace.mergekit MERGEKIT_YAML

runs mergekit again (its command `mergekit-yaml`, version 0.1.5 for the stored values) and writes the file anew.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.models.pairs import save, tiny_tokenizer
from tests.tiny import tiny_model

GOLDEN = Path(__file__).parent / "golden/mergekit.json"
UNION = Path(__file__).parent / "golden/union.json"
STRIDE = 97  # of the values of a tensor that are kept
W = {"linear": (0.3, 0.7), "ties": (0.5, 0.3, 0.6), "slerp": (0.7, 0.3), "nuslerp": (0.7, 0.3), "lines": (1.0,)}

# name: (mergekit's method and options, its options for each model, our method, our weights)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Any]] = {
    "linear": ({"merge_method": "linear"}, {"weight": W["linear"]}, "linear"),
    "task_arithmetic": ({"merge_method": "task_arithmetic"}, {"weight": (0.4,) * 3}, "task_arithmetic"),
    "ties": (
        {"merge_method": "ties"},
        {"weight": W["ties"], "density": (0.3,) * 3},
        {"method": "ties", "density": 0.3, "scope": "tensor", "tie": "plus"},
    ),
    "breadcrumbs": (
        {"merge_method": "breadcrumbs"},
        {"weight": (0.5,) * 3, "density": (0.4,) * 3, "gamma": (0.02,) * 3},
        {"method": "breadcrumbs", "keep": 0.4, "drop_top": 0.02, "scope": "tensor", "order": "fit", "scale": 1.0},
    ),
    "breadcrumbs_ties": (
        {"merge_method": "breadcrumbs_ties"},
        {"weight": (0.5,) * 3, "density": (0.4,) * 3, "gamma": (0.02,) * 3},
        {
            "method": "breadcrumbs", "keep": 0.4, "drop_top": 0.02, "scope": "tensor", "order": "fit", "scale": 1.0, "sign": "elect",
            "agg": "sum",
        },
    ),
    "slerp": ({"merge_method": "slerp", "parameters": {"t": 0.3}}, {}, "slerp"),
    "nuslerp": ({"merge_method": "nuslerp"}, {"weight": W["nuslerp"]}, {"method": "slerp", "of": "updates", "linear_above": 1.0}),
    "model_stock": ({"merge_method": "model_stock"}, {}, {"method": "model_stock", "clamp": False}),
    "sce": ({"merge_method": "sce", "parameters": {"select_topk": 0.3}}, {}, {"method": "sce", "select_topk": 0.3}),
    "karcher": ({"merge_method": "karcher"}, {}, "karcher"),
    "lines": ({"merge_method": "task_arithmetic"}, {"weight": ([0.1, 1.0],)}, {"method": "lines", "alpha": 0.1}),
}  # fmt: skip
WITHOUT_BASE = {"linear", "karcher"}


def sources(name: str) -> list[float]:
    """Our weights, one for each model that takes part."""
    given = CASES[name][1].get("weight", (1.0,) * 3)
    return list(W.get(name, given))


def models(folder: Path) -> tuple[str, list[str]]:
    """A base and three models near it, the same ones every time."""
    draw = torch.Generator().manual_seed(1)
    save(tiny_model("llama"), folder / "base")
    for k in range(3):
        model = tiny_model("llama")
        with torch.no_grad():
            for p in model.parameters():
                p += 0.02 * torch.randn(p.shape, generator=draw)
        save(model, folder / f"m{k}")
    return str(folder / "base"), [str(folder / f"m{k}") for k in range(3)]


def read(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def mergekit_plan(name: str, base: str, tuned: list[str]) -> dict[str, Any]:
    options, each, _ = CASES[name]
    plan: dict[str, Any] = {**options, "dtype": "float32", "models": []}
    for k, model in enumerate(tuned[: len(sources(name))]):
        parameters = {key: values[k] for key, values in each.items()}
        plan["models"].append({"model": model, "parameters": parameters} if parameters else {"model": model})
    if name not in WITHOUT_BASE:
        plan["base_model"] = tuned[0] if name == "slerp" else base
    return plan


def main(command: str) -> None:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        base, tuned = models(Path(folder))
        for name in CASES:
            (Path(folder) / "plan.yaml").write_text(yaml.safe_dump(mergekit_plan(name, base, tuned)))
            out = Path(folder) / f"out-{name}"
            subprocess.run([command, str(Path(folder) / "plan.yaml"), str(out), "--no-copy-tokenizer"], check=True)
            found[name] = {key: tensor.flatten()[::STRIDE].tolist() for key, tensor in sorted(read(out).items())}
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(found))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "plan.yaml").write_text(yaml.safe_dump(union_plan(vocabularies(Path(folder)))))
        subprocess.run([command, str(Path(folder) / "plan.yaml"), str(Path(folder) / "out")], check=True)
        UNION.write_text(json.dumps({name: rows_of(Path(folder) / "out", name) for name in VOCABULARY}))


VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def vocabularies(root: Path) -> dict[str, Path]:
    """<a> is id 102 of the anchor and 103 of `one`; <b> is in both others; <c> in one of them."""
    return {
        "anchor": written(root / "anchor", 103, 0, ("<a>",)),
        "one": written(root / "one", 112, 1, ("<b>", "<a>")),
        "two": written(root / "two", 105, 2, ("<b>", "<c>")),
    }


def written(folder: Path, rows: int, seed: int, extra: tuple[str, ...], dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A tiny model with so many rows, and a tokenizer with extra tokens."""
    tiny_model(vocab=rows, seed=seed, **changes).to(dtype).save_pretrained(folder)
    tiny_tokenizer(extra=extra).save_pretrained(folder)
    return folder


def union_plan(folders: dict[str, Path]) -> dict[str, Any]:
    plan: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": str(folders["anchor"]), "dtype": "float32"}
    plan["tokenizer_source"] = "union"
    plan["models"] = [{"model": str(folders[key]), "parameters": {"weight": weight}} for key, weight in (("one", 0.5), ("two", 0.25))]
    return plan


def rows_of(folder: Path, name: str) -> dict[str, list[float]]:
    """The first values of some tokens' rows."""
    from guidetune.models.loading import load_tokenizer

    vocabulary, tensor = load_tokenizer(str(folder)).get_vocab(), read(folder)[name]
    return {token: tensor[vocabulary[token]][:4].tolist() for token in ("<a>", "<b>", "<c>", "</s>", "q")}


if __name__ == "__main__":
    main(sys.argv[1])
