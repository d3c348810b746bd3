"""How fast: each figure beside the usual way of doing the same, both measured in one run on the same input.

    python tests/bench.py video      # from a film to patches: against decoding it whole, and transformers' processor
    python tests/bench.py rewards    # gradings per second on one core, against what json.loads alone would take

Seconds are of CPU time. --json FILE keeps the table with the machine and the versions.
"""

import argparse
import json
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

import cpu_compat  # noqa: E402, F401

# isort: split
import av  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
import rewards  # noqa: E402


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
        stream = container.add_stream(
            "libx264", rate=fps, options={"preset": "veryfast", "g": str(10 * fps), "crf": "23"}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        packets = []
        for i in range(60 * fps):
            wave = 128 + 60 * np.sin(x / 40 + i / 9) + 40 * np.cos(y / 25 - i / 17)
            picture = np.stack([wave, wave[::-1], np.full_like(wave, 2 * i % 256)], 2)
            picture[:: 1 + i % 3] += rng.integers(-8, 8, (1, width, 1))
            frame = av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), format="rgb24")
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
    size = {"shortest_edge": limits.frame_min_pixels, "longest_edge": limits.frame_max_pixels * len(frames)}
    videos = [torch.from_numpy(frames).permute(0, 3, 1, 2)]
    made = processor(videos=videos, size=size, do_sample_frames=False, return_tensors="pt")
    return made["pixel_values_videos"], tuple(made["video_grid_thw"][0].tolist())


def video(args):
    """Rows of the table: sparse sampling of a long film, dense sampling of a clip, and the cache."""
    from transformers import Qwen3VLVideoProcessor

    processor = Qwen3VLVideoProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3, cap_pixels_per_frame=False)
    limits, rows = data.Limits(), []
    bounds = limits.fps, limits.max_frames, limits.frame_min_pixels, limits.frame_max_pixels
    with tempfile.TemporaryDirectory() as folder:
        for name, minutes in ((f"{args.minutes} min film", args.minutes), ("1 min clip", 1)):
            path = os.path.join(folder, f"{minutes}.mp4")
            write_film(path, minutes)
            read, film = seconds_of(data.read_video, path, *bounds)
            cut, (patches, grid) = seconds_of(data.patchify, film.frames)
            decode, frames = seconds_of(whole_film, path, film.indices)
            process, (expected, expected_grid) = seconds_of(library_patches, processor, frames, limits)
            assert grid == expected_grid, (grid, expected_grid)
            levels = np.abs(patches.astype(np.float32) - (expected.numpy() * 0.5 + 0.5) * 255)
            assert levels.mean() < 2, "the two sides do not show the same frames"
            count = len(film.indices)
            what = f"{name}, {count} of {film.total} frames"
            rows.append((what + ": film to patches, frames/CPU s", count / (read + cut), count / (decode + process)))
            rows.append((what + ": film to pixels, frames/CPU s", count / read, count / decode))
            print(f"{what}: mean difference {levels.mean():.2f} of 255 levels, {(levels > 16).mean():.2%} over 16")
            kept = data.Limits(cache=os.path.join(folder, "cache"))
            data.cached(kept, data.read_video, path, *bounds, None)
            again, _ = seconds_of(data.cached, kept, data.read_video, path, *bounds, None)
            rows.append((what + ": from --cache, against reading anew, frames/CPU s", count / again, count / read))
    return ["", "ours", "usual", "ratio"], [(what, ours, usual, ours / usual) for what, ours, usual in rows]


def grade(pairs):
    return [rewards.score(*pair) for pair in pairs]


def parse(answers):
    return [json.loads(answer) for answer in answers]


def rewards_(args):
    """Rows of the table: gradings per second of each task whose answer is JSON, against the aim and bare json.loads."""
    rng = random.Random(0)
    box = lambda: [rng.randrange(500), rng.randrange(500), 500 + rng.randrange(500), 500 + rng.randrange(500)]  # noqa: E731
    points = lambda: [[rng.randrange(1000), rng.randrange(1000)] for _ in range(3)]  # noqa: E731
    mask = lambda: dict(boxes=box(), positive_points=points(), negative_points=points())  # noqa: E731
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
            record = dict(problem_type=name.split(",")[0], data_type=medium, answer=json.dumps(some()))
            answers += (group := [json.dumps(some()) for _ in range(8)])
            pairs += [(record, f"<think>{'It moves. ' * 40}</think><answer>{answer}</answer>") for answer in group]
        graded = [seconds_of(grade, pairs) for _ in range(args.rounds)]
        taken, scores = min(seconds for seconds, _ in graded), graded[0][1]
        bare = min(seconds_of(parse, answers)[0] for _ in range(args.rounds))
        assert all(score.structure == 0.5 for score in scores) and any(score.accuracy > 0 for score in scores)
        rows.append((name, len(pairs) / taken, aim, len(pairs) / taken / aim, len(pairs) / bare))
    return ["gradings per second, one core", "ours", "aim", "ratio", "json.loads alone"], rows


# fmt: off
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("video", help=video.__doc__)
    sub.add_argument("--minutes", type=int, default=60, help="length of the film (%(default)s)")
    sub = commands.add_parser("rewards", help=rewards_.__doc__)
    sub.add_argument("--responses", type=int, default=8_000, help="per task (%(default)s)")
    sub.add_argument("--rounds", type=int, default=5, help="of which the best counts (%(default)s)")
    for sub in commands.choices.values():
        sub.add_argument("--json", help="file for the table")
    args = parser.parse_args()
# fmt: on
    torch.set_num_threads(1)
    names, rows = dict(video=video, rewards=rewards_)[args.command](args)
    packages = ("torch", "transformers", "av", "pillow", "numpy")
    machine = dict(machine=platform.processor() or platform.machine(), cores=os.cpu_count(), python=platform.python_version())
    machine |= {name: version(name) for name in packages}
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    width = max(len(row[0]) for row in [names, *rows])
    print(f"{names[0]:<{width}}" + "".join(f"{name:>18}" for name in names[1:]))
    for row in rows:
        print(f"{row[0]:<{width}}" + "".join(f"{value:>18,.1f}" for value in row[1:]))
    if args.json:
        Path(args.json).write_text(json.dumps(dict(machine, columns=names, rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
