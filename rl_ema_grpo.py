"""EMA-GRPO: reinforcement learning on many tasks at once, each task's advantages divided by its own moving reward std.

    bash demo.sh                                                        # a laptop: its third part is this script on 2 CPU ranks
    torchrun --nproc-per-node 8 rl_ema_grpo.py --model runs/sft --data onethinker_rl_train.json --out runs/rl        # 8 x 80 GB

Every rank holds a shard of the trainer and a whole vLLM engine. A step, numbered as in the code:

    1 sync       the trainer's weights go to the engines
    2 roll out   each rank samples n responses to each of its own prompts
    3 grade      rewards; groups that are all right or all wrong teach nothing and are dropped; 2-3 again until enough are kept
    4 advantages (reward - mean of its group) / moving std of its task
    5 old logps  of the groups that will be updated after the policy has moved
    6 update     a few clipped policy-gradient steps
    7 log, 8 save

Where this departs from the paper (arXiv 2512.03043) and the release:
 1. Advantages are clipped at 5 as the paper says; the release divides a group with any |A| > 5 by its own std instead.
 2. A task's first batch sets its moments (as released; the paper is silent), and they survive a restart (released: lost).
 3. Clip range 0.2 / 0.3 and a mean over all response tokens (as released; the paper writes a symmetric clip and a mean
    over sequences). No KL term unless --kl-coef is set (the paper says 0.01, the released configuration switches it off).
 4. Groups that dynamic sampling finds beyond --prompts-per-step are trained on, not thrown away.
"""

import argparse
import json
import math
import os
import random
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import cpu_compat  # before transformers
import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoProcessor

# fmt: off
from data import (
    BANNED, Prompt, add_limits, data_order, encode, limits_of, load_prompts, load_records, next_items, prefetch, refuse, task_of,
)
from rewards import Grader
from sft import (
    DUMMY, Group, Stop, adamw, check_resume, check_room, export_model, find_checkpoint, forget_after, full_weights, gather,
    global_sum, init_distributed, load_checkpoint, load_model, log_metrics, microbatches, optimizer_step, pack,
    peak_memory_gb, reset_peak_memory, save_checkpoint, start_run, training_flops,
)
# fmt: on

# ----------------------------------------------------------------------------------------------------------------------
# The method


class EMAStd:
    """Moving mean and second moment of each task's rewards, and the std that follows (paper, EMA-GRPO).

    >>> ema = EMAStd()
    >>> ema.update("QA", [0.0, 1.0])               # the first batch of a task is taken as it is
    >>> ema.std("QA")
    0.5
    >>> ema.update("QA", [1.0, 1.0])               # m1 = 0.99 * 0.5 + 0.01 * 1, m2 likewise
    >>> round(ema.std("QA"), 6)
    0.499975
    """

    def __init__(self, decay=0.99, floor=1e-3):
        self.decay, self.floor = decay, floor
        self.moments = {}  # task -> [mean of R, mean of R^2]

    def update(self, task, rewards):
        """Takes in all rewards of one task in one batch, of all ranks. Raises ValueError on none or non-finite ones."""
        rewards = np.asarray(rewards, dtype=np.float64)
        if not (len(rewards) and np.isfinite(rewards).all()):
            raise ValueError(
                f"rewards of {task!r} must be finite numbers, at least one: {rewards.tolist()[:8]}"
            )
        batch = [float(rewards.mean()), float((rewards**2).mean())]
        old = self.moments.get(task, batch)
        self.moments[task] = [self.decay * m + (1 - self.decay) * b for m, b in zip(old, batch)]

    def std(self, task):
        """sqrt(m2 - m1^2), at least `floor`. KeyError for a task never seen."""
        m1, m2 = self.moments[task]
        return max(math.sqrt(max(m2 - m1**2, 0.0)), self.floor)

    def state_dict(self):
        return {task: list(moments) for task, moments in self.moments.items()}

    def load_state_dict(self, state):
        self.moments = {task: list(moments) for task, moments in state.items()}


def advantages(rewards, groups, tasks, ema, method="ema_grpo", clip=5.0):
    """A = (R - mean of its group) / scale, clipped to [-clip, clip]; one float per response, in the order given.

    rewards, groups, tasks: parallel lists with one entry per response, in any order: reward, id of the prompt, task.
    The moments in `ema` take in this batch first. The scale is
        ema_grpo  the task's moving std: all groups of a task are weighed alike, and all tasks come out at a like size
        grpo      the group's own std (unbiased) + 1e-6: blows up groups whose rewards hardly differ
        dr_grpo   1: tasks with small rewards drown beside tasks with large ones

    >>> [round(a, 3) for a in advantages([1, 0, 0, 0], ["p"] * 4, ["QA"] * 4, EMAStd())]      # std of 1, 0, 0, 0: 0.433
    [1.732, -0.577, -0.577, -0.577]
    >>> advantages([1, 0, 0, 0], ["p"] * 4, ["QA"] * 4, EMAStd(), "dr_grpo")
    [0.75, -0.25, -0.25, -0.25]
    """
    by_task, by_group = defaultdict(list), defaultdict(list)
    for reward, group, task in zip(rewards, groups, tasks, strict=True):
        by_task[task].append(reward)
        by_group[group].append(reward)
    for task, values in by_task.items():
        ema.update(task, values)
    result = []
    for reward, group, task in zip(rewards, groups, tasks):
        values = by_group[group]
        if method == "ema_grpo":
            scale = ema.std(task)
        elif method == "grpo":
            scale = (np.std(values, ddof=1) if len(values) > 1 else 0.0) + 1e-6
        elif method == "dr_grpo":
            scale = 1.0
        else:
            raise ValueError(f"method is {method!r}, expected ema_grpo, grpo or dr_grpo")
        result.append(float(np.clip((reward - np.mean(values)) / scale, -clip, clip)))
    return result


