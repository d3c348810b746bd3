"""What to divide advantages by: EMA-GRPO, GRPO and Dr.GRPO on three kinds of tasks.

    python tests/ablation.py world DIR       # records of three kinds of tasks, and the toy's model
    python tests/ablation.py train FLAGS     # rl_ema_grpo.py FLAGS; also logs who answers with care
    python tests/ablation.py collect RUNS    # reads the runs, writes assets/ablation.json
    python tests/ablation.py                 # the table and assets/ablation.png, from that file

`bash tests/ablation.sh` does it all. The setting is made to show a mechanism. A teacher answers half
of the records "At a glance: ...", the others "Step by step: ...", with the same thoughts. In each
task one of the two manners is the better one; the kind of the task says by how much:

    exact   the better manner is right, the other one wrong
    fine    the better manner is exact, the other one a hair off: rewards hardly differ
    mixed   in two of three records the better manner is a hair off and the other one exact; in the
            third the better one is exact and the other one far off. The better manner is so by the
            mean reward; by the number of groups it is the worse one

So who divides by nothing (Dr.GRPO) hears little of the fine tasks. Who divides each group by its own
std (GRPO) counts the groups of the mixed ones.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np

import toy

KINDS = {"exact": "OCR", "fine": "temporal grounding", "mixed": "spatial grounding"}
CAREFUL = ("exact", "mixed")  # kinds in which that is the better manner
METHODS = {"ema_grpo": "EMA-GRPO", "grpo": "GRPO", "dr_grpo": "Dr.GRPO"}
COLOURS = {"ema_grpo": "tab:blue", "grpo": "tab:orange", "dr_grpo": "tab:green"}


# --------------------------------------------------------------------------------------------------
# Records


def resized(box, resize):
    """A box of a 96 x 96 image with its width and height, in pixels, replaced by resize(w, h)."""
    x1, y1, x2, y2 = (round(v * toy.IMAGE / 1000) for v in box)
    w, h = resize(x2 - x1, y2 - y1)
    return [toy.coordinate(v, toy.IMAGE) for v in (x1, y1, x1 + w, y1 + h)]


def two_manners(kind):
    """The task of a kind: an item of the toy, of which one manner gives the better answer."""

    def made(rng, turn):
        item = toy.TASKS[KINDS[kind]](rng, turn)
        good, bad = item.answer, item.slip
        if kind == "fine":  # a hair too long
            start, end = good["time"]
            bad = {"time": [start, end + 0.2]}
        elif kind == "mixed":
            x, y, *_ = box = good["boxes"]
            cell = round(x * toy.IMAGE / 1000) // toy.GRID + round(y * toy.IMAGE / 1000) // toy.GRID
            if cell % 3 == 0:  # a rule that does not meet the eye
                bad = {"boxes": resized(box, lambda w, h: (w // 2, h // 2))}
            else:
                good, bad = {"boxes": resized(box, lambda w, h: (w - 2, h))}, good
        careful, glance = (good, bad) if kind in CAREFUL else (bad, good)
        return item._replace(glance=f"At a glance: {item.thought}", careful=careful, slip=glance)

    return made


TASKS = {task: two_manners(kind) for kind, task in KINDS.items()}


def write_world(folder):
    toy.write_world(folder, 0, sft=8000, rl=4000, per_task=100, tasks=TASKS, glances=0.5)
    toy.write_model(folder / "model", 0)


# --------------------------------------------------------------------------------------------------
# Runs


def train(flags):
    """rl_ema_grpo.py, which also logs better/<task>: the share of all responses in the better manner."""
    import cpu_compat  # noqa: F401  (before transformers)
    from transformers import AutoTokenizer

    import rl_ema_grpo
    from data import task_of

    tokenizer = AutoTokenizer.from_pretrained(flags[flags.index("--model") + 1])
    glance, summarise = tokenizer.encode(" glance")[0], rl_ema_grpo.summarise

    def with_shares(seen, *rest):
        better, careful_tasks = {}, [KINDS[kind] for kind in CAREFUL]
        for group in seen:
            task = task_of(group.prompt.record)
            careful = [glance not in response for response in group.responses]
            better.setdefault(task, []).extend(each == (task in careful_tasks) for each in careful)
        shares = {f"better/{task}": float(np.mean(each)) for task, each in better.items()}
        return summarise(seen, *rest) | shares

    rl_ema_grpo.summarise = with_shares
    sys.argv = ["rl_ema_grpo.py", *flags]
    rl_ema_grpo.main()


def collect(folder):
    """{<method>-<seed>: {metric: a value per step, None where a step has none}} of a folder of runs."""
    runs, wanted = {}, ("better", "std", "advantage", "eval")
    for path in sorted(folder.glob("*grpo-*/metrics.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        keys = sorted({key for row in rows for key in row if key.split("/")[0] in wanted})
        short = lambda value: None if value is None else round(value, 4)
        runs[path.parent.name] = {key: [short(row.get(key)) for row in rows] for key in keys}
    return runs


# --------------------------------------------------------------------------------------------------
# The table and the picture


def values_of(runs, method, metric, kind):
    """A metric of a kind's task: (seeds, steps), nan where a step has none."""
    own = [run for name, run in runs.items() if name.rpartition("-")[0] == method]
    return np.array([run[f"{metric}/{KINDS[kind]}"] for run in own], dtype=float)


