"""A pushed stage carries its model, its record and a card that says where it comes from."""

import pytest
from huggingface_hub.errors import LocalTokenNotFoundError

from sftrl_utils import cli, hub
from sftrl_utils.config import InputError


class Hub:
    """Keeps what it is sent."""

    def __init__(self):
        self.files, self.repositories = {}, {}

    def create_repo(self, name, private, exist_ok):
        self.repositories[name] = private
        return f"https://hub/{name}"

    def upload_folder(self, repo_id, folder_path):
        self.files |= {path.name: path.read_bytes() for path in folder_path.iterdir()}

    def upload_file(self, repo_id, path_or_fileobj, path_in_repo):
        self.files[path_in_repo] = path_or_fileobj.read_bytes()


@pytest.fixture
def somewhere(monkeypatch):
    there = Hub()
    monkeypatch.setattr(hub, "HfApi", lambda: there)
    monkeypatch.setattr(hub.ModelCard, "push_to_hub", lambda card, _: there.files.update({"README.md": str(card)}))
    return there


def test_a_stage_is_pushed_whole(sft_then_rl, somewhere, capsys):
    stage = sft_then_rl[1]
    assert cli.main(["push", str(stage.path), "someone/coupled", "--private"]) == 0
    assert capsys.readouterr().out.strip() == "https://hub/someone/coupled"
    assert somewhere.repositories == {"someone/coupled": True}
    assert {"model.safetensors", "config.json", "tokenizer.json", "record.json", "metrics.parquet"} <= set(
        somewhere.files
    )
    assert somewhere.files["record.json"] == (stage.path / "record.json").read_bytes()
    card = somewhere.files["README.md"]
    for part in ("# coupled", "sft, then grpo", stage.record.stage, stage.record.versions["trl"], "health gate"):
        assert part in card
    assert f"{stage.metrics['sft_loss_dev'].iloc[-1]:.4f}".rstrip("0") in card
    assert "base_model" not in card  # the embedded one is not on the hub


def test_the_card_names_a_base_model_that_is_on_the_hub(sft_then_rl):
    record = sft_then_rl[0].record.model_copy(update={"model": "Qwen/Qwen3-0.6B"})
    stage = hub.Stage(sft_then_rl[0].path, record, sft_then_rl[0].metrics, sft_then_rl[0].report)
    card = hub.model_card(stage, "x")
    assert card.data.base_model == "Qwen/Qwen3-0.6B" and card.data.library_name == "transformers"


def test_an_invalid_stage_is_not_pushed(sft_then_rl, somewhere):
    stage = sft_then_rl[0]
    record = stage.record.model_copy(update={"gates": {"eos": "0.99 of completions have no EOS"}})
    with pytest.raises(InputError, match="failed a health gate"):
        hub.push(hub.Stage(stage.path, record, stage.metrics, stage.report), "a/b")
    assert somewhere.repositories == {}


def test_a_hub_that_does_not_let_you_in_is_one_line(sft_then_rl, somewhere, monkeypatch, capsys):
    def refuse(*_, **__):
        raise LocalTokenNotFoundError("Token is required.\nMore.")

    monkeypatch.setattr(somewhere, "create_repo", refuse)
    assert cli.main(["push", str(sft_then_rl[0].path), "a/b"]) == 2
    message = capsys.readouterr().err
    assert "'a/b' was not pushed: Token is required" in message and message.count("\n") == 1


def test_what_is_not_a_stage_is_one_line(tmp_path, capsys):
    assert cli.main(["push", str(tmp_path), "a/b"]) == 2
    assert "is not a finished stage" in capsys.readouterr().err
