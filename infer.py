"""Asks a model about an image or a video: prints the response as it comes, and draws the answer.

    python infer.py --model runs/rl --image a.jpg --task "spatial grounding" "the cat" --save out.png
    python infer.py --model runs/rl --video a.mp4 --task "multiple choice" "Who?" --options dog man
    python infer.py --model runs/rl --questions file.jsonl --json    # one JSON object per question
    python infer.py --model runs/rl --video a.mp4                    # asks for questions
    python infer.py --base-url http://127.0.0.1:8000/v1 --image a.jpg "..."    # a `vllm serve`

Prompts are those of training, decoding is greedy, answers are read as in evaluation. Exit code 1: an
answer cannot be read, 2: the request cannot be used. A server gets the same pixels and times. It
writes the prompt by its own chat template (transformers 5 puts one more pair of vision tokens around
a whole video), may answer with vision tokens, and for videos needs --trust-request-mm-kwargs.
"""

import base64
import io
import json
import os
import re
import sys
import urllib.request
from fractions import Fraction
from functools import cache
from http.client import HTTPException

import av
import numpy as np
import torch
from PIL import Image, ImageOps
from tokenizers.decoders import DecodeStream

import cpu_compat  # noqa: F401  (before transformers)
import data
import rewards
from rewards import PROBLEM_TYPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNUSABLE = (OSError, ValueError, data.MediaError)

# ---- Drawing


def iter_frames(path, folder_fps):
    """The length of a video (file, or folder of numbered images) in seconds, and an iterator of
    (second, PIL image) of all its frames, upright and in their own size."""
    if os.path.isdir(path):
        paths = data.list_frame_folder(path)
        images = (ImageOps.exif_transpose(Image.open(name)) for name in paths)
        return len(paths) / folder_fps, ((i / folder_fps, image) for i, image in enumerate(images))
    with data.open_video(path) as container:
        stream = container.streams.best("video")
        pts, _ = data.list_frames(container, stream)
        seconds = (pts - pts[0]) * float(stream.time_base)

    def frames():
        with data.open_video(path) as container:
            decoded = container.decode(container.streams.best("video"))
            shown = (frame for frame in decoded if frame.pts is None or frame.pts >= pts[0])
            for second, frame in zip(seconds.tolist(), shown):
                pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                yield second, Image.fromarray(np.ascontiguousarray(pixels))

    return seconds[-1] * len(pts) / max(1, len(pts) - 1), frames()


