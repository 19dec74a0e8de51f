#!/usr/bin/env bash
# Every run behind DyDiff's demo results, two at a time, one thread each.    benchmark/dydiff_demos.sh [run-dir]
# Then: python benchmark/table.py --collect RUN_DIR
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${1:-runs/demos}
export OMP_NUM_THREADS=1
for env in pendulum-demo hopper-demo; do
  for seed in 0 1 2; do echo "--env $env --seed $seed --run-dir $runs/dydiff"; done
done | xargs -P 2 -L 1 python dydiff.py --resume
for env in pendulum-demo hopper-demo; do  # the other columns, on the same models
  for seed in 0 1 2; do
    echo "--env $env --seed $seed --augment none --run-dir $runs/a=none"
    echo "--env $env --seed $seed --augment single-step --run-dir $runs/a=single-step --pretrained $runs/dydiff/$env/dydiff/seed$seed"
  done
done | xargs -P 2 -L 1 python dydiff.py --resume
