"""evaluate.py: metrics, intervals, reading of benchmarks, stored outputs, judge, masks, report, comparison, whole runs."""

import argparse
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
    record = dict(
        problem_type=kind,
        data_type="image",
        answer=truth if isinstance(truth, str) else json.dumps(truth),
    )
    answer = answer if isinstance(answer, str) or answer is None else json.dumps(answer)
    parts = evaluate.parts_of(task, record, answer)
    accuracy = evaluate.rewards.accuracy(record, answer)
    return dict(
        problem_id="p",
        position=position,
        task=task,
        accuracy=accuracy,
        parts=parts,
        trouble=[],
        **more,
    )


def values(name, lines):
    return {metric: cell["value"] for metric, cell in evaluate.metrics_of(name, lines).items()}


# ----------------------------------------------------------------------------------------------------------------------
# Metrics


def test_recall_counts_a_tie_and_miou_counts_everything():
    """R@t as IoU > t, or mIoU over the readable answers only, gives other numbers than the papers'."""
    truth = {"time": [0, 10]}
    answers = [{"time": [0, 10]}, {"time": [0, 5]}, {"time": [0, 3]}, "not JSON", None]
    found = values("charades", [line_of("temporal grounding", truth, answer) for answer in answers])
    assert (found["R@0.3"], found["R@0.5"], found["R@0.7"]) == (0.6, 0.4, 0.2)
    assert found["mIoU"] == pytest.approx(1.8 / 5) and found["accuracy"] == pytest.approx(1.8 / 5)


def test_box_iou_of_spatial_grounding():
    """The release's evaluation crashes on box IoU; a malformed box must be a 0, not an end."""
    truth = {"boxes": [0, 0, 100, 100]}
    answers = [
        {"boxes": [0, 0, 100, 100]},
        {"boxes": [0, 50, 100, 150]},
        {"boxes": [1, 2]},
        {"boxes": "x"},
        [1],
        "{}",
    ]
    found = values("refcoco", [line_of("spatial grounding", truth, answer) for answer in answers])
    assert found["R@0.5"] == pytest.approx(1 / 6) and found["mIoU"] == pytest.approx(
        (1 + 1 / 3) / 6
    )
    assert "AO" not in found and "R@0.3" not in found


def test_spatial_temporal_boxes_over_true_and_over_shared_seconds():
    """One right box of five scores as five in the release (m_sIoU); m_vIoU must not, and the two must not be swapped."""
    box = [0, 0, 10, 10]
    truth = {"time": [0, 4], "boxes": {str(second): box for second in range(5)}}
    found = values(
        "stvg",
        [line_of("spatial-temporal grounding", truth, {"time": [0, 2], "boxes": {"0": box}})],
    )
    assert found["m_sIoU"] == found["sIoU@0.5"] == 1.0 and found["m_vIoU"] == 0.2
    assert found["m_tIoU"] == 0.5 and found["tIoU@0.5"] == 1.0 and found["accuracy"] == 0.35


def test_tracking_recall_is_per_sequence():
    """R@t over frames instead of sequences: here 3 of 4 frames are right, but only one sequence of two passes 0.7."""
    box, off = [0, 0, 10, 10], [50, 50, 60, 60]
    truth = {"boxes": {"1": box, "2": box}}
    lines = [
        line_of("tracking", truth, {"boxes": {"1": box, "2": second}}) for second in (box, off)
    ]
    found = values("got10k", lines)
    assert (found["AO"], found["R@0.3"], found["R@0.5"], found["R@0.7"]) == (0.75, 1.0, 1.0, 0.5)
    missing = values("got10k", [line_of("tracking", truth, {"boxes": {"1": box}})])
    assert missing["AO"] == 0.5  # a second without a box counts 0


