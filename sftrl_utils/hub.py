"""A finished stage on the Hugging Face hub, with a model card filled from its run record."""

from __future__ import annotations

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from sftrl_utils.config import InputError
from sftrl_utils.stages import Stage, chain

CARD = """---
{data}
---

# {title}

{base} after {kinds}, a stage of a book on whether supervised fine-tuning and reinforcement learning can be run one
after the other ([arXiv:2601.07389](https://arxiv.org/abs/2601.07389)). Trained to answer one question: is a sentence
acceptable English? It is of no use for anything else.

## Where it comes from

{provenance}

## What it does

Exact metrics at the start and the end of the last stage; every evaluation is in `metrics.parquet`.

{summary}
"""


def model_card(stage: Stage, title: str) -> ModelCard:
    """The card of `stage`: its chain, settings that differ from TRL's defaults, health gates and metrics."""
    stages = chain(stage)
    base, _, commit = stages[0].record.key["parent"].partition("@")  # of a hub model `owner/name@commit`
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base if commit else None,
        tags=["trl", *stage.record.kinds],
    )
    summary = stage.summary().round(4)
    summary.columns = [" ".join(column) for column in summary.columns]
    content = CARD.format(
        data=data.to_yaml(),
        title=title,
        base=base if commit else "A model that is not on the hub",
        kinds=", then ".join(each.record.kind for each in stages),
        provenance=_markdown(stage.record.provenance().reset_index()),
        summary=_markdown(summary.reset_index()),
    )
    return ModelCard(content)


def push(stage: Stage, repository: str, private: bool = False) -> str:
    """Upload model, metrics and card to the hub's `repository` (owner/name), made if need be; returns its URL.

    Raises `InputError` for a stage that is not valid or has no model, a public repository where a private one is asked
    for, or a hub that cannot be reached or refuses.
    """
    if not stage.record.valid:
        raise InputError(f"{stage.record.stage} failed a health gate, not for others: {stage.record.failed_gates}")
    if not any((stage.path / "model").glob("*.safetensors")):
        raise InputError(f"{str(stage.path)!r} holds no weights, published stages have none: train it with `sftrl run`")
    card, api = str(model_card(stage, repository.split("/")[-1])), HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        public = private and not api.repo_info(repository).private  # an existing one stays what it is
        if not public:
            api.upload_folder(repo_id=repository, folder_path=stage.path / "model")
            for name, content in (("metrics.parquet", stage.path / "metrics.parquet"), ("README.md", card.encode())):
                api.upload_file(repo_id=repository, path_or_fileobj=content, path_in_repo=name)
    except Exception as error:  # the hub client raises many kinds for one cause: it cannot be used
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        answered = isinstance(error, (HfHubHTTPError, LocalTokenNotFoundError, HFValidationError))
        remedy = "Log in with `hf auth login`, and name a repository of yours" if answered else "Is the network there?"
        raise InputError(f"{repository!r} was not pushed: {reason}. {remedy}") from None
    if public:
        raise InputError(f"{repository!r} is there and public: name another one, or leave out --private")
    return str(url)


def _markdown(table) -> str:
    """`table` as Markdown, without its index."""
    lines = [list(table.columns), ["---"] * table.shape[1], *table.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
