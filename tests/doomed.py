"""Runs sft.py or rl_ema_grpo.py and kills it on purpose; test_survival.py and soak.py use it.

    torchrun --standalone --nproc-per-node 2 --max-restarts 2 tests/doomed.py \\
        "rl_ema_grpo.generate:2:all sft.save_checkpoint:1:0" rl_ema_grpo --model ...

Death i belongs to restart i: function:call:rank dies by SIGKILL 0.1 s after that call begins ("all":
every rank; "raise0": rank 0 raises an exception). The restart after the last death lives.
The toy's model is untrained and earns nothing, so rewards are made from the sampled tokens: every
step has groups to train on.
"""

import importlib
import os
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cpu_compat  # noqa: F401
import torch

from rewards import Score

torch.set_num_threads(1)
deaths, script = sys.argv[1].split(), importlib.import_module(sys.argv[2])
sys.argv = [f"{sys.argv[2]}.py", *sys.argv[3:]]
restart, rank = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), os.environ["RANK"]


def doom(module, name, at, who):
    """Replaces a function by one whose call number `at` kills this process."""
    original, calls = getattr(module, name), []

    def doomed(*args, **kwargs):
        calls.append(1)
        if len(calls) == at and who in ("all", rank):
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGKILL)).start()
        if len(calls) == at and who == f"raise{rank}":
            raise ArithmeticError("on purpose")
        return original(*args, **kwargs)

    setattr(module, name, doomed)


def grade_by_tokens(rollouts, grader, tokenizer):
    for rollout in rollouts:
        values = [0.05 + 0.9 * (sum(tokens) % 89) / 89 for tokens in rollout.responses]
        rollout.scores = [Score(0.9 * value + 0.1, value, 1.0) for value in values]


if restart < len(deaths):
    path, at, who = deaths[restart].split(":")
    doom(importlib.import_module(path.split(".")[0]), path.split(".")[1], int(at), who)
script.grade = grade_by_tokens  # of rl_ema_grpo; sft has no such names
script.Grader = lambda **_: SimpleNamespace(counts={}, close=lambda: None)
script.main()
