"""Open answers, scored by a judge: by a rubric, or against an answer of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from guidetune.evaluation.judge import Case, Judge, JudgeSettings, preference_score
from guidetune.evaluation.task import Item, Output, RowTask, ask, breakdown, column, fill
from guidetune.registry import method

HELPFUL = "The answer does what the question asks, is correct, complete and clear, and holds nothing that does not belong there."


@method(kind="task", name="judged", summary="Open answers scored by a judge model: by a rubric, or against an answer of the data.")
class Judged(RowTask):
    """`compare: rubric`: the judge's whole number from `low` to `high`, as a share of the way from `low` to `high`.

    `compare: pairwise`: against the answer in `reference`, asked in both orders: 1 better, 0.5 tie (or the orders disagree), 0 worse.
    Answers without a verdict score 0 and are counted in `no_verdict`; the judge, its failures and its cost are in the result's notes.
    """

    mode: ClassVar[str] = "generate"
    metric: ClassVar[str] = "judged"
    default_new_tokens: ClassVar[int] = 1024

    judge: JudgeSettings = Field(description="The judge: {model, base_url, ...}; docs/judge.md lists its options.")
    compare: Literal["rubric", "pairwise"] = Field("rubric", description="Score by the rubric, or compare with the reference.")
    rubric: str = Field(HELPFUL, description="What a good answer is, in words.")
    low: int = Field(1, description="Worst score of the rubric.")
    high: int = Field(5, description="Best score of the rubric.")
    prompt: str = Field("{prompt}", description="Prompt; {column} is replaced.")
    reference: str | None = Field(None, description="Column of a good answer: shown to the judge, or compared with (pairwise).")
    system: str | None = Field(None, description="System message.")
    id: str | None = Field(None, description="Column of a unique id (default: the row's number).")
    skill: str | None = Field(None, description="Column to break the score down by.")
    category: str | None = Field(None, description="Column to break the score down by.")

    @model_validator(mode="after")
    def _whole(self) -> Judged:
        if self.compare == "pairwise" and self.reference is None:
            raise ValueError("compare: pairwise needs reference, the column of the answer to compare with")
        if self.low >= self.high:
            raise ValueError(f"low = {self.low} must be below high = {self.high}")
        return self

    def deciding(self) -> dict[str, Any]:
        return {**super().deciding(), "judge": self.judge.deciding()}

    def item(self, row: Mapping[str, Any], number: int) -> Item:
        identity = str(column(row, self.id)) if self.id else str(number)
        reference = str(column(row, self.reference)) if self.reference else None
        meta = breakdown(row, skill=self.skill, category=self.category)
        return Item(identity, ask(fill(self.prompt, row), self.system), reference=reference, meta=meta)

    def scores(self, answered: Sequence[tuple[Item, Output]]) -> list[dict[str, Any]]:
        judge = Judge(self.judge)
        verdicts: list[dict[str, Any]] = []
        if self.compare == "pairwise":
            cases = [Case(item.prompt, output.text, str(item.reference)) for item, output in answered]
            for found in judge.preferences(cases, self.rubric):
                points = {"first": 1.0, "tie": 0.5, "second": 0.0, None: 0.0}[found.value]
                more = {"flipped": int(found.flipped), "verdict": found.value or "none", "reasons": list(found.texts)}
                verdicts.append({"correct": points, "no_verdict": int(found.value is None), **more})
        else:
            cases = [Case(item.prompt, output.text, reference=item.reference) for item, output in answered]
            for score in judge.scores(cases, self.rubric, self.low, self.high):
                points = (score.value - self.low) / (self.high - self.low) if score.value is not None else 0.0
                verdict = str(score.value if score.value is not None else score.why)
                verdicts.append({"correct": points, "no_verdict": int(score.value is None), "verdict": verdict, "reasons": score.text})
        verdicts[0]["judge"] = judge.report()
        return verdicts

    def score(self, item: Item, output: Output) -> dict[str, Any]:
        return self.scores([(item, output)])[0]

    def overall(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        if self.compare == "rubric" or any("samples" in line for line in lines):
            return {}
        score = preference_score([None if line["verdict"] == "none" else line["verdict"] for line in lines])
        return {} if score is None else {"preference_score": score}

    def notes(self, lines: Sequence[Mapping[str, Any]]) -> list[str]:
        first = lines[0]["samples"][0] if "samples" in lines[0] else lines[0]
        missing = sum(line["no_verdict"] for line in lines) / len(lines)
        share = [f"{100 * missing:.1f} % of the answers have no verdict and count as 0"] if missing else []
        if self.compare == "pairwise":
            share.append(f"the two orders disagree on {100 * sum(line['flipped'] for line in lines) / len(lines):.1f} % (counted as ties)")
        return [first["judge"], *share]
