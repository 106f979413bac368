"""Programs in responses, judged by tests in each published form; attacks on the verdict."""

import base64
import json
import os
import pickle
import shutil
import time
import zlib

import pytest

from megavar.verifiers import code, get_verifier, sandbox
from megavar.verifiers.code import last_program, read_tests, verify
from megavar.verifiers.pool import VerifyJob, verify_all

needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap: apt-get install bubblewrap")


def fenced(program, language="python"):
    return f"I add the numbers.\n```{language}\n{program}\n```\nDone."


def apps(inputs, outputs, **more):
    return json.dumps({"inputs": inputs, "outputs": outputs, **more})


def packed(cases):
    """As LiveCodeBench publishes private tests."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


def case(given, expected, testtype="stdin"):
    return {"input": given, "output": expected, "testtype": testtype}


def livecodebench(public, private, metadata=None):
    return json.dumps(
        {
            "public_test_cases": json.dumps(public),
            "private_test_cases": packed(private),
            "metadata": json.dumps(metadata or {}),
            "starter_code": "",
        }
    )


ADD = "a, b = map(int, input().split())\nprint(a + b)"
ADD_WRONG_FOR_LARGE = "a, b = map(int, input().split())\nprint(a + b if a < 100 else 0)"
ADD_TESTS = apps(["1 2\n", "100 200\n"], ["3\n", "300\n"])
FUNCTION = "def add(a, b):\n    return a + b"
METHOD = "class Solution:\n    def add(self, a: List[int], b: int) -> int:\n        return sum(a) + b"
TWO_LINES = "n = int(input())\nprint(*sorted(map(int, input().split())), sep='\\n')"
NESTED = "import json\njson.dumps = lambda _: '[' * 10**5 + ']' * 10**5\ndef f():\n    return 1"
ROOT_OF_TWO = "print(2 ** 0.5)"
ADD_FUNCTIONAL = [case("[1, 2]\n3", "6", "functional"), case("[]\n0", "0", "functional")]


@needs_bwrap
@pytest.mark.parametrize(
    ("program", "gold", "verdict"),
    [
        (ADD, ADD_TESTS, "correct"),
        (ADD_WRONG_FOR_LARGE, ADD_TESTS, "wrong"),
        (ADD + "\nprint()", ADD_TESTS, "correct"),
        (ADD + "\nprint(0)", ADD_TESTS, "wrong"),
        (ADD + "\nraise SystemExit(1)", ADD_TESTS, "wrong"),
        (ADD + "\nexit()", ADD_TESTS, "correct"),
        ("print(3.0)", apps([""], ["3"]), "wrong"),
        ("print('a  b\\n\\nc')", apps([""], ["a b c\n"]), "correct"),
        ("print('ab')", apps([""], ["a b"]), "wrong"),
        ("pass", apps(["1"], ["1"]), "wrong"),
        ("print('\\udcff'.encode(errors='surrogateescape'))", apps([""], ["b'\\xff'"]), "correct"),
        ("import sys; sys.stdout.buffer.write(b'\\xff')", apps([""], ["\ufffd"]), "wrong"),
        (TWO_LINES, apps([["3", "2 1 3"]], [["1", "2", "3"]]), "correct"),
        (TWO_LINES, apps([["3", "2 1 3"]], [["1", "3", "2"]]), "wrong"),
        ("import sys\nprint(len(str(7 ** 9999)))", apps([""], ["8451"]), "correct"),
        ("print('x' * 3_000_000)", apps([""], ["x" * 3_000_000]), "correct"),  # above the usual limit, as expected
        ("if __name__ == '__main__':\n    print(1)", apps([""], ["1"]), "correct"),
        # With a tolerance, only where the tests name one.
        (ROOT_OF_TWO, apps([""], ["1.41421"]), "wrong"),
        (ROOT_OF_TWO, apps([""], ["1.41421"], tolerance=1e-5), "correct"),
        (ROOT_OF_TWO, apps([""], ["1.4141"], tolerance=1e-5), "wrong"),
        ("print(1000001)", apps([""], ["1e6"], tolerance=1e-5), "correct"),
        ("print('nan')", apps([""], ["1"], tolerance=0.5), "wrong"),
        ("print('inf')", apps([""], ["1e999"], tolerance=0.5), "wrong"),
        ("print('x')", apps([""], ["y"], tolerance=0.5), "wrong"),
        ("def f():\n    return [2 ** 0.5]", apps([[]], [[1.41421]], fn_name="f", tolerance=1e-5), "correct"),
        ("def f():\n    return 10 ** 400", apps([[]], [1.5], fn_name="f", tolerance=1e-5), "wrong"),
        # Functions.
        (FUNCTION, apps([[1, 2], [3, 4]], [3, 7], fn_name="add"), "correct"),
        (FUNCTION, apps([[1, 2], [3, 4]], [3, 8], fn_name="add"), "wrong"),
        (FUNCTION, apps([[1, 2], [3, 4]], [[3], [7]], fn_name="add"), "correct"),
        (FUNCTION, apps([[[1], [2]]], [[1, 2]], fn_name="add"), "correct"),
        (FUNCTION, apps([[1, 2], [[3], [4]]], [[3], [3, 4]], fn_name="add"), "wrong"),  # not all are wrapped
        (FUNCTION, apps(["1\n2", '"a"\n"b"'], [3, "ab"], fn_name="add"), "correct"),
        (METHOD, apps([[[1, 2], 3]], [6], fn_name="add"), "correct"),
        (FUNCTION, apps([[1, 2]], [3], fn_name="sub"), "wrong"),
        ("def f(a):\n    print(a)", apps([[1]], [1], fn_name="f"), "wrong"),
        ("def f():\n    return 1, (2, 3)", apps([[]], [[1, [2, 3]]], fn_name="f"), "correct"),
        ("def f():\n    return {1}", apps([[]], [[1]], fn_name="f"), "wrong"),
        ("def f():\n    return 1", apps([[]], [True], fn_name="f"), "wrong"),
        ("def f():\n    return 1.0", apps([[]], [1], fn_name="f"), "correct"),
        ("def f():\n    return '1'", apps([[]], [1], fn_name="f"), "wrong"),
        ("def f():\n    return None", apps([[]], [None], fn_name="f"), "correct"),
        ("def f():\n    return {'a': [1]}", apps([[]], [{"a": [1]}], fn_name="f"), "correct"),
        ("def f(d):\n    return d[7]", apps([[{"7": "x"}]], ["x"], fn_name="f"), "correct"),
        ("def f():\n    return pow(2, 3, 5) + comb(4, 2)", apps([[]], [9], fn_name="f"), "correct"),
        ("def f():\n    return 1\nif __name__ == '__main__':\n    input()", apps([[]], [1], fn_name="f"), "correct"),
        (NESTED, apps([[]], [[]], fn_name="f"), "wrong"),
        # LiveCodeBench.
        (ADD, json.dumps([case("1 2", "3"), case("5 6", "11")]), "correct"),
        (ADD, json.dumps([case("1 2", "3"), case("5 6", "12")]), "wrong"),
        (ADD, livecodebench([case("1 2", "3")], [case("5 6", "11")]), "correct"),
        (ADD_WRONG_FOR_LARGE, livecodebench([case("1 2", "3")], [case("500 6", "506")]), "wrong"),
        (METHOD, livecodebench(ADD_FUNCTIONAL[:1], ADD_FUNCTIONAL[1:], {"func_name": "add"}), "correct"),
        (METHOD.replace("+ b", "- b"), livecodebench([], ADD_FUNCTIONAL, {"func_name": "add"}), "wrong"),
        (METHOD, json.dumps([{**one, "metadata": {"func_name": "add"}} for one in ADD_FUNCTIONAL]), "correct"),
        # Programs that fail.
        ("print(3", ADD_TESTS, "wrong"),
        ("1 / 0", ADD_TESTS, "wrong"),
        ("import numpy", ADD_TESTS, "wrong"),
        (ADD + "\nimport os\nos.kill(os.getpid(), 11)", ADD_TESTS, "wrong"),
        ("while True:\n    print(3)", ADD_TESTS, "wrong"),
    ],
)  # fmt: skip
def test_verdicts(program, gold, verdict):
    assert get_verifier("code")(fenced(program), gold) == verdict


@pytest.mark.parametrize(
    ("response", "program"),
    [
        (fenced("x = 1"), "x = 1"),
        (fenced("x = 1", "py"), "x = 1"),
        (fenced("x = 1", ""), "x = 1"),
        (fenced("x = 1", " Python title=a.py"), "x = 1"),
        (fenced("x = 1") + fenced("y = 2"), "y = 2"),
        (fenced("x = 1") + fenced("int x;", "cpp"), None),
        (fenced("int x;", "cpp") + fenced("x = 1"), "x = 1"),
        (fenced("x = 1\n\ny = '''\n  ```\n'''").replace("```", "````", 1).replace("\n```\nDone", "\n````\nDone"),
         "x = 1\n\ny = '''\n  ```\n'''"),
        ("1. So:\n\n   ```python\n   if x:\n       y\n   ```", "if x:\n    y"),
        ("```python\r\nx = 1\r\ny = 2\r\n```", "x = 1\ny = 2"),
        ("```python\nx = 'a\u2028b'\n```", "x = 'a\u2028b'"),
        ("```python\nx = 1", "x = 1"),
        ("use `x = 1` or ```x = 1``` here", None),
        (fenced("  \n"), None),
        ("x = 1", None),
        ("", None),
    ],
)  # fmt: skip
def test_the_program_is_the_last_fenced_block(response, program):
    assert last_program(response) == program


@pytest.mark.parametrize("response", ["3", "The answer is \\boxed{3}.", fenced("int x;", "c++")])
def test_no_program_is_no_answer(response):
    assert verify(response, ADD_TESTS) == "no_answer"


class Touch:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def private(pickled):
    return json.dumps({"private_test_cases": base64.b64encode(zlib.compress(pickled)).decode()})


@pytest.mark.parametrize(
    ("gold", "message"),
    [
        ("", "got ''.*expected JSON"),
        ("42", "got 42, expected inputs"),
        ("[" * 100_000, "expected JSON"),
        ("{}", r"got \[\], expected inputs"),
        ("[]", "expected 1 or more"),
        (apps([], []), r"got \[0, 0\], expected two lists"),
        (apps(["1"], []), r"got \[1, 0\], expected two lists"),
        (apps("1", "1"), r"expected two lists"),
        (json.dumps({"inputs": ["1"]}), r"got \[1, None\], expected two lists"),
        (apps([1], ["1"]), "got 1, expected text or a list of lines"),
        (apps(["1"], [[1]]), r"got \[1\], expected text or a list of lines"),
        (apps([1], [1], fn_name="f"), "arguments of a function: got 1"),
        (apps(["x"], [1], fn_name="f"), "argument: got 'x'.*expected JSON"),
        (apps([[1]], [1], fn_name="import os"), "got import os, expected a Python name"),
        (apps(["1"], ["1"], tolerance="1e-5"), "tolerance: got 1e-5, expected a number"),
        (apps(["1"], ["1"], tolerance=-1), "tolerance: got -1"),
        (apps(["1"], ["1"], tolerance=float("nan")), "tolerance: got nan"),
        (json.dumps([case("1", 1)]), "expected an object with the texts input and output"),
        (json.dumps([case("1", "1", "file")]), r"testtype: got \['file'\]"),
        (json.dumps([case("1", "1"), case("1", "1", "functional")]), "testtype: got"),
        (json.dumps([case("1", "1", "functional")]), "func_name.*got None"),
        (livecodebench([], [case("1", "x", "functional")], {"func_name": "f"}), "output of a test: got 'x'"),
        (livecodebench([], []), "expected 1 or more"),
        (json.dumps({"private_test_cases": "?"}), "expected base64 of zlib of a pickle"),
        (json.dumps({"private_test_cases": "bm90IHpsaWI="}), "expected base64 of zlib of a pickle"),
        (private(pickle.dumps(Touch(), 0)), "a pickle with GLOBAL, expected a pickle of one text"),
        (private(pickle.dumps(["[]"])), "a pickle with EMPTY_LIST"),
        (private(pickle.dumps(b"[]", 0)), "a pickle with"),
        (private(pickle.dumps("[]")[:-1]), "a broken pickle"),
        (private(b"."), "a pickle without text"),
        (private(pickle.dumps("x")), "got 'x'.*expected JSON"),
        (private(bytes(code.MAX_TESTS_BYTES + 1)), "at most 134217728 bytes"),
    ],
)  # fmt: skip
def test_tests_that_cannot_be_read_are_an_error_that_says_why(gold, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_tests(gold)
    with pytest.raises(ValueError, match=message):
        verify(fenced("print(1)"), gold)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_private_tests_are_read_as_pickle_reads_them(protocol):
    cases = [case("1 2", "ä\u2028"), case("x" * 70_000, "y")]
    gold = private(pickle.dumps(json.dumps(cases, ensure_ascii=False), protocol))
    assert [(one.given, one.expected) for one in read_tests(gold).cases] == [
        (one["input"], one["output"]) for one in cases
    ]


@needs_bwrap
def test_in_the_pool_an_unreadable_test_is_an_error_and_a_loop_is_wrong():
    loop = fenced("while True:\n    pass")
    jobs = [VerifyJob(get_verifier("code"), fenced(ADD), gold) for gold in (ADD_TESTS, "{}")]
    jobs += [VerifyJob(get_verifier("code"), loop, ADD_TESTS), VerifyJob(get_verifier("code"), "3", ADD_TESTS)]
    started = time.monotonic()
    verdicts: dict[int, str] = {}
    verify_all(jobs, 2, 20.0, verdicts.__setitem__)
    assert verdicts[0] == "correct" and [verdicts[2], verdicts[3]] == ["wrong", "no_answer"]
    assert verdicts[1].startswith("error: ValueError: code tests")
    assert time.monotonic() - started < 40


@needs_bwrap
def test_all_tests_together_have_a_limit(monkeypatch):
    monkeypatch.setattr(code, "ALL_TESTS_SECONDS", 1.5)
    sleepy = fenced("import time\ntime.sleep(0.5)\nprint(1)")
    started = time.monotonic()
    assert verify(sleepy, apps(["1"] * 100, ["1"] * 100)) == "wrong"
    assert time.monotonic() - started < 10


SEARCH = """
import glob, os
def contents():
    yield repr(dict(os.environ)).encode()
    for pattern in ('/proc/[0-9]*/environ', '/proc/[0-9]*/cmdline', '/tmp/**', '/dev/shm/*', '/proc/[0-9]*/fd/*'):
        for name in glob.glob(pattern, recursive=True):
            try:
                fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK)
                yield os.read(fd, 2**20)
            except OSError:
                pass
    for name in glob.glob('/proc/[0-9]*/maps'):
        try:
            lines = open(name).readlines()
            memory = open(name.replace('maps', 'mem'), 'rb', 0)
        except OSError:
            continue
        for line in lines:
            start, end = (int(part, 16) for part in line.split()[0].split('-'))
            try:
                memory.seek(start)
                yield memory.read(end - start)
            except (OSError, ValueError, OverflowError):
                pass
