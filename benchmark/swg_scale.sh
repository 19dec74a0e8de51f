#!/usr/bin/env bash
# Score against guidance scale: rho x kappa x N on the trained policies of one env, no training.
#   benchmark/swg_scale.sh ENV RUN_DIR "SEEDS" [EPISODES]        e.g.  benchmark/swg_scale.sh hopper-medium-v2 runs "0 1 2 3 4" 50
# Appends to reeval.csv of every run folder, then draws docs/figures/swg_scale_ENV.png and prints the table.
set -euo pipefail
cd "$(dirname "$0")/.."
env=${1:-pendulum-demo} runs=${2:-runs} seeds=${3:-0 1 2} episodes=${4:-20}
for seed in $seeds; do
  for rho in 0 1 5 10 15 20 25 30; do
    for setting in "0 1" "0.5 1" "1 1" "1 16"; do
      read -r kappa N <<<"$setting"
      echo "--env $env --run-dir $runs --seed $seed --eval-only --rho $rho --kappa $kappa --N $N --final-episodes $episodes"
    done
  done
done | OMP_NUM_THREADS=1 xargs -P "${JOBS:-1}" -L 1 python swg.py
python benchmark/swg_scale.py --env "$env" --run-dir "$runs"
