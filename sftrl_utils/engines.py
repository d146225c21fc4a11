"""Running the cells of a sweep: as processes of this machine, or as tasks of a Ray cluster."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
from filelock import FileLock, Timeout
from tqdm import tqdm

from sftrl_utils import sweeps
from sftrl_utils.cell import SPEC
from sftrl_utils.config import InputError
from sftrl_utils.sweeps import Cell, Plan

LOG = "log.txt"
LAST_LINES = 5  # of a failed cell's log are shown
POLL_S = 0.2
TABLE_S = 10.0  # while a sweep runs its table is written at most this often
WORKER_RETRIES = 3  # of a cell whose Ray worker dies


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: `state` is `finished`, `failed` or, by ctrl-C, `stopped`."""

    state: str
    reason: str = ""


@dataclass(frozen=True)
class Job:
    """What a worker, here or on another machine, must know to run a cell; both paths are absolute.

    `cells` is where the folders of cells are, `folder` where to run; `cpus` how many threads to compute with.
    """

    cell: Cell
    cells: Path
    folder: Path
    timeout_s: float
    cpus: int


@dataclass(frozen=True)
class Engine:
    """`run` runs a job to its end; `slots` says how many may run at once; `close` lets go of what was held."""

    run: Callable[[Job, Callable[[], bool]], Outcome]
    slots: Callable[[], int]
    close: Callable[[], None] = lambda: None


def local(jobs: int) -> Engine:
    """At most `jobs` processes on this machine."""
    return Engine(run_job, lambda: jobs)


def on_ray(address: str | None, cpus: int, gpus: float) -> Engine:
    """Tasks of the Ray cluster at `address` (`auto`: the one started here; None: one is started for this run).

    Each cell has `cpus` cores and `gpus` GPUs to itself; one whose worker dies is tried again. All machines see the
    store under the same path, and have this package installed. Raises `InputError` without Ray or without a cluster.
    """
    try:
        import ray
    except ImportError:
        raise InputError("engine='ray' needs Ray: pip install 'sftrl_utils[ray]'") from None
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error", include_dashboard=False)
    except (ConnectionError, ValueError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[-1]
        raise InputError(f"--address={address!r}: no Ray cluster there, or it does not let you in ({reason})") from None
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=WORKER_RETRIES)(run_job)

    def run(job: Job, stopped: Callable[[], bool]) -> Outcome:
        result = task.remote(job)
        while not ray.wait([result], timeout=POLL_S)[0]:
            if stopped():
                ray.cancel(result, force=True)
                return Outcome("stopped")
        try:
            return ray.get(result)
        except ray.exceptions.RayError as error:
            return Outcome("failed", f"its Ray worker died {WORKER_RETRIES + 1} times ({type(error).__name__})")

    def slots() -> int:
        there = ray.cluster_resources()
        fits = [there.get("CPU", 0) // cpus, *([there.get("GPU", 0) // gpus] if gpus else [])]
        return int(min(fits))

    return Engine(run, slots, ray.shutdown)


def run_job(job: Job, stopped: Callable[[], bool] = lambda: False) -> Outcome:
    """Run one cell in a process of its own, and leave its folder: outcome, log and executed notebook.

    The folder is written under another name and renamed when whole. A cell that another sweep runs meanwhile is waited
    for, and how it ended there counts.
    """
    try:
        job.cells.mkdir(parents=True, exist_ok=True)
        lock = FileLock(job.cells / f".{job.cell.name}.lock")
        while True:
            try:
                with lock.acquire(timeout=POLL_S):
                    there = sweeps.read_outcome(job.cells / job.cell.name)
                    return Outcome(there["state"], there["reason"]) if there else _run_locked(job, stopped)
            except Timeout:
                if stopped():
                    return Outcome("stopped")
    except OSError as error:
        return Outcome("failed", f"{job.cells} cannot be written to ({error.strerror}): make room there")


def _run_locked(job: Job, stopped: Callable[[], bool]) -> Outcome:
    name, final = job.cell.name, job.cells / job.cell.name
    for leftover in job.cells.glob(f".{name}.*.tmp"):  # of a sweep that was killed: we hold the cell's lock
        shutil.rmtree(leftover)
    work = job.cells / f".{name}.{os.getpid()}.tmp"
    spec = {"cell": name, "notebook": str(job.cell.notebook), "parameters": job.cell.parameters}
    try:
        work.mkdir()
        (work / SPEC).write_text(json.dumps(spec), encoding="utf-8")
        started, clock = datetime.now(UTC), time.perf_counter()
        outcome = _execute(job, work, stopped)
        if outcome.state != "stopped":
            spec |= {"state": outcome.state, "reason": outcome.reason, "stages": sorted(job.cell.stages)}
            spec |= {"started": started.isoformat(timespec="seconds"), "wall_s": round(time.perf_counter() - clock, 2)}
            spec |= {"host": socket.gethostname(), "cpus": job.cpus}
            (work / SPEC).write_text(json.dumps(spec, indent=2) + "\n", encoding="utf-8")
            work.rename(final)
        return outcome
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _execute(job: Job, work: Path, stopped: Callable[[], bool]) -> Outcome:
    command = [sys.executable, "-m", "sftrl_utils.cell", str(work)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.cpus)}
    deadline = time.monotonic() + job.timeout_s
    with (work / LOG).open("wb") as log:
        # It ends when its standard input does: with this process, however that ends.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, cwd=job.folder, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            while process.poll() is None:
                if stopped():
                    return Outcome("stopped")
                if time.monotonic() > deadline:
                    return Outcome("failed", f"it took longer than {job.timeout_s / 60:g} minutes")
                time.sleep(POLL_S)
        finally:
            _kill(process)
    if process.returncode == 0:
        return Outcome("finished")
    if process.returncode < 0:
        return Outcome("failed", f"its process was killed by signal {-process.returncode}")
    return Outcome("failed", (last_lines(work) or ["it printed nothing"])[-1])


