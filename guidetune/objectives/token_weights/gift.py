"""GIFT: each target token weighted by the instruct model's confidence in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from guidetune.objectives.token_weights import TokenBatch, TokenWeights
from guidetune.registry import method

if TYPE_CHECKING:
    import torch


@method(
    kind="token_weights",
    name="gift",
    paper="2605.01256",
    summary="Weight each target token by the instruct model's probability of it.",
)
class Gift(TokenWeights):
    """w_t = max(q_t, floor)^power, q_t = p_teacher(y_t | x, y_<t), computed once before training (arXiv 2605.01256).

    With the reducer `weights` the loss is Σ w ℓ / Σ w over the optimiser batch. `eos_weight: 1.0` and the reducer `micro`
    give the authors' released code.
    """

    power: float = Field(1.0, ge=0, allow_inf_nan=False, description="Exponent γ of the confidence; 0 is plain fine-tuning.")
    floor: float = Field(1e-4, ge=0, le=1, description="Smallest confidence used.")
    eos_weight: Literal["teacher"] | float = Field(
        "teacher", description="`teacher`: stop tokens weigh like any other; a number: that weight (the release: 1.0)."
    )
    teacher: str = Field("instruct", description="`instruct`, `base` (the paper's ablation), or any model.")

    @property
    def teachers(self) -> tuple[str, ...]:
        return (self.teacher,)

    def weights(self, batch: TokenBatch) -> torch.Tensor:
        w = batch.teacher(self.teacher).exp().clamp(max(self.floor, 1e-8), 1.0)
        if self.eos_weight != "teacher":
            w = w.masked_fill(batch.is_stop, float(self.eos_weight))
        return w.pow(self.power)
