"""Records, images, videos, prompts and their order."""

import argparse
import doctest
import itertools
import json
import random
import re
import resource
import struct
import sys
import zlib
from collections import Counter
from pathlib import Path

import av
import av.stream
import numpy as np
import pytest
from PIL import Image
from release_prompts import release_prompts

import data
import sft

CASES = Path(__file__).parent / "cases"


def test_examples():
    """The docstrings show what the code no longer does."""
    result = doctest.testmod(data)
    assert result.attempted > 1 and result.failed == 0


# --- videos ------------------------------------------------------------------------------------------

X264 = {"g": "10", "bf": "2", "crf": "4"}
OPEN = {"x264-params": "open-gop=1:keyint=10:bframes=3:b-adapt=0:scenecut=0:crf=4"}
OPEN265 = {"x265-params": "open-gop=1:keyint=10:bframes=3:crf=4:log-level=none"}
MPEG = dict(options={"g": "10", "bf": "2"}, rate=25)
VP9 = dict(codec="libvpx-vp9", options={"g": "10", "deadline": "realtime", "cpu-used": "8"})


def clock(i, width=128, height=64):
    """An image that shows the number i < 65,536 as 16 bars, black or white."""
    bars = np.array([255 * (i >> bit & 1) for bit in range(16)], np.uint8)
    return np.broadcast_to(np.repeat(bars, width // 16)[None, :, None], (height, width, 3)).copy()


def read_clock(frame):
    bars = frame.mean((0, 2)).reshape(16, -1).mean(1)
    return sum(1 << bit for bit in range(16) if bars[bit] > 127)


def write_video(path, count=40, codec="libx264", options=X264, form=None, rate=10, first=0, **more):
    """Clocks first, first + 1, .., one every 1 / rate seconds, or at more["times"] (units of it)."""
    with av.open(str(path), "w", format=form, options=more.get("container", {})) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.bit_rate = 128, 64, 4_000_000
        stream.pix_fmt = more.get("pixels", "yuv420p")
        if "rotation" in more:
            stream.set_display_rotation(more["rotation"])
        for i, time in enumerate(more.get("times", range(count))):
            frame = av.VideoFrame.from_ndarray(clock(first + i), format="rgb24")
            frame.pts = more.get("start", 0) + time
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def cut(path, begin=0.0, end=1.0):
    content = path.read_bytes()
    path.write_bytes(content[int(begin * len(content)) : int(end * len(content))])


VIDEOS = {
    "plain.mp4": {},
    "fragments.mp4": dict(container={"movflags": "frag_keyframe+empty_moov"}),  # no length in it
    "late.mp4": dict(start=50),  # the first frame is not at 0
    "open.mp4": dict(options=OPEN),
    "open265.mp4": dict(codec="libx265", options=OPEN265),
    "short.mp4": dict(options={"g": "2", "bf": "1", "crf": "4"}),
    "plain.mkv": {},
    "plain.webm": VP9,
    "plain.ts": dict(form="mpegts"),  # its seek goes by decoding order
    "wrapped.ts": dict(form="mpegts", start=954_417),  # its clock of 33 bits begins anew
    "plain.avi": dict(codec="mpeg4", options={"g": "10", "bf": "2"}),  # likewise
    "images.avi": dict(codec="mjpeg", options={}, pixels="yuvj420p"),
    "h264.avi": {},  # B-frames whose stamps are in decoding order
    "few.avi": dict(
        count=43, options={"g": "4", "bf": "2", "crf": "4"}
    ),  # four frames do not show it
    "late.avi": dict(start=50),  # empty chunks before its first frame
    "mpeg1.mpg": dict(codec="mpeg1video", form="mpeg", **MPEG),  # seeks land anywhere
    "mpeg2.vob": dict(codec="mpeg2video", form="vob", **MPEG),
    "cut.vob": dict(codec="mpeg2video", form="vob", cut=0.3, **MPEG),
    "h264.flv": {},
    "plain.gif": dict(codec="gif", options={}, pixels="rgb8"),
    "cut.ts": dict(form="mpegts", cut=0.3),  # begins between key frames
    "cut_open.ts": dict(form="mpegts", options=OPEN, cut=0.3),
    "cut_265.ts": dict(form="mpegts", codec="libx265", options=OPEN265, cut=0.3),
    "cut_mpeg2.ts": dict(form="mpegts", codec="mpeg2video", cut=0.3, **MPEG),
}


@pytest.mark.parametrize("name", VIDEOS)
def test_every_container_shows_the_frames_that_are_named(tmp_path, name):
    """A seek that lands one key frame late, frames of an open group of pictures, a clock that does not
    start at 0; .mpg, .vob, cut .ts and H.264 in AVI were refused."""
    settings = dict(VIDEOS[name])
    begin, rate, total = settings.pop("cut", 0), settings.get("rate", 10), settings.get("count", 40)
    write_video(tmp_path / name, **settings)
    cut(tmp_path / name, begin)
    for fps in (1, 25):
        video = data.read_video(str(tmp_path / name), fps=fps)
        numbers = [read_clock(frame) for frame in video.frames]
        first = numbers[0]
        assert (first in range(8, 35) if begin else first == 0) and video.total == total - first
        assert numbers == [first + i for i in video.indices] and video.fps == pytest.approx(rate)
        count = min(max(int(video.total / rate * fps), 4) // 2 * 2, video.total + video.total % 2)
        spread = np.linspace(0, video.total - 1, count).round().astype(int).tolist()
        assert count > video.total or video.indices == spread


@pytest.mark.parametrize("form", ["mkv", "mp4", "ts"])
def test_sound_may_begin_long_before_the_video(tmp_path, form):
    """FFmpeg guesses an MKV's decoding times, and they go back there: it was taken for two files."""
    path = tmp_path / f"a.{form}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options=X264)
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        sound = container.add_stream("aac", rate=8000)
        for i in range(100):
            silence = np.zeros((1, 1024), np.float32)
            frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, 1024 * i
            container.mux(sound.encode(frame))
        for i in range(40):
            frame = av.VideoFrame.from_ndarray(clock(i), format="rgb24")
            frame.pts = 60 + i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        container.mux(sound.encode())
    video = data.read_video(str(path), fps=25)
    assert [read_clock(frame) for frame in video.frames] == video.indices == list(range(40))


def test_variable_frame_rate_keeps_true_times(tmp_path):
    """Time stamps from a mean frame rate: every second of such a video would be wrong."""
    times = [40 * min(i, 20) + 400 * max(i - 20, 0) for i in range(40)]
    write_video(tmp_path / "a.mp4", rate=1000, times=times)
    video = data.read_video(str(tmp_path / "a.mp4"), fps=2)
    assert video.fps == 1000
    assert video.indices == [times[read_clock(frame)] for frame in video.frames]
    wanted = np.linspace(0, times[-1], len(video.indices))
    assert np.abs(np.array(video.indices) - wanted).max() <= 200  # half a gap


def write_sound(path, cover):
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=8000)
        if cover:
            image = container.add_stream("mjpeg", rate=1)
            image.width, image.height, image.pix_fmt = 128, 64, "yuvj420p"
            image.disposition = av.stream.Disposition.attached_pic
            container.mux(image.encode(av.VideoFrame.from_ndarray(clock(1), format="rgb24")))
        silence = np.zeros((1, 1024), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(sound.encode(frame))
        container.mux(sound.encode())


def write_broken(path, end=1.0, joined=0, **settings):
    write_video(path, **settings)
    if joined:
        begin = path.read_bytes()
        write_video(path, first=1000, **settings, start=joined)
        cut(path, 0.32 if joined > 1 else 0)
        path.write_bytes(begin + path.read_bytes())
    cut(path, end=end)


MOOV = dict(container={"movflags": "faststart"})
BROKEN = {  # name: how it is written, and what is said
    "sound.mp4": (None, "no video stream"),
    "cover.mp4": (None, "no video stream"),
    "empty.mp4": (dict(end=0.0), "empty.mp4"),
    "raw.h264": (dict(form="h264"), "frames without a time stamp"),
    "half.mp4": (dict(end=0.7, **MOOV), r"ends after \d\.\d s of 4\.0 s"),
    "no_index.mp4": (dict(end=0.7), "no_index.mp4"),
    "half.mkv": (dict(end=0.5), "ends after 0.* s of 4.0 s"),
    "half.webm": (dict(end=0.5, **VP9), "ends after 1.* s of 4.0 s"),
    "half.avi": (dict(end=0.5, count=400), "ends after 2.* s of 40.0 s"),
    "half.flv": (dict(end=0.5), "ends after 1.* s of 4.* s"),
    "fragments.mp4": (dict(end=0.5, **VIDEOS["fragments.mp4"]), "ends after"),
    "damaged.mpg": (dict(end=0.6, **VIDEOS["mpeg1.mpg"]), "is damaged"),
    "joined.ts": (dict(joined=1, form="mpegts"), "time goes back"),
    "joined_cut.ts": (dict(joined=25, form="mpegts"), "time goes back"),
    "joined.mpg": (dict(joined=1, **VIDEOS["mpeg1.mpg"]), "time goes back"),
    "joined.mkv": (dict(joined=1), "time goes back"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_videos_that_cannot_be_used_say_why(tmp_path, name):
    """A broken video that ends the run, or is taken for another, shorter one; two joined ones whose
    frames were mixed."""
    settings, message = BROKEN[name]
    if settings is None:
        write_sound(tmp_path / name, cover=name == "cover.mp4")
    else:
        write_broken(tmp_path / name, **settings)
    for fps in (1, 25):
        with pytest.raises(data.MediaError, match=message) as error:
            data.read_video(str(tmp_path / name), fps=fps)
    assert error.value.reason == "unreadable_video" and name in str(error.value)


def test_no_frame_stands_in_for_another(tmp_path, monkeypatch):
    """A frame that cannot be had was replaced by the one after it, under the name of the first."""
    write_video(tmp_path / "a.mp4")
    listed = data.list_frames

    def shifted(path):
        seconds, pts, keys = listed(path)
        return seconds, np.append(pts[:-1], pts[-1] + 1), keys

    monkeypatch.setattr(data, "list_frames", shifted)
    video = data.read_video(str(tmp_path / "a.mp4"))
    assert [read_clock(frame) for frame in video.frames] == video.indices


class Wrapped:
    """A container or a packet; what it demuxes is wrapped likewise."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.inner.close()

    def demux(self, *streams):
        return map(type(self), self.inner.demux(*streams))


@pytest.mark.parametrize("stamp", [None, 0])
def test_frames_without_their_own_stamps_are_counted(tmp_path, monkeypatch, stamp):
    """A decoder that gives no stamps, or one for all: such a video ended the run, or showed one frame."""
    write_video(tmp_path / "a.mp4")
    open_video = data.open_video

    class Blind(Wrapped):
        def decode(self):
            frames = self.inner.decode()
            for frame in frames:
                frame.pts = stamp
            return frames

    monkeypatch.setattr(data, "open_video", lambda path: Blind(open_video(path)))
    video = data.read_video(str(tmp_path / "a.mp4"))
    assert [read_clock(frame) for frame in video.frames] == video.indices


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_no_more_frames_than_there_are(tmp_path, count):
    """20 frames at 1 frame/s gave 40, each of them twice; one frame gave four."""
    write_video(tmp_path / "a.mp4", count=count, rate=1)
    video = data.read_video(str(tmp_path / "a.mp4"), fps=4)
    assert video.indices == [*range(count)] + [count - 1] * (count % 2) and video.total == count


@pytest.mark.parametrize("seconds", [5, 8])
def test_length_times_rate_is_not_cut_by_rounding(tmp_path, seconds):
    """8 s at 12 frames/s were 7.999999999999999 s, and 2 fps gave 14 of their frames instead of 16."""
    write_video(tmp_path / "a.mp4", count=12 * seconds, rate=12)
    assert len(data.read_video(str(tmp_path / "a.mp4"), fps=2).indices) == 2 * seconds


def test_hidden_frames_are_not_shown(tmp_path):
    """An edit list that cuts a video's beginning off: frames that a player never shows were shown."""
    write_video(tmp_path / "a.mp4")
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    entry = content.index(b"elst") + 12  # after version, flags and count: duration, media time
    length, begin = (int.from_bytes(content[entry + i : entry + i + 4], "big") for i in (0, 4))
    content[entry : entry + 4] = (length * 25 // 40).to_bytes(4, "big")
    content[entry + 4 : entry + 8] = (begin + 15 * 1024).to_bytes(4, "big")  # 15 frames in
    (tmp_path / "a.mp4").write_bytes(content)
    video = data.read_video(str(tmp_path / "a.mp4"), fps=25)
    assert [read_clock(frame) for frame in video.frames] == [15 + min(i, 24) for i in video.indices]
    assert video.total == 25 and video.fps == pytest.approx(10)


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_videos_stand_upright(tmp_path, rotation):
    """A telephone's video lies on its side, or is turned the wrong way."""
    write_video(tmp_path / "a.mp4", rotation=rotation)
    video = data.read_video(str(tmp_path / "a.mp4"), fps=1)
    assert video.frames.shape[1:] == ((64, 128, 3) if rotation == 180 else (128, 64, 3))
    stored = [np.rot90(frame, -rotation // 90) for frame in video.frames]  # counterclockwise
    assert [read_clock(frame) for frame in stored] == video.indices


def test_odd_sizes_and_titles(tmp_path):
    """A width that is no multiple of 2, 16 or 32 sheared the image; a title that is not UTF-8 ended
    the run."""
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        container.metadata["title"] = "TITLE"
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 119, 53, "yuv444p"
        for i in range(4):
            image = np.full((53, 119, 3), 128, np.uint8)
            image[:, 60:] = 40 * i
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    content = (tmp_path / "a.mkv").read_bytes().replace(b"TITLE", b"T\xeft\xe9\xff")
    (tmp_path / "a.mkv").write_bytes(content)
    frames = data.read_video(str(tmp_path / "a.mkv")).frames
    assert frames.shape == (4, 64, 128, 3)
    assert np.abs(frames[:, :, :60].mean((1, 2, 3)) - 128).max() < 2
    assert np.abs(frames[:, :, 68:].mean((1, 2, 3)) - [0, 40, 80, 120]).max() < 2


def test_two_hours_are_not_decoded(tmp_path, monkeypatch):
    """Reading a video from end to end for 128 of its frames, or keeping all of them."""
    fast = {"preset": "ultrafast", "g": "10", "crf": "20"}
    write_video(tmp_path / "a.mp4", count=7200, rate=1, options=fast)
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    decoded, memory, open_video = [], [resident()], data.open_video

    class Counted(Wrapped):
        def decode(self):
            memory.append(resident())
            frames = self.inner.decode()
            decoded.extend(frame.pts for frame in frames)
            return frames

    monkeypatch.setattr(data, "open_video", lambda path: Counted(open_video(path)))
    video = data.read_video(str(tmp_path / "a.mp4"))
    assert [read_clock(frame) for frame in video.frames] == video.indices
    assert len(video.indices) == 128 and video.indices[-1] == 7199 and video.total == 7200
    assert len(decoded) <= 128 * 10
    assert max(memory) - memory[0] < 5e7 and len(memory) >= 128  # the whole video is 177 MB


def test_folders_of_frames(tmp_path):
    """frame10 before frame2, a hidden file that is no image; frames of two sizes, or a name with a
    digit that is no number, ended the run."""
    for i in range(12):
        Image.fromarray(clock(i)).save(tmp_path / f"frame{i}.{'bmp' if i % 2 else 'png'}")
    (tmp_path / ".frame0.png").write_text("no image")
    video = data.read_video(str(tmp_path), folder_fps=2)
    assert [read_clock(frame) for frame in video.frames] == video.indices == list(range(12))
    Image.new("RGB", (128, 128)).save(tmp_path / "frame12².png")
    with pytest.raises(data.MediaError, match="must have the same shape"):
        data.read_video(str(tmp_path))
    (tmp_path / "none").mkdir()
    with pytest.raises(data.MediaError, match="no frames in this folder"):
        data.read_video(str(tmp_path / "none"))


def test_frames_share_a_total_of_pixels(tmp_path, monkeypatch):
    """The release's processor shrinks long videos; ours saw 40% more tokens."""
    write_video(tmp_path / "a.mp4")
    for path, frames in ((tmp_path / "a.mp4", 40), (tmp_path, 1)):
        Image.fromarray(clock(0)).save(tmp_path / "a.png")
        monkeypatch.setattr(data, "VIDEO_PIXELS", 64 * 128 * max(frames, 2))
        video = data.read_video(str(path), fps=25, min_pixels=256 * 128, max_pixels=256 * 256)
        assert video.frames.shape[1:3] == (64, 128)


# --- images ------------------------------------------------------------------------------------------

HALF = np.array([[[255, 0, 0, 255], [0, 0, 255, 0]]], np.uint8).repeat(64, 0).repeat(32, 1)
HALF_RED = Image.fromarray(HALF, "RGBA")
DEEP = Image.fromarray(np.array([[51400, 257]], np.uint16).repeat(64, 0).repeat(32, 1))
PALETTE = HALF_RED.convert("RGB").quantize(2)
RED, BLUE, WHITE, BLACK, GREY = (255, 0, 0), (0, 0, 255), (255,) * 3, (0,) * 3, (76,) * 3


@pytest.mark.parametrize(
    "name, image, left, right",
    [
        ("alpha.png", HALF_RED, RED, WHITE),  # transparent: white
        ("grey_alpha.png", HALF_RED.convert("LA"), GREY, WHITE),
        ("palette.png", PALETTE, RED, BLUE),
        ("cmyk.jpg", HALF_RED.convert("RGB").convert("CMYK"), RED, BLUE),
        ("grey.png", HALF_RED.convert("L"), GREY, (29,) * 3),
        ("bits.png", HALF_RED.convert("L").point([0] * 50 + [255] * 206, "1"), WHITE, BLACK),
        ("deep.png", DEEP, (200,) * 3, (1,) * 3),
        ("deep.pgm", DEEP, (200,) * 3, (1,) * 3),
        ("deep.tif", DEEP, (200,) * 3, (1,) * 3),
        ("entry.png", PALETTE, RED, WHITE),  # with a transparent entry of the palette
    ],
)
def test_images_of_any_mode(tmp_path, name, image, left, right):
    """Sixteen bits clipped at 255 are all white; colours below transparent pixels came into view."""
    image.save(
        tmp_path / name,
        **(dict(transparency=1 - PALETTE.getpixel((0, 0))) if name == "entry.png" else {}),
    )
    pixels = data.read_image(str(tmp_path / name), 0).astype(int)
    assert pixels.shape == (64, 64, 3)
    assert np.abs(pixels[32, 8] - left).max() <= 3 and np.abs(pixels[32, 56] - right).max() <= 3


def test_the_most_pixels_are_kept(tmp_path):
    """Enlarged to --image-min-pixels, beyond --image-max-pixels."""
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    assert data.read_image(str(tmp_path / "a.png"), 65536, 16384).shape == (128, 128, 3)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_images_that_are_refused(tmp_path, kind):
    """Integer and float TIFF files were black."""
    Image.fromarray(np.full((64, 64), 1, kind)).save(tmp_path / "a.tif")
    with pytest.raises(data.MediaError, match="32 bits a pixel"):
        data.read_image(str(tmp_path / "a.tif"))


def test_all_eight_exif_orientations(tmp_path):
    """A photograph turned the wrong way, or mirrored."""
    upright = np.zeros((64, 128, 3), np.uint8)
    upright[:32, :64, 0] = upright[:32, 64:, 1] = upright[32:, :64, 2] = 255  # and black
    turn = Image.Transpose  # how each orientation's file is stored
    ways = [None, turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM]
    ways += [turn.TRANSPOSE, turn.ROTATE_90, turn.TRANSVERSE, turn.ROTATE_270]
    for orientation, way in enumerate(ways, 1):
        stored = Image.fromarray(upright)
        stored = stored if way is None else stored.transpose(way)
        exif = stored.getexif()
        exif[0x0112] = orientation
        stored.save(tmp_path / "a.png", exif=exif)
        assert (data.read_image(str(tmp_path / "a.png"), 0) == upright).all(), orientation


def test_bombs_are_refused_unopened(tmp_path):
    """A file of 109 kB that takes 2.7 GB of memory when it is decoded."""

    def chunk(name, content):
        checked = name + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(bytes(30_000 * (1 + 30_000 // 8)), 9))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + rows + chunk(b"IEND", b""))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(data.MediaError, match="bomb") as error:
        data.read_image(str(tmp_path / "bomb.png"))
    assert error.value.reason == "unreadable_image"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


@pytest.mark.filterwarnings("ignore")  # Pillow's own, about the damage
@pytest.mark.parametrize("form", ["png", "jpg", "webp", "gif", "tiff", "bmp", "avif"])
def test_damaged_images_never_end_the_run(tmp_path, form):
    """Readers raise whatever they like on damaged bytes: RuntimeError for AVIF, TypeError for TIFF."""
    rng = random.Random(form)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    exif = noise.getexif()
    exif[0x0112] = 6
    noise.save(tmp_path / f"a.{form}", **({"exif": exif} if form in ("jpg", "png") else {}))
    whole = (tmp_path / f"a.{form}").read_bytes()
    damaged = 0
    for _ in range(100):
        content = bytearray(whole[: rng.choice([len(whole), rng.randrange(len(whole))])])
        for _ in range(rng.randint(0, 8) if content else 0):
            place = rng.randrange(min(len(content), rng.choice([60, 300, 10**6])))
            content[place] = rng.randrange(256)
        (tmp_path / f"b.{form}").write_bytes(content)
        try:
            data.read_image(str(tmp_path / f"b.{form}"), 0)
        except data.MediaError as error:
            damaged += error.reason == "unreadable_image"
    assert damaged > 15


@pytest.mark.parametrize("error", [struct.error(), KeyError(282), ZeroDivisionError(), EOFError()])
def test_rare_damage_never_ends_the_run(tmp_path, monkeypatch, error):
    """Errors that random bytes seldom bring about (a damaged EXIF of a JPEG: struct.error)."""

    def read(_):
        raise error

    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(data.ImageOps, "exif_transpose", read)
    with pytest.raises(data.MediaError, match="a.png"):
        data.read_image(str(tmp_path / "a.png"))


# --- records -----------------------------------------------------------------------------------------

GOOD = dict(problem_type="OCR", problem="<image>?", data_type="image", images=["a.png"])
GOOD |= dict(answer="<answer>x</answer>")
BOX = GOOD | dict(problem_type="spatial grounding", answer={"boxes": [1, 2, 3, 4]})


def load(folder, *raws, **settings):
    (folder / "a.json").write_text(json.dumps(raws))
    return data.load_records(folder / "a.json", **settings)


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize("case", json.loads((CASES / "records.json").read_text()), ids=str)
def test_cases(tmp_path, case):
    """Records as people write them: a model that is trained without its image, or on a truth that no
    answer can match."""
    if case["expect"].startswith("refuse"):
        with pytest.raises(ValueError, match="a.json: .*record 0") as error:
            load(tmp_path, case["record"])
        assert len(str(error.value)) < 400
        assert "conversations" not in case["record"] or "three forms" in str(error.value)
    else:
        (record,) = load(tmp_path, case["record"])
        assert record["media"] == [{"type": "image", "path": str(tmp_path / "a.png")}]
        assert "letter" not in case["expect"] or record["answer"] == "B"


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(problem_type="poetry"), "problem_type is 'poetry', expected one of multiple choice"),
        (dict(problem_type=None), "problem_type is missing, expected one of multiple choice"),
        (dict(answer=None), "answer is missing, expected the true answer"),
        (dict(answer=["x"]), "answer is .*, expected a text or a number"),
        (dict(answer=float("nan")), "answer is 'nan', expected the true answer"),
        (dict(answer=None, solution=""), "solution is '', expected the true answer"),
        (dict(problem_type="tracking", answer="left"), "'left' .*schema.*, expected .* JSON like {.bo"),
        (dict(problem_type="tracking", answer="[" * 50_000), "expected .* JSON like {"),
        (dict(problem_type="tracking", answer='{"time": [1, NaN]}'), "expected .* JSON like {"),
        (dict(problem=7), "problem is '7', expected a text"),
        (dict(problem="<image><image>?"), "problem is .*, expected 1 <image> placeholders"),
        (dict(images=["../../etc/passwd"]), "files below the media folder"),
        (dict(images=["/etc/passwd"]), "files below the media folder"),
        (dict(images=[""]), "files below the media folder"),
        (dict(images={"a.png": 1}), "images is \"{'a.png': 1}\", expected a list of paths"),
        (dict(images=[{"bytes": "x"}]), "images is .*, expected a list of paths"),
        (dict(images=["data:image/png;base64," + "x" * 9999]), "images is .{100,120}, expected"),
        (dict(images=[], path={"a.png": 1}), "path is .*, expected a list of paths"),
        (dict(images=[], path=None), "data_type is 'image', expected 'text' by the media"),
        (dict(images=[], data_type=None, problem=None), "problem is missing, expected one of three"),
        (dict(images=None, data_type=None, image_path="a.png"), "data_type is missing, expected 'text'"),
        (dict(BOX, images=None, data_type="text", problem="?"), "expected an image or a video"),
        (dict(data_type="video"), "data_type is 'video', expected 'image' by the media"),
        (dict(data_type="text"), "data_type is 'text', expected 'image' by the media"),
        (dict(data_type="sound"), "data_type is 'sound', expected 'image' by the media"),
        (dict(options="A. x"), "options is 'A. x', expected a list"),
        (dict(options=False), "options is 'False', expected a list"),
        (dict(fps="fast"), "fps is 'fast', expected a number"),
        (dict(fps=-1), "fps is '-1', expected a number above 0"),
        (dict(process=["thought"]), "process is .*, expected a text"),
        (dict(process="so</think>\n<answer>x</answer>"), "process is .*, expected no tags inside"),
        (dict(messages=turns("a", " ")), "messages is .*, expected turns with role and content"),
        (dict(messages=turns("a")), "messages is .*, expected turns with role and content"),
        (dict(messages=[{"from": "human", "value": "x"}]), "expected turns with role and content"),
        (dict(messages=turns("<image><image>", "x")), "expected 1 <image> placeholders"),
        (dict(problem=None, query="?", response="x"), "expected one of three forms"),
    ],
)  # fmt: skip
def test_malformed_fields_are_named(tmp_path, change, message):
    """A KeyError from deep inside, a field that was read letter by letter, or a record that gave every
    response a reward of 0."""
    with pytest.raises(ValueError, match=f"a.json: .*record 1: .*{message}"):
        load(tmp_path, GOOD, {**GOOD, **change})


def test_truths_that_cannot_be_graded(tmp_path, capsys):
    """Own data in pixels was trained on without a word; a few bad records of many stopped a run."""
    wrong = [BOX | dict(answer=None, solution={"boxes": [9, 9, 1, 1]})] * 7
    with pytest.raises(ValueError, match="7 of 107 records .*; record 100: solution .*9, 9, 1, 1"):
        load(tmp_path, *[BOX] * 100, *wrong, max_bad_share=0.06)
    assert len(load(tmp_path, *[BOX] * 100, *wrong, max_bad_share=0.07)) == 100
    said = capsys.readouterr().out
    assert said.startswith("left out: ") and "record 104" in said and "record 105" not in said
    masks = dict(frames=[0], segmentation_rle={"size": [2, 2], "counts": "04"})
    record = {**GOOD, "problem_type": "segmentation", "answer": "", "segmentation_output": masks}
    assert load(tmp_path, record)[0]["answer"] == ""  # masks alone are a truth


def test_three_forms_become_one(tmp_path):
    """Ids as numbers, `solution` and `path` of the evaluation form, a missing placeholder, two media;
    thinking (`process`) makes an RL record a demonstration too."""
    evaluation = dict(problem_id=7, problem="Where?", data_type="video-image", problem_type="OCR")
    evaluation |= dict(solution="x", path="a.mp4", additional_path="b.png", fps=4)
    talk = turns("What?", "<think>.</think><answer>x</answer>")
    rl, both, sft = load(tmp_path, GOOD, evaluation, dict(messages=talk, images="c.png"))
    assert rl["answer"] == "x"
    assert rl["media"] == [{"type": "image", "path": str(tmp_path / "a.png")}]
    assert both["problem"] == "<image><video>Where?" and both["problem_id"] == "7"
    assert [medium["type"] for medium in both["media"]] == ["image", "video"]  # as in the text
    assert sft["messages"][0]["content"] == "<image>What?" and sft["answer"] is None
    plain = dict(problem="?", problem_type="OCR", solution="x", data_type=None)
    image, video, two, thought, masks = load(
        tmp_path,
        plain | dict(path="a.JPG"),
        plain | dict(path="a.mp4"),
        plain | dict(path=["a.png", "b.png"]),
        GOOD | dict(process="<think>\nhm\n</think>"),
        BOX
        | dict(problem_type="segmentation", answer="", process="hm", segmentation_output={0: 0}),
    )
    assert [image["data_type"], video["data_type"], len(two["media"])] == ["image", "video", 2]
    assert two["data_type"] == "image" and masks["demonstration"] is None  # nothing to imitate
    assert thought["demonstration"] == "<think>hm</think><answer>x</answer>"
    assert "messages" not in thought and rl["demonstration"] is None


def test_options_get_letters(tmp_path):
    """A model that is asked for a letter, of options that have none."""
    choice = GOOD | dict(problem_type="multiple choice", answer="dog", options=["cat", "dog"])
    plain, lettered = load(tmp_path, choice, choice | dict(options=["(A) cat", "(B) dog"]))
    assert plain["options"] == ["A. cat", "B. dog"] and plain["answer"] == lettered["answer"] == "B"
    assert lettered["options"] == ["(A) cat", "(B) dog"]


def test_lines_of_text_files(tmp_path):
    """A byte order mark, Windows' line ends, blank lines, line ends of other alphabets in a text."""
    texts = ["one", "two\u2028lines\x85", "Grüße 你好"]
    lines = [json.dumps({**GOOD, "problem": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + ("\r\n\r\n".join(lines) + "\r\n").encode())
    records = data.load_records(tmp_path / "a.jsonl")
    assert [record["problem"] for record in records] == [f"<image>{text}" for text in texts]
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


def test_paths(tmp_path):
    """Absolute paths, links and names in any script are fine if they are written below the folder."""
    place = tmp_path / "media" / "link" / "图 1.png"
    (tmp_path / "other").mkdir()
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "link").symlink_to(tmp_path / "other")
    Image.new("RGB", (64, 64)).save(place)
    raws = [
        {**GOOD, "images": path} for path in ("link/图 1.png", str(place), "./x/../link/图 1.png")
    ]
    for root in (tmp_path / "media", f"{tmp_path}/media/", "/"):
        for record in load(tmp_path, *(raws if root != "/" else raws[1:2]), media_root=root):
            assert record["media"][0]["path"] == str(place)


# --- prompts -----------------------------------------------------------------------------------------


def encoded(folder, processor, **record):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 64)).save(folder / name)
    return data.encode(load(folder, record)[0], processor, data.Limits(image_min_pixels=1))


def test_prompts_are_never_cut(toy, processor):
    """The release cuts long prompts from the right, through their vision tokens."""
    record = data.load_records(toy / "rl_train.json")[0]
    length = len(data.encode(record, processor).token_ids)
    with pytest.raises(data.MediaError, match=f"{length} tokens, limit {length - 1}"):
        data.encode(record, processor, data.Limits(max_prompt_tokens=length - 1))


def test_media_in_several_turns(tmp_path, processor):
    """Placeholders were looked for in the first turn alone; an <image> of the assistant is text."""
    talk = turns("<image>What?", "An <image> tag.", "<image>And here?", "x")
    prompt = encoded(tmp_path, processor, messages=talk, images=["a.png", "b.png"])
    text = processor.tokenizer.decode(prompt.token_ids)
    assert text.count("<|vision_start|>") == 2 and "An <image> tag." in text
    one = encoded(tmp_path, processor, messages=turns("What?", "y", "Now?", "x"), images=["a.png"])
    text = processor.tokenizer.decode(one.token_ids)
    assert text.startswith("<|im_start|>user\n<|vision_start|>")


def test_placeholders_in_options_are_text(tmp_path, processor):
    """An option that reads "<image>" took the image's place, or made the record unusable."""
    record = {**GOOD, "problem_type": "multiple choice", "answer": "A"}
    prompt = encoded(tmp_path, processor, **record, options=["A. <image>", "B. <video>"])
    text = processor.tokenizer.decode(prompt.token_ids)
    assert text.count("<|vision_start|>") == 1 and "A. <image>\nB. <video>" in text


@pytest.mark.parametrize("word", ["<|image_pad|>", "<|im_end|>", "a\ud83d"])
def test_control_tokens_and_half_characters(tmp_path, processor, word):
    """A question that ends its own turn, or brings vision tokens without pixels; half of a surrogate
    pair, which ended the worker that tokenised it."""
    talk = turns("a", word)
    for change in (
        dict(problem=f"a{word}b"),
        dict(options=[word]),
        dict(process=word),
        dict(messages=talk, images=[], data_type="text"),
    ):
        with pytest.raises(data.MediaError) as error:
            encoded(tmp_path, processor, **{**GOOD, **change})
        assert error.value.reason == "control_token"


def test_what_the_template_has_opened_is_not_learned_again(tmp_path, processor, monkeypatch):
    """With a Thinking checkpoint's template, which ends with <think>, every training reward was 0."""
    tokenizer = processor.tokenizer
    decoded = lambda prompt: tokenizer.decode(data.target_ids(prompt, tokenizer))
    plain = encoded(tmp_path, processor, **GOOD, process="hm")
    assert plain.opened == "" and decoded(plain) == "<think>hm</think><answer>x</answer><|im_end|>"
    start = "<|im_start|>assistant\n{% endif %}"
    assert start in tokenizer.chat_template
    opening = tokenizer.chat_template.replace(start, start.replace("\n", "\n<think>\n"))
    monkeypatch.setattr(tokenizer, "chat_template", opening)
    prompt = encoded(tmp_path, processor, **GOOD, process="hm")
    assert (
        prompt.opened == "<think>\n" and decoded(prompt) == "hm</think><answer>x</answer><|im_end|>"
    )
    assert tokenizer.decode(prompt.token_ids).endswith("assistant\n<think>\n")
    talk = turns("a", "<answer>x</answer>")
    other = encoded(tmp_path, processor, messages=talk, data_type="text")
    with pytest.raises(data.MediaError, match="does not begin with '<think>'"):
        data.target_ids(other, tokenizer)


def test_system_turn(tmp_path, processor):
    """Benchmarks that the release asks with a system prompt were asked without."""
    record = load(tmp_path, dict(GOOD, images=[], problem="?", data_type="text"))[0]
    text = processor.tokenizer.decode(data.encode(record, processor, system="Be brief.").token_ids)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n?")


# --- feeding -----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("workers", [0, 999])  # more than there are cores: DataLoader warned
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "name, reason", [("no.png", "missing_media"), ("a.mp4", "unreadable_video")]
)
def test_broken_media_are_skipped_with_their_reason(tmp_path, processor, name, reason, workers):
    """A broken file that ends the run, or disappears without a count."""
    (tmp_path / "a.mp4").write_bytes(b"no video")
    kind = "image" if name.endswith("png") else "video"
    raw = dict(problem_type="OCR", problem="?", data_type=kind, answer="x", **{kind: name})
    encode = lambda record: data.encode(record, processor)
    stream, tally = data.prefetch(load(tmp_path, raw), encode, [0], workers), Counter()
    assert sft.next_items(stream, 1, tally, max_bad_share=0.05) == []
    assert tally == {"records": 1, f"skipped/{reason}": 1}


def test_skipped_updates_are_no_bad_records():
    """Eleven updates that were not finite ended the run with "too many records cannot be used"."""
    tally = Counter(records=20, skipped_updates=11)
    assert sft.next_items(iter(["item"]), 1, tally, 0.05) == ["item"]


def test_too_many_unusable_records_stop_the_run():
    """A wrong media folder that trains on nothing."""
    stream = iter([data.MediaError("missing_media", "no file")] * 300)
    with pytest.raises(RuntimeError, match="max-bad-share"):
        sft.next_items(stream, 300, Counter(), 0.05)


# --- scripts -----------------------------------------------------------------------------------------


def test_wrong_models_are_named(toy, tmp_path, monkeypatch):
    """A wrong path asked the hub for 145 s; another model family ended in 90 lines of traceback."""
    monkeypatch.chdir(tmp_path)
    for name, config in (("qwen25", '{"model_type": "qwen2_5_vl"}'), ("empty", "{}"), ("bad", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((toy / "model" / "config.json").read_bytes())
    monkeypatch.setattr("socket.socket.connect", None)  # the hub is never asked
    expected = {
        "qwen25": "model_type is 'qwen2_5_vl', expected 'qwen3_vl'",
        "empty": "is no Qwen3-VL model",
        "bad": "is no Qwen3-VL model",
        "bare": "is no Qwen3-VL model",
        "empty/nothere": "no folder of a model, and no hub id",
        "/no/where": "no folder of a model, and no hub id",
        "gpt2": "no folder of a model, and no hub id",
    }
    for path, message in expected.items():
        with pytest.raises(ValueError, match=message) as error:
            data.load_processor(path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert data.load_processor(f"{toy}/model").tokenizer


@pytest.mark.parametrize("flags", ["--max-frames 1", "--fps 0", "--fps -2", "--fps nan", "--fps x", "--max-prompt-tokens 0"])  # fmt: skip
def test_numbers_that_make_no_sense(flags, capsys):
    """--max-frames 1 ended in a traceback, --fps 0 looked at four frames."""
    parser = data.new_parser("")
    data.add_limits(parser)
    with pytest.raises(SystemExit) as error:
        parser.parse_args(flags.split())
    said = capsys.readouterr().err
    assert error.value.code == 2 and said.count("\n") == 1 and flags.split()[0] in said
    limits = data.limits_of(parser.parse_args(["--fps", "0.5"]))
    assert limits == data.Limits(fps=0.5) and isinstance(limits, tuple)
    assert isinstance(parser, argparse.ArgumentParser)


def test_torchrun_says_it_last(tmp_path, monkeypatch, capsys):
    """Under torchrun the sentence was line 1 of 40."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit):
        data.refuse("this\nis wrong")
    said = json.loads((tmp_path / "error.json").read_text())["message"]["message"]
    assert said.endswith(": this is wrong") and capsys.readouterr().err == said + "\n"


RELEASE = """
import something_that_is_not_installed
QUESTION_TEMPLATE = ("{Question}\\n" "Look.\\n")
TYPE_TEMPLATE = """
RELEASE += repr({task.replace("-", "_"): f"Read {task}.\n" for task in data.PROMPTS})


def test_prompts_of_the_release(tmp_path):
    """A released model was asked in other words than it was trained with."""
    (tmp_path / "clone" / "a" / "b").mkdir(parents=True)
    (tmp_path / "clone" / "a" / "b" / "dataset.py").write_text(RELEASE)
    expected = {task: f"Look.\nRead {task}.\n" for task in data.PROMPTS}
    (tmp_path / "prompts.json").write_text(json.dumps(release_prompts(tmp_path / "clone")))
    assert data.load_prompts(tmp_path / "prompts.json") == expected
    for wrong in (json.dumps({"OCR": "Read."}), "3", "{", json.dumps({**expected, "OCR": None})):
        (tmp_path / "prompts.json").write_text(wrong)
        with pytest.raises(ValueError, match="prompts.json: expected an instruction for"):
            data.load_prompts(tmp_path / "prompts.json")


def test_peek_shows_what_is_learned(toy, tmp_path, monkeypatch, capsys):
    """Labels that are off by one; a bad record that ends the look at the others; a swapped axis that
    is not seen."""
    records = json.loads((toy / "sft_video.json").read_text())
    records = [each for each in records if "Step by step" in each["messages"][1]["content"]][:2]
    records.insert(1, {**records[0], "videos": ["media/none.mp4"]})
    boxes = json.loads((toy / "rl_train.json").read_text())
    boxes = [record for record in boxes if record["problem_type"] == "spatial grounding"][:4]
    (tmp_path / "a.json").write_text(json.dumps([*records, *boxes]))
    command = ["data.py", tmp_path / "a.json", "--media-root", toy, "--model", toy / "model"]
    command += ["--peek", 7, "--image-min-pixels", 1]
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    monkeypatch.chdir(tmp_path)
    data.main()
    shown = capsys.readouterr().out
    assert shown.count("video of height, width (64, 64): peek-") == 2
    assert len(re.findall(r"image of height, width \(\d+, \d+\): peek-", shown)) == 4
    assert "<|video_pad|>x4" in shown and "<|image_pad|>x" in shown
    assert shown.count("skipped, missing_media: no file") == 1
    learned = (
        r"<\|im_start\|>assistant\n\n--- \d+ tokens given, \d+ learned:\n<think>.*<\|im_end\|>\n"
    )
    assert len(re.findall(learned, shown)) == 2
    assert len(list(tmp_path.glob("peek-*.png"))) == shown.count(": peek-") == 6
    for i in range(3, 7):
        drawn = np.asarray(Image.open(tmp_path / f"peek-{i}-0.png"))
        assert (drawn == [0, 255, 0]).all(-1).any()
