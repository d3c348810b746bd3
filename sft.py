"""Supervised cold start: one pass over chain-of-thought data, and the forward that reinforcement learning shares.

    bash demo.sh                                                   # a laptop: its second part is this script on 2 CPU ranks
    torchrun --nproc-per-node 8 sft.py --model Qwen/Qwen3-VL-8B-Instruct \\
        --data onethinker_sft_image.json onethinker_sft_video.json --out runs/sft                             # 8 x 80 GB

A training sequence is a `Group`: one prompt and its n responses, packed as [prompt | R1 | ... | Rn]. The prompt, with its
thousands of vision tokens, is computed once; response i attends to the prompt and to itself. SFT is n = 1, the rollouts
of reinforcement learning are n = 8, and both take their log-probabilities from `response_logps`.

Where this departs from the release: a plain loop over FSDP2 in place of a forked trainer; the loss is the mean over all
response tokens of the global batch, whatever the rank they are on; prompts are skipped when too long, never cut.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import cpu_compat  # noqa: F401  (before transformers)
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
from huggingface_hub import save_torch_state_dict
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.attention.varlen import varlen_attn
from tqdm import tqdm
from transformers import AutoConfig, AutoProcessor, Qwen3VLForConditionalGeneration
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import data

# ----------------------------------------------------------------------------------------------------------------------
# The forward


class Group(NamedTuple):
    """One prompt and its responses: what is packed, trained, and kept together."""

    prompt: data.Prompt
    responses: list  # n lists of token ids, each with its end-of-turn token if it has one


def pack(groups, device):
    """(prompt, responses) pairs -> one sequence of T tokens, [prompt | R1 | ... | Rn] after each other, as a dict of

    ids (T,), positions (3, T), patches uint8 (P, 1536), grids (M, 3); rows (R,): the row of the sequence that predicts each
    response token; targets (R,): that token; R counts the response tokens in the order of the groups and their responses;
    sequences: what attention treats as one causal sequence, a tuple of (begin, end) spans of keys, the last of which holds
    the queries. [prompt | R1] is such a sequence of one span; every other response has two, its prompt and itself.
    """
    ids, positions, rows, targets, sequences = [], [], [], [], []
    for prompt, responses in groups:
        start, end = len(ids), len(ids) + len(prompt.token_ids)
        ids += prompt.token_ids
        positions.append(torch.from_numpy(prompt.positions))
        first = int(prompt.positions.max()) + 1  # every response begins right after the prompt
        for i, response in enumerate(responses):
            own = len(ids), len(ids) + len(response)
            sequences.append(((start, end), own) if i > 0 else ((start, own[1]),))
            rows += [end - 1, *range(own[0], own[1] - 1)]  # token k is predicted by token k - 1
            ids += response
            targets += response
            positions.append((first + torch.arange(len(response))).expand(3, -1))
    patches, grids = (
        torch.cat([getattr(prompt, name) for prompt, _ in groups]) for name in ("patches", "grids")
    )
    batch = dict(
        ids=torch.tensor(ids), positions=torch.cat(positions, dim=1), patches=patches, grids=grids
    )
    batch |= dict(rows=torch.tensor(rows), targets=torch.tensor(targets))
    return {name: tensor.to(device) for name, tensor in batch.items()} | dict(
        sequences=tuple(sequences)
    )


def shared_prefix_attention(module, query, key, value, attention_mask, scaling, sequences, **_):
    """Causal attention in which the responses of a group see their prompt and themselves, not each other.

    query (1, H, T, D); key, value (1, Hkv, T, D); sequences as `pack` gives them. Returns (1, T, H, D) and None.
    One varlen call on CUDA, SDPA sequence by sequence on a CPU.
    """
    if query.is_cuda and query.dtype != torch.float32:  # the kernel knows 16 bits only
        return varlen_attention(query, key, value, scaling, sequences), None
    out = []
    for spans in sequences:
        begin, end = spans[-1]
        q, (k, v) = (
            query[:, :, begin:end],
            (torch.cat([x[:, :, a:b] for a, b in spans], dim=2) for x in (key, value)),
        )
        # Causal from the bottom right corner: every query sees the `before` keys that stand before them all.
        before = k.shape[2] - q.shape[2]
        mask = (
            torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(before)
            if before
            else None
        )
        out += [
            F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=not before, scale=scaling, enable_gqa=True
            )
        ]
    return torch.cat(out, dim=2).transpose(1, 2), None


def varlen_attention(query, key, value, scaling, sequences):
    """The same on CUDA, where one kernel runs all sequences: (1, H, T, D) -> (1, T, H, D)."""
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, D)
    key_rows, *plan = varlen_plan(sequences, query.device)
    key, value = key.index_select(0, key_rows), value.index_select(0, key_rows)
    # The queries stand in the order of the sequences already. (-1, 0) is causal, aligned at the bottom right.
    return varlen_attn(
        query, key, value, *plan, scale=scaling, window_size=(-1, 0), enable_gqa=True
    )[None]


@lru_cache(2)  # all layers of a micro-batch ask for the same
def varlen_plan(sequences, device):
    """The rows of all keys; where the queries and the keys of each sequence begin; the most queries and keys of one."""
    key_rows = torch.cat([torch.arange(begin, end) for spans in sequences for begin, end in spans])
    queries = [spans[-1][1] - spans[-1][0] for spans in sequences]
    keys = [sum(end - begin for begin, end in spans) for spans in sequences]
    offsets = [
        torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32) for lengths in (queries, keys)
    ]
    return key_rows.to(device), *offsets, max(queries), max(keys)


def frame_attention(
    module, query, key, value, attention_mask, scaling, cu_seq_lens_q, max_length_q, **_
):
    """The vision tower's attention on CUDA: every frame attends to itself, all frames of all media in one call.

    query, key, value (1, H, P, D); cu_seq_lens_q (frames + 1,). Returns (1, P, H, D) and None.
    """
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    offsets, longest = cu_seq_lens_q, int(max_length_q)
    return varlen_attn(query, key, value, offsets, offsets, longest, longest, scale=scaling)[
        None
    ], None


AttentionInterface.register("shared_prefix", shared_prefix_attention)
AttentionMaskInterface.register(
    "shared_prefix", lambda *args, **kwargs: None
)  # the sequences say all there is to mask
AttentionInterface.register(
    "flash_frames", frame_attention
)  # transformers passes whole films to names with "flash"


class ChunkedLogps(torch.autograd.Function):
    """See `chunked_logps`. Logits live for one chunk at a time; the backward pass computes them again, and turns them in
    place into -d log p(token) / d logits = softmax(logits) - onehot(token)."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk, entropy):
        wide = weight.float()
        logps, normalisers, entropies = [], [], []
        for rows, tokens in zip(hidden.split(chunk), targets.split(chunk)):
            logits = rows.float() @ wide.T  # (chunk, V)
            normaliser = logits.logsumexp(-1)  # (chunk,)
            logps.append(logits.gather(-1, tokens[:, None])[:, 0] - normaliser)
            normalisers.append(normaliser)
            if entropy:
                probabilities = (logits - normaliser[:, None]).exp_()
                entropies.append(normaliser - torch.linalg.vecdot(probabilities, logits))
        ctx.save_for_backward(hidden, weight, targets, torch.cat(normalisers))
        ctx.chunk = chunk
        entropies = torch.cat(entropies) if entropy else torch.empty(0, device=hidden.device)
        ctx.mark_non_differentiable(entropies)
        return torch.cat(logps), entropies

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, normalisers = ctx.saved_tensors
        wide = weight.float()
        grad_hidden, grad_weight = (
            torch.empty_like(hidden),
            torch.zeros_like(wide),
        )  # all chunks add up in float32
        chunks = zip(
            *(x.split(ctx.chunk) for x in (hidden, targets, normalisers, grad, grad_hidden))
        )
        for rows, tokens, normaliser, scale, out in chunks:
            slope = torch.addmm(
                -normaliser[:, None], rows.float(), wide.T
            ).exp_()  # the probabilities
            slope.scatter_add_(1, tokens[:, None], slope.new_full((len(tokens), 1), -1.0))
            out.copy_((slope @ wide) * -scale[:, None])
            grad_weight.addmm_(slope.T, rows.float() * -scale[:, None])
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def chunked_logps(hidden, weight, targets, chunk=1024, entropy=False):
    """Log-probability of each target token, in float32, with `chunk` rows of logits in memory at a time, forward and backward.

    hidden (R, E), weight (V, E), targets (R,). Returns (R,); with `entropy` also the entropy of each row's distribution in
    nats, (R,), which carries no gradient.
    """
    logps, entropies = ChunkedLogps.apply(hidden, weight, targets, chunk, entropy)
    return (logps, entropies) if entropy else logps


