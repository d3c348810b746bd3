"""The packed shared-prefix forward against transformers, one sequence at a time."""

import argparse
import doctest
import math
import random

import numpy as np
import pytest
import torch
from conftest import run
from transformers import Qwen3VLForConditionalGeneration

import data
import rl_ema_grpo
import sft


@pytest.fixture(scope="module")
def groups(toy, processor):
    """Two images, two videos and a text, each with three responses; the first is the record's own."""
    records = (
        data.load_records(toy / "sft_image.json")[:2]
        + data.load_records(toy / "sft_video.json")[:2]
    )
    text = {**records[0], "media": [], "messages": [dict(turn) for turn in records[0]["messages"]]}
    text["messages"][0]["content"] = text["messages"][0]["content"].replace("<image>", "")
    pairs = [sft.training_pair(record, processor, data.Limits()) for record in [*records, text]]
    rng = random.Random(0)
    noise = lambda: [rng.randrange(10, 500) for _ in range(rng.randint(1, 30))]
    return [sft.Group(pair.prompt, [*pair.responses, noise(), noise()]) for pair in pairs]


def load(toy, packed):
    model = Qwen3VLForConditionalGeneration.from_pretrained(
        toy / "model", dtype=torch.float32
    ).train()
    if packed:
        model.set_attn_implementation({"text_config": "shared_prefix", "vision_config": "sdpa"})
    return model


def plain_logps(model, prompt, response):
    """Log-probabilities of a response by transformers' own forward: no packing, no sharing, its own positions."""
    ids = torch.tensor([prompt.token_ids + response])
    config = model.config
    kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    pixels = prompt.patches.float() / 127.5 - 1
    media = {}
    if (kinds == 1).any():
        media = dict(pixel_values=pixels, image_grid_thw=prompt.grids)
    if (kinds == 2).any():
        media = dict(pixel_values_videos=pixels, video_grid_thw=prompt.grids)
    logits = model(input_ids=ids, mm_token_type_ids=kinds, **media).logits[
        0, -len(response) - 1 : -1
    ]
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


def test_packed_forward_equals_one_at_a_time(toy, groups, seeded):
    """A wrong mask, position, row or pixel order anywhere in the forward: log-probs and every gradient must agree."""
    ours, plain = load(toy, packed=True), load(toy, packed=False)
    logps = sft.response_logps(ours, sft.pack(groups, "cpu"))
    expected = torch.cat(
        [
            plain_logps(plain, prompt, response)
            for prompt, responses in groups
            for response in responses
        ]
    )
    assert (logps - expected).abs().max() < 5e-6
    weights = torch.randn(len(logps))
    (logps * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, a), b in zip(ours.named_parameters(), plain.parameters()):
        assert (a.grad - b.grad).norm() <= 1e-5 * b.grad.norm() + 1e-7, name


def test_the_gpu_attention_reads_the_same_rows(groups, monkeypatch):
    """Rows, offsets or alignment that the kernel on a GPU does not take: a strict one stands in for it."""

    def kernel(q, k, v, q_offsets, k_offsets, q_longest, k_longest, scale, window_size, enable_gqa):
        assert (
            window_size == (-1, 0)
            and enable_gqa
            and q_offsets.dtype == k_offsets.dtype == torch.int32
        )
        assert q_longest == q_offsets.diff().max() and k_longest == k_offsets.diff().max()
        out = []
        for a, b, c, d in zip(q_offsets, q_offsets[1:], k_offsets, k_offsets[1:]):
            mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(
                d - c - (b - a)
            )  # aligned at the bottom right
            heads = (x[None].transpose(1, 2) for x in (q[a:b], k[c:d], v[c:d]))
            part = torch.nn.functional.scaled_dot_product_attention(
                *heads, mask, scale=scale, enable_gqa=True
            )
            out.append(part[0].transpose(0, 1))
        return torch.cat(out)

    batch = sft.pack(groups, "cpu")
    length, plan = len(batch["ids"]), batch["plan"]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, length, 8, generator=generator) for heads in (4, 2, 2)
    )
    attention = lambda: sft.shared_prefix_attention(None, query, key, value, None, 0.3, plan)
    expected, _ = attention()
    monkeypatch.setattr(sft, "attend_one_by_one", kernel)
    assert torch.allclose(attention()[0], expected, atol=1e-6)


