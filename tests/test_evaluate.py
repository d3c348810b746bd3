"""evaluate.py: metrics, intervals, reading of benchmarks, outputs, judge, masks, report, whole runs."""

import base64
import contextlib
import csv
import http.server
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, run, tiny_sam2
from PIL import Image
from scipy import ndimage

import data
import evaluate


def line_of(task, truth, answer, position=0, **more):
    """A stored line, its accuracy by rewards, its parts by evaluate."""
    kind = "segmentation" if task.startswith("segmentation") else task
    truth = truth if isinstance(truth, str) else json.dumps(truth)
    record = dict(problem_type=kind, data_type="image", answer=truth)
    answer = answer if isinstance(answer, str) or answer is None else json.dumps(answer)
    line = dict(problem_id="p", position=position, task=task, trouble=[], **more)
    accuracy = evaluate.rewards.accuracy(record, answer)
    return line | dict(accuracy=accuracy, parts=evaluate.parts_of(task, record, answer))


def values(name, lines):
    return {metric: cell["value"] for metric, cell in evaluate.metrics_of(name, lines).items()}


def write_lines(path, lines):
    evaluate.write_whole(path, "".join(json.dumps(line) + "\n" for line in lines.values()))


def stored(out, name):
    return evaluate.read_lines(f"{out}/{name}.jsonl")


# --------------------------------------------------------------------------------------------------
# Metrics


def test_recall_counts_a_tie_and_miou_counts_everything():
    """R@t as IoU > t, or mIoU over the readable answers only, gives other numbers than the papers'."""
    answers = [{"time": [0, 10]}, {"time": [0, 5]}, {"time": [0, 3]}, "not JSON", None]
    lines = [line_of("temporal grounding", {"time": [0, 10]}, answer) for answer in answers]
    found = values("charades", lines)
    assert (found["R@0.3"], found["R@0.5"], found["R@0.7"]) == (0.6, 0.4, 0.2)
    assert found["mIoU"] == pytest.approx(1.8 / 5) == found["accuracy"]


def test_box_iou_of_spatial_grounding():
    """The release's evaluation crashes on box IoU; a malformed box must be a 0, not an end."""
    boxes = [[0, 0, 100, 100], [0, 50, 100, 150], [1, 2], "x"]
    answers = [*({"boxes": box} for box in boxes), [1], "{}"]
    lines = [line_of("spatial grounding", {"boxes": boxes[0]}, answer) for answer in answers]
    found = values("refcoco", lines)
    assert found["R@0.5"] == pytest.approx(1 / 6) and found["mIoU"] == pytest.approx(4 / 3 / 6)


def test_spatial_temporal_boxes_over_true_and_over_shared_seconds():
    """One right box of five scores as five in the release (m_sIoU); m_vIoU must not."""
    box = [0, 0, 10, 10]
    truth = {"time": [0, 4], "boxes": {str(second): box for second in range(5)}}
    answer = {"time": [0, 2], "boxes": {"0": box}}
    found = values("stvg", [line_of("spatial-temporal grounding", truth, answer)])
    assert found["m_sIoU"] == found["sIoU@0.5"] == 1.0 and found["m_vIoU"] == 0.2
    assert found["m_tIoU"] == 0.5 and found["tIoU@0.5"] == 1.0 and found["accuracy"] == 0.35


def test_tracking_counts_sequences():
    """R@t over frames instead of sequences; the given box as a success."""
    box, off = [0, 0, 10, 10], [50, 50, 60, 60]
    long = {"boxes": {str(k): box for k in range(1, 5)}}  # 4 frames, of which the last is missed
    short = {"boxes": {"1": box, "2": box}}  # 2 frames, of which the second is missed
    answers = {"boxes": {**long["boxes"], "4": off}}, {"boxes": {"1": box}}
    lines = [line_of("tracking", y, p) for y, p in zip((long, short), answers)]
    given_alone = line_of("tracking", {"boxes": {"1": box}}, {"boxes": {"1": box}})
    found, left = values("got10k", lines), ", given box left out"
    assert found["AO"] == pytest.approx(5 / 8) and found["AO" + left] == pytest.approx(1 / 3)
    assert (found["R@0.3"], found["R@0.5"], found["R@0.7"]) == (1.0, 1.0, 0.5)
    cells = evaluate.metrics_of("got10k", [*lines, given_alone])
    assert cells["AO" + left]["n"] == 2 and cells["AO" + left]["value"] == found["AO" + left]


def test_a_file_with_two_tasks_keeps_their_metrics_apart():
    """mIoU of times and mIoU of boxes averaged into one number when a file mixes tasks."""
    box = {"boxes": [0, 0, 10, 10]}
    lines = [
        line_of("temporal grounding", {"time": [0, 10]}, {"time": [0, 5]}),
        line_of("spatial grounding", box, box),
        line_of("multiple choice", "B", "B"),
    ]
    results = evaluate.metrics_of("mixed", lines)
    assert results["mIoU (temporal grounding)"]["value"] == 0.5
    assert results["mIoU (spatial grounding)"] == dict(value=1.0, low=0.0, high=1.0, n=1)
    assert "mIoU" not in results and results["accuracy"]["value"] == pytest.approx(2.5 / 3)


def test_the_table_is_the_papers():
    """A wrong digit, a benchmark lost, or another headline metric than in the paper's ablation table
    of means per task family, which must come out of the numbers of the benchmarks."""
    families = {  # OneThinker-8B (EMA-GRPO); Qwen3-VL-8B where all of its numbers are known
        ("multiple choice",): (69.8, 65.0),
        ("temporal grounding",): (49.7, 30.8),
        ("spatial grounding",): (89.2, None),
        ("spatial-temporal grounding",): (38.1, 19.5),
        ("tracking",): (73.0, 33.7),
        ("segmentation-image", "segmentation-video"): (64.2, None),
    }
    for tasks, expected in families.items():
        stems = [stem for stem, row in evaluate.BENCHMARKS.items() if row.task in tasks]
        for i in (0, 1)[: 2 - (None in expected)]:
            first = lambda stem: next(iter(evaluate.paper_numbers(stem).values()))[i]  # noqa: B023
            mean = evaluate.mean_of({stem: first(stem) for stem in stems})
            assert abs(mean - expected[i]) < 0.101, (tasks, i)
    assert len({row.name for row in evaluate.BENCHMARKS.values()}) == 31
    known = {"accuracy", "circular accuracy", "cIoU", "J", "F", "J&F"}
    for stem, row in evaluate.BENCHMARKS.items():  # the paper's metrics are among ours, by name
        parts = evaluate.parts_of(row.task, dict(answer="{}"), None)
        numbers = evaluate.paper_numbers(stem)
        assert numbers.keys() <= known | parts.keys() and len(numbers) == len(row.paper), stem
        assert len(row.qwen) in (0, len(row.paper)), stem


