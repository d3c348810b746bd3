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
import threading
import time
from collections import Counter

import pytest
import torch
from conftest import ROOT, run
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemWriter

import data
import rl_ema_grpo
import sft

RL = "--steps 4 --prompts-per-step 4 --rollouts-per-prompt 4 --updates-per-step 2 --lr 1e-3 --max-response-tokens 24"
RL += " --dtype float32 --no-recompute --workers 1 --max-prompt-tokens 400 --save-every 1 --max-rounds 2 --max-bad-share 0.5"
SFT = "--steps 4 --sequences-per-step 8 --lr 1e-3 --dtype float32 --no-recompute --workers 1 --save-every 1"


def metrics(out):
    """metrics.jsonl without what a clock or a memory gauge wrote."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = ("seconds", "gb", "tokens_per_second", "tflops")
    return [
        {key: value for key, value in row.items() if not key.startswith(measured)} for row in rows
    ]


def start(script, deaths, settings, model, files, out, ranks=2, restarts=0, check=True):
    return run(
        "tests/doomed.py", deaths, script, "--model", model, "--data", *files, "--out", out, *settings.split(),
        ranks=ranks, restarts=restarts, check=check,
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
    deaths = "rl_ema_grpo.generate:2:all rl_ema_grpo.update:4:all sft.publish:1:all"
    start("rl_ema_grpo", deaths, RL, damaged_toy / "model", files, killed, restarts=3)
    assert metrics(whole) == metrics(killed)
    assert (whole / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()
    assert (whole / "model.safetensors").read_bytes() != (
        damaged_toy / "model" / "model.safetensors"
    ).read_bytes()
    states = [
        json.loads((out / "checkpoints/step-000004/trainer_state.json").read_text())
        for out in (whole, killed)
    ]
    assert (
        states[0]["moments"] == states[1]["moments"] and states[0]["cursor"] == states[1]["cursor"]
    )
    last = metrics(whole)[-1]
    records = data.load_records(files[0])
    taken = itertools.islice(data.data_order(len(records), 0), states[0]["cursor"])
    assert (
        last["skipped/unreadable_image"] + last["skipped/unreadable_video"]
        == sum(i % 10 == 0 for i in taken)
        > 0
    )
    assert last["records"] == states[0]["cursor"] and math.isfinite(last["loss"])
    assert not list(killed.glob("checkpoints/*.tmp"))


def test_sft_killed_ranks_and_another_number_of_ranks(toy, tmp_path):
    """One rank that dies must not hang the other; a run goes on with fewer ranks and with more, on the same data."""
    model, files = toy / "model", [toy / "sft_image.json"]
    start("sft", "", SFT + " --export-saves --keep 1", model, files, tmp_path / "whole")
    exports = list((tmp_path / "whole").glob("step-*/model.safetensors"))
    assert len(exports) == 4 and len(list((tmp_path / "whole").glob("checkpoints/step-*"))) == 1
    start("sft", "sft.update:2:0", SFT, model, files, tmp_path / "one", restarts=1)
    assert metrics(tmp_path / "one") == metrics(tmp_path / "whole")
    assert (tmp_path / "one/model.safetensors").read_bytes() == (
        tmp_path / "whole/model.safetensors"
    ).read_bytes()
    for ranks, deaths in (
        (2, "sft.update:3:all"),
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


def test_a_save_does_not_change_what_is_computed(alone, toy, tmp_path):
    """Making Adam's moments for a checkpoint counts as a step: the first real one is then a quarter too small."""
    moves = []
    for saved in (False, True):
        model = sft.load_model(toy / "model", torch.device("cpu"), torch.float32)
        optimizer = sft.adamw(model, 1e-3, 0.0)
        if saved:
            save(tmp_path, (model, optimizer), alone, 1)
        before = [param.to_local().clone() for param in model.parameters()]
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
        moves.append(
            [(a - b.to_local()).abs().max().item() for a, b in zip(before, model.parameters())]
        )
    assert moves[0] == moves[1] == pytest.approx([1e-3] * len(moves[0]), rel=1e-2)


