"""A base, its instruct sibling and adapters, as folders on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.tiny import tiny_model

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def tiny_tokenizer(vocab: int = 128, template: str | None = TEMPLATE, extra: tuple[str, ...] = ()) -> Any:
    """Characters as tokens, the special tokens first."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(c) for c in range(32, 127)]
    words = {token: i for i, token in enumerate([*SPECIAL, *letters][:vocab])}
    backend = Tokenizer(models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", additional_special_tokens=SPECIAL[3:]
    )
    if extra:
        tokenizer.add_tokens(list(extra))
    tokenizer.chat_template = template
    return tokenizer


def save(model: Any, folder: Path, template: str | None = TEMPLATE, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    tiny_tokenizer(template=template).save_pretrained(folder)
    return folder


def make_pair(
    root: Path, family: str = "llama", dtype: torch.dtype = torch.float32, noise: float = 0.01, **changes: Any
) -> tuple[Path, Path]:
    """(base, instruct = base + noise)."""
    base = tiny_model(family, **changes)
    instruct = tiny_model(family, **changes)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in instruct.parameters():
            p += noise * torch.randn(p.shape, generator=generator)
    return save(base.to(dtype), root / "base", template=None), save(instruct.to(dtype), root / "instruct")


def make_adapter(base: Path, folder: Path, seed: int = 1, size: float = 0.05, **options: Any) -> Path:
    """A LoRA with random A and B on `base`, saved by peft."""
    import warnings

    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if "target_modules" not in options and "target_parameters" not in options:
        modules = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
        options["target_modules"] = [name for name in (FUSED if "qkv_proj" in modules else PROJECTIONS) if name in modules]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options}))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in tuned.named_parameters():
                if "lora_" in name:
                    p.copy_(size * torch.randn(p.shape, generator=generator))
        tuned.save_pretrained(folder)
    return folder


def logits(model: Any, seed: int = 3) -> torch.Tensor:
    ids = torch.randint(7, 100, (3, 12), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits.float()


def with_adapter(model_folder: Path, adapter: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    # peft stores a copy of targeted embeddings and puts it over those of the model it is loaded on: put them back.
    own = {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}
    tuned = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        for name, p in tuned.base_model.model.named_parameters(remove_duplicate=False):
            if ".base_layer." in name and (original := own.get(name.replace(".base_layer.", "."))) is not None:
                p.copy_(original)
    return tuned


def plain(folder: Path, dtype: Any = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
