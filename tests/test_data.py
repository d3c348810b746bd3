"""Records, pictures, videos and their order."""

import doctest
import itertools
import json
import os
import random
import re
import resource
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import av
import av.stream
import numpy as np
import pytest
from conftest import run
from PIL import Image

import data


def test_examples():
    """The docstrings show what the code no longer does."""
    result = doctest.testmod(data)
    assert result.attempted > 3 and result.failed == 0


def write_clock(path, count, gap_ms=lambda i: 100, key_every=10):
    """A video whose frame i shows its number as a grey level of 4 i, with gaps in milliseconds. Returns the times."""
    times = list(itertools.accumulate((gap_ms(i) for i in range(count - 1)), initial=0))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=1000, options={"g": str(key_every), "crf": "4", "bf": "2"}
        )
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(
                np.full((64, 64, 3), 4 * i, np.uint8), format="rgb24"
            )
            frame.pts = time
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return times


def shown(video):
    """The numbers on the frames."""
    return (video.frames.mean((1, 2, 3)) / 4).round().astype(int).tolist()


@pytest.mark.parametrize("fps", [0.5, 2, 100])
def test_video_frames_are_the_ones_that_are_named(tmp_path, fps):
    """Seeking to the wrong key frame, B-frames in decoding order, or a time stamp of another frame."""
    write_clock(tmp_path / "a.mp4", 60)
    video = data.read_video(str(tmp_path / "a.mp4"), fps=fps)
    count = max(4, min(int(6 * fps) // 2 * 2, 128))
    assert video.indices == np.linspace(0, 59, count).round().astype(int).tolist()
    assert shown(video) == video.indices
    assert video.fps == pytest.approx(10) and video.total == 60


def test_variable_frame_rate_keeps_true_times(tmp_path):
    """Time stamps from a mean frame rate: every second of such a video would be wrong."""
    times = write_clock(tmp_path / "a.mp4", 40, lambda i: 40 if i < 20 else 400)
    video = data.read_video(str(tmp_path / "a.mp4"), fps=2)
    assert video.fps == 1000
    assert video.indices == [times[i] for i in shown(video)]
    wanted = np.linspace(0, times[-1], len(video.indices))
    assert (
        np.abs(np.array(video.indices) - wanted).max() <= 200
    )  # the nearest frame, half a gap away at most


def test_folder_of_frames_and_rotated_pictures(tmp_path):
    """frame10 before frame2; a photograph that lies on its side."""
    for i in range(12):
        Image.fromarray(np.full((64, 64, 3), 4 * i, np.uint8)).save(tmp_path / f"frame{i}.png")
    video = data.read_video(str(tmp_path), folder_fps=2)
    assert shown(video) == video.indices == list(range(12))
    picture = Image.new("RGB", (64, 128), "red")
    exif = picture.getexif()
    exif[0x0112] = 6  # stored turned by 90 degrees
    picture.save(tmp_path / "side.jpg", exif=exif)
    assert data.read_image(str(tmp_path / "side.jpg")).shape == (64, 128, 3)


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("no.png", None, "missing_media"),
        ("text.jpg", b"not a picture", "unreadable_image"),
        ("empty.png", b"", "unreadable_image"),
        ("no.mp4", None, "missing_media"),
        ("text.mp4", b"not a film", "unreadable_video"),
    ],
)
def test_broken_media_are_skipped_with_their_reason(tmp_path, processor, name, content, reason):
    """A broken file that ends the run, or disappears without a count."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    kind = "image" if name.endswith(("png", "jpg")) else "video"
    record = dict(
        problem_type="OCR", problem="?", data_type=kind, answer="x", **{kind + "s": [name]}
    )
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    records = data.load_records(tmp_path / "a.jsonl")
    stream = data.prefetch(records, lambda record: data.encode(record, processor), [0], workers=0)
    tally = Counter()
    assert data.next_items(stream, 1, tally, max_bad_share=0.05) == []
    assert tally == {"records": 1, f"skipped/{reason}": 1}


def test_too_many_unusable_records_stop_the_run():
    """A wrong media folder that trains on nothing."""
    stream = iter([data.Skipped("missing_media", "no file")] * 300)
    with pytest.raises(RuntimeError, match="max-bad-share"):
        data.next_items(stream, 300, Counter(), 0.05)


def test_prompts_are_never_cut(toy, processor):
    """The release cuts long prompts from the right, through their vision tokens."""
    record = data.load_records(toy / "rl_train.json")[0]
    length = len(data.encode(record, processor).token_ids)
    with pytest.raises(data.MediaError, match=f"{length} prompt tokens, the limit is {length - 1}"):
        data.encode(record, processor, data.Limits(max_prompt_tokens=length - 1))


GOOD = dict(
    problem_type="OCR",
    problem="<image>?",
    data_type="image",
    images=["a.png"],
    answer="<answer>x</answer>",
)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(problem_type="poetry"),
            "record 1: problem_type is 'poetry', expected one of multiple choice",
        ),
        (dict(answer=None), "record 1: answer is 'None', expected the true answer"),
        (dict(problem_type="tracking", answer="left"), "record 1: answer is 'left', expected JSON"),
        (dict(problem="<image><image>?"), "expected 1 <image> placeholders"),
        (dict(images=["../../etc/passwd"]), "is outside the media folder"),
        (dict(problem=7), "record 1: problem is '7', expected a text"),
    ],
)
def test_malformed_records_are_named(tmp_path, change, message):
    """A KeyError from deep inside, or a record that is read as something else."""
    (tmp_path / "a.json").write_text(json.dumps([GOOD, {**GOOD, **change}]))
    with pytest.raises(ValueError, match=message) as error:
        data.load_records(tmp_path / "a.json")
    assert "a.json" in str(error.value)


def test_three_forms_become_one(tmp_path):
    """Ids as numbers, `solution` and `path` of the evaluation form, a missing placeholder, two media."""
    evaluation = dict(
        problem_id=7, problem="Where?", data_type="video-image", problem_type="OCR", solution="x"
    )
    evaluation |= dict(path="a.mp4", additional_path="b.png", fps=4)
    turns = [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "<think>.</think><answer>x</answer>"},
    ]
    (tmp_path / "a.json").write_text(
        json.dumps([GOOD, evaluation, dict(messages=turns, images="c.png")])
    )
    rl, both, sft = data.load_records(tmp_path / "a.json")
    assert rl["answer"] == "x" and rl["media"] == [
        {"type": "image", "path": str(tmp_path / "a.png")}
    ]
    assert (
        both["problem"] == "<image><video>Where?" and both["problem_id"] == "7" and both["fps"] == 4
    )
    assert [medium["type"] for medium in both["media"]] == ["image", "video"]  # as in the text
    assert sft["messages"][0]["content"] == "<image>What?" and sft["answer"] is None


def test_order_depends_on_the_seed_alone():
    """Another number of ranks, or a restart, that repeats or leaves out records."""
    take = lambda cursor, rank, world, n: list(
        itertools.islice(data.data_order(10, 3, cursor, rank, world), n)
    )
    whole = take(0, 0, 1, 30)
    assert [sorted(whole[i : i + 10]) for i in (0, 10, 20)] == [list(range(10))] * 3
    assert whole[:10] != whole[10:20]
    assert [index for pair in zip(take(0, 0, 2, 15), take(0, 1, 2, 15)) for index in pair] == whole
    assert take(13, 0, 1, 17) == whole[13:]


def test_every_rank_is_dealt_as_much_work():
    """One rank that writes the long answers while the others wait; a dealing that takes other records than the order says."""
    work = (
        np.random.default_rng(0).lognormal(6, 0.8, 1000).tolist()
    )  # long answers are few and long
    excess, whole = {}, {}
    for name, options in dict(cards={}, dealt=dict(work=work)).items():
        ranks = [data.data_order(1000, 0, 0, rank, 8, rows=4, **options) for rank in range(8)]
        steps = [[list(itertools.islice(rank, 16)) for rank in ranks] for _ in range(7)]
        loads = [[sum(work[i] for i in hand) for hand in step] for step in steps]
        excess[name] = np.mean([max(load) / np.mean(load) - 1 for load in loads])
        assert [sorted(sum(step, [])) for step in steps] == [
            sorted(itertools.islice(data.data_order(1000, 0, 128 * i), 128)) for i in range(7)
        ]
        totals = np.sum(loads, axis=0)
        whole[name] = max(totals) / np.mean(totals) - 1
    assert excess["dealt"] < 0.6 * excess["cards"], excess
    assert whole["dealt"] < 0.05 < whole["cards"], whole  # nobody gets the heaviest of every hand


# --- films of every kind ----------------------------------------------------------------------------------------------

X264 = {"g": "10", "bf": "2", "crf": "4"}


def clock(i, width=128, height=64):
    """A picture that shows the number i < 65,536 as 16 bars, black or white."""
    bars = np.array([255 * (i >> bit & 1) for bit in range(16)], np.uint8)
    return np.broadcast_to(np.repeat(bars, width // 16)[None, :, None], (height, width, 3)).copy()


def read_clock(frame):
    bars = frame.mean((0, 2)).reshape(16, -1).mean(1)
    return sum(1 << bit for bit in range(16) if bars[bit] > 127)


def write_film(
    path,
    count=40,
    codec="libx264",
    options=X264,
    form=None,
    rate=10,
    start=0,
    pixels="yuv420p",
    **settings,
):
    """A film of `count` clocks, one every 1 / rate seconds; the first one has the time stamp start / rate."""
    with av.open(str(path), "w", format=form, options=settings.pop("container", {})) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 128, 64, pixels, 4_000_000
        if "rotation" in settings:
            stream.set_display_rotation(settings["rotation"])
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(clock(i), format="rgb24")
            frame.pts = start + i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


FILMS = {
    "plain.mp4": {},
    "fragments.mp4": dict(
        container={"movflags": "frag_keyframe+empty_moov"}
    ),  # no length in its header
    "late.mp4": dict(start=50),  # the first frame is not at 0
    "open.mp4": dict(
        options={"x264-params": "open-gop=1:keyint=10:bframes=3:b-adapt=0:scenecut=0:crf=4"}
    ),
    "open265.mp4": dict(
        codec="libx265",
        options={"x265-params": "open-gop=1:keyint=10:bframes=3:crf=4:log-level=none"},
    ),
    "short.mp4": dict(options={"g": "2", "bf": "1", "crf": "4"}),
    "plain.mkv": {},
    "plain.webm": dict(
        codec="libvpx-vp9", options={"g": "10", "deadline": "realtime", "cpu-used": "8"}
    ),
    "plain.ts": dict(form="mpegts"),  # its seek goes by decoding order
    "plain.avi": dict(codec="mpeg4", options={"g": "10", "bf": "2"}),  # likewise
    "pictures.avi": dict(codec="mjpeg", options={}, pixels="yuvj420p"),
}


@pytest.mark.parametrize("name", FILMS)
@pytest.mark.parametrize("fps", [1, 25])
def test_every_container_shows_the_frames_that_are_named(tmp_path, name, fps):
    """A seek that lands one key frame late, frames of an open group of pictures, a clock that does not start at 0."""
    write_film(tmp_path / name, **FILMS[name])
    video = data.read_video(str(tmp_path / name), fps=fps)
    count = min(max(4 * fps, 4), 128)
    assert video.indices == np.linspace(0, 39, count).round().astype(int).tolist()
    assert [read_clock(frame) for frame in video.frames] == video.indices
    assert video.fps == pytest.approx(10) and video.total == 40


def write_sound(path, cover):
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=8000)
        if cover:
            picture = container.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = 128, 64, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
            container.mux(picture.encode(av.VideoFrame.from_ndarray(clock(1), format="rgb24")))
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 8000
        container.mux(sound.encode(frame))
        container.mux(sound.encode())


def truncate(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def write_broken(path, kind):
    if kind in ("sound", "cover"):
        write_sound(path, cover=kind == "cover")
    elif kind == "no frames":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
            container.start_encoding()
    elif kind == "raw":
        write_film(path, form="h264")
    elif kind == "disorder":
        write_film(path, form="avi")
    elif kind == "no tail":
        write_film(path, container={"movflags": "faststart"})
        truncate(path, 0.7)
    elif kind == "no index":
        write_film(path)
        truncate(path, 0.7)


@pytest.mark.parametrize(
    "name, kind, reason, message",
    [
        ("a.mp4", "sound", "unreadable_video", "no video stream"),
        ("a.mp4", "cover", "unreadable_video", "no video stream"),
        ("a.mp4", "no frames", "unreadable_video", "a.mp4"),
        ("a.h264", "raw", "unreadable_video", "no frames with a time stamp"),
        (
            "a.avi",
            "disorder",
            "unreadable_video",
            "time stamps are not in order|no frame can be decoded",
        ),
        ("a.mp4", "no tail", "truncated_video", r"ends after \d\.\d s of 4\.0 s"),
        ("a.mp4", "no index", "unreadable_video", "a.mp4"),
    ],
)
def test_films_that_cannot_be_used_say_why(tmp_path, name, kind, reason, message):
    """A broken film that ends the run, or is taken for another, shorter one, or whose frames come in a wrong order."""
    write_broken(tmp_path / name, kind)
    with pytest.raises(data.MediaError, match=message) as error:
        data.read_video(str(tmp_path / name), fps=25)
    assert error.value.reason == reason and name in str(error.value)


def test_no_frame_stands_in_for_another(tmp_path):
    """A frame that cannot be had was replaced by the one after it, under the name of the first."""
    write_film(tmp_path / "a.mp4")
    for missing in (3, 39):
        with av.open(str(tmp_path / "a.mp4")) as container:
            stream = container.streams.video[0]
            pts, keys = data.list_frames(container, stream)
            with pytest.raises(
                data.MediaError, match=f"no frame can be decoded at {missing / 10:.2f} s"
            ):
                data.decode_at(
                    container, stream, np.array([pts[0], pts[missing] + 1]), keys, 4096, 65536
                )


def test_one_frame(tmp_path):
    """A division by the number of gaps between frames, of which one frame has none."""
    write_film(tmp_path / "a.mp4", count=1)
    video = data.read_video(str(tmp_path / "a.mp4"))
    assert (
        video.indices == [0, 0, 0, 0] and video.frames.shape == (4, 64, 128, 3) and video.total == 1
    )


def test_hidden_frames_are_not_shown(tmp_path):
    """An edit list that cuts a film's beginning off: frames that a player never shows were looked for, or shown."""
    write_film(tmp_path / "a.mp4")
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    entry = (
        content.index(b"elst") + 12
    )  # version and flags, number of entries; then duration, media time
    length, begin = (int.from_bytes(content[entry + i : entry + i + 4], "big") for i in (0, 4))
    content[entry : entry + 4] = (length * 25 // 40).to_bytes(4, "big")
    content[entry + 4 : entry + 8] = (begin + 15 * 1024).to_bytes(
        4, "big"
    )  # 15 frames in, in the middle of a group
    (tmp_path / "a.mp4").write_bytes(content)
    video = data.read_video(str(tmp_path / "a.mp4"), fps=25)
    assert [read_clock(frame) for frame in video.frames] == [15 + i for i in video.indices]
    assert video.total == 25 and video.fps == pytest.approx(10)


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_films_stand_upright(tmp_path, rotation):
    """A telephone's film lies on its side, or is turned the wrong way."""
    write_film(tmp_path / "a.mp4", rotation=rotation)
    video = data.read_video(str(tmp_path / "a.mp4"), fps=1)
    assert video.frames.shape[1:] == ((64, 128, 3) if rotation == 180 else (128, 64, 3))
    stored = [
        np.rot90(frame, -rotation // 90) for frame in video.frames
    ]  # degrees are counted counterclockwise
    assert [read_clock(frame) for frame in stored] == video.indices


def test_odd_sizes(tmp_path):
    """A width that is no multiple of 2, 16 or 32 shears the picture."""
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 119, 53, "yuv444p"
        for i in range(4):
            picture = np.full((53, 119, 3), 128, np.uint8)
            picture[:, 60:] = 40 * i
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    frames = data.read_video(str(tmp_path / "a.mkv")).frames
    assert frames.shape == (4, 64, 128, 3)
    assert np.abs(frames[:, :, :60].mean((1, 2, 3)) - 128).max() < 2
    assert np.abs(frames[:, :, 68:].mean((1, 2, 3)) - [0, 40, 80, 120]).max() < 2


def test_two_hours_are_not_decoded(tmp_path, monkeypatch):
    """Reading a film from end to end for 128 of its frames, or keeping all of them."""
    write_film(
        tmp_path / "a.mp4",
        count=7200,
        rate=1,
        options={"preset": "ultrafast", "g": "10", "crf": "20"},
    )
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    decoded, memory, next_frame = [], [resident()], data.next_frame

    def count(decoder, target, reached):
        memory.append(resident())
        return next_frame(
            (decoded.append(frame.pts) or frame for frame in decoder), target, reached
        )

    monkeypatch.setattr(data, "next_frame", count)
    video = data.read_video(str(tmp_path / "a.mp4"))
    assert [read_clock(frame) for frame in video.frames] == video.indices
    assert len(video.indices) == 128 and video.indices[-1] == 7199 and video.total == 7200
    assert len(decoded) <= 128 * 10
    assert max(memory) - memory[0] < 5e7 and len(memory) >= 128  # the whole film is 177 MB


@pytest.mark.parametrize("seconds", [5, 8])
def test_length_times_rate_is_not_cut_by_rounding(tmp_path, seconds):
    """8 s at 12 frames/s were 7.999999999999999 s, and 2 fps gave 14 of their frames instead of 16."""
    write_film(tmp_path / "a.mp4", count=12 * seconds, rate=12)
    assert len(data.read_video(str(tmp_path / "a.mp4"), fps=2).indices) == 2 * seconds


def test_titles_in_another_encoding(tmp_path):
    """A film whose title is not UTF-8 ended the run."""
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        container.metadata["title"] = "TITLE"
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(clock(3), format="rgb24")))
        container.mux(stream.encode())
    content = (tmp_path / "a.mkv").read_bytes().replace(b"TITLE", b"T\xeft\xe9\xff")
    (tmp_path / "a.mkv").write_bytes(content)
    assert read_clock(data.read_video(str(tmp_path / "a.mkv")).frames[0]) == 3


