#!/usr/bin/env bash
# Every run behind SWG's demo results, two at a time, one thread each.    benchmark/swg_demos.sh [run-dir]
# Then: python benchmark/table.py --collect RUN_DIR
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${1:-runs/demos}
export OMP_NUM_THREADS=1
{
  for seed in 0 1 2 3 4; do echo "--seed $seed"; done
  for seed in 0 1 2; do echo "--env hopper-demo --seed $seed"; done
} | xargs -P 2 -I {} bash -c "python swg.py {} --run-dir $runs/swg --resume"
for seed in 0 1 2 3 4; do  # rho kappa N; SWG-R always beside 16 candidates without guidance
  for setting in "0 1 1" "0 1 16" "10 1 16" "10 0.5 16"; do
    read -r rho kappa N <<<"$setting"
    python swg.py --run-dir "$runs/swg" --seed $seed --eval-only --rho $rho --kappa $kappa --N $N
  done
done
for seed in 0 1 2; do
  for setting in "0 1 1" "0 0 1" "3 0 1" "10 0 1" "1 1 1" "0 1 16" "10 1 16"; do
    read -r rho kappa N <<<"$setting"
    python swg.py --env hopper-demo --run-dir "$runs/swg" --seed $seed --eval-only --rho $rho --kappa $kappa --N $N --final-episodes 50
  done
done
