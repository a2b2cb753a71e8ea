"""The skill table of a model of the world: greedy answers to test items, graded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from guidetune.world.export import items
from guidetune.world.grade import grade
from guidetune.world.items import Item

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONGEST_ANSWER = 110


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Sequence[Item], batch: int = 100, longest: int = LONGEST_ANSWER
) -> list[str]:
    """Greedy answers to the items' prompts, in order; prompts of like length share a batch."""
    import torch

    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": item.prompt}], add_generation_prompt=True, tokenize=True).input_ids
        for item in asked
    ]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    model.eval()
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        width = max(len(prompts[i]) for i in chosen)
        pad = tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in chosen])
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=(ids != pad).long(),
                max_new_tokens=longest,
                do_sample=False,
                pad_token_id=pad,
                eos_token_id=[tokenizer.convert_tokens_to_ids("<|end|>"), tokenizer.eos_token_id],
            )
        for i, text in zip(chosen, tokenizer.batch_decode(out[:, width:], skip_special_tokens=True), strict=True):
            texts[i] = text
    return texts


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sets: Mapping[str, int], split: str = "test", longest: int = LONGEST_ANSWER
) -> dict[str, dict]:
    """Set name -> `{"score", "n", "by_difficulty"}` over that many items of each set."""
    table = {}
    for name, count in sets.items():
        asked = items(name, split, count)
        right = [grade(item, text) for item, text in zip(asked, answers(model, tokenizer, asked, longest=longest), strict=True)]
        levels = sorted({item.difficulty for item in asked})
        by_level = {
            str(level): round(sum(r for r, item in zip(right, asked, strict=True) if item.difficulty == level) / n, 4)
            for level in levels
            if (n := sum(item.difficulty == level for item in asked))
        }
        table[name] = {"score": round(sum(right) / len(right), 4), "n": len(right), "by_difficulty": by_level}
    return table
