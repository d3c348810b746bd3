"""Asks a model about an image or a video: prints the response as it comes, and draws the answer.

    python infer.py --model runs/rl --image a.jpg --task "spatial grounding" "the cat" --save out.png
    python infer.py --model runs/rl --video a.mp4 --task "multiple choice" "Who?" --options dog man
    python infer.py --model runs/rl --video a.mp4                    # asks for questions
    python infer.py --base-url http://127.0.0.1:8000/v1 --image a.jpg "..."    # a `vllm serve`

Prompts are those of training, decoding is greedy. Exit code 1: the answer cannot be read, 2: the
request cannot be used. A server needs --trust-request-mm-kwargs for the times of videos.
"""

import base64
import io
import json
import os
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

import cpu_compat  # before transformers
import data
import rewards
from rewards import PROBLEM_TYPES

PIXELS = dict(image_max_pixels=2**20, frame_max_pixels=2**18)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNUSABLE = (OSError, ValueError, data.MediaError)


def iter_frames(medium, folder_fps):
    """Yields (second, PIL image) of a record's image, or of all frames of its video (file, or folder
    of numbered images), upright and in their own size."""
    path, is_image = medium["path"], medium["type"] == "image"
    if is_image or os.path.isdir(path):
        for i, name in enumerate([path] if is_image else data.list_frame_folder(path)):
            yield i / folder_fps, ImageOps.exif_transpose(Image.open(name)).convert("RGB")
        return
    seconds, pts, _ = data.list_frames(path)
    with data.open_video(path) as container:
        decoded = container.decode(container.streams.best("video"))
        shown = (frame for frame in decoded if frame.pts is None or frame.pts >= pts[0])
        for second, frame in zip(seconds.tolist(), shown):
            pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
            yield second, Image.fromarray(np.ascontiguousarray(pixels))


def save_video(path, frames, length):
    """Writes (second, PIL image) pairs as MP4 or GIF. A GIF's last frame is shown until `length`."""
    if path.endswith(".gif"):
        seconds, images = zip(*frames)
        times = 10 * np.round(100 * np.array([*seconds, length]))  # ms, in steps of ten
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


def tint(image, mask):
    """A PIL image, half orange where a mask, bool (H, W) of any size, is."""
    orange = Image.blend(image, Image.new("RGB", image.size, "orange"), 0.5)
    return Image.composite(orange, image, Image.fromarray(mask).resize(image.size))


def save_drawing(path, record, answer, limits, sam2=None):
    """Draws an answer on its record's image (PNG) or video (PNG: a few frames; MP4, GIF: all), in its
    own size unless it is tiny. A time span is written below, and an answer without any marks."""
    marks = data.marks_of(data.task_of(record), answer)
    drawing = {"orange": marks}
    caption = "" if any(marks[:4]) else answer or "(no answer)"
    if marks.span:
        caption = "time {:.1f} to {:.1f} s".format(*marks.span)
    (medium,) = record["media"]
    fps, masks = record.get("fps") or limits.fps, None
    if medium["type"] == "image":
        frames = np.array(next(iter_frames(medium, fps))[1])[None]
        video = data.Video(frames, [0], 1.0, 1)
    else:
        video = data.read_medium(medium, limits, fps)
    seconds = np.array(video.indices) / video.fps
    if sam2 and (marks.time is not None or medium["type"] == "image"):
        masks = segment_video(sam2, video.frames, data.nearest(seconds, marks.time or 0), marks)
        images = map(tint, map(Image.fromarray, video.frames), masks)
        video = video._replace(frames=np.stack([*images]))
    if path.endswith(".png"):
        return data.captioned(data.draw_medium(video, drawing), caption).save(path)

    def drawn(frames):
        for second, image in frames:
            if masks is not None:
                image = tint(image, masks[data.nearest(seconds, second)])
            yield second, data.captioned(data.draw(image, drawing, second), caption)

    save_video(path, drawn(iter_frames(medium, fps)), video.total / video.fps)


