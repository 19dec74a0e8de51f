#!/usr/bin/env bash
# Every run behind DAC's demo results, two at a time, one thread each.    benchmark/dac_demos.sh [run-dir]
# Then: python benchmark/table.py --collect RUN_DIR
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${1:-runs/demos}
export OMP_NUM_THREADS=1
for seed in 0 1 2; do
  echo "--seed $seed --run-dir $runs/dac --env pendulum-demo"
  echo "--seed $seed --run-dir $runs/cloning --env pendulum-demo --guidance none --N-a 1"
  echo "--seed $seed --run-dir $runs/b=1 --env pendulum-demo --b 1"
  echo "--seed $seed --run-dir $runs/b=0.1 --env pendulum-demo --b 0.1"
  echo "--seed $seed --run-dir $runs/dac --env hopper-demo"
  echo "--seed $seed --run-dir $runs/cloning --env hopper-demo --guidance none --N-a 1 --H 1"
done | xargs -P 2 -L 1 python dac.py --resume
for seed in 0 1 2; do
  for n in 1 4; do
    python dac.py --env hopper-demo --run-dir "$runs/dac" --seed $seed --eval-only --N-a $n --final-episodes 50
  done
done
