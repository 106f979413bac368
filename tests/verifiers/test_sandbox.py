"""Programs made to reach out of the sandbox, to fill the machine or to stay on it: none does."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from helpers.processes import runs

from megavar.verifiers import sandbox
from megavar.verifiers.sandbox import Sandbox, check_sandbox

ROOT = Path(__file__).parents[2]

if shutil.which("bwrap") is None:
    pytest.skip("needs bubblewrap: apt-get install bubblewrap", allow_module_level=True)


def run(program, given="", function="", **limits):
    with Sandbox(program, function) as opened:
        return opened.run(given, **limits)


def printed(program, given="", **limits):
    outcome = run(program, given, **limits)
    assert outcome.exit_code == 0, outcome
    return outcome.output.decode().strip()


def attempt(statement):
    """A program that prints whether one statement succeeds."""
    return (
        f"import os, socket\ntry:\n    {statement}\n"
        "except BaseException as error:\n    print('failed', type(error).__name__)\nelse:\n    print('done')"
    )


def wait_until(condition, seconds=10.0):
    limit = time.monotonic() + seconds
    while not condition() and time.monotonic() < limit:
        time.sleep(0.02)
    return condition()


class Watch:
    """Looks at the processes of all sandboxes of this process, as long as the `with` block lasts."""

    def __enter__(self):
        self.seen, self.most_threads, self.ended = set(), 0, threading.Event()
        self.thread = threading.Thread(target=self.look)
        self.thread.start()
        return self

    def look(self):
        while not self.ended.wait(0.02):
            num_threads = 0
            with suppress(psutil.NoSuchProcess):
                for bwrap in psutil.Process().children():
                    if bwrap.name() == "bwrap":
                        for process in [bwrap, *bwrap.children(recursive=True)]:
                            self.seen.add(process)
                            num_threads += process.num_threads()
            self.most_threads = max(self.most_threads, num_threads)

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()

    def all_ended(self):
        return wait_until(lambda: not any(map(runs, self.seen)))


def test_a_program_gets_its_input_and_nothing_else():
    program = "import os, sys\nprint(sys.stdin.read(), os.getcwd(), sorted(os.environ), sys.argv, __name__)"
    output = printed(program, "naïve\n")
    assert output == "naïve\n /tmp ['HOME', 'LC_CTYPE', 'PWD', 'PYTHONHASHSEED'] ['program.py'] __main__"


@pytest.mark.parametrize(
    "reading",
    ["input()", "open(0).read()", "open('/dev/stdin').read()", "__import__('sys').stdin.buffer.read().decode()"],
)
def test_the_input_can_be_read_in_every_usual_way(reading):
    assert printed(f"print({reading}.strip()[::-1])", "abc") == "cba"


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("print(1)", 0),
        ("exit()", 0),
        ("quit(0)", 0),
        ("import sys; sys.exit(3)", 3),
        ("1 / 0", 1),
        ("def f(:", None),
        ("\0", None),
        ("\ud800", None),
        ("import os; os.kill(os.getpid(), 9)", 128 + 9),
        ("import os; os.kill(os.getppid(), 9)", None),
        ("import os, time; os.kill(os.getppid(), 9); time.sleep(60)", None),
    ],
)
def test_the_exit_code_says_how_it_ended(program, code):
    assert run(program).exit_code == code


def test_a_function_gives_json_whatever_the_program_prints():
    program = "import os\nprint('[0]')\ndef f(a, b):\n    print('{}')\n    return {'sum': a + b, 'pair': (a, b)}"
    outcome = run(program, "[1, 2]", "f")
    assert outcome.exit_code == 0 and json.loads(outcome.output) == {"sum": 3, "pair": [1, 2]}


def test_a_program_ends_in_the_same_way_each_time():
    """Sets of texts are in the order of their hashes, which Python draws anew in each process."""
    program = "print(*{str(number) for number in range(50)})"
    assert len({printed(program) for _ in range(3)}) == 1


def test_deep_recursion_in_a_thread_is_possible():
    program = (
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**28)\n"
        "def depth(n):\n    return 0 if n == 0 else 1 + depth(n - 1)\n"
        "thread = threading.Thread(target=lambda: print(depth(50_000)))\nthread.start()\nthread.join()"
    )
    assert printed(program) == "50000"


# Reaching out


def test_no_network_not_even_this_machine():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        attack = attempt(f"socket.create_connection(('127.0.0.1', {port}), 2)")
        ours = subprocess.run([sys.executable, "-c", attack], capture_output=True, text=True, check=True)
        assert ours.stdout.strip() == "done"  # so it is the sandbox that makes it fail
        assert printed(attack).startswith("failed")


def test_the_only_interface_is_one_of_its_own():
    lines = printed("print(open('/proc/net/dev').read())").splitlines()[2:]
    assert [line.split(":")[0].strip() for line in lines] == ["lo"]
    received = lines[0].split(":")[1].split()[0]
    assert received == "0"  # nothing of what this machine's own has carried


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK", "AF_VSOCK"])
def test_no_sockets(family):
    assert printed(attempt(f"socket.socket(socket.{family})")) == "failed PermissionError"


def test_a_connected_pair_still_works_for_asyncio():
    assert printed("import asyncio\nasync def f():\n    await asyncio.sleep(0)\n    print(1)\nasyncio.run(f())") == "1"


def test_no_file_of_the_machine_can_be_read(tmp_path, monkeypatch):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    monkeypatch.setenv("MEGAVAR_SECRET", "hush")
    paths = [secret, "/etc/passwd", "/etc/hostname", ROOT / "pyproject.toml", Path.home() / ".bashrc", "/bin/sh"]
    paths += [
        "/proc/1/root/etc/passwd",
        "/proc/self/root/etc/passwd",
        "../../../../etc/passwd",
        "/proc/1/cwd/pyproject.toml",
    ]
    assert secret.exists() and Path("/etc/passwd").exists()
    for path in map(str, paths):
        assert printed(attempt(f"open({path!r}).read()")).startswith("failed"), path
        assert printed(attempt(f"os.symlink({path!r}, 'link'), open('link').read()")).startswith("failed"), path
    everything = "import glob\nfor name in glob.glob('/proc/*/environ'):\n    print(open(name).read())"
    assert "hush" not in run(everything).output.decode()


def test_what_can_be_seen_is_python_and_libraries():
    libraries = ["/usr/lib", "/usr/lib64", "/usr/lib32", f"{sys.base_prefix}/lib"]
    program = f"""
