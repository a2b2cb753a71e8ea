"""How much memory a pass will take, known before any weight is loaded, and the settings that make it fit.

The model is built from its configuration without memory, the trainable part is attached to it, and one micro-batch is run with
tensors that have shapes but no contents (`torch.FakeTensorMode`). Every operation's new storage is counted while it is alive, so
the peak follows from the code that will run (adapters, layers, attention, recomputation, head) and not from a formula beside it.

    peak = process + weights + trained state (gradients, AdamW moments, kept originals) + taken(live activations) + scratch

What the operations do not show is in the constants below: memory inside a kernel and what the allocator keeps. They are measured:
`tests/engine/test_memory.py` runs real steps in fresh processes and prints measured / estimated.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from guidetune.engine import attention
from guidetune.engine.batching import Layout, MicroBatch
from guidetune.engine.forward import opened
from guidetune.engine.head import CHUNK_ELEMENTS
from guidetune.engine.settings import TuneSettings
from guidetune.errors import BadInput
from guidetune.models.architecture import plain

if TYPE_CHECKING:
    from guidetune.params import Params

# Activations: what the allocator takes for what lives. By default the C library keeps freed blocks, and aligned blocks of tensors leave
# holes between them: (factor, and bytes besides). Inside `sparing` every large block goes back when it is freed; that costs time.
KEEPING = (2.1, 128 << 20)
KEEPING_BY_HAND = (1.25, 224 << 20)  # the hand-written stack frees in the order in which it took
FRUGAL = (1.15, 96 << 20)
# Kernel code compiled on first use, thread pools, optimiser and progress machinery.
SCRATCH = 96 << 20
# logsumexp and products in 16 bits hold one more fp32 chunk of logits than the operations show.
HEAD_SCRATCH = 4 * CHUNK_ELEMENTS
# Of the free memory, what a run may plan with when no limit was given.
USABLE = 0.9
QUANTIZED = {"8bit": 1.01, "4bit": 0.52}  # bytes of a weight, its scales included
SMALLEST = 64  # tokens of a micro-batch below which no plan goes
ADVICE = "lower tune.max_length or the adapter's rank, use a smaller model, or allow more with --max-memory"


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


# ---------------------------------------------------------------------------------------------------------------------
# What there is


def free_memory(device: str = "cpu") -> int | None:
    """Bytes this process may still take on the device, or None where that cannot be known.

    On Linux the least of the system's available memory and what the control groups leave (versions 2 and 1).
    """
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info()[0])
    found = [*_system_available(), *_group_available()]
    return max(0, min(found)) if found else None


def _system_available() -> Iterator[int]:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024
                return
    except (OSError, ValueError, IndexError):
        pass
    if hasattr(os, "sysconf"):  # macOS has no figure for what is free; half of all is a guess that errs on the safe side
        try:
            yield os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        except (OSError, ValueError):
            return


def _group_available(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """limit − use of every control group this process is in; the page cache counts as free, as the kernel gives it back first."""
    places = [(root, "memory.max", "memory.current", "inactive_file"), (root / "memory", *_V1)]
    try:
        for line in own.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            below = Path(path.strip("/"))
            for part in [below, *below.parents]:
                if part == Path("."):
                    continue
                if not controllers:
                    places.append((root / part, "memory.max", "memory.current", "inactive_file"))
                elif "memory" in controllers.split(","):
                    places.append((root / "memory" / part, *_V1))
    except (OSError, ValueError):
        pass
    for folder, most, now, cache in places:
        try:
            limit = (folder / most).read_text(encoding="ascii").strip()
            if limit == "max" or int(limit) >= 1 << 60:
                continue
            used = int((folder / now).read_text(encoding="ascii"))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
            yield int(limit) - used + int(stat.get(cache, 0))
        except (OSError, ValueError):
            continue


_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def resident() -> int:
    """Bytes of this process in memory now (0 where the system does not say)."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0


