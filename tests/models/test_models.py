"""Operators undo themselves bit for bit, and folders that are not what they seem are refused."""

import json
import shutil

import pytest
import torch
from helpers.tiny_models import save_tiny_model
from safetensors.torch import load_file, save_file

from megavar.checkpoints.huggingface import HuggingFaceFolder
from megavar.models import operators
from megavar.models.config_json import read_dims
from megavar.models.dims import Yarn
from megavar.models.ops import joined, names_at, pieces

FAMILIES = [(family, tied) for family in ("qwen2", "qwen3", "qwen3_moe") for tied in (False, True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_tiny_model(path, "qwen3", tied=False)
    return path


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_operators_take_every_tensor_once_and_undo_themselves(tmp_path, family, tied):
    save_tiny_model(tmp_path, family, tied)
    dims, source = read_dims(tmp_path), HuggingFaceFolder(tmp_path)
    source.check(operators(dims), dims)
    seen = []
    for operator, index in pieces(operators(dims), dims):
        names = names_at(operator, index)
        tensors = [source.tensor(name) for name in names]
        back = operator.split(operator.merge(tensors, dims), dims)
        assert all(torch.equal(old, new) for old, new in zip(tensors, back, strict=True)), operator
        seen += names
    assert sorted(seen) == sorted(source.names())


@pytest.mark.parametrize("layout", ["transformers 5", "transformers 4"])
def test_the_rope_base_is_read_from_either_layout(folder, tmp_path, layout):
    assert read_dims(folder).rope_base == 1e6
    config = json.loads((folder / "config.json").read_text())
    for key in ("rope_parameters", "rope_theta"):
        config.pop(key, None)
    if layout == "transformers 5":
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    else:
        config["rope_theta"] = 5e5
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_dims(tmp_path).rope_base == 5e5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama'; supported are qwen2, qwen3"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}}, "RoPE scaling 'linear'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5, which is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        (
            {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]},
            "layer_types=.*other attention is not supported",
        ),
        ({"hidden_act": "gelu"}, "hidden_act='gelu', which is not supported"),
    ],
)
def test_configs_the_engine_would_get_wrong_are_refused(folder, tmp_path, changes, message):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=message):
        read_dims(tmp_path)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}


def write_scaling(folder, target, scaling, **changes):
    """config.json as transformers 4 writes it."""
    config = json.loads((folder / "config.json").read_text())
    config = {**config, "rope_parameters": None, "rope_scaling": scaling, "rope_theta": 1e6, **changes}
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_yarn_is_read_from_either_layout_and_extends_the_positions(folder, tmp_path, key):
    scaling = {key: "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    dims = read_dims(write_scaling(folder, tmp_path, scaling))
    assert dims.rope_base == 1e6
    assert dims.yarn == Yarn(4.0, 256, pytest.approx(1.1386294361), beta_fast=32.0, beta_slow=1.0, truncate=True)
    assert dims.max_positions == 1024  # max_position_embeddings says 512
    of_5 = {"rope_scaling": None, "rope_theta": None, "rope_parameters": {**scaling, "rope_theta": 1e6}}
    assert read_dims(write_scaling(folder, tmp_path, None, **of_5)) == dims
    assert read_dims(write_scaling(folder, tmp_path, scaling, max_position_embeddings=5000)).max_positions == 5000


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"original_max_position_embeddings": None}, "original_max_position_embeddings=None in its YaRN scaling"),
        ({"factor": None}, "factor=None in its YaRN scaling, expected a number of at least 1"),
        ({"factor": 0.5}, "factor=0.5 in its YaRN scaling, expected a number of at least 1"),
        ({"factor": "4"}, "factor='4' in its YaRN scaling"),
        ({"beta_fast": 0}, "beta_fast=0 in its YaRN scaling, expected a number above 0"),
        ({"truncate": None}, "truncate=None in its YaRN scaling, expected true or false"),
        ({"extrapolation_factor": 2.0}, r"extrapolation_factor=2\.0 in its YaRN scaling, which is not supported"),
        ({"mscale": 1.0, "mscale_all_dim": 0}, "mscale_all_dim=0 in its YaRN scaling"),
        ({"attention_factor": 1.0}, r"scale queries and keys by 1 and 1\.138629\. .*or attn_factor=0\.87824885"),
        # As in DeepSeek-R1-0528-Qwen3-8B.
        ({"attn_factor": 0.8782488562869419}, r"by 1\.138629 and 1\. Have .* attention_factor=1\.0 next to this"),
        ({"attention_factor": 1.0, "attn_factor": 0.9}, "Have both keys say which is meant"),
    ],
)
def test_yarn_that_transformers_and_sglang_understand_differently_is_refused(folder, tmp_path, scaling, message):
    with pytest.raises(ValueError, match=message):
        read_dims(write_scaling(folder, tmp_path, {**YARN, **scaling}))


