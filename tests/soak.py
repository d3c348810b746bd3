"""What takes too long for the test suite: random kills, and hundreds of steps under watch.

python tests/soak.py kills --times 20     # kill -9 of all ranks at random moments, then resumed
python tests/soak.py steps --steps 300    # memory and open files of each rank over many steps
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.environ["OMP_NUM_THREADS"] = "1"
SETTINGS = "--prompts-per-step 4 --rollouts-per-prompt 4 --updates-per-step 2 --lr 1e-3 --workers 1"
SETTINGS += " --max-response-tokens 24 --max-rounds 2 --dtype float32 --no-recompute"
SETTINGS += " --max-prompt-tokens 400 --image-min-pixels 4096"


def make_toy(folder):
    command = [sys.executable, "tests/toy.py", folder, *"--sft 12 --rl 400 --eval 1".split()]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def launch(folder, out, settings):
    """The toy's RL on two ranks. settings: more flags. Returns the process of torchrun; its output
    goes to OUT.log."""
    command = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2".split()]
    command += ["tests/doomed.py", "", "rl_ema_grpo", "--out", out, "--model", f"{folder}/model"]
    command += ["--data", f"{folder}/rl_train.json", *SETTINGS.split(), *settings.split()]
    with open(f"{out}.log", "a") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def rows(out):
    """The whole lines of metrics.jsonl, without what a clock or a memory gauge wrote."""
    path = Path(out, "metrics.jsonl")
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    measured = ("seconds", "gb", "tokens_per_second")
    return [{k: v for k, v in row.items() if not k.startswith(measured)} for row in found]


def ranks_of(launcher):
    """Process ids of the ranks under a torchrun process."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    named = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
    return [pid for pid, command in named.items() if "doomed" in command]


def kills(folder, args):
    """A run that is killed at random moments, and resumed each time, against one left alone."""
    settings, rng = f"--steps {6 * args.times} --save-every 2", random.Random(args.seed)
    whole, killed = f"{folder}/whole", f"{folder}/killed"
    assert launch(folder, whole, settings).wait() == 0
    run = launch(folder, killed, settings)
    for i in range(args.times):
        reached = len(rows(killed))
        while i % 4 < 3 and len(rows(killed)) <= reached and run.poll() is None:
            time.sleep(0.05)  # three of four die within 5 s after a new step, one while it starts
        time.sleep(rng.uniform(0, 5))
        if run.poll() is not None:
            break
        for pid in [run.pid, *ranks_of(run)]:
            os.kill(pid, signal.SIGKILL)
        run.wait()
        print(f"kill {i + 1} after step {len(rows(killed))}", flush=True)
        run = launch(folder, killed, settings)
    assert run.wait() == 0
    weights = [Path(out, "model.safetensors").read_bytes() for out in (whole, killed)]
    same = rows(whole) == rows(killed)
    print(f"metrics equal: {same}; weights equal: {weights[0] == weights[1]}")
    return same and weights[0] == weights[1]


def steps(folder, args):
    """Resident memory and open files of each rank, every 50 steps."""
    out, seen = f"{folder}/long", {}
    run = launch(folder, out, f"--steps {args.steps} --save-every 50")
    while run.poll() is None:
        done = len(rows(out)) // 50 * 50
        if done and done not in seen:
            seen[done] = [measure(pid) for pid in ranks_of(run)]
            print(f"step {done}: (MB, files) of each rank: {seen[done]}", flush=True)
        time.sleep(0.1)
    first, last = seen[min(seen)], seen[max(seen)]
    growth = max(b[0] / a[0] - 1 for a, b in zip(first, last))
    files = max(b[1] - a[1] for a, b in zip(first, last))
    print(f"after step 50: memory grew by {growth:.1%}, open files by {files}")
    return run.returncode == 0 and growth < 0.05 and files <= 2


def measure(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) // 1000, len(os.listdir(f"/proc/{pid}/fd"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["kills", "steps"])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_toy(folder)
        sys.exit(0 if globals()[args.what](folder, args) else 1)
