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
    book.add_argument("--single", action="store_true", help="build one page of everything into _build/singlehtml")
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

    _add_sweep(commands)

    runs = commands.add_parser("runs", help="list finished stages, one line each")
    runs.add_argument("--dir", type=Path, default=Path("runs"), help="the store to list (default: runs)")
    runs.add_argument("--json", action="store_true", help="print a list of objects with all columns")
    runs.set_defaults(command=_runs)

    publish = commands.add_parser("publish", help="copy records and metrics of stages, without weights")
    publish.add_argument("--dir", type=Path, default=Path("runs"), help="the store to copy from (default: runs)")
    publish.add_argument("--to", type=Path, required=True, help="the folder to copy to, e.g. data/results")
    publish.add_argument("--sweep", type=Path, metavar="FILE", help="only the stages and the table of this sweep")
    publish.set_defaults(command=_publish)

    claims = commands.add_parser("claims", help="what published runs say of each claim in book/claims.yml")
    claims.add_argument(
        "--json", action="store_true", help="print a list of objects: id, verdict, effect, low, high, …"
    )
    claims.set_defaults(command=_claims)

    gradients = commands.add_parser("gradients", help="cosines of the two objectives' gradients, for trained stages")
    gradients.add_argument("--dir", type=Path, default=Path("runs"), help="a store with weights (default: runs)")
    gradients.add_argument("--to", type=Path, required=True, help="the folder to write to, e.g. data/results/gradients")
    gradients.add_argument("--sweep", type=Path, metavar="FILE", help="only the stages of this sweep")
    gradients.set_defaults(command=_gradients)

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


