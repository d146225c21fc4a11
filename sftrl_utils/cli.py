"""The `sftrl` command: argument parsing only."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sftrl_utils.config import PRESETS, InputError, RunConfig
from sftrl_utils.records import PIPELINES


def main(arguments: list[str] | None = None) -> int:
    """Run `sftrl`; returns the exit status. Input that cannot be used is one line on stderr and status 2."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options) or 0
    except InputError as error:
        print(f"sftrl: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sftrl", description="Runs and lists the stages behind the book.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    book = commands.add_parser("book", help="execute every notebook and build the HTML into _build/html")
    book.add_argument("--preset", choices=PRESETS, default="tiny", help="settings to run at (default: tiny)")
    book.set_defaults(command=_book)

    run = commands.add_parser(
        "run",
        help="train (or load) the stages of one pipeline without a notebook",
        epilog=f"Parameters: {', '.join(RunConfig.model_fields)}. A preset sets all of them.",
    )
    run.add_argument("pipeline", help=f"one of {', '.join(PIPELINES.values())}")
    run.add_argument(
        "-p", dest="parameters", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
        help="set a notebook parameter, e.g. -p preset smoke -p seed 1; may be repeated",
    )  # fmt: skip
    run.set_defaults(command=_run)

    runs = commands.add_parser("runs", help="list finished stages, one line each")
    runs.add_argument("--dir", type=Path, default=Path("runs"), help="the store to list (default: runs)")
    runs.add_argument("--json", action="store_true", help="print a list of objects with all columns")
    runs.set_defaults(command=_runs)

    publish = commands.add_parser("publish", help="copy records and metrics of stages, without weights")
    publish.add_argument("--dir", type=Path, default=Path("runs"), help="the store to copy from (default: runs)")
    publish.add_argument("--to", type=Path, required=True, help="the folder to copy to, e.g. data/results")
    publish.set_defaults(command=_publish)

    push = commands.add_parser("push", help="upload a stage to the Hugging Face hub, with a card from its record")
    push.add_argument("stage", type=Path, help="the stage's folder, as `sftrl run` prints it")
    push.add_argument("repository", help="owner/name on the hub; made if it is not there")
    push.add_argument("--private", action="store_true", help="make it a private repository")
    push.set_defaults(command=_push)

    corpus = commands.add_parser("corpus", help="write the graded corpus as CoLA TSV files plus q and phenomenon")
    corpus.add_argument("folder", type=Path, help="where to write the three files")
    corpus.set_defaults(command=_corpus)

    base = commands.add_parser("base", help="pre-train the embedded base model (about 20 minutes on 2 cores)")
    base.add_argument("--to", type=Path, required=True, help="the folder to write it to, e.g. data/base")
    base.set_defaults(command=_base)
    return parser


def _book(options: argparse.Namespace) -> int:
    from sftrl_utils import publishing

    publishing.execute(options.preset)
    publishing.build(options.preset)
    return 0


def _run(options: argparse.Namespace) -> int:
    from sftrl_utils.stages import train_pipeline

    for stage in train_pipeline(RunConfig.from_parameters(dict(options.parameters)), options.pipeline):
        print(stage.path)
    return 0


def _runs(options: argparse.Namespace) -> int:
    from sftrl_utils import records

    if not options.dir.is_dir():
        raise InputError(f"--dir={str(options.dir)!r} is not a folder: name a store such as runs or data/results")
    if options.json:
        print(records.runs_json(options.dir))
    else:
        print(records.runs_text(options.dir))
    return 0


def _publish(options: argparse.Namespace) -> int:
    from sftrl_utils import records

    if not options.dir.is_dir():
        raise InputError(f"--dir={str(options.dir)!r} is not a folder: name a store such as runs")
    try:
        copied = records.publish(options.dir, options.to)
    except ValueError as error:
        raise InputError(str(error)) from None
    print(f"{len(copied)} stages copied to {options.to}")
    for record in copied:
        if not record.valid:  # claims and figures leave it out; whoever reads the tables should know why
            print(f"{record.stage} is INVALID: {record.failed_gates}", file=sys.stderr)
    return 0


def _push(options: argparse.Namespace) -> int:
    if not (options.stage / "record.json").is_file():
        raise InputError(f"{str(options.stage)!r} is not a finished stage: `sftrl runs` lists those there are")
    from sftrl_utils import hub, stages

    print(hub.push(stages.open_stage(options.stage), options.repository, options.private))
    return 0


def _corpus(options: argparse.Namespace) -> int:
    from sftrl_utils.corpora import write_graded_corpus

    preset = PRESETS["tiny"]
    counts = {split: preset[f"{split}_sentences"] for split in ("train", "dev", "heldout")}
    write_graded_corpus(options.folder, counts)
    return 0


def _base(options: argparse.Namespace) -> int:
    from sftrl_utils.pretraining import pretrain

    pretrain(options.to)
    return 0


if __name__ == "__main__":
    sys.exit(main())