import os
for folder, folders, files in os.walk('/'):
    folders[:] = [name for name in folders if os.path.join(folder, name) not in {["/proc", "/dev", *libraries]}]
    for file in files:
        print(os.path.join(folder, file))
"""
    python = f"{sys.base_prefix}/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    assert set(printed(program).splitlines()) == {python, "/etc/ld.so.cache"}


def test_no_file_of_the_machine_can_be_written(tmp_path):
    for folder in (
        tmp_path,
        "/",
        "/usr",
        "/usr/lib",
        "/etc",
        "/dev",
        "/dev/shm",
        "/proc",
        sys.base_prefix,
        f"{sys.base_prefix}/lib",
    ):
        statement = f"open({f'{folder}/written'!r}, 'w').write('x')"
        assert printed(attempt(statement)).startswith("failed"), folder
        assert not Path(folder, "written").exists()
    assert printed("open('/tmp/megavar-written', 'w').write('x')\nprint(open('/tmp/megavar-written').read())") == "x"
    assert not Path("/tmp/megavar-written").exists()
    assert printed(attempt("open('/tmp/megavar-written')")) == "failed FileNotFoundError"  # of the program before


def test_the_program_is_nobody_and_cannot_become_more():
    assert printed("import os\nprint(os.getuid() > 1000, os.getgid() > 1000, 0 in os.getgroups())") == "True True False"
    for statement in ("os.setuid(0)", "os.chroot('/tmp')", "os.mknod('x', 0o60600, 0x800)", "os.chown('/usr', 0, 0)"):
        assert printed(attempt(statement)).startswith("failed"), statement
    status = printed("print(open('/proc/self/status').read())")
    assert (
        "CapEff:\t0000000000000000" in status and "CapPrm:\t0000000000000000" in status and "NoNewPrivs:\t1" in status
    )


# Constants of the kernel: CLONE_NEWUSER, PTRACE_ATTACH, IPC_CREAT.
@pytest.mark.parametrize(
    "call",
    [
        "unshare(0x10000000)",
        "ptrace(16, 1, 0, 0)",
        "shmget(0, 4096, 0o1600)",
        "memfd_create(b'x', 0)",
        "mount(b'x', b'/tmp', b'tmpfs', 0, 0)",
    ],
)
def test_system_calls_without_use_are_refused(call):
    program = (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"print(libc.{call}, os.strerror(ctypes.get_errno()))"
    )
    assert printed(program) == "-1 Operation not permitted"


def test_a_clone_into_a_new_namespace_is_refused():
    program = (
        "import ctypes, os, platform\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "number = {'x86_64': 56, 'aarch64': 220}[platform.machine()]\n"
        "print(libc.syscall(number, 0x10000000 | 17, 0, 0, 0, 0), os.strerror(ctypes.get_errno()))"
    )
    assert printed(program) == "-1 Operation not permitted"


def test_no_process_of_the_machine_can_be_seen_or_touched():
    mine = os.getpid()
    program = (
        "import os\npids = sorted(int(name) for name in os.listdir('/proc') if name.isdecimal())\n"
        f"print(len(pids), max(pids) < 100, os.getppid())\n{attempt(f'os.kill({mine}, 0)')}"
    )
    assert printed(program).splitlines() == ["3 True 2", "failed ProcessLookupError"]


def test_memory_of_other_processes_holds_nothing_of_this_one():
    """What this process knows, as a verifier knows the expected output, is in no memory that the program can read."""
    token = f"expected-{os.urandom(8).hex()}"
    program = f"""
