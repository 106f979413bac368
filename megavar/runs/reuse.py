"""`reuse`: finished stages of other runs take the place of this run's own, where settings and inputs are the same.

Stages are compared by what manifests record: every setting that the result depends on, and the digests of what it was
made from. Outputs are hard-linked into a folder aside, or copied where the file system has no link between the two
runs, compared with their checksums there, and renamed into this run, which from then on needs the other one no more.
No run changes the outputs of a finished stage in place, so it does not matter whether the other run goes on.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megavar.checksums import CHECKSUMS, read_checksums
from megavar.config.schema import RunConfig
from megavar.disk import atomic_write, make_folder, sync
from megavar.progress import ProgressLine, in_megabytes
from megavar.runs.folder import Run
from megavar.runs.manifest import Manifest, NotFinished, differing_files, digest_of
from megavar.runs.metrics import Metrics
from megavar.runs.plan import Stage, stages_of
from megavar.stopping import stop_if_requested

ASIDE = ".reused"
LEFT_OUT = "left_out"
_COPY_BYTES = 2**23
"""Copied at once."""
Entries = Mapping[str, dict[str, Any]]


def open_others(config: RunConfig) -> dict[Path, Entries]:
    """The runs that `reuse` names, with the entries of their manifests as they are now.

    A run that has begun does not need them: one that is gone or damaged since has no entries.

    Raises:
        ValueError: if one of them is this run, or if this run has not begun and one is no run or damaged.
    """
    own, found = Run(config).folder, dict[Path, Entries]()
    has_begun = bool(Manifest(own).entries())
    for folder in map(Path, config.reuse):
        if folder.resolve() == own.resolve():
            raise ValueError(f"reuse={folder} is this run itself; name another run's folder, or leave it out.")
        manifest = Manifest(folder)
        try:
            if not manifest.file.is_file():
                raise ValueError(
                    f"reuse={folder} is not the folder of a run: it has no manifest.json; give one such as runs/demo, "
                    "or leave it out."
                )
            found[folder] = manifest.entries()
        except ValueError:
            if not has_begun:
                raise
            found[folder] = {}
    return found


def forecast_reuse(config: RunConfig) -> tuple[dict[str, Path], dict[str, str]]:
    """Which stages of a run would be reused, by what is known now: sizes of files are compared, checksums are not.

    Returns:
        Stage -> the run it would be taken from; stage -> why it is not reused. Stages that are finished here, and those
        that read what is still to be made, are in neither.
    """
    others, manifest = open_others(config), Manifest(Run(config).folder)
    own = manifest.entries()
    digests = {name: entry["digest"] for name, entry in own.items() if entry["status"] == "finished"}
    taken, why = dict[str, Path](), dict[str, str]()

    def digest(entry: str) -> str:
        if entry not in digests:
            raise NotFinished(entry)
        return str(digests[entry])

    for stage, run in stages_of(config) if others else ():
        name = run.entry(stage.name)
        if name in digests:
            continue
        try:
            settings = stage.settings(run, digest)
        except NotFinished:
            continue
        obstacles = {other: _obstacle(run, stage, settings, other, entries) for other, entries in others.items()}
        source = None if _is_own(own, name) else next((other for other in others if not obstacles[other]), None)
        if source is None:
            why[name] = _GOES_ON if _is_own(own, name) else _reasons(obstacles)
        else:
            digests[name], taken[name] = others[source][name]["digest"], source
    return taken, why


def reuse_stage(run: Run, stage: Stage, settings: dict[str, Any], conclude: Callable[[], None]) -> bool:
    """Finish a stage by the outputs of another run, if one has them; rank 0 only. Prints why not.

    Args:
        settings: of the stage, as `Stage.settings` has them.
        conclude: makes what the stage leaves besides its outputs.

    Returns:
        Whether the stage is finished now.
    """
    others = open_others(run.config)
    if not others:
        return False
    manifest, name = Manifest(run.folder), run.entry(stage.name)
    if _is_own(manifest.entries(), name):
        print(f"{name}: not reused: {_GOES_ON}", flush=True)
        return False
    obstacles = {}
    for other, entries in others.items():
        obstacles[other] = _obstacle(run, stage, settings, other, entries)
        if obstacles[other]:
            continue
        entry = entries[name]
        try:
            rows = _rows(run, stage, other)
            _link_aside(run, name, other, entry["outputs"])
        except (ValueError, FileNotFoundError, PermissionError) as error:
            clear_aside(run.folder)
            obstacles[other] = str(error)
            continue
        # As they are there: a key that an older version lacks, and that is null here, would give another digest.
        manifest.begin(name, entry["settings"], reused_from=str(other))
        _take_left_out(run, other)
        _place(run.folder / ASIDE, run.folder)
        clear_aside(run.folder)
        _log_again(run, rows)
        conclude()
        manifest.finish(name, entry["seconds"], stage.outputs(run))
        print(f"{name}: reused from {other}", flush=True)
        return True
    print(f"{name}: not reused: {_reasons(obstacles)}", flush=True)
    return False


def clear_aside(folder: Path) -> None:
    """Remove what was linked into the run's folder and not renamed."""
    shutil.rmtree(folder / ASIDE, ignore_errors=True)


_GOES_ON = "it was begun in this run, and goes on"


def _is_own(entries: Entries, name: str) -> bool:
    """Whether the run itself has begun the stage."""
    return name in entries and "reused_from" not in entries[name]


def _reasons(obstacles: Mapping[Path, str]) -> str:
    return "; ".join(f"{other}: {obstacle}" for other, obstacle in obstacles.items())


