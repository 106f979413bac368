"""Conversion of whole models between Hugging Face folders and Megatron checkpoints, a piece at a time, and comparison.

Both directions run over the same list of operators. A piece is read while the one before it is hashed and written, and
nothing but these two is in memory. What is written stays aside until it is complete.
"""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megavar.checkpoints.huggingface import (
    TIED_HEAD,
    HuggingFaceFolder,
    HuggingFaceWriter,
    TensorInfo,
    bytes_of,
    copy_side_files,
    new_folder,
)
from megavar.checkpoints.megatron import SIDE_FILES, Description, ShardedCheckpoint, ShardedWriter, find_checkpoint
from megavar.models import operators
from megavar.models.config_json import read_dims
from megavar.models.ops import Index, Operator, names_at, pieces

Progress = Callable[[int, int], None]
"""Called with (bytes since the last call, bytes in all)."""
FINITE_PART = 2**18
MAX_SHARD_BYTES = 5 * 10**9
"""The usual size of a Hugging Face folder's files."""


@dataclass(frozen=True)
class Converted:
    """What a conversion found and made."""

    digest: str
    """Of the tensors read, under their Hugging Face names; models of equal digests are equal bit by bit."""
    num_bytes: int
    """Written."""
    nonfinite: dict[str, int]
    """How many values are NaN or infinite, for each tensor that has any."""
    same_as_source: bool
    """On the way back: whether the tensors are those that the checkpoint was once converted from."""


class Model:
    """A model's tensors under their Hugging Face names, whether they lie in such a folder or in a Megatron checkpoint.

    Args:
        path: either kind of folder.
        template: Hugging Face folder whose configuration and tokenizer a Megatron checkpoint goes with; needed only if
            the checkpoint has no `huggingface/`.

    Raises:
        ValueError: naming file and tensor, if anything is missing, damaged, unknown or contradicts the configuration.
    """

    def __init__(self, path: Path, template: Path | None = None) -> None:
        if not path.is_dir():
            raise ValueError(f"{path} is no folder; give a Hugging Face folder or a Megatron checkpoint.")
        checkpoint = find_checkpoint(path)
        if checkpoint is None and not (path / "config.json").is_file():
            raise ValueError(
                f"{path} is neither a Hugging Face folder (no config.json) nor a checkpoint (no .metadata)."
            )
        self.path = path if checkpoint is None else checkpoint
        self.side_files = self.path if checkpoint is None else template or self.path / SIDE_FILES
        if checkpoint is not None and not self.side_files.is_dir():
            raise ValueError(
                f"{path} says nothing of its configuration (there is no {SIDE_FILES}/ in it); give a Hugging Face "
                "folder of the same sizes, with its tokenizer, as --hf-template."
            )
        self.dims = read_dims(self.side_files)
        self.operators = operators(self.dims)
        self._source = HuggingFaceFolder(path) if checkpoint is None else ShardedCheckpoint(path)
        self._source.check(self.operators, self.dims)
        self.description = None if checkpoint is None else Description.read(self.path)
        if isinstance(self._source, HuggingFaceFolder):
            self.tied_head_written = self.dims.tied_embeddings and TIED_HEAD in self._source.names()
        else:
            self.tied_head_written = self.description is not None and self.description.tied_head_written

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(info.num_bytes for item in self.pieces() for _, info in self.infos(*item))

    @property
    def is_megatron(self) -> bool:
        """Whether the tensors lie in a Megatron checkpoint."""
        return isinstance(self._source, ShardedCheckpoint)

    def pieces(self) -> Iterator[tuple[Operator, Index]]:
        """Every piece once."""
        return pieces(self.operators, self.dims)

    def infos(self, operator: Operator, index: Index) -> list[tuple[str, TensorInfo]]:
        """Name, dtype and shape of a piece's Hugging Face tensors."""
        names, shapes = names_at(operator, index), operator.hf_shapes(self.dims)
        if isinstance(self._source, HuggingFaceFolder):
            return [(name, self._source.info(name)) for name in names]
        dtype = self._source.info(operator.megatron_name).dtype
        return [(name, TensorInfo(dtype, shape)) for name, shape in zip(names, shapes, strict=True)]

    def tensors(self, operator: Operator, index: Index) -> list[Tensor]:
        """A piece's Hugging Face tensors."""
        if isinstance(self._source, HuggingFaceFolder):
            return [self._source.tensor(name) for name in names_at(operator, index)]
        return operator.split(self._source.piece(operator, index, self.dims), self.dims)

    def piece(self, operator: Operator, index: Index) -> Tensor:
        """A piece of a Megatron parameter."""
        if isinstance(self._source, ShardedCheckpoint):
            return self._source.piece(operator, index, self.dims)
        return operator.merge(self.tensors(operator, index), self.dims)

    def check_tied_head(self) -> None:
        """Check that a copy of the tied embedding is one.

        Raises:
            ValueError: if it differs.
        """
        if not self.tied_head_written or not isinstance(self._source, HuggingFaceFolder):
            return
        if not self._source.same_bytes("model.embed_tokens.weight", TIED_HEAD):
            raise ValueError(
                f"{self.path}: config.json says tie_word_embeddings=true, but {TIED_HEAD} differs from "
                "model.embed_tokens.weight; set it to false, or remove the tensor."
            )