def test_an_exception_of_one_rank_ends_all_with_its_traceback(toy, tmp_path):
    """Ranks that wait an hour in a collective for one that is gone; a traceback that nobody sees."""
    files = [toy / "rl_train.json"]
    result = start(
        "rl_ema_grpo",
        "rl_ema_grpo.update:1:raise1",
        RL,
        toy / "model",
        files,
        tmp_path / "out",
        check=False,
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
    """This process as a process group of one, and the group that saves."""
    sft.init_distributed()
    yield torch.distributed.new_group(backend="gloo")
    torch.distributed.destroy_process_group()


@pytest.fixture
def trainer(alone, toy):
    model = sft.load_model(toy / "model", torch.device("cpu"), torch.float32)
    return model, sft.adamw(model, 1e-3, 0.0)


def save(out, trainer, group, step, tally=None, keep=2):
    sft.save_checkpoint(
        str(out), *trainer, dict(step=step), group, keep, Counter() if tally is None else tally
    ).join()


def test_a_full_disk_keeps_the_run_and_the_older_checkpoint(
    alone, trainer, tmp_path, capsys, monkeypatch
):
    """A failed save that ends the run, destroys the checkpoint before it, leaves its ruins, or is kept quiet."""
    tally = Counter()
    save(tmp_path, trainer, alone, 1, tally)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (2**20, hard)
    )  # as a disk that is full after a megabyte
    save(tmp_path, trainer, alone, 2, tally)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert tally == {"failed_saves": 1} and "step 2 could not be saved" in capsys.readouterr().out
    with monkeypatch.context() as patch:  # the last few bytes
        patch.setattr(sft.Path, "rename", lambda self, target: open("/nowhere/at/all"))
        save(tmp_path, trainer, alone, 2, tally)
    assert tally.pop("failed_saves") == 2 and "/nowhere/at/all" in capsys.readouterr().out
    tally["failed_saves"] = 1
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step-000001"]
    assert sft.find_checkpoint(str(tmp_path))[1]["step"] == 1
    save(tmp_path, trainer, alone, 3, tally)
    assert sft.find_checkpoint(str(tmp_path))[1]["step"] == 3 and tally["failed_saves"] == 1


def test_training_goes_on_while_a_checkpoint_is_written(alone, trainer, tmp_path, monkeypatch):
    """An asynchronous save that writes the weights as they are later, not as they were."""
    model, optimizer = trainer
    before = {name: tensor.clone() for name, tensor in sft.full_weights(model, torch.float32)}
    moved, write = threading.Event(), FileSystemWriter.write_data
    monkeypatch.setattr(
        FileSystemWriter, "write_data", lambda *args: moved.wait(60) and write(*args)
    )
    thread = sft.save_checkpoint(str(tmp_path), model, optimizer, dict(step=1), alone, 2, Counter())
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1.0)
    moved.set()
    thread.join()
    folder, state = sft.find_checkpoint(str(tmp_path))
    sft.load_checkpoint(folder, state, model, optimizer)
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in sft.full_weights(model, torch.float32)
    )


def test_damaged_checkpoints_are_passed_over(alone, trainer, tmp_path, capsys):
    """A truncated file that ends the resumed run, or a run that begins anew over all the steps it had."""
    for step in (1, 2, 3):
        save(tmp_path, trainer, alone, step)
    checkpoints = tmp_path / "checkpoints"
    assert sorted(os.listdir(checkpoints)) == ["latest", "step-000002", "step-000003"]
    (checkpoints / "latest").write_text("step-000099")  # `latest` is for people
    part = next((checkpoints / "step-000003").glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-1])
    folder, state = sft.find_checkpoint(str(tmp_path))
    assert state["step"] == 2 and folder.name == "step-000002"
    assert "step-000003 is damaged" in capsys.readouterr().out
    (checkpoints / "step-000002" / "trainer_state.json").write_text('{"step": 2')
    with pytest.raises(SystemExit):
        sft.find_checkpoint(str(tmp_path))
    assert "all checkpoints under" in capsys.readouterr().err
    assert sft.find_checkpoint(str(tmp_path / "new")) == (None, {})