# ---------------------------------------------------------------------------------------------------------------------
# What a pass needs


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak of a pass, by part; `tokens` is the micro-batch it was made for."""

    what: str
    parts: Mapping[str, int]
    tokens: int
    recompute: bool = False
    frugal: bool = False

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def text(self, most: int = 3) -> str:
        """`2.1 GB (weights 1.2 GB, activations of 4,096 tokens 0.7 GB, ...)`, the largest parts first."""
        biggest = sorted(self.parts.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{name} {gigabytes(size)}" for name, size in biggest[:most] if size)
        return f"{gigabytes(self.total)} ({shown})"

    def as_dict(self) -> dict[str, Any]:
        return {
            "bytes": self.total,
            "tokens": self.tokens,
            "gradient_checkpointing": self.recompute,
            "frugal": self.frugal,
            "parts": dict(self.parts),
        }


class _Live(TorchDispatchMode):
    """Bytes of all storages made inside the block: how many live now, and the most that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, int] = {}

    def known(self, tensors: Any) -> None:
        """Storages that are counted elsewhere."""
        for tensor in tensors:
            self._seen[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        self.peak = max(self.peak, self.now)
        return out

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen[key] = size
        self.now += size
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._seen.pop(key, 0)


@dataclass
class Outline:
    """A model in shapes only, with its trainable part attached, on which passes can be tried at no cost."""

    model: nn.Module
    dtype: torch.dtype
    weights: int  # bytes of all parameters and buffers, trained ones included
    trained: int  # bytes of the trained parameters
    originals: int  # bytes of copies that the params method keeps
    _peaks: dict[tuple[Any, ...], int] = field(default_factory=dict)
    _by_hand: dict[Layout | None, bool] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, dtype: str, params: Params | None = None, quantize: str = "none") -> Outline:
        """From the configuration in a model folder; `quantize` as in `tune.quantize`.

        Raises:
            BadInput: the folder's configuration cannot be used, or `params` does not fit the model.
        """
        from guidetune.models.names import empty_model

        return cls.shaped(empty_model(folder), getattr(torch, dtype), params, quantize)

    @classmethod
    def shaped(cls, model: nn.Module, dtype: torch.dtype, params: Params | None = None, quantize: str = "none") -> Outline:
        """From a model on the meta device."""
        model = model.to(dtype)
        originals = 0
        if params is not None:
            with torch.device("meta"):
                attached = params.attach(model)
            model = attached.model
            trained = sum(p.nbytes for p in attached.trainable().values())
            originals = trained if params.keeps_original else 0
        else:
            model.requires_grad_(False)
            trained = 0
        held = {id(t): t.nbytes for t in [*model.parameters(), *model.buffers()]}
        if quantize != "none":
            head = plain(model).get_output_embeddings()
            for module in model.modules():
                if isinstance(module, nn.Linear) and module is not head and not module.weight.requires_grad:
                    held[id(module.weight)] = int(module.weight.numel() * QUANTIZED[quantize])
        return cls(model, dtype, sum(held.values()), trained, originals)

    def by_hand(self, layout: Layout | None) -> bool:
        """Whether the hand-written stack runs this model (known once a peak was asked for)."""
        return self._by_hand.get(layout, False)

    def peak(self, tokens: int, longest: int, *, train: bool, recompute: bool = False, layout: Layout | None = None) -> int:
        """Most bytes alive at once in one micro-batch, beside weights and accumulated gradients."""
        key = (tokens, longest, train, recompute, layout)
        if key not in self._peaks:
            self._peaks[key], self._by_hand[layout] = _trial(self.model, _worst_batch(tokens, longest), train, recompute, layout)
        return self._peaks[key]


def _worst_batch(tokens: int, longest: int) -> list[int]:
    """Documents of the greatest length that fill the budget; a longer row is a micro-batch of its own."""
    full, rest = divmod(max(tokens, longest), longest)
    return [longest] * full + ([rest] if rest > 1 else [])


def _trial(model: nn.Module, lengths: list[int], train: bool, recompute: bool, layout: Layout | None) -> tuple[int, bool]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    chosen: Layout = layout or ("varlen" if attention.supported(plain(model)) else "padded")
    if chosen == "padded":
        lengths = [lengths[0]] * max(1, len(lengths) - (lengths[-1] != lengths[0]))
    live = _Live()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, _unreal(model, fake):
        live.known([*model.parameters(), *model.buffers()])
        if train:
            for p in model.parameters():
                # what earlier micro-batches have added up
                p.grad = torch.zeros_like(p) if p.requires_grad else None
            live.known([p.grad for p in model.parameters() if p.grad is not None])
        batch = _fake_batch(lengths, chosen)
        before = model.training
        model.train(train)
        try:
            with (
                torch.set_grad_enabled(train),
                live,  # before the model is prepared: what that makes (rounded copies of adapters) counts
                opened(model, chosen, checkpointing=recompute) as forward,
                forward.documents(batch),
            ):
                by_hand = forward.stack is not None
                nll = forward.nll(batch)
                if train:
                    (nll * batch.loss_weight).sum().backward()
        finally:
            model.train(before)
            for p in model.parameters():
                p.grad = None
    return live.peak, by_hand


