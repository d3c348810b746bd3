"""Supervised cold start: one pass over chain-of-thought data, and the forward that RL shares.

    bash demo.sh              # a laptop: its second part is this script on 2 CPU ranks
    torchrun --nproc-per-node 8 sft.py --model Qwen/Qwen3-VL-8B-Instruct \\
        --data onethinker_sft_image.json onethinker_sft_video.json --out runs/sft  # 8 x 80 GB

A training sequence is a `Group`: one prompt and its n responses, packed as [prompt | R1 | ... | Rn].
The prompt, with its thousands of vision tokens, is computed once. Response i attends to the prompt
and to itself. SFT is n = 1, RL is n = 8; both take their log-probabilities from `response_logps`.

Where this departs from the release: a plain loop over FSDP2, no trainer; the loss is the mean over
all response tokens of the global batch, whatever their rank.

Letters of dimensions: T packed tokens, R response tokens, P patches, M media (images and videos),
V vocabulary, E width of the model, H attention heads, D width of a head.
"""

import itertools
import json
import math
import os
import shutil
import signal
import time
from argparse import BooleanOptionalAction
from collections import Counter, namedtuple
from datetime import timedelta
from functools import partial
from pathlib import Path

import cpu_compat  # before transformers
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict, snapshot_download
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig
from transformers import Qwen3VLForConditionalGeneration as Qwen3VL

import data

# ---- The forward

# A data.Prompt and its responses: lists of token ids, with the end-of-turn token if they have one.
Group = namedtuple("Group", "prompt responses")


def pack(groups, device):
    """Groups -> one sequence of T tokens, [prompt | R1 | ... | Rn] one group after the other, a dict:
    ids (T,), positions (3, T), patches uint8 (P, 1536), grids (M, 3); rows (R,): the row that
    predicts each response token; targets (R,): that token; plan: for attention, see below.

    Attention has one sequence per response, S in all. Its keys are the prompt and the response, its
    queries the response, of R1 the prompt too. plan: rows of all keys; where the queries and where
    the keys of each sequence end, int32 (S + 1,) each; the most queries and the most keys of one."""
    ids, positions, rows, targets, key_rows, lengths = [], [], [], [], [], []
    for prompt, responses in groups:
        start, end = len(ids), len(ids) + len(prompt.token_ids)
        ids += prompt.token_ids
        positions.append(torch.from_numpy(prompt.positions))
        first = int(prompt.positions.max()) + 1  # every response begins right after the prompt
        for i, response in enumerate(responses):
            own = range(len(ids), len(ids) + len(response))
            key_rows += [*range(start, end), *own]
            queries = own.stop - (start if i == 0 else own.start)
            lengths.append((queries, end - start + len(own)))
            rows += [end - 1, *own[:-1]]  # token k is predicted by token k - 1
            ids += response
            targets += response
            positions.append((first + torch.arange(len(response))).expand(3, -1))
    batch = dict(ids=ids, rows=rows, targets=targets, key_rows=key_rows)
    batch = {name: torch.tensor(values) for name, values in batch.items()}
    batch["positions"] = torch.cat(positions, dim=1)
    batch["ends"] = torch.tensor([(0, 0), *lengths]).cumsum(0).int().T.contiguous()  # (2, S + 1)
    for name in ("patches", "grids"):
        batch[name] = torch.cat([getattr(prompt, name) for prompt, _ in groups])
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    batch["plan"] = batch.pop("key_rows"), *batch.pop("ends"), *map(max, zip(*lengths))
    return batch


def shared_prefix_attention(module, query, key, value, attention_mask, scaling, plan, **_):
    """Causal attention in which the responses of a group see their prompt and themselves only.
    query (1, H, T, D); key, value (1, Hkv, T, D); plan: see `pack`. Returns (1, T, H, D), None."""
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, D)
    key_rows, *ends = plan
    key, value = key.index_select(0, key_rows), value.index_select(0, key_rows)
    fast = query.is_cuda and query.dtype != torch.float32  # the kernel takes 16 bits only
    attend = varlen_attn if fast else attend_one_by_one
    # Queries are in the order of the sequences already. (-1, 0): causal from the bottom right.
    settings = dict(scale=scaling, window_size=(-1, 0), enable_gqa=True)
    return attend(query, key, value, *ends, **settings)[None], None


