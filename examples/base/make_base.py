"""Pre-trains the demo's base model, a small Qwen3 with its tokenizer, on CPU with plain transformers.

    python examples/base/make_base.py --out examples/base/qwen3-tiny
    python examples/base/make_base.py --out runs/swaps_base --corpus swaps --num-steps 900 --row-tokens 128

The corpus is an infinite stream generated from a seed. Most documents are raw text in the notation of the demo task:
chains of one to four operations, worked out without errors. The rest are chats about strings of digits, none of them a
question of the task, and random characters, so that the chat markers, thinking markers and other bytes get trained
embeddings. So the base model can do the arithmetic but has never seen the task's questions. A held-out chain can occur
in the raw text by chance: there are 270,000 chains of three operations and 8,100,000 of four.

Two other corpora make the bases of the tasks in examples/data/hard.py, which know a notation and not how to choose. In
`swaps`, most documents swap neighbours in a row of digits, at places that are given or drawn at random. In `tries`,
most try numbers in chains with a first digit left open; the numbers are drawn at random.
"""

import argparse
import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

VOCAB_SIZE = 512
"""Rows of the embedding: at least the tokenizer's size, and a multiple of 8."""
MAX_TOKENS = 4096
ROPE_THETA = 1e6
END_OF_TURN, END_OF_TEXT = "<|im_end|>", "<|endoftext|>"
# A LaTeX command, a word with its leading space, one digit, white space, or one other character.
PIECES = r"\\\p{L}+\{?| ?\p{L}+|\p{N}|\s+|[^\s\p{L}\p{N}]"
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)

README = """# The demo's base model

A Qwen3 with {parameters} parameters and a tokenizer of its own, pre-trained on generated text about single-digit
arithmetic modulo 10. It serves the demo and the tests and is of no other use. No third party's weights or data
are in it.

Made by `examples/base/make_base.py`, which says what the text is:

    {command}

with torch {torch} and transformers {transformers} on CPU, one thread. SHA-256 of `model.safetensors`:

    {digest}
"""


def worked_chain(rng: random.Random) -> str:
    """A chain of one to four operations as raw text: the chain, then the remaining chain after each step, by line."""
    value, steps = rng.randrange(10), [(rng.choice("+-*"), rng.randrange(10)) for _ in range(rng.randint(1, 4))]
    lines = ""
    for done in range(len(steps) + 1):
        lines += str(value) + "".join(f"{operator}{right}" for operator, right in steps[done:])
        lines += " left to right mod 10\n" if done == 0 and rng.random() < 0.3 else "\n"
        if done < len(steps):
            operator, right = steps[done]
            value = {"+": value + right, "-": value - right, "*": value * right}[operator] % 10
    return lines


def chat(rng: random.Random) -> str:
    """A one-turn chat about a string of digits, with a thinking trace and sometimes a hint."""
    digits = [str(rng.randrange(10)) for _ in range(rng.randint(2, 6))]
    task, answer = rng.choice(
        [
            ("Repeat", "".join(digits)),
            ("Reverse", "".join(reversed(digits))),
            ("Name the first digit of", digits[0]),
            ("Name the last digit of", digits[-1]),
            ("Name the largest digit of", max(digits)),
        ]
    )
    hint = rng.choice(["", f"\nHint: the answer is {answer}."])
    thought = rng.choice([f"{' '.join(digits)}\n", f"{' '.join(digits)} no\n{answer}\n", f"{answer}\n"])
    return (
        f"<|im_start|>user\n{task} {''.join(digits)}{hint}<|im_end|>\n"
        f"<|im_start|>assistant\n<think>\n{thought}</think>\n\\boxed{{{answer}}}<|im_end|>"
    )


def arbitrary_text(rng: random.Random) -> str:
    """Random characters of one to three UTF-8 bytes."""
    return "".join(chr(rng.choice((rng.randrange(0x21, 0x250), rng.randrange(0x400, 0xD800)))) for _ in range(8))


def swapped_digits(rng: random.Random) -> str:
    """One to nine swaps of neighbours in a row of digits: the row and the place before each swap, and the row after."""
    digits = rng.sample("0123456789", rng.choice((4, 5, 6)))
    places = [rng.randrange(1, len(digits)) for _ in range(rng.randint(1, 9))]
    row, given, lines = "".join(digits), "".join(map(str, places)), ""
    for place in places:
        lines += f"{''.join(digits)}:{place}\n"
        digits[place - 1], digits[place] = digits[place], digits[place - 1]
    lines += "".join(digits) + "\n"
    draw = rng.random()
    if draw < 0.5:
        return (
            f"<|im_start|>user\nSwap {given} in {row}<|im_end|>\n"
            f"<|im_start|>assistant\n<think>\n{lines}</think>\n\\boxed{{{given}}}<|im_end|>"
        )
    return f"{given} in {row}\n{lines}" if draw < 0.75 else lines


def tried_numbers(rng: random.Random) -> str:
    """Up to four random numbers, each tried in one to three chains until one does not come out; one that fits ends."""
    chains = [[(rng.choice("+-*"), rng.randrange(1, 10)) for _ in range(2)] for _ in range(rng.randint(1, 3))]
    written = ["".join(f"{operator}{right}" for operator, right in steps) for steps in chains]
    targets = [rng.randrange(10) for _ in chains]
    lines = " ".join(f"?{text}={target}" for text, target in zip(written, targets, strict=True)) + "\n"
    for _ in range(4):
        number, fits = [rng.randrange(10) for _ in chains], True
        lines += "".join(map(str, number)) + "\n"
        for value, steps, target in zip(number, chains, targets, strict=True):
            for done, (operator, right) in enumerate(steps):
                lines += str(value) + "".join(f"{sign}{operand}" for sign, operand in steps[done:]) + "\n"
                value = {"+": value + right, "-": value - right, "*": value * right}[operator] % 10
            fits = value == target
            lines += f"{value}={target}\n" if fits else f"{value}={target} no\n"
            if not fits:
                break
        if fits:
            break
    return lines


