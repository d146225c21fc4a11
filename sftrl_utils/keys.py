"""What a stage's numbers depend on, and the name that follows from it: known before anything is trained."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sftrl_utils import records
from sftrl_utils.config import InputError, RunConfig

# Modules whose code decides what a stage's numbers are; what lists or draws them is not among these.
RESULT_MODULES = (
    "lexicon", "grammar", "corpora", "sources", "models", "rewards", "evaluation", "prefix_sharing", "joint",
    "training", "protocol", "keys", "stages",
)  # fmt: skip
_RL_SETTINGS = ("rl_steps", "rl_learning_rate", "beta", "group_size", "loss_type")
_SFT_SETTINGS = ("sft_steps", "sft_learning_rate")
RESULT_SETTINGS = {
    "format": ("format_steps", "sft_learning_rate"),  # it is always evaluated twice
    "sft": (*_SFT_SETTINGS, "evaluations"),
    "grpo": (*_RL_SETTINGS, "evaluations"),
    "constant": (*_RL_SETTINGS, "evaluations"),
    "proxy": (*_RL_SETTINGS, *_SFT_SETTINGS, "evaluations", "proxy_flipped"),
    "joint": (*_RL_SETTINGS, "sft_weight", "evaluations"),
    "interleaved": (*_RL_SETTINGS, *_SFT_SETTINGS, "cycles", "evaluations"),
    "merged": ("interpolation",),
}
COMMON_SETTINGS = ("response_style", "seed", "batch_size", "lora_rank", "gradient_checkpointing")


def stage_key(config: RunConfig, kind: str, corpus_revision: str, parent: str) -> dict[str, Any]:
    """All that a stage's numbers depend on; settings that do not bear on this kind are left out.

    `parent` is the name of the stage before, or the revision of the base model (`sources.revision`).
    """
    names = COMMON_SETTINGS + RESULT_SETTINGS[kind]
    return {
        "kind": kind,
        "parent": parent,
        "corpus": corpus_revision,
        "code": CODE,
        "settings": {name: getattr(config, name) for name in names},
    }


def stage_name(key: dict[str, Any]) -> str:
    """The name of a stage's folder: its kind and a hash of its key."""
    return f"{key['kind']}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]}"


def pipeline_names(config: RunConfig, pipeline: str, corpus_revision: str, base: str) -> list[str]:
    """Names of the stages, in order, that `stages.train_pipeline` loads or trains.

    `base` is the base model's revision. Raises `InputError` for a pipeline that does not exist.
    """
    names = []
    if config.format_steps:  # once for all seeds
        unseeded = config.model_copy(update={"seed": 0})
        base = stage_name(stage_key(unseeded, "format", corpus_revision, base))
        names.append(base)
    for kind in kinds_of(pipeline):
        base = stage_name(stage_key(config, kind, corpus_revision, base))
        names.append(base)
    return names


def kinds_of(pipeline: str) -> tuple[str, ...]:
    """The kinds of the stages of `pipeline`, in order. Raises `InputError` if it does not exist."""
    chains = {name: kinds for kinds, name in records.PIPELINES.items()}
    if pipeline not in chains:
        raise InputError(f"pipeline={pipeline!r} does not exist: choose one of {', '.join(chains)}")
    return chains[pipeline]


def code_fingerprint(modules: Iterable[str]) -> str:
    """Hash of the code of `modules` of this package and of the libraries that numbers depend on.

    Comments and docstrings do not count.
    """
    digest = hashlib.sha256(json.dumps(records.versions(), sort_keys=True).encode())
    for name in modules:
        tree = ast.parse((Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
                node.body.pop(0)
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:16]


CODE = code_fingerprint(RESULT_MODULES)  # as it is when first imported, not of files edited since
