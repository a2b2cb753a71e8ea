"""Is the written folder the model it should be? Weights recomputed, untouched bytes compared, logits of merged against adapter."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from guidetune import artefacts
from guidetune.errors import BadInput, RunFailed
from guidetune.models.checkpoint import Checkpoint
from guidetune.models.loading import TOKENIZER_FILES, load_model, load_tokenizer
from guidetune.models.sources import ModelSource
from guidetune.weightspace.apply import FULL_VERIFY_BYTES, Plan, _bytes, dtype_of
from guidetune.weightspace.sources import LoraDelta, refusals
from guidetune.weightspace.store import Entry
from guidetune.weightspace.vocabulary import Extended

PROBE_TEXTS = (
    "What is 17 + 26?",
    "Name a river in Europe.",
    "Translate into French: good morning.",
    "Write one sentence about the sea.",
    "Sort these words: pear, apple, fig.",
    "Why is the sky blue?",
    "List three prime numbers.",
    "Say hello.",
)
PROBE_TOKENS = 64
MAX_ROWS = 8
SHARE = 0.05  # of the tensors of a large model that are read again
RELATIVE_TOLERANCE = 1e-4


def verify_result(
    plan: Plan, source: ModelSource, work: Path, level: str, rows: Sequence[Sequence[int]] | None, moved: bool
) -> dict[str, Any]:
    """Check a written model folder against its plan; returns what was found, with "warnings".

    Raises:
        RunFailed: a stored value is not the one that was computed, or the model does not load or behave as target + update.
    """
    if level == "none":
        return {"level": "none"}
    found: dict[str, Any] = {"level": level}
    with Checkpoint(work) as written:
        found |= _weights(plan, written)
    if level == "full":
        found |= _loads_and_agrees(plan, source, work, rows, moved)
        found |= {"tokenizer": plan.target.vocabulary.kind} if isinstance(plan.target, Extended) else _same_tokenizer(source, work)
    return found


def _weights(plan: Plan, written: Checkpoint) -> dict[str, Any]:
    expected, there = {entry.name for entry in plan.entries}, set(written.tensors)
    if expected != there:
        raise RunFailed(f"the written folder has other tensors than planned: {sorted(expected ^ there)[:3]}")
    updated = [entry for entry in plan.entries if entry.name in plan.update_of]
    others = [entry for entry in plan.entries if entry.name not in plan.update_of]
    if written.nbytes > FULL_VERIFY_BYTES:
        draw = random.Random(artefacts.derive_seed(plan.seed, "verify"))
        updated, others = (
            sorted(draw.sample(some, max(min(4, len(some)), int(SHARE * len(some)))), key=lambda e: e.name) for some in (updated, others)
        )
    for entry in updated:
        for start, stop in plan.pieces(entry):
            *_, y = plan.compute(entry, start, stop)
            if _bytes(written.rows(entry.name, start, stop)) != _bytes(y):
                raise RunFailed(f"{entry.name} on disk is not what was computed: the disk or the memory of this machine is unreliable")
        plan.delta.done(plan.update_of[entry.name])
    for entry in others:
        _check_copy(plan, written, entry)
    return {"weights_recomputed": len(updated), "copies_compared": len(others)}


def _check_copy(plan: Plan, written: Checkpoint, entry: Entry) -> None:
    name = plan.stored_from[entry.name]
    if plan.converts(entry):
        pairs = (
            (_bytes(written.rows(entry.name, start, stop)), _bytes(plan.target.rows(name, start, stop).to(dtype_of(entry))))
            for start, stop in plan.pieces(entry)
        )
    else:
        pairs = zip(written.raw(entry.name), plan.target.raw(name), strict=True)
    if any(a != b for a, b in pairs):
        raise RunFailed(f"{entry.name} on disk is not a copy of the target's: the disk is unreliable, or the target was changed meanwhile")


def probe_rows(source: ModelSource, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Eight short prompts in the model's own chat format; random ids when it has no tokenizer."""
    if any((source.path / name).is_file() for name in TOKENIZER_FILES):
        tokenizer = load_tokenizer(source)
        rows = []
        for text in PROBE_TEXTS:
            if tokenizer.chat_template:
                messages = [{"role": "user", "content": text}]
                ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
            else:
                ids = tokenizer(text)["input_ids"]
            rows.append([int(i) for i in ids][:PROBE_TOKENS])
        rows = [row for row in rows if row and max(row) < vocabulary]
        if rows:
            return rows
    draw = random.Random(artefacts.derive_seed(seed, "probe"))
    return [[draw.randrange(vocabulary) for _ in range(16)] for _ in range(MAX_ROWS)]


def _loads_and_agrees(plan: Plan, source: ModelSource, work: Path, rows: Sequence[Sequence[int]] | None, moved: bool) -> dict[str, Any]:
    """Logits in float32: target alone, target + update without merging, and the written model loaded as any user would."""
    model = plan.target.fitted(load_model(source, dtype="float32", device="cpu"))
    vocabulary = model.get_input_embeddings().weight.shape[0]
    probes = [list(row)[:PROBE_TOKENS] for row in rows][:MAX_ROWS] if rows else probe_rows(source, vocabulary, plan.seed)
    plain = _log_probs(model, probes)
    unmerged = plain
    if plan.scale != 0.0:
        model = _with_update(plan, model)
        unmerged = _log_probs(model, probes)
    del model
    try:
        # Refuses missing weights and other shapes, so this is also the check that the folder loads.
        merged_model = load_model(str(work), dtype="float32", device="cpu")
    except BadInput as error:
        raise RunFailed(f"the written model does not load: {error}") from None
    merged = _log_probs(merged_model, probes)
    del merged_model
    return _compare(
        plain, unmerged, merged, exact=all(plan.target.tensors[s].dtype == e.dtype == "F32" for e, s in _weights_of(plan)), moved=moved
    )


