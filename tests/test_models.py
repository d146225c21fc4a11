"""The shipped model is what the data card says, and nothing unsafe or missing loads."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl
from transformers import Qwen3ForCausalLM

from sftrl_utils import models, sources
from sftrl_utils.config import InputError


def test_the_shipped_base_is_a_small_qwen3_with_its_template_and_tokens(embedded):
    model, tokenizer = embedded
    assert isinstance(model, Qwen3ForCausalLM)
    assert 1e6 <= sum(weight.numel() for weight in model.parameters()) <= 8e6
    assert sum(file.stat().st_size for file in sources.base_dir().iterdir()) <= 16e6
    template = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    assert tokenizer.chat_template == template.read_text(encoding="utf-8")
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    for token in ("<|im_start|>", "<think>", "</think>", "<tool_call>"):
        assert len(tokenizer(token)["input_ids"]) == 1


def test_the_tokenizer_covers_any_text(embedded):
    _, tokenizer = embedded
    text = "Ærøskøbing – 東京, naïve 𝛑!"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_saved_and_loaded_models_agree(embedded, tmp_path):
    model, tokenizer = embedded
    models.save(model, tokenizer, tmp_path / "copy")
    copy, copied = models.load(str(tmp_path / "copy"))
    ids = tokenizer("The dog barks.", return_tensors="pt")["input_ids"]
    assert copied("The dog barks.")["input_ids"] == ids[0].tolist()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, copy(ids).logits)
    revision = sources.revision(str(tmp_path / "copy"))
    with (tmp_path / "copy" / "chat_template.jinja").open("a") as stream:
        stream.write(" ")
    assert sources.revision(str(tmp_path / "copy")) != revision


def test_the_random_twin_shares_the_architecture_only(embedded):
    model, _ = embedded
    first, second = models.load("embedded-random")[0], models.load("embedded-random")[0]
    assert first.config.hidden_size == model.config.hidden_size
    assert torch.equal(first.model.embed_tokens.weight, second.model.embed_tokens.weight)
    assert not torch.equal(first.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert sources.revision("embedded-random") != sources.revision("embedded")


@pytest.mark.parametrize("name", ["embeded", "./nowhere", "/nowhere/at/all", "no-such-owner/no-such-model", "x.gguf"])
def test_a_missing_model_is_one_line(name):
    with pytest.raises(InputError) as caught:
        models.load(name)
    assert f"model={name!r}" in str(caught.value) and "\n" not in str(caught.value)


def test_a_hub_model_is_pinned_by_name_and_commit(monkeypatch, tmp_path):
    for name in ("one/model", "two/model"):
        cached = tmp_path / name / "snapshots" / "abc123" / "config.json"
        monkeypatch.setattr(sources, "cached_file", lambda *_, cached=cached: str(cached))
        assert sources.revision(name) == f"{name}@abc123"


def test_a_hub_model_that_cannot_be_reached_is_one_line():
    with pytest.raises(InputError) as caught:
        sources.revision("no-such-owner/no-such-model")
    assert "no-such-owner" in str(caught.value) and "\n" not in str(caught.value)


def test_pickled_weights_are_refused(embedded, tmp_path):
    model, tokenizer = embedded
    models.save(model, tokenizer, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be loaded"):
        models.load(str(tmp_path))


def test_a_truncated_weights_file_is_one_line(embedded, tmp_path):
    model, tokenizer = embedded
    models.save(model, tokenizer, tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError) as caught:
        models.load(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_a_chat_template_is_refused(embedded, tmp_path):
    model, tokenizer = embedded
    models.save(model, tokenizer, tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="no chat template"):
        models.load(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(range(200)), b"no model at all"])
def test_a_corrupt_gguf_is_one_line(tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        models.load(str(path))
    assert f"model={str(path)!r} cannot be loaded: it is not a whole GGUF file" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_eos_is_refused(embedded, tmp_path):
    model, tokenizer = embedded
    models.save(model, tokenizer, tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": None}))
    with pytest.raises(InputError, match="no EOS token"):
        models.load(str(tmp_path))


@pytest.mark.parametrize(
    ("cuda", "native", "expected"), [(False, False, "float32"), (True, False, "fp16"), (True, True, "bf16")]
)
def test_precision_is_what_the_device_multiplies_itself(monkeypatch, cuda, native, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert models.precision() == expected


def test_too_little_memory_says_what_would_do(embedded, monkeypatch):
    weights = 4 * sum(weight.numel() for weight in embedded[0].parameters())
    monkeypatch.setattr(models.psutil, "virtual_memory", lambda: SimpleNamespace(available=3 * weights))
    models.require_memory("embedded", embedded[0], copies=3)
    with pytest.raises(InputError, match="model='embedded' needs at least .* lora_rank=16"):
        models.require_memory("embedded", embedded[0], copies=4)
