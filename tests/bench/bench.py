"""How fast the project is beside plain TRL: `make bench`, or `make bench CASES=grpo` for one family.

Every measurement is a process of its own, and the variants of a case take turns: ours, TRL tuned, TRL at its defaults,
the same model, data, seed and sample counts. Prints a row a case as it is done and writes `_build/bench.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
# Case: settings of the worker's function, repeats, and whether TRL's defaults are run too (on a CPU: minutes a step).
CPU = {
    **{f"grpo, tiny, {p} + 2, G = {g}": (dict(kind="grpo", name="tiny", length=p, group_size=g, steps=6), n, n > 1)
       for p in (40, 256) for g, n in ((4, 1), (8, 3), (16, 1))},
    "grpo, smollm2, 40 + 2, G = 4": (dict(kind="grpo", name="smollm2", length=40, group_size=4, steps=3), 1, False),
    "grpo, smollm2, 40 + 2, G = 8": (dict(kind="grpo", name="smollm2", length=40, group_size=8, steps=3), 3, True),
    "grpo, smollm2, 40 + 2, G = 16": (dict(kind="grpo", name="smollm2", length=40, group_size=16, steps=2), 1, False),
    "grpo, smollm2, 256 + 2, G = 8": (dict(kind="grpo", name="smollm2", length=256, group_size=8, steps=2), 1, False),
    "sft, tiny": (dict(kind="sft", name="tiny", batch_size=32, steps=12), 3, True),
    "sft, smollm2": (dict(kind="sft", name="smollm2", batch_size=32, steps=4), 3, True),
    "eval, tiny": (dict(kind="eval", name="tiny", sentences=1024), 3, False),
    "eval, smollm2": (dict(kind="eval", name="smollm2", sentences=128), 3, False),
}  # fmt: skip
GPU = {
    **{f"grpo, {name}, {p} + 2, G = {g}": (dict(kind="grpo", name=name, length=p, group_size=g, steps=12), 3, True)
       for name in ("smollm2", "qwen3") for p in (40, 256) for g in (4, 8, 16)},
    **{f"sft, {name}": (dict(kind="sft", name=name, batch_size=512, steps=12), 3, True)
       for name in ("smollm2", "qwen3")},
    **{f"eval, {name}": (dict(kind="eval", name=name, sentences=2048), 3, False) for name in ("smollm2", "qwen3")},
}  # fmt: skip


def measure(settings: dict, variant: str) -> dict:
    command = [sys.executable, "-W", "ignore", str(HERE / "worker.py"), json.dumps(settings), variant]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"bench: {settings} {variant} failed:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def row(case: str, settings: dict, repeats: int, with_default: bool) -> dict:
    """One case: medians over repeats, and the ratio to tuned TRL with its spread."""
    variants = ["ours", "tuned", *(["default"] if with_default else [])]
    runs = {variant: [] for variant in variants}
    for repeat in range(repeats):
        for variant in variants:
            if variant != "default" or repeat == 0:  # context, not what the ratio is against
                runs[variant].append(measure(settings, variant))
    seconds = {variant: statistics.median(run["seconds"] for run in done) for variant, done in runs.items()}
    ratios = [tuned["seconds"] / ours["seconds"] for ours, tuned in zip(runs["ours"], runs["tuned"], strict=True)]
    first = runs["ours"][0]
    return {
        "case": case,
        "device": first["device"],
        "ours_s": seconds["ours"],
        "trl_tuned_s": seconds["tuned"],
        "trl_default_s": seconds.get("default"),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "repeats": repeats,
        "floor_ratio": first["floor"],
        "tokens_per_s": first["tokens"] / seconds["ours"],
        "parameters": first["parameters"],
        "peak_rss_ours_mb": max(run["peak_mb"] for run in runs["ours"]),
        "peak_rss_plain_mb": max(run["peak_mb"] for run in runs["tuned"]),
    }


def start_up() -> dict:
    """Seconds to import what a notebook imports, and what TRL's own trainers take."""
    codes = {
        "ours": "import sftrl_utils.stages, sftrl_utils.figures",
        "tuned": "from trl import GRPOTrainer, SFTTrainer",
    }
    seconds = {name: [] for name in codes}
    for _ in range(3):
        for name, code in codes.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT)
            seconds[name].append(time.perf_counter() - start)
    ratios = [tuned / ours for ours, tuned in zip(seconds["ours"], seconds["tuned"], strict=True)]
    return {
        "case": "start-up of a notebook (TRL: its trainers alone)",
        "device": f"{os.cpu_count()} CPU cores",
        "ours_s": statistics.median(seconds["ours"]),
        "trl_tuned_s": statistics.median(seconds["tuned"]),
        "trl_default_s": None,
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "repeats": 3,
        "floor_ratio": None,
        "tokens_per_s": None,
        "parameters": None,
        "peak_rss_ours_mb": None,
        "peak_rss_plain_mb": None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="grpo, sft, eval, start-up, or the beginning of a case's name")
    parser.add_argument("--to", type=Path, default=ROOT / "_build" / "bench.json")
    arguments = parser.parse_args()
    import torch

    cases = GPU if torch.cuda.is_available() else CPU
    wanted = tuple(arguments.families)
    chosen = {case: settings for case, settings in cases.items() if not wanted or case.startswith(wanted)}
    if not chosen and not "start-up".startswith(wanted):
        raise SystemExit(f"bench: no case begins with {' or '.join(wanted)}: there are {', '.join(cases)}, start-up")
    arguments.to.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(arguments.to.read_text(encoding="utf-8")) if arguments.to.is_file() else []
    rows = {done["case"]: done for done in kept}  # of other cases: a run for one family adds to them
    jobs = [lambda case=case, settings=settings: row(case, *settings) for case, settings in chosen.items()]
    jobs += [start_up] if not wanted or "start-up".startswith(wanted) else []
    for job in jobs:
        done = job()
        rows[done["case"]] = done
        print(
            f"{done['case']}: {done['ours_s']:.3f} s, tuned TRL {done['trl_tuned_s']:.3f} s,"
            f" ratio {done['ratio']:.2f} ({done['ratio_min']:.2f}..{done['ratio_max']:.2f})"
            + (f", floor {done['floor_ratio']:.2f}" if done["floor_ratio"] else ""),
            flush=True,
        )
        arguments.to.write_text(
            json.dumps(list(rows.values()), indent=2) + "\n", encoding="utf-8"
        )  # what is done is kept
    print(f"The benchmark is at {arguments.to}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