def to_megatron(
    source: Path, target: Path, dtype: torch.dtype | None, overwrite: bool, progress: Progress = lambda *_: None
) -> Converted:
    """Convert a Hugging Face folder into a Megatron checkpoint.

    Args:
        dtype: of the written tensors; None keeps each one's own.

    Raises:
        ValueError: for a source that `Model` refuses, or a target that `new_folder` refuses; nothing is then left.
    """
    model = _open_source(source, None, target, megatron=False)
    model.check_tied_head()
    if dtype is None:
        _check_dtypes(model)
    num_bytes = sum(_cast(info, dtype).num_bytes for item in model.pieces() for _, info in model.infos(*item))
    with new_folder(target, overwrite, num_bytes) as aside, Digest() as digest:
        writer = ShardedWriter(aside, model.dims)
        for (operator, index), tensors in _read_ahead(model):
            digest.add(names_at(operator, index), tensors)
            piece = operator.merge(tensors, model.dims)
            writer.write(operator, index, piece, dtype or piece.dtype)
            progress(piece.numel() * (dtype or piece.dtype).itemsize, num_bytes)
        writer.finish()
        (aside / SIDE_FILES).mkdir()
        copy_side_files(model.side_files, aside / SIDE_FILES, dtype)
        Description(model.tied_head_written, digest.hexdigest()).write(aside)
    return Converted(digest.hexdigest(), num_bytes, digest.nonfinite, same_as_source=False)


def to_hugging_face(
    source: Path,
    target: Path,
    template: Path | None,
    max_shard_bytes: int,
    overwrite: bool,
    progress: Progress = lambda *_: None,
) -> Converted:
    """Convert a Megatron checkpoint into a Hugging Face folder that transformers and SGLang load.

    Args:
        template: as for `Model`.

    Raises:
        ValueError: as `to_megatron`.
    """
    model = _open_source(source, template, target, megatron=True)
    embedding = model.operators[0]
    tensors_of = [(item, model.infos(*item)) for item in model.pieces()]
    if model.tied_head_written:
        (item, infos), *rest = tensors_of
        tensors_of = [(item, [*infos, (TIED_HEAD, infos[0][1])]), *rest]
    rows = [row for _, infos in tensors_of for row in infos]
    num_bytes = sum(info.num_bytes for _, info in rows)
    with new_folder(target, overwrite, num_bytes) as aside, Digest() as digest:
        writer = HuggingFaceWriter(aside, rows, max_shard_bytes)
        for (operator, index), tensors in _read_ahead(model):
            names = names_at(operator, index)
            digest.add(names, tensors)
            if operator == embedding and model.tied_head_written:
                names, tensors = [*names, TIED_HEAD], tensors * 2
            for name, tensor in zip(names, tensors, strict=True):
                writer.write(name, tensor)
                progress(tensor.nbytes, num_bytes)
        writer.finish()
        dtypes = {info.dtype for _, info in rows}
        copy_side_files(model.side_files, aside, dtypes.pop() if len(dtypes) == 1 else None)
    known = model.description.source_digest if model.description else None
    return Converted(digest.hexdigest(), num_bytes, digest.nonfinite, known == digest.hexdigest())


def differences(first: Model, second: Model, progress: Progress = lambda *_: None) -> Iterator[str]:
    """What two models differ in, one text for each tensor: presence, dtype, bits. Sizes come first, and alone.

    Raises:
        ValueError: if a copy of a tied embedding is none.
    """
    first.check_tied_head()
    second.check_tied_head()
    sizes, others = asdict(first.dims), asdict(second.dims)
    unlike = [
        f"{key}: {sizes[key]} in the first, {others[key]} in the second" for key in sizes if sizes[key] != others[key]
    ]
    if unlike:
        yield from unlike
        return
    if first.tied_head_written != second.tied_head_written:
        yield f"{TIED_HEAD}: only in the {'first' if first.tied_head_written else 'second'}"
    num_bytes = first.num_bytes
    for operator, index in first.pieces():
        pairs = zip(first.infos(operator, index), second.infos(operator, index), strict=True)
        found = [(name, info.dtype, other.dtype) for (name, info), (_, other) in pairs]
        tensors = zip(first.tensors(operator, index), second.tensors(operator, index), strict=True)
        for (name, dtype, other_dtype), (tensor, other_tensor) in zip(found, tensors, strict=True):
            progress(tensor.nbytes, num_bytes)
            if dtype != other_dtype:
                yield f"{name}: {_name(dtype)} in the first, {_name(other_dtype)} in the second"
            elif text := bit_difference(tensor, other_tensor):
                yield f"{name}: {text}"


