"""One forward pass over a micro-batch: hidden states where a target is predicted, then the fused head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from guidetune.data.rows import EncodedRows
from guidetune.engine import attention
from guidetune.engine.batching import Layout, MicroBatch, sorted_batches
from guidetune.engine.head import head_nll
from guidetune.models.architecture import Parts, check_head, parts, plain


class Forward:
    """-log p of a micro-batch's targets. Use inside `with opened(model, ...) as forward`."""

    def __init__(self, model: nn.Module, layout: Layout, autocast: torch.dtype | None = None, exact_head: bool = False) -> None:
        self.model, self.layout, self.autocast = model, layout, autocast
        self.head: Parts = parts(model)
        if exact_head and self.head.weight.dtype.itemsize < 4:
            self.head = replace(self.head, weight=self.head.weight.float())
        self.device = self.head.weight.device

    def hidden(self, batch: MicroBatch) -> torch.Tensor:
        """Hidden states that predict the targets, [n, H]."""
        masks = {} if batch.attention_mask is None else {"attention_mask": batch.attention_mask}
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            out = self.head.backbone(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **masks)
        return out.last_hidden_state.flatten(0, 1).index_select(0, batch.predicts)

    def nll(self, batch: MicroBatch) -> torch.Tensor:
        """-log p of every target, fp32 [n]. Call inside `self.documents(batch)`."""
        return head_nll(self.hidden(batch), batch.targets, self.head)

    @contextmanager
    def documents(self, batch: MicroBatch) -> Iterator[None]:
        """Holds the batch's document layout for forward and backward."""
        with attention.documents(batch.lengths if self.layout == "varlen" else []):
            yield

    @torch.no_grad()
    def total_nll(self, data: EncodedRows, max_tokens: int, indices: np.ndarray | None = None) -> tuple[float, int]:
        """Sum of -log p over all supervised tokens of `data` (or of some of its rows), and their number; the model's mode is kept."""
        training = self.model.training
        self.model.eval()
        total, count = 0.0, 0
        for batch in sorted_batches(data, np.arange(len(data)) if indices is None else indices, max_tokens, self.layout, self.device):
            with self.documents(batch):
                nll = self.nll(batch)
            total += float(nll.double().sum())
            count += len(nll)
        self.model.train(training)
        return total, count


@contextmanager
def opened(
    model: nn.Module, layout: Layout | None = None, autocast: torch.dtype | None = None, exact_head: bool = False
) -> Iterator[Forward]:
    """Prepare a model for padding-free passes (padded where its architecture does not allow it), check its head, restore it after.

    `exact_head`: logits in fp32 also where the weights are held in 16 bits (a bf16 logit has two to three digits).

    Raises:
        BadInput: the head is not one the fused routine can serve.
    """
    inner = plain(model)
    chosen: Layout = layout or ("varlen" if attention.supported(inner) else "padded")
    check_head(model)
    with ExitStack() as stack:
        if chosen == "varlen":
            stack.enter_context(attention.installed(inner))
        yield Forward(model, chosen, autocast, exact_head)
