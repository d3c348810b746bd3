"""Asks a model about an image or a video: prints its thinking as it is written, then its answer, and draws the answer.

    python infer.py --model runs/rl --image cat.jpg --task "spatial grounding" "the cat on the left" --save cat.png
    python infer.py --model runs/rl --video street.mp4 --task "multiple choice" "Who crosses first?" --options "a dog" "a man"
    python infer.py --model runs/rl --questions questions.jsonl --json          # one JSON object per question
    python infer.py --model runs/rl --video street.mp4                          # a prompt: the model stays loaded
    python infer.py --base-url http://127.0.0.1:8000/v1 --image cat.jpg "..."   # asks a running `vllm serve`

The prompt is written as in training (data.encode), the answer is greedy and read as in evaluation (rewards.find_answer).
--save draws on the original medium, upright and in its own size (only small ones are enlarged): a video becomes an MP4 or
GIF with all its frames and time stamps, without sound, or a film strip (PNG). The exit code is 1 when an answer says nothing
in the terms of its task, 2 when the request itself cannot be used.

A server gets the same pixels and times, but its chat template is its own (that of Qwen3-VL puts one more <|vision_start|>,
<|vision_end|> around a whole video), it enlarges pictures below 65,536 pixels, and may write vision tokens into answers. For
videos it must run with --trust-request-mm-kwargs, since vLLM otherwise takes no time stamps.
"""

import argparse
import base64
import io
import json
import os
import re
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial

import av
import numpy as np
import torch
from PIL import Image, ImageOps

import data
import rewards

TASKS = [*data.PROMPTS, "segmentation"]

# ----------------------------------------------------------------------------------------------------------------------
# Reading an answer


def thought_of(text, ended=True):
    """The thinking in a response. While it goes on, the last 7 characters wait: they may be the beginning of </think>.

    >>> thought_of("<think>Two legs.</think><answer>B"), thought_of("<think>Two legs.</thi", ended=False)
    ('Two legs.', 'Two leg')
    """
    text, closed, _ = text.partition("</think>")
    text = text.rpartition("<think>")[2].lstrip() if closed or "<think>" in text else ""
    return text if closed or ended else text[:-7]


# ----------------------------------------------------------------------------------------------------------------------
# Drawing


def film(path, folder_fps):
    """A whole video file, or folder of numbered frames, upright and in its own size, to be read frame by frame.

    Returns its length in seconds and an iterator of (second, PIL image).
    """
    if os.path.isdir(path):
        names = [
            name
            for name in os.listdir(path)
            if name.lower().endswith((".jpg", ".jpeg", ".png", ".webp"))
        ]
        names.sort(
            key=lambda name: ([int(number) for number in re.findall(r"\d+", name)], name)
        )  # as data.py does
        images = (ImageOps.exif_transpose(Image.open(os.path.join(path, name))) for name in names)
        return len(names) / folder_fps, ((i / folder_fps, image) for i, image in enumerate(images))
    with av.open(path) as container:
        times = sorted(
            float(p.pts * p.time_base) for p in container.demux(video=0) if p.pts is not None
        )

    def frames():
        with av.open(path) as container:
            for frame in (frame for frame in container.decode(video=0) if frame.pts is not None):
                pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)
                yield frame.time - times[0], Image.fromarray(np.ascontiguousarray(pixels))

    return (times[-1] - times[0]) * len(times) / max(1, len(times) - 1), frames()


def draw_film(pictures, length, marks, caption="", masks=None, seconds=()):
    """(second, PIL image) pairs of a film of this length -> pairs with the marks, a clock and a time bar, and the caption.

    Frames outside the answer's span lose their colour. masks: bool (T, H, W), of the frames at `seconds`; the nearest counts.
    """
    for second, image in pictures:
        mask = masks[data.nearest(seconds, second)] if masks is not None else None
        image = data.draw(data.enlarged(image), marks, second, mask=mask)
        if marks.span and not marks.span[0] <= second < marks.span[1]:
            image = Image.blend(
                image.convert("L").convert("RGB"), Image.new("RGB", image.size, "grey"), 0.5
            )
        bar = data.timeline(
            image.width, [(marks.span, "orange")], [0, length], [70, image.width - 4], now=second
        )
        yield second, data.captioned(data.stack(image, bar), caption)


