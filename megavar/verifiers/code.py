"""Verifier `code`: the last program of the response must pass every test of the question, in a sandbox.

`Question.answer` holds the tests as JSON text, in the forms in which APPS, TACO and LiveCodeBench publish them:

- `{"inputs": [...], "outputs": [...], "fn_name": optional}`
- `[{"input": ..., "output": ..., "testtype": "stdin" or "functional"}, ...]`
- `{"public_test_cases": ..., "private_test_cases": ..., "metadata": ...}`

and, in an object, an optional `tolerance`. The sandbox gets the inputs only: a program cannot read what is expected.
"""

import base64
import binascii
import json
import pickletools
import re
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import isclose, isfinite
from typing import Any

from megavar.records import Verdict
from megavar.verifiers.sandbox import MAX_OUTPUT_BYTES, WALL_SECONDS, Outcome, Sandbox, check_sandbox

ALL_TESTS_SECONDS = 60.0
MAX_TESTS_BYTES = 2**27
"""Of the compressed tests of one question, uncompressed."""
_LANGUAGES = ("", "python", "py", "python3")
_FENCE = re.compile(r"(\s*)(`{3,})([^`]*)$")
_PICKLED_TEXT = ("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
_NO_EFFECT = ("PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP")


@dataclass(frozen=True)
class Case:
    """One test."""

    given: str
    """Standard input; for a function, the JSON list of its arguments."""
    expected: str
    """Standard output; for a function, JSON."""


@dataclass(frozen=True)
class Tests:
    """All tests of one question."""

    cases: tuple[Case, ...]
    function: str = ""
    """What to call; if empty, the program reads standard input."""
    is_wrapped: bool = False
    """Each expected result is in a list of its own, as APPS has them."""
    tolerance: float | None = None
    """Absolute and relative, of numbers; without it they must be equal."""


def verify(response: str, gold: str) -> Verdict:
    """Run the last fenced Python program of the response on the tests.

    Args:
        gold: the tests.

    Raises:
        ValueError: if the tests cannot be read.
        RuntimeError: if there is no sandbox here.
    """
    tests = read_tests(gold)
    program = last_program(response)
    if program is None:
        return Verdict.NO_ANSWER
    check_sandbox()
    deadline = time.monotonic() + ALL_TESTS_SECONDS
    with Sandbox(program, tests.function) as sandbox:
        for case in tests.cases:
            # Some tests expect more than the usual limit.
            max_bytes = MAX_OUTPUT_BYTES + 4 * len(case.expected)
            seconds = min(WALL_SECONDS, deadline - time.monotonic())
            if seconds <= 0 or not _passes(sandbox.run(case.given, seconds, max_bytes), case.expected, tests):
                return Verdict.WRONG
    return Verdict.CORRECT


def last_program(response: str) -> str | None:
    """The last fenced block if it is Python or has no language; one that is not closed ends with the response."""
    lines: list[str] = []
    language, fence, indent, program = "", "", 0, None
    for line in response.split("\n"):
        line = line.removesuffix("\r")
        mark = _FENCE.match(line)
        if not fence and mark:
            fence, indent, lines = mark[2], len(mark[1]), []
            language = (mark[3].split() or [""])[0].lower()
        elif fence and mark and len(mark[2]) >= len(fence) and not mark[3].strip():
            fence = ""
        elif fence:
            lines.append(line[min(indent, len(line) - len(line.lstrip())) :])
            continue
        program = "\n".join(lines) if language in _LANGUAGES else None
    if fence:
        program = "\n".join(lines) if language in _LANGUAGES else None
    return program if program and program.strip() else None


@lru_cache(maxsize=4)
def read_tests(gold: str) -> Tests:
    """Read the tests of a question.

    Raises:
        ValueError: if there are none, or their form is not one of the above.
    """
    content = _load(gold, "the answer of a code question")
    if isinstance(content, list):
        return _from_list(content, None)
    if isinstance(content, dict) and "inputs" in content:
        tests = _from_columns(content)
    elif isinstance(content, dict) and content.keys() & {"public_test_cases", "private_test_cases"}:
        tests = _from_livecodebench(content)
    else:
        found = sorted(content)[:5] if isinstance(content, dict) else content
        raise _refusal("the answer of a code question", found, "inputs, public_test_cases, or a list of tests")
    tolerance = content.get("tolerance")
    if tolerance is not None and (type(tolerance) not in (int, float) or not 0 < tolerance < 1):
        raise _refusal("tolerance", tolerance, "a number between 0 and 1")
    return replace(tests, tolerance=tolerance)


def _from_columns(content: dict[str, Any]) -> Tests:
    """APPS and TACO."""
    inputs, outputs, function = content["inputs"], content.get("outputs"), content.get("fn_name")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs) or not inputs:
        sizes = [len(column) if isinstance(column, list) else column for column in (inputs, outputs)]
        raise _refusal("inputs and outputs", sizes, "two lists of one length, 1 or more")
    pairs = zip(inputs, outputs, strict=True)
    if not function:
        return Tests(tuple(Case(_text(given), _text(expected)) for given, expected in pairs))
    cases = [Case(_arguments(given), json.dumps(expected)) for given, expected in pairs]
    is_wrapped = all(isinstance(expected, list) and len(expected) == 1 for expected in outputs)
    return Tests(tuple(cases), _function(function), is_wrapped)


def _from_livecodebench(content: dict[str, Any]) -> Tests:
    cases: list[Any] = []
    for key in ("public_test_cases", "private_test_cases"):
        part = content.get(key) or []
        if isinstance(part, str):
            part = _load(part if part.lstrip().startswith("[") else _unpack(part), key)
        if not isinstance(part, list):
            raise _refusal(key, part, "a list of tests")
        cases += part
    return _from_list(cases, content.get("metadata"))