def _kill(process: subprocess.Popen) -> None:
    """End `process` and all it has started: a kernel is in a session of its own."""
    if process.poll() is None:
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait()
    process.stdin.close()


def last_lines(folder: Path) -> list[str]:
    """The last lines of the log of the cell in `folder` that say anything."""
    try:
        text = (folder / LOG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [line for line in text.replace("\r", "\n").splitlines() if line.strip()][-LAST_LINES:]


def run(plan: Plan, engine: Engine, cpus: int, chosen: set[str]) -> int:
    """Run the cells of `plan` that are named in `chosen`; returns an exit status.

    Shows how many cells are done, running and failed, and the time left; then the failed ones with the last lines of
    their logs. The status is 1 if any cell of the plan has failed or the table could not be written, 130 after ctrl-C.
    """
    stop = threading.Event()
    wanted = [cell for cell in plan.cells if cell.name in chosen]
    outcomes: dict[str, Outcome] = {}
    try:
        for cell in wanted:
            _forget(plan, cell)
        _run_all(plan, engine, cpus, wanted, outcomes, stop)
    except KeyboardInterrupt:
        print("stopped: what was finished stays, run it again to go on", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"{plan.folder} cannot be written to ({error.strerror}): make room there", file=sys.stderr)
        return 1
    finally:
        stop.set()
        engine.close()
    failed = {name: outcome.reason for name, outcome in outcomes.items() if outcome.state == "failed"}
    report_failures(plan, failed | failures(plan))
    print(f"{plan.results} holds the table")
    return 1 if failed or failures(plan) else 0


def failures(plan: Plan) -> dict[str, str]:
    """Why each failed cell of `plan` has failed."""
    ended = {cell.name: sweeps.read_outcome(plan.cells_folder / cell.name) for cell in plan.cells}
    return {name: outcome["reason"] for name, outcome in ended.items() if outcome.get("state") == "failed"}


def report_failures(plan: Plan, reasons: dict[str, str]) -> None:
    """Print each failed cell with its reason and the last lines of its log to stderr, and what to do about them."""
    for name, reason in reasons.items():
        print(f"FAILED {name}: {reason}", file=sys.stderr)
        for line in last_lines(plan.cells_folder / name):
            print(f"    {line}", file=sys.stderr)
    if reasons:
        print(
            f"{len(reasons)} of {len(plan.cells)} cells failed; `sftrl sweep retry {plan.file} --failed`",
            file=sys.stderr,
        )


def _forget(plan: Plan, cell: Cell) -> None:
    """Remove what `cell` left when it last ended, unless another sweep is running it now."""
    folder = plan.cells_folder / cell.name
    if folder.is_dir():
        try:
            with FileLock(sweeps.cell_lock(plan, cell.name), timeout=0):
                shutil.rmtree(folder)
        except Timeout:
            pass


def _run_all(
    plan: Plan, engine: Engine, cpus: int, wanted: list[Cell], outcomes: dict[str, Outcome], stop: threading.Event
) -> None:
    pending, running = list(wanted), {}
    written = 0.0
    bar = tqdm(total=len(plan.cells), initial=len(plan.cells) - len(wanted), desc=plan.file.stem, unit="cell")
    with ThreadPoolExecutor(max_workers=max(1, len(wanted))) as threads, bar:
        try:
            while pending or running:
                while pending and len(running) < max(1, engine.slots()):
                    cell = _next(plan, pending, list(running.values()))
                    pending.remove(cell)
                    minutes = plan.sweep.timeout_minutes
                    job = Job(cell, plan.cells_folder.absolute(), Path.cwd(), minutes * 60, cpus)
                    running[threads.submit(engine.run, job, stop.is_set)] = cell
                ended, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in ended:
                    outcomes[running.pop(future).name] = future.result()
                    bar.update()
                failed = sum(outcome.state == "failed" for outcome in outcomes.values())
                bar.set_postfix_str(f"{len(running)} running, {failed} failed")
                if ended and time.monotonic() > written + TABLE_S:
                    sweeps.write_results(plan)
                    written = time.monotonic()
        finally:
            stop.set()
    sweeps.write_results(plan)


def _next(plan: Plan, pending: list[Cell], running: list[Cell]) -> Cell:
    """The first cell that would not wait for a stage which a running one is training; if there is none, the first."""
    busy = {name for cell in running for name in cell.stages if not (plan.store / name / "record.json").is_file()}
    return next((cell for cell in pending if not cell.stages & busy), pending[0])
