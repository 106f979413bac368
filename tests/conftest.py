"""What the package keeps in the user's cache folder goes to one of the tests' own."""

import os
import shutil
import tempfile


def pytest_configure():
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="megavar-tests-")


def pytest_unconfigure():
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)
