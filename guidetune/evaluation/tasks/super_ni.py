"""Super-NaturalInstructions: many tasks given by their definition (arXiv 2204.07705)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from guidetune.evaluation.answers import normal_text
from guidetune.evaluation.metrics import byte_level_tokens, exact_match, rouge_l
from guidetune.evaluation.task import Item, Output, RowTask, ask, breakdown, column, fill, texts
from guidetune.registry import method


@method(
    kind="task", name="super_ni", paper="2204.07705", summary="Instances of Super-NaturalInstructions tasks, by ROUGE-L and exact match."
)
class SuperNI(RowTask):
    """A task's definition and one input.

    `rouge_l`: F1 of the longest common subsequence with stemming, the largest over the references (papers give it times 100); `exact`:
    equal to a reference in lower case, without punctuation, articles kept; `macro`: the mean over tasks.

    ROUGE's own tokenizer keeps only a-z and 0-9, so that Chinese text would score 0 against itself: references without such a
    character are split by a byte-level BPE instead, as are all with `language: other`. `tokenizer_path` names another one than the
    package's (papers use GPT-2's). Of rows with a column `split` only those of `split` are read.
    """

    mode: ClassVar[str] = "generate"
    metric: ClassVar[str] = "rouge_l"
    default_new_tokens: ClassVar[int] = 128

    template: str = Field("Definition: {definition}\n\nInput: {input}\nOutput:", description="Prompt; {definition}, {input} or any column.")
    system: str | None = Field(None, description="System message.")
    language: Literal["english", "other"] = Field("english", description="other: byte-level BPE tokens for every item.")
    tokenizer_path: str | None = Field(None, description="tokenizer.json of the byte-level BPE (default: the embedded world's).")
    task: str | None = Field(None, description="Column of the task's name (default: task or task_name), to break the score down by.")
    category: str | None = Field(None, description="Column to break the score down by.")

    def wanted(self, row: Mapping[str, Any]) -> bool:
        return super().wanted(row) and str(row.get("split", self.split)) == self.split

    def item(self, row: Mapping[str, Any], number: int) -> Item:
        values = {name: column(row, next((one for one in names if one in row), names[0])) for name, names in COLUMNS.items()}
        shown = {name: "\n".join(texts(values[name], name)) for name in ("definition", "input")}
        references = texts(values["output"], "output")
        prompt = ask(fill(self.template, {**row, **shown}), self.system)
        name = self.task or next((one for one in ("task", "task_name") if one in row), None)
        meta = breakdown(row, skill=name, category=self.category)
        return Item(str(number), prompt, reference=references, gold=references[0], meta=meta)

    def score(self, item: Item, output: Output) -> dict[str, Any]:
        latin = any(c.isascii() and c.isalnum() for reference in item.reference for c in reference.lower())
        tokens = None if latin and self.language == "english" else byte_level_tokens(self.tokenizer_path)
        found = rouge_l(output.text, item.reference, tokens)
        return {"correct": found, "exact": exact_match(output.text, item.reference), "answer": normal_text(output.text) or None}

    def overall(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        groups: dict[str, list[float]] = {}
        for line in lines:
            groups.setdefault(str(line["meta"].get("skill")), []).append(line["correct"])
        return {"macro": sum(sum(group) / len(group) for group in groups.values()) / len(groups)} if len(groups) > 1 else {}


# What the columns are called in the published forms of the data.
COLUMNS = {
    "definition": ("definition", "Definition"),
    "input": ("instance_input", "input", "inputs"),
    "output": ("output", "outputs", "targets"),
}
