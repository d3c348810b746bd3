"""infer.py: what an answer says, where it is drawn, and that every way of asking puts the same question."""

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
from types import SimpleNamespace

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

ORANGE, WHITE = (255, 165, 0), (255, 255, 255)
POINTS = '"positive_points": [[200, 300], [300, 400], [400, 600]], "negative_points": [[90, 240], [500, 260], [300, 750]]'
BOX = [120, 250, 480, 700]

# ----------------------------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize(
    "task, kind, said, good, marks",
    [
        ("multiple choice", "image", "B. a man", True, Marks()),
        ("multiple choice", "image", "A or B", False, Marks()),
        ("numerical", "image", "1,234", True, Marks()),
        ("numerical", "image", "a dozen", False, Marks()),
        ("math", "image", "\\frac{\\sqrt{2}}{2}", True, Marks()),
        ("regression", "video", "about a third", False, Marks()),
        ("OCR", "image", "NO PARKING", True, Marks()),
        ("open-ended", "video", '{"boxes": [1, 2, 3, 4]}', True, Marks()),
        ("temporal grounding", "video", '{"time": [12.3, 25.7]}', True, Marks(span=(12.3, 25.7))),
        ("temporal grounding", "video", "from 12.3 to 25.7 s", False, Marks()),
        ("spatial grounding", "image", '```json\n{"boxes": [120, 250, 480, 700]}\n```', True, Marks(boxes={None: BOX})),
        ("spatial grounding", "image", '{"boxes": [120, 250, 480]}', False, Marks()),
        ("spatial grounding", "image", '{"boxes": [120, 250, 480, NaN]}', False, Marks()),
        ("spatial-temporal grounding", "video", '{"time": [3.0, 4.6], "boxes": {"3": [120, 250, 480, 700], "4": [130, 250, 490, 700]}}',
         True, Marks(span=(3.0, 4.6), boxes={3.0: BOX, 4.0: [130, 250, 490, 700]})),
        ("tracking", "video", '{"boxes": {"1": [120, 250, 480, 700], "3": [130, 250, 490, 700], "0": [1, 1, 2, 2], "x": [1, 1, 2, 2]}}',
         True, Marks(boxes={0.0: BOX, 2.0: [130, 250, 490, 700]})),
        ("tracking", "video", '{"boxes": {"1": [120, 250, 480, 700], "2": "gone"}}', False, Marks(boxes={0.0: BOX})),
        ("segmentation", "image", '{"boxes": [120, 250, 480, 700], %s}' % POINTS, True,
         Marks(boxes={None: BOX}, positive=[[200, 300], [300, 400], [400, 600]], negative=[[90, 240], [500, 260], [300, 750]])),
        ("segmentation", "video", '{"time": 4.0, "boxes": [120, 250, 480, 700], %s}' % POINTS, True,
         Marks(None, {4.0: BOX}, [[200, 300], [300, 400], [400, 600]], [[90, 240], [500, 260], [300, 750]], 4.0)),
        ("segmentation", "video", '{"boxes": [120, 250, 480, 700], %s}' % POINTS, False, Marks()),
    ],
)  # fmt: skip
def test_answers_of_all_tasks_are_read(task, kind, said, good, marks, capsys):
    """An answer that cannot be read passes as one that can; a key is taken for the wrong second; a malformed part is drawn."""
    record = dict(
        problem_id="0", problem_type=task, data_type=kind, options=["A. a dog", "B. a man"]
    )
    text = f"<think>I look at it.</think>\n<answer>{said}</answer>"
    pieces = [(text[i : i + 5], None) for i in range(0, len(text), 5)] + [("", "stop")]
    answer, readable = infer.follow(record, pieces, SimpleNamespace(json=False))
    assert readable is good
    assert data.marks_of(data.task_of(record), answer) == marks
    printed = capsys.readouterr()
    assert printed.out == f"thinking: I look at it.\nanswer: {answer}\n"
    assert ("cannot be read" in printed.err) is not good


