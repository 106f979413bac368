"""The code of docs/extending.md works: from outside, and applied to a copy of the package."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.small_run import round_records

from megavar.config.load import load_config
from megavar.config.schema import VerifyConfig
from megavar.data.questions import read_questions
from megavar.objectives import check_objective
from megavar.record_files import read_records, write_records
from megavar.records import Answer, Score, Weight
from megavar.stages.verify import verify_answers
from megavar.stages.weigh import weigh_traces
from megavar.verifiers import get_verifier

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(
    r"^```(\w+) file=(\S+)\n(.*?)^```$", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL | re.MULTILINE
)
BASE = ROOT / "examples" / "base" / "qwen3-tiny"


def write_block(folder: Path, kind: str, name: str, text: str) -> None:
    """Write a file of the page, or apply a diff whose hunks are separated by `...`."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if kind != "diff":
        assert not file.exists()
        file.write_text(text)
        return
    content = file.read_text()
    for hunk in text.split("...\n"):
        lines = hunk.splitlines(keepends=True)
        old, new = ("".join(line[1:] for line in lines if line[0] != mark) for mark in "+-")
        # An addition at a place where lines repeat is anchored by its context; it must tell one place from all others.
        assert content.count(old) == 1, f"{name} has {content.count(old)} places like\n{old}"
        content = content.replace(old, new)
    file.write_text(content)


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """A folder with the files that live outside the package."""
    folder = tmp_path_factory.mktemp("outside")
    for kind, name, text in BLOCKS:
        if "/" not in name:
            write_block(folder, kind, name, text)
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the repository with all of the page applied, the outside modules moved into the package."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("megavar", "tools", "conf"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    homes = {"hard_first.py": "megavar/objectives/hard_first.py", "any_of.py": "megavar/verifiers/any_of.py"}
    for kind, name, text in BLOCKS:
        write_block(folder, kind, homes.get(name, name), text)
    return folder


def load(folder: Path, *overrides: str):
    (folder / "train.jsonl").write_text('{"id": "a", "question": "1+2", "answer": "3", "trace": "1+2=3;"}\n')
    settings = {
        "name": "run", "runs_dir": str(folder), "model": str(BASE), "data": {"train": str(folder / "train.jsonl")},
        "sample": {"num_traces": 3, "num_answers": 2, "max_trace_tokens": 16, "max_answer_tokens": 8},
        "logging": {"tensorboard": False},
    }  # fmt: skip
    (folder / "run.yaml").write_text(json.dumps(settings))
    return load_config(folder / "run.yaml", list(overrides))


