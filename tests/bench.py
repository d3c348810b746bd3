"""How fast: each figure beside the usual way of doing the same, both measured in one run on the same input.

    python tests/bench.py video      # from a film to patches: against decoding it whole, and transformers' processor
    python tests/bench.py rewards    # gradings per second on one core, against what json.loads alone would take
    python tests/bench.py forward    # the update of a group of 8: its prompt once, against once per response, and padded rows
    python tests/bench.py logps      # log-probabilities a chunk of logits at a time, against all logits
    python tests/bench.py sampling   # responses generated per response trained, against the released loop (a simulation)
    python tests/bench.py step       # one RL step of the toy, phase by phase

Seconds are of CPU time, those of `step` and on a GPU of the clock. --json FILE keeps the table with the machine and the versions.
"""

import argparse
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
from soak import launch, make_toy
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

import data
import rewards
import rl_ema_grpo
import sft


def seconds_of(function, *args):
    """CPU seconds of one call, those of all its threads together, and what it returned. A busy machine changes them little."""
    start = time.process_time()
    result = function(*args)
    return time.process_time() - start, result


def write_film(path, minutes, fps=25, width=640, height=360):
    """A film of moving shapes and noise with a key frame every 10 s: one minute is drawn and encoded, then repeated."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    with av.open(str(path), "w") as container:
        options = {"preset": "veryfast", "g": str(10 * fps), "crf": "23"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        packets = []
        for i in range(60 * fps):
            wave = 128 + 60 * np.sin(x / 40 + i / 9) + 40 * np.cos(y / 25 - i / 17)
            picture = np.stack([wave, wave[::-1], np.full_like(wave, 2 * i % 256)], 2)
            picture[:: 1 + i % 3] += rng.integers(-8, 8, (1, width, 1))
            frame = av.VideoFrame.from_ndarray(
                picture.clip(0, 255).astype(np.uint8), format="rgb24"
            )
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


def whole_film(path, indices):
    """The usual decoding: every frame in turn; the chosen ones are kept at full size. uint8 (T, H, W, 3)."""
    chosen, frames = set(indices), {}
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        for i, frame in enumerate(container.decode(video=0)):
            if i in chosen:
                frames[i] = frame.to_ndarray(format="rgb24")
    return np.stack([frames[i] for i in indices])


def library_patches(processor, frames, limits):
    """transformers' own resizing and patching of given frames. float32 (P, 1536), and the grid."""
    size = {
        "shortest_edge": limits.frame_min_pixels,
        "longest_edge": limits.frame_max_pixels * len(frames),
    }
    videos = [torch.from_numpy(frames).permute(0, 3, 1, 2)]
    made = processor(videos=videos, size=size, do_sample_frames=False, return_tensors="pt")
    return made["pixel_values_videos"], tuple(made["video_grid_thw"][0].tolist())


def video(args):
    """Rows of the table: sparse sampling of a long film, dense sampling of a clip, and the cache."""
    from transformers import Qwen3VLVideoProcessor

    processor = Qwen3VLVideoProcessor(
        image_mean=[0.5] * 3, image_std=[0.5] * 3, cap_pixels_per_frame=False
    )
    limits, rows = data.Limits(), []
    bounds = limits.fps, limits.max_frames, limits.frame_min_pixels, limits.frame_max_pixels
    with tempfile.TemporaryDirectory() as folder:
        for name, minutes in ((f"{args.minutes} min film", args.minutes), ("1 min clip", 1)):
            path = os.path.join(folder, f"{minutes}.mp4")
            write_film(path, minutes)
            read, film = seconds_of(data.read_video, path, *bounds)
            cut, (patches, grid) = seconds_of(data.patchify, film.frames)
            decode, frames = seconds_of(whole_film, path, film.indices)
            process, (expected, expected_grid) = seconds_of(
                library_patches, processor, frames, limits
            )
            assert grid == expected_grid, (grid, expected_grid)
            levels = np.abs(patches.astype(np.float32) - (expected.numpy() * 0.5 + 0.5) * 255)
            assert levels.mean() < 2, "the two sides do not show the same frames"
            count = len(film.indices)
            what = f"{name}, {count} of {film.total} frames"
            rows.append(
                (
                    what + ": film to patches, frames/CPU s",
                    count / (read + cut),
                    count / (decode + process),
                )
            )
            rows.append((what + ": film to pixels, frames/CPU s", count / read, count / decode))
            print(
                f"{what}: mean difference {levels.mean():.2f} of 255 levels, {(levels > 16).mean():.2%} over 16"
            )
            kept = data.Limits(cache=os.path.join(folder, "cache"))
            data.cached(kept, data.read_video, path, *bounds, None)
            again, _ = seconds_of(data.cached, kept, data.read_video, path, *bounds, None)
            rows.append(
                (
                    what + ": from --cache, against reading anew, frames/CPU s",
                    count / again,
                    count / read,
                )
            )
    return ["", "ours", "usual", "ratio"], [
        (what, ours, usual, ours / usual) for what, ours, usual in rows
    ]