def save_film(path, pictures, length):
    """Writes (second, picture) pairs as an MP4 or a GIF, each picture at its own second. In a GIF the last one stands until
    `length`, and times are rounded to hundredths."""
    if path.endswith(".gif"):
        seconds, images = zip(*pictures)
        durations = np.diff(np.round(np.array([*seconds, length]) * 100)) * 10  # milliseconds
        images[0].save(
            path, save_all=True, append_images=images[1:], duration=durations.tolist(), loop=0
        )
        return
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", options={"crf": "18"})
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 90_000)
        for second, picture in pictures:
            if not stream.codec_context.is_open:
                stream.width, stream.height = picture.size
            frame = av.VideoFrame.from_image(picture)
            frame.pts, frame.time_base = round(second * 90_000), Fraction(1, 90_000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def save_drawing(path, record, answer, limits, sam2=None):
    """Draws an answer on its record's medium: images and film strips as PNG, videos as MP4 or GIF. Text answers, and answers
    that cannot be read, stand under it. Raises ValueError when the medium cannot be saved under this name."""
    medium = max(record["media"], key=lambda medium: medium["type"])  # a video where there is one
    check_save(path, medium["type"])
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    task, marks = data.task_of(record), data.marks_of(data.task_of(record), answer)
    caption = (
        ""
        if record["problem_type"] in data.JSON_TYPES and rewards.readable(record, answer)
        else answer or "(no answer)"
    )
    if medium["type"] == "image":
        with Image.open(medium["path"]) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
        mask = (
            segment_images(sam2, [(image, marks)])[0]
            if sam2 and task == "segmentation-image"
            else None
        )
        return data.captioned(data.draw(data.enlarged(image), marks, mask=mask), caption).save(path)
    fps, masks, seconds = record.get("fps") or limits.fps, {}, ()
    if path.endswith(".png") or sam2:
        bounds = limits.frame_min_pixels, limits.frame_max_pixels
        video = data.read_video(
            medium["path"], limits.fps, limits.max_frames, *bounds, folder_fps=fps
        )
        seconds = [index / video.fps for index in video.indices]
        if sam2 and marks.time is not None:
            masks["orange"] = segment_video(
                sam2, video.frames, data.nearest(seconds, marks.time), marks
            )
    if path.endswith(".png"):
        return data.captioned(
            data.draw_strip(video.frames, seconds, {"orange": marks}, masks), caption
        ).save(path)
    length, pictures = film(medium["path"], fps)
    save_film(
        path, draw_film(pictures, length, marks, caption, masks.get("orange"), seconds), length
    )


def check_save(path, kind):
    """Raises ValueError unless a medium of this kind can be saved under this name."""
    known = (".png",) if kind == "image" else (".png", ".mp4", ".gif")
    if not path.endswith(known):
        raise ValueError(
            f"--save: {path!r} with --{kind}: expected a name that ends with {' or '.join(known)}"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Masks by SAM2, prompted with box and points


def load_sam2(path, device):
    """SAM2 from a Hugging Face folder or hub id, such as facebook/sam2.1-hiera-large: what the two functions below take."""
    from transformers import Sam2Model, Sam2Processor, Sam2VideoModel, Sam2VideoProcessor

    safe = dict(use_safetensors=True)  # nothing is ever unpickled from a model folder
    models = (
        kind.from_pretrained(path, **safe).to(device).eval() for kind in (Sam2Model, Sam2VideoModel)
    )
    return *models, Sam2Processor.from_pretrained(path), Sam2VideoProcessor.from_pretrained(path)


def sam2_prompt(marks, width, height):
    """Marks -> points [[x, y], ...] in pixels and labels: 1 on the object, 0 beside it, 2 and 3 the corners of its box."""
    corners = [xy for box in marks.boxes.values() for xy in (box[:2], box[2:])]
    points = [
        [x * width / 1000, y * height / 1000]
        for x, y in [*corners, *marks.positive, *marks.negative]
    ]
    return points, [2, 3] * (len(corners) // 2) + [1] * len(marks.positive) + [0] * len(
        marks.negative
    )


@torch.no_grad()
def segment_images(sam2, items):
    """Masks of (PIL image, Marks) pairs: a list of bool (H, W) at each image's size. No box and no points: an empty mask."""
    model, _, processor, _ = sam2
    masks = [np.zeros((image.height, image.width), bool) for image, _ in items]
    for i, (image, marks) in enumerate(items):
        points, labels = sam2_prompt(marks, *image.size)
        if points:
            prompt = dict(input_points=[[points]], input_labels=[[labels]], return_tensors="pt")
            inputs = processor(images=image.convert("RGB"), **prompt).to(model.device)
            logits = model(**inputs, multimask_output=False).pred_masks.cpu()  # (1, 1, 1, 256, 256)
            masks[i] = processor.post_process_masks(logits, inputs["original_sizes"].cpu())[0][
                0, 0
            ].numpy()
    return masks


@torch.no_grad()
def segment_video(sam2, frames, index, marks):
    """The mask in every frame: bool (T, H, W). frames: uint8 (T, H, W, 3). The prompt stands on frame `index` and is
    followed from there to the end and to the beginning. No box and no points: empty masks."""
    _, model, _, processor = sam2
    count, height, width, _ = frames.shape
    masks = np.zeros((count, height, width), bool)
    points, labels = sam2_prompt(marks, width, height)
    if not points:
        return masks
    session = processor.init_video_session(
        video=[frames], inference_device=model.device, video_storage_device="cpu"
    )
    prompt = dict(input_points=[[points]], input_labels=[[labels]])
    processor.add_inputs_to_inference_session(session, frame_idx=index, obj_ids=1, **prompt)
    model(session, frame_idx=index)
    for backwards in (False, True):
        for output in model.propagate_in_video_iterator(
            session, start_frame_idx=index, reverse=backwards
        ):
            mask = processor.post_process_masks([output.pred_masks.cpu()], [[height, width]])[
                0
            ]  # (1, 1, H, W)
            masks[output.frame_idx] = mask[0, 0].numpy()
    return masks


# ----------------------------------------------------------------------------------------------------------------------
# Asking. Each stream yields (piece of text, finish reason); the reason is None until the last piece: "stop" or "length".


def stream_vllm(prompt, llm, tokenizer, max_tokens):
    """A data.Prompt -> the pieces of the engine's greedy answer."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    banned = dict.fromkeys(tokenizer.convert_tokens_to_ids(data.BANNED), -100.0)
    settings = dict(skip_special_tokens=False, output_kind=RequestOutputKind.DELTA)
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, logit_bias=banned, **settings)
    llm.llm_engine.add_request("question", prompt.vllm, params)
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            assert list(output.prompt_token_ids) == prompt.token_ids, (
                "vLLM reads another prompt than data.encode wrote"
            )
            yield output.outputs[0].text, output.outputs[0].finish_reason


def stream_transformers(prompt, model, processor, max_tokens):
    """The same by transformers' generate, which runs in a thread of its own."""
    from transformers import TextIteratorStreamer

    media, tokenizer, kept = (
        prompt.vllm["multi_modal_data"],
        processor.tokenizer,
        prompt.vllm["mm_processor_kwargs"],
    )
    videos = media.get("video", [])
    told = [
        {key: known[key] for key in ("fps", "frames_indices", "total_num_frames")}
        for _, known in videos
    ]
    films = (
        dict(videos=[torch.tensor(frames) for frames, _ in videos], video_metadata=told)
        if videos
        else {}
    )
    text = dict(text=[prompt.vllm["prompt"]], return_tensors="pt")
    inputs = processor(**text, images=media.get("image"), **films, **kept).to(model.device)
    assert inputs["input_ids"][0].tolist() == prompt.token_ids, (
        "transformers reads another prompt than data.encode"
    )
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    settings = dict(
        do_sample=False,
        max_new_tokens=max_tokens,
        suppress_tokens=tokenizer.convert_tokens_to_ids(data.BANNED),
    )
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(model.generate, **inputs, **settings, streamer=streamer)
        future.add_done_callback(
            lambda _: streamer.end()
        )  # after an error we would wait here for ever
        for piece in streamer:
            yield piece.removesuffix(tokenizer.eos_token), None
    yield "", "stop" if future.result()[0, -1] == tokenizer.eos_token_id else "length"


def data_url(kind, *images):
    """RGB arrays -> a URL that holds them as PNG, without loss. Frames of a video: one after the other, with commas between."""
    texts = []
    for pixels in images:
        Image.fromarray(pixels).save(file := io.BytesIO(), "png")
        texts.append(base64.b64encode(file.getvalue()).decode())
    return f"data:{kind};base64,{','.join(texts)}"


def request_of(record, model, limits, prompts, max_tokens):
    """A record -> the JSON of a chat request to a vLLM server. Raises MediaError, and ValueError on several videos.

    vLLM takes sampled frames under the name of video/jpeg, whatever their format, and is told beside it which ones they are.
    """
    content, told, media = [], {}, iter(record["media"])
    for part in re.split("(<image>|<video>)", data.render_problem(record, prompts)):
        if part == "<image>":
            pixels = data.read_image(
                next(media)["path"], limits.image_min_pixels, limits.image_max_pixels
            )
            content.append(
                dict(type="image_url", image_url=dict(url=data_url("image/png", pixels)))
            )
        elif part == "<video>":
            if told:
                raise ValueError(
                    "--base-url: one video per question: vLLM takes the time stamps of one only"
                )
            bounds = limits.frame_min_pixels, limits.frame_max_pixels
            video = data.read_video(
                next(media)["path"], limits.fps, limits.max_frames, *bounds, record.get("fps")
            )
            content.append(
                dict(type="video_url", video_url=dict(url=data_url("video/jpeg", *video.frames)))
            )
            times = dict(
                num_frames=-1,
                fps=video.fps,
                frames_indices=video.indices,
                total_num_frames=video.total,
            )
            kept = dict(do_resize=False, do_sample_frames=False)
            told = dict(media_io_kwargs=dict(video=times), mm_processor_kwargs=kept)
        elif part:
            content.append(dict(type="text", text=part))
    settings = dict(stream=True, temperature=0.0, max_tokens=max_tokens, skip_special_tokens=False)
    return dict(model=model, messages=[dict(role="user", content=content)], **settings, **told)


def ask_server(url, request=None):
    """GETs a URL of a server, or POSTs it a request -> the open reply. Raises OSError with what the server says."""
    key = os.environ.get("OPENAI_API_KEY", "none")
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    body = json.dumps(request).encode() if request else None
    try:
        return urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=600)
    except OSError as error:  # an HTTPError can be read
        said = error.read(500).decode(errors="replace") if hasattr(error, "code") else ""
        raise OSError(f"{url}: {error} {said}") from error


def stream_server(request, base_url):
    """The pieces of a server's answer, as it sends them (server-sent events)."""
    with ask_server(f"{base_url}/chat/completions", request) as reply:
        for line in reply:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise OSError(f"{base_url}: {event['error']}")
                for choice in event["choices"]:
                    yield choice["delta"].get("content") or "", choice["finish_reason"]


# ----------------------------------------------------------------------------------------------------------------------
# The script


# fmt: off
def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("what")
    group.add_argument("question", nargs="?", help="without it, and without --questions: a prompt that asks for questions")
    medium = group.add_mutually_exclusive_group()
    medium.add_argument("--image", help="image file")
    medium.add_argument("--video", help="video file, or a folder of numbered frames, which play at --fps")
    group.add_argument("--task", choices=TASKS, metavar="TASK", default="open-ended", help='see --list-tasks; "segmentation" goes by the medium (%(default)s)')
    group.add_argument("--options", nargs="+", default=[], help="of a multiple choice, after the question; letters are added if missing")
    group.add_argument("--questions", metavar="FILE.jsonl", help='several questions, one a line: records as for training, but without an answer, like {"problem": "Where is the cat?", "problem_type": "spatial grounding", "images": ["cat.jpg"]}; paths are relative to the file')
    group.add_argument("--save", help="draw the answer: .png, of a video also .mp4 or .gif; with --questions a folder, for one .png per line: 0.png, 1.png, ...")
    group.add_argument("--json", action="store_true", help="print one JSON object per question, and nothing else")
    group.add_argument("--list-tasks", action="store_true", help="print the tasks with their instructions, and end")
    group = parser.add_argument_group("model")
    group.add_argument("--model", help="Hugging Face folder or hub id of a Qwen3-VL; with --base-url the name it is served under (default: the first)")
    group.add_argument("--base-url", metavar="URL", help="a running vLLM server, like http://127.0.0.1:8000/v1; its key comes from OPENAI_API_KEY")
    group.add_argument("--backend", choices=["vllm", "transformers"], default="vllm", help="what runs --model here (%(default)s)")
    group.add_argument("--sam2", help="folder or hub id of a SAM2, which turns the box and points of a segmentation into masks")
    group.add_argument("--prompts", help="JSON file that replaces the instructions of data.py")
    group.add_argument("--max-response-tokens", type=int, default=8192, help="per answer (%(default)s)")
    group.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="compute (%(default)s)")
    data.add_limits(parser, image_max_pixels=1024 * 32 * 32, frame_max_pixels=256 * 32 * 32, max_prompt_tokens=20480)
    return parser.parse_args()
