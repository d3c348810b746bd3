"""Pretrains the toy's base model: it learns to see, and to answer about what it is asked for.

    python tests/pretrain.py runs/base --minutes 85     # one core for the model, a little of another

As the real recipe begins with Qwen3-VL-Instruct, the demo begins with a model that can see. It is
shown random scenes, each with several questions: short ones about one object, one second or one
row, and those of the tasks, answered in plain words. It meets none of the answers' tags, and none
of the scenes held out for evaluation. A scene and its questions are one `sft.Group`, [media |
question 1, answer 1 | ... | question n, answer n], so that the scene is computed once.

Writes assets/toy_base.safetensors, the weights in bfloat16, and assets/toy_base.json beside it:
their SHA-256, the command, the last loss. Muon trains the layers' matrices, AdamW the rest.
"""

import argparse
import hashlib
import json
import random
import sys
import time
from collections import deque
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cpu_compat  # before transformers
import torch
import toy
from safetensors.torch import save_file
from transformers import AutoTokenizer

import data
import sft


def questions_of_cells(rng, shapes):
    """About a picture of 3 x 3 cells."""
    there = sorted({shape.colour for shape in shapes})
    colour = rng.choice(there if rng.random() < 0.8 else list(toy.COLOURS))
    rows = toy.in_rows(shapes, colour)
    spot = rng.choice(shapes)
    yield f"How many {colour} by row?", f"{rows[0]} {rows[1]} {rows[2]}, {sum(rows)}"
    row = rng.randrange(3)
    yield f"How many {colour} in the {('top', 'middle', 'bottom')[row]} row?", str(rows[row])
    yield f"How many {colour} shapes?", str(sum(rows))
    yield f"What is at the {toy.place(spot, toy.IMAGE)}?", toy.name(spot)
    yield (
        "How many of each colour?",
        ", ".join(f"{sum(s.colour == c for s in shapes)} {c}" for c in there),
    )


def questions_of_image(rng, shapes):
    """About a picture of a few things."""
    for shape in shapes:
        others = [other for other in shapes if other is not shape]
        if shape.kind in toy.WORDS:
            yield "Which letters?", " ".join(shape.kind)
            yield "Which word?", shape.kind
            yield "Which colour is the word?", shape.colour
        elif shape.kind == "bar":
            start, end = shape.x // 8, (shape.x + shape.w) // 8
            yield "Where does the bar begin and end?", f"{start} {end}"
            yield "How long is the bar?", str(end - start)
        elif (shape.colour, shape.kind) not in [other[:2] for other in others]:
            asked = toy.name(shape)
            if shape.kind not in [other.kind for other in others]:
                asked = rng.choice((asked, asked, shape.kind))
                yield f"Which colour is the {shape.kind}?", shape.colour
            if shape.colour not in [other.colour for other in others]:
                yield f"Which shape is {shape.colour}?", shape.kind
            corners = " ".join(map(str, toy.box(shape, toy.IMAGE)))
            yield f"Where is the {asked}?", f"{toy.place(shape, toy.IMAGE)}, {corners}"
            yield f"Box of the {asked}?", corners
            points = " ".join(str(c) for point in toy.points(shape, toy.IMAGE) for c in point)
            yield f"Points of the {asked}?", points
            if others:
                yield f"What is there beside the {asked}?", ", ".join(map(toy.name, others))


def questions_of_video(rng, scene):
    """About a video of moving or standing things."""
    looks = sorted({shape[:2] for shapes in scene for shape in shapes})
    second = rng.randrange(toy.SECONDS)
    words = ", ".join(toy.name(shape) for shape in scene[second])
    yield f"What is there at {second}?", words or "nothing"
    for look in looks:
        path = {t: shape for t, shapes in enumerate(scene) for shape in shapes if shape[:2] == look}
        name = " ".join(look)
        start, end = min(path), max(path) + 1
        yield f"When is the {name} there?", f"{start} {end}"
        yield f"When does the {name} come?", str(start)
        yield f"Until when is the {name} there?", str(end)
        second = rng.choice(list(path))
        corners = toy.box(path[second], toy.VIDEO)
        yield f"Box of the {name} at {second}?", " ".join(map(str, corners))
        yield f"Where is the {name} at {second}?", toy.place(path[second], toy.VIDEO)
        points = " ".join(str(c) for point in toy.points(path[second], toy.VIDEO) for c in point)
        yield f"Points of the {name}?", points
        moves = {
            (b.x - a.x, b.y - a.y) for a, b in zip(list(path.values()), list(path.values())[1:])
        }
        ways = [way for way, (dx, dy) in toy.DIRECTIONS.items() if (dx * 16, dy * 16) in moves]
        if len(ways) == 1 and moves <= {(0, 0), tuple(16 * d for d in toy.DIRECTIONS[ways[0]])}:
            yield f"Which way does the {look[1]} move?", ways[0]


def task_questions(rng, task, item, kind):
    """The task's own question: with its whole instruction, and short."""
    problem_type = "segmentation" if task.startswith("segmentation") else task
    record = dict(problem=item.problem, options=list(item.options))
    record |= dict(problem_type=problem_type, data_type=kind)
    answer = toy.as_text(item.answer)
    yield data.render_problem(record), f"{item.thought} {answer}"
    short = " ".join([item.problem, *item.options])
    yield short, rng.choice((answer, f"{item.thought} {answer}"))


