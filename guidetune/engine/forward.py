"""One forward pass over a micro-batch: hidden states where a target is predicted, then the fused head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn

from guidetune.data.rows import EncodedRows
from guidetune.engine import attention, linear
from guidetune.engine.batching import Layout, MicroBatch, sorted_batches
from guidetune.engine.head import head_nll, release
from guidetune.engine.recompute import recomputed
from guidetune.engine.stack import Stack, fast_stack
from guidetune.models.architecture import Parts, check_head, parts, plain


class Forward:
    """-log p of a micro-batch's targets. Use inside `with opened(model, ...) as forward`."""

    def __init__(
        self, model: nn.Module, layout: Layout, autocast: torch.dtype | None = None, stack: Stack | None = None, checkpointing: bool = False
    ) -> None:
        self.model, self.layout, self.autocast = model, layout, autocast
        self.head: Parts = parts(model)
        self.device = self.head.weight.device
        self.checkpointing = checkpointing
        self.leaves: dict[int, torch.Tensor] | None = None
        self._steady = False
        self.stack = stack

    def hidden(self, batch: MicroBatch, seed: int | None = None) -> torch.Tensor:
        """Hidden states that predict the targets, [n, H]. `seed`: of dropout, in training."""
        training = self.model.training
        if self.stack is not None:
            if not self._steady:
                self.stack.refresh()
            recompute = training and self.checkpointing
            seed = seed if training else None
            return self.stack.hidden(batch.input_ids, batch.position_ids, batch.lengths, batch.predicts, seed, recompute, self.leaves)
        linear.sow(seed if training else None)
        if training and seed is not None:
            torch.manual_seed(seed)  # for adapters that are not plain LoRA
        masks = {} if batch.attention_mask is None else {"attention_mask": batch.attention_mask}
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            out = self.head.backbone(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **masks)
        return out.last_hidden_state.flatten(0, 1).index_select(0, batch.predicts)

    def nll(self, batch: MicroBatch, seed: int | None = None) -> torch.Tensor:
        """-log p of every target, fp32 [n]. Call inside `self.documents(batch)`. `seed`: of dropout, in training."""
        return head_nll(self.hidden(batch, seed), batch.targets, self.head)

    @contextmanager
    def documents(self, batch: MicroBatch) -> Iterator[None]:
        """Holds the batch's document layout for forward and backward."""
        with attention.documents(batch.lengths if self.layout == "varlen" else []):
            yield

    @contextmanager
    def steady(self) -> Iterator[None]:
        """The parameters do not change inside the block: what follows from them is formed once."""
        before, self._steady = self._steady, True
        if self.stack is not None:
            self.stack.refresh()
        try:
            yield
        finally:
            self._steady = before

    @torch.no_grad()
    def total_nll(self, data: EncodedRows, max_tokens: int, indices: np.ndarray | None = None) -> tuple[float, int]:
        """Sum of -log p over all supervised tokens of `data` (or of some of its rows), and their number; the model's mode is kept."""
        training = self.model.training
        self.model.eval()
        total, count = 0.0, 0
        chosen = np.arange(len(data)) if indices is None else indices
        with self.steady():
            for batch in sorted_batches(data, chosen, max_tokens, self.layout, self.device):
                with self.documents(batch):
                    nll = self.nll(batch)
                total += float(nll.double().sum())
                count += len(nll)
        self.model.train(training)
        return total, count


@contextmanager
def opened(
    model: nn.Module, layout: Layout | None = None, autocast: torch.dtype | None = None, checkpointing: bool = False
) -> Iterator[Forward]:
    """Prepare a model for padding-free passes (padded where its architecture does not allow it), check its head, restore it after.

    checkpointing: keep only the layers' inputs for the backward pass and compute the rest again.

    Raises:
        BadInput: the head is not one the fused routine can serve.
    """
    inner = plain(model)
    chosen: Layout = layout or ("varlen" if attention.supported(inner) else "padded")
    check_head(model)
    stack = fast_stack(model, parts(model).backbone) if chosen == "varlen" and autocast is None else None
    with ExitStack() as exits:
        if chosen == "varlen":
            exits.enter_context(attention.installed(inner))
        exits.enter_context(linear.installed(model))
        exits.callback(linear.sow, None)
        release()
        exits.callback(release)
        exits.enter_context(recomputed(model, checkpointing and stack is None))
        yield Forward(model, chosen, autocast, stack, checkpointing)
