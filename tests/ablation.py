"""The table and the picture of tests/ablation.sh.

python tests/ablation.py runs/ablation      # reads the runs; writes assets/ablation.json, then as below
python tests/ablation.py                    # from assets/ablation.json: prints the table, draws assets/ablation.png
"""

import json
import sys
from pathlib import Path

import method_without_images
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

ASSETS = Path(__file__).resolve().parents[1] / "assets"
METHODS = {
    "ema_grpo": ("EMA-GRPO", "tab:blue"),
    "grpo": ("GRPO", "tab:orange"),
    "dr_grpo": ("Dr.GRPO", "tab:green"),
}


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def short(number):
    return None if number is None else round(number, 4)


def collect(folder):
    """Out of a folder of runs, what the table and the picture need.

    "runs": <method>-<seed> -> metric -> one number per step (None where a step had no record of the task);
    "groups": method -> [task, std of the group's rewards, root mean square of its advantages] of sampled groups;
    "heldout": sft or <method>-<seed> -> task -> accuracy of each held-out record;
    "without_images": what tests/method_without_images.py gives, every third step.
    """
    result = dict(runs={}, groups={method: [] for method in METHODS}, heldout={})
    for path in sorted(folder.glob("*grpo-*/metrics.jsonl")):
        rows, name = read(path), path.parent.name
        keys = {
            key
            for row in rows
            for key in row
            if key.split("/")[0] in ("reward", "advantage", "std")
        }
        result["runs"][name] = {key: [short(row.get(key)) for row in rows] for key in sorted(keys)}
        for entry in read(path.with_name("rollouts.jsonl")):
            if entry["advantages"]:
                size = np.sqrt(np.mean(np.square(entry["advantages"])))
                result["groups"][name.split("-")[0]].append(
                    [entry["task"], short(np.std(entry["rewards"])), short(size)]
                )
    for path in sorted(folder.glob("eval/*/*.jsonl")):
        if path.stem != "judge":
            lines = sorted(read(path), key=lambda line: line["position"])
            task = lines[0]["task"]
            result["heldout"].setdefault(path.parent.name, {})[task] = [
                short(line["accuracy"]) for line in lines
            ]
    result["without_images"] = {
        method: shares[:, ::3].round(4).tolist()
        for method, shares in method_without_images.curves().items()
    }
    return result


def heldout_of(result, method):
    """Accuracy of every held-out record, (seeds, tasks, records)."""
    runs = [tasks for name, tasks in result["heldout"].items() if name.split("-")[0] == method]
    return np.array([[tasks[task] for task in sorted(tasks)] for tasks in runs])


def resampled(accuracy, draws=2000):
    """Bootstrap of the mean over seeds and records, both drawn with replacement -> (draws, tasks). Every method meets the same
    draws of records, so that differences of methods are paired."""
    seeds, _, records = accuracy.shape
    chosen_records = np.random.default_rng(0).integers(records, size=(draws, records))
    chosen_seeds = np.random.default_rng(1).integers(seeds, size=(draws, seeds))
    return np.array(
        [accuracy[s][:, :, r].mean((0, 2)) for s, r in zip(chosen_seeds, chosen_records)]
    )


def intervals(result):
    """method, "sft" and differences -> (mean (tasks + 1,), low, high), in percent; the last entry is the mean over tasks."""
    draws, means = {}, {}
    for method in ("sft", *METHODS):
        accuracy = 100 * heldout_of(result, method)
        means[method], draws[method] = accuracy.mean((0, 2)), resampled(accuracy)
    for method in METHODS:
        for other in ("sft", *METHODS):
            means[f"{method} - {other}"], draws[f"{method} - {other}"] = (
                each[method] - each[other] for each in (means, draws)
            )
    with_mean = lambda values: np.concatenate([values, values.mean(-1, keepdims=True)], axis=-1)
    return {
        name: (with_mean(means[name]), *np.percentile(with_mean(draws[name]), [2.5, 97.5], axis=0))
        for name in draws
    }


def print_table(result, tasks, table):
    print(f"{'held-out accuracy in percent':28}      SFT" + "".join(f"{title:>10}" for title, _ in METHODS.values())
          + "      EMA-GRPO - GRPO [95%]   EMA-GRPO - Dr.GRPO [95%]")  # fmt: skip
    for i, task in enumerate([*tasks, f"mean over {len(tasks)} tasks"]):
        cells = f"{table['sft'][0][i]:9.1f}" + "".join(
            f"{table[method][0][i]:10.1f}" for method in METHODS
        )
        for other in ("grpo", "dr_grpo"):
            value, low, high = (side[i] for side in table[f"ema_grpo - {other}"])
            cells += f"   {value:+7.1f} [{low:+6.1f}, {high:+6.1f}]"
        print(f"{task:28}{cells}")
    print(
        "\nreward std and how hard a task pulls (root mean square advantage), means over steps and seeds"
    )
    print(f"{'':28}{'std':>9}" + "".join(f"{title:>10}" for title, _ in METHODS.values()))
    for task in tasks:
        cells = [step_means(result, "ema_grpo", f"std/{task}")] + [
            step_means(result, method, f"advantage/{task}") for method in METHODS
        ]
        print(f"{task:28}{cells[0]:9.3f}" + "".join(f"{cell:10.2f}" for cell in cells[1:]))


