"""The inside of `sandbox.run`: give up every right, then become the program. Standard library only; run as a script by `sandbox`.

sandboxed.py HOW FOLDER SECONDS MEMORY_MB FILE_MB PYTHON PREFIX  < program
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys

NOBODY = 65534
HIDDEN = ("/home", "/root", "/run", "/var/run")  # other people's files, and sockets of services (a container engine's, an agent's)
WORK, PREFIX = "/tmp/work", "/tmp/python"  # inside the namespaces
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000  # the same number on every architecture

# Becomes the program: its source is read before it starts, so that its own standard input is empty. What it printed comes before an error.
START = """
import sys
sys.excepthook = lambda *error: (sys.stdout.flush(), sys.__excepthook__(*error))
exec(compile(sys.stdin.read(), "<program>", "exec"), vars(sys.modules["__main__"]))
"""

GUARD = """
def guard():
    import os, sys
    here = os.path.realpath(os.getcwd()) + os.sep
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    changes = {"os.remove", "os.rmdir", "os.rename", "os.link", "os.symlink", "os.truncate", "os.mkdir", "os.chmod", "os.chown", "os.utime",
               "os.chflags", "os.lockf", "os.setxattr", "os.removexattr", "shutil.rmtree", "shutil.move", "shutil.chown"}
    never = {"os.kill", "os.killpg", "os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.startfile",
             "subprocess.Popen", "signal.pthread_kill", "pty.spawn", "os.listxattr"}
    join, real, absolute = os.path.join, os.path.realpath, os.path.isabs

    def inside(path):
        if isinstance(path, int):
            return True
        path = os.fsdecode(path)
        return (real(path) + os.sep).startswith(here)

    def hook(event, args):
        if event in never or event.startswith(("socket.", "ctypes.")):
            raise PermissionError(f"not allowed here: {event}")
        if event == "open" and args[2] is not None and args[2] & writing and not inside(args[0]) and args[0] != os.devnull:
            raise PermissionError(f"not allowed here: writing {args[0]}")
        if event in changes and not all(inside(a) for a in args[: 2 if event in ("os.rename", "os.link", "shutil.move") else 1]):
            raise PermissionError(f"not allowed here: {event} {args[0]}")

    sys.addaudithook(hook)


guard()
del guard
"""


class MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]


def main(how: str, folder: str, seconds: str, memory_mb: str, file_mb: str, python: str, prefix: str) -> None:
    if how == "namespaces":
        python = enter_namespaces(python, os.path.realpath(prefix))
        folder = WORK
    if how != "guard" and os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    os.chdir(folder)
    limit(float(seconds), int(memory_mb) << 20, int(file_mb) << 20)
    if python.startswith(PREFIX):
        libraries = {"LD_LIBRARY_PATH": f"{PREFIX}/lib"}  # an interpreter may look for its library where it was installed
    else:
        libraries = {}
    # hashes are fixed, so that a program's result (the order in a set) is the same every time
    libraries["PYTHONHASHSEED"] = "0"
    environment = {**libraries, "HOME": folder, "TMPDIR": folder, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    code = START if how == "namespaces" else GUARD + START
    os.execve(python, [python, "-P", "-s", "-S", "-X", "utf8", "-c", code], environment)


def enter_namespaces(python: str, prefix: str) -> str:
    """New mount, process, network, IPC and host name spaces, and a new user space when not root; returns in their first process.

    What is returned is where the interpreter is now: its folder may be one that only root can enter.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long

    def must(result: int, what: str) -> None:
        if result != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"{what}: {os.strerror(number)}")

    def mount(source: str | None, place: str, kind: str | None, flags: int, options: str | None = None) -> None:
        given = [value.encode() if value is not None else None for value in (source, place, kind, options)]
        must(libc.mount(given[0], given[1], given[2], ctypes.c_ulong(flags), given[3]), f"mount {place}")

    def attributes(place: str, flags: int, **change: int) -> None:
        wanted = MountAttributes(**{"set": 0, "clear": 0, "propagation": 0, "userns": 0, **change})
        arguments = (ctypes.c_int(AT_FDCWD), place.encode(), ctypes.c_uint(flags), ctypes.byref(wanted), ctypes.c_size_t(32))
        must(libc.syscall(ctypes.c_long(MOUNT_SETATTR), *arguments), f"mount_setattr {place}")

    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    root, user, group = os.geteuid() == 0, os.geteuid(), os.getegid()
    must(libc.unshare(NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS | (0 if root else NEWUSER)), "unshare")
    if not root:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    owner = f"uid={NOBODY},gid={NOBODY}" if root else f"uid={user},gid={group}"
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    # What others keep in /tmp is hidden, and the program's folder lies in memory, so that it cannot fill the disk.
    hidden = not all(os.stat(place).st_mode & 0o001 for place in above(prefix))
    copy = os.open(prefix, os.O_PATH)
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size=64m,nr_inodes=4096,mode=0700,{owner}")
    os.mkdir(WORK)
    os.chown(WORK, *((NOBODY, NOBODY) if root else (user, group)))
    python = os.path.realpath(python)
    if hidden or prefix.startswith(tuple(f"{place}/" for place in ("/tmp", *HIDDEN))):
        os.mkdir(PREFIX)
        mount(f"/proc/self/fd/{copy}", PREFIX, None, MS_BIND)
        python = PREFIX + python.removeprefix(prefix)
    os.close(copy)
    for place in ("/dev/shm", *HIDDEN):
        if os.path.isdir(place) and not os.path.islink(place):
            mount("tmpfs", place, "tmpfs", MS_NOSUID | MS_NODEV, "size=4k,mode=0755")
    attributes("/", AT_RECURSIVE, set=MS_RDONLY | MS_NOSUID)
    attributes("/tmp", 0, clear=MS_RDONLY)

    child = os.fork()
    if child:
        for number in range(3):
            os.close(number)  # the reader of the output waits for the program, not for us
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) % 256)
    mount("tmpfs", "/proc", "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV, "size=4k")  # other processes' environments
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return python


def above(path: str) -> list[str]:
    """The folder and all that it lies in."""
    return [path] if path == "/" else [path, *above(os.path.dirname(path))]


def limit(seconds: float, memory: int, file: int) -> None:
    wanted = {
        "RLIMIT_CPU": max(1, round(seconds + 0.5)),
        "RLIMIT_AS": memory,
        "RLIMIT_FSIZE": file,
        "RLIMIT_NPROC": 0,  # neither a process nor a thread
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
    }
    for name, most in wanted.items():
        number = getattr(resource, name, None)
        if number is None:
            continue
        try:
            resource.setrlimit(number, (most, most))
        except (ValueError, OSError):
            if sys.platform == "linux":
                raise  # macOS knows some of these and refuses to set them


if __name__ == "__main__":
    main(*sys.argv[1:])
