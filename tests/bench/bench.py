"""How fast the project is beside plain TRL: `make bench`, or `make bench CASES=grpo` for one family.

Every measurement is a process of its own: first each side's candidates (dtypes, batches, TRL's defaults), then the
fastest of ours and of TRL's in turns, with the same model, data, seed and sample counts. Prints a row a case as it is
done and writes `_build/bench.json`.
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

from sftrl_utils import records

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
OURS = ("ours float32", "ours bf16")
TUNED = ("tuned float32", "tuned bf16")
IN_PARTS = (*TUNED, "tuned float32 in parts", "tuned bf16 in parts")
BATCHES = ("tuned 32", "tuned 128")
# Case: settings of the worker's function, candidates for tuned TRL, repeats.
CPU = {
    "grpo, smollm2, 40 + 2, G = 8":
        (dict(kind="grpo", name="smollm2", length=40, group_size=8, steps=4), (*TUNED, "default"), 3),
    "grpo, smollm2, 256 + 2, G = 8": (dict(kind="grpo", name="smollm2", length=256, group_size=8, steps=2), TUNED, 3),
    **{f"grpo, smollm2, 40 + 2, G = {g}":
       (dict(kind="grpo", name="smollm2", length=40, group_size=g, steps=3), TUNED, 1)
       for g in (4, 16)},
    "sft, smollm2": (dict(kind="sft", name="smollm2", batch_size=32, steps=4), (*TUNED, "default"), 3),
    **{f"eval, smollm2{what}": (dict(kind="eval", name="smollm2", sentences=128, every_metric=bool(what)), BATCHES, 3)
       for what in ("", ", every metric")},
    **{f"grpo, tiny, {p} + 2, G = 8": (dict(kind="grpo", name="tiny", length=p, group_size=8, steps=7), plain, 3)
       for p, plain in ((40, (*TUNED, "default")), (256, (*IN_PARTS, "default")))},
    **{f"grpo, tiny, {p} + 2, G = {g}": (dict(kind="grpo", name="tiny", length=p, group_size=g, steps=7), TUNED, 1)
       for p, g in ((40, 4), (40, 16), (128, 8), (256, 4), (256, 16))},
    "sft, tiny": (dict(kind="sft", name="tiny", batch_size=32, steps=12), (*TUNED, "default"), 3),
    **{f"eval, tiny{what}": (dict(kind="eval", name="tiny", sentences=1024, every_metric=bool(what)), BATCHES, 3)
       for what in ("", ", every metric")},
}  # fmt: skip
GPU = {
    **{f"grpo, {name}, {p} + 2, G = {g}":
       (dict(kind="grpo", name=name, length=p, group_size=g, steps=12), (*IN_PARTS, "default"), 3)
       for name in ("smollm2", "qwen3") for p in (40, 256) for g in (4, 8, 16)},
    **{f"sft, {name}": (dict(kind="sft", name=name, batch_size=512, steps=12), (*TUNED, "default"), 3)
       for name in ("smollm2", "qwen3")},
    **{f"eval, {name}{what}": (dict(kind="eval", name=name, sentences=2048, every_metric=bool(what)), BATCHES, 3)
       for name in ("smollm2", "qwen3") for what in ("", ", every metric")},
}  # fmt: skip


def measure(settings: dict, variant: str) -> dict:
    command = [sys.executable, "-W", "ignore", str(HERE / "worker.py"), json.dumps(settings), variant]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"bench: {settings} {variant} failed:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def row(case: str, settings: dict, candidates: tuple[str, ...], repeats: int) -> dict:
    """One case: medians over repeats of each side's fastest variant, and the ratio to tuned TRL with its spread.

    The fastest is chosen on runs that do not count again; then the two sides take turns, each first every other time.
    """
    own = OURS[:1] if settings["kind"] == "eval" else OURS
    tried = {variant: measure(settings, variant)["seconds"] for variant in (*own, *candidates)}
    ours, tuned = min(own, key=tried.get), min(candidates, key=tried.get)
    runs = {ours: [], tuned: []}
    for repeat in range(repeats):
        for variant in (ours, tuned) if repeat % 2 == 0 else (tuned, ours):
            runs[variant].append(measure(settings, variant))
    seconds = {variant: statistics.median(run["seconds"] for run in done) for variant, done in runs.items()}
    ratios = [plain["seconds"] / mine["seconds"] for mine, plain in zip(runs[ours], runs[tuned], strict=True)]
    float32 = [tried.get(name) for name in ("tuned float32", "ours float32")]
    first = runs[ours][0]
    # Floating-point operations that the method needs, a second, over what square matrix products of its dtype reach.
    rate = statistics.median(run["matrix_rate"] for run in runs[ours])
    return {
        "case": case,
        "device": first["device"],
        "commit": records.git_commit(),
        "ours_s": seconds[ours],
        "trl_tuned_s": seconds[tuned],
        "trl_default_s": tried.get("default"),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "repeats": repeats,
        "ours": ours.removeprefix("ours "),
        "tuned": tuned.removeprefix("tuned "),
        "float32_ratio": float32[0] / float32[1] if all(float32) else None,
        "floor_ratio": first["floor"],
        "tokens_per_s": first["tokens"] / seconds[ours],
        "parameters": first["parameters"],
        "matrix_share": first["flops"] / seconds[ours] / rate,
        "profile": first.get("profile"),
        "peak_rss_ours_mb": max(run["peak_mb"] for run in runs[ours]),
        "peak_rss_plain_mb": max(run["peak_mb"] for run in runs[tuned]),
    }


FIELDS = ("ours", "tuned", "float32_ratio")
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
        "commit": records.git_commit(),
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
    return WHOLE | {
        "case": "make book",
        "device": f"{os.cpu_count()} CPU cores",
        "commit": records.git_commit(),
        "ours_s": seconds,
        "repeats": 1,
    }


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
