"""infer.py: what an answer says, where it is drawn, and that every way of asking asks the same."""

import contextlib
import http.server
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request

import av
import numpy as np
import pytest
import torch
from conftest import ROOT, run, tiny_sam2
from PIL import Image
from test_vllm import write_video

import data
import infer
from data import Marks

ORANGE, WHITE, BLUE = (255, 165, 0), (255, 255, 255), (0, 0, 255)
SIX = dict(
    positive_points=[[200, 300], [300, 400], [400, 600]],
    negative_points=[[90, 240], [500, 260], [300, 750]],
)
BOX, MOVED = [120, 250, 480, 700], [130, 250, 490, 700]

# --------------------------------------------------------------------------------------------------
# Reading


TRACK = {"1": BOX, "3": MOVED, "0": [1, 1, 2, 2], "x": [1, 1, 2, 2]}


@pytest.mark.parametrize(
    "task, kind, said, good, marks",
    [
        ("multiple choice", "image", "B. a man", True, Marks()),
        ("multiple choice", "image", "A or B", False, Marks()),
        ("numerical", "image", "1,234", True, Marks()),
        ("regression", "video", "about a third of it", False, Marks()),
        ("open-ended", "video", '{"boxes": [1, 2, 3, 4]}', True, Marks()),
        ("temporal grounding", "video", {"time": [12.3, 25.7]}, True, Marks(span=(12.3, 25.7))),
        ("temporal grounding", "video", "from the start on", False, Marks()),
        ("spatial grounding", "image", f'It is [{{"bbox_2d": {BOX}}}].', True, Marks(boxes={0: BOX})),
        ("spatial grounding", "image", '{"boxes": [120, 250, 480]}', False, Marks()),
        ("spatial-temporal grounding", "video", {"time": [3.0, 4.6], "boxes": {"3": BOX, "4": MOVED}}, True,
         Marks((3.0, 4.6), {3.0: BOX, 4.0: MOVED})),
        ("tracking", "video", {"boxes": TRACK}, True, Marks(boxes={0.0: BOX, 2.0: MOVED})),
        ("tracking", "video", {"boxes": {"1": BOX, "2": "gone"}}, False, Marks(boxes={0.0: BOX})),
        ("segmentation", "image", {"boxes": BOX, **SIX}, True, Marks(None, {0: BOX}, *SIX.values())),
        ("segmentation", "video", {"time": 4.0, "boxes": BOX, **SIX}, True, Marks(None, {4.0: BOX}, *SIX.values(), 4.0)),
        ("segmentation", "video", {"boxes": BOX, **SIX}, False, Marks()),
        ("segmentation", "video", {"time": 4, "boxes": {"7": BOX}}, False, Marks(None, {}, [], [], 4)),
    ],
)  # fmt: skip
def test_answers_of_all_tasks_are_read(task, kind, said, good, marks, capsys):
    """An unreadable answer passes for a readable one; a box is drawn at the wrong second."""
    record = dict(
        problem_id="0", problem_type=task, data_type=kind, options=["A. a dog", "B. a man"]
    )
    said = said if isinstance(said, str) else json.dumps(said)
    text = f"<think>I look at it.</think>\n<answer>{said}</answer>"
    pieces = [(text[i : i + 5], None) for i in range(0, len(text), 5)] + [("", "stop")]
    answer, readable = infer.print_stream(record, pieces)
    assert readable is good
    assert data.marks_of(data.task_of(record), answer) == marks
    assert (
        not good or marks == Marks() or data.marks_of(None, answer) == marks
    )  # as --peek draws messages
    printed = capsys.readouterr()
    assert printed.out == f"{text}\nanswer: {answer}\n"
    assert ("cannot be read" in printed.err) is not good


