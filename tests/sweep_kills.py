"""Kill a sweep again and again at random moments, resume it once, and count what was lost or done twice.

`python tests/sweep_kills.py` takes a quarter of an hour or more; the suite runs a short form.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from sftrl_utils import records, sweeps

SMOKE = Path(__file__).parent.parent / "notebooks" / "sweeps" / "smoke.yaml"


def kill_and_resume(file: Path, store: Path, kills: int, longest_s: float, seed: int) -> dict[str, int]:
    """`kills` times start the sweep and SIGKILL it within `longest_s`; then let it finish. Returns counts."""
    rng = random.Random(seed)
    command = [sys.executable, "-m", "sftrl_utils.cli", "sweep", "run", str(file), "--dir", str(store)]
    seen: dict[str, str] = {}
    counts = {"kills": 0, "trained_again": 0, "cells_run_again": 0, "read_half_written": 0}
    while counts["kills"] < kills:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=rng.uniform(0.5, longest_s))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            counts["kills"] += 1
        else:  # it was done before the kill: there is nothing left to disturb
            break
        process.wait()
        _compare(store, file, seen, counts)
    time.sleep(2)
    final = subprocess.run(command, capture_output=True, text=True)
    _compare(store, file, seen, counts)
    plan = sweeps.plan(file, store)
    states = sweeps.states(plan, sweeps.whole_stages(plan)[0])
    counts |= {"finished": list(states.values()).count("finished"), "cells": len(plan.cells)}
    counts |= {"status": final.returncode, "rows": len(pd.read_parquet(plan.results))}
    return counts


def unharmed(counts: dict[str, int]) -> bool:
    """Whether everything is there, and nothing was lost, done twice or read half-written."""
    none = ("trained_again", "cells_run_again", "read_half_written", "status")
    return all(counts[name] == 0 for name in none) and counts["finished"] == counts["cells"]


def _compare(store: Path, file: Path, seen: dict[str, str], counts: dict[str, int]) -> None:
    """Note when each finished stage and cell was begun; one that was finished before must not have been begun again."""
    for folder in records.finished_stages(store) if store.is_dir() else []:
        counts["read_half_written"] += bool(records.damaged_file(folder))
        begun = records.read_record(folder).started
        counts["trained_again"] += seen.setdefault(folder.name, begun) != begun
    for path in (store / "sweeps" / file.stem / "cells").glob("[!.]*/cell.json"):
        outcome = json.loads(path.read_text())
        counts["cells_run_again"] += seen.setdefault(path.parent.name, outcome["started"]) != outcome["started"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--longest", type=float, default=20.0, help="seconds before a kill, at most")
    parser.add_argument("--file", type=Path, default=SMOKE)
    parser.add_argument("--same-as", type=Path, help="the table of an undisturbed run of the same sweep")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder, "runs")
        counts = kill_and_resume(options.file, store, options.kills, options.longest, seed=0)
        if options.same_as:
            mine, theirs = (
                pd.read_parquet(path) for path in (sweeps.plan(options.file, store).results, options.same_as)
            )
            counts["same_table"] = int(mine.equals(theirs))
    print(json.dumps(counts))
    sys.exit(0 if unharmed(counts) and counts.get("same_table", 1) else 1)


if __name__ == "__main__":
    main()
