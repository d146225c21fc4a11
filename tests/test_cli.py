"""The command line: what it prints, and one line for what it cannot do."""

import json
import subprocess
import sys

import pytest

from sftrl_utils import cli, corpora, pretraining, records

SMALL = ["-p", "preset", "smoke", "-p", "model", "embedded"]


def test_runs_lists_the_store(sft_then_rl, capsys):
    store = sft_then_rl[0].path.parent
    assert cli.main(["runs", "--dir", str(store)]) == 0
    assert sft_then_rl[0].record.stage in capsys.readouterr().out
    assert cli.main(["runs", "--dir", str(store), "--json"]) == 0
    stages = [row["stage"] for row in json.loads(capsys.readouterr().out)]
    assert sft_then_rl[1].record.stage in stages


def test_run_trains_a_pipeline_and_prints_its_stages(rl_then_sft, shared_store, capsys):
    assert cli.main(["run", "rl_then_sft", *SMALL, "-p", "out_dir", str(shared_store)]) == 0
    assert capsys.readouterr().out.split() == [str(stage.path) for stage in rl_then_sft]


def test_publish_copies_without_weights(sft_then_rl, tmp_path, capsys):
    store = sft_then_rl[0].path.parent
    assert cli.main(["publish", "--dir", str(store), "--to", str(tmp_path / "out")]) == 0
    assert len(records.finished_stages(tmp_path / "out")) == int(capsys.readouterr().out.split()[0])
    assert not list(tmp_path.rglob("*.safetensors"))


def test_stages_of_two_versions_of_the_code_are_not_published(sft_then_rl, tmp_path, capsys):
    records.publish(sft_then_rl[0].path.parent, tmp_path / "store")
    path = records.finished_stages(tmp_path / "store")[0] / "record.json"
    record = json.loads(path.read_text())
    record["key"]["code"] = "other"
    path.write_text(json.dumps(record))
    assert cli.main(["publish", "--dir", str(tmp_path / "store"), "--to", str(tmp_path / "out")]) == 2
    assert "2 versions of the code" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_corpus_writes_cola_s_files(tmp_path):
    assert cli.main(["corpus", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == set(corpora.COLA_FILES.values())


def test_base_pretrains_into_the_folder_named(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(pretraining, "pretrain", asked.append)
    assert cli.main(["base", "--to", str(tmp_path)]) == 0
    assert asked == [tmp_path]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs", "--dir", "nowhere"], "--dir='nowhere' is not a folder"),
        (["publish", "--dir", "nowhere", "--to", "x"], "--dir='nowhere' is not a folder"),
        (["run", "sft_rl"], "pipeline='sft_rl' does not exist"),
        (["run", "sft", "-p", "beta", "-1"], "beta='-1'"),
        (["run", "sft", "-p", "bta", "1"], "bta='1' is not a parameter"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_status_two(arguments, message, capsys):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_help_names_every_command():
    shown = subprocess.run(
        [sys.executable, "-m", "sftrl_utils.cli", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("book", "run", "runs", "publish", "corpus", "base"):
        assert f"    {command} " in shown.stdout
