"""LoRA, through peft."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from guidetune.errors import BadInput
from guidetune.params import Attached, Params, readable
from guidetune.registry import method

if TYPE_CHECKING:
    import torch
    from torch import nn


@method(kind="params", name="lora", paper="2106.09685", summary="Low-rank adapters W + s·B·A on the linear layers; the rest is frozen.")
class Lora(Params):
    """W' = W + (alpha / rank) B A, B = 0 at the start; rsLoRA divides by √rank (arXiv 2106.09685, 2312.03732).

    The defaults are those of GIFT (arXiv 2605.01256). The output head is never adapted: the fused loss needs it frozen.
    """

    rank: int = Field(64, ge=1, description="Rank r of the update of each layer.")
    alpha: float = Field(128, gt=0, description="Scale numerator: the update counts alpha / rank.")
    dropout: float = Field(0.05, ge=0, lt=1, description="Dropout on the adapter's input during training.")
    targets: Literal["all-linear"] | list[str] = Field("all-linear", description="Layer names to adapt, or all linear layers but the head.")
    rslora: bool = Field(False, description="Scale by alpha / √rank instead of alpha / rank.")

    def attach(self, model: nn.Module, seed: int = 0) -> Attached:
        """Wrap `model` in place with fp32 adapters.

        Raises:
            BadInput: a target matches no layer, or names the output head.
        """
        import torch
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.targets if isinstance(self.targets, str) else list(self.targets),
            use_rslora=self.rslora,
            bias="none",
            task_type="CAUSAL_LM",
        )
        model.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                wrapped = get_peft_model(model, config)
            except ValueError as error:
                raise BadInput(f"lora: targets = {self.targets}: {error}") from None
        head = model.get_output_embeddings()
        if hasattr(head, "base_layer"):
            raise BadInput("lora: targets names the output head; leave it out (the loss is computed by a fused, frozen head)")
        return LoraAttached(wrapped)


class LoraAttached(Attached):
    @contextmanager
    def base(self) -> Iterator[nn.Module]:
        with self.model.disable_adapter():
            yield self.model.get_base_model()

    def fold(self) -> nn.Module:
        return self.model.merge_and_unload(safe_merge=True)

    def delta(self) -> dict[str, torch.Tensor]:
        out = {}
        for name, module in self.model.get_base_model().named_modules():
            if hasattr(module, "get_delta_weight"):
                out[f"{name}.weight"] = module.get_delta_weight("default").detach().float()
        return out

    def save(self, folder: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
        self.model.save_pretrained(str(folder), safe_serialization=True)
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty card
        readable(folder)

    def load(self, folder: Path) -> None:
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        result = set_peft_model_state_dict(self.model, load_file(folder / "adapter_model.safetensors"))
        if result.unexpected_keys:
            raise BadInput(f"{folder}: adapter tensors that this model does not have: {result.unexpected_keys[:3]}")
