"""The folder of a run: where each stage of each round reads and writes."""

from dataclasses import dataclass, replace
from pathlib import Path

from megavar.config.load import save_config
from megavar.config.schema import RunConfig
from megavar.disk import atomic_write, make_folder
from megavar.records import Question


@dataclass(frozen=True)
class Run:
    """A configuration and the paths of one of its rounds.

    Example: `Run(config, 2).policy` is `runs/NAME/round_02/policy`.
    """

    config: RunConfig
    round_index: int = 1

    def entry(self, stage: str) -> str:
        """Name of a stage of this round in manifest, metrics and on the command line: `policy`, `policy_02`, ..."""
        return stage if self.round_index == 1 else f"{stage}_{self.round_index:02d}"

    @property
    def previous(self) -> "Run":
        """The run in the round before this one."""
        assert self.round_index > 1
        return replace(self, round_index=self.round_index - 1)

    @property
    def folder(self) -> Path:
        """Everything the run writes."""
        return Path(self.config.runs_dir) / self.config.name

    @property
    def base(self) -> Path:
        """Hugging Face folder of the base model."""
        return Path(self.config.model)

    @property
    def sft(self) -> Path:
        """pi_0: checkpoints/ and hf/."""
        return self.folder / "sft"

    @property
    def round(self) -> Path:
        """What this round samples, scores, weighs and trains."""
        return self.folder / f"round_{self.round_index:02d}"

    @property
    def posterior(self) -> Path:
        """q: checkpoints/ and hf/. On gold traces it is trained in the first round only."""
        first = self.config.posterior.source == "gold"
        return (replace(self, round_index=1) if first else self).round / "posterior"

    @property
    def learns_by_reverse_kl(self) -> bool:
        """Whether this round's q continues from the previous one by the ELBO's gradient, on that q's own traces."""
        return self.config.posterior.source == "reverse_kl" and self.round_index > 1

    @property
    def reference(self) -> Path:
        """The policy that this round starts with, as a Hugging Face folder: pi_0, or the previous round's."""
        return self.sft / "hf" if self.round_index == 1 else self.previous.policy / "hf"

    @property
    def policy(self) -> Path:
        """The policy that this round trains: checkpoints/ and hf/."""
        return self.round / "policy"

    @property
    def eval(self) -> Path:
        """MODEL/ of each policy on `data.eval`, and SUITE/MODEL/ on each of `eval.suites`."""
        return self.folder / "eval"

    @property
    def final(self) -> Path:
        """Symlink to the newest round's policy as a Hugging Face folder."""
        return self.folder / "hf"

    def take_questions(self, questions: list[Question]) -> list[Question]:
        """This round's part of the train file's questions."""
        number = self.config.data.questions_per_round
        first = (self.round_index - 1) * (number or 0) if self.config.data.fresh_questions else 0
        return questions[first:][:number]

    def open(self) -> None:
        """Create the folder and write the resolved configuration into it; rank 0 only."""
        make_folder(self.folder)
        with atomic_write(self.folder / "config.yaml") as temporary:
            save_config(self.config, temporary)
