"""manifest.json of a run: which stage is finished, under which settings, from which inputs, with which outputs.

A stage whose settings and inputs equal those it was finished under is skipped; if they differ, finished or not, it is
refused with the differing key. Settings that cannot change a result (parallel layout, microbatches, intervals) are not
compared. A finished stage's outputs are recorded with their checksums, and checked before another stage reads them.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from megavar.checksums import CHECKSUMS, check_checksums, file_digest
from megavar.disk import atomic_write

_WITHOUT_EFFECT = {
    *("log_interval", "save_interval", "save_minutes", "keep_checkpoints", "flush_seconds", "num_workers"),
    *("microbatch_tokens", "chunk_sequences", "recompute", "distributed_optimizer"),
    *("pack_length", "overlap_communication", "overlap_tensor_parallel", "optimizer_offload"),
}
_IDENTIFYING_BYTES = 2**16
"""Of each end of a file of weights."""


class NotFinished(ValueError):
    """A stage that must be finished before this one is not."""


class Manifest:
    """manifest.json of a run."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "manifest.json"

    def entries(self) -> dict[str, dict[str, Any]]:
        """Stage -> settings and status (`begun` or `finished`); a finished one has digest, outputs and seconds too.

        One that is taken from another run has `reused_from`, the folder of that.

        Raises:
            ValueError: if the file is damaged.
        """
        if not self.file.exists():
            return {}
        try:
            entries: dict[str, dict[str, Any]] = json.loads(self.file.read_text(encoding="utf-8"))
            for stage, entry in entries.items():
                is_finished = entry["status"] == "finished"
                if not (isinstance(entry["settings"], dict) and entry["status"] in ("begun", "finished")):
                    raise ValueError(f"stage {stage} has no settings or an unknown status")
                if is_finished and not (isinstance(entry["digest"], str) and isinstance(entry["outputs"], dict)):
                    raise ValueError(f"stage {stage} is finished without digest or outputs")
                if is_finished and not isinstance(entry["seconds"], int | float):
                    raise ValueError(f"the seconds of stage {stage} are no number")
                float(entry["seconds"] if is_finished else 0.0)
                for output in entry.get("outputs", {}).values():
                    int(output["bytes"]), str(output["sha256"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError(
                f"{self.file} is damaged or of another version ({type(error).__name__}: {error}); restore it, or "
                "remove it: the same command then finds what the stages wrote, but does not compare the settings they "
                "ran with (docs/troubleshooting.md#damaged-files)."
            ) from error
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
                    f"{new.get(key)!r}; restore it, or choose another run name (or --out), or remove the stage's "
                    "outputs and its entry in manifest.json (docs/troubleshooting.md#refused-settings)."
                )
        return bool(entry["status"] == "finished")

    def check_outputs(self, stage: str) -> None:
        """Compare the outputs of a finished stage with the checksums that it was finished with.

        Of a folder with `SHA256SUMS` all files are compared.

        Raises:
            ValueError: naming the first file that is missing, changed or damaged.
        """
        for file, problem in differing_files(self.file.parent, self.entries()[stage]["outputs"]):
            raise ValueError(
                f"{file} of the finished stage {stage} {problem}: it was changed or damaged; restore it, or remove "
                f"the entry {stage} of {self.file} (and the file, if it cannot be read) and run the same command "
                "again: what is missing is made again (docs/troubleshooting.md#damaged-files)."
            )

    def digest(self, stage: str) -> str:
        """Digest of a finished stage's settings and outputs, as an input of later ones.

        Raises:
            NotFinished: if it is not finished.
        """
        entry = self.entries().get(stage)
        if entry is None or entry["status"] != "finished":
            raise NotFinished(f"{self.file.parent}: stage {stage} is not finished; run `megavar {stage}` first.")
        return str(entry["digest"])

    def made_from(self, stage: str) -> str:
        """Digest of the settings and inputs that a stage was begun with, for what it makes on the way."""
        return _hexdigest(json.dumps(self.entries()[stage]["settings"], sort_keys=True).encode())

    def begin(self, stage: str, settings: dict[str, Any], reused_from: str | None = None) -> None:
        """Record that the stage was started under these settings.

        Args:
            reused_from: folder of the run whose outputs will be this stage's.
        """
        reused = {} if reused_from is None else {"reused_from": reused_from}
        self._put(stage, {"settings": settings, "status": "begun", **reused})

    def finish(self, stage: str, seconds: float, outputs: Sequence[Path]) -> None:
        """Record that the stage is finished, after this many seconds in the attempt that finished it.

        Args:
            outputs: files in the run's folder that stand for the results; those that do not exist are left out.
        """
        entry = self.entries()[stage]
        written = {
            str(file.relative_to(self.file.parent)): {"bytes": file.stat().st_size, "sha256": file_digest(file)}
            for file in outputs
            if file.is_file()
        }
        digest = digest_of(entry["settings"], written)
        finished = {"status": "finished", "digest": digest, "seconds": round(seconds, 1)}
        self._put(stage, {**entry, **finished, "outputs": written})

    def _put(self, stage: str, entry: dict[str, Any]) -> None:
        with atomic_write(self.file) as temporary:
            temporary.write_text(json.dumps({**self.entries(), stage: entry}, indent=2) + "\n")


def differing_files(folder: Path, outputs: dict[str, Any]) -> Iterator[tuple[Path, str]]:
    """The outputs of a manifest's entry that are not what was recorded, and what is wrong with each.

    Raises:
        ValueError: naming a file of a folder with `SHA256SUMS` that is missing, changed or damaged.
    """
    for name, output in outputs.items():
        file = folder / name
        if not file.is_file():
            yield file, "is missing"
        elif file.stat().st_size != output["bytes"]:
            yield file, f"has {file.stat().st_size} bytes, the stage wrote {output['bytes']}"
        elif file_digest(file) != output["sha256"]:
            yield file, "has another checksum than what the stage wrote"
        elif file.name == CHECKSUMS:
            check_checksums(file.parent)


def digest_of(settings: dict[str, Any], outputs: dict[str, Any]) -> str:
    """Digest of a finished stage."""
    return _hexdigest(json.dumps([settings, outputs], sort_keys=True).encode())


def flat(prefix: str, section: Any) -> dict[str, Any]:
    """A configuration section as {prefix.key: value}, without the keys that cannot change a result."""
    return {f"{prefix}.{key}": value for key, value in asdict(section).items() if key not in _WITHOUT_EFFECT}


def model_digest(folder: Path) -> str:
    """Identifies a model by what its folder holds, wherever that is; the path itself if there is no folder.

    Of files of weights the name, the size and both ends count: another model, or one trained further, differs there.
    """
    if not folder.is_dir():
        return str(folder)
    files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".jinja", ".safetensors", ".txt"))
    return _model_digest(tuple((file, file.stat().st_mtime_ns, file.stat().st_size) for file in files))


@lru_cache
def _model_digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    parts = []
    for file, _, size in files:
        with file.open("rb") as content:
            if file.suffix != ".safetensors":
                parts.append(f"{file.name} {_hexdigest(content.read())}")
                continue
            ends = content.read(_IDENTIFYING_BYTES)
            content.seek(max(0, size - _IDENTIFYING_BYTES))
            parts.append(f"{file.name} {size} {_hexdigest(ends + content.read())}")
    return _hexdigest("\n".join(parts).encode())


def _hexdigest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
