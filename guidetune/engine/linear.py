"""Linear layers with low-rank adapters, by hand: no fp32 copies of activations, no temporary sums, no gradient nobody asked for.

A `Bundle` holds the layers that read the same input (q, k and v; gate and up; or a single one):

    y_i = x W_iᵀ + b_i + s_i d(x) A_iᵀ B_iᵀ          x [N, in], W_i [out_i, in], A_i [r_i, in], B_i [out_i, r_i]

The adapters' first products are one product with the stacked A; the second ones are added into y_i in place. Backward:

    u = d(x) [A_1; A_2; …]ᵀ,   du_i = s_i dy_i B_i,   dB_i = s_i dy_iᵀ u_i,   dA = duᵀ d(x),   dx = Σ_i dy_i W_i + dᵀ(du A)

d is dropout with one mask for the bundle (peft draws one per layer; each has the same distribution). Masters stay in fp32; what
enters a product is rounded to the weights' dtype once per optimiser step. Weight gradients of W_i only where W_i is trained.
LoRA: arXiv 2106.09685.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from guidetune.models.architecture import has_contents

Gradients = dict[int, torch.Tensor]  # by id of the parameter


@dataclass(frozen=True)
class Adapted:
    """One linear layer: W, b and, where it is adapted, A, B, their scale and the dropout on the adapter's input."""

    module: nn.Module
    weight: torch.Tensor
    bias: torch.Tensor | None
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scale: float = 1.0
    dropout: float = 0.0

    @property
    def on(self) -> bool:
        return self.a is not None and not self.module.disable_adapters


def adapted(module: nn.Module | None) -> Adapted | None:
    """What a plain linear layer or a plain LoRA layer of peft computes, or None where it computes something else."""
    if module is None or module._forward_hooks or module._forward_pre_hooks:
        return None
    if type(module).forward is nn.Linear.forward:
        return Adapted(module, module.weight, module.bias) if _plain(module.weight) else None
    base = getattr(module, "base_layer", None)
    if base is None or not hasattr(module, "lora_A") or type(base).forward is not nn.Linear.forward or not _plain(base.weight):
        return None
    active = [name for name in module.active_adapters if name in module.lora_A]
    if module.merged or len(active) > 1 or getattr(module, "lora_variant", None):
        return None
    if not active:
        return Adapted(module, base.weight, base.bias)
    a, b = module.lora_A[active[0]], module.lora_B[active[0]]
    if b.bias is not None or not (_plain(a.weight) and _plain(b.weight)):
        return None
    drop = module.lora_dropout[active[0]]
    p = float(drop.p) if isinstance(drop, nn.Dropout) else 0.0
    return Adapted(module, base.weight, base.bias, a.weight, b.weight, float(module.scaling[active[0]]), p)


def draws_by_row(module: nn.Module) -> bool:
    """Whether a layer's dropout is drawn by `Noise`: a plain LoRA layer of peft, its weight sharded or not."""
    return (
        hasattr(module, "lora_A")
        and type(getattr(module, "base_layer", None)).forward is nn.Linear.forward
        and len([name for name in module.active_adapters if name in module.lora_A]) <= 1
        and not getattr(module, "lora_variant", None)
        and all(layer.bias is None for layer in module.lora_B.values())
    )


def _plain(tensor: torch.Tensor) -> bool:
    """An ordinary floating-point tensor: not quantised, not sharded over processes."""
    known = type(tensor) in (nn.Parameter, torch.Tensor) or not has_contents(tensor)
    return known and tensor.is_floating_point() and not tensor.is_meta