def test_text_alone_runs_the_vision_tower_without_effect(toy, groups):
    """A micro-batch without pictures that skips the vision tower hangs FSDP; one that leaks the dummy changes the text."""
    model = load(toy, packed=True)
    calls = []
    model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    logps = sft.response_logps(model, sft.pack(groups[-1:], "cpu"))
    expected = plain_logps(load(toy, packed=False), groups[-1].prompt, groups[-1].responses[0])
    assert len(calls) == 1
    assert (logps[: len(expected)] - expected).abs().max() < 5e-6
    logps.sum().backward()
    assert model.model.visual.patch_embed.proj.weight.grad.abs().max() == 0


@torch.no_grad()
def test_prompts_keep_their_own_pictures(toy, groups):
    """Patches that are packed in another order than the prompts give each prompt its neighbour's picture."""
    model = load(toy, packed=True)
    alone = torch.cat([sft.response_logps(model, sft.pack([group], "cpu")) for group in groups])
    together = sft.response_logps(model, sft.pack(groups, "cpu"))
    assert (alone - together).abs().max() < 5e-6
    first, second = groups[0], groups[1]
    swapped = [
        sft.Group(
            data.Prompt(**{**vars(a.prompt), "patches": b.prompt.patches, "grids": b.prompt.grids}),
            a.responses,
        )
        for a, b in ((first, second), (second, first))
    ]
    wrong = sft.response_logps(model, sft.pack(swapped, "cpu"))
    assert (wrong - together[: len(wrong)]).abs().max() > 1e-4  # the pictures do matter


def test_end_of_turn_is_trained_and_nothing_else_is_added(toy, processor, groups):
    """EOS left out where it doubles as padding: the model never stops. Prompt tokens or padding in the loss."""
    eos = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    batch = sft.pack(groups, "cpu")
    responses = [response for group in groups for response in group.responses]
    assert batch["targets"].tolist() == sum(responses, [])
    assert all(
        group.responses[0][-1] == eos and eos not in group.responses[0][:-1] for group in groups
    )
    assert len(batch["ids"]) == sum(len(group.prompt.token_ids) for group in groups) + sum(
        map(len, responses)
    )
    end = len(groups[0].responses[0]) - 1  # where the first response's EOS is predicted
    assert batch["targets"][end] == eos
    model = load(toy, packed=True)
    sft.response_logps(model, batch)[end].backward()
    assert model.lm_head.weight.grad[eos].abs().max() > 0


def test_positions_and_patches_match_transformers(toy, processor):
    """Our own mRoPE positions, patch order and token expansion against the library's processor and get_rope_index."""
    model = load(toy, packed=False)
    for record in (
        data.load_records(toy / "sft_image.json")[0],
        data.load_records(toy / "sft_video.json")[0],
    ):
        prompt = data.encode(record, processor)
        kinds = [medium["type"] for medium in record["media"]]
        media = prompt.vllm["multi_modal_data"]
        extra = {}
        if "video" in media:
            frames, metadata = media["video"][0]
            metadata = {key: metadata[key] for key in ("fps", "frames_indices", "total_num_frames")}
            extra = dict(
                videos=[torch.from_numpy(frames.copy())],
                video_metadata=[metadata],
                do_sample_frames=False,
            )
        else:
            extra = dict(images=media["image"])
        theirs = processor(
            text=[prompt.vllm["prompt"]], do_resize=False, return_tensors="pt", **extra
        )
        assert theirs["input_ids"][0].tolist() == prompt.token_ids
        suffix = "_videos" if "video" in kinds else ""
        assert torch.allclose(
            theirs["pixel_values" + suffix], prompt.patches.float() / 127.5 - 1, atol=1e-6
        )
        grids = {("video" if suffix else "image") + "_grid_thw": prompt.grids}
        positions, _ = model.model.get_rope_index(
            theirs["input_ids"], mm_token_type_ids=theirs["mm_token_type_ids"], **grids
        )
        assert np.array_equal(positions[:, 0].numpy(), prompt.positions)


