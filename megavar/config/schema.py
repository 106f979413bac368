"""The run configuration: one dataclass a section, every default here and nowhere else.

A run is one YAML file over these dataclasses (`load.py` reads it, `validate` checks it). Functions below
`stages/` take one of these sections or plain values, never all of `RunConfig`.
"""

import re
from dataclasses import dataclass, field, fields, is_dataclass
from math import gcd, isfinite
from typing import Any

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


MAX_CHARACTERS = 4000
"""Of a string that is no template: a name, a path, an address."""
MAX_FILE_NAME = 255


def choice(*allowed: str, default: str) -> Any:
    """A string field that must be one of `allowed`."""
    return field(default=default, metadata={"choices": allowed})


def at_least(minimum: float, default: Any) -> Any:
    """A number field that must not be below `minimum`."""
    return field(default=default, metadata={"minimum": minimum})


@dataclass
class DataConfig:
    """Input files (JSONL or Parquet of `questions` records) and the sequence limit."""

    train: str = "???"
    """Training questions: a .jsonl or .parquet file (docs/records.md#questions)."""
    eval: str | None = None
    """Held-out questions, a file of the same kind; null: nothing is evaluated."""
    on_bad_reference: str = choice("refuse", "drop", default="refuse")
    """A question whose reference answer is not correct by its own verifier: an error, or left out."""
    questions_per_round: int | None = None
    """Questions of the train file that traces are sampled for in a round: its first N; null: all."""
    fresh_questions: bool = False
    """Round t takes the t-th N questions instead: a curriculum, if the file is in order."""
    max_sequence_tokens: int = at_least(16, default=4096)
    """Limit of prompt + trace + answer in tokens; a longer gold sequence is an input error."""


@dataclass
class TemplateConfig:
    """What the policy (question only) and the posterior (question and hint) are asked."""

    system: str | None = None
    """System message of every prompt; null: none."""
    policy: str = "{question}"
    """User message of the policy's prompt; inserts `{question}`."""
    posterior: str = "{question}\n\nHint: the final answer is {answer}."
    """User message of the posterior's prompt; inserts `{question}` and, as the hint, `{answer}`."""
    solution: str = "\n\nThe final answer is \\boxed{{{answer}}}."
    """Derives the solution of questions without one."""
    reply: str = "{solution}"
    """Reference answer: what the policy should write after its trace; inserts `{solution}`."""
    open_marker: str = "<think>\n"
    """Ends every prompt, so that the model continues with its trace; may be empty."""
    close_marker: str = "</think>"
    """Ends a trace, and belongs to it."""


@dataclass
class ParallelConfig:
    """Sizes of the parallel layout; data parallelism is what remains of the world size."""

    tensor: int = at_least(1, default=1)
    """Tensor-parallel size, ranks."""
    pipeline: int = at_least(1, default=1)
    """Pipeline-parallel size, ranks."""
    virtual_pipeline: int = at_least(1, default=1)
    """Model chunks a pipeline rank holds (interleaved schedule); 1: plain 1F1B."""
    context: int = at_least(1, default=1)
    """Context-parallel size, ranks: each sequence is split along its tokens."""
    expert: int = at_least(1, default=1)
    """Expert parallelism: the experts of a mixture, spread over the ranks of a pipeline stage."""
    sequence: bool | None = None
    """Sequence parallelism: norms split along tokens over the tensor-parallel ranks; null: with tensor parallelism."""

    @property
    def sequence_parallel(self) -> bool:
        """Whether tokens are split over the tensor-parallel ranks between layers."""
        return self.tensor > 1 if self.sequence is None else self.sequence

    @property
    def ranks_per_replica(self) -> int:
        """Ranks of one copy of the model; a multiple of it adds data parallelism."""
        return self.tensor * self.pipeline * self.context

    @property
    def least_ranks(self) -> int:
        """The fewest ranks of this layout: experts are spread over the ranks of a pipeline stage."""
        return self.ranks_per_replica * self.expert // gcd(self.expert, self.tensor * self.context)