def attend_one_by_one(query, key, value, query_ends, key_ends, *_, scale, **__):
    """What varlen_attn does, without its kernel: SDPA sequence by sequence."""
    queries = query.split(query_ends.diff().tolist())
    keys, values = (x.split(key_ends.diff().tolist()) for x in (key, value))
    out = []
    for q, k, v in zip(queries, keys, values):
        mask = q.new_ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        seen = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
        out.append(seen[0].transpose(0, 1))
    return torch.cat(out)


def frame_attention(module, query, key, value, mask, scaling, cu_seq_lens_q, max_length_q, **_):
    """The vision tower's on CUDA: each frame attends to itself, all frames in one call.
    query, key, value (1, H, P, D); cu_seq_lens_q (frames + 1,). Returns (1, P, H, D), None."""
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    plan = cu_seq_lens_q, cu_seq_lens_q, int(max_length_q), int(max_length_q)
    return varlen_attn(query, key, value, *plan, scale=scaling)[None], None


AttentionInterface.register("shared_prefix", shared_prefix_attention)
AttentionMaskInterface.register("shared_prefix", lambda *_, **__: None)  # the plan says it
AttentionInterface.register("flash_frames", frame_attention)  # "flash": all frames in one call


def chunked_logps(hidden, weight, targets, chunk=1024):
    """Log-probability of each target token in float32, with `chunk` rows of logits in memory at a
    time: backward computes them again. hidden (R, E), weight (V, E), targets (R,). Returns (R,)."""
    wide = weight.float()  # also sums up the gradients of all chunks in float32

    def logps_of(rows, tokens):
        return -F.cross_entropy(rows.float() @ wide.T, tokens, reduction="none")

    pieces = zip(hidden.split(chunk), targets.split(chunk))
    return torch.cat([checkpoint(logps_of, *piece, use_reentrant=False) for piece in pieces])


def response_logps(model, batch):
    """log p(response token | prompt, response so far) of a packed batch: (R,) float32. The vision
    tower runs exactly once, also without media: see DUMMY."""
    visual, language = model.model.visual, model.model.language_model
    ids, patches, grids = batch["ids"], batch["patches"], batch["grids"]
    embeddings = language.embed_tokens(ids)  # (T, E)
    is_vision = (ids == model.config.image_token_id) | (ids == model.config.video_token_id)  # (T,)
    assert 4 * is_vision.sum() == len(patches), "vision tokens and patches do not match"
    if len(patches) == 0:  # a grey image of one token, which stands nowhere
        patches = patches.new_full((4, patches.shape[1]), 128)
        grids = grids.new_tensor([[1, 2, 2]])
    pixels = patches.float() / 127.5 - 1  # Qwen3-VL's normalisation: mean 0.5, std 0.5
    features = visual(pixels.to(embeddings.dtype), grid_thw=grids, return_dict=True)
    tokens = features.pooler_output.to(embeddings.dtype)  # (P / 4, E)
    hidden = language(
        inputs_embeds=embeddings.masked_scatter(is_vision[:, None], tokens)[None],
        position_ids=batch["positions"][:, None],
        visual_pos_masks=is_vision[None],
        deepstack_visual_embeds=features.deepstack_features,
        plan=batch["plan"],
        use_cache=False,
    )
    rows = hidden.last_hidden_state[0, batch["rows"]]  # (R, E)
    return chunked_logps(rows, model.lm_head.weight, batch["targets"])


# ---- Micro-batches

