"""The numbers of a training run."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class TuneSettings(BaseModel):
    """Optimiser, schedule and layout. The defaults are those of GIFT (arXiv 2605.01256)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lr: float = Field(2e-4, gt=0, allow_inf_nan=False, description="Peak learning rate.")
    epochs: float = Field(1, gt=0, allow_inf_nan=False, description="Passes over the rows; a fraction is allowed.")
    max_steps: int | None = Field(None, ge=1, description="Stop after this many optimiser steps, whatever `epochs` says.")
    batch: int = Field(256, ge=1, description="Rows in an optimiser batch.")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="Course of the learning rate after warm-up.")
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of the steps in which the rate rises from 0.")
    clip: float | None = Field(1.0, gt=0, description="Largest gradient norm; null: no clipping.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW betas.")
    seed: int = Field(42, ge=0, description="Seed of data order, adapter initialisation and dropout.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Weights of the frozen model; auto: bfloat16 where the processor has it."
    )
    quantize: Literal["none", "8bit", "4bit"] = Field(
        "none",
        description="Hold the frozen weights in fewer bits while tuning (GPU, bitsandbytes). The merge is from the 16-bit originals.",
    )
    kernels: Literal["torch", "compile", "liger"] = Field(
        "torch", description="GPU only: compile the decoder layers with torch.compile, or use Liger's kernels where they are installed."
    )
    layout: Literal["auto", "varlen", "padded"] = Field("auto", description="varlen: no padding, documents isolated; padded: classic.")
    micro_tokens: int = Field(4096, ge=1, description="Token budget of a micro-batch: memory and speed, not the result.")
    gradient_checkpointing: Literal["auto"] | bool = Field(
        "auto", description="Recompute activations in the backward pass: less memory, more time. auto: when it would not fit without."
    )
    checkpoint_every: int | None = Field(None, ge=1, description="Steps between checkpoints; null: about every two minutes.")
    validate_every: int | None = Field(None, ge=1, description="Steps between validations; null: at the start and the end only.")


def total_steps(settings: TuneSettings, rows: int) -> int:
    """Optimiser steps of a run over `rows` rows; a last, smaller batch counts as a step."""
    per_epoch = -(-rows // settings.batch)
    steps = max(1, round(per_epoch * settings.epochs))
    return min(steps, settings.max_steps) if settings.max_steps else steps


def rate(settings: TuneSettings, step: int, steps: int) -> float:
    """Learning rate of optimiser step `step` (from 0) of `steps`: the course of transformers' schedules.

    Linear: step / W during the W = ⌈warmup · steps⌉ warm-up steps (so the first runs at 0), then (steps − step) / (steps − W).
    """
    import math

    warm = math.ceil(settings.warmup * steps)
    if step < warm:
        return settings.lr * step / warm
    if settings.schedule == "constant":
        return settings.lr
    left = (steps - step) / max(1, steps - warm)
    return settings.lr * (left if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * (1 - left))))