@dataclass
class PrecisionConfig:
    """Arithmetic of the training engine."""

    recipe: str = choice("fp32", "bf16", "fp8_delayed", "fp8_current", "fp8_blockwise", "mxfp8", default="bf16")
    """Of parameters and activations: float32 or bf16. With FP8 those are bf16, and Transformer Engine's linear layers
    multiply in 8 bits (docs/gpu.md#precision). Gradients are added up, and optimizer states kept, in float32."""


@dataclass
class TrainConfig:
    """One training job: data order, optimizer, schedule, checkpoints."""

    epochs: float = at_least(0, default=1.0)
    """Passes over the sequences; fractions are allowed."""
    num_steps: int | None = None
    """Optimizer steps, whatever `epochs` says; to compare runs at equal training."""
    batch_sequences: int = at_least(1, default=32)
    """Sequences in one optimizer step, over all data-parallel ranks (B in the loss normaliser)."""
    microbatch_tokens: int = at_least(1, default=8192)
    """Token budget of one packed microbatch on one data-parallel rank."""
    pack_length: str = choice("free", "fixed", default="free")
    """Tokens of a microbatch: those of its sequences, or always `microbatch_tokens`, the rest of which is padding."""
    learning_rate: float = at_least(0, default=1e-5)
    """Peak learning rate."""
    min_learning_rate_ratio: float = at_least(0, default=0.1)
    """Learning rate at the end, as a fraction of the peak."""
    warmup_ratio: float = at_least(0, default=0.1)
    """Fraction of the steps over which the learning rate rises linearly from 0."""
    decay: str = choice("cosine", "linear", "constant", default="cosine")
    """Schedule from the peak to the end."""
    weight_decay: float = at_least(0, default=0.0)
    """AdamW weight decay; norms and biases have none."""
    adam_beta1: float = 0.9
    """AdamW decay rate of the first moment."""
    adam_beta2: float = 0.95
    """AdamW decay rate of the second moment."""
    adam_eps: float = 1e-8
    """AdamW epsilon."""
    clip_grad: float = at_least(0, default=1.0)
    """Global gradient norm limit; 0: no clipping."""
    loss_normalizer: float | None = None
    """C of the loss; null: B x the data set's mean of (weight x trained tokens)."""
    recompute: str = choice("none", "selective", "full", default="none")
    """Activation checkpointing: none, the core attention only, or every layer."""
    distributed_optimizer: bool = True
    """Shard optimizer states over the data-parallel ranks."""
    overlap_communication: bool = True
    """With the distributed optimizer: reduce gradients during the last backward pass of a step, and gather updated
    parameters during the next forward pass."""
    overlap_tensor_parallel: bool = False
    """Exchange activations between tensor-parallel ranks during matrix products, by Transformer Engine's buffers, which
    need `pack_length=fixed`, sequence parallelism and GPUs of one node."""
    optimizer_moments: str = choice("fp32", "bf16", default="fp32")
    """AdamW moments on GPUs: bf16 needs 4 bytes less a parameter, Transformer Engine and the distributed optimizer."""
    optimizer_offload: float = at_least(0, default=0.0)
    """Fraction of the optimizer states that GPUs keep in host memory and update there."""
    save_interval: int = at_least(1, default=100)
    """Optimizer steps between checkpoints."""
    save_minutes: float = at_least(0, default=15.0)
    """A checkpoint is saved at the latest this long after the one before; 0: at `save_interval` only."""
    keep_checkpoints: int = at_least(1, default=2)
    """Newest checkpoints that are kept."""
    log_interval: int = at_least(1, default=1)
    """Optimizer steps between rows of metrics."""

    @property
    def fixed_tokens(self) -> int:
        """Tokens that every microbatch has; 0: as many as its sequences."""
        return self.microbatch_tokens if self.pack_length == "fixed" else 0

    def steps_of(self, num_sequences: int) -> int:
        """Optimizer steps on this many sequences; the shuffled stream continues across epoch boundaries."""
        return self.num_steps or max(1, round(self.epochs * num_sequences / self.batch_sequences))


