"""How fast: each figure beside another way of doing the same, both measured in one run on the same input.

    python tests/bench.py video      # file to patches: against decoding all, and transformers' processor
    python tests/bench.py rewards    # gradings per second on one core, against what json.loads alone would take
    python tests/bench.py forward    # the update: prompts computed once, against once per response, and padded rows
    python tests/bench.py logps      # log-probabilities a chunk of logits at a time, against all logits
    python tests/bench.py step RUN   # where the time of an RL run went, phase by phase, from its metrics.jsonl

Seconds are of CPU time, on a GPU of the clock. --json FILE keeps the table with the machine and
the versions. The comparison with TRL is peer.py, the checks of a GPU are gpu.py; gpu.py takes the
FLOP formulas and the memory counters from here.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import platform
import random
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import cpu_compat  # noqa: F401

import av
import numpy as np
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

import data
import rewards
import sft

# --------------------------------------------------------------------------------------------------
# FLOPs and memory

# bfloat16, dense; the first name that is part of the device's counts
PEAK_TFLOPS = {"B200": 2250, "H100 PCIe": 756, "H100": 989, "H200": 989, "H800": 989}
PEAK_TFLOPS |= {"A100": 312, "A800": 312}


def attended_pairs(queries, keys):
    """Query-key pairs of a causal sequence whose last `queries` tokens are computed, out of `keys`.

    >>> attended_pairs(6, 6), attended_pairs(2, 6)  # 1 + 2 + 3 + 4 + 5 + 6, 5 + 6
    (21, 11)
    """
    return queries * keys - queries * (queries - 1) // 2


def count_parameters(module):
    return sum(param.numel() for param in module.parameters())


def training_flops(model, batch, recompute):
    """FLOPs that forward and backward of a packed batch execute.

    2 per weight and row that meets it, 4 * width per query-key pair and layer. The backward pass
    costs two forwards, recomputation a third, and the head always recomputes.
    """
    text, vision = model.config.text_config, model.config.vision_config
    visual, language = model.model.visual, model.model.language_model
    queries, keys = (ends.diff().tolist() for ends in batch["plan"][1:3])
    pairs = sum(map(attended_pairs, queries, keys))
    body = 2 * count_parameters(language.layers) * len(batch["ids"])
    body += 4 * text.num_attention_heads * text.head_dim * text.num_hidden_layers * pairs
    grids = batch["grids"].tolist()
    frames = [height * width for time, height, width in grids for _ in range(time)]  # patches
    blocks = count_parameters(visual.blocks)
    body += 2 * blocks * sum(frames) + 2 * (count_parameters(visual) - blocks) * sum(frames) // 4
    body += 4 * vision.hidden_size * vision.depth * sum(patches**2 for patches in frames)
    head = 2 * model.lm_head.weight.numel() * len(batch["rows"])
    return (4 if recompute else 3) * body + 4 * head


def reset_peak_memory():
    """From here on `peak_memory_gb` counts anew."""
    if torch.cuda.is_available():
        return torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # some sandboxes have no such file
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gb():
    """Largest memory since `reset_peak_memory`: of the GPU by PyTorch, or of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1e6


def seconds_of(function, *args):
    """CPU seconds of one call, all threads, and what it returned. A busy machine changes them little."""
    start = time.process_time()
    result = function(*args)
    return time.process_time() - start, result


