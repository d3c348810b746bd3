"""Answers benchmarks with a model and grades them; compares models on the same records.

    python evaluate.py --model runs/demo/rl --data runs/demo/toy/eval/*.json --out runs/demo/eval/rl --dtype float32 ...   # laptop
    torchrun --nproc-per-node 8 evaluate.py --model runs/rl --data eval/*.json --out runs/eval                        # 8 x 80 GB
    python evaluate.py --compare runs/eval/base runs/eval/sft runs/eval/rl --names base SFT RL                # no model needed

A benchmark is a record file, named by its stem. Every rank has a vLLM engine and answers its share, greedily. Under --out:

    <benchmark>.jsonl   one line per record, in the file's order: problem_id, position, answer, accuracy, parts, trouble,
                        response
    parts/              what the ranks have written so far; the same command goes on from there, with any number of ranks
    results.json        benchmark -> metric -> value, low, high (95% bootstrap interval), n; shares, not percent
    settings.json       what the answers depend on; a rerun that would mix two models is refused

Grading is rewards.accuracy, as in training; only the reading is more lenient (rewards.find_answer). Everything counts: an
answer that cannot be read scores 0, and so does a record whose media cannot be opened (a rerun tries it again). A
generation that failed is no answer: it is left out, the run says so, and a rerun makes up for it.
"""

import argparse
import glob
import hashlib
import json
import os
import shutil
import sys
import zlib
from datetime import timedelta
from functools import partial

import numpy as np

import rewards

# ----------------------------------------------------------------------------------------------------------------------
# Metrics. Each is a mean over records: of a part, or of "the part is at least the threshold".

METRICS = {  # task -> metric -> part of an answer's score, threshold
    "temporal grounding": {"R@0.3": ("iou", 0.3), "R@0.5": ("iou", 0.5), "R@0.7": ("iou", 0.7), "mIoU": ("iou", None)},
    "spatial grounding": {"R@0.5": ("iou", 0.5), "mIoU": ("iou", None)},
    "spatial-temporal grounding": {
        "tIoU@0.5": ("t_iou", 0.5),
        "m_tIoU": ("t_iou", None),
        "sIoU@0.5": ("s_iou", 0.5),  # s: over the seconds that answer and truth share, as the paper's table has it
        "m_sIoU": ("s_iou", None),
        "m_vIoU": ("v_iou", None),  # v: over the true seconds, as in the reward
    },
    "tracking": {"AO": ("iou", None), "R@0.3": ("iou", 0.3), "R@0.5": ("iou", 0.5), "R@0.7": ("iou", 0.7)},
    "segmentation-image": {"box_mIoU": ("iou", None)},  # of the box that prompts SAM2; masks come later
    "segmentation-video": {"box_mIoU": ("iou", None)},
}
TROUBLES = ("unreadable", "cut off", "skipped")  # no answer in it, stopped by --max-response-tokens, no media


def parts_of(task, record, answer):
    """What the metrics of a task need to know of one answer: {"task", and its IoUs}. An answer of None has IoU 0.

    >>> parts_of("temporal grounding", {"answer": '{"time": [2, 6]}'}, '{"time": [0, 4]}')
    {'task': 'temporal grounding', 'iou': 0.3333333333333333}
    """
    parts = dict(task=task)
    if task not in METRICS:
        return parts
    p, y = (rewards.read_json(text) if isinstance(text, str) else None for text in (answer, rewards.truth_of(record)))
    p, y = (side if isinstance(side, dict) else {} for side in (p, y))
    if task == "temporal grounding":
        parts["iou"] = rewards.iou_1d(p.get("time"), y.get("time"))
    elif task == "tracking":
        parts["iou"] = rewards.mean_box_iou(
            p.get("boxes"), y.get("boxes")
        )  # of the sequence; the given first box counts
    elif task == "spatial-temporal grounding":
        parts["t_iou"] = rewards.iou_1d(p.get("time"), y.get("time"))
        parts["v_iou"] = rewards.mean_box_iou(p.get("boxes"), y.get("boxes"))
        parts["s_iou"] = rewards.mean_box_iou(p.get("boxes"), y.get("boxes"), over="shared")
    else:
        parts["iou"] = rewards.iou_box(p.get("boxes"), y.get("boxes"))
    return parts


