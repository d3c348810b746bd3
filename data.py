"""Records -> prompts -> model inputs: what the model sees, for training, rollouts and evaluation alike.

A record (one question about one image or video) becomes a `Prompt`: token ids with the vision tokens expanded, mRoPE
positions, uint8 patches for the vision tower, and the same pixels once more in the form that vLLM takes. Each medium is
decoded once, so trainer and vLLM cannot disagree about it. A prompt is never cut: what does not fit is skipped by name.

    python data.py runs/demo/toy/rl_train.json --model runs/demo/toy/model --peek 3     # what training will see

Where this departs from the release: timestamps are true for every video (theirs drift beyond max_frames / fps seconds);
prompts that are too long are skipped and counted (theirs lose vision tokens from the right); wording of the prompts.
"""

import argparse
import ctypes
import gc
import itertools
import json
import math
import os
import re
import signal
import struct
import sys
import textwrap
import types
from collections import Counter, namedtuple
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import av
import numpy as np
import torch
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageDraw, ImageFont, ImageOps

import rewards

PATCH, MERGE, TEMPORAL = (
    16,
    2,
    2,
)  # Qwen3-VL: pixels per patch, patches per token side, frames per patch
BANNED = [
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
]  # from answers: they claim pixels


def refuse(message):
    """Ends the script before anything heavy has started: one sentence, from one rank, and exit code 2."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{os.path.basename(sys.argv[0])}: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def new_parser(doc):
    """An argparse parser whose errors are one sentence, see `refuse`."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = refuse
    return parser


def at_least(least, kind=int):
    """An argparse type: a finite number that is not below `least`."""

    def read(text):
        value = kind(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least} on")
        return value

    read.__name__ = "number"  # argparse names it where `kind` refuses the text
    return read


def load_processor(path):
    """The processor of a Qwen3-VL folder or hub id (owner/name). Raises ValueError, one sentence, if there is none.

    The hub is asked only for what can be there: not for a path below a folder of this machine.
    """
    from transformers import AutoConfig, AutoProcessor

    owner, _, name = path.partition("/")
    if not os.path.isdir(path):
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) or os.path.isdir(owner):
            raise ValueError(f"{path}: no such folder, and no hub id of the form owner/name")
    try:
        found = AutoConfig.from_pretrained(path).model_type
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: no model: {str(error).strip().splitlines()[0]}") from error
    if found != "qwen3_vl":
        raise ValueError(
            f"{path}: model_type is {found!r}, expected 'qwen3_vl': only Qwen3-VL models are read"
        )
    try:
        processor = AutoProcessor.from_pretrained(path)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: no processor: {str(error).strip().splitlines()[0]}") from error
    if not hasattr(processor, "video_processor"):
        raise ValueError(f"{path}: a tokenizer, but no processor of images and videos")
    return processor


def one_matrix_patch_embedding(visual):
    """The vision tower's patch embedding as one matrix product, in place of a Conv3d that covers each patch exactly
    once: the same numbers up to rounding, the same weights and names, several times faster (on GPUs Conv3d is slow or
    fails in some versions of cuDNN)."""

    def forward(self, patches):
        weight = self.proj.weight.flatten(1)
        return torch.nn.functional.linear(patches.to(weight.dtype), weight, self.proj.bias)

    visual.patch_embed.forward = types.MethodType(forward, visual.patch_embed)


# ----------------------------------------------------------------------------------------------------------------------
# Prompts: one instruction per task. Coordinates are 0-1000 of the width and height, times are seconds.

THINK = "Think first, between <think> and </think>. Then write only the final answer between <answer> and </answer>"
MARKS = '"boxes": [120, 250, 480, 700], "positive_points": [[200, 300], [300, 400], [400, 600]], '
MARKS += '"negative_points": [[90, 240], [500, 260], [300, 750]]'
PROMPTS = {
    "multiple choice": f"{THINK}: the letter of the right option.",
    "numerical": f"{THINK}: one number.",
    "math": f"{THINK}: the result, in LaTeX if it is not a plain number.",
    "regression": f"{THINK}: your best estimate as one number.",
    "OCR": f"{THINK}: the text exactly as it is written.",
    "open-ended": f"{THINK}: a short text.",
    "temporal grounding": f'{THINK}: the start and the end in seconds, as JSON like {{"time": [12.3, 25.7]}}.',
    "spatial grounding": f"{THINK}: the box as JSON in coordinates from 0 to 1000, x1 and y1 top left, "
    'like {"boxes": [120, 250, 480, 700]}.',
    "spatial-temporal grounding": f"{THINK}: the start and the end in seconds, and for each whole second between "
    'them the box in coordinates from 0 to 1000, as JSON like {"time": [3.0, 4.6], '
    '"boxes": {"3": [120, 250, 480, 700], "4": [130, 250, 490, 700]}}.',
    "tracking": f"{THINK}: the box in coordinates from 0 to 1000 once a second, key 1 for the first frame, as JSON "
    'like {"boxes": {"1": [120, 250, 480, 700], "2": [130, 250, 490, 700]}}.',
    "segmentation-image": f"{THINK}: the box, three points on the object and three beside it, in coordinates from 0 "
    f"to 1000, as JSON like {{{MARKS}}}.",
    "segmentation-video": f"{THINK}: a second at which the object is well seen, and for that frame its box, three "
    f'points on the object and three beside it, in coordinates from 0 to 1000, as JSON like {{"time": 4.0, {MARKS}}}.',
}
PROBLEM_TYPES = [task for task in PROMPTS if not task.startswith("segmentation")] + ["segmentation"]
JSON_TYPES = PROBLEM_TYPES[PROBLEM_TYPES.index("temporal grounding") :]  # the answer is JSON


def task_of(record):
    """The key of a record's prompt and of its moving averages: problem_type, segmentation split by medium."""
    if record["problem_type"] == "segmentation":
        return f"segmentation-{'image' if record['data_type'] == 'image' else 'video'}"
    return record["problem_type"]