def save_video(path, frames, length):
    """Writes (second, PIL image) pairs as MP4 or GIF. A GIF's last frame is shown until `length`."""
    if path.endswith(".gif"):
        seconds, images = zip(*frames)
        times = 10 * np.round(100 * np.array([*seconds, length]))  # milliseconds, in steps of ten
        settings = dict(duration=np.diff(times).tolist(), loop=0)
        return images[0].save(path, save_all=True, append_images=images[1:], **settings)
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", options={"crf": "18"})
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 90_000)
        for second, image in frames:
            if not stream.codec_context.is_open:
                stream.width, stream.height = image.size
            frame = av.VideoFrame.from_image(image)
            frame.pts, frame.time_base = round(second * 90_000), Fraction(1, 90_000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def save_drawing(path, record, answer, limits, sam2=None):
    """Draws an answer on its record's image (PNG) or video (PNG: a few frames; MP4, GIF: all), in its
    own size unless it is tiny. Text, and what cannot be read, is written below, and a time span."""
    task = data.task_of(record)
    marks = data.marks_of(task, answer)
    has_marks = task not in rewards.TEXT_TYPES and rewards.readable(record, answer)
    caption = "" if has_marks else answer or "(no answer)"
    if marks.span:
        caption = "time {:.1f} to {:.1f} s".format(*marks.span)
    medium = max(record["media"], key=lambda medium: medium["type"])  # a video, if there is one
    if medium["type"] == "image":
        with Image.open(medium["path"]) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
        mask = segment_images(sam2, [(image, marks)])[0] if sam2 else None
        return data.captioned(data.draw(data.enlarged(image), marks, mask=mask), caption).save(path)

    fps, masks = record.get("fps") or limits.fps, None
    video = data.read_medium(medium, limits, fps)
    seconds = [index / video.fps for index in video.indices]
    if sam2 and marks.time is not None:
        masks = segment_video(sam2, video.frames, data.nearest(seconds, marks.time), marks)
    if path.endswith(".png"):
        strip = data.draw_strip(video.frames, seconds, {"orange": marks}, masks)
        return data.captioned(strip, caption).save(path)

    def drawn(frames):
        for second, image in frames:
            mask = None if masks is None else masks[data.nearest(seconds, second)]
            image = data.draw(data.enlarged(image), marks, second, mask=mask)
            yield second, data.captioned(image, caption)

    length, frames = iter_frames(medium["path"], fps)
    save_video(path, drawn(frames), length)


def check_sam2(path):
    """Raises ValueError for what is neither a folder with a model nor looks like a hub id."""
    hub_id = path.count("/") == 1 and not os.path.isdir(os.path.dirname(path))
    if not hub_id and not os.path.exists(f"{path}/config.json"):
        raise ValueError(f"--sam2 {path}: no folder of a SAM2, and no hub id: owner/name")


def load_sam2(path, device):
    """SAM2 from a folder or hub id, such as facebook/sam2.1-hiera-large: what is used below."""
    from transformers import Sam2VideoModel, Sam2VideoProcessor

    check_sam2(str(path))
    model = Sam2VideoModel.from_pretrained(path, use_safetensors=True).to(device).eval()
    return model, Sam2VideoProcessor.from_pretrained(path)


def segment_images(sam2, items):
    """(PIL image, Marks) pairs -> masks, bool (H, W) each. An image is a video of one frame."""
    images = [(np.array(image.convert("RGB")), marks) for image, marks in items]
    return [segment_video(sam2, pixels[None], 0, marks)[0] for pixels, marks in images]


@torch.no_grad()
def segment_video(sam2, frames, index, marks):
    """Frames, uint8 (T, H, W, 3) -> masks, bool (T, H, W); empty ones without box and points. The
    marks are of frame `index`; from there SAM2 goes to the end and to the beginning."""
    model, processor = sam2
    masks, (height, width) = np.zeros(frames.shape[:3], bool), frames.shape[1:3]
    corners = [xy for box in marks.boxes.values() for xy in (box[:2], box[2:])]
    points = [*corners, *marks.positive, *marks.negative]
    if not points:
        return masks
    pixels = [[[x * width / 1000, y * height / 1000] for x, y in points]]
    labels = [2, 3] * len(marks.boxes) + [1] * len(marks.positive) + [0] * len(marks.negative)
    places = dict(inference_device=model.device, video_storage_device="cpu")
    session = processor.init_video_session(video=[frames], **places)
    prompt = dict(frame_idx=index, obj_ids=1, input_points=[pixels], input_labels=[[labels]])
    processor.add_inputs_to_inference_session(session, **prompt)
    for back in (False, True):
        for step in model.propagate_in_video_iterator(session, index, reverse=back):
            mask = processor.post_process_masks([step.pred_masks.cpu()], [(height, width)])[0]
            masks[step.frame_idx] = mask[0, 0].numpy()
    return masks


# ---- Responses, as streams of (piece of text, None or at the end "stop" or "length")


@torch.no_grad()
def stream_model(prompt, model, tokenizer, max_tokens):
    """A data.Prompt -> the stream of a model's greedy response, first what the prompt has opened."""
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    banned = tokenizer.convert_tokens_to_ids(data.BANNED)
    pixels = (prompt.patches.to(model.device) / 127.5 - 1).split(prompt.grids.prod(1).tolist())
    media = {}
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        which = [i for i, m in enumerate(prompt.record["media"]) if m["type"] == kind]
        if which:
            media[name] = torch.cat([pixels[i] for i in which])
            media[f"{kind}_grid_thw"] = prompt.grids[which].to(model.device)

    yield prompt.opened, None
    ids, positions = torch.tensor([prompt.token_ids]), torch.tensor(prompt.positions)[:, None]
    letters, past = DecodeStream(skip_special_tokens=False), None
    for _ in range(max_tokens):
        inputs = dict(input_ids=ids.to(model.device), position_ids=positions.to(model.device))
        output = model(**inputs, **media, past_key_values=past, use_cache=True, logits_to_keep=1)
        past, media = output.past_key_values, {}
        output.logits[..., banned] = -torch.inf
        token = int(output.logits[0, -1].argmax())
        if token in ends:
            yield "", "stop"
            return
        yield letters.step(tokenizer.backend_tokenizer, token) or "", None  # None: half a letter
        ids, positions = torch.tensor([[token]]), positions.max().expand(3, 1, 1) + 1
    yield "", "length"


def in_base64(image, form="png"):
    """A PIL image -> the bytes of a file (png: without loss) in base64."""
    image.save(file := io.BytesIO(), form)
    return base64.b64encode(file.getvalue()).decode()


def request_of(record, model, limits, max_tokens, prompts, system=None):
    """A record -> the JSON of a chat request to a vLLM server, which takes the sampled frames of one
    video as "video/jpeg", whatever their format, with their times beside them."""
    content, more, media = [], {}, iter(record["media"])
    problem = data.render_problem(record, prompts)
    for part in re.split("(<image>|<video>)", problem, maxsplit=len(record["media"])):
        if part == "<image>":
            image = Image.fromarray(data.read_medium(next(media), limits))
            url = f"data:image/png;base64,{in_base64(image)}"
            content.append(dict(type="image_url", image_url=dict(url=url)))
        elif part == "<video>":
            if more:
                raise ValueError("--base-url: one video per question, vLLM takes the times of one")
            video = data.read_medium(next(media), limits, record.get("fps"))
            frames = [in_base64(Image.fromarray(frame)) for frame in video.frames]
            url = f"data:video/jpeg;base64,{','.join(frames)}"
            content.append(dict(type="video_url", video_url=dict(url=url)))
            times = dict(fps=video.fps, frames_indices=video.indices, total_num_frames=video.total)
            more["media_io_kwargs"] = dict(video=times | dict(num_frames=-1))
            more["mm_processor_kwargs"] = dict(do_resize=False, do_sample_frames=False)
        elif part:
            content.append(dict(type="text", text=part))
    turns = [dict(role="system", content=system)] if system else []
    turns.append(dict(role="user", content=content))
    settings = dict(stream=True, temperature=0.0, max_tokens=max_tokens, skip_special_tokens=False)
    return dict(model=model, messages=turns, **settings, **more)


def ask_server(url, request=None, silence=30):
    """GETs a URL, or POSTs a request -> the lines of the reply, as they come. Raises OSError, also if
    the server is silent for so many seconds."""
    body = json.dumps(request).encode() if request else None
    key = f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"
    headers = {"Content-Type": "application/json", "Authorization": key}
    try:
        request = urllib.request.Request(url, body, headers)
        with urllib.request.urlopen(request, timeout=silence) as reply:
            yield from reply
    except (OSError, HTTPException) as error:
        reason = error.read(1000) if isinstance(error, urllib.error.HTTPError) else b""
        hint = " (see --max-response-tokens)" if b"max_tokens" in reason else ""
        raise OSError(f"{url}: {error} {reason.decode(errors='replace')}{hint}") from error


def stream_server(request, url):
    """A chat request -> the stream of a server's response (server-sent events)."""
    for line in ask_server(f"{url}/chat/completions", request):
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if "error" in event:
                raise OSError(f"{url}: {event['error']}")
            for choice in event["choices"]:
                yield choice["delta"].get("content") or "", choice["finish_reason"]


# ---- The script


# fmt: off
def parse_args():
    parser = data.new_parser(__doc__)
    group = parser.add_argument_group("what")
    group.add_argument("question", nargs="?", help="without it, and without --questions: a prompt for questions")
    medium = group.add_mutually_exclusive_group()
    medium.add_argument("--image", help="image file")
    medium.add_argument("--video", help="video file, or folder of numbered images, shown at --fps")
    group.add_argument("--task", choices=PROBLEM_TYPES, metavar="TASK", default="open-ended", help=", ".join(PROBLEM_TYPES))
    group.add_argument("--options", nargs="+", default=[], help="of a multiple choice, after the question")
    group.add_argument("--questions", metavar="FILE",
                       help='lines of {"problem": "What is it?", "problem_type": "OCR", "images": ["a.jpg"]}')
    group.add_argument("--save", help=".png, .mp4 or .gif file; with --questions a folder for 0.png, 1.png, ...")
    group.add_argument("--json", action="store_true", help="print one JSON object per question")
    group = parser.add_argument_group("model")
    group.add_argument("--model", help="folder or hub id; with --base-url its name there (default: the first)")
    group.add_argument("--base-url", metavar="URL", help="vLLM server, http://127.0.0.1:8000/v1; key: OPENAI_API_KEY")
    group.add_argument("--sam2", help="folder or hub id of a SAM2, for masks from box and points")
    group.add_argument("--prompts", help="JSON file that replaces the instructions of data.py")
    group.add_argument("--system", metavar="FILE", help="text file for a system turn before the question")
    group.add_argument("--max-response-tokens", type=data.at_least(1), default=8192, help="(%(default)s)")
    data.add_limits(parser, image_max_pixels=1024 * 32 * 32, frame_max_pixels=256 * 32 * 32,
                    video_total_pixels=24576 * 1024, max_prompt_tokens=20480)
    return parser.parse_args()
# fmt: on


def read_questions(path):
    """A JSONL file of questions -> records; "{}" stands where an answer is missing."""
    folder, raws = os.path.dirname(os.path.abspath(path)), data.read_values(path)
    raws = [{"answer": "{}"} | raw if isinstance(raw, dict) else raw for raw in raws]
    return [data.normalise(raw, path, index, folder) for index, raw in enumerate(raws)]


def record_of(question, kind, path, task, options):
    """A request as a record (see data.load_records). Raises ValueError if it makes no sense."""
    if not path:
        raise ValueError("--image or --video is needed")
    if kind == "image" and task in ("temporal grounding", "spatial-temporal grounding", "tracking"):
        raise ValueError(f"--task {task!r} does not go with --image")
    if (task == "multiple choice") != bool(options):
        raise ValueError("--options are needed for a multiple choice, and only there")
    if not all(re.match(r"\(?[A-Z][).:]", option) for option in options):
        options = [f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(options)]
    folder, name = os.path.split(os.path.abspath(path))
    raw = dict(problem=question, problem_type=task, options=options, data_type=kind, answer="{}")
    raw[f"{kind}s"] = name
    return data.normalise(raw, "this question", 0, folder)


def print_stream(record, pieces, as_json=False):
    """Prints a response as it comes, then the answer as it is read; or one JSON object. Returns the
    answer (None: there is none) and whether it can be read for its task."""
    text, finished = "", False
    for piece, end in pieces:
        text, finished = text + piece, end == "stop"
        if not as_json:
            print(piece, end="", flush=True)
    answer, task = rewards.answer_of(record, text), data.task_of(record)
    readable = rewards.readable(record, answer)
    if as_json:
        line = dict(problem_id=record["problem_id"], task=task, response=text, answer=answer)
        print(json.dumps(line | dict(readable=readable, finished=finished)), flush=True)
    else:
        print(f"\nanswer: {answer or '(none)'}", flush=True)
    if not finished:
        print("infer.py: cut off, by --max-response-tokens or by the server", file=sys.stderr)
    if not readable:
        print(f"infer.py: this answer cannot be read for the task {task!r}", file=sys.stderr)
    return answer, readable


def converse(ask, kind, path, task, save):
    """Asks for questions until Ctrl-D. What cannot be used is named; Ctrl-C stops an answer."""
    import readline  # noqa: F401  (gives input() its history and its arrow keys)

    print("Ask (choices: Which? | cat | dog), or /image FILE, /video FILE, /task NAME; Ctrl-D ends")
    while True:
        try:
            line = input(f"{os.path.basename(path or 'no image, no video')}, {task}> ").strip()
            command, _, rest = line.partition(" ")
            if command == "/image" and rest.lower().endswith((".mp4", ".mkv", ".webm", ".mov")):
                print("that is a video: use /video")
            elif command in ("/image", "/video"):
                kind, path = command[1:], os.path.expanduser(rest.strip())
            elif command == "/task" and rest in PROBLEM_TYPES:
                task = rest
            elif line.startswith("/"):
                print(f"no such task or command: {line}")
            elif line:
                question, *options = (part.strip() for part in line.split("|"))
                ask(record_of(question, kind, path, task, options), save)
        except EOFError:
            return print()
        except KeyboardInterrupt:
            print()
        except UNUSABLE as error:
            print(error)


@cache
def load_model(path):
    from transformers import AutoModelForImageTextToText

    dtype = "bfloat16" if DEVICE == "cuda" else "float32"
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, use_safetensors=True)
    data.one_matrix_patch_embedding(model.model.visual)
    return model.to(DEVICE).eval()


