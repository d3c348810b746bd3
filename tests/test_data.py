"""Records, pictures, videos and their order."""

import itertools
import json
from collections import Counter

import av
import numpy as np
import pytest
from PIL import Image

import data


def write_clock(path, count, gap_ms=lambda i: 100, key_every=10):
    """A video whose frame i shows its number as a grey level of 4 i, with gaps in milliseconds. Returns the times."""
    times = list(itertools.accumulate((gap_ms(i) for i in range(count - 1)), initial=0))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1000, options={"g": str(key_every), "crf": "4", "bf": "2"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 4 * i, np.uint8), format="rgb24")
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
    assert np.abs(np.array(video.indices) - wanted).max() <= 200  # the nearest frame, half a gap away at most


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
    record = dict(problem_type="OCR", problem="?", data_type=kind, answer="x", **{kind + "s": [name]})
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    records = data.load_records(tmp_path / "a.jsonl")
    stream = data.prefetch(records, lambda record: data.encode(record, processor), [0], workers=0)
    tally = Counter()
    assert data.take(stream, 1, tally, max_bad_share=0.05) == []
    assert tally == {"records": 1, f"skipped/{reason}": 1}


def test_too_many_unusable_records_stop_the_run():
    """A wrong media folder that trains on nothing."""
    stream = iter([data.Skipped("missing_media", "no file")] * 300)
    with pytest.raises(RuntimeError, match="max-bad-share"):
        data.take(stream, 300, Counter(), 0.05)


def test_prompts_are_never_cut(toy, processor):
    """The release cuts long prompts from the right, through their vision tokens."""
    record = data.load_records(toy / "rl_train.json")[0]
    length = len(data.encode(record, processor).token_ids)
    with pytest.raises(data.MediaError, match=f"{length} prompt tokens, the limit is {length - 1}"):
        data.encode(record, processor, data.Limits(max_prompt_tokens=length - 1))
    foreign = {**record, "problem": record["problem"] + " <|image_pad|>"}  # special tokens smuggled into the text
    with pytest.raises(data.MediaError, match="places for"):
        data.encode(foreign, processor)


GOOD = dict(problem_type="OCR", problem="<image>?", data_type="image", images=["a.png"], answer="<answer>x</answer>")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(problem_type="poetry"), "record 1: problem_type is 'poetry', expected one of multiple choice"),
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
    evaluation = dict(problem_id=7, problem="Where?", data_type="video-image", problem_type="OCR", solution="x")
    evaluation |= dict(path="a.mp4", additional_path="b.png", fps=4)
    turns = [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "<think>.</think><answer>x</answer>"},
    ]
    (tmp_path / "a.json").write_text(json.dumps([GOOD, evaluation, dict(messages=turns, images="c.png")]))
    rl, both, sft = data.load_records(tmp_path / "a.json")
    assert rl["answer"] == "x" and rl["media"] == [{"type": "image", "path": str(tmp_path / "a.png")}]
    assert both["problem"] == "<image><video>Where?" and both["problem_id"] == "7" and both["fps"] == 4
    assert [medium["type"] for medium in both["media"]] == ["image", "video"]  # as in the text
    assert sft["messages"][0]["content"] == "<image>What?" and sft["answer"] is None


def test_order_depends_on_the_seed_alone():
    """Another number of ranks, or a restart, that repeats or leaves out records."""
    take = lambda cursor, rank, world, n: list(itertools.islice(data.data_order(10, 3, cursor, rank, world), n))  # noqa: E731
    whole = take(0, 0, 1, 30)
    assert [sorted(whole[i : i + 10]) for i in (0, 10, 20)] == [list(range(10))] * 3
    assert whole[:10] != whole[10:20]
    assert [index for pair in zip(take(0, 0, 2, 15), take(0, 1, 2, 15)) for index in pair] == whole
    assert take(13, 0, 1, 17) == whole[13:]


def test_every_rank_is_dealt_as_much_work():
    """One rank that writes the long answers while the others wait; a dealing that takes other records than the order says."""
    work = np.random.default_rng(0).lognormal(6, 0.8, 1000).tolist()  # long answers are few and long
    excess = {}
    for name, options in dict(cards={}, dealt=dict(work=work)).items():
        ranks = [data.data_order(1000, 0, 0, rank, 8, rows=4, **options) for rank in range(8)]
        steps = [[list(itertools.islice(rank, 16)) for rank in ranks] for _ in range(7)]
        loads = [[sum(work[i] for i in hand) for hand in step] for step in steps]
        excess[name] = np.mean([max(load) / np.mean(load) - 1 for load in loads])
        assert [sorted(sum(step, [])) for step in steps] == [
            sorted(itertools.islice(data.data_order(1000, 0, 128 * i), 128)) for i in range(7)
        ]
    assert excess["dealt"] < 0.6 * excess["cards"], excess
