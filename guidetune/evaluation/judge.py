"""A model as judge: scores by a rubric, preferences between two answers, and labels.

The verdict is the last `[[...]]` of a reply, thinking left out. A reply without one is asked for again, twice at most; what then has no
verdict is None and counted (`Judge.report`), never a score. Preferences are asked in both orders; when the two disagree it is a tie.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from pydantic import Field, NonNegativeInt

from guidetune.artefacts import fingerprint
from guidetune.models.api import ApiSettings, Client, Message, Reply

V = TypeVar("V")
REMINDER = (
    "Your reply has no verdict that can be read. Give it now, in double square brackets and nothing else, in the form asked for above."
)
REASK_TEMPERATURE = 0.3

RUBRIC = """Judge the answer to a question by the rubric below.

Rubric:
{rubric}

Question:
{question}
{reference}
Answer:
{answer}

Give your reasons in a few sentences. Then end with a whole number from {low} (worst) to {high} (best) in double square brackets, \
like [[{low}]]."""

PAIRWISE = """Two assistants, A and B, have answered the same question. Decide by the rubric below which answer is better. Neither the \
order of the answers nor their length is a reason.

Rubric:
{rubric}

Question:
{question}
{reference}
Answer of A:
{a}

Answer of B:
{b}

Give your reasons in a few sentences. Then end with [[A]] when A is better, [[B]] when B is better, or [[tie]]."""

LABEL = """{instructions}

Question:
{question}

Answer:
{answer}

End with exactly one of these labels in double square brackets: {labels}."""


class JudgeSettings(ApiSettings):
    """The judge: an OpenAI-compatible model, and how often an unreadable verdict is asked for again."""

    reasks: NonNegativeInt = Field(2, description="Further questions after a reply without a verdict.")

    def deciding(self) -> dict[str, Any]:
        return {**super().deciding(), "reasks": self.reasks, "prompts": fingerprint([RUBRIC, PAIRWISE, LABEL, REMINDER])}


@dataclass(frozen=True)
class Case:
    """What is judged: a question, an answer, and for a preference another; `reference` is shown to the judge as a correct answer."""

    question: str
    answer: str
    other: str = ""
    reference: str | None = None


@dataclass(frozen=True)
class Verdict(Generic[V]):
    """A judgement; `value` is None when there is none, and `why` is then the reason. `text` is the judge's last reply."""

    value: V | None
    text: str = ""
    why: str | None = None


@dataclass(frozen=True)
class Preference:
    """Which of `answer` (first) and `other` (second) is better; None without two verdicts. `flipped`: the two orders disagree."""

    value: Literal["first", "second", "tie"] | None
    flipped: bool
    texts: tuple[str, str]


class Judge:
    """Asks a model for verdicts, many at a time; see `JudgeSettings` for the limits."""

    def __init__(self, settings: JudgeSettings) -> None:
        self.settings = settings
        self.client = Client(settings)
        self.counts: Counter[str] = Counter()

    def scores(self, cases: Sequence[Case], rubric: str, low: int = 1, high: int = 5) -> list[Verdict[int]]:
        """A whole number from `low` to `high` for each answer."""
        prompts = [
            RUBRIC.format(rubric=rubric, question=c.question, answer=c.answer, reference=_reference(c), low=low, high=high) for c in cases
        ]
        return self.verdicts(prompts, lambda text: read_score(text, low, high))

    def preferences(self, cases: Sequence[Case], rubric: str) -> list[Preference]:
        """Which answer is better, asked in both orders."""

        def prompt(case: Case, a: str, b: str) -> str:
            return PAIRWISE.format(rubric=rubric, question=case.question, reference=_reference(case), a=a, b=b)

        prompts = [prompt(c, *pair) for c in cases for pair in ((c.answer, c.other), (c.other, c.answer))]
        found = self.verdicts(prompts, read_preference)
        return [_both_orders(found[i], found[i + 1]) for i in range(0, len(found), 2)]

    def labels(self, cases: Sequence[Case], instructions: str, labels: Sequence[str]) -> list[Verdict[str]]:
        """One of `labels` for each answer."""
        shown = ", ".join(f"[[{label}]]" for label in labels)
        prompts = [LABEL.format(instructions=instructions, question=c.question, answer=c.answer, labels=shown) for c in cases]
        return self.verdicts(prompts, lambda text: read_label(text, labels))

    def verdicts(self, prompts: Sequence[str], read: Callable[[str], V | None]) -> list[Verdict[V]]:
        """What `read` finds in the reply to each prompt, in order."""
        conversations: list[list[Message]] = [[{"role": "user", "content": prompt}] for prompt in prompts]
        found: list[Verdict[V]] = [Verdict(None)] * len(prompts)
        waiting = list(range(len(prompts)))
        for attempt in range(self.settings.reasks + 1):
            temperature = REASK_TEMPERATURE if attempt else 0.0
            replies = self.client.ask_all([conversations[i] for i in waiting], temperature=temperature, sample=attempt)
            again = []
            for i, reply in zip(waiting, replies, strict=True):
                found[i] = self._read(reply, read)
                if found[i].value is None and reply.error is None:
                    again.append(i)
                    turns: list[Message] = [{"role": "assistant", "content": reply.text or ""}, {"role": "user", "content": REMINDER}]
                    conversations[i] = [conversations[i][0], *turns]
            waiting = again
            if not waiting:
                break
        self.counts.update(asked=len(found), unreadable=len(waiting), failed=sum(v.value is None for v in found) - len(waiting))
        return found

    def _read(self, reply: Reply, read: Callable[[str], V | None]) -> Verdict[V]:
        if reply.text is None:
            return Verdict(None, why=reply.error)
        value = read(reply.text)
        return Verdict(value, reply.text, None if value is not None else "no verdict in the reply")

    def report(self) -> str:
        """How many verdicts were asked for and are missing, and what they cost."""
        c = self.counts
        return (
            f"judged by {self.settings.model}: {c['asked']} verdicts asked for, {c['unreadable']} unreadable, {c['failed']} failed; "
            f"{self.client.cost_text()}"
        )


