"""Fixtures shared by all tests."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest

# The tests' runs go to an index of their own, also those of commands that they start.
os.environ["GUIDETUNE_HOME"] = tempfile.mkdtemp(prefix="guidetune-home-")
atexit.register(shutil.rmtree, os.environ["GUIDETUNE_HOME"], ignore_errors=True)

# The suite is the same on every run; `HYPOTHESIS_PROFILE=explore` looks for new counter-examples instead.
hypothesis.settings.register_profile("steady", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The larger real data sets beside a development checkout; tests that need them are skipped elsewhere."""
    folder = ROOT.parent / "shared" / "data"
    if not (folder / "SOURCES.md").is_file():
        pytest.skip("the larger real data files are not beside this checkout (../shared/data)")
    return folder


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tests run two at a time on two cores: more threads would only fight."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _usual_verbosity(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that asks for quiet must not silence the next one."""
    monkeypatch.setattr("guidetune.progress._verbosity", 0)