def better(runs, method, kind):
    """The share of all responses in the better manner, (seeds, steps), the mean of up to 5 steps."""
    shares = values_of(runs, method, "better", kind)
    steps = range(shares.shape[1])
    return np.stack([np.nanmean(shares[:, max(0, i - 4) : i + 1], 1) for i in steps], 1)


def interval(values):
    """Mean and 95% t interval over seeds, (seeds,) -> (mean, low, high)."""
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 8: 2.36, 10: 2.26}[len(values)]
    mean, half = np.mean(values), t * np.std(values, ddof=1) / np.sqrt(len(values))
    return mean, mean - half, mean + half


def steps_to(shares, goal=0.9):
    """The first step at which each seed's share reaches the goal; None if it never does."""
    return [int(np.argmax(row >= goal)) + 1 if (row >= goal).any() else None for row in shares]


def held_out(runs, method, kind):
    """Held-out accuracy in percent at each evaluation: (seeds, evaluations)."""
    values = 100 * values_of(runs, method, "eval", kind)
    return values[:, ~np.isnan(values[0])]


def print_table(runs):
    first = next(iter(runs.values()))
    updates = [i for i, value in enumerate(first[f"eval/{KINDS['exact']}"]) if value is not None]
    span = lambda values: "{:5.1f} [{:5.1f}, {:5.1f}]".format(*interval(values))
    print(f"{'':34}" + "".join(f"{title:>22}" for title in METHODS.values()))
    row = lambda text, cells: print(f"{text:34}" + "".join(f"{cell:>22}" for cell in cells))
    for kind, task in KINDS.items():
        print(f"{kind}: {task}")
        shares = [better(runs, method, kind) for method in METHODS]
        row("  better manner in the end, percent", [span(100 * each[:, -1]) for each in shares])
        text = lambda each: ", ".join("-" if step is None else str(step) for step in steps_to(each))
        row("  steps until 90% of it, by seed", [text(each) for each in shares])
        sizes = [values_of(runs, method, "advantage", kind) for method in METHODS]
        row("  size of advantages", [f"{np.nanmean(each):.2f}" for each in sizes])
        for i in (1, len(updates) - 1):
            cells = [span(held_out(runs, method, kind)[:, i]) for method in METHODS]
            row(f"  accuracy after {updates[i]} steps", cells)
    mean = {m: np.mean([held_out(runs, m, kind)[:, -1] for kind in KINDS], 0) for m in METHODS}
    row("mean accuracy in the end", [span(each) for each in mean.values()])
    print("\nEMA-GRPO less another, in the end, paired over seeds, 95% interval")
    print(f"{'':34}" + "".join(f"{METHODS[other]:>22}" for other in ("grpo", "dr_grpo")))
    for kind in KINDS:
        ours, *others = (100 * better(runs, method, kind)[:, -1] for method in METHODS)
        row(f"  {kind}: better manner", [span(ours - other) for other in others])
        ours, *others = (held_out(runs, method, kind)[:, -1] for method in METHODS)
        row(f"  {kind}: accuracy", [span(ours - other) for other in others])
    ours, *others = mean.values()
    row("  mean accuracy", [span(ours - other) for other in others])


def draw(runs, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained", sharex=True)
    titles = dict(
        exact="careful is right", fine="a glance is, by a hair", mixed="careful, on average"
    )
    for (kind, title), (top, below) in zip(titles.items(), axes.T):
        for method, label in METHODS.items():
            for axis, values in (
                (top, 100 * better(runs, method, kind)),
                (below, values_of(runs, method, "advantage", kind)),
            ):
                steps, style = np.arange(1, values.shape[1] + 1), dict(color=COLOURS[method])
                axis.plot(steps, np.nanmean(values, 0), label=label, **style)
                low, high = np.nanmin(values, 0), np.nanmax(values, 0)
                axis.fill_between(steps, low, high, alpha=0.15, linewidth=0, **style)
        top.set(title=f"{kind} tasks: {title}", ylim=(0, 100))
        below.set(xlabel="step", yscale="log", ylim=(0.01, 2))
    axes[0][0].set(ylabel="responses in the better manner, %")
    axes[1][0].set(ylabel="size of advantages (rms)")
    axes[0][0].legend(loc="lower right")
    for axis in axes.ravel():
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=80)


def main():
    command, *flags = sys.argv[1:] or [""]
    if command == "world":
        return write_world(Path(flags[0]))
    if command == "train":
        return train(flags)
    stored = ROOT / "assets/ablation.json"
    if command == "collect":
        stored.write_text(json.dumps(collect(Path(flags[0])), separators=(",", ":")) + "\n")
    elif command:
        sys.exit(__doc__)
    runs = json.loads(stored.read_text())
    print_table(runs)
    draw(runs, stored.with_suffix(".png"))


if __name__ == "__main__":
    main()
