"""What the rollout tests serve, and how."""

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from megavar.config.schema import RolloutConfig
from megavar.rollout.sglang_client import SGLangEngine
from megavar.rollout.sglang_servers import ManagedServers

ROOT = Path(__file__).parents[2]
CONFIG = RolloutConfig(
    python=str(ROOT / ".venv-sglang/bin/python"),
    dtype="float32",
    max_total_tokens=16_384,
    concurrency=32,
    request_timeout_seconds=60.0,
    start_timeout_seconds=300.0,
)


API_KEY = "-key-of-the-tests"
"""Of the server that the tests share; a key may begin with a hyphen."""


@dataclass
class Managed:
    """A server that was started while its first port was taken."""

    servers: ManagedServers
    taken_port: int
    free_port: int


def write_model(folder: Path, seed: int, vocab_size: int = 512, **changes: object) -> Path:
    """A random Qwen3 of two layers with a byte-level tokenizer; end of sequence is `<|im_end|>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special
    )
    tokenizer.train_from_iterator(["The quick brown fox jumps over the lazy dog. two plus two"] * 10, trainer)
    tokenizer.add_tokens(["<think>", "</think>"])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        # The default leaves logits so flat that two models may agree on a greedy token by chance.
        "initializer_range": 0.3,
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "tie_word_embeddings": False,
    }
    Qwen3ForCausalLM(Qwen3Config(**{**sizes, **changes})).save_pretrained(folder)
    return folder


def temporary_folder(watchdog_pid: int) -> Path:
    """Where a running server puts temporary files."""
    [server] = psutil.Process(watchdog_pid).children()
    return Path(server.environ()["TMPDIR"])


def client(
    *urls: str,
    api_key: str | None = API_KEY,
    deterministic: bool = False,
    max_retries: int = 5,
    timeout_seconds: float = 60,
) -> SGLangEngine:
    """A client of servers that nobody here restarts."""
    return SGLangEngine(
        list(urls),
        concurrency=CONFIG.concurrency,
        request_timeout_seconds=timeout_seconds,
        max_retries=max_retries,
        deterministic=deterministic,
        api_key=api_key,
    )
