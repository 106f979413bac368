"""Converts and compares models: Hugging Face folders and Megatron checkpoints.

Both directions use the same list of operators. Tensors stream through memory: the next piece (one layer's or expert's
slice of a Megatron parameter, `models/ops.py`) is read while the previous one is hashed and written, and no more than
two are held. Output goes to a temporary folder that is renamed when complete. CPU only, one process.
"""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import torch
from torch import Tensor

from megavar.checkpoints.huggingface import (
    TIED_HEAD,
    HuggingFaceFolder,
    HuggingFaceWriter,
    TensorInfo,
    atomic_folder,
    bytes_of,
    copy_side_files,
    name_end_token,
)
from megavar.checkpoints.megatron import (
    SIDE_FILES,
    WEIGHTS_SUFFIX,
    Description,
    ShardedCheckpoint,
    ShardedWriter,
    find_checkpoint,
)
from megavar.checksums import check_checksums, check_files, read_checksums, write_checksums
from megavar.models import operators
from megavar.models.config_json import read_dims
from megavar.models.ops import Index, Operator, names_at, pieces

Progress = Callable[[int, int], None]
"""Called with (bytes done since the last call, total bytes)."""
FINITE_CHECK_CHUNK = 2**18
"""Values checked for NaN at a time; small enough for the CPU cache."""
BLAKE3 = "blake3:"
"""Prefix of a digest, which names its hash; without one it is SHA-256."""
MAX_SHARD_BYTES = 5 * 10**9
"""Default shard size of a Hugging Face folder."""


@dataclass(frozen=True)
class ConversionResult:
    """Summary of a conversion."""

    digest: str
    """`Digest` of the source tensors under their Hugging Face names; models with equal digests are bit-identical."""
    num_bytes: int
    """Bytes of tensors written."""
    nonfinite: dict[str, int]
    """Tensor name -> number of NaN or infinite values; only tensors that have any."""
    same_as_source: bool
    """Megatron to Hugging Face: whether the tensors are bit-identical to those the checkpoint was converted from."""