def response_logps(model, batch, entropy=False):
    """log p(response token | prompt, response so far) for all R response tokens of a packed batch. Returns (R,) float32; with
    `entropy` a second (R,), see `chunked_logps`.

    The vision tower runs exactly once, also when there is nothing to see: under FSDP every rank must make the same calls.
    """
    visual, language = model.model.visual, model.model.language_model
    ids, patches, grids = batch["ids"], batch["patches"], batch["grids"]
    embeddings = language.embed_tokens(ids)  # (T, E)
    is_vision = (ids == model.config.image_token_id) | (ids == model.config.video_token_id)  # (T,)

    blind = len(patches) == 0
    if blind:  # a grey picture of one token, whose features are multiplied by zero below
        patches, grids = patches.new_full((4, patches.shape[1]), 128), grids.new_tensor([[1, 2, 2]])
    pixels = patches.float() / 127.5 - 1  # Qwen3-VL's normalisation: mean 0.5, std 0.5
    features = visual(pixels.to(embeddings.dtype), grid_thw=grids, return_dict=True)
    tokens, deepstack = features.pooler_output, features.deepstack_features  # (V, E), [(V, E)]
    if blind:
        embeddings, seen = (
            embeddings + 0 * (tokens.sum() + sum(level.sum() for level in deepstack)),
            {},
        )
    else:
        assert is_vision.sum() == len(tokens), (
            f"{is_vision.sum()} vision tokens, {len(tokens)} vision features"
        )
        embeddings = embeddings.masked_scatter(is_vision[:, None], tokens.to(embeddings.dtype))
        seen = dict(visual_pos_masks=is_vision[None], deepstack_visual_embeds=deepstack)

    text = dict(
        inputs_embeds=embeddings[None],
        position_ids=batch["positions"][:, None],
        sequences=batch["sequences"],
    )
    hidden = language(**text, **seen, use_cache=False).last_hidden_state[0]  # (T, E)
    return chunked_logps(
        hidden[batch["rows"]], model.lm_head.weight, batch["targets"], entropy=entropy
    )