def load_sam2(path, device):
    """SAM2 from a folder or hub id, such as facebook/sam2.1-hiera-large: what is used below."""
    from transformers import Sam2VideoModel, Sam2VideoProcessor

    data.check_path(path)
    model = Sam2VideoModel.from_pretrained(path, use_safetensors=True).to(device).eval()
    return model, Sam2VideoProcessor.from_pretrained(path)


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
    ends = {tokenizer.eos_token_id, *np.ravel(model.generation_config.eos_token_id)}
    banned = tokenizer.convert_tokens_to_ids(data.BANNED)
    pixels, grids = prompt.patches.to(model.device) / 127.5 - 1, prompt.grids.to(model.device)
    media = dict(pixel_values=pixels, image_grid_thw=grids)
    if prompt.record["data_type"] == "video":
        media = dict(pixel_values_videos=pixels, video_grid_thw=grids)

    yield prompt.opened, None
    ids, positions = torch.tensor([prompt.token_ids]), torch.tensor(prompt.positions)[:, None]
    letters, past = DecodeStream(), None
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


def request_of(record, model, limits, max_tokens, prompts):
    """A record -> the JSON of a chat request to a vLLM server, which takes the sampled frames of a
    video as "video/jpeg", whatever their format, with their times beside them."""
    kind = record["data_type"]
    video = data.read_medium(record["media"][0], limits, record.get("fps"))
    frames = [in_base64(Image.fromarray(frame)) for frame in video.frames]
    url, more = f"data:image/png;base64,{frames[0]}", {}
    if kind == "video":
        url = f"data:video/jpeg;base64,{','.join(frames)}"
        times = dict(fps=video.fps, frames_indices=video.indices, total_num_frames=video.total)
        more["media_io_kwargs"] = dict(video=times | dict(num_frames=-1))
        more["mm_processor_kwargs"] = dict(do_resize=False, do_sample_frames=False)
    before, after = data.render_problem(record, prompts).split(f"<{kind}>", maxsplit=1)
    medium = {"type": f"{kind}_url", f"{kind}_url": dict(url=url)}
    content = [dict(type="text", text=before), medium, dict(type="text", text=after)]
    settings = dict(stream=True, temperature=0, max_tokens=max_tokens, skip_special_tokens=False)
    return dict(model=model, messages=[dict(role="user", content=content)], **settings, **more)


def ask_server(url, request=None, silence=30):
    """GETs, or POSTs a request -> lines of a reply. Raises OSError, also after `silence` seconds."""
    body = json.dumps(request).encode() if request else None
    key = f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"
    headers = {"Content-Type": "application/json", "Authorization": key}
    try:
        request = urllib.request.Request(url, body, headers)
        with urllib.request.urlopen(request, timeout=silence) as reply:
            yield from reply
    except (OSError, HTTPException) as error:
        reason = error.read(1000) if isinstance(error, urllib.error.HTTPError) else b""
        raise OSError(f"{url}: {error} {reason.decode(errors='replace')}") from error


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
def parse_args():
    parser = data.new_parser(__doc__)
    group = parser.add_argument_group("what")
    add = group.add_argument
    add("question", nargs="?", help="without it: a prompt")
    medium = group.add_mutually_exclusive_group()
    medium.add_argument("--image", help="image file")
    medium.add_argument("--video", help="video file, or folder of images shown at --fps")
    add("--task", choices=PROBLEM_TYPES, default="open-ended", help="(%(default)s)")
    add("--options", nargs="+", default=[], help="of a multiple choice, after the question")
    add("--save", help="draw the answer: .png, of a video also .mp4 or .gif")
    add("--json", action="store_true", help="print a JSON object")
    add = parser.add_argument_group("model").add_argument
    add("--model", help="folder or hub id; with --base-url its name there")
    add("--base-url", help="vLLM server, .../v1; key: OPENAI_API_KEY")
    add("--sam2", help="folder or hub id of a SAM2, for masks")
    add("--prompts", help="JSON file of instructions (default: data.PROMPTS)")
    add("--max-response-tokens", type=data.at_least(1), default=8192, help="(%(default)s)")
    data.add_limits(parser, **PIXELS, max_prompt_tokens=20480)
    return parser.parse_args()