def render_problem(record, prompts=PROMPTS):
    """The user's turn: question, options, instruction. `<image>` and `<video>` still stand for the media."""
    options = "\nOptions:\n" + "\n".join(record["options"]) if record.get("options") else ""
    return f"{record['problem']}{options}\n{prompts[task_of(record)]}"


def load_prompts(path):
    """PROMPTS, or the table in a JSON file {task: instruction}, for a model that was trained with another wording."""
    if path is None:
        return PROMPTS
    with open(path, encoding="utf-8") as file:
        prompts = json.load(file)
    if not isinstance(prompts, dict) or not all(
        isinstance(prompts.get(task), str) for task in PROMPTS
    ):
        raise ValueError(
            f"{path}: expected an object with an instruction for each of {', '.join(PROMPTS)}"
        )
    return prompts


# ----------------------------------------------------------------------------------------------------------------------
# Records: the release's three forms (RL, SFT, evaluation), JSON list or JSONL, become one.

DATA_TYPES = ("image", "video", "video-image", "text")
ROLES = ("system", "user", "assistant")
_TRUTH = json.JSONDecoder(
    parse_constant=int
)  # int("NaN") raises: with NaN in the truth no response could be right


def load_records(path, media_root=None, max_bad_share=0.0):
    """Reads a JSON list or JSONL file of records into plain dicts of one form.

    Returns a list of dicts with the record's own fields and: problem_id (str), problem (text with one placeholder per
    medium), data_type, problem_type (None where an SFT record does not say), options (list), answer (str without tags,
    None for SFT), media ([{"type", "path"}], absolute paths), messages (SFT only), file and index (where it stood).
    Paths are relative to media_root, by default the file's folder, and must stay below it as written; where links lead
    is their owner's business. Raises ValueError naming file, record, field and value when a record is malformed.
    """
    root = os.path.abspath(media_root or os.path.dirname(os.path.abspath(path))).rstrip(os.sep)
    gc.disable()  # a million new objects and nothing to collect: the collector's rounds would take a third of the time
    try:
        return [
            normalise(raw, str(path), index, root) for index, raw in enumerate(read_values(path))
        ]
    finally:
        gc.enable()


def read_values(path):
    """The values of a JSON list, or of the lines of a JSONL file."""
    line, values = "", []
    try:
        with open(path, encoding="utf-8-sig") as file:  # with or without a byte order mark
            text = file.read()
        if text.lstrip().startswith("["):
            values = json.loads(text)
        else:
            for number, content in enumerate(
                text.split("\n"), 1
            ):  # other line ends may stand in a text
                line = f"line {number}: "
                values += [json.loads(content)] if content.strip() else []
    except (
        ValueError,
        RecursionError,
    ) as error:  # ValueError: no UTF-8, no JSON, or an integer of thousands of digits
        raise ValueError(f"{path}: {line}not JSON in UTF-8: {error}") from error
    if not values:
        raise ValueError(f"{path}: holds no records")
    return values


def normalise(raw, file, index, root):
    """One raw record -> the form that load_records describes."""

    def fail(field, expected):
        value = raw.get(field) if isinstance(raw, dict) else raw
        raise ValueError(
            f"{file}: record {index}: {field} is {str(value)[:80]!r}, expected {expected}"
        )

    if not isinstance(raw, dict):
        fail("record", "an object")
    for field, kind in dict(
        options=list, process=str, path=str, additional_path=str, fps=(int, float)
    ).items():
        if raw.get(field) and not isinstance(raw[field], kind):
            fail(field, "a list" if kind is list else "a text" if kind is str else "a number")
    media = find_media(raw, fail)
    for medium in media:
        medium["path"] = os.path.normpath(os.path.join(root + os.sep, medium["path"]))
        if not medium["path"].startswith(root + os.sep):
            raise ValueError(
                f"{file}: record {index}: {medium['path']!r} is outside the media folder {root!r}"
            )
    kinds = [medium["type"] for medium in media]
    record = {**raw, "file": file, "index": index, "problem_id": str(raw.get("problem_id", index))}
    record["options"] = [str(option) for option in raw.get("options") or []]
    if (
        record.setdefault("data_type", "-".join(sorted({*kinds}, reverse=True)) or "text")
        not in DATA_TYPES
    ):
        fail("data_type", f"one of {', '.join(DATA_TYPES)}")

    if "messages" in raw:
        turns = raw["messages"] if isinstance(raw["messages"], list) else [None]
        if not all(
            isinstance(t, dict) and t.get("role") in ROLES and isinstance(t.get("content"), str)
            for t in turns
        ):
            fail("messages", f"a list of turns with a role ({', '.join(ROLES)}) and a text")
        asked = [turn for turn in turns if turn["role"] == "user"]
        if not asked or turns[-1]["role"] != "assistant":
            fail("messages", "a turn of the user, and a last turn of the assistant")
        text = "\n".join(
            turn["content"] for turn in asked
        )  # media may come in any turn of the user
        record["problem"], record["answer"] = place_media(text, kinds, fail, "messages"), None
        asked[0]["content"] = record["problem"].removesuffix(text) + asked[0]["content"]
        record.setdefault("problem_type", None)
    else:
        if raw.get("problem_type") not in PROBLEM_TYPES:
            fail("problem_type", f"one of {', '.join(PROBLEM_TYPES)}")
        if not isinstance(raw.get("problem"), str):
            fail("problem", "a text")
        record["problem"], record["answer"] = (
            place_media(raw["problem"], kinds, fail, "problem"),
            read_truth(raw, fail),
        )
    order = re.findall(
        "<(image|video)>", record["problem"]
    )  # the pixels meet their tokens in this order
    record["media"] = [
        media.pop([medium["type"] for medium in media].index(kind)) for kind in order
    ]
    return record