# ----------------------------------------------------------------------------------------------------------------------
# Micro-batches

PAIRS_PER_TOKEN = (
    20_000  # that cost as much as one token's matrices: 2 * 193e6 / (4 * 4096) in a layer of the 8B
)


def attended_pairs(queries, keys):
    """Query-key pairs of a causal sequence in which the last of `keys` tokens ask.

    >>> attended_pairs(6, 6), attended_pairs(2, 6)  # 1 + 2 + 3 + 4 + 5 + 6, 5 + 6
    (21, 11)
    """
    return queries * keys - queries * (queries - 1) // 2


def microbatches(groups, tokens_per_microbatch):
    """Packs groups into micro-batches of at most `tokens_per_microbatch` tokens and of like cost; as many on every rank.

    Returns a list of ([Group], positions (R,)): where the response tokens of these groups stand among all response tokens of
    `groups`, so that values per token find their way. A group too large by itself is split by responses, and each part
    computes the prompt once. FSDP's collectives must match, so a rank with little to do spreads it thin; one with fewer parts
    than another has micro-batches gets ([], []), which `update` runs as a dummy.
    """
    parts, position = [], 0  # (cost, tokens, Group, positions of its response tokens)
    for prompt, responses in groups:
        shares, length = [[]], len(prompt.token_ids)
        for response in responses:
            if (
                shares[-1]
                and length + sum(map(len, shares[-1])) + len(response) > tokens_per_microbatch
            ):
                shares.append([])
            shares[-1].append(response)
        for share in shares:
            lengths = [len(response) for response in share]
            tokens, at = length + sum(lengths), torch.arange(position, position + sum(lengths))
            pairs = attended_pairs(length, length) + sum(
                attended_pairs(n, length + n) for n in lengths
            )
            parts.append((tokens + pairs / PAIRS_PER_TOKEN, tokens, Group(prompt, share), at))
            position += sum(lengths)
    parts.sort(key=lambda part: -part[0])
    count = max(1, *gather(math.ceil(sum(part[1] for part in parts) / tokens_per_microbatch)))
    while any(gather((bins := spread(parts, count, tokens_per_microbatch)) is None)):
        count += 1  # on all ranks
    bins.sort(key=lambda members: -sum(part[0] for part in members))  # heavy ones meet heavy ones
    none = torch.arange(0)
    return [
        ([group for *_, group, _ in members], torch.cat([none, *(at for *_, at in members)]))
        for members in bins
    ]


def spread(parts, count, most_tokens):
    """Deals parts (cost, tokens, ...), costliest first, each to the bin with the least work so far that has room.

    Returns `count` lists of parts, or None where they do not fit. A part over `most_tokens` gets a bin of its own.

    >>> spread([(5, 5, "a"), (3, 3, "b"), (2, 2, "c")], 2, most_tokens=6)
    [[(5, 5, 'a')], [(3, 3, 'b'), (2, 2, 'c')]]
    """
    bins = [[] for _ in range(count)]
    for part in parts:
        fitting = [
            members
            for members in bins
            if not members or sum(m[1] for m in members) + part[1] <= most_tokens
        ]
        if not fitting:
            return None
        min(fitting, key=lambda members: sum(m[0] for m in members)).append(part)
    return bins


