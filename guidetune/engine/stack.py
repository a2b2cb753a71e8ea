"""The decoder stack of Llama-like models, forward and backward by hand.

Serves pre-norm decoder layers made of RMS norms, q/k/v/o with rotary positions and a gated SiLU MLP (Llama, Mistral, Qwen 2 and 3,
SmolLM and their kin), recognised by structure and compared with the model's own forward pass before it is trusted; everything
else runs through transformers' modules. One layer:

    n = rms(x) w₁,  q, k, v = Bundle(n),  x' = x + o(attention(rope(q), rope(k), v))
    m = rms(x') w₂, g, u = Bundle(m),     y = x' + down(silu(g) u)

What autograd would spend beside the products falls away: no fp32 copies, no zero fills, sums written by the products themselves,
the gradient of the residual stream in fp32, no dx below the lowest trained layer, the last MLP only at rows that predict a target.
Attention of short documents is two products and a softmax over all documents of similar length at once (`attention.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from guidetune.engine import attention, scratch
from guidetune.engine.linear import Adapted, Bundle, Gradients, Noise, adapted, add_gradient
from guidetune.models.architecture import has_contents

LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
NORMS = {"q_norm", "k_norm"}
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
BACKBONE = {"embed_tokens", "layers", "norm", "rotary_emb"}
# Difference of the hidden states from the model's own, as a share of their norm.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}


@dataclass(frozen=True)
class Norm:
    weight: torch.Tensor
    eps: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x w / rms(x), in fp32 and rounded once; a few rows at a time (see scratch.py)."""
        rows, out, weight = x.flatten(0, -2), torch.empty_like(x), self.weight.float()
        flat = out.view(rows.shape)
        for a, b in scratch.pieces(*rows.shape):
            xf = scratch.block("norm", (b - a, rows.shape[1]), torch.float32, x.device).copy_(rows[a:b])
            flat[a:b] = xf.mul_(self._inverse(xf)).mul_(weight)
        return out

    def backward(
        self, dy: torch.Tensor, x: torch.Tensor, wanted: frozenset[int], grads: Gradients, into: torch.Tensor | None = None
    ) -> torch.Tensor:
        """dx = r (g − x (g·x) r² / d) with g = dy w, r = 1 / rms(x): added to `into` (fp32), or in the dtype of dy."""
        xf = x.float()
        g = dy.float()
        r = self._inverse(xf)
        if id(self.weight) in wanted:
            add_gradient(grads, self.weight, (g * xf * r).flatten(0, -2).sum(0))
        g = g * self.weight.float() if g is dy else g.mul_(self.weight.float())
        c = (g * xf).sum(-1, keepdim=True)
        c *= r * r
        c /= x.shape[-1]
        g = g.addcmul_(xf, c, value=-1).mul_(r)
        return g.to(dy.dtype) if into is None else into.add_(g)

    def _inverse(self, x: torch.Tensor) -> torch.Tensor:
        """1 / rms of each row of x (fp32): [n, 1]."""
        return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(self.eps).rsqrt_()


@dataclass(frozen=True)
class Layer:
    """One decoder layer's parameters and sizes."""

    norm1: Norm
    qkv: Bundle
    q_norm: Norm | None
    k_norm: Norm | None
    out: Bundle
    norm2: Norm
    gate_up: Bundle
    down: Bundle
    head_dim: int
    scaling: float
    window: int | None

    def bundles(self) -> tuple[Bundle, ...]:
        return self.qkv, self.out, self.gate_up, self.down

    def parameters(self) -> list[torch.Tensor]:
        norms = [n.weight for n in (self.norm1, self.q_norm, self.k_norm, self.norm2) if n is not None]
        return norms + [p for bundle in self.bundles() for p in bundle.parameters()]


@dataclass
class Batch:
    """What the layers of one pass share: documents, rotary tables, rows that predict a target, where dropout masks come from."""

    documents: attention.Documents
    cos: torch.Tensor
    sin: torch.Tensor
    rows: torch.Tensor
    drawn: Noise | None

    def noise(self, layer: int, part: str, last: bool = False) -> Noise | None:
        """`last`: the part sees only the rows that predict a target."""
        return None if self.drawn is None else self.drawn.at(f"{layer}:{part}", self.rows if last else None)