def find_media(raw, fail):
    """The media of a raw record, [{"type", "path"}], with their paths as written: images, videos, or the evaluation
    form's path and additional_path."""
    media = []
    for kind in ("image", "video"):
        paths = raw.get(kind + "s") or []
        paths = [paths] if isinstance(paths, str) else paths
        if not (isinstance(paths, list) and all(isinstance(path, str) for path in paths)):
            fail(kind + "s", "a list of paths")
        media += [{"type": kind, "path": path} for path in paths]
    if not media and raw.get("path"):
        media.append(
            {"type": "image" if raw.get("data_type") == "image" else "video", "path": raw["path"]}
        )
        media += (
            [{"type": "image", "path": raw["additional_path"]}]
            if raw.get("additional_path")
            else []
        )
    return media


def read_truth(raw, fail):
    """The true answer of a raw record as text without tags. Segmentation may have its masks alone: an empty text."""
    field = "answer" if raw.get("answer") is not None or "solution" not in raw else "solution"
    answer = raw.get(field)
    if not answer and raw.get("segmentation_output"):
        return ""
    text = json.dumps(answer) if isinstance(answer, (dict, list)) else str(answer)
    text = text.rpartition("<answer>")[2].partition("</answer>")[0].strip()
    if answer is None or answer != answer or not text:  # NaN is not itself
        fail(field, "the true answer")
    if raw["problem_type"] in JSON_TYPES:
        try:
            truth = _TRUTH.decode(text)
        except (ValueError, RecursionError):
            truth = None
        if not isinstance(truth, dict):
            fail(field, "JSON, an object of finite numbers")
    return text


def demonstration(record):
    """The response that a record teaches in SFT: its last turn, or its thinking (`process`) and answer, or None."""
    if "messages" in record:
        return record["messages"][-1]["content"]
    if not record.get("process"):
        return None
    thinking = record["process"].strip().removeprefix("<think>").removesuffix("</think>").strip()
    return f"<think>{thinking}</think><answer>{record['answer']}</answer>"


def place_media(text, kinds, fail, field):
    """Puts the placeholders that are missing in front of the text; too many are an error."""
    for kind in ("video", "image"):
        missing = kinds.count(kind) - text.count(f"<{kind}>")
        if missing < 0:
            fail(field, f"{kinds.count(kind)} <{kind}> placeholders, one per {kind}")
        text = f"<{kind}>" * missing + text
    return text


# ----------------------------------------------------------------------------------------------------------------------
# Media: files -> uint8 pixels.


class MediaError(Exception):
    """A record that cannot be used. `reason` is a short word for the counts, the message says what and where."""

    def __init__(self, reason, message):
        super().__init__(message)
        self.reason = reason


Skipped = namedtuple("Skipped", ["reason", "message"])  # stands where a prompt would be

LIMITS = {  # how large media may be: a default, and what it means
    "image_min_pixels": (65536, "pixels per image, smaller ones are enlarged"),
    "image_max_pixels": (1024 * 1024, "pixels per image, larger ones are shrunk"),
    "fps": (2.0, "video frames per second"),
    "max_frames": (128, "frames per video"),
    "frame_min_pixels": (4 * 32 * 32, "pixels per video frame"),
    "frame_max_pixels": (64 * 32 * 32, "pixels per video frame"),
    "video_total_pixels": (0, "pixels of all frames of a video together, 0: no bound"),
    "max_prompt_tokens": (16384, "longer prompts are skipped and counted, never cut"),
}
Limits = namedtuple("Limits", LIMITS, defaults=[default for default, _ in LIMITS.values()])


def add_limits(parser, **defaults):
    """The argparse group whose flags `limits_of` reads back; each script names the paper's values for its stage."""
    group = parser.add_argument_group("media")
    for name, value in Limits(**defaults)._asdict().items():
        flag, kind = f"--{name.replace('_', '-')}", str if value is None else type(value)
        group.add_argument(flag, type=kind, default=value, help=f"{LIMITS[name][1]} (%(default)s)")


def limits_of(args):
    return Limits(**{name: getattr(args, name) for name in Limits._fields})


def fit(height, width, min_pixels, max_pixels):
    """The size that Qwen3-VL gives a picture: nearest multiples of 32 that keep the aspect within the pixel bounds.

    >>> fit(480, 640, 3136, 1024 * 1024), fit(2000, 1000, 3136, 100 * 1024), fit(20, 20, 4096, 65536)
    ((480, 640), (448, 224), (64, 64))
    """
    if max(height, width) > 200 * min(height, width):
        raise MediaError("aspect_ratio", f"{width} x {height} pixels: an aspect ratio over 200")
    new_height, new_width = (max(32, round(side / 32) * 32) for side in (height, width))
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height, new_width = (
            max(32, math.floor(side / shrink / 32) * 32) for side in (height, width)
        )
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height, new_width = (math.ceil(side * grow / 32) * 32 for side in (height, width))
    return new_height, new_width


# What Pillow's readers raise on damaged bytes, found by feeding them such; each is one unreadable picture.
IMAGE_ERRORS = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    RuntimeError,
    ArithmeticError,
    LookupError,
)
IMAGE_ERRORS += (
    struct.error,
    Image.DecompressionBombError,
)  # a bomb is refused by its header, before it is decoded


