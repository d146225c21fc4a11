"""A finished stage on the Hugging Face hub, with a model card filled from its run record."""

from __future__ import annotations

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from sftrl_utils.config import InputError
from sftrl_utils.models import hub_id
from sftrl_utils.stages import Stage

CARD = """{data}

# {title}

{base} after {chain}, a stage of a book on whether supervised fine-tuning and reinforcement learning can be run one
after the other ([arXiv:2601.07389](https://arxiv.org/abs/2601.07389)). Trained to answer one question: is a sentence
acceptable English? It is of no use for anything else.

## Where it comes from

{provenance}

## What it does

Exact metrics at the start and the end of the last stage.

{summary}

The whole record is in `record.json`, every evaluation in `metrics.parquet`.
"""


def model_card(stage: Stage, title: str) -> ModelCard:
    """The card of `stage`: its chain, settings that differ from TRL's defaults, health gates and metrics."""
    record = stage.record
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=hub_id(record.model),
        tags=["trl", *record.kinds],
    )
    summary = stage.summary().round(4)
    summary.columns = [" ".join(column) for column in summary.columns]
    content = CARD.format(
        data=f"---\n{data.to_yaml()}\n---",
        title=title,
        base=record.model,
        chain=", then ".join(record.kinds),
        provenance=_markdown(record.provenance().reset_index()),
        summary=_markdown(summary.reset_index()),
    )
    return ModelCard(content)


def push(stage: Stage, repository: str, private: bool = False) -> str:
    """Upload model, record, metrics and card to the hub's `repository` (owner/name), made if need be; returns its URL.

    Raises `InputError` for a stage that is not valid, a name the hub refuses, or a hub that cannot be reached or does
    not let you in.
    """
    if not stage.record.valid:
        raise InputError(f"{stage.record.stage} failed a health gate, not for others: {stage.record.failed_gates}")
    api = HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=stage.path / "model")
        for name in ("record.json", "metrics.parquet"):
            api.upload_file(repo_id=repository, path_or_fileobj=stage.path / name, path_in_repo=name)
        model_card(stage, repository.split("/")[-1]).push_to_hub(repository)
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise InputError(
            f"{repository!r} was not pushed: {reason}. Log in with `hf auth login`, and name a repository of yours"
        ) from None
    return str(url)


def _markdown(table) -> str:
    """`table` as Markdown, without its index."""
    lines = [list(table.columns), ["---"] * table.shape[1], *table.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