start = b'-'.join([b'hidden', b''])
found = sorted({part[:17] for text in contents() for part in [start + rest for rest in text.split(start)[1:]]})
print([name.decode(errors='replace') for name in found if name[7:].isalnum()])
"""


@needs_bwrap
def test_what_is_expected_cannot_be_found_anywhere(monkeypatch):
    """A program that searches its environment, files, open files and all memory it can read finds the input only."""
    outcomes, given, expected = [], "hidden-input12345", f"hidden-{os.urandom(5).hex()}"
    run = sandbox.Sandbox.run
    monkeypatch.setattr(sandbox.Sandbox, "run", lambda *args: outcomes.append(run(*args)) or outcomes[-1])
    assert verify(fenced(SEARCH), apps([given], [expected])) == "wrong"
    assert outcomes[0].exit_code == 0 and given in outcomes[0].output.decode()  # so the search works
    assert expected not in outcomes[0].output.decode()


SCRIBBLE = """
import os
def f():
    for fd in range(3, 20):
        try:
            os.write(fd, b'42')
        except OSError:
            pass
    return 42
"""


@needs_bwrap
@pytest.mark.parametrize(
    "attack",
    [
        "class Always:\n    def __eq__(self, other): return True\ndef f(): return Always()",
        "class Always(int):\n    def __eq__(self, other): return True\ndef f(): return Always(1)",
        "import json\njson.dumps = lambda *a, **k: 'true'\ndef f(): return 1",
        SCRIBBLE,
        "import os, sys\ndef f():\n    os.closerange(3, 20)\n    os._exit(0)",
        "import os\nos._exit(0)",
        "import sys\nsys.exit(0)",
        "import sys\nsys.modules.clear()\ndef f(): return 1",
    ],
)  # fmt: skip
def test_a_result_that_pretends_to_be_equal_is_wrong(attack):
    assert verify(fenced(attack), apps([[]], [42], fn_name="f")) == "wrong"


def test_without_bubblewrap_no_answer_passes(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox.check_sandbox.cache_clear()
    with pytest.raises(RuntimeError, match="apt-get install bubblewrap"):
        verify(fenced(ADD), ADD_TESTS)