def scene_of(rng):
    """A random scene that is not held out: its kind of medium, its seconds, [(question, answer)]."""
    task = rng.choice(list(toy.TASKS))
    item = toy.some_item(rng, toy.TASKS[task], rng.randrange(1200))
    scene, kind = item.scene, "image" if len(item.scene) == 1 else "video"
    long, short = task_questions(rng, task, item, kind)
    if kind == "video":
        asked = list(questions_of_video(rng, scene))
    elif scene[0][0].w == 24:  # the shapes of toy.cells
        asked = list(questions_of_cells(rng, scene[0]))
    else:
        asked = list(questions_of_image(rng, scene[0]))
    asked = rng.sample(asked, min(5, len(asked))) + [short] * (rng.random() < 0.5)
    return kind, scene, asked + [long] * (rng.random() < 0.4)


def group_of(tokenizer, kind, scene, pairs):
    """A scene with its questions -> sft.Group, and for each token of its responses 1.0 in an answer, else 0.0."""
    ids_of = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    side = toy.IMAGE if kind == "image" else toy.VIDEO
    pads = f"<|{kind}_pad|>" * (side // 32) ** 2
    media = f"<|vision_start|>{pads}<|vision_end|>"
    if kind == "video":
        shown = data.sample_positions(toy.SECONDS * toy.FPS, toy.SECONDS, 2, 128) / toy.FPS
        stamps = (shown[::2] + shown[1::2]) / 2
        media = "".join(f"<{stamp:.1f} seconds>{media}" for stamp in stamps)
    frames = np.repeat([np.asarray(toy.draw(shapes, side)) for shapes in scene], 2, axis=0)
    rows, grid = data.patchify(frames)
    ids = ids_of(f"<|im_start|>user\n{media}")
    vision = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    positions = data.mrope_positions(ids, vision, [grid])
    prompt = data.Prompt({}, ids, positions, torch.from_numpy(rows), torch.tensor([grid]), None)
    responses, weights = [], []
    for question, answer in pairs:
        asked = ids_of(f"{question}<|im_end|>\n<|im_start|>assistant\n")
        said = ids_of(f"{answer}<|im_end|>")
        responses.append(asked + said)
        weights += [0.0] * len(asked) + [1.0] * len(said)
    return sft.Group(prompt, responses), weights


class Batches(torch.utils.data.IterableDataset):
    """Packed batches of random scenes without end, drawn by one worker process."""

    def __init__(self, tokenizer, scenes, seed):
        self.tokenizer, self.scenes, self.seed = tokenizer, scenes, seed

    def __iter__(self):
        rng = random.Random(f"{self.seed}/pretrain")
        while True:
            made = [group_of(self.tokenizer, *scene_of(rng)) for _ in range(self.scenes)]
            batch = sft.pack([group for group, _ in made], "cpu")
            yield batch, torch.tensor([w for _, weights in made for w in weights])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the random model is written")
    parser.add_argument("--minutes", type=float, default=85, help="(%(default)s)")
    parser.add_argument("--scenes", type=int, default=24, help="per step (%(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", type=Path, default=toy.BASE, help="where its weights go")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    toy.write_model(args.folder / "model", args.seed, base=None)
    tokenizer = AutoTokenizer.from_pretrained(args.folder / "model")
    model = sft.Qwen3VL.from_pretrained(args.folder / "model", dtype=torch.float32)
    cpu_compat.one_matrix_patch_embedding(model.model.visual)
    model.set_attn_implementation({"text_config": "shared_prefix", "vision_config": "sdpa"})

    named = dict(model.named_parameters())
    inside = [name for name, w in named.items() if "language_model.layers" in name and w.ndim == 2]
    others = [weight for name, weight in named.items() if name not in inside]
    optimizers = [torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)]
    settings = dict(lr=args.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    optimizers.append(torch.optim.Muon([named[name] for name in inside], **settings))

    batches = Batches(tokenizer, args.scenes, args.seed)
    as_it_is = lambda batch: batch  # the default would change the tuples inside
    loader = torch.utils.data.DataLoader(
        batches, None, num_workers=1, collate_fn=as_it_is, multiprocessing_context="fork"
    )
    begin, losses = time.time(), deque(maxlen=200)
    for step, (batch, weights) in enumerate(loader, 1):
        share = (time.time() - begin) / 60 / args.minutes
        if share >= 1:
            break
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            # Warm-up, constant for half of the time, then down to 2%.
            group["lr"] = args.lr * min(1, step / 100, 2 * (1 - share) + 0.02)
        logps = sft.response_logps(model, batch)
        loss = -(logps * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if step % 200 == 0:
            print(f"step {step}, {share:.0%} of the time: loss {np.mean(losses):.4f}", flush=True)

    state = {
        name: w.to(torch.bfloat16)
        for name, w in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(state, args.base, {"format": "pt"})
    told = dict(sha256=hashlib.sha256(args.base.read_bytes()).hexdigest(), steps=step - 1)
    words = json.loads((args.folder / "model" / "tokenizer.json").read_text())["model"]["vocab"]
    told["vocabulary"] = hashlib.sha256(json.dumps(words).encode()).hexdigest()
    told |= dict(command=" ".join(["python", *sys.argv]), loss=round(float(np.mean(losses)), 4))
    args.base.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
