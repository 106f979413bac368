"""Microbatches of one fixed length: what they are, what they ask of Megatron, and that they change no result."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.engine_cases import run_cases
from helpers.ranks import run_ranks
from helpers.tiny_models import random_sequences, save_tiny_model
from safetensors.torch import load_file

from megavar.config.schema import ParallelConfig, PrecisionConfig, RunConfig, TrainConfig, validate
from megavar.models.config_json import read_dims
from megavar.packing import PackShape, pack
from megavar.records import TrainSequence
from megavar.sequences import in_memory
from megavar.training import loop, parallel
from megavar.training.forward_backward import pack_shape
from megavar.training.model import transformer_config
from megavar.training.tensor_overlap import check_tensor_overlap

SEQUENCES = random_sequences(12)
TRAIN = {
    "num_steps": 3,
    "batch_sequences": 4,
    "microbatch_tokens": 61,
    "learning_rate": 3e-3,
    "save_interval": 3,
    "adam_eps": 1e-4,  # padded products are summed in another order: 1e-8 makes a step of it where gradients are near 0
}
GRIDS = {
    "dp4": {},
    "tp2_pp2": {"tensor": 2, "pipeline": 2},
    "cp2_pp2": {"context": 2, "pipeline": 2},
    "pp2_vpp2_dp2": {"pipeline": 2, "virtual_pipeline": 2},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trainings on each grid, with and without a fixed length."""
    root = tmp_path_factory.mktemp("models")
    save_tiny_model(root / "model", "qwen3", tied=False)
    cases = []
    for name, grid in GRIDS.items():
        for length in ("free", "fixed"):
            train = {**TRAIN, "pack_length": length}
            case = {"kind": "train", "grid": grid, "model": str(root / "model"), "train": train}
            cases.append({**case, "out": str(root / f"{length}-{name}")})
    run_ranks(4, run_cases, cases, SEQUENCES)
    return root


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


@pytest.mark.parametrize("grid", GRIDS)
def test_a_fixed_length_changes_no_step(trained, grid):
    """61 tokens are no multiple of what these grids need; pipeline ranks no longer tell each other the shape."""
    free, fixed = trained / f"free-{grid}", trained / f"fixed-{grid}"
    for name in ("losses.json", "norms.json"):
        expected = json.loads((free / name).read_text())
        assert json.loads((fixed / name).read_text()) == pytest.approx(expected, rel=2e-6)
    expected, found = tensors(free / "hf"), tensors(fixed / "hf")
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert (found[key] - tensor).abs().max() <= 1e-6, key


@pytest.mark.parametrize(
    ("shape", "total"),
    [
        (PackShape(least_tokens=61), 61),
        (PackShape(total_multiple=16, least_tokens=61), 64),
        (PackShape(context_parallel=2, total_multiple=2, least_tokens=61), 64),
        (PackShape(context_parallel=2, total_multiple=64, least_tokens=65), 128),
    ],
)
@pytest.mark.parametrize("lengths", [[], [2], [62], [20, 20, 20], [33, 27]])
def test_every_microbatch_has_the_same_length_and_its_padding_no_target(shape, total, lengths):
    sequences = [
        TrainSequence(np.array([1], np.int32), np.arange(1, length, dtype=np.int32), 1.0) for length in lengths
    ]
    packed = [pack(sequences, range(len(lengths)), shape, rank) for rank in range(shape.context_parallel)]
    assert {len(part.token_ids) * shape.context_parallel for part in packed} == {total}
    assert sum(packed[0].segment_lengths) == total
    assert sum(len(part.targets) for part in packed) == sum(length - 1 for length in lengths)


def test_the_share_of_padding_is_that_of_all_microbatches():
    parallel.start_alone()
    sequences = [TrainSequence(np.ones(1, np.int32), np.ones(length - 1, np.int32), 1.0) for length in (31, 21, 11)]
    for fixed_tokens, expected in ((0, 0.0), (40, 1 - 60 / 80)):
        shape = pack_shape(ParallelConfig(), PrecisionConfig("fp32"), fixed_tokens)
        microbatches, share = loop.own_microbatches(in_memory(sequences), range(3), 40, ParallelConfig(), shape)
        parallel_tokens = sum(len(microbatch.token_ids) for microbatch in microbatches)
        assert share == pytest.approx(expected) == pytest.approx(1 - 60 / parallel_tokens)
    parallel.stop()


def test_the_configuration_of_a_fixed_length_and_of_tensor_overlap(trained):
    dims, layout = read_dims(trained / "model"), ParallelConfig(tensor=2)
    free = transformer_config(dims, layout, PrecisionConfig("bf16"), "none")
    assert free.variable_seq_lengths and not free.tp_comm_overlap
    train = TrainConfig(pack_length="fixed", overlap_tensor_parallel=True)
    config = transformer_config(
        dims, layout, PrecisionConfig("bf16"), "none", train.fixed_tokens, train.overlap_tensor_parallel
    )
    assert not config.variable_seq_lengths and config.tp_comm_overlap and config.sequence_parallel
    # The methods of each product are Megatron's and Transformer Engine's own.
    assert config.tp_comm_overlap_ag and config.tp_comm_overlap_rs and not config.tp_comm_overlap_rs_dgrad
    assert config.tp_comm_bulk_dgrad and config.tp_comm_bulk_wgrad


@pytest.mark.parametrize(
    ("layout", "recipe", "length", "message"),
    [
        ({"tensor": 2}, "bf16", "free", r"needs buffers of one size, but policy\.train\.pack_length=free; use fixed"),
        ({}, "bf16", "fixed", r"needs tensor-parallel ranks, but parallel\.tensor=1; use 2 or more"),
        (
            {"tensor": 2, "sequence": False},
            "bf16",
            "fixed",
            r"needs sequence parallelism, but parallel\.sequence=False",
        ),
        ({"tensor": 2}, "fp32", "fixed", r"needs a precision .* but precision\.recipe=fp32; use bf16"),
        ({"tensor": 2}, "fp8_blockwise", "fixed", r"needs a precision .* but precision\.recipe=fp8_blockwise"),
    ],
)
def test_tensor_overlap_is_refused_where_it_cannot_work(layout, recipe, length, message):
    config = RunConfig(name="a", model="m", parallel=ParallelConfig(**layout), precision=PrecisionConfig(recipe))
    config.data.train = "q.jsonl"
    config.policy.train = TrainConfig(pack_length=length, overlap_tensor_parallel=True)
    with pytest.raises(ValueError, match=rf"^policy\.train\.overlap_tensor_parallel=true {message}"):
        validate(config)


def test_moments_in_bf16_are_refused_where_megatron_keeps_them_in_float32():
    config = RunConfig(name="a", model="m", sft=TrainConfig(optimizer_moments="bf16", optimizer_offload=0.5))
    config.data.train = "q.jsonl"
    with pytest.raises(
        ValueError, match=r"^sft\.optimizer_moments=bf16 has no effect with sft\.optimizer_offload=0\.5"
    ):
        validate(config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_tensor_overlap_is_refused_without_a_gpu():
    with pytest.raises(ValueError, match=r"^sft\.overlap_tensor_parallel=true needs a CUDA GPU and Transformer Engine"):
        check_tensor_overlap("sft.overlap_tensor_parallel", 2)
