"""Pre-trains the demo's base model: a small Qwen3 that knows the task's notation, not the task.

    python examples/base/make_base.py --out examples/base/qwen3-tiny

It reads raw documents of single operations modulo 10 and of chains of them, some with mistakes, and short chats about
other things, so that every token of the chat format has been seen. No document holds a question with its solution.
"""

import argparse
import hashlib
import random
from pathlib import Path

import torch
from rich.progress import track
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "left to right, mod 10 Hint: the final answer is \\boxed user assistant system hello please count again".split()
VOCAB_SIZE = 320
CONTEXT_TOKENS = 128
MISTAKE_SHARE = 0.1


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text encodes; digits and signs stand alone, the prompts' words are single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d|[^\w\s]| ?[A-Za-z]+|\n"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [f"{word} {word}: {word}" for word in WORDS] * 20
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>", "<think>", "</think>"],
        chat_template=CHAT_TEMPLATE,
    )


def draw_document(random_: random.Random) -> str:
    """Raw notation, or a short chat about something else."""
    if random_.random() < 0.15:
        word, thought = random_.choice(WORDS), random_.choice(WORDS)
        return (
            f"<|im_start|>user\nplease count {word}<|im_end|>\n<|im_start|>assistant\n"
            f"<think>\n{thought} again</think>\n\\boxed{{{random_.randrange(10)}}}<|im_end|>\n"
        )
    value, written = random_.randrange(10), ""
    for _ in range(random_.randint(1, 12)):
        operation, right = random_.choice("+-*"), random_.randrange(10)
        result = {"+": value + right, "-": value - right, "*": value * right}[operation] % 10
        if random_.random() < MISTAKE_SHARE:
            result = random_.randrange(10)
        written += f"{value}{operation}{right}={result};"
        value = result
    return written + "<|endoftext|>"


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A Qwen3 of about a million parameters."""
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rope_parameters={"rope_theta": 1_000_000.0, "rope_type": "default"},
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def main() -> None:
    """Pre-train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch", type=int, default=32, help="rows of 128 tokens in a step")
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    torch.manual_seed(chosen.seed)
    random_ = random.Random(chosen.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=chosen.steps, pct_start=0.1)
    stream: list[int] = []
    for step in track(range(chosen.steps), "pre-training"):
        while len(stream) < chosen.batch * CONTEXT_TOKENS:
            stream += tokenizer(draw_document(random_), add_special_tokens=False)["input_ids"]
        rows = torch.tensor(stream[: chosen.batch * CONTEXT_TOKENS]).view(chosen.batch, CONTEXT_TOKENS)
        stream = stream[chosen.batch * CONTEXT_TOKENS :]
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == chosen.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    model.eval().save_pretrained(chosen.out)
    tokenizer.save_pretrained(chosen.out)
    digest = hashlib.sha256((chosen.out / "model.safetensors").read_bytes()).hexdigest()
    (chosen.out / "README.md").write_text(
        "# The demo's base model\n\n"
        f"A Qwen3 of {sum(p.numel() for p in model.parameters()):,} parameters that knows the notation of "
        "`examples/data/generate.py`, made by\n\n"
        f"    python examples/base/make_base.py --out DIR --steps {chosen.steps} --batch {chosen.batch} "
        f"--seed {chosen.seed}\n\nsha256 of model.safetensors: {digest}\n"
    )


if __name__ == "__main__":
    main()
