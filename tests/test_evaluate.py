"""evaluate.py without a model: metrics, intervals, stored outputs, comparison, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402


def line_of(task, truth, answer, position=0, **more):
    """A stored line, its accuracy by rewards, its parts by evaluate."""
    kind = "segmentation" if task.startswith("segmentation") else task
    record = dict(problem_type=kind, data_type="image", answer=truth if isinstance(truth, str) else json.dumps(truth))
    answer = answer if isinstance(answer, str) or answer is None else json.dumps(answer)
    parts = evaluate.parts_of(task, record, answer)
    accuracy = evaluate.rewards.accuracy(record, answer)
    return dict(problem_id="p", position=position, accuracy=accuracy, parts=parts, trouble=[], **more)


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
    answers = [{"boxes": [0, 0, 100, 100]}, {"boxes": [0, 50, 100, 150]}, {"boxes": [1, 2]}, {"boxes": "x"}, [1], "{}"]
    found = values("refcoco", [line_of("spatial grounding", truth, answer) for answer in answers])
    assert found["R@0.5"] == pytest.approx(1 / 6) and found["mIoU"] == pytest.approx((1 + 1 / 3) / 6)
    assert "AO" not in found and "R@0.3" not in found


def test_spatial_temporal_boxes_over_true_and_over_shared_seconds():
    """One right box of five scores as five in the release (m_sIoU); m_vIoU must not, and the two must not be swapped."""
    box = [0, 0, 10, 10]
    truth = {"time": [0, 4], "boxes": {str(second): box for second in range(5)}}
    found = values("stvg", [line_of("spatial-temporal grounding", truth, {"time": [0, 2], "boxes": {"0": box}})])
    assert found["m_sIoU"] == found["sIoU@0.5"] == 1.0 and found["m_vIoU"] == 0.2
    assert found["m_tIoU"] == 0.5 and found["tIoU@0.5"] == 1.0 and found["accuracy"] == 0.35


def test_tracking_recall_is_per_sequence():
    """R@t over frames instead of sequences: here 3 of 4 frames are right, but only one sequence of two passes 0.7."""
    box, off = [0, 0, 10, 10], [50, 50, 60, 60]
    truth = {"boxes": {"1": box, "2": box}}
    lines = [line_of("tracking", truth, {"boxes": {"1": box, "2": second}}) for second in (box, off)]
    found = values("got10k", lines)
    assert (found["AO"], found["R@0.3"], found["R@0.5"], found["R@0.7"]) == (0.75, 1.0, 1.0, 0.5)
    missing = values("got10k", [line_of("tracking", truth, {"boxes": {"1": box}})])
    assert missing["AO"] == 0.5  # a second without a box counts 0


def test_segmentation_accuracy_is_not_its_box():
    """The box alone reported as accuracy: an answer with a right box but without points has accuracy 0."""
    found = values("seg", [line_of("segmentation-image", {"boxes": [0, 0, 9, 9]}, {"boxes": [0, 0, 9, 9]})])
    assert found["box_mIoU"] == 1.0 and found["accuracy"] == 0.0


def test_a_file_with_two_tasks_keeps_their_metrics_apart():
    """mIoU of times and mIoU of boxes averaged into one number when a file mixes tasks."""
    lines = [
        line_of("temporal grounding", {"time": [0, 10]}, {"time": [0, 5]}),
        line_of("spatial grounding", {"boxes": [0, 0, 10, 10]}, {"boxes": [0, 0, 10, 10]}),
        line_of("multiple choice", "B", "B"),
    ]
    results = evaluate.metrics_of("mixed", lines)
    assert results["mIoU (temporal grounding)"]["value"] == 0.5 and results["mIoU (spatial grounding)"]["value"] == 1.0
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


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        ("multiple choice", "B", "one of them"),
        ("numerical", "3", "three"),
        ("OCR", "STOP", None),
        ("temporal grounding", '{"time": [1, 2]}', '{"time": 1}'),
        ("spatial grounding", '{"boxes": [1, 2, 3, 4]}', '{"boxes": [1, 2, 3]}'),
        ("tracking", '{"boxes": {"1": [1, 2, 3, 4]}}', '{"boxes": [1, 2, 3, 4]}'),
    ],
)
def test_readable_needs_no_truth(kind, good, bad):
    """infer.py has no true answer: reading must not depend on it (nor call nonsense an answer)."""
    assert evaluate.readable(dict(problem_type=kind), good) and not evaluate.readable(dict(problem_type=kind), bad)


# ----------------------------------------------------------------------------------------------------------------------
# Intervals


def test_interval_is_that_of_the_mean():
    """An interval of the values, not of their mean; or one that shrinks with the resamples instead of with n."""
    scores = np.random.default_rng(0).random(400)
    means = evaluate.resampled_means([scores], "x")
    assert means.shape == (2000, 1)
    cell = evaluate.interval(scores.mean(), means[:, 0])
    half = 1.96 * scores.std() / np.sqrt(400)
    assert cell["low"] == pytest.approx(scores.mean() - half, abs=0.1 * half)
    assert cell["high"] == pytest.approx(scores.mean() + half, abs=0.1 * half)


def test_interval_covers_the_truth_about_95_times_in_100():
    """Wrong percentiles (90%, or one-sided)."""
    rng, hits = np.random.default_rng(1), 0
    for i in range(400):
        means = evaluate.resampled_means([rng.random(60) < 0.4], f"benchmark {i}")
        low, high = evaluate.interval(0, means)["low"], evaluate.interval(0, means)["high"]
        hits += low <= 0.4 <= high
    assert 0.91 <= hits / 400 <= 0.98


def test_resamples_are_the_same_for_a_name_and_independent_between_names():
    """One seed for all benchmarks couples their draws, and the interval of the mean over benchmarks is wrong."""
    scores = np.random.default_rng(0).random(50)
    a, again, b = (evaluate.resampled_means([scores], name)[:, 0] for name in ("a", "a", "b"))
    assert (a == again).all() and abs(np.corrcoef(a, b)[0, 1]) < 0.1


def test_resampling_in_blocks_draws_every_block_anew(monkeypatch):
    """A large benchmark is resampled block by block: a generator made anew per block repeats the same draws."""
    means = evaluate.resampled_means([np.arange(400_000.0)], "large", resamples=6)[:, 0]
    assert len(set(means)) == 6


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
            f"{out}/parts/a/{rank}.jsonl", dict(position=position, problem_id=str(position), response="first")
        )
    assert list(evaluate.merge_parts(out, "a")) == list(range(24))
    assert not (tmp_path / "parts" / "a").exists()
    evaluate.append(f"{out}/parts/a/0.jsonl", dict(position=24, problem_id="24", response="second"))
    evaluate.append(f"{out}/parts/a/1.jsonl", dict(position=5, problem_id="5", response="tried again"))
    lines = evaluate.merge_parts(out, "a")
    assert list(lines) == list(range(25)) and lines[5]["response"] == "tried again" and lines[6]["response"] == "first"
    stored = [json.loads(text) for text in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["position"] for line in stored] == list(range(25))


def test_parts_of_a_benchmark_whose_name_begins_another(tmp_path):
    """Parts found by a pattern: "a" swallows those of "a.b", "x[1]" finds none."""
    out = str(tmp_path)
    for name in ("a", "a.b", "x[1]"):
        evaluate.append(f"{out}/parts/{name}/0.jsonl", dict(position=0, problem_id=name))
    for name in ("a", "a.b", "x[1]"):
        assert evaluate.merge_parts(out, name)[0]["problem_id"] == name


def test_duplicate_problem_ids_stay_apart(tmp_path):
    """The release keys its outputs by problem id: records that share one overwrite each other."""
    for position, accuracy in enumerate([1.0, 0.0, 1.0]):
        line = dict(problem_id="same", position=position, accuracy=accuracy, parts=dict(task="math"), trouble=[])
        evaluate.append(f"{tmp_path}/parts/a/0.jsonl", line)
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
        line = dict(problem_id=str(i) if ids is None else ids[i], position=i, accuracy=float(accuracy))
        evaluate.append(f"{out}/parts/{name}/0.jsonl", line | dict(parts=dict(task="math"), trouble=[]))
    lines = list(evaluate.merge_parts(str(out), name).values())
    results = evaluate.read_json_file(f"{out}/results.json") or {}
    evaluate.write_whole(f"{out}/results.json", json.dumps(results | {name: evaluate.metrics_of(name, lines)}))


def test_difference_is_paired_over_the_records():
    """Independent resamples for the two models: a model that is better on every single record looks like chance."""
    rng = np.random.default_rng(0)
    ids, base = [str(i) for i in range(50)], {name: 0.8 * (rng.random(50) < 0.5) for name in ("a", "b")}
    models = {
        "base": {name: (ids, list(base[name])) for name in base},
        "better": {name: (ids, list(base[name] + 0.02)) for name in base},
    }
    report = evaluate.compare_models(models)
    (difference,) = report["differences"]
    assert (difference["model"], difference["minus"]) == ("better", "base")
    for key in ("value", "low", "high"):
        assert difference[key] == pytest.approx(0.02)
    assert report["mean"]["base"]["high"] - report["mean"]["base"]["low"] > 0.1  # while each alone is uncertain


def test_difference_of_equal_models_with_different_luck_includes_zero():
    """An interval that is too narrow calls luck progress: resampling benchmarks' means instead of records."""
    rng = np.random.default_rng(3)
    ids = [str(i) for i in range(80)]
    hits = 0
    for i in range(60):
        models = {model: {f"{i}": (ids, list((rng.random(80) < 0.5) * 1.0))} for model in ("a", "b")}
        (difference,) = evaluate.compare_models(models)["differences"]
        hits += difference["low"] <= 0 <= difference["high"]
    assert hits >= 52


