"""The project as it is installed: pins, ranges, what the wheel holds, and the generated pages."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins(name: str) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    found = {}
    for line in lines:
        if line and not line.startswith("-"):
            match = re.fullmatch(r"([a-z0-9-]+)==([0-9][^;\s]*)(; .+)?", line)
            assert match, f"{name}: {line!r} is not an exact pin"
            found[match[1]] = match[2]
    return found


CORE, DEV = pins("requirements.lock"), pins("requirements-dev.lock")


def test_torch_is_pinned_as_the_local_wheel_needs_it() -> None:
    assert CORE["torch"] == "2.13.0"
    assert "torch==2.13.0" in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()


def test_every_pin_lies_in_its_range_and_every_dependency_is_pinned() -> None:
    for text in PROJECT["dependencies"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(CORE[canonicalize_name(requirement.name)]), text
    for text in PROJECT["optional-dependencies"]["dev"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains((CORE | DEV)[canonicalize_name(requirement.name)]), text
    assert not CORE.keys() & DEV.keys()


def test_the_locks_are_closed_and_are_what_is_installed() -> None:
    """Everything a pinned package needs is pinned, so that an installation cannot drift."""
    locked = CORE | DEV
    for name, version in locked.items():
        found = metadata.distribution(name)
        assert found.version.split("+")[0] == version, f"{name}: {found.version} is installed; run make setup"
        for text in found.requires or []:
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                assert canonicalize_name(need.name) in (CORE if name in CORE else locked), f"{name} needs {need.name}, which is not locked"


def test_the_extras_are_pinned_within_their_ranges() -> None:
    extras = pins("requirements-extras.lock")
    assert not extras.keys() & (CORE | DEV).keys()
    for text in PROJECT["optional-dependencies"]["eval"] + PROJECT["optional-dependencies"]["track"]:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        if name != "trackio":  # wants an older pillow than requirements.lock has
            assert requirement.specifier.contains(extras[name]), text


def test_never_a_dependency() -> None:
    named = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    assert not named & {"unsloth", "axolotl", "torchtune", "lightning", "mergekit", "trl"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in a wheel built from a copy of the tree, without a network."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "guidetune", source / "guidetune", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(source / "dist")]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, str(source)],
        capture_output=True,
        text=True,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next((source / "dist").glob("guidetune-*.whl"))) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: set[str]) -> None:
    package = {p.relative_to(ROOT).as_posix() for p in (ROOT / "guidetune").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    package = {name for name in package if not any(part.startswith(".") for part in name.split("/"))}
    assert package <= wheel, sorted(package - wheel)[:5]
    assert {name.split("/")[0] for name in wheel if ".dist-info" not in name} == {"guidetune"}


def test_the_console_script() -> None:
    entry = [e for e in metadata.entry_points(group="console_scripts") if e.name == "guidetune"]
    assert entry and entry[0].value == "guidetune.cli:main"


def test_the_generated_pages_are_up_to_date() -> None:
    from guidetune.reference import PAGES

    for name, render in PAGES.items():
        page = ROOT / "docs" / name
        assert page.is_file() and page.read_text(encoding="utf-8") == render(), f"docs/{name} is out of date; run `make docs`"


def test_every_option_is_described() -> None:
    from guidetune import reference

    for cls in reference.methods():
        assert cls.summary, cls.name
        for name, _, _, description in reference.options(cls):
            assert description, f"{cls.kind}/{cls.name}: option {name} has no description"


# The set-up commands


def run_setup(folder: Path, *arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python, str(folder / "tools" / "setup.py"), *arguments], capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The set-up's own files, with locks that need nothing from anywhere."""
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "setup.py", tmp_path / "tools")
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\nversion = "0"\n', encoding="utf-8")
    for name in ("requirements.lock", "requirements-dev.lock"):
        (tmp_path / name).write_text("# empty\n", encoding="utf-8")
    return tmp_path


def test_setup_refuses_an_old_python_in_words(checkout: Path) -> None:
    code = (
        "import runpy, sys; sys.version_info = (3, 10, 4); sys.argv = ['setup.py'];"
        f"runpy.run_path({str(checkout / 'tools' / 'setup.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "needs Python 3.11 or newer" in done.stderr and "is 3.10.4" in done.stderr
    assert not (checkout / ".venv").exists()


def test_setup_says_so_when_venv_is_missing(checkout: Path) -> None:
    code = (
        "import runpy, subprocess, sys; sys.argv = ['setup.py']; real = subprocess.run\n"
        "fails = [sys.executable, '-c', 'import sys; sys.exit(\"No module named ensurepip\")']\n"
        "def run(command, **options): return real(fails, **options)\n"
        f"subprocess.run = run; runpy.run_path({str(checkout / 'tools' / 'setup.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "apt install python3-venv" in done.stderr and "No module named ensurepip" in done.stderr
    assert not (checkout / ".venv").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_names_a_missing_interpreter(checkout: Path) -> None:
    done = subprocess.run(["make", "setup", "PYTHON=no-such-python"], cwd=checkout, capture_output=True, text=True)
    assert done.returncode != 0 and "no interpreter 'no-such-python'" in done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_alone_prints_help() -> None:
    done = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    for target in ("demo", "test", "setup", "lint"):
        assert f"make {target} " in done.stdout


def test_no_machine_paths_or_registries_in_the_tree() -> None:
    done = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"--(extra-)?" + r"index-url|find-" + r"links|download\.py" + r"torch\.org")
    here = str(ROOT.parent) + os.sep
    for name in done.stdout.splitlines():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".lock", ""} and path.is_file() and path.stat().st_size < 1_000_000:
            text = path.read_text(encoding="utf-8", errors="replace")
            assert not pattern.search(text), name
            assert len(here) < 4 or here not in text, name
