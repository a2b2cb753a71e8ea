"""One measurement, one process: an engine trains a shape on the prepared rows, and one line of JSON says what it took.

Every engine trains LoRA r = 16, alpha = 32 without dropout on all linear layers with AdamW, on the same rows in random order: first
the warm-up steps, then the measured ones. The incumbents run one epoch over them, guidetune three over the same rows, because
guidance is paid once and used in every epoch. Loading, importing and preparing data count for nobody; only real tokens count,
never padding. Packing draws on all prepared rows and orders them by itself.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from data import MAX_LENGTH
from measure import Clock, Window, matmul_limit, peak_rss_mb
from shapes import ALPHA, RANK, SHAPES, Shape

from guidetune import threads
from guidetune.errors import BadInput

SEED, LEARNING_RATE, EPOCHS = 0, 2e-4, 3


@dataclass
class Job:
    """What is measured. `folder` holds `base`, `teacher` (checkpoints) and `rows` of the shape; `scratch` is this process's own.

    With `random` the models are not read but made on `device`, with random weights in bf16. `options` are further settings of
    guidetune's loop.
    """

    shape: Shape
    folder: Path
    scratch: Path
    warm: int
    steps: int
    device: str = "cpu"
    random: bool = False
    attention: str = "sdpa"
    options: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def shuffled(self) -> list[Any]:
        """All prepared rows, in random order."""
        from guidetune.data.rows import EncodedRows
        from guidetune.engine.batching import epoch_order

        stored = EncodedRows.open(self.folder / "rows")
        return [stored[int(i)] for i in epoch_order(len(stored), SEED, 0)]

    @cached_property
    def rows(self) -> Any:
        """Rows of the warm-up and the measured steps, in the order in which the steps take them."""
        from guidetune.data.rows import EncodedRows

        wanted = (self.warm + self.steps) * self.batch
        if wanted > len(self.shuffled):
            raise BadInput(f"{wanted} rows are needed and {len(self.shuffled)} were prepared: fewer steps, or a larger --rows")
        return EncodedRows.from_rows(self.shuffled[:wanted])

    @property
    def batch(self) -> int:
        return self.shape.batch

    def part(self, measured: bool) -> Any:
        """The rows of the measured steps, or those of the warm-up."""
        from guidetune.data.rows import EncodedRows

        cut = self.warm * self.batch
        return EncodedRows.from_rows([self.rows[i] for i in (range(cut, len(self.rows)) if measured else range(cut))])

    def clock(self) -> Clock:
        if self.device.startswith("cuda"):
            import torch

            return Clock(torch.cuda.synchronize)
        return Clock()

    @property
    def supervised(self) -> float:
        """Supervised share of the tokens of the measured rows."""
        rows = self.part(True)
        return float(rows.supervised.sum() / rows.lengths.sum())

    def trl_model(self) -> Any:
        """What SFTTrainer is given: the checkpoint's path, which it loads as it sees fit, or the random model itself."""
        return self.load("base") if self.random else str(self.folder / "base")

    def load(self, role: str) -> Any:
        """A model through transformers' own loader, in the checkpoint's dtype."""
        import torch
        from transformers import AutoModelForCausalLM

        if self.random:
            return self.shape.random_model(("base", "teacher").index(role), torch.bfloat16, self.device, self.attention)
        return AutoModelForCausalLM.from_pretrained(self.folder / role)


def result(clock: Clock, tokens: int, slots: int, model: Any, **more: Any) -> dict[str, Any]:
    """`slots`: positions the engine computed for these tokens, padding included."""
    dtype = str(next(p.dtype for p in model.parameters() if not p.requires_grad)).removeprefix("torch.")
    return {
        **clock.seconds(tokens),
        "real_per_slot": round(tokens / slots, 3),
        "frozen_dtype": dtype,
        **more,
    }


# ---------------------------------------------------------------------------------------------------------------------
# guidetune


def guidetune_sft(job: Job) -> dict[str, Any]:
    """Plain fine-tuning: warmed up on other rows, then `EPOCHS` epochs over the measured ones."""
    attached = _attached(job)
    _fit(job, attached, job.part(False), None, 1, "warm")
    return _epochs(job, attached, None, None)


def guidetune_gift(job: Job) -> dict[str, Any]:
    """The teacher pass over the measured rows, then `EPOCHS` epochs over them with its confidence as token weights.

    Both passes are warmed up on other rows. The first epoch and the teacher pass are also reported by themselves.
    """
    from guidetune.engine import Objective
    from guidetune.objectives.token_weights.gift import Gift

    teacher = _load(job, "teacher")
    warm = Objective([Gift()], "weights", {"instruct": _guide(job, teacher, job.part(False), "warm")})
    clock = job.clock()
    clock.start()
    objective = Objective([Gift()], "weights", {"instruct": _guide(job, teacher, job.part(True), "measured")})
    clock.stop()
    del teacher
    attached = _attached(job)
    _fit(job, attached, job.part(False), warm, 1, "warm")
    return _epochs(job, attached, objective, clock)