def test_folders_of_frames_that_do_not_fit(tmp_path):
    """Frames of two sizes, or a name with a digit that is no number, ended the run."""
    for name, size in (("1.png", (64, 64)), ("2².png", (64, 64)), ("10.png", (128, 64))):
        Image.new("RGB", size).save(tmp_path / name)
    with pytest.raises(data.MediaError, match="must have the same shape"):
        data.read_video(str(tmp_path))
    (tmp_path / "none").mkdir()
    with pytest.raises(data.MediaError, match="no frames in this folder"):
        data.read_video(str(tmp_path / "none"))


# --- pictures of every kind -------------------------------------------------------------------------------------------

HALF_RED = Image.fromarray(
    np.array([[[255, 0, 0, 255], [0, 0, 255, 0]]], np.uint8).repeat(64, 0).repeat(32, 1), "RGBA"
)


def palette(image):
    return image.convert("RGB").quantize(2)


@pytest.mark.parametrize(
    "name, image, left, right",
    [
        ("alpha.png", HALF_RED, (255, 0, 0), (255, 255, 255)),  # transparent: white
        ("grey_alpha.png", HALF_RED.convert("LA"), (76, 76, 76), (255, 255, 255)),
        ("palette.png", palette(HALF_RED), (255, 0, 0), (0, 0, 255)),
        ("cmyk.jpg", HALF_RED.convert("RGB").convert("CMYK"), (255, 0, 0), (0, 0, 255)),
        ("grey.png", HALF_RED.convert("L"), (76, 76, 76), (29, 29, 29)),
        ("bits.png", HALF_RED.convert("L").point([0] * 50 + [255] * 206, "1"), (255, 255, 255), (0, 0, 0)),
        ("deep.png", Image.fromarray(np.array([[51400, 257]], np.uint16).repeat(64, 0).repeat(32, 1)), (200,) * 3, (1,) * 3),
        ("deep.pgm", Image.fromarray(np.array([[51400, 257]], np.uint16).repeat(64, 0).repeat(32, 1)), (200,) * 3, (1,) * 3),
    ],
)  # fmt: skip
def test_pictures_of_any_mode(tmp_path, name, image, left, right):
    """Sixteen bits clipped at 255 are all white; colours that hide below transparent pixels came into view."""
    image.save(tmp_path / name)
    pixels = data.read_image(str(tmp_path / name)).astype(int)
    assert pixels.shape == (64, 64, 3)
    assert np.abs(pixels[32, 8] - left).max() <= 3 and np.abs(pixels[32, 56] - right).max() <= 3, (
        pixels[32, ::8]
    )


