"""One forward pass over a micro-batch: hidden states where a target is predicted, then the fused head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from guidetune.artefacts import derive_seed
from guidetune.data.rows import EncodedRows
from guidetune.engine import attention, linear, scratch
from guidetune.engine.batching import Layout, MicroBatch, sorted_batches
from guidetune.engine.head import head_nll
from guidetune.engine.recompute import recomputed
from guidetune.engine.stack import Stack, fast_stack
from guidetune.models.architecture import Parts, check_head, parts, plain

T = TypeVar("T")


class Forward:
    """-log p of a micro-batch's targets. Use inside `with opened(model, ...) as forward`."""

    def __init__(
        self, model: nn.Module, layout: Layout, autocast: torch.dtype | None = None, stack: Stack | None = None, checkpointing: bool = False
    ) -> None:
        self.model, self.layout, self.autocast = model, layout, autocast
        self.head: Parts = parts(model)
        self.device = self.head.weight.device
        self.checkpointing = checkpointing
        self._threads = torch.get_num_threads()
        self._pool: ThreadPoolExecutor | None = None
        self._steady = False
        self.stack = stack

    def hidden(self, batch: MicroBatch, seed: int | None = None, leaves: dict[int, torch.Tensor] | None = None) -> torch.Tensor:
        """Hidden states that predict the targets, [n, H]. `seed`: of dropout, in training. `leaves`: see `Stack.hidden`."""
        training = self.model.training
        noise = None
        if training and seed is not None:
            width = None if self.layout == "varlen" else batch.input_ids.shape[1]
            noise = linear.Noise(seed, tuple(int(row) for row in batch.rows), tuple(batch.lengths), width)
        if self.stack is not None:
            if not self._steady:
                self.stack.refresh()
            recompute = training and self.checkpointing
            return self.stack.hidden(batch.input_ids, batch.position_ids, batch.lengths, batch.predicts, noise, recompute, leaves)
        linear.sow(noise)
        if noise is not None:
            torch.manual_seed(derive_seed(seed, *noise.rows[:1]))  # for what does not draw by row: see draws_per_batch
        masks = {} if batch.attention_mask is None else {"attention_mask": batch.attention_mask}
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            out = self.head.backbone(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **masks)
        return out.last_hidden_state.flatten(0, 1).index_select(0, batch.predicts)

    def nll(self, batch: MicroBatch, seed: int | None = None, leaves: dict[int, torch.Tensor] | None = None) -> torch.Tensor:
        """-log p of every target, fp32 [n]. Call inside `self.documents(batch)`. `seed`: of dropout, in training."""
        return head_nll(self.hidden(batch, seed, leaves), batch.targets, self.head)

    @cached_property
    def draws_per_batch(self) -> bool:
        """Whether training draws noise that depends on how rows are laid out in micro-batches (dropout that is not plain LoRA's)."""
        plain_lora = [m for m in self.model.modules() if linear.draws_by_row(m)] if self.autocast is None else []
        ours = {id(part) for m in plain_lora for part in m.modules()}
        names = ("dropout", "attention_dropout")
        return any(
            (isinstance(m, torch.nn.modules.dropout._DropoutNd) and m.p > 0)
            or any(isinstance(m.__dict__.get(n), float) and m.__dict__[n] > 0 for n in names)
            for m in self.model.modules()
            if id(m) not in ours
        )

    @cached_property
    def lanes(self) -> int:
        """How many micro-batches can run at once, each on a thread of its own: 1 unless every trained parameter is in the stack.

        Two threads with a micro-batch each do more than two threads that share every product of one.
        """
        if self.stack is None or self.device.type != "cpu":
            return 1
        inside = {id(p) for p in self.stack.parameters}
        return self._threads if all(id(p) in inside for p in self.model.parameters() if p.requires_grad) else 1

    def at_once(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """The results of the jobs, each run on a thread of its own with the caller's grad and inference mode; the first error is raised."""
        if len(jobs) == 1:
            return [jobs[0]()]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, initializer=torch.set_num_threads, initargs=(1,))
        inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

        def run(job: Callable[[], T]) -> T:
            with torch.inference_mode(inference), torch.set_grad_enabled(grad and not inference):
                return job()

        futures = [self._pool.submit(run, job) for job in jobs]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
            wait(futures)  # after an error or Ctrl-C: nobody works on the model when this returns

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            torch.set_num_threads(self._threads)  # the workers' setting reaches the product library as a whole

    @contextmanager
    def documents(self, batch: MicroBatch) -> Iterator[None]:
        """Holds the batch's document layout for forward and backward."""
        if self.stack is not None:  # which is told with every pass
            yield
            return
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
        scratch.release()
        exits.callback(scratch.release)
        exits.enter_context(recomputed(model, checkpointing and stack is None))
        forward = Forward(model, chosen, autocast, stack, checkpointing)
        exits.callback(forward.close)
        yield forward
