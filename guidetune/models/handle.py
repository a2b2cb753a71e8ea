"""A model ready to use: weights, tokenizer, chat format and the fingerprint that its results are filed under."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guidetune.models.fingerprints import fingerprint
from guidetune.models.loading import load_model, load_tokenizer
from guidetune.models.sources import ModelSource, resolve

if TYPE_CHECKING:
    from guidetune.data.chat import Chat


@dataclass
class ModelHandle:
    """`chat` is None for a model without a chat template when none was given; `folder` for an adapter on another model's weights."""

    spec: str
    model: Any
    tokenizer: Any
    chat: Chat | None
    fingerprint: str
    folder: Path | None = None

    @property
    def device(self) -> Any:
        return self.model.device


def open_handle(
    spec: str | Path | ModelSource,
    dtype: str = "auto",
    device: str = "auto",
    attention: str = "sdpa",
    template: str | None = None,
    allow_mismatch: bool = False,
) -> ModelHandle:
    """Load everything of a model. `template` is the chat template to use instead of the tokenizer's (a base model has none).

    Raises:
        BadInput: as `resolve`, `load_model` and `load_tokenizer`.
    """
    from guidetune.data.chat import Chat

    source = resolve(spec)
    tokenizer = load_tokenizer(source)
    chat = Chat(tokenizer, template) if template or tokenizer.chat_template else None
    model = load_model(source, dtype, device, attention, allow_mismatch)
    return ModelHandle(source.spec, model, tokenizer, chat, fingerprint(source), source.path if source.adapter is None else None)
