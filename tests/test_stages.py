"""The store: a stage is trained once, depends on what it should, and survives being killed."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file

from sftrl_utils import corpora, keys, records, sources, stages, training
from sftrl_utils.config import InputError, RunConfig

METRICS = {"sft_loss", "sft_loss_sum", "mean_reward", "greedy_accuracy", "mcc", "acceptable_rate", "entropy"}


def test_a_stage_leaves_a_model_a_table_and_a_record(sft_then_rl, small_config):
    for stage in sft_then_rl:
        assert {path.name for path in stage.path.iterdir()} == {
            "model",
            "metrics.parquet",
            "report.parquet",
            "answers.parquet",
            "base.npz",
            "record.json",
            "SHA256SUMS",
        }
        assert (stage.path / "model" / "model.safetensors").is_file()
        columns = {f"{metric}_{split}" for metric in METRICS for split in ("train", "dev", "heldout")}
        assert columns <= set(stage.metrics) and stage.metrics[list(columns)].notna().all(axis=None)
        assert stage.metrics["step"].tolist() == list(range(11))
    first, second = (stage.record for stage in sft_then_rl)
    assert (first.parent, second.parent) == ("base", first.stage)
    assert (first.pipeline, second.pipeline) == ("sft", "sft_then_rl")
    assert second.config["rl_steps"] == small_config.rl_steps and second.valid


def test_the_second_stage_starts_where_the_first_ended(sft_then_rl, rl_then_sft):
    for first, second in (sft_then_rl, rl_then_sft):
        end, start = first.metrics.iloc[-1], second.metrics.iloc[0]
        for metric in METRICS:
            assert start[f"{metric}_dev"] == pytest.approx(end[f"{metric}_dev"], abs=1e-6)
        assert start["kl_start_dev"] == 0 < start["kl_base_dev"]


def test_what_is_in_the_store_is_not_trained_again(sft_then_rl, small_config, monkeypatch):
    monkeypatch.setattr(training, "train", lambda *_: pytest.fail("trained again"))
    again = stages.train_pipeline(small_config, "sft_then_rl")
    assert [stage.record for stage in again] == [stage.record for stage in sft_then_rl]


def test_the_same_run_from_an_empty_store_gives_identical_metrics(sft_then_rl, small_config, tmp_path):
    again = stages.train_pipeline(small_config.model_copy(update={"out_dir": tmp_path}), "sft_then_rl")
    for one, other in zip(sft_then_rl, again, strict=True):
        pd.testing.assert_frame_equal(one.metrics, other.metrics, check_exact=True)


def test_a_constant_reward_changes_nothing(sft_then_rl, small_config):
    """Group-relative advantages of equal rewards are 0: what RL does, its reward does."""
    control = stages.train_pipeline(small_config, "sft_then_constant_rl")[-1]
    assert control.record.valid and control.record.pipeline == "sft_then_constant_rl"
    start, end = control.metrics.iloc[0], control.metrics.iloc[-1]
    pd.testing.assert_series_equal(start.drop("step"), end.drop("step"), check_names=False)
    assert end["sft_loss_dev"] == sft_then_rl[0].metrics["sft_loss_dev"].iloc[-1]


def test_the_report_follows_the_pipeline(sft_then_rl):
    table = stages.judged(sft_then_rl)
    assert list(table.columns) == ["base", "sft", "sft → grpo"] and table.notna().all(axis=None)
    for stage, column in zip(sft_then_rl, table.columns[1:], strict=True):
        assert table.loc["mean_reward", column] == pytest.approx(stage.metrics["mean_reward_dev"].iloc[-1], abs=1e-9)
    assert table.loc["mean_reward", "base"] == pytest.approx(
        sft_then_rl[0].metrics["mean_reward_dev"].iloc[0], abs=1e-9
    )


def test_the_form_of_an_answer_is_taught_once_and_nothing_else(tmp_path):
    few = {"preset": "smoke", "dev_sentences": 40, "sft_steps": 1, "rl_steps": 1, "format_steps": 80}
    config = RunConfig.from_parameters({**few, "sft_learning_rate": 1e-3, "out_dir": str(tmp_path)})
    one, other = (stages.train_stage(config.model_copy(update={"seed": seed}), "sft") for seed in (0, 1))
    base = stages.open_stage(tmp_path / one.record.parent)
    assert other.record.parent == base.record.stage and base.record.pipeline == "format"
    assert (one.record.kinds, base.record.kinds) == (("sft",), ())
    assert base.record.trainer_config["seed"] not in {one.record.trainer_config["seed"] for one in (one, other)}
    assert base.record.command == ""
    start, end = base.metrics["format_rate_dev"].iloc[[0, -1]]
    assert start < 0.1 and end > 0.9
    assert base.metrics["acceptable_probability_dev"].iloc[-1] == pytest.approx(0.5, abs=0.15)
    # What follows starts from it, and calls it the base.
    assert one.metrics["kl_base_dev"].iloc[0] == 0 and set(one.report["point"]) == {"start", "end"}
    second = stages.train_stage(config, "grpo", parent=one)
    assert second.metrics["kl_base_dev"].iloc[0] == pytest.approx(one.metrics["kl_base_dev"].iloc[-1], abs=1e-9)
    assert second.record.pipeline == "sft_then_rl" and set(second.report["point"]) == {"end"}


def test_on_another_corpus_the_base_is_judged_again(sft_then_rl, small_config, tmp_path):
    shorter = small_config.model_copy(update={"dev_sentences": 20, "sft_steps": 1, "out_dir": tmp_path})
    stage = stages.train_stage(shorter, "sft", parent=sft_then_rl[0])
    alone = stages.train_stage(shorter, "sft")
    assert stage.metrics["kl_base_dev"].iloc[0] > 0
    reasons = small_config.model_copy(update={"response_style": "rationale", "sft_steps": 1, "out_dir": tmp_path})
    explained = stages.train_stage(reasons, "sft", parent=sft_then_rl[0])
    assert explained.metrics["kl_base_dev"].iloc[0] > 0
    for child, first in ((stage, alone), (explained, stages.train_stage(reasons, "sft"))):
        with np.load(child.path / "base.npz") as one, np.load(first.path / "base.npz") as other:
            assert all((one[split] == other[split]).all() for split in one)
    with np.load(stage.path / "base.npz") as one:
        assert one["dev"].shape == (20, 3)


def test_rl_against_a_proxy_records_both_rewards(small_config, tmp_path):
    config = small_config.model_copy(update={"sft_steps": 20, "proxy_flipped": 0.1, "out_dir": tmp_path})
    [stage] = stages.train_pipeline(config, "proxy_rl")
    assert stage.record.gates["reward_model"] == "ok"
    assert stage.record.trainer_config["reward_model/learning_rate"] == config.sft_learning_rate
    assert {"proxy_reward_dev", "proxy_accuracy_dev", "mean_reward_dev"} <= set(stage.metrics)
    assert stage.metrics["proxy_accuracy_dev"].nunique() == 1 and stage.record.valid


def test_rl_follows_the_proxy_and_not_the_verifier(small_config, tmp_path):
    reversed_pairs = {"proxy_flipped": 1.0, "sft_steps": 60, "sft_learning_rate": 3e-4, "rl_learning_rate": 3e-4}
    config = small_config.model_copy(update={**reversed_pairs, "rl_steps": 30, "evaluations": 1, "out_dir": tmp_path})
    [stage] = stages.train_pipeline(config, "proxy_rl")
    start, end = (stage.metrics.iloc[at] for at in (0, -1))
    assert start["proxy_accuracy_dev"] < 0.5  # it was taught the reverse
    assert end["proxy_reward_dev"] > start["proxy_reward_dev"] + 0.1
    assert end["mean_reward_dev"] < start["mean_reward_dev"] - 0.1


def test_a_proxy_of_rationales_is_refused(small_config):
    with pytest.raises(InputError, match="response_style='rationale': a reward model compares one-word answers"):
        stages.train_pipeline(small_config.model_copy(update={"response_style": "rationale"}), "proxy_rl")


def test_adapters_are_merged_and_the_next_stage_trains_from_there(small_config, tmp_path):
    config = small_config.model_copy(
        update={"lora_rank": 4, "sft_learning_rate": 1e-3, "beta": 0.1, "out_dir": tmp_path}
    )
    first, second = stages.train_pipeline(config, "sft_then_rl")
    weights = [set(load_file(stage.path / "model" / "model.safetensors")) for stage in (first, second)]
    assert weights[0] == weights[1] and not any("lora" in name for name in weights[0])
    assert first.metrics["kl_start_dev"].iloc[-1] > 1e-4
    assert second.metrics["sft_loss_dev"].iloc[0] == pytest.approx(first.metrics["sft_loss_dev"].iloc[-1], abs=1e-5)


def test_checkpointed_gradients_are_the_same_gradients(small_config, sft_then_rl, tmp_path):
    config = small_config.model_copy(update={"gradient_checkpointing": True, "out_dir": tmp_path})
    with pytest.warns(UserWarning, match="plain TRL: activations are checkpointed"):
        [stage] = stages.train_pipeline(config, "sft")
    ends = [run.metrics["sft_loss_dev"].iloc[-1] for run in (stage, sft_then_rl[0])]
    assert ends[0] == pytest.approx(ends[1], abs=1e-4)


def test_another_seed_gives_other_metrics(sft_then_rl, small_config):
    other = stages.train_stage(small_config.model_copy(update={"seed": 1}), "sft")
    assert other.metrics["sft_loss_dev"].iloc[-1] != sft_then_rl[0].metrics["sft_loss_dev"].iloc[-1]


@pytest.mark.parametrize(
    ("setting", "value", "changes"),
    [
        ("beta", 0.1, {"grpo"}),
        ("rl_steps", 7, {"grpo"}),
        ("group_size", 2, {"grpo"}),
        ("sft_steps", 7, {"sft"}),
        ("sft_learning_rate", 1e-5, {"sft"}),
        ("seed", 9, {"sft", "grpo"}),
        ("batch_size", 4, {"sft", "grpo"}),
        ("preset", "tiny", set()),
        ("out_dir", Path("elsewhere"), set()),
    ],
)
def test_a_stage_depends_on_its_own_settings_only(small_config, setting, value, changes):
    changed = small_config.model_copy(update={setting: value})
    both = {kind: [keys.stage_key(c, kind, "r", "base") for c in (small_config, changed)] for kind in ("sft", "grpo")}
    assert {kind for kind, (before, after) in both.items() if before != after} == changes


def test_a_stage_depends_on_corpus_model_and_parent(small_config):
    base = sources.revision("embedded")
    names = [
        keys.pipeline_names(small_config, "sft", "r", base),
        keys.pipeline_names(small_config, "sft", "other", base),
        keys.pipeline_names(small_config, "sft", "r", sources.revision("embedded-random")),
        keys.pipeline_names(small_config, "sft_then_sft", "r", base)[1:],
    ]
    assert len({name for [name] in names}) == len(names)


def test_the_names_of_stages_are_known_before_they_are_trained(sft_then_rl, small_config, tmp_path):
    corpus, base = corpora.load_corpus(small_config).revision, sources.revision(small_config.model)
    planned = keys.pipeline_names(small_config, "sft_then_rl", corpus, base)
    assert planned == [stage.record.stage for stage in sft_then_rl]
    formed = small_config.model_copy(update={"format_steps": 2, "sft_steps": 1, "seed": 1, "out_dir": tmp_path})
    [stage] = stages.train_pipeline(formed, "sft")
    assert keys.pipeline_names(formed, "sft", corpus, base) == [stage.record.parent, stage.record.stage]


@pytest.mark.parametrize("file", ["metrics.parquet", "model/model.safetensors", "record.json", "SHA256SUMS"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_stage_is_found_reported_and_trained_again(small_config, tmp_path, capsys, file, damage):
    config = small_config.model_copy(update={"sft_steps": 1, "out_dir": tmp_path})
    whole = stages.train_stage(config, "sft")
    path = whole.path / file
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + (bytes([content[middle] ^ 1]) + content[middle + 1 :]) * (damage != "cut"))
    capsys.readouterr()
    again = stages.train_stage(config, "sft")
    reported = capsys.readouterr().out
    if (file, damage) == ("record.json", "gone"):
        assert reported == ""  # without a record it was never finished
    else:
        assert "is damaged: the stage is trained again" in reported
        assert file == "SHA256SUMS" or str(path) in reported
    pd.testing.assert_frame_equal(again.metrics, whole.metrics)
    assert records.damaged_file(again.path) == ""


def test_code_counts_and_comments_do_not(monkeypatch, tmp_path):
    source = 'def f(x):\n    """Doc."""\n    return x\n'
    variants = {
        "same": source,
        "comment": source.replace("return x", "return x  # why"),
        "docstring": source.replace("Doc.", "Other."),
        "code": source.replace("return x", "return -x"),
    }
    monkeypatch.setattr(keys, "__file__", str(tmp_path / "keys.py"))
    for name, text in variants.items():
        (tmp_path / f"{name}.py").write_text(text)
    prints = {name: keys.code_fingerprint([name]) for name in variants}
    assert prints["same"] == prints["comment"] == prints["docstring"] != prints["code"]


def test_every_module_that_numbers_depend_on_is_in_their_key():
    """What `stages` imports, directly or not, but settings and the names of things."""
    found, queue = set(), ["stages"]
    while queue:
        name = queue.pop()
        tree = ast.parse((Path(keys.__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sftrl_utils"):
                inner = node.module.removeprefix("sftrl_utils").strip(".")
                queue += [name for name in ([inner] if inner else [a.name for a in node.names]) if name not in found]
        found.add(name)
    assert found - {"records", "config"} == set(keys.RESULT_MODULES)


RUN = """
import sys
from sftrl_utils import stages
from sftrl_utils.config import RunConfig
steps, folder = int(sys.argv[1]), sys.argv[2]
config = RunConfig.from_parameters(
    {"preset": "smoke", "model": "embedded", "sft_steps": steps, "dev_sentences": 20, "out_dir": folder}
)
print(stages.train_stage(config, "sft").path, flush=True)
"""


def start(folder, steps):
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(steps), str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_killed_run_leaves_nothing_finished_and_the_next_one_completes(tmp_path):
    run = start(tmp_path, 100)
    deadline = time.time() + 120
    while not list(tmp_path.glob(".sft-*.lock")) and time.time() < deadline:
        time.sleep(0.1)
    time.sleep(3)  # inside the 100 updates
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert records.finished_stages(tmp_path) == []
    again = start(tmp_path, 100)  # the same stage: it meets the lock and whatever was left
    printed, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert [str(path) for path in records.finished_stages(tmp_path)] == [printed.strip()]


def test_what_a_kill_while_writing_leaves_is_never_read_and_is_cleared(small_config, tmp_path):
    config = small_config.model_copy(update={"out_dir": tmp_path, "sft_steps": 1})
    whole = stages.train_stage(config, "sft").path
    half = tmp_path / f".{whole.name}.12345.tmp"
    whole.rename(half)
    (half / "metrics.parquet").unlink()
    assert records.finished_stages(tmp_path) == [] and records.runs_table(tmp_path).empty
    assert stages.train_stage(config, "sft").path == whole
    assert not half.exists() and records.finished_stages(tmp_path) == [whole]


def test_two_processes_train_a_stage_once(tmp_path):
    runs = [start(tmp_path, 3), start(tmp_path, 3)]
    printed = [run.communicate(timeout=240)[0].strip() for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert printed[0] == printed[1] and [str(path) for path in records.finished_stages(tmp_path)] == [printed[0]]


def contents(folder):
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in Path(folder).rglob("*.*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": "./nowhere"}, "model='./nowhere'"),
        ({"corpus": "nowhere"}, "corpus='nowhere'"),
        ({"train_sentences": 10**9}, "1000000000"),
    ],
)
def test_bad_input_is_one_line_before_training_and_touches_nothing(
    sft_then_rl, small_config, change, named, monkeypatch
):
    monkeypatch.setattr(training, "train", lambda *_: pytest.fail("training began"))
    before = {path: contents(path) for path in records.finished_stages(small_config.out_dir)}
    with pytest.raises(InputError) as caught:
        stages.train_stage(small_config.model_copy(update=change), "sft")
    assert named in str(caught.value) and "\n" not in str(caught.value)
    assert {path: contents(path) for path in before} == before


def test_an_unwritable_store_is_one_line(small_config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="out_dir=.*cannot be written to"):
        stages.train_stage(small_config.model_copy(update={"out_dir": tmp_path / "file" / "runs"}), "sft")


def test_an_unknown_pipeline_is_one_line(small_config):
    with pytest.raises(InputError, match="pipeline='sft_rl' does not exist: choose one of sft, grpo"):
        stages.train_pipeline(small_config, "sft_rl")


def test_the_summary_shows_start_and_end_of_every_metric(sft_then_rl):
    stage = sft_then_rl[1]
    table = stage.summary()
    assert table.loc["sft_loss", ("dev", "end")] == stage.metrics["sft_loss_dev"].iloc[-1]
    assert table.loc["kl_base", ("train", "start")] == stage.metrics["kl_base_train"].iloc[0]
    assert len(table) * 3 == stage.metrics.shape[1] - 1


def test_the_record_is_json_that_says_where_the_numbers_come_from(sft_then_rl):
    record = json.loads((sft_then_rl[0].path / "record.json").read_text())
    assert set(record["versions"]) == set(records.PACKAGES)
    assert record["seed"] == 0 and record["key"]["settings"]["sft_steps"] == 10
    assert record["device"].startswith("cpu") and record["wall_s"] > 0
    assert os.path.basename(sft_then_rl[0].path) == record["stage"]