@contextmanager
def _unreal(model: nn.Module, mode: Any) -> Iterator[None]:
    """Inside the block every parameter and buffer of a meta model is a fake tensor that calls itself a CPU tensor.

    The meta device would choose other attention kernels than the processor does.
    """
    kept: list[tuple[dict[str, Any], str, Any]] = []
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    with mode:
                        new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
                    made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
                kept.append((store, name, tensor))
                store[name] = made[id(tensor)]
    try:
        yield
    finally:
        for store, name, tensor in kept:
            store[name] = tensor


def _fake_batch(lengths: list[int], layout: Layout) -> MicroBatch:
    """A micro-batch of these documents in which every token but the first is a target."""
    n, targets = sum(lengths), sum(lengths) - len(lengths)
    shape = (1, n) if layout == "varlen" else (len(lengths), lengths[0])

    def whole(*size: int) -> torch.Tensor:
        return torch.zeros(*size, dtype=torch.long)

    return MicroBatch(
        rows=np.arange(len(lengths)),
        lengths=lengths,
        input_ids=whole(*shape),
        position_ids=whole(*shape),
        attention_mask=None if layout == "varlen" else whole(*shape),
        predicts=whole(targets),
        targets=whole(targets),
        loss_weight=torch.ones(targets),
        row=whole(targets),
    )


def taken(live: int, frugal: bool, by_hand: bool = False) -> int:
    """Bytes the allocator takes from the system for `live` bytes of activations."""
    factor, besides = FRUGAL if frugal or not hasattr(os, "sysconf") else KEEPING_BY_HAND if by_hand else KEEPING
    return int(factor * live) + besides + HEAD_SCRATCH


@contextmanager
def sparing(on: bool) -> Iterator[None]:
    """Inside the block the C library gives large freed blocks back to the system at once (glibc; elsewhere nothing happens).

    A step with gradient checkpointing was measured to take half the memory and half as much time again.
    """
    mallopt = None
    if on:
        import ctypes

        try:
            mallopt = ctypes.CDLL(None).mallopt
        except (OSError, AttributeError):
            pass
    threshold = -3  # M_MMAP_THRESHOLD
    if mallopt is not None:
        mallopt(threshold, 1 << 20)
    try:
        yield
    finally:
        if mallopt is not None:
            mallopt(threshold, 32 << 20)  # the most that the library's own adjustment goes to


def tune_estimate(
    outline: Outline,
    tokens: int,
    longest: int,
    recompute: bool,
    process: int | None = None,
    layout: Layout | None = None,
    frugal: bool = False,
) -> Estimate:
    """A training step: weights, AdamW's two moments and the gradient of every trained value in its own precision, one micro-batch."""
    tokens = max(tokens, longest)
    peak = outline.peak(tokens, longest, train=True, recompute=recompute, layout=layout)
    return Estimate(
        "training",
        {
            "weights": outline.weights,
            "gradients and AdamW moments": 3 * outline.trained,
            "originals of the trained weights": outline.originals,
            f"activations of {tokens:,} tokens": taken(peak, frugal, outline.by_hand(layout)),
            "the process itself": (resident() if process is None else process) + SCRATCH,
        },
        tokens,
        recompute,
        frugal,
    )


def pass_estimate(
    outline: Outline, what: str, tokens: int, longest: int, process: int | None = None, layout: Layout | None = None, cached: bool = False
) -> Estimate:
    """A pass without gradients (guidance, validation, evaluation). `cached`: keys and values of all tokens are kept, as in generation."""
    tokens = max(tokens, longest)
    peak = outline.peak(tokens, longest, train=False, layout=layout)
    parts = {
        "weights": outline.weights,
        # few blocks live at once and their sizes repeat: nothing is left between them
        f"activations of {tokens:,} tokens": taken(peak, frugal=True),
        "the process itself": (resident() if process is None else process) + SCRATCH,
    }
    if cached:
        # a growing cache copies one layer at a time: the new one beside the old
        layers = max(1, getattr(plain(outline.model).config.get_text_config(), "num_hidden_layers", 1))
        parts[f"keys and values of {tokens:,} tokens"] = tokens * kv_bytes(outline) * (layers + 1) // layers
    return Estimate(what, parts, tokens)


def kv_bytes(outline: Outline) -> int:
    """Bytes of keys and values of one token in all layers."""
    config = plain(outline.model).config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * width * outline.dtype.itemsize


