"""Kills, full disks, damaged files: what a run of days on many GPUs meets. tests/soak.py does the same for longer."""

import argparse
import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from conftest import ROOT, run
from safetensors.torch import load_file

import data
import sft

RL = "--steps 4 --prompts-per-step 4 --rollouts-per-prompt 4 --updates-per-step 2 --lr 1e-3 --max-response-tokens 24"
RL += " --dtype float32 --no-recompute --workers 1 --max-prompt-tokens 400 --save-every 1 --max-rounds 2 --max-bad-share 0.5 --image-min-pixels 4096"
SFT = "--steps 4 --sequences-per-step 8 --lr 1e-3 --dtype float32 --no-recompute --workers 1 --save-every 1"
SFT += " --image-min-pixels 4096"


def metrics(out):
    """metrics.jsonl without what a clock or a memory gauge wrote."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = ("seconds", "gb", "tokens_per_second")
    return [
        {key: value for key, value in row.items() if not key.startswith(measured)} for row in rows
    ]


def start(script, deaths, settings, model, files, out, ranks=2, **more):
    return run(
        "tests/doomed.py", deaths, script, "--model", model, "--data", *files, "--out", out, *settings.split(),
        ranks=ranks, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def damaged_toy(toy, tmp_path_factory):
    """The toy with a tenth of its pictures and films destroyed, and two answers that make no sense."""
    folder = tmp_path_factory.mktemp("damaged") / "toy"
    shutil.copytree(toy, folder)
    records = json.loads((folder / "rl_train.json").read_text())
    for record in records[::10]:
        (folder / (record.get("images") or record.get("videos"))[0]).write_bytes(b"no picture")
    boxes = [record for record in records if record["problem_type"] == "spatial grounding"]
    boxes[0]["answer"] = '<answer>{"boxes": [900, 900, 1, 1]}</answer>'
    boxes[1]["answer"] = '<answer>{"boxes": {"left": 1e300}}</answer>'
    (folder / "rl_train.json").write_text(json.dumps(records))
    return folder


def test_rl_killed_in_every_phase_ends_as_if_nothing_had_happened(damaged_toy, tmp_path):
    """Moments, cursor, seeds or optimiser state that a restart forgets; a half-written checkpoint that is picked up; counts
    of skipped media that a restart loses. kill -9 of all ranks while generating, updating and saving, torchrun restarts."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    files = [damaged_toy / "rl_train.json"]
    start("rl_ema_grpo", "", RL, damaged_toy / "model", files, whole)
    deaths = "rl_ema_grpo.generate:2:all rl_ema_grpo.update:4:all sft.save_checkpoint:1:all"
    start("rl_ema_grpo", deaths, RL, damaged_toy / "model", files, killed, restarts=3)
    assert metrics(whole) == metrics(killed)
    assert (whole / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()
    assert (whole / "model.safetensors").read_bytes() != (
        damaged_toy / "model" / "model.safetensors"
    ).read_bytes()
    states = [
        json.loads((out / "checkpoints/step-000004/state.json").read_text())
        for out in (whole, killed)
    ]
    assert (
        states[0]["moments"] == states[1]["moments"] and states[0]["cursor"] == states[1]["cursor"]
    )
    last = metrics(whole)[-1]
    records = data.load_records(files[0], max_bad_share=0.5)
    taken = itertools.islice(data.data_order(len(records), 0), states[0]["cursor"])
    damaged = sum(records[i]["index"] % 10 == 0 for i in taken)
    skipped = sum(count for name, count in last.items() if name.startswith("skipped/unreadable"))
    assert skipped == damaged > 0
    assert last["records"] == states[0]["cursor"] and math.isfinite(last["grad_norm"])
    assert not list(killed.glob("checkpoints/*.tmp"))


def test_sft_killed_ranks_and_another_number_of_ranks(toy, tmp_path):
    """One rank that dies must not hang the other; a run goes on with fewer ranks and with more, on the same data."""
    model, files = toy / "model", [toy / "sft_image.json"]
    start("sft", "", SFT + " --keep 1", model, files, tmp_path / "whole")
    assert len(list((tmp_path / "whole").glob("checkpoints/*"))) == 1
    for ranks, deaths in (
        (2, "sft.update:3:0"),
        (1, "sft.update:2:all"),
        (2, ""),
    ):  # 2, 1 and 1 step
        start("sft", deaths, SFT, model, files, tmp_path / "moved", ranks=ranks, check=not deaths)
    losses, expected = (
        [row["loss"] for row in metrics(tmp_path / out)] for out in ("moved", "whole")
    )
    assert losses == pytest.approx(expected, rel=1e-4)
    begin, end = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "whole"))
    for name, tensor in end.items():  # without --train-vision
        assert torch.equal(tensor, begin[name].to(tensor.dtype)) == ("visual" in name), name


