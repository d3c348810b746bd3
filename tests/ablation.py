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
    runs, wanted = {}, ("better", "accuracy", "std", "advantage")
    for path in sorted(folder.glob("*grpo-*/metrics.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()][:40]
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


def window(runs, method, metric, kind, steps):
    """The mean of a metric over a slice of the steps, for each seed: (seeds,)."""
    return np.nanmean(values_of(runs, method, metric, kind)[:, steps], 1)


def interval(values):
    """Mean and 95% t interval over 5 seeds, (5,) -> text in percent."""
    mean, half = np.mean(values), 2.776 * np.std(values, ddof=1) / 5**0.5
    return f"{100 * mean:.1f} [{100 * (mean - half):.1f}, {100 * (mean + half):.1f}]"


WINDOWS = {"steps 11-20": slice(10, 20), "steps 31-40": slice(30, 40)}


def print_table(runs):
    def row(text, cells):
        print(f"{text:40}" + "".join(f"{cell:>24}" for cell in cells))

    row("percent, mean over 5 seeds [95%]", METHODS.values())
    for kind in KINDS:
        for metric, name in (("better", "better manner"), ("accuracy", "accuracy")):
            for when, steps in WINDOWS.items():
                cells = [window(runs, method, metric, kind, steps) for method in METHODS]
                row(f"{kind}: {name}, {when}", map(interval, cells))
        sizes = [values_of(runs, method, "advantage", kind) for method in METHODS]
        row(f"{kind}: size of advantages (rms)", [f"{np.nanmean(each):.2f}" for each in sizes])
    print()
    row("EMA-GRPO less, paired over the seeds", [METHODS["grpo"], METHODS["dr_grpo"]])
    for kind in KINDS:
        for metric, name in (("better", "better manner"), ("accuracy", "accuracy")):
            for when, steps in WINDOWS.items():
                ours, *others = (window(runs, method, metric, kind, steps) for method in METHODS)
                row(f"{kind}: {name}, {when}", [interval(ours - other) for other in others])


def draw(runs, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained", sharex=True)
    titles = dict(exact="right or wrong", fine="a hair apart", mixed="better by the mean reward")
    for (kind, title), (top, below) in zip(titles.items(), axes.T):
        for method, label in METHODS.items():
            for axis, metric in ((top, "better"), (below, "accuracy")):
                values = values_of(runs, method, metric, kind)
                steps = np.arange(3, values.shape[1] - 1)  # means of five steps
                smooth = [np.nanmean(values[:, i - 3 : i + 2], 1) for i in steps]
                style = dict(color=COLOURS[method])
                axis.plot(steps, np.mean(smooth, 1), label=label, **style)
                low, high = np.min(smooth, 1), np.max(smooth, 1)
                axis.fill_between(steps, low, high, alpha=0.15, linewidth=0, **style)
        top.set(title=f"{kind}: {title}", ylim=(0, 1))
        below.set(xlabel="step", ylim=(0.5, 1.01))
    axes[0][0].set(ylabel="share of the better manner")
    axes[1][0].set(ylabel="accuracy")
    axes[1][2].legend(loc="lower right")
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