import os
found, halves = [], ({token[:12]!r}, {token[12:]!r})
for pid in filter(str.isdecimal, os.listdir('/proc')):
    if int(pid) == os.getpid():
        continue
    try:
        maps, memory = open(f'/proc/{{pid}}/maps').read(), open(f'/proc/{{pid}}/mem', 'rb', 0)
    except OSError:
        continue
    for line in maps.splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split('-'))
        try:
            memory.seek(start)
            found.append(''.join(halves).encode() in memory.read(end - start))
        except (OSError, ValueError, OverflowError):
            pass
print(any(found))
"""
    assert printed(program) == "False"


# Filling the machine


FORKS = """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
"""
SESSIONS = """
import os
while True:
    try:
        if os.fork() == 0:
            os.setsid()
            os.fork()
    except OSError:
        pass
"""
THREADS = """
import threading, time
while True:
    try:
        threading.Thread(target=time.sleep, args=(60,)).start()
    except RuntimeError:
        pass
"""


@pytest.mark.parametrize("bomb", [FORKS, SESSIONS, THREADS], ids=["forks", "sessions", "threads"])
def test_a_fork_bomb_stays_small_and_ends(bomb):
    started = time.monotonic()
    with Watch() as watch:
        assert run(bomb, wall_seconds=2).exit_code is None
    assert time.monotonic() - started < 10
    assert 5 < watch.most_threads <= 12 and watch.all_ended()


def test_an_endless_loop_is_killed_for_its_time():
    started = time.monotonic()
    assert run("while True:\n    pass", wall_seconds=1).exit_code is None
    assert run("import time\ntime.sleep(60)", wall_seconds=1).exit_code is None
    assert time.monotonic() - started < 10


def test_a_program_that_is_deaf_to_signals_is_killed():
    program = """
import signal, time
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
while True:
    time.sleep(1)
"""
    assert run(program, wall_seconds=1).exit_code is None


def test_processor_time_is_limited_whatever_the_clock_says(monkeypatch):
    monkeypatch.setattr(sandbox, "CPU_SECONDS", 1)
    outcome = run("while True:\n    pass", wall_seconds=60)
    assert outcome.exit_code == 128 + signal.SIGKILL


@pytest.mark.parametrize(
    "flood",
    [
        "print('x' * 10**9)",
        "while True:\n    print('x' * 1000)",
        "import os\nwhile True:\n    os.write(1, b'x' * 4096)",
        "import os\nos.fork()\nos.fork()\nwhile True:\n    os.write(1, b'x' * 4096)",
    ],
)
def test_a_gigabyte_of_output_costs_a_megabyte(flood):
    before = psutil.Process().memory_info().rss
    started = time.monotonic()
    outcome = run(flood)
    assert outcome.exit_code != 0 and len(outcome.output) <= 2**20 + 2**16
    assert time.monotonic() - started < 6 and psutil.Process().memory_info().rss - before < 64 * 2**20


def test_a_flood_of_results_is_bounded_too():
    to_all = """
import os
for fd in range(3, 20):
    try:
        for _ in range(1000):
            os.write(fd, b'x' * 4096)
    except OSError:
        pass
"""
    outcome = run(to_all, "[]", "f", wall_seconds=4)
    assert outcome.exit_code is None and len(outcome.output) <= 2**20 + 2**16


@pytest.mark.parametrize(
    "hog",
    [
        "block = bytearray(2 * 2**30)",
        "blocks = []\nwhile True:\n    blocks.append(bytearray(2**26))",
        "import mmap\nmmap.mmap(-1, 2 * 2**30)",
        "for index in range(100):\n    open(f'/tmp/{index}', 'wb').write(bytes(2**23))",
        "open('/tmp/file', 'wb').write(bytes(2**26))",
        "open('/tmp/file', 'wb').truncate(2**40)",
        "files = [open('/dev/null') for _ in range(1000)]",
    ],
)
def test_memory_and_files_are_limited(hog):
    assert run(hog).exit_code == 1


# Staying


@pytest.mark.parametrize("ending", ["", "os._exit(0)", "1 / 0", "time.sleep(60)"])
def test_a_child_does_not_outlive_the_program(ending):
    program = f"""
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in range(3):
            os.close(fd)
        time.sleep(120)
    os._exit(0)