def test_the_mean_leaves_out_by_name_what_has_no_grade():
    """The release counts segmentation as 0 in its mean; a caption set without a judge must not count
    either, while one missing verdict of many does not take it out."""
    cell = lambda value, n=40: dict(value=value, low=value, high=value, n=n)
    clean = {"unreadable": cell(0.0)}
    results = {
        "eval_charades": {"accuracy": cell(0.1), "mIoU": cell(0.6), **clean},
        "eval_seg_mevis": {"accuracy": cell(0.9), **clean},  # of the prompts: no masks yet
        "Video_MMLU_CAP": {"accuracy": cell(0.4, 39), "unreadable": cell(0.025)},
        "MMT-Caption": {"accuracy": cell(0.4, 20), **clean},
        "mine": {"accuracy": cell(0.4, 36), **clean},
    }
    lines = evaluate.table_of(results)
    why = "run again (captions: --judge-url, masks: --sam2)"
    assert lines[-4:] == [
        f"not in the mean: eval_seg_mevis: 40 of 40 have no J&F: {why}",
        f"not in the mean: MMT-Caption: 20 of 40 have no accuracy: {why}",
        f"not in the mean: mine: 4 of 40 have no accuracy: {why}",
        "mean over 2 benchmarks (metrics with *): 50.0",
    ]
    rows = [line.split() for line in lines[:-4]]
    unreadable = ["Video_MMLU_CAP", "unreadable", "40", "2.5", "[", "2.5,", "2.5]"]
    assert unreadable in rows and len(rows) == 8
    assert ["eval_charades", "mIoU*", "40", "60.0", "[", "60.0,", "60.0]", "59.9", "36.7"] in rows


def test_circular_accuracy_wants_every_order_of_the_options():
    """MMBench's rows counted one by one, where the paper's number needs all orders right."""
    rows = [("7", 1.0), ("1000007", 0.0), ("8", 1.0), ("2000008", 1.0), ("1000008", 1.0)]
    lines = [line_of("multiple choice", "B", "B", i) for i in range(len(rows))]
    lines = [line | dict(problem_id=k, accuracy=a) for line, (k, a) in zip(lines, rows)]
    found = evaluate.metrics_of("MMBench_DEV_EN", lines)
    assert (found["accuracy"]["value"], found["accuracy"]["n"]) == (0.8, 5)
    assert (found["circular accuracy"]["value"], found["circular accuracy"]["n"]) == (0.5, 2)


# --------------------------------------------------------------------------------------------------
# Masks


def davis_f(p, y):
    """F by another way: contours by shifted copies, the tolerance by a distance transform."""
    contours = []
    for mask in (p, y):
        shifts = (0, -1), (-1, 0), (-1, -1)
        moved = [ndimage.shift(mask.astype(int), by, order=0, mode="nearest") for by in shifts]
        contours.append(np.logical_or.reduce([mask != other for other in moved]))
    near = lambda contour, r: ndimage.distance_transform_edt(~contour) <= r
    return f_measure(*contours, near, math.ceil(0.008 * np.linalg.norm(p.shape)))


def paper_f(p, y):
    inside = [ndimage.binary_erosion(mask, np.ones((3, 3)), border_value=0) for mask in (p, y)]
    grow = lambda contour, r: ndimage.binary_dilation(contour, np.ones((2 * r + 1, 2 * r + 1)))
    r = max(1, round(0.0075 * np.linalg.norm(p.shape)))
    return f_measure(p & ~inside[0], y & ~inside[1], grow, r)


def f_measure(p, y, grow, r):
    if not p.any() or not y.any():
        return float(not p.any() and not y.any())
    precision, recall = grow(y, r)[p].mean(), grow(p, r)[y].mean()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_f_is_that_of_scipy():
    """A contour that lacks the image's edge, a square for a disk, a tolerance rounded the other way."""
    rng = np.random.default_rng(0)
    sizes = [(5, 7), (40, 30), (1, 9), (100, 180), (240, 427), (301, 300), (480, 854)]
    for size in sizes * 2:
        grain = ndimage.gaussian_filter(rng.normal(size=(2, *size)), (0, *rng.uniform(0, 6, 2)))
        p, y = grain > np.quantile(grain, rng.choice([0.3, 0.9, 0.99]))
        if rng.random() < 0.3:
            y = np.roll(p, rng.integers(0, 9, 2), (0, 1))
        for davis, reference in ((True, davis_f), (False, paper_f)):
            found, expected = evaluate.boundary_f(p, y, davis), reference(p, y)
            assert found == pytest.approx(expected, abs=1e-6), (size, davis)


def test_f_of_empty_masks():
    """An object that is rightly said to be absent: a division by 0, or a 0."""
    none, some = np.zeros((20, 30), bool), np.zeros((20, 30), bool)
    some[5:9, 5:9] = True
    for davis in (True, False):
        f = [evaluate.boundary_f(p, y, davis) for p in (none, some) for y in (none, some)]
        assert f == [1.0, 0.0, 0.0, 1.0]


def test_ciou_is_cumulative_and_giou_is_not():
    """cIoU as a mean of IoUs, or its interval from resampled IoUs: one large image of ten."""
    pairs = [(900, 1000)] + [(0, 10)] * 9
    common = dict(problem_id="p", task="segmentation-image", accuracy=0.0, trouble=[])
    parts = [{"box_mIoU": 0.0, "cIoU": [i, u], "gIoU": i / u} for i, u in pairs]
    lines = [common | dict(position=k, parts=part) for k, part in enumerate(parts)]
    cell = evaluate.metrics_of("eval_seg_refcoco", lines)["cIoU"]
    assert cell["value"] == pytest.approx(900 / 1090) and cell["low"] == 0.0
    assert cell["high"] == pytest.approx(2700 / 3070)  # three draws of the large one
    assert values("eval_seg_refcoco", lines)["gIoU"] == pytest.approx(0.09)
    lines[3]["parts"] = dict(box_mIoU=0.0)  # SAM2 has not come to it yet
    metrics = evaluate.metrics_of("eval_seg_refcoco", lines)
    assert "1 of 10 have no cIoU" in evaluate.headline_metric("eval_seg_refcoco", metrics)[1]


def segmentation_records(toy, name, count=2):
    path = str(toy / "eval" / f"{name}.json")
    return list(evaluate.load_benchmark(path, None, "nowhere").values())[:count]


