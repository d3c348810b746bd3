#!/usr/bin/env bash
# EMA-GRPO, GRPO and Dr.GRPO on three tasks, from one SFT checkpoint, five seeds each, on a CPU.
#   bash tests/ablation.sh             15 to 45 minutes on 2 cores, under runs/ablation/; writes assets/ablation.json, .png
#   SEEDS="0" LR=5e-5 bash tests/ablation.sh        other seeds, another learning rate
# Two runs at a time, one rank each. Stopped half way, the same command goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
source tests/venv.sh
export OMP_NUM_THREADS=1
out=runs/ablation
limits="--max-prompt-tokens 400 --image-min-pixels 4096 --dtype float32 --workers 1 --no-recompute"

[ -e $out/world/model/config.json ] || python tests/ablation.py world $out/world
python sft.py --model $out/world/model --data $out/world/sft_*.json --out $out/sft --steps 400 --lr 1e-3 --train-vision $limits
for seed in ${SEEDS:-10 11 12 13 14}; do
    for method in ema_grpo grpo dr_grpo; do
        echo --method $method --seed $seed --out $out/$method-$seed
    done
done | xargs -P 2 -L 1 python tests/ablation.py train --model $out/sft --data $out/world/rl_train.json \
    --steps 40 --prompts-per-step 12 --updates-per-step 2 --ema-decay 0.9 --lr ${LR:-2e-4} --max-response-tokens 96 --save-every 40 $limits
python tests/ablation.py collect $out
