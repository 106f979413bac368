"""The converter's command line, as a user types it."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
BASE = ROOT / "examples" / "base" / "qwen3-tiny"
SPEC = importlib.util.spec_from_file_location("convert_checkpoint", ROOT / "tools" / "convert_checkpoint.py")
tool = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tool)


@pytest.fixture
def run(monkeypatch, capsys):
    """run(arguments ...) -> exit code, what was printed."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, arguments)])
        code = tool.main()
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return call


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("7+3*4-8 left to right mod 10\n7+3*4-8\n0*4-8\n0-8\n2")
    return file


def test_there_and_back_and_verified_with_log_probs(run, tmp_path, text):
    megatron, back = tmp_path / "m", tmp_path / "back"
    code, printed = run("to-megatron", "--hf", BASE, "--out", megatron)
    assert code == 0 and "0.004 GB, digest of the source" in printed and "WARNING" not in printed
    code, printed = run("to-hf", "--megatron", megatron, "--out", back, "--max-shard-size", "1MB")
    assert code == 0 and "bit for bit those that the checkpoint was converted from" in printed
    code, printed = run("verify", megatron, back, "--logits", text)
    assert code == 0 and "are equal: every key, shape, dtype and bit" in printed
    assert float(printed.split("largest difference ")[1].split(",")[0]) <= 2e-5  # Megatron's against transformers'
    assert len(list(back.glob("model-*-of-00005.safetensors"))) == 5


@pytest.mark.parametrize("lacks", ["rope_theta", "rope_parameters"])
def test_log_probs_equal_wherever_the_configuration_has_its_rope_base(run, tmp_path, text, lacks):
    source = tmp_path / "source"
    shutil.copytree(BASE, source)
    config = json.loads((BASE / "config.json").read_text())
    del config[lacks]
    (source / "config.json").write_text(json.dumps(config))
    run("to-megatron", "--hf", source, "--out", tmp_path / "m")
    code, printed = run("verify", tmp_path / "m", source, "--logits", text)
    assert code == 0 and float(printed.split("largest difference ")[1].split(",")[0]) <= 2e-5


@pytest.mark.parametrize("layout", ["transformers 4", "transformers 5"])
def test_log_probs_equal_wherever_the_configuration_has_its_rope_scaling(run, tmp_path, text, layout):
    """A model that was not trained with the scaling: log-probs go down to -12, and float32 rounds more than usually.

    Measured against float64: transformers 0.9e-5, Megatron 1.4e-5, to the other side.
    """
    source, base = tmp_path / "source", json.loads((BASE / "config.json").read_text())
    shutil.copytree(BASE, source)
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    theta = base.pop("rope_parameters", {}).get("rope_theta") or base["rope_theta"]
    del base["rope_theta"]
    forms = {
        "transformers 4": {"rope_scaling": scaling, "rope_theta": theta},
        "transformers 5": {"rope_parameters": {**scaling, "rope_theta": theta}},
    }
    (source / "config.json").write_text(json.dumps({**base, **forms[layout]}))
    run("to-megatron", "--hf", source, "--out", tmp_path / "m")
    run("to-hf", "--megatron", tmp_path / "m", "--out", tmp_path / "back")
    for folder in (source, tmp_path / "back"):
        code, printed = run("verify", tmp_path / "m", folder, "--logits", text)
        assert code == 0 and float(printed.split("largest difference ")[1].split(",")[0]) <= 5e-5
    (source / "config.json").write_text(json.dumps({**base, "rope_theta": theta}))  # the oracle sees the scaling
    code, printed = run("verify", tmp_path / "m", source, "--logits", text)
    assert float(printed.split("largest difference ")[1].split(",")[0]) > 1e-2


def test_a_flipped_weight_is_found_by_bits_and_by_log_probs(run, tmp_path, text):
    run("to-megatron", "--hf", BASE, "--out", tmp_path / "m")
    run("to-hf", "--megatron", tmp_path / "m", "--out", tmp_path / "back")
    tensors = load_file(tmp_path / "back" / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][3, 4] *= -1
    save_file(tensors, tmp_path / "back" / "model.safetensors", metadata={"format": "pt"})
    code, printed = run("verify", tmp_path / "m", tmp_path / "back")
    assert code == 1 and "model.layers.1.self_attn.o_proj.weight: 1 of 32768 values differ, first at [3, 4]" in printed
    assert "log-probs" not in printed  # no text was given
    code, printed = run("verify", tmp_path / "m", tmp_path / "back", "--logits", text, "--tolerance", "2e-5")
    assert code == 1 and float(printed.split("largest difference ")[1].split(",")[0]) > 2e-5


def test_dtype_and_its_configuration_change_together(run, tmp_path):
    assert run("to-megatron", "--hf", BASE, "--out", tmp_path / "m", "--dtype", "bf16")[0] == 0
    code, printed = run("to-hf", "--megatron", tmp_path / "m", "--out", tmp_path / "back")
    assert code == 0 and "bit for bit" not in printed
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert all(
        torch.equal(found[key], tensor.bfloat16()) for key, tensor in load_file(BASE / "model.safetensors").items()
    )


def test_inspect_says_what_a_folder_holds(run, tmp_path):
    run("to-megatron", "--hf", BASE, "--out", tmp_path / "m")
    for folder, kind in ((BASE, "Hugging Face"), (tmp_path / "m", "Megatron torch_dist")):
        code, printed = run("inspect", folder)
        assert code == 0
        for value in (kind, "qwen3", "1,115,520", "1000000.0", "float32"):
            assert value in printed


def test_values_that_are_not_finite_are_warned_of(run, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for file in BASE.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][:2] = torch.nan
    save_file(tensors, source / "model.safetensors")
    code, printed = run("to-megatron", "--hf", source, "--out", tmp_path / "m")
    assert code == 0 and "WARNING: model.norm.weight has 2 values that are NaN or infinite" in printed


def test_refusals_have_code_2_and_one_line(run, tmp_path):
    for arguments, message in (
        (("to-megatron", "--hf", tmp_path / "no", "--out", tmp_path / "m"), "is not a folder"),
        (("to-hf", "--megatron", BASE, "--out", tmp_path / "m"), "is not a Megatron checkpoint"),
        (("verify", BASE, BASE, "--logits", tmp_path / "no.txt"), "No such file or directory"),
        (
            ("verify", BASE, tmp_path),
            "neither a Hugging Face folder (no config.json) nor a Megatron checkpoint (no .metadata)",
        ),
    ):
        code, printed = run(*arguments)
        assert code == 2 and message in printed and len(printed.strip().splitlines()) == 1


@pytest.mark.parametrize(("written", "size"), [("5GB", 5 * 10**9), ("512MiB", 2**29), ("1.5kb", 1500)])
def test_sizes_are_read(written, size):
    assert tool.size_in_bytes(written) == size


@pytest.mark.parametrize("written", ["5", "GB", "-1GB", "0GB", "5TBs"])
def test_what_is_no_size_is_refused(written):
    import argparse

    with pytest.raises(argparse.ArgumentTypeError, match="is not a size"):
        tool.size_in_bytes(written)
