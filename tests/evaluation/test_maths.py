from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest

from guidetune.evaluation import maths
from guidetune.evaluation.maths import gift_equal, hendrycks_equal, hendrycks_form, verified

ORACLES = [
    (r"$\frac12$", "$0.5$", True),
    (r"\boxed{14}", "so 14", True),
    ("$x=5$", r"\boxed{5}", True),
    (r"\boxed{5}", "$x=5$", True),
    (r"$(3,\frac{\pi}{2})$", r"$\left(3,\frac{\pi}{2}\right)$", True),
    (r"$(3,\frac\pi2)$", r"$(3,\frac{\pi}{2})$", False),
    (r"$10\%$", "$0.1$", True),
    ("1,000", "1000", True),
    (r"$\text{Evelyn}$", r"\boxed{Evelyn}", True),
    ("$1,2$", "$2,1$", True),
    ("$1/3$", "$0.333$", False),
    ("$1/3$", "$0.333333$", True),
    ("$(0,1)$", "$0<x<1$", False),
    ("$0<x<1$", "$(0,1)$", True),
    ("$5$", "", False),
]


@pytest.mark.parametrize(("gold", "output", "equal"), ORACLES)
def test_math_verify_oracles(gold: str, output: str, equal: bool) -> None:
    assert verified(gold, output) is equal


BOMBS = [
    r"$10^{100000000}$",
    r"$\log(10^{10^{9}})$",
    r"$100000000!$",
    r"$(x+y+z+1)^{3000}$",  # memory
    "$" + "\\sqrt{" * 200 + "2" + "}" * 200 + "$",
    "\\frac" * 20_000,
    "9" * 1_000_000,
]


def test_latex_that_would_run_for_ever_is_wrong_in_bounded_time_and_memory() -> None:
    assert verified("$2$", "$2$")
    for bomb in BOMBS:
        began = time.monotonic()
        assert verified("$x^{2}$", bomb, 1) is False
        assert time.monotonic() - began < 3 * 1 + 1 + 3, bomb[:40]
    assert verified("$2$", "$2$")  # and the grader still works
    helper = maths._helper._process
    if helper is not None and sys.platform == "linux":
        assert int(Path(f"/proc/{helper.pid}/statm").read_text().split()[0]) * 4096 <= maths.MEMORY


def test_a_helper_serves_all_threads_and_is_ended_when_it_hangs() -> None:
    found: list[bool] = []
    pairs = [("$x=5$", r"\boxed{5}"), ("$5$", "$6$")]
    thread = threading.Thread(target=lambda: found.extend(verified(*pair) for pair in pairs))
    thread.start()
    thread.join()
    assert found == [True, False]
    assert maths._helper._process is not None
    slow = "$" + "^".join(["9"] * 12) + "$"
    assert maths._helper.ask(slow, slow.replace("9", "8"), 0.01) is False
    assert maths._helper._process is None  # ended; the next question starts another
    assert maths._helper.ask("$2$", "$2$", 30) is True
    maths._helper.close()


@pytest.mark.parametrize(
    ("raw", "form"),
    [
        (r"\dfrac12", r"\frac{1}{2}"),
        (r"\tfrac{1}{2}", r"\frac{1}{2}"),
        (r"\frac1{72}", r"\frac{1}{72}"),
        ("3/4", r"\frac{3}{4}"),
        ("0.5", r"\frac{1}{2}"),
        (".5", r"\frac{1}{2}"),
        (r"\left(3, \frac{\pi}{2}\right)", r"(3,\frac{\pi}{2})"),
        (r"90^\circ", "90"),
        (r"12\text{ cm}", "12"),
        (r"50\%", "50"),
        (r"\$5", "5"),
        ("k = 7", "7"),
        (r"\sqrt3", r"\sqrt{3}"),
        (r"10,\!000", "10,000"),
    ],
)
def test_hendrycks_form(raw: str, form: str) -> None:
    assert hendrycks_form(raw) == form
    assert hendrycks_equal(raw, f"\\boxed{{{form}}}")


def test_gift_rule() -> None:
    assert gift_equal("x", r"\boxed{x}")
    assert gift_equal("0.5", r"\boxed{50\%}")
    assert gift_equal("50", r"\boxed{0.5}")
    assert gift_equal(r"\frac{1}{2}", r"\boxed{0.5}")
    assert gift_equal("1000", r"\boxed{1,000.05}")
    assert not gift_equal("5", "5")  # no box
    assert not gift_equal("5", r"\boxed{6}")
    assert not gift_equal("5", r"\boxed{}")
