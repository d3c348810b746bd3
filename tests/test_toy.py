"""The toy world is what every other test and the demo stand on: is it what its records say?"""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
import toy

from data import PROMPTS, load_records, task_of


def write(folder):
    command = [
        sys.executable,
        toy.__file__,
        str(folder),
        "--sft",
        "48",
        "--rl",
        "48",
        "--eval",
        "12",
    ]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def records(world):
    """All records, normalised, by file name without .json."""
    return {
        path.stem: load_records(path)
        for path in [*world.glob("*.json"), *world.glob("eval/*.json")]
    }


def evaluation(records):
    return [
        record
        for name, group in records.items()
        if "_train" not in name and "sft" not in name
        for record in group
    ]


def frames_of(path):
    if path.endswith(".png"):
        return [np.asarray(Image.open(path))]
    with av.open(path) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def box_of_colour(pixels, colour):
    """Box 0-1000 of the pixels that are nearer to this colour than to the others and the background; None if none."""
    palette = np.array(
        [toy.COLOURS[colour], toy.BACKGROUND, *(c for n, c in toy.COLOURS.items() if n != colour)]
    )
    distance = np.abs(pixels[:, :, None].astype(int) - palette).sum(-1)  # (H, W, colours)
    rows, columns = np.nonzero(distance.argmin(-1) == 0)
    if not len(rows):
        return None
    corners = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    return (1000 * corners / len(pixels)).tolist()