def bit_difference(first: Tensor, second: Tensor) -> str | None:
    """How two tensors of one dtype and shape differ in bits, or None if they do not; a NaN equals itself."""
    integers = {2: torch.int16, 4: torch.int32}[first.dtype.itemsize]
    left, right = first.contiguous().view(integers), second.contiguous().view(integers)
    if torch.equal(left, right):
        return None
    places = (left != right).nonzero()
    place = tuple(places[0].tolist())
    return (
        f"{len(places)} of {first.numel()} values differ, first at {list(place)}: {first[place].item()!r} "
        f"in the first, {second[place].item()!r} in the second"
    )


class Digest:
    """SHA-256 over (name, dtype, shape, SHA-256 of the bytes) of tensors in the order of their names, in a thread.

    The digest is that of the model, whatever files its tensors lie in. It also counts values that are not finite.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None
        self._lines: list[str] = []
        self.nonfinite: dict[str, int] = {}

    def __enter__(self) -> "Digest":
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self._pool.shutdown(cancel_futures=error is not None)

    def add(self, names: list[str], tensors: list[Tensor]) -> None:
        """Take tensors; waits for those of the call before, so that no more than two are held."""
        if self._last is not None:
            self._last.result()
        self._last = self._pool.submit(self._add, names, tensors)

    def hexdigest(self) -> str:
        """The digest of everything added."""
        if self._last is not None:
            self._last.result()
        return hashlib.sha256("\n".join(sorted(self._lines)).encode()).hexdigest()

    def _add(self, names: list[str], tensors: list[Tensor]) -> None:
        for name, tensor in zip(names, tensors, strict=True):
            data = tensor.contiguous().view(-1)
            digest = hashlib.sha256(bytes_of(data)).hexdigest()
            self._lines.append(f"{name} {_name(tensor.dtype)} {list(tensor.shape)} {digest}")
            if not all_finite(data):
                self.nonfinite[name] = int((~torch.isfinite(data)).sum())


def all_finite(values: Tensor) -> bool:
    """Whether no value of a contiguous [N] tensor is NaN or infinite: those have the largest bits but for the sign.

    A part at a time, which stays in the processor's cache.
    """
    bits = values.view({2: torch.int16, 4: torch.int32}[values.dtype.itemsize]).numpy()
    infinite = torch.tensor(torch.inf, dtype=values.dtype).view(torch.int16 if bits.itemsize == 2 else torch.int32)
    no_sign = bits.dtype.type(np.iinfo(bits.dtype).max)
    parts = (bits[start : start + FINITE_PART] for start in range(0, len(bits), FINITE_PART))
    return all(int((part & no_sign).max()) < infinite.item() for part in parts)


def _open_source(source: Path, template: Path | None, target: Path, megatron: bool) -> Model:
    model = Model(source, template)
    for place in (source, model.path, model.side_files):
        if target.resolve() in (place.resolve(), *place.resolve().parents):
            raise ValueError(f"{target} is or contains {place}, which is read from; choose another target.")
    if model.is_megatron != megatron:
        wanted = "a Megatron checkpoint" if megatron else "a Hugging Face folder"
        raise ValueError(f"{source} is not {wanted}, which this direction converts from.")
    return model


def _check_dtypes(model: Model) -> None:
    """Refuse tensors of several dtypes where Megatron has one parameter: that of all layers and experts."""
    first: dict[str, tuple[str, TensorInfo]] = {}
    for operator, index in model.pieces():
        for name, info in model.infos(operator, index):
            other, known = first.setdefault(operator.megatron_name, (name, info))
            if info.dtype != known.dtype:
                raise ValueError(
                    f"{model.path}: {other} is {_name(known.dtype)} and {name} is {_name(info.dtype)}, but both are "
                    "parts of one Megatron parameter; choose --dtype bf16 or fp32."
                )


def _read_ahead(model: Model) -> Iterator[tuple[tuple[Operator, Index], list[Tensor]]]:
    """A model's pieces with their tensors, the next one being read meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        pending: tuple[tuple[Operator, Index], Future[list[Tensor]]] | None = None
        for item in [*model.pieces(), None]:
            following = None if item is None else (item, pool.submit(model.tensors, *item))
            if pending is not None:
                yield pending[0], pending[1].result()
            pending = following


def _cast(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    return TensorInfo(dtype or info.dtype, info.shape)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