NO_MEDIA = torch.zeros(0, 1536, dtype=torch.uint8), torch.zeros(0, 3, dtype=torch.int64)
DUMMY = Group(
    data.Prompt({}, [0], torch.zeros(3, 1, dtype=torch.int64).numpy(), *NO_MEDIA, vllm={}), [[0]]
)


def count_parameters(module):
    return sum(param.numel() for param in module.parameters())


def training_flops(model, batch, recompute):
    """FLOPs that forward and backward of a packed batch execute: 2 per weight and row that meets it, 4 * width per
    query-key pair and layer; the backward pass costs two forwards, recomputation a third, and the head always recomputes.
    """
    text, vision = model.config.text_config, model.config.vision_config
    visual, tower = model.model.visual, model.model.language_model
    sequences = [
        [end - begin for begin, end in spans] for spans in batch["sequences"]
    ]  # the queries of each come last
    pairs = sum(attended_pairs(lengths[-1], sum(lengths)) for lengths in sequences)
    body = 2 * count_parameters(tower.layers) * len(batch["ids"])
    body += 4 * text.num_attention_heads * text.head_dim * text.num_hidden_layers * pairs
    frames = [
        height * width for time, height, width in batch["grids"].tolist() for _ in range(time)
    ]  # patches each
    blocks = count_parameters(visual.blocks)
    body += 2 * blocks * sum(frames) + 2 * (count_parameters(visual) - blocks) * sum(frames) // 4
    body += 4 * vision.hidden_size * vision.depth * sum(patches**2 for patches in frames)
    head = 2 * model.lm_head.weight.numel() * len(batch["rows"])
    return (4 if recompute else 3) * body + 4 * head


def reset_peak_memory():
    """From here on `peak_memory_gb` counts anew."""
    if torch.cuda.is_available():
        return torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # some sandboxes have no such file
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gb():
    """Largest memory since `reset_peak_memory`: what PyTorch took of the GPU, or this process of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1e6


# ----------------------------------------------------------------------------------------------------------------------
# Distributed: one process per device, FSDP2. A single process is a group of one, so there is no other code path.


def init_distributed():
    """Joins torchrun's process group (or makes a group of one). Returns rank, world size, device."""
    for name, value in dict(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
    ).items():
        os.environ.setdefault(name, value)
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if torch.cuda.is_available():
        if local >= (count := torch.cuda.device_count()):
            raise SystemExit(
                f"rank {rank} wants GPU {local}, but this machine has {count}: lower --nproc-per-node"
            )
        torch.cuda.set_device(local)
        device, backend = torch.device("cuda", local), "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    patience = timedelta(minutes=60)  # a rank may roll out long after the others are done
    store, *_ = next(dist.rendezvous("env://", timeout=patience))
    # A restart by torchrun finds the store of the run before: the addresses of dead ranks must not be taken for living ones.
    store = dist.PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
    return rank, world, device


