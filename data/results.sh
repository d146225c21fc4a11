#!/bin/sh
# Trains every published run of the embedded model again and writes its tables into data/results: hours on two cores.
# Stages that are in runs/published already are not trained again. SFTRL is the command (default: .venv/bin/sftrl).
set -e
cd "$(dirname "$0")/.."
SFTRL=${SFTRL:-.venv/bin/sftrl}
export OMP_NUM_THREADS=1 # as published: the numbers depend on it
store=runs/published

for sweep in coupling beta duration; do
    $SFTRL sweep run notebooks/sweeps/$sweep.yaml --dir $store --jobs 2
done
for seed in 0 1 2 3 4; do
    run() { $SFTRL run "$@" -p seed $seed; }
    for share in 0.25 0.5 0.75; do run sft_then_rl_merged -p interpolation $share -p out_dir $store-joint; done
    for weight in 0.1 0.3 1 3; do run joint -p sft_weight $weight -p out_dir $store-joint; done
    run interleaved -p out_dir $store-joint
    run sft_then_interleaved -p sft_steps 100 -p out_dir $store-joint # half of the expert data first, half replayed
    if [ $seed -lt 2 ]; then run sft_then_constant_rl -p out_dir $store-joint; fi
    if [ $seed -lt 3 ]; then
        for pipeline in sft_then_rl rl_then_sft sft_then_sft rl_then_rl; do
            run $pipeline -p response_style rationale -p out_dir $store-rationale
        done
    fi
    for share in 0 0.2 0.4; do run proxy_rl -p proxy_flipped $share -p out_dir $store-proxy; done
done

# What solutions of exercises show: one seed.
run() { $SFTRL run "$@" -p out_dir $store-exercises; }
run sft
run sft -p sft_learning_rate 1e-5
run grpo
for weight in 0 100; do run joint -p sft_weight $weight; done
for cycles in 1 50; do run interleaved -p cycles $cycles; done

$SFTRL publish --dir $store --sweep notebooks/sweeps/coupling.yaml --to data/results
for sweep in beta duration; do
    $SFTRL publish --dir $store --sweep notebooks/sweeps/$sweep.yaml --to data/results/$sweep
done
for name in joint rationale proxy exercises; do $SFTRL publish --dir $store-$name --to data/results/$name; done
$SFTRL gradients --dir $store --sweep notebooks/sweeps/duration.yaml --to data/results/gradients