def measured(function, *args):
    """In a process of its own, work = function(*args): the better of two seconds of work(), its
    memory in GB, what it returned."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(in_this_process, (function, args))


def in_this_process(function, args):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    work, seconds = function(*args), []
    reset_peak_memory()
    before = peak_memory_gb()
    result = work()  # warms up
    memory = peak_memory_gb() - before
    for _ in range(2):
        start = clock()
        again = work()  # a number on the host: a GPU has finished
        seconds.append(clock() - start)
        assert math.isclose(again, result, rel_tol=1e-3)
    return min(seconds), memory, result


# --------------------------------------------------------------------------------------------------
# Video and rewards


def write_video(path, minutes, fps=25, width=640, height=360):
    """Moving shapes, noise, a key frame every 10 s: one minute is encoded, then repeated."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    with av.open(str(path), "w") as container:
        options = {"preset": "veryfast", "g": str(10 * fps), "crf": "23"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        packets = []
        for i in range(60 * fps):
            wave = 128 + 60 * np.sin(x / 40 + i / 9) + 40 * np.cos(y / 25 - i / 17)
            image = np.stack([wave, wave[::-1], np.full_like(wave, 2 * i % 256)], 2)
            image[:: 1 + i % 3] += rng.integers(-8, 8, (1, width, 1))
            pixels = image.clip(0, 255).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = i
            packets += stream.encode(frame)
        packets += stream.encode()
        kept = [(bytes(p), p.pts, p.dts, p.is_keyframe) for p in packets]
        time_base, length = packets[0].time_base, round(60 / packets[0].time_base)
        for minute in range(minutes):
            for content, pts, dts, is_key in kept:
                packet = av.Packet(content)
                packet.stream, packet.time_base, packet.is_keyframe = stream, time_base, is_key
                packet.pts, packet.dts = pts + minute * length, dts + minute * length
                container.mux(packet)


def decode_whole(path, indices):
    """The usual way: every frame in turn, the chosen ones kept. uint8 (T, H, W, 3)."""
    chosen, frames = set(indices), {}
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        for i, frame in enumerate(container.decode(video=0)):
            if i in chosen:
                frames[i] = frame.to_ndarray(format="rgb24")
    return np.stack([frames[i] for i in indices])


def library_patches(processor, frames, limits):
    """transformers' own resizing and patching of given frames. float32 (P, 1536), and the grid."""
    most = limits.frame_max_pixels * len(frames)
    size = dict(shortest_edge=limits.frame_min_pixels, longest_edge=most)
    videos = [torch.from_numpy(frames).permute(0, 3, 1, 2)]
    made = processor(videos=videos, size=size, do_sample_frames=False, return_tensors="pt")
    return made["pixel_values_videos"], tuple(made["video_grid_thw"][0].tolist())


def video(args):
    """Rows of the table: sparse sampling of a long video, dense sampling of a short one."""
    from transformers import Qwen3VLVideoProcessor

    normalisation = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor = Qwen3VLVideoProcessor(**normalisation, cap_pixels_per_frame=False)
    limits, rows = data.Limits(), []
    bounds = limits.fps, limits.max_frames, limits.frame_min_pixels, limits.frame_max_pixels
    with tempfile.TemporaryDirectory() as folder:
        for minutes in (args.minutes, 1):
            path = os.path.join(folder, f"{minutes}.mp4")
            write_video(path, minutes)
            read, seen = seconds_of(data.read_video, path, *bounds)
            cut, (patches, grid) = seconds_of(data.patchify, seen.frames)
            decode, frames = seconds_of(decode_whole, path, seen.indices)
            process, expected = seconds_of(library_patches, processor, frames, limits)
            assert grid == expected[1], (grid, expected[1])
            levels = np.abs(patches.astype(np.float32) - (expected[0].numpy() + 1) * 127.5)
            assert levels.mean() < 2, "the two sides do not show the same frames"
            count = len(seen.indices)
            what = f"{minutes} min, {count} of {seen.total} frames"
            print(f"{what}: on average {levels.mean():.2f} of 255 levels apart")
            for goal, ours, usual in (
                ("patches", count / (read + cut), count / (decode + process)),
                ("pixels", count / read, count / decode),
            ):
                rows.append((f"{what}: to {goal}, frames/CPU s", ours, usual, ours / usual))
    return ["", "ours", "usual", "ratio"], rows


def grade(pairs):
    return [rewards.score(*pair) for pair in pairs]


def parse(answers):
    return [json.loads(answer) for answer in answers]


def rewards_(args):
    """Rows of the table: gradings per second of each JSON task, and of bare json.loads."""
    rng = random.Random(0)
    corner = lambda least: rng.randrange(least, least + 500)
    box = lambda: [corner(0), corner(0), corner(500), corner(500)]
    points = lambda: [[rng.randrange(1000), rng.randrange(1000)] for _ in range(3)]
    mask = lambda: dict(boxes=box(), positive_points=points(), negative_points=points())
    span = lambda: [rng.random() * 9, 9 + rng.random() * 9]
    short = lambda: [rng.random(), 7 + rng.random()]
    boxes = lambda first, last: {str(k): box() for k in range(first, last + 1)}
    tasks = {
        "temporal grounding": ("video", lambda: dict(time=span())),
        "spatial grounding": ("image", lambda: dict(boxes=box())),
        "spatial-temporal grounding, 8 boxes": ("video", lambda: dict(time=short(), boxes=boxes(0, 7))),
        "segmentation, image": ("image", mask),
        "segmentation, video": ("video", lambda: dict(time=rng.random() * 9, **mask())),
        "tracking, 32 boxes": ("video", lambda: dict(boxes=boxes(1, 32))),
    }  # fmt: skip
    rows = []
    for name, (medium, some) in tasks.items():
        pairs, answers = [], []
        for i in range(args.responses):
            if i % 8 == 0:  # a group of 8 responses to one record
                record = dict(problem_type=name.split(",")[0], data_type=medium)
                record["answer"] = json.dumps(some())
            answers.append(json.dumps(some()))
            response = f"<think>{'It moves. ' * 40}</think><answer>{answers[-1]}</answer>"
            pairs.append((record, response))
        scores = grade(pairs)
        assert all(score.structure == 0.5 for score in scores)
        assert any(score.accuracy > 0 for score in scores)
        graded = min(seconds_of(grade, pairs)[0] for _ in range(args.rounds))
        bare = min(seconds_of(parse, answers)[0] for _ in range(args.rounds))
        rows.append((name, len(pairs) / graded, len(pairs) / bare))
    return ["per second, one core", "gradings", "json.loads alone"], rows


# --------------------------------------------------------------------------------------------------
# The update


def bench_model():
    """Layers of the 8B's shape on a GPU, of an eighth of its width on a CPU; random weights."""
    cuda = torch.cuda.is_available()
    width, layers, vocabulary = (4096, 8, 151_936) if cuda else (512, 2, 2000)
    heads, section = (32, [24, 20, 20]) if cuda else (8, [12, 10, 10])
    rope = dict(rope_type="default", rope_theta=5e6, mrope_section=section, mrope_interleaved=True)
    text = dict(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads // 4, head_dim=width // heads, vocab_size=vocabulary, tie_word_embeddings=False,
        rope_parameters=rope,
    )  # fmt: skip
    vision = dict(
        depth=1, hidden_size=64, intermediate_size=256, num_heads=2, out_hidden_size=width
    )
    vision["deepstack_visual_indexes"] = [0]
    tokens = dict(image_token_id=0, video_token_id=1)
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **tokens)
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    model = Qwen3VLForConditionalGeneration(config).to(device, dtype).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, device