def pull_of_tasks(advantages, tasks):
    """How hard each task pulls, for the log: {"advantage/<task>": root mean square of its advantages}.

    >>> pull_of_tasks([3.0, -4.0, 1.0], ["QA", "QA", "box"])
    {'advantage/QA': 3.5355339059327378, 'advantage/box': 1.0}
    """
    squares = defaultdict(list)
    for advantage, task in zip(advantages, tasks, strict=True):
        squares[task].append(advantage**2)
    return {f"advantage/{task}": math.sqrt(np.mean(squares[task])) for task in sorted(squares)}


def policy_loss(
    logps, old_logps, advantages, clip_low=0.2, clip_high=0.3, dual_clip=3.0,
    ref_logps=None, kl_coef=0.0, rollout_logps=None, tis_cap=None,
):  # fmt: skip
    """The loss of each response token, to be averaged over all response tokens of the mini-batch, and what was clipped.

    logps, old_logps, advantages and, where used, ref_logps and rollout_logps: (R,) float32. Returns losses (R,), clipped
    (R,) bool. old_logps is the trainer before this mini-batch's step; where nothing has moved yet, pass logps.detach():
    the ratio is 1, the loss is the mean of -A, near 0, and the gradient is the policy gradient all the same.
    """
    ratio = torch.exp(logps - old_logps)
    gain = ratio * advantages
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    surrogate = torch.min(gain, bounded)  # PPO: no reward for moving further than the clip range
    # Dual clip: a bad token that has become much more likely would have an unbounded loss; stop at dual_clip * |A|.
    surrogate = torch.where(advantages < 0, torch.max(surrogate, dual_clip * advantages), surrogate)
    losses = -surrogate
    if (
        tis_cap is not None
    ):  # truncated importance sampling: vLLM sampled from a slightly different policy
        losses = losses * torch.exp(old_logps - rollout_logps).clamp(max=tis_cap).detach()
    if kl_coef > 0:  # k3 estimator of KL(policy || reference): unbiased, never negative
        difference = ref_logps - logps
        losses = losses + kl_coef * (torch.exp(difference) - difference - 1)
    return losses, bounded < gain


# ----------------------------------------------------------------------------------------------------------------------
# Rollouts: a vLLM engine in every rank


@dataclass
class Rollout:
    """One prompt's group of n responses. Lists are parallel, one entry per response."""

    prompt: Prompt
    responses: list  # n lists of token ids, with the end-of-turn token where the model wrote one
    logps: list  # n lists of vLLM's log-probabilities of these tokens
    finished: list  # n bools: ended by itself
    scores: list = field(default_factory=list)  # n rewards.Score
    advantages: list = field(default_factory=list)  # n floats

    @property
    def group(self):
        return Group(self.prompt, self.responses)


def make_engine(path, dtype, max_model_len, media_per_prompt, seed, tensor_parallel=1):
    """A vLLM engine inside this process, on this rank's device, that generates without any collective.

    media_per_prompt: {"image": most images of one prompt, "video": most videos}. tensor_parallel: ranks that hold one engine
    together; they must then ask it for the same, in step.
    """
    from vllm import LLM

    cpu_compat.register_qwen3_vl()
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        device = dict(
            enable_sleep_mode=True,
            kv_cache_memory_bytes=min(24 << 30, memory // 3),
            gpu_memory_utilization=0.5,  # only compared with the memory that is free now; the line above sizes the pool
            compilation_config={
                "cudagraph_mode": "FULL_DECODE_ONLY",
                "max_cudagraph_capture_size": 256,
            },
        )
    else:
        # No chunks: after half a prompt vLLM winds a seeded generator back, which a CPU generator cannot do.
        device = dict(
            enforce_eager=True,
            enable_chunked_prefill=False,
            max_num_batched_tokens=max(max_model_len, 8192),
        )
    random_state, precision = (
        torch.get_rng_state(),
        torch.get_float32_matmul_precision(),
    )  # LLM() sets both anew
    llm = LLM(
        path,
        load_format="safetensors",  # nothing is ever unpickled from a model folder
        tensor_parallel_size=tensor_parallel,
        distributed_executor_backend="external_launcher",
        seed=seed,
        dtype=dtype,
        max_model_len=max_model_len,
        enable_prefix_caching=True,
        limit_mm_per_prompt=media_per_prompt,
        mm_processor_cache_gb=0,
        hf_overrides={"head_dtype": "float32"},  # logits in float32, like the trainer's
        logprobs_mode="raw_logprobs",
        use_tqdm_on_load=False,
        **device,
    )
    torch.set_rng_state(random_state)
    torch.set_float32_matmul_precision(precision)
    return llm


def sync_weights(llm, weights):
    """Gives the engine the trainer's weights, and makes it forget everything that it computed with the old ones.

    weights: iterator of (Hugging Face name, whole tensor). The loader casts to the engine's dtype.
    """
    llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=weights))
    llm.reset_prefix_cache()
    llm.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()  # without this one the engine later dies of an "Encoder cache miss"