def readable(record, answer):
    """Whether an answer says anything in the terms of its task, right or wrong.

    >>> readable({"problem_type": "numerical"}, "12"), readable({"problem_type": "numerical"}, "a dozen")
    (True, False)
    """
    kind = rewards.kind_of(record)
    if not answer:
        return False
    if kind == "multiple choice":
        return rewards.read_choice(answer, record.get("options")) is not None
    if kind in ("numerical", "regression"):
        return rewards.read_number(answer) is not None
    return kind not in rewards.JSON_TYPES or rewards.structure(record, answer) > 0


def resampled_means(columns, name, resamples=2000):
    """Bootstrap: the means of the columns (m, n) over `resamples` draws of n rows with replacement -> (resamples, m).

    All columns see the same draws, which is what makes a comparison of columns paired. The seed comes from the name, so
    that a benchmark has the same draws everywhere and two benchmarks have independent ones.
    """
    columns = [np.array(column, dtype=np.float64) for column in columns]
    rng, means = np.random.default_rng(zlib.crc32(name.encode())), []
    n = len(columns[0])
    block = max(1, 10**6 // n)  # draws at a time: bounds the memory
    for start in range(0, resamples, block):
        draws = rng.integers(n, size=(min(block, resamples - start), n), dtype=np.int32)
        means.append(np.stack([column.take(draws).mean(1) for column in columns], axis=1))
    return np.concatenate(means)


def interval(value, means, **more):
    """{"value", "low", "high"}: a mean and the middle 95% of its resamples (R,)."""
    low, high = np.percentile(means, [2.5, 97.5])
    return dict(value=float(value), low=float(low), high=float(high), **more)


def metrics_of(name, lines):
    """Stored lines of one benchmark -> {metric: {"value", "low", "high", "n"}}.

    accuracy, then the metrics of the records' task, then the shares of what went wrong. A file with several tasks gets each
    one's metrics over its own records, named like "mIoU (temporal grounding)".
    """
    result = {}

    def add(metric, values):
        result[metric] = interval(np.mean(values), resampled_means([values], name)[:, 0], n=len(values))

    add("accuracy", [line["accuracy"] for line in lines])
    tasks = sorted({line["parts"]["task"] for line in lines})
    for task in tasks:
        own = [line for line in lines if line["parts"]["task"] == task]
        suffix = f" ({task})" if len(tasks) > 1 else ""
        if suffix:
            add("accuracy" + suffix, [line["accuracy"] for line in own])
        for metric, (part, least) in METRICS.get(task, {}).items():
            values = [line["parts"][part] for line in own]
            add(metric + suffix, values if least is None else [value >= least for value in values])
    for trouble in TROUBLES:
        add(trouble, [trouble in line["trouble"] for line in lines])
    return result


def print_results(results):
    """The table on the screen: one line per metric, in percent, and beside the accuracy how many answers had trouble."""
    width = max(map(len, [*results, "mean over benchmarks"]))
    deep = max(len(metric) for metrics in results.values() for metric in metrics)
    print(f"\n{'benchmark':{width}}  {'n':>6}  {'metric':{deep}}  percent  95% interval")
    for name, metrics in results.items():
        for metric, cell in metrics.items():
            if metric in TROUBLES:
                continue
            row = f"{100 * cell['value']:7.1f}  [{100 * cell['low']:5.1f}, {100 * cell['high']:5.1f}]"
            if metric == "accuracy":
                counts = {trouble: round(metrics[trouble]["value"] * cell["n"]) for trouble in TROUBLES}
                row += "".join(f"  {count} {trouble}" for trouble, count in counts.items() if count)
            print(f"{name if metric == 'accuracy' else '':{width}}  {cell['n']:6}  {metric:{deep}}  {row}")
    mean = 100 * np.mean([metrics["accuracy"]["value"] for metrics in results.values()])
    print(f"{'mean over benchmarks':{width}}  {len(results):6}  {'accuracy':{deep}}  {mean:7.1f}")


# ----------------------------------------------------------------------------------------------------------------------
# Stored outputs


def read_lines(path):
    """{position: line} of a JSONL file of outputs; {} if there is none. Of two lines for a position the later one counts; a
    line that a kill has torn is as good as not written."""
    lines = {}
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            for text in file:
                try:
                    line = json.loads(text)
                except json.JSONDecodeError:
                    continue
                lines[line["position"]] = line
    return lines


def read_json_file(path):
    """The value in a JSON file; None if there is no file."""
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            return json.load(file)


def write_whole(path, text):
    """Writes a file so that it is there in full or not at all."""
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(path + ".tmp", path)


def append(path, line):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def merge_parts(out, name):
    """Moves what the ranks have written for a benchmark into <benchmark>.jsonl, in position order -> {position: line}."""
    path, folder = os.path.join(out, name + ".jsonl"), os.path.join(out, "parts", name)
    lines = read_lines(path)
    for part in sorted(glob.glob(os.path.join(glob.escape(folder), "*.jsonl"))):
        lines |= read_lines(part)
    lines = dict(sorted(lines.items()))
    write_whole(path, "".join(json.dumps(line) + "\n" for line in lines.values()))
    shutil.rmtree(folder, ignore_errors=True)  # only now: a kill in between leaves every line in at least one place
    return lines


def fingerprint(path):
    """Tells model folders apart by samples of their weights, fast at any size. A hub id stands for itself."""
    if not os.path.isdir(path):
        return path
    digest = hashlib.sha256()
    for file_path in sorted(glob.glob(os.path.join(glob.escape(path), "*.safetensors"))):
        size = os.path.getsize(file_path)
        digest.update(f"{os.path.basename(file_path)} {size} ".encode())
        with open(file_path, "rb") as file:
            for offset in range(0, size, max(size // 64, 2**16)):
                file.seek(offset)
                digest.update(file.read(2**16))
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Answering


def refuse(message):
    """Ends the run before anything heavy has started: one sentence, from one rank."""
    if os.environ.get("RANK", "0") == "0":
        print(f"evaluate.py: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def check(args):
    """Everything that can be wrong with the input, before a model is loaded. Returns {benchmark: records}, processor, the
    prompts, and the settings that the answers depend on."""
    from transformers import AutoProcessor

    from data import limits_of, load_prompts, load_records

    if not (args.model and args.data and args.out):
        refuse("--model, --data and --out are needed (or --compare with the --out folders of earlier runs)")
    if not os.path.isdir(args.model) and args.model.count("/") != 1:
        refuse(f"--model {args.model}: no such folder, and no hub id of the form owner/name")
    benchmarks, paths = {}, {}
    try:
        for path in args.data:
            name = os.path.splitext(os.path.basename(path))[0]
            if name in benchmarks:
                refuse(f"--data: {paths[name]} and {path} would both be the benchmark {name!r}: rename one")
            benchmarks[name], paths[name] = load_records(path, args.media_root), path
        prompts = load_prompts(args.prompts)
    except (OSError, ValueError) as error:
        refuse(error)
    try:
        processor = AutoProcessor.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        refuse(f"--model {args.model}: {error}")
    for name, records in benchmarks.items():
        if strangers := [record for record in records if record["answer"] is None]:
            refuse(f"{paths[name]}: record {strangers[0]['index']}: an SFT record (messages), where answers are needed")
        lost = [
            medium["path"] for record in records for medium in record["media"] if not os.path.exists(medium["path"])
        ]
        if len(lost) > args.max_bad_share * len(records):
            refuse(
                f"{paths[name]}: {len(lost)} media files do not exist, such as {lost[0]} (see --media-root, --max-bad-share)"
            )

    settings = dict(model=fingerprint(args.model), dtype=args.dtype, max_response_tokens=args.max_response_tokens)
    settings |= dict(prompts=prompts, limits=limits_of(args)._asdict(), data={})
    for name, path in paths.items():
        with open(path, "rb") as file:
            settings["data"][name] = hashlib.sha256(file.read()).hexdigest()
    if old := read_json_file(os.path.join(args.out, "settings.json")):
        other = [key for key in settings if key != "data" and settings[key] != old.get(key)]
        other += [
            f"{name} data" for name in paths if old["data"].get(name, settings["data"][name]) != settings["data"][name]
        ]
        if other:
            refuse(f"{args.out} holds answers with other {', '.join(other)}: name another --out, or remove that folder")
        settings["data"] = old["data"] | settings["data"]
    return benchmarks, processor, prompts, settings


def prompt_of(record, processor, limits, prompts):
    """A prompt without what only a trainer needs, so that a film leaves the decoding process once, not twice."""
    from data import encode

    prompt = encode(record, processor, limits, prompts)
    prompt.patches = prompt.positions = None
    return prompt


def chunked(items, most, most_tokens=2**18):
    """Lists of (benchmark, record, prompt): at most `most`, fewer if they are long. 2^18 tokens of film are 1.6 GB of pixels."""
    chunk, tokens = [], 0
    for item in items:
        chunk.append(item)
        tokens += len(getattr(item[-1], "token_ids", ()))
        if len(chunk) == most or tokens >= most_tokens:
            yield chunk
            chunk, tokens = [], 0
    if chunk:
        yield chunk


def answer(chunk, llm, grader, tokenizer, max_tokens):
    """Greedy, graded answers to a chunk of (benchmark, record, Prompt or Skipped) -> list of (benchmark, line to store).

    A generation that neither ended nor filled its tokens has failed in vLLM. It is no answer and has no line.
    """
    from data import Prompt, task_of
    from rl_ema_grpo import generate, text_of

    prompts = [prompt for *_, prompt in chunk if isinstance(prompt, Prompt)]
    rollouts = iter(generate(llm, prompts, [0] * len(prompts), 1, max_tokens, tokenizer, temperature=0.0))
    given = []  # (benchmark, record, response, what went wrong)
    for name, record, prompt in chunk:
        if not isinstance(prompt, Prompt):
            print(f"counts 0: {prompt.message}", file=sys.stderr)
            given.append((name, record, None, ["skipped", prompt.reason]))
            continue
        rollout = next(rollouts)
        if rollout.finished[0] or len(rollout.responses[0]) >= max_tokens:
            given.append((name, record, text_of(rollout, 0, tokenizer), [] if rollout.finished[0] else ["cut off"]))

    answers = [rewards.find_answer(response) for _, _, response, _ in given]  # None for None
    accuracies = grader.accuracies([(record, answer) for (_, record, _, _), answer in zip(given, answers)])
    lines = []
    for (name, record, response, trouble), answer, accuracy in zip(given, answers, accuracies):
        if response is not None and not readable(record, answer):
            trouble = trouble + ["unreadable"]
        line = dict(problem_id=record["problem_id"], position=record["index"], answer=answer, accuracy=accuracy)
        line |= dict(parts=parts_of(task_of(record), record, answer), trouble=trouble, response=response)
        lines.append((name, line))
    return lines


def evaluate(args):
    import torch.distributed as dist  # here, not above: --compare needs neither torch nor vLLM
    from tqdm import tqdm

    import cpu_compat  # noqa: F401  (before transformers)
    from data import limits_of, prefetch
    from rl_ema_grpo import gather, make_engine
    from sft import init_distributed, start_run

    benchmarks, processor, prompts, settings = check(args)
    rank, world, _ = init_distributed()
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=2))  # a rank may finish long before the others

    # 1 What is there already? Rank 0 tidies up, then all look. Records whose media could not be used are tried again.
    if rank == 0:
        start_run(args)
        write_whole(os.path.join(args.out, "settings.json"), json.dumps(settings, indent=1))
        for name in benchmarks:
            merge_parts(args.out, name)
    dist.barrier(group=patient)
    todo, count = [], sum(map(len, benchmarks.values()))
    for name, records in benchmarks.items():
        stored = read_lines(os.path.join(args.out, name + ".jsonl"))
        done = {position for position, line in stored.items() if "skipped" not in line["trouble"]}
        todo += [(name, record) for record in records if record["index"] not in done]
    mine, failed, killed = todo[rank::world], 0, 0
    if rank == 0:
        print(
            f"{count} records in {len(benchmarks)} benchmarks: {len(todo)} to answer on {world} ranks, the others are there"
        )

    # 2 Each rank answers its share, and writes as it goes.
    if todo:
        limits, tokenizer = limits_of(args), processor.tokenizer
        make_prompt = partial(prompt_of, processor=processor, limits=limits, prompts=prompts)
        stream = prefetch([record for _, record in mine], make_prompt, range(len(mine)), args.workers)
        kinds = [[medium["type"] for medium in record["media"]] for _, record in todo]
        media_per_prompt = {kind: max(each.count(kind) for each in kinds) for kind in ("image", "video")}
        length = limits.max_prompt_tokens + args.max_response_tokens
        llm = make_engine(args.model, args.dtype, length, media_per_prompt, seed=0)
        items = ((name, record, prompt) for (name, record), prompt in zip(mine, stream))
        bar = tqdm(total=len(mine), disable=rank > 0, unit="record", desc="rank 0's share")
        with rewards.Grader(seconds=args.grade_seconds) as grader:
            for chunk in chunked(items, args.prompts_per_chunk):
                lines = answer(chunk, llm, grader, tokenizer, args.max_response_tokens)
                for name, line in lines:
                    append(os.path.join(args.out, "parts", name, f"{rank}.jsonl"), line)
                failed += len(chunk) - len(lines)
                bar.update(len(chunk))
            killed = sum(grader.counts.values())
        bar.close()
    dist.barrier(group=patient)
    failed, killed = (sum(counts) for counts in zip(*gather((failed, killed))))

    # 3 Merge and sum up.
    if rank == 0:
        lines = {name: list(merge_parts(args.out, name).values()) for name in benchmarks}
        shutil.rmtree(os.path.join(args.out, "parts"), ignore_errors=True)
        if killed:
            print(f"{killed} answers could not be graded in {args.grade_seconds} s and count 0")
        if failed:
            print(f"evaluate.py: {failed} generations failed; the same command tries them again", file=sys.stderr)
        else:
            new = {name: metrics_of(name, lines[name]) for name in benchmarks}
            path = os.path.join(args.out, "results.json")
            write_whole(path, json.dumps((read_json_file(path) or {}) | new, indent=1))
            print_results(new)
            print(f"written to {args.out}")
    if todo:
        llm.llm_engine.engine_core.shutdown()  # takes the process group with it
    sys.exit(1 if failed else 0)


# ----------------------------------------------------------------------------------------------------------------------
# Comparing models that answered the same records


def read_accuracies(out):
    """The finished benchmarks of an --out folder: {benchmark: ([problem ids], [accuracies])}, in position order."""
    results, found = read_json_file(os.path.join(out, "results.json")), {}
    if results is None:
        refuse(f"--compare: {out} has no results.json: no evaluation has ended there")
    for name, metrics in results.items():
        lines = [line for _, line in sorted(read_lines(os.path.join(out, name + ".jsonl")).items())]
        if len(lines) != metrics["accuracy"]["n"]:
            refuse(
                f"--compare: {out} has {len(lines)} answers to {name}, its results.json speaks of {metrics['accuracy']['n']}"
            )
        found[name] = [line["problem_id"] for line in lines], [line["accuracy"] for line in lines]
    return found


def compare_models(models):
    """{model: read_accuracies(...)} -> what --compare prints and writes.

    "benchmarks" and "mean" hold one interval per model; "differences" the paired one of each model to the one before it:
    records are drawn within each benchmark, the same for all models, and the mean over benchmarks is taken each time.
    Benchmarks that not all models have are "left_out".
    """
    names = list(models)
    shared = [name for name in models[names[0]] if all(name in models[model] for model in names)]
    left_out = sorted({name for found in models.values() for name in found} - set(shared))
    report, values, means = dict(benchmarks={}, mean={}, differences=[], left_out=left_out), [], []
    for name in shared:
        if any(models[model][name][0] != models[names[0]][name][0] for model in names):
            raise ValueError(f"{name}: the models did not answer the same records")
        accuracies = np.array([models[model][name][1] for model in names])  # (models, n)
        values.append(accuracies.mean(1))
        means.append(resampled_means(accuracies, name))
        report["benchmarks"][name] = {
            model: interval(values[-1][i], means[-1][:, i], n=accuracies.shape[1]) for i, model in enumerate(names)
        }
    value, mean = np.mean(values, axis=0), np.mean(means, axis=0)  # (models,), (resamples, models)
    for i, model in enumerate(names):
        report["mean"][model] = interval(value[i], mean[:, i], n=len(shared))
        if i > 0:
            difference = interval(value[i] - value[i - 1], mean[:, i] - mean[:, i - 1])
            report["differences"].append(dict(model=model, minus=names[i - 1], **difference))
    return report


def compare(args):
    names = args.names or [os.path.basename(os.path.normpath(out)) for out in args.compare]
    if len(set(names)) != len(args.compare) or len(names) != len(args.compare):
        refuse(f"--names: {len(args.compare)} different names are needed, not {' '.join(names)}")
    models = {name: read_accuracies(out) for name, out in zip(names, args.compare)}
    try:
        report = compare_models(models)
    except ValueError as error:
        refuse(f"--compare: {error}")
    if not report["benchmarks"]:
        refuse("--compare: the folders have no benchmark in common")

    cell = lambda cell: f"{100 * cell['value']:5.1f} [{100 * cell['low']:5.1f}, {100 * cell['high']:5.1f}]"  # noqa: E731
    last = f"mean over {len(report['benchmarks'])} benchmarks"
    width = max(map(len, [last, *report["benchmarks"]]))
    print(f"{'accuracy in percent [95% interval]':{width + 8}}" + "".join(f"  {name[:20]:>20}" for name in names))
    for name, row in report["benchmarks"].items():
        print(f"{name:{width}}  {row[names[0]]['n']:>6}" + "".join(f"  {cell(row[model]):>20}" for model in names))
    print(f"{last:{width}}  {'':6}" + "".join(f"  {cell(report['mean'][model]):>20}" for model in names))
    for row in report["differences"]:
        sign = "above" if row["low"] > 0 else "below" if row["high"] < 0 else "no clear difference"
        numbers = f"{100 * row['value']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
        print(f"{row['model']} - {row['minus']}: {numbers} points, paired over the records: {sign}")
    if report["left_out"]:
        print(f"left out, since not all models have them: {', '.join(report['left_out'])}")
    if args.out:
        write_whole(args.out, json.dumps(report, indent=1))


# fmt: off
def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("what")
    group.add_argument("--model", help="Hugging Face folder or hub id of a Qwen3-VL")
    group.add_argument("--data", nargs="+", help="record files with answers, one per benchmark")
    group.add_argument("--media-root", help="folder of the media paths (default: each file's own folder)")
    group.add_argument("--prompts", help="JSON file that replaces the instructions of data.py")
    group.add_argument("--out", help="folder for the outputs, the same command goes on there; with --compare a JSON file")
    group.add_argument("--max-response-tokens", type=int, default=8192, help="per answer (%(default)s)")
    group = parser.add_argument_group("comparison")
    group.add_argument("--compare", nargs="+", metavar="DIR", help="--out folders of models to put side by side, in order")
    group.add_argument("--names", nargs="+", help="what to call them (default: the folders' names)")
    group = parser.add_argument_group("machine")
    group.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="compute (%(default)s)")
    group.add_argument("--workers", type=int, default=4, help="decoding processes per rank (%(default)s)")
    group.add_argument("--prompts-per-chunk", type=int, default=256, help="prompts per rank between two writes (%(default)s)")
    group.add_argument("--grade-seconds", type=float, default=10.0, help="an answer that takes longer to grade counts 0 (%(default)s)")
    group.add_argument("--max-bad-share", type=float, default=0.05, help="largest share of missing media in a file (%(default)s)")
    if not any(word.startswith("--compare") for word in sys.argv):
        # Brings torch, which a comparison need not wait for. 128 frames of 256 tokens per pair are 16,384 tokens and the text.
        from data import add_limits

        add_limits(parser, image_max_pixels=1024 * 32 * 32, frame_max_pixels=256 * 32 * 32, max_prompt_tokens=20480)
    return parser.parse_args()
# fmt: on


if __name__ == "__main__":
    args = parse_args()
    compare(args) if args.compare else evaluate(args)
