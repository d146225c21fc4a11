"""Settings are checked at the door, and a bad one is one line that names it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftrl_utils.config import PRESETS, InputError, RunConfig


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid_and_none_means_its_value(preset):
    config = RunConfig.from_parameters({"preset": preset, "beta": None, "seed": 3})
    expected = {**PRESETS[preset], "preset": preset, "seed": 3}
    assert {name: getattr(config, name) for name in expected} == expected


def test_a_parameter_overrides_one_field_only():
    default, changed = (RunConfig.from_parameters(given).model_dump() for given in ({}, {"beta": 0.1}))
    assert {name for name in default if default[name] != changed[name]} == {"beta"}


BAD = [
    ({"preset": "large"}, "preset='large'", "smoke, tiny"),
    ({"bta": 0.1}, "bta=0.1", "beta"),
    ({"beta": math.inf}, "beta=inf", "finite"),
    ({"beta": -0.1}, "beta=-0.1", "greater than or equal to 0"),
    ({"beta": math.nan}, "beta=nan", "greater than or equal to 0"),
    ({"beta": True}, "beta=True", "number"),
    ({"seed": -1}, "seed=-1", "greater than or equal to 0"),
    ({"seed": 1.5}, "seed=1.5", "integer"),
    ({"sft_steps": 0}, "sft_steps=0", "greater than or equal to 1"),
    ({"rl_steps": "many"}, "rl_steps='many'", "integer"),
    ({"sft_learning_rate": 0}, "sft_learning_rate=0", "greater than 0"),
    ({"rl_learning_rate": 5}, "rl_learning_rate=5", "less than or equal to 1"),
    ({"group_size": 1}, "group_size=1", "greater than or equal to 2"),
    ({"batch_size": 30}, "batch_size=30", "use 24"),
    ({"loss_type": "ppo"}, "loss_type='ppo'", "grpo"),
    ({"response_style": "essay"}, "response_style='essay'", "rationale"),
    ({"response_style": "rationale", "corpus": "cola"}, "response_style='rationale'", "corpus='graded'"),
    ({"train_sentences": 2, "batch_size": 64}, "train_sentences=2", "at least"),
    ({"lora_rank": 100_000}, "lora_rank=100000", "1024"),
    ({"model": ""}, "model=''", "at least 1"),
]


@pytest.mark.parametrize(("parameters", "named", "remedy"), BAD, ids=[bad[1] for bad in BAD])
def test_bad_input_is_one_line_with_name_value_and_remedy(parameters, named, remedy):
    with pytest.raises(InputError) as caught:
        RunConfig.from_parameters(parameters)
    message = str(caught.value)
    assert named in message and remedy in message and "\n" not in message


def test_a_notebook_shows_the_line_and_no_traceback():
    assert InputError("beta=-1: no")._render_traceback_() == ["InputError: beta=-1: no"]


def test_modules_and_private_names_of_a_notebook_are_not_parameters():
    namespace = {"math": math, "_i1": "x", "In": ["x"], "Out": {}, "RunConfig": RunConfig, "seed": 7}
    assert RunConfig.from_parameters(namespace).seed == 7


def test_a_notebook_can_be_run_again_in_one_kernel():
    namespace = {"seed": 1}
    RunConfig.from_parameters(namespace)
    namespace |= {"numbers": {"later": 1}, "seed": 2}
    assert RunConfig.from_parameters(namespace).seed == 2


@given(name=st.from_regex(r"[a-z]{3,12}", fullmatch=True), value=st.one_of(st.integers(), st.text(max_size=5)))
def test_no_unknown_name_passes(name, value):
    if name not in RunConfig.model_fields:
        with pytest.raises(InputError, match=name):
            RunConfig.from_parameters({name: value})
