"""What a run is asked to do: presets, the one settings object, and errors that read as one line."""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator


class InputError(ValueError):
    """Input that cannot be used: one line naming the parameter, its value and what would be right."""

    def _render_traceback_(self) -> list[str]:
        # IPython asks an exception for its own rendering: a reader of a notebook needs the line alone.
        return [f"InputError: {self}"]


def data_dir() -> Path:
    """Folder of what ships: inside the package when installed from a wheel, else the checkout's `data/`."""
    installed = Path(__file__).parent / "_data"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "data"


# Every value has the paper's setting or a reason. The recovered text of the paper (v1) gives the model,
# the kind of corpus and the algorithm, but no step counts or learning rates: those below are ours.
_TINY = {
    "model": "embedded",
    "corpus": "graded",
    "response_style": "label",  # the paper's CoLA-style answer: one word
    "seed": 0,
    "beta": 0.0,  # no anchor, TRL's default: the strongest case of the claim; sweep beta for the other
    "sft_steps": 200,  # 1.6 passes over the 4,000 sentences
    "rl_steps": 200,  # as many updates as SFT; on an eighth of its sentences, each answered eight times
    "sft_learning_rate": 1e-4,  # of 1e-4, 3e-4, 1e-3 (seed 100, an earlier base) smoothest; 1e-3 raises dev loss
    "rl_learning_rate": 3e-5,  # of 3e-5 and 1e-4 (seed 100, from the base) the one whose reward rises steadily
    "batch_size": 32,  # 4 prompts a step at group size 8: two cores do a stage in under a minute
    "group_size": 8,  # TRL's default number of generations
    "format_steps": 0,  # the embedded base model answers in the right form already
    "lora_rank": 0,  # the paper trains all weights
    "gradient_checkpointing": False,  # costs about a third more time, and there is memory enough
    "proxy_flipped": 0.0,  # of the pairs that a proxy reward is learned from: annotators who never err
    "sft_weight": 1.0,  # the two losses of a joint update weigh the same; swept by the book
    "cycles": 10,  # 20 updates of the one, 20 of the other
    "interpolation": 0.5,  # halfway between the two ends
    "loss_type": "grpo",  # the loss of the GRPO paper (DeepSeekMath, Eq. 3); TRL's default is "dapo"
    "train_sentences": 4000,
    "dev_sentences": 400,
    "heldout_sentences": 200,
    "evaluations": 10,
}
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        **_TINY,
        "model": "embedded-random",
        "sft_steps": 10,
        "rl_steps": 10,
        "cycles": 5,
        "batch_size": 8,
        "group_size": 4,
        "train_sentences": 200,
        "dev_sentences": 40,
        "heldout_sentences": 40,
    },
    "tiny": _TINY,
    "smollm2": {
        **_TINY,
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "corpus": "cola",
        "sft_learning_rate": 3e-6,  # of 3e-6, 1e-5, 2e-5 and 5e-5 (seed 100) the one whose dev loss swings least
        "rl_learning_rate": 1e-5,
        "sft_steps": 80,  # one pass over the sentences at 32 a step
        "rl_steps": 80,  # as many updates
        "format_steps": 40,  # of 24 sampled answers of the untouched model none was one of the two words
        "evaluations": 4,  # an evaluation takes longer than ten updates
        "train_sentences": 2560,
        "dev_sentences": 527,  # the whole public in-domain dev file
        "heldout_sentences": 516,  # the whole public out-of-domain dev file
    },
    "paper": {
        **_TINY,
        "model": "Qwen/Qwen3-0.6B",  # the paper's model
        "corpus": "cola",  # the paper's "CoLA-style" set
        "sft_learning_rate": 2e-5,  # TRL's SFT default, meant for full fine-tuning at this size
        "rl_learning_rate": 1e-6,  # TRL's GRPO default
        "sft_steps": 260,  # one pass over CoLA's 8,551 training sentences at 32 a step
        "rl_steps": 260,
        "batch_size": 32,
        "train_sentences": 8551,
        "dev_sentences": 527,
        "heldout_sentences": 516,
    },
}


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):  # pydantic would read True as 1
        raise ValueError("a number is needed, not a truth value")
    return value