def _reference(case: Case) -> str:
    return f"\nA correct answer, for comparison:\n{case.reference}\n" if case.reference is not None else ""


def _both_orders(first: Verdict[str], second: Verdict[str]) -> Preference:
    texts = (first.text, second.text)
    if first.value is None or second.value is None:
        return Preference(None, False, texts)
    a = {"A": "first", "B": "second", "tie": "tie"}[first.value]
    b = {"A": "second", "B": "first", "tie": "tie"}[second.value]
    return Preference(a if a == b else "tie", a != b, texts)  # type: ignore[arg-type]


def _said(text: str) -> str:
    """The reply without its thinking; a thinking that never ends holds no verdict."""
    text = re.sub(r"\A.*</think(?:ing)?>", "", text, flags=re.DOTALL)
    return re.sub(r"<think(?:ing)?>.*\Z", "", text, flags=re.DOTALL)


def bracketed(text: str) -> str | None:
    """What is in the last double square brackets of a reply, its thinking left out."""
    found = re.findall(r"\[\[\s*(.*?)\s*\]\]", _said(text), re.DOTALL)
    return found[-1] if found else None


def read_score(text: str, low: int, high: int) -> int | None:
    """The last `[[n]]`, else the only whole number in the text; None outside of the scale.

    >>> read_score("Good, but short. [[4]]", 1, 5)
    4
    """
    inside = bracketed(text)
    match = re.fullmatch(r"(-?\d+)(?:\.0)?(?:\s*/\s*\d+)?", inside) if inside is not None else None
    if inside is None:
        numbers = re.findall(r"(?<![\d.])-?\d+(?![\d.]*\d)", _said(text))
        match = re.fullmatch(r"(-?\d+)", numbers[0]) if len(numbers) == 1 else None
    value = int(match[1]) if match else None
    return value if value is not None and low <= value <= high else None


def read_preference(text: str) -> str | None:
    """`A`, `B` or `tie` from the last brackets, or from a reply that is nothing else."""
    inside = bracketed(text)
    plain = (inside if inside is not None else _said(text)).strip().strip(".").lower()
    plain = re.sub(r"\A(?:response|answer|assistant)\s*", "", plain)
    return {"a": "A", "b": "B", "c": "tie", "tie": "tie", "equal": "tie"}.get(plain)


def read_label(text: str, labels: Sequence[str]) -> str | None:
    """The label in the last brackets, or in a reply that is nothing else."""
    inside = bracketed(text)
    plain = re.sub(r"[\s_-]+", " ", (inside if inside is not None else _said(text)).strip().strip(".").lower())
    return {re.sub(r"[\s_-]+", " ", label.lower()): label for label in labels}.get(plain)


def preference_score(values: Sequence[str | None]) -> float | None:
    """`100 (wins - losses) / (wins + losses + ties)` of the first answer; what has no verdict is left out (arXiv 2405.09055)."""
    counts = Counter(value for value in values if value is not None)
    return 100 * (counts["first"] - counts["second"]) / counts.total() if counts else None


def agreement(judged: Sequence[str | None], human: Sequence[str]) -> dict[str, float]:
    """How far a judge agrees with people on the same items: share of equal labels and Cohen's kappa, over those with a verdict.

    `kappa = (p - e) / (1 - e)`, p the share of equal labels, e that expected of independent judges; 1 when both give one same label only.
    """
    pairs = [(a, b) for a, b in zip(judged, human, strict=True) if a is not None]
    n = len(pairs)
    if not n:
        return {"n": 0, "agreement": float("nan"), "kappa": float("nan")}
    same = sum(a == b for a, b in pairs) / n
    left, right = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    chance = sum(left[label] * right[label] for label in left) / n**2
    return {"n": n, "agreement": same, "kappa": (same - chance) / (1 - chance) if chance < 1 else 1.0}