def test_a_response_is_printed_as_it_comes(capsys):
    """Words twice or never, a "stream" that appears at its end, JSON with other words around it."""
    record, text = (
        dict(problem_type="OCR", data_type="image"),
        "<think>Hm.</think>B",
    )
    parts = []

    def pieces():
        for i, letter in enumerate(text):
            yield letter, "length" if i == len(text) - 1 else None
            parts.append(capsys.readouterr().out)

    infer.print_stream(record, pieces())
    assert parts == list(text) and capsys.readouterr().out == "\nanswer: B\n"
    infer.print_stream(record, [(text, "length")], as_json=True)
    line = dict(task="OCR", response=text, answer="B", readable=True, finished=False)
    assert json.loads(capsys.readouterr().out) == line


# --------------------------------------------------------------------------------------------------
# Drawing


def outline(pixels, colour=ORANGE, tolerance=0):
    """x1, y1, x2, y2 (exclusive) of all pixels of about this colour."""
    near = np.abs(np.asarray(pixels, dtype=int) - colour) <= tolerance
    ys, xs = np.nonzero(near.all(-1))
    return (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(xs) else None


def draw(image, marks, second=0):
    return data.draw(image, {"orange": marks}, second)


def test_a_box_covers_its_pixels():
    """Width and height exchanged, x2 one pixel too far, a reversed box, one beyond the edge."""
    white = Image.new("RGB", (400, 300), "white")
    drawn = lambda box: draw(white, Marks(boxes={0: box}))
    pixels = np.asarray(drawn([100, 200, 499, 800]))
    assert outline(pixels) == (40, 60, 200, 240)
    assert (pixels[60:62, 40:200] == ORANGE).all() and (pixels[60:240, 198:200] == ORANGE).all()
    assert (pixels[62:238, 42:198] == WHITE).all()
    assert outline(drawn([499, 800, 100, 200])) == (40, 60, 200, 240)
    assert outline(drawn([-5, 501, 2000, 1e9])) == (0, 150, 400, 300)
    assert np.asarray(white).min() == 255, "the image itself was drawn on"


def test_points_and_masks():
    """Points at (y, x), negative ones like positive ones, a mask stretched to the wrong shape."""
    white = Image.new("RGB", (400, 300), "white")
    disc = np.asarray(draw(white, Marks(positive=[[250, 500]])))
    other = np.asarray(draw(white, Marks(negative=[[250, 500]])))
    assert (disc[150, 100] == ORANGE).all() and (disc[146, 100] == 0).all()
    assert (other[150, 100] == 0).all() and (other[146, 100] == ORANGE).all()
    mask = np.zeros((30, 40), bool)
    mask[:10, 20:] = True  # at a tenth of the size
    assert outline(infer.tint(white, mask), (255, 210, 127), 1) == (200, 0, 400, 100)


def test_boxes_between_seconds():
    """Boxes that jump from second to second, stay for ever, or appear before they are named."""
    grey = Image.new("RGB", (400, 300), "grey")
    marks = Marks(boxes={2.0: [0, 0, 499, 499], 3.0: [501, 0, 1000, 499]})
    places = [outline(draw(grey, marks, second)) for second in (1.9, 2.0, 2.5, 3.9, 4.0)]
    between = [(0, 0, 200, 150), (100, 0, 300, 150), (200, 0, 400, 150)]
    assert places == [None, *between, None]
    prompt = Marks(boxes={2.0: [0, 0, 500, 500]}, positive=[[900, 900]], time=2.0)
    drawn = [outline(draw(grey, prompt, second)) for second in (1.9, 2.0, 2.9, 3.0)]
    assert [place is not None for place in drawn] == [0, 1, 1, 0]


def test_options_have_one_letter():
    """ "A. A. dog" where the user has written the letters."""
    asked = ("Which?", "image", "a.png", "multiple choice")
    plain, lettered = ["dog", "cat"], ["A. dog", "B. cat"]
    assert infer.record_of(*asked, plain)["options"] == lettered
    assert infer.record_of(*asked, lettered)["options"] == lettered


def save(path, medium, kind, task, answer, sam2=None, **more):
    record = dict(problem_type=task, data_type=kind, **more)
    record["media"] = [dict(type=kind, path=str(medium))]
    answer = answer if isinstance(answer, str) else json.dumps(answer)
    infer.save_drawing(str(path), record, answer, data.Limits(), sam2)
    if str(path).endswith(".png"):
        with Image.open(path) as drawn:
            return drawn.convert("RGB")


def test_a_rotated_photograph_is_drawn_upright(tmp_path):
    """A phone's photograph, stored on its side: a box drawn on the stored pixels is elsewhere."""
    upright = Image.new("RGB", (300, 401), "white")
    upright.paste(BLUE, (30, 200, 150, 401))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.png", exif=exif)
    answer = {"boxes": [100, 499, 499, 1000]}
    drawn = save(tmp_path / "o.png", tmp_path / "phone.png", "image", "spatial grounding", answer)
    assert drawn.size == (300, 402)  # one row more, for an even height
    assert outline(drawn) == (30, 200, 150, 401)
    assert outline(drawn, BLUE) == (32, 202, 148, 399)  # the object, less the frame around it


def test_text_answers_stand_below_a_tiny_image(tmp_path):
    """An answer without marks that leaves no trace; a caption that a thumbnail has no room for."""
    Image.new("RGB", (48, 96), "blue").save(tmp_path / "tiny.png")
    for task, answer in (("OCR", "TWO WORDS"), ("spatial grounding", "[1, 2")):
        drawn = save(tmp_path / "o.png", tmp_path / "tiny.png", "image", task, answer)
        assert outline(drawn, BLUE) == (0, 0, 96, 192)  # twice as large
        assert outline(np.asarray(drawn)[192:], (0, 0, 0), 60) is not None


def turned(path, out):
    """A copy of an MP4 whose header says: turn by 90 degrees clockwise (matrix of its tkhd box)."""
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 40
    content[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    out.write_bytes(content)


def frames_of(path):
    """[(second, pixels)] of a video."""
    with av.open(str(path)) as container:
        frames = container.decode(video=0)
        return [(float(f.pts * f.time_base), f.to_ndarray(format="rgb24")) for f in frames]


TIMES = [0, 40, 500, 1000, 1040, 2500, 3000, 3960]  # ms


@pytest.mark.parametrize("rotated", [False, True])
def test_a_video_is_drawn_on_every_frame_at_its_own_time(tmp_path, rotated):
    """Frames lost or evened out, odd sizes, a phone's video on its side, boxes at other seconds."""
    write_video(tmp_path / "a.mp4", 258, 386, TIMES)
    turned(tmp_path / "a.mp4", tmp_path / "turned.mp4")
    width, height = (386, 258) if rotated else (258, 386)
    boxes = {"1": [0, 0, 500, 500], "2": [500, 0, 1000, 500], "3": [500, 500, 1000, 1000]}
    medium, answer = "turned.mp4" if rotated else "a.mp4", {"time": [1.02, 1.9], "boxes": boxes}
    save(tmp_path / "o.mp4", tmp_path / medium, "video", "spatial-temporal grounding", answer)
    frames = frames_of(tmp_path / "o.mp4")
    assert [second for second, _ in frames] == pytest.approx([ms / 1000 for ms in TIMES], abs=1e-4)
    corners = {1.0: (0, 0), 1.04: (0.02, 0), 2.5: (0.5, 0.25), 3.0: (0.5, 0.5), 3.96: (0.5, 0.5)}
    for (second, pixels), level in zip(frames, range(0, 64, 8)):
        assert pixels.shape[0] >= height + 18 and pixels.shape[1] == width
        shown, corner = pixels[:height], corners.get(round(second, 2))
        found = outline(shown, ORANGE, 70)
        if corner is None:
            assert found is None and shown.std() < 4
        elif second == pytest.approx(1.04):  # in the span: a border around it all
            assert found == pytest.approx((0, 0, width, height), abs=1)
        else:
            x, y = corner[0] * width, corner[1] * height
            assert found == pytest.approx((x, y, x + width / 2, y + height / 2), abs=2.1), second
        assert np.median(shown) == pytest.approx(level, abs=4)


def test_frames_are_turned_the_way_the_model_sees_them(tmp_path):
    """A phone's video upside down: its stored top left corner is shown at the top right."""
    pixels = np.full((200, 300, 3), 128, np.uint8)
    pixels[:100, :150] = BLUE
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt = 300, 200, "yuv420p"
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    turned(tmp_path / "a.mp4", tmp_path / "turned.mp4")
    frames = infer.iter_frames(dict(type="video", path=str(tmp_path / "turned.mp4")), None)
    shown = [image for _, image in frames]
    assert len(shown) == 4 and shown[0].size == (200, 300)
    seen = Image.fromarray(data.read_video(tmp_path / "turned.mp4").frames[0]).resize((200, 300))
    assert outline(shown[0], BLUE, 60) == pytest.approx((100, 0, 200, 150), abs=2)
    assert outline(seen, BLUE, 60) == pytest.approx((100, 0, 200, 150), abs=4)


def test_a_gif_keeps_time(tmp_path):
    """A GIF that plays all frames at one speed, or loses the ones that look alike."""
    write_video(tmp_path / "a.mp4", 300, 200, TIMES)
    answer = {"boxes": {"1": [0, 0, 500, 500]}}
    save(tmp_path / "o.gif", tmp_path / "a.mp4", "video", "tracking", answer)
    durations = []
    with Image.open(tmp_path / "o.gif") as gif:
        for i in range(gif.n_frames):
            gif.seek(i)
            durations.append(gif.info["duration"])
            boxed = outline(gif.convert("RGB").crop((0, 0, 300, 200)), ORANGE, 8) is not None
            assert boxed == (TIMES[i] < 1000)
    mean = pytest.approx(3960 / 7, abs=6)  # so long stands the last one
    assert durations == [40, 460, 500, 40, 1460, 500, 960, mean]


def test_the_strip_of_a_video():
    """A strip of other seconds than it says, a span that is off, the prompted frame left out."""
    frames = np.stack([np.full((60, 90, 3), 5 * i, np.uint8) for i in range(21)])
    answer = Marks(boxes={4.5: [0, 0, 1000, 1000]}, time=4.5)
    marks = {"lime": Marks(span=(5.0, 10.0)), "orange": answer}
    strip = data.draw_medium(data.Video(frames, [*range(21)], 2.0, 21), marks)
    levels = np.asarray(strip)[60, 80::162, 0]
    assert (levels / 10).tolist() == [0, 1, 3, 4.5, 5, 6, 8, 10]
    cells = [strip.crop((162 * i, 0, 162 * i + 160, 120)) for i in range(8)]
    assert [outline(cell) is not None for cell in cells] == [0, 0, 0, 1, 1, 0, 0, 0]
    # The span's border, under the box if there is one; a frame at the span's end is outside.
    borders = [outline(cell, (0, 255, 0)) for cell in cells]
    expected = [None] * 4 + [(158, 105), (160, 107), (160, 107), None]
    assert [border and border[2:] for border in borders] == expected


def test_folders_of_frames(tmp_path):
    """Frames in the order 1, 10, 2, and a folder that plays at another speed than the model saw."""
    (tmp_path / "frames").mkdir()
    for i in range(12):
        Image.new("RGB", (300, 200), (10 * i,) * 3).save(tmp_path / "frames" / f"{i}.png")
    answer = {"boxes": {"1": [0, 0, 1, 1]}}
    save(tmp_path / "o.mp4", tmp_path / "frames", "video", "tracking", answer, fps=4)
    frames = frames_of(tmp_path / "o.mp4")
    assert [second for second, _ in frames] == pytest.approx([i / 4 for i in range(12)], abs=1e-4)
    levels = [np.median(pixels[50:150]) for _, pixels in frames]
    assert levels == pytest.approx([10 * i for i in range(12)], abs=2)


# --------------------------------------------------------------------------------------------------
# SAM2


@pytest.fixture(scope="module")
def sam2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sam2")
    tiny_sam2(folder)
    return folder, infer.load_sam2(str(folder), "cpu")


POINTS = [[300, 300], [400, 300], [300, 400]], [[900, 900], [50, 900], [900, 50]]
PROMPT = Marks(None, {0: [100, 100, 600, 700]}, *POINTS)


def noise(*shape):
    return np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)


def test_sam2_is_prompted_with_box_and_points(sam2):
    """A box left out where there are points, points in another image's pixels, a mask that differs
    from that of SAM2's model for images."""
    from transformers import Sam2Model, Sam2Processor

    model, processor = Sam2Model.from_pretrained(sam2[0]), Sam2Processor.from_pretrained(sam2[0])
    image, other = Image.fromarray(noise(50, 70, 3)), Image.fromarray(noise(90, 40, 3))
    points = [[x * 0.07, y * 0.05] for x, y in PROMPT.positive + PROMPT.negative]
    prompt = dict(input_points=[[points]], input_labels=[[[1, 1, 1, 0, 0, 0]]])
    boxes = [[[7, 5, 42, 35]]]
    inputs = processor(images=[image], input_boxes=boxes, **prompt, return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**inputs, multimask_output=False).pred_masks
    expected = processor.post_process_masks(logits, inputs["original_sizes"])[0][0, 0].numpy()
    only_box = PROMPT._replace(positive=[], negative=[])
    items = [(image, PROMPT), (other, PROMPT), (image, Marks()), (image, only_box)]
    masks = [infer.segment_video(sam2[1], np.array(im)[None], 0, marks)[0] for im, marks in items]
    assert [mask.shape for mask in masks] == [(50, 70), (90, 40), (50, 70), (50, 70)]
    assert masks[0].dtype == bool and (masks[0] == expected).all() and 0.05 < expected.mean() < 0.95
    assert not masks[2].any() and (masks[3] != masks[0]).mean() > 0.01


def test_sam2_follows_an_object_both_ways(sam2):
    """Masks only from the prompt onwards; the prompt on the first frame instead of its own."""
    frames = noise(6, 50, 70, 3)
    masks = infer.segment_video(sam2[1], frames, 2, PROMPT)
    assert masks.shape == (6, 50, 70) and masks.dtype == bool and masks.any((1, 2)).all()
    backwards = infer.segment_video(sam2[1], frames[::-1].copy(), 3, PROMPT)
    assert ((backwards[::-1] == masks).mean((1, 2)) > 0.9).all()
    assert (infer.segment_video(sam2[1], frames, 0, PROMPT) != masks)[2].mean() > 0.2
    assert not infer.segment_video(sam2[1], frames, 2, Marks()).any()


def test_masks_are_drawn(sam2, tmp_path):
    """--sam2 given and nothing of it to be seen; a video's masks at other seconds."""
    Image.fromarray(noise(300, 400, 3)).save(tmp_path / "a.png")
    write_video(tmp_path / "a.mp4", 300, 200, range(0, 4000, 250))
    answer = json.dumps({"time": 1.0, "boxes": BOX, **SIX})
    drawn = {}
    for name, model in (("plain", None), ("masked", sam2[1])):
        settings = "image", "segmentation", answer, model
        drawn[name] = np.asarray(save(tmp_path / f"{name}.png", tmp_path / "a.png", *settings))
        settings = "video", *settings[1:]
        save(tmp_path / f"{name}.mp4", tmp_path / "a.mp4", *settings)
    marks = data.marks_of("segmentation-image", answer)
    with Image.open(tmp_path / "a.png") as image:
        mask = infer.segment_video(sam2[1], np.array(image)[None], 0, marks)[0]
    differs = (drawn["plain"] != drawn["masked"]).any(-1)
    assert (differs <= mask).all() and differs.sum() > 0.8 * mask.sum() > 0

    video, marks = data.read_video(tmp_path / "a.mp4"), data.marks_of("segmentation-video", answer)
    masks = infer.segment_video(sam2[1], video.frames, 2, marks)
    seconds = [i / video.fps for i in video.indices]
    shares = [masks[data.nearest(seconds, i / 4)].mean() for i in range(16)]
    both = zip(frames_of(tmp_path / "plain.mp4"), frames_of(tmp_path / "masked.mp4"), strict=True)
    tinted = [(np.abs(a.astype(int) - b)[:200].max(-1) > 40).mean() for (_, a), (_, b) in both]
    assert tinted == pytest.approx(shares, abs=0.05)


# --------------------------------------------------------------------------------------------------
# Requests


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--image none.png --task OCR read", "none.png"),
        ("--image a.png --task tracking follow", "--task 'tracking' does not go with --image"),
        ("--image a.png --save o.mp4 read", "--save o.mp4: expected .png"),
        ("--image a.png --save a.png/o.png", "File exists"),
        ("--image a.png which --options one two", "--options are needed for a multiple choice"),
        ("--image torn.png what", "torn.png: cannot identify image file"),
        ("what", "--image or --video is needed"),
        ("--image a.png what<image>is<image>this", "<image>"),
        ("--image a.png --json", "--json: a question is needed"),
        ("--image a.png what --sam2 none", "none: no folder of a model, and no hub id"),
        ("--image a.png what --model none", "none: no folder of a model, and no hub id"),
    ],
)  # fmt: skip
def test_wrong_requests_are_refused_at_once(toy, tmp_path, monkeypatch, words, sentence):
    """A model of 8B is loaded first, and then a typing error ends it in a traceback."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save("a.png")
    (tmp_path / "a.mp4").write_text("no video")
    (tmp_path / "torn.png").write_text("no image")
    monkeypatch.setattr(infer, "load_model", lambda *_: pytest.fail("the model is loaded"))
    monkeypatch.setattr(sys, "argv", ["infer.py", "--model", str(toy / "model"), *words.split()])
    with pytest.raises(infer.UNUSABLE) as error:
        infer.main()
    assert sentence in str(error.value)


# --------------------------------------------------------------------------------------------------
# Asking the model, and a server


@pytest.fixture(scope="module")
def questions(toy):
    """Records: a held-out question of each task, and one on an uneven video."""
    folder, records = toy / "eval", []
    for path in sorted(folder.glob("*.json")):
        records.append(data.load_records(path)[0])
    times = [0, 40, 80, 1000, 1040, 3000, 3100, 7000]
    write_video(folder / "uneven.mp4", 130, 50, times)
    uneven = folder / "uneven.mp4"
    record = infer.record_of("Before <video> and after?", "video", uneven, "OCR", [])
    return [*records, record]


@pytest.fixture(scope="module")
def model(toy):
    return infer.load_model(str(toy / "model"))


LIMITS = data.Limits(frame_max_pixels=256 * 1024, image_min_pixels=4096)


def answers(record, processor, model, tokens=24):
    """The model's response, and why it ended."""
    prompt = data.encode(record, processor, LIMITS)
    pieces = list(infer.stream_model(prompt, model, processor.tokenizer, tokens))
    assert not any(end for _, end in pieces[:-1])
    return "".join(piece for piece, _ in pieces), pieces[-1][1]


