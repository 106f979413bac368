"""Sequence sets on disk: rank 0 writes one, and every rank maps it and reads what its own microbatches hold.

The folder holds Megatron's IndexedDataset (`texts.bin`, `texts.idx`: one sequence a text), one array for each
field of `SequenceSet`, and `made_from.json`: what the set was made from, and the checksums of its files.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from numpy.typing import NDArray

from megavar.checksums import file_digests
from megavar.disk import atomic_write, make_folder, sync
from megavar.ranks import ExplainedFailure, on_rank_zero
from megavar.records import TrainSequence
from megavar.sequences import SequenceSet, TextNumbers

FIELDS = ("parts", "weights", "num_tokens", "num_targets")
LATE_SECONDS = 120.0
"""How long a rank waits for what rank 0 wrote, where its node sees that late."""
_DESCRIPTION = "made_from.json"
_TEXTS_AT_ONCE = 256

Make = Callable[[], Iterable[Sequence[TrainSequence]]]


def shared_sequences(folder: Path, made_from: str, make: Make) -> SequenceSet:
    """The set in `folder`, which rank 0 writes unless it is there; every rank calls it.

    Args:
        made_from: identifies all that the sequences depend on; a set of anything else, and a damaged one, is replaced.
        make: yields the sequences some at a time; called on rank 0, if at all.
    """

    def write() -> None:
        problem = _problem(folder, made_from)
        if problem is not None:
            if folder.exists():
                print(f"{folder} {problem}; it is written again.", flush=True)
            write_sequences(folder, made_from, make())

    on_rank_zero(write)
    waited_until = time.monotonic() + LATE_SECONDS
    while (problem := _size_problem(folder, made_from)) is not None:
        if time.monotonic() > waited_until:
            raise ExplainedFailure(
                f"{folder} {problem}, {LATE_SECONDS:.0f} s after rank 0 wrote it; runs_dir must be a folder that all "
                "nodes share."
            )
        time.sleep(1.0)
    return open_sequences(folder)


def write_sequences(folder: Path, made_from: str, sequences: Iterable[Sequence[TrainSequence]]) -> None:
    """Write a set, aside and renamed; an existing one is replaced.

    Raises:
        ValueError: if there is no sequence.
        ExplainedFailure: if it cannot be written.
    """
    make_folder(folder.parent)
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    aside.mkdir()
    try:
        _write(aside, sequences)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise ExplainedFailure(
            f"{folder} could not be written: {error.strerror or error}; the same command writes it again."
        ) from error
    files = sorted(aside.iterdir())
    digests = dict(zip((file.name for file in files), file_digests(files), strict=True))
    sizes = {file.name: file.stat().st_size for file in files}
    with atomic_write(aside / _DESCRIPTION) as temporary:
        temporary.write_text(json.dumps({"made_from": made_from, "bytes": sizes, "sha256": digests}, indent=2) + "\n")
    for path in (*files, aside):
        sync(path)
    os.replace(aside, folder)
    sync(folder.parent)


def _write(folder: Path, sequences: Iterable[Sequence[TrainSequence]]) -> None:
    builder, numbers = IndexedDatasetBuilder(str(folder / "texts.bin"), np.int32), TextNumbers()
    columns: dict[str, list[NDArray[Any]]] = {name: [] for name in FIELDS}
    for some in sequences:
        texts, parts = numbers.add(some)
        if not len(parts):
            continue
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            few = texts[start : start + _TEXTS_AT_ONCE]
            builder.add_document(np.concatenate(few), list(map(len, few)))
        prompts = np.array([len(sequence.prompt_ids) for sequence in some], np.int32)
        columns["parts"].append(parts)
        columns["weights"].append(np.array([sequence.weight for sequence in some], np.float64))
        columns["num_tokens"].append(np.array([sequence.num_tokens for sequence in some], np.int32))
        columns["num_targets"].append(columns["num_tokens"][-1] - prompts)
    builder.finalize(str(folder / "texts.idx"))
    if not columns["parts"]:
        raise ValueError("no sequence to train on or to score.")
    for name, arrays in columns.items():
        np.save(folder / f"{name}.npy", np.concatenate(arrays))


def write_documents(folder: Path, sequences: Iterable[TrainSequence]) -> int:
    """Write sequences for Megatron-LM: `traces.bin` and `traces.idx`, one document a sequence, its prompt first.

    Beside them [documents] arrays: `prompt_lengths.npy` (int32, tokens without loss) and `weights.npy` (float64).

    Returns:
        The number of sequences.
    """
    builder = IndexedDatasetBuilder(str(folder / "traces.bin"), np.int32)
    prompt_lengths, weights = [], []
    for sequence in sequences:
        builder.add_document(np.concatenate([sequence.prompt_ids, sequence.target_ids]), [sequence.num_tokens])
        prompt_lengths.append(len(sequence.prompt_ids))
        weights.append(sequence.weight)
    builder.finalize(str(folder / "traces.idx"))
    np.save(folder / "prompt_lengths.npy", np.array(prompt_lengths, np.int32))
    np.save(folder / "weights.npy", np.array(weights, np.float64))
    return len(weights)


def open_sequences(folder: Path) -> SequenceSet:
    """Map a set that `write_sequences` wrote."""
    texts = IndexedDataset(str(folder / "texts"))
    return SequenceSet(texts, *(np.load(folder / f"{name}.npy", mmap_mode="r") for name in FIELDS))


def _problem(folder: Path, made_from: str) -> str | None:
    """Why the set cannot be used; None if it can."""
    problem = _size_problem(folder, made_from)
    if problem is not None:
        return problem
    kept = json.loads((folder / _DESCRIPTION).read_text())
    files = [folder / name for name in kept["sha256"]]
    for file, digest in zip(files, file_digests(files), strict=True):
        if digest != kept["sha256"][file.name]:
            return f"is damaged: {file.name} has another checksum than what was written"
    return None


def _size_problem(folder: Path, made_from: str) -> str | None:
    """As `_problem`, without reading the files."""
    try:
        kept = json.loads((folder / _DESCRIPTION).read_text())
        sizes = {str(name): int(size) for name, size in kept["bytes"].items()}
        names = {"texts.bin", "texts.idx", *(f"{name}.npy" for name in FIELDS)}
        if sizes.keys() != names or kept["sha256"].keys() != names:
            return f"is damaged: {_DESCRIPTION} lists other files"
        if kept["made_from"] != made_from:
            return "was made from other data"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"is incomplete ({type(error).__name__}: {_DESCRIPTION})"
    for name, size in sizes.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            return f"is damaged: {name} has {found} bytes, {size} were written"
    return None