def test_yarn_of_which_two_keys_disagree_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="original_max_position_embeddings=128, and 256 in its YaRN scaling"):
        read_dims(write_scaling(folder, tmp_path, YARN, original_max_position_embeddings=128))
    other = {**YARN, "factor": 2.0, "rope_theta": 1e6}
    with pytest.raises(ValueError, match="another scaling in rope_parameters"):
        read_dims(write_scaling(folder, tmp_path, YARN, rope_parameters=other))
    with pytest.raises(ValueError, match="another scaling in rope_parameters"):
        read_dims(write_scaling(folder, tmp_path, YARN, rope_parameters={"rope_type": "default", "rope_theta": 1e6}))


def test_an_attention_factor_that_both_keys_agree_on_is_taken(folder, tmp_path):
    agreed = {"attention_factor": 1.0, "attn_factor": 0.8782488562869419}
    assert read_dims(write_scaling(folder, tmp_path, {**YARN, **agreed})).yarn.attention_factor == 1.0


def test_routing_to_one_expert_with_weight_one_is_refused(tmp_path):
    save_tiny_model(tmp_path, "qwen3_moe", tied=True, num_experts_per_tok=1)
    with pytest.raises(ValueError, match="num_experts_per_tok=1 and norm_topk_prob=true"):
        read_dims(tmp_path)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        read_dims(tmp_path)


def test_a_truncated_file_is_refused_by_name(folder, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is missing, truncated"):
        HuggingFaceFolder(tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"lacks model\.norm\.weight"),
        (lambda t: t.update(odd=torch.zeros(1)), "unknown tensor odd"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), r"model\.norm\.weight has shape \(3,\).*\(64,\)"),
    ],
)
def test_tensors_that_contradict_the_config_are_refused(folder, tmp_path, edit, message):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    dims = read_dims(tmp_path)
    with pytest.raises(ValueError, match=message):
        HuggingFaceFolder(tmp_path).check(operators(dims), dims)


def test_an_index_that_names_a_missing_shard_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="model-00001-of-00002"):
        HuggingFaceFolder(tmp_path / "m")


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe"])
def test_training_flops_equal_those_that_torch_counts_in_transformers(tmp_path, family):
    """torch counts attention over all pairs of positions, the formula the causal half."""
    from torch.utils.flop_counter import FlopCounterMode

    # torch does not count the grouped product of experts, which transformers 5 would choose.
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = save_tiny_model(tmp_path, family, tied=False, **eager)
    dims, length = read_dims(tmp_path), 23
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(length)[None]).logits.sum().backward()
    all_pairs = 6.0 * dims.num_layers * dims.query_size * length**2
    assert dims.training_flops([length], length) + all_pairs == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, r"config\.json has hidden_size=None, expected a value of type int"),
        ({"num_hidden_layers": "4", "layer_types": None}, r"num_hidden_layers='4', expected a value of type int"),
        ({"num_key_value_heads": 0}, r"num_key_value_heads=0, expected 1 to 2"),
        ({"tie_word_embeddings": "no"}, r"tie_word_embeddings='no', expected a value of type bool"),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": None}, r"no rope_theta"),
    ],
)
def test_a_size_is_never_guessed(folder, tmp_path, changes, message):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=message):
        read_dims(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\ud800"])
def test_a_config_that_is_no_object_is_refused_by_name(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"config\.json (cannot be read|contains)"):
        read_dims(tmp_path)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe"])
def test_what_a_config_leaves_out_has_transformers_default(tmp_path, family):
    model = save_tiny_model(tmp_path, family, tied=False)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("tie_word_embeddings", "use_sliding_window", "hidden_act", "attention_bias", "norm_topk_prob"):
        config.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    dims, defaults = read_dims(tmp_path), type(model.config).from_pretrained(tmp_path)
    assert dims.tied_embeddings == defaults.tie_word_embeddings
    assert dims.normalise_routing == getattr(defaults, "norm_topk_prob", False)


def test_stacked_tensors_are_not_copied_where_they_lie_side_by_side():
    memory = torch.arange(24.0)
    first, second, apart = memory[4:10].view(2, 3), memory[10:16].view(2, 3), memory[17:23].view(2, 3)
    stacked = joined([first, second])
    assert stacked.data_ptr() == first.data_ptr() and torch.equal(stacked, torch.cat([first, second]))
    others = [
        [second, first],
        [first, apart],
        [first, second.clone()],
        [first, second.double()],
        [first, memory[10:16].view(3, 2).T],
    ]
    for tensors in others:
        copied = joined(tensors)
        assert copied.data_ptr() != first.data_ptr() and torch.equal(copied, torch.cat(tensors))
