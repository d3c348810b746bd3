"""vLLM's OpenAI server on a CPU: python tests/serve.py --model runs/rl --port 8000. On a GPU:
vllm serve runs/rl --trust-request-mm-kwargs (for the times of video frames, set here anyway)."""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cpu_compat

cpu_compat.register_qwen3_vl()  # here, and again in the engine's process, which imports this file

if __name__ == "__main__":
    sys.argv.append("--trust-request-mm-kwargs")
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
