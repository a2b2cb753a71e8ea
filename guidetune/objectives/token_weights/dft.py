"""DFT: each target token weighted by the tuned model's own probability of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from guidetune.objectives.token_weights import TokenBatch, TokenWeights
from guidetune.registry import method

if TYPE_CHECKING:
    import torch


@method(
    kind="token_weights", name="dft", paper="2508.05629", summary="Weight each target token by the tuned model's own probability of it."
)
class Dft(TokenWeights):
    """w_t = sg(p_θ(y_t)), recomputed at every step; the loss is Σ w ℓ / N (arXiv 2508.05629)."""

    reducer: ClassVar[str] = "tokens"

    def weights(self, batch: TokenBatch) -> torch.Tensor:
        return batch.student_log_prob.exp()