# FSDP gathers and reduces each layer by collectives, so every rank must make the same forward and
# backward calls, the vision tower included. A rank that has fewer micro-batches than another runs
# this dummy in their place, with its loss multiplied by zero.
NO_MEDIA = torch.zeros(0, 1536, dtype=torch.uint8), torch.zeros(0, 3, dtype=torch.int64)
DUMMY = Group(data.Prompt({}, [0], torch.zeros(3, 1).long().numpy(), *NO_MEDIA, vllm={}), [[0]])


def microbatches(groups, limit):
    """Packs groups into micro-batches of at most `limit` tokens, first fit, longest first; equally
    many on every rank (all ranks call this, see DUMMY). A group that is too long is split, and each
    part repeats the prompt. Returns a list of ([Group], at); of a dummy both are empty. at (R,):
    where their response tokens stand among those of all `groups`."""
    parts, position = [], 0  # [tokens, Group, positions of its response tokens]
    for group in groups:
        for i, response in enumerate(group.responses):
            if i == 0 or parts[-1][0] + len(response) > limit:
                parts.append([len(group.prompt.token_ids), Group(group.prompt, []), []])
            parts[-1][0] += len(response)
            parts[-1][1].responses.append(response)
            parts[-1][2] += range(position, position + len(response))
            position += len(response)
    bins = [[0, [], []] for _ in parts]  # [tokens, [Group], positions]
    for tokens, group, positions in sorted(parts, key=lambda part: -part[0]):
        chosen = next(each for each in bins if not each[0] or each[0] + tokens <= limit)
        chosen[0] += tokens
        chosen[1].append(group)
        chosen[2] += positions
    bins = [each for each in bins if each[0]]
    bins += [[0, [], []]] * (max(1, *gather(len(bins))) - len(bins))
    return [(members, torch.tensor(at, dtype=torch.int64)) for _, members, at in bins]


# ---- Distributed: one process per device, FSDP2
def init_distributed():
    """Joins torchrun's process group, or makes a group of one. Returns rank, world size, device."""
    alone = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    os.environ |= alone | {**os.environ}
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise SystemExit(f"rank {rank} has no GPU of its own: lower --nproc-per-node")
        # Micro-batches differ in size: less fragmentation. vLLM's pool switches it off for itself.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(local)
        device, backend = torch.device("cuda", local), "cpu:gloo,cuda:nccl"
    timeout = timedelta(minutes=60)  # ranks roll out for unequal times
    store, *_ = next(dist.rendezvous("env://", timeout=timeout))
    # After a restart by torchrun the store still has the addresses of the ranks that died.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    return rank, world, device