def test_masks_meet_the_truth_in_its_own_size_and_at_its_own_frames(toy, monkeypatch):
    """Masks of the image's size compared with a truth of another; frames of a video counted from 1,
    or a prompt on the wrong one; an answer without a prompt that vanishes instead of scoring 0."""
    images = segmentation_records(toy, "segmentation_image")
    videos = segmentation_records(toy, "segmentation_video")
    for record in images:  # a truth of twice the image's size, in COCO's uncompressed form
        twice = np.kron(evaluate.true_masks(record)[0], np.ones((2, 2))).astype(bool)
        column = np.concatenate([[False], twice.T.ravel(), [False]])
        runs = np.diff(np.flatnonzero(np.diff(column)), prepend=0, append=twice.size).tolist()
        rle = dict(size=list(twice.shape), counts=runs)
        record["segmentation_output"]["segmentation_rle"] = rle
        assert (evaluate.true_masks(record)[0] == twice).all()
    prompts = []

    def segment_video(
        sam2, frames, index, marks
    ):  # a perfect SAM2, at the size of what it is given
        if len(frames) == 1:
            mask = Image.fromarray(evaluate.true_masks(images[0])[0])
            return np.asarray(mask.resize(frames.shape[2:0:-1]))[None]
        prompts.append(index)
        assert frames.shape == (32, 64, 64, 3)
        return np.stack([evaluate.true_masks(videos[len(prompts) - 1])[k] for k in range(32)])

    monkeypatch.setattr(evaluate, "segment_video", segment_video)
    images[1]["media"] = [dict(type="image", path="lost.png")]
    sums = [int(evaluate.true_masks(record)[0].sum()) for record in images]
    answers = images[0]["answer"], None
    found = [evaluate.masks_of(r, answer, None)["parts"] for r, answer in zip(images, answers)]
    assert [parts["cIoU"] for parts in found] == [[sums[0], sums[0]], [0, sums[1]]]
    for record in videos:
        masks, truths = (
            evaluate.masks_of(record, record["answer"], None),
            evaluate.true_masks(record),
        )
        assert prompts[-1] == 4 * json.loads(record["answer"])["time"]  # 4 frames a second
        absent, parts = np.mean([not mask.any() for mask in truths.values()]), masks["parts"]
        assert parts["J (DAVIS)"] == parts["F (DAVIS)"] == parts["F"] == 1.0
        assert 0 < absent < 1 and parts["J"] == pytest.approx(1 - absent)


def test_frames_of_a_segmentation_are_those_of_its_seconds(toy):
    """Frame k of the decoded frames is right only if the video has the truth's frame rate."""
    record = segmentation_records(toy, "segmentation_video", 1)[0]
    frames = evaluate.frames_at(record, 40, (64, 64))
    slow = evaluate.frames_at(record | dict(fps=1), 8, (64, 64))  # the video has 4 a second
    assert (slow == frames[0:32:4]).all() and (frames[31:] == frames[31]).all()
    colours = dict(
        red=(230, 40, 40), green=(40, 200, 70), blue=(60, 90, 255), yellow=(240, 220, 50)
    )
    colour = colours[record["problem"].split()[2]]
    for k, mask in evaluate.true_masks(record).items():  # on the object in the very frame for SAM2
        if mask.any():
            assert np.abs(frames[k][mask].mean(0) - colour).max() < 40, k


# --------------------------------------------------------------------------------------------------
# Reading


def make_forms(toy, out, count=2):
    """A folder with one small file per form of the paper's benchmarks, out of the toy's records."""
    out.mkdir()
    (out / "media").symlink_to(toy / "eval" / "media")
    read = lambda name: json.loads((toy / "eval" / f"{name}.json").read_text())[:count]
    truth = lambda record: record["solution"].removeprefix("<answer>").removesuffix("</answer>")
    code = lambda record: base64.b64encode((toy / "eval" / record["path"]).read_bytes()).decode()
    letters = lambda record: {option[0]: option[3:] for option in record["options"]}

    def write_tsv(stem, *rows):
        with open(out / f"{stem}.tsv", "w", newline="") as file:
            columns = list(dict.fromkeys(key for row in rows for key in row))
            writer = csv.DictWriter(file, columns, delimiter="\t")
            writer.writeheader()
            writer.writerows(rows)

    copied = dict(
        eval_refcoco_val="spatial_grounding", eval_charades="temporal_grounding",
        eval_got10k="tracking", eval_stvg="spatial_temporal_grounding",
        eval_mmvu="multiple_choice", eval_seg_refcoco="segmentation_image",
        eval_seg_mevis="segmentation_video",
    )  # fmt: skip
    for stem, name in copied.items():
        (out / f"{stem}.json").write_text(json.dumps(read(name)))
    lost = dict(read("open_ended")[0], path="late/lost.png")  # whose image is not there yet
    (out / "mine.json").write_text(json.dumps([*read("open_ended"), lost]))
    video, choice = read("temporal_grounding")[0]["path"], read("multiple_choice")
    number = code(read("numerical")[0])
    both = dict(path=video, additional_path=choice[0]["path"], data_type="video-image")
    (out / "eval_videomathqa.json").write_text(json.dumps([choice[0] | both] * 2))  # one id twice
    two = dict(question="Is <image 2> beside <image 1>?", hint="Look.")
    two |= dict(image=str([code(choice[0]), code(choice[1])]), answer=truth(choice[0]))
    val, options = dict(split="validation", question="Who?", image=number), letters(choice[0])
    write_tsv(
        "MMMU_DEV_VAL",
        dict(index="dev_1", split="dev", question="?", image=number, answer="A", **options),
        val | dict(index="val_1", **two, **options),
        val | dict(index="val_2", question='How "many"\nare there?', answer="1,200"),
        val | dict(index="val_3", answer="a red fox"),
    )
    whole = dict(question=choice[0]["problem"].replace("<image>", ""), image=code(choice[0]))
    write_tsv(
        "MMBench_DEV_EN",
        dict(index="1000007", question="Turned", image="7", answer="B", A="x", B="y"),
        dict(index="7", answer=truth(choice[0]), **whole, **options),
    )
    write_tsv(
        "MathVerse_MINI",
        dict(index="1", question="Which?\nChoices:\nA:1\nB:2 (half)", image=number, answer="B"),
        dict(index="2", question="What?", image=number, answer="$\\sqrt{3}$"),
    )
    listed = dict(choices="['3', '8']", answer="8", answer_option="B")
    write_tsv(
        "MathVista_MINI",
        dict(index="1", question="Which?\nChoices:\n(A) 3\n(B) 8", image=number, **listed),
        dict(index="2", question="How far?", image=number, answer="0.6", answer_option="0.6"),
        dict(index="3", question="Which years?", image=number, answer="[2001, 2004]"),
    )
    captions = [dict(caption=truth(r), image=code(r)) for r in read("open_ended")]
    captions = [dict(index=str(i), question="Describe.") | row for i, row in enumerate(captions)]
    write_tsv("MMSci_DEV_Captioning_image_only", *captions)
    for folder in ("video", "videos", "youtube_videos"):
        (out / folder).mkdir()
        shutil.copy(toy / "eval" / video, out / folder / "abc.mp4")
    holmes = {"video ID": "abc", "Question ID": "q", "Question": "Who?", "Answer": "B"}
    holmes["Options"] = {"A": "he", "B": "she"}
    (out / "Video_Holmes.json").write_text(json.dumps([holmes]))
    long = dict(video_path="abc.mp4", question="?", candidates=["he", "she"], correct_choice=0)
    (out / "LongVideoBench.json").write_text(json.dumps([long]))
    pairs = [dict(question="Who comes?", answer="Ann."), dict(question="When?", answer="Late.")]
    write_tsv("Video_MMLU_CAP", dict(index="0", video="abc.mp4", question=str(pairs)))
    return out


@pytest.fixture(scope="module")
def forms(toy, tmp_path_factory):
    return make_forms(toy, tmp_path_factory.mktemp("forms") / "eval")


def loaded(path, out="nowhere"):
    return list(evaluate.load_benchmark(str(path), None, str(out)).values())