def check_engines(checksums, tensor_parallel):
    """Raises RuntimeError unless all engines hold the same weights. checksums: one per rank, of its part of the engine."""
    strange = [
        rank for rank, sums in enumerate(checksums) if sums != checksums[rank % tensor_parallel]
    ]
    if strange:
        raise RuntimeError(
            f"after the sync the engines of ranks {strange} hold other weights than the first one"
        )


def release_kv_cache(llm):
    """Frees the engine's key-value pool for the trainer. GPU only: CPU builds cannot."""
    if torch.cuda.is_available():
        core = llm.llm_engine.engine_core.engine_core
        while core.scheduler.has_requests() or core.batch_queue:
            llm.llm_engine.step()  # finished requests linger for a step or two, and the pause would be refused
        llm.sleep(level=0)
        llm.release_kv_cache_memory()


def restore_kv_cache(llm):
    if torch.cuda.is_available():
        llm.wake_up(tags=["kv_cache"])


def generate(llm, prompts, seeds, n, max_tokens, tokenizer, temperature=1.0):
    """n responses to each prompt -> list of Rollout, ungraded. seeds: one int per prompt.

    Vision tokens are banned: a sampled <|image_pad|> would claim the pixels of the prompt in the trainer's forward.
    """
    from vllm import SamplingParams

    banned = dict.fromkeys(tokenizer.convert_tokens_to_ids(BANNED), -100.0)
    settings = [
        SamplingParams(
            n=n, temperature=temperature, top_p=1.0, max_tokens=max_tokens, seed=seed,
            logprobs=0, detokenize=False, logit_bias=banned,
        )
        for seed in seeds
    ]  # fmt: skip
    rollouts = []
    if not prompts:  # every record of this round was skipped
        return rollouts
    outputs = llm.generate([prompt.vllm for prompt in prompts], settings, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert list(output.prompt_token_ids) == prompt.token_ids, (
            "vLLM and the trainer read different prompts"
        )
        samples = output.outputs
        rollouts.append(
            Rollout(
                prompt,
                responses=[list(sample.token_ids) for sample in samples],
                logps=[[step[token].logprob for step, token in zip(sample.logprobs, sample.token_ids)] for sample in samples],
                finished=[sample.finish_reason == "stop" for sample in samples],
            )
        )  # fmt: skip
    return rollouts


def common_prompts(prompts, rank, tensor_parallel):
    """The prompts that all ranks of this rank's engine could read: ranks that ask it for different things fall out of step."""
    if tensor_parallel == 1:
        return prompts
    name = lambda prompt: (prompt.record["file"], prompt.record["index"])
    everyone = gather([name(prompt) for prompt in prompts])
    mates = everyone[rank - rank % tensor_parallel :][:tensor_parallel]
    return [prompt for prompt in prompts if all(name(prompt) in names for names in mates)]


def text_of(rollout, i, tokenizer):
    """Response i as text, without its end-of-turn token. Other special tokens stay visible: they break the format."""
    return tokenizer.decode(rollout.responses[i][: -1 if rollout.finished[i] else None])


def grade(rollouts, grader, tokenizer):
    """Fills in the scores of every response."""
    pairs = [
        (rollout.prompt.record, text_of(rollout, i, tokenizer))
        for rollout in rollouts
        for i in range(len(rollout.responses))
    ]
    scores = iter(grader.score(pairs))
    for rollout in rollouts:
        rollout.scores = [next(scores) for _ in rollout.responses]


def teaches(rollout):
    """Dynamic sampling (DAPO): a group whose answers are all right or all wrong has no gradient worth its forward.

    The bounds are the paper's; graded tasks such as grounding hardly ever reach them exactly.
    """
    return 0.01 < np.mean([score.accuracy for score in rollout.scores]) < 0.99


def round_size(missing, keep_rate, prompts_per_step, multiple):
    """Prompts to draw in the next round, all ranks together, so that about `missing` groups are kept, given the share that was
    kept lately. Never a flood after a few bad rounds. A multiple of `multiple`: every rank draws equally many.

    >>> round_size(missing=128, keep_rate=0.5, prompts_per_step=128, multiple=32)
    256
    >>> round_size(missing=5, keep_rate=0.5, prompts_per_step=128, multiple=32)
    32
    """
    wanted = min(missing / max(keep_rate, 0.1), 2 * prompts_per_step)
    return math.ceil(wanted / multiple) * multiple


def expected_work(record):
    """How long the responses to a record will be, roughly, in characters: a thought and the true answer; a film counts as more
    thought."""
    return 500 + 500 * (record["data_type"] != "image") + len(record["answer"])


# ----------------------------------------------------------------------------------------------------------------------
# The update


def deal_minibatches(counts, rank, parts):
    """Splits the groups of all ranks into min(parts, groups) mini-batches of near-equal size; groups stay on their rank.

    counts: groups held by each rank. Returns for `rank` one list of its own group indices per mini-batch.

    >>> deal_minibatches([3, 1], rank=0, parts=2), deal_minibatches([3, 1], rank=1, parts=2)
    ([[0], [1, 2]], [[0], []])
    """
    everyone = sorted(
        (i, r) for r, count in enumerate(counts) for i in range(count)
    )  # alternating ranks
    parts = min(parts, len(everyone))
    edges = [part * len(everyone) // max(parts, 1) for part in range(parts + 1)]
    return [[i for i, r in everyone[a:b] if r == rank] for a, b in zip(edges, edges[1:])]


@torch.no_grad()
def current_logps(model, groups, tokens_per_microbatch, device):
    """Log-probabilities of all response tokens of the groups under the current weights: (R,) float32, on the CPU."""
    result = torch.empty(sum(len(response) for group in groups for response in group.responses))
    for members, positions in microbatches(groups, tokens_per_microbatch):
        logps = model.response_logps(pack(members or [DUMMY], device))
        if members:
            result[positions] = logps.cpu()
    model.reshard()  # the root keeps its gathered weights after a forward without backward
    return result


def per_token(rollouts, values):
    """One number per response -> one per response token, (R,). values: Rollout -> n floats."""
    pairs = [
        (value, len(response))
        for rollout in rollouts
        for value, response in zip(values(rollout), rollout.responses)
    ]
    return torch.repeat_interleave(
        torch.tensor([value for value, _ in pairs], dtype=torch.float32), torch.tensor([length for _, length in pairs], dtype=torch.int64)
    )  # fmt: skip


def update(model, optimizer, rollouts, old_logps, ref_logps, args, device):
    """One optimiser step on this rank's share of a mini-batch.

    old_logps, ref_logps: (R,) or None, where None means: as the policy is now, and not used. Returns a dict of numbers
    that hold for all ranks together.
    """
    advantage = per_token(rollouts, lambda rollout: rollout.advantages)  # (R,)
    sampled = torch.tensor(
        [logp for rollout in rollouts for response in rollout.logps for logp in response]
    )  # (R,)
    tokens = global_sum(len(advantage))
    totals = dict.fromkeys(
        ("loss", "clipped", "gap", "entropy", "flops", "microbatches", "dummies"), 0.0
    )
    for members, at in microbatches(
        [rollout.group for rollout in rollouts], args.tokens_per_microbatch
    ):
        batch = pack(members or [DUMMY], device)
        logps, entropies = model.response_logps(batch, entropy=True)
        if not members:  # nothing left here while other ranks still work: keep FSDP company
            (0 * logps.sum()).backward()
            totals["dummies"] += 1
            continue
        old = logps.detach() if old_logps is None else old_logps[at].to(device)
        rollout_logps = sampled[at].to(device)
        losses, clipped = policy_loss(
            logps, old, advantage[at].to(device), args.clip_low, args.clip_high, args.dual_clip,
            ref_logps[at].to(device) if ref_logps is not None else None, args.kl_coef, rollout_logps, args.tis_cap,
        )  # fmt: skip
        loss = (
            losses.sum() / tokens
        )  # the mean over all response tokens of the mini-batch, whatever their rank
        (
            loss * dist.get_world_size()
        ).backward()  # FSDP averages gradients over ranks, the loss is a sum over them
        totals["loss"] += loss.item()
        totals["clipped"] += clipped.sum().item()
        totals["gap"] += (old - rollout_logps).abs().sum().item()
        totals["entropy"] += entropies.sum().item()
        totals["flops"] += training_flops(model, batch, args.recompute)
        totals["microbatches"] += 1
    totals = dict(zip(totals, global_sum(*totals.values())))
    return dict(
        loss=totals["loss"],
        clip_share=totals["clipped"] / tokens,
        logp_gap=totals["gap"] / tokens,
        entropy=totals["entropy"] / tokens,
        grad_norm=optimizer_step(model, optimizer, args.grad_clip, totals["loss"]),
        tokens=tokens,
        **{name: totals[name] for name in ("flops", "microbatches", "dummies")},
    )


# ----------------------------------------------------------------------------------------------------------------------
# The run


# fmt: off
def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("what")
    group.add_argument("--model", required=True, help="Hugging Face folder or hub id of a Qwen3-VL, usually the SFT run")
    group.add_argument("--data", nargs="+", required=True, help="RL record files (JSON or JSONL)")
    group.add_argument("--media-root", help="folder of the media paths (default: each file's own folder)")
    group.add_argument("--prompts", help="JSON file that replaces the instructions of data.py")
    group.add_argument("--out", required=True, help="run folder; the same command resumes from it")
    group.add_argument("--eval-data", nargs="+", default=[], help="held-out record files to answer greedily during the run")
    group.add_argument("--eval-every", type=int, default=50, help="steps between such evaluations, each before its step; for the final model there is evaluate.py (%(default)s)")
    group = parser.add_argument_group("method")
    group.add_argument("--method", choices=["ema_grpo", "grpo", "dr_grpo"], default="ema_grpo")
    group.add_argument("--ema-decay", type=float, default=0.99, help="of the moving reward moments, per step (%(default)s)")
    group.add_argument("--advantage-clip", type=float, default=5.0)
    group.add_argument("--clip-low", type=float, default=0.2, help="ratio above 1 - this (%(default)s)")
    group.add_argument("--clip-high", type=float, default=0.3, help="ratio below 1 + this (%(default)s)")
    group.add_argument("--dual-clip", type=float, default=3.0, help="largest ratio of a token with a negative advantage (%(default)s)")
    group.add_argument("--kl-coef", type=float, default=0.0, help="weight of the KL to the starting model; 0 loads no reference")
    group.add_argument("--tis-cap", type=float, help="cap of the trainer / vLLM importance weight (default: no such weight)")
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=int, default=200, help="rollout batches (%(default)s)")
    group.add_argument("--minutes", type=float, help="stop and save after this time")
    group.add_argument("--prompts-per-step", type=int, default=128, help="kept groups per step, all ranks (%(default)s)")
    group.add_argument("--rollouts-per-prompt", type=int, default=8, help="responses per group (%(default)s)")
    group.add_argument("--updates-per-step", type=int, default=4, help="optimiser steps per rollout batch (%(default)s)")
    group.add_argument("--max-rounds", type=int, default=20, help="rounds of dynamic sampling per step (%(default)s)")
    group.add_argument("--max-response-tokens", type=int, default=4096)
    group.add_argument("--tokens-per-microbatch", type=int, default=32768, help="tokens per forward and rank (%(default)s)")
    group.add_argument("--lr", type=float, default=2e-6, help="constant learning rate (%(default)s)")
    group.add_argument("--weight-decay", type=float, default=1e-2)
    group.add_argument("--grad-clip", type=float, default=1.0, help="largest global gradient norm (%(default)s)")
    group.add_argument("--seed", type=int, default=0)
    group = parser.add_argument_group("machine")
    group.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="compute of trainer and vLLM; master weights are float32")
    group.add_argument("--rollout-tp", type=int, default=1, help="ranks that share one vLLM engine, for models too large for one GPU beside the trainer (%(default)s)")
    group.add_argument("--shard-size", type=int, help="ranks that share one copy of the trainer (default: all); with several nodes, the GPUs of one")
    group.add_argument("--recompute", action=argparse.BooleanOptionalAction, default=True, help="recompute layers in the backward pass: less memory")
    group.add_argument("--workers", type=int, default=4, help="decoding processes per rank (%(default)s)")
    group.add_argument("--grade-seconds", type=float, default=10.0, help="a grading that takes longer scores 0 (%(default)s)")
    group.add_argument("--polar-url", help="vLLM server of the POLAR reward model, for open-ended answers (default: ROUGE)")
    group.add_argument("--save-every", type=int, default=20, help="steps between checkpoints (%(default)s)")
    group.add_argument("--keep", type=int, default=2, help="checkpoints that stay (%(default)s)")
    group.add_argument("--export-saves", action="store_true", help="with each checkpoint also write a Hugging Face folder, OUT/step-*")
    group.add_argument("--force", action="store_true", help="resume although a setting has changed")
    group.add_argument("--max-bad-share", type=float, default=0.05, help="largest share of unusable records (%(default)s)")
    group.add_argument("--wandb", help="also log to this Weights & Biases project")
    add_limits(parser)
    return parser.parse_args()
