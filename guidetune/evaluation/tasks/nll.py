"""Negative log-likelihood per supervised token, under the encoding of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field, PositiveInt, ValidationError

from guidetune.data.records import Dropped, Identifiers, normalise
from guidetune.data.sources import SourceSpec
from guidetune.errors import BadInput
from guidetune.evaluation.metrics import bits_per_byte, perplexity
from guidetune.evaluation.task import Item, Output, Task, TaskContext, read_rows
from guidetune.registry import method, option_problems


@method(kind="task", name="nll", summary="Negative log-likelihood per token of given answers, encoded as in training.")
class NegativeLogLikelihood(Task):
    """`Σ nll / Σ tokens` over the tokens that training would learn from: the assistant's text and its stop token.

    `perplexity = exp(nll per token)`; `bits_per_byte` divides by the UTF-8 bytes of the answers' text, which no tokenizer changes.
    """

    mode: ClassVar[str] = "nll"
    metric: ClassVar[str] = "nll_per_token"
    higher_is_better: ClassVar[bool] = False

    path: str = Field(description="Data source: a file, a folder or a hub id, as in data.train.")
    map: dict[str, str] = Field(default_factory=dict, description="Columns by part, as in data.train.")
    system: str | None = Field(None, description="System prompt for rows that have none.")
    split: str = Field("test", description="Split of a folder or hub data set.")
    subset: str | None = Field(None, description="Configuration name of a hub data set.")
    max_length: PositiveInt | None = Field(None, description="Longest row in tokens, cut as in training (default: the model's context).")

    def items(self, ctx: TaskContext) -> list[Item]:
        try:
            source = SourceSpec(path=self.path, map=self.map, system=self.system, split=self.split, subset=self.subset)
        except ValidationError as error:
            raise BadInput(option_problems(type(self), error)) from None
        identifiers, found = Identifiers(), []
        for line, row in read_rows(source, ctx):
            record = normalise(row, source, source.label, line, identifiers)
            if isinstance(record, Dropped):
                place = f"task {self.label or self.name}: {self.path}, line {line}"
                raise BadInput(f"{place}: {record.reason}: {record.detail}; mend or remove the row")
            answers = [message["content"] for message in record.messages if message["role"] == "assistant" and message.get("train", True)]
            size = sum(len(answer.encode("utf-8", "surrogatepass")) for answer in answers)
            found.append(Item(record.id, tuple(record.messages), reference=answers[-1], meta={"bytes": size}))
        return found

    def score(self, item: Item, output: Output) -> dict[str, Any]:
        assert output.nll is not None
        return {"correct": output.nll / output.tokens, "nll": output.nll, "tokens": output.tokens}

    def overall(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        nll, tokens = sum(line["nll"] for line in lines), sum(line["tokens"] for line in lines)
        size = sum(line["meta"]["bytes"] for line in lines)
        return {"perplexity": perplexity(nll, tokens), "bits_per_byte": bits_per_byte(nll, size), "tokens": tokens}
