"""The toy world: a tiny random Qwen3-VL and records of all tasks over small pictures and videos, drawn in seconds.

    python tests/toy.py runs/demo/toy                     # everything below, for the demo
    python tests/toy.py DIR --sft 240 --rl 240 --eval 4   # small, for a test
    python tests/toy.py --shuffle-media eval/ocr.json eval/ocr_shuffled.json    # same questions, other pictures

    DIR/model/                              the real architecture with 0.8 M random weights, tokenizer, processor
    DIR/sft_image.json, sft_video.json      the release's SFT form: rendered prompt, thinking, answer
    DIR/rl_train.json                       the release's RL form
    DIR/eval/<task>.json                    the release's evaluation form, 12 files
    DIR/media/, DIR/eval/media/             96 x 96 PNG; 64 x 64 MP4 of 8 seconds at 4 fps

Same seed, same bytes. A hash of its content decides whether a scene is for training or for evaluation, so that none is
for both. No answer can be guessed from the question: which object is asked for is drawn at random, every video lasts 8
seconds, and where an answer is one of a few they come equally often. (Tracking is given its first box.)

The SFT answers come from a teacher of two manners. In 60% of them he answers "At a glance." and slips: a count one too
high, the letter after, a word cut short, a span or a box a step too large. In the others he thinks "Step by step:" and
is right. A cold start learns both; rewards, which know the truth, tell which one is worth its tokens.

Made to be learned by a tiny model in minutes: big shapes, edges on a grid of 16 pixels, every word and every number one
token. Objects move once a second, in jumps: sampled at 2 fps, each pair of frames, which is one time step of Qwen3-VL,
then shows exactly one whole second.
"""

import argparse
import hashlib
import json
import os
import random
import sys
from multiprocessing import Pool
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import render_problem

COLOURS = {
    "red": (230, 40, 40),
    "green": (40, 200, 70),
    "blue": (60, 90, 255),
    "yellow": (240, 220, 50),
}
KINDS = ("circle", "square", "triangle")
WORDS = ("BAG", "CAT", "DOG", "FOX", "HEN", "JAM", "LIP", "MUD", "OWL", "SKY", "VET", "ZIP")
BACKGROUND = (128, 128, 128)  # 0 after normalisation: only shapes speak
IMAGE, VIDEO = 96, 64  # pixels a side
GRID, SECONDS, FPS = 16, 8, 4
GLANCES = 0.6  # share of the SFT answers that are given at a glance, and slip
BASE = Path(__file__).resolve().parents[1] / "assets" / "toy_base.safetensors"  # by pretrain.py
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


class Shape(NamedTuple):
    colour: str
    kind: str  # circle, square, triangle, bar, or a word in capitals
    x: int  # pixels from the left, y from the top
    y: int
    w: int
    h: int


class Item(NamedTuple):
    scene: tuple  # a tuple of shapes for each second; a picture has one
    problem: str
    thought: str
    answer: object  # JSON for perception, else text
    slip: object  # the answer at a glance
    options: tuple = ()
    target: Shape = None  # what a mask is wanted of
    careful: object = None  # the answer step by step, where that is not the true one (ablation.py)
    glance: str = "At a glance."  # all that is thought before the slip


# ----------------------------------------------------------------------------------------------------------------------
# Shapes, and how the text speaks of them.


def some_shape(rng, side, colour=None, kind=None):
    size = rng.choice((32, 48) if side == IMAGE else (16, 32))
    x, y = (rng.randrange(0, side - size + 1, GRID) for _ in "xy")
    return Shape(colour or rng.choice(list(COLOURS)), kind or rng.choice(KINDS), x, y, size, size)


def some_pair(rng, side):
    """Two shapes that do not touch, of different colour and kind."""
    looks = list(zip(rng.sample(list(COLOURS), 2), rng.sample(KINDS, 2), strict=True))
    while True:
        a, b = (some_shape(rng, side, *look) for look in looks)
        if a.x + a.w < b.x or b.x + b.w < a.x or a.y + a.h < b.y or b.y + b.h < a.y:
            return a, b


