"""What test_distributed.py runs in every process of a launch, and once in its own process: `python -m tests.engine.ranks OUT [PAIR]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

from guidetune.data.rows import EncodedRow, EncodedRows
from guidetune.engine import Objective, TuneSettings, fit
from guidetune.engine.distributed import current, whole
from guidetune.errors import RunFailed
from guidetune.guidance import GuideSettings, teach
from guidetune.objectives.token_weights.gift import Gift
from guidetune.params.full import Full
from tests.engine.test_engine import VOCAB, guidance_for, lora, make_rows
from tests.tiny import tiny_model

SETTINGS = TuneSettings(batch=6, epochs=3, lr=1e-2, micro_tokens=40, checkpoint_every=3, validate_every=4, weight_decay=0.01)
# name -> (family, tied, what is trained, dropout, reducer)
VARIANTS = {
    "plain": ("llama", False, "lora", 0.0, "weights"),
    "noise": ("llama", False, "lora", 0.1, "weights"),
    "micro": ("qwen3", True, "lora", 0.0, "micro"),
    "rows": ("gemma2", True, "lora", 0.0, "rows"),
    "full": ("llama", False, "full", 0.0, "tokens"),
    "tied": ("qwen2", True, "full", 0.0, "weights"),
}


def train(variant: str, work: Path, stop_at: int | None = None) -> tuple[dict[str, torch.Tensor], dict]:
    """One short run; whole weights and what was measured. A run found in `work` goes on."""
    family, tied, kind, dropout, reducer = VARIANTS[variant]
    rows = make_rows(20)
    model = tiny_model(family, vocab=VOCAB, seed=0, tie_word_embeddings=tied)
    attached = lora(model, dropout=dropout, warm=False) if kind == "lora" else Full().attach(model)
    changes = {"lr": 1e-2 if kind == "lora" else 1e-3, "gradient_checkpointing": variant == "rows"}
    settings = SETTINGS.model_copy(update=changes)
    objective = Objective([Gift()], reducer, {"instruct": guidance_for(rows)})
    work.mkdir(parents=True, exist_ok=True)
    stop = None if stop_at is None else (lambda step: step == stop_at)
    result = fit(attached, rows, settings, objective, work=work, validation=make_rows(9, seed=9), stop=stop)
    weights = {name: whole(p.detach()).clone().contiguous() for name, p in attached.trainable().items()}
    measured = {key: getattr(result, key) for key in ("steps", "tokens", "loss_first", "loss_last", "validation", "signal")}
    return weights, measured


def poisoned() -> tuple[torch.nn.Module, EncodedRows]:
    """A model whose loss is not finite on row r4 alone."""
    model = tiny_model("llama", vocab=VOCAB, seed=0)
    with torch.no_grad():
        model.get_input_embeddings().weight[95] = float("inf")
    clean = [EncodedRow(r.id, r.source, np.minimum(r.input_ids, 90), r.loss_weight) for r in make_rows(12)]
    ids = clean[4].input_ids.copy()
    ids[0] = 95
    clean[4] = EncodedRow("r4", "test", ids, clean[4].loss_weight)
    return model, EncodedRows.from_rows(clean)


def failure(work: Path) -> str:
    work.mkdir(parents=True, exist_ok=True)
    model, rows = poisoned()
    try:
        fit(lora(model), rows, SETTINGS, work=work)
    except RunFailed as error:
        return str(error)
    return "nothing failed"


def evaluated(pair: Path, out: Path) -> dict:
    """Every kind of task on the pair's instruct model."""
    from guidetune.evaluation.evaluate import EvalSettings, evaluate
    from guidetune.models.handle import open_handle
    from guidetune.recipe import load

    recipe = load(pair / "recipe.yaml")
    group = current()
    handle = open_handle(pair / "instruct", device=group.loading_device)
    group.place(handle.model)
    settings = EvalSettings(batch_tokens=100, max_new_tokens=8)
    return evaluate(handle, [*recipe.evaluate.task, *recipe.evaluate.general], out, settings, pair)


def main(out: Path, pair: Path) -> None:
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    group = current()
    own = out / f"rank{group.rank}"
    own.mkdir(parents=True, exist_ok=True)
    measured = {"size": group.size, "sharded": group.sharding is not None, "failure": failure(out / "failure")}
    for variant in VARIANTS:  # after the failure: the ranks are still in step
        weights, measured[variant] = train(variant, out / variant)
        save_file(weights, own / f"{variant}.safetensors")
    for variant in ("plain", "full"):
        save_file(train(variant, out / f"began-with-one-{variant}")[0], own / f"one-to-two-{variant}.safetensors")
        train(variant, out / f"began-with-two-{variant}", stop_at=7)
    model = tiny_model("gemma2", vocab=VOCAB, seed=4)
    group.place(model)
    guide = out / "guide"
    guide.mkdir(exist_ok=True)
    measured["guide"] = teach(model, make_rows(30), GuideSettings(batch_tokens=50), guide)
    results = evaluated(pair, out / "evaluation")
    measured["evaluate"] = {label: {k: v for k, v in r.items() if k != "cost"} for label, r in results.items()}
    (own / "measured.json").write_text(json.dumps(measured))
    if group.size > 1:
        torch.distributed.destroy_process_group()  # its threads may not outlive the interpreter: that aborts the process now and then


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