def read_image(path, min_pixels=3136, max_pixels=1024 * 1024):
    """An image file as RGB pixels, upright by its EXIF rotation, resized by `fit`. Returns uint8 (H, W, 3).

    Transparent pixels show white, as Qwen's own loader and vLLM's have it. Raises MediaError if it cannot be read.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
        if image.has_transparency_data:
            image = Image.alpha_composite(
                Image.new("RGBA", image.size, "white"), image.convert("RGBA")
            )
        image = image.convert("RGB")
        height, width = fit(image.height, image.width, min_pixels, max_pixels)
    except MediaError as error:
        raise MediaError(error.reason, f"{path}: {error}") from error
    except IMAGE_ERRORS as error:
        raise MediaError("unreadable_image", f"{path}: {error}") from error
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


class Video(NamedTuple):
    """Sampled frames. Frame i was frame indices[i] of `total`, shown at indices[i] / fps seconds."""

    frames: np.ndarray  # uint8 (T, H, W, 3), T even
    indices: list  # (T,)
    fps: float
    total: int


def sample_positions(total, duration, fps, max_frames):
    """Which frames Qwen3-VL looks at: fps * duration of them, 4 to max_frames, even, evenly from first to last.

    >>> sample_positions(total=32, duration=8.0, fps=1.0, max_frames=128).tolist()
    [0, 4, 9, 13, 18, 22, 27, 31]
    """
    count = (
        min(max(int(duration * fps + 1e-6), 4), max_frames) // 2 * 2
    )  # 8 s may be 7.999999999999999 s
    return np.linspace(0, total - 1, count).round().astype(int)


def read_video(
    path,
    fps=2.0,
    max_frames=128,
    min_pixels=4 * 32 * 32,
    max_pixels=64 * 32 * 32,
    folder_fps=None,
    total_pixels=0,
):
    """Frames of a video file, or of a folder of numbered pictures (which play at `folder_fps`, by default at `fps`).

    The packets are listed first, without decoding, for the true time stamp of every frame, in seconds after the first.
    Then the decoder visits the wanted frames in order and jumps to a key frame whenever one lies on the way. With a
    variable frame rate positions are spread evenly in time, and indices are milliseconds at 1000 fps: index / fps is
    the time of both. Raises MediaError also where a film ends before its header says, or lacks a wanted frame: it is
    not the film that the question is about.
    """
    try:
        if os.path.isdir(path):
            return read_frame_folder(
                path, fps, max_frames, min_pixels, max_pixels, folder_fps or fps
            )
        with av.open(path, metadata_errors="ignore") as container:
            stream = container.streams.best("video")
            if (
                stream is None or stream.disposition & Disposition.attached_pic
            ):  # the cover of a record
                raise MediaError("unreadable_video", "no video stream")
            pts, keys = list_frames(container, stream)
            seconds = (pts - pts[0]) * float(stream.time_base)
            step = (
                seconds[-1] / (len(pts) - 1) if len(pts) > 1 else 1 / fps
            )  # mean seconds per frame
            duration = seconds[-1] + step
            positions = sample_positions(len(pts), duration, fps, max_frames)
            indices, rate, total = positions, 1 / step, len(pts)
            if (
                np.abs(seconds - np.arange(len(pts)) * step).max() >= step / 2
            ):  # a variable frame rate
                times = np.linspace(0, seconds[-1], len(positions))
                positions = np.array([np.abs(seconds - time).argmin() for time in times])
                indices, rate, total = (
                    (seconds[positions] * 1000).round().astype(int),
                    1000,
                    round(duration * 1000),
                )
            frames = decode_at(container, stream, pts[positions], keys, min_pixels, max_pixels)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError("unreadable_video", f"{path}: {error}") from error
    except MediaError as error:
        raise MediaError(error.reason, f"{path}: {error}") from error
    return Video(np.stack(frames), indices.tolist(), float(rate), total)


def list_frames(container, stream):
    """Time stamps of all frames that are shown, ascending (total,), and where decoding may start: of each key frame the
    time stamp and the place in decoding order, (keys, 2). All in units of the stream's time_base."""
    shown, keys, end = set(), {}, 0
    for packet in container.demux(stream):
        if packet.pts is not None:
            if packet.is_keyframe:
                keys[packet.pts] = packet.pts if packet.dts is None else packet.dts
            if not packet.is_discard:  # an edit list may hide frames that others need
                shown.add(packet.pts)
                end = max(end, packet.pts + (packet.duration or 0))
    if not shown:
        raise MediaError("unreadable_video", "no frames with a time stamp")
    pts = np.array(sorted(shown))
    if stream.frames and end - pts[0] < 0.95 * (stream.duration or 0):  # other headers only guess
        seconds = [
            float(ticks * stream.time_base) for ticks in (end - int(pts[0]), stream.duration)
        ]
        raise MediaError("truncated_video", f"ends after {seconds[0]:.1f} s of {seconds[1]:.1f} s")
    return pts, np.array(sorted(keys.items()) or [(pts[0], pts[0])])


def decode_at(container, stream, wanted, keys, min_pixels, max_pixels):
    """The frames at the time stamps `wanted` (ascending, repeats allowed), as a list of uint8 (H, W, 3)."""
    stream.thread_type = "AUTO"
    scaler = VideoReformatter()  # one for all frames: it keeps its tables
    decoder, frame, frames = None, None, []
    for target in wanted.tolist():
        if frame is not None and frame.pts == target:  # the same frame once more
            frames.append(frames[-1])
            continue
        last = max(
            0, int(np.searchsorted(keys[:, 0], target, side="right")) - 1
        )  # key frame not after the target
        # MP4 and MKV seek by time, others by place in decoding order; the key frame before, should that be late too
        places = [*keys[last].tolist(), int(keys[max(0, last - 1), 1])]
        if (
            frame is not None and keys[last, 0] <= frame.pts
        ):  # no key frame lies on the way: first just go on
            places.insert(0, None)
        for place in places:
            if place is not None:
                container.seek(place, stream=stream)
                decoder, frame = container.decode(stream), None
            frame = next_frame(decoder, target, -math.inf if frame is None else frame.pts)
            if frame is not None and frame.pts == target:
                break
        else:
            raise MediaError(
                "unreadable_video",
                f"no frame can be decoded at {float(target * stream.time_base):.2f} s",
            )
        if not frames:
            height, width = fit(frame.height, frame.width, min_pixels, max_pixels)
        pixels = scaler.reformat(
            frame, width, height, "rgb24", interpolation="BICUBIC"
        ).to_ndarray()
        frames.append(np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90))))
    return frames


def next_frame(decoder, target, reached):
    """The next frame that is not before `target`, or None at the end. Frames must come in the order of their times."""
    for frame in decoder:
        if frame.pts is None or frame.pts <= reached:
            raise MediaError("unreadable_video", "its time stamps are not in order")
        reached = frame.pts
        if reached >= target:
            return frame
    return None


