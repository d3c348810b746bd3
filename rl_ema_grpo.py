"""EMA-GRPO: RL on many tasks; a task's advantages are divided by the moving std of its rewards.

    bash demo.sh              # a laptop: its third part is this script on 2 CPU ranks
    torchrun --nproc-per-node 8 rl_ema_grpo.py --model runs/sft --data onethinker_rl_train.json \\
        --out runs/rl         # 8 x 80 GB

Every rank holds a shard of the trainer and a whole vLLM engine. A step, numbered as in main():

    1 sync        the engines get the trainer's weights
    2 roll out    each rank samples a group of n responses to each of its own prompts
    3 grade       rewards; 2 and 3 again until enough groups are neither all right nor all wrong
    4 advantages  A = (reward - mean of its group) / moving std of its task
    5 old logps   the trainer's log-probabilities before its weights move
    6 update      a few optimiser steps: tokens become likelier if A > 0, less likely if A < 0 (PPO)
    7 log, 8 save

Where the paper (arXiv 2512.03043) and its authors' code, the release, differ, or this from both:
 1. Advantages are clipped at 5 as the paper says. In the release a group with any |A| > 5 falls
    back to its own std, as in GRPO.
 2. A task's first batch sets its moments (as released). They survive a restart (released: lost).
 3. Clip range 0.2 / 0.3 and a mean over all response tokens (as released; the paper has a symmetric
    clip and a mean over sequences). No KL term without --kl-coef (paper: 0.01; released: off).
 4. Groups that dynamic sampling finds beyond --prompts-per-step are trained on, not thrown away.
As in both the vision tower is trained, unlike in SFT, and the learning rate is constant. A response
that was cut off is graded like any other: its tags are wrong.

Letters of dimensions: n responses in a group, R response tokens (of the groups that a function gets,
of a micro-batch in `policy_loss`), and those of sft.py.
"""

import itertools
import json
import math
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial

import cpu_compat  # before transformers
import numpy as np
import torch
import torch.distributed as dist

import data
import sft
from data import Prompt, encode, task_of
from rewards import Grader
from sft import DUMMY, gather, microbatches, next_items, pack