@pytest.mark.parametrize(
    "text, thinking, answer",
    [
        ("<think>a < b </ c</think><answer>B</answer>", "a < b </ c", "B"),
        ("no tags, it is B", "", "no tags, it is B"),
        ("<think>cut off in the middle of </thi", "cut off in the middle of </thi", None),
        ("thought without a first tag</think><answer>B", "thought without a first tag", "B"),
    ],
)
def test_thinking_is_printed_as_it_comes_and_once(text, thinking, answer, capsys):
    """Half a tag on the screen, words printed twice or not at all, and a "stream" that appears all at once at its end."""
    record, printed = dict(problem_id="7", problem_type="OCR", data_type="image"), []

    def pieces():
        for i, letter in enumerate(text):
            yield letter, "length" if i == len(text) - 1 else None
            printed.append(capsys.readouterr().out)

    infer.follow(record, pieces(), SimpleNamespace(json=False, max_response_tokens=99))
    printed.append(capsys.readouterr().out)
    start = f"thinking: {thinking}\n" if thinking else ""
    assert "".join(printed) == f"{start}answer: {answer or ''}\n"
    if "<think>" in text:
        assert sum(bool(part) for part in printed) > 10
    infer.follow(record, pieces(), SimpleNamespace(json=True, max_response_tokens=99))
    line = dict(
        problem_id="7",
        task="OCR",
        thinking=thinking,
        answer=answer,
        readable=bool(answer),
        finished=False,
    )
    assert json.loads(capsys.readouterr().out or printed[-1]) == line


# ----------------------------------------------------------------------------------------------------------------------
# Drawing


