"""Runs one Python program that nobody trusts, in namespaces of its own (bubblewrap) and under limits.

The program sees the Python interpreter, its libraries, an empty /tmp and its input; no network, no other file and no
process of the host. Nothing of it is left when its sandbox is closed, or the process that opened it killed.
"""

import errno
import marshal
import os
import platform
import random
import select
import shutil
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO, Self

CPU_SECONDS = 4
"""CPU time of one process of the program."""
WALL_SECONDS = 8.0
"""Of one run."""
MAX_OUTPUT_BYTES = 2**20
_START_SECONDS = 30.0
"""Until the program starts, on a machine that is busy."""
_TMP_BYTES = 64 * 2**20
_LIBRARIES = ("lib", "lib64")
_SYSCTLS = {
    "kernel.unprivileged_userns_clone": "0",
    "kernel.apparmor_restrict_unprivileged_userns": "1",
    "user.max_user_namespaces": "0",
}
"""Settings of some kernels, and the value with which they forbid user namespaces."""

# System calls that a program for one test has no use for: memory that no limit counts, more namespaces (whose file
# systems no limit counts), other processes, and sockets, since not every kind stays inside a network namespace.
_FORBIDDEN = {
    "x86_64": {
        "socket": 41, "shmget": 29, "msgget": 68, "semget": 64, "mq_open": 240, "memfd_create": 319,
        "memfd_secret": 447, "unshare": 272, "setns": 308, "mount": 165, "pivot_root": 155, "chroot": 161,
        "open_tree": 428, "move_mount": 429, "fsopen": 430, "ptrace": 101, "process_vm_readv": 310,
        "process_vm_writev": 311, "add_key": 248, "request_key": 249, "keyctl": 250, "bpf": 321,
        "perf_event_open": 298, "userfaultfd": 323, "io_uring_setup": 425,
    },
    "aarch64": {
        "socket": 198, "shmget": 194, "msgget": 186, "semget": 190, "mq_open": 180, "memfd_create": 279,
        "memfd_secret": 447, "unshare": 97, "setns": 268, "mount": 40, "pivot_root": 41, "chroot": 51,
        "open_tree": 428, "move_mount": 429, "fsopen": 430, "ptrace": 117, "process_vm_readv": 270,
        "process_vm_writev": 271, "add_key": 217, "request_key": 218, "keyctl": 219, "bpf": 280,
        "perf_event_open": 241, "userfaultfd": 282, "io_uring_setup": 425,
    },
}  # fmt: skip
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3 = 435
_NEW_NAMESPACES = 0x7E020000
"""All CLONE_NEW... flags."""


@dataclass(frozen=True)
class Outcome:
    """How one run of a program ended."""

    exit_code: int | None
    """0 if it ended well; above 128 if a signal ended it; None if the sandbox ended, for its time or its output."""
    output: bytes
    """Its standard output; of a function, the JSON text of what it returned."""