def main():
    args = parse_args()
    kind, path = ("image", args.image) if args.image else ("video", args.video)
    limits, most = data.limits_of(args), args.max_response_tokens

    # 1 What can be refused is refused before a model is loaded
    if not (args.model or args.base_url):
        raise ValueError("--model or --base-url is needed")
    if args.json and not (args.question or args.questions):
        raise ValueError("--json: a question or --questions is needed")
    if args.questions:
        records, folder = read_questions(args.questions), args.save
    else:
        asked = [args.question] if args.question else []
        records = [record_of(question, kind, path, args.task, args.options) for question in asked]
        folder = args.save and os.path.dirname(os.path.abspath(args.save))
        endings = (".png",) if kind == "image" else (".png", ".mp4", ".gif")
        if args.save and not args.save.endswith(endings):
            raise ValueError(f"--save {args.save}: expected {' or '.join(endings)}")
    if folder:
        os.makedirs(folder, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise OSError(f"--save: {folder} cannot be written")
    system = open(args.system, encoding="utf-8").read().strip() if args.system else None
    texts = dict(prompts=data.load_prompts(args.prompts), system=system)

    # 2 The model
    if args.base_url:
        url = args.base_url.rstrip("/")
        name = args.model or json.loads(b"".join(ask_server(f"{url}/models")))["data"][0]["id"]
    else:
        processor = data.load_processor(args.model)
    sam2 = load_sam2(args.sam2, DEVICE) if args.sam2 else None

    # 3 The answers
    def ask(record, save):
        if args.base_url:
            stream = stream_server(request_of(record, name, limits, most, **texts), url)
        else:
            prompt = data.encode(record, processor, limits, **texts)  # before a model is loaded
            stream = stream_model(prompt, load_model(args.model), processor.tokenizer, most)
        answer, readable = print_stream(record, stream, args.json)
        if save and record["media"]:
            save_drawing(save, record, answer, limits, sam2)
        return readable

    if not records:
        converse(ask, kind, path, args.task, args.save)
    unread = 0
    for i, record in enumerate(records):
        if args.questions and not args.json:
            print(f"--- {record['problem_id']}: {record['problem']}")
        save = os.path.join(folder, f"{i}.png") if folder and args.questions else args.save
        unread += not ask(record, save)
    return int(unread > 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UNUSABLE as error:
        data.refuse(error)
    except KeyboardInterrupt:
        sys.exit("infer.py: stopped")