def _epochs(job: Job, attached: Any, objective: Any, guide: Clock | None) -> dict[str, Any]:
    """Train for `EPOCHS` epochs over the measured rows. `guide`: what the teacher pass took, which counts too."""
    rows = job.part(True)
    once, per_epoch = int(rows.lengths.sum()), len(rows) // job.batch
    first, whole = job.clock(), job.clock()

    def after_step(done: int) -> bool:
        if done == per_epoch:
            first.stop()
        return False

    whole.start()
    first.start()
    fitted = _fit(job, attached, rows, objective, EPOCHS, "measured", after_step)
    whole.stop()
    parts = {"first_epoch": first.seconds(once)}
    if guide is not None:
        parts["teacher"] = guide.seconds(once)
        whole.wall, whole.cpu = whole.wall + guide.wall, whole.cpu + guide.cpu
    tokens = once * EPOCHS
    return result(whole, tokens, tokens, attached.model, loss=fitted.loss_last, epochs=EPOCHS, **parts)


def _load(job: Job, role: str) -> Any:
    """As the pipeline loads: the dtype that `auto` gives for this size and machine."""
    from guidetune.engine.precision import frozen_dtype
    from guidetune.models.loading import load_model

    if job.random:
        return job.load(role)
    return load_model(str(job.folder / role), frozen_dtype("auto", job.shape.parameters, job.device), job.device)


def _attached(job: Job) -> Any:
    from guidetune.params.lora import Lora

    return Lora(rank=RANK, alpha=ALPHA, dropout=0.0).attach(_load(job, "base"), SEED)


def _guide(job: Job, teacher: Any, rows: Any, name: str) -> Any:
    """The teacher pass as the pipeline runs it: a stage whose folder appears when it is complete."""
    from guidetune.artefacts import stage
    from guidetune.guidance import Guidance, GuideSettings, teach

    done = stage(job.scratch / f"guidance-{name}", {"rows": rows.digest}, partial(teach, teacher, rows, GuideSettings()))
    return Guidance.open(done.path)


def _fit(job: Job, attached: Any, rows: Any, objective: Any, epochs: int, name: str, stop: Callable[[int], bool] | None = None) -> Any:
    from guidetune.engine import TuneSettings, fit

    work = job.scratch / name
    work.mkdir(parents=True)
    settings = TuneSettings(batch=job.batch, epochs=epochs, lr=LEARNING_RATE, seed=SEED, **job.options)
    return fit(attached, rows, settings, objective, work=work, stop=stop)


# ---------------------------------------------------------------------------------------------------------------------
# The incumbents


def trl_sft(job: Job, *, teacher: bool = False, **settings: Any) -> dict[str, Any]:
    """TRL's SFTTrainer; without `settings` everything is its default. `teacher`: guidance computed inside every step."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    # packing puts about seven rows into one: it draws on all that there are
    rows = job.shuffled if settings.get("packing") else job.rows
    counter = _Counter(Window(job.warm, job.steps, job.clock()))
    kind = _guided(SFTTrainer, job.load("teacher")) if teacher else SFTTrainer
    trainer = _counted(kind, counter)(
        model=job.trl_model(),
        args=SFTConfig(**{**_arguments(job), "max_length": MAX_LENGTH, "completion_only_loss": True, **settings}),
        train_dataset=Dataset.from_list(
            [{"input_ids": r.input_ids.tolist(), "completion_mask": (r.loss_weight > 0).astype(int).tolist()} for r in rows]
        ),
        processing_class=AutoTokenizer.from_pretrained(job.folder / "rows"),
        peft_config=_lora_config(),
        callbacks=[counter.callback()],
    )
    return _train(job, trainer, counter)


def trainer_sft(job: Job, *, teacher: bool = False) -> dict[str, Any]:
    """transformers.Trainer, autocast to bf16, textbook loss: cross-entropy of the full logits.

    `teacher`: guidance computed inside every step, from the full logits of the teacher.
    """
    import torch
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        shape = (len(rows), max(len(r.input_ids) for r in rows))
        out = {
            name: torch.full(shape, fill, dtype=torch.long) for name, fill in (("input_ids", 1), ("attention_mask", 0), ("labels", -100))
        }
        for k, row in enumerate(rows):
            n, ids = len(row.input_ids), torch.from_numpy(row.input_ids.astype("int64"))
            out["input_ids"][k, :n] = ids
            out["attention_mask"][k, :n] = 1
            out["labels"][k, :n] = ids.masked_fill(torch.from_numpy(row.loss_weight == 0), -100)
        return out

    counter = _Counter(Window(job.warm, job.steps, job.clock()))
    kind = _guided(Trainer, job.load("teacher")) if teacher else Trainer
    trainer = _counted(kind, counter)(
        model=get_peft_model(job.load("base"), _lora_config()),
        args=TrainingArguments(**_arguments(job), bf16=True, remove_unused_columns=False),
        train_dataset=list(job.rows),
        data_collator=collate,
        callbacks=[counter.callback()],
    )
    return _train(job, trainer, counter)


class _Counter:
    """Real tokens and computed positions of the measured steps of a Trainer."""

    def __init__(self, window: Window) -> None:
        self.window, self.tokens, self.slots = window, 0, 0

    def add(self, done: int, inputs: dict[str, Any]) -> None:
        if self.window.holds(done):
            slots = inputs["input_ids"].numel()
            self.tokens += int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else slots
            self.slots += slots

    def callback(self) -> Any:
        from transformers import TrainerCallback

        window = self.window

        class AfterStep(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **other: Any) -> None:
                window.after_step(state.global_step)

        return AfterStep()


def _counted(kind: type, counter: _Counter) -> type:
    class Counted(kind):
        def training_step(self, model: Any, inputs: Any, *more: Any, **named: Any) -> Any:
            counter.add(self.state.global_step, inputs)
            return super().training_step(model, inputs, *more, **named)

    return Counted


def _guided(kind: type, teacher: Any) -> type:
    """Σ w ℓ / Σ w of one batch, w = softmax of the teacher's logits at the target: the teacher runs in every step."""
    import torch
    import torch.nn.functional as F

    teacher.eval().requires_grad_(False)

    class Guided(kind):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            labels = inputs.pop("labels")
            inputs["use_cache"] = False
            logits = model(**inputs).logits[:, :-1].float()  # [B, T - 1, V]
            with torch.no_grad(), torch.autocast(labels.device.type, torch.bfloat16):
                reference = teacher(**inputs).logits[:, :-1].float()
            targets = labels[:, 1:]  # [B, T - 1]
            at = targets.clamp(min=0).unsqueeze(2)
            weight = torch.softmax(reference, -1).gather(2, at).squeeze(2) * (targets != -100)
            nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none").view_as(weight)
            return (nll * weight).sum() / weight.sum()

    return Guided