def test_transparent_palette_entry(tmp_path):
    """A palette's transparent entry showed the colour it happens to have."""
    image = palette(HALF_RED)
    image.save(tmp_path / "a.png", transparency=image.getpixel((56, 32)))
    pixels = data.read_image(str(tmp_path / "a.png"))
    assert pixels[32, 8].tolist() == [255, 0, 0] and pixels[32, 56].tolist() == [255, 255, 255]


def test_all_eight_exif_orientations(tmp_path):
    """A photograph turned the wrong way, or mirrored."""
    upright = np.zeros((64, 128, 3), np.uint8)
    upright[:32, :64, 0], upright[:32, 64:, 1], upright[32:, :64, 2] = (
        255,
        255,
        255,
    )  # red, green, blue, black
    turn = Image.Transpose  # how each orientation's file is stored
    ways = [
        None,
        turn.FLIP_LEFT_RIGHT,
        turn.ROTATE_180,
        turn.FLIP_TOP_BOTTOM,
        turn.TRANSPOSE,
        turn.ROTATE_90,
    ]
    for orientation, way in enumerate([*ways, turn.TRANSVERSE, turn.ROTATE_270], 1):
        stored = Image.fromarray(upright)
        stored = stored if way is None else stored.transpose(way)
        exif = stored.getexif()
        exif[0x0112] = orientation
        stored.save(tmp_path / "a.png", exif=exif)
        assert (data.read_image(str(tmp_path / "a.png")) == upright).all(), orientation


