"""`megavar eval --model ... --suite ...`: any models on any suites, into a folder of its own, without a run.

Each model on each suite is an entry of the folder's manifest: what is finished is kept as long as its settings are the
same, and another model or suite adds to it.
"""

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from megavar.config.load import save_config
from megavar.config.schema import EvaluationConfig
from megavar.data.question_tokens import QuestionTokens
from megavar.data.questions import read_questions
from megavar.data.templates import Templates
from megavar.disk import atomic_write
from megavar.evaluation.results import Results
from megavar.rollout.engine import Engine
from megavar.rollout.service import RolloutService
from megavar.runs.manifest import Manifest
from megavar.runs.names import distinct_names, suite_names
from megavar.runs.owner import owned
from megavar.runs.plan import evaluation_settings
from megavar.stages.check_evaluation import check_evaluation
from megavar.stages.sample import Loaded, Sampling
from megavar.stages.suites import Suite, answer_suite, compare_models, write_suites
from megavar.stopping import stop_if_requested

SETTINGS = "evaluation.yaml"


@dataclass(frozen=True)
class _Task:
    """A model that answers a suite."""

    suite: Suite
    name: str
    model: Path

    @property
    def entry(self) -> str:
        """Of the manifest."""
        return f"{self.suite.name}/{self.name}"

    @property
    def folder(self) -> Path:
        """What it writes."""
        return self.suite.folder / self.name

    def outputs(self) -> list[Path]:
        """The files that stand for the result."""
        return [self.folder / kind / "data.parquet" for kind in ("traces", "answers", "verified")]


def evaluate(models: Sequence[Path], config: EvaluationConfig, folder: Path) -> Results:
    """Have every model answer every suite of `eval.suites`, and write `results.json` into the folder.

    Args:
        models: Hugging Face folders; each is shown its own chat template.

    Raises:
        ValueError: for a mistake in models, suites or settings, before anything is started; or if the folder has
            results of a model and a suite of these names under other settings.
    """
    names, files = distinct_names(models), config.eval.suites
    suites = [Suite(name, file, folder / name) for name, file in zip(suite_names(files), files, strict=True)]
    check_evaluation(models, config)
    if (folder / "config.yaml").exists():
        raise ValueError(f"{folder} is the folder of a run; choose another with --out.")
    with owned(folder):
        manifest = Manifest(folder)
        tasks = [_Task(suite, name, model) for name, model in zip(names, models, strict=True) for suite in suites]
        finished = [task for task in tasks if manifest.check(task.entry, _settings(task, config))]
        with atomic_write(folder / SETTINGS) as temporary:
            save_config(config, temporary)
        for task in finished:
            manifest.check_outputs(task.entry)
            print(f"{task.entry}: finished, skipped", flush=True)
        _run([task for task in tasks if task not in finished], models, manifest, config, folder)
        results = {
            suite.name: compare_models(suite, read_questions(Path(suite.file)), names, config) for suite in suites
        }
        return write_suites(results, dict(zip(names, models, strict=True)), config, folder)


def _settings(task: _Task, config: EvaluationConfig) -> dict[str, object]:
    return evaluation_settings(config, task.model, Path(task.suite.file))


def _run(
    tasks: Sequence[_Task], models: Sequence[Path], manifest: Manifest, config: EvaluationConfig, folder: Path
) -> None:
    """Do the tasks, model by model.

    Managed servers are started for each model: the weights of running ones can be exchanged, their stop tokens cannot.
    External servers, which serve the first model, are given the weights of the others.
    """
    is_external = config.rollout.mode == "external"
    with closing(RolloutService(config.rollout, models[0], folder / "servers")) as service:
        if is_external and tasks:
            service.run(models[0], _nothing)
        for model in models:
            for task in tasks:
                if task.model == model:
                    _answer(task, service, manifest, config)
            if not is_external:
                service.close()


async def _nothing(engine: Engine) -> None:
    """The servers are asked which model they serve when they are opened."""


def _answer(task: _Task, service: RolloutService, manifest: Manifest, config: EvaluationConfig) -> None:
    stop_if_requested(f"all results before {task.entry} are finished")
    print(f"{task.entry}: {config.eval.num_samples} samples a question", flush=True)
    manifest.begin(task.entry, _settings(task, config))
    started = time.monotonic()

    def load() -> Loaded:
        questions, templates = read_questions(Path(task.suite.file)), Templates(task.model, config.templates)
        return Loaded(questions, templates, QuestionTokens(questions, templates))

    answer_suite(service, task.model, Sampling(config.sample, config.seed, 0, load), config, task.folder)
    manifest.finish(task.entry, time.monotonic() - started, task.outputs())
