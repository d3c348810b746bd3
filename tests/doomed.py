"""Runs sft.py or rl_ema_grpo.py and kills it on purpose, by SIGKILL: what test_survival.py and soak.py put under torchrun.

    torchrun --standalone --nproc-per-node 2 --max-restarts 2 tests/doomed.py "rl_ema_grpo.generate:2:all sft.save_checkpoint:1:0" rl_ema_grpo ...

Death i belongs to restart i: function:call:rank dies 0.1 s after that function is entered for that time ("all": every rank;
"raise0" instead of a rank: that rank raises an exception). The restart after the last lives.

"towers" in place of deaths: now and then the response to a math record is a factorial that sympy does not finish.
The toy's model is untrained and earns nothing, so rewards are made from the sampled tokens: every step has groups to train on.
"""

import importlib
import os
import signal
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cpu_compat  # noqa: F401
import torch

torch.set_num_threads(1)
towers, script = sys.argv[1] == "towers", importlib.import_module(sys.argv[2])
deaths = [] if towers else sys.argv[1].split()
sys.argv = [f"{sys.argv[2]}.py", *sys.argv[3:]]
restart, rank = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), os.environ["RANK"]
if restart < len(deaths):
    path, at, who = deaths[restart].split(":")
    module, name = path.split(".")
    module = importlib.import_module(module)
    original, calls = getattr(module, name), []

    def doomed(*args, **kwargs):
        calls.append(1)
        if len(calls) == int(at) and who in ("all", rank):
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGKILL)).start()
        if len(calls) == int(at) and who == f"raise{rank}":
            raise ArithmeticError("on purpose")
        return original(*args, **kwargs)

    setattr(module, name, doomed)
if script.__name__ == "rl_ema_grpo":
    from rewards import total

    grade, text_of = script.grade, script.text_of

    def grade_by_tokens(rollouts, grader, tokenizer):
        script.text_of = hanging_text if towers else text_of
        grade(rollouts, grader, tokenizer)
        script.text_of = text_of
        for rollout in rollouts:
            rollout.scores = [
                total(0.05 + 0.9 * (sum(tokens) % 89) / 89, 0.0) for tokens in rollout.responses
            ]

    def hanging_text(rollout, i, tokenizer):
        is_math = rollout.prompt.record["problem_type"] == "math"
        if is_math and sum(rollout.responses[i]) % 8 == 0:  # one response in about 100
            print("tower on purpose", flush=True)
            return "<think>.</think><answer>$99999999!$</answer>"
        return text_of(rollout, i, tokenizer)

    script.grade = grade_by_tokens
script.main()