def test_success_rate_is_per_frame_and_the_given_box_can_be_left_out():
    """The box that the question gives counted as a success of the model; SR averaged over sequences, long or short."""
    box, off = [0, 0, 10, 10], [50, 50, 60, 60]
    long = {"boxes": {str(k): box for k in range(1, 5)}}  # 4 frames, of which the last is missed
    short = {"boxes": {"1": box, "2": box}}  # 2 frames, of which the second is missed
    lines = [
        line_of("tracking", long, {"boxes": {**long["boxes"], "4": off}}),
        line_of("tracking", short, {"boxes": {"1": box}}),
    ]
    found = evaluate.metrics_of("got10k", lines)
    value = {metric: cell["value"] for metric, cell in found.items()}
    assert value["SR@0.5"] == pytest.approx(4 / 6) and value[
        "SR@0.5, given box left out"
    ] == pytest.approx(2 / 4)
    assert value["AO"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert value["AO, given box left out"] == pytest.approx((2 / 3 + 0) / 2)
    assert value["R@0.5"] == 1.0 and value["R@0.5, given box left out"] == 0.5
    alone = evaluate.metrics_of(
        "got10k", [*lines, line_of("tracking", {"boxes": {"1": box}}, {"boxes": {"1": box}})]
    )
    assert (
        alone["AO, given box left out"]["n"] == 2
    )  # a sequence of nothing but the given box has no say there
    assert alone["AO, given box left out"]["value"] == value["AO, given box left out"]


def test_segmentation_accuracy_is_not_its_box():
    """The box alone reported as accuracy: an answer with a right box but without points has accuracy 0."""
    found = values(
        "seg", [line_of("segmentation-image", {"boxes": [0, 0, 9, 9]}, {"boxes": [0, 0, 9, 9]})]
    )
    assert found["box_mIoU"] == 1.0 and found["accuracy"] == 0.0


def test_a_file_with_two_tasks_keeps_their_metrics_apart():
    """mIoU of times and mIoU of boxes averaged into one number when a file mixes tasks."""
    lines = [
        line_of("temporal grounding", {"time": [0, 10]}, {"time": [0, 5]}),
        line_of("spatial grounding", {"boxes": [0, 0, 10, 10]}, {"boxes": [0, 0, 10, 10]}),
        line_of("multiple choice", "B", "B"),
    ]
    results = evaluate.metrics_of("mixed", lines)
    assert (
        results["mIoU (temporal grounding)"]["value"] == 0.5
        and results["mIoU (spatial grounding)"]["value"] == 1.0
    )
    assert "mIoU" not in results and results["mIoU (spatial grounding)"]["n"] == 1
    assert results["accuracy"]["value"] == pytest.approx(2.5 / 3) and results["accuracy"]["n"] == 3


def test_troubles_are_counted():
    """Unreadable, cut off and skipped records that vanish from the report."""
    lines = [
        line_of("multiple choice", "B", "B"),
        line_of("multiple choice", "B", None) | dict(trouble=["skipped", "x"]),
    ]
    lines.append(line_of("multiple choice", "B", "?") | dict(trouble=["cut off", "unreadable"]))
    found = values("mmvu", lines)
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["unreadable"] == found["cut off"] == found["skipped"] == pytest.approx(1 / 3)


def test_the_table_is_the_papers():
    """A wrong digit, a benchmark lost, or another metric in the mean than in the paper's: its ablation table has the means
    of task families, to one digit, and they must come out of the numbers of its benchmarks."""
    families = {  # OneThinker-8B (EMA-GRPO); Qwen3-VL-8B where all of its numbers are known
        ("multiple choice",): (69.8, 65.0),
        ("temporal grounding",): (49.7, 30.8),
        ("spatial grounding",): (89.2, None),
        ("spatial-temporal grounding",): (38.1, 19.5),
        ("tracking",): (73.0, 33.7),
        ("segmentation-image", "segmentation-video"): (64.2, None),
    }
    for tasks, expected in families.items():
        files = {stem: row for stem, row in evaluate.BENCHMARKS.items() if row.task in tasks}
        weights = evaluate.weights_of(list(files))
        for i in range(2):
            numbers = [row.paper[own_of(stem)][i] for stem, row in files.items()]
            mean = None if None in numbers else np.average(numbers, weights=weights)
            assert mean == expected[i] or abs(mean - expected[i]) < 0.101, (
                tasks,
                mean,
                expected[i],
            )
    assert len({(row.name) for row in evaluate.BENCHMARKS.values()}) == 31
    for (
        stem,
        row,
    ) in evaluate.BENCHMARKS.items():  # every number of the paper has a metric of exactly that name
        known = {"accuracy", "circular accuracy"}
        known |= evaluate.parts_of(row.task, dict(answer="{}"), None).keys() | {
            "cIoU",
            "J",
            "F",
            "J&F",
        }
        assert row.paper.keys() <= known and row.task in evaluate.CONVENTIONS, stem


def own_of(stem):
    row = evaluate.BENCHMARKS[stem]
    return evaluate.own_metric(stem, [dict(task=row.task)], row.paper)


def test_the_mean_leaves_out_by_name_what_has_no_grade():
    """The release counts segmentation as 0 in its mean; a caption set without a judge must not count either."""
    cell = lambda value: dict(value=value, low=value, high=value, n=4)
    clean = {"not judged": cell(0.0), "failed": cell(0.0)}
    results = {
        "eval_charades": {"accuracy": cell(0.1), "mIoU": cell(0.6), **clean},
        "eval_seg_mevis": {"accuracy": cell(0.9), **clean},  # of the prompts: no masks yet
        "eval_seg_refcoco": {"accuracy": cell(0.9), "cIoU": cell(0.4), **clean},
        "Video_MMLU_CAP": clean | {"not judged": cell(0.5)},
    }
    owns = dict(zip(results, ("mIoU", "J&F", "cIoU", "accuracy")))
    said = evaluate.table_of(results, owns).splitlines()
    assert "mean over 2 benchmarks, each by its own *: 50.0" in said
    assert said[-2:] == [
        "not in the mean: eval_seg_mevis: no J&F without --sam2",
        "not in the mean: Video_MMLU_CAP: 2 not judged (see --judge-url)",
    ]


def test_circular_accuracy_wants_every_order_of_the_options():
    """MMBench's rows counted one by one, where the paper's number needs all orders of a question right."""
    rows = [("7", 1.0), ("1000007", 0.0), ("8", 1.0), ("2000008", 1.0), ("1000008", 1.0)]
    lines = [line_of("multiple choice", "B", "B", i) for i in range(len(rows))]
    lines = [
        line | dict(problem_id=index, accuracy=right) for line, (index, right) in zip(lines, rows)
    ]
    found = evaluate.metrics_of("MMBench_DEV_EN", lines)
    assert (found["accuracy"]["value"], found["accuracy"]["n"]) == (0.8, 5)
    assert (found["circular accuracy"]["value"], found["circular accuracy"]["n"]) == (0.5, 2)


# ----------------------------------------------------------------------------------------------------------------------
# Masks


def davis_f(p, y):
    """F by another way: contours by comparing shifted copies, the tolerance by a distance transform."""
    contours = []
    for mask in (p, y):
        right, below, both = (
            ndimage.shift(mask.astype(int), by, order=0, mode="nearest")
            for by in ((0, -1), (-1, 0), (-1, -1))
        )
        contours.append((mask != right) | (mask != below) | (mask != both))
    return f_measure(
        *contours,
        lambda contour, r: ndimage.distance_transform_edt(~contour) <= r,
        math.ceil(0.008 * np.linalg.norm(p.shape)),
    )


def paper_f(p, y):
    contours = [
        mask & ~ndimage.binary_erosion(mask, np.ones((3, 3)), border_value=0) for mask in (p, y)
    ]
    grow = lambda contour, r: ndimage.binary_dilation(contour, np.ones((2 * r + 1, 2 * r + 1)))
    return f_measure(*contours, grow, max(1, round(0.0075 * np.linalg.norm(p.shape))))


def f_measure(p, y, grow, r):
    if not p.any() or not y.any():
        return float(not p.any() and not y.any())
    precision, recall = grow(y, r)[p].mean(), grow(p, r)[y].mean()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_j_and_f_are_those_of_scipy():
    """A contour that lacks the picture's edge, a square for a disk, a tolerance rounded the other way: F off by percents."""
    rng = np.random.default_rng(0)
    sizes = [(5, 7), (40, 30), (1, 9), (100, 180), (240, 427), (301, 300), (480, 854)]
    for size in sizes * 3:
        grain = ndimage.gaussian_filter(rng.normal(size=(2, *size)), (0, *rng.uniform(0, 6, 2)))
        p, y = grain > np.quantile(grain, rng.choice([0.3, 0.9, 0.99]))
        if rng.random() < 0.3:
            y = np.roll(p, rng.integers(0, 9, 2), (0, 1))
        assert evaluate.boundary_f(p, y, davis=True) == pytest.approx(davis_f(p, y), abs=1e-6), size
        assert evaluate.boundary_f(p, y, davis=False) == pytest.approx(paper_f(p, y), abs=1e-6), (
            size
        )
        union = ndimage.binary_dilation(p, np.zeros((3, 3))) | p | y
        j = (p & y).sum() / union.sum() if union.any() else 1.0
        assert evaluate.jaccard(p, y, empty=1.0) == pytest.approx(j, abs=1e-6)


def test_empty_masks_are_where_the_two_conventions_part():
    """An object that is rightly said to be absent: J is 1 by DAVIS, 0 in the paper's figures; F is 1 in both."""
    none, some = np.zeros((20, 30), bool), np.zeros((20, 30), bool)
    some[5:9, 5:9] = True
    assert [evaluate.jaccard(none, none, empty) for empty in (1.0, 0.0)] == [1.0, 0.0]
    for davis in (True, False):
        assert (
            evaluate.boundary_f(none, none, davis) == 1.0
            and evaluate.boundary_f(some, some, davis) == 1.0
        )
        assert (
            evaluate.boundary_f(none, some, davis) == evaluate.boundary_f(some, none, davis) == 0.0
        )


def test_ciou_is_cumulative_and_giou_is_not():
    """cIoU as a mean of IoUs, or its interval from resampled IoUs: here one large picture outweighs nine small ones."""
    pairs = [(900, 1000)] + [(0, 10)] * 9
    common = dict(problem_id="p", task="segmentation-image", accuracy=0.0, trouble=[])
    parts = [{"box_mIoU": 0.0, "cIoU": [i, u], "gIoU": i / u} for i, u in pairs]
    lines = [common | dict(position=k, parts=part) for k, part in enumerate(parts)]
    found = evaluate.metrics_of("eval_seg_refcoco", lines)
    assert found["cIoU"]["value"] == pytest.approx(900 / 1090) and found["gIoU"][
        "value"
    ] == pytest.approx(0.09)
    assert found["cIoU"]["low"] == 0.0 and found["cIoU"]["high"] == pytest.approx(
        2700 / 3070
    )  # three draws of the large one
    lines[3]["parts"] = dict(box_mIoU=0.0)  # SAM2 has not come to it yet
    assert "cIoU" not in evaluate.metrics_of("eval_seg_refcoco", lines)


def segmentation_records(toy, name, count=2):
    records = list(
        evaluate.load_benchmark(str(toy / "eval" / f"{name}.json"), None, "nowhere").values()
    )[:count]
    lines = [
        dict(problem_id="p", position=r["index"], response=r["answer"], trouble=[]) for r in records
    ]
    return list(zip(records, lines))


def test_masks_meet_the_truth_in_its_own_size_and_at_its_own_frames(toy, monkeypatch):
    """Masks of the picture's size compared with a truth of another; frames of a video counted from 1, or a prompt on
    the wrong one; an answer without a prompt that vanishes instead of scoring 0."""
    images, videos = (
        segmentation_records(toy, "segmentation_image"),
        segmentation_records(toy, "segmentation_video"),
    )
    for record, _ in images:
        twice = np.kron(evaluate.true_masks(record)[0], np.ones((2, 2)))
        record["segmentation_output"]["segmentation_rle"] = evaluate.encode_mask(twice)
    truth = [evaluate.true_masks(record) for record, _ in images + videos]
    prompts = []

    def segment_images(sam2, items):  # a perfect SAM2, at the size of what it is given
        masks = [
            truth[k][0] if marks.boxes else np.zeros_like(truth[k][0])
            for k, (_, marks) in enumerate(items)
        ]
        return [
            np.asarray(Image.fromarray(mask).resize(image.size))
            for mask, (image, _) in zip(masks, items)
        ]

    def segment_video(sam2, frames, index, marks):
        prompts.append(index)
        assert frames.shape == (32, 64, 64, 3)
        return np.stack([truth[2 + len(prompts) - 1][k] for k in range(32)])

    monkeypatch.setattr(evaluate, "segment_images", segment_images)
    monkeypatch.setattr(evaluate, "segment_video", segment_video)
    images[1][1]["response"], images[1][0]["media"] = None, [dict(type="image", path="lost.png")]
    done = []
    evaluate.add_image_masks(images, None, lambda record, line: done.append(line))
    for record, line in videos:
        evaluate.add_video_masks(record, line, None, lambda record, line: done.append(line))
    assert done[0]["masks"]["parts"]["cIoU"] == [truth[0][0].sum()] * 2
    assert done[1]["masks"]["parts"]["cIoU"] == [0, truth[1][0].sum()]
    assert prompts == [
        4 * json.loads(record["answer"])["time"] for record, _ in videos
    ]  # 4 frames a second
    for line, masks in zip(done[2:], truth[2:]):
        absent = np.mean([not mask.any() for mask in masks.values()])
        parts, frames = line["masks"]["parts"], line["masks"]["frames"]
        assert parts["J (DAVIS)"] == parts["F (DAVIS)"] == parts["F"] == 1.0
        assert 0 < absent < 1 and parts["J"] == pytest.approx(
            1 - absent
        )  # absent objects are 0 in the paper
        assert all((evaluate.decode_mask(rle) == masks[int(k)]).all() for k, rle in frames.items())


def test_frames_of_a_segmentation_are_those_of_its_seconds(toy):
    """Frame k taken from the list of decoded frames, which is right only if the film has the truth's frame rate."""
    record = segmentation_records(toy, "segmentation_video", 1)[0][0]
    all_frames = evaluate.frames_at(record, 40, (64, 64))
    slow = evaluate.frames_at(
        record | dict(fps=1), 8, (64, 64)
    )  # the film itself has 4 a second, 8 seconds
    assert (slow == all_frames[0:32:4]).all() and (all_frames[31:] == all_frames[31]).all()
    truth = evaluate.true_masks(record)
    colour = dict(
        red=(230, 40, 40), green=(40, 200, 70), blue=(60, 90, 255), yellow=(240, 220, 50)
    )[record["problem"].split()[2]]
    for (
        k,
        mask,
    ) in truth.items():  # the truth's mask lies on the object in the very frame that goes to SAM2
        if mask.any():
            assert np.abs(all_frames[k][mask].mean(0) - colour).max() < 40, k


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def make_forms(toy, out, count=2):
    """A folder with one small file per form of the paper's benchmarks, out of the toy world's held-out records."""
    out.mkdir()
    (out / "media").symlink_to(toy / "eval" / "media")
    read = lambda name: json.loads((toy / "eval" / f"{name}.json").read_text())[:count]
    truth = lambda record: record["solution"].removeprefix("<answer>").removesuffix("</answer>")
    code = lambda record: base64.b64encode((toy / "eval" / record["path"]).read_bytes()).decode()
    question = lambda record: record["problem"].replace("<image>", "")
    letters = lambda record: {option[0]: option[3:] for option in record["options"]}

    def write_tsv(stem, rows):
        with open(out / f"{stem}.tsv", "w", newline="") as file:
            writer = csv.DictWriter(
                file, list(dict.fromkeys(key for row in rows for key in row)), delimiter="\t"
            )
            writer.writeheader()
            writer.writerows(rows)

    copied = dict(
        eval_refcoco_val="spatial_grounding",
        eval_charades="temporal_grounding",
        eval_got10k="tracking",
    )
    copied |= dict(
        eval_stvg="spatial_temporal_grounding", eval_mmvu="multiple_choice", mine="open_ended"
    )
    for stem, name in (
        copied | dict(eval_seg_refcoco="segmentation_image", eval_seg_mevis="segmentation_video")
    ).items():
        (out / f"{stem}.json").write_text(json.dumps(read(name)))
    lost = dict(
        read("open_ended")[0], path="late/lost.png"
    )  # one record whose picture is not there yet
    (out / "mine.json").write_text(json.dumps([*read("open_ended"), lost]))
    film, choice, number = (
        read("temporal_grounding")[0],
        read("multiple_choice"),
        read("numerical")[0],
    )
    both = dict(
        choice[0], data_type="video-image", path=film["path"], additional_path=choice[0]["path"]
    )
    (out / "eval_videomathqa.json").write_text(json.dumps([both, both]))  # one id twice
    two = dict(
        question="Is <image 2> beside <image 1>?",
        image=str([code(choice[0]), code(choice[1])]),
        hint="Look.",
    )
    val = dict(split="validation", question="Who?", image=code(number))
    write_tsv("MMMU_DEV_VAL", [
        dict(index="dev_1", split="dev", question="?", image=code(number), answer="A", **letters(choice[0])),
        val | dict(index="val_1", answer=truth(choice[0]), **two, **letters(choice[0])),
        val | dict(index="val_2", question='How "many"\nare there?', answer="1,200"),
        val | dict(index="val_3", answer="a red fox"),
    ])  # fmt: skip
    write_tsv("MMBench_DEV_EN", [
        dict(index="1000007", question="Turned", image="7", answer="B", A="x", B="y"),
        dict(index="7", question=question(choice[0]), image=code(choice[0]), answer=truth(choice[0]), **letters(choice[0])),
    ])  # fmt: skip
    write_tsv("MathVerse_MINI", [
        dict(index="1", question="Choices:\nA:1\nB:2", image=code(number), answer="B", question_type="multi-choice"),
        dict(index="2", question="What?", image=code(number), answer="$\\sqrt{3}$", question_type="free-form"),
    ])  # fmt: skip
    write_tsv("MathVista_MINI", [
        dict(index="1", question="Which?\nChoices:\n(A) 3\n(B) 8", image=code(number), choices="['3', '8']", answer="8", answer_option="B"),
        dict(index="2", question="How far?", image=code(number), choices="", answer="0.6", answer_option="0.6"),
    ])  # fmt: skip
    captions = [
        dict(index=str(i), question="Describe.", image=code(r), caption=truth(r))
        for i, r in enumerate(read("open_ended"))
    ]
    write_tsv("MMSci_DEV_Captioning_image_only", captions)
    for folder in ("video", "videos", "youtube_videos"):
        (out / folder).mkdir()
        shutil.copy(toy / "eval" / film["path"], out / folder / "abc.mp4")
    holmes = {
        "video ID": "abc",
        "Question ID": "q",
        "Question": "Who?",
        "Options": {"A": "he", "B": "she"},
        "Answer": "B",
    }
    (out / "Video_Holmes.json").write_text(json.dumps([holmes]))
    (out / "LongVideoBench.json").write_text(
        json.dumps(
            [dict(video_path="abc.mp4", question="?", candidates=["he", "she"], correct_choice=0)]
        )
    )
    pairs = [
        dict(question="Who comes?", answer="A triangle."),
        dict(question="When?", answer="Late."),
    ]
    write_tsv(
        "Video_MMLU_CAP", [dict(index="0", video="abc.mp4", question=str(pairs), discipline="Math")]
    )
    return out


@pytest.fixture(scope="module")
def forms(toy, tmp_path_factory):
    return make_forms(toy, tmp_path_factory.mktemp("forms") / "eval")


def test_tsv_rows_become_records(forms, tmp_path, capsys):
    """A row of another split graded as a question, pictures in the wrong order or lost, an answer of the wrong kind."""
    load = lambda name: list(
        evaluate.load_benchmark(str(forms / name), None, str(tmp_path)).values()
    )
    two, number, text = load("MMMU_DEV_VAL.tsv")
    assert "1 rows of other splits than 'validation' are no records" in capsys.readouterr().out
    assert [r["index"] for r in (two, number, text)] == [1, 2, 3] and two["problem_id"] == "val_1"
    assert two[
        "problem"
    ] == "Hint: Look.\nImage 1: <image>\nImage 2: <image>\nIs image 2 beside image 1?" and two[
        "options"
    ][0].startswith("A. ")
    pictures = [medium["path"] for medium in two["media"]]
    originals = json.loads((forms / "eval_mmvu.json").read_text())
    assert [Path(p).read_bytes() for p in pictures] == [
        (forms / r["path"]).read_bytes() for r in originals
    ]
    assert (number["problem_type"], number["answer"]) == (
        "numerical",
        "1,200",
    ) and "\nare there?" in number["problem"]
    assert text["problem_type"] == "open-ended"

    turned, straight = load("MMBench_DEV_EN.tsv")
    assert turned["media"] == straight["media"] and turned["problem_id"] == "1000007"
    letter, root = load("MathVerse_MINI.tsv")
    assert (letter["problem_type"], letter["answer"], root["problem_type"]) == (
        "multiple choice",
        "B",
        "math",
    )
    listed, measure = load("MathVista_MINI.tsv")
    assert (listed["problem"], listed["options"], listed["answer"]) == (
        "<image>Which?",
        ["A. 3", "B. 8"],
        "B",
    )
    assert (measure["problem_type"], measure["answer"]) == ("numerical", "0.6")
    assert load("MMSci_DEV_Captioning_image_only.tsv")[0]["problem_type"] == "open-ended"


def test_pictures_of_a_tsv_go_below_a_relative_out(forms, tmp_path, monkeypatch):
    """--out runs/eval, as the README has it: pictures that are written there, and then taken for strangers."""
    monkeypatch.chdir(tmp_path)
    straight = evaluate.load_benchmark(str(forms / "MathVerse_MINI.tsv"), None, "runs")[0]
    assert Path(straight["media"][0]["path"]).parent == tmp_path / "runs" / "media"


def test_video_tsv_and_json_become_records(forms, tmp_path):
    """The three video sets that VLMEvalKit reads in forms of their own."""
    (holmes,) = evaluate.load_benchmark(
        str(forms / "Video_Holmes.json"), None, str(tmp_path)
    ).values()
    (long,) = evaluate.load_benchmark(
        str(forms / "LongVideoBench.json"), None, str(tmp_path)
    ).values()
    (caption,) = evaluate.load_benchmark(
        str(forms / "Video_MMLU_CAP.tsv"), None, str(tmp_path)
    ).values()
    for record, folder in ((holmes, "video"), (long, "videos"), (caption, "youtube_videos")):
        assert record["media"] == [dict(type="video", path=str(forms / folder / "abc.mp4"))]
    assert (holmes["options"], holmes["answer"]) == (["A. he", "B. she"], "B")
    assert (long["options"], long["answer"]) == (["A. he", "B. she"], "A")
    assert (
        caption["answer"] == "Who comes? A triangle.\nWhen? Late."
        and caption["problem_type"] == "open-ended"
    )


def test_benchmarks_by_name(forms, capsys):
    """A name of the paper's that finds only one of its files, or none without a word."""
    assert evaluate.files_of("refcoco", str(forms)) == [str(forms / "eval_refcoco_val.json")]
    assert evaluate.files_of("MMMU", str(forms)) == [str(forms / "MMMU_DEV_VAL.tsv")]
    assert evaluate.files_of(str(forms / "mine.json"), "nowhere") == [str(forms / "mine.json")]
    for name, said in (
        ("GOT-10k", "none of nowhere/eval_got10k.json"),
        ("nothing", "no benchmark of --list"),
    ):
        with pytest.raises(SystemExit):
            evaluate.files_of(name, "nowhere")
        assert said in capsys.readouterr().err


def test_list_names_every_benchmark():
    """A benchmark without a way to get it: each has a download command, or a sentence that says why not."""
    said = run("evaluate.py", "--list").stdout
    for stem, row in evaluate.BENCHMARKS.items():
        assert re.search(rf"^  {re.escape(row.name)} +{re.escape(stem)} ", said, re.MULTILINE)
        assert row.source in said and str(next(iter(row.paper.values()))[0]) in said
    assert said.count("hf download") == 4 and said.count("curl -L -o") == 9


@pytest.mark.parametrize(
    "response, answer",
    [
        ("<think>A?</think><answer>B</answer>", "B"),
        ("<think>The answer is A.</think>So it is the dog: option B.", "B"),
        ("First I thought the answer was A. The correct answer is **(B)**.", "B"),
        ("It barks.\n\nB.", "B"),
        ("It barks, hence $\\boxed{B}$\n\\boxed{B}", "B"),
        ("The answer is A because it purrs.", "A"),
        ("Answer: B, since it barks", "B"),
        ("<answer>the striped one</answer> that is, option A", "A"),
        ("Based on the picture, I cannot say.", None),
        ("The answer is A or B.", None),
        ("The answer could be B or C.", None),
        ("Options: (B) and (C)", None),
        ("The answer is a dog or a cat", None),
        ("A dog barks. Option: BC", None),
        ("<think>The answer is A", None),
        ("The options:\nA. a cat\nB. a dog\nC. a cow\nI see nothing.", None),
    ],
)
def test_choice_falls_back_to_the_last_stated_letter(response, answer):
    """The release reads "Based on" as B; a reader without the fallback gives 0 for "The answer is **(B)**"."""
    record = dict(problem_type="multiple choice", options=["A. a cat", "B. a dog", "C. a cow"])
    found = evaluate.answer_of(record, response)
    assert (found and evaluate.rewards.read_choice(found, record["options"])) == answer


# ----------------------------------------------------------------------------------------------------------------------
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
            status, body = (
                reply
                if isinstance(reply, tuple)
                else (200, json.dumps(dict(choices=[dict(message=dict(content=reply))])))
            )
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.replies, server.url = (
        [],
        [],
        f"http://127.0.0.1:{server.server_address[1]}/v1",
    )
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


CAPTION = dict(
    problem="<image>Describe it.",
    options=[],
    answer="a red fox",
    problem_type="open-ended",
    data_type="image",
)


@pytest.mark.parametrize(
    "replies, score",
    [
        (["8"], 0.8),
        (["<think>9 or 10</think>\n10"], 1.0),
        (["3/10."], 0.3),
        ([(500, "busy"), (200, "no JSON"), "0"], 0.0),
        (["too late", "too late", "4"], 0.4),
        (["11", "NaN", "great: 9"], None),
        (
            [
                (200, "[]"),
                (200, '{"choices": []}'),
                (200, '{"choices": [{"message": {"content": null}}]}'),
            ],
            None,
        ),
    ],
)
def test_judge_answers_fails_and_lies(server, replies, score):
    """A failing or babbling judge read as a score, or as 0."""
    server.replies = list(replies)
    assert evaluate.ask_judge(server.url, "m", CAPTION, "a fox", seconds=0.2, pause=0) == score
    assert len(server.asked) == len(replies)
    assert json.loads(server.asked[0].splitlines()[-1])["reference"] == "a red fox"


def test_judge_is_asked_once_and_its_silence_is_no_grade(server, tmp_path, monkeypatch):
    """Paying twice for one verdict; an answer without a verdict as a 0; a verdict for other words of the model."""
    monkeypatch.setattr(evaluate.time, "sleep", lambda seconds: None)
    name, out = "MMSci_DEV_Captioning_image_only", str(tmp_path)
    records = {i: CAPTION | dict(index=i, problem_id=str(i), benchmark=name) for i in range(5)}
    answers = ["a fox", "a fox", "a cow", "a hen", None]
    lines = {
        i: dict(problem_id="p", position=i, response=text, trouble=[])
        for i, text in enumerate(answers)
    }
    evaluate.write_lines(f"{out}/{name}.jsonl", lines)

    def accuracies():
        evaluate.judge({name: records}, out, server.url, "m")
        evaluate.grade({name: records}, out)
        return [line["accuracy"] for line in evaluate.read_lines(f"{out}/{name}.jsonl").values()]

    server.replies = ["no"] * 9  # nobody has an answer
    assert accuracies() == [None] * 4 + [0.0] and len(server.asked) == 9
    found = values(name, list(evaluate.read_lines(f"{out}/{name}.jsonl").values()))
    assert found["not judged"] == 0.8 and found["accuracy"] == 0.0  # of the one that says nothing
    assert accuracies() == [0.7] * 4 + [0.0] and len(server.asked) == 12  # three different answers
    evaluate.write_lines(f"{out}/{name}.jsonl", lines)
    assert accuracies() == [0.7] * 4 + [0.0] and len(server.asked) == 12  # all in judge.jsonl
    evaluate.write_lines(f"{out}/{name}.jsonl", lines | {0: lines[0] | dict(response="an owl")})
    assert accuracies() == [0.7] * 4 + [0.0] and len(server.asked) == 13


# ----------------------------------------------------------------------------------------------------------------------
# Intervals


def column_of(values):
    """One metric that is a mean, as columns_of stacks them: (1, 2, n)."""
    return np.stack([values, np.ones(len(values))])[None].astype(float)


def test_interval_is_that_of_the_mean():
    """An interval of the values, not of their mean; or one that shrinks with the resamples instead of with n."""
    scores = np.random.default_rng(0).random(400)
    means = evaluate.resampled(column_of(scores), "x")
    assert means.shape == (2000, 1)
    cell = evaluate.interval(scores.mean(), means[:, 0])
    half = 1.96 * scores.std() / np.sqrt(400)
    assert cell["low"] == pytest.approx(scores.mean() - half, abs=0.1 * half)
    assert cell["high"] == pytest.approx(scores.mean() + half, abs=0.1 * half)


def test_interval_covers_the_truth_about_95_times_in_100():
    """Wrong percentiles (90%, or one-sided)."""
    rng, hits = np.random.default_rng(1), 0
    for i in range(400):
        means = evaluate.resampled(column_of(rng.random(60) < 0.4), f"benchmark {i}")
        low, high = evaluate.interval(0, means)["low"], evaluate.interval(0, means)["high"]
        hits += low <= 0.4 <= high
    assert 0.91 <= hits / 400 <= 0.98


def test_resamples_are_the_same_for_a_name_and_independent_between_names():
    """One seed for all benchmarks couples their draws, and the interval of the mean over benchmarks is wrong."""
    scores = np.random.default_rng(0).random(50)
    a, again, b = (evaluate.resampled(column_of(scores), name)[:, 0] for name in ("a", "a", "b"))
    assert (a == again).all() and abs(np.corrcoef(a, b)[0, 1]) < 0.1


# ----------------------------------------------------------------------------------------------------------------------
# Stored outputs


def test_torn_line_is_not_read(tmp_path):
    """A line that a kill has torn ends the rerun, or counts as an answer."""
    path = tmp_path / "a.jsonl"
    whole = json.dumps(dict(position=0, problem_id="p")) + "\n"
    path.write_text(whole + json.dumps(dict(position=1, problem_id="q"))[:-3])
    assert list(evaluate.read_lines(path)) == [0]
    assert evaluate.read_lines(tmp_path / "none.jsonl") == {}


def test_parts_merge_in_position_order_with_what_was_there(tmp_path):
    """Outputs in the order of the ranks; parts lost, or left behind to be counted twice; "10" before "2"."""
    out = str(tmp_path)
    for position in range(0, 24):
        rank = position % 3
        evaluate.append(
            f"{out}/a.parts/{rank}.jsonl",
            dict(position=position, problem_id=str(position), response="first"),
        )
    assert list(evaluate.merge_parts(out, "a")) == list(range(24))
    assert not (tmp_path / "a.parts").exists()
    evaluate.append(f"{out}/a.parts/0.jsonl", dict(position=24, problem_id="24", response="second"))
    evaluate.append(
        f"{out}/a.parts/1.jsonl", dict(position=5, problem_id="5", response="tried again")
    )
    lines = evaluate.merge_parts(out, "a")
    assert (
        list(lines) == list(range(25))
        and lines[5]["response"] == "tried again"
        and lines[6]["response"] == "first"
    )
    stored = [json.loads(text) for text in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["position"] for line in stored] == list(range(25))


def test_parts_of_a_benchmark_whose_name_begins_another(tmp_path):
    """Parts found by a pattern: "a" swallows those of "a.b", "x[1]" finds none."""
    out = str(tmp_path)
    for name in ("a", "a.b", "x[1]"):
        evaluate.append(f"{out}/{name}.parts/0.jsonl", dict(position=0, problem_id=name))
    for name in ("a", "a.b", "x[1]"):
        assert evaluate.merge_parts(out, name)[0]["problem_id"] == name


def test_duplicate_problem_ids_stay_apart(tmp_path):
    """The release keys its outputs by problem id: records that share one overwrite each other."""
    for position, accuracy in enumerate([1.0, 0.0, 1.0]):
        line = dict(
            problem_id="same",
            position=position,
            task="math",
            accuracy=accuracy,
            parts={},
            trouble=[],
        )
        evaluate.append(f"{tmp_path}/a.parts/0.jsonl", line)
    lines = evaluate.merge_parts(str(tmp_path), "a")
    assert len(lines) == 3 and values("a", list(lines.values()))["accuracy"] == pytest.approx(2 / 3)


def test_fingerprint_sees_new_weights(tmp_path):
    """A model trained on under the same path: its answers would mix with the old model's."""
    path, prints = tmp_path / "model.safetensors", []
    for byte in (0, 1):
        path.write_bytes(bytes(10**6) + bytes([byte]) * 10**5 + bytes(10**6))
        prints.append(evaluate.fingerprint(str(tmp_path)))
    (tmp_path / "args.json").write_text("{}")  # which a training run rewrites at every start
    assert prints[0] != prints[1] == evaluate.fingerprint(str(tmp_path))
    assert evaluate.fingerprint("Qwen/Qwen3-VL-8B-Instruct") == "Qwen/Qwen3-VL-8B-Instruct"


# ----------------------------------------------------------------------------------------------------------------------
# Comparison


def store(out, name, accuracies, ids=None):
    """A finished evaluation of one benchmark, as evaluate() leaves it."""
    Path(out).mkdir(exist_ok=True)
    for i, accuracy in enumerate(accuracies):
        line = dict(
            problem_id=str(i) if ids is None else ids[i], position=i, accuracy=float(accuracy)
        )
        evaluate.append(
            f"{out}/{name}.parts/0.jsonl", line | dict(task="math", parts={}, trouble=[])
        )
    lines = list(evaluate.merge_parts(str(out), name).values())
    results = evaluate.read_json_file(f"{out}/results.json")
    evaluate.write_whole(
        f"{out}/results.json", json.dumps(results | {name: evaluate.metrics_of(name, lines)})
    )


def own(values, ids=None):
    """One benchmark of one model, of what read_own gives."""
    ids = [str(i) for i in range(len(values))] if ids is None else ids
    return ids, np.array([values, np.ones(len(values))], dtype=float)


def test_difference_is_paired_over_the_records():
    """Independent resamples for the two models: a model that is better on every single record looks like chance."""
    rng = np.random.default_rng(0)
    base = {(name, "accuracy"): 0.8 * (rng.random(50) < 0.5) for name in ("a", "b")}
    models = {
        "base": {key: own(base[key]) for key in base},
        "better": {key: own(base[key] + 0.02) for key in base},
    }
    report = evaluate.compare_models(models)
    for row in (report["mean"], *report["benchmarks"].values()):
        difference = row["differences"]["better"]
        assert [difference[key] for key in ("value", "low", "high", "p")] == pytest.approx(
            [0.02, 0.02, 0.02, 0.0]
        )
    assert list(report["benchmarks"]) == ["a", "b"] and list(report["mean"]["differences"]) == [
        "better"
    ]
    alone = report["mean"]["models"]["base"]
    assert alone["high"] - alone["low"] > 0.1  # while each model alone is uncertain


def test_difference_of_equal_models_with_different_luck_includes_zero():
    """An interval that is too narrow calls luck progress: resampling benchmarks' means instead of records."""
    rng = np.random.default_rng(3)
    hits, surprises = 0, 0
    for i in range(60):
        models = {
            model: {(f"{i}", "accuracy"): own((rng.random(80) < 0.5) * 1.0)} for model in ("a", "b")
        }
        difference = evaluate.compare_models(models)["mean"]["differences"]["b"]
        hits += difference["low"] <= 0 <= difference["high"]
        surprises += difference["p"] < 0.05
    assert hits >= 52 and surprises <= 8


def test_mean_weighs_benchmarks_not_records():
    """A large benchmark drowns the small ones in one pot; the three files of RefCOCO count three times."""
    models = {"m": {("large", "accuracy"): own([0.0] * 90), ("small", "accuracy"): own([1.0] * 10)}}
    assert evaluate.compare_models(models)["mean"]["models"]["m"]["value"] == 0.5
    files = {
        (f"eval_refcoco_{split}", "R@0.5"): own([1.0] * 5) for split in ("val", "testA", "testB")
    }
    models = {"m": files | {("eval_charades", "mIoU"): own([0.0] * 5)}}
    assert evaluate.compare_models(models)["mean"]["models"]["m"]["value"] == 0.5


def test_a_ratio_of_sums_is_compared_as_one():
    """cIoU averaged over pictures in the comparison, while results.json has the cumulative one."""
    columns = np.array([[90.0, 0.0], [100.0, 10.0]])
    report = evaluate.compare_models({"m": {("eval_seg_refcoco", "cIoU"): (["1", "2"], columns)}})
    assert report["mean"]["models"]["m"]["value"] == pytest.approx(90 / 110)


def test_comparison_needs_the_same_records_and_names_what_it_leaves_out(capsys):
    """Models compared over different benchmarks, metrics or records, in silence."""
    x, y, z = ("x", "accuracy"), ("y", "accuracy"), ("z", "accuracy")
    a = {x: own([1.0, 0.0], ["1", "2"]), y: own([1.0], ["1"]), z: own([1.0], ["1"])}
    b = {x: own([0.0, 0.0], ["1", "2"]), ("z", "cIoU"): own([1.0], ["1"])}
    assert evaluate.compare_models({"a": a, "b": b})["left_out"] == ["y", "z"]
    with pytest.raises(SystemExit):
        evaluate.compare_models({"a": a, "b": {x: own([0.0, 0.0], ["1", "3"])}})
    assert "x: the models did not answer the same records" in capsys.readouterr().err


def test_compare_command_prints_and_writes(tmp_path):
    """--compare that loads a model's libraries for half a minute, or whose intervals differ from results.json."""
    for out, right in (("base", 2), ("sft", 7), ("rl", 9)):
        store(tmp_path / out, "math", [1.0] * right + [0.0] * (10 - right))
        store(tmp_path / out, "ocr", [right / 10] * 10)
    code = "import sys, runpy; runpy.run_path('evaluate.py', run_name='__main__'); assert not {'vllm', 'sft'} & {*sys.modules}"
    command = [
        sys.executable,
        "-c",
        code,
        "--compare",
        *(str(tmp_path / out) for out in ("base", "sft", "rl")),
    ]
    command += ["--names", "base", "SFT", "RL", "--out", str(tmp_path / "report.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        "mean over 2 benchmarks" in done.stdout
        and re.search(
            r"SFT - base: \+50.0 \[.*\] points, p < 0.001, paired over the records: above",
            done.stdout,
        )
        and "RL - SFT: +20.0 [" in done.stdout
    )
    ocr = next(row for row in done.stdout.splitlines() if row.startswith("ocr"))
    assert re.fullmatch(
        r"ocr +10 +20.0 \[[^]]+\] +70.0 \[[^]]+\]\+ +90.0 \[[^]]+\]\+", ocr
    )  # constant: clear everywhere
    report = json.loads((tmp_path / "report.json").read_text())
    alone = evaluate.read_json_file(f"{tmp_path}/rl/results.json")["math"]["accuracy"]
    assert report["benchmarks"]["math"]["models"]["RL"] | dict(n=10) == alone


# ----------------------------------------------------------------------------------------------------------------------
# Around the model


def test_chunks_are_bounded_by_count_and_by_tokens():
    """256 prompts of 128 frames at once: 25 GB of pixels per rank; or a chunk that never ends and loses its rest."""
    items = [({}, SimpleNamespace(token_ids=[0] * length)) for length in (5, 5, 90, 5, 5, 5, 5)]
    sizes = [len(chunk) for chunk in evaluate.chunked(iter(items), most=3, most_tokens=50)]
    assert sizes == [3, 3, 1] and sum(sizes) == len(items)
    assert [len(chunk) for chunk in evaluate.chunked(iter(items[2:]), most=3, most_tokens=50)] == [
        1,
        3,
        1,
    ]


def test_failed_generations_are_tried_again_and_missing_media_are_zeros(monkeypatch, tmp_path):
    """The release writes a failed batch as answers and never retries it, and drops what it cannot read from the mean."""
    import rl_ema_grpo

    common = dict(
        problem_type="numerical", data_type="image", answer="3", problem_id="p", benchmark="a"
    )
    records = [dict(common, index=i) for i in range(6)]
    prompts = [data.Prompt(record, [0], None, None, None, {}) for record in records]
    prompts[3] = data.Skipped("missing_media", "no file x.png")
    responses = {
        0: [("<answer>3</answer>", True)],
        1: [("", False)] * 3,  # fails whenever it is tried
        2: [("<think>3? 3.", False)],
        4: [("<answer>two</answer>", True)],
        5: [("", False), ("", False), ("<answer>3</answer>", True)],
    }

    def generate(llm, asked, seeds, n, max_tokens, tokenizer, temperature):
        assert temperature == 0 and n == 1 and prompts[3] not in asked and len(seeds) == len(asked)
        made = [responses[prompt.record["index"]].pop(0) for prompt in asked]
        return [SimpleNamespace(responses=[list(text)], finished=[ended]) for text, ended in made]

    monkeypatch.setattr(rl_ema_grpo, "generate", generate)
    monkeypatch.setattr(
        rl_ema_grpo, "text_of", lambda rollout, i, tokenizer: "".join(rollout.responses[i])
    )
    lines = {}
    for record, response, trouble in evaluate.answer(
        list(zip(records, prompts)), None, None, max_tokens=12
    ):
        lines[record["index"]] = dict(
            problem_id="p", position=record["index"], response=response, trouble=trouble
        )
    assert sorted(lines) == [0, 2, 3, 4, 5]  # 1 has neither ended nor used its tokens up: it failed
    assert not any(responses.values())  # tried three times, and no more

    evaluate.write_lines(f"{tmp_path}/a.jsonl", lines)
    evaluate.grade({"a": dict(enumerate(records))}, tmp_path)
    by_position = evaluate.read_lines(tmp_path / "a.jsonl")
    assert [by_position[i]["accuracy"] for i in (0, 3, 4, 5)] == [1.0, 0.0, 0.0, 1.0]
    assert by_position[2]["trouble"][0] == "cut off" and by_position[4]["trouble"] == ["unreadable"]
    assert (
        by_position[3]["trouble"] == ["skipped", "missing_media"]
        and by_position[3]["response"] is None
    )

    metrics = evaluate.metrics_of("a", list(by_position.values()), failed=1)
    assert metrics["accuracy"]["n"] == 5 and metrics["failed"]["value"] == pytest.approx(1 / 6)
    said = evaluate.table_of({"a": metrics}, {"a": "accuracy"})
    assert "mean over" not in said and "not in the mean: a: 1 failed (a rerun tries again)" in said


def test_masks_of_what_was_read_as_the_answer_before_are_dropped(tmp_path):
    """After a change of the reader: the masks of the old answer counted as those of the new one, or all masks lost."""
    record = dict(problem_type="segmentation", data_type="image", answer="{}", benchmark="a")
    for said, kept in (("read", True), ("read otherwise", False)):
        masks = dict(answer=said, parts=dict(gIoU=0.5), frames={})
        line = dict(problem_id="p", position=0, response="read", trouble=[], masks=masks)
        evaluate.write_lines(f"{tmp_path}/a.jsonl", {0: line})
        evaluate.grade({"a": {0: record}}, str(tmp_path))
        line = evaluate.read_lines(f"{tmp_path}/a.jsonl")[0]
        assert ("masks" in line) == ("gIoU" in line["parts"]) == kept and line["answer"] == "read"


@pytest.fixture
def request_of(tmp_path, monkeypatch):
    """Arguments of a run over one small file, with a model folder that only looks like one."""
    import transformers

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda path: None)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "media.png").write_bytes(b"")
    record = dict(
        problem_type="math", problem="1 + 1?", solution="2", data_type="image", path="media.png"
    )
    (tmp_path / "math.json").write_text(json.dumps([record]))

    def make(**changes):
        sys_argv = [
            "evaluate.py",
            "--model",
            str(tmp_path / "model"),
            "--data",
            str(tmp_path / "math.json"),
        ]
        monkeypatch.setattr(sys, "argv", sys_argv + ["--out", str(tmp_path / "out")])
        args = evaluate.parse_args()
        for name, value in changes.items():
            setattr(args, name, value)
        return args

    return make


