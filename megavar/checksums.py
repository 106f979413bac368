"""SHA-256 of files, and `SHA256SUMS` of folders: what was written can be told from what is there now.

`SHA256SUMS` is in every checkpoint and model folder that this package writes, in the format of sha256sum, so that
`sha256sum -c SHA256SUMS` checks a copy. Folders from elsewhere need none.
"""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

CHECKSUMS = "SHA256SUMS"
MAX_THREADS = 16
MAX_FILE_NAME = 255


def file_digest(file: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits; read again only if the file has changed."""
    state = file.stat()
    return _digest(file.resolve(), state.st_ino, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=4096)
def _digest(file: Path, _inode: int, _modified: int, _size: int) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def file_digests(files: Iterable[Path]) -> list[str]:
    """SHA-256 of several files, in threads: hashing releases the interpreter lock."""
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(file_digest, files))


def files_in(folder: Path) -> list[Path]:
    """All files of a folder and its subfolders but `SHA256SUMS`, in order of their names."""
    return sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / CHECKSUMS)


def write_checksums(folder: Path, digest_of: dict[Path, str] | None = None) -> None:
    """Write `SHA256SUMS` of a folder's files.

    Args:
        digest_of: digests that are known already; the other files are read.
    """
    known = digest_of or {}
    unread = [file for file in files_in(folder) if file not in known]
    known = known | dict(zip(unread, file_digests(unread), strict=True))
    lines = [f"{known[file]}  {file.relative_to(folder).as_posix()}\n" for file in files_in(folder)]
    (folder / CHECKSUMS).write_text("".join(lines))


def read_checksums(folder: Path) -> dict[Path, str]:
    """File -> SHA-256 as `SHA256SUMS` says; empty for a folder that has none.

    Raises:
        ValueError: if it is not in the format of sha256sum, or names a file outside of the folder.
    """
    source = folder / CHECKSUMS
    if not source.is_file():
        return {}
    found = {}
    for number, line in enumerate(source.read_text(errors="replace").splitlines(), start=1):
        digest, separator, name = line.partition("  ")
        parts = Path(name).parts
        is_inside = (
            parts and not Path(name).is_absolute() and ".." not in parts and max(map(len, parts)) <= MAX_FILE_NAME
        )
        if len(digest) != 64 or not separator or not is_inside or "\0" in name:
            raise ValueError(
                f"{source}, line {number}: expected a SHA-256, two spaces and a file name, got {line!r:.100}."
            )
        found[folder / name] = digest
    return found


def check_files(folder: Path, digest_of: dict[Path, str]) -> None:
    """Compare files of a folder with their checksums.

    Raises:
        ValueError: naming the first that is missing or differs.
    """
    missing = [file for file in digest_of if not file.is_file()]
    if not missing:
        found = zip(digest_of, file_digests(digest_of), strict=True)
        missing = [file for file, digest in found if digest != digest_of[file]]
    if missing:
        state = "has another checksum" if missing[0].is_file() else "is missing"
        raise ValueError(
            f"{missing[0]} {state}: {folder} is not what {CHECKSUMS} in it says ({len(missing)} files); it was changed "
            f"or damaged; copy or make it again, or remove {folder / CHECKSUMS} if you changed it yourself "
            "(docs/troubleshooting.md#damaged-files)."
        )


def check_checksums(folder: Path) -> None:
    """Check a folder against its `SHA256SUMS`, if it has one; see `check_files`."""
    check_files(folder, read_checksums(folder))