class Bundle:
    """Linear layers of one input. `leaves` maps the id of a parameter to the tensor that stands for it in this pass."""

    def __init__(self, members: Sequence[Adapted]) -> None:
        self.members = list(members)
        self.dtype = self.members[0].weight.dtype
        self.p = _dropped(max(m.dropout for m in self.members)) / 65536
        self._a: torch.Tensor | None = None
        self._b: list[torch.Tensor] = []

    def parameters(self) -> Iterator[torch.Tensor]:
        for m in self.members:
            yield from (t for t in (m.weight, m.bias, m.a, m.b) if t is not None)

    def refresh(self) -> None:
        """Round A and s·B anew: after an optimiser step (which torch's fused optimisers do not show in a tensor's version)."""
        on = [m for m in self.members if m.on]
        with torch.no_grad():
            self._a = torch.cat([m.a for m in on]).to(self.dtype) if on else None
            self._b = [(m.b * m.scale).to(self.dtype) for m in on]

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, noise: Noise | None = None
    ) -> tuple[list[torch.Tensor], tuple[Any, ...]]:
        """The outputs y_i [N, out_i], and what `backward` needs besides x. `residual` [N, out] is added to a single output."""
        mask = None
        u = None
        if self._a is not None:
            xd = x
            if self.p and noise is not None:
                mask = noise.mask(x, self.p)
                xd = x * mask
            u = xd @ self._a.T
            if mask is not None:
                u *= 1.0 / (1.0 - self.p)
        out, r, k = [], 0, 0
        for m in self.members:
            if residual is not None:
                y = torch.addmm(residual, x, m.weight.T)
                if m.bias is not None:
                    y += m.bias
            elif m.bias is not None:
                y = torch.addmm(m.bias, x, m.weight.T)
            else:
                y = x @ m.weight.T
            if m.on:
                b = self._b[k]
                y.addmm_(u[:, r : r + b.shape[1]], b.T)
                r, k = r + b.shape[1], k + 1
            out.append(y)
        return out, (u, mask)

    def backward(
        self, dys: Sequence[torch.Tensor], x: torch.Tensor, saved: tuple[Any, ...], wanted: frozenset[int], grads: Gradients, need_dx: bool
    ) -> torch.Tensor | None:
        """dx [N, in] (None unless wanted); the gradients of trained parameters are added to `grads`."""
        u, mask = saved
        dx = None
        du = None if u is None else torch.empty_like(u)
        r, k = 0, 0
        for m, dy in zip(self.members, dys, strict=True):
            if need_dx:
                dx = dy @ m.weight if dx is None else dx.addmm_(dy, m.weight)
            if id(m.weight) in wanted:
                add_gradient(grads, m.weight, dy.T @ x)
            if m.bias is not None and id(m.bias) in wanted:
                add_gradient(grads, m.bias, dy.sum(0, dtype=torch.float32))
            if m.on:
                b = self._b[k]
                part = slice(r, r + b.shape[1])
                torch.mm(dy, b, out=du[:, part])
                if id(m.b) in wanted:
                    add_gradient(grads, m.b, (dy.T @ u[:, part]).float().mul_(m.scale))
                r, k = part.stop, k + 1
        if du is None:
            return dx
        if mask is not None:
            du *= 1.0 / (1.0 - self.p)
        a_wanted = [m.a for m in self.members if m.on and id(m.a) in wanted]
        if a_wanted:
            da = (du.T @ (x if mask is None else x * mask)).float()
            r = 0
            for m in self.members:
                if m.on:
                    if id(m.a) in wanted:
                        add_gradient(grads, m.a, da[r : r + m.a.shape[0]])
                    r += m.a.shape[0]
        if need_dx:
            if mask is None:
                dx.addmm_(du, self._a)
            else:
                dx += (du @ self._a).mul_(mask)
        return dx


def add_gradient(grads: Gradients, parameter: torch.Tensor, value: torch.Tensor) -> None:
    have = grads.get(id(parameter))
    value = value.to(parameter.dtype)
    if have is None:
        grads[id(parameter)] = value
    else:
        have += value