def test_ends_and_banned_tokens(processor, model, questions, monkeypatch):
    """<|endoftext|>, the second end of Qwen3-VL's generation_config.json, or a vision token is read
    as part of an answer."""
    record, tokenizer = questions[0], processor.tokenizer
    first, end = answers(record, processor, model, tokens=1)
    assert first and end == "length"
    ids = [i for i in range(len(tokenizer)) if tokenizer.decode([i]) == first]
    for ends in ([tokenizer.eos_token_id, *ids], ids[-1]):
        with monkeypatch.context() as patch:
            patch.setattr(model.generation_config, "eos_token_id", ends)
            assert answers(record, processor, model) == ("", "stop")
    monkeypatch.setattr(data, "BANNED", tokenizer.convert_ids_to_tokens(ids))
    assert not answers(record, processor, model)[0].startswith(first)


def test_what_the_template_opens_is_shown(processor, model, questions, monkeypatch):
    """A Thinking checkpoint, whose template writes <think>: its thought is taken for the answer."""
    template = processor.tokenizer.chat_template
    opens = template.replace("assistant\n", "assistant\n<think>\n")
    monkeypatch.setattr(processor.tokenizer, "chat_template", opens)
    assert answers(questions[0], processor, model)[0].startswith("<think>\n")


def test_one_json_object(toy, questions, processor, model, tmp_path):
    """A word on stdout that is not JSON, exit code 0 for an answer that says nothing, other pixels
    than in evaluation, bfloat16 on a CPU."""
    path, words = questions[-1]["media"][0]["path"], "Before <video> and after?"
    settings = "--max-response-tokens", 24, "--image-min-pixels", 4096
    settings += "--json", "--save", tmp_path / "new" / "o.png"
    command = "--model", toy / "model", "--video", path, "--task", "OCR", words, *settings
    result = run("infer.py", *command, check=False)
    line = json.loads(result.stdout)
    said, end = answers(questions[-1], processor, model)
    assert (line["response"], line["finished"]) == (said, end == "stop")
    assert result.returncode == (0 if line["readable"] else 1) and line["task"] == "OCR"
    with Image.open(tmp_path / "new" / "o.png") as drawn:
        assert drawn.width > 2 * drawn.height  # a strip


