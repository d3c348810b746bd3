"""Draws the curves of a run, SFT or RL: python tests/curves.py RUN... -> RUN/curves.png for each.

RUN is a run folder, or one that has sft/ and rl/ below it, such as runs/demo: both are then drawn.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def read(folder):
    """The rows of a run's metrics.jsonl; [] if there is none."""
    path = Path(folder, "metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def smooth(values, width):
    """Mean of the last `width` values that are there."""
    return [np.mean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]


def plot(axis, rows, key, title, colour="tab:blue", start=False, **limits):
    """One number over the steps. A step that does not have it is left out. start: dots where it began."""
    rows = [row for row in rows if row.get(key) is not None]
    steps, values = [row["step"] for row in rows], [row[key] for row in rows]
    axis.plot(steps, values, color=colour, alpha=0.25)
    axis.plot(steps, smooth(values, max(1, len(rows) // 8)), color=colour)
    if start and values:
        axis.axhline(np.mean(values[:3]), color="black", linestyle=":", linewidth=1)
    axis.set(title=title, **limits)


def plot_stds(axis, rows, tasks):
    """The moving reward std of each task, with its name at the end of its line."""
    ends = []
    for i, task in enumerate(tasks):
        own = [row for row in rows if f"std/{task}" in row]
        if own:
            colour = plt.cm.tab20(i % 20)
            values = [row[f"std/{task}"] for row in own]
            axis.plot([row["step"] for row in own], values, color=colour, linewidth=1.2)
            ends.append((values[-1], task, colour))
    axis.set(title="moving reward std of each task", ylim=(0, None))
    low, high = axis.get_ylim()
    height = low
    for value, task, colour in sorted(ends):  # names must not lie on each other
        height = max(height + (high - low) / 17, value)
        place = dict(xycoords=("axes fraction", "data"), va="center")
        axis.annotate(task, (1.01, height), color=colour, fontsize=8, **place)


def draw(sft, rl, path):
    """All curves of an SFT run and an RL run, of which one may be []."""
    prefix = "accuracy/"
    tasks = sorted({key.removeprefix(prefix) for row in rl for key in row if prefix in key})
    count = bool(sft) + 3 * bool(rl) + len(tasks)
    columns = min(4, count)
    lines = -(-count // columns)
    size = (4.2 * columns + 0.8, 3 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    free = iter(axes.ravel())
    if sft:
        plot(next(free), sft, "loss", "SFT: loss per response token", "tab:grey", yscale="log")
    if rl:
        plot(next(free), rl, "reward", "RL: mean reward (at most 1.5)")
        plot(next(free), rl, "response_tokens", "RL: tokens of a response", ylim=(0, None))
        plot_stds(next(free), rl, tasks)
    for task in tasks:
        key, style = f"accuracy/{task}", dict(colour="tab:orange", start=True, ylim=(0, 1))
        plot(next(free), rl, key, f"{task}: accuracy", **style)
    for axis in axes.ravel():
        axis.grid(alpha=0.3)
        axis.set_xlabel("step")
    for axis in free:
        axis.remove()
    dots = "; dots: the mean of RL's first three steps" * bool(tasks)
    figure.supxlabel(
        f"faint: each step; full: running mean over an eighth of the run{dots}", fontsize=10
    )
    figure.savefig(path, dpi=80)
    plt.close(figure)
    print(f"{path}: {len(sft)} SFT steps, {len(rl)} RL steps, {len(tasks)} tasks")


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for run in sys.argv[1:]:
        parts = [rows for folder in (run, f"{run}/sft", f"{run}/rl") if (rows := read(folder))]
        sft = next((rows for rows in parts if "reward" not in rows[0]), [])
        rl = next((rows for rows in parts if "reward" in rows[0]), [])
        if not (sft or rl):
            sys.exit(f"curves.py: {run}: no metrics.jsonl here, nor in sft/ or rl/ below")
        draw(sft, rl, Path(run, "curves.png"))


if __name__ == "__main__":
    main()
