"""What SGLang lacks on a machine without a GPU; `sglang_launcher.py` runs it in each of SGLang's processes.

The PyPI wheels serve on CPU once these gaps are bridged; nothing else is changed, and GPU machines do not use this
file:

1. `sgl_kernel` has no CPU wheel. SGLang imports some of its names; here they exist and raise when called.
2. torchvision from PyPI is built for CUDA: with CPU torch its C++ part does not load, and its Python part wants two
   operator schemas to exist.
3. Seeds of single requests need `--enable-deterministic-inference`, which refuses the `torch_native` attention, wants
   a hash kernel of the missing `sgl_kernel`, and swaps in Triton operators. Bridged only when asked for. Invariance to
   the batch is not preserved: a sample repeats if float32 rounding, which varies with batch size, flips no token.

4. `torch_native` attends one sequence after another, and to a prompt's cached prefix once more: most of the time with
   many short sequences. Here a batch is one call, with a mask.
"""

import importlib
import importlib.abc
import importlib.metadata
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

WRITTEN_FOR = "0.5.23"
SEEDS_FLAG = "--enable-deterministic-inference"
ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",  # sglang/srt/utils/common.py: is_cpu() wants it
    "OMP_NUM_THREADS": "1",  # small models: more threads only spin, and training shares the cores
    "TORCHDYNAMO_DISABLE": "1",  # else the first use of some samplers compiles C++ for a minute
}

_libraries: list[Any] = []  # torch drops an operator when its Library object is collected


def changed(what: str) -> NoReturn:
    """End the process: SGLang is no longer what a bridge was written against."""
    version = importlib.metadata.version("sglang")
    raise SystemExit(
        f"sglang_cpu_bridge.py was written for sglang {WRITTEN_FOR}; in sglang {version} {what}. Install the "
        "versions of requirements/sglang-cpu.lock (`make sglang`) or adapt this bridge."
    )


class MissingKernels(types.ModuleType):
    """Stands for `sgl_kernel`: any name can be imported from it, and raises when it is called."""

    def __getattr__(self, name: str) -> Any:
        """Return a function that raises NotImplementedError."""
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_: Any, **__: Any) -> NoReturn:
            raise NotImplementedError(f"sgl_kernel.{name} has no CPU build in this installation")

        return missing


def operator_library(namespace: str) -> Any:
    """A torch.library.Library that adds operators to a namespace for as long as the process lives."""
    import torch

    library_class: Any = torch.library.Library  # untyped
    _libraries.append(library_class(namespace, "FRAGMENT"))
    return _libraries[-1]


def bridge_kernels() -> None:
    """Gap 1. Nothing to do where a real CPU build of sgl_kernel is installed."""
    if importlib.util.find_spec("sgl_kernel") is None:
        sys.modules["sgl_kernel"] = MissingKernels("sgl_kernel")


def bridge_torchvision() -> None:
    """Gap 2: torchvision/_meta_registrations.py registers meta kernels for operators that did not load."""
    torchvision = operator_library("torchvision")
    for name in ("nms", "qnms"):
        torchvision.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def murmur_hash32(seed: Any, positions: Any, columns: Any) -> Any:
    """MurmurHash3 (32 bit) of (seed low, seed high, position, column).

    The same numbers as the Triton kernel in sglang/kernels/ops/sampling/murmur_hash.py.

    Args:
        seed: [rows] uint64, of each request.
        positions: [rows] integer, of the token to sample.
        columns: [V] integer, vocabulary ids.

    Returns:
        [rows, V] uint32.
    """
    import torch

    mask = 0xFFFFFFFF

    def mix(hashed: Any, block: Any) -> Any:
        # int64 holds every product's low 32 bits right: overflow wraps, and the mask keeps the low ones.
        block = (block * 0xCC9E2D51) & mask
        block = (((block << 15) | (block >> 17)) & mask) * 0x1B873593 & mask
        hashed = hashed ^ block
        hashed = ((hashed << 13) | (hashed >> 19)) & mask
        return (hashed * 5 + 0xE6546B64) & mask

    seed = seed.view(torch.int64)[:, None]
    hashed = mix(torch.zeros_like(seed), seed & mask)
    hashed = mix(hashed, (seed >> 32) & mask)
    hashed = mix(hashed, positions.to(torch.int64)[:, None] & mask)
    hashed = mix(hashed, columns.to(torch.int64)[None, :] & mask)
    hashed = hashed ^ 16  # bytes hashed
    hashed = ((hashed ^ (hashed >> 16)) * 0x85EBCA6B) & mask
    hashed = ((hashed ^ (hashed >> 13)) * 0xC2B2AE35) & mask
    return (hashed ^ (hashed >> 16)).to(torch.uint32)


def bridge_seeds() -> None:
    """Gap 3. Remove the parts one by one as SGLang supports torch_native or ships the hash kernel for CPU."""
    import torch

    choices = importlib.import_module("sglang.srt.arg_groups.choices")
    backends = getattr(choices, "DETERMINISTIC_ATTENTION_BACKEND_CHOICES", None)
    if not isinstance(backends, list):
        changed("arg_groups/choices.py has no list DETERMINISTIC_ATTENTION_BACKEND_CHOICES")
    # On CPU the resolution proposes intel_amx first and turns it into torch_native where the AMX kernels are missing.
    backends.extend(name for name in ("torch_native", "intel_amx") if name not in backends)

    if not hasattr(torch.ops.sgl_kernel, "murmur_hash32_cpu"):
        kernels = operator_library("sgl_kernel")
        kernels.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor")
        kernels.impl("murmur_hash32_cpu", murmur_hash32, "CPU")
    source = importlib.util.find_spec("sglang.kernels.ops.sampling.murmur_hash")
    if source is None or source.origin is None or "murmur_hash32_cpu" not in _read(source.origin):
        changed("kernels/ops/sampling/murmur_hash.py does not call sgl_kernel.murmur_hash32_cpu")

    # model_executor/model_runner.py imports this name when it is called, so replacing it in the package is enough.
    invariant: Any = importlib.import_module("sglang.srt.batch_invariant_ops")
    if not hasattr(invariant, "enable_batch_invariant_mode"):
        changed("batch_invariant_ops has no enable_batch_invariant_mode")
    invariant.enable_batch_invariant_mode = lambda *_, **__: None


