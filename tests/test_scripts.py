"""The scripts as a person runs them: --help, wrong input, and the whole demo in a few steps."""

import json
import re
import runpy
import subprocess
import sys

import pytest
from conftest import ROOT, run

import data
import rl_ema_grpo

SCRIPTS = ("data.py", "sft.py", "rl_ema_grpo.py", "evaluate.py", "infer.py")


def test_help(monkeypatch, capsys):
    """A script that does not even start, or an option without an explanation of the script."""
    for script in SCRIPTS:
        monkeypatch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit, match="^0$"):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        text = capsys.readouterr().out
        assert text.startswith("usage:") and "--model" in text, script


def test_wrong_input_is_refused_before_a_model_is_loaded(toy, tmp_path):
    """The release loads 8B parameters on every GPU and then dies of a typing error. Under torchrun the
    sentence must not be lost above forty lines of its own."""
    records = json.loads((toy / "rl_train.json").read_text())[:8]
    del records[3]["answer"]
    (toy / "no_answer.json").write_text(json.dumps(records))
    files = ["--model", toy / "model", "--data", toy / "no_answer.json", "--out", tmp_path / "run"]
    result = run("rl_ema_grpo.py", *files, ranks=2, torchrun=True, check=False)
    assert result.returncode != 0 and not (tmp_path / "run").exists()
    said = [line for line in result.stderr.splitlines() if line.startswith("rl_ema_grpo.py: ")]
    sentence = "no_answer.json: record 3: answer is"
    assert len(said) == 1 and sentence in said[0], result.stderr
    assert sentence in "".join(result.stderr.splitlines()[-3:]) and "Loading" not in result.stderr


def test_wrong_values_and_paths_are_named(monkeypatch, capsys, tmp_path):
    """--steps 0 trains on nothing; a folder that is not there is looked for on the hub for minutes."""
    command = "rl_ema_grpo.py --model m --data d --out o --steps 0"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit, match="^2$"):
        rl_ema_grpo.parse_args()
    assert "argument --steps: 0 is not a number from 1 on" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match="^runs/nothere: no folder of a model, and no hub id"):
        data.load_processor("runs/nothere")
    with pytest.raises(OSError, match="nowhere.json"):
        data.load_records("nowhere.json")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """demo.sh in a few steps: toy, SFT, RL, three evaluations, table, curves."""
    out = tmp_path_factory.mktemp("demo")
    result = subprocess.run(
        ["bash", "demo.sh", "--quick", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return out, result.stdout


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_demo_runs_to_the_end(demo):
    """A demo that rots: every stage, its files, the table and the plot."""
    out, said = demo
    sft, rl = rows(out / "sft" / "metrics.jsonl"), rows(out / "rl" / "metrics.jsonl")
    assert [row["step"] for row in sft] == [1, 2, 3] and all(row["grad_norm"] > 0 for row in sft)
    assert [row["step"] for row in rl] == [1, 2]
    named = "reward accuracy kept_share response_tokens finished_share tokens_per_second gb"
    named += " seconds/sync seconds/generate seconds/grade seconds/update"
    assert all(set(named.split()) <= set(row) for row in rl)
    for stage in ("sft", "rl"):
        assert (out / stage / "args.json").exists() and list((out / stage).glob("checkpoints/*"))
    assert (out / "curves.png").stat().st_size > 10_000
    for line in (out / "rl" / "rollouts.jsonl").read_text().splitlines():
        entry = json.loads(
            line
        )  # another group's rewards or advantages: those of one group have the same order
        assert len(entry["rewards"]) == 8 and len(entry["advantages"]) in (0, 8)
        assert [a for _, a in sorted(zip(entry["rewards"], entry["advantages"]))] == sorted(
            entry["advantages"]
        )
    for model in ("sft", "rl"):
        results = json.loads((out / "eval" / model / "results.json").read_text())
        assert len(results) >= 12
    table = json.loads((out / "table.json").read_text())
    assert table and re.search(r"SFT .*RL", said)


def test_same_command_resumes(demo, toy):
    """A rerun that starts from nothing, or repeats what is done. More steps are another cosine, so they need --force."""
    out, _ = demo
    before = (out / "sft" / "model.safetensors").read_bytes()
    with open(out / "sft" / "metrics.jsonl", "a") as file:
        file.write(
            '{"step": 4, "loss": 9.9}\n{"step": 5, "lo'
        )  # as a kill between two checkpoints leaves it
    options = "--lr 2e-3 --train-vision --dtype float32 --no-recompute --workers 1".split()
    options += "--max-prompt-tokens 400 --image-min-pixels 4096".split()
    data = sorted((out / "toy").glob("sft_*.json"))
    files = ["--model", out / "toy/model", "--data", *data, "--out", out / "sft"]
    run("sft.py", *files, "--steps", 5, "--force", *options, ranks=2, torchrun=True)
    metrics = rows(out / "sft" / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5] and metrics[3]["loss"] != 9.9
    assert (out / "sft" / "model.safetensors").read_bytes() != before


def test_trained_folder_opens_with_transformers(demo):
    """An export with wrong names, a missing chat template, or garbage in the rotary tables."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from data import encode, load_records

    folder = demo[0] / "rl"
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(folder)
    prompt = encode(load_records(demo[0] / "toy" / "rl_train.json")[0], processor)
    media = prompt.vllm["multi_modal_data"]
    if "image" in media:
        inputs = processor(
            text=[prompt.vllm["prompt"]],
            images=media["image"],
            do_resize=False,
            return_tensors="pt",
        )
    else:
        frames, metadata = media["video"][0]
        metadata = {key: metadata[key] for key in ("fps", "frames_indices", "total_num_frames")}
        inputs = processor(
            text=[prompt.vllm["prompt"]], videos=[torch.from_numpy(frames.copy())], video_metadata=[metadata],
            do_sample_frames=False, do_resize=False, return_tensors="pt",
        )  # fmt: skip
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert (
        answer.shape[1] == inputs["input_ids"].shape[1] + 4
        or processor.tokenizer.eos_token_id in answer[0, -4:]
    )
