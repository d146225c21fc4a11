"""Loading models and tokenizers: the shipped base, its untrained twin, a hub id, a folder, a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from sftrl_utils import sources
from sftrl_utils.config import InputError

if TYPE_CHECKING:
    from peft import LoraConfig


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in float32, in eval mode, on the GPU if there is one, and its tokenizer with left padding.

    `name` is `embedded`, `embedded-random`, a folder, a `.gguf` file or a hub id. Weights are read from
    safetensors or GGUF only and no remote code is run. Float32 because small updates vanish in pure
    bfloat16; attention is transformers' choice for the model and what is installed. Raises `InputError` if the model
    or a usable tokenizer is not there.
    """
    source, options = sources.locate(name)
    # The reader of GGUF files raises whatever broken bytes lead to.
    broken = Exception if "gguf_file" in options else (OSError, ValueError, SafetensorError)
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if name == sources.EMBEDDED_RANDOM:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=torch.float32)
        else:
            safe = {} if "gguf_file" in options else {"use_safetensors": True}
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **safe, **options)
    except broken as error:
        raise InputError(sources.unloadable(name, error)) from None
    if tokenizer.eos_token is None or tokenizer.chat_template is None:
        missing = "EOS token" if tokenizer.eos_token is None else "chat template"
        raise InputError(f"model={name!r}: its tokenizer has no {missing}; use an instruction-tuned model")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    if "gguf_file" in options:  # its weights are de-quantised by now: what says otherwise forbids saving and training
        model.hf_quantizer.remove_quantization_config(model)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def precision() -> str:
    """What a model computes in while it trains, its weights in float32: `bf16`, `fp16` or `float32`.

    bfloat16 where the GPU multiplies it natively; one before Ampere (a T4) only emulates it and gets float16. A CPU
    gets float32: even where it multiplies bfloat16 six times as fast, a step of SmolLM2 is no faster.
    """
    if not torch.cuda.is_available():
        return "float32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def adapters(rank: int) -> LoraConfig | None:
    """LoRA adapters of `rank` on every linear layer, as TRL's trainers take them; None for rank 0."""
    if not rank:
        return None
    from peft import LoraConfig  # a second that those who plan or evaluate need not wait

    # alpha = 32 for every rank: the best learning rate then hardly depends on it (Schulman et al., LoRA Without Regret)
    return LoraConfig(r=rank, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def require_memory(name: str, model: PreTrainedModel, copies: int) -> None:
    """Raise `InputError` if there is no memory for `copies` of the weights of `model` beside them."""
    weights = 4 * sum(weight.numel() for weight in model.parameters())
    needed = weights * copies
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # what an earlier stage of this process held and has let go
    free = torch.cuda.mem_get_info()[0] if model.device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise InputError(
            f"model={name!r} needs at least {needed / 2**30:.1f} GiB more memory to train and {free / 2**30:.1f} are "
            "free: use lora_rank=16, preset='tiny', or a smaller model"
        )


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write safetensors and tokenizer to `folder`; `load(str(folder))` gives them back."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
