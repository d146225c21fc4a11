"""Loading models and tokenizers: the shipped base, its untrained twin, a hub id, a folder, a GGUF file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import psutil
import torch
from peft import LoraConfig
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file, logging

from sftrl_utils.config import InputError, data_dir

EMBEDDED = "embedded"
EMBEDDED_RANDOM = "embedded-random"  # the shipped architecture and tokenizer with untrained weights


def base_dir() -> Path:
    """Folder of the shipped base model (safetensors, tokenizer, chat template)."""
    return data_dir() / "base"


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in float32, in eval mode, on the GPU if there is one, and its tokenizer with left padding.

    `name` is `embedded`, `embedded-random`, a folder, a `.gguf` file or a hub id. Weights are read from
    safetensors or GGUF only and no remote code is run. Float32 because small updates vanish in pure
    bfloat16; attention is transformers' choice for the model and what is installed. Raises `InputError` if the model
    or a usable tokenizer is not there.
    """
    source, options = _source(name)
    # The reader of GGUF files raises whatever broken bytes lead to.
    broken = Exception if "gguf_file" in options else (OSError, ValueError, SafetensorError)
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if name == EMBEDDED_RANDOM:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=torch.float32)
        else:
            safe = {} if "gguf_file" in options else {"use_safetensors": True}
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **safe, **options)
    except broken as error:
        raise InputError(_unloadable(name, error)) from None
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


def revision(name: str) -> str:
    """What pins the model behind `name`: a hash of the local files that define it, or the hub's commit.

    Raises `InputError` for a hub id that cannot be reached.
    """
    source, options = _source(name)
    if "gguf_file" in options:
        return _hash(Path(source) / options["gguf_file"])
    if Path(source).is_dir():
        patterns = ("config.json", "tokenizer*", "chat_template.jinja", "*.safetensors")
        files = sorted(path for pattern in patterns for path in Path(source).glob(pattern))
        if name == EMBEDDED_RANDOM:
            return "random-" + _hash(*(path for path in files if path.suffix != ".safetensors"))
        return _hash(*files)
    try:
        return f"{name}@{Path(cached_file(source, 'config.json')).parent.name}"  # the cache names it by commit
    except OSError as error:
        raise InputError(_unloadable(name, error)) from None


def _source(name: str) -> tuple[str, dict[str, str]]:
    if name in {EMBEDDED, EMBEDDED_RANDOM}:
        return str(base_dir()), {}
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"model={name!r} is not there: name a .gguf file, {EMBEDDED!r}, a folder or a hub id")
        return str(path.parent), {"gguf_file": path.name}
    looks_local = path.is_absolute() or name.startswith(".") or name.count("/") != 1
    if looks_local and not path.is_dir():
        raise InputError(f"model={name!r} is neither {EMBEDDED!r}, a folder, a .gguf file nor a hub id (owner/name)")
    return name, {}


def _unloadable(name: str, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    if name.endswith(".gguf"):  # the reader's own words are about its arrays
        reason = f"it is not a whole GGUF file of a model that transformers knows ({type(error).__name__}: {reason})"
    return (
        f"model={name!r} cannot be loaded: {reason}. Use {EMBEDDED!r}, a folder with "
        "config.json and safetensors, a .gguf file, or a hub id that can be reached"
    )


def _hash(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]
