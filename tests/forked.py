"""torchrun for tests: its ranks are forks of one process that has imported everything, which saves half of their time.

python tests/forked.py RANKS RESTARTS SCRIPT [ARGUMENTS]
"""

import runpy
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import cpu_compat
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import rl_ema_grpo  # noqa: F401  (and with it sft, data, transformers)
from transformers import Qwen3VLProcessor, tokenization_mistral_common  # noqa: F401


def rank(*command):
    sys.argv = [*command]
    runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks, restarts, *command = sys.argv[1:]
    if {"rl_ema_grpo", "tests/sync.py"} & {*command}:
        from vllm import LLM  # noqa: F401

        cpu_compat.register_qwen3_vl()
    store = dict(rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="forked")
    config = LaunchConfig(
        1, 1, int(ranks), **store, max_restarts=int(restarts), start_method="fork"
    )
    try:
        elastic_launch(config, rank)(*command)
    except ChildFailedError as error:
        sys.exit(str(error))