def record_of(question, kind, path, task, options):
    """A request as a record (see data.load_records). Raises ValueError if it makes no sense."""
    if not path:
        raise ValueError("--image or --video is needed")
    if kind == "image" and ("temporal" in task or task == "tracking"):
        raise ValueError(f"--task {task!r} does not go with --image")
    if (task == "multiple choice") != bool(options):
        raise ValueError("--options are needed for a multiple choice, and only there")
    raw = dict(problem=question, problem_type=task, options=options, answer="{}")
    raw |= dict(data_type=kind, path=os.path.abspath(path))
    return data.normalise(raw, "this question", index=0, root="/")


def print_stream(record, pieces, as_json=False):
    """Prints a response as it comes, then its answer; or JSON -> answer or None, can it be read."""
    text, finished = "", False
    for piece, end in pieces:
        text, finished = text + piece, end == "stop"
        if not as_json:
            print(piece, end="", flush=True)
    answer, task = rewards.answer_of(record, text), data.task_of(record)
    readable = rewards.readable(record, answer)
    if as_json:
        line = dict(task=task, response=text, answer=answer, readable=readable, finished=finished)
        print(json.dumps(line))
    else:
        print(f"\nanswer: {answer or '(none)'}", flush=True)
    if not finished:
        print("infer.py: cut off, by --max-response-tokens or by the server", file=sys.stderr)
    if not readable:
        print(f"infer.py: this answer cannot be read for the task {task!r}", file=sys.stderr)
    return answer, readable


def converse(ask, kind, path, task):
    """Asks for questions until Ctrl-D. What cannot be used is named; Ctrl-C stops an answer."""
    import readline  # noqa: F401  (gives input() its history and its arrow keys)

    print("Ask (Which? | cat | dog), or /image FILE, /video FILE, /task NAME; Ctrl-D ends")
    while True:
        try:
            line = input(f"{os.path.basename(path or 'no file')}, {task}> ").strip()
            command, _, rest = line.partition(" ")
            rest = os.path.expanduser(rest.strip())
            if command in ("/image", "/video"):
                kind, path = command[1:], rest
            elif command == "/task" and rest in PROBLEM_TYPES:
                task = rest
            elif line.startswith("/"):
                print(f"no such task or command: {line}; tasks: {', '.join(PROBLEM_TYPES)}")
            elif line:
                question, *options = (part.strip() for part in line.split("|"))
                ask(record_of(question, kind, path, task, options))
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
    cpu_compat.one_matrix_patch_embedding(model.model.visual)
    return model.to(DEVICE).eval()


def main():
    args = parse_args()
    kind, path = ("image", args.image) if args.image else ("video", args.video)
    limits, most = data.limits_of(args), args.max_response_tokens

    # 1 What can be refused is refused before a model is loaded
    if not (args.model or args.base_url):
        raise ValueError("--model or --base-url is needed")
    if args.json and not args.question:
        raise ValueError("--json: a question is needed")
    if args.question:
        record = record_of(args.question, kind, path, args.task, args.options)
    if args.save:
        endings = (".png",) if kind == "image" else (".png", ".mp4", ".gif")
        if not args.save.endswith(endings):
            raise ValueError(f"--save {args.save}: expected {' or '.join(endings)}")
        os.makedirs(os.path.dirname(os.path.abspath(args.save)), exist_ok=True)
    prompts = data.load_prompts(args.prompts)

    # 2 The model
    if args.base_url:
        url = args.base_url.rstrip("/")
        name = args.model or json.loads(b"".join(ask_server(f"{url}/models")))["data"][0]["id"]
    else:
        processor = data.load_processor(args.model)
    sam2 = load_sam2(args.sam2, DEVICE) if args.sam2 else None

    # 3 The answer
    def ask(record):
        if args.base_url:
            stream = stream_server(request_of(record, name, limits, most, prompts), url)
        else:
            prompt = data.encode(record, processor, limits, prompts)  # before a model is loaded
            stream = stream_model(prompt, load_model(args.model), processor.tokenizer, most)
        answer, readable = print_stream(record, stream, args.json)
        if args.save:
            save_drawing(args.save, record, answer, limits, sam2)
            print(f"drawn: {args.save}", file=sys.stderr)
        return readable

    if args.question:
        return 0 if ask(record) else 1
    return converse(ask, kind, path, args.task)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UNUSABLE as error:
        data.refuse(error)
    except KeyboardInterrupt:
        sys.exit("infer.py: stopped")
