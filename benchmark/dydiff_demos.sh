#!/usr/bin/env bash
# Every run behind DyDiff's demo results, two at a time, one thread each.    benchmark/dydiff_demos.sh [run-dir]
# Then: python benchmark/table.py --collect RUN_DIR --write
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${1:-runs/demos}
export OMP_NUM_THREADS=1
all() { xargs -P 2 -L 1 python dydiff.py --resume; }
for seed in 0 1 2; do # models: Pendulum's with the run itself, Hopper's (11 minutes) once, for all of its columns
  echo "--env pendulum-demo --seed $seed --run-dir $runs/dydiff"
  echo "--env hopper-demo --seed $seed --run-dir $runs.models --steps 500 --eval-every 500 --eval-episodes 2 --final-episodes 2"
done | all
for seed in 0 1 2; do
  pendulum="$runs/dydiff/pendulum-demo/dydiff/seed$seed" hopper="$runs.models/hopper-demo/dydiff/seed$seed"
  echo "--env hopper-demo --seed $seed --run-dir $runs/dydiff --pretrained $hopper"
  echo "--env hopper-demo --seed $seed --run-dir $runs/a=single-step --augment single-step --pretrained $hopper"
  echo "--env pendulum-demo --seed $seed --run-dir $runs/a=single-step --augment single-step --pretrained $pendulum"
  for env in pendulum-demo hopper-demo; do echo "--env $env --seed $seed --run-dir $runs/a=none --augment none"; done
  echo "--env pendulum-demo --seed $seed --run-dir $runs/a=synther --augment synther"
done | all
for base in cql diffql; do # every pair of base and augmentation, one seed
  from="--pretrained $runs/dydiff/pendulum-demo/dydiff/seed0"
  echo "--base $base --run-dir $runs/b=$base $from"
  echo "--base $base --run-dir $runs/b=$base,a=single-step --augment single-step $from"
  echo "--base $base --run-dir $runs/b=$base,a=synther --augment synther --pretrained $runs/a=synther/pendulum-demo/dydiff/seed0"
  echo "--base $base --run-dir $runs/b=$base,a=none --augment none"
done | all