def bench_group(prompt, response):
    """A prompt of text and 8 responses, half to all of `response` tokens long, as sampling gives them."""
    rng = np.random.default_rng(0)
    lengths = np.linspace(response // 2, response, 8).astype(int)
    responses = [rng.integers(2, 2000, n).tolist() for n in lengths]
    no_media = torch.zeros(0, 1536, dtype=torch.uint8), torch.zeros(0, 3, dtype=torch.int64)
    positions = np.broadcast_to(np.arange(prompt), (3, prompt)).copy()
    ids = rng.integers(2, 2000, prompt).tolist()
    return sft.Group(data.Prompt({}, ids, positions, *no_media, {}), responses)


def packed_update(prompt, response, copies, share=True):
    """Forward and backward of `copies` groups in one micro-batch; without `share` each response of
    one group brings its own prompt."""
    model, device = bench_model()
    model.set_attn_implementation({"text_config": "shared_prefix", "vision_config": "sdpa"})
    group = bench_group(prompt, response)
    if not share:
        groups = [sft.Group(group.prompt, [tokens]) for tokens in group.responses]
    else:
        groups = [group] * copies

    def work():
        model.zero_grad()
        loss = sft.response_logps(model, sft.pack(groups, device)).mean()
        loss.backward()
        return loss.item()

    return work


def padded_update(prompt, response):
    """A row per response, padded to the longest; the logits of all response rows at once."""
    model, device = bench_model()
    group = bench_group(prompt, response)
    rows = torch.zeros(8, prompt + response, dtype=torch.int64, device=device)
    mask = torch.zeros_like(rows)
    for i, tokens in enumerate(group.responses):
        rows[i, : prompt + len(tokens)] = torch.tensor(group.prompt.token_ids + tokens)
        mask[i, : prompt + len(tokens)] = 1
    settings = dict(attention_mask=mask, logits_to_keep=response + 1, use_cache=False)

    def work():
        model.zero_grad()
        logits = model(rows, **settings).logits[:, :-1]
        logps = logits.float().log_softmax(-1).gather(-1, rows[:, -response:, None])[..., 0]
        loss = (logps * mask[:, -response:]).sum() / mask[:, -response:].sum()
        loss.backward()
        return loss.item()

    return work


def forward(args):
    """Rows of the table: the update of groups of 8. Ours: one group a micro-batch, and 16,384 tokens,
    the default; a group with its prompt once per response; padded rows with full logits (not what
    TRL does today: see peer.py). Seconds are per group, GB of the whole micro-batch."""
    rows = []
    for prompt, response in ((256, 32), (1024, 128), (4096, 256)):
        tokens = prompt + sum(map(len, bench_group(prompt, response).responses))
        copies = 16_384 // tokens
        sides = [
            measured(packed_update, prompt, response, 1),
            measured(packed_update, prompt, response, copies),
            measured(packed_update, prompt, response, 1, False),
            measured(padded_update, prompt, response),
        ]
        assert all(math.isclose(loss, sides[0][2], rel_tol=1e-3) for *_, loss in sides)
        seconds = [side[0] for side in sides]
        seconds[1] /= copies
        ratios = seconds[2] / seconds[0], seconds[3] / seconds[0]
        rows.append((f"{prompt}/{response}, seconds", *seconds, *ratios))
        gb = [side[1] for side in sides]
        rows.append((f"{prompt}/{response}, GB", *gb, gb[2] / gb[0], gb[3] / gb[0]))
    names = "ours, a group|ours, 16k tokens|not shared|padded, logits|not shared/ours|padded/ours"
    return ["prompt/response of a group of 8", *names.split("|")], rows


def logps_update(rows, vocabulary, width, chunk):
    cuda = torch.cuda.is_available()
    kind = dict(device="cuda", dtype=torch.bfloat16) if cuda else dict(dtype=torch.float32)
    hidden = torch.randn(rows, width, **kind, requires_grad=True)
    weight = torch.randn(vocabulary, width, **kind).div_(width**0.5).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), device=hidden.device)

    def work():
        hidden.grad = weight.grad = None
        if chunk:
            total = sft.chunked_logps(hidden, weight, targets, chunk).sum()
        else:
            total = (hidden @ weight.T).float().log_softmax(-1).gather(-1, targets[:, None]).sum()
        total.backward()
        return total.item()

    return work