def refused(args, capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.check(args)
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def test_wrong_input_is_refused_in_one_sentence(request_of, tmp_path, capsys):
    """Wrong input that shows after the model has been loaded, or as a traceback."""
    evaluate.check(request_of())
    assert "no such folder" in refused(request_of(model=str(tmp_path / "nothing")), capsys)
    assert "none.json" in refused(request_of(data=[str(tmp_path / "none.json")]), capsys)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "math.json").write_text((tmp_path / "math.json").read_text())
    twice = [str(tmp_path / "math.json"), str(tmp_path / "more" / "math.json")]
    assert "a second file of the benchmark 'math'" in refused(request_of(data=twice), capsys)
    (tmp_path / "sft.jsonl").write_text(
        json.dumps(
            dict(messages=[dict(role="user", content="?"), dict(role="assistant", content="!")])
        )
    )
    assert "an SFT record" in refused(request_of(data=[str(tmp_path / "sft.jsonl")]), capsys)
    assert "1 media do not exist, such as" in refused(
        request_of(media_root=str(tmp_path / "elsewhere")), capsys
    )
    assert "go together" in refused(request_of(judge_url="http://x/v1"), capsys)
    assert "--sam2 nowhere: no such folder" in refused(request_of(sam2="nowhere"), capsys)
    record = dict(
        problem_type="segmentation", problem="?", solution="{}", data_type="image", path="media.png"
    )
    (tmp_path / "seg.json").write_text(json.dumps([record]))
    assert "no segmentation_rle" in refused(
        request_of(data=[str(tmp_path / "seg.json")], sam2=str(tmp_path)), capsys
    )
    for row, sentence in (
        ("1\t?\tB\t7", "image is '7', expected the index of a row with a picture"),
        ("1\t?\tB\t" + 100 * "!", "base64"),
        ("1\t?\t\t" + 100 * "A", "expected the true answer"),
    ):
        (tmp_path / "rows.tsv").write_text(f"index\tquestion\tanswer\timage\n{row}\n")
        said = refused(request_of(data=[str(tmp_path / "rows.tsv")]), capsys)
        assert "rows.tsv: record 0: " in said and sentence in said