# fmt: on


def check(args, world):
    """Everything that can be wrong with the input, before a model is loaded. Returns records, held-out records, processor."""
    if args.prompts_per_step % world:
        refuse(f"--prompts-per-step {args.prompts_per_step} does not divide among {world} ranks")
    for flag, ranks in (
        ("--rollout-tp", args.rollout_tp),
        ("--shard-size", args.shard_size or world),
    ):
        if ranks < 1 or world % ranks:
            refuse(f"{flag} {ranks} does not divide {world} ranks")
    for name in ("prompts_per_step", "updates_per_step", "keep"):
        if (number := getattr(args, name)) < 1:
            refuse(f"--{name.replace('_', '-')} {number} must be at least 1")
    if args.rollouts_per_prompt < 2:
        refuse(
            f"--rollouts-per-prompt {args.rollouts_per_prompt}: a group of one has no mean to differ from"
        )
    try:
        records, held_out = (
            [record for path in paths for record in load_records(path, args.media_root)]
            for paths in (args.data, args.eval_data)
        )
        load_prompts(args.prompts)
        processor = AutoProcessor.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        refuse(error)
    for record in records + held_out:
        if record["answer"] is None:
            refuse(
                f"{record['file']}: record {record['index']}: an SFT record (messages), where answers are needed"
            )
    return records, held_out, processor