def test_chunked_logps_never_hold_all_logits(seeded):
    """A tensor of rows x vocabulary, forward or backward, or all chunks of it kept for backward: 5 GB at
    8,192 rows of the real model."""
    rows, vocabulary, chunk, largest, saved = 512, 1000, 64, 0, []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    hidden, weight = (
        torch.randn(rows, 8, requires_grad=True),
        torch.randn(vocabulary, 8, requires_grad=True),
    )
    count = lambda tensor: saved.append(tensor.numel()) or tensor
    with Watch():
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            logps = sft.chunked_logps(hidden, weight, torch.zeros(rows).long(), chunk)
        logps.sum().backward()
    assert chunk * vocabulary <= largest < rows * vocabulary / 4
    assert sum(saved) < rows * vocabulary / 4


@pytest.fixture(scope="module")
def alone():
    """This process as a process group of one."""
    sft.init_distributed()
    yield
    torch.distributed.destroy_process_group()


def test_doctests():
    """Examples in the docstrings that no longer hold."""
    assert doctest.testmod(sft).failed == doctest.testmod(data).failed == 0


def test_microbatches_lose_nothing(alone, groups):
    """A group over the budget that is cut or dropped; values per token that end up at another response."""
    flat = [token for group in groups for response in group.responses for token in response]
    for budget in (1, 100, 250, 10**6):
        bins = sft.microbatches(groups, budget)
        positions = torch.cat([at for _, at in bins])
        assert sorted(positions.tolist()) == list(range(len(flat)))
        for members, at in bins:
            assert [token for part in members for r in part.responses for token in r] == [
                flat[i] for i in at
            ]
            assert all(any(part.prompt is group.prompt for group in groups) for part in members)
            size = sum(
                len(part.prompt.token_ids) + sum(map(len, part.responses)) for part in members
            )
            assert size <= budget or (len(members) == 1 and len(members[0].responses) == 1)
        least = (
            sum(len(group.prompt.token_ids) + sum(map(len, group.responses)) for group in groups)
            / budget
        )
        assert budget < 250 or len(bins) <= 2 * least + 1  # no micro-batch for every little group
    assert [members for members, _ in sft.microbatches([], 100)] == [[]]