def gather(value):
    """One small Python object per rank -> the list of all, on every rank."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def global_sum(*values):
    """Sums numbers over all ranks. One number in, one out; several in, a list out."""
    totals = [sum(column) for column in zip(*gather(values))]
    return totals if len(values) > 1 else totals[0]


def load_model(path, device, dtype, trainable=True, shard_size=None):
    """A Hugging Face Qwen3-VL folder -> FSDP2-sharded model with float32 master weights that computes in `dtype`.

    Only rank 0 reads the weights, the others receive their shards by broadcast: host memory holds one copy, not one per rank.
    trainable=False: frozen, weights kept in `dtype` (the KL reference). shard_size: ranks that share one copy of the trainer
    (default: all); with the GPUs of one node, gathers stay inside it and only gradients cross the network.
    """
    if (
        dtype == torch.bfloat16
    ):  # TF32 for the head: its operands are bfloat16 values, and its gradient becomes one
        torch.set_float32_matmul_precision("high")
    master = torch.float32 if trainable else dtype
    weights, generation = {}, None
    if dist.get_rank() == 0:
        whole = Qwen3VLForConditionalGeneration.from_pretrained(
            path, dtype=master, use_safetensors=True
        )
        weights, generation = whole.state_dict(), whole.generation_config
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(AutoConfig.from_pretrained(path)).to(master)
    vision_attention = (
        "flash_frames" if device.type == "cuda" and dtype == torch.bfloat16 else "sdpa"
    )
    model.set_attn_implementation(
        {"text_config": "shared_prefix", "vision_config": vision_attention}
    )
    model.requires_grad_(trainable)

    world = dist.get_world_size()
    shape = (world // shard_size, shard_size) if shard_size and shard_size < world else (world,)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("copies", "shards")[-len(shape) :])
    # Inputs are left as they are: patches arrive as uint8, and the rotary tables of the vision tower stay in float32.
    precision = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in [*model.model.visual.blocks, *model.model.language_model.layers, model]:
        fully_shard(block, mesh=mesh, mp_policy=precision)
    model.response_logps = partial(response_logps, model)
    register_fsdp_forward_method(
        model, "response_logps"
    )  # enters through the root, which gathers embeddings and head

    model.to_empty(device=device)
    for (
        module
    ) in model.modules():  # rotary tables are in no checkpoint: to_empty leaves garbage in them
        if hasattr(module, "original_inv_freq"):
            fresh = type(module)(module.config)
            module.inv_freq, module.original_inv_freq = (
                fresh.inv_freq.to(device),
                fresh.original_inv_freq.to(device),
            )
    options = states.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    states.set_model_state_dict(model, weights, options=options)
    model.tie_weights()
    model.generation_config = generation  # stop tokens, which `export_model` passes on
    return model.train()


def adamw(model, lr, weight_decay):
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(
        params, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.999), fused=True
    )
    states.get_state_dict(
        model, optimizer
    )  # makes the moments, by a step without gradient that Adam must not count:
    for state in optimizer.state.values():
        state["step"].zero_()
    return optimizer


def optimizer_step(model, optimizer, grad_clip, loss):
    """Clips the global gradient norm and steps. Where the norm or the loss (of all ranks) is not finite nothing moves, on
    all ranks alike. Returns the norm before clipping (float; nan when the step was skipped)."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip).full_tensor().item()
    if finite := math.isfinite(norm + loss):
        optimizer.step()
    optimizer.zero_grad()
    return norm if finite else math.nan


# ----------------------------------------------------------------------------------------------------------------------
# Run folder: the Hugging Face model at its root, checkpoints/step-*/, metrics.jsonl, args.json


def published(out):
    """The folders of a run's checkpoints, oldest first."""
    return sorted(Path(out, "checkpoints").glob("step-*[0-9]"))


def save_checkpoint(out, model, optimizer, state, group, keep, tally):
    """Copies weights and optimiser state; returns a thread that writes the copy (see `publish`) while training goes on: join it
    before the next save, and at the end.

    state: JSON (step, cursor, ...). group: a gloo process group for nothing but this. keep: how many checkpoints stay.
    """
    folder = Path(out, "checkpoints", f"step-{state['step']:06d}.tmp")
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed while it wrote
    dist.barrier()
    state = state | dict(parameters=count_parameters(model))
    model_state, optimizer_state = states.get_state_dict(model, optimizer)
    content = dict(model=model_state, optimizer=optimizer_state)
    writing = dcp.async_save(content, checkpoint_id=folder, process_group=group)
    thread = threading.Thread(
        target=publish, args=(writing, folder, state, keep, tally), daemon=True
    )
    thread.start()
    return thread


def publish(writing, folder, state, keep, tally):
    """Waits until all ranks have written, then renames: a checkpoint is there as a whole or not at all, `latest` comes last.

    A save that fails is said loudly, counted (tally["failed_saves"]) and cleared away; the run and older checkpoints go on.
    """
    error = writing.exception()
    if dist.get_rank() > 0:
        return
    try:
        if error:
            raise OSError(error)
        files = {path.name: path.stat().st_size for path in folder.iterdir()}
        (folder / "trainer_state.json").write_text(json.dumps(state | dict(files=files), indent=1))
        whole, latest = folder.with_suffix(""), folder.with_name("latest")
        shutil.rmtree(whole, ignore_errors=True)
        folder.rename(whole)
        latest.with_suffix(".tmp").write_text(whole.name)
        latest.with_suffix(".tmp").replace(latest)
        for old in published(whole.parents[1])[:-keep]:
            shutil.rmtree(old)
    except OSError as failure:
        tally["failed_saves"] += 1
        shutil.rmtree(folder, ignore_errors=True)
        print(
            f"WARNING: step {state['step']} could not be saved, the run goes on: {failure}",
            flush=True,
        )


