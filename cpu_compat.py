"""vLLM's environment, and what a CPU-only installation needs to behave. Import it before transformers or vllm.

Outside PyTorch's own CPU index, torchvision, torchaudio and torchcodec come as CUDA builds that a CPU torch cannot load.
Nothing here uses their compiled code, so the two audio packages are hidden when they do not load, and torchvision
gets declarations of the two operators that it wants to annotate.
"""

import importlib
import os
import sys
import warnings

import torch

os.environ.setdefault(
    "VLLM_ENABLE_V1_MULTIPROCESSING", "0"
)  # the engine lives in our process: torchrun owns the ranks
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # vLLM reports usage by default
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings(
    "ignore", message=".*torch.distributed.reduce_op.*"
)  # vLLM's own, twice a rank

if torch.version.cuda is None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    for name in ("torchaudio", "torchcodec"):
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError):
            sys.modules[name] = None
    try:
        import torchvision
    except RuntimeError:  # "operator torchvision::nms does not exist"
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        for op in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{op}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
        import torchvision  # noqa: F401


def register_qwen3_vl():
    """On a CPU: name the model class to vLLM, which would otherwise inspect it in a subprocess that lacks the above."""
    if torch.version.cuda is None:
        from vllm import ModelRegistry
        from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration as Model

        ModelRegistry.register_model("Qwen3VLForConditionalGeneration", Model)
