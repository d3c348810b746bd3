#!/usr/bin/env bash
# The whole pipeline on a CPU, from nothing: toy data -> SFT -> EMA-GRPO -> evaluation. Ends with a table and a plot.
#   bash demo.sh             6 to 12 minutes on 2 cores, install included, under runs/demo/
#   bash demo.sh --quick     a few steps of everything, to see that it runs; nothing is learned. Under runs/demo-quick/
# Stopped half way, the same command goes on where it was; remove the folder to begin anew.
set -euo pipefail
cd "$(dirname "$0")"
source tests/venv.sh

out=runs/demo toy="--sft 8000 --rl 5000 --eval 100" sft_steps=300 rl_steps=30 prompts=32
if [ "${1:-}" = --quick ]; then
    out=${2:-runs/demo-quick} toy="--sft 128 --rl 96 --eval 2" sft_steps=3 rl_steps=2 prompts=4
fi
say() { printf '\n== %s (after %d min)\n' "$1" $((SECONDS / 60)); }
limits="--max-prompt-tokens 400 --image-min-pixels 4096" # toy prompts have about 200 tokens, toy images 96 x 96 pixels

say "1 toy world: a tiny Qwen3-VL that can see, images, videos, records of all tasks"
[ -e $out/toy/model/config.json ] || python tests/toy.py $out/toy $toy

say "2 supervised cold start, $sft_steps steps on 2 ranks"
torchrun --standalone --nproc-per-node 2 sft.py --model $out/toy/model --data $out/toy/sft_*.json --out $out/sft \
    --steps $sft_steps --lr 2e-3 --train-vision --dtype float32 --no-recompute --workers 1 $limits

say "3 EMA-GRPO, $rl_steps steps on 2 ranks"
torchrun --standalone --nproc-per-node 2 rl_ema_grpo.py --model $out/sft --data $out/toy/rl_train.json --out $out/rl \
    --steps $rl_steps --prompts-per-step $prompts --lr 3e-4 --max-response-tokens 128 \
    --dtype float32 --no-recompute --workers 1 $limits

say "4 held-out records: after SFT, after RL"
for model in sft rl; do
    python evaluate.py --model $out/$model --data $out/toy/eval/*.json --out $out/eval/$model --max-response-tokens 128 \
        --dtype float32 --workers 1 $limits
done

say "5 what was learned"
python evaluate.py --compare $out/eval/sft $out/eval/rl --names SFT RL --out $out/table.json
python tests/curves.py $out
python - $out <<'EOF'
import json, sys
print("\nOne held-out question, answered after SFT and after RL:")
for name in ("sft", "rl"):
    with open(f"{sys.argv[1]}/eval/{name}/ocr.jsonl") as file:
        answer = json.loads(next(file))
    print(f"{name.upper():>4}: {answer['response']}   (accuracy {answer['accuracy']:.0f})")
EOF
say "done: $out/table.json, $out/curves.png, $out/eval/rl/report.html. To ask the model, after source .venv/bin/activate:"
python - $out <<'EOF'
import json, shlex, sys
out = sys.argv[1]
for task, flag, suffix in (("spatial_grounding", "--image", "png"), ("temporal_grounding", "--video", "gif")):
    record = json.load(open(f"{out}/toy/eval/{task}.json"))[0]
    command = ["python", "infer.py", "--model", f"{out}/rl", flag, f"{out}/toy/eval/{record['path']}"]
    command += ["--task", record["problem_type"], record["problem"].split(">")[1], "--save", f"{out}/{task}.{suffix}"]
    print(shlex.join([*command, "--image-min-pixels", "4096"]))
EOF
