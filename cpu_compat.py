"""vLLM's environment, what a CPU-only installation needs, and a faster patch embedding. Import it before
torch, transformers or vllm.

Outside PyTorch's own CPU index, torchvision, torchaudio and torchcodec come as CUDA builds that a CPU
torch cannot load. Nothing here uses their compiled code, so the two audio packages are hidden when they
do not load, and torchvision gets declarations of the two operators that it wants to annotate.
"""

import importlib
import logging
import os
import sys
import warnings

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # torchrun owns the ranks
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # vLLM reports usage by default
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the NUMA nodes of each engine
warnings.filterwarnings("ignore", message=".*torch.distributed.reduce_op.*")  # vLLM, twice a rank
logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)  # "Triton is installed"

import torch  # noqa: E402

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
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for op in ("nms", "qnms"):
            torch.library.define(f"torchvision::{op}", schema)
        import torchvision  # noqa: F401


def register_qwen3_vl():
    """On a CPU: names the model class to vLLM, which else inspects it in a subprocess without this."""
    if torch.version.cuda is None:
        from vllm import ModelRegistry
        from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration as Model

        ModelRegistry.register_model("Qwen3VLForConditionalGeneration", Model)


def one_matrix_patch_embedding(visual):
    """Makes the patch embedding of a vision tower one matrix product: it is a Conv3d whose kernel covers
    each patch exactly once, which is slow and in some versions of cuDNN fails."""
    conv, linear = visual.patch_embed.proj, torch.nn.functional.linear
    rows = lambda: conv.weight.flatten(1)
    visual.patch_embed.forward = lambda x: linear(x.to(conv.weight.dtype), rows(), conv.bias)