def _lora_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def _arguments(job: Job) -> dict[str, Any]:
    """What both trainers are told; the rest is their default."""
    return {
        "output_dir": str(job.scratch / "out"),
        "use_cpu": job.device == "cpu",
        "per_device_train_batch_size": job.batch,
        "max_steps": job.warm + job.steps,
        "learning_rate": LEARNING_RATE,
        "train_sampling_strategy": "sequential",  # the rows are in their random order already
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": SEED,
    }


def _train(job: Job, trainer: Any, counter: _Counter) -> dict[str, Any]:
    trainer.train()
    losses = [entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry]
    return result(counter.window.clock, counter.tokens, counter.slots, trainer.model, loss=losses[-1] if losses else None)


# ---------------------------------------------------------------------------------------------------------------------
# The process

ENGINES: dict[str, tuple[str, Callable[[Job], dict[str, Any]]]] = {
    "trl": ("TRL SFTTrainer, its defaults", trl_sft),
    "trl_packing": ("TRL, packing to 1,024 tokens", partial(trl_sft, packing=True)),
    "trl_packing_1": (
        "TRL, packing, one pack a step, no checkpointing",
        partial(trl_sft, packing=True, per_device_train_batch_size=1, gradient_checkpointing=False),
    ),
    "trainer": ("transformers.Trainer, full logits, autocast bf16", trainer_sft),
    "naive": ("naive GIFT: Trainer, teacher in every step", partial(trainer_sft, teacher=True)),
    "naive_trl": ("naive GIFT: TRL, teacher in every step", partial(trl_sft, teacher=True)),
    "sft": ("guidetune, plain fine-tuning", guidetune_sft),
    "gift": ("guidetune, GIFT: teacher pass and epochs", guidetune_gift),
}
OURS = {guidetune_sft, guidetune_gift}


def main() -> None:
    parser = argparse.ArgumentParser(description="One measurement; benchmarks/train.py starts these.")
    parser.add_argument("engine", choices=[*ENGINES, "limit"])
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--warm", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    if given.engine == "limit":
        print(json.dumps({"limit": matmul_limit(given.threads, 1.0)}))
        return
    if ENGINES[given.engine][1] in OURS:
        threads.settle()  # as every command of guidetune begins; the others keep their own defaults
    try:
        with tempfile.TemporaryDirectory() as scratch:
            job = Job(SHAPES[given.shape], given.folder, Path(scratch), given.warm, given.steps)
            out = measured(ENGINES[given.engine][1], job, given.threads)
            print(json.dumps({**out, "limit": matmul_limit(given.threads)}))
    except ImportError as error:
        print(json.dumps({"error": f"{error.name or error} is not installed or too old ({error}): pip install 'guidetune[bench]'"}))
    except BadInput as error:
        print(json.dumps({"error": str(error)}))


def measured(engine: Callable[[Job], dict[str, Any]], job: Job, threads: int) -> dict[str, Any]:
    """What the engine reports, the supervised share of its rows and the largest memory until now."""
    import torch

    torch.set_num_threads(threads)
    out = engine(job)
    return {**out, "supervised_share": round(job.supervised, 4), "peak_rss_mb": peak_rss_mb()}


if __name__ == "__main__":
    main()