@pytest.fixture(scope="module")
def server(toy):
    """vLLM's OpenAI server with the toy model -> base URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = (
        f"tests/serve.py --model {toy}/model --served-model-name toy --dtype float32 --port {port}"
    )
    words += " --max-model-len 1024 --enforce-eager --host 127.0.0.1"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    command = [sys.executable, *words.split()]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    try:
        for _ in range(240):
            assert process.poll() is None, process.stdout.read()[-4000:]
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


def test_a_server_reads_the_same_prompt(server, processor, model, questions):
    """Times lost on the way (a video of 7 s read as 4 frames at 1 fps), frames blurred by JPEG, text
    in another order."""
    for record in questions:
        request = infer.request_of(record, "toy", LIMITS, 24, data.PROMPTS)
        at_once = request | dict(stream=False, return_token_ids=True)
        reply = json.loads(b"".join(infer.ask_server(f"{server}/chat/completions", at_once)))
        prompt = data.encode(record, processor, LIMITS)
        assert reply["prompt_token_ids"] == prompt.token_ids, record["problem"]

        pieces = list(infer.stream_server(request, server))
        said, end = answers(record, processor, model)
        assert "".join(piece for piece, _ in pieces).rstrip("\ufffd") == said.rstrip("\ufffd")
        assert pieces[-1][1] == end


def test_the_prompt_goes_on_after_a_mistake(server, questions, tmp_path):
    """A wrong path that ends a session with a large model; an answer that is not drawn."""
    media = {m["type"]: m["path"] for record in questions for m in record["media"]}
    typed = f"""what?\n/image none.png\nwhat?\n/image {media["image"]}
        /task spotting\n/task OCR\nWhat is here?\n/dance\n/task multiple choice\nWhat?
        Which? | a | b\n"""
    words = f"infer.py --base-url {server} --max-response-tokens 16 --save {tmp_path}/new/o.png"
    pipes = dict(input=typed, capture_output=True, text=True, timeout=120)
    command = [sys.executable, *words.split(), "--image-min-pixels", "4096"]
    result = subprocess.run(command, cwd=ROOT, check=False, **pipes)
    assert result.returncode == 0, result.stderr[-2000:]
    for sentence in (
        "--image or --video is needed",
        "no file " + str(ROOT / "none.png"),
        "--options are needed",
        "no such task or command: /task spotting",
        "no such task or command: /dance",
    ):
        assert sentence in result.stdout
    assert result.stdout.count("answer: ") == 2 and (tmp_path / "new" / "o.png").exists()


class Canned(http.server.BaseHTTPRequestHandler):
    """A server that streams one text, and can be interrupted by Ctrl-C or end with an error."""

    def do_GET(self):
        self.reply(dict(data=[dict(id="canned")]))

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.headers["Authorization"], request))
        if self.server.refusal:
            return self.reply(self.server.refusal, 400)
        self.reply()
        self.event(self.server.text, None)
        if self.server.interrupt.pop("now", False):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)
        elif self.server.error:
            self.wfile.write(b"data: " + json.dumps(dict(error="out of memory")).encode() + b"\n\n")
        else:
            self.event("", "stop")

    def event(self, text, reason):
        choice = dict(delta=dict(content=text), finish_reason=reason)
        self.wfile.write(b"data: " + json.dumps(dict(choices=[choice])).encode() + b"\n\n")

    def reply(self, body=None, status=200):
        self.send_response(status)
        self.end_headers()
        if body:
            self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def canned():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Canned)
    server.text, server.error, server.refusal = "", None, None
    server.requests, server.interrupt = [], {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def ask(tmp_path, monkeypatch, canned):
    """A function that runs infer.py here with these words on an image of noise."""
    Image.fromarray(noise(256, 256, 3)).save(tmp_path / "a.png")
    url = f"--base-url http://127.0.0.1:{canned.server_port}/v1 --image {tmp_path}/a.png"

    def ask(*words):
        monkeypatch.setattr(sys, "argv", ["infer.py", *url.split(), *words])
        return infer.main()

    return ask


def test_exit_codes_and_the_request(ask, canned, tmp_path, monkeypatch, capsys):
    """A script that calls this one cannot tell an answer from none; pixels that lose on the way."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    words = "where?", "--task", "spatial grounding", "--save", f"{tmp_path}/o.png"
    canned.text = 'I look.</think><answer>{"boxes": [250, 250, 750, 750]}</answer>'
    assert ask(*words) == 0
    said = '\nanswer: {"boxes": [250, 250, 750, 750]}\n'
    assert capsys.readouterr().out == canned.text + said
    ((key, request),) = canned.requests
    assert key == "Bearer secret" and request["model"] == "canned" and request["temperature"] == 0
    sent = request["messages"][0]["content"][1]["image_url"]["url"]
    with Image.open(io.BytesIO(urllib.request.urlopen(sent).read())) as image:
        assert (np.asarray(image) == noise(256, 256, 3)).all()
    with Image.open(tmp_path / "o.png") as drawn:
        assert outline(drawn) == (64, 64, 192, 192)
    canned.text = "Hm.</think><answer>in the middle</answer>"
    assert ask(*words) == 1
    assert "this answer cannot be read for the task 'spatial grounding'" in capsys.readouterr().err