os.wait()
print('started', flush=True)
time.sleep(0.3)
{ending}
"""
    with Watch() as watch:
        assert run(program, wall_seconds=1).output == b"started\n"
    assert len(watch.seen) >= 5 and watch.all_ended()


@pytest.mark.parametrize("when", ["at once", "later"])
def test_no_process_outlives_a_killed_verifier(tmp_path, when):
    """With SIGKILL, as the pool does it: neither the program nor what it left in the background."""
    program = "import os, time\nos.fork()\nos.fork()\nif os.getpid() != 3:\n    os.setsid()\ntime.sleep(300)"
    caller = tmp_path / "caller.py"
    caller.write_text(f"from megavar.verifiers.sandbox import Sandbox\nSandbox({program!r}).run('', 300)\n")
    for delay in [0.05, 0.1, 0.15, 0.2] if when == "at once" else [None]:
        process = subprocess.Popen([sys.executable, caller], env={**os.environ, "PYTHONPATH": str(ROOT)})
        worker, below = psutil.Process(process.pid), []
        if delay is None:
            assert wait_until(lambda: len(worker.children(recursive=True)) >= 6, 20)  # noqa: B023
        else:
            time.sleep(delay)
        below = worker.children(recursive=True)
        process.kill()
        process.wait()
        assert wait_until(lambda: not any(map(runs, below))), below  # noqa: B023


def test_each_run_is_a_new_process_and_nothing_runs_on_from_one_to_the_next():
    program = """
import os, time
assert 'number' not in globals()
number = 1
if os.fork() == 0:
    os.setsid()
    time.sleep(60)
print(input(), len([name for name in os.listdir('/proc') if name.isdecimal()]))
"""
    with Sandbox(program) as opened:
        outcomes = [opened.run(str(number)) for number in range(20)]
    assert [outcome.output.decode().split()[0] for outcome in outcomes] == [str(number) for number in range(20)]
    # bwrap's, the one that starts the others, this run's two, and perhaps some that are just ending.
    assert max(int(outcome.output.split()[1]) for outcome in outcomes) <= 6


def test_a_program_that_kills_what_started_it_has_no_exit_code():
    with Watch() as watch, Sandbox("import os, time\ntime.sleep(0.3)\nos.kill(os.getppid(), 9)") as opened:
        assert opened.run("").exit_code is None
    assert len(watch.seen) >= 4 and watch.all_ended()


def test_file_descriptors_are_not_left_open():
    run("print(1)")
    before = len(os.listdir("/proc/self/fd"))
    for program in ("print(1)", "1 / 0", "import os; os.kill(os.getpid(), 9)"):
        run(program)
    assert len(os.listdir("/proc/self/fd")) == before


# Refusals


@pytest.fixture
def unchecked():
    check_sandbox.cache_clear()
    yield
    check_sandbox.cache_clear()


def test_without_bubblewrap_nothing_runs(monkeypatch, tmp_path, unchecked):
    monkeypatch.setenv("PATH", str(tmp_path))
    marker = tmp_path / "ran"
    with pytest.raises(RuntimeError, match="apt-get install bubblewrap"):
        check_sandbox()
    with pytest.raises(RuntimeError, match="apt-get install bubblewrap"):
        run(f"open({str(marker)!r}, 'w')")
    assert not marker.exists()


def test_a_bubblewrap_that_fails_is_quoted(monkeypatch, tmp_path, unchecked):
    """Such as where the kernel allows no namespaces, or where it is older than the options."""
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"No permissions to create new namespace.*user namespaces"):
        check_sandbox()


def test_a_sandbox_without_limits_is_refused(monkeypatch, unchecked):
    source = sandbox._runner()
    monkeypatch.setattr(
        sandbox, "_runner", lambda: source.replace("resource.RLIMIT_NPROC: 10", "resource.RLIMIT_NPROC: 500")
    )
    with pytest.raises(RuntimeError, match="does not hold programs"):
        check_sandbox()


def test_another_processor_is_refused(monkeypatch):
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "riscv64")
    sandbox._system_call_filter.cache_clear()
    with pytest.raises(RuntimeError, match="x86_64 and aarch64 only, got riscv64"):
        run("print(1)")