def find_checkpoint(out):
    """The newest complete checkpoint of a run -> its folder and its state; (None, {}) for a run that has none yet.

    A damaged one (a file is missing or has another size than when it was published) is named and passed over; when all are,
    the run does not begin anew by itself.
    """
    folders, found = published(out), [None, {}]
    for folder in reversed(folders) if dist.get_rank() == 0 else ():
        try:
            state = json.loads((folder / "trainer_state.json").read_text())
            if cut := [
                name
                for name, size in state["files"].items()
                if (folder / name).stat().st_size != size
            ]:
                raise ValueError(f"{cut[0]} has another size than when it was saved")
            found = [folder, state]
            break
        except (OSError, ValueError, KeyError) as error:
            print(
                f"WARNING: the checkpoint {folder} is damaged ({error}); trying the one before",
                flush=True,
            )
    dist.broadcast_object_list(found)
    if folders and found[0] is None:
        data.refuse(f"all checkpoints under {out} are damaged: remove the folder to begin anew")
    return tuple(found)


def check_resume(state, args, may_change):
    """Refuses to go on with other settings than a run began with, `may_change` aside; --force takes the new ones."""
    new, old = vars(args), state.get("args", {})
    changed = [
        name for name in new if name in old and old[name] != new[name] and name not in may_change
    ]
    if changed and not args.force:
        differences = "; ".join(
            f"--{name.replace('_', '-')} was {old[name]}, is now {new[name]}" for name in changed
        )
        data.refuse(
            f"{args.out} was begun with other settings: {differences}. --force goes on with the new ones"
        )


def load_checkpoint(folder, state, model, optimizer):
    """Restores weights and optimiser state in place, on any number of ranks."""
    if state["parameters"] != (count := count_parameters(model)):
        data.refuse(
            f"{folder} holds a model of {state['parameters']} parameters, --model has {count}"
        )
    model_state, optimizer_state = states.get_state_dict(model, optimizer)
    dcp.load(dict(model=model_state, optimizer=optimizer_state), checkpoint_id=folder)
    states.set_state_dict(
        model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state
    )


def check_room(out, model, keep, exports=1):
    """Refuses a disk without room for the checkpoints to come (weights and two Adam moments in float32; one more than is kept,
    since the newest is written before the oldest goes) and for so many exported models (bfloat16)."""
    needed = (
        count_parameters(model) * (12 * max(keep + 1 - len(published(out)), 1) + 2 * exports) / 1e9
    )
    free = min(gather(shutil.disk_usage(out).free)) / 1e9  # of the node that has least
    if free < needed:
        data.refuse(
            f"--out {out} has {free:.2f} GB free, checkpoints and exported models need {needed:.2f} GB more"
        )


def full_weights(model, dtype):
    """(Hugging Face name, whole tensor in `dtype`) of every weight, one at a time, on every rank.

    Cast before the gather: half the traffic. A tied head comes under both its names: vLLM packs the head separately.
    """
    for name, shard in model.state_dict().items():
        yield name, shard.to(dtype).full_tensor()


def export_model(model, processor, out):
    """Writes a folder that transformers and vLLM load as it is: bfloat16 safetensors, config, processor, chat template."""
    rank0, weights = dist.get_rank() == 0, {}
    for name, tensor in full_weights(model, torch.bfloat16):
        if rank0 and not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            weights[name] = tensor.cpu().clone()  # a gathered tensor may be a view of a padded one
    if rank0:
        os.makedirs(out, exist_ok=True)
        save_torch_state_dict(weights, out)
        model.config.dtype = torch.bfloat16
        for part in (model.config, model.generation_config, processor):
            part.save_pretrained(out)
    dist.barrier()


def log_metrics(out, row):
    """Appends one line to metrics.jsonl (rank 0)."""
    if dist.get_rank() == 0:
        with open(os.path.join(out, "metrics.jsonl"), "a") as file:
            file.write(json.dumps(row) + "\n")


def forget_after(step, path):
    """Drops the lines of a log that a killed run wrote for steps it did not save; they will be run, and logged, again."""
    if dist.get_rank() == 0 and os.path.exists(path):
        with open(path) as file:
            lines = [
                line for line in file if line.endswith("\n") and json.loads(line)["step"] <= step
            ]
        Path(f"{path}.tmp").write_text("".join(lines))
        os.replace(f"{path}.tmp", path)


