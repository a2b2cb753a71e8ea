"""Perplexity of plain text, in rolling windows that score every token exactly once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from guidetune.data.sources import SourceSpec
from guidetune.errors import BadInput
from guidetune.evaluation.metrics import bits_per_byte, perplexity
from guidetune.evaluation.task import Item, Output, Task, TaskContext, column, read_rows
from guidetune.registry import method


@method(kind="task", name="perplexity", summary="Perplexity of plain text, in rolling windows.")
class Perplexity(Task):
    """`exp(Σ nll / Σ tokens)` of a text file, or of one column of a data file.

    The first token is predicted from BOS (EOS where there is none); each window begins with the last token scored before it.
    Comparable between tokenizers: `word_perplexity`, `byte_perplexity`, `bits_per_byte`. `nll_per_token` is the logarithm of the score;
    paired tests compare that.
    """

    mode: ClassVar[str] = "nll"
    metric: ClassVar[str] = "perplexity"
    higher_is_better: ClassVar[bool] = False

    path: str = Field(description="A text file, or a data file when `column` is given.")
    column: str | None = Field(None, description="Column that holds the text; every row is a document.")
    unit: Literal["document", "paragraph", "line"] = Field("document", description="What a text file is cut into; contexts end there.")
    window: PositiveInt | None = Field(None, description="Inputs of one window (default: the model's context).")

    def items(self, ctx: TaskContext) -> list[Item]:
        if self.column is not None:
            documents = [str(column(row, self.column)) for _, row in read_rows(SourceSpec(path=self.path), ctx)]
        else:
            file = ctx.find(self.path)
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise BadInput(f"{file} is not UTF-8 text ({error}); for a data file name its column") from None
            documents = {"document": [text], "paragraph": text.split("\n\n"), "line": text.split("\n")}[self.unit]
        found = []
        for number, document in enumerate(documents):
            if document.strip():
                size = {"bytes": len(document.encode("utf-8", "surrogatepass")), "words": len(document.split())}
                found.append(Item(str(number), text=document, meta=size))
        return found

    def score(self, item: Item, output: Output) -> dict[str, Any]:
        assert output.nll is not None
        return {
            "correct": output.nll / output.tokens,
            "nll": output.nll,
            "tokens": output.tokens,
            "windows": [list(window) for window in output.windows],
        }

    def scale(self, mean: float) -> float:
        return perplexity(mean, 1)

    def overall(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        nll, tokens = sum(line["nll"] for line in lines), sum(line["tokens"] for line in lines)
        size, words = (sum(line["meta"][key] for line in lines) for key in ("bytes", "words"))
        return {
            "nll_per_token": nll / tokens,
            "word_perplexity": perplexity(nll, words),
            "byte_perplexity": perplexity(nll, size),
            "bits_per_byte": bits_per_byte(nll, size),
            "tokens": tokens,
        }