def read_frame_folder(path, fps, max_frames, min_pixels, max_pixels, folder_fps):
    names = [
        name
        for name in os.listdir(path)
        if name.lower().endswith((".jpg", ".jpeg", ".png", ".webp"))
    ]
    names.sort(
        key=lambda name: ([int(number) for number in re.findall(r"\d+", name)], name)
    )  # 2 before 10
    if not names:
        raise MediaError("unreadable_video", "no frames in this folder")
    indices = sample_positions(len(names), len(names) / folder_fps, fps, max_frames).tolist()
    frames = [read_image(os.path.join(path, names[i]), min_pixels, max_pixels) for i in indices]
    return Video(np.stack(frames), indices, float(folder_fps), len(names))


# ----------------------------------------------------------------------------------------------------------------------
# Model inputs.


@dataclass
class Prompt:
    """One prompt, ready for the trainer and for vLLM."""

    record: dict
    token_ids: list  # T ints, vision tokens expanded
    positions: np.ndarray  # int64 (3, T), mRoPE: time, height, width
    patches: torch.Tensor  # uint8 (P, 3 * 2 * 16 * 16), all media in the order of the text
    grids: torch.Tensor  # int64 (M, 3): frames / 2, height / 16, width / 16 of each medium
    vllm: dict  # what LLM.generate takes
    opened: str = ""  # what the chat template has written of the response, such as "<think>\n"


def patchify(frames):
    """Pixels in the order in which Qwen3-VL's vision tower reads them: 2 x 2 neighbouring patches stand together.

    frames: uint8 (T, H, W, 3), T even. Returns uint8 (T/2 * H/16 * W/16, 3 * 2 * 16 * 16), the grid (T/2, H/16, W/16).
    """
    time, height, width = (
        frames.shape[0] // TEMPORAL,
        frames.shape[1] // PATCH,
        frames.shape[2] // PATCH,
    )
    blocks = frames.reshape(
        time, TEMPORAL, height // MERGE, MERGE, PATCH, width // MERGE, MERGE, PATCH, 3
    )
    blocks = blocks.transpose(
        0, 2, 5, 3, 6, 8, 1, 4, 7
    )  # time, row, column, both in the token | channel, frame, y, x
    return blocks.reshape(time * height * width, -1), (time, height, width)


