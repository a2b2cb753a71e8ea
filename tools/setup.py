"""Make .venv and install the locked requirements and guidetune itself; does nothing when they are already there.

Standard library only, and readable by old interpreters, because it runs before anything is installed:

    python3 tools/setup.py          what `make demo` needs
    python3 tools/setup.py --dev    also what `make test` needs
    ... --dev --extras              also the optional packages that `make test-extras` needs
"""

import hashlib
import os
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
PYTHON = os.path.join(VENV, "Scripts" if os.name == "nt" else "bin", "python.exe" if os.name == "nt" else "python")
LOCKS = {"core": "requirements.lock", "dev": "requirements-dev.lock", "extras": "requirements-extras.lock"}


def stop(message):
    sys.stderr.write("setup: " + message + "\n")
    sys.exit(2)


def wanted(lock):
    """What a finished installation is recognised by: the lock, the packaging data, the place and the interpreter."""
    parts = hashlib.sha256()
    for name in ("pyproject.toml", lock):
        with open(os.path.join(ROOT, name), "rb") as file:
            parts.update(file.read())
    parts.update(ROOT.encode())
    with open(os.path.join(VENV, "pyvenv.cfg"), "rb") as file:
        parts.update(file.read())
    return parts.hexdigest()


def make_venv():
    """A virtual environment with pip, or a message that says what the machine lacks."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if os.path.exists(PYTHON) and subprocess.call([PYTHON, "-m", "pip", "--version"], **quiet) == 0:
        return
    if os.path.exists(VENV):
        print("setup: .venv is incomplete, making it again")
        shutil.rmtree(VENV)
    print("setup: making .venv with Python {}.{}.{}".format(*sys.version_info[:3]), flush=True)
    done = subprocess.run([sys.executable, "-m", "venv", VENV], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0 or not os.path.exists(PYTHON):
        shutil.rmtree(VENV, ignore_errors=True)
        stop(
            "{} cannot make a virtual environment; its venv or ensurepip module is missing.\n"
            "On Debian or Ubuntu: apt install python3-venv. Or name another interpreter: make setup PYTHON=/path/to/python3.12\n\n"
            "{}".format(sys.executable, done.stdout.decode("utf-8", "replace").strip())
        )


def pip(*arguments):
    code = subprocess.call([PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "-qq"] + list(arguments), cwd=ROOT)
    if code != 0:
        stop("pip could not install the above; mend the cause and run the same command again, it continues.")


def install(part):
    lock = LOCKS[part]
    stamp = os.path.join(VENV, ".guidetune-" + part)
    key = wanted(lock)
    if os.path.exists(stamp):
        with open(stamp) as file:
            if file.read() == key:
                return
    print("setup: installing " + lock + " (the first time takes a few minutes)", flush=True)
    # One request with exact pins: nothing looser may be asked for first, or pip would fetch another torch.
    pip("-r", lock)
    if part == "core":
        pip("--no-deps", "--no-build-isolation", "-e", ".")
    with open(stamp, "w") as file:
        file.write(key)


def main(arguments):
    if sys.version_info < (3, 11):
        stop(
            "guidetune needs Python 3.11 or newer, and {} is {}.{}.{}. Name another interpreter: make setup PYTHON=python3.12".format(
                sys.executable, *sys.version_info[:3]
            )
        )
    make_venv()
    install("core")
    for part in ("dev", "extras"):
        if "--" + part in arguments:
            install(part)


if __name__ == "__main__":
    main(sys.argv[1:])