# fmt: on


def record_of(question, kind, path, task, options):
    """A request as a record, the form of the questions in training and evaluation. Raises ValueError if it makes no sense."""
    if not path:
        raise ValueError("--image or --video is needed")
    if not os.path.exists(path):
        raise ValueError(f"--{kind}: no file {path}")
    if kind == "image" and task in ("temporal grounding", "spatial-temporal grounding", "tracking"):
        raise ValueError(f"--task {task!r} does not go with --image")
    if (task == "multiple choice") != bool(options):
        raise ValueError("--options are needed for a multiple choice, and only there")
    if not all(re.match(r"\(?[A-Z][).:]", option) for option in options):
        options = [f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(options)]
    folder, name = os.path.split(os.path.abspath(path))
    raw = {
        "problem": question,
        "problem_type": task.removesuffix(f"-{kind}"),
        "data_type": kind,
        "options": options,
    }
    return data.normalise(raw | {f"{kind}s": name, "answer": "{}"}, "this question", 0, folder)


def read_questions(path):
    """A JSONL file of questions -> records as data.load_records gives them; where an answer is missing, "{}" stands in."""
    raws = [
        {"answer": "{}"} | raw if isinstance(raw, dict) else raw for raw in data.read_values(path)
    ]
    records = [
        data.normalise(raw, path, i, os.path.dirname(os.path.abspath(path)))
        for i, raw in enumerate(raws)
    ]
    if lost := [record["index"] for record in records if not record["media"]]:
        raise ValueError(f"{path}: record {lost[0]}: no images and no videos")
    return records


