"""Three judges of a mathematical answer: math-verify, Hendrycks' string rule, and the GIFT release's rule.

math-verify reads what a model wrote with sympy, which may compute for hours, take all memory, or swallow the alarm signal that is to stop
it. So the comparison runs in one helper process with a limit on its memory, which is ended when its own alarms have not stopped it.
"""

from __future__ import annotations

import atexit
import json
import logging
import queue
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from math import isclose

from guidetune.evaluation.answers import boxed, to_number

TIMEOUT_S = 5
MEMORY = 4 << 30  # address space of the helper
LONGEST = 100_000  # characters of an output that are read: an answer stands at its end


def verified(gold: str, output: str, timeout: int = TIMEOUT_S) -> bool:
    """math-verify: `verify(parse(gold), parse(output))`, gold first (the relation is not symmetric); False on a time-out.

    `timeout` is for each of the three steps, so no comparison takes longer than 3 `timeout` and a little.

    LaTeX must be wrapped (`$...$` or a box) to be read; of unwrapped text only the last number counts.
    """
    return bool(output.strip()) and _helper.ask(gold, output[-LONGEST:], timeout)


def _verify(gold: str, output: str, timeout: int | None) -> bool:
    from math_verify import parse, verify

    # Both libraries log every unreadable answer with a traceback; an unreadable answer is simply wrong.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)
    try:
        return bool(verify(parse(gold, parsing_timeout=timeout), parse(output, parsing_timeout=timeout), timeout_seconds=timeout))
    except Exception:  # noqa: BLE001 - sympy raises whatever it likes on a model's output
        return False


class _Helper:
    """One child process that compares pairs given as JSON lines."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()
        self._lock = threading.Lock()

    def ask(self, gold: str, output: str, timeout: float) -> bool:
        """`_verify` in the child; False when it takes longer than its alarms allow, and then the child is ended."""
        with self._lock:
            starting = self._process is None or self._process.poll() is not None
            if starting:
                self._start()
            process = self._process
            assert process is not None and process.stdin is not None
            try:
                process.stdin.write(json.dumps([gold, output, timeout]) + "\n")
                process.stdin.flush()
                # The first answer waits for the child's imports as well.
                return json.loads(self._answers.get(timeout=3 * timeout + min(1, timeout) + (60 if starting else 0))) is True
            except (queue.Empty, OSError, ValueError):
                self.close()
                return False

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "guidetune.evaluation.maths"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        self._answers = queue.Queue()
        threading.Thread(target=self._read, args=(self._process, self._answers), daemon=True).start()

    @staticmethod
    def _read(process: subprocess.Popen[str], answers: queue.Queue[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            answers.put(line)
        answers.put("")  # the child has gone: no answer will come

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                try:
                    if pipe is not None:
                        pipe.close()
                except OSError:
                    pass
            self._process = None


_helper = _Helper()
atexit.register(_helper.close)


def serve() -> None:
    """The helper's loop: `[gold, output, timeout]` per line in, `true` or `false` per line out. The parent keeps the time as well."""
    with suppress(ImportError, ValueError, OSError):  # Windows has no such limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        gold, output, timeout = json.loads(line)
        whole = max(1, round(timeout)) if hasattr(signal, "SIGALRM") else None
        try:
            equal = _verify(gold, output, whole)
        except MemoryError:
            equal = False
        print(json.dumps(equal), flush=True)


_FRACTION = re.compile(r"\\frac\s*(?:\{([^{}]*)\}|([^\s{}\\]))\s*(?:\{([^{}]*)\}|([^\s{}\\]))")


def hendrycks_form(answer: str) -> str:
    r"""The MATH data set's string form: without `\left \right \! $ % \text{ units}`, degrees and spaces; fractions as `\frac{a}{b}`.

    >>> hendrycks_form(r"\dfrac12"), hendrycks_form("0.5"), hendrycks_form("3/4")
    ('\\frac{1}{2}', '\\frac{1}{2}', '\\frac{3}{4}')
    """
    text = answer.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac").replace("\\left", "").replace("\\right", "")
    text = text.replace("^{\\circ}", "").replace("^\\circ", "").replace("\\$", "").replace("$", "")
    text = re.split(r"\\text\{ ", text)[0]  # a unit: text that begins with a space
    text = text.replace("\\%", "").replace("%", "").replace(" .", " 0.").replace("{.", "{0.")
    if text.startswith("."):
        text = "0" + text
    name, equals, value = text.partition("=")
    if equals and "=" not in value and len(name.strip()) <= 2:
        text = value  # "k = 5"
    text = re.sub(r"\\sqrt\s*([^\s{\[\\])", r"\\sqrt{\1}", text)
    text = _FRACTION.sub(lambda m: rf"\frac{{{m[1] if m[1] is not None else m[2]}}}{{{m[3] if m[3] is not None else m[4]}}}", text)
    text = text.replace(" ", "")
    if text == "0.5":
        text = "1/2"
    return re.sub(r"\A(-?\d+)/(-?\d+)\Z", r"\\frac{\1}{\2}", text)


def hendrycks_equal(gold: str, output: str) -> bool:
    """Whether the last boxed answer of `output` has the string form of `gold`."""
    found = boxed(output)
    return found is not None and hendrycks_form(found) == hendrycks_form(gold)


def gift_equal(gold: str, output: str) -> bool:
    """The GIFT release's rule on the boxed answer (arXiv 2605.01256): string, then numeric (also x100 and /100), then symbolic equality."""
    found = boxed(output)
    if found is None or not found.strip():
        return False
    if found.strip().lower() == gold.strip().lower():
        return True
    a, b = to_number(gold), to_number(found)
    if a is not None and b is not None:
        return any(isclose(b, scaled, rel_tol=1e-4, abs_tol=1e-12) for scaled in (a, a / 100, a * 100))
    return verified(f"${gold}$", f"\\boxed{{{found}}}", 3)


if __name__ == "__main__":
    serve()