Count = Annotated[int, BeforeValidator(_not_bool), Field(ge=1)]
CountOrZero = Annotated[int, BeforeValidator(_not_bool), Field(ge=0)]
Rate = Annotated[float, BeforeValidator(_not_bool), Field(gt=0, le=1, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(_not_bool), Field(ge=0, le=1, allow_inf_nan=False)]


class RunConfig(BaseModel):
    """Settings of one run, checked once, at the door.

    `batch_size` counts responses per optimisation step in either stage (TRL's convention), so a GRPO
    step sees `batch_size / group_size` prompts. `evaluations` is the number of equal intervals between
    evaluations; step 0 and the last step are always evaluated. `format_steps` updates on labels drawn at
    random, half of them each, teach a model that does not answer in one of the two words to do so, and
    nothing else, before any pipeline begins: the model after them is what all of them start from.
    `lora_rank` above 0 trains adapters of that rank, at most the width of the largest preset, and merges them when the
    stage ends.
    `proxy_flipped` is the share of preference pairs whose order is reversed before a reward model
    learns from them.
    `sft_weight`, `cycles` and `interpolation` are of the stages `joint` (the μ beside the GRPO loss), `interleaved`
    (how often SFT and GRPO take turns) and `merged` (the share of the later model in the mean of weights).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: Literal["smoke", "tiny", "smollm2", "paper"] = "tiny"
    model: Annotated[str, Field(min_length=1)]
    corpus: Annotated[str, Field(min_length=1)]
    response_style: Literal["label", "rationale"]
    seed: Annotated[int, BeforeValidator(_not_bool), Field(ge=0, lt=2**31)]
    beta: Annotated[float, BeforeValidator(_not_bool), Field(ge=0, allow_inf_nan=False)]
    sft_steps: Count
    rl_steps: Count
    sft_learning_rate: Rate
    rl_learning_rate: Rate
    batch_size: Count
    group_size: Annotated[int, BeforeValidator(_not_bool), Field(ge=2)]
    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo"]
    format_steps: CountOrZero
    lora_rank: Annotated[int, BeforeValidator(_not_bool), Field(ge=0, le=1024)]
    gradient_checkpointing: bool
    proxy_flipped: Share
    sft_weight: Annotated[float, BeforeValidator(_not_bool), Field(ge=0, allow_inf_nan=False)]
    cycles: Count
    interpolation: Share
    train_sentences: Count
    dev_sentences: Count
    heldout_sentences: Count
    evaluations: Count
    out_dir: Path = Path("runs")

    @model_validator(mode="after")
    def _whole_groups(self) -> RunConfig:
        if self.train_sentences < self.batch_size // self.group_size:
            raise ValueError(
                f"train_sentences={self.train_sentences} is less than a GRPO step needs: use at least "
                f"batch_size / group_size = {self.batch_size // self.group_size}"
            )
        if self.batch_size % self.group_size:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of group_size={self.group_size}: "
                f"use {self.group_size * max(1, self.batch_size // self.group_size)}"
            )
        if self.response_style == "rationale" and self.corpus != "graded":
            raise ValueError(
                f"response_style='rationale' needs corpus='graded' (got corpus={self.corpus!r}): "
                "no other corpus has reasons"
            )
        return self

    @classmethod
    def from_parameters(cls, namespace: MutableMapping[str, Any]) -> RunConfig:
        """Settings from a notebook's parameters: `RunConfig.from_parameters(globals())`.

        Every public plain value in `namespace` must be a field of `RunConfig`: papermill only warns of a
        parameter that does not exist. What cells define after the first call does not count, so that a
        notebook can be run again. `None` means the preset's value. Raises `InputError`, one line.
        """
        given = {
            name: value
            for name, value in namespace.items()
            if not name.startswith("_")
            and name not in {"In", "Out"}
            and isinstance(value, (bool, int, float, str, list, dict, tuple, type(None)))
        }
        first = namespace.setdefault("_parameters_at_first_call", frozenset(given))
        given = {name: value for name, value in given.items() if name in first or name in cls.model_fields}
        preset = given.get("preset") or "tiny"
        if preset not in PRESETS:
            raise InputError(f"preset={preset!r} does not exist: choose one of {', '.join(PRESETS)}")
        for name, value in given.items():
            if name not in cls.model_fields:
                raise InputError(f"{name}={value!r} is not a parameter: choose from {', '.join(cls.model_fields)}")
        chosen = {name: value for name, value in given.items() if value is not None}
        try:
            return cls.model_validate({"preset": preset, **PRESETS[preset], **chosen})
        except ValidationError as error:
            raise InputError(one_line(error)) from None

    def table(self):
        """The settings as a one-column pandas table for a page: what this run uses."""
        import pandas as pd

        values = {name: str(value) for name, value in self.model_dump().items() if name != "out_dir"}
        return pd.DataFrame({"value": values}).rename_axis("parameter")


def one_line(error: ValidationError) -> str:
    """The first fault that pydantic found: name, value and what is wrong."""
    first = error.errors()[0]
    reason = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return reason
    return f"{first['loc'][0]}={first['input']!r}: {reason[0].lower()}{reason[1:]}"