def follow(record, pieces, args):
    """Prints the thinking as it comes, then the answer; with --json one object at the end. Returns the answer (None: there
    is none) and whether it can be read for its task."""
    text, shown, reason = "", 0, None
    for piece, reason in pieces:
        text += piece
        thought = thought_of(text, ended=reason is not None)
        if len(thought) > shown and not args.json:
            print(thought[shown:] if shown else "thinking: " + thought, end="", flush=True)
            shown = len(thought)
    answer, task = rewards.find_answer(text), data.task_of(record)
    good = rewards.readable(record, answer)
    if args.json:
        line = dict(
            problem_id=record["problem_id"],
            task=task,
            thinking=thought_of(text).strip(),
            answer=answer,
        )
        print(json.dumps(line | dict(readable=good, finished=reason == "stop")), flush=True)
    else:
        print(("\n" if shown else "") + f"answer: {answer or ''}", flush=True)
    if reason != "stop":
        print(
            f"infer.py: stopped after {args.max_response_tokens} tokens (--max-response-tokens)",
            file=sys.stderr,
        )
    if not good:
        print(f"infer.py: this answer cannot be read for the task {task!r}", file=sys.stderr)
    return answer, good


def converse(ask, kind, path, task, save):
    """The prompt: questions and what they are about, until Ctrl-D. What cannot be used is named, and the prompt goes on."""
    import readline  # noqa: F401  (gives input() its history and its arrow keys)

    print(
        "Ask, or: /image FILE, /video FILE, /task NAME. Ctrl-D ends. A multiple choice: Which one? | a cat | a dog"
    )
    while True:
        try:
            line = input(f"{os.path.basename(path or 'no image, no video')}, {task}> ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        command, _, rest = line.partition(" ")
        rest = os.path.expanduser(rest.strip())
        if command in ("/image", "/video") and os.path.exists(rest):
            kind, path = command[1:], rest
        elif command == "/task" and rest in TASKS:
            task = rest
        elif line.startswith("/"):
            print(f"no such file, task or command: {line}")
        elif line:
            question, *options = (part.strip() for part in line.split("|"))
            try:
                ask(record_of(question, kind, path, task, options), save)
            except (OSError, ValueError, data.MediaError) as error:
                print(error)


def main():
    args = parse_args()
    if args.list_tasks:
        return print(
            "\n".join(f"{task}\n    {instruction}" for task, instruction in data.PROMPTS.items())
        )
    if not (args.model or args.base_url):
        data.refuse("--model or --base-url is needed")
    for flag, folder in (("--model", None if args.base_url else args.model), ("--sam2", args.sam2)):
        if (
            folder and not os.path.isdir(folder) and folder.count("/") != 1
        ):  # else the hub is asked, for minutes if offline
            data.refuse(f"{flag} {folder}: no such folder, and no hub id of the form owner/name")
    import cpu_compat  # noqa: F401  (before transformers)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    # 1 The questions, written as prompts. What can be refused is refused before a model is loaded.
    limits, max_tokens = data.limits_of(args), args.max_response_tokens
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, path = ("image", args.image) if args.image else ("video", args.video)
    try:
        prompts, records = data.load_prompts(args.prompts), []
        if args.questions:
            records = read_questions(args.questions)
        elif args.question:
            records = [record_of(args.question, kind, path, args.task, args.options)]
            if args.save:
                check_save(args.save, kind)
        if args.base_url:
            url = args.base_url.rstrip("/")
            name = args.model or json.load(ask_server(f"{url}/models"))["data"][0]["id"]
            prepare = partial(
                request_of, model=name, limits=limits, prompts=prompts, max_tokens=max_tokens
            )
        else:
            processor = AutoProcessor.from_pretrained(args.model)
            prepare = partial(data.encode, processor=processor, limits=limits, prompts=prompts)
        prepared = [prepare(record) for record in records]
        sam2 = load_sam2(args.sam2, device) if args.sam2 else None
    except (OSError, ValueError, data.MediaError) as error:
        data.refuse(error)

    # 2 The model
    llm = None
    if args.base_url:
        stream = partial(stream_server, base_url=url)
    elif args.backend == "vllm":
        from rl_ema_grpo import make_engine
        from sft import init_distributed

        init_distributed()  # a group of one: the engine expects torchrun's surroundings
        length = (
            max((len(prompt.token_ids) for prompt in prepared), default=limits.max_prompt_tokens)
            + max_tokens
        )
        kinds = [[medium["type"] for medium in record["media"]] for record in records] or [
            ["image", "video"]
        ]
        media = {kind: max(each.count(kind) for each in kinds) for kind in ("image", "video")}
        llm = make_engine(args.model, args.dtype, length, media, seed=0)
        stream = partial(stream_vllm, llm=llm, tokenizer=processor.tokenizer, max_tokens=max_tokens)
    else:
        model = AutoModelForImageTextToText.from_pretrained(
            args.model, dtype=args.dtype, use_safetensors=True
        )
        model = model.to(device).eval()
        stream = partial(
            stream_transformers, model=model, processor=processor, max_tokens=max_tokens
        )

    # 3 The answers
    def ask(record, save, prompt=None):
        answer, good = follow(record, stream(prompt or prepare(record)), args)
        if save:
            save_drawing(save, record, answer, limits, sam2)
        return good

    unread = 0
    for index, (record, prompt) in enumerate(zip(records, prepared)):
        save = (
            os.path.join(args.save, f"{index}.png") if args.questions and args.save else args.save
        )
        if args.questions and not args.json:
            print(f"--- {record['problem_id']}: {record['problem']}")
        try:
            unread += not ask(record, save, prompt)
        except OSError as error:
            data.refuse(error)
    if not records:
        converse(ask, kind, path, args.task, args.save)
    if llm:
        llm.llm_engine.engine_core.shutdown()
    sys.exit(1 if unread else 0)


if __name__ == "__main__":
    main()
