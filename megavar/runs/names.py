"""Names of folders and files of which several may be called the same."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many of the folders before it as tell it from the others: `a-hf`, `b-hf`.

    Raises:
        ValueError: naming two paths that are one.
    """
    parts = [Path(os.path.abspath(path)).parts[1:] or ("root",) for path in paths]
    lengths = [1] * len(paths)
    while True:
        names = ["-".join(some[-length:]) for some, length in zip(parts, lengths, strict=True)]
        count_of = Counter(names)
        shared = [index for index, name in enumerate(names) if count_of[name] > 1]
        if not shared:
            return names
        longer = [index for index in shared if lengths[index] < len(parts[index])]
        if not longer:
            twice = [str(paths[index]) for index in shared if names[index] == names[shared[0]]]
            raise ValueError(f"{' and '.join(twice)} cannot be told apart; give each once.")
        for index in longer:
            lengths[index] += 1


def suite_names(files: Sequence[str]) -> list[str]:
    """Names of question files: without suffix, `aime24` for `data/aime24.jsonl`.

    Raises:
        ValueError: naming two files that are one, or differ in their suffix only.
    """
    return distinct_names([Path(file).with_suffix("") for file in files])