def gather(value):
    """One small Python object per rank -> the list of all, on every rank. All ranks call this."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def load_model(path, device, dtype, trainable=True, shard_size=None, recompute=False):
    """A Hugging Face Qwen3-VL -> FSDP2-sharded model, float32 weights, that computes in `dtype`.
    Rank 0 reads the weights and broadcasts the shards: host memory holds one copy. trainable=False:
    frozen, kept in `dtype` (the KL reference). shard_size: ranks that share one copy of the model.
    recompute: layers are computed again in backward. All ranks call this."""
    if dtype == torch.bfloat16:  # TF32 for the head: its operands are bfloat16 values anyway
        torch.set_float32_matmul_precision("high")
    master, weights = torch.float32 if trainable else dtype, {}
    if dist.get_rank() == 0:
        weights = Qwen3VL.from_pretrained(path, dtype=master, use_safetensors=True).state_dict()
    with torch.device("meta"):
        model = Qwen3VL(AutoConfig.from_pretrained(path)).to(master)
    cpu_compat.one_matrix_patch_embedding(model.model.visual)
    vision = "flash_frames" if device.type == "cuda" and dtype == torch.bfloat16 else "sdpa"
    model.set_attn_implementation({"text_config": "shared_prefix", "vision_config": vision})
    model.requires_grad_(trainable)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    world = dist.get_world_size()
    shape = (world // shard_size, shard_size) if shard_size and shard_size < world else (world,)
    names = ("copies", "shards")[-len(shape) :]
    mesh = dist.init_device_mesh(device.type, shape, mesh_dim_names=names)
    # Inputs stay as they are: patches are uint8, and rotary tables stay in float32.
    precision = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for block in [*model.model.visual.blocks, *model.model.language_model.layers, model]:
        fully_shard(block, mesh=mesh, mp_policy=precision)
    model.response_logps = partial(response_logps, model)
    register_fsdp_forward_method(model, "response_logps")  # the root gathers embeddings and head
    model.to_empty(device=device)
    for module in model.modules():  # rotary tables are in no checkpoint, to_empty left garbage
        if hasattr(module, "original_inv_freq"):
            fresh = type(module)(module.config).inv_freq.to(device)
            module.inv_freq, module.original_inv_freq = fresh, fresh.clone()
    options = states.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    states.set_model_state_dict(model, weights, options=options)
    model.tie_weights()
    return model.train()


# ---- Run folder: the Hugging Face model at its root, checkpoints/step-*/, metrics.jsonl, args.json
def start_run(args):
    """Makes the run folder and writes args.json. Returns the newest checkpoint's state, or that of
    step 0. All ranks call this before a model is loaded. Changed settings need --force."""
    if os.path.realpath(args.out) == os.path.realpath(args.model):
        data.refuse(f"--out {args.out} is the folder of --model")
    saved = sorted(Path(args.out).glob("checkpoints/step-*[0-9]/state.json"))  # half saved: .tmp
    state = json.loads(saved[-1].read_text()) if saved else dict(step=0, counts={})
    old, new = state.get("args", {}), vars(args)
    changed = [name for name in new if old.get(name, new[name]) != new[name] and name != "force"]
    if changed and not args.force:
        said = [f"--{name.replace('_', '-')} was {old[name]}, is {new[name]}" for name in changed]
        data.refuse(f"{args.out}: {'; '.join(said)}; --force takes the new ones")
    if dist.get_rank() == 0:
        try:
            os.makedirs(args.out, exist_ok=True)
            Path(args.out, "args.json").write_text(json.dumps(new, indent=1))
        except OSError as error:
            data.refuse(f"--out cannot be written: {error}")
        for path in Path(args.out, "metrics.jsonl"), Path(args.out, "rollouts.jsonl"):
            if path.exists():  # steps after the checkpoint will be run, and logged, again
                whole, _, torn = path.read_text().rpartition("\n")  # a kill may tear a line
                kept = [x for x in whole.splitlines() if json.loads(x)["step"] <= state["step"]]
                path.write_text("".join(row + "\n" for row in kept))
    return state


def save_checkpoint(args, model, optimizer, state):
    """Writes weights, optimiser and `state` (JSON, with "step") to checkpoints/step-*: aside, then
    renamed, so a checkpoint is there whole or not at all. Raises OSError. All ranks call this."""
    folder = Path(args.out, "checkpoints", f"step-{state['step']:06d}")
    aside = folder.with_suffix(".tmp")
    weights, moments = states.get_state_dict(model, optimizer)
    try:
        dcp.save(dict(model=weights, optimizer=moments), checkpoint_id=aside)
    except dcp.api.CheckpointException as error:
        raise OSError(f"{folder} could not be saved (disk full?), older ones are whole") from error
    if dist.get_rank() == 0:
        with open(aside / "state.json", "w") as file:
            json.dump(state | dict(args=vars(args)), file, indent=1)
            file.flush()
            os.fsync(file.fileno())  # dcp.save has done so with its own files
        aside.rename(folder)
        for old in sorted(folder.parent.glob("step-*[0-9]"))[: -args.keep]:
            shutil.rmtree(old)
    dist.barrier()


def load_optimizer(args, model, step):
    """AdamW for the weights that are trained. After step 0 its state and the weights are those of
    the checkpoint of that step, which any number of ranks may have saved. All ranks call this."""
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, args.lr, weight_decay=args.weight_decay, fused=True)
    if step:
        weights, moments = states.get_state_dict(model, optimizer)
        folder = Path(args.out, "checkpoints", f"step-{step:06d}")
        dcp.load(dict(model=weights, optimizer=moments), checkpoint_id=folder)
        states.set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
        # The old ones came with the checkpoint.
        optimizer.param_groups[0].update(lr=args.lr, weight_decay=args.weight_decay)
    return optimizer


def full_weights(model, dtype):
    """(Hugging Face name, whole tensor in `dtype`) of each weight, one at a time. All ranks call it.
    A tied head comes under both its names: vLLM on a CPU packs the head separately."""
    for name, shard in model.state_dict().items():
        yield name, shard.to(dtype).full_tensor()  # cast first: half the traffic


def export_model(model, source, out):
    """Writes bfloat16 safetensors, and all other files of the folder or hub id `source` as they are:
    an older transformers cannot read what a newer one writes. All ranks call this."""
    # Other weights, and our own logs: RL starts from an SFT run.
    left_out = "*.safetensors *.index.json *.bin *.pt *.pth *.jsonl args.json".split()
    weights = {}
    for name, tensor in full_weights(model, torch.bfloat16):
        if dist.get_rank() == 0:
            weights[name] = tensor.cpu().clone()  # it may be a view of a padded tensor
    if dist.get_rank() == 0:
        if model.config.tie_word_embeddings:
            del weights["lm_head.weight"]
        if not os.path.isdir(source):
            source = snapshot_download(source, ignore_patterns=left_out)
        save_torch_state_dict(weights, out)
        for path in Path(source).iterdir():
            if path.is_file() and not any(map(path.match, left_out)):
                shutil.copyfile(path, Path(out, path.name))
        print(f"model in {out}; curves: python tests/curves.py {out}", flush=True)
    dist.barrier()


def log_metrics(out, row, pool=0.0):
    """Rank 0 appends a step's row to metrics.jsonl; nan and inf become null. It gets "gb": the peak
    of GPU memory less vLLM's pool, which counts even while it is freed. All ranks call this."""
    row["gb"] = torch.cuda.max_memory_allocated() / 1e9 - pool  # 0 on a CPU
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if dist.get_rank() == 0:
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
        with open(Path(out, "metrics.jsonl"), "a") as file:
            file.write(json.dumps(finite) + "\n")


