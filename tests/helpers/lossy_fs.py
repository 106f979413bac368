"""A file system that remembers what a power cut would leave: Linux's FUSE protocol, spoken on /dev/fuse.

`mounted` serves one from memory, in a process of its own, and records the operations that change it. `Disk` replays
them, up to any of them, and says what could then be on the disk if the power went: the worst that POSIX allows. Bytes
of a file last once the file is fsynced, entries of a folder once the folder is; of the rest, each folder keeps the
first few changes and each file any of its blocks, independently of one another. (ext4, XFS and Btrfs keep more: they
order changes over all folders.) A rename is one change. There are no links, and no renames from folder to folder.
"""

import ctypes
import errno
import os
import pickle
import select
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from random import Random
from typing import Any

ROOT = 1
BLOCK_BYTES = 4096
MAX_WRITE_BYTES = 2**17
Operation = tuple[Any, ...]
"""Name and arguments of a method of `Disk`."""
Image = dict[str, bytes | None]
"""Path -> content of a file; None: a folder."""


@dataclass
class Node:
    """A file or folder; `synced_*` is what lasts."""

    mode: int
    data: bytearray = field(default_factory=bytearray)
    synced_data: bytes = b""
    entries: dict[str, int] = field(default_factory=dict)
    synced_entries: dict[str, int] = field(default_factory=dict)
    changes: list[dict[str, int | None]] = field(default_factory=list)
    """Of the entries since they were synced; None: removed."""


class Disk:
    """The state of the file system after some operations; a node's number is never used again."""

    def __init__(self, operations: list[Operation] = []) -> None:  # noqa: B006 (never changed)
        self.nodes = {ROOT: Node(stat.S_IFDIR | 0o755)}
        for operation in operations:
            self.apply(operation)

    def apply(self, operation: Operation) -> None:
        """Apply one operation."""
        name, *arguments = operation
        getattr(self, name)(*arguments)

    def create(self, folder: int, name: str, mode: int) -> None:
        """Create a file or a folder."""
        self.nodes[len(self.nodes) + 1] = Node(mode)
        self._change(folder, {name: len(self.nodes)})

    def remove(self, folder: int, name: str) -> None:
        """Remove a file or an empty folder."""
        self._change(folder, {name: None})

    def rename(self, folder: int, old: str, new: str) -> None:
        """Rename an entry of a folder; one under the new name is replaced."""
        self._change(folder, {old: None, new: self.nodes[folder].entries[old]})

    def write(self, file: int, offset: int, data: bytes) -> None:
        """Write bytes; a gap before them is zeros."""
        content = self.nodes[file].data
        content.extend(bytes(max(0, offset - len(content))))
        content[offset : offset + len(data)] = data

    def truncate(self, file: int, size: int) -> None:
        """Cut or extend a file to a size."""
        content = self.nodes[file].data
        content[:] = content[:size].ljust(size, b"\0")

    def sync(self, node: int) -> None:
        """The bytes of a file, or the entries of a folder, last from now on."""
        item = self.nodes[node]
        item.synced_data, item.synced_entries, item.changes = bytes(item.data), dict(item.entries), []

    def after_power_cut(self, keeps_names: float, keeps_data: float, random: Random) -> Image:
        """What is there after a power cut.

        Args:
            keeps_names: probability that a folder's next change is kept, if all before it are.
            keeps_data: probability that an unsynced block or size of a file is kept.
        """
        image: Image = {}
        folders = [("", self.nodes[ROOT])]
        for path, folder in folders:
            entries: dict[str, int | None] = dict(folder.synced_entries)
            for change in takewhile(lambda _: random.random() < keeps_names, folder.changes):
                entries |= change
            for name, number in entries.items():
                if number is None:
                    continue
                node = self.nodes[number]
                if stat.S_ISDIR(node.mode):
                    image[path + name] = None
                    folders.append((f"{path}{name}/", node))
                else:
                    image[path + name] = _torn(node, keeps_data, random)
        return image

    def _change(self, folder: int, change: dict[str, int | None]) -> None:
        node = self.nodes[folder]
        node.changes.append(change)
        node.entries = {name: item for name, item in (node.entries | change).items() if item is not None}


