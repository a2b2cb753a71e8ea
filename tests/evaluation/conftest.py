"""A tiny real model and tokenizer, made on the spot."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from guidetune.models.handle import ModelHandle

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "Question: what is 12 + 30? Answer: 42. The answer is (B).",
    "A. yes B. no C. maybe D. certainly not, the capital of France is Paris.",
    "Janet sells 16 - 3 - 4 = 9 duck eggs a day for $2 each, so she makes 18 dollars.",
    "Abstract: user assistant system 0123456789 abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ",
]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    specials = ["<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        CORPUS * 4, trainers.BpeTrainer(vocab_size=420, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="session")
def llama(tokenizer: Any) -> Callable[..., Any]:
    """`llama(seed, **config)`: a random Llama of hidden size 32 and 2 layers, in fp32."""

    def make(seed: int = 0, spread: float = 0.2, **options: Any) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=spread,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **{"max_position_embeddings": 1024, **options},
        )
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture(scope="session")
def handle_of(tokenizer: Any) -> Callable[..., ModelHandle]:
    from guidetune.data.chat import Chat

    chat = Chat(tokenizer)

    def make(model: Any, with_chat: bool = True) -> ModelHandle:
        return ModelHandle("tiny", model, tokenizer, chat if with_chat else None, _weights_hash(model))

    return make


@pytest.fixture(scope="session")
def weights_hash() -> Callable[[Any], str]:
    return _weights_hash


def _weights_hash(model: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]
