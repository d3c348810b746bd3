"""vLLM's OpenAI server on a CPU: python tests/serve.py --model runs/rl --port 8000. On a GPU: vllm serve runs/rl."""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cpu_compat

cpu_compat.register_qwen3_vl()  # in this process, and again in the engine's, which imports this file when it is spawned

if __name__ == "__main__":
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