# ---- The method
class EMAStd:
    """Moving mean and second moment of each task's rewards in kept groups, and their std (paper).

    >>> ema = EMAStd()
    >>> ema.update("QA", [0.0, 1.0])        # the first batch of a task is taken as it is
    >>> ema.std("QA")
    0.5
    >>> ema.update("QA", [1.0, 1.0])        # m1 = 0.99 * 0.5 + 0.01 * 1, m2 likewise
    >>> round(ema.std("QA"), 6)
    0.499975
    """

    def __init__(self, decay=0.99, floor=1e-3):
        self.decay, self.floor = decay, floor
        self.moments = {}  # task -> [mean of rewards, mean of their squares]

    def update(self, task, rewards):
        """Takes in a task's rewards of one batch, all ranks. ValueError on nan or an empty list."""
        rewards = np.asarray(rewards, dtype=np.float64)
        if not (len(rewards) and np.isfinite(rewards).all()):
            raise ValueError(f"rewards of {task!r} must be finite numbers: {rewards.tolist()[:8]}")
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
    """A = (reward - mean of its group) / scale, clipped to [-clip, clip]; one float per response.

    rewards, groups, tasks: parallel lists, one entry per response in any order: reward, key of its
    group, task. The moments in `ema` take in this batch first. The scale is
        ema_grpo  the task's moving std: one divisor for a task, so tasks get advantages of like size
        grpo      the group's own std (ddof 1) + 1e-6: inflates groups whose rewards hardly differ
        dr_grpo   1: tasks with small rewards have small advantages

    >>> result = advantages([1, 0, 0, 0], ["p"] * 4, ["QA"] * 4, EMAStd())  # std 0.433
    >>> [round(a, 3) for a in result]
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


def policy_loss(
    logps, old_logps, advantages, clip_low=0.2, clip_high=0.3, dual_clip=3.0,
    ref_logps=None, kl_coef=0.0, rollout_logps=None, tis_cap=None,
):  # fmt: skip
    """The loss of each response token, to be averaged over all response tokens of the mini-batch.

    All tensors are (R,) float32. logps: the trainer's now, with a gradient. old_logps: the trainer's
    before this step's updates; in the first update logps.detach(): the ratio is 1, the gradient that
    of A * logps. rollout_logps: vLLM's, of the same weights as the old ones.
    Returns losses (R,) and, for the log, {name: (R,)}: clip_share, and kl, capped_share if used."""
    ratio = torch.exp(logps - old_logps)
    gain = ratio * advantages
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    surrogate = torch.min(gain, bounded)  # PPO: beyond the clip range gains have no gradient
    # Dual clip: where A < 0 the loss grows with the ratio; here to dual_clip * |A| at most.
    dual = torch.max(surrogate, dual_clip * advantages)
    losses = -torch.where(advantages < 0, dual, surrogate)
    numbers = dict(clip_share=bounded < gain)
    if tis_cap is not None:  # truncated importance sampling: vLLM's policy differs a little
        weight = torch.exp(old_logps - rollout_logps)
        losses = losses * weight.clamp(max=tis_cap).detach()
        numbers["capped_share"] = weight > tis_cap
    if kl_coef > 0:  # k3 estimator of KL(policy || reference, the frozen --model): never negative
        difference = ref_logps - logps
        numbers["kl"] = torch.exp(difference) - difference - 1
        losses = losses + kl_coef * numbers["kl"]
    return losses, numbers


# ---- The vLLM engine in every rank
@dataclass
class RolloutGroup:
    """One prompt and its n rollouts, in parallel lists. sft.py reads its prompt and responses."""

    prompt: Prompt
    responses: list  # n lists of token ids, with the end-of-turn token if there is one
    logps: list  # n lists of vLLM's log-probabilities of these tokens
    finished: list  # n bools: ended by itself
    scores: list = field(default_factory=list)  # n rewards.Score
    advantages: list = field(default_factory=list)  # n floats


def make_engine(path, dtype, max_model_len, media_per_prompt, seed):
    """A vLLM engine inside this process, on this rank's device, that generates without collectives.
    media_per_prompt: {"image": most images of one prompt, "video": most videos}."""
    from vllm import LLM

    cpu_compat.register_qwen3_vl()
    if torch.cuda.is_available():
        _, memory = torch.cuda.mem_get_info()
        settings = dict(
            enable_sleep_mode=True,
            kv_cache_memory_bytes=min(24 << 30, memory // 3),
            gpu_memory_utilization=0.25,  # what must be free at the start; the pool is sized above
        )
        graphs = dict(cudagraph_mode="FULL_DECODE_ONLY", max_cudagraph_capture_size=256)
        settings["compilation_config"] = graphs
    else:
        # No chunks of a prompt: vLLM would rewind its seeded generator, which a CPU's cannot do.
        settings = dict(enforce_eager=True, enable_chunked_prefill=False)
        settings["max_num_batched_tokens"] = max(max_model_len, 8192)
    precision = torch.get_float32_matmul_precision()
    llm = LLM(
        path,
        load_format="safetensors",  # "dummy" would leave a random mean and std of pixels
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
        **settings,
    )
    torch.set_float32_matmul_precision(precision)  # LLM() has set it anew
    return llm


def sync_weights(llm, weights, compare=False):
    """Wakes the engine and gives it the trainer's weights; it forgets what it computed with the old
    ones. All ranks call this. weights: iterator of (Hugging Face name, whole tensor). compare:
    RuntimeError unless the engines of all ranks then hold the same (10 to 40 s for an 8B)."""
    if torch.cuda.is_available():
        llm.wake_up(tags=["kv_cache"])  # asleep from the second step on
    llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=weights))
    if not llm.reset_prefix_cache():
        raise RuntimeError("vLLM did not drop its prefix cache: a request is still running")
    llm.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()  # or the engine dies later: "Encoder cache miss"
    if compare:
        sums = gather(llm.collective_rpc("compute_weight_checksums"))
        if others := [rank for rank, each in enumerate(sums) if each != sums[0]]:
            raise RuntimeError(f"engines of ranks {others} hold other weights than that of rank 0")


def release_kv_cache(llm):
    """Frees the engine's key-value pool for the trainer; returns its GB. CPU builds cannot: 0."""
    if not torch.cuda.is_available():
        return 0.0
    core = llm.llm_engine.engine_core.engine_core
    while core.scheduler.has_requests() or core.batch_queue:
        llm.llm_engine.step()  # finished requests linger for a step or two; sleep would refuse
    llm.sleep(level=0)
    llm.release_kv_cache_memory()
    return llm.llm_engine.vllm_config.cache_config.kv_cache_memory_bytes / 1e9