Kind = Callable[[random.Random], str]
CORPORA: dict[str, dict[Kind, int]] = {
    "demo": {worked_chain: 80, chat: 18, arbitrary_text: 2},
    "swaps": {worked_chain: 25, swapped_digits: 55, chat: 18, arbitrary_text: 2},
    "tries": {worked_chain: 25, tried_numbers: 55, chat: 18, arbitrary_text: 2},
}
"""Name -> kind of document -> per cent of them."""


def corpus(seed: int, kinds: dict[Kind, int]) -> Iterator[str]:
    """Infinite stream of documents."""
    rng = random.Random(seed)
    while True:
        yield rng.choices(list(kinds), list(kinds.values()))[0](rng)


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: encodes any text; common words and single digits are one token each."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    rng = random.Random(seed)
    texts = [(worked_chain if index % 2 else chat)(rng) for index in range(2000)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 8, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([END_OF_TURN, END_OF_TEXT, "<|im_start|>"])
    # As in Qwen3, the thinking markers are single tokens that decoding keeps (not special tokens).
    backend.add_tokens(["<think>", "</think>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    if len(tokenizer) > VOCAB_SIZE:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, more than VOCAB_SIZE={VOCAB_SIZE}; raise it.")
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """A randomly initialised Qwen3 with about one million parameters, float32."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        initializer_range=0.05,
        max_position_embeddings=MAX_TOKENS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def batches_of_rows(
    tokenizer: PreTrainedTokenizerFast, documents: Iterator[str], num_rows: int, row_tokens: int
) -> Iterator[torch.Tensor]:
    """Infinite stream of [rows, tokens] int64 batches of concatenated documents, each followed by the end of text."""
    buffer = list[int]()
    while True:
        while len(buffer) < num_rows * row_tokens:
            buffer += [*tokenizer(next(documents))["input_ids"], tokenizer.pad_token_id]
        batch, buffer = buffer[: num_rows * row_tokens], buffer[num_rows * row_tokens :]
        yield torch.tensor(batch).view(num_rows, row_tokens)


def make_optimizers(model: Qwen3ForCausalLM, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' weight matrices (needs less than half the steps at this size), AdamW for the rest."""
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    ids = {id(weight) for weight in matrices}
    rest = [weight for weight in model.parameters() if id(weight) not in ids]
    return [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def pretrain(model: Qwen3ForCausalLM, batches: Iterator[torch.Tensor], num_steps: int, learning_rate: float) -> None:
    """Train `model` in place, with linear warmup and linear decay to zero."""
    optimizers = make_optimizers(model, learning_rate)
    warmup = max(1, num_steps // 20)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, (num_steps - step) / (num_steps - warmup))
        )
        for optimizer in optimizers
    ]
    begin = time.monotonic()
    for step in range(1, num_steps + 1):
        ids = next(batches)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if step % 20 == 0 or step == num_steps:
            print(f"step {step}/{num_steps}  loss {loss.item():.3f}  {time.monotonic() - begin:.0f} s", flush=True)


def write_folder(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, command: str) -> None:
    """Write a Hugging Face folder that transformers 4 and 5 can load, and a README with the command that made it."""
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # transformers 5 saves keys that transformers 4 does not read: without these additions, version 4 finds no
    # tokenizer class and uses its default RoPE base, 10000.
    for name, addition in (
        ("config.json", {"rope_theta": ROPE_THETA}),
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}),
    ):
        entries = json.loads((folder / name).read_text(encoding="utf-8")) | addition
        (folder / name).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "README.md").write_text(
        README.format(
            parameters=f"{model.num_parameters():,}",
            command=command,
            torch=torch.__version__,
            transformers=transformers.__version__,
            digest=digest,
        ),
        encoding="utf-8",
    )


def main() -> None:
    """Parse the flags, pre-train, write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--num-steps", type=int, default=600)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--row-tokens", type=int, default=64)
    parser.add_argument("--corpus", choices=CORPORA, default="demo")
    chosen = parser.parse_args()
    if chosen.num_steps < 2:
        parser.error(f"--num-steps={chosen.num_steps} is too small; use at least 2.")
    torch.set_num_threads(1)  # another number of threads can change the last bits of the weights
    tokenizer = make_tokenizer(chosen.seed)
    model = make_model(tokenizer, chosen.seed)
    print(f"{len(tokenizer)} tokens, {model.num_parameters():,} parameters")
    documents = corpus(chosen.seed, CORPORA[chosen.corpus])
    batches = batches_of_rows(tokenizer, documents, num_rows=32, row_tokens=chosen.row_tokens)
    pretrain(model, batches, chosen.num_steps, chosen.learning_rate)
    command = (
        f"python examples/base/make_base.py --out {chosen.out} --seed {chosen.seed} --num-steps {chosen.num_steps} "
        f"--learning-rate {chosen.learning_rate:g} --row-tokens {chosen.row_tokens} --corpus {chosen.corpus}"
    )
    write_folder(model, tokenizer, chosen.out, command)


if __name__ == "__main__":
    main()
