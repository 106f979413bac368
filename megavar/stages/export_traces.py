"""Writes a round's weighted traces for trainers elsewhere: as chat messages, or as Megatron's indexed data set.

These are the sequences that the policy stage trains on, one row each, with their weights (docs/export.md).
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from megavar.config.load import load_config
from megavar.data.decode import Decoder, open_decoder
from megavar.data.question_tokens import QuestionTokens
from megavar.disk import atomic_write, make_folder
from megavar.progress import ProgressLine
from megavar.records import Question, TrainSequence
from megavar.runs.folder import Run
from megavar.runs.manifest import Manifest, NotFinished
from megavar.runs.plan import stages_of
from megavar.stages.run_files import question_tokens, templates
from megavar.stages.weighted import WeightedTraces, weighted_traces

Row = dict[str, Any]


def export_traces(run_folder: Path, form: str, selection: str | None, target: Path) -> int:
    """Write the weighted traces of the last round that finished `weigh`.

    Args:
        form: a key of `FORMS`, or `megatron`.
        selection: instead of the run's `objective.selection`.
        target: file to write; with `megatron` a folder.

    Returns:
        The number of sequences.

    Raises:
        ValueError: if the run has no weighted round, its files, questions or model were changed, or `target` exists or
            is below a file.
    """
    if not (run_folder / "config.yaml").is_file():
        raise ValueError(f"{run_folder} is not a run folder: it has no config.yaml; give a folder such as runs/demo.")
    if target.exists():
        raise ValueError(f"{target} exists; move it away, or give another name.")
    if not (above := next(folder for folder in target.parents if folder.exists())).is_dir():
        raise ValueError(f"{above} is a file, so {target} cannot be written; give another name.")
    run = _last_weighted(run_folder)
    if selection is not None:
        run = replace(run, config=replace(run.config, objective=replace(run.config.objective, selection=selection)))
    tokens = question_tokens(run)
    _check_settings(run)
    make_folder(target.parent)
    if form == "megatron":
        return _write_megatron(run, tokens, target)
    return _write_lines(run, tokens, FORMS[form], target)


def _last_weighted(run_folder: Path) -> Run:
    """The last round whose traces are weighed, its files checked; a moved run is read where it is now."""
    config = load_config(run_folder / "config.yaml", [])
    config = replace(config, runs_dir=str(run_folder.resolve().parent), name=run_folder.resolve().name)
    manifest = Manifest(run_folder)
    entries = manifest.entries()
    rounds = [run for stage, run in stages_of(config) if stage.name == "weigh"]
    finished = [run for run in rounds if entries.get(run.entry("weigh"), {}).get("status") == "finished"]
    if not finished:
        raise ValueError(f"{run_folder}: no round has finished `weigh`; run it first.")
    for stage in ("sample", "verify", "weigh"):
        manifest.check_outputs(finished[-1].entry(stage))
    return finished[-1]


def _check_settings(run: Run) -> None:
    """Questions and model must be those that the traces were sampled and weighed with, as they are where they train.

    Raises:
        ValueError: naming the stage and the differing key.
    """
    manifest = Manifest(run.folder)
    for stage, of_round in stages_of(run.config):
        if of_round.round_index == run.round_index and stage.name in ("sample", "verify", "score", "weigh"):
            with suppress(NotFinished):  # what they were made from is to be made again
                manifest.check(run.entry(stage.name), stage.settings(run))


def _write_lines(run: Run, tokens: QuestionTokens, row_of: Callable[[str, str, str | None], Row], target: Path) -> int:
    prompts, decode = templates(run), open_decoder(run.base)
    system, marker = run.config.templates.system, run.config.templates.open_marker
    count = 0
    with atomic_write(target) as aside, aside.open("w", encoding="utf-8") as lines, ProgressLine("export") as progress:
        for question, trace_index, sequence in _sequences(run, tokens):
            answer = marker + _text(decode, sequence, prompts.end_token)
            row = row_of(prompts.policy_text(question)[1], answer, system)
            row |= {"weight": sequence.weight, "question_id": question.id, "trace_index": trace_index}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
            progress.update(count, None, "sequences")
    return count


def _text(decode: Decoder, sequence: TrainSequence, end_token: int) -> str:
    """What the policy should write, without the end-of-sequence token, which the trainer's chat template adds."""
    ids = sequence.target_ids
    return decode(ids[:-1] if ids[-1] == end_token else ids)


def _messages(user: str, assistant: str, system: str | None) -> Row:
    """Rows of TRL, and of LLaMA-Factory's format `openai`."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return {"messages": [*first, {"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def _sharegpt(user: str, assistant: str, system: str | None) -> Row:
    """Rows of LLaMA-Factory's format `sharegpt`."""
    turns = [{"from": "human", "value": user}, {"from": "gpt", "value": assistant}]
    return {"conversations": turns} | ({} if system is None else {"system": system})


FORMS: dict[str, Callable[[str, str, str | None], Row]] = {"messages": _messages, "sharegpt": _sharegpt}
"""Name -> (user's message, the policy's text, system message) -> a row of JSON."""


def _write_megatron(run: Run, tokens: QuestionTokens, target: Path) -> int:
    # Not above: it imports Megatron.
    from megavar.training.sequence_files import write_documents

    aside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    with ProgressLine("export") as progress:

        def shown() -> Iterator[TrainSequence]:
            for count, (_, _, sequence) in enumerate(_sequences(run, tokens), start=1):
                progress.update(count, None, "sequences")
                yield sequence

        count = write_documents(aside, shown())
    aside.rename(target)
    return count


def _sequences(run: Run, tokens: QuestionTokens) -> Iterator[tuple[Question, int, TrainSequence]]:
    """Question, trace index (-1: the gold trace) and sequence, trace by trace."""
    for some in weighted_traces(run):
        question_of = {question.id: question for question in some.questions}
        traces_of, answers_of = defaultdict(list), defaultdict(list)
        for trace in some.traces:
            traces_of[trace.question_id, trace.trace_index].append(trace)
        for answer in some.answers:
            answers_of[answer.question_id, answer.trace_index].append(answer)
        for weight in some.weights:
            key = (weight.question_id, weight.trace_index)
            questions = [question_of[key[0]]] if key[0] in question_of else []
            one = WeightedTraces(questions, traces_of[key], answers_of[key], [weight])
            for sequence in one.sequences(tokens, run.config.objective.train_answers):
                yield question_of[key[0]], weight.trace_index, sequence