def _obstacle(run: Run, stage: Stage, settings: dict[str, Any], other: Path, entries: Entries) -> str:
    """Why the stage of another run cannot be reused; empty if nothing speaks against it but unread checksums."""
    entry = entries.get(run.entry(stage.name))
    if entry is None or entry["status"] != "finished":
        return "the stage is not finished there"
    return (
        _difference(settings, stage.inputs(run), entry["settings"])
        or _damage(run, stage, other, entry)
        or _other_left_out(run, other)
    )


def _difference(settings: dict[str, Any], inputs: dict[str, str], there: dict[str, Any]) -> str:
    """The first difference; one of the stage's own settings says more than one of its inputs."""
    here = json.loads(json.dumps(settings))
    for key in sorted(here.keys() | there.keys(), key=lambda key: (key in inputs, key)):
        if here.get(key) != there.get(key):
            if key in inputs:
                return f"it reads another {inputs[key]} there"
            return f"{key} is {here.get(key)!r:.100} here, {there.get(key)!r:.100} there"
    return ""


def _damage(run: Run, stage: Stage, other: Path, entry: dict[str, Any]) -> str:
    """What is wrong with the outputs of a finished stage of another run, as far as names and sizes say."""
    outputs = entry["outputs"]
    if entry["digest"] != digest_of(entry["settings"], outputs):
        return f"its entry in {other}/manifest.json was changed"
    for name, output in outputs.items():
        file = other / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"{name} in {other}/manifest.json is outside of that folder"
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != output["bytes"]:
            return f"{file} has {file.stat().st_size} bytes, the stage wrote {output['bytes']}"
    whole = Path(os.path.abspath(other))
    there = replace(run, config=replace(run.config, runs_dir=str(whole.parent), name=whole.name))
    found = {str(file.relative_to(whole)) for file in stage.outputs(there) if file.is_file()}
    if not found or found != outputs.keys():
        return f"its entry in {other}/manifest.json does not list its outputs"
    return ""


def _other_left_out(run: Run, other: Path) -> str:
    """Whether questions were left out that this run has not left out (`data.on_bad_reference=drop`)."""
    for file in sorted((other / LEFT_OUT).glob("*.json")):
        own = run.folder / LEFT_OUT / file.name
        if own.exists() and own.read_bytes() != file.read_bytes():
            return f"{file} leaves out other questions than {own}"
    return ""


def _take_left_out(run: Run, other: Path) -> None:
    for file in sorted((other / LEFT_OUT).glob("*.json")):
        own = run.folder / LEFT_OUT / file.name
        if not own.exists():
            make_folder(own.parent)
            with atomic_write(own) as temporary:
                temporary.write_bytes(file.read_bytes())


def _link_aside(run: Run, name: str, other: Path, outputs: dict[str, Any]) -> None:
    """Link or copy a stage's outputs into the folder aside, at their places, and compare them with their checksums.

    Raises:
        ValueError: naming what is damaged.
        FileNotFoundError: for a file that has gone meanwhile.
        PermissionError: for one that may not be read.
    """
    aside = run.folder / ASIDE
    clear_aside(run.folder)
    files = [other / output for output in outputs]
    files += [file for sums in files if sums.name == CHECKSUMS for file in read_checksums(sums.parent)]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{missing[0]} is missing")
    num_bytes = sum(file.stat().st_size for file in files)
    with ProgressLine(f"{name}: copy") as line:
        advance = in_megabytes(line)
        for file in files:
            target = aside / file.relative_to(other)
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(file, target, lambda done: advance(done, num_bytes))
    try:
        for file, problem in differing_files(aside, outputs):
            raise ValueError(f"{file} {problem}")
    except ValueError as error:
        raise ValueError(str(error).replace(str(aside), str(other))) from error
    for folder, _, _ in os.walk(aside, topdown=False):
        sync(Path(folder))


def _link(source: Path, target: Path, copied: Callable[[int], None]) -> None:
    """Hard-link a file; copy it where the file systems differ, have no links or refuse them."""
    source = source.resolve(strict=True)
    try:
        os.link(source, target)
        return
    except FileNotFoundError:
        raise
    except OSError:
        target.unlink(missing_ok=True)
    with source.open("rb") as content, target.open("wb") as copy:
        while block := content.read(_COPY_BYTES):
            stop_if_requested("what was copied from another run is removed, and copied again")
            copy.write(block)
            copied(len(block))
    sync(target)


def _place(source: Path, target: Path) -> None:
    """Rename what is in `source` into `target`: whole folders where they are not there, files and models over old ones.

    A folder that is not there appears with all its files at once, and so does a folder with checksums.
    """
    for path in sorted(source.iterdir()):
        own = target / path.name
        if path.is_dir() and own.is_dir() and not (path / CHECKSUMS).exists():
            _place(path, own)
            continue
        if path.is_dir() and own.is_dir():
            os.rename(own, path.with_name(f"{path.name}.replaced"))
        os.replace(path, own)
    sync(target)


def _rows(run: Run, stage: Stage, other: Path) -> list[dict[str, Any]]:
    """What the stage logged there.

    Raises:
        ValueError: if metrics.jsonl is damaged, or lacks what the stage logged for its round.
    """
    if not stage.logs:
        return []
    if stage.logs == "steps":
        return [row for row in Metrics.read(other) if row["stage"] == run.entry(stage.name)]
    rows = [row for row in Metrics.read(other) if (row["stage"], row["step"]) == (stage.name, run.round_index)]
    if not rows:
        raise ValueError(f"{other}/metrics.jsonl has no row of it")
    return rows


def _log_again(run: Run, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    metrics = Metrics(run.folder, run.config.logging, run.config.name)
    metrics.drop(rows[0]["stage"], {row["step"] for row in rows})
    for row in rows:
        values = {key: value for key, value in row.items() if key not in ("stage", "step", "time")}
        metrics.log(row["stage"], row["step"], values, at=row["time"])
    metrics.close()
