"""manifest.json of a run: which stage is finished, under which settings, from which inputs.

A stage whose settings and inputs equal those it was finished under is skipped; if they differ, finished or not, it is
refused with the differing key. Settings that cannot change a result (parallel layout, microbatches, intervals) are not
compared.
"""

import hashlib
import json
import time
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from megavar.records import atomic_write

_WITHOUT_EFFECT = {
    *("log_interval", "save_interval", "save_minutes", "keep_checkpoints", "flush_seconds", "num_workers"),
    *("microbatch_tokens", "recompute", "distributed_optimizer"),
}


class NotFinished(ValueError):
    """A stage that must be finished before this one is not."""


class Manifest:
    """manifest.json of a run."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "manifest.json"

    def entries(self) -> dict[str, dict[str, Any]]:
        """Stage -> settings and status (`begun` or `finished`); a finished one has digest and seconds too."""
        entries: dict[str, dict[str, Any]] = json.loads(self.file.read_text()) if self.file.exists() else {}
        return entries

    def check(self, stage: str, settings: dict[str, Any]) -> bool:
        """Whether the stage is finished under these settings.

        Raises:
            ValueError: if it was started or finished under others, naming the first differing key.
        """
        entry = self.entries().get(stage)
        if entry is None:
            return False
        old, new = entry["settings"], json.loads(json.dumps(settings))
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                raise ValueError(
                    f"{self.file.parent}: stage {stage} was {entry['status']} with {key}={old.get(key)!r}, now it is "
                    f"{new.get(key)!r}; restore it, or choose another run name, or remove the stage's outputs and its "
                    "entry in manifest.json (docs/troubleshooting.md#refused-settings)."
                )
        return bool(entry["status"] == "finished")

    def digest(self, stage: str) -> str:
        """Digest of a finished stage, as an input of later ones.

        Raises:
            NotFinished: if it is not finished.
        """
        entry = self.entries().get(stage)
        if entry is None or entry["status"] != "finished":
            raise NotFinished(f"{self.file.parent}: stage {stage} is not finished; run `megavar {stage}` first.")
        return str(entry["digest"])

    def begin(self, stage: str, settings: dict[str, Any]) -> None:
        """Record that the stage was started under these settings."""
        self._put(stage, {"settings": settings, "status": "begun"})

    def finish(self, stage: str, seconds: float) -> None:
        """Record that the stage is finished, after this many seconds in the attempt that finished it."""
        entry = self.entries()[stage]
        # Includes the time: rerunning a stage under equal settings must invalidate the stages that read its outputs.
        content = json.dumps([entry["settings"], time.time_ns()], sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        self._put(stage, {**entry, "status": "finished", "digest": digest, "seconds": round(seconds, 1)})

    def _put(self, stage: str, entry: dict[str, Any]) -> None:
        with atomic_write(self.file) as temporary:
            temporary.write_text(json.dumps({**self.entries(), stage: entry}, indent=2) + "\n")


def flat(prefix: str, section: Any) -> dict[str, Any]:
    """A configuration section as {prefix.key: value}, without the keys that cannot change a result."""
    return {f"{prefix}.{key}": value for key, value in asdict(section).items() if key not in _WITHOUT_EFFECT}


def file_digest(file: Path) -> str:
    """Digest of a file's bytes."""
    state = file.stat()
    return _digest(file, state.st_mtime_ns, state.st_size)


@lru_cache
def _digest(file: Path, _modified: int, _size: int) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:16]
