"""Models: where they come from, how they are loaded, what they contain, and whether two of them fit together."""

from __future__ import annotations

from guidetune.models.fingerprints import fingerprint, tokenizer_digest
from guidetune.models.handle import ModelHandle, open_handle
from guidetune.models.loading import load_model, load_tokenizer
from guidetune.models.sources import ModelSource, resolve

__all__ = ["ModelHandle", "ModelSource", "fingerprint", "load_model", "load_tokenizer", "open_handle", "resolve", "tokenizer_digest"]