def generate(llm, prompts, seeds, n, max_tokens, tokenizer, temperature=1.0):
    """n responses to each prompt -> list of RolloutGroup, ungraded. seeds: one int per prompt.
    Vision tokens are banned: a sampled <|image_pad|> would claim the prompt's pixels."""
    from vllm import SamplingParams

    banned = dict.fromkeys(tokenizer.convert_tokens_to_ids(data.BANNED), -100.0)
    settings = dict(n=n, temperature=temperature, max_tokens=max_tokens, logit_bias=banned)
    settings |= dict(top_p=1.0, logprobs=0, detokenize=False)  # 0: of the sampled token alone
    params = [SamplingParams(seed=seed, **settings) for seed in seeds]
    outputs = llm.generate([prompt.vllm for prompt in prompts], params, use_tqdm=False)
    groups = []
    for prompt, output in zip(prompts, outputs, strict=True):
        assert list(output.prompt_token_ids) == prompt.token_ids, "vLLM reads another prompt"
        group = RolloutGroup(prompt, [], [], [])
        for sample in output.outputs:
            pairs = zip(sample.logprobs, sample.token_ids)
            group.responses.append(list(sample.token_ids))
            group.logps.append([row[token].logprob for row, token in pairs])
            group.finished.append(sample.finish_reason == "stop")
        groups.append(group)
    return groups


def text_of(group, i, tokenizer):
    """Response i as text, after what the chat template wrote of it (such as <think>), without its
    end-of-turn token. Other special tokens stay visible: they break the format."""
    tokens = group.responses[i][: -1 if group.finished[i] else None]
    return group.prompt.opened + tokenizer.decode(tokens)


def grade(groups, grader, tokenizer):
    """Fills in the scores of every response."""
    pairs = []
    for group in groups:
        texts = [text_of(group, i, tokenizer) for i in range(len(group.responses))]
        pairs += [(group.prompt.record, text) for text in texts]
    scores = iter(grader.score(pairs))
    for group in groups:
        group.scores = [next(scores) for _ in group.responses]


# ---- The parts of a step
def has_signal(group):
    """Dynamic sampling (DAPO) drops a group whose answers are all right or all wrong, even if their
    formats differ. Bounds: the paper's. With partial credit, as in grounding, few groups go."""
    accuracies = [score.accuracy for score in group.scores]
    return 0.01 < sum(accuracies) / len(accuracies) < 0.99


def sample_groups(llm, stream, grader, tokenizer, args, state, tally, row, stop):
    """Dynamic sampling: draws prompts, rolls them out and grades them, until all ranks together
    have kept enough groups, or --max-rounds are over: a step may train on fewer, or on none. All
    ranks call this. Returns the kept groups of this rank, and all that it has seen. Moves state["cursor"] (records drawn by all ranks) and state["keep_rate"]; fills in
    `row`, the line of the log, and `tally`, the counts of skipped records."""
    rank, world = dist.get_rank(), dist.get_world_size()
    kept, seen, rounds, all_kept, all_seen = [], [], 0, 0, 0
    while all_kept < args.prompts_per_step and rounds < args.max_rounds:
        if rounds >= 3 and (not all_kept or stop()):
            break  # all ranks together: three rounds kept nothing, or a stop was asked for
        # Missing groups by the share kept lately are prompts to draw; at most two steps' worth.
        missing = (args.prompts_per_step - all_kept) / max(state["keep_rate"], 0.1)
        size = math.ceil(min(missing, 2 * args.prompts_per_step) / world)
        with phase(row, "data"):
            prompts = next_items(stream, size, tally, args.max_bad_share)
        # vLLM seeds response j with seed + j: the seeds of prompts lie n apart.
        n, place = args.rollouts_per_prompt, state["cursor"] + rank
        seeds = [args.seed + (place + i * world) * n for i in range(len(prompts))]
        state["cursor"] += size * world
        with phase(row, "generate"):
            groups = generate(llm, prompts, seeds, n, args.max_response_tokens, tokenizer)
        with phase(row, "grade"):
            grade(groups, grader, tokenizer)
        for group in groups:
            group.prompt.vllm = None  # pixels are large, and in shared memory
            if not has_signal(group):
                group.prompt.patches = group.prompt.grids = None
        seen += groups
        kept += filter(has_signal, groups)
        counts = gather((sum(map(has_signal, groups)), len(groups)))
        new_kept, new_seen = map(sum, zip(*counts))
        all_kept, all_seen, rounds = all_kept + new_kept, all_seen + new_seen, rounds + 1
        state["keep_rate"] = 0.5 * state["keep_rate"] + 0.5 * new_kept / max(new_seen, 1)
    row |= dict(kept_share=all_kept / max(all_seen, 1), groups=all_kept, rounds=rounds)
    return kept, seen


