"""What takes too long for the test suite: random kills, and hundreds of steps under watch. Prints what happened as a table.

python tests/soak.py kills --times 20     # kill -9 of all ranks at random moments, until the run has ended all the same
python tests/soak.py steps --steps 300    # memory, open files and processes of each rank while the toy is trained
python tests/soak.py grader               # a grading that hangs for one response in a hundred
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.environ["OMP_NUM_THREADS"] = "1"
SETTINGS = "--prompts-per-step 4 --rollouts-per-prompt 4 --updates-per-step 2 --lr 1e-3 --max-response-tokens 24 --max-rounds 2"
SETTINGS += " --dtype float32 --no-recompute --workers 1 --max-prompt-tokens 400 --grade-seconds 1"


def make_toy(folder):
    command = [sys.executable, "tests/toy.py", folder, *"--sft 12 --rl 400 --eval 1".split()]
    subprocess.run(
        command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def launch(folder, out, settings, deaths=""):
    """The toy's RL on two ranks, with rewards made from the sampled tokens (doomed.py). settings: flags, which overrule those
    above. Returns the process of torchrun; what it prints goes to OUT.log."""
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2 tests/doomed.py".split()
    files = ["--model", f"{folder}/model", "--data", f"{folder}/rl_train.json", "--out", out]
    command = [
        sys.executable,
        *launcher,
        deaths,
        "rl_ema_grpo",
        *files,
        *SETTINGS.split(),
        *settings.split(),
    ]
    with open(f"{out}.log", "a") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def rows(out):
    path = Path(out, "metrics.jsonl")
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def ranks_of(launcher):
    """Process ids of the ranks under a torchrun process."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [
        int(child) for child in children if "doomed" in Path(f"/proc/{child}/cmdline").read_text()
    ]


def unmeasured(row):
    return {
        k: v
        for k, v in row.items()
        if not k.startswith(("seconds", "gb", "tokens_per_second", "tflops"))
    }


def kills(folder, args):
    """Uninterrupted run first; then one that is killed at random moments, and resumed each time."""
    settings, rng = f"--steps {12 * args.times} --save-every 4", random.Random(args.seed)
    whole, killed, lost, back = f"{folder}/whole", f"{folder}/killed", [], []
    assert launch(folder, whole, settings).wait() == 0
    run, start, done = launch(folder, killed, settings), time.time(), 0
    for i in range(args.times):
        while i % 4 < 3 and not (rows(killed) and rows(killed)[-1]["step"] > done):
            time.sleep(
                0.05
            )  # three kills of four come within 10 s after a new step, one while the run starts
        if i % 4 < 3:
            back.append(time.time() - start)
        time.sleep(rng.uniform(0, 10))
        if run.poll() is not None:
            break
        ranks = ranks_of(run)
        run.kill()
        for rank in ranks:
            os.kill(rank, signal.SIGKILL)
        run.wait()
        saved = max(
            (int(path.name[5:]) for path in Path(killed, "checkpoints").glob("step-*[0-9]")),
            default=0,
        )
        reached = rows(killed)[-1]["step"] if rows(killed) else 0
        done = max(done, reached)
        lost.append(reached - saved)
        run, start = launch(folder, killed, settings), time.time()
    assert run.wait() == 0
    same = list(map(unmeasured, rows(whole))) == list(map(unmeasured, rows(killed)))
    weights = (
        Path(whole, "model.safetensors").read_bytes()
        == Path(killed, "model.safetensors").read_bytes()
    )
    print(
        f"{len(lost)} kills, a save every 4 steps: at most {max(lost)} finished steps lost, mean {statistics.mean(lost):.1f}"
    )
    print(
        f"past where it was after {statistics.median(back):.0f} s (median of {len(back)}), start included"
    )
    print(f"metrics equal: {same}; weights equal: {weights}")
    return same and weights


def steps(folder, args):
    """Resident memory, open files and threads of each rank, and all processes below it, every ten steps."""
    out, seen = f"{folder}/long", {}
    run = launch(folder, out, f"--steps {args.steps} --save-every 50")
    while run.poll() is None:
        done = len(rows(out))
        if done and done % 10 == 0 and done not in seen:
            seen[done] = [measure(rank) for rank in ranks_of(run)]
        time.sleep(0.1)
    print("step   " + "   ".join(f"rank {i}: MB files children" for i in range(2)))
    for done, ranks in sorted(seen.items()):
        if done % 50 == 0 or done == 60:
            print(
                f"{done:5d}   "
                + "   ".join(
                    f"{mb:12.0f} {files:5d} {children:8d}" for mb, files, children in ranks
                )
            )
    late = [seen[done] for done in sorted(seen) if done >= 50]
    growth = max(
        max(measures[rank][0] for measures in late) / late[0][rank][0] - 1 for rank in range(2)
    )
    files, children = (
        max(last[i] - first[i] for first, last in zip(late[0], late[-1])) for i in (1, 2)
    )
    print(
        f"after step 50: memory grew by {growth:.1%}, open files by {files}, child processes by {children}"
    )
    return run.returncode == 0 and growth < 0.05 and files <= 2 and children <= 0


def measure(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    memory = (
        next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
        / 1000
    )
    children = sum(
        len(Path(task, "children").read_text().split())
        for task in Path(f"/proc/{pid}/task").iterdir()
    )
    return memory, len(os.listdir(f"/proc/{pid}/fd")), children


def grader(folder, args):
    """One response in a hundred, by its tokens, claims a factorial that sympy does not finish."""
    out = f"{folder}/grader"
    code = launch(folder, out, "--steps 40 --save-every 50", "towers").wait()
    last, towers = rows(out)[-1], Path(f"{out}.log").read_text().count("tower on purpose")
    killed = last.get("grader/killed", 0)
    print(
        f"{towers} hanging gradings in {last['step']} steps, {killed} counted as killed, loss {last['loss']:.3f}"
    )
    return code == 0 and towers == killed > 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["kills", "steps", "grader"])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_toy(folder)
        sys.exit(0 if globals()[args.what](folder, args) else 1)
