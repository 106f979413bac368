"""Files of a model that must agree, and templates that would train or sample something else."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megavar.config.schema import TemplateConfig
from megavar.data.templates import Templates
from megavar.models.config_json import read_dims
from megavar.records import Question
from megavar.stages.check_model import check_model_files

BASE = Path(__file__).parents[2] / "examples" / "base" / "qwen3-tiny"
QUESTION = Question("a", "7+3", "0", trace="7+3\n0\n")
EMPTY_THINK = (
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{%- endif %}"
)


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(BASE, tmp_path / "model")


def change(file: Path, **changes) -> None:
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in {**config, **changes}.items() if value is not None}))


def check(model: Path, **templates) -> None:
    loaded = Templates(model, TemplateConfig(**templates))
    check_model_files(model, read_dims(model), loaded, QUESTION)


def test_the_example_agrees(model, caplog):
    with caplog.at_level(logging.WARNING):
        check(model)
    assert caplog.text == ""


@pytest.mark.parametrize("rows", [340, 341])
def test_fewer_rows_than_token_ids(model, rows):
    tensors = load_file(model / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = tensors[name][:rows].clone()
    save_file(tensors, model / "model.safetensors")
    change(model / "config.json", vocab_size=rows)
    with pytest.raises(ValueError, match=rf"token ids up to 341, its embedding only {rows} rows"):
        check(model)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(("tokens", "said"), [(338, "338"), ([338, 5], "5 or 338"), ([337, 338], None), (None, None)])
def test_another_stop_token_is_said(model, caplog, name, tokens, said):
    change(model / name, eos_token_id=tokens)
    with caplog.at_level(logging.WARNING):
        check(model)
    assert (f"{name} ends a text at token {said}, the tokenizer at 337" in caplog.text) == (said is not None)
    assert bool(caplog.text) == (said is not None)


@pytest.mark.parametrize("tokens", ["338", [1.5], -1, True])
def test_stop_tokens_that_are_no_ids(model, tokens):
    change(model / "generation_config.json", eos_token_id=tokens)
    with pytest.raises(ValueError, match=r"generation_config\.json has eos_token_id=.*expected token ids"):
        check(model)


def test_tokenizer_files_that_name_no_end(model):
    change(
        model / "tokenizer_config.json", eos_token={"__type": "AddedToken", "content": "<|im_end|>", "special": True}
    )
    check(model)
    change(model / "tokenizer_config.json", eos_token="<|end|>")
    with pytest.raises(ValueError, match=r"names the eos_token '<\|end\|>', which tokenizer\.json lacks"):
        check(model)


def test_a_template_that_closes_a_trace_before_it_begins(model):
    (model / "chat_template.jinja").write_text(EMPTY_THINK)
    with pytest.raises(ValueError, match=r"closes a trace.*before the model has begun one.*remove the block"):
        check(model)


def test_a_template_that_opens_two_traces(model):
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text("<think>" + template)
    with pytest.raises(ValueError, match="has '<think>' 2 times, expected once"):
        check(model)


def test_messages_may_say_how_a_trace_is_marked(model):
    said = "Think between <think> and </think>."
    check(model, system=said, policy=said + "\n{question}")
    (model / "chat_template.jinja").write_text(EMPTY_THINK)
    with pytest.raises(ValueError, match="closes a trace"):
        check(model, system=said)


def test_a_template_that_opens_the_trace_itself_is_right(model):
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text(template + "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}")
    check(model)


def test_a_template_that_drops_the_question(model):
    (model / "chat_template.jinja").write_text("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(ValueError, match="does not hold the question"):
        check(model)


@pytest.mark.parametrize(
    ("marker", "message"),
    [("", "is empty: no trace would ever end"), (" \n", "is empty"), ("<|im_end|>", "is a token that ends the turn")],
)
def test_a_close_marker_that_ends_nothing_or_everything(model, marker, message):
    with pytest.raises(ValueError, match=message):
        check(model, close_marker=marker)


def test_a_system_message_that_the_template_refuses(model):
    (model / "chat_template.jinja").write_text(
        "{%- for message in messages %}"
        "{%- if message['role'] == 'system' %}{{ raise_exception('no system') }}{%- endif %}"
        "{{ message['content'] }}{%- endfor %}"
    )
    check(model)
    with pytest.raises(ValueError, match=r"no system.*leave out templates\.system if it takes no system message"):
        check(model, system="Think.")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"quantization_config": {"bits": 4, "quant_method": "awq"}},
            "has quantization_config, a leftover",
        ),
        (
            {"dual_chunk_attention_config": {"chunk_size": 262144}},
            "has dual_chunk_attention_config",
        ),
        ({"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, "has layer_types=.*not supported"),
        ({"use_sliding_window": True}, "has use_sliding_window=True, which is not supported"),
    ],
)
def test_what_would_be_computed_differently_is_refused_by_name(model, changes, message):
    change(model / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        read_dims(model)