def test_tsv_rows_become_records(forms, tmp_path, monkeypatch, capsys):
    """A row of another split as a question, images in the wrong order or outside a relative --out,
    an answer of the wrong kind, choices inside the question."""
    monkeypatch.chdir(tmp_path)
    load = lambda name: loaded(forms / f"{name}.tsv", "out")
    two, number, text = load("MMMU_DEV_VAL")
    assert "1 rows of other splits are no records" in capsys.readouterr().out
    assert [r["index"] for r in (two, number, text)] == [1, 2, 3] and two["problem_id"] == "val_1"
    asked = "Hint: Look.\nImage 1: <image>\nImage 2: <image>\nIs image 2 beside image 1?"
    assert two["problem"] == asked and two["options"][0].startswith("A. ")
    images = [Path(medium["path"]) for medium in two["media"]]
    assert images[0].parent == tmp_path / "out" / "media"
    originals = json.loads((forms / "eval_mmvu.json").read_text())
    assert [p.read_bytes() for p in images] == [(forms / r["path"]).read_bytes() for r in originals]
    assert number["answer"] == "1,200" and "\nare there?" in number["problem"]
    assert [r["problem_type"] for r in (number, text)] == ["numerical", "open-ended"]

    turned, straight = load("MMBench_DEV_EN")
    assert turned["media"] == straight["media"] and turned["problem_id"] == "1000007"
    letter, root = load("MathVerse_MINI")
    assert (letter["problem"], letter["answer"]) == ("<image>Which?", "B")
    assert letter["options"] == ["A. 1", "B. 2 (half)"] and root["problem_type"] == "math"
    listed, measure, years = load("MathVista_MINI")
    assert (listed["problem"], listed["answer"]) == ("<image>Which?", "B")
    assert listed["options"] == ["A. 3", "B. 8"]
    assert [r["problem_type"] for r in (measure, years)] == ["numerical", "open-ended"]
    assert load("MMSci_DEV_Captioning_image_only")[0]["problem_type"] == "open-ended"


def test_video_tsv_and_json_become_records(forms):
    """The three video sets that VLMEvalKit reads in forms of their own."""
    (holmes,) = loaded(forms / "Video_Holmes.json")
    (long,) = loaded(forms / "LongVideoBench.json")
    (caption,) = loaded(forms / "Video_MMLU_CAP.tsv")
    for record, folder in ((holmes, "video"), (long, "videos"), (caption, "youtube_videos")):
        assert record["media"] == [dict(type="video", path=str(forms / folder / "abc.mp4"))]
    assert (holmes["options"], holmes["answer"]) == (["A. he", "B. she"], "B")
    assert (long["options"], long["answer"]) == (["A. he", "B. she"], "A")
    assert caption["answer"] == "Who comes? Ann.\nWhen? Late."


def test_list_names_every_benchmark():
    """A benchmark without a way to get it; one of the release under a name that says otherwise."""
    said = run("evaluate.py", "--list").stdout
    for stem, row in evaluate.BENCHMARKS.items():
        line = rf"^{re.escape(row.name)} +{re.escape(stem)} .*{row.paper[0]}.*\n +(\S*)$"
        source = re.search(line, said, re.MULTILINE)[1]
        assert source.startswith(row.source) and not source.endswith("/"), stem
        assert (row.source == evaluate.HUB) == stem.startswith("eval_")
    assert said.count(".tsv\n") == 9


# --------------------------------------------------------------------------------------------------
# The judge


@contextlib.contextmanager
def serve():
    """A local OpenAI-compatible server that says what server.replies has, in order, and then "7"."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.asked.append(asked["messages"][0]["content"])
            reply = self.server.replies.pop(0) if self.server.replies else "7"
            if reply == "too late":
                time.sleep(0.6)
            body = json.dumps(dict(choices=[dict(message=dict(content=reply))]))
            status, body = reply if isinstance(reply, tuple) else (200, body)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.replies = [], []
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def server():
    with serve() as server:
        yield server


CAPTION = dict(problem="<image>Describe it.", options=[], answer="a red fox")
CAPTION |= dict(problem_type="open-ended", data_type="image")
NOTHING = "[]", '{"choices": []}', '{"choices": [{}]}'


@pytest.mark.parametrize(
    "text, score",
    [
        *[(text, 0.8) for text in ("8", "**8**", "Score: 8", "8.0", "\\boxed{8}", "8 out of 10")],
        *[(text, 0.8) for text in ("8/10.", "$\\boxed{8}$", "**Score:** 8 / 10", "Rating: 8.")],
        ("<think>9 or 10</think>\n10", 1.0),
        ("It says it all.\n\nThe score is 10.", 1.0),
        ("0", 0.0),
        *[
            (text, None)
            for text in ("11", "NaN", "great: 9", "-3", "7.5", "810", "8 or 9", "", "88")
        ],
    ],
)
def test_a_judges_reply_is_read_or_not(text, score):
    """A judge that writes **8** asked three times for nothing; 11 or "8 or 9" read as a score."""
    assert evaluate.read_score(text) == score


@pytest.mark.parametrize(
    "reply, score, wrong",
    [
        ("8", 0.8, ""),
        ("0", 0.0, ""),
        ("too late", None, "timed out"),
        ("great: 9", None, "'great: 9'"),
        ((401, "no such key"), None, "401: Unauthorized no such key"),
        *[((200, body), None, "no chat completion") for body in ("no JSON", *NOTHING)],
    ],
)
def test_judge_answers_fails_and_lies(server, reply, score, wrong):
    """A failing or babbling judge read as a score, or as 0, and nobody learns why."""
    server.replies = [reply]
    found = evaluate.ask_judge(server.url, "m", CAPTION, dict(answer="a fox"), silence=0.2)
    assert found[0] == score and wrong in found[1] and len(server.asked) == 1
    assert json.loads(server.asked[0].splitlines()[-1])["reference"] == "a red fox"


def test_judge_is_asked_once_and_its_silence_is_no_grade(server, tmp_path, capsys):
    """Paying twice for one verdict; an answer without a verdict as a 0; a verdict for other words of
    the model; verdicts of two judges in one table."""
    name, out = "MMSci_DEV_Captioning_image_only", str(tmp_path)
    records = {i: CAPTION | dict(index=i, problem_id=str(i), benchmark=name) for i in range(4)}
    answers = ["a fox", "a cow", "a hen", None]
    lines = [dict(problem_id="p", response=text, trouble=[]) for text in answers]
    lines = {i: line | dict(position=i) for i, line in enumerate(lines)}
    write_lines(f"{out}/{name}.jsonl", lines)

    def accuracies(model="m"):
        lines = stored(out, name)
        with evaluate.rewards.Grader() as grader:
            evaluate.grade(records, lines, grader, model)
        evaluate.judge_answers(records, lines, f"{out}/{name}.jsonl", server.url, model)
        for p, line in stored(out, name).items():  # a verdict is written at once
            assert line == lines[p] or "verdict" not in lines[p]
        write_lines(f"{out}/{name}.jsonl", lines)
        return [line["accuracy"] for line in lines.values()]

    server.replies = [(503, "asleep"), "no", "no"]
    assert accuracies() == [None] * 3 + [0.0] and len(server.asked) == 3
    said = capsys.readouterr().out
    assert "no verdict for 3 of 3 answers, see record 0: " in said
    found = evaluate.metrics_of(name, list(stored(out, name).values()))
    assert found["accuracy"]["value"] == 0.0 and found["accuracy"]["n"] == 1  # that says nothing
    assert accuracies() == [0.7] * 3 + [0.0] and len(server.asked) == 6
    assert accuracies() == [0.7] * 3 + [0.0] and len(server.asked) == 6  # nothing left to ask
    changed = stored(out, name)
    changed[0]["response"] = "an owl"
    write_lines(f"{out}/{name}.jsonl", changed)
    assert accuracies() == [0.7] * 3 + [0.0] and len(server.asked) == 7
    server.replies = ["5", "5", "no"]  # another judge, which is silent about one answer
    assert sorted(map(str, accuracies("other"))) == ["0.0", "0.5", "0.5", "None"]


# --------------------------------------------------------------------------------------------------
# Intervals


def column_of(values):
    """One metric that is a mean, as columns_of has it, stacked: (1, 2, n)."""
    return np.stack([values, np.ones(len(values))])[None].astype(float)


def test_interval_covers_the_truth_about_95_times_in_100():
    """An interval of the values, not of their mean; wrong percentiles (90%, or one-sided)."""
    rng, hits = np.random.default_rng(1), 0
    for i in range(300):
        means = evaluate.resampled(column_of(rng.random(60) < 0.4), f"benchmark {i}")[:, 0]
        cell = evaluate.interval(means)
        hits += cell["low"] <= 0.4 <= cell["high"]
    assert 0.91 <= hits / 300 <= 0.98


def test_resamples_are_the_same_for_a_name_and_independent_between_names():
    """One seed for all benchmarks couples their draws: the mean's interval is then wrong."""
    scores = np.random.default_rng(0).random(50)
    a, again, b = (evaluate.resampled(column_of(scores), name)[1:, 0] for name in ("a", "a", "b"))
    assert (a == again).all() and abs(np.corrcoef(a, b)[0, 1]) < 0.1