def test_the_objective_weighs_from_outside(outside, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(outside)
    config = load(tmp_path, "objective.name=hard_first:OBJECTIVE", "objective.ratio=none", "sample.sampler=policy")
    assert check_objective(config.objective, config.sample).compares_answers
    with pytest.raises(ValueError, match="compares several answers of a question"):
        check_objective(config.objective, load(tmp_path, "sample.num_traces=1", "sample.num_answers=1").sample)
    traces, _, scores = round_records()
    equal = [Score(*(s.question_id, s.trace_index, 1, s.logp_policy, s.logp_policy, s.logp_answer),
                   s.num_answers, s.num_correct) for s in scores]  # fmt: skip
    weigh_traces([(traces, equal)], config.objective.name, config.objective, tmp_path / "weights")
    weights: dict[str, list[float]] = {}
    for row in read_records(tmp_path / "weights" / "data.parquet", Weight):
        weights.setdefault(row.question_id, []).append(row.weight)
    # Correct answers of 2: easy 2 2 2 2, mixed 0 1 2 0, hard none, cut 1 0 0 and a truncated trace.
    assert weights["easy"] == weights["hard"] == [0, 0, 0, 0]
    assert weights["mixed"] == pytest.approx([0, 5 / 8 / 3, 5 / 8 * 2 / 3, 0])
    assert weights["cut"] == pytest.approx([7 / 8, 0, 0, 0])


def test_the_verifier_judges_in_the_pool_from_outside(outside, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(outside)
    questions = read_questions(outside / "questions.jsonl")
    texts = ["So it is\nGray", "grey \n", "blue", ""]
    answers = [Answer("sky", 0, i, 1, np.array([i], np.int32), text, "stop", i) for i, text in enumerate(texts)]
    with pytest.raises(ValueError, match=r"if you trust the code: verify\.plugins"):
        get_verifier(questions[0].verifier)
    config = VerifyConfig(num_workers=1, plugins=["any_of:verify"])
    write_records(tmp_path / "answers.parquet", answers, Answer)
    verify_answers(lambda: questions, tmp_path / "answers.parquet", config, 0.0, tmp_path / "verified")
    verified = read_records(tmp_path / "verified" / "data.parquet", Answer)
    assert [row.verdict for row in verified] == ["correct", "correct", "wrong", "no_answer"]


CHECKS = """
import asyncio, json, sys
from pathlib import Path
import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
import megavar
from megavar import cli
from megavar.checkpoints.convert import Model, differences, to_hugging_face, to_megatron
from megavar.config.load import load_config
from megavar.config.schema import ParallelConfig, PrecisionConfig
from megavar.objectives import OBJECTIVES
from megavar.record_files import read_records, write_records
from megavar.records import Answer, Trace, TrainSequence
from megavar.report.curves import IMPLIED_WEIGHTS
from megavar.rollout.engine import GenerateRequest
from megavar.rollout.transformers_engine import TransformersEngine
from megavar.runs.manifest import Manifest
from megavar.runs.plan import stages_of
from megavar.verifiers import VERIFIERS


def registered(checkout):
    assert Path(megavar.__file__).parent == checkout / "megavar"
    config = load_config(Path(sys.argv[3]), [])
    assert config.objective.name == "hard_first" and OBJECTIVES["hard_first"].implied_weight
    assert IMPLIED_WEIGHTS["hard first: 1 - P"](0.25) == 0.75
    assert VERIFIERS["any_of"]("grey", "grey|gray") == "correct"


def llama(folder):
    torch.manual_seed(0)
    sizes = dict(vocab_size=203, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8,
                 num_key_value_heads=4, max_position_embeddings=128, initializer_range=0.1)
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    model.save_pretrained(folder / "hf")
    to_megatron(folder / "hf", folder / "megatron", None, False)
    assert to_hugging_face(folder / "megatron", folder / "back", None, 10**9, False).same_as_source
    assert list(differences(Model(folder / "hf"), Model(folder / "back"))) == []
    from megavar.sequences import in_memory
    from megavar.training import parallel
    from megavar.training.scorer import Scorer

    parallel.start_alone()
    ids = np.random.default_rng(1).integers(0, 203, 40).astype(np.int32)
    scorer = Scorer(Model(folder / "megatron"), ParallelConfig(), PrecisionConfig(recipe="fp32"))
    scored = scorer.score(in_memory([TrainSequence(ids[:5], ids[5:], 1.0)]), [0], 1.0, 64)[0]
    parallel.stop()
    with torch.no_grad():
        rows = model(torch.from_numpy(ids).long()[None]).logits[0].log_softmax(-1)
    expected = rows[4:-1].gather(1, torch.from_numpy(ids[5:]).long()[:, None])[:, 0].numpy()
    assert np.abs(scored - expected).max() < 2e-5


def greedy(base):
    prompt = [339, 279, 16, 17]
    request = GenerateRequest(prompt, max_tokens=12, temperature=0.0)
    (generation,) = asyncio.run(TransformersEngine(base).generate(request))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, 4:]
    assert generation.ids.tolist() == expected.tolist()


def stages(file):
    config = load_config(file, [])
    for stage, run in stages_of(config)[:2]:  # as if pi_0 and q were trained
        assert stage.name in ("sft", "posterior")
        run.open()
        Manifest(run.folder).begin(stage.name, stage.settings(run))
        Manifest(run.folder).finish(stage.name, 1.0, [])
        folder = run.sft if stage.name == "sft" else run.posterior
        folder.mkdir(parents=True)
        (folder / "hf").symlink_to(config.model)
    for stage in ("sample", "lengths", "lengths"):
        assert cli.main([stage, "--config", str(file)]) == 0
    traces = read_records(run.round / "traces" / "data.parquet", Trace)
    lengths = json.loads((run.round / "lengths.json").read_text())
    assert len(traces) == 3 and sum(lengths["counts"]) == 3 and len(lengths["counts"]) == 10
    assert lengths["edges"][-1] == max(len(trace.trace_ids) for trace in traces) or len(set(lengths["counts"])) == 2
    closed = sum(trace.finish == "closed" for trace in traces)
    assert len(read_records(run.round / "answers" / "data.parquet", Answer)) == 2 * closed
    assert cli.main(["lengths", "--config", str(file), "lengths.num_bins=3"]) == 2
    assert cli.main(["lengths", "--config", str(file), "lengths.num_bins=0"]) == 2


if __name__ == "__main__":
    registered(Path(sys.argv[1]))
    greedy(Path(sys.argv[2]))
    stages(Path(sys.argv[4]))
    llama(Path(sys.argv[5]))
"""


def test_the_package_with_all_of_the_page_works(checkout, tmp_path):
    load(tmp_path)
    settings = json.loads((tmp_path / "run.yaml").read_text())
    settings |= {"rollout": {"mode": "in_process"}, "data": {**settings["data"], "max_sequence_tokens": 128}}
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    (tmp_path / "include.yaml").write_text(
        f"include: [{checkout}/conf/objective/hard_first.yaml]\nname: a\nmodel: m\ndata: {{train: t.jsonl}}\n"
    )
    (tmp_path / "checks.py").write_text(CHECKS)
    result = subprocess.run(
        [sys.executable, "checks.py", checkout, BASE, "include.yaml", "run.yaml", tmp_path / "llama"],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(checkout)},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "lengths: finished, skipped" in result.stdout
    assert "stage lengths was finished with lengths.num_bins=10, now it is 3" in result.stdout
    assert "lengths.num_bins=0 is too small" in result.stdout


def test_the_configuration_page_shows_the_new_key_and_its_stage(checkout):
    (checkout / "docs").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    subprocess.run([sys.executable, "tools/write_configuration_page.py"], cwd=checkout, env=environment, check=True)
    page = (checkout / "docs" / "configuration.md").read_text()
    assert "| `lengths.num_bins` | int, at least 1 | `10` | Bins of equal width" in page
    (row,) = [line for line in page.splitlines() if line.startswith("| `lengths.num_bins`")]
    assert row.endswith("| lengths |")


def test_the_code_of_the_page_is_in_the_style_of_the_package(checkout):
    files = [name for kind, name, _ in BLOCKS if kind == "python" and "/" in name]
    files += ["megavar/objectives/hard_first.py", "megavar/verifiers/any_of.py", "megavar/objectives/__init__.py"]
    for command in (["check"], ["format", "--check"]):
        result = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *files], cwd=checkout, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout + result.stderr