def mrope_positions(token_ids, vision_ids, grids):
    """Qwen3-VL's positions, int64 (3, T): text counts on in all three rows, a frame spans its token grid and takes its
    longer side. vision_ids: the ids of the image and video tokens. grids: (M, 3), one per medium. A video has one run
    of vision tokens per time step, since time stamps stand between them."""
    is_vision = np.isin(token_ids, vision_ids)
    runs = np.flatnonzero(np.diff(is_vision, prepend=False, append=False)).reshape(
        -1, 2
    )  # start and end of each
    frames = [
        (height // MERGE, width // MERGE) for time, height, width in grids for _ in range(time)
    ]
    inside, advance = np.zeros((3, len(token_ids)), np.int64), np.ones(len(token_ids), np.int64)
    for (start, end), (height, width) in zip(runs, frames, strict=True):
        if end - start != height * width:
            raise MediaError(
                "token_mismatch", f"{end - start} vision tokens for a frame of {height} x {width}"
            )
        inside[1:, start:end] = np.divmod(
            np.arange(height * width), width
        )  # not in time: that is told by time stamps
        advance[start:end], advance[end - 1] = 0, max(height, width)
    return inside + np.cumsum(advance) - advance


def check_text(texts, tokenizer):
    """Raises MediaError where a text holds a control token, such as <|im_end|>, or half a character."""
    control = [word for word in tokenizer.get_added_vocab() if word.startswith("<|")]
    if found := [word for word in control if any(word in text for text in texts)]:
        raise MediaError(
            "control_token", f"the text holds {found[0]}, which the model would not read as text"
        )
    if half := re.search("[\ud800-\udfff]", "".join(texts)):
        raise MediaError("broken_text", f"half a character, {half[0]!r}, in the text")


def encode(record, processor, limits=None, prompts=PROMPTS, system=None):
    """A record -> Prompt. Raises MediaError when a medium cannot be read or the prompt is longer than its limit.

    The text is what Qwen3-VL's processor would write. Videos use the bare <|video_pad|> form, which gives
    `<1.5 seconds><|vision_start|>...<|vision_end|>` for every pair of frames, with nothing around the whole.
    """
    tokenizer, limits = processor.tokenizer, limits or Limits()
    turns = record.get("messages", [])[:-1] or [
        {"role": "user", "content": render_problem(record, prompts)}
    ]
    check_text([turn["content"] for turn in turns] + [demonstration(record) or ""], tokenizer)
    kinds = [medium["type"] for medium in record["media"]]

    def placed(
        text,
    ):  # as many as there are media: they come first, an <image> in an option or an answer stays text
        text = text.replace(
            "<image>", "<|vision_start|><|image_pad|><|vision_end|>", kinds.count("image")
        )
        return text.replace("<video>", "<|video_pad|>", kinds.count("video"))

    turns = [
        turn | {"content": placed(turn["content"])} if turn["role"] == "user" else turn
        for turn in turns
    ]
    turns = [{"role": "system", "content": system}] * bool(system) + turns
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)

    patches, grids, expanded, vllm_data = [], [], [], {"image": [], "video": []}
    for medium in record["media"]:
        if medium["type"] == "image":
            pixels = read_image(medium["path"], limits.image_min_pixels, limits.image_max_pixels)
            rows, grid = patchify(
                np.stack([pixels, pixels])
            )  # a picture is a film of two equal frames
            expanded.append("<|image_pad|>" * (grid[1] * grid[2] // MERGE**2))
            vllm_data["image"].append(Image.fromarray(pixels))
        else:
            bounds = limits.fps, limits.max_frames, limits.frame_min_pixels, limits.frame_max_pixels
            video = read_video(
                medium["path"], *bounds, record.get("fps"), limits.video_total_pixels
            )
            rows, grid = patchify(video.frames)
            frame = (
                "<|vision_start|>"
                + "<|video_pad|>" * (grid[1] * grid[2] // MERGE**2)
                + "<|vision_end|>"
            )
            shown = [index / video.fps for index in video.indices]  # seconds
            pairs = zip(
                shown[::2], shown[1::2]
            )  # in the library's own order: 3.15 is else 3.1 here and 3.2 there
            expanded.append("".join(f"<{(a + b) / 2:.1f} seconds>{frame}" for a, b in pairs))
            metadata = dict(
                fps=video.fps, frames_indices=video.indices, total_num_frames=video.total
            )
            metadata |= dict(video_backend="pyav", do_sample_frames=False)
            vllm_data["video"].append((video.frames.transpose(0, 3, 1, 2), metadata))
        patches.append(rows)
        grids.append(grid)

    waiting = iter(expanded)
    full = re.sub(r"<\|(image|video)_pad\|>", lambda _: next(waiting), text)
    token_ids = tokenizer(full, add_special_tokens=False)["input_ids"]
    if len(token_ids) > limits.max_prompt_tokens:
        raise MediaError(
            "too_long", f"{len(token_ids)} prompt tokens, the limit is {limits.max_prompt_tokens}"
        )

    positions = mrope_positions(
        token_ids, tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"]), grids
    )
    rows = np.concatenate(patches) if patches else np.zeros((0, 3 * TEMPORAL * PATCH**2), np.uint8)
    grids = torch.tensor(grids, dtype=torch.int64).reshape(-1, 3)
    opened = text.rpartition("<|im_start|>assistant\n")[2]
    vllm = dict(prompt=text, mm_processor_kwargs=dict(do_resize=False, do_sample_frames=False))
    vllm["multi_modal_data"] = {kind: items for kind, items in vllm_data.items() if items}
    return Prompt(record, token_ids, positions, torch.from_numpy(rows), grids, vllm, opened)


# ----------------------------------------------------------------------------------------------------------------------
# Feeding: which record next, decoded ahead of time.


def data_order(count, seed, cursor=0, rank=0, world=1):
    """Endless record indices of one rank: a new permutation every epoch, dealt to the ranks like cards.

    The order over all ranks depends on the seed alone, so the only thing to save is the cursor: how many records all
    ranks together have taken.

    >>> [list(itertools.islice(data_order(6, 0, rank=rank, world=2), 3)) for rank in (0, 1)]
    [[3, 5, 0], [2, 4, 1]]
    """
    for place in itertools.count(cursor + rank, world):
        epoch, i = divmod(place, count)
        yield int(permutation(count, seed, epoch)[i])


@lru_cache(2)
def permutation(count, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(count)


def target_ids(prompt, tokenizer):
    """The tokens that SFT learns: the demonstration without what the prompt has written of it, and the end of the turn."""
    text, opened = demonstration(prompt.record), prompt.opened.strip()
    if not text.lstrip().startswith(opened):
        message = f"the prompt ends with {opened!r}, with which the response does not begin"
        raise MediaError("opened", message)
    text = text.lstrip().removeprefix(opened).lstrip() if opened else text
    return tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]


def prefetch(records, function, order, workers, seconds=600):
    """Yields function(records[i]) for each i in `order`, computed ahead by worker processes (0: in this process).

    Raises RuntimeError when a record takes longer than `seconds`, as on a file system that hangs.
    """

    def become_worker(_):
        os.setsid()  # Ctrl-C and SIGTERM are for the script, which stops after its step
        ctypes.CDLL(None).prctl(
            1, signal.SIGKILL
        )  # PR_SET_PDEATHSIG: does not outlive the script, even a killed one

    def use(record):
        try:
            return function(record)
        except MediaError as error:
            return Skipped(error.reason, f"{record['file']}: record {record['index']}: {error}")

    return iter(torch.utils.data.DataLoader(
        records, sampler=order, batch_size=None, collate_fn=use, num_workers=workers, worker_init_fn=become_worker,
        timeout=seconds if workers else 0,
    ))  # fmt: skip


def next_items(stream, count, tally, max_bad_share):
    """The next `count` items less the unusable ones, which are named on the screen and counted.

    tally: a Counter, kept by the caller from call to call: "records" and "skipped/<reason>" are counted in it. Raises
    RuntimeError when more than `max_bad_share` of all records so far (and of at least 200) were unusable.
    """
    items = []
    for item in itertools.islice(stream, count):
        tally["records"] += 1
        if isinstance(item, Skipped):
            tally[f"skipped/{item.reason}"] += 1
            print(f"skipped: {item.message}")
        else:
            items.append(item)
    bad = sum(count for name, count in tally.items() if name.startswith("skipped/"))
    if bad > max_bad_share * max(tally["records"], 200):
        raise RuntimeError(f"too many records cannot be used (see --max-bad-share): {dict(tally)}")
    return items


# ----------------------------------------------------------------------------------------------------------------------
# Drawing: what an answer says, on what it speaks of. --peek, infer.py and the report of evaluate.py use it.


class Marks(NamedTuple):
    """What an answer says, in a form that can be drawn: coordinates 0-1000, times in seconds. Empty where it says nothing."""

    span: tuple | None = None  # (start, end)
    boxes: dict = {}  # {second: [x1, y1, x2, y2]}, or of a single image {None: box}
    positive: list = []  # [[x, y], ...] on the object
    negative: list = []  # [[x, y], ...] beside it
    time: float | None = (
        None  # the second at which the box and the points of a video's segmentation stand
    )


def marks_of(task, answer):
    """The marks in an answer's text (or None). task: as data.task_of gives it. What is malformed is left out.

    Tracking's key k is the frame at k - 1 seconds, spatial-temporal grounding's key k the one at k seconds.

    >>> marks_of("tracking", '{"boxes": {"1": [0, 0, 500, 500], "2": [0, 0, 9]}}').boxes
    {0.0: [0, 0, 500, 500]}
    >>> marks_of("temporal grounding", '{"time": [2, 6.5]}').span
    (2, 6.5)
    """
    said = rewards.read_json(answer) if answer and task.lower() not in rewards.TEXT_TYPES else {}
    time, boxes, in_video = said.get("time"), said.get("boxes"), task == "segmentation-video"
    if in_video and not rewards.is_number(time):
        return Marks()  # of which frame?
    first = {"spatial-temporal grounding": 0, "tracking": 1}.get(task)  # the key of second 0
    if first is None:
        boxes = {time if in_video else None: boxes}
    else:
        keys = (
            [key for key in boxes if re.fullmatch("[0-9]{1,9}", key)]
            if isinstance(boxes, dict)
            else []
        )
        boxes = {float(key) - first: boxes[key] for key in keys if int(key) >= first}
    boxes = {second: box for second, box in boxes.items() if rewards.are_numbers(box, 4)}
    points = [said.get(key) for key in ("positive_points", "negative_points")]
    points = [
        [xy for xy in p if rewards.are_numbers(xy, 2)] if isinstance(p, list) else []
        for p in points
    ]
    return Marks(
        tuple(time) if rewards.are_numbers(time, 2) else None,
        boxes,
        *points,
        time if in_video else None,
    )


def box_at(boxes, second):
    """The box at a second (None of an image), on a straight line between the seconds that are named; the last one holds for
    less than a second more. None where there is no box.

    >>> boxes = {1.0: [0, 0, 100, 100], 2.0: [100, 0, 200, 100]}
    >>> box_at(boxes, 1.25), box_at(boxes, 0.5), box_at(boxes, 3.0)
    ([25.0, 0.0, 125.0, 100.0], None, None)
    """
    if None in boxes or not boxes or second is None:
        return boxes.get(None)
    named = sorted(boxes)
    if not named[0] <= second < named[-1] + 1:
        return None
    return [float(np.interp(second, named, side)) for side in zip(*(boxes[k] for k in named))]


def draw(image, marks, second=None, colour="orange", mask=None):
    """An RGB copy of a PIL image with everything that holds at this second (None: of an image, which has no time).

    A box covers the pixels from x1 to x2 - 1. Positive points are discs, negative ones crosses; what lies outside goes to the
    edge. mask: bool (H, W) of the image's shape in any size, becomes a tint.
    """
    image = image.convert("RGB")
    if mask is not None:
        tint = Image.blend(image, Image.new("RGB", image.size, colour), 0.5)
        image.paste(tint, mask=Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST))
    canvas, line = ImageDraw.Draw(image), max(2, min(image.size) // 150)
    pixel = lambda xy: [
        round(min(max(v, 0), 1000) * side / 1000) for v, side in zip(xy, image.size)
    ]
    if box := box_at(marks.boxes, second):
        (x1, y1), (x2, y2) = (pixel(corner) for corner in zip(sorted(box[::2]), sorted(box[1::2])))
        canvas.rectangle([x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)], outline=colour, width=line)
    if marks.time is None or second is not None and marks.time <= second < marks.time + 1:
        r = 2 * line
        for x, y in map(pixel, marks.positive):
            canvas.circle((x, y), r, fill=colour, outline="black")
        for x, y in map(pixel, marks.negative):
            for width, ink in ((r + 1, "black"), (line, colour)):
                canvas.line([x - r, y - r, x + r, y + r], ink, width)
                canvas.line([x - r, y + r, x + r, y - r], ink, width)
    return image


def enlarged(image, least=256):
    """A picture whose longer side has at least so many pixels, by a whole factor: marks and text on a tiny one can be seen."""
    factor = math.ceil(least / max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def stack(*images):
    """Pictures under each other. Even width and height, as the chroma of an MP4 needs."""
    width, height = max(image.width for image in images), sum(image.height for image in images)
    canvas, y = Image.new("RGB", (width + width % 2, height + height % 2), "white"), 0
    for image in images:
        canvas.paste(image, (0, y))
        y += image.height
    return canvas


def captioned(image, text, size=14, above=False):
    """The picture with black text under it (or above it), in letters of this many pixels. Without text: just the picture."""
    lines = [
        part
        for line in text.splitlines()
        for part in textwrap.wrap(line, max(8, int(image.width / size / 0.55)))
    ]
    strip = Image.new("RGB", (image.width, (size + 4) * len(lines) + 6 if lines else 0), "white")
    ImageDraw.Draw(strip).multiline_text(
        (4, 2), "\n".join(lines), "black", ImageFont.load_default(size), spacing=4
    )
    return stack(strip, image) if above else stack(image, strip)


def timeline(width, spans, edges, places, now=None):
    """A bar for each (span, colour). edges (seconds) stand at places (pixels), both ascending. now: a clock and a cursor."""
    strip = Image.new("RGB", (width, 18 * len(spans)), "white")
    canvas = ImageDraw.Draw(strip)
    for y, (span, colour) in zip(range(6, 18 * len(spans), 18), spans):
        canvas.rectangle([places[0], y, places[-1] - 1, y + 5], "lightgrey")
        start, end = np.interp(span or (0, 0), edges, places).round()
        if start < end:
            canvas.rectangle([start, y, end - 1, y + 5], colour)
    if now is not None:
        x = round(np.interp(now, edges, places))
        canvas.rectangle([x - 1, 3, x, 14], "black")
        canvas.text((4, 1), f"{now:.2f} s", "black", ImageFont.load_default(13))
    return strip


def nearest(seconds, second):
    """The index of the frame that is nearest in time; of two, the later one."""
    return int(np.abs(np.subtract(seconds, second) - 1e-6).argmin())


def draw_strip(frames, seconds, marks, masks=None, cell=160):
    """A film strip: up to 8 frames side by side with their seconds and marks, and under it a bar for each span.

    frames: uint8 (T, H, W, 3). seconds: (T,), ascending. marks: {colour: Marks}, such as {"orange": answer, "lime": truth}.
    masks: {colour: bool (T, H, W)}. cell: pixels of a frame's longer side. Returns a PIL image. The frames are those at whole
    seconds, where answers have their boxes, and at a segmentation's time. On the bar a frame stands until the next.
    """
    times = {part.time for part in marks.values() if part.time is not None}
    shown = sorted(
        {*np.floor(np.linspace(seconds[0], seconds[-1], 8 - len(times))).tolist(), *times}
    )
    indices, cells = [nearest(seconds, second) for second in shown], []
    for second, index in zip(shown, indices):
        image = ImageOps.contain(
            Image.fromarray(frames[index]), (cell, cell), Image.Resampling.BICUBIC
        )
        for colour, part in marks.items():
            image = draw(
                image,
                part,
                second,
                colour,
                masks[colour][index] if masks and colour in masks else None,
            )
        cells.append(captioned(image, f"{seconds[index]:.1f} s", 11, above=True))
    places = [i * (cells[0].width + 2) for i in range(len(cells) + 1)]
    strip = Image.new("RGB", (places[-1], cells[0].height), "white")
    for image, x in zip(cells, places):
        strip.paste(image, (x, 0))
    begin = [seconds[index] for index in indices]
    edges = [*begin, begin[-1] + (begin[-1] - begin[0]) / max(1, len(begin) - 1)]
    spans = [(part.span, colour) for colour, part in marks.items() if part.span]
    return stack(strip, timeline(strip.width, spans, edges, places))


# ----------------------------------------------------------------------------------------------------------------------
# --peek: what training will see.


def token_table(prompt, tokenizer, few=6):
    """Which tokens SFT learns, as text: a `few` around the first learned token, and the last ones. All of the prompt is
    given, all of the response is learned, the end of the turn included; the row above a label predicts it."""
    response = tokenizer(demonstration(prompt.record), add_special_tokens=False)["input_ids"] + [
        tokenizer.eos_token_id
    ]
    ids, start = prompt.token_ids + response, len(prompt.token_ids)
    rows = [
        f"labels: {start} tokens given, {len(response)} learned",
        f"{'position':>10}{'id':>10}{'label':>10}  token",
    ]
    for i in range(start - few, len(ids)):
        if i < start + few or i >= len(ids) - few:
            rows.append(
                f"{i:>10}{ids[i]:>10}{ids[i] if i >= start else '-':>10}  {tokenizer.decode([ids[i]])!r}"
            )
    return "\n".join(rows)


def contact_sheet(prompts, path, cell=160, line=14):
    """Saves a PNG with a row for each prompt: the pixels that the model sees, of a video up to eight frames."""
    sheet = Image.new("RGB", (8 * cell, len(prompts) * (cell + 2 * line)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, prompt in enumerate(prompts):
        top, media = row * (cell + 2 * line), prompt.vllm["multi_modal_data"]
        draw.text(
            (2, top),
            f"record {prompt.record['index']}, {prompt.record['problem_type'] or 'SFT'}",
            "black",
        )
        cells = [("image", image) for image in media.get("image", [])]
        for frames, metadata in media.get("video", []):
            for i in np.linspace(0, len(frames) - 1, min(8, len(frames))).round().astype(int):
                seconds = metadata["frames_indices"][i] / metadata["fps"]
                cells.append((f"{seconds:.2f} s", Image.fromarray(frames[i].transpose(1, 2, 0))))
        for column, (label, image) in enumerate(cells[:8]):
            draw.text(
                (column * cell + 2, top + line), f"{label}, {image.width} x {image.height}", "black"
            )
            sheet.paste(
                ImageOps.contain(image, (cell - 4, cell - 4)), (column * cell, top + 2 * line)
            )
    sheet.save(path)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", help="record file")
    parser.add_argument("--model", required=True, help="folder or hub id that has the processor")
    parser.add_argument("--media-root", help="folder of the media paths (default: the file's own)")
    parser.add_argument("--prompts", help="JSON file that replaces the instructions")
    parser.add_argument("--peek", type=int, default=3, help="records to show (%(default)s)")
    parser.add_argument("--sheet", default="peek.png", help="where the picture goes (%(default)s)")
    add_limits(parser)
    args = parser.parse_args()
    from transformers import AutoProcessor

    try:
        processor, table = AutoProcessor.from_pretrained(args.model), load_prompts(args.prompts)
        records = load_records(args.file, args.media_root)
    except (OSError, ValueError) as error:
        refuse(error)
    tokenizer, limits = processor.tokenizer, limits_of(args)
    print(
        f"{args.file}: {len(records)} records: {dict(Counter(record['problem_type'] for record in records))}"
    )
    prompts = []
    for record in records[: args.peek]:
        print(
            f"\n--- record {record['index']}, problem_id {record['problem_id']}, {record['problem_type']}"
        )
        try:
            prompt = encode(record, processor, limits, table)
        except MediaError as error:
            print(f"skipped, {error.reason}: {error}")
            continue
        prompts.append(prompt)
        sizes = [f"{TEMPORAL * t} x {PATCH * h} x {PATCH * w}" for t, h, w in prompt.grids.tolist()]
        vision = int(prompt.grids.prod(1).sum()) // MERGE**2
        print(
            f"{len(prompt.token_ids)} tokens, {vision} of them vision; frames x height x width: {', '.join(sizes)}"
        )
        text = tokenizer.decode(prompt.token_ids)
        print(
            re.sub(
                r"(<\|(?:image|video)_pad\|>)+",
                lambda run: f"{run[1]}x{len(run[0]) // len(run[1])}",
                text,
            )
        )
        response = demonstration(record)
        print(
            f"truth: {record['answer']}"
            if response is None
            else f"{response}\n\n{token_table(prompt, tokenizer)}"
        )
    if not prompts:
        refuse(f"{args.file}: none of the first {args.peek} records can be used")
    contact_sheet(prompts, args.sheet)
    print(f"\npixels: {args.sheet}")


if __name__ == "__main__":
    import cpu_compat  # noqa: F401  (before transformers)

    main()