def start_run(args):
    """Makes the run folder and notes what reruns it: arguments, versions, commit. Refuses a folder it cannot write to."""
    if dist.get_rank() == 0:
        commit = subprocess.getoutput(f"git -C '{Path(__file__).resolve().parent}' rev-parse HEAD")
        try:
            os.makedirs(args.out, exist_ok=True)
            noted = vars(args) | dict(
                commit=commit, torch=torch.__version__, transformers=transformers.__version__
            )
            Path(args.out, "args.json").write_text(json.dumps(noted, indent=1))
        except OSError as error:
            data.refuse(f"--out {args.out} cannot be written: {error}")
    dist.barrier()


class Stop:
    """Notices SIGTERM, Ctrl-C and the end of --minutes. `now()` is the same on all ranks; ask it once a step."""

    def __init__(self, minutes=None):
        self.deadline, self.signals = time.time() + 60 * (minutes or math.inf), []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: self.signals.append(number))

    def now(self):
        return any(gather(bool(self.signals) or time.time() > self.deadline))


# ----------------------------------------------------------------------------------------------------------------------
# Supervised fine-tuning


def training_pair(record, processor, limits):
    """A record -> Group of its prompt and its one response: what it demonstrates, and the end-of-turn token."""
    prompt, tokenizer = data.encode(record, processor, limits), processor.tokenizer
    prompt.vllm = None
    response = tokenizer(data.demonstration(record), add_special_tokens=False)["input_ids"] + [
        tokenizer.eos_token_id
    ]
    length = len(prompt.token_ids) + len(response)
    if length > (most := limits.max_prompt_tokens):
        raise data.MediaError("too_long", f"{length} tokens with the response, the limit is {most}")
    return Group(prompt, [response])


def learning_rate(step, steps, peak, warmup_share):
    """Cosine with a linear warm-up.

    >>> [round(learning_rate(step, steps=10, peak=1.0, warmup_share=0.2), 2) for step in range(0, 11, 2)]
    [0.5, 1.0, 0.85, 0.5, 0.15, 0.0]
    """
    warmup = max(1, round(steps * warmup_share))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def update(model, optimizer, groups, args, device):
    """One optimiser step on this rank's groups. Returns loss per token, tokens of the global batch, gradient norm (nan: the
    step was skipped, since loss or gradient were not finite)."""
    tokens = global_sum(sum(len(response) for group in groups for response in group.responses))
    total = 0.0
    for members, _ in microbatches(groups, args.tokens_per_microbatch):
        logps = model.response_logps(pack(members or [DUMMY], device))
        loss = -logps.sum() / max(tokens, 1) * bool(members)
        (
            loss * dist.get_world_size()
        ).backward()  # FSDP averages gradients over ranks, the loss is a sum over them
        total += loss.item()
    loss = global_sum(total)
    return loss, tokens, optimizer_step(model, optimizer, args.grad_clip, loss)


# fmt: off
def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("what")
    group.add_argument("--model", required=True, help="Hugging Face folder or hub id of a Qwen3-VL")
    group.add_argument("--data", nargs="+", required=True, help="SFT record files (JSON or JSONL)")
    group.add_argument("--media-root", help="folder of the media paths (default: each file's own folder)")
    group.add_argument("--out", required=True, help="run folder; the same command resumes from it")
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=float, default=1.0, help="passes over the data (%(default)s)")
    group.add_argument("--steps", type=int, help="optimiser steps, in place of --epochs")
    group.add_argument("--minutes", type=float, help="stop and save after this time")
    group.add_argument("--sequences-per-step", type=int, default=32, help="sequences per optimiser step, all ranks (%(default)s)")
    group.add_argument("--tokens-per-microbatch", type=int, default=32768, help="tokens per forward and rank (%(default)s)")
    group.add_argument("--lr", type=float, default=1e-5, help="peak learning rate (%(default)s)")
    group.add_argument("--warmup-share", type=float, default=0.02, help="share of the steps (%(default)s)")
    group.add_argument("--weight-decay", type=float, default=1e-6)
    group.add_argument("--grad-clip", type=float, default=1.0, help="largest global gradient norm (%(default)s)")
    group.add_argument("--train-vision", action="store_true", help="train the vision tower too (the paper freezes it)")
    group.add_argument("--seed", type=int, default=0)
    group = parser.add_argument_group("machine")
    group.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="compute; weights are always float32")
    group.add_argument("--shard-size", type=int, help="ranks that share one copy of the trainer (default: all); with several nodes, the GPUs of one")
    group.add_argument("--recompute", action=argparse.BooleanOptionalAction, default=True, help="recompute layers in the backward pass: less memory")
    group.add_argument("--workers", type=int, default=4, help="decoding processes per rank (%(default)s)")
    group.add_argument("--save-every", type=int, default=500, help="steps between checkpoints (%(default)s)")
    group.add_argument("--keep", type=int, default=2, help="checkpoints that stay (%(default)s)")
    group.add_argument("--export-saves", action="store_true", help="with each checkpoint also write a Hugging Face folder, OUT/step-*")
    group.add_argument("--force", action="store_true", help="resume although a setting has changed")
    group.add_argument("--max-bad-share", type=float, default=0.05, help="largest share of unusable records (%(default)s)")
    data.add_limits(parser, image_max_pixels=802816, frame_max_pixels=100352)
    return parser.parse_args()