def test_first_on_policy_step(alone, toy, groups, seeded):
    """Before anything moved the ratio is 1: nothing is clipped, and yet the gradient is not 0."""
    model = sft.load_model(toy / "model", torch.device("cpu"), torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    settings = argparse.Namespace(
        recompute=False, tokens_per_microbatch=300, grad_clip=1.0,
        clip_low=0.2, clip_high=0.3, dual_clip=3.0, kl_coef=0.0, tis_cap=None,
    )  # fmt: skip
    responses = [
        [[7, 8, 9, 10], [11, 12, 13, 14]] for _ in groups
    ]  # equal lengths: advantages cancel in the mean
    rollouts = []
    for group, pair in zip(groups, responses):
        logps = model.response_logps(sft.pack([sft.Group(group.prompt, pair)], "cpu")).detach()
        sampled = [logps[:4].tolist(), logps[4:].tolist()]
        rollouts.append(
            rl_ema_grpo.RolloutGroup(
                group.prompt, pair, sampled, [True, True], advantages=[1.0, -1.0]
            )
        )
    result = rl_ema_grpo.update(
        model, optimizer, rollouts, None, None, settings, torch.device("cpu")
    )
    assert result["clip_share"] == 0
    assert result["logp_gap"] < 1e-5
    assert result["grad_norm"] > 0.01
    # The same rollouts once more through stored log-probabilities: the same ratio, the same gradient.
    old = rl_ema_grpo.current_logps(model, rollouts, 300, torch.device("cpu"))
    again = rl_ema_grpo.update(model, optimizer, rollouts, old, None, settings, torch.device("cpu"))
    assert again == pytest.approx(result, abs=1e-5)
    # --kl-coef and --tis-cap each compare with their own log-probabilities, not with one another's.
    settings.kl_coef, settings.tis_cap = 0.1, 2.0
    for rollout in rollouts:
        rollout.logps = [[logp - 1 for logp in each] for each in rollout.logps]  # e > 2: capped
    numbers = rl_ema_grpo.update(
        model, optimizer, rollouts, old, old - 0.1, settings, torch.device("cpu")
    )
    assert numbers["capped_share"] == 1 and numbers["logp_gap"] == pytest.approx(1, abs=1e-4)
    assert numbers["kl"] == pytest.approx(math.exp(-0.1) + 0.1 - 1, abs=1e-4)


def test_bfloat16_stays_near_float32(alone, toy, groups):
    """An operand of another type somewhere in the forward or backward that the real runs take."""
    logps, gradients = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        model = sft.load_model(toy / "model", torch.device("cpu"), dtype)
        logps[dtype] = model.response_logps(sft.pack(groups, "cpu"))
        assert logps[dtype].dtype == torch.float32
        logps[dtype].mean().backward()
        gradients[dtype] = torch.cat(
            [param.grad.full_tensor().flatten() for param in model.parameters()]
        )
        assert all(param.dtype == torch.float32 for param in model.parameters())
    assert 0 < (logps[torch.float32] - logps[torch.bfloat16]).abs().mean() < 0.05
    a, b = gradients.values()
    assert (a - b).norm() < 0.1 * a.norm()


def test_two_ranks_give_the_gradient_of_one(toy, tmp_path):
    """Losses averaged per rank or per micro-batch; a rank with fewer micro-batches that falls out of step; --shard-size."""
    worlds = {}
    for ranks, shard_size in ((1, 1), (2, 2), (2, 1)):
        out = tmp_path / f"{ranks}-{shard_size}"
        run("tests/ranks.py", toy, out, shard_size, ranks=ranks)
        worlds[ranks, shard_size] = torch.load(out / "steps.pt", weights_only=True)
    one = worlds.pop((1, 1))
    assert one["numbers"][0] == pytest.approx(
        one["mean"], rel=1e-5
    )  # over all tokens, not a mean of means
    assert one["resumed"]
    for two in worlds.values():
        assert one["numbers"] == pytest.approx(
            two["numbers"], rel=1e-5
        )  # losses, norms, token counts
        for key in ("sft", "rl"):
            for name, gradient in one[key].items():
                assert (gradient - two[key][name]).norm() <= 1e-5 * gradient.norm() + 1e-7, (
                    f"{key} {name}"
                )
        assert two["resumed"] and len({*two["microbatches"]}) == 1 < len({*two["own"]})


def test_more_ranks_than_gpus_is_said_at_once(monkeypatch):
    """The release waits forever when there are too few GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit, match="has no GPU"):
        sft.init_distributed()


def test_chunked_logps_in_value_and_gradient(seeded):
    """A chunk boundary that drops or repeats a row; our own derivative of the softmax."""
    hidden = torch.randn(70, 16, requires_grad=True)
    weight = torch.randn(50, 16, requires_grad=True)
    targets, scale = torch.randint(0, 50, (70,)), torch.randn(70)
    got = sft.chunked_logps(hidden, weight, targets, chunk=32)
    expected = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert torch.allclose(got, expected, atol=1e-6)
    ours = torch.autograd.grad((got * scale).sum(), (hidden, weight))
    theirs = torch.autograd.grad((expected * scale).sum(), (hidden, weight))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs))
