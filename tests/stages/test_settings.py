"""Each stage records the configuration keys that its work reads, and no others.

The stages run for real on one rank, and every read of a configuration value in their work is written down. The engine
is one of this file, which continues each prompt in the same way: what it would read is not a stage's.
"""

import json
import sys
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path

import pytest
from helpers.parrot import ParrotService

from megavar.config import schema
from megavar.config.load import load_config
from megavar.data.templates import Templates
from megavar.runs.folder import Run
from megavar.runs.manifest import Manifest
from megavar.runs.plan import stages_of
from megavar.training import parallel

BASE = Path(__file__).parents[2] / "examples" / "base" / "qwen3-tiny"
VARIANTS = {
    "gold": ["data.eval=eval.jsonl", "eval.suites=[suite.jsonl]", "eval.pass_at=[1]"],
    "rollout": ["posterior.source=rollout", "objective.train_answers=reference", "policy.init=sft"],
    "reverse_kl": [
        "posterior.source=reverse_kl",
        "posterior.allow_collapse=true",
        "rounds=2",
        "objective.ratio=sequence",
    ],
    "prompt": ["posterior.source=prompt", "rounds=2"],
    "policy": ["sample.sampler=policy", "objective.ratio=none", "objective.on_no_correct_trace=gold"],
}
WITHOUT_EFFECT = {
    "name", "runs_dir", "data.max_sequence_tokens", "posterior.allow_collapse", "sample.flush_seconds",
    "score.microbatch_tokens", "score.chunk_sequences", "verify.num_workers", "logging.tensorboard",
    "logging.wandb_project",
    *(f"parallel.{item.name}" for item in fields(schema.ParallelConfig)),
    *(f"{job}.{name}" for job in ("sft", "posterior.train", "policy.train")
      for name in ("microbatch_tokens", "recompute", "distributed_optimizer", "overlap_communication",
                   "pack_length", "overlap_tensor_parallel", "optimizer_offload", "save_interval", "save_minutes",
                   "keep_checkpoints", "log_interval")),
}  # fmt: skip
"""Layout, speed, limits that are checked, and what is logged."""
CHOOSES_INPUTS = {"posterior.source", "sample.sampler", "policy.init"}
"""Decide which stage's outputs are read; those are recorded by digest."""
EXCEPTIONS = {
    "weigh": {
        "sample.num_traces",
        "score.temperature",
        "sample.temperature",
        "precision.recipe",
        "score.precision",
    },  # for its warnings
    "rollouts": {"objective.num_traces", "objective.max_leakage"},  # set to null there
    "posterior": {"objective.max_leakage"},  # likewise
}
OF_COPIES = {schema.ObjectiveConfig: "objective.", schema.PrecisionConfig: "precision."}
"""Sections that stages make altered copies of."""
NOT_READ_HERE = {"epochs", "rollout.dtype", "rollout.deterministic"}
"""Keys that other settings of these runs leave unused, and those of the serving engine."""


class Reads:
    """Writes down which keys of a configuration are read while it is on."""

    def __init__(self, config, monkeypatch) -> None:
        self.keys: set[str] = set()
        self.on = False
        self.path_of = {}
        self._name(config, "")
        for kind in {type(section) for section in self.sections}:
            monkeypatch.setattr(kind, "__getattribute__", self._reader(), raising=False)

    def _name(self, section, prefix):
        self.sections = [*getattr(self, "sections", []), section]
        self.path_of[id(section)] = prefix
        for item in fields(section):
            if is_dataclass(value := getattr(section, item.name)):
                self._name(value, f"{prefix}{item.name}.")

    def _reader(self):
        def read(section, name):
            value = object.__getattribute__(section, name)
            if self.on and name in type(section).__dataclass_fields__ and not is_dataclass(value):
                caller = sys._getframe(1)
                copies = caller.f_globals["__name__"] in ("dataclasses", "copy")
                checks = caller.f_code is Templates.__init__.__code__  # that every template has its placeholders
                if not (copies or checks):
                    self.keys.add(self.path_of.get(id(section), OF_COPIES.get(type(section))) + name)
            return value

        return read


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """(variant, stage) -> (keys that its settings record, keys that its work read)."""
    found = {}
    parallel.start_alone()
    with pytest.MonkeyPatch.context() as monkeypatch:
        for variant, overrides in VARIANTS.items():
            folder = tmp_path_factory.mktemp(variant)
            monkeypatch.chdir(folder)
            rows = [{"id": f"q{n}", "question": "1+1", "answer": answer, "trace": "7+3\n0\n"}
                    for n, answer in enumerate("2223")]  # fmt: skip
            rows.append({**rows[0], "id": "unjudged", "verifier": "none"})
            for name in ("train", "eval"):
                Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
            Path("suite.jsonl").write_text("\n".join(map(json.dumps, rows[:4])))
            Path("run.yaml").write_text(
                f"name: a\nmodel: {BASE}\ndata: {{train: train.jsonl, max_sequence_tokens: 160}}\n"
                "precision: {recipe: fp32}\nsft: &train {num_steps: 1, batch_sequences: 4}\n"
                "posterior: {train: *train}\npolicy: {mix_gold: true, train: *train}\n"
                "sample: {num_traces: 2, num_answers: 2, max_trace_tokens: 64, max_answer_tokens: 16}\n"
                "logging: {tensorboard: false}\neval: {num_bootstrap: 10}\n"
            )
            config = load_config(Path("run.yaml"), overrides)
            reads = Reads(config, monkeypatch)
            Run(config).open()
            for stage, run in stages_of(config):
                settings = stage.settings(run)
                digests = set(stage.inputs(run))
                Manifest(run.folder).begin(run.entry(stage.name), settings)
                monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))  # nothing is kept
                reads.keys, reads.on = set(), True
                import_module(f"megavar.stages.{stage.name}").execute(run, ParrotService())
                reads.on = False
                found[variant, run.entry(stage.name)] = (stage.name, settings.keys() - digests, reads.keys)
                Manifest(run.folder).finish(run.entry(stage.name), 1.0, stage.outputs(run))
    parallel.stop()
    return found


def test_every_key_that_a_stages_work_reads_is_recorded(seen):
    for (variant, entry), (stage, recorded, read) in seen.items():
        left_out = read - recorded - WITHOUT_EFFECT - CHOOSES_INPUTS - EXCEPTIONS.get(stage, set())
        assert left_out == set(), (variant, entry)


def test_every_key_that_a_stage_records_is_read_by_its_work(seen):
    for stage in {stage for stage, _, _ in seen.values()}:
        rows = [(recorded, read) for name, recorded, read in seen.values() if name == stage]
        recorded, read = (set().union(*(row[part] for row in rows)) for part in (0, 1))
        unread = {key for key in recorded - read if not key.endswith(tuple(NOT_READ_HERE))}
        assert unread == set(), stage


def test_all_stages_were_seen(seen):
    assert len({stage for stage, _, _ in seen.values()}) == 10
