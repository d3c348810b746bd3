"""vLLM's OpenAI server on a CPU: python tests/serve.py --model runs/rl --port 8000. On a GPU: vllm serve runs/rl."""

import os
import runpy
import sys
from pathlib import Path

os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cpu_compat

cpu_compat.register_qwen3_vl()
runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
