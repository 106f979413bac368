"""SGLang's own server, with the API key of its run: `python sglang_launcher.py ARGUMENTS OF sglang.launch_server`.

Runs inside SGLang's interpreter, by file path, and changes three things:

1. The key comes in the environment, since every user of a machine can read command lines. SGLang's log begins with all
   arguments; the key is hidden there.
2. A killed SGLang leaves two files in /dev/shm. One goes to TMPDIR instead, which `watchdog.py` removes; the other, a
   lock between processes that SGLang does not start, is not made.
3. If the arguments begin with `--device cpu`, `sglang_cpu_bridge.py` bridges what its wheels lack on a CPU.

SGLang starts its other processes with multiprocessing's `spawn`, which runs this file's top level in each of
them, with the same `sys.argv`: so the changes hold everywhere.
"""

import importlib.abc
import importlib.util
import logging
import os
import runpy
import sys
import tempfile
import types
from collections.abc import Callable
from typing import Any

KEY = "MEGAVAR_SERVER_KEY"
HERE = os.path.dirname(os.path.abspath(__file__))


class WhenImported(importlib.abc.MetaPathFinder):
    """Changes a module when it is imported, in whichever of SGLang's processes that happens."""

    def __init__(self, name: str, change: Callable[[Any], None]) -> None:
        self._name, self._change = name, change

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """The module's own spec, whose loader also makes the change."""
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        run = spec.loader.exec_module

        def run_and_change(module: types.ModuleType) -> None:
            run(module)
            self._change(module)

        spec.loader.exec_module = run_and_change  # type: ignore[method-assign]
        return spec


def hide(key: str) -> None:
    """Keep the key out of every line that goes through logging."""
    format_record = logging.Formatter.format

    def format_without(self: logging.Formatter, record: logging.LogRecord) -> str:
        return format_record(self, record).replace(key, "***")

    logging.Formatter.format = format_without  # type: ignore[method-assign]


def move_load_file(module: Any) -> None:
    """In sglang/srt/managers/load_snapshot.py: the file in which the scheduler says how busy it is."""
    module.shm_path_for = lambda name: os.path.join(tempfile.gettempdir(), f"loads_{os.path.basename(name)}")


def drop_process_lock(module: Any) -> None:
    """In tqdm/std.py: a semaphore for progress bars of forked processes."""
    module.TqdmDefaultWriteLock.mp_lock = None


def bridge_cpu() -> None:
    """Run sglang_cpu_bridge.py beside this file, which is on no import path."""
    spec = importlib.util.spec_from_file_location("sglang_cpu_bridge", os.path.join(HERE, "sglang_cpu_bridge.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.bridge(WhenImported)


def prepare() -> None:
    """Make the changes in the calling process, before SGLang is imported."""
    if KEY in os.environ:
        hide(os.environ[KEY])
    sys.meta_path.insert(0, WhenImported("sglang.srt.managers.load_snapshot", move_load_file))
    sys.meta_path.insert(0, WhenImported("tqdm.std", drop_process_lock))
    if sys.argv[1:3] == ["--device", "cpu"]:
        bridge_cpu()


if __name__ == "__main__":
    # Python put this file's folder first, where requests.py, our client, would hide the package of that name.
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != HERE]
    if KEY in os.environ:
        sys.argv.append(f"--api-key={os.environ[KEY]}")  # Python's list, not the command line that others see
if __name__ in ("__main__", "__mp_main__"):  # the second is the name in spawned processes
    prepare()
if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
