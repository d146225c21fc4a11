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
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout
from tqdm import tqdm

from sftrl_utils import sweeps
from sftrl_utils.cell import REASON, SOURCE, SPEC
from sftrl_utils.config import InputError
from sftrl_utils.sweeps import Cell, Plan

LOG = "log.txt"
LAST_LINES = 5  # of a failed cell's log are shown
POLL_S = 0.2
TABLE_S = 10.0  # while a sweep runs its table is written at most this often
WORKER_RETRIES = 3  # of a cell whose Ray worker dies


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: `state` is `finished`, `failed` or, by ctrl-C, `stopped`; `log` its last lines if it failed."""

    state: str
    reason: str = ""
    log: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """What a worker, here or on another machine, must know to run a cell; all paths are absolute.

    `cells` is where the folders of cells are, `store` where its stages are, `folder` where to run; `cpus` how many
    threads to compute with.
    """

    cell: Cell
    cells: Path
    store: Path
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

    Each cell has `cpus` cores and `gpus` GPUs to itself; one whose worker dies is tried again. All machines have this
    package installed, and see the store, the folder the sweep is started in and what the parameters name under the same
    paths. Raises `InputError` without Ray, without a cluster, or if no machine has what a cell needs.
    """
    try:
        import ray
    except ImportError:
        raise InputError("engine='ray' needs Ray: pip install 'sftrl_utils[ray]'") from None
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level="error", include_dashboard=False)
    except (ConnectionError, ValueError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[-1]
        raise InputError(f"--address={address!r}: no Ray cluster there, or it does not let you in ({reason})") from None

    def slots() -> int:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        fits = [min(has.get("CPU", 0) // cpus, has.get("GPU", 0) // gpus if gpus else 10**6) for has in machines]
        return int(sum(fits))

    if slots() == 0:
        ray.shutdown()
        raise InputError(f"--cpus={cpus} --gpus={gpus:g}: no machine of the cluster has as many: ask for fewer")
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=WORKER_RETRIES)(run_job)

    def run(job: Job, stopped: Callable[[], bool]) -> Outcome:
        result = task.remote(job)
        while not ray.wait([result], timeout=POLL_S)[0]:
            if stopped():
                ray.cancel(result, force=True)
                return Outcome("stopped")
        try:
            return ray.get(result)
        except ray.exceptions.WorkerCrashedError:
            return Outcome("failed", f"its Ray worker died {WORKER_RETRIES + 1} times")

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
        return Outcome("failed", f"{error.filename or job.cells}: {error.strerror or error}")


def _run_locked(job: Job, stopped: Callable[[], bool]) -> Outcome:
    cell, final = job.cell, job.cells / job.cell.name
    for leftover in job.cells.glob(f".{cell.name}.*.tmp"):  # of a sweep that was killed: we hold the cell's lock
        shutil.rmtree(leftover, ignore_errors=True)
    work = job.cells / f".{cell.name}.{os.getpid()}.tmp"
    spec = {"cell": cell.name, "notebook": str(cell.notebook.path), "parameters": cell.parameters}
    spec |= {"stages": sorted(cell.stages), "modules": cell.notebook.modules, "code": cell.notebook.code}
    try:
        work.mkdir()
        (work / SPEC).write_text(json.dumps(spec), encoding="utf-8")
        (work / SOURCE).write_text(cell.notebook.text, encoding="utf-8")
        started, clock = datetime.now(UTC), time.perf_counter()
        outcome = _execute(job, work, stopped)
        if outcome.state != "stopped":
            spec |= {"state": outcome.state, "reason": outcome.reason, "host": socket.gethostname(), "cpus": job.cpus}
            spec |= {"started": started.isoformat(timespec="seconds"), "wall_s": round(time.perf_counter() - clock, 2)}
            (work / SPEC).write_text(json.dumps(spec, indent=2) + "\n", encoding="utf-8")
            for name in (SOURCE, REASON):  # the executed notebook and the outcome have them
                (work / name).unlink(missing_ok=True)
            shutil.rmtree(final, ignore_errors=True)  # no outcome can be read there
            work.rename(final)
        return outcome
    except OSError as error:
        return Outcome("failed", f"{error.filename or work}: {error.strerror or error}", last_lines(work))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _execute(job: Job, work: Path, stopped: Callable[[], bool]) -> Outcome:
    command = [sys.executable, "-m", "sftrl_utils.cell", str(work)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.cpus)}
    deadline, reason = time.monotonic() + job.timeout_s, ""
    with (work / LOG).open("wb") as log:
        # It ends when its standard input does: with this process, however that ends.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, cwd=job.folder, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            while process.poll() is None and not reason:
                if stopped():
                    return Outcome("stopped")
                if time.monotonic() > deadline:
                    reason = f"it took longer than {job.timeout_s / 60:g} minutes"
                time.sleep(POLL_S)
        finally:
            _kill(process)
    reason = reason or _fault(job, work, process.returncode)
    return Outcome("failed", reason, last_lines(work)) if reason else Outcome("finished")


def _fault(job: Job, work: Path, returncode: int) -> str:
    """Why the cell that ended by itself in `work` has failed; "" if it has not."""
    if returncode < 0:
        return f"its process was killed by signal {-returncode}"
    if returncode:
        file = work / REASON
        said = file.read_text(encoding="utf-8") if file.is_file() else ""
        return said or (last_lines(work) or ("it printed nothing",))[-1]
    for name in sorted(job.cell.stages):
        if not (job.store / name / "record.json").is_file():
            return f"it did not train {name}, which the notebook's metadata say it does"
    return ""


def _kill(process: subprocess.Popen) -> None:
    """End `process` and all it has started: a kernel is in a session of its own."""
    with contextlib.suppress(psutil.Error):
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()  # first: it would start another kernel
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()
    process.kill()
    process.wait()
    process.stdin.close()


def last_lines(folder: Path) -> tuple[str, ...]:
    """The last lines of the log of the cell in `folder` that say anything."""
    try:
        text = (folder / LOG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    return tuple([line for line in text.replace("\r", "\n").splitlines() if line.strip()][-LAST_LINES:])


def run(plan: Plan, engine: Engine, cpus: int, chosen: dict[str, dict[str, Any]]) -> int:
    """Run the cells of `plan` named in `chosen`, each with the outcome that it was chosen for; returns an exit status.

    Shows how many cells are done, running and failed, and the time left; then the failed ones with the last lines of
    their logs. The status is 1 if any cell of the plan has failed or the table could not be written, 130 after ctrl-C.
    """
    outcomes: dict[str, Outcome] = {}
    status = 0
    try:
        for name, seen in chosen.items():
            _forget(plan, name, seen)
        _run_all(plan, engine, cpus, [cell for cell in plan.cells if cell.name in chosen], outcomes)
    except KeyboardInterrupt:
        print("stopped: what was finished stays, run it again to go on", file=sys.stderr)
        status = 130
    finally:
        engine.close()
    failed = failures(plan) | {name: outcome for name, outcome in outcomes.items() if outcome.state == "failed"}
    report_failures(plan, failed)
    states = sweeps.states(plan, sweeps.whole_stages(plan, weights=False)[0])
    if left := sum(state in {"waiting", "running"} for state in states.values()):
        print(
            f"{left} of {len(plan.cells)} cells have not run to their end: `sftrl sweep run {plan.file}`",
            file=sys.stderr,
        )
    try:
        sweeps.write_results(plan)
        if plan.results.is_file():
            print(f"{plan.results} holds the table")
    except OSError as error:
        reason = f"({error.strerror}): make room there, and run it again"
        print(f"{plan.results} cannot be written {reason}", file=sys.stderr)
        status = status or 1
    return status or (1 if failed else 0)


def failures(plan: Plan) -> dict[str, Outcome]:
    """The outcome of each cell of `plan` that has left one and failed."""
    found = {}
    for cell in plan.cells:
        folder = plan.cells_folder / cell.name
        outcome = sweeps.read_outcome(folder)
        if outcome.get("state") == "failed":
            found[cell.name] = Outcome("failed", outcome["reason"], last_lines(folder))
    return found


def report_failures(plan: Plan, failed: dict[str, Outcome]) -> None:
    """Print each failed cell with its reason and the last lines of its log to stderr, and what to do about them."""
    for name, outcome in failed.items():
        print(f"FAILED {name}: {outcome.reason}", file=sys.stderr)
        for line in outcome.log:
            print(f"    {line}", file=sys.stderr)
    if failed:
        kept = [name for name in failed if (plan.cells_folder / name).is_dir()]
        commands = [f"`sftrl sweep retry {plan.file} --failed`"] * bool(kept)
        commands += [f"`sftrl sweep run {plan.file}`"] * (len(kept) < len(failed))  # those that could leave nothing
        remedy = f"{' and '.join(commands)} will run them again"
        print(f"{len(failed)} of {len(plan.cells)} cells failed; {remedy}", file=sys.stderr)


def _forget(plan: Plan, name: str, seen: dict[str, Any]) -> None:
    """Remove what the cell `name` left when it ended as `seen`, unless another sweep has run it since or does now."""
    folder = plan.cells_folder / name
    if folder.is_dir():
        with contextlib.suppress(Timeout), FileLock(sweeps.cell_lock(plan, name), timeout=POLL_S):
            if sweeps.read_outcome(folder) == seen:
                shutil.rmtree(folder)


def _run_all(plan: Plan, engine: Engine, cpus: int, wanted: list[Cell], outcomes: dict[str, Outcome]) -> None:
    """Run `wanted`; how each ended is in `outcomes`, also if this is interrupted."""
    stop = threading.Event()
    pending, running = list(wanted), {}
    due, unwritten = 0.0, False
    bar = tqdm(total=len(plan.cells), initial=len(plan.cells) - len(wanted), desc=plan.file.stem, unit="cell")
    with bar, ThreadPoolExecutor(max_workers=max(1, len(wanted))) as threads:
        try:
            while pending or running:
                while pending and len(running) < max(1, engine.slots()):
                    cell = _next(plan, pending, list(running.values()))
                    pending.remove(cell)
                    paths = (plan.cells_folder.absolute(), plan.store.absolute(), Path.cwd())
                    job = Job(cell, *paths, plan.sweep.timeout_minutes * 60, cpus)
                    running[threads.submit(engine.run, job, stop.is_set)] = cell
                ended, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in ended:
                    outcomes[running.pop(future).name] = _outcome(future)
                    bar.update()
                failed = sum(outcome.state == "failed" for outcome in outcomes.values())
                bar.set_postfix_str(f"{len(running)} running, {failed} failed")
                unwritten = unwritten or bool(ended)
                if unwritten and time.monotonic() > due:
                    due, unwritten = _write_in_time(plan), False
        finally:
            stop.set()


def _outcome(future: Future[Outcome]) -> Outcome:
    try:
        return future.result()
    except Exception as error:  # whatever went wrong about one cell must not end the others
        return Outcome("failed", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def _write_in_time(plan: Plan) -> float:
    """Write the table, and return when to do so next; a table that cannot be written now is written at the end."""
    began = time.monotonic()
    with contextlib.suppress(OSError):
        sweeps.write_results(plan)
    now = time.monotonic()
    return now + max(TABLE_S, 20 * (now - began))


def _next(plan: Plan, pending: list[Cell], running: list[Cell]) -> Cell:
    """The cell to start: one that nobody else runs and that waits for no stage of a running one, if there is any."""
    busy = {name for cell in running for name in cell.stages if not (plan.store / name / "record.json").is_file()}
    free = (cell for cell in pending if not cell.stages & busy and not sweeps.is_running(plan, cell.name))
    return next(free, pending[0])