class Model:
    """Reads a model's tensors, by Hugging Face or Megatron name, from a Hugging Face folder or a Megatron checkpoint.

    Opening validates the names, shapes and file sizes of all tensors without reading them.

    Args:
        path: a Hugging Face folder, or a Megatron checkpoint.
        template: Hugging Face folder with the configuration and tokenizer of a Megatron checkpoint that has no
            `huggingface/` folder.

    Raises:
        ValueError: naming the file and tensor that is missing, damaged, unknown or inconsistent with the configuration.
    """

    def __init__(self, path: Path, template: Path | None = None) -> None:
        if not path.is_dir():
            raise ValueError(f"{path} is not a folder; give a Hugging Face folder or a Megatron checkpoint.")
        checkpoint = find_checkpoint(path)
        if checkpoint is None and not (path / "config.json").is_file():
            raise ValueError(
                f"{path} is neither a Hugging Face folder (no config.json) nor a Megatron checkpoint (no .metadata)."
            )
        self.path = path if checkpoint is None else checkpoint
        self.side_files = self.path if checkpoint is None else template or self.path / SIDE_FILES
        if checkpoint is not None and not self.side_files.is_dir():
            raise ValueError(
                f"{path} has no {SIDE_FILES}/ folder with its configuration and tokenizer; pass a Hugging Face folder "
                "of the same architecture as --hf-template."
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
        """Total size of all tensors."""
        return sum(info.num_bytes for item in self.pieces() for _, info in self.infos(*item))

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model; a tied output layer counts once."""
        return sum(torch.Size(info.shape).numel() for item in self.pieces() for _, info in self.infos(*item))

    @property
    def is_megatron(self) -> bool:
        """Whether the source is a Megatron checkpoint."""
        return isinstance(self._source, ShardedCheckpoint)

    def pieces(self) -> Iterator[tuple[Operator, Index]]:
        """All pieces of the model, each once, in the order of `models.ops.pieces`."""
        return pieces(self.operators, self.dims)

    def infos(self, operator: Operator, index: Index) -> list[tuple[str, TensorInfo]]:
        """Name, dtype and shape of the Hugging Face tensors of a piece, without reading them."""
        names, shapes = names_at(operator, index), operator.hf_shapes(self.dims)
        if isinstance(self._source, HuggingFaceFolder):
            return [(name, self._source.info(name)) for name in names]
        dtype = self._source.info(operator.megatron_name).dtype
        return [(name, TensorInfo(dtype, shape)) for name, shape in zip(names, shapes, strict=True)]

    def tensors(self, operator: Operator, index: Index) -> list[Tensor]:
        """Read the Hugging Face tensors of a piece: in the source's dtype, on the CPU."""
        if isinstance(self._source, HuggingFaceFolder):
            return self._source.tensors(names_at(operator, index))
        return operator.split(self._source.piece(operator, index, self.dims), self.dims)

    def piece(self, operator: Operator, index: Index) -> Tensor:
        """Read a piece of a Megatron parameter, full size (not split over ranks): in the source's dtype, on the CPU."""
        if isinstance(self._source, ShardedCheckpoint):
            return self._source.piece(operator, index, self.dims)
        return operator.merge(self.tensors(operator, index), self.dims)

    def check_tied_head(self) -> None:
        """Check that an `lm_head.weight` in a folder with tied embeddings equals the embedding.

        Raises:
            ValueError: if they differ.
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
) -> ConversionResult:
    """Convert a Hugging Face folder into a Megatron checkpoint.

    Args:
        source: Hugging Face folder.
        target: checkpoint folder to create.
        dtype: cast all tensors to this; None keeps the dtype of each.
        overwrite: replace an existing model or checkpoint at `target`.

    Raises:
        ValueError: if `Model` rejects the source, `atomic_folder` the target, or (dtype None) one Megatron parameter
            would mix dtypes. No partial output is left.
    """
    model = _open_source(source, None, target, megatron=False)
    model.check_tied_head()
    if dtype is None:
        _check_dtypes(model)
    num_bytes = sum(_cast(info, dtype).num_bytes for item in model.pieces() for _, info in model.infos(*item))
    with atomic_folder(target, overwrite, num_bytes) as partial, Digest() as digest:
        writer = ShardedWriter(partial, model.dims)
        for (operator, index), tensors in _read_ahead(model):
            digest.add(names_at(operator, index), tensors)
            piece = operator.merge(tensors, model.dims)
            writer.write(operator, index, piece, dtype or piece.dtype)
            progress(piece.numel() * (dtype or piece.dtype).itemsize, num_bytes)
        writer.finish()
        (partial / SIDE_FILES).mkdir()
        copy_side_files(model.side_files, partial / SIDE_FILES, dtype)
        Description(model.tied_head_written, digest.hexdigest()).write(partial)
        write_checksums(partial, writer.digest_of)
    return ConversionResult(digest.hexdigest(), num_bytes, digest.nonfinite, same_as_source=False)


def to_hugging_face(
    source: Path,
    target: Path,
    template: Path | None,
    max_shard_bytes: int,
    overwrite: bool,
    progress: Progress = lambda *_: None,
    end_token: int | None = None,
) -> ConversionResult:
    """Convert a Megatron checkpoint into a Hugging Face folder that transformers and SGLang can load.

    Args:
        source: Megatron checkpoint.
        target: folder to create.
        template: see `Model`.
        max_shard_bytes: maximum size of a safetensors file, unless one tensor is larger.
        overwrite: replace an existing model or checkpoint at `target`.
        end_token: of a trained model, for its configuration (`name_end_token`); None: as in the source.

    Raises:
        ValueError: see `to_megatron`.
    """
    model = _open_source(source, template, target, megatron=True)
    embedding = model.operators[0]
    tensors_of = [(item, model.infos(*item)) for item in model.pieces()]
    if model.tied_head_written:
        (item, infos), *rest = tensors_of
        tensors_of = [(item, [*infos, (TIED_HEAD, infos[0][1])]), *rest]
    rows = [row for _, infos in tensors_of for row in infos]
    num_bytes = sum(info.num_bytes for _, info in rows)
    with atomic_folder(target, overwrite, num_bytes) as partial, Digest(_source_digest(model)) as digest:
        writer = HuggingFaceWriter(partial, rows, max_shard_bytes)
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
        copy_side_files(model.side_files, partial, dtypes.pop() if len(dtypes) == 1 else None)
        if end_token is not None:
            name_end_token(partial, end_token)
        write_checksums(partial, writer.digest_of)
        same_as_source = digest.hexdigest() == _source_digest(model)
        if _source_digest(model) and not same_as_source:
            check_checksums(model.path)
    return ConversionResult(digest.hexdigest(), num_bytes, digest.nonfinite, same_as_source)


def differences(first: Model, second: Model, progress: Progress = lambda *_: None) -> Iterator[str]:
    """Compare two models; yields one line per differing tensor (missing, dtype, bits).

    If the architectures differ, yields those differences only.

    Raises:
        ValueError: see `Model.check_tied_head`.
    """
    first.check_tied_head()
    second.check_tied_head()
    dims, other_dims = asdict(first.dims), asdict(second.dims)
    unequal = [key for key in dims if dims[key] != other_dims[key]]
    if unequal:
        yield from (f"{key}: {dims[key]} in the first, {other_dims[key]} in the second" for key in unequal)
        return
    if first.tied_head_written != second.tied_head_written:
        yield f"{TIED_HEAD}: only in the {'first' if first.tied_head_written else 'second'}"
    num_bytes = first.num_bytes
    for operator, index in first.pieces():
        pairs = zip(first.infos(operator, index), second.infos(operator, index), strict=True)
        dtypes = [(name, info.dtype, other.dtype) for (name, info), (_, other) in pairs]
        tensors = zip(first.tensors(operator, index), second.tensors(operator, index), strict=True)
        for (name, dtype, other_dtype), (tensor, other_tensor) in zip(dtypes, tensors, strict=True):
            progress(tensor.nbytes, num_bytes)
            if dtype != other_dtype:
                yield f"{name}: {_name(dtype)} in the first, {_name(other_dtype)} in the second"
            elif text := bit_difference(tensor, other_tensor):
                yield f"{name}: {text}"


def bit_difference(first: Tensor, second: Tensor) -> str | None:
    """Describe how two tensors of equal dtype and shape differ bitwise; None if they are equal (so NaN equals NaN)."""
    integers = {2: torch.int16, 4: torch.int32}[first.dtype.itemsize]
    left, right = first.contiguous().view(integers), second.contiguous().view(integers)
    if torch.equal(left, right):
        return None
    differing = (left != right).nonzero()
    index = tuple(differing[0].tolist())
    return (
        f"{len(differing)} of {first.numel()} values differ, first at {list(index)}: {first[index].item()!r} "
        f"in the first, {second[index].item()!r} in the second"
    )


class Digest:
    """Hash over (name, dtype, shape, hash of the bytes) of all tensors, sorted by name; hashes in a thread.

    It identifies the weights, independent of format and sharding. Also counts NaN and infinite values.

    Args:
        compared_with: the digest that this one will be compared with. The hash is BLAKE3, which takes a quarter of
            SHA-256's time; where `compared_with` has no prefix "blake3:", it is SHA-256, as it once was.
    """

    def __init__(self, compared_with: str | None = None) -> None:
        is_sha256 = compared_with is not None and not compared_with.startswith(BLAKE3)
        self._hash: Callable[[Any], Any] = hashlib.sha256 if is_sha256 else blake3.blake3
        self._prefix = "" if is_sha256 else BLAKE3
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None
        self._lines: list[str] = []
        self.nonfinite: dict[str, int] = {}

    def __enter__(self) -> "Digest":
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self._pool.shutdown(cancel_futures=error is not None)

    def add(self, names: list[str], tensors: list[Tensor]) -> None:
        """Add tensors; waits until those of the previous call are hashed, so no more than two pieces are held."""
        if self._last is not None:
            self._last.result()
        self._last = self._pool.submit(self._add, names, tensors)

    def hexdigest(self) -> str:
        """Digest of all tensors added so far."""
        if self._last is not None:
            self._last.result()
        lines = "\n".join(sorted(self._lines)).encode()
        return f"{self._prefix}{self._hash(lines).hexdigest()}"

    def _add(self, names: list[str], tensors: list[Tensor]) -> None:
        for name, tensor in zip(names, tensors, strict=True):
            data = tensor.contiguous().view(-1)
            digest = self._hash(bytes_of(data)).hexdigest()
            self._lines.append(f"{name} {_name(tensor.dtype)} {list(tensor.shape)} {digest}")
            if not all_finite(data):
                self.nonfinite[name] = int((~torch.isfinite(data)).sum())


def all_finite(values: Tensor) -> bool:
    """Whether all values of a contiguous [N] CPU tensor are finite.

    As unsigned bits without the sign, NaN and infinity are the largest values. Faster than torch.isfinite: chunks fit
    the CPU cache.
    """
    bits = values.view({2: torch.int16, 4: torch.int32}[values.dtype.itemsize]).numpy()
    infinite = torch.tensor(torch.inf, dtype=values.dtype).view(torch.int16 if bits.itemsize == 2 else torch.int32)
    no_sign = bits.dtype.type(np.iinfo(bits.dtype).max)
    chunks = (bits[start : start + FINITE_CHECK_CHUNK] for start in range(0, len(bits), FINITE_CHECK_CHUNK))
    unsigned = np.empty(FINITE_CHECK_CHUNK, dtype=bits.dtype)
    return all(
        int(np.bitwise_and(chunk, no_sign, out=unsigned[: len(chunk)]).max()) < infinite.item() for chunk in chunks
    )


def _open_source(source: Path, template: Path | None, target: Path, megatron: bool) -> Model:
    model = Model(source, template)
    checksums = read_checksums(model.path)
    if _source_digest(model):  # it will tell whether the weights are right, without reading them once more for that
        checksums = {file: digest for file, digest in checksums.items() if file.suffix != WEIGHTS_SUFFIX}
    check_files(model.path, checksums)
    for path in (source, model.path, model.side_files):
        if target.resolve() in (path.resolve(), *path.resolve().parents):
            raise ValueError(f"{target} is or contains {path}, which is the source; choose another target.")
    if model.is_megatron != megatron:
        expected = "a Megatron checkpoint" if megatron else "a Hugging Face folder"
        raise ValueError(f"{source} is not {expected}; use the command for the other direction.")
    return model


def _source_digest(model: Model) -> str | None:
    """Digest of the tensors that a Megatron checkpoint was converted from, if it was."""
    return model.description.source_digest if model.description else None


def _check_dtypes(model: Model) -> None:
    """Reject mixed dtypes within one Megatron parameter, which stacks the tensors of all layers and experts."""
    first: dict[str, tuple[str, TensorInfo]] = {}
    for operator, index in model.pieces():
        for name, info in model.infos(operator, index):
            other, known = first.setdefault(operator.megatron_name, (name, info))
            if info.dtype != known.dtype:
                raise ValueError(
                    f"{model.path}: {other} is {_name(known.dtype)} and {name} is {_name(info.dtype)}, but both "
                    "belong to one Megatron parameter; choose --dtype bf16 or fp32."
                )


def _read_ahead(model: Model) -> Iterator[tuple[tuple[Operator, Index], list[Tensor]]]:
    """All pieces with their tensors; a thread reads the next piece while the caller uses the current one."""
    with ThreadPoolExecutor(1) as pool:
        pending: tuple[tuple[Operator, Index], Future[list[Tensor]]] | None = None
        for item in [*model.pieces(), None]:
            upcoming = None if item is None else (item, pool.submit(model.tensors, *item))
            if pending is not None:
                yield pending[0], pending[1].result()
            pending = upcoming


def _cast(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    return TensorInfo(dtype or info.dtype, info.shape)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