def name(shape):
    return f"{shape.colour} {shape.kind}"


def coordinate(pixels, side):
    return int(1000 * pixels / side + 0.5)


def box(shape, side):
    corners = shape.x, shape.y, shape.x + shape.w, shape.y + shape.h
    return [coordinate(pixels, side) for pixels in corners]


def wide_box(shape, side):
    """The box at a glance: a step too wide and too high."""
    w, h = min(side, shape.w + GRID), min(side, shape.h + GRID)
    return box(shape._replace(x=min(shape.x, side - w), y=min(shape.y, side - h), w=w, h=h), side)


def compact(answer):
    return json.dumps(answer, separators=(",", ":"))


def points(shape, side):
    """The middle and two points below it: inside a circle, a square and a triangle alike."""
    x, y = shape.x + shape.w // 2, shape.y + shape.h // 2
    return [
        [coordinate(px, side), coordinate(py, side)]
        for px, py in ((x, y), (x - 4, y + 4), (x + 4, y + 4))
    ]


def place(shape, side):
    column = ("left", "centre", "right")[(shape.x + shape.w // 2) * 3 // side]
    return f"{('top', 'middle', 'bottom')[(shape.y + shape.h // 2) * 3 // side]} {column}"


def walk(shape, steps, direction):
    """The shape once a second, moving one cell at a time and turning back at the edges of the video."""
    dx, dy = direction
    path = [shape]
    while len(path) < steps:
        x, y = path[-1].x, path[-1].y
        dx = dx if 0 <= x + dx * GRID <= VIDEO - shape.w else -dx
        dy = dy if 0 <= y + dy * GRID <= VIDEO - shape.h else -dy
        path.append(shape._replace(x=x + dx * GRID, y=y + dy * GRID))
    return path


def some_span(rng, longest=4):
    """A start and an end in whole seconds: visible from the one until just before the other."""
    start, length = rng.choice(
        [(s, n) for n in range(1, longest + 1) for s in range(SECONDS - n + 1)]
    )
    return start, start + length


def shown(*shapes_and_spans):
    """A video in which each shape stands still and is visible during its span."""
    return tuple(
        tuple(shape for shape, (a, b) in shapes_and_spans if a <= t < b) for t in range(SECONDS)
    )


# ----------------------------------------------------------------------------------------------------------------------
# The tasks. `turn` counts the records of a task, so that answers out of a small set come equally often.


def multiple_choice(rng, turn):
    letter = turn % 4
    if turn // 4 % 2:
        options = list(DIRECTIONS)
        right = options[letter]
        dx, dy = DIRECTIONS[right]
        start, still = rng.randint(0, 1), rng.randint(3, 4)  # moves in cells; then stands still
        along = start * GRID if dx + dy > 0 else VIDEO - (start + 1) * GRID
        across = rng.randrange(0, VIDEO, GRID)
        x, y = (along, across) if dx else (across, along)
        shape = Shape(rng.choice(list(COLOURS)), rng.choice(KINDS), x, y, GRID, GRID)
        path = walk(shape, still - start, (dx, dy))
        scene = tuple((path[min(t, len(path) - 1)],) for t in range(SECONDS))
        problem = f"Which way does the {shape.kind} move?"
        thought = f"The {shape.kind} moves {right}, {right} is option {'ABCD'[letter]}."
    else:
        options = list(COLOURS)
        right = options[letter]
        while (pair := some_pair(rng, IMAGE))[0].colour != right:
            pass
        a, b = pair
        scene = (pair,)
        problem = f"Which colour is the {a.kind}?"
        thought = f"The {a.kind} is {right}, {right} is option {'ABCD'[letter]}."
    options = [f"{mark}. {option}" for mark, option in zip("ABCD", options, strict=True)]
    return Item(scene, problem, thought, "ABCD"[letter], "ABCD"[(letter + 1) % 4], options)


def cells(rng, counts):
    """A picture of 3 x 3 cells of 32 pixels with as many shapes of each colour as asked for."""
    places = rng.sample(range(9), sum(counts.values()))
    colours = [colour for colour, count in counts.items() for _ in range(count)]
    shapes = [
        Shape(colour, rng.choice(KINDS), cell % 3 * 32 + 4, cell // 3 * 32 + 4, 24, 24)
        for colour, cell in zip(colours, places, strict=True)
    ]
    return (tuple(shapes),)


def in_rows(shapes, colour):
    """How many shapes of the colour stand in each row of cells."""
    return [sum(s.colour == colour and s.y // 32 == row for s in shapes) for row in range(3)]


def numerical(rng, turn):
    count = 1 + turn % 5
    asked, other = rng.sample(list(COLOURS), 2)
    scene = cells(rng, {asked: count, other: rng.randint(0, 4)})
    top, middle, bottom = in_rows(scene[0], asked)
    thought = f"{top} in the top row, {middle} in the middle, {bottom} at the bottom."
    problem = f"How many {asked} shapes are there?"
    return Item(scene, problem, thought, str(count), str(count + 1))


def math(rng, turn):
    r, b = (2, 3, 5)[turn % 3], (2, 3, 4)[turn // 3 % 3]
    first, second = rng.sample(list(COLOURS), 2)
    scene = cells(rng, {first: r, second: b})
    problem = (
        f"Divide the square root of the number of {first} shapes by the number of {second} shapes."
    )
    thought = f"I see {r} {first} and {b} {second} shapes."
    return Item(scene, problem, thought, rf"\frac{{\sqrt{{{r}}}}}{{{b}}}", rf"\frac{{{r}}}{{{b}}}")


def regression(rng, turn):
    length = 2 + turn % 10
    start, line = rng.randint(0, 12 - length), rng.randint(0, 4)
    bar = Shape(rng.choice(list(COLOURS)), "bar", start * 8, line * 16, length * 8, 32)
    thought = f"The bar goes from {start} to {start + length}."
    problem = "The picture is 12 units wide and high. How long is the bar?"
    return Item(((bar,),), problem, thought, str(length), str(length + 1))


def ocr(rng, turn):
    word = WORDS[turn % len(WORDS)]
    sign = Shape(rng.choice(list(COLOURS)), word, 0, 32, 96, 32)
    around = [
        Shape(rng.choice(list(COLOURS)), rng.choice(KINDS), rng.randint(0, 4) * 16, y, 32, 32)
        for y in (0, 64)
    ]
    thought = f"The letters are {' '.join(word)}."
    return Item(((sign, *around),), "Which word is written here?", thought, word, word[:2])


def open_ended(rng, turn):
    """A caption in reading order."""
    a, b = (shape._replace(w=32, h=32) for shape in some_pair(rng, IMAGE))
    near, far, along = rng.choice((0, 16)), rng.choice((48, 64)), rng.randrange(0, 65, GRID)
    if turn % 2:
        a, b = a._replace(x=along, y=near), b._replace(x=along, y=far)
        thought, relation = "One shape is over the other.", "above"
    else:
        a, b = a._replace(x=near, y=along), b._replace(x=far, y=along)
        thought, relation = "The two shapes are side by side.", "beside"
    caption, slip = f"{name(a)} {relation} {name(b)}", f"{a.kind} {relation} {b.kind}"
    return Item(((a, b),), "Describe the picture.", thought, caption, slip)


def came_and_went(shape, start, end):
    return f"The {name(shape)} comes at {start} and is gone at {end}."


def temporal_grounding(rng, turn):
    a, b = some_pair(rng, VIDEO)
    start, end = some_span(rng)
    scene = shown((a, (start, end)), (b, some_span(rng)))
    slip = [start, end + 1] if end < SECONDS else [start - 1, end]
    problem, thought = f"When is the {name(a)} visible?", came_and_went(a, start, end)
    return Item(scene, problem, thought, {"time": [start, end]}, {"time": slip})


def spatial_grounding(rng, turn):
    a, b = some_pair(rng, IMAGE)
    thought = f"The {name(a)} is at the {place(a, IMAGE)}."
    answer, slip = {"boxes": box(a, IMAGE)}, {"boxes": wide_box(a, IMAGE)}
    return Item(((a, b),), f"Where is the {name(a)}?", thought, answer, slip)


def spatial_temporal_grounding(rng, turn):
    shape, (start, end), way = some_shape(rng, VIDEO), some_span(rng), rng.choice(list(DIRECTIONS))
    path = dict(zip(range(start, end), walk(shape, end - start, DIRECTIONS[way]), strict=True))
    scene = tuple((path[t],) if t in path else () for t in range(SECONDS))
    answer, slip = (
        {"time": [start, end], "boxes": {str(t): as_box(path[t], VIDEO) for t in path}}
        for as_box in (box, wide_box)
    )
    problem = f"When and where is the {name(shape)} visible?"
    return Item(scene, problem, came_and_went(shape, start, end), answer, slip)


def tracking(rng, turn):
    shape, dx, dy = some_shape(rng, VIDEO), rng.choice((-1, 1)), rng.choice((-1, 0, 1))
    path = walk(shape, SECONDS, (dx, dy) if rng.random() < 0.5 else (dy, dx))
    problem = f"Track the object whose box in the first frame is {compact(box(shape, VIDEO))}."
    places = place(path[0], VIDEO), place(path[-1], VIDEO)
    thought = f"The {name(shape)} goes from the {places[0]} to the {places[1]}."
    answer, slip = (
        {"boxes": {str(t + 1): as_box(path[t], VIDEO) for t in range(SECONDS)}}
        for as_box in (box, wide_box)
    )
    return Item(tuple((shape,) for shape in path), problem, thought, answer, slip)


def segmentation_image(rng, turn):
    a, b = some_pair(rng, IMAGE)
    marks = {"positive_points": points(a, IMAGE), "negative_points": points(b, IMAGE)}
    answer, slip = {"boxes": box(a, IMAGE)} | marks, {"boxes": wide_box(a, IMAGE)} | marks
    thought = f"The {name(a)} is at the {place(a, IMAGE)}, the {name(b)} at the {place(b, IMAGE)}."
    return Item(((a, b),), f"Segment the {name(a)}.", thought, answer, slip, target=a)


def segmentation_video(rng, turn):
    a, b = some_pair(rng, VIDEO)
    start, end = some_span(rng)
    marks = {"positive_points": points(a, VIDEO), "negative_points": points(b, VIDEO)}
    answer, slip = (
        {"time": start, "boxes": as_box(a, VIDEO)} | marks for as_box in (box, wide_box)
    )
    thought = f"The {name(a)} comes at {start} at the {place(a, VIDEO)}, "
    thought += f"the {name(b)} is at the {place(b, VIDEO)}."
    scene = shown((a, (start, end)), (b, (0, SECONDS)))
    return Item(scene, f"Segment the {name(a)}.", thought, answer, slip, target=a)


TASKS = {
    "multiple choice": multiple_choice,
    "numerical": numerical,
    "math": math,
    "regression": regression,
    "OCR": ocr,
    "open-ended": open_ended,
    "temporal grounding": temporal_grounding,
    "spatial grounding": spatial_grounding,
    "spatial-temporal grounding": spatial_temporal_grounding,
    "tracking": tracking,
    "segmentation-image": segmentation_image,
    "segmentation-video": segmentation_video,
}


# ----------------------------------------------------------------------------------------------------------------------
# Scenes -> files.


def draw(shapes, side, background=BACKGROUND):
    image = Image.new("RGB", (side, side), background)
    pen = ImageDraw.Draw(image)
    for shape in shapes:
        x1, y1, x2, y2 = shape.x, shape.y, shape.x + shape.w - 1, shape.y + shape.h - 1
        colour = COLOURS[shape.colour]
        if shape.kind == "circle":
            pen.ellipse((x1, y1, x2, y2), fill=colour)
        elif shape.kind == "triangle":
            pen.polygon(
                ((x1, y2), (x2, y2), (x1 + shape.w // 2, y1), (x1 + shape.w // 2 - 1, y1)),
                fill=colour,
            )
        elif shape.kind in WORDS:
            for i, letter in enumerate(shape.kind):  # a letter for each vision token
                centre = x1 + 32 * i + 16, y1 + 16
                pen.text(
                    centre, letter, colour, ImageFont.load_default(32), anchor="mm", stroke_width=1
                )
        else:
            pen.rectangle((x1, y1, x2, y2), fill=colour)
    return image


def digest(scene):
    """The same for scenes that look the same: shapes do not overlap, so their order does not show."""
    return hashlib.sha1(repr([sorted(shapes) for shapes in scene]).encode()).hexdigest()[:12]


def write_media(job):
    path, scene = job
    if len(scene) == 1:
        draw(scene[0], IMAGE).save(path)
        return
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=FPS, options={"crf": "8", "preset": "ultrafast", "threads": "1"}
        )
        stream.width = stream.height = VIDEO
        stream.pix_fmt = "yuv420p"
        for shapes in scene:
            for _ in range(FPS):
                container.mux(stream.encode(av.VideoFrame.from_image(draw(shapes, VIDEO))))
        container.mux(stream.encode())


def masks(item, side):
    """`segmentation_output` of an evaluation record: COCO run lengths of the asked object, by frame for a video."""
    rles = []
    for shapes in item.scene:
        drawn = np.asarray(draw([s for s in shapes if s == item.target], side, (0, 0, 0))).any(-1)
        rle = coco.encode(np.asfortranarray(drawn, dtype=np.uint8))
        rles.append({"size": [side, side], "counts": rle["counts"].decode()})
    if len(rles) == 1:
        return {"frames": [0], "segmentation_rle": rles[0]}
    frames = list(range(SECONDS * FPS))
    return {
        "frames": frames,
        "segmentation_rle": {str(frame): rles[frame // FPS] for frame in frames},
    }


# ----------------------------------------------------------------------------------------------------------------------
# Items -> records in the release's three forms.


def held_out(scene):
    """One scene in eight is for evaluation only."""
    return int(digest(scene), 16) % 8 == 0


def some_item(rng, make, turn, for_evaluation=False):
    while held_out((item := make(rng, turn)).scene) != for_evaluation:
        pass
    return item


def as_text(answer):
    return answer if isinstance(answer, str) else compact(answer)


def records_of(split, task, make, count, seed, glances):
    """`count` records of a task, each with its scene and the text of both turns. Split: sft, rl or eval."""
    rng, side = random.Random(f"{seed}/{split}/{task}"), {"image": IMAGE, "video": VIDEO}
    for turn in range(count):
        glance = rng.random() < glances
        item = some_item(rng, make, turn, split == "eval")
        kind, suffix = ("image", "png") if len(item.scene) == 1 else ("video", "mp4")
        path = f"media/{digest(item.scene)}.{suffix}"  # equal scenes share their file
        answer = f"<answer>{as_text(item.answer)}</answer>"
        record = {
            "problem_id": f"{split}-{task.replace(' ', '-')}-{turn}",
            "problem": f"<{kind}>{item.problem}",
            "data_type": kind,
            "problem_type": task.split("-")[0] if task.startswith("segmentation") else task,
            "options": list(item.options),
            "data_source": "toy",
        }
        thought, said = f"Step by step: {item.thought}", item.careful or item.answer
        if glance:
            thought, said = item.glance, item.slip
        user = render_problem(record)
        assistant = f"<think>{thought}</think><answer>{as_text(said)}</answer>"
        if split == "sft":
            turns = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
            record = {"messages": turns, f"{kind}s": [path]}
        elif split == "rl":
            record |= {"answer": answer, f"{kind}s": [path]}
        else:
            record |= {"solution": answer, "path": path}
            if item.target:
                record |= {"resolution": {"width": side[kind], "height": side[kind]}, "fps": FPS}
                record["segmentation_output"] = masks(item, side[kind])
        yield path, item.scene, record, user + assistant


def write_json(path, records):
    path.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def write_world(folder, seed, sft, rl, per_task, tasks=TASKS, glances=GLANCES):
    """All records and media. sft and rl count records, per_task evaluation records of each task."""
    train, jobs = {"sft": [], "rl": []}, {}
    for split, total in (("sft", sft), ("rl", rl), ("eval", per_task * len(tasks))):
        home = folder / "eval" if split == "eval" else folder
        (home / "media").mkdir(parents=True, exist_ok=True)
        for i, (task, make) in enumerate(tasks.items()):
            count = total // len(tasks) + (i < total % len(tasks))
            quads = list(records_of(split, task, make, count, seed, glances))
            records = [record for _, _, record, _ in quads]
            jobs |= {home / path: scene for path, scene, _, _ in quads}
            if split == "eval":
                write_json(
                    home / f"{task.lower().replace(' ', '_').replace('-', '_')}.json", records
                )
            else:
                train[split] += records
    for records in train.values():
        random.Random(seed).shuffle(records)
    write_json(folder / "sft_image.json", [record for record in train["sft"] if "images" in record])
    write_json(folder / "sft_video.json", [record for record in train["sft"] if "videos" in record])
    write_json(folder / "rl_train.json", train["rl"])
    with Pool(os.cpu_count()) as pool:
        list(
            tqdm(
                pool.imap_unordered(write_media, jobs.items(), chunksize=16),
                "toy media",
                len(jobs),
                unit="file",
            )
        )


# ----------------------------------------------------------------------------------------------------------------------
# The tiny model.

PRETRAINING_WORDS = (
    """
Which letters? Which word? Which colour is the word? Which shape is by row? of each in there Points
What nothing, beside the at, come? Until until When does there? many? begin end? How long row? Box
""".split()
    + [*COLOURS, *KINDS, *WORDS, *DIRECTIONS, *"top middle bottom left centre right when".split()]
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPECIAL += ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
PIECES = r"<\d+\.\d seconds>|</?(?:think|answer)>| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}<]+|<|\s"  # one token each
CHAT = """{% for turn in messages %}<|im_start|>{{ turn.role }}
{% if turn.content is string %}{{ turn.content }}{% else %}{% for part in turn.content %}\
{% if 'image' in part.type %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif 'video' in part.type %}<|video_pad|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def vocabulary():
    """Texts with every piece that the toy's records and its pretraining are made of."""
    texts = []
    for split in ("sft", "rl"):
        for task, make in TASKS.items():
            texts += [text for *_, text in records_of(split, task, make, 96, 0, GLANCES)]
    return texts + [f"{word} {word}" for word in PRETRAINING_WORDS] * 2


def write_model(folder, seed, texts=None, base=BASE):
    """A tiny Qwen3-VL in the folder, with the weights of `base` or, for None, random ones.

    Its tokenizer, a byte-level BPE, knows every piece of the texts (default: the toy's own)."""
    texts = vocabulary() if texts is None else texts
    import cpu_compat  # noqa: F401 (before transformers)
    import torch
    from safetensors.torch import load_file
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        GenerationConfig,
        PreTrainedTokenizerFast,
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    numbers = [str(coordinate(px, side)) for side in (IMAGE, VIDEO) for px in range(0, side + 1, 2)]
    stamps = [f"<{t / 10} seconds>" for t in range(SECONDS * 10 + 1)]
    corpus = texts + [f"{n} {n}" for n in numbers] + stamps + ["user\nassistant\nsystem\n"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings = dict(special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=9999, **settings))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT,
        model_max_length=32768,
    )
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}

    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=32768,
            rope_parameters=dict(rope_type="default", rope_theta=5e6, mrope_section=[6, 5, 5], mrope_interleaved=True),
            tie_word_embeddings=True, pad_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"],
        ),
        vision_config=dict(
            depth=2, hidden_size=64, intermediate_size=128, num_heads=2, patch_size=16, spatial_merge_size=2,
            temporal_patch_size=2, out_hidden_size=128, num_position_embeddings=256, deepstack_visual_indexes=[0],
        ),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    if base:
        weights = {name: w.float() for name, w in load_file(base).items()}
        lacking, unknown = model.load_state_dict(weights, strict=False)
        assert lacking == ["lm_head.weight"] and not unknown  # the head is the embedding, tied
    else:
        # A std of 0.02 suits wide layers; here tokens, pictures and positions would drown in it.
        stds = {"embed_tokens": 0.1, "pos_embed": 0.5}
        for name, weight in model.named_parameters():
            own = next((std for part, std in stds.items() if part in name), None)
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=own or weight[0].numel() ** -0.5)
    model.generation_config = GenerationConfig(
        eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"]
    )
    model.save_pretrained(folder)

    tile = 32 * 32
    half = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, patch_size=16)
    image_processor = Qwen2VLImageProcessor(
        **half, size=dict(shortest_edge=4 * tile, longest_edge=1024 * tile)
    )
    video_size = dict(shortest_edge=4 * tile, longest_edge=768 * tile)  # of all frames together
    video_processor = Qwen3VLVideoProcessor(
        **half, size=video_size, fps=2, cap_pixels_per_frame=False
    )
    Qwen3VLProcessor(
        image_processor, tokenizer, video_processor, chat_template=CHAT
    ).save_pretrained(folder)
    return sum(weights.numel() for weights in model.parameters())


# ----------------------------------------------------------------------------------------------------------------------


def shuffle_media(source, target, seed):
    """Writes the records of `source` with media exchanged within each task and kind of medium; none keeps its own.

    The question and the truth stay. A model that still scores well on `target` does not look.
    """
    records = json.loads(Path(source).read_text(encoding="utf-8"))
    groups = {}
    for record in records:
        field = next(field for field in ("path", "images", "videos") if field in record)
        groups.setdefault((record.get("problem_type"), record.get("data_type"), field), []).append(
            record
        )
    for (task, _, field), group in groups.items():
        media = [record[field] for record in group]
        order = sorted({str(medium) for medium in media})
        random.Random(seed).shuffle(order)
        group.sort(
            key=lambda record: order.index(str(record[field]))
        )  # equal media stand together ...
        most = max(map(media.count, media))
        if 2 * most > len(group):
            raise ValueError(
                f"{source}: {len(group)} records of {task}, {most} of them with the same medium"
            )
        media = [record[field] for record in group]
        for i, record in enumerate(
            group
        ):  # ... so that turning by the longest run gives each another one
            record[field] = media[(i + most) % len(group)]
    if Path(source).resolve().parent != Path(target).resolve().parent:
        raise ValueError(f"{target}: must stand beside {source}, since media paths are relative")
    write_json(Path(target), records)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, help="where to write")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes (%(default)s)")
    parser.add_argument("--sft", type=int, default=4000, help="SFT records in all (%(default)s)")
    parser.add_argument("--rl", type=int, default=4000, help="RL records in all (%(default)s)")
    parser.add_argument(
        "--eval", type=int, default=40, help="evaluation records per task (%(default)s)"
    )
    parser.add_argument(
        "--shuffle-media",
        nargs=2,
        metavar=("IN", "OUT"),
        help="exchange the media of a JSON file; OUT beside IN",
    )
    parser.add_argument("--random", action="store_true", help="weights that were never trained")
    args = parser.parse_args()
    if args.shuffle_media:
        shuffle_media(*args.shuffle_media, args.seed)
        return
    if args.folder is None:
        parser.error("the folder to write to is missing")
    write_world(args.folder, args.seed, args.sft, args.rl, args.eval)
    base = None if args.random else BASE
    parameters = write_model(args.folder / "model", args.seed, base=base)
    print(f"{args.folder}: {args.sft} SFT and {args.rl} RL records, {args.eval} evaluation records for each of "
          f"{len(TASKS)} tasks, a model of {parameters:,} parameters")  # fmt: skip


if __name__ == "__main__":
    main()
