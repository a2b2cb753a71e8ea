"""The base/instruct pairs that the package ships: one build, two settings of it.

`general` is made from nothing; `data` goes on from its base model, with the same tokenizer, on a corpus and an instruct set that
also hold what the data-side systems need. Each pair is a base model and the model tuned from it on its instruct set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guidetune.errors import BadInput
from guidetune.world import data_corpus, instruct_set
from guidetune.world.corpus import BY_NAME, Document, documents
from guidetune.world.targets import TARGETS

if TYPE_CHECKING:
    from guidetune.world.build import BuildSettings


@dataclass(frozen=True)
class Pair:
    """What a build is made of. `start` is the shipped model that pre-training goes on from; without it, it begins with its tokenizer.

    `overrides` are fields of `BuildSettings`; `general` and `special` are the sets of the skill table, asked `test_items` and
    `target_items` times.
    """

    name: str
    base: str
    instruct: str
    summary: str
    documents: Callable[[int], Iterator[Document]]
    conversations: Callable[[int], Iterator[list[dict[str, str]]]]
    general: tuple[str, ...]
    special: tuple[str, ...]
    start: str | None = None
    overrides: Mapping[str, object] | None = None

    @property
    def models(self) -> tuple[str, str]:
        return self.base, self.instruct

    @property
    def report(self) -> str:
        """The report's file name."""
        return "report.json" if self.start is None else f"report-{self.name}.json"

    def settings(self) -> BuildSettings:
        from guidetune.world.build import BuildSettings

        return BuildSettings(**(self.overrides or {}))  # type: ignore[arg-type]


PAIRS = {
    pair.name: pair
    for pair in (
        Pair(
            "general",
            "base",
            "instruct",
            "24 general skills and three targets, from nothing.",
            documents,
            instruct_set.conversations,
            tuple(BY_NAME),
            tuple(skill.name for skill in TARGETS),
        ),
        Pair(
            "data",
            "base-data",
            "instruct-data",
            "The skills of the data-side systems as well, from world:base on.",
            data_corpus.documents,
            data_corpus.conversations,
            tuple(BY_NAME),
            data_corpus.MEASURED,
            start="base",
            overrides={
                "row_tokens": 256,
                "pretrain_rows": 16_000,
                "pretrain_epochs": 1,
                "pretrain_batch": 8,
                "pretrain_lr": 1e-3,
                "instruct_rows": 20_000,
                "stored": "bfloat16",
                "test_items": 20,
                "target_items": 60,
                "longest_answer": 80,
            },
        ),
    )
}
MODELS = tuple(model for pair in PAIRS.values() for model in pair.models)


def pair(name: str) -> Pair:
    """Raises BadInput: there is no pair of that name."""
    if name not in PAIRS:
        raise BadInput(f"the embedded world has no pair {name!r}; it has {' and '.join(PAIRS)}")
    return PAIRS[name]
