"""Listing and publishing of finished stages."""

import json

import pandas as pd
import pytest

from sftrl_utils import cli, records, stages
from sftrl_utils.config import RunConfig

KEYS = {"stage", "kind", "parent", "pipeline", "preset", "model", "corpus", "seed", "beta", "wall_s", "device", "gates"}


@pytest.fixture
def published(sft_then_rl, rl_then_sft, tmp_path):
    for stage in (*sft_then_rl, *rl_then_sft):
        records.publish(stage.path.parent, tmp_path)
    return tmp_path


def test_the_listing_has_every_key_and_the_metrics_of_both_ends(published, sft_then_rl):
    rows = {row["stage"]: row for row in json.loads(records.runs_json(published))}
    for stage in sft_then_rl:
        row = rows[stage.record.stage]
        assert set(row) >= KEYS and row["gates"] == "ok"
        for metric in records.SUMMARY:
            assert row[f"{metric}_start"] == pytest.approx(stage.metrics[metric].iloc[0], abs=1e-12)
            assert row[f"{metric}_end"] == pytest.approx(stage.metrics[metric].iloc[-1], abs=1e-12)


def test_one_line_a_stage(published):
    lines = records.runs_text(published).splitlines()
    assert len(lines) == 1 + len(records.finished_stages(published))
    assert records.runs_text(published / "empty").startswith("no finished stages")


def test_publishing_copies_records_and_metrics_but_no_weights(published):
    names = {path.name for path in published.rglob("*") if path.is_file()}
    assert names == {"metrics.parquet", "report.parquet", "answers.parquet", "record.json", "SHA256SUMS"}
    assert all(records.damaged_file(stage) == "" for stage in records.finished_stages(published))


def test_published_metrics_are_the_same_numbers_in_less_room(published, sft_then_rl):
    for stage in sft_then_rl:
        copy = published / stage.path.name
        pd.testing.assert_frame_equal(records.read_metrics(copy), stage.metrics, check_exact=True)
        assert (copy / "metrics.parquet").stat().st_size < (stage.path / "metrics.parquet").stat().st_size / 2


def test_publishing_some_stages_copies_those_and_asks_for_all_of_them(sft_then_rl, tmp_path):
    store, names = sft_then_rl[0].path.parent, {stage.path.name for stage in sft_then_rl}
    assert {record.stage for record in records.publish(store, tmp_path / "to", names)} == names
    assert {path.name for path in records.finished_stages(tmp_path / "to")} == names
    with pytest.raises(ValueError, match="holds 2 of 3 stages: run the sweep to its end first"):
        records.publish(store, tmp_path / "other", names | {"sft-absent"})
    assert not (tmp_path / "other").exists()


def test_publishing_a_stage_without_its_report_touches_nothing(published, tmp_path_factory):
    old, target = tmp_path_factory.mktemp("old"), tmp_path_factory.mktemp("target")
    for folder in (old, target):
        records.publish(published, folder)
    lacking = records.finished_stages(old)[0] / "report.parquet"
    lacking.unlink()
    before = sorted(path.name for path in target.rglob("*"))
    with pytest.raises(ValueError, match="report.parquet is not there"):
        records.publish(old, target)
    assert sorted(path.name for path in target.rglob("*")) == before


def test_an_invalid_stage_says_which_gate_it_failed(published):
    path = records.finished_stages(published)[0] / "record.json"
    record = json.loads(path.read_text())
    record["gates"]["eos"] = "1.00 of completions have no EOS"
    path.write_text(json.dumps(record))
    table = records.runs_table(published).set_index("stage")
    assert table.loc[record["stage"], "gates"] == "eos: 1.00 of completions have no EOS"
    assert not records.read_record(path.parent).valid


def test_the_provenance_of_a_stage_is_a_table_for_a_page(sft_then_rl):
    record = sft_then_rl[1].record
    table = record.provenance()["value"]
    assert table["trainer", "loss_type"] == "'grpo' (TRL: 'dapo')"
    assert set(table["health gate"]) == {"ok"} and set(table["version"].index) == set(records.PACKAGES)
    assert table["run", "seed"] == "0" and table["run", "stage"] == record.stage


def test_metrics_are_chosen_by_record_fields(published, sft_then_rl):
    table = records.metrics_table(published, pipeline="sft_then_rl", seed=0)
    columns = ["step", "sft_loss_dev"]
    expected = sft_then_rl[1].metrics[columns]
    pd.testing.assert_frame_equal(table[columns], expected)
    assert records.metrics_table(published, pipeline="no_such").empty


def test_the_base_model_s_metrics_are_those_before_the_first_stage(published, sft_then_rl):
    base = records.base_metrics(published, preset="smoke")
    assert base["sft_loss_dev"] == sft_then_rl[0].metrics["sft_loss_dev"].iloc[0]


def test_a_damaged_stage_is_not_published_as_whole(published, tmp_path_factory):
    path = records.finished_stages(published)[0] / "metrics.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="metrics.parquet is damaged"):
        records.publish(published, tmp_path_factory.mktemp("target"))


def test_a_damaged_record_is_named_with_its_remedy(published, tmp_path_factory, capsys):
    path = records.finished_stages(published)[0] / "record.json"
    path.write_text("{")
    for command in (
        ["runs", "--dir", str(published)],
        ["publish", "--dir", str(published), "--to", str(published / "x")],
    ):
        assert cli.main(command) == 2
        message = capsys.readouterr().err
        assert f"{path} is damaged: remove {path.parent}" in message and message.count("\n") == 1


def test_a_store_is_not_published_into_itself_or_into_a_file(published, tmp_path_factory):
    file = tmp_path_factory.mktemp("other") / "file"
    file.touch()
    before = sorted(published.rglob("*"))
    for target in (published, file):
        with pytest.raises(ValueError, match="name another folder"):
            records.publish(published, target)
    assert sorted(published.rglob("*")) == before


def test_the_command_in_a_record_trains_the_same_stage(sft_then_rl, shared_store):
    words = sft_then_rl[1].record.command.split()
    assert words[:5] == ["sftrl", "run", "sft_then_rl", "-p", "preset"]
    given = dict(zip(words[4::3], words[5::3], strict=True))
    assert given == {"preset": "smoke", "model": "embedded"}
    config = RunConfig.from_parameters({**given, "out_dir": str(shared_store)})
    assert [stage.path for stage in stages.train_pipeline(config, words[2])] == [stage.path for stage in sft_then_rl]
