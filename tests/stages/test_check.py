"""What is wrong with a run is said before anything starts, and nothing is written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny_models import save_tiny_model
from safetensors.torch import load_file, save_file

from megavar.cli import main
from megavar.config.load import load_config
from megavar.models.config_json import read_dims
from megavar.models.parallel_layout import check_layout
from megavar.stages.check import check_run

ROOT = Path(__file__).parents[2]
BASE = ROOT / "examples" / "base" / "qwen3-tiny"
GOOD = {"id": "a", "question": "1+1", "answer": "2", "trace": "1+1=2;"}


@pytest.fixture
def config_file(tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps(GOOD))
    (tmp_path / "run.yaml").write_text(
        f"name: a\nruns_dir: {tmp_path}/runs\nmodel: {BASE}\ndata: {{train: {tmp_path}/t.jsonl, "
        "max_sequence_tokens: 160}\nprecision: {recipe: fp32}\n"
        "sample: {max_trace_tokens: 80, max_answer_tokens: 16}\nrollout: {mode: external, urls: [http://127.0.0.1:9]}\n"
    )
    return tmp_path / "run.yaml"


def test_a_good_run_passes(config_file):
    check_run(load_config(config_file, []), 4)


@pytest.mark.parametrize(
    ("overrides", "ranks", "message"),
    [
        (["parallel.tensor=3"], 4, r"tensor=3 x parallel\.pipeline=1.*does not divide the world size 4"),
        (["parallel.context=2"], 3, r"= 2 does not divide the world size 3"),
        (["parallel.pipeline=3"], 3, r"does not divide num_hidden_layers=4"),
        (["parallel.pipeline=2", "parallel.virtual_pipeline=4"], 2, r"= 8 does not divide num_hidden_layers=4"),
        (["precision.recipe=fp8_delayed"], 1, r"precision\.recipe=fp8_delayed needs a CUDA GPU"),
        (["sft.optimizer_moments=bf16"], 1, r"sft\.optimizer_moments=bf16 and .* need a GPU and Transformer Engine"),
        (["policy.train.optimizer_offload=0.5"], 1, r"policy\.train\.optimizer_offload=0\.5 need a GPU"),
        (["score.precision=mxfp8"], 1, r"score\.precision=mxfp8 needs a CUDA GPU.*use score\.precision=bf16"),
        (["objective.name=odd"], 1, r"objective\.name='odd' is unknown; use one of iwae"),
        (["sft.microbatch_tokens=100"], 1, r"sft\.microbatch_tokens=100 is less than data\.max_sequence_tokens=160"),
        (["data.max_sequence_tokens=100000", "sft.microbatch_tokens=100000", "policy.train.microbatch_tokens=100000",
          "score.microbatch_tokens=100000", "posterior.train.microbatch_tokens=100000"], 1,
         r"more than the model's max_position_embeddings"),
        (["rollout.mode=managed", "rollout.urls=[]", "rollout.python=/nowhere/python"], 1, r"make sglang"),
        (["model=/nowhere"], 1, r"no config\.json"),
        (["logging.wandb_project=a"], 1, r"wandb_project=a needs the package wandb, which is not installed"),
        (["objective.name=forward_kl"], 1, r"trains the posterior, but.*use posterior\.source=rollout"),
        (["objective.name=reverse_kl"], 1, r"trains the posterior, but.*use posterior\.source=reverse_kl"),
        (["objective.name=rft", "objective.on_no_correct_trace=gold"], 1, r"on_no_correct_trace=gold has no effect"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_by_name(config_file, overrides, ranks, message):
    with pytest.raises(ValueError, match=message):
        check_run(load_config(config_file, overrides), ranks)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"verifier": "odd"}, r"t\.jsonl: verifier 'odd' is unknown; use one of math"),
        (
            {"trace": "1+1=2;" * 60},
            r"question 'a' has a gold sequence of \d+ tokens, more than data\.max_sequence_tokens",
        ),
        ({"question": "x<|im_end|>"}, r"question 'a' contains the control token"),
        ({"question": "1" * 60}, r"question 'a': its prompt, a trace of .* over data\.max_sequence_tokens=160"),
        ({"solution": "7" * 67 + "\\boxed{2}"}, r"an answer of 71 tokens .* over data\.max_sequence_tokens=160"),
    ],
)
def test_questions_the_run_cannot_use_are_refused(config_file, row, message):
    (config_file.parent / "t.jsonl").write_text(json.dumps({**GOOD, **row}))
    with pytest.raises(ValueError, match=message):
        check_run(load_config(config_file, []), 1)


@pytest.mark.parametrize("setting", ["objective.on_no_correct_trace=gold", "objective.name=reference_acc"])
def test_gold_as_the_last_resort_needs_gold_traces(config_file, setting):
    rows = [GOOD, {**GOOD, "id": "b", "trace": None}]
    (config_file.parent / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    overrides = [setting]
    with pytest.raises(ValueError, match=rf"t\.jsonl, line 2: question 'b' has no trace, which {setting} may need"):
        check_run(load_config(config_file, overrides), 1)
    check_run(load_config(config_file, [*overrides, "data.questions_per_round=1"]), 1)


def test_mixing_in_gold_needs_a_gold_trace_in_every_round(config_file):
    rows = [GOOD, {**GOOD, "id": "b", "trace": None}]
    (config_file.parent / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    overrides = ["policy.mix_gold=true", "data.questions_per_round=1", "data.fresh_questions=true"]
    check_run(load_config(config_file, overrides), 1)
    with pytest.raises(ValueError, match="no question has a gold trace"):
        check_run(load_config(config_file, [*overrides, "rounds=2"]), 1)


def test_a_hint_that_nobody_is_shown_needs_no_room(config_file):
    overrides = [f"templates.posterior=Q {{question}} {'1' * 50} {{answer}}"]
    with pytest.raises(ValueError, match="question 'a': its prompt, a trace"):
        check_run(load_config(config_file, overrides), 1)
    check_run(load_config(config_file, [*overrides, "sample.sampler=policy", "objective.ratio=none"]), 1)


def test_a_head_that_is_no_copy_of_its_tied_embedding_is_refused(config_file, tmp_path):
    shutil.copytree(BASE, tmp_path / "base")
    config = json.loads((BASE / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "base" / "model.safetensors")
    check_run(load_config(config_file, [f"model={tmp_path}/base"]), 1)
    head[-1, -1] += 1
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(ValueError, match=r"tie_word_embeddings=true, but lm_head\.weight differs"):
        check_run(load_config(config_file, [f"model={tmp_path}/base"]), 1)


def test_sequences_may_be_as_long_as_yarn_extends_the_model(config_file, tmp_path):
    shutil.copytree(BASE, tmp_path / "base")
    config = json.loads((BASE / "config.json").read_text())

    def check(original):
        scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": original, "rope_theta": 1e4}
        changes = {"rope_parameters": scaling, "max_position_embeddings": original}
        (tmp_path / "base" / "config.json").write_text(json.dumps({**config, **changes}))
        check_run(load_config(config_file, [f"model={tmp_path}/base"]), 1)

    check(40)  # 160 tokens
    with pytest.raises(ValueError, match=r"max_sequence_tokens=160 is more than .* that YaRN extends to=156"):
        check(39)


def test_fresh_questions_must_last_for_all_rounds(config_file):
    overrides = ["rounds=2", "data.questions_per_round=1", "data.fresh_questions=true"]
    with pytest.raises(ValueError, match=r"rounds x questions_per_round = 2 x 1 = 2 questions, but .* has 1"):
        check_run(load_config(config_file, overrides), 1)
    (config_file.parent / "t.jsonl").write_text("\n".join(json.dumps({**GOOD, "id": name}) for name in "ab"))
    check_run(load_config(config_file, overrides), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_key_value_heads": 2},
            r"tensor=4 does not divide num_key_value_heads \(query groups\)=2; use one of 1, 2",
        ),
        ({"num_attention_heads": 6, "num_key_value_heads": 6}, r"tensor=4 does not divide num_attention_heads=6"),
    ],
)
def test_tensor_parallelism_must_divide_the_heads(tmp_path, changes, message):
    from megavar.config.schema import ParallelConfig

    save_tiny_model(tmp_path, "qwen3", tied=True, **changes)
    with pytest.raises(ValueError, match=message):
        check_layout(ParallelConfig(tensor=4), read_dims(tmp_path), 4)


@pytest.mark.parametrize("stage", ["run", "policy_02"])
def test_without_torchrun_the_command_says_how_to_start_and_touches_nothing(config_file, stage):
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "megavar", stage, "--config", str(config_file), "rounds=2"],
        env=environment, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2 and "torchrun --nproc-per-node" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert not (config_file.parent / "runs").exists()


def test_an_unknown_stage_and_a_stage_before_its_input_are_refused(config_file, capsys):
    assert main(["odd", "--config", str(config_file)]) == 2
    assert "no stage 'odd' in this run; its stages are sft" in capsys.readouterr().out
    assert main(["verify", "--config", str(config_file)]) == 2
    assert "stage sample is not finished; run `megavar sample` first" in capsys.readouterr().out