def logps(args):
    """Rows of the table: log-probabilities forward and backward, a chunk of logits at a time and all
    at once. The head's gradient, which both sides need, is taken off the memory."""
    size, width, number = (8192, 4096, 2) if torch.cuda.is_available() else (2048, 256, 4)
    head = 151_936 * width * number / 1e9  # GB
    full, rows = measured(logps_update, size, 151_936, width, 0), []
    for chunk in (size // 4, size // 8, size // 16):
        ours = measured(logps_update, size, 151_936, width, chunk)
        gb, full_gb = ours[1] - head, full[1] - head
        what = f"{size} rows, {chunk} at a time"
        rows.append((f"{what}, seconds", ours[0], full[0], ours[0] / full[0]))
        rows.append((f"{what}, GB", gb, full_gb, gb / full_gb))
    return ["vocabulary 151,936", "ours", "full logits", "ours/full"], rows


def step(args):
    """Rows of the table: seconds of each phase (median of the steps from the third on), most GB."""
    lines = Path(args.run, "metrics.jsonl").read_text().splitlines()[2:]
    steps = [json.loads(line) for line in lines]
    if not steps:
        sys.exit(f"{args.run}: three steps at least")
    names = {key.split("/")[1] for row in steps for key in row if key.startswith("seconds/")}
    median = lambda name: float(np.median([row.get(f"seconds/{name}", 0.0) for row in steps]))
    whole, rows = median("step"), []
    for name in sorted(names, key=median):
        memory = max(row.get("gb" if name == "step" else f"gb/{name}", 0.0) for row in steps)
        rows.append((name, median(name), median(name) / whole, memory))
    return ["phase", "seconds", "share", "peak GB"], rows


# fmt: off
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("video", help=video.__doc__)
    sub.add_argument("--minutes", type=int, default=60, help="length of the long video (%(default)s)")
    sub = commands.add_parser("rewards", help=rewards_.__doc__)
    sub.add_argument("--responses", type=int, default=8_000, help="per task (%(default)s)")
    sub.add_argument("--rounds", type=int, default=5, help="of which the best counts (%(default)s)")
    for function in (forward, logps, step):
        sub = commands.add_parser(function.__name__, help=function.__doc__)
    sub.add_argument("run", help="folder of an RL run")
    for sub in commands.choices.values():
        sub.add_argument("--json", help="file for the table")
    args = parser.parse_args()
# fmt: on
    torch.set_num_threads(1)
    functions = dict(video=video, rewards=rewards_, forward=forward, logps=logps, step=step)
    names, rows = functions[args.command](args)
    machine = dict(machine=platform.processor() or platform.machine(), cores=os.cpu_count())
    machine["python"] = platform.python_version()
    machine |= {name: version(name) for name in ("torch", "transformers", "av", "pillow", "numpy")}
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    width = max(len(row[0]) for row in [names, *rows])
    print(f"{names[0]:<{width}}" + "".join(f"{name:>18}" for name in names[1:]))
    for name, *values in rows:
        numbers = [f"{value:>18,.4g}" if value < 100 else f"{value:>18,.0f}" for value in values]
        print(f"{name:<{width}}" + "".join(numbers))
    if args.json:
        table = dict(machine, columns=names, rows=rows)
        Path(args.json).write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