MAX_MASK_ELEMENTS = 2**24
"""Beyond this size of a batch's mask (query x key positions) SGLang's own loop attends."""


def batched_attention(
    tensors: Sequence[Any], seq_lens: Any, query_lens: Any, scaling: float | None, enable_gqa: bool
) -> Any:
    """Causal attention of the last `query_lens` tokens of each sequence to all of it, in one call.

    Args:
        tensors: query [tokens, heads, head_dim] of all sequences, one after the other; output, of the same shape;
            k_cache and v_cache [slots, key heads, head_dim]; req_to_token [requests, positions], each token's slot;
            req_pool_indices [sequences], rows of it.
        seq_lens: [sequences] tokens, with the cached ones.
        query_lens: [sequences] tokens without the cached ones.
    """
    import torch

    query, output, k_cache, v_cache, req_to_token, req_pool_indices = tensors
    count, most_keys, most_queries = len(seq_lens), int(seq_lens.max()), int(query_lens.max())
    positions, steps = torch.arange(most_keys), torch.arange(most_queries)
    slots = req_to_token[req_pool_indices, :most_keys].long()
    slots = torch.where(positions < seq_lens[:, None], slots, slots[:, :1])  # any slot with finite values: it is masked
    real = steps < query_lens[:, None]
    padded = query.new_zeros(count, most_queries, *query.shape[1:])
    padded[real] = query
    last_seen = (seq_lens - query_lens)[:, None] + steps  # [sequences, queries]
    mask = (positions <= last_seen[:, :, None])[:, None]

    def gather(cache: Any) -> Any:
        rows = cache.index_select(0, slots.flatten())  # half the time of cache[slots]
        return rows.view(*slots.shape, *cache.shape[1:]).transpose(1, 2).to(query.dtype)

    result = torch.nn.functional.scaled_dot_product_attention(
        padded.transpose(1, 2),
        gather(k_cache),
        gather(v_cache),
        attn_mask=mask,
        scale=scaling,
        enable_gqa=enable_gqa,
    )
    output[:] = result.transpose(1, 2)[real]
    return output


def replace_attention(module: Any) -> None:
    """Gap 4, in sglang/srt/layers/attention/torch_native_backend.py once it is imported."""
    backend = getattr(module, "TorchNativeAttnBackend", None)
    for name in ("_run_sdpa_forward_extend", "_run_sdpa_forward_decode"):
        if not hasattr(backend, name):
            changed(f"layers/attention/torch_native_backend.py has no TorchNativeAttnBackend.{name}")
    backend_class: Any = backend
    extend_one_by_one = backend_class._run_sdpa_forward_extend
    decode_one_by_one = backend_class._run_sdpa_forward_decode

    def is_plain(seq_lens: Any, query_lens: Any, options: dict[str, Any]) -> bool:
        unusual = ("encoder_lens", "is_cross_attn", "sliding_window_size")
        elements = len(seq_lens) * int(seq_lens.max()) * int(query_lens.max())
        return elements <= MAX_MASK_ELEMENTS and all(options.get(name) in (None, False) for name in unusual)

    def extend(self: Any, *tensors: Any, **options: Any) -> Any:
        *shared, seq_lens, _prefix_lens, query_lens, encoder_lens = tensors
        options = {**options, "encoder_lens": encoder_lens}
        if not (options["causal"] and is_plain(seq_lens, query_lens, options)):
            return extend_one_by_one(self, *tensors, **{k: v for k, v in options.items() if k != "encoder_lens"})
        return batched_attention(shared, seq_lens, query_lens, options["scaling"], options["enable_gqa"])

    def decode(self: Any, *tensors: Any, **options: Any) -> Any:
        import torch

        *shared, seq_lens, encoder_lens = tensors
        query_lens = torch.ones_like(seq_lens)
        if not is_plain(seq_lens, query_lens, {**options, "encoder_lens": encoder_lens}):
            return decode_one_by_one(self, *tensors, **options)
        return batched_attention(shared, seq_lens, query_lens, options["scaling"], options["enable_gqa"])

    backend_class._run_sdpa_forward_extend = extend
    backend_class._run_sdpa_forward_decode = decode


def _read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


def bridge(when_imported: Callable[[str, Callable[[Any], None]], importlib.abc.MetaPathFinder]) -> None:
    """Bridge every gap in the calling process, before SGLang is imported.

    Args:
        when_imported: makes the finder that changes a module once it is imported.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import torch

    if torch.version.cuda is not None:
        raise SystemExit(
            f"sglang_cpu_bridge.py needs a CPU build of torch, got {torch.__version__}; a machine without a GPU serves "
            "with the versions of requirements/sglang-cpu.txt (`make sglang`)."
        )
    bridge_kernels()
    bridge_torchvision()
    # Only one of SGLang's processes imports it.
    sys.meta_path.insert(0, when_imported("sglang.srt.layers.attention.torch_native_backend", replace_attention))
    if SEEDS_FLAG in sys.argv:
        bridge_seeds()
