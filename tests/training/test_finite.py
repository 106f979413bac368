"""A loss or gradient that is not finite stops training before a weight changes."""

import math
from dataclasses import replace

import pytest
import torch
from helpers.tiny_models import random_sequences, save_tiny_model

from megavar.checkpoints.convert import Model
from megavar.config.schema import ParallelConfig, PrecisionConfig, TrainConfig
from megavar.sequences import in_memory
from megavar.training import parallel
from megavar.training.forward_backward import configure_gradients
from megavar.training.load_weights import load_weights
from megavar.training.loop import train_model
from megavar.training.model import build_model, transformer_config
from megavar.training.optimizer import build_optimizer, wrap_for_gradients

FP32 = PrecisionConfig(recipe="fp32")


@pytest.fixture
def folder(tmp_path):
    save_tiny_model(tmp_path / "model", "qwen3", tied=False)
    parallel.start_alone()
    yield tmp_path
    parallel.stop()


def test_a_loss_that_is_not_finite_is_no_step(folder):
    sequences = [replace(random_sequences(1)[0], weight=math.nan)]
    steps = []
    with pytest.raises(FloatingPointError, match=r"step 1: the loss is nan; the weights were not updated"):
        train_model(
            folder / "model", in_memory(sequences), TrainConfig(num_steps=2, loss_normalizer=1.0), ParallelConfig(),
            FP32, 1,
            folder / "checkpoints", lambda step, *_: steps.append(step),
        )  # fmt: skip
    assert steps == [] and not list((folder / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("distributed_optimizer", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_no_weight(folder, value, distributed_optimizer):
    model, train = Model(folder / "model"), TrainConfig(distributed_optimizer=distributed_optimizer)
    config = transformer_config(model.dims, ParallelConfig(), FP32, "none")
    configure_gradients(config)
    chunks = build_model(config, model.dims)
    load_weights(chunks, model)
    chunks = wrap_for_gradients(config, chunks, train)
    optimizer, scheduler = build_optimizer(chunks, train, False, 2)
    scheduler.step(1)
    before = [parameter.detach().clone() for parameter in chunks[0].parameters()]
    for parameter in chunks[0].parameters():
        parameter.main_grad.fill_(0.1)
    parameter.main_grad.view(-1)[0] = value
    with pytest.raises(FloatingPointError, match=r"the gradient norm is (nan|inf); the weights were not updated"):
        optimizer.step()
    assert all(torch.equal(old, new) for old, new in zip(before, chunks[0].parameters(), strict=True))
    parameter.main_grad.fill_(0.1)
    optimizer.step()
    assert not any(torch.equal(old, new) for old, new in zip(before, chunks[0].parameters(), strict=True))
