"""What model a name means: the shipped base, its untrained twin, a folder, a GGUF file, a hub id; and its revision."""

from __future__ import annotations

import hashlib
from pathlib import Path

from transformers.utils import cached_file

from sftrl_utils.config import InputError, data_dir

EMBEDDED = "embedded"
EMBEDDED_RANDOM = "embedded-random"  # the shipped architecture and tokenizer with untrained weights


def base_dir() -> Path:
    """Folder of the shipped base model (safetensors, tokenizer, chat template)."""
    return data_dir() / "base"


def revision(name: str) -> str:
    """What pins the model behind `name`: a hash of the local files that define it, or the hub's commit.

    Raises `InputError` for a hub id that cannot be reached.
    """
    source, options = locate(name)
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
        raise InputError(unloadable(name, error)) from None


def locate(name: str) -> tuple[str, dict[str, str]]:
    """Where `name` is to be loaded from, and what transformers must be told about it.

    Raises `InputError` for what cannot be a model: not there, or no hub id.
    """
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


def unloadable(name: str, error: Exception) -> str:
    """One line: why `name` was not loaded, and what would be."""
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
