#!/usr/bin/env bash
# Figure 4 of the DyDiff paper: one knob at a time around the preset, on the models of trained runs.
#   benchmark/dydiff_fig4.sh ENV RUN_DIR OUT "SEEDS" [options for every run]
#   e.g.  benchmark/dydiff_fig4.sh pendulum-demo runs/demos/dydiff runs/fig4 "0 1 2" --alpha-bc 2.5 --lr 3e-4 --policy-lr 3e-4
# RUN_DIR/ENV/dydiff/seed<k> holds the models. Then: python benchmark/dydiff_fig4.py --collect OUT
set -euo pipefail
cd "$(dirname "$0")/.."
env=$1 models=$2 out=$3 seeds=$4
shift 4
last=${L:-15}  # H - 1 of the preset
for seed in $seeds; do
  for setting in "none=0 --augment none" "M=0 --M 0" "M=1 --M 1" "M=2" "M=4 --M 4" "M=8 --M 8" \
    "L=1 --L 1" "L=$((last / 3)) --L $((last / 3))" "L=$last" "eta=0.1 --eta 0.1" "eta=0.3 --eta 0.3" "eta=0.6" "eta=1 --eta 1" \
    "alpha=0.1 --real-ratio 0.1" "alpha=0.3 --real-ratio 0.3" "alpha=0.6" "alpha=0.9 --real-ratio 0.9"; do
    read -r label options <<<"$setting"
    case $label in M=2 | L=$last | eta=0.6) continue ;; esac  # the preset: once, as alpha=0.6
    from="--pretrained $models/$env/dydiff/seed$seed"
    case $label in none=*) from="" ;; esac
    echo "--env $env --seed $seed --run-dir $out/$label $from $* $options --resume"
  done
done | OMP_NUM_THREADS=1 xargs -P "${JOBS:-1}" -L 1 python dydiff.py
