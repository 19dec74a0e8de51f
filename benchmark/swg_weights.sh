#!/usr/bin/env bash
# Weight formulas on one critic per seed: only --weight changes, the largest weight is the same (tau).
#   benchmark/swg_weights.sh ENV RUN_DIR "SEEDS"       RUN_DIR holds the expectile runs; the others go to RUN_DIR/../weights
# Then: python benchmark/table.py --collect RUN_DIR/../weights
set -euo pipefail
cd "$(dirname "$0")/.."
env=${1:-pendulum-demo} runs=${2:-runs/demos/swg} seeds=${3:-0 1 2}
for seed in $seeds; do
  for weight in smooth-expectile exponential linex dice hard; do
    echo "--env $env --seed $seed --weight $weight --run-dir $runs/../weights/w=$weight --pretrained $runs/$env/swg/seed$seed --resume"
  done
done | OMP_NUM_THREADS=1 xargs -P "${JOBS:-2}" -L 1 python swg.py
