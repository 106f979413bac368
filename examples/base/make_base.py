"""Makes the demo's base model: a small real Qwen3 and its tokenizer, pre-trained on CPU with plain transformers.

    python examples/base/make_base.py --out examples/base/qwen3-tiny

The corpus is endless and drawn from a seed. Most documents are raw text in the notation of the demo task: single
steps and worked chains of at most two steps, while the task's questions have three and more. The rest are chats about
strings of digits, none of them a question of the task, and strings of arbitrary characters, so that the chat
and thinking markers and all bytes have trained embeddings. The base model can thus do the arithmetic, and has not seen
the task.
"""

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

VOCAB_SIZE = 512
"""Rows of the embedding: a little more than the tokenizer has entries, and a multiple of 8."""
END_OF_TURN, END_OF_TEXT = "<|im_end|>", "<|endoftext|>"
# A LaTeX command, a word with the space before it, one digit, white space, one other character.
PIECES = r"\\\p{L}+\{?| ?\p{L}+|\p{N}|\s+|[^\s\p{L}\p{N}]"
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)


def worked_chain(rng: random.Random) -> str:
    """One or two steps modulo 10, as raw text: the chain, then a line for each step."""
    value = rng.randrange(10)
    chain, lines = str(value), ""
    for _ in range(rng.choice((1, 2))):
        operator, right = rng.choice("+-*"), rng.randrange(10)
        result = {"+": value + right, "-": value - right, "*": value * right}[operator] % 10
        chain += f"{operator}{right}"
        lines += f"{value}{operator}{right}={result}\n"
        value = result
    return f"{chain} left to right mod 10\n{lines}" if rng.random() < 0.7 else lines


def chat(rng: random.Random) -> str:
    """A turn about a string of digits, with thought and, sometimes, a hint."""
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
    """Characters of one, two, three or four bytes."""
    return "".join(chr(rng.choice((rng.randrange(0x21, 0x250), rng.randrange(0x400, 0xD800)))) for _ in range(8))


def corpus(seed: int) -> Iterator[str]:
    """Documents without end."""
    rng = random.Random(seed)
    while True:
        kind = rng.choices((worked_chain, chat, arbitrary_text), (80, 18, 2))[0]
        yield kind(rng)


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text encodes, words are single tokens, and so is each digit."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    rng = random.Random(seed)
    # Markers become tokens of their own below and must not be learnt as words.
    texts = [(worked_chain if index % 2 else chat)(rng) for index in range(2000)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 8, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        additional_special_tokens=["<|im_start|>"],
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = CHAT_TEMPLATE
    if len(tokenizer) > VOCAB_SIZE:
        raise ValueError(f"the tokenizer has {len(tokenizer)} entries, over VOCAB_SIZE={VOCAB_SIZE}; raise that.")
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """A Qwen3 of about one million random weights, float32."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def rows_of_tokens(
    tokenizer: PreTrainedTokenizerFast, seed: int, num_rows: int, row_tokens: int
) -> Iterator[torch.Tensor]:
    """Batches [rows, tokens] int64 of documents, one after another with the end-of-text token between."""
    documents, held = corpus(seed), list[int]()
    while True:
        while len(held) < num_rows * row_tokens:
            held += [*tokenizer(next(documents))["input_ids"], tokenizer.pad_token_id]
        batch, held = held[: num_rows * row_tokens], held[num_rows * row_tokens :]
        yield torch.tensor(batch).view(num_rows, row_tokens)


def pretrain(model: Qwen3ForCausalLM, batches: Iterator[torch.Tensor], num_steps: int, learning_rate: float) -> None:
    """AdamW with a linear warm-up and a linear decay to zero, in place."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = max(1, num_steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (num_steps - step) / (num_steps - warmup))
    )
    begin = time.monotonic()
    for step in range(1, num_steps + 1):
        ids = next(batches)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0 or step == num_steps:
            print(f"step {step}/{num_steps}  loss {loss.item():.3f}  {time.monotonic() - begin:.0f} s", flush=True)


def main() -> None:
    """Read the flags, pre-train, write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--num-steps", type=int, default=600)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; another number may change the last bits")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    tokenizer = make_tokenizer(chosen.seed)
    model = make_model(tokenizer, chosen.seed)
    print(f"{len(tokenizer)} tokens, {model.num_parameters():,} parameters")
    pretrain(model, rows_of_tokens(tokenizer, chosen.seed, 64, 64), chosen.num_steps, chosen.learning_rate)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(chosen.out)
    tokenizer.save_pretrained(chosen.out)


if __name__ == "__main__":
    main()
