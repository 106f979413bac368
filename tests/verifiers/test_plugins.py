"""Verifiers from outside the package: only those that the configuration names, judged in the pool like the others."""

import pytest

from megavar.verifiers import get_verifier
from megavar.verifiers.pool import VerifyJob, verify_all

MODULE = """
from megavar.records import Verdict

def reversed_text(response, gold):
    return Verdict.CORRECT if response == gold[::-1] else Verdict.WRONG
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    (tmp_path / "outside_verifiers.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return "outside_verifiers:reversed_text"


def test_a_plugin_judges_in_the_pool(plugin):
    verifier = get_verifier(plugin, [plugin])
    jobs = [VerifyJob(verifier, "cba", "abc"), VerifyJob(verifier, "abc", "abc")]
    assert verify_all(jobs, 1, 10.0, lambda *_: None) == ["correct", "wrong"]


def test_a_name_from_a_data_file_runs_nothing_that_the_configuration_does_not_list(plugin):
    for name in (plugin, "os:system"):
        with pytest.raises(
            ValueError, match=rf"{name}' is unknown; use one of math, code, or allow it if you trust .*verify\.plugins"
        ):
            get_verifier(name)


@pytest.mark.parametrize("name", ["outside_verifiers:lacks", "no_such_module:verify", "outside_verifiers"])
def test_a_plugin_that_is_not_there_is_refused(plugin, name):
    with pytest.raises(ValueError, match=rf"verify\.plugins: '{name}' cannot be imported"):
        get_verifier(name, [name])
