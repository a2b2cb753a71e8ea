"""Programs that would do harm: nothing outside is changed, nothing is left, and every one ends in time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from guidetune.evaluation.sandbox import Execution, Isolation, Limits, isolation, run, run_all

pytestmark = pytest.mark.skipif(os.name != "posix", reason="programs are limited on POSIX systems only")
LIMITS = Limits(seconds=1, memory_mb=512)
# what the machine gives, and the weakest there is
WAYS: list[Isolation] = list(dict.fromkeys([isolation(), "guard"])) if os.name == "posix" else []


@pytest.fixture(params=WAYS)
def how(request: pytest.FixtureRequest) -> Isolation:
    return request.param


def bounded(program: str, how: Isolation) -> Execution:
    began = time.monotonic()
    found = run(program, LIMITS, how)
    assert time.monotonic() - began < LIMITS.seconds + 5
    return found


def mine() -> set[int]:
    """Processes whose command line is a sandboxed program."""
    found = set()
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"sandboxed.py" in (text := place.read_bytes()) or b"<program>" in text:
                found.add(int(place.parent.name))
        except OSError:
            pass
    return found


def test_a_program_passes_fails_and_may_not_leave_early(how: Isolation) -> None:
    assert run("assert 1 + 1 == 2", LIMITS, how).passed
    failed = run("print('seen')\nassert 1 + 1 == 3, 'sum'", LIMITS, how)
    assert (failed.status, failed.detail) == ("failed", "AssertionError: sum") and "seen" in failed.output
    for leaving in ("import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"):
        assert run(f"{leaving}\nassert False", LIMITS, how).status == "early exit"
    assert run("half a character: \udc80", LIMITS, how).status == "failed"


def test_an_infinite_loop_ends(how: Isolation) -> None:
    assert bounded("while True: pass", how).status == "timeout"
    assert bounded("import os, time\nos.close(1); os.close(2)\ntime.sleep(600)", how).status == "timeout"


def test_a_gigabyte_of_output_is_not_kept(how: Isolation) -> None:
    found = bounded("import sys\nfor _ in range(1024): sys.stdout.write('x' * 2**20)", how)
    assert found.status == "output" and len(found.output) <= LIMITS.output_bytes


def test_a_fork_bomb_makes_no_process(how: Isolation) -> None:
    found = bounded("import os\nwhile True: os.fork()", how)
    assert found.status == "failed"
    assert bounded("import subprocess\nsubprocess.run(['sleep', '600'])", how).status == "failed"
    time.sleep(0.05)
    assert not mine()


def test_files_outside_stay(how: Isolation, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("mine", encoding="utf-8")
    os.chmod(tmp_path, 0o777)  # a sandbox that only changes the user must not be saved by the modes alone
    os.chmod(tmp_path / "kept", 0o777)
    os.chmod(tmp_path / "kept" / "file", 0o666)
    program = f"import shutil\nshutil.rmtree({str(tmp_path)!r}, ignore_errors=True)\n"
    for more in (f"open({str(tmp_path / 'kept' / 'file')!r}, 'w')", f"import os\nos.remove({str(tmp_path / 'kept' / 'file')!r})"):
        assert bounded(program.replace(", ignore_errors=True", "") if how == "guard" else program + more, how).status == "failed"
    assert (tmp_path / "kept" / "file").read_text(encoding="utf-8") == "mine"


def test_the_parent_lives(how: Isolation) -> None:
    for program in ("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)", "import os\nos.kill(-1, 9)"):
        bounded(program, how)  # whatever became of it, this line is reached
    bounded(f"import os\nos.kill({os.getpid()}, 9)", how)


def test_memory_and_disk_are_limited(how: Isolation) -> None:
    assert bounded("x = bytearray(2**31)", how).detail == "MemoryError"
    assert bounded("with open('a', 'wb') as f:\n  while True: f.write(b'x' * 2**20)", how).status == "failed"


def test_it_sees_no_network_and_no_secrets(how: Isolation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with subprocess.Popen([sys.executable, "-c", "import socket\ns=socket.create_server(('127.0.0.1',0))\nprint(s.getsockname()[1],flush=True)\ns.accept()"], stdout=subprocess.PIPE, text=True) as server:  # fmt: skip # noqa: E501
        assert server.stdout is not None
        port = int(server.stdout.readline())
        assert bounded(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)", how).status == "failed"
        assert server.poll() is None  # nobody has called
        server.kill()
    found = run("import os\nprint(sorted(os.environ), os.getcwd() == os.environ['HOME'], os.listdir('.'))", LIMITS, how)
    assert found.passed and "KEY" not in found.output and found.output.endswith("True []")
    assert "secret" not in found.output
    if how == "namespaces":
        other = run("import os\nprint(os.listdir('/proc'), os.listdir('/tmp'), os.getuid() != 0)", LIMITS, how)
        hidden = run("import os\nprint([os.listdir(p) for p in ('/home', '/root', '/run') if os.path.isdir(p)])", LIMITS, how)
        assert hidden.passed and set(hidden.output) <= set("[], ")
        assert other.passed and other.output.startswith("[] [") and "guidetune" not in other.output and other.output.endswith("True")


def test_nothing_is_left_behind(how: Isolation) -> None:
    before = set(os.listdir(tempfile.gettempdir()))
    bounded("import os\nfor i in range(1100):\n    os.mkdir('d'); os.chdir('d')", how)
    bounded("import os\nos.mkdir('locked'); open('locked/file', 'w').close(); os.chmod('locked', 0)", how)
    assert not [name for name in set(os.listdir(tempfile.gettempdir())) - before if name.startswith("guidetune-")]


def test_many_keep_their_order() -> None:
    found = run_all([f"assert {i} != 2, {i}" for i in range(4)], LIMITS)
    assert [one.passed for one in found] == [True, True, False, True]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.skipif(shutil.which("python3", path="/usr/bin") is None, reason="needs an interpreter that any user may run")
@pytest.mark.parametrize(("user", "how"), [(1234, "namespaces"), (0, "user")])
def test_other_users(user: int, how: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """An ordinary user enters a user namespace, where the system allows those; root without namespaces becomes nobody."""
    source = Path(__file__).parents[2] / "guidetune" / "evaluation" / "sandboxed.py"
    become = f"import os, sys\nos.setgid({user})\nos.setuid({user})\n" if user else "import os, sys\n"
    given = [how, "/var/tmp", "5", "512", "16", "/usr/bin/python3", "/usr"]
    code = f"{become}os.execv('/usr/bin/python3', ['python3', '-I', '-S', '-c', sys.argv[1], *{given}])"
    lines = [
        "import os",
        "print(os.getuid() not in (0,), len(os.listdir('/proc')) == 0)",
        "try: os.fork()",
        "except OSError: print('alone')",
        "open('/etc/x', 'w')",
    ]
    command = [sys.executable, "-c", code, source.read_text(encoding="utf-8")]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, cwd="/", timeout=30)
    if "unshare" in done.stderr:
        pytest.skip("user namespaces are not allowed here")
    assert done.stdout.splitlines() == [f"True {how == 'namespaces'}", "alone"], done.stderr
    assert "Error" in done.stderr.splitlines()[-1]
