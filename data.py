"""Records -> prompts -> model inputs: what the model sees, in training, rollouts and evaluation.

A record is one question about images or videos. `encode` makes a `Prompt` of it: token ids with the
vision tokens expanded, mRoPE positions, uint8 patches for the vision tower, and the same pixels as
vLLM takes them. Each image or video is decoded once: trainer and vLLM cannot disagree about it.

    python data.py runs/demo/toy/rl_train.json --model runs/demo/toy/model  # what training sees

Where this departs from the release: frames have their true times (in its SFT they run short); a
prompt that is too long is left out and counted, not cut; the wording of the instructions.
"""

import ctypes
import itertools
import json
import math
import os
import re
import struct
import sys
import textwrap
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections import Counter, namedtuple
from dataclasses import dataclass
from pathlib import Path

import av
import cpu_compat  # noqa: F401  (before transformers)
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from transformers import AutoConfig, Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

import rewards
from rewards import JSON_TYPES, PROBLEM_TYPES

PATCH, MERGE, TEMPORAL = 16, 2, 2  # pixels per patch, patches per token side, frames per patch
BANNED = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]  # never sampled
CORES = len(os.sched_getaffinity(0))
WORKERS = max(1, min(4, CORES // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))  # per rank
FIRST_RANK = os.environ.get("LOCAL_RANK", "0") == "0"  # of its machine


def refuse(message):
    """Ends the script before anything heavy has started: one sentence a machine, exit code 2."""
    text = f"{os.path.basename(sys.argv[0])}: {' '.join(str(message).split())}"
    if FIRST_RANK:
        print(text, file=sys.stderr)
        if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun prints it last
            said = dict(message=text, extraInfo=dict(timestamp=0))
            Path(report).write_text(json.dumps(dict(message=said)))
    sys.exit(2)


def new_parser(doc):
    """An argparse parser whose errors are one sentence, see `refuse`."""
    parser = ArgumentParser(description=doc, formatter_class=RawDescriptionHelpFormatter)
    parser.error = refuse
    return parser


def at_least(least, kind=int):
    """An argparse type: a finite number that is not below `least`."""

    def number(text):  # where `kind` refuses the text argparse says "invalid number value"
        if not least <= kind(text) < math.inf:
            raise ArgumentTypeError(f"{text} is not a number from {least} on")
        return kind(text)

    return number


def check_path(path):
    """Raises ValueError for what is no folder of a model and looks like no hub id."""
    hub_id = path.count("/") == 1 and not os.path.isdir(os.path.dirname(path))
    if not hub_id and not os.path.exists(f"{path}/config.json"):
        raise ValueError(f"{path}: no folder of a model, and no hub id of the form owner/name")


def load_processor(path):
    """The processor of a Qwen3-VL folder or hub id. Else it raises ValueError, one sentence."""
    check_path(path)
    try:
        kind = AutoConfig.from_pretrained(path).model_type
        if kind != "qwen3_vl":
            raise ValueError(f"model_type is {kind!r}, expected 'qwen3_vl'")
        return Qwen3VLProcessor.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise ValueError(f"{path} is no Qwen3-VL model: {reason}") from error


# ---- Prompts: one instruction per task, coordinates 0-1000 of width and height, times in seconds
THINK = "Think first, between <think> and </think>. "
THINK += "Then write only the final answer between <answer> and </answer>: "
MARKS = '"boxes": [120, 250, 480, 700], "positive_points": [[200, 300], [300, 400], [400, 600]], '
MARKS += '"negative_points": [[90, 240], [500, 260], [300, 750]]'
POINTS = "three points on the object and three beside it, in coordinates from 0 to 1000, as JSON"
PROMPTS = {
    "multiple choice": "the letter of the right option.",
    "numerical": "one number.",
    "math": "the result, in LaTeX if it is not a plain number.",
    "regression": "your best estimate as one number.",
    "OCR": "the text exactly as it is written.",
    "open-ended": "a short text.",
    "temporal grounding": 'the start and the end in seconds, as JSON like {"time": [12.3, 25.7]}.',
    "spatial grounding": "the box as JSON in coordinates from 0 to 1000, x1 and y1 top left, like "
    '{"boxes": [120, 250, 480, 700]}.',
    "spatial-temporal grounding": "the start and the end in seconds, and for each whole second "
    "between them the box in coordinates from 0 to 1000, as JSON like "
    '{"time": [3.0, 4.6], "boxes": {"3": [120, 250, 480, 700], "4": [130, 250, 490, 700]}}.',
    "tracking": "the box in coordinates from 0 to 1000 once a second, key 1 for the first frame, "
    'as JSON like {"boxes": {"1": [120, 250, 480, 700], "2": [130, 250, 490, 700]}}.',
    "segmentation-image": f"the box, {POINTS} like {{{MARKS}}}.",
    "segmentation-video": "a second at which the object is well seen, and for that frame its box, "
    f'{POINTS} like {{"time": 4.0, {MARKS}}}.',
}
PROMPTS = {task: THINK + instruction for task, instruction in PROMPTS.items()}


def task_of(record):
    """The key of a record's prompt and moving averages: problem_type, segmentation by medium."""
    if record["problem_type"] != "segmentation":
        return record["problem_type"]
    return "segmentation-image" if record["data_type"] == "image" else "segmentation-video"


def render_problem(record, prompts=PROMPTS):
    """The user's turn: question, options, instruction. <image> and <video> stand for media."""
    options = "\nOptions:\n" + "\n".join(record["options"]) if record.get("options") else ""
    return f"{record['problem']}{options}\n{prompts[task_of(record)]}"


def load_prompts(path):
    """PROMPTS, or another wording of them: a JSON file {task: instruction}."""
    prompts = rewards.read_json(Path(path).read_text("utf-8")) if path else PROMPTS
    if lacking := [task for task in PROMPTS if not is_text(prompts.get(task))]:
        raise ValueError(f"{path}: expected an instruction for {lacking[0]!r}")
    return prompts


# ---- Records: three forms, as a JSON list or JSONL, become one.
FORMS = "one of three forms: problem and answer, problem and solution, or messages"
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
is_text = lambda x: isinstance(x, str)
is_turn = lambda x: isinstance(x, dict) and is_text(x.get("role")) and is_text(x.get("content"))


def load_records(path, media_root=None, max_bad_share=0.0, raws=None):
    """Reads a JSON list or JSONL file into records, plain dicts of one form: their own fields and
    problem_id (text), problem (with one placeholder per medium), problem_type (None where messages
    do not say), data_type, options (lettered), answer (text without tags; None with messages),
    demonstration (the response that SFT learns, or None), media ([{"type", "path"}]), file, index.
    Paths are relative to media_root, by default the file's folder, and must stay below it. Raises
    ValueError naming file, record, field and value, also when more than max_bad_share of the truths
    cannot be graded; a smaller share is left out. raws: {index: raw record} in the file's place."""
    root = os.path.abspath(media_root or Path(path).parent)
    raws = dict(enumerate(read_values(path))) if raws is None else raws
    records, bad = [], []
    for i, raw in raws.items():
        record = normalise(raw, str(path), i, root) | dict(file=str(path), index=i)
        if reason := record["answer"] and rewards.gradable(record):
            field, truth = "solution" if "solution" in record else "answer", record["answer"][:100]
            expected = PROMPTS[task_of(record)].removeprefix(THINK).rstrip(".")
            bad.append(f"record {i}: {field} {truth!r} {reason}, expected {expected}")
        else:
            records.append(record)
    message = f"{path}: {len(bad)} of {len(raws)} records cannot be graded; {'; '.join(bad[:5])}"
    if len(bad) > max_bad_share * len(raws):
        raise ValueError(message)
    if bad and FIRST_RANK:
        print(f"left out: {message}")
    return records


def read_values(path):
    """The values of a JSON list, or of the lines of a JSONL file."""
    where, values = path, []
    try:
        text = Path(path).read_text("utf-8-sig")  # with or without a byte order mark
        if text.lstrip().startswith("["):
            values = json.loads(text)
        else:
            for number, line in enumerate(text.split("\n"), 1):  # other line ends may be in a text
                where = f"{path}: line {number}"
                values += [json.loads(line)] if line.strip() else []
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON in UTF-8: {error}") from error
    if not values:
        raise ValueError(f"{path}: holds no records")
    return values


def normalise(raw, file, index, root):
    """One raw record -> the form that load_records describes. Its truth is not graded here."""

    def need(right, field, expected):
        if not right:
            found = "missing" if record.get(field) is None else repr(str(record[field])[:100])
            raise ValueError(f"{file}: record {index}: {field} is {found}, expected {expected}")

    record = raw if isinstance(raw, dict) else {"record": raw}
    need(record is raw, "record", "an object")
    record = dict(problem_type=None, problem_id=index, options=[])
    record |= {field: value for field, value in raw.items() if value is not None}
    need(is_text(record.get("process", "")), "process", "a text")
    need(isinstance(record["options"], list), "options", "a list")
    fps = record.get("fps") or 1
    need(rewards.is_number(fps) and fps > 0, "fps", "a number above 0")

    fields = dict(images="image", image="image", videos="video", video="video")
    media = {"video": [], "image": []}  # in the order of data_type "video-image"
    if not any(map(record.get, fields)):  # the evaluation form
        by_name = str(record.get("path")).lower().rstrip("']").endswith(IMAGE_ENDINGS)
        kind = "image" if by_name or record.get("data_type") == "image" else "video"
        fields = dict(path=kind, additional_path="image")
    for field, kind in fields.items():
        paths = record.get(field) or []
        for path in paths if isinstance(paths, list) else [paths]:
            local = is_text(path) and not re.match(r"data:|\w+://", path)
            path = os.path.normpath(os.path.join(root, path)) if local else ""
            inside = path.startswith(os.path.join(root, ""))
            need(inside, field, f"a list of paths of files below the media folder {root}")
            media[kind].append(path)
    found = "-".join(filter(media.get, media)) or "text"

    if "messages" in record:
        field, turns, record["answer"] = "messages", record["messages"], None
        right = isinstance(turns, list) and all(map(is_turn, turns))
        asked = [turn for turn in turns if turn["role"] == "user"] if right else []
        response = turns[-1]["content"] if asked and turns[-1]["role"] == "assistant" else ""
        need(response.strip(), field, "turns with role and content, the last the assistant's")
    else:
        field, text, kind = "problem", record.get("problem"), record["problem_type"]
        need(is_text(text), field, "a text" if field in record else FORMS)
        need(kind in PROBLEM_TYPES, "problem_type", f"one of {', '.join(PROBLEM_TYPES)}")
        need(found != "text" or kind not in JSON_TYPES, "images", "an image or a video")
        said = "answer" if "answer" in record or "solution" not in record else "solution"
        answer, truth = record.get(said), rewards.truth_of(record)
        right = kind in JSON_TYPES or not isinstance(answer, (dict, list))
        need(right, said, "a text or a number")
        truth = "" if answer != answer else truth  # NaN
        need(truth or record.get("segmentation_output"), said, "the true answer")
        letter = kind == "multiple choice" and rewards.read_choice(truth, record["options"])
        record["answer"] = letter or truth  # of a choice its letter
        thinking = re.sub("^<think>|</think>$", "", record.get("process", "").strip()).strip()
        response = f"<think>{thinking}</think><answer>{record['answer']}</answer>"
        response = response if record["answer"] and record.get("process") else None
        need(not response or rewards.parse_response(response), "process", "no tags inside")
        asked = [dict(content=text)]
    # "text" must be said: a media field that is spelled otherwise would pass unseen.
    matches = record.setdefault("data_type", found if found != "text" else None) == found
    need(matches, "data_type", f"{found!r} by the media in images, videos or path")
    for kind, paths in media.items():  # in any turn of the user
        missing = len(paths) - sum(turn["content"].count(f"<{kind}>") for turn in asked)
        need(missing >= 0, field, f"{len(paths)} <{kind}> placeholders, one per {kind}")
        asked[0]["content"] = f"<{kind}>" * missing + asked[0]["content"]

    record["problem"] = "\n".join(turn["content"] for turn in asked)
    order = re.findall("<(image|video)>", record["problem"])  # that of the placeholders
    record["media"] = [dict(type=kind, path=media[kind].pop(0)) for kind in order]
    options = [str(option) for option in record["options"]]
    if not all(re.match(r"\(?[A-Z][).:]", option) for option in options):
        options = [f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(options)]
    more = dict(problem_id=str(record["problem_id"]), options=options, demonstration=response)
    return record | more


# ---- Media: images as uint8 (H, W, 3), videos as sampled frames with their times.
class MediaError(Exception):
    """MediaError(reason, message): a record that cannot be used. reason: a word for the counts."""

    reason = property(lambda self: self.args[0])
    __str__ = lambda self: self.args[1]


# frames: uint8 (T, H, W, 3), T even, of `total` (1: an image). One is shown at index / fps seconds.
Video = namedtuple("Video", "frames indices fps total")
# What Pillow raises on damaged bytes, found by feeding it such, and for a decompression bomb.
IMAGE_ERRORS = (OSError, EOFError, SyntaxError, ValueError, TypeError, RuntimeError)
IMAGE_ERRORS += (ArithmeticError, LookupError, struct.error, Image.DecompressionBombError)
VIDEO_PIXELS = 24 * 2**20  # of all frames of a video, as Qwen3-VL's own video processor has it
LIMITS = {  # how large media may be: default, least, meaning
    "image_min_pixels": (65536, 1, "pixels per image, smaller ones are enlarged"),
    "image_max_pixels": (1024 * 1024, 1024, "pixels per image, larger ones are shrunk"),
    "fps": (2.0, 0.001, "video frames per second"),
    "max_frames": (128, 2, "frames per video"),
    "frame_min_pixels": (4 * 32 * 32, 1, "pixels per video frame"),
    "frame_max_pixels": (64 * 32 * 32, 1024, "pixels per video frame"),
    "max_prompt_tokens": (16384, 1, "longer prompts are left out and counted"),
}
Limits = namedtuple("Limits", LIMITS, defaults=[default for default, *_ in LIMITS.values()])
limits_of = lambda args: Limits(*(getattr(args, name) for name in Limits._fields))


def add_limits(parser, **defaults):
    """The argparse group whose flags `limits_of` reads back; each script names its own defaults."""
    add = parser.add_argument_group("media").add_argument
    for name, (default, least, meaning) in LIMITS.items():
        values = dict(type=at_least(least, type(default)), default=defaults.get(name, default))
        add(f"--{name.replace('_', '-')}", help=meaning + " (%(default)s)", **values)


def read_image(path, min_pixels=65536, max_pixels=1024 * 1024):
    """An image file as RGB, upright by its EXIF rotation, in multiples of 32: uint8 (H, W, 3).
    Transparent pixels show white, as in Qwen's own loader and in vLLM. Raises MediaError."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
        if image.mode == "F" or image.mode == "I" and file.format == "TIFF":
            raise ValueError("32 bits a pixel, of which the range is not known")
        if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        bounds = min(min_pixels, max_pixels), max_pixels
        h, w = smart_resize(image.height, image.width, PATCH * MERGE, *bounds)
        image = image.convert("RGB").resize((w, h), Image.Resampling.BICUBIC)
    except IMAGE_ERRORS as error:
        raise MediaError("unreadable_image", f"{path}: {error}") from error
    return np.asarray(image)


def sample_positions(total, duration, fps, max_frames):
    """Which frames Qwen3-VL looks at: fps * duration of them, 4 to max_frames, evenly spread, and
    never more than there are: of an odd number the last one counts twice.
    >>> sample_positions(total=32, duration=8.0, fps=1.0, max_frames=128).tolist()
    [0, 4, 9, 13, 18, 22, 27, 31]
    """
    count = min(max(int(duration * fps + 1e-6), 4), max_frames) // 2 * 2  # 8 s may be 7.999999 s
    if count >= total:
        return np.arange(total + total % 2).clip(0, total - 1)
    return np.linspace(0, total - 1, count).round().astype(int)


def read_video(path, fps=2, max_frames=128, min_pixels=4096, max_pixels=65536, folder_fps=None):
    """Frames of a video file, or of a folder of numbered images that play at `folder_fps` (`fps`).
    Packets are listed first, for the true times; then the wanted frames are decoded. With a variable
    frame rate they are spread evenly in time, and indices are ms, fps 1000. Raises MediaError."""
    try:
        if is_folder := os.path.isdir(path):
            names, rate = list_frame_folder(path), folder_fps or fps
            seconds = np.arange(len(names)) / rate
        else:
            seconds, pts, keys = list_frames(path)
            rate = (len(pts) - 1) / seconds[-1] if len(pts) > 1 else fps  # the mean
        total, duration = len(seconds), seconds[-1] + 1 / rate
        positions = indices = sample_positions(total, duration, fps, max_frames)
        if np.abs(seconds - np.arange(total) / rate).max() >= 0.5 / rate:  # a variable frame rate
            if len(positions) < total:
                times = np.linspace(0, seconds[-1], len(positions))
                positions = [nearest(seconds, time) for time in times]
            indices = (seconds[positions] * 1000).round().astype(int)
            rate, total = 1000, round(duration * 1000)
        most = min(max_pixels, VIDEO_PIXELS / len(positions))
        bounds = min(min_pixels, most), most
        if is_folder:
            frames = [read_image(names[i], *bounds) for i in positions]
        else:
            frames = decode_frames(path, pts, keys, pts[positions], bounds)
        return Video(np.stack(frames), indices.tolist(), float(rate), total)
    except (av.FFmpegError, OSError, ValueError, KeyError) as error:
        raise MediaError("unreadable_video", f"{path}: {error}") from error


def list_frame_folder(path):
    """The paths of a folder's numbered images, frame2 before frame10."""
    paths = [p for p in Path(path).glob("[!.]*") if p.suffix.lower() in IMAGE_ENDINGS]
    if not paths:
        raise ValueError("no frames in this folder")
    return sorted(paths, key=lambda p: ([*map(int, re.findall(r"\d+", p.name))], p.name))


def open_video(path):
    file = av.open(path, metadata_errors="ignore")
    stream = file.streams.best("video")
    if stream is None or stream.disposition & av.stream.Disposition.attached_pic:  # a cover
        raise ValueError("no video stream")
    stream.thread_type = "AUTO"
    return file


def list_frames(path):
    """Seconds and time stamps, ascending (total,), of the frames that are shown, and the stamps of the
    key frames (keys,), empty where stamps do not tell which frame is which."""
    rows, reached, before = [], 0, -math.inf
    with open_video(path) as file:
        stream, no_dts = file.streams.best("video"), file.format.name == "matroska,webm"
        for packet in file.demux():
            stamp = packet.dts if packet.pts is None else packet.pts
            if stamp is None:
                continue
            reached = max(reached, (stamp + (packet.duration or 0)) * float(packet.time_base))
            # What comes before the first key frame cannot be decoded.
            if packet.size and packet.stream == stream and (rows or packet.is_keyframe):
                rows.append((stamp, packet.is_keyframe, packet.is_discard))
                place = stamp if no_dts else before if packet.dts is None else packet.dts
                if place < before and (packet.is_keyframe or not no_dts):
                    raise ValueError("its time goes back, as of two files joined")
                before = max(before, place)
        stamps, is_key, is_hidden = np.array(rows, np.int64).reshape(-1, 3).T
        # An AVI's header counts its frames, one tick each. A clock may begin below 0.
        length = max((file.duration or 0) / 1e6, float(stream.frames * stream.time_base))
        if reached - min(file.start_time or 0, 0) / 1e6 < 0.95 * length:
            raise ValueError(f"ends after {reached:.1f} s of {length:.1f} s")
        # An edit list hides frames that others need. None is shown before the first key frame.
        shown = stamps[(is_hidden == 0) & (stamps >= stamps[:1])]
        if not len(shown):
            raise ValueError("no key frame, or frames without a time stamp")
        keys, pts = stamps[is_key == 1], np.unique(shown)
        if stream.codec_context.has_b_frames and (np.diff(shown) >= 0).all():
            keys = []  # stamps that never go back although there are B-frames are no times
        return (pts - pts[0]) * float(stream.time_base), pts, keys


def decode_frames(path, pts, keys, wanted, bounds):
    """The pixels of the frames with the stamps `wanted`, some of `pts`, resized within the bounds:
    decoded from the key frame before each. Where decoded frames have other stamps than listed, or no
    keys are known, all frames are decoded: the n-th one has the n-th stamp."""
    found, place, reached, end = {}, 0, -math.inf, -math.inf if len(keys) else math.inf
    groups = np.searchsorted(keys, wanted, side="right") - 1
    last = dict(zip(keys[groups], wanted)) if len(keys) else {}  # key -> last wanted one after it
    with open_video(path) as file:
        stream = file.streams.best("video")
        for packet in file.demux(stream):
            if packet.is_keyframe:
                end = max(end, last.get(packet.dts if packet.pts is None else packet.pts, end))
            for frame in packet.decode() if reached < end else ():
                stamp = frame.pts
                if last and (stamp is None or stamp <= reached):
                    return decode_frames(path, pts, [], wanted, bounds)
                if not last and (stamp is None or stamp >= pts[0]):
                    stamp, place = pts[min(place, len(pts) - 1)], place + 1
                reached = stamp
                if stamp in wanted:
                    if frame.is_corrupt:
                        raise ValueError("a wanted frame is damaged")
                    h, w = smart_resize(frame.height, frame.width, PATCH * MERGE, *bounds)
                    pixels = frame.reformat(w, h, "rgb24", interpolation="BICUBIC").to_ndarray()
                    found[int(stamp)] = np.rot90(pixels, round(frame.rotation / 90))
            if last and reached >= end:
                stream.codec_context.flush_buffers()  # the next packets do not follow on
    if not last and place != len(pts):
        raise ValueError(f"{place} frames can be decoded of {len(pts)}")
    if not found.keys() >= {*wanted.tolist()}:
        return decode_frames(path, pts, [], wanted, bounds)
    return [found[stamp] for stamp in wanted.tolist()]


def read_medium(medium, limits, folder_fps=None):
    """A record's medium within the limits as a Video: an image becomes two equal frames."""
    path = medium["path"]
    if not os.path.exists(path):
        raise MediaError("missing_media", f"no file {path[:200]}")
    if medium["type"] == "image":
        image = read_image(path, *limits[:2])  # in the order of Limits
        return Video(np.stack([image, image]), [0, 0], 1.0, 1)
    return read_video(path, *limits[2:6], folder_fps)


# ---- Model inputs.
@dataclass
class Prompt:  # ready for the trainer and for vLLM
    record: dict
    token_ids: list  # T ints, vision tokens expanded
    positions: np.ndarray  # int64 (3, T), mRoPE: time, height, width
    patches: torch.Tensor  # uint8 (P, 3 * 2 * 16 * 16), all media in the order of the text
    grids: torch.Tensor  # int64 (M, 3): frames / 2, height / 16, width / 16 of each medium
    vllm: dict  # what LLM.generate takes
    opened: str = ""  # what the chat template has written of the response, such as "<think>\n"


def patchify(frames):
    """uint8 (T, H, W, 3), T even -> patches in Qwen3-VL's order, in which 2 x 2 neighbours stand
    together: uint8 (T/2 * H/16 * W/16, 3 * 2 * 16 * 16), and the grid (T/2, H/16, W/16)."""
    time, height, width = np.array(frames.shape[:3]) // (TEMPORAL, PATCH, PATCH)
    rows, columns = (height // MERGE, MERGE, PATCH), (width // MERGE, MERGE, PATCH)
    blocks = frames.reshape(time, TEMPORAL, *rows, *columns, 3)
    # time, row and column of the token, row and column in the token | channel, frame, y, x
    blocks = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return blocks.reshape(time * height * width, -1), (int(time), int(height), int(width))


def mrope_positions(token_ids, vision_ids, grids):
    """Qwen3-VL's positions, int64 (3, T): text counts on in all three rows; a frame covers its grid
    of tokens and takes its longer side. A video has one run of vision tokens per time step, since
    time stamps stand between them. vision_ids: of image and video tokens. grids: (M, 3)."""
    is_vision = np.isin(token_ids, vision_ids)
    runs = np.flatnonzero(np.diff(is_vision, prepend=False, append=False)).reshape(-1, 2)
    frames = [(h // MERGE, w // MERGE) for time, h, w in grids for _ in range(time)]
    inside, advance = np.zeros((3, len(token_ids)), int), np.ones(len(token_ids), int)
    for (start, end), (height, width) in zip(runs, frames, strict=True):
        inside[1:, start:end] = np.divmod(np.arange(height * width), width)  # time stays
        advance[start:end], advance[end - 1] = 0, max(height, width)
    return inside + np.cumsum(advance) - advance


def encode(record, processor, limits=None, prompts=PROMPTS, system=None):
    """A record -> Prompt. Raises MediaError if a medium cannot be read or the prompt is too long. Two
    frames of a video are `<1.5 seconds><|vision_start|>...<|vision_end|>`, as in transformers 4.57."""
    tokenizer, limits = processor.tokenizer, limits or Limits()
    turns = [dict(role="system", content=system)] * bool(system)
    turns += record.get("messages", [])[:-1]
    if "messages" not in record:
        turns.append(dict(role="user", content=render_problem(record, prompts)))
    said = "\n".join([*(turn["content"] for turn in turns), record.get("demonstration") or ""])
    if wrong := re.search(r"<\|\w+\|>|[\ud800-\udfff]", said):
        raise MediaError("control_token", f"control token or half a letter: {wrong[0]!r}")
    kinds = [medium["type"] for medium in record["media"]]
    patches = [np.zeros((0, 3 * TEMPORAL * PATCH**2), np.uint8)]
    grids, expanded, vllm_media = [], [], {kind: [] for kind in kinds}
    for kind, medium in zip(kinds, record["media"]):
        video = read_medium(medium, limits, record.get("fps"))
        rows, grid = patchify(video.frames)
        pads = f"<|{kind}_pad|>" * (grid[1] * grid[2] // MERGE**2)
        if kind == "image":
            vllm_media[kind].append(Image.fromarray(video.frames[0]))
        else:
            known = dict(fps=video.fps, frames_indices=video.indices, video_backend="pyav")
            known |= dict(total_num_frames=video.total, do_sample_frames=False)
            vllm_media[kind].append((video.frames.transpose(0, 3, 1, 2), known))
            shown = np.array(video.indices) / video.fps  # seconds
            # The mean in the library's own order: 3.15 would else be 3.1 here and 3.2 there.
            means = (shown[::2] + shown[1::2]) / 2
            frame = f"<|vision_start|>{pads}<|vision_end|>"
            pads = "".join(f"<{second:.1f} seconds>{frame}" for second in means)
        patches.append(rows)
        grids.append(grid)
        expanded.append(pads)

    def placed(text):  # the problem comes first: an <image> in an option or an answer stays text
        image = "<|vision_start|><|image_pad|><|vision_end|>"
        text = text.replace("<image>", image, kinds.count("image"))
        return text.replace("<video>", "<|video_pad|>", kinds.count("video"))

    turns = [t | {"content": placed(t["content"])} if t["role"] == "user" else t for t in turns]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    full = re.sub(r"<\|(image|video)_pad\|>", lambda _: expanded.pop(0), text)
    token_ids = tokenizer(full, add_special_tokens=False)["input_ids"]
    if len(token_ids) > limits.max_prompt_tokens:
        raise MediaError("too_long", f"{len(token_ids)} tokens, limit {limits.max_prompt_tokens}")
    vision_ids = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    positions = mrope_positions(token_ids, vision_ids, grids)
    patches = torch.from_numpy(np.concatenate(patches))
    grids = torch.tensor(grids, dtype=torch.int64).reshape(-1, 3)
    vllm = dict(prompt=text, multi_modal_data=vllm_media)
    vllm["mm_processor_kwargs"] = dict(do_resize=False, do_sample_frames=False)
    opened = text.rpartition("<|im_start|>assistant\n")[2]
    return Prompt(record, token_ids, positions, patches, grids, vllm, opened)


def target_ids(prompt, tokenizer):
    """What SFT learns: the demonstration less what the prompt has opened, and the end."""
    text, opened = prompt.record["demonstration"].lstrip(), prompt.opened.strip()
    if not text.startswith(opened):
        raise MediaError("opened", f"the response does not begin with {opened!r}")
    text = text.removeprefix(opened).lstrip()
    return tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]


# ---- Feeding: which record next, decoded ahead of time.
def data_order(count, seed, cursor=0, rank=0, world=1):
    """Endless record indices of one rank: a new permutation every epoch, dealt like cards. The
    order over all ranks depends on the seed alone. cursor: records that all ranks have taken.
    >>> [list(itertools.islice(data_order(6, 0, rank=rank, world=2), 3)) for rank in (0, 1)]
    [[3, 5, 0], [2, 4, 1]]
    """
    epoch, done = divmod(cursor, count)
    shuffled = lambda epoch: np.random.default_rng([seed, epoch]).permutation(count).tolist()
    all_ranks = itertools.chain.from_iterable(map(shuffled, itertools.count(epoch)))
    return itertools.islice(all_ranks, done + rank, None, world)


def prefetch(records, function, order, workers, seconds=600):
    """Yields function(records[i]), or the MediaError that it raises, for i in `order`, computed ahead
    by worker processes (0: here). Raises RuntimeError if a record takes longer than `seconds`."""

    def begin(_):
        os.setsid()  # Ctrl-C and SIGTERM are for the script, which stops after its step
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: end with the script

    def use(record):
        try:
            return function(record)
        except MediaError as error:
            return MediaError(error.reason, f"{record['file']}: record {record['index']}: {error}")

    # Without batches DataLoader calls collate_fn on each record.
    settings = dict(sampler=order, batch_size=None, collate_fn=use, worker_init_fn=begin)
    if workers := min(workers, CORES):  # by fork, which takes local functions along
        settings |= dict(num_workers=workers, timeout=seconds, multiprocessing_context="fork")
    return iter(torch.utils.data.DataLoader(records, **settings))


# ---- Drawing: what an answer says on its media, for --peek, infer.py and evaluate.py
# What an answer says: span (start, end), boxes {second: [x1, y1, x2, y2]} (0: of an image),
# points [[x, y], ...] on and beside an object, and their time in a video. Coordinates are 0-1000.
Marks = namedtuple("Marks", "span boxes positive negative time", defaults=(None, {}, [], [], None))


def marks_of(task, answer):
    """The marks in an answer's text (or None), without what is malformed. task: of task_of; where
    messages do not say it (None) the fields do. Key k is the frame at k seconds, of tracking k - 1."""
    said = rewards.read_json(answer) if answer and task not in rewards.TEXT_TYPES else {}
    time, boxes = said.get("time"), said.get("boxes")
    is_prompt = task == "segmentation-video" or not task and rewards.is_number(time)
    if is_prompt and not rewards.is_number(time):
        return Marks()  # of which frame?
    second = time if is_prompt else None
    first = int(task == "tracking" or not task and time is None)  # the key of second 0
    keyed = boxes if isinstance(boxes, dict) and "segmentation" not in str(task) else {}
    keys = [key for key in keyed if re.fullmatch("[0-9]{1,9}", key) and int(key) >= first]
    boxes = {float(key) - first: boxes[key] for key in keys} or {second or 0: boxes}
    boxes = {at: box for at, box in boxes.items() if rewards.are_numbers(box, 4)}
    points = [said.get("positive_points"), said.get("negative_points")]
    points = [part if isinstance(part, list) else [] for part in points]
    points = [[xy for xy in part if rewards.are_numbers(xy, 2)] for part in points]
    return Marks(tuple(time) if rewards.are_numbers(time, 2) else None, boxes, *points, second)


def draw(image, marks, second=0):
    """An RGB copy of a PIL image, a tiny one enlarged, with what {colour: Marks} have at this second
    (0: of an image), the first ones widest: a span as border, a box, positive points as discs in
    the colour, negative ones as black discs with a rim in it."""
    factor = math.ceil(160 / max(image.size))
    image = ImageOps.scale(image.convert("RGB"), factor, Image.Resampling.NEAREST)
    last = image.width - 1, image.height - 1
    pixel = lambda xy: tuple(round(min(max(v, 0), 1000) * n / 1000) for v, n in zip(xy, last))
    for scale, (colour, part) in zip(range(len(marks), 0, -1), marks.items()):
        canvas, line = ImageDraw.Draw(image), scale * max(2, min(image.size) // 150)
        if part.span and part.span[0] <= second < part.span[1]:
            canvas.rectangle([(0, 0), last], None, colour, 2 * line)
        seconds = sorted(part.boxes)
        if seconds and seconds[0] <= second < seconds[-1] + 1:
            sides = zip(*(part.boxes[each] for each in seconds))  # on a line between two seconds
            box = [np.interp(second, seconds, side) for side in sides]
            corners = map(pixel, zip(sorted(box[::2]), sorted(box[1::2])))
            canvas.rectangle([*corners], None, colour, line)
        if (part.time or 0) <= second < (part.time or 0) + 1:
            for xy in map(pixel, part.positive):
                canvas.circle(xy, 2 * line, colour, "black")
            for xy in map(pixel, part.negative):
                canvas.circle(xy, 2 * line, "black", colour, line)
    return image


def captioned(image, text, size=14):
    """The image with black text below it. Width and height become even, as an MP4 needs."""
    lines = textwrap.wrap(text, max(8, int(image.width / size / 0.55)))
    height = image.height + ((size + 4) * len(lines) + 6 if lines else 0)
    canvas = Image.new("RGB", (image.width + image.width % 2, height + height % 2), "white")
    canvas.paste(image)
    text, font = "\n".join(lines), ImageFont.load_default(size)
    ImageDraw.Draw(canvas).text((4, image.height + 2), text, "black", font, spacing=4)
    return canvas


def nearest(seconds, second):
    """The index of the frame that is nearest in time; of two, the later one."""
    return int(np.abs(np.subtract(seconds, second) - 1e-6).argmin())


def draw_medium(video, marks):
    """A Video with {colour: Marks} on it: its one frame, or up to 8 side by side with their seconds
    below. They are those at whole seconds, which have boxes, and at a segmentation's time."""
    if video.total == 1:
        return draw(Image.fromarray(video.frames[0]), marks)
    cells, seconds = [], np.array(video.indices) / video.fps
    times = {part.time for part in marks.values() if part.time is not None}
    spread = np.floor(np.linspace(seconds[0], seconds[-1], 8 - len(times)))
    for second in sorted({*spread.tolist(), *times}):
        i = nearest(seconds, second)
        image = ImageOps.contain(Image.fromarray(video.frames[i]), (160, 160))
        cell = captioned(draw(image, marks, second), f"{seconds[i]:.1f} s", 11)
        cells.append(ImageOps.expand(cell, (0, 0, 2, 0), "white"))
    return Image.fromarray(np.hstack(cells))


def main():
    """Prints some prompts, their truth and what SFT learns; draws the truth: peek-<record>-<i>.png."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("file", help="record file")
    add("--model", required=True, help="folder or hub id")
    add("--media-root", help="folder of the media (default: the file's)")
    add("--prompts", help="JSON file of instructions (default: PROMPTS)")
    add("--peek", type=at_least(1), default=3, help="records to show (%(default)s)")
    add_limits(parser)
    args = parser.parse_args()
    limits = limits_of(args)
    try:
        processor, prompts = load_processor(args.model), load_prompts(args.prompts)
        records = load_records(args.file, args.media_root)
    except (OSError, ValueError) as error:
        refuse(error)
    print(f"{args.file}:", Counter(record["problem_type"] or "SFT" for record in records))
    for record in records[: args.peek]:
        print(f"\n--- record {record['index']}, {record['problem_type'] or 'SFT'}")
        try:
            prompt, shown = encode(record, processor, limits, prompts), record["demonstration"]
            learned = target_ids(prompt, processor.tokenizer) if shown else []
        except MediaError as error:
            print(f"skipped, {error.reason}: {error}")
            continue
        truth = record["answer"] or rewards.find_answer(shown) or ""
        marks = {"lime": marks_of(task_of(record), truth)}
        for i, medium in enumerate(record["media"]):
            video, path = read_medium(medium, limits, record.get("fps")), f"{record['index']}-{i}"
            captioned(draw_medium(video, marks), truth).save(f"peek-{path}.png")
            print(f"{medium['type']} of height, width {video.frames.shape[1:3]}: peek-{path}.png")
        count = lambda run: f"{run[1]}x{len(run[0]) // len(run[1])}"  # run[1]: one of them
        print(re.sub(r"(<\|\w+_pad\|>)+", count, processor.decode(prompt.token_ids)))
        print(f"--- {len(prompt.token_ids)} tokens given, {len(learned)} learned:")
        print(f"{processor.decode(learned)}\n--- truth: {truth}")


if __name__ == "__main__":
    main()
