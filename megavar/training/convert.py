"""Weights between a Hugging Face folder and the model chunks of this grid, through the family's operators.

Reading: every rank takes its shards, a tensor at a time. Writing: each pipeline stage gathers its tensors
over its tensor-parallel ranks, one at a time, and writes them as one safetensors file of the folder.
"""

import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from safetensors.torch import save_file
from torch import Tensor

from megavar.models import operators
from megavar.models.dims import ModelDims
from megavar.models.folder import INDEX, SINGLE, HuggingFaceFolder, copy_side_files, sync_folder
from megavar.models.ops import Operator
from megavar.training.parallel import barrier, is_rank_zero

# Transformer Engine keeps a norm inside the linear layer that follows it; local layers keep it apart.
_LOCAL_NORMS = {
    ".input_layernorm.weight": ".self_attention.linear_qkv.layer_norm_weight",
    ".pre_mlp_layernorm.weight": ".mlp.linear_fc1.layer_norm_weight",
}


def load_weights(chunks: list[torch.nn.Module], folder: Path, dims: ModelDims) -> None:
    """Fill the chunks' parameters from a Hugging Face folder; every parameter must have its source.

    Raises:
        ValueError: naming file and tensor, if the folder does not hold this model.
    """
    source = HuggingFaceFolder(folder)
    source.check(operators(dims), dims)
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    by_name = {operator.megatron_name: operator for operator in operators(dims)}
    for chunk in chunks:
        for name, layer, parameter in _parameters(chunk):
            if name == "output_layer.weight" and dims.tied_embeddings:
                name = "embedding.word_embeddings.weight"  # the last stage's copy of a tied table
            operator = by_name[name]
            tensors = [source.tensor(hf_name.format(layer=layer)) for hf_name in operator.hf_names]
            shard = operator.shard(tensors, dims, rank, size)
            assert shard.shape == parameter.shape, f"{name}: {tuple(shard.shape)} for {tuple(parameter.shape)}"
            whole = shard.untyped_storage().nbytes() == shard.nbytes
            if whole and shard.dtype == parameter.dtype and parameter.device.type == "cpu":
                parameter.data = shard  # no second copy of the model on the way in
            else:
                parameter.data.copy_(shard)


def export_weights(chunks: list[torch.nn.Module], dims: ModelDims, source: Path, target: Path) -> None:
    """Write the model as a Hugging Face folder, with the config and tokenizer files of `source`; all ranks call it.

    The folder is written aside and renamed: `target` is complete or absent. An existing one is replaced.
    """
    aside = target.with_name(f".{target.name}.tmp")
    if is_rank_zero():
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    barrier()
    stage, stages = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0:
        tensors = _gather(chunks, dims)
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            file = SINGLE if stages == 1 else f"model-{stage + 1:05d}-of-{stages:05d}.safetensors"
            save_file(tensors, aside / file, metadata={"format": "pt"})
    barrier()
    if is_rank_zero():
        _finish_folder(aside, dims, source, next(chunks[0].parameters()).dtype)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(aside, target)
    barrier()


def _finish_folder(aside: Path, dims: ModelDims, source: Path, dtype: torch.dtype) -> None:
    """Side files, index and checks of a folder whose weights are written."""
    copy_side_files(source, aside, str(dtype).removeprefix("torch."))
    files = sorted(file.name for file in aside.glob("*.safetensors"))
    if len(files) > 1:
        placed = {key: file for file in files for key in _keys(aside / file)}
        total = sum(os.path.getsize(aside / file) for file in files)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
        (aside / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    HuggingFaceFolder(aside).check(operators(dims), dims)
    sync_folder(aside)


def _keys(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as handle:
        return list(handle.keys())


def _gather(chunks: list[torch.nn.Module], dims: ModelDims) -> dict[str, Tensor]:
    """Hugging Face tensors of this pipeline stage, on the CPU of its first tensor-parallel rank."""
    by_name: dict[str, Operator] = {operator.megatron_name: operator for operator in operators(dims)}
    group = parallel_state.get_tensor_model_parallel_group()
    found: dict[str, Tensor] = {}
    for chunk in chunks:
        for name, layer, parameter in _parameters(chunk):
            if name == "output_layer.weight" and dims.tied_embeddings:
                continue
            shards = [torch.empty_like(parameter) for _ in range(group.size())]
            dist.all_gather(shards, parameter.detach().contiguous(), group=group)
            if group.rank() == 0:
                tensors = by_name[name].unshard([shard.cpu() for shard in shards], dims)
                names = [hf_name.format(layer=layer) for hf_name in by_name[name].hf_names]
                found |= {key: tensor.contiguous() for key, tensor in zip(names, tensors, strict=True)}
    return found


def _parameters(chunk: torch.nn.Module) -> list[tuple[str, int, Tensor]]:
    """(operator's name, global layer or -1, parameter) of each parameter, the same order on every rank."""
    module = unwrap_model(chunk)
    numbers = [layer.layer_number - 1 for layer in module.decoder.layers]
    found = []
    for name, parameter in module.named_parameters():
        layer = -1
        if name.startswith("decoder.layers."):
            local, rest = name.removeprefix("decoder.layers.").split(".", 1)
            layer, name = numbers[int(local)], "decoder.layers.{layer}." + rest
            for ending, fused in _LOCAL_NORMS.items():
                name = name.replace(ending, fused)
        found.append((name, layer, parameter))
    return found
