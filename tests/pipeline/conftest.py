"""A tiny base/instruct pair with a real tokenizer, and a recipe over it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.tiny import ARCHITECTURES, tiny_model

WORDS = "alpha beta gamma delta one two three four five six sum of and is the result red blue".split()
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def tiny_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|eos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", additional_special_tokens=special[3:]
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


def write_pair(folder: Path, family: str = "llama", **changes) -> None:
    """`folder/base` and `folder/instruct`: the instruct model is the base plus noise."""
    tokenizer = tiny_tokenizer()
    vocab = len(tokenizer)
    for name, noise in (("base", 0.0), ("instruct", 0.02)):
        model = tiny_model(family, vocab=vocab, seed=0, eos_token_id=tokenizer.eos_token_id, **changes)
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=g) * noise)
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def write_rows(path: Path, n: int, seed: int) -> None:
    import random

    rng = random.Random(seed)
    lines = []
    for i in range(n):
        a, b = rng.sample(WORDS[:10], 2)
        lines.append(json.dumps({"id": f"q{seed}-{i}", "prompt": f"sum of {a} and {b} {i}", "completion": f"the result is {b} {a}"}))
    path.write_text("\n".join(lines) + "\n")


RECIPE = """
name: trial
models: {base: base, instruct: instruct}
data: {train: [train.jsonl], validation: [test.jsonl]}
tune: {params: {rank: 4, alpha: 8, dropout: 0.1}, weights: [gift], lr: 1e-2, epochs: 3, batch: 8, max_length: 128, checkpoint_every: 1}
evaluate:
  task: [{method: generate, path: test.jsonl, prompt: "{prompt}", reference: completion, match: contains, label: echo}]
  general: [{method: nll, path: test.jsonl, label: loss}]
  max_new_tokens: 8
"""


def write_place(folder: Path) -> Path:
    """A pair, rows to train and test on, and the recipe."""
    write_pair(folder)
    write_rows(folder / "train.jsonl", 24, 1)
    write_rows(folder / "test.jsonl", 8, 2)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="session")
def _pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def place(_pair: Path, tmp_path: Path) -> Path:
    """A private copy of the pair, its data and its recipe."""
    import shutil

    shutil.copytree(_pair, tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture(params=sorted(ARCHITECTURES))
def family_place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write_pair(tmp_path, request.param)
    write_rows(tmp_path / "train.jsonl", 16, 1)
    write_rows(tmp_path / "test.jsonl", 4, 2)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path