@dataclass
class RolloutConfig:
    """The SGLang servers."""

    mode: str = choice("managed", "external", default="managed")
    """`managed`: started and stopped by the run, on each of its nodes; `external`: yours, at `rollout.urls`."""
    python: str = ".venv-sglang/bin/python"
    """Interpreter with SGLang installed (managed)."""
    urls: list[str] = field(default_factory=list)
    """Base URLs of SGLang servers, or of sglang-routers in front of them (external)."""
    worker_urls: list[str] = field(default_factory=list)
    """Base URLs of the servers behind the routers, which get weights and are watched (external); empty: the routers are
    asked for them."""
    api_key_env: str | None = None
    """Name of the environment variable with the API key of external servers and routers; null: they have none, or
    `api_key_file`. Managed servers have a new key at each start."""
    api_key_file: str | None = None
    """File with that key, which only its owner may read, instead of a variable."""
    num_servers: int = at_least(1, default=1)
    """Managed servers on each node."""
    tensor_parallel_size: int = at_least(1, default=1)
    """GPUs of each managed server."""
    dtype: str = choice("auto", "float32", "bfloat16", default="auto")
    """Of the served weights; `auto`: the checkpoint's, by SGLang's rules."""
    max_total_tokens: int | None = None
    """Size of the KV cache of each managed server, tokens; null: SGLang's choice, 65,536 on CPU."""
    context_length: int | None = None
    """Longest prompt and continuation of managed servers, tokens; null: the model's."""
    mem_fraction: float | None = None
    """Fraction of a GPU's memory for weights and KV cache of managed servers, which must be free when they start; null:
    SGLang's choice of what is free."""
    between_stages: str = choice("stop", "release", default="stop")
    """Managed servers on GPUs after a stage that samples: `stop` ends them; `release` keeps the processes, without the
    memory of weights and KV cache. On CPUs they stay as they are."""
    deterministic: bool = False
    """Ask SGLang for deterministic inference, without which it ignores request seeds."""
    concurrency: int = at_least(1, default=64)
    """Samples in flight for each server."""
    request_timeout_seconds: float = at_least(0.1, default=1800.0)
    """Deadline of one attempt of a request."""
    max_retries: int = at_least(0, default=5)
    """Further attempts of a request after a server error, a broken connection or a time-out."""
    start_timeout_seconds: float = at_least(1, default=900.0)
    """Deadline for a managed server to become healthy."""
    server_args: list[str] = field(default_factory=list)
    """Extra arguments passed to `sglang.launch_server` as they are; no keys, since they are saved with the run."""


@dataclass
class SampleConfig:
    """How many traces and answers are sampled, and how."""

    sampler: str = choice("posterior", "policy", default="posterior")
    """The model that traces are sampled from: q, or the policy without a hint (as RFT, REINFORCE and GRPO do)."""
    num_traces: int = at_least(1, default=8)
    """K: traces for each question."""
    num_answers: int = at_least(1, default=8)
    """n: answers from the policy for each trace."""
    temperature: float = at_least(0, default=0.7)
    """Sampling temperature of traces and answers; 0: greedy."""
    top_p: float = 1.0
    """Nucleus sampling: the probability mass that is kept; 1: all."""
    max_trace_tokens: int = at_least(1, default=3072)
    """Tokens after which a trace is truncated."""
    max_answer_tokens: int = at_least(1, default=512)
    """Tokens after which an answer is truncated."""
    keep_logps: str = choice("some", "all", default="some")
    """The server's log-probs of traces, which are compared with the training engine's: those of the first 64 questions,
    or of all. They take most of a reply."""
    flush_seconds: float = at_least(0.1, default=2.0)
    """Finished samples are on disk at the latest after this time."""


@dataclass
class VerifyConfig:
    """Verdicts in killable worker processes."""

    num_workers: int = at_least(1, default=2)
    """Verifier processes."""
    timeout_seconds: float = at_least(0.1, default=10.0)
    """Deadline of one verdict."""
    plugins: list[str] = field(default_factory=list)
    """Verifiers of your own that questions may name, each `package.module:function`. One that is not listed here is
    refused: a data file must not choose what code runs."""