def test_bombs_are_refused_unopened(tmp_path):
    """A file of 109 kB that takes 2.7 GB of memory when it is decoded."""

    def chunk(name, content):
        checked = name + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0))
    rows = zlib.compress(bytes(30_000 * (1 + 30_000 // 8)), 9)
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(data.MediaError, match="bomb") as error:
        data.read_image(str(tmp_path / "bomb.png"))
    assert error.value.reason == "unreadable_image"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


@pytest.mark.filterwarnings("ignore")  # Pillow's own, about the damage
@pytest.mark.parametrize("form", ["png", "jpg", "webp", "gif", "tiff", "bmp", "avif"])
def test_damaged_pictures_never_end_the_run(tmp_path, form):
    """Readers raise whatever they like on damaged bytes: RuntimeError for AVIF, TypeError for TIFF."""
    rng = random.Random(form)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    exif = noise.getexif()
    exif[0x0112] = 6
    noise.save(tmp_path / f"a.{form}", **({"exif": exif} if form in ("jpg", "png") else {}))
    whole = (tmp_path / f"a.{form}").read_bytes()
    read = Counter()
    for _ in range(150):
        content = bytearray(whole[: rng.choice([len(whole), rng.randrange(len(whole))])])
        for _ in range(rng.randint(0, 8) if content else 0):
            content[rng.randrange(min(len(content), rng.choice([60, 300, 10**6])))] = rng.randrange(
                256
            )
        (tmp_path / f"b.{form}").write_bytes(content)
        try:
            data.read_image(str(tmp_path / f"b.{form}"))
            read["whole"] += 1
        except data.MediaError as error:
            read[error.reason] += 1
    assert read["unreadable_image"] > 20


@pytest.mark.parametrize(
    "error", [struct.error("not an integer"), KeyError(282), ZeroDivisionError(), EOFError()]
)
def test_rare_damage_never_ends_the_run(tmp_path, monkeypatch, error):
    """Errors that random bytes seldom bring about (a damaged EXIF of a JPEG: struct.error) went through."""

    def read(_):
        raise error

    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(data.ImageOps, "exif_transpose", read)
    with pytest.raises(data.MediaError, match="a.png"):
        data.read_image(str(tmp_path / "a.png"))


def test_aspect_ratio(tmp_path):
    """A line of a picture: the model family refuses an aspect ratio over 200."""
    Image.new("RGB", (6500, 32)).save(tmp_path / "a.png")
    with pytest.raises(
        data.MediaError, match="a.png: 6500 x 32 pixels: an aspect ratio over 200"
    ) as error:
        data.read_image(str(tmp_path / "a.png"))
    assert error.value.reason == "aspect_ratio"
    Image.new("RGB", (6400, 32)).save(tmp_path / "a.png")
    assert data.read_image(str(tmp_path / "a.png"), 3136, 10**6).shape == (32, 6400, 3)


# --- the cache --------------------------------------------------------------------------------------------------------


def test_cache_gives_back_what_was_read(tmp_path, monkeypatch):
    """A cache that serves another size, another file of the same name, or another type; or one that is never used."""
    write_film(tmp_path / "a.mp4")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    limits = data.Limits(cache=str(tmp_path / "cache"))
    settings = (2.0, 128, 4096, 65536, None)
    film = lambda *settings: data.cached(
        limits, data.read_video, str(tmp_path / "a.mp4"), *settings
    )
    picture = lambda: data.cached(limits, data.read_image, str(tmp_path / "a.png"), 3136, 65536)
    fresh, red = film(*settings), picture()
    with monkeypatch.context() as patch:
        patch.setattr(av, "open", None)
        patch.setattr(Image, "open", None)
        kept = film(*settings)
        assert (kept.frames == fresh.frames).all() and kept.frames.dtype == np.uint8
        assert kept[1:] == fresh[1:] and [type(part) for part in kept] == [
            type(part) for part in fresh
        ]
        assert (picture() == red).all()
    assert film(1.0, 128, 4096, 65536, None).indices != fresh.indices
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "a.png")
    assert picture()[0, 0].tolist() == [0, 0, 255]
    with pytest.raises(data.MediaError, match="no file"):
        data.cached(limits, data.read_image, str(tmp_path / "none.png"), 3136, 65536)


def test_damaged_entries_are_read_again(tmp_path):
    """Pixels of a half-written or spoilt entry; a crash that leaves its half-written file behind for ever."""
    Image.fromarray(clock(77)).save(tmp_path / "a.png")
    limits = data.Limits(cache=str(tmp_path / "cache"))
    read = lambda: data.cached(limits, data.read_image, str(tmp_path / "a.png"), 3136, 65536)
    whole = read()
    (entry,) = (tmp_path / "cache").rglob("*.npz")
    content = entry.read_bytes()
    spoilt = content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]
    for damaged in (b"", content[:100], content[:-10], spoilt, b"\0" * len(content)):
        entry.write_bytes(damaged)
        assert (read() == whole).all()
        assert entry.read_bytes() == content


FILL_CACHE = """
import sys, data
limits = data.Limits(cache=sys.argv[1], cache_gb=16 * 60_000 / 2**30)
for round in range(3):
    for i in range(60):
        pixels = data.cached(limits, data.read_image, f"{sys.argv[2]}/{i}.png", 3136, 65536)
        assert (pixels == i).all(), i
"""


def test_cache_is_bounded_and_shared(tmp_path):
    """A cache that fills the disk; processes that delete or read each other's entries at the wrong moment."""
    for i in range(60):
        Image.new("RGB", (64, 128), (i, i, i)).save(
            tmp_path / f"{i}.png"
        )  # 24 kB each once decoded
    command = [sys.executable, "-c", FILL_CACHE, str(tmp_path / "cache"), str(tmp_path)]
    workers = [subprocess.Popen(command, cwd=os.path.dirname(data.__file__)) for _ in range(3)]
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    sizes = Counter()
    for file in (tmp_path / "cache").rglob("*.*"):
        sizes[file.parent.name] += file.stat().st_size
    assert (
        sizes
        and max(sizes.values()) <= 110_000
        and len(list((tmp_path / "cache").rglob("*.npz"))) > 16
    )
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_cache_that_cannot_be_written(tmp_path):
    """A folder without the right to write, or a full disk, ended the run."""
    (tmp_path / "cache").write_text("a file where the folder should be")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    limits = data.Limits(cache=str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match="--cache .*cache"):
        assert data.cached(limits, data.read_image, str(tmp_path / "a.png"), 3136, 65536).shape == (
            64,
            64,
            3,
        )


# --- records of every kind --------------------------------------------------------------------------------------------


def test_lines_of_text_files(tmp_path):
    """A byte order mark, Windows' line ends, blank lines, and line ends of other alphabets within a text."""
    lines = [
        json.dumps({**GOOD, "problem": text}, ensure_ascii=False)
        for text in ("one", "two\u2028lines\x85", "Grüße 你好")
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + ("\r\n\r\n".join(lines) + "\r\n").encode())
    records = data.load_records(tmp_path / "a.jsonl")
    assert [record["problem"] for record in records] == [
        "<image>one",
        "<image>two\u2028lines\x85",
        "<image>Grüße 你好",
    ]
    assert [record["index"] for record in records] == [0, 1, 2]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "holds no records"),
        (b"[]", "holds no records"),
        (b'{"a": 1}\n{"a": ', "a.json: line 2: not JSON"),
        (b'[{"a": 1}, {"a": ]', "a.json: not JSON"),
        (b'{"a": "\xff"}', "a.json: not JSON in UTF-8"),
        (b"[" * 100_000, "a.json: not JSON"),
        (b'[{"a": ' + b"9" * 5000 + b"}]", "a.json: not JSON"),
        (b'["text"]', "record 0: record is 'text', expected an object"),
    ],
)
def test_files_that_are_no_records(tmp_path, content, message):
    """A traceback from within json, without the file's name or the line."""
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.load_records(tmp_path / "a.json")


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(images={"a.png": 1}), "images is \"{'a.png': 1}\", expected a list of paths"),
        (dict(images=7), "images is '7', expected a list of paths"),
        (dict(images=[None]), "images is '\\[None\\]', expected a list of paths"),
        (dict(images=[], path=["a.png"]), "path is .*, expected a text"),
        (dict(images=[""]), "is outside the media folder"),
        (dict(images=["/etc/passwd"]), "is outside the media folder"),
        (dict(data_type="sound"), "data_type is 'sound', expected one of image, video"),
        (dict(options="A. x"), "options is 'A. x', expected a list"),
        (dict(answer=float("nan")), "answer is 'nan', expected the true answer"),
        (dict(problem_type="temporal grounding", answer='{"time": [1, NaN]}'), "expected JSON, an object of finite numbers"),
        (dict(problem_type="tracking", answer="[" * 50_000), "expected JSON, an object"),
        (dict(problem_type="tracking", answer="[1]"), "expected JSON, an object"),
        (dict(answer=None, solution=""), "solution is '', expected the true answer"),
        (dict(fps="fast"), "fps is 'fast', expected a number"),
        (dict(process=["thought"]), "process is .*, expected a text"),
        (dict(messages=turns("a")), "expected .* a last turn of the assistant"),
        (dict(messages=[{"from": "human", "value": "x"}]), "expected a list of turns with a role"),
        (dict(messages=turns("<image><image>", "x")), "expected 1 <image> placeholders"),
        (dict(messages=None), "messages is 'None', expected a list of turns"),
    ],
)  # fmt: skip
def test_malformed_fields_are_named(tmp_path, change, message):
    """A field of another type that was read letter by letter, or gave every response to its record a reward of 0."""
    (tmp_path / "a.json").write_text(json.dumps([GOOD, {**GOOD, **change}]))
    with pytest.raises(ValueError, match=f"record 1: .*{message}"):
        data.load_records(tmp_path / "a.json")