# --------------------------------------------------------------------------------------------------
# Stored outputs


def test_lines_of_several_ranks_in_one_file(tmp_path):
    """Outputs in the order of the ranks; "10" before "2"; a torn line that ends the run, or takes
    the next one with it; records with one problem id that overwrite each other."""
    path = f"{tmp_path}/a.jsonl"
    for position in (0, 10, 2, 3):
        evaluate.append(path, dict(problem_id="same", position=position, response="said"))
    with open(path, "a") as file:
        file.write('{"problem_id": "same", "posit')  # killed here
    evaluate.append(path, dict(position=12, response="new"))
    evaluate.append(path, dict(position=3, response="tried again"))
    lines = evaluate.read_lines(path, range(13))
    assert list(lines) == list(range(13)) and lines[3]["response"] == "tried again"
    answered = [position for position, line in lines.items() if line["response"]]
    assert answered == [0, 2, 3, 10, 12] and lines[1]["trouble"] == ["unanswered"]
    write_lines(path, lines)
    assert [json.loads(text) for text in open(path)] == list(lines.values())
    assert evaluate.read_lines(tmp_path / "none.jsonl") == {}


def test_ranks_do_not_write_into_each_others_lines(tmp_path):
    """Two processes that add to one file at once, long lines and many."""
    code = "import sys; sys.path.insert(0, '.'); import evaluate\nrank = int(sys.argv[1])\n"
    code += "for i in range(200): evaluate.append(sys.argv[2], dict(position=2 * i + rank, x='y' * 99_999))"
    path = f"{tmp_path}/a.jsonl"
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen([*command, str(rank), path], cwd=ROOT) for rank in (0, 1)]
    assert [each.wait() for each in both] == [0, 0]
    lines = evaluate.read_lines(path)
    assert sorted(lines) == list(range(400)) and {len(x["x"]) for x in lines.values()} == {99_999}


# --------------------------------------------------------------------------------------------------
# Comparison


def store(out, name, accuracies, **more):
    """A finished evaluation of one benchmark, as evaluate() leaves it."""
    Path(out).mkdir(exist_ok=True)
    common = dict(task="math", parts={}, trouble=[]) | more
    lines = [dict(accuracy=float(accuracy)) | common for accuracy in accuracies]
    lines = [line | dict(position=i, problem_id=str(i)) for i, line in enumerate(lines)]
    write_lines(f"{out}/{name}.jsonl", dict(enumerate(lines)))
    results = evaluate.read_object(f"{out}/results.json")
    results[name] = evaluate.metrics_of(name, lines)
    evaluate.write_whole(f"{out}/results.json", json.dumps(results))


def compared(tmp_path, **models):
    """compare of {model: {benchmark: accuracies}}."""
    for model, found in models.items():
        for name, accuracies in found.items():
            store(tmp_path / model, name, accuracies)
    folders = [str(tmp_path / model) for model in models]
    return evaluate.compare(SimpleNamespace(compare=folders, names=None, out=None))


def test_difference_is_paired_over_the_records(tmp_path):
    """Independent resamples: a model that is better on every single record looks like chance."""
    rng = np.random.default_rng(0)
    base = {name: 0.8 * (rng.random(50) < 0.5) for name in ("a", "b")}
    better = {name: accuracies + 0.02 for name, accuracies in base.items()}
    report = compared(tmp_path, base=base, better=better)
    for row in (report["mean"], *report["benchmarks"].values()):
        found = [row["differences"]["better"][key] for key in ("value", "low", "high")]
        assert found == pytest.approx([0.02, 0.02, 0.02])
    assert list(report["benchmarks"]) == ["a", "b"]
    assert list(report["mean"]["differences"]) == ["better"]
    alone = report["mean"]["models"]["base"]
    assert alone["high"] - alone["low"] > 0.1  # while each model alone is uncertain


def test_difference_of_equal_models_with_different_luck_includes_zero(tmp_path):
    """An interval that is too narrow calls luck progress."""
    luck = np.random.default_rng(3).random((2, 60, 80)) < 0.5
    found = {f"m{i}": {str(k): row for k, row in enumerate(each)} for i, each in enumerate(luck)}
    rows = [row["differences"]["m1"] for row in compared(tmp_path, **found)["benchmarks"].values()]
    assert sum(row["low"] <= 0 <= row["high"] for row in rows) >= 52


def test_mean_weighs_benchmarks_not_records(tmp_path):
    """A large benchmark drowns the small ones; RefCOCO's three files count three times; cIoU is
    averaged over images in the comparison, while results.json has the ratio of sums."""
    mean = lambda model, **found: compared(tmp_path, **{model: found})["mean"]["models"][model]
    assert mean("a", large=[0.0] * 90, small=[1.0] * 10)["value"] == 0.5
    stems = [f"eval_refcoco_{split}" for split in ("val", "testA", "testB")]
    assert evaluate.mean_of(dict.fromkeys(stems, 1.0) | {"eval_charades": 0.0}) == 0.5
    seg = "eval_seg_refcoco"
    store(tmp_path / "b", seg, [0.0, 0.0], task="segmentation-image", parts={"cIoU": (90, 100)})
    lines = stored(tmp_path / "b", seg)
    lines[1]["parts"]["cIoU"] = [0, 10]
    write_lines(f"{tmp_path}/b/{seg}.jsonl", lines)
    row = compared(tmp_path, b={})["benchmarks"][seg]
    assert row["metric"] == "cIoU" and row["models"]["b"]["value"] == pytest.approx(90 / 110)


