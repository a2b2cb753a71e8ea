"""Mean -log p per token of parts of rows under a model: what perplexity and IFD are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from guidetune.scorers import NoScore, Row, ScoreContext

if TYPE_CHECKING:
    from guidetune.models.handle import ModelHandle


@dataclass(frozen=True)
class Tokens:
    """A row in a model's own tokens. targets: positions of the answers' tokens; header: what stands before an answer that stands alone."""

    ids: list[int]
    targets: list[int]
    header: list[int]

    @property
    def prompt(self) -> list[int]:
        """Positions of the tokens before the first answer that something predicts."""
        return list(range(1, self.targets[0]))

    def answers_alone(self) -> list[tuple[list[int], list[int]]]:
        """(ids, targets) of every answer behind the header and nothing else; each scores the very tokens that the whole row scores."""
        spans = np.split(self.targets, np.flatnonzero(np.diff(self.targets) > 1) + 1)
        return [
            ([*self.header, *(self.ids[t] for t in span)], list(range(len(self.header), len(self.header) + len(span)))) for span in spans
        ]


def tokens(rows: Sequence[Row], name: str, handle: ModelHandle, context: ScoreContext) -> list[Tokens | NoScore]:
    """The rows as the model reads them: as they were prepared where it has the rows' tokenizer, else encoded with its own.

    A model without a chat template reads prompt, newline, answer and end of sequence.
    """
    from guidetune.data.chat import Chat, Refused
    from guidetune.models.fingerprints import tokenizer_digest

    found: list[Tokens | NoScore] = []
    if name in ("base", "instruct") or tokenizer_digest(handle.tokenizer) == tokenizer_digest(context.chat.tokenizer):
        chat = context.chat
        encoded: list[tuple[list[int], list[int]] | NoScore] = [(row.input_ids.tolist(), row.targets.tolist()) for row in rows]
    else:
        chat = handle.chat or Chat(handle.tokenizer, "plain")
        encoded = [
            NoScore(f"its own tokenizer: {one.reason}")
            if isinstance(one, Refused)
            else (one.input_ids, np.flatnonzero(one.target).tolist())
            for one in chat.encode_many([row.messages for row in rows])
        ]
    ending, start = _prompt_ending(chat), _start_token(chat.tokenizer)
    longest = getattr(handle.model.config, "max_position_embeddings", None)
    for one in encoded:
        if isinstance(one, NoScore):
            found.append(one)
            continue
        ids, targets = one
        if not targets:
            found.append(NoScore("no answer token"))
        elif longest and len(ids) > longest:
            found.append(NoScore("longer than the model's context"))
        else:
            found.append(Tokens(ids, targets, _header(ids, targets[0], ending, start)))
    return found


def mean_nll(model: Any, parts: Sequence[tuple[list[int], list[int]]], batch_tokens: int) -> list[float]:
    """Mean -log p of the tokens at the given positions (each >= 1) of each text."""
    from guidetune.evaluation.scoring import target_log_probs

    found = target_log_probs(model, [ids for ids, _ in parts], [targets for _, targets in parts], batch_tokens=batch_tokens)
    return [float(-np.mean(one, dtype=np.float64)) for one in found]


@lru_cache(maxsize=4)
def _prompt_ending(chat: Any) -> tuple[int, ...]:
    """What every prompt ends with: the end of the user's turn and the header of the answer."""
    a, b = (chat.prompt([{"role": "user", "content": text}]) for text in ("Zebra 1", "apple?"))
    n = 0
    while n < min(len(a), len(b)) and a[-1 - n] == b[-1 - n]:
        n += 1
    return tuple(a[len(a) - n :])


def _start_token(tokenizer: Any) -> int | None:
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def _header(ids: list[int], first: int, ending: tuple[int, ...], start: int | None) -> list[int]:
    """The start token where the row has one, and as much of `ending` as stands before the first answer; never empty."""
    n = 0
    while n < min(len(ending), first) and ids[first - 1 - n] == ending[-1 - n]:
        n += 1
    begins = [start] if start is not None and ids[0] == start and n < first else []
    return [*begins, *ids[first - n : first]] or ([start] if start is not None else ids[:1])
