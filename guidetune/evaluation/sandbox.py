"""Running a program that a model wrote, so that it can harm nothing and always ends.

Each program runs in a Python process of its own (no environment, no site packages): its own session, an empty folder as HOME
and current folder, limits on processor time, memory, file size, open files and processes (it can start none), and a limit on the time
on the clock and on what it prints. How well the rest of the machine is out of its reach depends on what the system allows, and
`isolation()` says which it is:

    namespaces   Linux that allows them: the file system is read-only but for its folder (a small one in memory), there is no network,
                 no other process is visible, and /proc, /tmp, /run and home folders are empty. Root becomes an unprivileged user.
    user         started by root without namespaces: it runs as an unprivileged user, behind the guard below.
    guard        an audit hook refuses files outside its folder, processes, signals and sockets. This stops accidents, not an attack by
                 somebody who knows Python's insides; use a container or a virtual machine for models you do not trust.

A program has passed when it prints a random word at its
very end, so leaving early with exit code 0 is not a pass.
"""

from __future__ import annotations

import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from guidetune.errors import BadInput

Isolation = Literal["namespaces", "user", "guard"]
NOBODY = 65534


@dataclass(frozen=True)
class Limits:
    """What one program may use. `seconds` is both time on the clock and processor time."""

    seconds: float = 10.0
    memory_mb: int = 1024
    file_mb: int = 16
    output_bytes: int = 65536


@dataclass(frozen=True)
class Execution:
    """How a program ended. `detail` is the last line it wrote: for a failure, the exception."""

    status: Literal["passed", "failed", "timeout", "output", "early exit"]
    detail: str
    output: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def run(program: str, limits: Limits | None = None, how: Isolation | None = None) -> Execution:
    """Run a program to its end or its limits; it harms nothing, and nothing of it is left.

    Raises:
        BadInput: programs cannot be limited on this system.
    """
    limits, how = limits or Limits(), how or isolation()
    word = secrets.token_hex(16)
    folder = Path(tempfile.mkdtemp(prefix="guidetune-"))
    source = folder.with_name(folder.name + ".py")
    try:
        # surrogatepass: a model may write half a character; the program then fails on it, and not we
        source.write_bytes(f"{program}\n\nprint({word!r})\n".encode("utf-8", "surrogatepass"))
        if how != "guard" and os.geteuid() == 0:
            os.chown(folder, NOBODY, NOBODY)
        return _execute(source, folder, word, limits, how)
    finally:
        source.unlink(missing_ok=True)
        _remove(folder)


def run_all(programs: Sequence[str], limits: Limits | None = None) -> list[Execution]:
    """`run` of each, as many at a time as there are cores; results in order."""
    from guidetune.threads import available_cores

    if not programs:
        return []
    isolation()
    with ThreadPoolExecutor(available_cores()) as pool:
        return list(pool.map(lambda program: run(program, limits), programs))


@cache
def isolation() -> Isolation:
    """The best isolation that this system gives, found by trying it.

    Raises:
        BadInput: there is none: not a POSIX system.
    """
    if os.name != "posix":
        raise BadInput("running a model's programs needs Linux or macOS; on Windows use WSL or a container")
    ways: list[Isolation] = ["namespaces"] if sys.platform == "linux" else []
    ways += ["user"] if os.geteuid() == 0 else []
    for way in ways:
        if run("open('x', 'w').close()", Limits(seconds=20), way).passed:
            return way
    return "guard"


EXPLAINED: dict[Isolation, str] = {
    "namespaces": "programs ran without network, on a read-only file system, in namespaces of their own",
    "user": "programs ran as an unprivileged user; namespaces are not allowed here, so the network was blocked inside Python only",
    "guard": "programs ran as this user; namespaces are not allowed here, so files, processes and network were guarded inside Python only",
}


def _execute(source: Path, folder: Path, word: str, limits: Limits, how: Isolation) -> Execution:
    began = time.monotonic()
    python = getattr(sys, "_base_executable", sys.executable) or sys.executable
    settings = [how, str(folder), str(limits.seconds), str(limits.memory_mb), str(limits.file_mb), python, sys.base_prefix]
    with open(source, "rb") as program:
        process = subprocess.Popen(
            [python, "-I", "-S", str(Path(__file__).with_name("sandboxed.py")), *settings],
            stdin=program,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={},
            start_new_session=True,
            close_fds=True,
        )
    try:
        output, status = _read(process, began + limits.seconds, limits.output_bytes)
        if status is None:
            try:
                # The end of the output is not the end of the process: a program may close its streams and go on.
                process.wait(max(0.5, began + limits.seconds - time.monotonic()))
            except subprocess.TimeoutExpired:
                status = "timeout"
    finally:
        _end(process)
    text = output.decode("utf-8", "replace")
    lines = text.rstrip().splitlines()
    if status is None:
        passed = process.returncode == 0 and bool(lines) and lines[-1] == word
        lines = [line for line in lines if line != word]
        status = "passed" if passed else "early exit" if process.returncode == 0 else "failed"
    detail = lines[-1][:300] if lines else ""
    if status == "timeout":
        detail = f"not finished after {limits.seconds:g} seconds"
    elif status == "output":
        detail = f"printed more than {limits.output_bytes} bytes"
    elif status == "early exit":
        detail = "ended before its tests did"
    elif status == "failed" and not detail:
        detail = f"ended by signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
    return Execution(status, detail, "\n".join(lines), time.monotonic() - began)  # type: ignore[arg-type]


def _read(process: subprocess.Popen[bytes], deadline: float, most: int) -> tuple[bytes, str | None]:
    """What the process writes until it ends its output, the deadline, or `most` bytes; and which of the last two it was."""
    assert process.stdout is not None
    found = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if not selector.select(left):
                break
            chunk = os.read(process.stdout.fileno(), 65536)
            if not chunk:
                return bytes(found), None
            found += chunk
            if len(found) > most:
                return bytes(found[:most]), "output"
    return bytes(found), "timeout"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and its group; in namespaces the launcher's end takes every process of them along."""
    for kill in (lambda: os.killpg(process.pid, signal.SIGKILL), process.kill):
        try:
            kill()
        except (ProcessLookupError, PermissionError):
            pass  # it has ended already
    assert process.stdout is not None
    process.stdout.close()
    process.wait()


def _remove(folder: Path) -> None:
    try:
        folder.rmdir()  # in namespaces nothing was written here
    except OSError:
        # A program may have taken the rights off its folders, or put thousands of them inside each other: Python's own rmtree gives up.
        for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
            subprocess.run([*command, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