def set_advantages(kept, ema, args):
    """Fills in the advantages of the kept groups. All ranks call this and see all rewards (few kB),
    so that all hold the same moments. Returns each task's root mean square advantage, for the log."""
    own = []
    for i, group in enumerate(kept):
        key, task = (dist.get_rank(), i), task_of(group.prompt.record)
        own += [(score.reward, key, task) for score in group.scores]
    rows = list(itertools.chain(*gather(own)))
    columns = zip(*rows) if rows else ([], [], [])
    result = advantages(*columns, ema, args.method, args.advantage_clip)
    squares = defaultdict(list)
    for (_, (rank, i), task), advantage in zip(rows, result):
        squares[task].append(advantage**2)
        if rank == dist.get_rank():
            kept[i].advantages.append(advantage)
    return {f"advantage/{task}": math.sqrt(np.mean(squares[task])) for task in squares}


def deal_minibatches(counts, rank, updates):
    """Deals the groups of all ranks like cards to min(updates, groups) mini-batches. counts: how many
    groups each rank holds; none changes rank. Returns the indices of `rank`'s in each mini-batch.

    >>> deal_minibatches([3, 1], rank=0, updates=2), deal_minibatches([3, 1], rank=1, updates=2)
    ([[0, 2], [1]], [[], [0]])
    """
    groups = [(r, i) for r, count in enumerate(counts) for i in range(count)]
    dealt = [groups[start::updates] for start in range(min(updates, len(groups)))]
    return [[i for r, i in minibatch if r == rank] for minibatch in dealt]


@torch.no_grad()
def current_logps(model, groups, tokens_per_microbatch, device):
    """log p of all response tokens by the model: (R,) float32, on the CPU. All ranks call this."""
    result = torch.empty(sum(len(each) for group in groups for each in group.responses))
    for members, at in microbatches(groups, tokens_per_microbatch):
        logps = model.response_logps(pack(members or [DUMMY], device))
        if members:
            result[at] = logps.cpu()
    model.reshard()  # the root keeps its gathered weights after a forward without backward
    return result


def update(model, optimizer, groups, old_logps, ref_logps, args, device):
    """One optimiser step on this rank's share of a mini-batch. All ranks call this.
    old_logps: (R,), or None: this forward's own, detached. ref_logps: (R,), or None without a KL.
    Returns numbers that hold for all ranks together."""
    tokens = []  # (advantage, vLLM's log-probability) of each response token
    for group in groups:
        for advantage, logps in zip(group.advantages, group.logps):
            tokens += [(advantage, logp) for logp in logps]
    advantage, sampled = torch.tensor(tokens).reshape(-1, 2).T.to(device)  # (R,), (R,)

    def loss_of(logps, at):  # at: their places among the R tokens
        old = logps.detach() if old_logps is None else old_logps[at].to(device)
        ref = None if ref_logps is None else ref_logps[at].to(device)
        clips = args.clip_low, args.clip_high, args.dual_clip
        options = dict(ref_logps=ref, kl_coef=args.kl_coef)
        options |= dict(rollout_logps=sampled[at], tis_cap=args.tis_cap)
        losses, numbers = policy_loss(logps, old, advantage[at], *clips, **options)
        return losses, numbers | dict(logp_gap=(old - sampled[at]).abs())

    numbers = sft.update(model, optimizer, groups, args, device, loss_of)
    del numbers["loss"], numbers["tokens"]  # the loss says little: a group's advantages sum to 0
    return numbers