def grade(pairs):
    return [rewards.score(*pair) for pair in pairs]


def parse(answers):
    return [json.loads(answer) for answer in answers]


def rewards_(args):
    """Rows of the table: gradings per second of each task whose answer is JSON, against the aim and bare json.loads."""
    rng = random.Random(0)
    box = lambda: [
        rng.randrange(500),
        rng.randrange(500),
        500 + rng.randrange(500),
        500 + rng.randrange(500),
    ]
    points = lambda: [[rng.randrange(1000), rng.randrange(1000)] for _ in range(3)]
    mask = lambda: dict(boxes=box(), positive_points=points(), negative_points=points())
    tasks = {
        "temporal grounding": ("video", 20_000, lambda: dict(time=[rng.random() * 9, 9 + rng.random() * 9])),
        "spatial grounding": ("image", 20_000, lambda: dict(boxes=box())),
        "spatial-temporal grounding, 8 boxes": (
            "video", 20_000, lambda: dict(time=[rng.random(), 7 + rng.random()], boxes={str(k): box() for k in range(8)}),
        ),
        "segmentation, image": ("image", 20_000, mask),
        "segmentation, video": ("video", 20_000, lambda: dict(time=rng.random() * 9, **mask())),
        "tracking, 32 boxes": ("video", 12_000, lambda: dict(boxes={str(k): box() for k in range(1, 33)})),
    }  # fmt: skip
    rows = []
    for name, (medium, aim, some) in tasks.items():
        pairs, answers = [], []
        for _ in range(args.responses // 8):
            record = dict(
                problem_type=name.split(",")[0], data_type=medium, answer=json.dumps(some())
            )
            answers += (group := [json.dumps(some()) for _ in range(8)])
            pairs += [
                (record, f"<think>{'It moves. ' * 40}</think><answer>{answer}</answer>")
                for answer in group
            ]
        graded = [seconds_of(grade, pairs) for _ in range(args.rounds)]
        taken, scores = min(seconds for seconds, _ in graded), graded[0][1]
        bare = min(seconds_of(parse, answers)[0] for _ in range(args.rounds))
        assert all(score.structure == 0.5 for score in scores) and any(
            score.accuracy > 0 for score in scores
        )
        rows.append((name, len(pairs) / taken, aim, len(pairs) / taken / aim, len(pairs) / bare))
    return ["gradings per second, one core", "ours", "aim", "ratio", "json.loads alone"], rows


def measured(function, *args):
    """work = function(*args) in a process of its own: the better of two seconds of work(), its memory in GB, its result."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(in_this_process, (function, args))


def in_this_process(function, args):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    work, seconds = function(*args), []
    sft.reset_peak_memory()
    before = sft.peak_memory_gb()
    result = work()  # warms up
    memory = sft.peak_memory_gb() - before
    for _ in range(2):
        start = clock()
        assert math.isclose(
            work(), result, rel_tol=1e-3
        )  # a number on the host: a GPU has finished
        seconds.append(clock() - start)
    return min(seconds), memory, result


def bench_model():
    """Layers of the 8B's shape on a GPU, of an eighth of its width on a CPU; random weights."""
    cuda = torch.cuda.is_available()
    width, layers, vocabulary = (4096, 8, 151_936) if cuda else (512, 2, 2000)
    heads = width // 128 if cuda else 8
    text = dict(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads // 4, head_dim=width // heads, vocab_size=vocabulary, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20] if cuda else [12, 10, 10], "mrope_interleaved": True},
    )  # fmt: skip
    vision = dict(
        depth=1, hidden_size=64, num_heads=2, out_hidden_size=width, deepstack_visual_indexes=[0]
    )
    config = Qwen3VLConfig(
        text_config=text, vision_config=vision, image_token_id=0, video_token_id=1
    )
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    model = Qwen3VLForConditionalGeneration(config).to(device, dtype).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, device


def bench_group(prompt, response):
    """A prompt of text and 8 responses, half to all of `response` tokens long, as sampling gives them."""
    rng = np.random.default_rng(0)
    responses = [
        rng.integers(2, 2000, n).tolist()
        for n in np.linspace(response // 2, response, 8).astype(int)
    ]
    empty = torch.zeros(0, 1536, dtype=torch.uint8), torch.zeros(0, 3, dtype=torch.int64)
    positions = np.broadcast_to(np.arange(prompt), (3, prompt)).copy()
    return sft.Group(
        data.Prompt({}, rng.integers(2, 2000, prompt).tolist(), positions, *empty, {}), responses
    )


def packed_update(prompt, response, share):
    """Forward and backward of a group: its prompt once, or once per response."""
    model, device = bench_model()
    model.set_attn_implementation({"text_config": "shared_prefix", "vision_config": "sdpa"})
    group = bench_group(prompt, response)
    groups = [group] if share else [sft.Group(group.prompt, [r]) for r in group.responses]

    def work():
        model.zero_grad()
        loss = sft.response_logps(model, sft.pack(groups, device)).mean()
        loss.backward()
        return loss.item()

    return work


def padded_update(prompt, response):
    """The usual route: a row per response, all padded to the longest, full logits of the response rows."""
    model, device = bench_model()
    group = bench_group(prompt, response)
    rows = torch.zeros(8, prompt + response, dtype=torch.int64, device=device)
    mask = torch.zeros_like(rows)
    for i, tokens in enumerate(group.responses):
        rows[i, : prompt + len(tokens)] = torch.tensor(group.prompt.token_ids + tokens)
        mask[i, : prompt + len(tokens)] = 1

    def work():
        model.zero_grad()
        logits = model(
            rows, attention_mask=mask, logits_to_keep=response + 1, use_cache=False
        ).logits[:, :-1]
        logps = logits.float().log_softmax(-1).gather(-1, rows[:, -response:, None])[..., 0]
        loss = (logps * mask[:, -response:]).sum() / mask[:, -response:].sum()
        loss.backward()
        return loss.item()

    return work


def forward(args):
    """Rows of the table: the update of one group of 8, its prompt computed once, once per response, or in padded rows."""
    rows = []
    for prompt, response in ((32, 32), (256, 32), (1024, 128), (4096, 256)):
        ours = measured(packed_update, prompt, response, True)
        apart, padded = (
            measured(packed_update, prompt, response, False),
            measured(padded_update, prompt, response),
        )
        assert math.isclose(ours[2], apart[2], rel_tol=1e-3) and math.isclose(
            ours[2], padded[2], rel_tol=1e-3
        )
        for name, i in (("seconds", 0), ("GB", 1)):
            row = (ours[i], apart[i], padded[i], apart[i] / ours[i], padded[i] / ours[i])
            rows.append((f"{prompt}/{response}, {name}", *row))
    return [
        "prompt/response of a group of 8",
        "ours",
        "not shared",
        "padded",
        "not shared/ours",
        "padded/ours",
    ], rows


def logps_update(rows, vocabulary, width, chunk):
    device, dtype = (
        ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    )
    hidden = torch.randn(rows, width, device=device, dtype=dtype, requires_grad=True)
    weight = (
        torch.randn(vocabulary, width, device=device, dtype=dtype).div_(width**0.5).requires_grad_()
    )
    targets = torch.randint(0, vocabulary, (rows,), device=device)

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
    """Rows of the table: log-probabilities forward and backward, a chunk of logits at a time and all at once. The gradient of
    the head, which both sides need, is taken off the memory."""
    size, width = (8192, 4096) if torch.cuda.is_available() else (2048, 256)
    head = 151_936 * width * (2 if torch.cuda.is_available() else 4) / 1e9
    full = measured(logps_update, size, 151_936, width, 0)
    rows = []
    for chunk in (size // 4, size // 8, size // 16):
        ours = measured(logps_update, size, 151_936, width, chunk)
        rows.append(
            (f"{size} rows, {chunk} at a time, seconds", ours[0], full[0], ours[0] / full[0])
        )
        gb, full_gb = ours[1] - head, full[1] - head
        rows.append((f"{size} rows, {chunk} at a time, GB", gb, full_gb, gb / full_gb))
    return ["vocabulary 151,936", "ours", "full logits", "ours/full"], rows


def sampling(args):
    """Rows of the table: responses generated per response trained, by the share of prompts that teach: ours against rounds of fixed size whose
    surplus is thrown away, as released. 128 prompts a step, 8 ranks, 200 steps, simulated."""
    rows = []
    for share in (0.9, 0.7, 0.5, 0.3):
        rng, rate, ours, theirs = np.random.default_rng(0), 1.0, [0, 0], [0, 0]
        for _ in range(200):
            kept = 0
            while kept < 128:
                size = rl_ema_grpo.round_size(128 - kept, rate, 128, 32)
                new = int(rng.binomial(size, share))
                kept, ours[0], rate = kept + new, ours[0] + size, 0.5 * rate + 0.5 * new / size
            ours[1] += kept  # all of them
            kept = 0
            while kept < 128:
                theirs[0] += 128
                kept += int(rng.binomial(128, share))
            theirs[1] += 128
        ours, theirs = ours[0] / ours[1], theirs[0] / theirs[1]
        rows.append((f"{share:.0%} of the prompts teach", ours, theirs, theirs / ours))
    return ["responses generated per response trained", "ours", "released", "released/ours"], rows


def step(args):
    """Rows of the table: a whole RL step of the toy on two ranks, phase by phase, medians of steps 3 to 8. Its untrained model writes to the limit,
    and rewards are made from the tokens (doomed.py), so that all groups are trained."""
    settings = "--steps 8 --prompts-per-step 32 --rollouts-per-prompt 8 --max-response-tokens 64 --save-every 4 --grade-seconds 10"
    with tempfile.TemporaryDirectory() as folder:
        make_toy(folder)
        if launch(folder, f"{folder}/rl", settings).wait():
            sys.exit(Path(f"{folder}/rl.log").read_text()[-3000:])
        steps = [
            json.loads(line)
            for line in Path(f"{folder}/rl/metrics.jsonl").read_text().splitlines()[2:]
        ]
    whole = float(np.median([row["seconds/step"] for row in steps]))
    rows = []
    for name in ("sync", "data", "generate", "wait", "grade", "old_logps", "update", "save"):
        seconds = float(np.median([row.get(f"seconds/{name}", 0.0) for row in steps]))
        memory = max(row.get(f"gb/{name}", 0.0) for row in steps)
        rows.append((name, seconds, seconds / whole, memory))
    rows.append(("step", whole, 1.0, max(row["gb"] for row in steps)))
    return ["phase", "seconds", "share", "peak GB"], rows


# fmt: off
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("video", help=video.__doc__)
    sub.add_argument("--minutes", type=int, default=60, help="length of the film (%(default)s)")
    sub = commands.add_parser("rewards", help=rewards_.__doc__)
    sub.add_argument("--responses", type=int, default=8_000, help="per task (%(default)s)")
    sub.add_argument("--rounds", type=int, default=5, help="of which the best counts (%(default)s)")
    for function in (forward, logps, sampling, step):
        commands.add_parser(function.__name__, help=function.__doc__)
    for sub in commands.choices.values():
        sub.add_argument("--json", help="file for the table")
    args = parser.parse_args()
# fmt: on
    torch.set_num_threads(1)
    names, rows = dict(video=video, rewards=rewards_, forward=forward, logps=logps, sampling=sampling, step=step)[args.command](args)
    packages = ("torch", "transformers", "av", "pillow", "numpy")
    machine = dict(machine=platform.processor() or platform.machine(), cores=os.cpu_count(), python=platform.python_version())
    machine |= {name: version(name) for name in packages}
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    width = max(len(row[0]) for row in [names, *rows])
    print(f"{names[0]:<{width}}" + "".join(f"{name:>18}" for name in names[1:]))
    for row in rows:
        print(f"{row[0]:<{width}}" + "".join(f"{value:>18,.4g}" if value < 100 else f"{value:>18,.0f}" for value in row[1:]))
    if args.json:
        Path(args.json).write_text(json.dumps(dict(machine, columns=names, rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