def test_an_exception_of_one_rank_ends_all_with_its_traceback(toy, tmp_path):
    """Ranks that wait an hour in a collective for one that is gone; a traceback that nobody sees."""
    files, death = [toy / "sft_image.json"], "sft.update:1:raise1"
    result = start(
        "sft", death, SFT, toy / "model", files, tmp_path / "out", check=False, torchrun=True
    )
    assert result.returncode != 0
    assert "ArithmeticError: on purpose" in result.stderr


def hang(record):
    time.sleep(10**6)


def test_a_data_worker_that_hangs_ends_the_run():
    """A file system that never answers: all ranks wait in silence."""
    with pytest.raises(RuntimeError, match="timed out"):
        next(data.prefetch([{}], hang, [0], workers=1, seconds=1))


def test_data_workers_do_not_outlive_a_killed_rank():
    """Orphans that keep gigabytes of films after each kill -9: they wait for a reader of their full pipe."""
    code = """
import os, sys, numpy as np
sys.path.insert(0, ".")
import data
stream = data.prefetch([{}] * 99, lambda record: np.zeros(10**7), range(99), workers=1)
next(stream)
print(stream._workers[0].pid, flush=True)
sys.stdin.read()
"""
    script = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    worker = int(script.stdout.readline())
    assert os.path.exists(f"/proc/{worker}")
    script.kill()
    script.wait()
    for _ in range(100):
        if not os.path.exists(f"/proc/{worker}"):
            break
        time.sleep(0.1)
    else:
        os.kill(worker, signal.SIGKILL)
        pytest.fail("the data worker is still there")


@pytest.fixture(scope="module")
def alone():
    """This process as a process group of one."""
    sft.init_distributed()
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def trainer(alone, toy):
    model = sft.load_model(toy / "model", torch.device("cpu"), torch.float32)
    return model, torch.optim.AdamW(model.parameters(), 1e-3)


def settings_of(out, **more):
    args = dict(out=str(out), model="", keep=2, lr=1e-3, weight_decay=0.0, force=False)
    return argparse.Namespace(**args | more)


