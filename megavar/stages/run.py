"""A run's folder, and its manifest: which stage is finished, under which settings, from which inputs.

A stage whose settings and inputs are those it was finished under is skipped; if they differ, finished or begun, it is
refused with the differing key. Settings that cannot change a result (grid, microbatches, intervals) are not compared.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from megavar.config.load import save_config
from megavar.config.schema import RunConfig
from megavar.records import Question, write_aside

_WITHOUT_EFFECT = {
    *("log_interval", "save_interval", "keep_checkpoints", "flush_seconds", "num_workers"),
    *("microbatch_tokens", "recompute", "distributed_optimizer"),
}


@dataclass(frozen=True)
class Run:
    """A configuration and the places its stages read and write in one of its rounds."""

    config: RunConfig
    round_index: int = 1

    def entry(self, stage: str) -> str:
        """Name of a stage of this round in manifest, metrics and on the command line; plain in the first round."""
        return stage if self.round_index == 1 or stage == "sft" else f"{stage}_{self.round_index:02d}"

    @property
    def before(self) -> "Run":
        """The same in the round before."""
        assert self.round_index > 1
        return replace(self, round_index=self.round_index - 1)

    @property
    def folder(self) -> Path:
        """Everything the run writes."""
        return Path(self.config.runs_dir) / self.config.name

    @property
    def base(self) -> Path:
        """Hugging Face folder of the base model."""
        return Path(self.config.model)

    @property
    def sft(self) -> Path:
        """pi_0: checkpoints/ and hf/."""
        return self.folder / "sft"

    @property
    def round(self) -> Path:
        """What this round samples, scores, weighs and trains."""
        return self.folder / f"round_{self.round_index:02d}"

    @property
    def posterior(self) -> Path:
        """q: checkpoints/ and hf/. On gold traces it is trained in the first round only."""
        first = self.config.posterior.source == "gold"
        return (replace(self, round_index=1) if first else self).round / "posterior"

    @property
    def learns_by_reverse_kl(self) -> bool:
        """Whether q goes on from the last round's by the ELBO's own gradient, which needs traces of it."""
        return self.config.posterior.source == "reverse_kl" and self.round_index > 1

    @property
    def reference(self) -> Path:
        """The policy that this round starts with, as a Hugging Face folder: pi_0, or the last round's."""
        return self.sft / "hf" if self.round_index == 1 else self.before.policy / "hf"

    @property
    def policy(self) -> Path:
        """The policy that this round makes: checkpoints/ and hf/."""
        return self.round / "policy"

    @property
    def final(self) -> Path:
        """Link to the newest round's policy as a Hugging Face folder."""
        return self.folder / "hf"

    def take_questions(self, questions: list[Question]) -> list[Question]:
        """Those of this round, of all questions of the train file."""
        number = self.config.data.questions_per_round
        first = (self.round_index - 1) * (number or 0) if self.config.data.fresh_questions else 0
        return questions[first:][:number]

    def open(self) -> None:
        """Make the folder, with the resolved configuration in it; rank 0 only."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with write_aside(self.folder / "config.yaml") as aside:
            save_config(self.config, aside)


class NotFinished(ValueError):
    """A stage whose records are asked for is not finished."""


class Manifest:
    """manifest.json of a run."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "manifest.json"

    def entries(self) -> dict[str, dict[str, Any]]:
        """Stage -> settings and status (begun or finished); of a finished one digest and seconds too."""
        found: dict[str, dict[str, Any]] = json.loads(self.file.read_text()) if self.file.exists() else {}
        return found

    def check(self, stage: str, settings: dict[str, Any]) -> bool:
        """Whether the stage is finished under these settings.

        Raises:
            ValueError: if it was begun or finished under others, naming the first differing key.
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
                    "entry in manifest.json."
                )
        return bool(entry["status"] == "finished")

    def digest(self, stage: str) -> str:
        """Digest of a finished stage, as an input of later ones.

        Raises:
            NotFinished: if it is not.
        """
        entry = self.entries().get(stage)
        if entry is None or entry["status"] != "finished":
            raise NotFinished(f"{self.file.parent}: stage {stage} is not finished; run `megavar {stage}` first.")
        return str(entry["digest"])

    def begin(self, stage: str, settings: dict[str, Any]) -> None:
        """Note that the stage works under these settings now."""
        self._put(stage, {"settings": settings, "status": "begun"})

    def finish(self, stage: str, seconds: float) -> None:
        """Note that the stage is finished, after this many seconds in the attempt that finished it."""
        entry = self.entries()[stage]
        # The time is part of it: what a stage made anew from the same settings is not what later stages read before.
        made = json.dumps([entry["settings"], time.time_ns()], sort_keys=True)
        digest = hashlib.sha256(made.encode()).hexdigest()[:16]
        self._put(stage, {**entry, "status": "finished", "digest": digest, "seconds": round(seconds, 1)})

    def _put(self, stage: str, entry: dict[str, Any]) -> None:
        with write_aside(self.file) as aside:
            aside.write_text(json.dumps({**self.entries(), stage: entry}, indent=2) + "\n")


def run_once(run: Run, stage: str, settings: dict[str, Any], work: Callable[[], None]) -> None:
    """Do a stage's work unless it is finished under these settings; every rank calls it."""
    # Here and not above: looking at a run needs no torch.
    from megavar.training.parallel import barrier, is_rank_zero

    manifest, stage = Manifest(run.folder), run.entry(stage)
    if manifest.check(stage, settings):
        if is_rank_zero():
            print(f"{stage}: finished already, skipped", flush=True)
        return
    barrier()
    started = time.monotonic()
    if is_rank_zero():
        manifest.begin(stage, settings)
        print(f"{stage}: begins", flush=True)
    barrier()
    work()
    barrier()
    if is_rank_zero():
        manifest.finish(stage, time.monotonic() - started)
    barrier()


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