def watch_for_stop(minutes=None):
    """Notices SIGTERM, Ctrl-C and the end of --minutes, which count from here. Returns a function:
    whether any rank was asked to stop. All ranks call that one; all get the same answer."""
    deadline, signals = time.time() + 60 * (minutes or math.inf), []

    def notice(number, _):
        signals.append(number)
        if number == signal.SIGINT:  # a second Ctrl-C ends at once; torchrun makes it a SIGTERM
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, notice)
    signal.signal(signal.SIGINT, notice)
    return lambda: any(gather(bool(signals) or time.time() > deadline))


# ---- Supervised fine-tuning
def training_pair(record, processor, limits, prompts=data.PROMPTS):
    """A record -> Group of its prompt and one response: its demonstration and the end of the turn."""
    prompt = data.encode(record, processor, limits, prompts)
    prompt.vllm = None
    response = data.target_ids(prompt, processor.tokenizer)
    length, limit = len(prompt.token_ids) + len(response), limits.max_prompt_tokens
    if length > limit:
        raise data.MediaError("too_long", f"{length} tokens with the response, limit {limit}")
    return Group(prompt, [response])


def learning_rate(step, steps, peak, warmup_share):
    """Cosine with a linear warm-up.
    >>> [round(learning_rate(step, 10, 1.0, warmup_share=0.2), 2) for step in (0, 2, 4, 6, 8, 10)]
    [0.5, 1.0, 0.85, 0.5, 0.15, 0.0]
    """
    warmup = max(1, round(steps * warmup_share))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def next_items(stream, count, tally, max_bad_share):
    """The next `count` items less the unusable ones, which are printed and counted in `tally`
    ("records", "skipped/<reason>"). Raises RuntimeError when they are over `max_bad_share` of all
    records so far (and of at least 200)."""
    items = []
    for item in itertools.islice(stream, count):
        tally["records"] += 1
        if isinstance(item, data.MediaError):
            tally[f"skipped/{item.reason}"] += 1
            print(f"skipped: {item}")
        else:
            items.append(item)
    bad = sum(count for name, count in tally.items() if name.startswith("skipped/"))
    if bad > max_bad_share * max(tally["records"], 200):
        raise RuntimeError(f"too many bad records (see --max-bad-share): {dict(tally)}")
    return items


