"""Token weights: how much each supervised token's loss counts. Methods are the files beside this one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from guidetune.errors import BadInput
from guidetune.registry import Method

if TYPE_CHECKING:
    import torch


@dataclass
class TokenBatch:
    """The n supervised tokens of a micro-batch, in label order; all tensors are detached.

    targets int64 [n]; row int64 [n]; is_stop bool [n] (the target is a stop token); student_log_prob fp32 [n] of the model in
    training; teachers: name → fp32 log-probability [n] from the guidance store.
    """

    targets: torch.Tensor
    row: torch.Tensor
    is_stop: torch.Tensor
    student_log_prob: torch.Tensor
    teachers: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def teacher(self, name: str) -> torch.Tensor:
        """A teacher's log-probabilities.

        Raises:
            BadInput: this teacher's guidance was not computed.
        """
        if name not in self.teachers:
            raise BadInput(f"no guidance of teacher {name!r} for these rows; run the guide stage with it first")
        return self.teachers[name]


class TokenWeights(Method):
    """Contract: `weights(batch)` gives fp32 [n] ≥ 0 without gradient; several methods multiply."""

    # The usual reducer of this method, used when the recipe names none.
    reducer: ClassVar[str] = "weights"

    @property
    def teachers(self) -> tuple[str, ...]:
        """Teachers whose guidance must exist before training: `instruct`, `base` or a model."""
        return ()

    def weights(self, batch: TokenBatch) -> torch.Tensor:
        raise TypeError(f"{type(self).__name__} does not define weights()")