def test_paths(tmp_path):
    """Absolute paths, links and names in any script are fine as long as they are written below the media folder."""
    (tmp_path / "other").mkdir()
    (tmp_path / "media").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "other" / "图 1.png")
    (tmp_path / "media" / "link").symlink_to(tmp_path / "other")
    paths = ["link/图 1.png", str(tmp_path / "media" / "link" / "图 1.png"), "./x/../link/图 1.png"]
    (tmp_path / "a.json").write_text(json.dumps([{**GOOD, "images": path} for path in paths]))
    for root in (tmp_path / "media", f"{tmp_path}/media/"):
        records = data.load_records(tmp_path / "a.json", root)
        assert {record["media"][0]["path"] for record in records} == {
            str(tmp_path / "media" / "link" / "图 1.png")
        }
    assert data.read_image(records[0]["media"][0]["path"]).shape == (64, 64, 3)
    (tmp_path / "b.json").write_text(json.dumps([{**GOOD, "images": str(tmp_path / "a.png")}]))
    assert data.load_records(tmp_path / "b.json", "/")[0]["media"][0]["path"] == str(
        tmp_path / "a.png"
    )


def test_thinking_makes_a_demonstration(tmp_path):
    """A record with `process` was no SFT data, or lost its use for RL when it was made SFT data."""
    (tmp_path / "a.json").write_text(
        json.dumps([{**GOOD, "process": "<think>\nhm\n</think>"}, GOOD])
    )
    both, bare = data.load_records(tmp_path / "a.json")
    assert (
        data.demonstration(both) == "<think>hm</think><answer>x</answer>" and "messages" not in both
    )
    assert data.demonstration(bare) is None