def update(model, optimizer, groups, args, device, loss_of=lambda logps, at: (-logps, {})):
    """One optimiser step on this rank's groups. All ranks call this.
    loss_of(logps (R,), at (R,)) -> losses (R,) of a micro-batch's response tokens, and numbers for
    the log, each (R,). at: where these tokens stand among those of all `groups`. Default: SFT's.
    Returns a dict: the means over all response tokens of the global batch, tokens, and grad_norm
    before clipping. Where that or the loss is not finite nothing moves, and grad_norm is nan."""
    tokens = sum(gather(sum(len(each) for group in groups for each in group.responses)))
    totals, means = Counter(), Counter(loss=0.0)
    for members, at in microbatches(groups, args.tokens_per_microbatch):
        logps = model.response_logps(pack(members or [DUMMY], device))
        if not members:
            (0 * logps.sum()).backward()
            continue
        losses, numbers = loss_of(logps, at)
        loss = losses.sum() / tokens
        # FSDP averages gradients over ranks; the loss is a sum over them.
        (loss * dist.get_world_size()).backward()
        for name, values in dict(numbers, loss=losses).items():
            totals[name] += values.sum().item() / tokens
    for each in gather(totals):
        means.update(each)  # adds
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip).full_tensor().item()
    if math.isfinite(norm + means["loss"]):
        optimizer.step()
    else:
        norm = math.nan
    optimizer.zero_grad()
    return {**means, "tokens": tokens, "grad_norm": norm}


def new_parser(doc, lr, weight_decay, save_every):
    """A parser with the options that sft.py and rl_ema_grpo.py share."""
    parser, positive, number = data.new_parser(doc), data.at_least(1), data.at_least(0, float)
    add = parser.add_argument_group("what").add_argument
    add("--model", required=True, help="folder or hub id of a Qwen3-VL")
    add("--data", nargs="+", required=True, help="record files (JSON or JSONL)")
    add("--media-root", help="folder of the media paths (default: the file's)")
    add("--prompts", help="JSON file of instructions (default: data.PROMPTS)")
    add("--out", required=True, help="run folder; the same command resumes from it")
    add("--minutes", type=data.at_least(0.001, float), help="stop and save after this time")
    add("--save-every", type=positive, default=save_every, help="steps (%(default)s)")
    add("--keep", type=positive, default=2, help="checkpoints that stay (%(default)s)")
    add("--force", action="store_true", help="resume with other settings than before")
    add = parser.add_argument_group("optimiser").add_argument
    add("--lr", type=number, default=lr, help="learning rate (%(default)s)")
    add("--weight-decay", type=number, default=weight_decay, help="(%(default)s)")
    add("--grad-clip", type=number, default=1.0, help="largest global gradient norm (%(default)s)")
    add("--seed", type=int, default=0)
    add = parser.add_argument_group("machine").add_argument
    add("--tokens-per-microbatch", type=positive, default=16384, help="per rank (%(default)s)")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="to compute in")
    add("--shard-size", type=positive, help="ranks that share one copy of the trainer (all)")
    add("--recompute", action=BooleanOptionalAction, default=True, help="less memory, slower")
    add("--workers", type=data.at_least(0), default=data.WORKERS, help="per rank (%(default)s)")
    add("--max-bad-share", type=number, default=0.05, help="of unusable records (%(default)s)")
    return parser