def test_mean_weighs_benchmarks_not_records():
    """A large benchmark drowns the small ones when all records go into one pot."""
    models = {"m": {"large": (["x"] * 90, [0.0] * 90), "small": (["x"] * 10, [1.0] * 10)}}
    assert evaluate.compare_models(models)["mean"]["m"]["value"] == 0.5


def test_comparison_needs_the_same_records_and_names_what_it_leaves_out():
    """Models compared over different benchmarks or records, in silence."""
    a = {"x": (["1", "2"], [1.0, 0.0]), "y": (["1"], [1.0])}
    assert evaluate.compare_models({"a": a, "b": {"x": (["1", "2"], [0.0, 0.0])}})["left_out"] == ["y"]
    with pytest.raises(ValueError, match="x: the models did not answer the same records"):
        evaluate.compare_models({"a": a, "b": {"x": (["1", "3"], [0.0, 0.0])}})


def test_compare_command_prints_writes_and_starts_fast(tmp_path):
    """--compare that waits for torch and vLLM, or whose intervals differ from results.json."""
    for out, right in (("base", 2), ("sft", 7), ("rl", 9)):
        store(tmp_path / out, "math", [1.0] * right + [0.0] * (10 - right))
        store(tmp_path / out, "ocr", [right / 10] * 10)
    code = "import sys, runpy; runpy.run_path('evaluate.py', run_name='__main__'); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "--compare", *(str(tmp_path / out) for out in ("base", "sft", "rl"))]
    command += ["--names", "base", "SFT", "RL", "--out", str(tmp_path / "report.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        "mean over 2 benchmarks" in done.stdout
        and "SFT - base: +50.0 [" in done.stdout
        and "RL - SFT: +20.0 [" in done.stdout
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert (
        report["benchmarks"]["math"]["RL"] == evaluate.read_json_file(f"{tmp_path}/rl/results.json")["math"]["accuracy"]
    )


# ----------------------------------------------------------------------------------------------------------------------
# Around the model


def test_chunks_are_bounded_by_count_and_by_tokens():
    """256 prompts of 128 frames at once: 25 GB of pixels per rank; or a chunk that never ends and loses its rest."""
    items = [("a", {}, SimpleNamespace(token_ids=[0] * length)) for length in (5, 5, 90, 5, 5, 5, 5)]
    sizes = [len(chunk) for chunk in evaluate.chunked(iter(items), most=3, most_tokens=50)]
    assert sizes == [3, 3, 1] and sum(sizes) == len(items)
    assert [len(chunk) for chunk in evaluate.chunked(iter(items[2:]), most=3, most_tokens=50)] == [1, 3, 1]


def test_failed_generations_are_no_answers_and_missing_media_are_zeros(monkeypatch):
    """The release writes a failed batch as answers and never retries it, and drops what it cannot read from the mean."""
    import data
    import rl_ema_grpo

    records = [dict(problem_type="numerical", data_type="image", answer="3", problem_id="p", index=i) for i in range(5)]
    prompts = [data.Prompt(record, [0], None, None, None, {}) for record in records]
    prompts[3] = data.Skipped("missing_media", "no file x.png")
    responses = {
        0: ("<answer>3</answer>", True),
        1: ("", False),
        2: ("<think>3? 3.", False),
        4: ("<answer>two</answer>", True),
    }

    def generate(llm, asked, seeds, n, max_tokens, tokenizer, temperature):
        assert temperature == 0 and n == 1 and prompts[3] not in asked
        made = [responses[prompt.record["index"]] for prompt in asked]
        return [SimpleNamespace(responses=[list(text)], finished=[ended]) for text, ended in made]

    monkeypatch.setattr(rl_ema_grpo, "generate", generate)
    monkeypatch.setattr(rl_ema_grpo, "text_of", lambda rollout, i, tokenizer: "".join(rollout.responses[i]))
    grader = SimpleNamespace(accuracies=lambda pairs: [evaluate.rewards.accuracy(*pair) for pair in pairs])
    lines = evaluate.answer(
        [("a", record, prompt) for record, prompt in zip(records, prompts)], None, grader, None, max_tokens=12
    )
    by_position = {line["position"]: line for name, line in lines if name == "a"}
    assert sorted(by_position) == [0, 2, 3, 4]  # 1 has neither ended nor used its tokens up: it failed
    assert [by_position[i]["accuracy"] for i in (0, 3, 4)] == [1.0, 0.0, 0.0]
    assert by_position[2]["trouble"][0] == "cut off" and by_position[4]["trouble"] == ["unreadable"]
    assert by_position[3]["trouble"] == ["skipped", "missing_media"] and by_position[3]["response"] is None


@pytest.fixture
def request_of(tmp_path, monkeypatch):
    """Arguments of a run over one small file, with a model folder that only looks like one."""
    import transformers

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda path: None)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "media.png").write_bytes(b"")
    record = dict(problem_type="math", problem="1 + 1?", solution="2", data_type="image", path="media.png")
    (tmp_path / "math.json").write_text(json.dumps([record]))

    def make(**changes):
        sys_argv = ["evaluate.py", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "math.json")]
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
    assert "both be the benchmark 'math'" in refused(request_of(data=twice), capsys)
    (tmp_path / "sft.jsonl").write_text(
        json.dumps(dict(messages=[dict(role="user", content="?"), dict(role="assistant", content="!")]))
    )
    assert "an SFT record" in refused(request_of(data=[str(tmp_path / "sft.jsonl")]), capsys)
    assert "1 media files do not exist" in refused(request_of(media_root=str(tmp_path / "elsewhere")), capsys)


def test_a_folder_never_mixes_two_models_or_settings(request_of, tmp_path, capsys):
    """A rerun with other weights, prompts or limits goes on in the old folder, and its table is of neither model."""
    settings = evaluate.check(request_of())[-1]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_text(json.dumps(settings))
    evaluate.check(request_of(workers=9, prompts_per_chunk=1))  # what does not change answers may change
    assert "other max_response_tokens, limits:" in refused(request_of(max_response_tokens=5, max_frames=2), capsys)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weightz")
    assert "other model:" in refused(request_of(), capsys)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "math.json").write_text((tmp_path / "math.json").read_text().replace("1 + 1", "1 + 2"))
    assert "other math data:" in refused(request_of(), capsys)