def test_a_folder_never_mixes_two_models_or_settings(request_of, tmp_path, capsys):
    """A rerun with other weights, prompts or limits goes on in the old folder, and its table is of neither model."""
    settings = evaluate.check(request_of())[-1]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_text(json.dumps(settings))
    evaluate.check(
        request_of(workers=9, prompts_per_chunk=1)
    )  # what does not change answers may change
    evaluate.check(request_of(cache=str(tmp_path), cache_gb=1.0))  # if data.py has a cache
    assert "other max_response_tokens, limits:" in refused(
        request_of(max_response_tokens=5, max_frames=2), capsys
    )
    judged = evaluate.check(request_of(judge_url="http://x/v1", judge_model="a"))[
        -1
    ]  # a judge may come later,
    (tmp_path / "out" / "settings.json").write_text(json.dumps(judged))
    evaluate.check(request_of())  # and go,
    assert "other judge:" in refused(
        request_of(judge_url="http://x/v1", judge_model="b"), capsys
    )  # but not be another
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weightz")
    assert "other model:" in refused(request_of(), capsys)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "math.json").write_text(
        (tmp_path / "math.json").read_text().replace("1 + 1", "1 + 2")
    )
    assert "other math data:" in refused(request_of(), capsys)


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs


# A model that knows the truth, and errs in every other record: the rest of the run is real. Runs one after another, each in
# a process of its own: out, and `stage:k` to end without a warning in the middle of writing the k-th line of that stage.
ORACLE = """
import json, os, sys, types
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
        said = truth_of(record) if record["index"] % 2 == 0 else truth_of(record).replace("5", "6").replace("A", "B")
        ids = tokenizer(f"<think>{record['problem_id']} <script>alert(1)</script></think><answer>{said}</answer>")["input_ids"]
        made.append(types.SimpleNamespace(responses=[ids + [0]], finished=[True]))
    return made

def run(out, stage, left):
    def append(path, line):
        nonlocal left
        here = "judge" if path.endswith("judge.jsonl") else "mask" if "masks" in line else "answer"
        left -= here == stage
        if here == stage and left == 0:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "a") as file:
                file.write(json.dumps(line)[:40])
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
        run(out, stage, int(left or 0))
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended == (9 if die else 0), (out, die, ended)
"""


