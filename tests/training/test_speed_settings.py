"""Settings of speed and memory: the configuration of Megatron that each makes, and that none changes a result."""

import gc
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.engine_cases import run_cases
from helpers.ranks import run_ranks
from helpers.tiny_models import random_sequences, save_tiny_model
from megatron.core.optimizer import OptimizerConfig
from safetensors.torch import load_file

from megavar.config.schema import ParallelConfig, PrecisionConfig, TrainConfig
from megavar.models.config_json import read_dims
from megavar.sequences import in_memory
from megavar.training import parallel
from megavar.training.loop import GC_INTERVAL_STEPS, train_model
from megavar.training.model import build_model, transformer_config
from megavar.training.optimizer import optimizer_config_arguments, wrap_for_gradients

SEQUENCES = random_sequences(12)
TRAIN = {"num_steps": 5, "batch_sequences": 4, "microbatch_tokens": 48, "learning_rate": 3e-3, "save_interval": 2}
MODELS = ("tied", "untied")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in MODELS:
        save_tiny_model(folder / name, "qwen3", tied=name == "tied", num_hidden_layers=2)
    return folder


@pytest.fixture(scope="module")
def trained(model):
    """Trainings by 2 data-parallel ranks, with and without overlap, and one that was resumed."""
    cases = []
    for name in MODELS:
        common = {"kind": "train", "grid": {}, "model": str(model / name), "bucket_size": 1}
        plain = {**TRAIN, "overlap_communication": False}
        cases.append({**common, "train": plain, "out": str(model / f"plain-{name}")})
        cases.append({**common, "train": TRAIN, "out": str(model / f"overlap-{name}")})
        resumed = {**common, "train": TRAIN, "out": str(model / f"resumed-{name}")}
        cases += [{**resumed, "stop_after": 3}, resumed]
    run_ranks(2, run_cases, cases, SEQUENCES)
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", MODELS)
def test_overlapping_communication_changes_no_weight(trained, name):
    """A bucket for each parameter: one that is used before it is gathered, or reduced too early, shows."""
    plain, overlap, resumed = (trained / f"{how}-{name}" for how in ("plain", "overlap", "resumed"))
    expected = json.loads((plain / "losses.json").read_text())
    assert json.loads((overlap / "losses.json").read_text()) == pytest.approx(expected, rel=1e-6)
    assert json.loads((resumed / "losses.json").read_text()) == pytest.approx(expected[2:], rel=1e-6)
    for other in (overlap, resumed):
        found = tensors(other / "hf")
        for key, tensor in tensors(plain / "hf").items():
            assert (found[key] - tensor).abs().max() <= 1e-6, key


@pytest.fixture
def alone():
    parallel.start_alone()
    yield
    parallel.stop()


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
def test_communication_overlaps_with_the_distributed_optimizer_and_gradients_add_up_in_float32(
    alone, model, sharded, overlap
):
    dims = read_dims(model / "tied")
    config = transformer_config(dims, ParallelConfig(), PrecisionConfig("bf16"), "none")
    train = TrainConfig(distributed_optimizer=sharded, overlap_communication=overlap)
    (wrapped,) = wrap_for_gradients(config, build_model(config, dims), train)
    found = wrapped.ddp_config
    assert found.grad_reduce_in_fp32 and found.use_distributed_optimizer == sharded
    assert found.overlap_grad_reduce == found.overlap_param_gather == (sharded and overlap)
    assert (config.no_sync_func is not None) == (sharded and overlap)


@pytest.mark.parametrize(
    ("tensor", "given", "expected"),
    [(1, None, False), (2, None, True), (2, False, False), (2, True, True)],
)
def test_tokens_are_split_between_layers_with_tensor_parallelism(model, tensor, given, expected):
    layout = ParallelConfig(tensor=tensor, sequence=given)
    config = transformer_config(read_dims(model / "tied"), layout, PrecisionConfig("fp32"), "none")
    assert config.sequence_parallel == expected


def test_gradients_are_added_up_in_the_product_where_the_kernel_is(model, tmp_path, monkeypatch):
    dims = read_dims(model / "tied")
    arguments = (dims, ParallelConfig(), PrecisionConfig("bf16"), "none")
    assert not transformer_config(*arguments).gradient_accumulation_fusion
    (tmp_path / "fused_weight_gradient_mlp_cuda.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert transformer_config(*arguments).gradient_accumulation_fusion


def test_garbage_is_collected_after_the_same_steps_only(alone, model, tmp_path, monkeypatch):
    collections, seen = [0], []
    collect = gc.collect

    def counted(*arguments):
        collections[0] += 1
        return collect(*arguments)

    monkeypatch.setattr(gc, "collect", counted)
    monkeypatch.setattr("megavar.training.loop.GC_INTERVAL_STEPS", 2)
    train = TrainConfig(**{**TRAIN, "save_interval": 5})
    assert gc.isenabled() and GC_INTERVAL_STEPS == 100
    train_model(
        model / "tied", in_memory(SEQUENCES), train, ParallelConfig(), PrecisionConfig("fp32"), 1, tmp_path / "out",
        lambda *_: seen.append((collections[0], gc.isenabled())),
    )  # fmt: skip
    assert seen == [(1, False), (2, False), (2, False), (3, False), (3, False)] and gc.isenabled()


def test_moments_in_bf16_and_offloading_are_megatrons_options():
    plain = OptimizerConfig(**optimizer_config_arguments(TrainConfig(), bf16=True))
    assert not plain.use_precision_aware_optimizer and not plain.optimizer_cpu_offload
    assert plain.exp_avg_dtype == plain.exp_avg_sq_dtype == plain.main_params_dtype == torch.float32
    # No OptimizerConfig of the first: it looks for Transformer Engine's AdamW.
    moments = optimizer_config_arguments(TrainConfig(optimizer_moments="bf16"), bf16=True)
    assert moments["use_precision_aware_optimizer"] and not moments["store_param_remainders"]
    assert moments["exp_avg_dtype"] == moments["exp_avg_sq_dtype"] == torch.bfloat16
    offload = OptimizerConfig(**optimizer_config_arguments(replace(TrainConfig(), optimizer_offload=0.5), bf16=True))
    assert offload.optimizer_cpu_offload and offload.optimizer_offload_fraction == 0.5