def test_a_full_disk_ends_the_run_and_keeps_the_older_checkpoint(trainer, tmp_path):
    """A failed save that destroys the checkpoint before it, is taken for a whole one, or is silent."""
    args, folder = settings_of(tmp_path), tmp_path / "checkpoints"
    sft.save_checkpoint(args, *trainer, dict(step=1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))  # as a disk that is full after 1 MB
    try:
        with pytest.raises(OSError, match="step-000002 could not be saved .*older ones are whole"):
            sft.save_checkpoint(args, *trainer, dict(step=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name for path in folder.iterdir()} == {"step-000001", "step-000002.tmp"}
    assert sft.start_run(args)["step"] == 1
    for step in (2, 3):  # over the remains of the failed one
        sft.save_checkpoint(args, *trainer, dict(step=step))
    assert {path.name for path in folder.iterdir()} == {"step-000002", "step-000003"}


def test_forced_settings_count(trainer, tmp_path):
    """--force with another learning rate, and the one in the checkpoint is used."""
    sft.save_checkpoint(settings_of(tmp_path), *trainer, dict(step=1))
    args = settings_of(tmp_path, lr=5e-4, weight_decay=0.1)
    group = sft.load_optimizer(args, trainer[0], 1).param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (5e-4, 0.1)


def test_a_run_does_not_go_on_with_other_settings(alone, tmp_path, capsys):
    """Two halves of a run with different learning rates under one name."""
    folder = tmp_path / "checkpoints/step-000007"
    folder.mkdir(parents=True)
    old = dict(lr=1e-5, workers=4, method="grpo", gone=1)
    (folder / "state.json").write_text(json.dumps(dict(step=7, args=old)))
    new = settings_of(tmp_path, lr=2e-5, workers=4, method="ema_grpo")
    with pytest.raises(SystemExit):
        sft.start_run(new)
    said = capsys.readouterr().err
    assert "--lr was 1e-05, is 2e-05" in said and "method" in said and "workers" not in said
    new.force = True
    assert sft.start_run(new)["step"] == 7
    assert sft.start_run(settings_of(tmp_path / "new"))["step"] == 0


def test_the_input_folder_is_no_run_folder(alone, tmp_path, capsys):
    """Hours of training that end while the model is copied onto its own input."""
    with pytest.raises(SystemExit):
        sft.start_run(settings_of(tmp_path, model=str(tmp_path / ".")))
    assert "is the folder of --model" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_found_before_training(alone, tmp_path, capsys):
    """A run that trains for hours and then cannot save."""
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        sft.start_run(settings_of(tmp_path / "file" / "run"))
    assert "cannot be written" in capsys.readouterr().err


def test_metrics_are_json_and_end_with_the_checkpoint(alone, tmp_path):
    """A skipped update's nan is no JSON; lines of steps that were lost would stand there twice."""
    for step in (1, 2, 3):
        sft.log_metrics(tmp_path, dict(step=step, grad_norm=math.nan if step == 2 else 0.5))
    path = tmp_path / "metrics.jsonl"
    strict = lambda text: json.loads(text, parse_constant=pytest.fail)
    assert [strict(line)["grad_norm"] for line in path.read_text().splitlines()] == [0.5, None, 0.5]
    path.write_text(path.read_text() + '{"step": 4, "gra')
    folder = tmp_path / "checkpoints/step-000002"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text('{"step": 2}')
    sft.start_run(settings_of(tmp_path))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_an_export_has_the_files_of_the_input(trainer, toy, tmp_path):
    """Files rewritten by a newer transformers, which older ones, with other scripts, cannot open."""
    source = tmp_path / "source"
    shutil.copytree(toy / "model", source)
    for name in ("metrics.jsonl", "args.json", "model.safetensors.index.json", "pytorch_model.bin"):
        (source / name).write_text("{}")
    for name in ("vocab.json", "preprocessor_config.json", "README.md", "prompt"):
        (source / name).write_text("as it was")
    (source / "original").mkdir()
    (tmp_path / "out").mkdir()
    sft.export_model(trainer[0], source, tmp_path / "out")
    same = {path.name for path in (toy / "model").iterdir()}
    same |= {"vocab.json", "preprocessor_config.json", "README.md", "prompt"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == same
    for name in same - {"model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_moves_nothing(trainer, what):
    """One bad batch that turns all weights, or Adam's moments, into NaN for good."""
    model, optimizer = trainer
    args = argparse.Namespace(tokens_per_microbatch=8, grad_clip=1.0)
    step = partial(sft.update, model, optimizer, [sft.DUMMY], args, torch.device("cpu"))
    assert step()["grad_norm"] > 0
    before = [param.to_local().clone() for param in model.parameters()]
    moments = [state["exp_avg"].to_local().clone() for state in optimizer.state.values()]
    bad = dict(loss=lambda zeros: zeros + math.nan, gradient=torch.sqrt)  # infinite slope at 0
    numbers = step(lambda logps, at: (bad[what](0 * logps), {}))
    assert math.isnan(numbers["loss"]) == (what == "loss") and math.isnan(numbers["grad_norm"])
    assert all(torch.equal(a, b.to_local()) for a, b in zip(before, model.parameters()))
    assert all(
        torch.equal(a, s["exp_avg"].to_local()) for a, s in zip(moments, optimizer.state.values())
    )
    assert all(param.grad is None for param in model.parameters())


def test_signals_and_the_clock_stop_at_the_end_of_a_step(alone):
    """Ctrl-C in the middle of an update, ranks that stop at different steps, a second Ctrl-C that waits too."""
    old = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    for number in (signal.SIGTERM, signal.SIGINT):
        stop = sft.watch_for_stop(minutes=60)
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        assert (signal.getsignal(signal.SIGINT) == signal.SIG_DFL) == (number == signal.SIGINT)
    assert sft.watch_for_stop(minutes=1e-9)() and not sft.watch_for_stop()()
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), old):
        signal.signal(number, handler)
