"""The two ways a job can end badly. Both are shown without a traceback."""

from __future__ import annotations

from collections.abc import Sequence


class BadInput(Exception):
    """What the user gave cannot be used; nothing expensive has started. Exit code 2.

    `problems` lists every fault found, each naming the culprit, its value and the next step.
    """

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class RunFailed(Exception):
    """A job that had started could not be finished; nothing was published from it. Exit code 1."""

    exit_code = 1
