"""What `sandbox.py` starts inside the sandbox, as `python -c`: it limits itself, then runs one program test by test.

It imports no more than it needs, since every answer waits for it.
"""

import _socket
import builtins
import marshal
import os
import resource
import sys
from types import CodeType, ModuleType

_MIB = 2**20
_LIMITS = {
    resource.RLIMIT_AS: 1024 * _MIB,
    resource.RLIMIT_NPROC: 10,  # processes and threads, with this one and that of bwrap
    resource.RLIMIT_FSIZE: 16 * _MIB,
    resource.RLIMIT_NOFILE: 64,
    resource.RLIMIT_CORE: 0,
    resource.RLIMIT_MEMLOCK: 0,
    resource.RLIMIT_STACK: 64 * _MIB,  # more than usual, for programs that recurse
}

# The names that coding platforms import before a submitted function. The built-in names come last: pow and open are
# names of math and os, too.
_PRELUDE = """
import bisect, collections, copy, datetime, functools, heapq, itertools, json, math
import operator, os, random, re, string, sys
from bisect import *
from collections import *
from copy import *
from functools import *
from heapq import *
from itertools import *
from math import *
from operator import *
from re import *
from string import *
from typing import *
from builtins import *
"""


def _limit(kind: int, limit: int) -> None:
    known = resource.getrlimit(kind)[1]
    limit = limit if known == resource.RLIM_INFINITY else min(limit, known)
    resource.setrlimit(kind, (limit, limit))


def _confine(uid: int) -> None:
    """Take limits and, where `uid` is not 0, another user, from which neither can be undone."""
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # Where memory runs out, this ends before the training does.
    for kind, limit in _LIMITS.items():
        _limit(kind, limit)
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


def _receive_job(control: _socket.socket) -> bytes:
    """The job after its length, and nothing of what follows it; empty if who started this has died."""
    job, num_bytes = b"", int.from_bytes(control.recv(8, _socket.MSG_WAITALL))
    while len(job) < num_bytes and (chunk := control.recv(num_bytes - len(job))):
        job += chunk
    return job


def _next_test(control: _socket.socket) -> tuple[int, int] | None:
    """Descriptors to read the input from and to write the output to; None after the last test."""
    _, ancillary, _, _ = control.recvmsg(1, _socket.CMSG_SPACE(8))
    if not ancillary:
        return None
    given, output = memoryview(ancillary[0][2]).cast("i")
    return given, output


def _end_test(pid: int) -> int:
    """Wait for the process of a test, then kill what it has left; as a shell, 128 and more is a signal."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:  # noqa: SIM105 - contextlib takes longer to import than the rest of this file
        os.kill(-1, 9)
    except ProcessLookupError:
        pass
    return code if code >= 0 else 128 - code


def _call(module: ModuleType, code: CodeType, function: str, output: int) -> None:
    """Write the JSON text of what the function, or the method of class Solution, returns."""
    import json

    arguments = json.loads(sys.stdin.read())
    exec(code, module.__dict__)
    names = module.__dict__
    is_method = hasattr(names.get("Solution"), function)
    called = getattr(names["Solution"](), function) if is_method else names[function]
    result = json.dumps(called(*map(_with_integer_keys, arguments)))
    with open(output, "w") as file:
        file.write(result)


def _with_integer_keys(argument: object) -> object:
    """JSON made texts of them; the solutions of APPS expect numbers."""
    if isinstance(argument, dict) and all(key.removeprefix("-").isdecimal() for key in argument):
        return {int(key): value for key, value in argument.items()}
    return argument


def main(control_fd: int, cpu_seconds: int, uid: int) -> None:
    """Announce that the limits hold, receive the program, run it in a process of its own for each test."""
    _confine(uid)
    control = _socket.socket(fileno=control_fd)
    control.send(b"+")
    job = _receive_job(control)
    if not job:
        return
    program, function = marshal.loads(job)
    nowhere = os.open("/dev/null", os.O_WRONLY)
    os.dup2(nowhere, 2)
    # Module `site`, which is left out, would define these.
    for name in ("exit", "quit"):
        setattr(builtins, name, sys.exit)
    sys.set_int_max_str_digits(0)
    sys.argv = ["program.py"]
    # As on the platforms: what is called is imported, what reads its input is the main program.
    module = ModuleType("solution" if function else "__main__")
    sys.modules[module.__name__] = module
    if function:
        exec(_PRELUDE, module.__dict__)
    code = compile(program, "program.py", "exec", dont_inherit=True)
    while test := _next_test(control):
        given, output = test
        pid = os.fork()
        if pid == 0:
            _limit(resource.RLIMIT_CPU, cpu_seconds)
            control.close()
            os.dup2(given, 0)
            os.dup2(nowhere if function else output, 1)
            sys.stdin = os.fdopen(0, errors="surrogateescape", closefd=False)
            sys.stdout = os.fdopen(1, "w", errors="surrogateescape", closefd=False)
            os.close(given)
            if function:
                return _call(module, code, function, output)
            os.close(output)
            return exec(code, module.__dict__)
        os.close(given)
        os.close(output)
        control.send(bytes([_end_test(pid)]))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