def _add_sweep(commands: argparse._SubParsersAction) -> None:
    sweep = commands.add_parser("sweep", help="run notebooks with many parameters, named in a sweep file")
    actions = sweep.add_subparsers(required=True, metavar="ACTION")
    run = actions.add_parser("run", aliases=["resume"], help="run every cell that has neither finished nor failed")
    run.add_argument("--dry-run", action="store_true", help="list the cells and the stages they share, run nothing")
    run.set_defaults(command=_sweep_run)
    retry = actions.add_parser("retry", help="run failed cells again")
    which = retry.add_mutually_exclusive_group(required=True)
    which.add_argument("--failed", action="store_true", help="all that have failed")
    which.add_argument("--cell", action="append", help="this one, as `status` names it; may be repeated")
    retry.set_defaults(command=_sweep_retry)
    status = actions.add_parser("status", help="how many cells are finished, running, failed and waiting, and why")
    status.set_defaults(command=_sweep_status)
    for action in (run, retry, status):
        action.add_argument("file", type=Path, help="a sweep file, e.g. notebooks/sweeps/smoke.yaml")
        action.add_argument("--dir", type=Path, default=Path("runs"), help="the store of stages (default: runs)")
    for action in (run, retry):
        action.add_argument("--jobs", type=_count, help="cells at once on this machine (default: cores / --cpus)")
        action.add_argument("--engine", choices=["local", "ray"], default="local", help="default: local")
        action.add_argument("--address", help="of a Ray cluster, e.g. auto (default: one is started for this run)")
        action.add_argument(
            "--cpus", type=_count, default=1, help="threads of a cell, its numbers depend on them (default: 1)"
        )
        action.add_argument("--gpus", type=_share, default=0, help="GPUs of a cell, for Ray (default: 0)")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _share(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return number


def _sweep_run(options: argparse.Namespace) -> int:
    from sftrl_utils import sweeps

    plan = sweeps.plan(options.file, options.dir)
    if options.dry_run:
        print(sweeps.describe(plan))
        return 0
    seen = {cell.name: sweeps.read_outcome(plan.cells_folder / cell.name) for cell in plan.cells}
    whole, damaged = sweeps.whole_stages(plan)
    for path in damaged:
        print(f"{path} is damaged: the cells that need it run again")
    states = sweeps.states(plan, whole)
    return _run_cells(plan, {name: seen[name] for name in seen if states[name] in {"waiting", "running"}}, options)


def _sweep_retry(options: argparse.Namespace) -> int:
    from sftrl_utils import sweeps

    plan = sweeps.plan(options.file, options.dir)
    seen = {cell.name: sweeps.read_outcome(plan.cells_folder / cell.name) for cell in plan.cells}
    if unknown := set(options.cell or ()) - set(seen):
        raise InputError(f"--cell={min(unknown)!r} is not in {options.file}: `sftrl sweep status` names them")
    chosen = options.cell or [name for name in seen if seen[name].get("state") == "failed"]
    return _run_cells(plan, {name: seen[name] for name in chosen}, options)


def _run_cells(plan, chosen: dict, options: argparse.Namespace) -> int:
    import os
    import signal

    from sftrl_utils import engines, records

    if options.engine == "ray" and options.jobs:
        raise InputError(f"--jobs={options.jobs} is for this machine: on Ray, --cpus and --gpus say how many cells fit")
    if options.engine == "local" and (options.address or options.gpus):
        raise InputError("--address and --gpus are Ray's: add --engine ray")
    records.writable_store(plan.store)
    if options.engine == "ray":
        engine = engines.on_ray(options.address, options.cpus, options.gpus)
    else:
        engine = engines.local(options.jobs or max(1, (os.cpu_count() or 1) // options.cpus))

    def interrupt(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)  # how batch systems stop a job; after Ray, which has a handler of its own
    return engines.run(plan, engine, options.cpus, chosen)


def _sweep_status(options: argparse.Namespace) -> int:
    from sftrl_utils import engines, sweeps

    plan = sweeps.plan(options.file, options.dir)
    whole, damaged = sweeps.whole_stages(plan, weights=False)
    for path in damaged:
        print(f"{path} is damaged: the cells that need it run again")
    states = sweeps.states(plan, whole)
    for name, state in states.items():
        print(f"{state}  {name}")
    counts = {state: list(states.values()).count(state) for state in ("finished", "running", "failed", "waiting")}
    print(", ".join(f"{count} {state}" for state, count in counts.items()))
    engines.report_failures(plan, engines.failures(plan))
    return 1 if counts["failed"] else 0


def _book(options: argparse.Namespace) -> int:
    from sftrl_utils import publishing

    publishing.execute(options.preset)
    publishing.build(options.preset, builder="singlehtml" if options.single else "html")
    return 0


def _run(options: argparse.Namespace) -> int:
    from sftrl_utils import keys

    keys.kinds_of(options.pipeline)
    config = RunConfig.from_parameters(dict(options.parameters))
    from sftrl_utils.stages import train_pipeline  # seconds that nobody should wait for to read of a typo

    for stage in train_pipeline(config, options.pipeline):
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
    names = _stages_of(options)
    try:
        copied = records.publish(options.dir, options.to, names)
    except ValueError as error:
        raise InputError(str(error)) from None
    print(f"{len(copied)} stages copied to {options.to}")
    for record in copied:
        if not record.valid:  # claims and figures leave it out; whoever reads the tables should know why
            print(f"{record.stage} is INVALID: {record.failed_gates}", file=sys.stderr)
    return 0


def _stages_of(options: argparse.Namespace) -> set[str] | None:
    """Names of the stages of `--sweep`; None, for all, without it."""
    if not options.sweep:
        return None
    from sftrl_utils import sweeps

    return sweeps.plan(options.sweep, options.dir).stages


def _claims(options: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from sftrl_utils import claims

    here = Path("book", "claims.yml")
    path = here if here.is_file() else claims.ledger_file()
    ledger, root = claims.read_ledger(path), path.parent.parent
    results = root / "data" / "results" if path.parent.name == "book" else path.parent / "results"
    verdicts = [claims.judge(claim, results) for claim in ledger]
    if options.json:
        print(json.dumps([asdict(verdict) for verdict in verdicts], indent=2))
    else:
        print(claims.text(ledger, verdicts))
    texts = claims.pages(root)
    wrong = claims.misquoted(texts, verdicts)
    wrong += claims.typed_metrics(texts, claims.quotable_figures(path))
    for line in wrong:
        print(f"sftrl: {line}", file=sys.stderr)
    return 1 if wrong else 0


def _gradients(options: argparse.Namespace) -> int:
    from sftrl_utils import alignment

    count = alignment.measure_store(options.dir, options.to, _stages_of(options))
    print(f"{count} stages measured into {options.to}")
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
