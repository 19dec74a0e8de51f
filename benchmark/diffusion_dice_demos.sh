#!/usr/bin/env bash
# Every run behind Diffusion-DICE's demo results, two at a time, one thread each.    benchmark/diffusion_dice_demos.sh [run-dir]
# Then: python benchmark/table.py --collect RUN_DIR
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${1:-runs/demos}
export OMP_NUM_THREADS=1
for env in pendulum-demo hopper-demo; do
  for seed in 0 1 2; do
    echo "--env $env --seed $seed --run-dir $runs/diffusion_dice"
  done
done | xargs -P 2 -L 1 python diffusion_dice.py --resume
for seed in 0 1 2; do
  for setting in "0 1" "0 4" "0 16" "2 1" "1 4" "2 16"; do
    read -r kappa K <<<"$setting"
    python diffusion_dice.py --run-dir "$runs/diffusion_dice" --seed $seed --eval-only --kappa $kappa --K $K
  done
done
for seed in 0 1 2; do
  for setting in "0 1" "0 2" "1 1"; do
    read -r kappa K <<<"$setting"
    python diffusion_dice.py --env hopper-demo --run-dir "$runs/diffusion_dice" --seed $seed --eval-only --kappa $kappa --K $K --final-episodes 50
  done
done