def run_oracle(toy, forms, folder, outs, ranks=0):
    """The oracle over all forms, once for each (folder of outputs, where to die); under torchrun if ranks > 0."""
    (folder / "oracle.py").write_text(ORACLE)
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks] if ranks else []
    )
    paths = sorted(path for path in forms.iterdir() if path.suffix in (".json", ".tsv"))
    outs = json.dumps([(str(folder / out), die) for out, die in outs])
    with serve() as server:
        command = [
            "--model",
            toy / "model",
            "--data",
            *paths,
            "--sam2",
            folder / "sam2",
            "--judge-url",
            server.url,
        ]
        command += "--judge-model m --workers 0 --prompts-per-chunk 4 --dtype float32 --max-bad-share 1".split()
        done = subprocess.run(
            list(map(str, [sys.executable, *launcher, folder / "oracle.py", outs, *command])),
            cwd=ROOT, env=os.environ | dict(no_proxy="127.0.0.1"), capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def runs(toy, forms, tmp_path_factory):
    """All forms through one command, in folder whole; and once more in folder cut, interrupted three times, and brought to
    its end by two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_sam2(folder / "sam2")
    run_oracle(
        toy,
        forms,
        folder,
        [("whole", ""), ("cut", "answer:7"), ("cut", "mask:2"), ("cut", "judge:2")],
    )
    run_oracle(toy, forms, folder, [("cut", "")], ranks=2)
    return folder


def stored(out):
    paths = [
        path for path in sorted(out.glob("*.jsonl")) if path.name != "judge.jsonl"
    ]  # whose lines have no order
    return {path.name: path.read_bytes() for path in [*paths, out / "results.json"]}


def test_interrupted_three_times_the_result_is_the_same(runs):
    """A rerun that loses, repeats or mixes answers, masks or verdicts; a torn line that ends it, or takes the next along."""
    whole, resumed = ((runs / f"{out}.txt").read_text() for out in ("whole", "cut"))
    assert stored(runs / "whole") == stored(runs / "cut")
    assert ", 1 to answer" in resumed  # the one whose picture is not there
    assert resumed[resumed.index("\nbenchmark") :] == whole[whole.index("\nbenchmark") :].replace(
        "/whole", "/cut"
    )
    verdicts = [evaluate.read_lines(runs / out / "judge.jsonl", "key") for out in ("whole", "cut")]
    assert verdicts[0] == verdicts[1] and verdicts[0]

    results = json.loads((runs / "whole" / "results.json").read_text())
    assert len(results) == 17 and all(
        metrics["failed"]["value"] == 0 for metrics in results.values()
    )
    assert results["eval_got10k"]["AO"]["n"] == 2 and "J&F (DAVIS)" in results["eval_seg_mevis"]
    assert results["MMSci_DEV_Captioning_image_only"]["accuracy"]["value"] == pytest.approx(0.7)
    assert "mean over 17 benchmarks" in whole and "not in the mean" not in whole


def test_a_record_without_its_medium_counts_0_and_is_tried_again(toy, forms, runs):
    """A picture that was not there: dropped from the mean, or a 0 for good although it has been put there since."""
    before = (runs / "whole" / "mine.jsonl").read_text().splitlines()
    assert (
        json.loads(before[2])["trouble"] == ["skipped", "missing_media"]
        and json.loads(before[2])["accuracy"] == 0
    )
    shutil.copytree(runs / "whole", runs / "later")
    (forms / "late").mkdir()
    shutil.copy(next((forms / "media").glob("*.png")), forms / "late" / "lost.png")
    run_oracle(toy, forms, runs, [("later", "")])
    after = (runs / "later" / "mine.jsonl").read_text().splitlines()
    assert (
        after[:2] == before[:2]
        and json.loads(after[2])["accuracy"] > 0
        and json.loads(after[2])["trouble"] == []
    )


def test_regrading_gives_the_same_grades_without_a_model(runs, tmp_path):
    """Grades that a rerun cannot restore; masks and verdicts thrown away with them, which cost hours."""
    out = str(shutil.copytree(runs / "whole", tmp_path / "whole"))
    for name in ("eval_charades", "MathVerse_MINI", "eval_seg_mevis"):
        path = f"{out}/{name}.jsonl"
        lost = {
            p: line | dict(accuracy=0.25, trouble=["unreadable"])
            for p, line in evaluate.read_lines(path).items()
        }
        evaluate.write_lines(path, lost)
    paths = json.loads(Path(f"{out}/args.json").read_text())["data"]
    done = run("evaluate.py", "--regrade", "--data", *paths, "--out", out)
    assert stored(Path(out)) == stored(runs / "whole") and "mean over 17 benchmarks" in done.stdout


def test_nothing_in_the_report_is_code_but_its_own(runs):
    """A model that writes a script into its answer, and the reader's browser runs it; a page that needs a network."""
    page = (runs / "whole" / "report.html").read_text()
    assert (
        "<script>alert" not in page
        and "&lt;script&gt;alert(1)" in page
        and page.count("<script") == 1
    )
    bare = re.sub('base64,[^"]+', "", page)
    assert (
        all(link.startswith("data:") for link in re.findall('(?:src|href)="?([^">]*)', bare))
        and "http" not in bare
    )
    assert (
        page.count("<article") == page.count("<details>") > 25
        and page.count("skipped; missing_media") == 1
    )


def test_the_report_in_a_browser(runs):
    """Filters that filter nothing, a page wider than a phone, pictures that do not show."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no Chromium here to open report.html with (apt-get install chromium)")
    page, probe = (runs / "whole" / "report.html").read_text(), runs / "probe.html"
    broken = "[...document.images].filter(image => !image.naturalWidth).length"
    script = f"<script>document.title = [innerWidth, document.documentElement.scrollWidth, {broken}]</script>"
    probe.write_text(page.replace('loading="lazy"', "") + script)
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=5000",
        "--window-size=500,900",
    ]

    def dom(part):
        command_here = [*command, "--dump-dom", f"file://{probe}{part}"]
        return re.sub(
            'base64,[^"]+',
            "",
            subprocess.run(command_here, capture_output=True, text=True, timeout=60).stdout,
        )

    seen = dom("#task=tracking&max=0.95&sort=-1")
    cards = re.findall("<article[^>]*>", seen)
    left = [card for card in cards if "hidden" not in card]
    assert 0 < len(left) < len(cards) and f"{len(left)} of {len(cards)} shown" in seen
    assert all(
        'task="tracking"' in card and float(re.search('score="([^"]+)', card)[1]) <= 0.95
        for card in left
    )
    width, needed, broken = map(int, re.search("<title>(.*)</title>", seen)[1].split(","))
    assert needed <= width and broken == 0
    for section in dom("").split("<section>")[1:]:
        scores = [float(score) for score in re.findall('data-score="([^"]+)', section)]
        assert scores == sorted(scores)  # worst first


def test_every_form_goes_through_with_a_real_engine(toy, forms, tmp_path):
    """Forms that load but that the engine does not take: several pictures, a film beside a picture, 32 frames."""
    names = [
        "MMMU",
        "Video-Holmes",
        "VideoMathQA",
        "GOT-10k",
        "STVG",
        "RefCOCO",
        "RefCOCO (masks)",
        "VideoMMLU",
    ]
    settings = (
        "--dtype float32 --workers 1 --max-prompt-tokens 900 --max-response-tokens 16".split()
    )
    result = run(
        "evaluate.py",
        "--model",
        toy / "model",
        "--data",
        *names,
        "--data-root",
        forms,
        "--out",
        tmp_path,
        *settings,
    )
    results = json.loads((tmp_path / "results.json").read_text())
    counts = {name: metrics["unreadable"]["n"] for name, metrics in results.items()}
    assert counts == {
        "MMMU_DEV_VAL": 3, "Video_Holmes": 1, "eval_videomathqa": 2, "eval_got10k": 2, "eval_stvg": 2,
        "eval_refcoco_val": 2, "eval_seg_refcoco": 2, "Video_MMLU_CAP": 1,
    }  # fmt: skip
    assert all(
        not metrics["skipped"]["value"] and not metrics["failed"]["value"]
        for metrics in results.values()
    )
    assert "not in the mean: eval_seg_refcoco: no cIoU without --sam2" in result.stdout
    assert (tmp_path / "report.html").exists()


def test_tracking_sees_32_frames(toy, processor):
    """GOT-10k with 128 frames: another benchmark than the paper's."""
    limits = data.Limits(fps=30.0)  # the toy's films: 8 seconds, 32 frames there are
    record = evaluate.load_benchmark(str(toy / "eval" / "tracking.json"), None, "nowhere")[0]
    seen = {}
    for name in ("eval_got10k", "mine"):
        prompt = evaluate.prompt_of(record | dict(benchmark=name), processor, limits, data.PROMPTS)
        seen[name] = len(prompt.vllm["multi_modal_data"]["video"][0][0])
    assert seen == {"eval_got10k": 32, "mine": 128}


def test_what_another_run_has_begun_stays(tmp_path):
    """A finished run that clears away the answers of an interrupted one to other benchmarks, in the same folder."""
    evaluate.append(f"{tmp_path}/other.parts/0.jsonl", dict(position=0, response="B", trouble=[]))
    evaluate.sum_up(argparse.Namespace(out=str(tmp_path), judge_url=None), {})
    assert evaluate.merge_parts(str(tmp_path), "other")[0]["response"] == "B"