# fmt: on


MAY_CHANGE = """out media_root minutes tokens_per_microbatch recompute shard_size workers save_every keep export_saves force
    max_bad_share cache cache_gb""".split()  # a resumed run may: they change nothing but the order of sums


def main():
    args = parse_args()
    rank, world, device = init_distributed()

    # Everything that can be wrong with the input is found before a model is loaded.
    if args.sequences_per_step % world:
        data.refuse(
            f"--sequences-per-step {args.sequences_per_step} does not divide among {world} ranks"
        )
    if args.shard_size is not None and (args.shard_size < 1 or world % args.shard_size):
        data.refuse(f"--shard-size {args.shard_size} does not divide {world} ranks")
    if args.keep < 1:
        data.refuse(f"--keep {args.keep} must be at least 1")
    try:
        records = [
            record for path in args.data for record in data.load_records(path, args.media_root)
        ]
        processor = AutoProcessor.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        data.refuse(error)
    if lost := [record for record in records if data.demonstration(record) is None]:
        where = f"{lost[0]['file']}: record {lost[0]['index']}"
        data.refuse(f"{where}: no messages and no process, so there is nothing to imitate")
    steps = args.steps or math.ceil(args.epochs * len(records) / args.sequences_per_step)
    checkpoint, state = find_checkpoint(args.out)
    check_resume(state, args, MAY_CHANGE)
    start_run(args)

    model = load_model(args.model, device, getattr(torch, args.dtype), shard_size=args.shard_size)
    model.model.visual.requires_grad_(args.train_vision)
    if args.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = adamw(model, args.lr, args.weight_decay)
    step, cursor = state.get("step", 0), state.get("cursor", 0)
    check_room(
        args.out, model, args.keep, 1 + args.export_saves * (steps - step) // args.save_every
    )
    if checkpoint:
        load_checkpoint(checkpoint, state, model, optimizer)
    forget_after(step, os.path.join(args.out, "metrics.jsonl"))
    if rank == 0:
        print(
            f"{len(records)} records; {steps} steps of {args.sequences_per_step} on {world} ranks, from step {step}"
        )

    make_pair = partial(training_pair, processor=processor, limits=data.limits_of(args))
    order = data.data_order(len(records), args.seed, cursor, rank, world)
    stream = data.prefetch(records, make_pair, order, args.workers)
    tally, stop = Counter(state.get("counts", {}) if rank == 0 else {}), Stop(args.minutes)
    saving, saving_group = None, dist.new_group(backend="gloo")
    bar = tqdm(initial=step, total=steps, disable=rank > 0, mininterval=2)
    stopping = False
    while step < steps and not stopping:
        begin = time.time()
        rate = learning_rate(step, steps, args.lr, args.warmup_share)
        for group in optimizer.param_groups:
            group.update(lr=rate, weight_decay=args.weight_decay)
        groups = data.next_items(
            stream, args.sequences_per_step // world, tally, args.max_bad_share
        )
        waited = time.time() - begin
        loss, tokens, norm = update(model, optimizer, groups, args, device)
        step, cursor = step + 1, cursor + args.sequences_per_step
        tally["skipped_updates"] += math.isnan(norm) and rank == 0
        counts = sum(gather(tally), Counter())
        seconds = time.time() - begin
        row = dict(
            step=step,
            loss=loss,
            tokens=tokens,
            lr=rate,
            grad_norm=norm,
            tokens_per_second=tokens / seconds,
        )
        log_metrics(args.out, row | {"seconds/step": seconds, "seconds/data": waited} | counts)
        bar.update()
        stopping = stop.now()
        if step % args.save_every == 0 or stopping or step == steps:
            if saving:
                saving.join()
            state = dict(step=step, cursor=cursor, counts=counts, args=vars(args))
            saving = save_checkpoint(
                args.out, model, optimizer, state, saving_group, args.keep, tally
            )
            if args.export_saves:
                export_model(model, processor, os.path.join(args.out, f"step-{step:06d}"))
    export_model(model, processor, args.out)
    if saving:
        saving.join()
    if rank == 0:
        print(f"step {step} of {steps}; model in {args.out}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
