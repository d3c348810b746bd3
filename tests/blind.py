"""Does the demo's model look? python tests/blind.py runs/demo, after bash demo.sh.

Asks it the held-out questions once more with the media exchanged among the records of each task. A model that answers
from the picture then falls to what a blind one can have: the best constant answer, or in tracking the given first box.
"""

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import cpu_compat  # noqa: F401
from data import load_records, task_of
from rewards import accuracy


def best_blind_answer(records, candidates):
    """The highest mean accuracy that one and the same answer reaches on all records, or, in tracking, the first box."""
    best = max(
        sum(accuracy(record, answer) for record in records) / len(records) for answer in candidates
    )
    if records[0]["problem_type"] == "tracking":
        first = [json.loads(record["answer"])["boxes"]["1"] for record in records]
        copied = [json.dumps({"boxes": {str(k): box for k in range(1, 9)}}) for box in first]
        best = max(best, sum(map(accuracy, records, copied)) / len(records))
    return best


def main():
    folder = Path(sys.argv[1])
    seen = json.loads((folder / "eval" / "rl" / "results.json").read_text())
    sources, shuffled = [folder / "toy" / "eval" / f"{name}.json" for name in seen], []
    for source in sources:
        shuffled.append(source.with_name(f"blind_{source.name}"))
        subprocess.run(
            [sys.executable, "tests/toy.py", "--shuffle-media", source, shuffled[-1]],
            cwd=ROOT,
            check=True,
        )
    settings = "--max-response-tokens 128 --dtype float32 --workers 1 --max-prompt-tokens 400 --image-min-pixels 4096".split()
    out = folder / "eval" / "blind"
    command = [
        sys.executable,
        "evaluate.py",
        "--model",
        folder / "rl",
        "--data",
        *shuffled,
        "--out",
        out,
        *settings,
    ]
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    blind = json.loads((out / "results.json").read_text())

    answers = defaultdict(set)
    for record in load_records(folder / "toy" / "rl_train.json"):
        answers[task_of(record)].add(record["answer"])
    print(f"{'accuracy in percent':28}  media right  media exchanged [95%]  best blind answer")
    total = [0.0, 0.0, 0.0]
    for source, other in zip(sources, shuffled):
        records = load_records(source)
        constant = best_blind_answer(records, sorted(answers[task_of(records[0])])[:150])
        right, wrong = seen[source.stem]["accuracy"], blind[other.stem]["accuracy"]
        span = f"[{100 * wrong['low']:5.1f}, {100 * wrong['high']:5.1f}]"
        print(
            f"{source.stem:28}  {100 * right['value']:11.1f}  {100 * wrong['value']:7.1f} {span}  {100 * constant:17.1f}"
        )
        total = [
            a + b / len(sources) for a, b in zip(total, (right["value"], wrong["value"], constant))
        ]
    print(
        f"{'mean':28}  {100 * total[0]:11.1f}  {100 * total[1]:7.1f} {'':14}  {100 * total[2]:17.1f}"
    )


if __name__ == "__main__":
    main()
