"""Where a causal language model's parts are: its backbone and its output head, and how the head turns hidden states into logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from guidetune.errors import BadInput


@dataclass(frozen=True)
class Parts:
    """logits = cap · tanh(scale · (h Wᵀ + b) / cap), without the cap when `softcap` is None.

    weight: [V, H]; bias: [V] or None.
    """

    backbone: nn.Module
    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float | None


def has_contents(tensor: torch.Tensor) -> bool:
    """False for tensors that are only shapes: memory is estimated with those."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def plain(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper (or the model itself)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def parts(model: nn.Module) -> Parts:
    """Backbone and head of a causal language model.

    Raises:
        BadInput: the model has no output embedding, or its head is not a plain linear layer.
    """
    inner = plain(model)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    kind = type(inner).__name__
    if head is None or getattr(head, "weight", None) is None:
        raise BadInput(f"{kind} has no output embeddings: guidetune tunes causal language models")
    head = getattr(head, "base_layer", head)
    backbone = inner.base_model
    if backbone is inner:
        raise BadInput(f"{kind}: cannot tell its backbone from its head (base_model_prefix is not set)")
    config = inner.config.get_text_config()
    scale = 1.0
    if getattr(config, "logits_scaling", None):  # Granite divides
        scale = 1.0 / float(config.logits_scaling)
    elif getattr(config, "logit_scale", None):  # Cohere multiplies
        scale = float(config.logit_scale)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Parts(backbone, head.weight, getattr(head, "bias", None), scale, float(softcap) if softcap else None)


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Compare head(backbone(ids)) with `model(ids).logits` on one short document; refuse an architecture we would get wrong.

    Raises:
        BadInput: the two differ by more than 2 % of the logits' spread (6 % where the weights have 16 bits).
    """
    inner = plain(model)
    head = parts(model)
    if not has_contents(head.weight):
        return  # shapes only (the memory estimate): nothing to compare
    vocab = head.weight.shape[0]
    ids = torch.arange(1, 9, device=head.weight.device).remainder(vocab)[None]
    training = model.training
    model.eval()
    try:
        expected = inner(input_ids=ids, use_cache=False).logits[0].float()
        hidden = head.backbone(input_ids=ids, use_cache=False).last_hidden_state[0]
        got = hidden @ head.weight.T.to(hidden.dtype)
        got = transform(got.float() + (head.bias.float() if head.bias is not None else 0.0), head)
    finally:
        model.train(training)
    tolerance = 2e-2 if head.weight.dtype.itemsize >= 4 else 6e-2
    worst = (got - expected).abs().max() / expected.std().clamp_min(1e-6)
    if not worst <= tolerance:
        raise BadInput(
            f"{type(inner).__name__}: its logits are not a linear head over the backbone's hidden states"
            f" (difference {float(worst):.2g} of their spread); the fused head does not serve this architecture"
        )


def transform(z: torch.Tensor, head: Parts) -> torch.Tensor:
    """Scale and soft cap of raw head outputs z [..., V]."""
    if head.scale != 1.0:
        z = z * head.scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return z
