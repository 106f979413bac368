"""Conversion is exact both ways, refuses what is wrong before it writes, and leaves nothing half done."""

import errno
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from helpers.commands import convert_until_killed
from helpers.ranks import forked
from helpers.tiny_models import save_tiny_model
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from transformers import AutoModelForCausalLM

from megavar.checkpoints import huggingface
from megavar.checkpoints import megatron as sharded
from megavar.checkpoints.convert import MAX_SHARD_BYTES, Model, differences, to_hugging_face, to_megatron
from megavar.checkpoints.huggingface import atomic_folder
from megavar.checksums import write_checksums

FAMILIES = ("qwen2", "qwen3", "qwen3_moe")


def save_model(folder, family="qwen3", tied=False, dtype=None, **changes):
    model = save_tiny_model(folder, family, tied, **changes)
    if dtype is not None:
        model.to(dtype).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untied Qwen3; tests that change it copy it."""
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def checkpoint(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("megatron") / "m"
    to_megatron(folder, target, None, False)
    return target


def copy(folder, target):
    shutil.copytree(folder, target)
    return target


def tensors_of(folder):
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def bits(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize])


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert tensor.dtype == second[key].dtype and torch.equal(bits(tensor), bits(second[key])), key


ODD = [
    {},
    {"num_key_value_heads": 1},
    {"num_hidden_layers": 3, "vocab_size": 7, "intermediate_size": 10},
    {"head_dim": 6, "num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 20},
]


@pytest.mark.parametrize("changes", ODD, ids=lambda changes: "-".join(changes) or "plain")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_bit_exact(tmp_path, family, tied, changes, monkeypatch):
    monkeypatch.setattr(sharded, "CHUNK_BYTES", 3000)  # several chunks a piece, several files
    monkeypatch.setattr(sharded, "FILE_BYTES", 100_000)
    if family == "qwen2" and "head_dim" in changes:
        changes = {**changes, "head_dim": 4}  # Qwen2 has no head_dim of its own: hidden / heads
    source = save_model(tmp_path / "source", family, tied, torch.bfloat16, **changes)
    there = to_megatron(source, tmp_path / "m", None, False)
    back = to_hugging_face(tmp_path / "m", tmp_path / "back", None, 20_000, False)
    assert back.same_as_source and back.digest == there.digest
    assert_same_bits(tensors_of(source), tensors_of(tmp_path / "back"))
    assert list(differences(Model(source), Model(tmp_path / "m"))) == []


def test_tensors_of_several_dtypes_are_cast_to_the_one_asked_for(folder, tmp_path):
    source = copy(folder, tmp_path / "source")
    edit_tensors(source, half_precision)
    to_megatron(source, tmp_path / "m", torch.float32, False)
    to_hugging_face(tmp_path / "m", tmp_path / "back", None, MAX_SHARD_BYTES, False)
    assert_same_bits({key: tensor.float() for key, tensor in tensors_of(source).items()}, tensors_of(tmp_path / "back"))


def test_values_that_are_not_finite_keep_their_bits_and_are_counted(folder, tmp_path):
    source = copy(folder, tmp_path / "source")
    tensors = tensors_of(source)
    bits(tensors["model.norm.weight"])[:3] = torch.tensor([0x7FC00001, -0x3FFFFF, 0x7F800000])  # two NaNs, infinity
    save_file(tensors, source / "model.safetensors")
    assert to_megatron(source, tmp_path / "m", None, False).nonfinite == {"model.norm.weight": 3}
    assert to_hugging_face(tmp_path / "m", tmp_path / "back", None, MAX_SHARD_BYTES, False).nonfinite
    assert_same_bits(tensors, tensors_of(tmp_path / "back"))


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_the_way_back_with_no_missing_or_unexpected_key(tmp_path, family):
    source = save_model(tmp_path / "source", family, True)
    to_megatron(source, tmp_path / "m", torch.bfloat16, False)
    to_hugging_face(tmp_path / "m", tmp_path / "back", None, 30_000, False)
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]
    assert model.dtype == torch.bfloat16
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for (name, parameter), (_, other) in zip(model.named_parameters(), original.named_parameters(), strict=True):
        assert torch.equal(parameter, other.bfloat16()), name


def test_files_are_named_and_carried_as_transformers_expects(folder, tmp_path, checkpoint):
    to_hugging_face(checkpoint, tmp_path / "back", None, 300_000, False)
    files = sorted(file.name for file in (tmp_path / "back").glob("*.safetensors"))
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    assert all((tmp_path / "back" / file).stat().st_size < 310_000 for file in files) and len(files) > 2
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_of(folder).values())
    assert set(index["weight_map"]) == tensors_of(folder).keys()
    config = json.loads((folder / "config.json").read_text())
    assert ("rope_theta" in config) != ("rope_parameters" in config)  # written by transformers 4 or 5
    base = config.get("rope_parameters", config)["rope_theta"]
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written == {**config, "rope_theta": base}  # 4 reads nothing else
    for name in ("generation_config.json", "tokenizer.json"):
        assert json.loads((tmp_path / "back" / name).read_text()) == json.loads((folder / name).read_text()), name


def test_a_copy_of_the_tied_embedding_is_written_only_where_the_source_had_one(tmp_path):
    plain = save_model(tmp_path / "plain", tied=True)
    written = copy(plain, tmp_path / "written")
    tensors = tensors_of(plain)
    save_file(
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, written / "model.safetensors"
    )
    for source in (plain, written):
        to_megatron(source, tmp_path / "m", None, True)
        to_hugging_face(tmp_path / "m", tmp_path / "back", None, MAX_SHARD_BYTES, True)
        assert_same_bits(tensors_of(source), tensors_of(tmp_path / "back"))
    assert list(differences(Model(plain), Model(written))) == ["lm_head.weight: only in the second"]

    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, written / "model.safetensors")
    differs = r"tie_word_embeddings=true, but lm_head\.weight differs from model\.embed"
    with pytest.raises(ValueError, match=differs):
        to_megatron(written, tmp_path / "new", None, False)
    with pytest.raises(ValueError, match=differs):
        list(differences(Model(plain), Model(written)))
    save_file({**tensors, "lm_head.weight": torch.zeros(3, 3)}, written / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape \(3, 3\)"):
        Model(written)


def test_a_checkpoint_without_its_description_needs_a_template(folder, checkpoint, tmp_path):
    bare = copy(checkpoint, tmp_path / "m")
    shutil.rmtree(bare / "huggingface")
    (bare / "megavar.json").unlink()
    (bare / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match=r"pass a Hugging Face folder of the same architecture as --hf-template"):
        to_hugging_face(bare, tmp_path / "back", None, MAX_SHARD_BYTES, False)
    to_hugging_face(bare, tmp_path / "back", folder, MAX_SHARD_BYTES, False)
    assert_same_bits(tensors_of(folder), tensors_of(tmp_path / "back"))


def test_the_newest_checkpoint_of_a_megatron_run_is_found(folder, checkpoint, tmp_path):
    copy(checkpoint, tmp_path / "run" / "iter_0000012")
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("12\n")
    assert list(differences(Model(tmp_path / "run"), Model(folder))) == []


def test_verify_finds_one_flipped_bit_on_either_side(folder, checkpoint, tmp_path):
    flipped = copy(folder, tmp_path / "flipped")
    tensors = tensors_of(folder)
    bits(tensors["model.layers.2.mlp.up_proj.weight"])[5, 7] ^= 1
    save_file(tensors, flipped / "model.safetensors")
    for first, second in ((folder, flipped), (checkpoint, flipped)):
        (found,) = differences(Model(first), Model(second))
        assert found.startswith("model.layers.2.mlp.up_proj.weight: 1 of 6144 values differ, first at [5, 7]")


def test_verify_names_dtypes_and_sizes_that_differ(folder, tmp_path):
    to_megatron(folder, tmp_path / "bf16", torch.bfloat16, False)
    found = list(differences(Model(folder), Model(tmp_path / "bf16")))
    assert "model.norm.weight: float32 in the first, bfloat16 in the second" in found
    assert len(found) == len(tensors_of(folder))
    other = save_model(tmp_path / "other", num_hidden_layers=2)
    assert list(differences(Model(folder), Model(other))) == ["num_layers: 4 in the first, 2 in the second"]


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_tensors(folder, edit):
    tensors = tensors_of(folder)
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def flip_header_byte(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[20] ^= 0xFF
    (folder / "model.safetensors").write_bytes(data)


def half_precision(tensors):
    tensors["model.layers.0.self_attn.k_proj.weight"] = tensors["model.layers.0.self_attn.k_proj.weight"].half()


def one_layer_of_half_precision(tensors):
    tensors["model.layers.2.input_layernorm.weight"] = tensors["model.layers.2.input_layernorm.weight"].half()


def index_to_nowhere(folder):
    weights = {"model.norm.weight": "model-00001-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


def index_without_a_key(folder):
    weights = dict.fromkeys(tensors_of(folder).keys() - {"model.norm.weight"}, "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


BROKEN = {
    "truncated": (lambda f: os.truncate(f / "model.safetensors", 5000), r"model\.safetensors is missing, truncated"),
    "empty": (lambda f: os.truncate(f / "model.safetensors", 0), r"model\.safetensors is missing, truncated"),
    "header": (flip_header_byte, r"model\.safetensors is missing, truncated or not a safetensors file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"neither model\.safetensors nor"),
    "index": (
        lambda f: (f / "model.safetensors.index.json").write_text("{"),
        r"index\.json is not a valid safetensors index",
    ),
    "shard": (index_to_nowhere, r"model-00001-of-00002\.safetensors is missing"),
    "stray": (index_without_a_key, r"model\.safetensors contains model\.norm\.weight, which .* does not list"),
    "missing key": (lambda f: edit_tensors(f, lambda t: t.pop("model.norm.weight")), r"lacks model\.norm\.weight"),
    "extra key": (lambda f: edit_tensors(f, lambda t: t.update(odd=torch.zeros(1))), r"unknown tensor odd"),
    "shape": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.norm.weight": torch.zeros(3)})),
        r"model\.safetensors: model\.norm\.weight has shape \(3,\), config\.json implies \(64,\)",
    ),
    "integers": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int32)})),
        r"model\.norm\.weight has dtype I32; supported are F32, BF16, F16",
    ),
    "mixed": (
        lambda f: edit_tensors(f, half_precision),
        r"layers\.0\.self_attn\.q_proj\.weight is float32 and .*layers\.0\.self_attn\.k_proj\.weight is float16",
    ),
    "mixed layers": (
        lambda f: edit_tensors(f, one_layer_of_half_precision),
        r"layers\.0\.input_layernorm\.weight is float32 and .*layers\.2\.input_layernorm\.weight is float16",
    ),
    "layer types": (lambda f: edit_config(f, num_hidden_layers=5), r"layer_types=.* each of num_hidden_layers=5"),
    "layers": (
        lambda f: edit_config(f, num_hidden_layers=5, layer_types=None),
        r"lacks model\.layers\.4\..*qwen3 with 5 layers",
    ),
    "tied": (lambda f: edit_config(f, tie_word_embeddings=True), r"tie_word_embeddings=true, but lm_head\.weight"),
    "family": (
        lambda f: edit_config(f, model_type="llama"),
        r"model_type='llama'; supported are qwen2, qwen3, qwen3_moe",
    ),
    "rope": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}),
        "RoPE scaling 'linear', which is not supported",
    ),
    "no rope base": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "default"}, rope_theta=None),
        "has no rope_theta, and the RoPE base has no default",
    ),
    "biases": (lambda f: edit_config(f, attention_bias=True), r"attention_bias=True, which is not supported"),
    "config": (lambda f: (f / "config.json").unlink(), r"no config\.json"),
    "config text": (lambda f: (f / "config.json").write_text("{"), r"config\.json cannot be read"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_folder_is_refused_and_nothing_is_written(folder, tmp_path, how):
    source = copy(folder, tmp_path / "source")
    damage, message = BROKEN[how]
    damage(source)
    with pytest.raises(ValueError, match=message):
        to_megatron(source, tmp_path / "m", None, False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def remove_file(folder):
    next(folder.glob("*.distcp")).unlink()


def rename_parameter(folder):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.state_dict_metadata["decoder.odd.weight"] = metadata.state_dict_metadata.pop("output_layer.weight")
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def lose_a_chunk(folder):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks.pop()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


BROKEN_CHECKPOINTS = {
    "no metadata": (lambda f: (f / ".metadata").unlink(), r"nor a Megatron checkpoint \(no \.metadata\)"),
    "metadata": (lambda f: os.truncate(f / ".metadata", 100), r"\.metadata is damaged"),
    "missing file": (remove_file, r"__0_0\.distcp is missing or truncated"),
    "truncated": (lambda f: os.truncate(f / "__0_0.distcp", 9000), r"__0_0\.distcp is missing or truncated"),
    "unknown": (rename_parameter, r"lacks output_layer\.weight \(1 missing, 1 unknown\)"),
    "chunk": (lose_a_chunk, r"only a part of decoder\.layers\.mlp\.linear_fc2\.weight\[3\]"),
    "config": (
        lambda f: edit_config(f / "huggingface", intermediate_size=95),
        r"linear_fc1\.weight has shape .*192.*190",
    ),
    "description": (lambda f: (f / "megavar.json").write_text("[1]"), r"megavar\.json is damaged"),
    "digest": (
        lambda f: (f / "megavar.json").write_text('{"tied_head_written": false, "source_digest": 7}'),
        r"megavar\.json is damaged",
    ),
    "huge size": (
        lambda f: edit_config(f / "huggingface", vocab_size=2**63),
        r"vocab_size=9223372036854775808, expected",
    ),
    "zeros": (lambda f: (f / "__0_0.distcp").write_bytes(bytes((f / "__0_0.distcp").stat().st_size)), "cannot be read"),
}


@pytest.mark.parametrize("how", BROKEN_CHECKPOINTS)
def test_a_broken_checkpoint_is_refused_and_nothing_is_written(checkpoint, tmp_path, how):
    source = copy(checkpoint, tmp_path / "source")
    damage, message = BROKEN_CHECKPOINTS[how]
    (source / "SHA256SUMS").unlink()  # it would tell of each of these first
    damage(source)
    with pytest.raises(ValueError, match=message):
        to_hugging_face(source, tmp_path / "back", None, MAX_SHARD_BYTES, False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("seed", range(3))
def test_random_damage_is_refused_or_found_by_verify(folder, tmp_path, seed):
    """Bytes cut off or changed anywhere: a clear error, or tensors that differ; never a silent pass, never a crash."""
    drawn = random.Random(seed)
    for attempt in range(10):
        source = copy(folder, tmp_path / f"source-{attempt}")
        file = source / "model.safetensors"
        data = bytearray(file.read_bytes())
        if drawn.random() < 0.3:
            data = data[: drawn.randrange(len(data))]
        else:
            place = drawn.randrange(len(data) if drawn.random() < 0.5 else 3000)
            data[place] ^= 1 << drawn.randrange(8)
        file.write_bytes(data)
        try:
            assert list(differences(Model(folder), Model(source)))
        except ValueError as error:
            assert str(source) in str(error)


def test_an_existing_target_is_refused_and_replaced_only_on_demand(folder, checkpoint, tmp_path):
    target = tmp_path / "m"
    to_megatron(folder, target, None, False)
    with pytest.raises(ValueError, match="already exists; choose another folder or pass --overwrite"):
        to_megatron(folder, target, None, False)
    to_megatron(folder, target, torch.bfloat16, True)
    assert list(differences(Model(folder), Model(target)))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]

    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="contains neither a model nor a checkpoint"):
        to_megatron(folder, tmp_path / "home", None, True)
    (tmp_path / "m" / "notes").mkdir()
    with pytest.raises(ValueError, match="contains another folder, notes, so it is not overwritten"):
        to_megatron(folder, tmp_path / "m", None, True)
    (tmp_path / "letter").write_text("dear")
    with pytest.raises(ValueError, match="is a file"):
        to_megatron(folder, tmp_path / "letter", None, True)
    assert (tmp_path / "letter").read_text() == "dear"


def test_a_target_that_is_read_from_is_refused(folder, checkpoint, tmp_path):
    for target in (folder, folder.parent):
        with pytest.raises(ValueError, match="which is the source"):
            to_megatron(folder, target, None, True)
    copy(checkpoint, tmp_path / "run" / "iter_0000007")
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("7")
    for target in ("run", "run/iter_0000007", "run/iter_0000007/huggingface"):
        with pytest.raises(ValueError, match="which is the source"):
            to_hugging_face(tmp_path / "run", tmp_path / target, None, MAX_SHARD_BYTES, True)
    assert list(differences(Model(tmp_path / "run"), Model(folder))) == []


def test_a_kill_between_the_two_renames_loses_neither_model(folder, checkpoint, tmp_path):
    copy(folder, tmp_path / ".m.replaced")
    copy(checkpoint, tmp_path / ".m.partial")
    with pytest.raises(ValueError, match="already exists"):
        to_megatron(folder, tmp_path / "m", None, False)
    assert list(differences(Model(tmp_path / "m"), Model(folder))) == []
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_target_that_another_process_fills_is_refused(folder, tmp_path):
    with atomic_folder(tmp_path / "m", False, 0) as aside:
        (aside / "file").write_text("first")
        with pytest.raises(ValueError, match="another process is writing"):
            to_megatron(folder, tmp_path / "m", None, False)
    assert (tmp_path / "m" / "file").read_text() == "first"


def test_what_another_process_begins_right_after_the_rename_is_left_alone(tmp_path, monkeypatch):
    rename = os.replace

    def rename_then_begin(source, target):
        rename(source, target)
        source.mkdir()
        (source / "file").write_text("second")

    monkeypatch.setattr(os, "replace", rename_then_begin)
    with atomic_folder(tmp_path / "m", False, 0):
        pass
    assert (tmp_path / ".m.partial" / "file").read_text() == "second"


def test_a_place_that_cannot_be_written_is_said(folder):
    with pytest.raises(ValueError, match=r"/proc/nowhere/m could not be written: .*; no partial output is left"):
        to_megatron(folder, Path("/proc/nowhere/m"), None, False)


def test_too_little_space_is_said_before_anything_is_written(folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"needs 0\.00 GB, but its disk has 0\.00 GB free"):
        to_megatron(folder, tmp_path / "m", None, False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("direction", ["to-megatron", "to-hf"])
def test_a_write_that_fails_half_way_leaves_nothing(folder, checkpoint, tmp_path, direction):
    """The system refuses files over a size, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(ValueError, match=r"could not be written: .*File too large"):
            if direction == "to-megatron":
                to_megatron(folder, tmp_path / "m", None, False)
            else:
                to_hugging_face(checkpoint, tmp_path / "m", None, MAX_SHARD_BYTES, False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_kill_at_any_moment_leaves_nothing_or_a_complete_checkpoint(folder, tmp_path):
    target, drawn, found = tmp_path / "m", random.Random(0), []
    for _ in range(8):
        receive, send = forked.Pipe(duplex=False)
        process = forked.Process(target=convert_until_killed, args=(folder, target, send), daemon=True)
        process.start()
        assert receive.recv() == "ready"
        time.sleep(drawn.uniform(0.0, 0.2))
        process.kill()
        process.join()
        found.append(target.exists())
        if target.exists():
            assert list(differences(Model(folder), Model(target))) == []
    to_megatron(folder, target, None, True)
    assert any(found) and [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_converted_checkpoint_with_a_changed_weight_is_refused_by_name(folder, checkpoint, tmp_path):
    """Its weights are not hashed before they are read: the digest of the tensors in megavar.json tells."""
    damaged = copy(checkpoint, tmp_path / "damaged")
    file = damaged / "__0_0.distcp"
    data, weight = file.read_bytes(), tensors_of(folder)["model.layers.0.mlp.down_proj.weight"].numpy().tobytes()
    assert data.count(weight) == 1
    where = data.index(weight) + len(weight) // 2
    file.write_bytes(data[:where] + bytes([data[where] ^ 1]) + data[where + 1 :])
    with pytest.raises(ValueError, match=r"__0_0\.distcp has another checksum"):
        to_hugging_face(damaged, tmp_path / "hf", None, MAX_SHARD_BYTES, False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]
    (damaged / "SHA256SUMS").unlink()  # without it, the change is taken for a wanted one
    assert not to_hugging_face(damaged, tmp_path / "hf", None, MAX_SHARD_BYTES, False).same_as_source


def test_chunks_over_layers_and_columns_and_of_any_strides_are_put_together(folder, checkpoint, tmp_path):
    """As ranks that split a parameter by columns save it; the second chunk lies transposed in its storage."""
    split = copy(checkpoint, tmp_path / "split")
    name = "decoder.layers.self_attention.linear_proj.weight"
    tensors = tensors_of(folder)
    weight_LHC = torch.stack([tensors[f"model.layers.{layer}.self_attn.o_proj.weight"] for layer in range(4)])
    metadata = pickle.loads((split / ".metadata").read_bytes())
    chunks = metadata.state_dict_metadata[name].chunks
    for index in [index for index in metadata.storage_data if index.fqn == name]:
        del metadata.storage_data[index]
    chunks.clear()
    with open(split / "__1_0.distcp", "wb") as file:
        for start, part in ((0, weight_LHC[..., :5].clone()), (5, weight_LHC[..., 5:].mT.contiguous().mT)):
            begin, offsets = file.tell(), torch.Size([0, 0, start])
            torch.save(part, file)
            chunks.append(ChunkStorageMetadata(offsets, part.shape))
            index = MetadataIndex(name, offset=offsets, index=len(chunks) - 1)
            metadata.storage_data[index] = _StorageInfo("__1_0.distcp", begin, file.tell() - begin)
    (split / ".metadata").write_bytes(pickle.dumps(metadata))
    write_checksums(split)
    assert to_hugging_face(split, tmp_path / "back", None, MAX_SHARD_BYTES, False).same_as_source
    assert_same_bits(tensors, tensors_of(tmp_path / "back"))


def digest_of(folder, hash_of):
    lines = [
        f"{key} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} {hash_of(tensor.numpy().tobytes())}"
        for key, tensor in tensors_of(folder).items()
    ]
    return hash_of("\n".join(sorted(lines)).encode())


def test_a_checkpoint_with_a_sha256_of_its_tensors_is_compared_by_it(folder, tmp_path):
    """Once, the digest was a SHA-256 without a prefix."""
    checkpoint = tmp_path / "m"
    assert to_megatron(folder, checkpoint, None, False).digest == "blake3:" + digest_of(
        folder, lambda data: blake3(data).hexdigest()
    )
    old = digest_of(folder, lambda data: hashlib.sha256(data).hexdigest())
    for digest, same in ((old, True), ("0" * 64, False)):
        sharded.Description(False, digest).write(checkpoint)
        write_checksums(checkpoint)
        back = to_hugging_face(checkpoint, tmp_path / "back", None, MAX_SHARD_BYTES, True)
        assert (back.digest, back.same_as_source) == (old, same)


def test_the_checksum_is_of_what_was_given_though_its_memory_changes_after_the_write(tmp_path):
    file, expected = huggingface.ChunkedFile(tmp_path / "file"), b""
    for num_bytes in (7, 3_000_000, 1, huggingface.WRITE_CHUNK_BYTES, 999_999):
        data = bytearray(random.Random(num_bytes).randbytes(num_bytes))
        expected += bytes(data)
        assert file.write(data) == num_bytes
        data[:] = bytes(num_bytes)
    file.close()
    assert (tmp_path / "file").read_bytes() == expected
    assert file.digest == hashlib.sha256(expected).hexdigest()


def test_a_large_write_that_fails_is_an_error_of_the_disk(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            huggingface.ChunkedFile(tmp_path / "file").write(bytes(3_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_memory_of_a_tensor_is_used_again_only_when_no_view_of_it_is_left():
    memory, info = huggingface.Memory(), huggingface.TensorInfo(torch.bfloat16, (300, 5))
    tensor = memory.empty(info)
    address, view = tensor.data_ptr(), tensor[7:].view(torch.int16).numpy()
    del tensor
    second = memory.empty(info)
    assert second.data_ptr() != address
    del view
    assert memory.empty(huggingface.TensorInfo(torch.bfloat16, (300, 6))).data_ptr() != address
    assert memory.empty(info).data_ptr() == address


def test_what_the_disk_refuses_while_more_is_written_fails_the_conversion(folder, tmp_path, monkeypatch):
    def refuse(handle):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(huggingface, "SYNC_BYTES", 1000)
    to_megatron(folder, tmp_path / "m", None, False)
    assert to_hugging_face(tmp_path / "m", tmp_path / "hf", None, MAX_SHARD_BYTES, False).same_as_source
    monkeypatch.setattr(os, "fdatasync", refuse)
    with pytest.raises(ValueError, match=r"n could not be written: .*Input/output error; no partial output is left"):
        to_megatron(folder, tmp_path / "n", None, False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "m"]