def test_comparison_needs_the_same_records_and_names_what_it_leaves_out(tmp_path, capsys):
    """Models compared over different benchmarks or records, in silence; one without its masks."""
    seg = "eval_seg_mevis"
    a, b = {"x": [1.0, 0.0], "y": [1.0], seg: [1.0]}, {"x": [0.0, 0.0], seg: [1.0]}
    report = compared(tmp_path, a=a, b=b)
    assert report["left_out"] == [seg, "y"] and list(report["benchmarks"]) == ["x"]
    assert f"left out, since not all models have them: {seg}, y\n" in capsys.readouterr().out
    lines = {p: line | dict(problem_id="other") for p, line in stored(tmp_path / "b", "x").items()}
    write_lines(f"{tmp_path}/b/x.jsonl", lines)
    with pytest.raises(SystemExit):
        compared(tmp_path, a=a, b={})
    assert "x: the models have different records" in capsys.readouterr().err
    with pytest.raises(OSError, match="lost/results.json"):
        compared(tmp_path, a=a, lost={})


def test_compare_command_prints_and_writes(tmp_path):
    """--compare that loads a model's libraries, or whose intervals differ from results.json."""
    folders = [str(tmp_path / out) for out in ("base", "sft", "rl")]
    for out, right in zip(folders, (2, 7, 9)):
        store(out, "math", [1.0] * right + [0.0] * (10 - right))
        store(out, "ocr", [right / 10] * 10)
    code = "import sys, runpy; runpy.run_path('evaluate.py', run_name='__main__')\n"
    code += "assert not {'vllm', 'sft'} & {*sys.modules}"
    command = [sys.executable, "-c", code, "--compare", *folders, "--names", "base", "SFT", "RL"]
    command += ["--out", str(tmp_path / "report.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    above = r"SFT - base: \+50.0 \[.*\] points, paired over the records"
    assert re.search(above, said) and "RL - SFT: +20.0 [" in said
    assert re.search(r"^mean over benchmarks +mean +2 +20.0 \[", said, re.MULTILINE)
    ocr = r"^ocr +accuracy +10 +20.0 \[[^]]+\] +70.0 \[[^]]+\]\+ +90.0 \[[^]]+\]\+$"  # constant: clear
    assert re.search(ocr, said, re.MULTILINE)
    report = json.loads((tmp_path / "report.json").read_text())
    alone = evaluate.read_object(f"{tmp_path}/rl/results.json")["math"]["accuracy"]
    assert report["benchmarks"]["math"]["models"]["RL"] | dict(n=10) == alone


# --------------------------------------------------------------------------------------------------
# Around the model


def answered(monkeypatch, pairs, responses, **more):
    """evaluate.answers with responses in place of a model's, [(text, finished)] in order; and how
    many prompts each call had."""
    import rl_ema_grpo

    sizes = []

    def generate(llm, asked, seeds, n, max_tokens, tokenizer, temperature):
        assert temperature == 0 and n == 1 and len(seeds) == len(asked)
        sizes.append(len(asked))
        made = [(prompt, *responses.pop(0)) for prompt in asked]
        named = [dict(prompt=p, responses=[list(text)], finished=[end]) for p, text, end in made]
        return [SimpleNamespace(**each) for each in named]

    text_of = lambda rollout, i, tokenizer: "".join(rollout.responses[i])
    monkeypatch.setattr(rl_ema_grpo, "generate", generate)
    monkeypatch.setattr(rl_ema_grpo, "text_of", text_of)
    return list(evaluate.answers(pairs, None, None, 12, **more)), sizes


def test_chunks_are_bounded_by_count_and_by_tokens(monkeypatch):
    """256 prompts of 128 frames at once: 25 GB of pixels per rank; or the last ones are lost."""
    prompts = [SimpleNamespace(token_ids=[0] * n, record=n) for n in (5, 5, 90, 5, 5, 5, 5)]
    for start, expected in ((0, [3, 3, 1, 0]), (2, [1, 3, 1, 0])):
        pairs = [(prompt.record, prompt) for prompt in prompts[start:]]
        bounds = dict(most=3, most_tokens=50)
        made, sizes = answered(monkeypatch, pairs, [("x", True)] * 7, **bounds)
        assert [each[0] for each in made] == [record for record, _ in pairs] and sizes == expected


def test_failed_generations_are_no_answers_and_missing_media_are_zeros(monkeypatch, tmp_path):
    """The release writes a failed batch as answers, and drops what it cannot read from the mean."""
    common = dict(problem_type="numerical", data_type="image", answer="3", problem_id="p")
    records = [common | dict(index=i, benchmark="a") for i in range(5)]
    pairs = [(record, data.Prompt(record, [0], None, None, None, {})) for record in records]
    pairs[3] = records[3], data.MediaError("missing_media", "no file x.png")
    responses = [("<answer>3</answer>", True), ("", False), ("<think>3? 3.", False)]
    made, _ = answered(monkeypatch, pairs, [*responses, ("<answer>two</answer>", True)])
    lines = {r["index"]: dict(response=said, trouble=trouble) for r, said, trouble in made}
    assert sorted(lines) == [0, 2, 3, 4]  # 1 has neither ended nor used its tokens up: it failed
    write_lines(f"{tmp_path}/a.jsonl", {p: line | dict(position=p) for p, line in lines.items()})
    lines = evaluate.read_lines(f"{tmp_path}/a.jsonl", range(5))
    with evaluate.rewards.Grader() as grader:
        evaluate.grade(dict(enumerate(records)), lines, grader)
    assert [line["accuracy"] for line in lines.values()] == [1.0, None, 0.0, 0.0, 0.0]
    assert lines[2]["trouble"][0] == "cut off" and lines[4]["trouble"] == ["unreadable"]
    assert lines[3]["trouble"] == ["skipped", "missing_media"] and lines[3]["response"] is None
    metrics = evaluate.metrics_of("a", list(lines.values()))
    assert metrics["accuracy"]["n"] == 4 and metrics["accuracy"]["value"] == 1 / 4
    troubles = {"unreadable": 0.4, "cut off": 0.2, "skipped": 0.2, "unanswered": 0.2}
    assert {trouble: metrics[trouble]["value"] for trouble in troubles} == troubles
    assert evaluate.headline_metric("a", metrics)[1].startswith("1 of 5 have no accuracy")


def test_masks_of_what_was_read_as_the_answer_before_are_dropped(tmp_path):
    """After a change of the reader: the masks of the old answer counted as those of the new one."""
    record = dict(problem_type="segmentation", data_type="image", answer="{}")
    records = {i: record | dict(index=i, benchmark="a", problem_id="p") for i in range(2)}
    lines = {}
    for i, said in enumerate(("read", "read otherwise")):
        masks = dict(answer=said, parts=dict(gIoU=0.5))
        lines[i] = dict(position=i, response="read", trouble=[], masks=masks)
    with evaluate.rewards.Grader() as grader:
        evaluate.grade(records, lines, grader)
    for i, kept in enumerate((True, False)):
        assert ("masks" in lines[i]) == ("gIoU" in lines[i]["parts"]) == kept


def test_each_benchmark_is_asked_as_the_release_asks_it(toy, processor):
    """GOT-10k with 128 frames; a system prompt where the release has none; two frames a second of a
    benchmark for which the release takes 128, whatever the length."""
    limits, seen = data.Limits(fps=1.0), {}
    record = loaded(toy / "eval" / "tracking.json")[0]  # 8 seconds, 4 frames each
    for name in ("eval_got10k", "Video_Holmes", "mine"):
        asked = record | dict(benchmark=name)
        prompt = evaluate.prompt_of(asked, processor, limits, data.PROMPTS, "Think twice.")
        frames = prompt.vllm["multi_modal_data"]["video"][0][0]
        seen[name] = len(frames), "Think twice." in prompt.vllm["prompt"]
    assert seen == {"eval_got10k": (8, False), "Video_Holmes": (32, True), "mine": (8, True)}


@pytest.fixture
def request_of(toy, tmp_path, monkeypatch):
    """Arguments of a run over one small file."""
    (tmp_path / "media.png").write_bytes(b"")
    record = dict(problem_type="math", problem="1 + 1?", data_type="image", path="media.png")
    (tmp_path / "math.json").write_text(json.dumps([record | dict(solution="2")]))
    shutil.copytree(toy / "model", tmp_path / "model")

    def make(**changes):
        command = ["evaluate.py", "--model", tmp_path / "model", "--data", tmp_path / "math.json"]
        monkeypatch.setattr(sys, "argv", [*map(str, command), "--out", str(tmp_path / "out")])
        args = evaluate.parse_args()
        for name, value in changes.items():
            setattr(args, name, value)
        return args

    return make


def refused(args, capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.check(args)
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.count("\n") == 1
    return message


def test_wrong_input_is_refused_in_one_sentence(request_of, tmp_path, capsys):
    """Wrong input that shows after the model has been loaded, or as a traceback."""
    evaluate.check(request_of())

    def file(name, content):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return str(tmp_path / name)

    said = lambda **changes: refused(request_of(**changes), capsys)
    assert "no folder of a model" in said(model=str(tmp_path / "nothing"))
    assert "none.json" in said(data=[str(tmp_path / "none.json")])
    twice = [
        str(tmp_path / "math.json"),
        file("more/math.json", (tmp_path / "math.json").read_text()),
    ]
    assert "a second file of 'math'" in said(data=twice)
    turns = [dict(role="user", content="?"), dict(role="assistant", content="!")]
    assert "SFT records" in said(data=[file("sft.json", [dict(messages=turns, data_type="text")])])
    assert "math.json: no medium exists, " in said(media_root=str(tmp_path / "elsewhere"))
    assert "goes with" in said(judge_url="http://x/v1")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)  # whose args.json would be overwritten
    assert "a training run's folder" in said(out=str(tmp_path / "run"))
    for sam2 in ("nowhere", str(tmp_path), f"{tmp_path}/sam2"):
        assert f"{sam2}: no folder of a model, and no hub id" in said(sam2=sam2)
    assert "record 0: cannot be read: KeyError('question')" in said(
        data=[file("Video_Holmes.json", '{"a": 1}')]
    )
    choice = f"index\tquestion\tanswer\timage\tA\tB\n1\t?\tD\t{100 * 'A'}\tx\ty\n"
    assert "record 0: answer 'D' is none of the options" in said(data=[file("c.tsv", choice)])
    for row, sentence in (
        ("1\t?\tB\t7", "base64"),
        ("1\t?\tB\t" + 100 * "!", "base64"),
        ("1\t?\t\t" + 100 * "A", "answer"),
    ):
        text = f"index\tquestion\tanswer\timage\n{row}\n"
        message = said(data=[file("rows.tsv", text)])
        assert "rows.tsv: record 0: " in message and sentence in message


def test_a_folder_never_mixes_two_models_or_settings(request_of, tmp_path, capsys):
    """A rerun with other weights, prompts or limits goes on in the old folder."""
    settings = evaluate.check(request_of())[1]
    (tmp_path / "out").mkdir()
    note = lambda settings: (tmp_path / "out" / "settings.json").write_text(json.dumps(settings))
    note(settings)
    evaluate.check(request_of(workers=9))  # what does not change answers may change
    changes = dict(max_response_tokens=5, max_frames=2)
    assert "other limits, max_response_tokens:" in refused(request_of(**changes), capsys)
    (tmp_path / "system.txt").write_text("Think.")
    assert "other system:" in refused(request_of(system=f"{tmp_path}/system.txt"), capsys)
    evaluate.check(request_of(judge_url="http://x/v1", judge_model="a"))  # a judge may come later
    (tmp_path / "model" / "args.json").write_text("{}")  # which a training run rewrites
    evaluate.check(request_of())
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(bytes(len(weights.read_bytes())))  # the same size, trained on
    assert "other model:" in refused(request_of(), capsys)
    text = (tmp_path / "math.json").read_text()
    (tmp_path / "math.json").write_text(text.replace("1 + 1", "1 + 2"))
    assert "other math data:" in refused(request_of(regrade=True), capsys)


# --------------------------------------------------------------------------------------------------
# Whole runs


# A model that knows the truth, and errs in every other record: the rest of the run is real. Runs one
# after another, each in a process of its own: out, and `stage:k` to be killed while it writes the
# k-th line of that stage, or `^C:k` to be interrupted then.
ORACLE = """
import json, os, signal, sys, types
sys.path.insert(0, os.getcwd())
import cpu_compat
import evaluate, rl_ema_grpo, sft, transformers
from rewards import truth_of

class Engine:
    def __getattr__(self, name): return self
    def __call__(self, *_): pass

def generate(llm, prompts, seeds, n, max_tokens, tokenizer, temperature):
    made = []
    for prompt in prompts:
        record = prompt.record
        said = truth_of(record)
        said = said if record["index"] % 2 == 0 else said.replace("5", "6").replace("A", "B")
        thought = f"<think>{record['problem_id']} <script>alert(1)</script></think>"
        ids = tokenizer(f"{thought}<answer>{said}</answer>")["input_ids"] + [0]
        made.append(types.SimpleNamespace(prompt=prompt, responses=[ids], finished=[True]))
    return made

def run(out, stage, left):
    def append(path, line):
        nonlocal left
        here = "judge" if "verdict" in line else "mask" if "masks" in line else "answer"
        left -= here == stage or stage == "^C"
        if left == 0 and stage == "^C":
            os.kill(os.getpid(), signal.SIGINT)
        if left == 0 and here == stage:
            with open(path, "a") as file:
                file.write("\\n" + json.dumps(line)[:40])
            os._exit(9)
        write(path, line)

    write, evaluate.append = evaluate.append, append
    sys.argv[1:] = [*common, "--out", out]
    sys.stdout = open(f"{out}.txt" if os.environ.get("RANK", "0") == "0" else os.devnull, "w")
    evaluate.evaluate(evaluate.parse_args())

rl_ema_grpo.generate, rl_ema_grpo.make_engine = generate, lambda *_, **__: Engine()
runs, common = json.loads(sys.argv[1]), sys.argv[2:]
for out, die in runs:
    if not (child := os.fork()):
        stage, _, left = die.partition(":")
        sys.exit(run(out, stage, int(left or 0)))
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended == (130 if die.startswith("^C") else 9 if die else 0), (out, die, ended)
"""


def run_oracle(toy, forms, folder, outs, ranks=0):
    """The oracle over all forms, once for each (folder of outputs, where to die) -> its stderr."""
    (folder / "oracle.py").write_text(ORACLE)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    outs = json.dumps([(str(folder / out), die) for out, die in outs])
    command = [*torchrun * bool(ranks), folder / "oracle.py", outs, "--model", toy / "model"]
    command += ["--data", *sorted(p for p in forms.iterdir() if p.suffix in (".json", ".tsv"))]
    command += ["--sam2", folder / "sam2", "--workers", 0, "--dtype", "float32"]
    with serve() as server:
        command += ["--judge-url", server.url, "--judge-model", "m"]
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True,
            env=os.environ | dict(no_proxy="127.0.0.1"), timeout=300,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.fixture(scope="module")
def runs(toy, forms, tmp_path_factory):
    """All forms through one command, in folder whole; and once more in folder cut, killed three
    times, stopped by Ctrl-C, and brought to its end by two ranks, with an image that was missing."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_sam2(folder / "sam2")
    deaths = ["answer:7", "^C:4", "mask:2", "judge:2"]
    outs = [("whole", ""), *(("cut", death) for death in deaths)]
    (folder / "said").write_text(run_oracle(toy, forms, folder, outs))
    (forms / "late").mkdir()  # the image that was not there
    shutil.copy(next((forms / "media").glob("*.png")), forms / "late" / "lost.png")
    run_oracle(toy, forms, folder, [("cut", "")], ranks=2)
    return folder


def outputs(out):
    """What a run leaves, without the benchmark of which an image was missing."""
    found = {path.name: path.read_text() for path in out.glob("*.jsonl") if path.stem != "mine"}
    return found | dict(results=evaluate.read_object(f"{out}/results.json") | dict(mine=None))


def test_interrupted_four_times_the_result_is_the_same(runs):
    """A rerun that loses, repeats or mixes answers, masks or verdicts; a torn line that ends it."""
    whole, resumed = ((runs / f"{out}.txt").read_text() for out in ("whole", "cut"))
    assert outputs(runs / "whole") == outputs(runs / "cut")
    assert "\n1 records to answer on 2 ranks" in "\n" + resumed
    results = json.loads((runs / "whole" / "results.json").read_text())
    assert len(results) == 17 and "mean over 17 benchmarks" in whole and "not in the" not in whole
    assert results["eval_got10k"]["AO"]["n"] == 2 and "J&F (DAVIS)" in results["eval_seg_mevis"]
    captions = results["MMSci_DEV_Captioning_image_only"]["accuracy"]
    assert captions["value"] == pytest.approx(0.7)


def test_ctrl_c_ends_in_one_line(runs):
    """A traceback of 40 lines, and nobody knows whether the answers are saved."""
    said = (runs / "said").read_text()
    line = f"evaluate.py: stopped; the same command goes on from {runs}/cut\n"
    assert said.count("evaluate.py: stopped") == 1 and line in said and "Traceback" not in said


def test_a_record_without_its_medium_counts_0_and_is_tried_again(runs):
    """An image that was not there: dropped from the mean, or a 0 for good although it is there now."""
    before, after = stored(runs / "whole", "mine"), stored(runs / "cut", "mine")
    assert before[2]["trouble"] == ["skipped", "missing_media"] and before[2]["accuracy"] == 0
    assert after[2]["trouble"] == [] and after[2]["accuracy"] > 0
    assert [before[0], before[1]] == [after[0], after[1]]


def test_regrading_gives_the_same_grades_without_a_model(runs, tmp_path, capsys):
    """Grades that a rerun cannot restore; masks and verdicts thrown away with them; a folder without
    answers that ends in a traceback, or in "written to" with nothing written."""
    out = shutil.copytree(runs / "whole", tmp_path / "whole")
    for name in ("eval_charades", "MathVerse_MINI", "eval_seg_mevis"):
        spoilt = dict(accuracy=0.25, trouble=["unreadable"])
        lines = {p: line | spoilt for p, line in stored(out, name).items()}
        write_lines(f"{out}/{name}.jsonl", lines)
    paths = json.loads((out / "args.json").read_text())["data"]
    done = run("evaluate.py", "--regrade", "--data", *paths, "--out", out)
    assert outputs(out) == outputs(runs / "whole") and "mean over 17 benchmarks" in done.stdout
    with pytest.raises(SystemExit):
        evaluate.sum_up(SimpleNamespace(out=str(tmp_path / "no")), {"a": {}})
    assert "no holds no answers to a\n" in capsys.readouterr().err


def test_nothing_in_the_report_is_code(runs):
    """A model that writes a script into its answer, and the reader's browser runs it; a page that
    needs a network; a report of which nobody knows what it is about."""
    page = (runs / "whole" / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    bare = re.sub('base64,[^"]+', "", page)
    links = re.findall('(?:src|href)="?([^">]*)', bare)
    assert links and all(link.startswith("data:") for link in links) and "http" not in bare
    assert bare.count("<article") == bare.count("<details>") > 25
    assert bare.count("skipped; missing_media") == 1
    assert re.search(r"<pre>\d+ \w+ 20\d\d, /.*/whole\n", bare)


def test_every_form_goes_through_with_a_real_engine(toy, forms, tmp_path):
    """Forms that load but that the engine does not take: several images, a video beside an image."""
    counts = dict(MMMU_DEV_VAL=3, Video_Holmes=1, eval_videomathqa=2, eval_got10k=2, eval_stvg=2)
    counts |= dict(eval_refcoco_val=2, eval_seg_refcoco=2, Video_MMLU_CAP=1)
    files = [next(forms.glob(f"{name}.*")) for name in counts]
    settings = (
        "--dtype float32 --workers 1 --max-prompt-tokens 900 --max-response-tokens 16".split()
    )
    command = ["--model", toy / "model", "--data", *files, "--out", tmp_path, *settings]
    result = run("evaluate.py", *command, "--image-min-pixels", 4096)
    results = json.loads((tmp_path / "results.json").read_text())
    assert {name: metrics["unreadable"]["n"] for name, metrics in results.items()} == counts
    for metrics in results.values():
        assert not metrics["skipped"]["value"]
    assert "not in the mean: eval_seg_refcoco: 2 of 2 have no cIoU" in result.stdout
    assert (tmp_path / "report.html").exists()