def plainly_fits(config: Mapping[str, Any], parameters: int, tokens: int, budget: int) -> bool:
    """Whether full fine-tuning in fp32 would fit several times over, by a rough upper bound: then nothing needs to be tried."""
    text = {**config, **(config.get("text_config") or {})}
    try:
        width, inner, layers = (int(text[key]) for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    except (KeyError, TypeError, ValueError):
        return False
    return 40 * parameters + 4 * tokens * layers * (80 * width + 24 * inner) + (1 << 30) < budget


# ---------------------------------------------------------------------------------------------------------------------
# Settings that fit


def fit_tune(
    outline: Outline, settings: TuneSettings, longest: int, budget: int, *, fixed_tokens: bool = False, process: int | None = None
) -> tuple[TuneSettings, Estimate, bool]:
    """Settings whose estimate is within `budget`: (settings, estimate, whether they fit).

    In this order: as asked for; with gradient checkpointing, where it is `auto`; with fewer micro_tokens (unless `fixed_tokens`: the
    reducer `micro` makes them part of the result); the same again with an allocator that keeps nothing (`Estimate.frugal`). When
    nothing fits, the smallest that was tried.
    """
    layout = None if settings.layout == "auto" else settings.layout
    asked = settings.gradient_checkpointing
    ways = [False, True] if asked == "auto" and _can_recompute(outline.model) else [asked is True]

    def at(tokens: int, recompute: bool, frugal: bool) -> Estimate:
        return tune_estimate(outline, tokens, longest, recompute, process, layout, frugal)

    best = at(settings.micro_tokens, ways[0], False)
    for frugal in (False, True):
        for way in ways:
            if best.total > budget:
                best = at(settings.micro_tokens, way, frugal)
        if best.total > budget and not fixed_tokens:
            best = _fewer(lambda tokens, frugal=frugal: at(tokens, ways[-1], frugal), best, longest, budget)
        if best.total <= budget:
            break
    chosen = settings.model_copy(
        update={"gradient_checkpointing": best.recompute, "micro_tokens": min(settings.micro_tokens, max(best.tokens, SMALLEST))}
    )
    return chosen, best, best.total <= budget


def fit_pass(outline: Outline, what: str, tokens: int, longest: int, budget: int, **options: Any) -> tuple[int, Estimate, bool]:
    """(tokens of one forward pass, estimate, whether it fits): as asked for, or fewer."""
    best = pass_estimate(outline, what, tokens, longest, **options)
    if best.total > budget:
        best = _fewer(lambda n: pass_estimate(outline, what, n, longest, **options), best, longest, budget)
    return min(tokens, max(best.tokens, SMALLEST)), best, best.total <= budget


def _fewer(at: Callable[[int], Estimate], most: Estimate, longest: int, budget: int) -> Estimate:
    """The largest micro-batch that fits, by halving; the smallest possible one when none does."""
    tokens, best = most.tokens, most
    while best.total > budget and tokens > max(longest, SMALLEST):
        tokens = max(tokens // 2, longest, SMALLEST)
        best = at(tokens)
    return best


def _can_recompute(model: nn.Module) -> bool:
    return bool(getattr(plain(model), "supports_gradient_checkpointing", False))


def refusal(estimate: Estimate, budget: int, smallest_fits: str = "") -> BadInput:
    return BadInput(
        f"{estimate.what} needs about {estimate.text()}, and {gigabytes(budget)} is allowed; this is with the smallest micro-batch"
        f"{' and gradient checkpointing' if estimate.recompute else ''}. {smallest_fits or ADVICE[0].upper() + ADVICE[1:]}"
    )


def outlook(folder: Path) -> str:
    """What is free here, and what tuning the model of a folder with the default recipe would take."""
    from guidetune import registry
    from guidetune.engine.precision import frozen_dtype
    from guidetune.models.checkpoint import Checkpoint
    from guidetune.models.loading import pick_device

    device = pick_device()
    with Checkpoint(folder) as checkpoint:
        parameters = sum(info.numel for info in checkpoint.tensors.values())
    free = free_memory(device)
    lora = registry.build("params", "lora")
    outline = Outline.of(folder, frozen_dtype("auto", parameters, device), lora)
    longest = min(2048, getattr(plain(outline.model).config.get_text_config(), "max_position_embeddings", None) or 2048)
    settings = TuneSettings()
    needs = f"tuning with the defaults (LoRA of rank {lora.rank}, rows of up to {longest:,} tokens)"  # type: ignore[attr-defined]
    if free is None:
        estimate = tune_estimate(outline, settings.micro_tokens, longest, False)
        return f"memory: {needs} needs about {estimate.text()}"
    _, estimate, fits = fit_tune(outline, settings, longest, int(USABLE * free) + resident())
    how = [f"micro-batches of {estimate.tokens:,} tokens", *(["gradient checkpointing"] if estimate.recompute else [])]
    return (
        f"memory: {gigabytes(free)} free on {device}; {needs} needs about {estimate.text()} with {' and '.join(how)}"
        f"{'' if fits else ': more than there is'}"
    )
