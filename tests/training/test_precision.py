"""What each precision makes of Megatron's TransformerConfig, and what it asks of the machine."""

import os
import subprocess
import sys

import pytest
import torch
from helpers.tiny_models import save_tiny_model

from megavar.config.schema import ParallelConfig, PrecisionConfig, RunConfig, ScoreConfig
from megavar.models.config_json import read_dims
from megavar.training.forward_backward import pack_shape
from megavar.training.model import transformer_config
from megavar.training.precision import RECIPES, check_recipe, transformer_config_arguments
from megavar.training.scorer import Scorer

FIRST_AND_LAST_LAYER = {
    "first_last_layers_bf16": True,
    "num_layers_at_start_in_bf16": 1,
    "num_layers_at_end_in_bf16": 1,
}
# NVIDIA's recipes of these names: Megatron-Bridge, training/mixed_precision.py.
EXPECTED = {
    "fp8_delayed": {"fp8": "hybrid", "fp8_recipe": "delayed", "fp8_margin": 0, "fp8_amax_history_len": 1024,
                    "fp8_amax_compute_algo": "max", "first_last_layers_bf16": False},
    "fp8_current": {"fp8": "hybrid", "fp8_recipe": "tensorwise", **FIRST_AND_LAST_LAYER},
    "fp8_blockwise": {"fp8": "hybrid", "fp8_recipe": "blockwise", "first_last_layers_bf16": False},
    "mxfp8": {"fp8": "e4m3", "fp8_recipe": "mxfp8", "first_last_layers_bf16": False},
    "bf16": {"fp8": None, "first_last_layers_bf16": False},
    "fp32": {"fp8": None, "first_last_layers_bf16": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def dims(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, "qwen3", tied=False)
    return read_dims(folder)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_configuration_has_the_values_of_nvidias_recipe_of_that_name(dims, recipe):
    config = transformer_config(dims, ParallelConfig(), PrecisionConfig(recipe), "none")
    assert {name: getattr(config, name) for name in EXPECTED[recipe]} == EXPECTED[recipe]
    assert (config.bf16, config.params_dtype) == (
        (False, torch.float32) if recipe == "fp32" else (True, torch.bfloat16)
    )
    assert not config.fp8_param and config.fp8_wgrad and not config.fp8_dot_product_attention


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("num_experts", [0, 8])
def test_the_router_pads_where_experts_multiply_in_fp8(recipe, num_experts):
    # Not a TransformerConfig: that one refuses FP8 with experts where Transformer Engine is not installed.
    arguments = transformer_config_arguments(PrecisionConfig(recipe), num_experts)
    assert arguments["moe_router_padding_for_quantization"] == ("fp8" in recipe and num_experts > 0)


def test_float32_block_scales_are_asked_for_before_transformer_engine_is_imported():
    code = "import sys, os, megavar.training; print(os.environ['NVTE_FP8_BLOCK_SCALING_FP32_SCALES'])"
    code += "; assert 'transformer_engine' not in sys.modules"
    given = {name: value for name, value in os.environ.items() if not name.startswith("NVTE_")}
    for setting, expected in (({}, "1"), ({"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "0"}, "0")):
        run = subprocess.run(
            [sys.executable, "-c", code], env=given | setting, capture_output=True, text=True, check=True
        )
        assert run.stdout.strip() == expected


@pytest.mark.parametrize(
    ("recipe", "tokens"), [("bf16", 4), ("fp8_current", 64), ("fp8_blockwise", 512), ("mxfp8", 128)]
)
def test_packs_are_padded_so_that_every_ranks_rows_divide(recipe, tokens):
    layout = ParallelConfig(tensor=2, context=2, sequence=True)
    assert pack_shape(layout, PrecisionConfig(recipe)).total_multiple == tokens


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_that_this_machine_lacks_is_refused_in_one_line(recipe):
    if not RECIPES[recipe].values:
        check_recipe("score.precision", recipe)
        return
    with pytest.raises(
        ValueError, match=rf"^score\.precision={recipe} needs a CUDA GPU .* use score\.precision=bf16\.$"
    ):
        check_recipe("score.precision", recipe)


def test_scoring_refuses_delayed_scales():
    with pytest.raises(AssertionError, match="delayed scales stay 1"):
        Scorer(None, ParallelConfig(), PrecisionConfig("fp8_delayed"))


@pytest.mark.parametrize(
    ("training", "scoring", "expected"),
    [
        ("bf16", "auto", "bf16"),
        ("fp32", "auto", "fp32"),
        ("fp8_delayed", "auto", "bf16"),
        ("mxfp8", "auto", "bf16"),
        ("fp8_current", "fp8_current", "fp8_current"),
        ("bf16", "fp32", "fp32"),
    ],
)
def test_scores_do_not_take_the_rounding_of_training(training, scoring, expected):
    config = RunConfig(precision=PrecisionConfig(training), score=ScoreConfig(precision=scoring))
    assert config.score_recipe == expected