def test_a_server_that_fails(ask, canned, tmp_path):
    """A failure taken for an answer, a refusal without its reason, a wait for ever."""
    canned.text, canned.error = "in the", True
    with pytest.raises(OSError, match="out of memory"):
        ask("where?")
    canned.refusal = dict(error=dict(message="max_tokens=8192 is more than 1024"))
    with pytest.raises(OSError, match="HTTP Error 400.*max_tokens=8192 is more"):
        ask("where?")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1/models"
        start = time.monotonic()
        with pytest.raises(OSError, match="timed out"):
            list(infer.ask_server(url, silence=0.2))
        assert time.monotonic() - start < 5


def test_ctrl_c_stops_an_answer_and_keeps_the_model(ask, canned, monkeypatch, capsys):
    """Ctrl-C during an answer ends the session in a traceback, and the model is loaded once more."""
    typed = iter(["one?", "two?"])

    def type_next(_):
        with contextlib.suppress(StopIteration):
            return next(typed)
        raise EOFError

    monkeypatch.setattr("builtins.input", type_next)
    canned.text, canned.interrupt["now"] = "Hm.</think><answer>A dog.</answer>", True
    assert not ask()
    assert len(canned.requests) == 2
    assert capsys.readouterr().out.endswith("</answer>\nanswer: A dog.\n\n")


def test_a_refusal_is_one_sentence_and_exit_code_2():
    """A script that calls this one takes a wrong request for an answer, or gets a traceback."""
    result = run("infer.py", "--model", "none", "--image", "none.png", "hi", check=False)
    sentence = "infer.py: none: no folder of a model, and no hub id of the form owner/name\n"
    assert (result.returncode, result.stderr) == (2, sentence)