@dataclass
class ScoreConfig:
    """Log-probs by the training engine's forward."""

    temperature: float = at_least(1e-6, default=1.0)
    """Logits are divided by it; equal to `sample.temperature` for exact importance weights."""
    microbatch_tokens: int = at_least(1, default=16384)
    """Token budget of one packed microbatch on one data-parallel rank."""
    chunk_sequences: int = at_least(1, default=4096)
    """Sequences scored between two writes to disk."""
    precision: str = choice("auto", "fp32", "bf16", "fp8_current", "fp8_blockwise", "mxfp8", default="auto")
    """Arithmetic of scoring, whatever models are trained in; `auto`: bf16, or fp32 if `precision.recipe` is. FP8's
    rounding would go into the weights. fp8_delayed is none of these: its scales move in training only."""


@dataclass
class ObjectiveConfig:
    """How scores become weights (docs/method.md, equations 6 and 8)."""

    name: str = "iwae"
    """One of docs/objectives.md, or `package.module:name` of your own."""
    num_traces: int | None = None
    """K: only the first K of the sampled traces are used; null: all."""
    ratio: str = choice("geometric_mean", "sequence", "none", default="geometric_mean")
    """d_k, the trace log-ratio: mean over the tokens, sum, or 0."""
    answer_estimator: str = choice("accuracy", "geometric_mean", "likelihood", default="accuracy")
    """a_k, the estimate of pi(Y_x | x, z_k): share of correct sampled answers, or mean or summed log-prob of the
    reference answer."""
    train_answers: str = choice("all_correct", "first_correct", "reference", default="all_correct")
    """The answers trained on after a trace: its distinct correct ones, the first of them, or the reference answer."""
    on_no_correct_trace: str = choice("drop", "gold", "geometric_mean", default="drop")
    """A question without a correct trace: left out, its gold trace instead, or weights by the geometric mean."""
    on_unverifiable: str = choice("geometric_mean", "drop", default="geometric_mean")
    """A question with the verifier `none`: weights by the geometric mean of its reference answer, or left out."""
    selection: str = choice("weighted", "resample", "best", default="weighted")
    """Train every trace with its weight, one resampled trace a question, or the one of the largest weight."""
    max_leakage: float | None = None
    """Traces with more leakage are left out, as truncated ones are, nats: those to which the policy gives the answer,
    where it first appears, a log-prob below minus this (docs/method.md#leakage); null: none."""
    min_weight: float = at_least(0, default=0.0)
    """Traces under this normalised weight are pruned; their weight mass is reported."""


@dataclass
class PosteriorConfig:
    """The posterior q_phi and what it learns from (equation 9)."""

    source: str = choice("gold", "rollout", "reverse_kl", "prompt", default="gold")
    """`gold`: the data's traces, once; `rollout`: in each round the policy's own, weighted by accuracy; `reverse_kl`:
    as gold, and from the second round on the ELBO's own gradient on the last round's traces of q; `prompt`: q is not
    trained, but is the policy that the round starts with, shown the posterior's prompt."""
    num_rollouts: int = at_least(1, default=8)
    """M: traces from the policy for each question (`rollout`)."""
    allow_collapse: bool = False
    """Run `source=reverse_kl`, although it collapses (docs/objectives.md)."""
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass
class PolicyConfig:
    """The final policy."""

    init: str = choice("base", "sft", default="base")
    """From the base, or from the policy that the round starts with: pi_0 in the first one."""
    mix_gold: bool = False
    """Adds the gold sequences of the round's questions, weight 1 each."""
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass
class EvalConfig:
    """Held-out accuracy of pi_0 and of each round's policy."""

    num_samples: int = at_least(1, default=4)
    """Samples for each question; pass@k of `data.eval` is reported for k = 1 and k = num_samples."""
    suites: list[str] = field(default_factory=list)
    """Further files of held-out questions, each with results of its own (docs/evaluation.md)."""
    pass_at: list[int] = field(default_factory=list)
    """The k of each pass@k in `results.json`; empty: `num_samples` alone (pass@1 is avg@n)."""
    models: list[str] = field(default_factory=lambda: ["pi_0", "policy"])
    """Which models; `[pi_0]` needs no stage after sft, to measure a run of more SFT."""
    num_bootstrap: int = at_least(1, default=1000)
    """Bootstrap resamples of the 95 % intervals."""


@dataclass
class LoggingConfig:
    """Where metrics go besides `metrics.jsonl`."""

    level: str = choice("info", "debug", default="info")
    """`debug` also shows what Megatron, torch, transformers and other libraries log and warn of."""
    tensorboard: bool = True
    """Write TensorBoard files."""
    wandb_project: str | None = None
    """Weights & Biases project to log to; null: none."""


