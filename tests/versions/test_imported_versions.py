"""The releases that tests import are declared; `make test-newest` and `make test-oldest` run on those they name."""

import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import megavar.training  # noqa: F401  (before megatron, which it makes usable on CPUs)

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
MODULES = {"megatron-core": "megatron.core", "transformers": "transformers"}
MEANT = [Requirement(text) for text in tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]]
if "RELEASE_UNDER_TEST" in os.environ:  # set by the Makefile, such as megatron-core==0.19.2
    MEANT.append(Requirement(os.environ["RELEASE_UNDER_TEST"]))
    assert MEANT[-1].name in MODULES
PRINT_VERSION = "import importlib, sys, megavar.training; print(importlib.import_module(sys.argv[1]).__version__)"


@pytest.mark.parametrize("package", MODULES)
def test_tests_and_the_processes_they_start_import_the_release_that_is_meant(package):
    started = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PRINT_VERSION, MODULES[package]],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    requirements = [requirement for requirement in MEANT if requirement.name == package]
    assert requirements
    for version in (importlib.import_module(MODULES[package]).__version__, started.stdout.split()[-1]):
        for requirement in requirements:
            assert version in requirement.specifier, f"{package} {version} is imported, {requirement} was meant"