def outline(pixels, colour=ORANGE, tolerance=0):
    """x1, y1, x2, y2 (exclusive) of all pixels of about this colour."""
    ys, xs = np.nonzero((np.abs(np.asarray(pixels, dtype=int) - colour) <= tolerance).all(-1))
    return (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(xs) else None


def test_a_box_covers_its_pixels():
    """Width and height exchanged, x2 one pixel too far, a reversed box that ends the script, one drawn off the picture."""
    white = Image.new("RGB", (400, 300), "white")
    pixels = np.asarray(data.draw(white, Marks(boxes={None: [100, 200, 500, 800]})))
    assert outline(pixels) == (40, 60, 200, 240)
    assert (pixels[60:62, 40:200] == ORANGE).all() and (pixels[60:240, 198:200] == ORANGE).all()
    assert (pixels[62:238, 42:198] == WHITE).all()
    assert outline(data.draw(white, Marks(boxes={None: [500, 800, 100, 200]}))) == (
        40,
        60,
        200,
        240,
    )
    assert outline(data.draw(white, Marks(boxes={None: [-5, 500, 2000, 1e9]}))) == (
        0,
        150,
        400,
        300,
    )
    assert np.asarray(white).min() == 255, "the picture itself was drawn on"


def test_points_and_masks():
    """Points at (y, x), negative ones that look like positive ones, a mask stretched over a picture in the wrong shape."""
    white = Image.new("RGB", (400, 300), "white")
    disc = np.asarray(data.draw(white, Marks(positive=[[250, 500]])))
    cross = np.asarray(data.draw(white, Marks(negative=[[250, 500]])))
    assert (disc[150, 100] == ORANGE).all() and (cross[150, 100] == ORANGE).all()
    assert (disc[152, 100] == ORANGE).all() and (cross[152, 100] != ORANGE).any()
    mask = np.zeros((30, 40), bool)
    mask[:10, 20:] = True  # at a tenth of the size
    assert outline(data.draw(white, Marks(), mask=mask), (255, 210, 127), 1) == (200, 0, 400, 100)


def test_boxes_between_seconds():
    """Boxes that jump from second to second, that stay for ever, or that appear before they are named."""
    marks = Marks(boxes={2.0: [0, 0, 500, 500], 3.0: [500, 0, 1000, 500]})
    grey = Image.new("RGB", (400, 300), "grey")
    places = {
        second: outline(data.draw(grey, marks, second)) for second in (1.9, 2.0, 2.5, 3.9, 4.0)
    }
    assert places == {
        1.9: None,
        2.0: (0, 0, 200, 150),
        2.5: (100, 0, 300, 150),
        3.9: (200, 0, 400, 150),
        4.0: None,
    }
    prompt = Marks(boxes={2.0: [0, 0, 500, 500]}, positive=[[900, 900]], time=2.0)
    assert [
        outline(data.draw(grey, prompt, second)) is not None for second in (1.9, 2.0, 2.9, 3.0)
    ] == [0, 1, 1, 0]


def save(path, medium, kind, task, answer, sam2=None, **more):
    record = dict(
        problem_type=task, data_type=kind, media=[dict(type=kind, path=str(medium))], **more
    )
    infer.save_drawing(str(path), record, answer, data.Limits(), sam2)


def test_a_rotated_photograph_is_drawn_upright(tmp_path):
    """A phone's picture, stored lying: the model sees it upright, and a box drawn on the stored pixels is elsewhere."""
    upright = Image.new("RGB", (300, 401), "white")
    upright.paste((0, 0, 255), (30, 200, 150, 401))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.png", exif=exif)
    save(
        tmp_path / "out.png",
        tmp_path / "phone.png",
        "image",
        "spatial grounding",
        '{"boxes": [100, 499, 500, 1000]}',
    )
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.size == (300, 402)  # one row more, for an even height
        assert outline(drawn) == (30, 200, 150, 401)
        assert outline(drawn, (0, 0, 255)) == (
            32,
            202,
            148,
            399,
        )  # the object, less the frame around it


def test_text_answers_stand_under_a_tiny_picture(tmp_path):
    """An answer without marks that leaves no trace, or covers the picture; a caption that a thumbnail has no room for."""
    Image.new("RGB", (48, 96), "blue").save(tmp_path / "tiny.png")
    save(tmp_path / "out.png", tmp_path / "tiny.png", "image", "OCR", "TWO WORDS")
    with Image.open(tmp_path / "out.png") as drawn:
        pixels = np.asarray(drawn.convert("RGB"))
    assert outline(pixels, (0, 0, 255)) == (0, 0, 144, 288)  # three times as large
    assert len(pixels) > 300 and outline(pixels[288:], (0, 0, 0), 60) is not None
    save(tmp_path / "unread.png", tmp_path / "tiny.png", "image", "spatial grounding", "[1, 2")
    with Image.open(tmp_path / "unread.png") as drawn:
        assert drawn.height > 300


def turned(path, out):
    """A copy of an MP4 whose header says: show it turned by 90 degrees clockwise (the matrix in its tkhd box)."""
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 40
    content[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    out.write_bytes(content)


def frames_of(path):
    with av.open(str(path)) as container:
        tick = container.streams.video[0].time_base
        return [
            (float(frame.pts * tick), frame.to_ndarray(format="rgb24"))
            for frame in container.decode(video=0)
        ]


TIMES = [0, 40, 500, 1000, 1040, 2500, 3000, 3960]  # ms


@pytest.mark.parametrize("rotated", [False, True])
def test_a_film_is_drawn_on_every_frame_at_its_own_time(tmp_path, rotated):
    """Frames dropped or evened out, odd sizes refused by the encoder, a phone's film on its side, boxes at other seconds."""
    write_video(tmp_path / "film.mp4", 258, 386, TIMES)
    medium = tmp_path / "film.mp4"
    if rotated:
        turned(medium, tmp_path / "turned.mp4")
        medium = tmp_path / "turned.mp4"
    width, height = (386, 258) if rotated else (258, 386)
    answer = '{"time": [1, 3], "boxes": {"1": [0, 0, 500, 500], "2": [500, 0, 1000, 500], "3": [500, 500, 1000, 1000]}}'
    save(tmp_path / "out.mp4", medium, "video", "spatial-temporal grounding", answer)
    frames = frames_of(tmp_path / "out.mp4")
    assert [second for second, _ in frames] == pytest.approx([ms / 1000 for ms in TIMES], abs=1e-4)
    for (second, pixels), level in zip(frames, range(0, 64, 8)):
        assert pixels.shape[0] >= height + 18 and pixels.shape[1] == width
        picture = pixels[:height]
        corners = {
            1.0: (0, 0),
            1.04: (0.02, 0),
            2.5: (0.5, 0.25),
            3.0: (0.5, 0.5),
            3.96: (0.5, 0.5),
        }
        corner = corners.get(round(second, 2))
        colour = (
            ORANGE if 1 <= second < 3 else tuple((np.full(3, 0.299 * 255 + 0.587 * 165) + 128) / 2)
        )  # faded
        found = outline(picture, colour, 70 if corner and 1 <= second < 3 else 25)
        if corner is None:
            assert found is None and picture.std() < 4
        else:
            x, y = corner[0] * width, corner[1] * height
            assert found == pytest.approx((x, y, x + width / 2, y + height / 2), abs=2.1), second
        inside = 1 <= second < 3
        assert np.median(picture) == pytest.approx(level if inside else (level + 128) / 2, abs=4)


def test_a_film_is_turned_the_way_the_model_sees_it(tmp_path):
    """A phone's film drawn upside down: its stored top left corner is shown at the top right."""
    pixels = np.full((200, 300, 3), 128, np.uint8)
    pixels[:100, :150] = (0, 0, 255)
    with av.open(str(tmp_path / "film.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt = 300, 200, "yuv420p"
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    turned(tmp_path / "film.mp4", tmp_path / "turned.mp4")
    length, pictures = infer.film(str(tmp_path / "turned.mp4"), None)
    shown = [picture for _, picture in pictures]
    assert length == pytest.approx(1) and len(shown) == 4 and shown[0].size == (200, 300)
    seen = Image.fromarray(data.read_video(tmp_path / "turned.mp4").frames[0]).resize((200, 300))
    assert outline(shown[0], (0, 0, 255), 60) == pytest.approx((100, 0, 200, 150), abs=2)
    assert outline(seen, (0, 0, 255), 60) == pytest.approx((100, 0, 200, 150), abs=4)


def test_a_gif_keeps_time(tmp_path):
    """A GIF that plays all frames at one speed, or loses the ones that look alike."""
    write_video(tmp_path / "film.mp4", 300, 200, TIMES)
    save(
        tmp_path / "out.gif",
        tmp_path / "film.mp4",
        "video",
        "tracking",
        '{"boxes": {"1": [0, 0, 500, 500]}}',
    )
    with Image.open(tmp_path / "out.gif") as gif:
        durations = []
        for i in range(gif.n_frames):
            gif.seek(i)
            durations.append(gif.info["duration"])
            assert (outline(gif.convert("RGB").crop((0, 0, 300, 200)), ORANGE, 8) is not None) == (
                TIMES[i] < 1000
            )
    assert durations == [
        40,
        460,
        500,
        40,
        1460,
        500,
        960,
        pytest.approx(566, abs=6),
    ]  # the last: a mean frame


def test_the_film_strip(tmp_path):
    """A strip of other seconds than it says, a bar that is off, the frame of a segmentation's prompt left out."""
    frames = np.stack([np.full((60, 90, 3), 5 * i, np.uint8) for i in range(21)])
    seconds = [i / 2 for i in range(21)]  # 0 to 10
    truth = Marks(span=(5.0, 10.5))
    answer = Marks(boxes={4.5: [0, 0, 1000, 1000]}, time=4.5)
    strip = data.draw_strip(frames, seconds, {"orange": answer, "lime": truth})
    cells = [np.asarray(strip)[60, 80 + 162 * i, 0] // 5 / 2 for i in range(8)]
    assert cells == [0, 1, 3, 4.5, 5, 6, 8, 10]
    boxed = [
        outline(strip.crop((162 * i, 0, 162 * i + 160, 120)), ORANGE, 0) is not None
        for i in range(8)
    ]
    assert boxed == [0, 0, 0, 1, 1, 0, 0, 0]
    end = 7 * 162 + 162 * 0.5 / (10 / 7)  # the last frame stands 10/7 s
    assert outline(strip, (0, 255, 0))[::2] == (4 * 162, round(end))


def test_folders_of_frames(tmp_path):
    """Frames in the order 1, 10, 2, and a folder that plays at another speed than the model was told."""
    (tmp_path / "frames").mkdir()
    for i in range(12):
        Image.new("RGB", (300, 200), (10 * i,) * 3).save(tmp_path / "frames" / f"{i}.png")
    save(
        tmp_path / "out.mp4",
        tmp_path / "frames",
        "video",
        "tracking",
        '{"boxes": {"1": [0, 0, 1, 1]}}',
        fps=4,
    )
    frames = frames_of(tmp_path / "out.mp4")
    assert [second for second, _ in frames] == pytest.approx([i / 4 for i in range(12)], abs=1e-4)
    assert [np.median(pixels[50:150]) for _, pixels in frames] == pytest.approx(
        [10 * i for i in range(12)], abs=2
    )


# ----------------------------------------------------------------------------------------------------------------------
# SAM2


@pytest.fixture(scope="module")
def sam2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sam2")
    tiny_sam2(folder)
    return folder, infer.load_sam2(folder, "cpu")


PROMPT = Marks(
    None,
    {None: [100, 100, 600, 700]},
    [[300, 300], [400, 300], [300, 400]],
    [[900, 900], [50, 900], [900, 50]],
)


def noise(*shape):
    return np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)


def test_sam2_is_prompted_with_box_and_points(sam2):
    """A box that is left out where there are points, points in the wrong picture's pixels, a batch that changes its items."""
    model, _, processor, _ = sam2[1]
    picture, other = Image.fromarray(noise(50, 70, 3)), Image.fromarray(noise(90, 40, 3))
    inputs = processor(
        images=[picture], input_boxes=[[[7, 5, 42, 35]]], input_labels=[[[1, 1, 1, 0, 0, 0]]], return_tensors="pt",
        input_points=[[[[x * 0.07, y * 0.05] for x, y in PROMPT.positive + PROMPT.negative]]],
    )  # fmt: skip
    with torch.no_grad():
        logits = model(**inputs, multimask_output=False).pred_masks
    expected = processor.post_process_masks(logits, inputs["original_sizes"])[0][0, 0].numpy()
    only_box = PROMPT._replace(positive=[], negative=[])
    items = [(picture, PROMPT), (other, PROMPT), (picture, Marks()), (picture, only_box)]
    masks = infer.segment_images(sam2[1], items)
    assert [mask.shape for mask in masks] == [(50, 70), (90, 40), (50, 70), (50, 70)] and masks[
        0
    ].dtype == bool
    assert (masks[0] == expected).all() and 0.05 < expected.mean() < 0.95
    assert not masks[2].any() and (masks[3] != masks[0]).mean() > 0.01
    for item, mask in zip(items, masks):
        assert (infer.segment_images(sam2[1], [item])[0] == mask).all()


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
    """--sam2 given and nothing of it to be seen; a video's masks at other seconds than their frames."""
    Image.fromarray(noise(300, 400, 3)).save(tmp_path / "picture.png")
    write_video(tmp_path / "film.mp4", 300, 200, range(0, 4000, 250))
    answer = '{"time": 1.0, "boxes": [120, 250, 480, 700], %s}' % POINTS
    for name, medium, kind in (
        ("image.png", "picture.png", "image"),
        ("film.mp4", "film.mp4", "video"),
    ):
        save(tmp_path / f"plain_{name}", tmp_path / medium, kind, "segmentation", answer)
        save(tmp_path / f"masked_{name}", tmp_path / medium, kind, "segmentation", answer, sam2[1])
    plain, masked = (
        np.asarray(Image.open(tmp_path / f"{name}_image.png")) for name in ("plain", "masked")
    )
    marks = data.marks_of("segmentation-image", answer)
    with Image.open(tmp_path / "picture.png") as picture:
        mask = infer.segment_images(sam2[1], [(picture, marks)])[0]
    assert ((plain != masked).any(-1) <= mask).all() and (plain != masked).any(
        -1
    ).sum() > 0.8 * mask.sum() > 0
    video = data.read_video(tmp_path / "film.mp4")
    masks = infer.segment_video(
        sam2[1], video.frames, 2, data.marks_of("segmentation-video", answer)
    )
    shares = [
        masks[data.nearest([i / video.fps for i in video.indices], i / 4)].mean() for i in range(16)
    ]
    both = zip(
        frames_of(tmp_path / "plain_film.mp4"), frames_of(tmp_path / "masked_film.mp4"), strict=True
    )
    tinted = [(np.abs(a.astype(int) - b)[:200].max(-1) > 40).mean() for (_, a), (_, b) in both]
    assert tinted == pytest.approx(shares, abs=0.05)


# ----------------------------------------------------------------------------------------------------------------------
# Asking


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--image none.png --task OCR read", "--image: no file none.png"),
        ("--image a.png --task tracking follow", "--task 'tracking' does not go with --image"),
        ("--image a.png --task dancing dance", "argument --task: invalid choice: 'dancing' (choose from"),
        ("--image a.png --task OCR read --save out.mp4", "--save: 'out.mp4' with --image: expected a name that ends with .png"),
        ("--image a.png which --options one two", "--options are needed for a multiple choice, and only there"),
        ("--image torn.png what", "torn.png: cannot identify image file"),
        ("what", "--image or --video is needed"),
        ("--image a.png what<image>is<image>this", "expected 1 <image> placeholders"),
        ("--questions torn.jsonl", "torn.jsonl: line 1: not JSON"),
        ("--questions bad.jsonl", "bad.jsonl: record 1: problem_type is 'sums'"),
        ("--questions bare.jsonl", "bare.jsonl: record 0: no images and no videos"),
        ("--image a.png what --sam2 none", "--sam2 none: no such folder, and no hub id of the form owner/name"),
    ],
)  # fmt: skip
def test_wrong_requests_are_refused_at_once(toy, tmp_path, monkeypatch, capsys, words, sentence):
    """A model of 8B is loaded first, and then a typing error ends it in a traceback."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save("a.png")
    (tmp_path / "torn.png").write_text("no picture")
    (tmp_path / "torn.jsonl").write_text('{"problem": ')
    good = '{"problem": "?", "problem_type": "OCR", "images": "a.png"}\n'
    (tmp_path / "bad.jsonl").write_text(
        good + '{"problem": "?", "problem_type": "sums", "images": "a.png"}\n'
    )
    (tmp_path / "bare.jsonl").write_text('{"problem": "?", "problem_type": "OCR"}\n')
    monkeypatch.setattr(sys, "argv", ["infer.py", "--model", str(toy / "model"), *words.split()])
    with pytest.raises(SystemExit) as end:
        infer.main()
    said = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and said[-1].startswith("infer.py: ") and sentence in said[-1], said


@pytest.fixture(scope="module")
def questions(toy):
    """One held-out question of each task, in JSONL, and a film with a variable frame rate. -> file, records"""
    lines = []
    for path in sorted((toy / "eval").glob("*.json")):
        raw = json.loads(path.read_text())[0]
        kept = ("problem_id", "problem", "problem_type", "options", "data_type", "path")
        lines.append({key: raw[key] for key in kept})
    write_video(
        toy / "eval" / "media" / "variable.mp4", 130, 50, [0, 40, 80, 1000, 1040, 3000, 3100, 7000]
    )
    lines.append(
        dict(problem="Before <video> and after?", problem_type="OCR", videos=["media/variable.mp4"])
    )
    path = toy / "eval" / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path, infer.read_questions(path)


LIMITS = data.Limits(image_max_pixels=1024 * 1024, frame_max_pixels=256 * 1024)


@pytest.fixture(scope="module")
def by_vllm(toy, questions, tmp_path_factory):
    """All questions through the script with vLLM: the result, its lines, and the folder of drawings."""
    out = tmp_path_factory.mktemp("drawings") / "new"
    result = run(
        "infer.py", "--model", toy / "model", "--questions", questions[0], "--json", "--save", out, "--dtype", "float32",
        "--max-response-tokens", 24, check=False,
    )  # fmt: skip
    return result, [json.loads(line) for line in result.stdout.splitlines()], out


def test_questions_in_json_lines(by_vllm, questions):
    """A word on stdout that is not JSON, an exit code of 0 for answers that say nothing, drawings of the wrong question."""
    result, lines, out = by_vllm
    assert [line["problem_id"] for line in lines] == [
        record["problem_id"] for record in questions[1]
    ]
    assert [line["task"] for line in lines] == [data.task_of(record) for record in questions[1]]
    assert not lines[1]["readable"] and result.returncode == 1, result.stderr[
        -2000:
    ]  # random weights say nothing
    assert sorted(os.listdir(out)) == sorted(f"{i}.png" for i in range(len(lines)))
    for i, record in enumerate(questions[1]):
        with Image.open(out / f"{i}.png") as drawn:
            assert (drawn.width > 2 * drawn.height) == (record["data_type"] == "video")


def whole(text):
    """The answer in a text, without the half letter at a cut, which vLLM keeps back and transformers shows as \ufffd."""
    return (infer.rewards.find_answer(text or "") or "").rstrip("\ufffd")


def test_transformers_answers_as_vllm_does(toy, processor, questions, by_vllm):
    """Two back ends, two prompts: other pixels, time stamps or stop tokens. Random weights in float32 tell them apart."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(toy / "model", dtype="float32").eval()
    for record, line in zip(questions[1], by_vllm[1]):
        prompt = data.encode(record, processor, LIMITS)
        pieces = list(infer.stream_transformers(prompt, model, processor, 24))
        assert whole("".join(piece for piece, _ in pieces)) == whole(line["answer"])
        assert (pieces[-1][1] == "stop") == line["finished"] and not any(
            reason for _, reason in pieces[:-1]
        )


@pytest.fixture(scope="module")
def server(toy):
    """vLLM's OpenAI server with the toy model -> base URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "tests/serve.py", "--model", str(toy / "model"), "--served-model-name", "toy", "--dtype", "float32",
         "--max-model-len", "1024", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port), "--trust-request-mm-kwargs"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        for _ in range(240):
            assert process.poll() is None, process.stdout.read()[-4000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


def test_a_server_reads_the_same_prompt(server, processor, questions, by_vllm):
    """Times lost on the way (a video of 7 s read as 4 frames at 1 fps), frames blurred by JPEG, text in another order."""
    for record, line in zip(questions[1], by_vllm[1]):
        request = infer.request_of(record, "toy", LIMITS, data.PROMPTS, 24)
        at_once = request | dict(stream=False, return_token_ids=True)
        reply = json.load(infer.ask_server(f"{server}/chat/completions", at_once))
        assert reply["prompt_token_ids"] == data.encode(record, processor, LIMITS).token_ids, (
            record["problem"]
        )
        pieces = list(infer.stream_server(request, server))
        assert len(pieces) > 1  # a busy server joins some
        text = "".join(piece for piece, _ in pieces)
        assert whole(text) == whole(line["answer"])


def test_the_prompt_goes_on_after_a_mistake(server, questions, tmp_path):
    """A wrong path that ends a session in which a large model has been loaded; an answer that is not drawn."""
    picture = next(
        m["path"] for record in questions[1] for m in record["media"] if m["type"] == "image"
    )
    typed = ["what?", "/image none.png", f"/image {picture}", "/task spotting", "/task OCR", "What is here?", "/dance",
             "/task multiple choice", "What?", "Which? | a | b"]  # fmt: skip
    result = subprocess.run(
        [sys.executable, "infer.py", "--base-url", server, "--max-response-tokens", "16", "--save", f"{tmp_path}/new/o.png"],
        cwd=ROOT, timeout=120, input="\n".join(typed) + "\n", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    for sentence in ("--image or --video is needed", "--options are needed", "no such file, task or command: /image none.png",
                     "command: /task spotting", "command: /dance"):  # fmt: skip
        assert sentence in result.stdout
    assert result.stdout.count("answer: ") == 2 and (tmp_path / "new" / "o.png").exists()


class Canned(http.server.BaseHTTPRequestHandler):
    """A server that streams one answer, or breaks off with an error."""

    def do_GET(self):
        self.reply(json.dumps(dict(data=[dict(id="canned")])).encode())

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.headers["Authorization"], request))
        delta = lambda text, reason: dict(
            choices=[dict(delta=dict(content=text), finish_reason=reason)]
        )
        events = [delta(self.server.text, None), self.server.last or delta(None, "stop")]
        self.reply(
            b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
            + b"data: [DONE]\n\n"
        )

    def reply(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    "said, last, code, sentence",
    [
        ('{"boxes": [250, 250, 750, 750]}', None, 0, ""),
        ("in the middle", None, 1, "this answer cannot be read for the task 'spatial grounding'"),
        ("in the", {"error": {"message": "out of memory"}}, 2, "out of memory"),
    ],
)
def test_exit_codes(tmp_path, monkeypatch, capsys, said, last, code, sentence):
    """A script that calls this one cannot tell an answer from none, or takes a server's failure for an answer."""
    canned = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Canned)
    canned.text, canned.last, canned.requests = (
        f"<think>Where?</think><answer>{said}</answer>",
        last,
        [],
    )
    threading.Thread(target=canned.serve_forever, daemon=True).start()
    pixels = noise(64, 64, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    url = f"http://127.0.0.1:{canned.server_port}/v1"
    words = (
        f"--base-url {url} --image {tmp_path}/a.png where? --save {tmp_path}/o.png --task".split()
    )
    monkeypatch.setattr(sys, "argv", ["infer.py", *words, "spatial grounding"])
    try:
        with pytest.raises(SystemExit) as end:
            infer.main()
    finally:
        canned.shutdown()
        canned.server_close()
    printed = capsys.readouterr()
    assert end.value.code == code and sentence in printed.err, printed
    ((key, request),) = canned.requests
    assert key == "Bearer secret" and request["model"] == "canned" and request["temperature"] == 0
    sent = request["messages"][0]["content"][0]["image_url"]["url"]
    with Image.open(io.BytesIO(urllib.request.urlopen(sent).read())) as picture:
        assert (np.asarray(picture) == pixels).all()  # no loss on the way
    assert (tmp_path / "o.png").exists() == (code < 2)
    if code == 0:
        with Image.open(tmp_path / "o.png") as drawn:
            assert outline(drawn) == (64, 64, 192, 192)