@dataclass
class EvaluationConfig:
    """The sections of a run that an evaluation without one reads (`megavar eval --model`)."""

    seed: int
    templates: TemplateConfig
    rollout: RolloutConfig
    sample: SampleConfig
    verify: VerifyConfig
    eval: EvalConfig
    logging: LoggingConfig


@dataclass
class RunConfig:
    """One run: `runs_dir`/`name` holds everything it writes."""

    name: str = "???"
    """Of the run and its folder."""
    runs_dir: str = "runs"
    """Folder that holds the runs."""
    seed: int = 1
    """Of data order, sampling, `objective.selection=resample` and bootstrap intervals."""
    rounds: int = at_least(1, default=1)
    """T: rounds; each samples with the policy of the one before, and trains from `policy.init`."""
    model: str = "???"
    """Hugging Face folder of the base model."""
    reuse: list[str] = field(default_factory=list)
    """Folders of other runs, or one of them: each stage that one has finished with equal settings and inputs is linked
    from there instead of run again (docs/reliability.md#what-reuse-does)."""
    data: DataConfig = field(default_factory=DataConfig)
    templates: TemplateConfig = field(default_factory=TemplateConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    sft: TrainConfig = field(default_factory=TrainConfig)
    posterior: PosteriorConfig = field(default_factory=PosteriorConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def evaluation(self) -> EvaluationConfig:
        """The sections that evaluating a model reads."""
        return EvaluationConfig(**{item.name: getattr(self, item.name) for item in fields(EvaluationConfig)})

    @property
    def num_traces(self) -> int:
        """K: the traces of a question that are weighed."""
        return self.objective.num_traces or self.sample.num_traces

    @property
    def trains_posterior(self) -> bool:
        """Whether q is a model of its own."""
        return self.sample.sampler == "posterior" and self.posterior.source != "prompt"

    @property
    def training_jobs(self) -> dict[str, TrainConfig]:
        """The settings of each training job, by their key."""
        return {"sft": self.sft, "posterior.train": self.posterior.train, "policy.train": self.policy.train}

    @property
    def score_recipe(self) -> str:
        """The precision that traces are scored in."""
        if self.score.precision != "auto":
            return self.score.precision
        return "fp32" if self.precision.recipe == "fp32" else "bf16"


def validate(config: Any, path: str = "") -> None:
    """Check every value of `config` on its own, then the pairs that depend on each other.

    Raises:
        ValueError: naming the key (both keys for a pair), what it holds and what it may hold.
    """
    for item in fields(config):
        key, value = path + item.name, getattr(config, item.name)
        if is_dataclass(value):
            validate(value, key + ".")
        allowed = item.metadata.get("choices")
        if allowed and value not in allowed:
            raise ValueError(f"{key}={value!r:.200} is unknown; use one of {', '.join(allowed)}.")
        if item.type != list[int]:
            for text in value if isinstance(value, list) else [value]:
                _check_text(key, text, isinstance(value, list))
        if isinstance(value, float) and not isfinite(value):
            raise ValueError(f"{key}={value} is not a finite number.")
        minimum = item.metadata.get("minimum")
        if minimum is not None and value < minimum:
            raise ValueError(f"{key}={value} is too small; the least is {minimum}.")
    if isinstance(config, RunConfig):
        if not _NAME.fullmatch(config.name):
            raise ValueError(
                f"name={config.name!r:.200} is not the name of a folder: use 1 to 100 letters, digits, '.', '_' and "
                "'-', beginning with a letter, a digit or '_'; runs_dir says where it is."
            )
        _validate_pairs(config)
    if isinstance(config, RolloutConfig):
        _validate_rollout(config)
    if isinstance(config, EvalConfig):
        _validate_eval(config)


def _check_text(key: str, text: Any, in_list: bool) -> None:
    """Refuse what no file, address or prompt can hold."""
    if not isinstance(text, str):
        if in_list:
            raise ValueError(f"{key} has the element {text!r:.200}, which is not a string.")
        return
    if any(not (char.isprintable() or char in "\n\t") for char in text):
        raise ValueError(f"{key}={text!r:.200} contains a control character or half of a character; remove it.")
    if key.startswith("templates."):
        return
    if len(text) > MAX_CHARACTERS or max(map(len, text.split("/"))) > MAX_FILE_NAME:
        raise ValueError(
            f"{key}={text!r:.100}... has {len(text)} characters; at most {MAX_CHARACTERS} are possible, and "
            f"{MAX_FILE_NAME} between two slashes."
        )


def _validate_pairs(config: RunConfig) -> None:
    objective, sample = config.objective, config.sample
    if objective.answer_estimator != "accuracy" and objective.train_answers != "reference":
        raise ValueError(
            f"objective.answer_estimator={objective.answer_estimator} weighs the reference answer, but "
            f"objective.train_answers={objective.train_answers} trains on sampled ones; use "
            "objective.train_answers=reference."
        )
    if objective.num_traces is not None and not 1 <= objective.num_traces <= sample.num_traces:
        raise ValueError(
            f"objective.num_traces={objective.num_traces} is not between 1 and sample.num_traces={sample.num_traces}; "
            "sample more traces or use fewer."
        )
    if sample.sampler == "policy" and objective.ratio != "none":
        raise ValueError(
            f"sample.sampler=policy has no ratio to take, but objective.ratio={objective.ratio}: rounding would "
            "stand in for it; use objective.ratio=none."
        )
    if objective.max_leakage is not None and objective.max_leakage < 0:
        raise ValueError(
            f"objective.max_leakage={objective.max_leakage} would leave out every trace that says its answer: no "
            "leakage is negative; use a limit in nats, or null."
        )
    _validate_posterior(config)
    _validate_training(config)
    if objective.min_weight > 0 and objective.selection != "weighted":
        raise ValueError(
            f"objective.min_weight={objective.min_weight} has no effect with objective.selection="
            f"{objective.selection}; use selection=weighted or min_weight=0."
        )
    needed = sample.max_trace_tokens + sample.max_answer_tokens
    if needed >= config.data.max_sequence_tokens:
        raise ValueError(
            f"sample.max_trace_tokens={sample.max_trace_tokens} + sample.max_answer_tokens="
            f"{sample.max_answer_tokens} leave no room for a prompt in data.max_sequence_tokens="
            f"{config.data.max_sequence_tokens}; raise the last or lower the first two."
        )
    if config.data.fresh_questions and config.data.questions_per_round is None:
        raise ValueError("data.fresh_questions=true needs data.questions_per_round, how many a round takes.")
    if config.parallel.virtual_pipeline > 1 and config.parallel.pipeline == 1:
        raise ValueError(
            f"parallel.virtual_pipeline={config.parallel.virtual_pipeline} needs parallel.pipeline of at least 2, "
            f"got {config.parallel.pipeline}."
        )


def _validate_eval(config: EvalConfig) -> None:
    if not config.models or not set(config.models) <= {"pi_0", "policy"}:
        raise ValueError(f"eval.models={config.models} must name one or both of pi_0, policy.")
    if config.pass_at and not 1 <= min(config.pass_at) <= max(config.pass_at) <= config.num_samples:
        raise ValueError(
            f"eval.pass_at={config.pass_at} (--k): pass@k needs 1 to eval.num_samples={config.num_samples} (--samples) "
            "samples of each question; sample more, or lower k."
        )


def _validate_rollout(rollout: RolloutConfig) -> None:
    _validate_secrets(rollout)
    if rollout.mode == "external" and not rollout.urls:
        raise ValueError("rollout.mode=external needs rollout.urls: the base URLs of running SGLang servers.")
    for key, urls in (("urls", rollout.urls), ("worker_urls", rollout.worker_urls)):
        if rollout.mode == "managed" and urls:
            raise ValueError(f"rollout.{key}={urls} are ignored in rollout.mode=managed; use rollout.mode=external.")


def _validate_secrets(rollout: RolloutConfig) -> None:
    """Refuse keys and passwords where they would be saved with the run; none is repeated in the message."""
    keys = {"api_key_env": rollout.api_key_env, "api_key_file": rollout.api_key_file}
    given = [f"rollout.{key}={value}" for key, value in keys.items() if value is not None]
    if rollout.mode == "managed" and given:
        raise ValueError(
            f"{given[0]} is ignored in rollout.mode=managed, whose servers get a key of their own; use "
            "rollout.mode=external."
        )
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} both name the servers' key; leave one out.")
    for argument in rollout.server_args:
        option = argument.partition("=")[0]
        for secret in ("--api-key", "--admin-api-key"):
            if len(option) > len("--a") and secret.startswith(option):  # argparse takes abbreviations
                raise ValueError(
                    f"rollout.server_args has {secret}, which would be saved with the run; leave it out: managed "
                    "servers get a key of their own."
                )
    for key, urls in (("urls", rollout.urls), ("worker_urls", rollout.worker_urls)):
        if any("@" in url or "?" in url for url in urls):
            raise ValueError(
                f"rollout.{key} has a URL with a user name, a password or a query, which would be saved with the run; "
                "give http://HOST:PORT, and the servers' key by rollout.api_key_env or rollout.api_key_file."
            )


def _validate_training(config: RunConfig) -> None:
    for name, train in config.training_jobs.items():
        if train.overlap_tensor_parallel:
            _validate_tensor_overlap(config, name, train)
        if train.optimizer_offload > 1:
            raise ValueError(f"{name}.optimizer_offload={train.optimizer_offload} is a fraction; the most is 1.")
        if train.optimizer_moments == "bf16" and train.optimizer_offload > 0:
            raise ValueError(
                f"{name}.optimizer_moments=bf16 has no effect with {name}.optimizer_offload="
                f"{train.optimizer_offload:g}: Megatron's offloading optimizer keeps float32; use "
                "optimizer_moments=fp32 or optimizer_offload=0."
            )
        if train.optimizer_moments == "bf16" and not train.distributed_optimizer:
            raise ValueError(
                f"{name}.optimizer_moments=bf16 needs the distributed optimizer, but {name}.distributed_optimizer="
                "false; use optimizer_moments=fp32 or distributed_optimizer=true."
            )


def _validate_tensor_overlap(config: RunConfig, name: str, train: TrainConfig) -> None:
    parallel, recipe = config.parallel, config.precision.recipe
    for is_possible, needed, got, advice in (
        (train.pack_length == "fixed", "buffers of one size", f"{name}.pack_length={train.pack_length}", "fixed"),
        (parallel.tensor > 1, "tensor-parallel ranks", f"parallel.tensor={parallel.tensor}", "2 or more"),
        (parallel.sequence_parallel, "sequence parallelism", f"parallel.sequence={parallel.sequence}", "null"),
        (
            recipe not in ("fp32", "fp8_blockwise"),
            "a precision that Transformer Engine's buffers have",
            f"precision.recipe={recipe}",
            "bf16, fp8_delayed, fp8_current or mxfp8",
        ),
    ):
        if not is_possible:
            raise ValueError(
                f"{name}.overlap_tensor_parallel=true needs {needed}, but {got}; use {advice}, or "
                "overlap_tensor_parallel=false."
            )


def _validate_posterior(config: RunConfig) -> None:
    source = config.posterior.source
    if source != "gold" and config.sample.sampler == "policy":
        raise ValueError(
            f"posterior.source={source} has no effect with sample.sampler=policy, which trains no posterior; use "
            "posterior.source=gold or sample.sampler=posterior."
        )
    if source == "reverse_kl" and not config.posterior.allow_collapse:
        raise ValueError(
            "posterior.source=reverse_kl takes many steps on the same traces with weights below 0, under which q "
            "collapses (docs/objectives.md#reverse-kl); use posterior.source=rollout, or posterior.allow_collapse=true "
            "to see it."
        )
    if source == "reverse_kl" and config.rounds == 1:
        raise ValueError(
            f"posterior.source=reverse_kl learns from the traces of the round before, but rounds={config.rounds}; use "
            "rounds of at least 2, or posterior.source=gold."
        )
    if source == "reverse_kl" and config.num_traces == 1:
        raise ValueError(
            "posterior.source=reverse_kl takes the question's other traces as the baseline, but objective.num_traces "
            f"(or sample.num_traces) is {config.num_traces}; use at least 2."
        )