# ---- The run
def parse_args():
    parser = sft.new_parser(__doc__, lr=2e-6, weight_decay=1e-2, save_every=20)
    positive, number = data.at_least(1), data.at_least(0, float)
    add = parser.add_argument_group("method").add_argument
    add("--method", choices=["ema_grpo", "grpo", "dr_grpo"], default="ema_grpo")
    add("--ema-decay", type=number, default=0.99, help="of the moments, per step (%(default)s)")
    add("--advantage-clip", type=number, default=5.0, help="largest advantage (%(default)s)")
    add("--clip-low", type=number, default=0.2, help="ratio above 1 - this (%(default)s)")
    add("--clip-high", type=number, default=0.3, help="ratio below 1 + this (%(default)s)")
    add("--dual-clip", type=number, default=3.0, help="largest ratio where A < 0 (%(default)s)")
    add("--kl-coef", type=number, default=0.0, help="weight of the KL to --model (%(default)s)")
    add("--tis-cap", type=number, help="cap of the trainer / vLLM importance weight (none)")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=positive, default=200, help="rollout batches (%(default)s)")
    add("--prompts-per-step", type=positive, default=128, help="groups, all ranks (%(default)s)")
    add("--rollouts-per-prompt", type=data.at_least(2), default=8, help="responses (%(default)s)")
    add("--updates-per-step", type=positive, default=4, help="optimiser steps (%(default)s)")
    add("--max-rounds", type=positive, default=20, help="of dynamic sampling (%(default)s)")
    add("--max-response-tokens", type=positive, default=4096, help="(%(default)s)")
    add("--polar-url", help="vLLM server of POLAR for open-ended answers (ROUGE)")
    add("--wandb", help="also log to this Weights & Biases project")
    data.add_limits(parser)
    return parser.parse_args()


@contextmanager
def phase(row, name):
    """Adds the seconds of a phase to the step's row, a defaultdict."""
    start = time.time()
    yield
    row[f"seconds/{name}"] += time.time() - start


def summarise(seen, updates, ema, seconds):
    """The numbers of a step: means over the responses that all ranks sampled, kept or not, and over
    the updates. seen: this rank's graded groups. All ranks call this."""
    own = []
    for group in seen:
        task = task_of(group.prompt.record)
        for score, response, done in zip(group.scores, group.responses, group.finished):
            row = dict(reward=score.reward, accuracy=score.accuracy)
            row |= {f"{name}/{task}": value for name, value in row.items()}
            own.append(row | dict(response_tokens=len(response), finished_share=done))
    values = defaultdict(list)
    for row in itertools.chain(*gather(own), updates):
        for name, value in row.items():
            values[name].append(value)
    result = {name: float(np.mean(each)) for name, each in values.items()}
    result["tokens_per_second"] = sum(values["response_tokens"]) / seconds
    return result | {f"std/{task}": ema.std(task) for task in sorted(ema.moments)}


def report(args, row, seen, tokenizer):
    """Rank 0: a line on the screen, and the first response of three groups in rollouts.jsonl."""
    left = timedelta(seconds=round(row["seconds/step"] * (args.steps - row["step"])))
    line = "step {step}/{steps}  reward {reward:.3f}  accuracy {accuracy:.3f}  "
    line += "kept {kept_share:.2f}  tokens {response_tokens:.0f}  {seconds/step:.1f} s  {left} left"
    print(line.format_map(row | dict(steps=args.steps, left=left)), flush=True)
    if row.get("logp_gap", 0) > 0.1:
        print(f"WARNING: logp_gap {row['logp_gap']:.2f}: other weights, pixels or positions?")
    with open(f"{args.out}/rollouts.jsonl", "a") as file:
        for group in seen[:3]:
            record = group.prompt.record
            entry = dict(step=row["step"], file=record["file"], index=record["index"])
            entry |= dict(task=task_of(record), answer=record["answer"])
            entry |= dict(response=text_of(group, 0, tokenizer)) | group.scores[0]._asdict()
            entry["rewards"] = [score.reward for score in group.scores]  # of the whole group
            entry["advantages"] = group.advantages  # empty where the group was not kept
            file.write(json.dumps(entry) + "\n")
    if args.wandb:
        import wandb

        run = wandb.run or wandb.init(project=args.wandb, config=vars(args))
        run.log(row, step=row["step"])


