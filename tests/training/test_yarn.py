"""Models whose RoPE is scaled by YaRN against transformers, at positions far beyond the original length."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from helpers.engine_cases import run_cases
from helpers.ranks import run_ranks
from helpers.tiny_models import random_sequences, reference_gradients, reference_logps, save_tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megavar.checkpoints.convert import MAX_SHARD_BYTES, Model, differences, to_hugging_face, to_megatron
from megavar.models.config_json import read_dims
from megavar.training.rope import yarn_frequencies

TOLERANCE = 2e-5
NORMALIZER = 300.0
ORIGINAL = 64
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
USUAL = 1.1386294361119891
"""transformers' attention factor for factor 4: 0.1 x log(4) + 1."""
ALL_KEYS = {
    **YARN, "factor": 3.0, "attention_factor": 0.9, "attn_factor": 0.9 / 1.1098612288668110, "beta_fast": 6.0,
    "beta_slow": 0.3, "truncate": False,
}  # fmt: skip
MODELS = {
    "qwen2": ("qwen2", False, YARN),
    "qwen3": ("qwen3", True, YARN),
    "qwen3_moe": ("qwen3_moe", False, YARN),
    "qwen3-all-keys": ("qwen3", False, ALL_KEYS),
    "qwen3-mscale": ("qwen3", False, {**YARN, "mscale": 0.7, "mscale_all_dim": 1.4}),
}
GRIDS = {
    "tp1": (1, {}),
    "tp2_pp2": (4, {"tensor": 2, "pipeline": 2, "sequence": False}),
    "tp2_pp2_sp": (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    "pp2_vpp2_cp2": (4, {"pipeline": 2, "virtual_pipeline": 2, "context": 2}),
    "cp2_tp2": (4, {"context": 2, "tensor": 2}),
}
# Megatron trains experts at tensor parallelism with sequence parallelism only.
PAIRS = [(name, grid) for name in MODELS for grid in GRIDS if name != "qwen3_moe" or grid in ("tp1", "tp2_pp2_sp")]
SEQUENCES = random_sequences(6, seed=3, longest=4 * ORIGINAL)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder with every model, and the models in transformers."""
    root = tmp_path_factory.mktemp("models")
    return root, {name: save(root / name, *model) for name, model in MODELS.items()}


def save(folder: Path, family: str, tied: bool, scaling: dict, **changes: object):
    changes = {"rope_theta": 10_000.0, "max_position_embeddings": 4 * ORIGINAL, **changes}
    return save_tiny_model(folder, family, tied, rope_scaling=dict(scaling), **changes)


@pytest.fixture(scope="module")
def references(models):
    return {name: reference_gradients(model, SEQUENCES, NORMALIZER) for name, model in models[1].items()}


@pytest.fixture(scope="module")
def results(models):
    """Folder with what every grid computed of every model."""
    root, _ = models
    for ranks in (1, 4):
        cases = []
        for grid, (grid_ranks, sizes) in GRIDS.items():
            for name in MODELS:
                if grid_ranks != ranks or (name, grid) not in PAIRS:
                    continue
                common = {"model": str(root / name), "grid": sizes, "microbatch_tokens": 400, "normalizer": NORMALIZER}
                for kind in ("score", "gradient"):
                    cases.append({"kind": kind, "out": str(root / f"{kind}-{name}-{grid}"), **common})
        run_ranks(ranks, run_cases, cases, SEQUENCES)
    return root


def test_sequences_are_longer_than_the_original_length():
    lengths = [len(sequence.prompt_ids) + len(sequence.target_ids) for sequence in SEQUENCES]
    assert sum(length > 2 * ORIGINAL for length in lengths) >= 3 and max(lengths) > 3 * ORIGINAL


@pytest.mark.parametrize(("name", "grid"), PAIRS)
def test_logps_equal_transformers(references, results, name, grid):
    found = pickle.loads((results / f"score-{name}-{grid}").read_bytes())
    for expected, logps in zip(references[name].logps, found, strict=True):
        assert (torch.from_numpy(logps) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize(("name", "grid"), [pair for pair in PAIRS if pair[0] != "qwen3_moe"])
def test_gradients_of_the_weighted_loss_equal_transformers(references, results, name, grid):
    folder = results / f"gradient-{name}-{grid}"
    assert json.loads((folder / "loss.json").read_text()) == pytest.approx(references[name].loss, rel=TOLERANCE)
    found = {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
    for key, gradient in references[name].gradients.items():
        assert (found[key] - gradient).abs().max() / gradient.abs().max() <= TOLERANCE, key


@pytest.mark.parametrize(
    "change",
    [
        {"rope_type": "default"},
        {"factor": 3.99},
        {"original_max_position_embeddings": 4 * ORIGINAL},
        {"attention_factor": 1.0},
        {"attention_factor": 1.001 * USUAL},
        {"beta_fast": 3.0},
        {"beta_slow": 0.3},
        {"truncate": False},
    ],
    ids=str,
)
def test_every_part_of_the_scaling_is_seen(models, references, tmp_path, change):
    """The oracle itself can tell: each part changes a log-prob by far more than the tolerance."""
    model = save(tmp_path, "qwen3", True, {**YARN, **change})
    with torch.no_grad():
        pairs = zip(SEQUENCES, references["qwen3"].logps, strict=True)
        assert max((reference_logps(model, sequence) - logps).abs().max() for sequence, logps in pairs) > 50 * TOLERANCE


@pytest.mark.parametrize(
    ("scaling", "sizes"),
    [
        (YARN, {}),
        (ALL_KEYS, {}),
        ({**YARN, "factor": 1.0}, {}),
        # As in Qwen's documentation and in DeepSeek-R1-0528-Qwen3-8B: 4 x 32,768 positions, 128 dimensions.
        ({**YARN, "original_max_position_embeddings": 32_768}, {"rope_theta": 1e6, "head_dim": 128}),
        # The ramp between the betas has no width.
        ({**YARN, "beta_fast": 1e-6, "beta_slow": 1e-7}, {}),
        ({**YARN, "beta_fast": 1e6, "beta_slow": 1e5}, {}),
    ],
    ids=["usual", "all keys", "factor 1", "qwen", "ramp after the end", "ramp before the start"],
)
def test_frequencies_and_attention_factor_equal_those_of_transformers(tmp_path, scaling, sizes):
    config = save(tmp_path, "qwen3", True, scaling, **sizes).config
    expected, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    dims = read_dims(tmp_path)
    found = yarn_frequencies(dims.yarn, dims.rope_base, dims.head_dim)
    assert (found / expected - 1).abs().max() <= 3e-7  # float32 has 6e-8
    assert dims.yarn.attention_factor == pytest.approx(attention_factor, rel=1e-7)


@pytest.mark.parametrize("layout", ["transformers 4", "transformers 5"])
def test_the_scaling_is_kept_on_the_way_there_and_back(models, tmp_path, layout):
    root, originals = models
    source = tmp_path / "source"
    model = originals["qwen3-all-keys"]
    model.save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    for key in ("rope_parameters", "rope_scaling", "rope_theta"):
        config.pop(key, None)
    if layout == "transformers 4":
        config |= {"rope_scaling": ALL_KEYS, "rope_theta": 1e4}
    else:
        config["rope_parameters"] = {**ALL_KEYS, "rope_theta": 1e4}
    (source / "config.json").write_text(json.dumps(config))
    to_megatron(source, tmp_path / "megatron", None, False)
    to_hugging_face(tmp_path / "megatron", tmp_path / "back", None, MAX_SHARD_BYTES, False)
    assert list(differences(Model(source), Model(tmp_path / "back"))) == []
    assert read_dims(tmp_path / "back") == read_dims(source) == read_dims(root / "qwen3-all-keys")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (written["rope_scaling"], written["rope_theta"]) == (ALL_KEYS, 1e4)  # what transformers 4 reads
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32).eval()
    ids = torch.arange(200)[None]
    with torch.no_grad():
        assert torch.equal(back(ids).logits, model(ids).logits)
