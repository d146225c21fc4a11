"""A pushed stage carries its model, its record and a card that says where it comes from."""

from unittest.mock import create_autospec

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError

from sftrl_utils import cli, hub, records
from sftrl_utils.config import InputError


@pytest.fixture
def files():
    return {}


@pytest.fixture
def api(monkeypatch, files):
    """The hub's client; what it is sent lands in `files`."""
    there = create_autospec(HfApi, instance=True)
    there.create_repo.side_effect = lambda name, **_: f"https://hub/{name}"

    def keep_folder(repo_id, folder_path):
        files.update({path.name: path.read_bytes() for path in folder_path.iterdir()})

    def keep_file(repo_id, path_or_fileobj, path_in_repo):
        files[path_in_repo] = path_or_fileobj if isinstance(path_or_fileobj, bytes) else path_or_fileobj.read_bytes()

    there.upload_folder.side_effect, there.upload_file.side_effect = keep_folder, keep_file
    there.repo_info.return_value.private = True
    monkeypatch.setattr(hub, "HfApi", lambda: there)
    return there


def test_a_stage_is_pushed_whole(sft_then_rl, api, files, capsys):
    stage = sft_then_rl[1]
    assert cli.main(["push", str(stage.path), "someone/coupled", "--private"]) == 0
    assert capsys.readouterr().out.strip() == "https://hub/someone/coupled"
    assert api.create_repo.call_args.kwargs == {"private": True, "exist_ok": True}
    assert set(files) > {"model.safetensors", "config.json", "tokenizer.json", "metrics.parquet"}
    card = files["README.md"].decode()
    for part in ("# coupled", "sft, then grpo", stage.record.stage, stage.record.versions["trl"], "health gate"):
        assert part in card
    assert f"{stage.metrics['sft_loss_dev'].iloc[-1]:.4f}".rstrip("0") in card
    assert "base_model" not in card  # the embedded one is not on the hub
    assert str(stage.path.parent) not in card


def test_the_card_names_a_base_model_that_is_on_the_hub(sft_then_rl):
    stage = sft_then_rl[0]
    record = stage.record.model_copy(update={"key": {**stage.record.key, "parent": "Qwen/Qwen3-0.6B@abc"}})
    card = hub.model_card(hub.Stage(stage.path, record, stage.metrics, stage.report), "x")
    assert card.data.base_model == "Qwen/Qwen3-0.6B" and card.data.library_name == "transformers"


def test_a_public_repository_is_not_used_where_a_private_one_is_asked_for(sft_then_rl, api, files):
    api.repo_info.return_value.private = False
    with pytest.raises(InputError, match="'a/b' is there and public"):
        hub.push(sft_then_rl[0], "a/b", private=True)
    assert files == {}


def test_an_invalid_stage_is_not_pushed(sft_then_rl, api):
    stage = sft_then_rl[0]
    record = stage.record.model_copy(update={"gates": {"eos": "0.99 of completions have no EOS"}})
    with pytest.raises(InputError, match="failed a health gate"):
        hub.push(hub.Stage(stage.path, record, stage.metrics, stage.report), "a/b")
    api.create_repo.assert_not_called()


def test_a_published_stage_has_no_weights_to_push(sft_then_rl, tmp_path, api, capsys):
    records.publish(sft_then_rl[0].path.parent, tmp_path)
    (tmp_path / sft_then_rl[0].record.stage / "model").mkdir()
    assert cli.main(["push", str(tmp_path / sft_then_rl[0].record.stage), "a/b"]) == 2
    assert "holds no weights" in capsys.readouterr().err
    api.create_repo.assert_not_called()


@pytest.mark.parametrize(
    ("error", "remedy"),
    [(LocalTokenNotFoundError("Token is required.\nMore."), "hf auth login"), (ConnectionError(), "network")],
)
def test_a_hub_that_does_not_let_you_in_is_one_line(sft_then_rl, api, capsys, error, remedy):
    api.create_repo.side_effect = error
    assert cli.main(["push", str(sft_then_rl[0].path), "a/b"]) == 2
    message = capsys.readouterr().err
    assert "'a/b' was not pushed: " in message and remedy in message and message.count("\n") == 1


def test_what_is_not_a_stage_is_one_line(tmp_path, capsys):
    assert cli.main(["push", str(tmp_path), "a/b"]) == 2
    assert "is not a finished stage" in capsys.readouterr().err