def _from_list(cases: Sequence[Any], metadata: Any) -> Tests:
    if not cases:
        raise _refusal("the tests", [], "1 or more")
    for case in cases:
        if not isinstance(case, dict) or not all(isinstance(case.get(key), str) for key in ("input", "output")):
            raise _refusal("a test", case, "an object with the texts input and output")
    kinds = {case.get("testtype", "stdin") for case in cases if isinstance(case.get("testtype", "stdin"), str)}
    if kinds == {"stdin"}:
        return Tests(tuple(Case(case["input"], case["output"]) for case in cases))
    if kinds != {"functional"}:
        raise _refusal("testtype", sorted(kinds), "stdin or functional, the same in all tests of a question")
    metadata = metadata or cases[0].get("metadata") or {}
    if isinstance(metadata, str):
        metadata = _load(metadata, "metadata")
    function = _function(metadata.get("func_name") if isinstance(metadata, dict) else metadata)
    for case in cases:
        _load(case["output"], "the output of a test")
    return Tests(tuple(Case(_arguments(case["input"]), case["output"]) for case in cases), function)


def _text(lines: Any) -> str:
    if isinstance(lines, str):
        return lines
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise _refusal("an input or output", lines, "text or a list of lines")
    return "\n".join(lines)


def _arguments(given: Any) -> str:
    """JSON list of a function's arguments, which some data give as text with one JSON value a line."""
    if isinstance(given, str):
        given = [_load(line, "an argument") for line in given.splitlines() if line.strip()]
    if not isinstance(given, list):
        raise _refusal("the arguments of a function", given, "a list, or text with one JSON value a line")
    return json.dumps(given)


def _function(name: Any) -> str:
    if not isinstance(name, str) or not name.isidentifier():
        raise _refusal("the name of the function (fn_name or func_name)", name, "a Python name")
    return name


def _unpack(text: str) -> str:
    """The text in the base64 of zlib of a pickle. The pickle is not executed: it may hold nothing but that text."""
    try:
        decompressor = zlib.decompressobj()
        pickled = decompressor.decompress(base64.b64decode(text, validate=True), MAX_TESTS_BYTES)
    except (binascii.Error, zlib.error) as error:
        raise _refusal("private_test_cases", f"{text[:20]!r}... ({error})", "base64 of zlib of a pickle") from error
    if not decompressor.eof:
        raise _refusal("private_test_cases", "incomplete or larger data", f"at most {MAX_TESTS_BYTES} bytes, unpacked")
    return _pickled_text(pickled)


def _pickled_text(pickled: bytes) -> str:
    text, found = None, ""
    try:
        for operation, argument, _ in pickletools.genops(pickled):
            if operation.name in _PICKLED_TEXT and text is None:
                text = argument
            elif operation.name not in _NO_EFFECT:
                found = f"a pickle with {operation.name}"
                break
    except ValueError as error:
        found = f"a broken pickle ({error})"
    if found or not isinstance(text, str):
        raise _refusal("private_test_cases", found or "a pickle without text", "a pickle of one text")
    return text


def _load(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refusal(what, f"{text[:60]!r} ({error})", "JSON") from error


def _refusal(what: str, found: Any, expected: str) -> ValueError:
    return ValueError(f"code tests, {what}: got {str(found)[:200]}, expected {expected}; correct `answer` in the data.")


def _passes(outcome: Outcome, expected: str, tests: Tests) -> bool:
    if outcome.exit_code != 0:
        return False
    if not tests.function:
        output = outcome.output.decode(errors="surrogateescape")
        return _same_tokens(output.split(), expected.split(), tests.tolerance)
    try:
        result, wanted = json.loads(outcome.output), json.loads(expected)
        return _equal(result, wanted, tests.tolerance) or (
            tests.is_wrapped and _equal(result, wanted[0], tests.tolerance)
        )
    except (ValueError, RecursionError):  # not JSON, or too deep
        return False


def _same_tokens(output: list[str], expected: list[str], tolerance: float | None) -> bool:
    return len(output) == len(expected) and all(
        found == wanted or (tolerance is not None and _are_close_texts(found, wanted, tolerance))
        for found, wanted in zip(output, expected, strict=True)
    )


def _are_close_texts(found: str, wanted: str, tolerance: float) -> bool:
    try:
        return _are_close(float(found), float(wanted), tolerance)
    except ValueError:
        return False


def _are_close(found: float, wanted: float, tolerance: float) -> bool:
    try:
        # Relative to what is expected, not to what was found.
        return isfinite(found) and isclose(found, wanted, rel_tol=0, abs_tol=tolerance * max(1.0, abs(wanted)))
    except OverflowError:  # an integer that no float can hold
        return False


def _equal(found: Any, wanted: Any, tolerance: float | None) -> bool:
    """Equality of JSON values: 1 is 1.0 and not true."""
    if isinstance(found, bool) or isinstance(wanted, bool):
        return found is wanted
    if isinstance(found, int | float) and isinstance(wanted, int | float):
        return found == wanted or (tolerance is not None and _are_close(found, wanted, tolerance))
    if isinstance(found, list) and isinstance(wanted, list):
        return len(found) == len(wanted) and all(
            _equal(one, other, tolerance) for one, other in zip(found, wanted, strict=True)
        )
    if isinstance(found, dict) and isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(_equal(found[key], wanted[key], tolerance) for key in wanted)
    return type(found) is type(wanted) and bool(found == wanted)