def _weights_of(plan: Plan) -> list[tuple[Entry, str]]:
    return [(entry, plan.stored_from[entry.name]) for entry in plan.entries if entry.name in plan.update_of or plan.converts(entry)]


def _with_update(plan: Plan, model: Any) -> Any:
    """Target + update by another way than the merge: through peft for an adapter, by adding in place for other deltas."""
    # peft would initialise a converted adapter's base once more, as its config still names the old initialisation.
    if isinstance(plan.delta, LoraDelta) and not plan.delta.saved and not refusals(plan.delta.config):
        from peft import PeftModel
        from peft.tuners.lora import LoraLayer

        # The file may hold copies of the base's embeddings, which peft would put over the target's own.
        own = {name: model.get_parameter(name).detach().clone() for name in plan.delta.plain}
        model = PeftModel.from_pretrained(model, str(plan.delta.folder), is_trainable=False).float().eval()
        with torch.no_grad():
            for name, weight in own.items():
                module = model.base_model.model.get_submodule(name.rsplit(".", 1)[0])
                getattr(module, "base_layer", module).weight.copy_(weight)
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.scaling["default"] *= plan.scale
        return model
    with torch.no_grad():
        if plan.untie:
            for a in plan.target.names.tied:
                module = model.get_submodule(a.rsplit(".", 1)[0])
                module.weight = torch.nn.Parameter(module.weight.detach().clone())
        done = set()
        for name in plan.delta.shapes:
            try:
                parameter = model.get_parameter(name)
            except AttributeError:
                continue  # assembled by transformers from several tensors: covered by the weights check
            if id(parameter) not in done:
                done.add(id(parameter))
                rows = parameter.shape[0] if parameter.dim() else 1
                parameter += plan.delta.rows(name, 0, rows) * plan.scale
    return model


@torch.no_grad()
def _log_probs(model: Any, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """[T, V] logits of each row."""
    return [model(input_ids=torch.tensor([list(row)]), use_cache=False).logits[0].float() for row in rows]


def _compare(
    plain: list[torch.Tensor], unmerged: list[torch.Tensor], merged: list[torch.Tensor], exact: bool, moved: bool
) -> dict[str, Any]:
    def divergence(p: list[torch.Tensor], q: list[torch.Tensor]) -> float:
        """Mean over tokens of KL(p || q)."""
        kl = [(x.log_softmax(-1).exp() * (x.log_softmax(-1) - y.log_softmax(-1))).sum(-1) for x, y in zip(p, q, strict=True)]
        return float(torch.cat(kl).double().mean().clamp_min(0))

    worst = max(float((x - y).abs().max()) for x, y in zip(merged, unmerged, strict=True))
    largest = max(float(x.abs().max()) for x in unmerged)
    agree = torch.cat([x.argmax(-1) == y.argmax(-1) for x, y in zip(merged, unmerged, strict=True)]).float().mean()
    found: dict[str, Any] = {
        "probe_rows": len(merged),
        "max_logit_difference": worst,
        "relative_logit_difference": worst / max(largest, 1e-30),
        "top1_agreement": float(agree),
        "kl_merged_unmerged": divergence(merged, unmerged),
        "kl_merged_target": divergence(merged, plain),
        "warnings": [],
    }
    if not all(bool(torch.isfinite(x).all()) for x in merged):
        raise RunFailed("the written model gives logits that are not finite; nothing was published")
    if exact and found["relative_logit_difference"] > RELATIVE_TOLERANCE:
        raise RunFailed(
            f"the written model and target + update disagree: logits differ by {worst:.3g} of {largest:.3g} in float32, which no rounding "
            "explains; nothing was published"
        )
    # A merge that did nothing looks like the target, not like target + update.
    if moved and found["kl_merged_target"] <= 10 * found["kl_merged_unmerged"]:
        found["warnings"].append(
            f"on the probe texts the result is hardly nearer to target + update (KL {found['kl_merged_unmerged']:.2g}) than to the target "
            f"(KL {found['kl_merged_target']:.2g}): the update is very small, or lost in rounding"
        )
    return found


def _same_tokenizer(source: ModelSource, work: Path) -> dict[str, Any]:
    if not any((source.path / name).is_file() for name in TOKENIZER_FILES):
        return {"tokenizer": "none"}
    from guidetune.models.fingerprints import tokenizer_digest

    a, b = load_tokenizer(source), load_tokenizer(str(work))
    text = "Round trip: 12 + 30 = 42, naïve café."
    same = (
        tokenizer_digest(a) == tokenizer_digest(b) and a(text)["input_ids"] == b(text)["input_ids"] and a.chat_template == b.chat_template
    )
    if not same:
        raise RunFailed("the written tokenizer or chat template is not the target's; nothing was published")
    return {"tokenizer": "equal"}
