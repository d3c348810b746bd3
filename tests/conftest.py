"""Shared by all tests: one thread, one toy world, and a way to run the scripts as a person would."""

import os
import subprocess
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # two ranks on two cores; before torch starts
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # vLLM's sampler compiles for longer than a test samples
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pytest
import torch

import cpu_compat  # noqa: F401

torch.set_num_threads(1)


def run(*command, ranks=0, restarts=0, torchrun=False, timeout=900, check=True):
    """Runs a script of the project in a process of its own; with ranks > 0 in so many, started by
    torchrun or, which is faster, by tests/forked.py."""
    launcher = [sys.executable]
    if torchrun:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    elif ranks:
        launcher += ["tests/forked.py", str(ranks), str(restarts)]
    result = subprocess.run(
        [*launcher, *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if check and result.returncode:
        pytest.fail(
            f"{command[0]} ended with {result.returncode}:\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
        )
    return result


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A small toy world: an untrained model, records of all tasks in all three forms, media."""
    folder = tmp_path_factory.mktemp("toy")
    run("tests/toy.py", folder, "--sft", 96, "--rl", 96, "--eval", 2, "--random")
    return folder


@pytest.fixture(scope="session")
def processor(toy):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(toy / "model")


@pytest.fixture
def seeded():
    torch.manual_seed(0)


def tiny_sam2(folder):
    """Writes a SAM2 of the real architecture, 64 x 64 pixels inside, with weights that answer differently everywhere."""
    import transformers as hf
    from transformers.models.sam2_video.configuration_sam2_video import Sam2VideoMaskDecoderConfig

    torch.manual_seed(0)
    backbone = dict(
        hidden_size=8, image_size=[64, 64], blocks_per_stage=[1, 1, 2, 1], embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1] * 4, window_size_per_stage=[4] * 4, global_attention_blocks=[3],
        window_positional_embedding_background_size=[2, 2],
    )  # fmt: skip
    vision = dict(
        backbone_config=backbone, backbone_channel_list=[64, 32, 16, 8], fpn_hidden_size=128
    )
    decoder = Sam2VideoMaskDecoderConfig(
        hidden_size=128, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=32
    )
    config = hf.Sam2VideoConfig(
        vision_config=vision | dict(backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]]), mask_decoder_config=decoder,
        prompt_encoder_config=dict(hidden_size=128, image_size=64, patch_size=16), image_size=64,
        memory_attention_hidden_size=128, memory_attention_feed_forward_hidden_size=32, memory_attention_num_layers=1,
        memory_attention_rope_feat_sizes=[4, 4], memory_encoder_hidden_size=128, memory_encoder_output_channels=64,
        mask_downsampler_embed_dim=128, memory_fuser_embed_dim=128, memory_fuser_intermediate_dim=32,
    )  # fmt: skip
    model = hf.Sam2VideoModel(config)
    for param in model.parameters():
        param.data *= 4 if param.ndim > 1 else 1
    model.mask_decoder.pred_obj_score_head.proj_out.bias.data += (
        100  # the object is in sight in every frame
    )
    model.save_pretrained(folder)
    size = dict(height=64, width=64)
    pictures = hf.Sam2ImageProcessor(size=size, mask_size=dict(height=16, width=16))
    hf.Sam2VideoProcessor(pictures, hf.Sam2VideoVideoProcessor(size=size)).save_pretrained(folder)
