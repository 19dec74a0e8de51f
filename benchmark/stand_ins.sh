#!/usr/bin/env bash
# Runs on data that is not in the repository: Hopper sets of one SAC run, door demonstrations (docs/data.md says what they are).
#   benchmark/stand_ins.sh DATA_DIR RUN_DIR [METHOD ...]       JOBS=2: two at a time
# Reduced sizes, for a CPU. Then: python benchmark/table.py --collect RUN_DIR --write
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1 runs=$2
shift 2
methods=${*:-td3bc swg dac diffusion_dice}
small_dac="--hidden 128 128 --batch-size 128 --N 1 --N-a 2"
small_swg="--hidden 128 128 --width 128 --batch-size 256 --critic-lr 1e-3 --polyak 0.02 --lr 1e-3 --lr-decay-steps 0 --ema 0.005 --rho 1 --reward-scale range"
often="--eval-every 10000 --save-every 5000 --final-episodes 100 --resume"
run() { # method data env seed: one command line, at the size of the hopper-demo presets
  local to="--env $3 --data-path $data/$2.hdf5 --seed $4 $often"
  case $1 in
    td3bc) echo "dydiff.py $to --augment none --steps 30000 --hidden 128 128 --policy-hidden 128 128 --alpha-bc 1 --run-dir $runs/$2@a=none" ;;
    swg) echo "swg.py $to $small_swg --steps 20000 --critic-steps 20000 --run-dir $runs/$2@swg" ;;
    dac) echo "dac.py $to $small_dac --eta 1 --eta-lr 0 --steps 30000 --run-dir $runs/$2@dac" ;;
    dac_cloning) echo "dac.py $to ${small_dac/N-a 2/N-a 1} --guidance none --eta-lr 0 --steps 30000 --run-dir $runs/$2@cloning" ;;
    dac_lr) echo "dac.py $to $small_dac --eta 1 --eta-lr 0 --actor-lr 1e-3 --critic-lr 1e-3 --steps 30000 --run-dir $runs/$2@lr" ;;
    dac_dual) echo "dac.py $to $small_dac --eta 0.1 --b 0.1 --steps 30000 --run-dir $runs/$2@dual" ;; # as hopper-demo has it
    dydiff) echo "dydiff.py $to --run-dir $runs/$2@dydiff" ;; # TD3+BC as in td3bc, and rollouts
    diffusion_dice) echo "diffusion_dice.py $to --run-dir $runs/$2@diffusion_dice" ;;
  esac
}
{
  for method in $methods; do
    for seed in 0 1 2; do
      for set in hopper-medium-sac hopper-medium-replay-sac hopper-expert-sac hopper-medium-expert-sac; do run "$method" $set hopper-demo $seed; done
      case $method in swg | dac) for set in door-human-dapg door-human-expert-dapg; do run "$method" $set door-human-v0 $seed; done ;; esac
    done
  done
} | OMP_NUM_THREADS=1 xargs -P "${JOBS:-1}" -L 1 python
todo=() # finished runs of models that can also clone, and have not been asked to
for path in "$runs"/*@swg/*/swg/seed* "$runs"/*@diffusion_dice/*/diffusion_dice/seed*; do
  if [ -e "$path/result.json" ] && [ ! -e "$path/reeval.csv" ]; then
    folder=$(dirname "$path") env=$(basename "$(dirname "$(dirname "$path")")")
    todo+=("$(basename "$folder").py --env $env --seed ${path##*seed} --run-dir ${path%%/"$env"/*} --eval-only")
  fi
done
clone() { # method, settings
  printf '%s\n' "${todo[@]}" | { grep "^$1.py" || true; } | sed "s/$/ $2/" | OMP_NUM_THREADS=1 xargs -r -P "${JOBS:-1}" -L 1 python
}
clone swg "--rho 0 --kappa 1"
clone swg "--rho 0 --kappa 0" # its mean
clone diffusion_dice "--kappa 0 --K 1"