def test_masks_alone_are_a_truth(tmp_path):
    """Evaluation's segmentation records, whose truth is a mask, were refused for want of a text."""
    masks = dict(frames=[0], segmentation_rle={"size": [2, 2], "counts": "04"})
    record = {**GOOD, "problem_type": "segmentation", "answer": "", "segmentation_output": masks}
    (tmp_path / "a.json").write_text(json.dumps([record]))
    assert data.load_records(tmp_path / "a.json")[0]["answer"] == ""


def encoded(tmp_path, processor, **record):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    (tmp_path / "a.json").write_text(json.dumps([record]))
    return data.encode(data.load_records(tmp_path / "a.json")[0], processor)


def test_media_in_several_turns(tmp_path, processor):
    """Placeholders were looked for in the first turn alone; what the assistant says about <image> is text."""
    talk = turns("<image>What?", "An <image> tag.", "<image>And here?", "x")
    prompt = encoded(tmp_path, processor, messages=talk, images=["a.png", "b.png"])
    text = processor.tokenizer.decode(prompt.token_ids)
    assert text.count("<|vision_start|>") == 2 and "An <image> tag." in text
    one = encoded(
        tmp_path, processor, messages=turns("What?", "y", "And now?", "x"), images=["a.png"]
    )
    assert processor.tokenizer.decode(one.token_ids).startswith(
        "<|im_start|>user\n<|vision_start|>"
    )