def main():
    args = parse_args()
    stop = sft.watch_for_stop(args.minutes)
    rank, world, device = sft.init_distributed()
    records, settings = sft.load_inputs(args, lambda r: r["answer"], "has messages, no answer")
    state = dict(cursor=0, keep_rate=1.0, moments={}) | sft.start_run(args)
    tokenizer, dtype = settings["processor"].tokenizer, getattr(torch, args.dtype)

    # The trainer, the reference, the engine, in this order: the engine needs what memory is left.
    shards = dict(shard_size=args.shard_size, recompute=args.recompute)
    model = sft.load_model(args.model, device, dtype, **shards)
    optimizer = sft.load_optimizer(args, model, state["step"])
    reference = None
    if args.kl_coef > 0:
        reference = sft.load_model(args.model, device, dtype, trainable=False, **shards)
    ema = EMAStd(args.ema_decay)
    ema.load_state_dict(state["moments"])
    kinds = [Counter(medium["type"] for medium in r["media"]) for r in records]
    media = {kind: max(counts[kind] for counts in kinds) for kind in ("image", "video")}
    length = args.max_prompt_tokens + args.max_response_tokens
    llm = make_engine(args.model, args.dtype, length, media, args.seed + rank)

    order = data.data_order(len(records), args.seed, state["cursor"], rank, world)
    stream = data.prefetch(records, partial(encode, **settings), order, args.workers)
    grader = Grader(polar_url=args.polar_url)
    tally = Counter(state["counts"] if rank == 0 else {})
    first, updates = state["step"], args.updates_per_step
    if rank == 0:
        g, n = args.prompts_per_step, args.rollouts_per_prompt
        work = f"{g} prompts x {n} rollouts = {g * n} responses a step on {world} ranks"
        print(f"{len(records)} records; {work}; {updates} updates; from {first}")

    for step in range(first + 1, args.steps + 1):
        row, start = defaultdict(float, step=step), time.time()

        # 1 sync
        with phase(row, "sync"):
            compare = step == first + 1 or step % 100 == 0
            sync_weights(llm, sft.full_weights(model, dtype), compare)

        # 2 roll out and 3 grade, until all ranks together have kept enough groups
        kept, seen = sample_groups(llm, stream, grader, tokenizer, args, state, tally, row, stop)
        pool_gb = release_kv_cache(llm)

        # 4 advantages
        row |= set_advantages(kept, ema, args)

        # 5 old log-probabilities. None for the first mini-batch: its weights are still those that
        # sampled, and update() uses its own forward. The others meet weights that have moved.
        dealt = deal_minibatches(gather(len(kept)), rank, updates)
        minibatches = [[kept[i] for i in indices] for indices in dealt]
        limits, ref_logps = (args.tokens_per_microbatch, device), [None] * len(minibatches)
        with phase(row, "old_logps"):
            old_logps = [None, *(current_logps(model, each, *limits) for each in minibatches[1:])]
            if reference:
                ref_logps = [current_logps(reference, each, *limits) for each in minibatches]

        # 6 update
        with phase(row, "update"):
            batches = zip(minibatches, old_logps, ref_logps)
            done = [update(model, optimizer, *batch, args, device) for batch in batches]

        # 7 log
        row["seconds/step"] = time.time() - start
        row |= summarise(seen, done, ema, row["seconds/step"])
        tally["skipped_updates"] += sum(math.isnan(u["grad_norm"]) for u in done) * (rank == 0)
        graded = Counter({f"grader/{what}": count for what, count in grader.counts.items()})
        state["counts"] = sum(gather(tally + graded), Counter())
        row |= state["counts"]
        sft.log_metrics(args.out, row, pool_gb)
        if rank == 0:
            report(args, row, seen, tokenizer)

        # 8 save
        state |= dict(step=step, moments=ema.state_dict())
        stopping = stop()
        if step % args.save_every == 0 or step == args.steps or stopping:
            sft.save_checkpoint(args, model, optimizer, state)
        if stopping:
            break

    sft.export_model(model, args.model, args.out)
    grader.close()
    llm.llm_engine.engine_core.shutdown()  # ends the process group too


if __name__ == "__main__":
    main()