@contextmanager
def phase(row, name):
    """Adds a phase's seconds to the step's row, and notes its peak memory."""
    reset_peak_memory()
    start = time.time()
    yield
    row[f"seconds/{name}"] = row.get(f"seconds/{name}", 0.0) + time.time() - start
    row[f"gb/{name}"] = max(row.get(f"gb/{name}", 0.0), peak_memory_gb())


def evaluate_greedily(llm, records, encode_record, grader, tokenizer, args, rank, world):
    """Mean held-out accuracy per task: {"eval/<task>": accuracy}. Unusable records count 0."""
    tp = args.rollout_tp
    mine, graded = records[rank // tp :: world // tp], []
    stream = prefetch(mine, encode_record, range(len(mine)), args.workers)
    for start in range(0, len(mine), 64):  # so that few pictures are in memory at a time
        prompts = common_prompts(
            next_items(stream, min(64, len(mine) - start), Counter(), 1.0), rank, tp
        )
        rollouts = generate(
            llm,
            prompts,
            [0] * len(prompts),
            1,
            args.max_response_tokens,
            tokenizer,
            temperature=0.0,
        )
        rollouts = rollouts[rank % tp :: tp]
        grade(rollouts, grader, tokenizer)
        graded += [
            (task_of(rollout.prompt.record), rollout.scores[0].accuracy) for rollout in rollouts
        ]
    right, total = Counter(), Counter(task_of(record) for record in records)
    for part in gather(graded):
        for task, accuracy in part:
            right[task] += accuracy
    return {f"eval/{task}": right[task] / total[task] for task in sorted(total)}


MAY_CHANGE = """out media_root eval_data eval_every steps minutes tokens_per_microbatch recompute rollout_tp shard_size workers
    grade_seconds save_every keep export_saves force max_bad_share wandb cache cache_gb""".split()  # by a resumed run


def main():
    args = parse_args()
    rank, world, device = init_distributed()
    records, held_out, processor = check(args, world)
    checkpoint, state = find_checkpoint(args.out)
    check_resume(state, args, MAY_CHANGE)
    start_run(args)
    torch.manual_seed(args.seed)
    limits, tokenizer = limits_of(args), processor.tokenizer
    encode_record = partial(
        encode, processor=processor, limits=limits, prompts=load_prompts(args.prompts)
    )
    n, parts = args.rollouts_per_prompt, args.updates_per_step

    # Trainer, reference, engine, in this order: the engine measures what memory is left.
    dtype = getattr(torch, args.dtype)
    model = load_model(args.model, device, dtype, shard_size=args.shard_size)
    if args.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = adamw(model, args.lr, args.weight_decay)
    reference = (
        load_model(args.model, device, dtype, trainable=False, shard_size=args.shard_size)
        if args.kl_coef > 0
        else None
    )
    first, cursor, keep_rate = (
        state.get("step", 0),
        state.get("cursor", 0),
        state.get("keep_rate", 1.0),
    )
    check_room(
        args.out, model, args.keep, 1 + args.export_saves * (args.steps - first) // args.save_every
    )
    if checkpoint:
        load_checkpoint(checkpoint, state, model, optimizer)
    for group in optimizer.param_groups:  # a checkpoint brings its old ones back
        group.update(lr=args.lr, weight_decay=args.weight_decay)
    ema = EMAStd(args.ema_decay)
    ema.load_state_dict(state.get("moments", {}))
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        forget_after(first, os.path.join(args.out, name))

    # An engine is held by `tp` ranks, which read the same prompts and then share out the groups.
    tp, engine, engines = args.rollout_tp, rank // args.rollout_tp, world // args.rollout_tp
    rows = max(
        1, min(4, args.prompts_per_step // engines // 4)
    )  # prompts that an engine is dealt at a time
    work = [expected_work(record) for record in records]
    order = data_order(len(records), args.seed, cursor, engine, engines, rows, work)
    stream = prefetch(records, encode_record, order, args.workers)
    grader = Grader(seconds=args.grade_seconds, polar_url=args.polar_url)
    media = [Counter(medium["type"] for medium in record["media"]) for record in records + held_out]
    media_per_prompt = {kind: max(counts[kind] for counts in media) for kind in ("image", "video")}
    max_model_len = limits.max_prompt_tokens + args.max_response_tokens
    llm = make_engine(
        args.model, args.dtype, max_model_len, media_per_prompt, args.seed + engine, tp
    )

    if rank == 0:
        print(
            f"{len(records)} records; {args.prompts_per_step} prompts x {n} rollouts = {args.prompts_per_step * n} responses a step"
            f" on {world} ranks; {parts} optimiser steps of about {args.prompts_per_step // parts} prompts; from step {first}"
        )  # fmt: skip
        if args.wandb:
            import wandb

            wandb.init(project=args.wandb, config=vars(args))
    tally, stop = Counter(state.get("counts", {}) if rank == 0 else {}), Stop(args.minutes)
    saving, saving_group = None, dist.new_group(backend="gloo")
    save_row = {}  # seconds and memory of the last save, which are logged with the next step

    step = first
    while step < args.steps:
        begin, row = time.time(), dict(step=step + 1, **save_row)

        # 1 sync
        with phase(row, "sync"):
            sync_weights(llm, full_weights(model, dtype))
            restore_kv_cache(llm)
            if step == first or step % 50 == 0:
                check_engines(gather(llm.collective_rpc("compute_weight_checksums")), tp)
        if held_out and step % args.eval_every == 0:
            with phase(row, "eval"):
                row |= evaluate_greedily(
                    llm, held_out, encode_record, grader, tokenizer, args, rank, world
                )

        # 2 roll out and 3 grade, until all ranks together have kept enough groups
        kept, seen, all_kept, all_seen, rounds = (
            [],
            [],
            0,
            0,
            0,
        )  # this rank's rollouts, and how many of all ranks
        while all_kept < args.prompts_per_step and rounds < args.max_rounds:
            missing = args.prompts_per_step - all_kept
            size = round_size(missing, keep_rate, args.prompts_per_step, rows * engines) // engines
            with phase(row, "data"):
                prompts = common_prompts(
                    next_items(stream, size, tally, args.max_bad_share), rank, tp
                )
            seeds = [args.seed + (cursor + engine + i * engines) * n for i in range(len(prompts))]
            cursor += size * engines
            with phase(row, "generate"):
                rollouts = generate(llm, prompts, seeds, n, args.max_response_tokens, tokenizer)[
                    rank % tp :: tp
                ]
            with phase(row, "wait"):  # for the rank that writes longest
                dist.barrier()
            with phase(row, "grade"):
                grade(rollouts, grader, tokenizer)
            new = [rollout for rollout in rollouts if teaches(rollout)]
            for rollout in rollouts:
                rollout.prompt.vllm = None  # pixels are large, and in shared memory
                if not teaches(rollout):
                    rollout.prompt.patches = None
            kept, seen, rounds = kept + new, seen + rollouts, rounds + 1
            new_kept, new_seen = map(int, global_sum(len(new), len(rollouts)))
            all_kept, all_seen = all_kept + new_kept, all_seen + new_seen
            keep_rate = 0.5 * keep_rate + 0.5 * new_kept / max(new_seen, 1)
        release_kv_cache(llm)

        # 4 advantages: every rank sees all rewards (a few kB), so that all ranks hold the same moments
        mine = [
            (score.reward, (rank, i), task_of(rollout.prompt.record))
            for i, rollout in enumerate(kept)
            for score in rollout.scores
        ]
        everyone = gather(mine)
        flat = [entry for part in everyone for entry in part]
        if flat:
            rewards, groups, tasks = zip(*flat)
            result = advantages(rewards, groups, tasks, ema, args.method, args.advantage_clip)
            start = sum(len(part) for part in everyone[:rank])
            for i, rollout in enumerate(kept):
                rollout.advantages = result[start + i * n : start + (i + 1) * n]
            row |= pull_of_tasks(result, tasks)

        # 5 old log-probabilities: the first mini-batch is updated by the very policy that computes them, so it needs none
        counts = [len(part) // n for part in everyone]
        minibatches = [[kept[i] for i in part] for part in deal_minibatches(counts, rank, parts)]
        old_logps = [None] * len(minibatches)
        ref_logps = [None] * len(minibatches)
        with phase(row, "old_logps"):
            for k, minibatch in enumerate(minibatches):
                members = [rollout.group for rollout in minibatch]
                if k > 0:
                    old_logps[k] = current_logps(model, members, args.tokens_per_microbatch, device)
                if reference is not None:
                    ref_logps[k] = current_logps(
                        reference, members, args.tokens_per_microbatch, device
                    )

        # 6 update
        with phase(row, "update"):
            updates = [
                update(model, optimizer, minibatch, old, ref, args, device)
                for minibatch, old, ref in zip(minibatches, old_logps, ref_logps)
            ]
        if updates and updates[0]["logp_gap"] > 0.1 and rank == 0:
            print(
                f"WARNING: step {step + 1}: trainer and vLLM differ by {updates[0]['logp_gap']:.2f} nats a token:"
                " other weights, other pixels, or other positions?"
            )
        if not updates and rank == 0:
            print(
                f"step {step + 1}: none of {all_seen} groups was kept in {rounds} rounds: nothing to learn from"
            )

        # 7 log
        tally["skipped_updates"] += sum(math.isnan(u["grad_norm"]) for u in updates) * (rank == 0)
        mine = Counter({f"grader/{what}": count for what, count in grader.counts.items()})
        counts = sum(gather(mine + tally if rank % tp == 0 else mine), Counter())
        row["seconds/step"] = time.time() - begin
        row |= summarise(seen, updates, ema, row) | counts
        row |= dict(kept_share=all_kept / max(all_seen, 1), groups=all_kept, rounds=rounds)
        log_metrics(args.out, row)
        if rank == 0:
            print(step_line(row, args.steps), flush=True)
            save_samples(args.out, step + 1, seen, tokenizer)
            if args.wandb:
                wandb.log(row, step=step + 1)

        # 8 save
        step, save_row, stopping = step + 1, {}, stop.now()
        if step % args.save_every == 0 or stopping or step == args.steps:
            state = dict(
                step=step,
                cursor=cursor,
                keep_rate=keep_rate,
                moments=ema.state_dict(),
                counts=counts,
                args=vars(args),
            )
            with phase(save_row, "save"):
                if saving:
                    saving.join()
                saving = save_checkpoint(
                    args.out, model, optimizer, state, saving_group, args.keep, tally
                )
                if args.export_saves:
                    export_model(model, processor, os.path.join(args.out, f"step-{step:06d}"))
        if stopping:
            break

    export_model(model, processor, args.out)
    if saving:
        saving.join()
    grader.close()
    if rank == 0:
        print(f"step {step} of {args.steps}; model in {args.out}")
    llm.llm_engine.engine_core.shutdown()  # ends the process group too


# bfloat16, dense; the first name that is part of the device's
PEAK_TFLOPS = {
    "B200": 2250,
    "H100 PCIe": 756,
    "H100": 989,
    "H200": 989,
    "H800": 989,
    "A100": 312,
    "A800": 312,
}


def summarise(seen, updates, ema, row):
    """The numbers of one step, over all ranks: see the glossary in the README. `seen`: this rank's graded rollouts."""
    responses = [
        (task_of(rollout.prompt.record), score.reward, score.accuracy, len(response), finished)
        for rollout in seen
        for score, response, finished in zip(rollout.scores, rollout.responses, rollout.finished)
    ]
    responses = [response for part in gather(responses) for response in part]
    by_task = defaultdict(list)
    for response in responses:
        by_task[response[0]].append(response)
    mean = lambda rows, column: float(np.mean([row[column] for row in rows])) if rows else 0.0
    result = dict(
        reward=mean(responses, 1),
        accuracy=mean(responses, 2),
        response_tokens=mean(responses, 3),
        finished_share=mean(responses, 4),
        tokens_per_second=sum(response[3] for response in responses) / row["seconds/step"],
        gb=max(value for key, value in row.items() if key.startswith("gb/")),
    )
    if updates:
        result |= {
            key: float(np.mean([u[key] for u in updates]))
            for key in ("loss", "clip_share", "entropy", "grad_norm")
        }
        result["logp_gap"] = updates[0][
            "logp_gap"
        ]  # before anything moved: only vLLM against the trainer
        result |= {key: sum(u[key] for u in updates) for key in ("microbatches", "dummies")}
        result["tflops"] = (
            sum(u["flops"] for u in updates) / dist.get_world_size() / row["seconds/update"] / 1e12
        )
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        if peak := next((peak for name, peak in PEAK_TFLOPS.items() if name in device), None):
            result["mfu"] = result["tflops"] / peak
    for task, part in sorted(by_task.items()):
        result |= {f"reward/{task}": mean(part, 1), f"accuracy/{task}": mean(part, 2)}
    result |= {f"std/{task}": ema.std(task) for task in sorted(ema.moments)}
    return result


def step_line(row, steps):
    """The step on one line, for the screen."""
    names = ("sync", "data", "generate", "wait", "grade", "old_logps", "update", "save")
    phases = " ".join(f"{name} {row.get(f'seconds/{name}', 0):.1f}" for name in names)
    return (
        f"step {row['step']:4d}/{steps}  reward {row['reward']:.3f}  accuracy {row['accuracy']:.3f}  kept {row['kept_share']:.2f}"
        f"  tokens {row['response_tokens']:5.1f}  finished {row['finished_share']:.2f}  grad {row.get('grad_norm', 0):.2f}"
        f"  gap {row.get('logp_gap', 0):.1e}  {row['tokens_per_second']:.0f} tok/s  {row.get('tflops', 0):.2g} TFLOP/s  {row['gb']:.1f} GB  {row['seconds/step']:.1f} s ({phases})"
    )  # fmt: skip


def save_samples(out, step, rollouts, tokenizer, count=3):
    """Appends a few of the step's rollouts with their reward parts to rollouts.jsonl."""
    with open(os.path.join(out, "rollouts.jsonl"), "a") as file:
        for rollout in random.Random(step).sample(rollouts, min(count, len(rollouts))):
            record = rollout.prompt.record
            entry = dict(
                step=step, file=record["file"], index=record["index"], task=task_of(record)
            )
            entry |= dict(answer=record["answer"], response=text_of(rollout, 0, tokenizer))
            entry |= rollout.scores[0]._asdict()
            entry["rewards"] = [score.reward for score in rollout.scores]  # of the whole group
            entry["advantages"] = rollout.advantages  # empty where the group was not kept
            file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
