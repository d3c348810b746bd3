"""Shared by all tests: one thread, one toy world, and a way to run the scripts as a person would."""

import os
import subprocess
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # two ranks on two cores; before torch starts
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

import cpu_compat  # noqa: E402, F401

torch.set_num_threads(1)


def run(*command, ranks=0, restarts=0, timeout=300, check=True):
    """Runs a script of the project in a process of its own, under torchrun if ranks > 0."""
    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        launcher += ["--max-restarts", str(restarts)]
    result = subprocess.run(
        [*launcher, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )
    if check and result.returncode:
        pytest.fail(f"{command[0]} ended with {result.returncode}:\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}")
    return result


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A small toy world: model, records of all tasks in all three forms, media."""
    folder = tmp_path_factory.mktemp("toy")
    run("tests/toy.py", folder, "--sft", 96, "--rl", 96, "--eval", 2)
    return folder


@pytest.fixture(scope="session")
def processor(toy):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(toy / "model")


@pytest.fixture
def seeded():
    torch.manual_seed(0)
