"""What a layer keeps for its backward pass, counted by autograd's own hooks, against what is forecast."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.tiny_models import save_tiny_model

from megavar.config.schema import ParallelConfig, PrecisionConfig, TrainConfig
from megavar.models.config_json import read_dims
from megavar.models.memory import layer_elements, training_bytes
from megavar.packing import PackShape, pack
from megavar.records import TrainSequence
from megavar.sequences import in_memory
from megavar.training import parallel
from megavar.training.forward_backward import configure_gradients, gradient_pass
from megavar.training.model import build_model, transformer_config
from megavar.training.optimizer import wrap_for_gradients

FP32 = PrecisionConfig("fp32")


@pytest.fixture(scope="module")
def dims(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, "qwen3", tied=False)
    return replace(
        read_dims(folder), hidden_size=256, num_heads=8, num_query_groups=2, head_dim=32, ffn_size=768, vocab_size=64
    )


@pytest.fixture
def alone():
    parallel.start_alone()
    yield
    parallel.stop()


def one_pass(dims, is_fused):
    """Elements a token that autograd keeps, parameters aside, and the gradients."""
    config = transformer_config(dims, ParallelConfig(), FP32, "none")
    config.bias_activation_fusion = is_fused
    configure_gradients(config)
    chunks = build_model(config, dims)
    torch.manual_seed(0)
    for parameter in chunks[0].parameters():
        parameter.data.fill_(1.0) if parameter.dim() == 1 else parameter.data.normal_(std=0.05)
    wrapped = wrap_for_gradients(config, chunks, TrainConfig(distributed_optimizer=False))
    own = {parameter.untyped_storage().data_ptr() for parameter in chunks[0].parameters()}
    ids = np.random.default_rng(0).integers(0, dims.vocab_size, (4, 129)).astype(np.int32)
    given = in_memory([TrainSequence(row[:8], row[8:], 1.0) for row in ids])
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    microbatch = pack(given, range(4), PackShape())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        gradient_pass(wrapped, [microbatch], 1.0)
    gradients = {name: parameter.main_grad.clone() for name, parameter in chunks[0].named_parameters()}
    return sum(kept.values()) / 4 / len(microbatch.token_ids), gradients


def test_a_layer_keeps_what_is_forecast_and_what_plain_pytorch_adds(alone, dims):
    two, three = (one_pass(replace(dims, num_layers=number), True)[0] for number in (2, 3))
    query, kv = 256, 64
    # These layers keep normalised copies beside the norms' inputs and outputs, the split projection, a second copy of
    # the attention's output, and sines and cosines twice; Transformer Engine's keep none of these.
    plain = (2 * 256 + query + kv) + query + query + 4 * dims.head_dim
    assert three - two == pytest.approx(layer_elements(dims, ParallelConfig()) + plain, rel=0.005)


@pytest.mark.parametrize("num_experts", [0, 4])
def test_the_fused_activation_gives_the_same_gradients(alone, dims, num_experts):
    model = replace(dims, num_layers=1, num_experts=num_experts, experts_per_token=2 if num_experts else 0)
    plain, fused = (one_pass(model, is_fused)[1] for is_fused in (False, True))
    for name, gradient in plain.items():
        assert (fused[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_memory_is_divided_over_the_grid(dims):
    """By hand: what each kind of parallelism divides, and what recomputing saves."""
    count = 10**9
    train = TrainConfig(microbatch_tokens=8192)

    def held(train=train, ranks=1, **layout):
        return training_bytes(dims, count, ParallelConfig(**layout), train, 2, ranks)

    one = held()
    a_layer = layer_elements(dims, ParallelConfig())
    assert one["activations"] == 2 * 8192 * (dims.num_layers * a_layer + 5 * 256)
    assert held(TrainConfig(microbatch_tokens=8192, recompute="full"))["activations"] == pytest.approx(
        2 * 8192 * (dims.num_layers * 256 + a_layer + 5 * 256)
    )
    # Two pipeline ranks: half of the layers, of two microbatches.
    assert held(pipeline=2, ranks=2)["activations"] == 2 * 8192 * (dims.num_layers * a_layer + 256)
    assert layer_elements(dims, ParallelConfig(tensor=2)) == a_layer / 2
    assert layer_elements(dims, ParallelConfig(tensor=2, sequence=False)) == a_layer / 2 + 2 * 256
    assert held(ranks=4)["optimizer"] == one["optimizer"] / 4
    assert one["optimizer"] == 12 * count and one["gradients"] == 4 * count and one["weights"] == 2 * count