def digest(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha1(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


def test_same_seed_same_bytes(world, tmp_path):
    """An unseeded draw or a set's order would make every run of the demo another one."""
    assert digest(write(tmp_path / "again")) == digest(world)
    toy.write_world(tmp_path / "other", seed=1, sft=48, rl=48, per_task=12)
    for name in ("rl_train.json", "sft_image.json", "eval/ocr.json"):
        assert digest(tmp_path / "other")[name] != digest(world)[name]


def test_evaluation_scenes_were_never_trained_on(world, records):
    """Held-out accuracy means nothing when a picture, under whatever name, is in both halves."""
    train = set(digest(world / "media").values())
    assert train.isdisjoint(digest(world / "eval/media").values())
    used = {m["path"] for record in evaluation(records) for m in record["media"]}
    assert all("/eval/media/" in path for path in used)


def test_every_medium_exists_and_every_task_is_there(records):
    """A task that is missing from one file would be missing from the demo's table, in silence."""
    for group in records.values():
        for record in group:
            assert len(record["media"]) == 1 and all(
                Path(m["path"]).is_file() for m in record["media"]
            )
    assert {task_of(record): 12 for record in evaluation(records)} == dict.fromkeys(PROMPTS, 12)
    assert Counter(task_of(record) for record in records["rl_train"]) == dict.fromkeys(PROMPTS, 4)
    assert len(records["sft_image"]) + len(records["sft_video"]) == 48
    assert {record["data_type"] for record in records["multiple_choice"]} == {"image", "video"}


def test_boxes_and_spans_match_the_decoded_pixels(records):
    """A box off by one second or one cell, or a colour that the codec smears, cannot be learned by looking."""
    tolerance = 1000 / toy.VIDEO + 1  # one pixel of a video
    for record in evaluation(records):
        answer = (
            json.loads(record["answer"])
            if "boxes" in record["answer"] or "time" in record["answer"]
            else None
        )
        if answer is None:
            continue
        frames = frames_of(record["media"][0]["path"])
        assert len(frames) == (1 if record["data_type"] == "image" else toy.SECONDS * toy.FPS)
        colour = next((c for c in toy.COLOURS if c in record["problem"]), None)
        if colour is None:  # tracking does not name it
            colour = next(c for c in toy.COLOURS if box_of_colour(frames[0], c))
        boxes = [box_of_colour(pixels, colour) for pixels in frames]
        task = task_of(record)
        if "grounding" in task and "temporal" in task:
            start, end = answer["time"]
            assert [box is not None for box in boxes] == [
                start <= i / toy.FPS < end for i in range(len(boxes))
            ]
        if task == "temporal grounding":
            continue
        if task in ("tracking", "spatial-temporal grounding"):
            first = 1 if task == "tracking" else 0  # the key of the frame at 0 seconds
            pairs = [
                (truth, (int(key) - first) * toy.FPS) for key, truth in answer["boxes"].items()
            ]
        else:
            pairs = [(answer["boxes"], answer.get("time", 0) * toy.FPS)]
        for truth, frame in pairs:
            assert np.abs(np.subtract(boxes[frame], truth)).max() < tolerance, (
                record["problem_id"],
                truth,
                boxes[frame],
            )


def test_points_and_masks_lie_on_the_object(records):
    """A positive point beside the shape would teach the model, and SAM2 after it, the wrong thing."""
    from pycocotools import mask as coco

    for name in ("segmentation_image", "segmentation_video"):
        for record in records[name]:
            answer, output = json.loads(record["answer"]), record["segmentation_output"]
            frame = answer.get("time", 0) * toy.FPS
            rle = (
                output["segmentation_rle"]
                if record["data_type"] == "image"
                else output["segmentation_rle"][str(frame)]
            )
            mask = coco.decode(rle)
            assert mask.shape == (record["resolution"]["height"], record["resolution"]["width"])
            rows, columns = np.nonzero(mask)
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert [toy.coordinate(int(px), len(mask)) for px in box] == answer["boxes"]
            hit = [
                mask[y * len(mask) // 1000, x * len(mask) // 1000]
                for x, y in answer["positive_points"]
            ]
            miss = [
                mask[y * len(mask) // 1000, x * len(mask) // 1000]
                for x, y in answer["negative_points"]
            ]
            assert all(hit) and not any(miss)


def test_no_constant_answer_scores_well(records):
    """The first draft of many a toy is solved by always saying the same."""
    for task in PROMPTS:
        answers = Counter(
            record["answer"] for record in evaluation(records) if task_of(record) == task
        )
        assert answers.most_common(1)[0][1] / answers.total() < 0.35, task


def test_tokenizer_round_trip_and_one_token_numbers(world, records):
    """A loader that swaps in Qwen's own splitting rules makes ten tokens of a box's four, and longer responses."""
    import cpu_compat  # noqa: F401 (before transformers)
    from transformers import AutoProcessor

    tokenizer = AutoProcessor.from_pretrained(world / "model").tokenizer
    for number in [
        toy.coordinate(px, side) for side in (toy.IMAGE, toy.VIDEO) for px in range(0, side + 1, 2)
    ]:
        assert len(tokenizer.tokenize(str(number))) == 1
    assert len(tokenizer.tokenize("<7.5 seconds>")) == len(tokenizer.tokenize("</think>")) == 1
    longest = 0
    for record in records["sft_image"] + records["sft_video"]:
        for message in record["messages"]:
            ids = tokenizer(message["content"])["input_ids"]
            assert tokenizer.decode(ids) == message["content"]
        longest = max(longest, len(ids))
    assert longest <= 110
    assert (
        tokenizer.decode(tokenizer("Ünknown wörds, 漢字 <1>\n")["input_ids"])
        == "Ünknown wörds, 漢字 <1>\n"
    )
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_model_sees_pictures_and_videos(world, records):
    """Special token ids of config, tokenizer and processor that disagree leave the vision features unused."""
    import cpu_compat  # noqa: F401 (before transformers)
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(world / "model")
    model = AutoModelForImageTextToText.from_pretrained(world / "model")
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    for kind, name, tokens in (("image", "ocr", 9), ("video", "tracking", 32)):
        logits = []
        for record in records[name][:2]:
            pixels = frames_of(record["media"][0]["path"])
            part = Image.fromarray(pixels[0]) if kind == "image" else np.stack(pixels[::2])
            chat = [
                {
                    "role": "user",
                    "content": [{"type": kind, kind: part}, {"type": "text", "text": "Look."}],
                }
            ]
            text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            assert text.startswith("<|im_start|>user\n") and text.endswith(
                "Look.<|im_end|>\n<|im_start|>assistant\n"
            )
            meta = dict(fps=toy.FPS, frames_indices=list(range(0, 32, 2)), total_num_frames=32)
            videos = {"videos": [part], "video_metadata": [meta], "do_sample_frames": False}
            media = {"images": [part]} if kind == "image" else videos
            inputs = processor(text=[text], return_tensors="pt", **media)
            assert (
                inputs["input_ids"] == getattr(model.config, f"{kind}_token_id")
            ).sum() == tokens
            with torch.no_grad():
                logits.append(model(**inputs).logits[0, -1])
        assert (logits[0] - logits[1]).abs().max() > 1e-4


def test_shuffled_media_are_all_others(world, records):
    """A shuffle that leaves some records their own picture makes a blind model look sighted."""
    for name in ("multiple_choice", "segmentation_video"):
        target = world / "eval" / f"{name}_shuffled.json"
        subprocess.run(
            [sys.executable, toy.__file__, "--shuffle-media", world / f"eval/{name}.json", target],
            check=True,
        )
        shuffled = load_records(target)
        target.unlink()
        for old, new in zip(records[name], shuffled, strict=True):
            assert (
                old["media"] != new["media"] and old["media"][0]["type"] == new["media"][0]["type"]
            )
            assert (old["problem"], old["answer"]) == (new["problem"], new["answer"])
            assert Path(new["media"][0]["path"]).is_file()
        assert Counter(r["path"] for r in shuffled) == Counter(r["path"] for r in records[name])


def test_pretraining_runs_and_leaves_a_base(tmp_path):
    """A script of which only the result is ever used: it no longer runs when somebody wants another."""
    base = tmp_path / "base.safetensors"
    flags = "--minutes", "0.05", "--scenes", "2", "--base", str(base)
    script = Path(toy.__file__).with_name("pretrain.py")
    subprocess.run([sys.executable, script, tmp_path, *flags], check=True, capture_output=True)
    told = json.loads(base.with_suffix(".json").read_text())
    assert told["steps"] > 0 and 0 < told["loss"] < 20
    assert toy.write_model(tmp_path / "again", 0, base=base) == 813_504


def test_the_base_is_what_its_file_says(world, records):
    """Weights of another tokenizer, of unknown origin, or that have seen what they are asked later."""
    import random

    import cpu_compat  # noqa: F401 (before transformers)
    import pretrain
    from transformers import AutoTokenizer

    told = json.loads(toy.BASE.with_suffix(".json").read_text())
    assert hashlib.sha256(toy.BASE.read_bytes()).hexdigest() == told["sha256"]
    assert toy.BASE.stat().st_size < 2_500_000
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    words = json.loads((world / "model" / "tokenizer.json").read_text())["model"]["vocab"]
    assert hashlib.sha256(json.dumps(words).encode()).hexdigest() == told["vocabulary"]
    rng = random.Random(1)
    for _ in range(300):
        kind, scene, pairs = pretrain.scene_of(rng)
        assert not toy.held_out(scene)
        assert not any("<answer>" in answer for _, answer in pairs)
    group, weights = pretrain.group_of(tokenizer, kind, scene, pairs)
    assert len(weights) == sum(map(len, group.responses)) and len(group.prompt.patches) > 0
