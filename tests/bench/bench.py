"""How fast the project is beside plain TRL: `make bench`, or `make bench CASES=grpo` for one family.

Every measurement is a process of its own, and the variants of a case take turns: ours and tuned TRL, each in its faster
dtype, and TRL at its defaults, with the same model, data, seed and sample counts. Prints a row a case as it is done and
writes `_build/bench.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
TRAINERS = ("ours", "tuned")
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
    **{f"eval, {name}{what}": (dict(kind="eval", name=name, sentences=n, with_loss=bool(what)), 3, False)
       for name, n in (("tiny", 1024), ("smollm2", 128)) for what in ("", " with SFT loss")},
}  # fmt: skip
GPU = {
    **{f"grpo, {name}, {p} + 2, G = {g}": (dict(kind="grpo", name=name, length=p, group_size=g, steps=12), 3, True)
       for name in ("smollm2", "qwen3") for p in (40, 256) for g in (4, 8, 16)},
    **{f"sft, {name}": (dict(kind="sft", name=name, batch_size=512, steps=12), 3, True)
       for name in ("smollm2", "qwen3")},
    **{f"eval, {name}{what}": (dict(kind="eval", name=name, sentences=2048, with_loss=bool(what)), 3, False)
       for name in ("smollm2", "qwen3") for what in ("", " with SFT loss")},
}  # fmt: skip


def measure(settings: dict, variant: str) -> dict:
    command = [sys.executable, "-W", "ignore", str(HERE / "worker.py"), json.dumps(settings), variant]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"bench: {settings} {variant} failed:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def row(case: str, settings: dict, repeats: int, with_default: bool) -> dict:
    """One case: medians over repeats, each trainer in its faster dtype, and the ratio to tuned TRL with its spread."""
    dtypes = ["float32"] if settings["kind"] == "eval" else ["float32", "bf16"]
    tried = {f"{trainer} {dtype}": measure(settings, f"{trainer} {dtype}") for dtype in dtypes for trainer in TRAINERS}
    fastest = {
        trainer: min((name for name in tried if name.startswith(trainer)), key=lambda name: tried[name]["seconds"])
        for trainer in TRAINERS
    }
    default = measure(settings, "default")["seconds"] if with_default else None  # context, once
    runs = {trainer: [tried[name]] for trainer, name in fastest.items()}
    for _ in range(repeats - 1):
        for trainer, name in fastest.items():
            runs[trainer].append(measure(settings, name))
    seconds = {trainer: statistics.median(run["seconds"] for run in done) for trainer, done in runs.items()}
    ratios = [tuned["seconds"] / ours["seconds"] for ours, tuned in zip(runs["ours"], runs["tuned"], strict=True)]
    first = runs["ours"][0]
    # Floating-point operations that the method needs, a second, over what square matrix products of its dtype reach.
    rate = statistics.median(run["matrix_rate"] for run in runs["ours"])
    share = first["flops"] / seconds["ours"] / rate
    return {
        "case": case,
        "device": first["device"],
        "ours_s": seconds["ours"],
        "trl_tuned_s": seconds["tuned"],
        "trl_default_s": default,
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "repeats": repeats,
        "ours_dtype": fastest["ours"].split()[1],
        "tuned_dtype": fastest["tuned"].split()[1],
        "float32_ratio": tried["tuned float32"]["seconds"] / tried["ours float32"]["seconds"],
        "floor_ratio": first["floor"],
        "tokens_per_s": first["tokens"] / seconds["ours"],
        "parameters": first["parameters"],
        "matrix_share": share,
        "profile": first.get("profile"),
        "peak_rss_ours_mb": max(run["peak_mb"] for run in runs["ours"]),
        "peak_rss_plain_mb": max(run["peak_mb"] for run in runs["tuned"]),
    }


FIELDS = ("ours_dtype", "tuned_dtype", "float32_ratio")
FIELDS += ("trl_tuned_s", "trl_default_s", "ratio", "ratio_min", "ratio_max", "floor_ratio", "tokens_per_s")
FIELDS += ("parameters", "matrix_share", "profile", "peak_rss_ours_mb", "peak_rss_plain_mb")
WHOLE = dict.fromkeys(FIELDS)  # what a whole process has no figure for


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
    return WHOLE | {
        "case": "start-up of a notebook (TRL: its trainers alone)",
        "device": f"{os.cpu_count()} CPU cores",
        "ours_s": statistics.median(seconds["ours"]),
        "trl_tuned_s": statistics.median(seconds["tuned"]),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "repeats": 3,
    }


def book() -> dict:
    """Seconds of `make book` in a fresh clone, after its `make setup`: every notebook at the default preset."""
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), scratch], check=True)
        subprocess.run(["make", "--silent", "-C", scratch, "setup"], check=True, stdout=subprocess.DEVNULL)
        start = time.perf_counter()
        subprocess.run(["make", "--silent", "-C", scratch, "book"], check=True, capture_output=True)
        seconds = time.perf_counter() - start
    return WHOLE | {"case": "make book", "device": f"{os.cpu_count()} CPU cores", "ours_s": seconds, "repeats": 1}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "families", nargs="*", help="grpo, sft, eval, start-up, make book, or the beginning of a case's name"
    )
    parser.add_argument("--to", type=Path, default=ROOT / "_build" / "bench.json")
    arguments = parser.parse_args()
    import torch

    cases = GPU if torch.cuda.is_available() else CPU
    wanted = tuple(arguments.families)
    chosen = {case: settings for case, settings in cases.items() if not wanted or case.startswith(wanted)}
    whole = {"start-up": start_up, "make book": book}
    others = [job for name, job in whole.items() if not wanted or name.startswith(wanted)]
    if not chosen and not others:
        named = ", ".join([*cases, *whole])
        raise SystemExit(f"bench: no case begins with {' or '.join(wanted)}: there are {named}")
    arguments.to.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(arguments.to.read_text(encoding="utf-8")) if arguments.to.is_file() else []
    rows = {done["case"]: done for done in kept}  # of other cases: a run for one family adds to them
    jobs = [lambda case=case, settings=settings: row(case, *settings) for case, settings in chosen.items()]
    for job in jobs + others:
        done = job()
        rows[done["case"]] = done
        line = f"{done['case']}: {done['ours_s']:.3f} s"
        if done["ratio"]:
            line += f", tuned TRL {done['trl_tuned_s']:.3f} s"
            line += f", ratio {done['ratio']:.2f} ({done['ratio_min']:.2f}..{done['ratio_max']:.2f})"
        if done["floor_ratio"]:
            line += f", floor {done['floor_ratio']:.2f}"
        if done["matrix_share"]:
            line += f", {done['matrix_share']:.0%} of the matrix rate"
        print(line, flush=True)
        arguments.to.write_text(
            json.dumps(list(rows.values()), indent=2) + "\n", encoding="utf-8"
        )  # what is done is kept
    print(f"The benchmark is at {arguments.to}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