def test_placeholders_in_options_are_text(tmp_path, processor):
    """An option that reads "<image>" took the picture's place, or made the record unusable."""
    record = {
        **GOOD,
        "problem_type": "multiple choice",
        "answer": "A",
        "options": ["A. <image>", "B. <video>"],
    }
    text = processor.tokenizer.decode(encoded(tmp_path, processor, **record).token_ids)
    assert text.count("<|vision_start|>") == 1 and "A. <image>\nB. <video>" in text


@pytest.mark.parametrize("word", ["<|image_pad|>", "<|im_end|>", "<|vision_start|>"])
def test_control_tokens_in_a_text(tmp_path, processor, word):
    """A question that ends its own turn, or brings vision tokens without pixels."""
    for change in (
        dict(problem=f"a{word}b"),
        dict(options=[word]),
        dict(process=word),
        dict(messages=turns("a", word)),
    ):
        with pytest.raises(data.MediaError, match=re.escape(word)) as error:
            encoded(tmp_path, processor, **{**GOOD, **change})
        assert error.value.reason == "control_token"


def test_half_a_character(tmp_path, processor):
    """Half of a surrogate pair, as careless scripts cut it, ended the worker that tokenised it."""
    with pytest.raises(data.MediaError, match="half a character") as error:
        encoded(tmp_path, processor, **{**GOOD, "problem": "a\ud83d"})
    assert error.value.reason == "broken_text"