class Sandbox:
    """A Python program in a sandbox, in which each run of it is a new process. To be used in a `with` statement.

    A run that ends without an exit code ends the sandbox. Files in /tmp stay from run to run.
    """

    def __init__(self, program: str, function: str = "") -> None:
        """Start the sandbox.

        Args:
            program: source text.
            function: what to call in each run: a function or a method of class `Solution`. Without it the program runs
                as a script.

        Raises:
            RuntimeError: if there is no sandbox here, or it did not start.
        """
        # As root of the machine the program gets a user of its own, since the kernel limits no number of processes for
        # root. For others the sandbox has a user namespace, in which they are nobody.
        uid = random.SystemRandom().randrange(1_880_000_000, 2_140_000_000) if _is_root_of_the_machine() else 0
        python = Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
        command = [_bwrap(), *_isolation(python, own_user=bool(uid))]
        self._control, theirs = socket.socketpair()
        with theirs, _memory_file(_system_call_filter()) as filter_file:
            command += ["--seccomp", str(filter_file.fileno()), "--"]
            # Isolated as by -I, which would ignore PYTHONHASHSEED: the same program ends in the same way again.
            command += [str(python), "-P", "-s", "-S", "-X", "utf8", "-c", _runner()]
            self._process = subprocess.Popen(
                [*command, *map(str, (theirs.fileno(), CPU_SECONDS, uid))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(filter_file.fileno(), theirs.fileno()),
                # The program can read the environment of bwrap, which is the first process of its namespace.
                env={},
            )
        try:
            self._control.settimeout(_START_SECONDS)
            if not self._control.recv(1):
                raise RuntimeError(f"bwrap did not start a program: {self._messages()}; {_advice()}")
            self._control.settimeout(None)
            # If this process has died by now, the program never starts, even where bwrap was too young to be told.
            job = marshal.dumps((program, function))
            self._control.sendall(len(job).to_bytes(8) + job)
        except TimeoutError as error:
            self.close()
            raise RuntimeError(f"bwrap did not start a program within {_START_SECONDS:.0f} seconds.") from error
        except (BrokenPipeError, ConnectionResetError):
            pass  # It has ended; so `run` will say.
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, given: str, wall_seconds: float = WALL_SECONDS, max_output_bytes: int = MAX_OUTPUT_BYTES) -> Outcome:
        """Run the program once.

        Args:
            given: its standard input; of a function, the JSON list of its arguments.
            wall_seconds: beyond them the sandbox is killed.
            max_output_bytes: the same.
        """
        deadline, output, code = time.monotonic() + wall_seconds, bytearray(), None
        reader, writer = os.pipe()
        try:
            with open(writer, "wb"), _memory_file(given.encode(errors="surrogateescape")) as given_file:
                socket.send_fds(self._control, [b"t"], [given_file.fileno(), writer])
            poller = select.poll()
            unfinished = {reader, self._control.fileno()}
            for fd in unfinished:
                poller.register(fd, select.POLLIN)
            while unfinished:
                ready = poller.poll(max(0.0, deadline - time.monotonic()) * 1000 + 1)
                for fd, _ in ready:
                    chunk = os.read(fd, 2**16 if fd == reader else 1)
                    if fd == reader:
                        output += chunk
                    else:
                        code = chunk[0] if chunk else None
                    if fd != reader or not chunk:
                        poller.unregister(fd)
                        unfinished.remove(fd)
                if time.monotonic() > deadline or len(output) > max_output_bytes:
                    code = None
                    break
        except (BrokenPipeError, ConnectionResetError):  # The sandbox has ended.
            code = None
        finally:
            os.close(reader)
        if code is None:
            self.close()
        return Outcome(code, bytes(output))

    def close(self) -> None:
        """Kill everything in the sandbox, and wait until it has ended."""
        self._process.kill()
        self._messages()
        self._process.wait()
        self._control.close()

    def _messages(self) -> str:
        """What bwrap says until it has ended: it and the first process in its namespace hold its end of the pipe."""
        assert self._process.stderr is not None
        if self._process.stderr.closed:
            return ""
        with self._process.stderr as stream:
            text = stream.read(2**16)
            while stream.read(2**16):
                pass
        return text.decode(errors="replace").strip()[-300:]


@cache
def check_sandbox() -> None:
    """Run a program that starts processes without end.

    Raises:
        RuntimeError: if it cannot be run in a sandbox here, or is not held by it.
    """
    with Sandbox(_PROBE) as probe:
        outcome = probe.run("")
    if outcome.output != b"held":
        raise RuntimeError(
            f"bwrap does not hold programs here: a program that starts processes ended with {outcome}, expected the "
            "output b'held'; use Linux 5.14 or newer, and a user other than root if a container maps root to root."
        )


_PROBE = """
import os, threading, time
threading.Thread(target=int).start()
for _ in range(100):
    try:
        if os.fork() == 0:
            time.sleep(60)
    except OSError:
        print("held", end="", flush=True)
        os._exit(0)
"""


