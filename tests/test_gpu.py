"""tests/gpu.py on a CPU: its checks pass on small shapes, and see what they are there to see."""

import bench
import cpu_compat
import gpu
import pytest
import torch
from conftest import ROOT, run

import sft

HIDE = """
from importlib.machinery import PathFinder
found = PathFinder.find_spec
hidden = "av", "vllm", "math_verify", "rouge_score", "pycocotools"
def find_spec(name, *rest):
    return None if name.split(".")[0] in hidden else found(name, *rest)
PathFinder.find_spec = staticmethod(find_spec)
"""


def test_runs_with_torch_and_transformers_alone(tmp_path, monkeypatch):
    """A GPU machine without PyAV, vLLM or a grader: an import fails and nothing is checked at all."""
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    before = sorted((ROOT / "assets").iterdir())
    lines = run("tests/gpu.py", "attention", "packed", "engine", "step").stdout.splitlines()
    assert [line.split(":")[0] for line in lines if line[0] != " "] == [
        "pass    attention, head 128",
        "not run attention, head 72",
        "pass    packed forward, bfloat16",
        "not run engine",
        "not run step",
        lines[-1],
    ]
    assert lines[-1].startswith("0 failed")
    assert sorted((ROOT / "assets").iterdir()) == before  # a CPU has no place beside the GPUs


def test_a_wrong_mask_fails(monkeypatch):
    """A check that passes whatever the kernel does: here responses see the responses before them."""
    right = sft.shared_prefix_attention

    def leaking(*args):
        *rest, (key_rows, query_ends, key_ends, *most) = args
        keys = key_rows.split(key_ends.diff().tolist())
        later = query_ends.diff() < key_ends.diff()
        keys = [torch.arange(end) if far else k for k, end, far in zip(keys, query_ends[1:], later)]
        key_ends = torch.tensor([0, *map(len, keys)]).cumsum(0)
        return right(*rest, (torch.cat(keys), query_ends, key_ends, *most))

    assert next(gpu.attention())[1]
    monkeypatch.setattr(sft, "shared_prefix_attention", leaking)
    assert not next(gpu.attention())[1]


def test_a_response_at_the_wrong_place_fails(monkeypatch):
    """Positions one too far on: log-probs and gradients are off by more than bfloat16 rounds."""
    right = sft.pack

    def shifted(groups, device):
        batch = right(groups, device)
        batch["positions"][0, -12:] += 1
        return batch

    monkeypatch.setattr(sft, "pack", shifted)
    ((_, passed, figures),) = gpu.packed()
    torch.distributed.destroy_process_group()
    assert not passed, figures


def test_a_patch_in_another_order_fails(monkeypatch):
    """A matrix product that is fast and wrong."""
    monkeypatch.setattr(gpu, "seconds_of", lambda work: 1.0)
    assert next(gpu.patches())[1]
    right = cpu_compat.one_matrix_patch_embedding

    def turned(visual):
        right(visual)
        forward = visual.patch_embed.forward
        visual.patch_embed.forward = lambda pixels: forward(pixels.flip(1))

    monkeypatch.setattr(cpu_compat, "one_matrix_patch_embedding", turned)
    assert not next(gpu.patches())[1]


def test_older_kernels_get_every_key_head(monkeypatch):
    """Key heads repeated in another order than grouped queries want them."""
    seen = []
    monkeypatch.setattr(sft, "varlen_attn", lambda q, k, v, scale: seen.append((k, v)))
    gpu.accept_older_torch()
    key = torch.arange(2)[None, :, None]
    sft.varlen_attn(torch.zeros(1, 6, 1), key, key, scale=1.0, enable_gqa=True)
    assert [heads.flatten().tolist() for heads in seen[0]] == [[0, 0, 0, 1, 1, 1]] * 2


def test_flops_are_those_that_torch_counts():
    """An MFU that flatters: FLOPs by formula against torch's own counter, without recomputation."""
    from torch.utils.flop_counter import FlopCounterMode

    model = gpu.Qwen3VL(gpu.model_config(2, 2, 2, 4, 500))
    model.set_attn_implementation({"text_config": "shared_prefix", "vision_config": "eager"})
    groups = [gpu.make_group("image", [(1, 8, 12), (1, 4, 6)], 20, [9, 31, 17])]
    groups.append(gpu.make_group("video", [(3, 6, 8)], 7, [25, 10]))
    batch = sft.pack(groups, "cpu")
    with FlopCounterMode(display=False) as counter:
        sft.response_logps(model, batch).sum().backward()
    # By hand: a causal sequence of 110 has 110 * 111 / 2 pairs; two of 55 have 3,025 fewer.
    fake = dict(ids=torch.zeros(110), rows=torch.zeros(10), grids=torch.zeros(0, 3).long())
    flops = []
    for ends in (torch.tensor([0, 110]), torch.tensor([0, 55, 110])):
        fake["plan"] = None, ends, ends
        flops.append(bench.training_flops(model, fake, recompute=False))
    # Forward and two backward, two products, a multiply and an add; 2 layers of 2 heads of 128.
    assert flops[0] - flops[1] == 3 * 2 * 2 * (2 * 2 * 128) * 3025
    # Torch counts a masked product in full, the formula the half that a causal kernel executes.
    expected = bench.training_flops(model, batch, recompute=False)
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.1)
