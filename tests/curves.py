"""Draws a run's curves: python tests/curves.py runs/demo -> runs/demo/curves.png. Reads sft/ and rl/metrics.jsonl."""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def smooth(values, width):
    """Mean of the last `width` values that are there."""
    return [np.mean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def main():
    folder = Path(sys.argv[1])
    sft, rl = read(folder / "sft" / "metrics.jsonl"), read(folder / "rl" / "metrics.jsonl")
    tasks = sorted(
        {key.removeprefix("accuracy/") for row in rl for key in row if key.startswith("accuracy/")}
    )
    figure, axes = plt.subplots(4, 4, figsize=(15, 11), constrained_layout=True)
    axes = axes.ravel()
    width = max(1, len(rl) // 8)

    axes[0].plot(
        [row["step"] for row in sft],
        smooth([row["loss"] for row in sft], max(1, len(sft) // 50)),
        color="tab:grey",
    )
    axes[0].set(title="SFT: loss per response token", yscale="log")
    steps = [row["step"] for row in rl]
    for axis, key, title in (
        (axes[1], "reward", "RL: mean reward (at most 1.5)"),
        (axes[2], "accuracy", "RL: mean accuracy of sampled answers"),
    ):
        values = [row[key] for row in rl]
        axis.plot(steps, values, color="tab:blue", alpha=0.25)
        axis.plot(steps, smooth(values, width), color="tab:blue")
        axis.set(title=title)
    for task in tasks:
        rows = [row for row in rl if f"std/{task}" in row]
        axes[3].plot(
            [row["step"] for row in rows], [row[f"std/{task}"] for row in rows], linewidth=1
        )
    axes[3].set(title="RL: moving reward std of each task", ylim=(0, None))
    for axis, task in zip(axes[4:], tasks):
        rows = [row for row in rl if f"accuracy/{task}" in row]
        values = [row[f"accuracy/{task}"] for row in rows]
        axis.plot([row["step"] for row in rows], values, color="tab:orange", alpha=0.25)
        axis.plot([row["step"] for row in rows], smooth(values, width), color="tab:orange")
        axis.set(title=f"{task}: accuracy", ylim=(0, max(0.5, *values)))
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.set_xlabel("step")
    figure.savefig(folder / "curves.png", dpi=80)
    print(f"{folder / 'curves.png'}: {len(sft)} SFT steps, {len(rl)} RL steps, {len(tasks)} tasks")


if __name__ == "__main__":
    main()