def _bwrap() -> str:
    path = shutil.which("bwrap")
    if path is None:
        raise RuntimeError(
            "answers that contain code run in bubblewrap only, and bwrap is not on PATH; install it: apt-get install "
            "bubblewrap."
        )
    return path


def _advice() -> str:
    for name, forbidding in _SYSCTLS.items():
        file = Path("/proc/sys", name.replace(".", "/"))
        if file.is_file() and file.read_text().strip() == forbidding:
            return f"the kernel forbids user namespaces ({name}={forbidding}); change that with sysctl."
    return (
        "use bubblewrap 0.7 or newer, where programs may make user namespaces (in a container, its seccomp profile and "
        "capabilities decide)."
    )


def _is_root_of_the_machine() -> bool:
    return os.geteuid() == 0 and Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"]


def _isolation(python: Path, own_user: bool) -> list[str]:
    """Options of bwrap: namespaces, and a file system with the interpreter and libraries only."""
    options = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    options += ["--die-with-parent", "--new-session", "--hostname", "sandbox", "--cap-drop", "ALL"]
    if own_user:
        options += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        options += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    options += ["--clearenv", "--setenv", "PYTHONHASHSEED", "0", "--setenv", "HOME", "/tmp"]
    for folder in (Path("/usr"), Path("/etc"), *reversed(python.parents[:-1])):  # bwrap would make some for root alone
        options += ["--perms", "0755", "--dir", str(folder)]
    for folder in dict.fromkeys(Path(root, name) for root in ("/", "/usr", sys.base_prefix) for name in _LIBRARIES):
        if folder.is_symlink():
            options += ["--symlink", os.readlink(folder), str(folder)]
        elif folder.is_dir():
            options += ["--ro-bind", str(folder), str(folder)]
    options += ["--ro-bind", str(python), str(python), "--ro-bind-try", *2 * ["/etc/ld.so.cache"]]
    options += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
    options += ["--perms", "1777", "--size", str(_TMP_BYTES), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    return [*options, "--remount-ro", "/"]


@cache
def _system_call_filter() -> bytes:
    """Program of the kernel's seccomp filter: `_FORBIDDEN` fails with EPERM, everything else is allowed."""
    machine = platform.machine()
    if machine not in _FORBIDDEN:
        raise RuntimeError(f"answers that contain code run on {' and '.join(_FORBIDDEN)} only, got {machine}.")
    load, equal, at_least, any_bit, end = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse, unknown = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
    # Of each: operation, instructions to skip if true, if false, operand. struct seccomp_data has the number at 0, the
    # architecture at 4, the first argument at 16.
    steps = [(load, 0, 0, 4), (equal, 1, 0, _AUDIT_ARCH[machine]), (end, 0, 0, kill), (load, 0, 0, 0)]
    steps += [(at_least, 0, 1, 0x40000000), (end, 0, 0, kill)]  # the numbers of the x32 ABI
    for number in _FORBIDDEN[machine].values():
        steps += [(equal, 0, 1, number), (end, 0, 0, refuse)]
    # libc falls back from clone3, whose flags a filter cannot see, to clone.
    steps += [(equal, 0, 1, _CLONE3), (end, 0, 0, unknown)]
    steps += [(equal, 0, 3, _CLONE[machine]), (load, 0, 0, 16), (any_bit, 0, 1, _NEW_NAMESPACES), (end, 0, 0, refuse)]
    return b"".join(struct.pack("=HBBI", *step) for step in [*steps, (end, 0, 0, allow)])


@cache
def _runner() -> str:
    return Path(__file__).with_name("sandbox_runner.py").read_text()


def _memory_file(content: bytes) -> BinaryIO:
    file = os.fdopen(os.memfd_create("input"), "w+b")
    file.write(content)
    file.seek(0)
    return file