def curves(result, method, key):
    """One metric of all seeds of a method: (seeds, steps), nan where a step has none."""
    runs = [run for name, run in result["runs"].items() if name.split("-")[0] == method]
    return np.array([run[key] for run in runs], dtype=float)


def step_means(result, method, key):
    return float(np.nanmean(curves(result, method, key)))


def smooth(values, width):
    """(seeds, steps): the mean over the last `width` steps that have a value; nan where none has."""
    sums, counts = (
        np.cumsum(part, axis=1, dtype=float) for part in (np.nan_to_num(values), ~np.isnan(values))
    )
    for part in (sums, counts):
        part[:, width:] -= part[:, :-width].copy()
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def draw(result, tasks, table, path):
    figure = plt.figure(figsize=(15, 19), constrained_layout=True)
    grid = figure.add_gridspec(5, 12, height_ratios=[1.8, 1.8, 1, 1, 1])
    tasks = sorted(tasks, key=lambda task: step_means(result, "ema_grpo", f"std/{task}"))
    places = {task: i for i, task in enumerate(sorted(tasks))}  # of the table

    axis = figure.add_subplot(grid[0, :6])
    for method, (title, colour) in METHODS.items():
        sizes = [step_means(result, method, f"advantage/{task}") for task in tasks]
        axis.plot(sizes, range(len(tasks)), "o-", color=colour, label=title, linewidth=1)
    labels = [f"{task}  {step_means(result, 'ema_grpo', f'std/{task}'):.2f}" for task in tasks]
    axis.set_yticks(range(len(tasks)), labels)
    axis.set(
        title="Between tasks: how hard each one pulls\n(root mean square advantage; beside a task: its reward std)",
        xscale="log",
    )
    axis.legend()

    axis = figure.add_subplot(grid[0, 6:])
    for method, (title, colour) in METHODS.items():
        groups = [
            (std, size) for task, std, size in result["groups"][method] if std > 0 and size > 0
        ]
        axis.scatter(*zip(*groups), s=6, color=colour, alpha=0.5, label=title)
    axis.set(title="Inside a task: a group's advantages\nby the std of its rewards", xscale="log", yscale="log", xlabel="std of the group's rewards")  # fmt: skip
    axis.legend()

    axis = figure.add_subplot(grid[1, :6])
    for k, (method, (title, colour)) in enumerate(METHODS.items()):
        mean, low, high = table[f"{method} - sft"]
        rows = [places[task] for task in tasks] + [len(tasks)]
        y = np.arange(len(rows)) + 0.22 * (1 - k)
        errors = [[mean[i] - low[i] for i in rows], [high[i] - mean[i] for i in rows]]
        axis.errorbar(
            mean[rows],
            y,
            xerr=errors,
            fmt="o",
            color=colour,
            markersize=4,
            linewidth=1,
            label=title,
        )
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(tasks) + 1), [*tasks, "mean"])
    axis.set(
        title="Held-out accuracy minus that of the SFT model,\npercent, 95% over seeds and records"
    )
    axis.legend(loc="lower right")

    axis = figure.add_subplot(grid[1, 6:])
    for method, (title, colour) in METHODS.items():
        for k, (kind, style) in enumerate(
            (("QA, reward 0 or 1", "--"), ("box, reward 0.70 or 0.75", "-"))
        ):
            shares = 100 * np.array(result["without_images"][method])[:, :, k]
            steps = np.arange(shares.shape[1]) * 3
            axis.plot(steps, shares.mean(0), style, color=colour, label=f"{title}: {kind}")
            axis.fill_between(
                steps, shares.min(0), shares.max(0), color=colour, alpha=0.1, linewidth=0
            )
    axis.set(
        title="A task of tiny reward spread (tests/method_without_images.py):\nright answers in percent; band: all ten seeds",
        xlabel="step",
    )
    axis.legend(fontsize="small")

    for i, task in enumerate(tasks):
        axis = figure.add_subplot(grid[2 + i // 4, 3 * (i % 4) : 3 * (i % 4) + 3])
        for method, (_, colour) in METHODS.items():
            values = smooth(curves(result, method, f"reward/{task}"), 10)
            steps = np.arange(1, values.shape[1] + 1)
            axis.plot(steps, values.mean(0), color=colour)
            axis.fill_between(
                steps, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0
            )
        axis.set(title=f"{task}: reward" + ", band: all seeds" * (i == 0), xlabel="step")
    for axis in figure.axes:
        axis.grid(alpha=0.3)
        for side in (axis.xaxis, axis.yaxis):
            if side.get_scale() == "log":
                side.set_major_locator(LogLocator(subs=(1, 2, 5)))
                side.set_major_formatter(ScalarFormatter())
                side.set_minor_formatter(NullFormatter())
    figure.savefig(path, dpi=75)


def main():
    stored = ASSETS / "ablation.json"
    if len(sys.argv) > 1:
        stored.write_text(json.dumps(collect(Path(sys.argv[1])), separators=(",", ":")) + "\n")
    result = json.loads(stored.read_text())
    tasks = sorted(result["heldout"]["sft"])
    table = intervals(result)
    print_table(result, tasks, table)
    draw(result, tasks, table, ASSETS / "ablation.png")
    print(f"\n{ASSETS / 'ablation.png'}: {len(result['runs'])} runs")


if __name__ == "__main__":
    main()