@dataclass(frozen=True)
class Noise:
    """Where dropout masks come from: each document's is a function of the seed of the step, its row and the layer's place.

    So a mask depends neither on how rows are laid out in micro-batches and over processes, nor on the order of drawing:
    recomputation in the backward pass finds it again, and so does the other way of running the same model.
    rows: the document's rows in the data; lengths; width: of a padded batch, None where documents lie end to end.
    chosen: the layer sees only these rows of the micro-batch.
    """

    seed: int
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    width: int | None = None
    place: str = ""
    chosen: torch.Tensor | None = None

    def at(self, place: str, chosen: torch.Tensor | None = None) -> Noise:
        return replace(self, place=place, chosen=chosen)

    def mask(self, x: torch.Tensor, p: float) -> torch.Tensor:
        """1 where dropout keeps, 0 where it drops, like x [N, in]; 16 random bits each, some times faster than torch's bernoulli."""
        size = x.shape[-1]
        count = sum(self.lengths) if self.width is None else self.width * len(self.rows)
        mask = x.new_zeros(len(x) if self.chosen is None else count, size)
        at = 0
        for row, length in zip(self.rows, self.lengths, strict=True):
            key = hashlib.blake2b(f"{self.seed}:{row}:{self.place}".encode(), digest_size=8).digest()
            generator = torch.Generator(device=x.device).manual_seed(int.from_bytes(key, "little") >> 1)
            bits = torch.empty(-(-length * size // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None, generator=generator)
            mask[at : at + length] = bits.view(torch.int16)[: length * size].view(length, size) >= _dropped(p) - 32768
            at += length if self.width is None else self.width
        if self.chosen is None:
            return mask
        out = torch.zeros_like(x)
        torch.index_select(mask, 0, self.chosen, out=out[: len(self.chosen)])
        return out


# q, k and v share a mask, and so do gate and up
_PARTS = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv") | dict.fromkeys(("gate_proj", "up_proj"), "gate_up")
_PARTS |= {"o_proj": "out", "down_proj": "down"}
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)$")
# The noise of the micro-batch in work; None: no dropout. A module global for the reason given in attention.py.
_noise: Noise | None = None


def place(name: str) -> str:
    """The place of a linear layer's mask, from the layer's name."""
    found = _LAYER.search(name)
    return f"{found[1]}:{_PARTS.get(found[2], found[2])}" if found else name


def sow(noise: Noise | None) -> None:
    """Set what the dropout masks of layers run by `installed` are drawn from."""
    global _noise
    _noise = noise


def _dropped(p: float) -> int:
    return round(p * 65536)


class _LoraLinear(torch.autograd.Function):
    """A bundle of one inside autograd."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bundle: Bundle, noise: Noise | None, *parameters: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        (y,), saved = bundle.forward(flat, noise=noise)
        ctx.bundle, ctx.saved, ctx.shape = bundle, saved, x.shape
        ctx.save_for_backward(flat)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (flat,) = ctx.saved_tensors
        parameters = list(ctx.bundle.parameters())
        wanted = frozenset(id(p) for p, need in zip(parameters, ctx.needs_input_grad[3:], strict=True) if need)
        grads: Gradients = {}
        dx = ctx.bundle.backward([dy.reshape(-1, dy.shape[-1])], flat, ctx.saved, wanted, grads, ctx.needs_input_grad[0])
        return None if dx is None else dx.view(ctx.shape), None, None, *(grads.get(id(p)) for p in parameters)


@contextmanager
def installed(model: nn.Module) -> Iterator[None]:
    """Run the plain LoRA layers of peft in `model` through `Bundle` inside the block."""
    changed = []

    def patch(name: str, module: nn.Module) -> None:
        original = module.forward

        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            # looked at in every pass: a sharded weight is whole only now
            layer = None if args or kwargs or torch.is_autocast_enabled(x.device.type) else adapted(module)
            if layer is None or layer.a is None or x.dtype != layer.weight.dtype:
                return original(x, *args, **kwargs)
            bundle = Bundle([layer])
            bundle.refresh()
            noise = _noise.at(place(name)) if module.training and bundle.p and _noise is not None else None
            return _LoraLinear.apply(x, bundle, noise, *bundle.parameters())

        module.forward = forward
        changed.append(module)

    with ExitStack() as stack:
        stack.callback(lambda: [m.__dict__.pop("forward", None) for m in changed])
        for name, module in model.named_modules():
            if hasattr(module, "lora_A") and "forward" not in module.__dict__:
                patch(name, module)
        yield