def parse_args():
    parser, positive = new_parser(__doc__, 1e-5, 1e-6, save_every=500), data.at_least(1)
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=data.at_least(0.001, float), default=1.0, help="passes (%(default)s)")
    add("--steps", type=positive, help="optimiser steps, in place of --epochs")
    add("--sequences-per-step", type=positive, default=32, help="all ranks (%(default)s)")
    add("--warmup-share", type=data.at_least(0, float), default=0.02, help="of steps (%(default)s)")
    add("--train-vision", action="store_true", help="train the vision tower (the paper does not)")
    data.add_limits(parser, image_max_pixels=802816, frame_max_pixels=100352)
    return parser.parse_args()


def load_inputs(args, needed, refusal):
    """The records of all files, and the settings of data.encode. Refuses what is wrong with them
    before a model is loaded: with the sentence `refusal` where needed(record) is None."""
    if args.shard_size and dist.get_world_size() % args.shard_size:
        data.refuse(f"--shard-size {args.shard_size} does not divide the number of ranks")
    try:
        load = lambda path: data.load_records(path, args.media_root, args.max_bad_share)
        records = sum(map(load, args.data), [])
        prompts, processor = data.load_prompts(args.prompts), data.load_processor(args.model)
    except (OSError, ValueError) as error:
        data.refuse(error)
    for record in records:
        if needed(record) is None:
            data.refuse(f"{record['file']}: record {record['index']}: {refusal}")
    return records, dict(processor=processor, limits=data.limits_of(args), prompts=prompts)


def main():
    args = parse_args()
    stop = watch_for_stop(args.minutes)
    rank, world, device = init_distributed()
    records, settings = load_inputs(args, lambda r: r["demonstration"], "no messages or process")
    size = args.sequences_per_step
    if size % world:
        data.refuse(f"--sequences-per-step {size} does not divide among {world} ranks")
    steps = args.steps or math.ceil(args.epochs * len(records) / size)
    state = start_run(args)
    step = state["step"]
    if rank == 0:
        print(f"{len(records)} records; {steps} steps of {size} on {world} ranks, from {step}")

    shards = dict(shard_size=args.shard_size, recompute=args.recompute)
    model = load_model(args.model, device, getattr(torch, args.dtype), **shards)
    model.model.visual.requires_grad_(args.train_vision)
    optimizer = load_optimizer(args, model, step)

    order = data.data_order(len(records), args.seed, step * size, rank, world)
    stream = data.prefetch(records, partial(training_pair, **settings), order, args.workers)
    tally = Counter(state["counts"] if rank == 0 else {})
    bar = tqdm(range(step + 1, steps + 1), initial=step, total=steps, disable=rank > 0)
    for step in bar:
        row, start = dict(step=step), time.time()
        groups = next_items(stream, size // world, tally, args.max_bad_share)
        row["seconds/data"] = time.time() - start
        row["lr"] = learning_rate(step - 1, steps, args.lr, args.warmup_share)
        optimizer.param_groups[0]["lr"] = row["lr"]
        row |= update(model, optimizer, groups, args, device)
        tally["skipped_updates"] += math.isnan(row["grad_norm"]) and rank == 0
        counts = sum(gather(tally), Counter())
        row["seconds/step"] = time.time() - start
        row["tokens_per_second"] = row["tokens"] / row["seconds/step"]
        log_metrics(args.out, row | counts)
        bar.set_postfix(loss=row["loss"])
        stopping = stop()
        if step % args.save_every == 0 or step == steps or stopping:
            save_checkpoint(args, model, optimizer, dict(step=step, counts=counts))
        if stopping:
            break
    export_model(model, args.model, args.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