def test_other_settings_or_another_model_are_refused(alone, trainer, tmp_path, capsys):
    """Two halves of a run with different learning rates, or other weights, under one name."""
    args = argparse.Namespace(out="runs/x", lr=2e-5, workers=8, method="ema_grpo", force=False)
    state = dict(args=dict(out="runs/y", lr=1e-5, workers=4, method="grpo", gone=1))
    with pytest.raises(SystemExit):
        sft.check_resume(state, args, ["out", "workers"])
    said = capsys.readouterr().err
    assert "--lr was 1e-05, is now 2e-05" in said and "method" in said and "workers" not in said
    args.force = True
    sft.check_resume(state, args, ["out", "workers"])
    sft.check_resume({}, argparse.Namespace(lr=1, force=False), [])
    save(tmp_path, trainer, alone, 1)
    folder, state = sft.find_checkpoint(str(tmp_path))
    with pytest.raises(SystemExit):
        sft.load_checkpoint(folder, state | dict(parameters=7), *trainer)
    assert "holds a model of 7 parameters" in capsys.readouterr().err


def test_every_free_setting_is_a_setting():
    """A name in MAY_CHANGE that no flag has any more."""
    for script in (sft, rl_ema_grpo):
        source = (ROOT / f"{script.__name__}.py").read_text()
        for name in script.MAY_CHANGE:
            assert f'"--{name.replace("_", "-")}"' in source or name in data.Limits._fields, name


def test_no_room_or_no_right_to_write_is_found_before_training(
    alone, trainer, tmp_path, monkeypatch, capsys
):
    """A run that trains for hours and then cannot save."""
    parameters = sum(param.numel() for param in trainer[0].parameters())
    for free, there, enough in (
        (38, 0, True),
        (37, 0, False),
        (14, 3, True),
        (13, 3, False),
    ):  # bytes a parameter
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        for step in range(there):
            (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
        usage = argparse.Namespace(free=free * parameters)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        if enough:
            sft.check_room(str(tmp_path), trainer[0], keep=2)
        else:
            with pytest.raises(SystemExit):
                sft.check_room(str(tmp_path), trainer[0], keep=2)
            assert "GB free" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        sft.start_run(argparse.Namespace(out=str(tmp_path / "file" / "run")))
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_moves_nothing(trainer, what):
    """One bad batch that turns all weights, or Adam's moments, into NaN for good."""
    model, optimizer = trainer
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    assert sft.optimizer_step(model, optimizer, 1.0, loss=0.5) > 0
    before = [param.to_local().clone() for param in model.parameters()]
    moments = [state["exp_avg"].to_local().clone() for state in optimizer.state.values()]
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    if what == "gradient":
        next(model.parameters()).grad.to_local().view(-1)[0] = math.nan
    assert math.isnan(
        sft.optimizer_step(model, optimizer, 1.0, loss=math.nan if what == "loss" else 0.5)
    )
    assert all(torch.equal(a, b.to_local()) for a, b in zip(before, model.parameters()))
    assert all(
        torch.equal(a, s["exp_avg"].to_local()) for a, s in zip(moments, optimizer.state.values())
    )
    assert all(param.grad is None for param in model.parameters())


def test_signals_and_the_clock_stop_at_the_end_of_a_step(alone):
    """Ctrl-C in the middle of an update, or ranks that stop at different steps."""
    old = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    for number in (signal.SIGTERM, signal.SIGINT):
        stop = sft.Stop(minutes=60)
        assert not stop.now()
        os.kill(os.getpid(), number)
        assert stop.now()
    assert sft.Stop(minutes=1e-9).now() and not sft.Stop().now()
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), old):
        signal.signal(number, handler)