LOAD = """
import resource, sys, data
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert len(data.load_records(sys.argv[1])) == 200_000
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_200_000_records_fit_in_a_gigabyte(tmp_path):
    """Text, raw and final records all held at once."""
    boxes = json.dumps({"boxes": {str(k): [10, 20, 300, 400] for k in range(1, 33)}})
    record = dict(
        problem_id=0,
        problem="<video>" + "Where is it? " * 12,
        data_type="video",
        problem_type="tracking",
    )
    plain = dict(
        problem_type="OCR",
        problem="<image>" + "What is this? " * 12,
        images=["a/b/c.jpg"],
        answer="x",
        options=["A", "B"],
    )
    lines = [
        json.dumps({**record, "videos": ["a/b/c.mp4"], "answer": f"<answer>{boxes}</answer>"}),
        json.dumps(plain),
    ]
    (tmp_path / "a.json").write_text(
        "[" + ",".join([lines[0], lines[1], lines[1]] * 66_666 + lines) + "]"
    )
    command = [sys.executable, "-c", LOAD, str(tmp_path / "a.json")]
    result = subprocess.run(
        command, cwd=os.path.dirname(data.__file__), capture_output=True, text=True, check=True
    )
    assert int(result.stdout) < 1e6  # kB


def test_peek_shows_what_is_learned(toy, tmp_path):
    """Labels that are off by one; a bad record that ends the look at the others."""
    records = json.loads((toy / "sft_video.json").read_text())[:2]
    records.insert(1, {**records[0], "videos": ["media/none.mp4"]})
    (tmp_path / "a.json").write_text(json.dumps(records))
    command = [
        "data.py",
        tmp_path / "a.json",
        "--media-root",
        toy,
        "--model",
        toy / "model",
        "--sheet",
        tmp_path / "a.png",
    ]
    shown = run(*command).stdout
    assert shown.count("32 of them vision; frames x height x width: 16 x 64 x 64") == 2
    assert shown.count("skipped, missing_media: no file") == 1 and "<|video_pad|>x4" in shown
    rows = [line.split(maxsplit=3) for line in shown.splitlines() if re.match(r" +\d+ +\d+ ", line)]
    learned = [row for row in rows if row[2] != "-"]
    assert all(row[1] == row[2] for row in learned)
    first = next(i for i, row in enumerate(rows) if row[2] != "-")
    assert [row[3] for row in rows[first - 2 : first + 1]] == ["'assistant'", "'\\n'", "'<think>'"]
    assert rows[-1][2:] == [rows[-1][1], "'<|im_end|>'"]
    assert Image.open(tmp_path / "a.png").size == (1280, 2 * 188)
    (tmp_path / "a.json").write_text(json.dumps(records[1:2]))
    result = run(*command, check=False)
    assert (
        result.returncode == 2
        and result.stderr.count("\n") == 1
        and "none of the first 3" in result.stderr
    )
