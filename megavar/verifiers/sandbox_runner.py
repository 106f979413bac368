"""What `sandbox.py` starts inside the sandbox, as `python -c`: it limits itself, then runs one program.

It imports no more than it needs, since every test of every answer waits for it.
"""

import builtins
import marshal
import os
import resource
import sys
from types import ModuleType

_MIB = 2**20
_LIMITS = {
    resource.RLIMIT_AS: 1024 * _MIB,
    resource.RLIMIT_NPROC: 8,  # processes and threads
    resource.RLIMIT_FSIZE: 16 * _MIB,
    resource.RLIMIT_NOFILE: 64,
    resource.RLIMIT_CORE: 0,
    resource.RLIMIT_MEMLOCK: 0,
    resource.RLIMIT_STACK: 64 * _MIB,  # more than usual, for programs that recurse
}
_PR_SET_DUMPABLE = 4

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


def _limit(cpu_seconds: int, uid: int) -> None:
    """Take limits and, where `uid` is not 0, another user, from which neither can be undone."""
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # Where memory runs out, this ends before the training does.
    for kind, limit in {**_LIMITS, resource.RLIMIT_CPU: cpu_seconds}.items():
        known = resource.getrlimit(kind)[1]
        limit = limit if known == resource.RLIM_INFINITY else min(limit, known)
        resource.setrlimit(kind, (limit, limit))
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        # The kernel closes /proc/self, and so /dev/stdin, to a process that changed its user.
        from ctypes import CDLL

        CDLL(None).prctl(_PR_SET_DUMPABLE, 1)


def _call(module: ModuleType, program: str, function: str, arguments: str) -> str:
    """The JSON text of what the function, or the method of class Solution, returns."""
    import json

    exec(_PRELUDE, module.__dict__)
    exec(compile(program, "program.py", "exec", dont_inherit=True), module.__dict__)
    names = module.__dict__
    is_method = hasattr(names.get("Solution"), function)
    called = getattr(names["Solution"](), function) if is_method else names[function]
    return json.dumps(called(*map(_with_integer_keys, json.loads(arguments))))


def _with_integer_keys(argument: object) -> object:
    """JSON made texts of them; the solutions of APPS expect numbers."""
    if isinstance(argument, dict) and all(key.removeprefix("-").isdecimal() for key in argument):
        return {int(key): value for key, value in argument.items()}
    return argument


def main(control: int, cpu_seconds: int, uid: int) -> None:
    """Announce that the limits hold, receive the program, run it."""
    _limit(cpu_seconds, uid)
    os.write(control, b"+")
    with open(control, "rb", closefd=False) as file:
        job = file.read()
    if not job:  # Who started this has died.
        return
    program, function, arguments = marshal.loads(job)
    nowhere = os.open("/dev/null", os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    # Module `site`, which is left out, would define these.
    for name in ("exit", "quit"):
        setattr(builtins, name, sys.exit)
    sys.set_int_max_str_digits(0)
    sys.argv = ["program.py"]
    # As on the platforms: what is called is imported, what reads its input is the main program.
    module = ModuleType("solution" if function else "__main__")
    sys.modules[module.__name__] = module
    if function:
        result = _call(module, program, function, arguments)
        with open(control, "w") as out:
            out.write(result)
    else:
        os.close(control)
        exec(compile(program, "program.py", "exec", dont_inherit=True), module.__dict__)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