def _torn(file: Node, keeps_data: float, random: Random) -> bytes:
    size = len(file.data) if random.random() < keeps_data else len(file.synced_data)
    content = bytearray(file.synced_data[:size].ljust(size, b"\0"))
    for start in range(0, size, BLOCK_BYTES):
        if random.random() < keeps_data:
            block = file.data[start : min(start + BLOCK_BYTES, size)]
            content[start : start + len(block)] = block
    return bytes(content)


def write_image(image: Image, folder: Path) -> None:
    """Write what `Disk.after_power_cut` gave into an empty folder of a real file system."""
    for path, content in image.items():
        (folder / path).mkdir() if content is None else (folder / path).write_bytes(content)


class LossyFileSystem:
    """A mounted file system.

    Args:
        folder: where it is mounted.
    """

    def __init__(self, folder: Path, server: subprocess.Popen[bytes]) -> None:
        self.folder, self._server = folder, server

    def operations(self) -> list[Operation]:
        """All operations so far."""
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(b"\n")
        self._server.stdin.flush()
        operations: list[Operation] = pickle.load(self._server.stdout)
        return operations


@contextmanager
def mounted(folder: Path) -> Iterator[LossyFileSystem]:
    """An empty file system, mounted at an empty folder while the context lasts.

    Raises:
        OSError: if it cannot be mounted: it takes Linux, /dev/fuse and root.
    """
    server = subprocess.Popen([sys.executable, __file__, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdin is not None and server.stdout is not None
    error = int(server.stdout.readline())
    try:
        if error:
            raise OSError(error, os.strerror(error), str(folder))
        yield LossyFileSystem(folder, server)
    finally:
        server.communicate()


class _Server:
    """Answers the kernel's requests; structures and numbers are those of linux/fuse.h, version 7.31."""

    def __init__(self, device: int) -> None:
        self.device, self.disk = device, Disk()
        self.operations: list[Operation] = []
        self._answers = {
            **{1: self._lookup, 3: self._getattr, 4: self._setattr, 9: self._mkdir, 10: self._unlink},
            **{11: self._rmdir, 12: self._rename, 14: self._open, 15: self._read, 16: self._write},
            **{17: self._statfs, 18: self._nothing, 20: self._fsync, 25: self._nothing, 26: self._init},
            **{27: self._open, 28: self._readdir, 29: self._nothing, 30: self._fsync, 35: self._create},
        }

    def answer(self) -> bool:
        """Answer the next request; False once the file system is unmounted."""
        try:
            request = os.read(self.device, MAX_WRITE_BYTES + 2**14)
        except OSError as error:
            return error.errno in (errno.ENOENT, errno.EINTR)  # ENOENT: the request was interrupted
        code, number, node = struct.unpack_from("<4xIQQ", request)
        if code in (2, 36, 42):  # FORGET, INTERRUPT, BATCH_FORGET have no reply
            return True
        try:
            reply, error_number = self._answers.get(code, self._unknown)(node, request[40:]), 0
        except OSError as error:
            reply, error_number = b"", error.errno or errno.EIO
        os.write(self.device, struct.pack("<IiQ", 16 + len(reply), -error_number, number) + reply)
        return True

    def _apply(self, *operation: Any) -> None:
        self.disk.apply(operation)
        self.operations.append(operation)

    def _child(self, folder: int, name: str) -> int:
        try:
            return self.disk.nodes[folder].entries[name]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, name) from None

    def _attributes(self, number: int) -> bytes:
        node = self.disk.nodes[number]
        return struct.pack(
            "<QQ32x12xIIIIIII", number, len(node.data), node.mode, 1, os.getuid(), os.getgid(), 0, 4096, 0
        )

    def _entry(self, number: int) -> bytes:
        return struct.pack("<QQQQII", number, 0, 0, 0, 0, 0) + self._attributes(number)

    def _unknown(self, node: int, body: bytes) -> bytes:
        raise OSError(errno.ENOSYS, "unknown request")

    def _nothing(self, node: int, body: bytes) -> bytes:
        return b""

    def _init(self, node: int, body: bytes) -> bytes:
        _, _, readahead, flags = struct.unpack_from("<IIII", body)
        big_writes = 1 << 5
        return struct.pack("<IIIIHHII32x", 7, 31, readahead, flags & big_writes, 12, 9, MAX_WRITE_BYTES, 1)

    def _lookup(self, node: int, body: bytes) -> bytes:
        return self._entry(self._child(node, _names(body)[0]))

    def _getattr(self, node: int, body: bytes) -> bytes:
        return bytes(16) + self._attributes(node)

    def _setattr(self, node: int, body: bytes) -> bytes:
        valid, size = struct.unpack_from("<I4x8xQ", body)
        if valid & 1 << 3:
            self._apply("truncate", node, size)
        return self._getattr(node, body)

    def _mkdir(self, node: int, body: bytes) -> bytes:
        return self._made(node, _names(body[8:])[0], stat.S_IFDIR | 0o755)

    def _create(self, node: int, body: bytes) -> bytes:
        return self._made(node, _names(body[16:])[0], stat.S_IFREG | 0o644) + self._open(node, body)

    def _made(self, folder: int, name: str, mode: int) -> bytes:
        self._apply("create", folder, name, mode)
        return self._entry(self._child(folder, name))

    def _unlink(self, node: int, body: bytes) -> bytes:
        self._apply("remove", node, _names(body)[0])
        return b""

    def _rmdir(self, node: int, body: bytes) -> bytes:
        (name,) = _names(body)
        self._check_empty(self._child(node, name))
        return self._unlink(node, body)

    def _rename(self, node: int, body: bytes) -> bytes:
        if struct.unpack_from("<Q", body) != (node,):
            raise OSError(errno.EXDEV, "another folder")
        old, new = _names(body[8:])
        if new in self.disk.nodes[node].entries:
            self._check_empty(self._child(node, new))
        self._apply("rename", node, old, new)
        return b""

    def _check_empty(self, number: int) -> None:
        if self.disk.nodes[number].entries:
            raise OSError(errno.ENOTEMPTY, "not empty")

    def _open(self, node: int, body: bytes) -> bytes:
        return bytes(16)

    def _read(self, node: int, body: bytes) -> bytes:
        offset, size = struct.unpack_from("<8xQI", body)
        return bytes(self.disk.nodes[node].data[offset : offset + size])

    def _write(self, node: int, body: bytes) -> bytes:
        offset, size = struct.unpack_from("<8xQI", body)
        self._apply("write", node, offset, body[40 : 40 + size])
        return struct.pack("<II", size, 0)

    def _fsync(self, node: int, body: bytes) -> bytes:
        self._apply("sync", node)
        return b""

    def _statfs(self, node: int, body: bytes) -> bytes:
        return struct.pack("<QQQQQIIII24x", *[2**20] * 5, BLOCK_BYTES, 255, BLOCK_BYTES, 0)

    def _readdir(self, node: int, body: bytes) -> bytes:
        offset, size = struct.unpack_from("<8xQI", body)
        reply = b""
        for place, (name, number) in enumerate(self.disk.nodes[node].entries.items(), start=1):
            kind = self.disk.nodes[number].mode >> 12
            entry = struct.pack("<QQII", number, place, len(name.encode()), kind) + name.encode()
            entry += bytes(-len(entry) % 8)
            if place > offset:
                if len(reply) + len(entry) > size:
                    break
                reply += entry
        return reply


def _names(body: bytes) -> list[str]:
    return [name.decode() for name in body.split(b"\0")[:-1]]


def _serve(folder: str) -> None:
    """Mount, print 0 or the error's number, and serve until the standard input ends; each line asks for operations."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        device = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={device},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
        if libc.mount(b"lossy", os.fsencode(folder), b"fuse", 0, options.encode()):
            raise OSError(ctypes.get_errno(), "mount")
    except OSError as error:
        print(error.errno, flush=True)
        return
    print(0, flush=True)
    server = _Server(device)
    try:
        while True:
            ready, _, _ = select.select([device, 0], [], [])
            if device in ready and not server.answer():
                return
            if 0 in ready and device not in ready:
                if not os.read(0, 1):
                    return
                sys.stdout.buffer.write(pickle.dumps(server.operations))
                sys.stdout.flush()
    finally:
        libc.umount2(os.fsencode(folder), 2)  # MNT_DETACH


if __name__ == "__main__":
    _serve(sys.argv[1])
