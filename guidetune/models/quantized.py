"""Whether a model can be held in 8 or 4 bits here: int8 on the CPU (models/int8.py), bitsandbytes on a GPU."""

from __future__ import annotations

from typing import Any

from guidetune.errors import BadInput
from guidetune.threads import processor_flags

ENGINE = "onednn"


def has_int8() -> bool:
    """Whether this torch and this processor (AVX-512 VNNI or AVX-VNNI) have exact 8-bit products; others could overflow silently."""
    import torch

    if ENGINE not in torch.backends.quantized.supported_engines:
        return False
    return bool(processor_flags() & {"avx512_vnni", "avx_vnni"})


def check_int8(device: str) -> None:
    """Raises BadInput when the machine cannot run a model in int8."""
    if device.startswith("cuda"):
        check_bitsandbytes(device, "guide.dtype: int8")
    elif device != "cpu" or not has_int8():
        raise BadInput("guide.dtype: int8 needs a processor with VNNI instructions, or a GPU with bitsandbytes; use bfloat16 or auto")


def check_bitsandbytes(device: str, option: str) -> None:
    """Raises BadInput when bitsandbytes is not there, or there is no GPU for it."""
    from importlib.util import find_spec

    if not device.startswith("cuda"):
        raise BadInput(f"{option} needs a CUDA GPU, and this run is on {device}; leave it out")
    if find_spec("bitsandbytes") is None:
        raise BadInput(f"{option} needs the package bitsandbytes, which is not installed: pip install bitsandbytes")


def bitsandbytes_config(quantize: str, compute: Any) -> Any:
    """transformers' configuration for `8bit` (LLM.int8, arXiv 2208.07339) or `4bit` (NF4 with double quantisation, arXiv 2305.14314)."""
    from transformers import BitsAndBytesConfig

    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute)