class Stack:
    """The layers of a model, from embeddings to the hidden states before the final norm."""

    def __init__(self, backbone: nn.Module, layers: Sequence[Layer]) -> None:
        self.backbone = backbone
        self.layers = list(layers)
        self.parameters = list({id(p): p for layer in layers for p in layer.parameters()}.values())
        self.dtype = layers[0].qkv.dtype
        self.dropout = any(bundle.p for layer in layers for bundle in layer.bundles())

    def refresh(self) -> None:
        for layer in self.layers:
            for bundle in layer.bundles():
                bundle.refresh()

    def hidden(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        lengths: Sequence[int],
        rows: torch.Tensor,
        noise: Noise | None = None,
        recompute: bool = False,
        leaves: dict[int, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Hidden states [n, H] at `rows` after the final norm. input_ids, position_ids: [1, N]; lengths: of the documents.

        noise: of dropout; None: no dropout. recompute: keep only each layer's input for the backward pass.
        leaves: tensors that stand for parameters (by id) in autograd, so that several threads collect gradients apart.
        """
        n = input_ids.shape[1]
        # rows that belong to no document: see attention.STEP
        fill = -n % (64 if n > 1024 else 32)
        input_ids, position_ids = F.pad(input_ids, (0, fill)), F.pad(position_ids, (0, fill))
        x = self.backbone.embed_tokens(input_ids)[0]
        cos, sin = self.backbone.rotary_emb(x[None], position_ids=position_ids)
        documents = attention.Documents(lengths, x.device)
        batch = Batch(documents, cos[0, :, None].float(), sin[0, :, None].float(), rows, noise if self.dropout else None)
        stand_ins = [p if leaves is None else leaves.get(id(p), p) for p in self.parameters]
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in stand_ins)):
            h = _StackFunction.apply(x, self, batch, recompute, *stand_ins)
        else:
            h = x
            for i in range(len(self.layers)):
                h, _ = self._layer(i, h, batch)
        return self.backbone.norm(h[: len(rows)])

    def _layer(self, i: int, x: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, tuple[Any, ...]]:
        """The layer's output and what its backward pass needs."""
        layer = self.layers[i]
        last = i == len(self.layers) - 1
        n1 = layer.norm1.forward(x)
        (q, k, v), s_qkv = layer.qkv.forward(n1, noise=batch.noise(i, "qkv"))
        q, k, v = (t.view(len(x), -1, layer.head_dim) for t in (q, k, v))
        qn = layer.q_norm.forward(q) if layer.q_norm else q
        kn = layer.k_norm.forward(k) if layer.k_norm else k
        o, s_attention = attention.attend_documents(qn, kn, v, batch.cos, batch.sin, batch.documents, layer.scaling, layer.window)
        xr, o = (_selected(x, batch.rows), _selected(o, batch.rows)) if last else (x, o)
        (x1,), s_out = layer.out.forward(o, residual=xr, noise=batch.noise(i, "out", last))
        n2 = layer.norm2.forward(x1)
        (g, u), s_gate_up = layer.gate_up.forward(n2, noise=batch.noise(i, "gate_up", last))
        h = F.silu(g).mul_(u)
        (y,), s_down = layer.down.forward(h, residual=x1, noise=batch.noise(i, "down", last))
        # the inputs of norms whose output is not scaled again are cheap to form once more; q and k are kept only under their own norm
        heads = (q if layer.q_norm else None, k if layer.k_norm else None)
        return y, (n1, heads, o, x1, n2, g, u, s_qkv, s_attention, s_out, s_gate_up, s_down)

    def _layer_backward(
        self,
        i: int,
        dy: torch.Tensor,
        x: torch.Tensor,
        saved: tuple[Any, ...],
        batch: Batch,
        wanted: frozenset[int],
        grads: Gradients,
        need_dx: bool,
    ) -> torch.Tensor | None:
        """Gradient of the layer's input, fp32 [N, H], from that of its output, fp32 (overwritten)."""
        layer = self.layers[i]
        n1, (q, k), o, x1, n2, g, u, s_qkv, s_attention, s_out, s_gate_up, s_down = saved
        # whether anything is trained below the point where each gradient arrives: nothing is computed for nobody
        below_norm1 = need_dx or id(layer.norm1.weight) in wanted
        own = [n.weight for n in (layer.q_norm, layer.k_norm) if n is not None]
        below_attention = below_norm1 or _any(wanted, own, layer.qkv.parameters())
        below_out = below_attention or _any(wanted, layer.out.parameters())
        below_norm2 = below_out or id(layer.norm2.weight) in wanted
        below_gates = below_norm2 or _any(wanted, layer.gate_up.parameters())
        act = F.silu(g)
        dh = layer.down.backward([dy.to(self.dtype)], act * u, s_down, wanted, grads, below_gates)
        if dh is None:
            return None
        du = dh * act
        dg = torch.ops.aten.silu_backward(dh.mul_(u), g)
        dn2 = layer.gate_up.backward([dg, du], n2, s_gate_up, wanted, grads, below_norm2)
        if dn2 is None:
            return None
        dx1 = layer.norm2.backward(dn2, x1, wanted, grads, into=dy)
        if not below_out:
            return None
        do = layer.out.backward([dx1.to(self.dtype)], o, s_out, wanted, grads, below_attention)
        if do is None:
            return None
        if i == len(self.layers) - 1:
            n = len(batch.rows)
            do = do.new_zeros(len(x), do.shape[1]).index_copy_(0, batch.rows, do[:n])
            dx1 = dx1.new_zeros(x.shape).index_copy_(0, batch.rows, dx1[:n])
        dq, dk, dv = attention.attend_documents_backward(do, s_attention, batch.cos, batch.sin, batch.documents, self.dtype)
        if layer.q_norm:
            dq = layer.q_norm.backward(dq, q, wanted, grads)
        if layer.k_norm:
            dk = layer.k_norm.backward(dk, k, wanted, grads)
        dn1 = layer.qkv.backward([t.view(len(x), -1) for t in (dq, dk, dv)], n1, s_qkv, wanted, grads, below_norm1)
        return None if dn1 is None else layer.norm1.backward(dn1, x, wanted, grads, into=dx1)


def _lowest(stack: Stack, needed: Sequence[bool]) -> int:
    """The lowest layer with a trained parameter: no gradient goes below it, and nothing is kept for one."""
    wanted = frozenset(id(p) for p, need in zip(stack.parameters, needed, strict=True) if need)
    return next(i for i, layer in enumerate(stack.layers) if _any(wanted, layer.parameters()))


def _any(wanted: frozenset[int], *parameters: Iterable[torch.Tensor]) -> bool:
    return any(id(p) in wanted for part in parameters for p in part)


def _selected(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """x[rows], filled up with zeros to a multiple of 32 rows."""
    out = x.new_empty(-(-len(rows) // 32) * 32, x.shape[1])
    torch.index_select(x, 0, rows, out=out[: len(rows)])
    out[len(rows) :] = 0
    return out


class _StackFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, stack: Stack, batch: Batch, recompute: bool, *parameters: torch.Tensor) -> torch.Tensor:
        lowest = 0 if ctx.needs_input_grad[0] else _lowest(stack, ctx.needs_input_grad[4:])
        kept = []
        for i in range(len(stack.layers)):
            y, saved = stack._layer(i, x, batch)
            if i >= lowest:
                kept.append((x, None if recompute else saved))
            x = y
        ctx.kept, ctx.stack, ctx.batch, ctx.lowest = kept, stack, batch, lowest
        return x

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        stack, batch = ctx.stack, ctx.batch
        wanted = frozenset(id(p) for p, need in zip(stack.parameters, ctx.needs_input_grad[4:], strict=True) if need)
        grads: Gradients = {}
        d = dy.float()
        d = d.clone() if d is dy else d
        for i in range(len(stack.layers) - 1, ctx.lowest - 1, -1):
            x, saved = ctx.kept.pop()
            if saved is None:
                _, saved = stack._layer(i, x, batch)
            d = stack._layer_backward(i, d, x, saved, batch, wanted, grads, i > ctx.lowest or ctx.needs_input_grad[0])
        ctx.kept.clear()
        dx = d.to(stack.dtype) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, *(grads.get(id(p)) for p in stack.parameters)


def recognise(backbone: nn.Module) -> Stack | None:
    """The stack of `backbone` when its structure is one we compute, else None. `agrees` must still be asked."""
    children = {name for name, _ in backbone.named_children()}
    if children != BACKBONE or any(m._forward_hooks or m._forward_pre_hooks for m in backbone.modules()):
        return None
    layers = [_layer(module, backbone.config) for module in backbone.layers]
    if not layers or any(layer is None for layer in layers):
        return None
    weights = {p.dtype for layer in layers for bundle in layer.bundles() for p in (m.weight for m in bundle.members)}
    devices = {p.device for layer in layers for p in layer.parameters()}
    if len(weights) != 1 or len(devices) != 1 or next(iter(devices)).type != "cpu" or backbone.embed_tokens.weight.dtype not in weights:
        return None
    return Stack(backbone, layers)


def _layer(module: nn.Module, config: Any) -> Layer | None:
    if {name for name, _ in module.named_children()} != LAYER:
        return None
    att, mlp = module.self_attn, module.mlp
    extra = {name for name, _ in att.named_children()} - ATTENTION
    if {name for name, _ in mlp.named_children()} != MLP or extra not in (set(), NORMS) or getattr(att, "attention_dropout", 0.0):
        return None
    if not isinstance(mlp.act_fn, nn.SiLU) and type(mlp.act_fn).__name__ != "SiLUActivation":
        return None
    q, k, v, o = (adapted(getattr(att, f"{name}_proj")) for name in "qkvo")
    gate, up, down = (adapted(getattr(mlp, f"{name}_proj")) for name in ("gate", "up", "down"))
    norms = [_norm(module.input_layernorm), _norm(module.post_attention_layernorm)]
    own = [_norm(getattr(att, name)) for name in ("q_norm", "k_norm")] if extra else [None, None]
    linears: list[Adapted | None] = [q, k, v, o, gate, up, down]
    if None in linears or None in norms or (extra and (None in own or any(n.weight.shape != (att.head_dim,) for n in own))):
        return None
    return Layer(
        norms[0], Bundle([q, k, v]), own[0], own[1], Bundle([o]), norms[1], Bundle([gate, up]), Bundle([down]),
        int(att.head_dim), float(att.scaling), getattr(att, "sliding_window", getattr(config, "sliding_window", None)),
    )  # fmt: skip


def _norm(module: nn.Module) -> Norm | None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    plain = {name for name, _ in module.named_parameters()} == {"weight"}
    return Norm(weight, float(eps)) if plain and eps is not None and weight.dim() == 1 else None


@torch.no_grad()
def agrees(stack: Stack, model: nn.Module) -> bool:
    """Whether the stack gives the hidden states of the model's own forward pass on two short documents."""
    vocab = stack.backbone.embed_tokens.weight.shape[0]
    window = next((layer.window for layer in stack.layers if layer.window), None) or 8
    lengths = [min(window, 32) + 3, 5]
    training = model.training
    model.eval()
    try:
        stack.refresh()
        ids = torch.arange(1, sum(lengths) + 1).mul(7).remainder(vocab)
        parts = ids.split(lengths)
        expected = torch.cat([stack.backbone(input_ids=part[None], use_cache=False).last_hidden_state[0] for part in parts]).float()
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        got = stack.hidden(ids[None], positions, lengths, torch.arange(len(ids))).float()
    finally:
        model.train(training)
    return bool((got - expected).norm() <= TOLERANCE[stack.dtype] * expected.norm())


def fast_stack(model: nn.Module, backbone: nn.Module) -> Stack | None:
    """The hand-written stack for this model, or None where transformers' own modules must run."""
    stack = recognise(backbone)
    if stack is None:
        return None
    if not has_contents(stack.parameters[0]):  # a memory estimate
        stack.refresh()
        return stack
    return stack if agrees(stack, model) else None
