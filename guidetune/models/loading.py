"""Load a model or a tokenizer; every weight accounted for, safetensors only, no code from the model's repository."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guidetune.errors import BadInput
from guidetune.models import quantized
from guidetune.models.checkpoint import Checkpoint
from guidetune.models.fingerprints import fingerprint
from guidetune.models.names import read_model_config
from guidetune.models.sources import ADAPTER_WEIGHTS, ModelSource, resolve

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def pick_device(device: str = "auto") -> str:
    """`auto`: the GPU where there is one, else Apple's, else the CPU; the CPU when accelerate was launched with `use_cpu`."""
    import torch

    if device == "auto" and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        return "cpu"

    if device != "auto":
        kind = device.split(":")[0]
        if kind == "cuda" and not torch.cuda.is_available():
            raise BadInput(f"device {device!r} was asked for and this machine has no usable GPU; use device auto or cpu")
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def pick_dtype(dtype: str) -> str | torch.dtype:
    import torch

    aliases = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    dtype = aliases.get(str(dtype).removeprefix("torch."), str(dtype).removeprefix("torch."))
    if dtype not in DTYPES:
        raise BadInput(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return "auto" if dtype == "auto" else getattr(torch, dtype)


def load_model(
    spec: str | Path | ModelSource,
    dtype: str = "auto",
    device: str = "auto",
    attention: str = "sdpa",
    allow_mismatch: bool = False,
    quantize: str = "none",
) -> PreTrainedModel:
    """The model in evaluation mode; for an adapter folder, base + adapter through peft (unmerged).

    `dtype="int8"`: linear layers in 8 bits, for passes without gradients. `quantize`: `8bit` or `4bit` weights through bitsandbytes.

    `attention="sdpa"` falls back to eager where the architecture cannot use it (Gemma 2's soft-capped scores).

    Raises:
        BadInput: weights missing from the files, damaged files, or an adapter whose recorded base is another model
            (`allow_mismatch` lets the last one through).
    """
    source = resolve(spec)
    if source.adapter is not None and not allow_mismatch:
        check_adapter_base(source)
    model = _load(source.path, dtype, device, attention, quantize)
    if source.adapter is not None:
        model = _attach(model, source.adapter)
    return model.eval()


def check_adapter_base(source: ModelSource) -> None:
    """Raises BadInput when the base on disk is not the one the adapter was trained on."""
    if source.base_fingerprint is None:
        return
    found = fingerprint(ModelSource(str(source.base_spec), source.path))
    if found != source.base_fingerprint:
        raise BadInput(
            f"adapter {source.spec} was trained on a base with fingerprint {source.base_fingerprint[:12]}, and {source.base_spec} is now "
            f"{found[:12]}: another model or another version; name the right base, or allow the mismatch"
        )


def load_tokenizer(spec: str | Path | ModelSource) -> PreTrainedTokenizerBase:
    """The model's tokenizer; an adapter folder's own one when it has one.

    Raises:
        BadInput: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    source = resolve(spec)
    folder = source.path
    if source.adapter is not None and (source.adapter / "tokenizer_config.json").is_file():
        folder = source.adapter
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise BadInput(f"{source.spec} has no tokenizer (tokenizer.json) in {folder}; copy the tokenizer files of its original model there")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the tokenizer libraries raise bare Exceptions for damaged files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"the tokenizer in {folder} cannot be read: {reason}") from None


def _load(folder: Path, dtype: str, device: str, attention: str, quantize: str = "none") -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    with Checkpoint(folder):
        pass  # truncated and damaged files are named here, before any memory is taken
    config = read_model_config(folder)
    device = pick_device(device)
    int8 = dtype == "int8"
    if int8:
        quantized.check_int8(device)
        quantize, dtype = ("none" if device == "cpu" else "8bit"), "auto"
    extra: dict[str, Any] = {} if device == "cpu" else {"device_map": {"": device}}
    if quantize != "none":
        quantized.check_bitsandbytes(device, f"quantize: {quantize}")
        extra["quantization_config"] = quantized.bitsandbytes_config(quantize, torch.bfloat16 if dtype == "auto" else pick_dtype(dtype))
    quiet = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # missing weights are an error below; the library would only warn
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=pick_dtype(dtype),
            attn_implementation=pick_attention(config, attention),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **extra,
        )
    except ValueError as error:
        raise BadInput(f"{folder} cannot be loaded as a causal language model: {(str(error).splitlines() or [''])[0]}") from None
    finally:
        logging.set_verbosity(quiet)
    problems = []
    if missing := sorted(info["missing_keys"]):
        problems.append(
            f"{folder}: {len(missing)} weights of its architecture are not in its files (first {missing[0]}): wrong files or config"
        )
    if mismatched := sorted(map(str, info["mismatched_keys"])):
        problems.append(f"{folder}: {len(mismatched)} weights have another shape than its config says (first {mismatched[0]})")
    if problems:
        raise BadInput(problems)
    if int8 and device == "cpu":
        from guidetune.models.int8 import to_int8

        return to_int8(model)
    return model


def pick_attention(config: Any, attention: str) -> str:
    """`attention`, or eager where the architecture does not have sdpa."""
    from transformers import AutoModelForCausalLM

    if attention != "sdpa":
        return attention
    mapping = AutoModelForCausalLM._model_mapping
    model_class = mapping.get(type(config), None)
    if isinstance(model_class, (list, tuple)):
        model_class = model_class[0]
    return "sdpa" if model_class is None or getattr(model_class, "_supports_sdpa", True) else "eager"


def _attach(model: Any, adapter: Path) -> Any:
    import warnings

    from peft import PeftModel

    from guidetune.models.checkpoint import read_header

    read_header(adapter / ADAPTER_WEIGHTS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            attached = PeftModel.from_pretrained(model, str(adapter), is_trainable=False, local_files_only=True)
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise BadInput(f"adapter {adapter} does not fit its base: {' '.join(lines[:2])[:400]}") from None
    # peft leaves keys that do not match at their initial value, which is the base model under another name.
    lost = [str(w.message) for w in caught if "missing adapter keys" in str(w.message).lower()]
    if lost:
        raise BadInput(f"adapter {adapter} does not fit its base: {lost[0][:300]}")
    return attached
