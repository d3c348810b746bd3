"""What the first GPU must show: python tests/gpu.py

One NVIDIA GPU, at most 8 minutes, from a fresh checkout. Prints pass or fail with figures and writes
assets/gpu-<name>.json. torch and transformers are enough; what needs another package is named as not
run. Without a GPU the same checks run on small shapes, and nothing is written.

    python tests/gpu.py                    # all checks, each in a process of its own
    python tests/gpu.py attention layers   # some of them

attention   the varlen kernel against SDPA, forward and backward, at head 128 (text) and 72 (vision)
packed      the packed forward against transformers, one response at a time, in bfloat16
patches     the patch embedding as one matrix product against its Conv3d, with both times
layers      groups of 8 through layers of the 8B's shape: memory per token, TFLOP/s, MFU, sharing
checkpoint  weights and optimiser saved and resumed, bit for bit
engine      vLLM: start, seeds, weight sync, logp_gap, pool released and restored three times
step        one RL step of the toy
"""

import argparse
import importlib.util
import inspect
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from unittest.mock import MagicMock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import cpu_compat  # before transformers
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import Qwen3VLConfig
from transformers import Qwen3VLForConditionalGeneration as Qwen3VL

# Stand-ins, so that our scripts import without PyAV and Pillow; the checks that use them do not run.
# After transformers, which asks for some of them itself.
PACKAGES = ("vllm", "av", "PIL", "tqdm", "math_verify", "rouge_score", "pycocotools")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
for name in ("av", "av.stream", "av.video.reformatter", "PIL", "tqdm"):
    if name.split(".")[0] in MISSING:
        sys.modules[name] = MagicMock()

import bench
import data
import rl_ema_grpo
import sft

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32  # where a check needs no float32 beside it
ERROR = 0.02 if CUDA else 1e-5  # what rounding in DTYPE may make of a result, relative
MINUTES = 8


def accept_older_torch():
    """varlen_attn of an older torch has no grouped queries: here its key heads are repeated."""
    kernel = sft.varlen_attn

    def varlen_attn(query, key, value, *plan, enable_gqa=False, **settings):
        times = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(times, 1) for x in (key, value))
        return kernel(query, key, value, *plan, **settings)

    if "enable_gqa" not in inspect.signature(kernel).parameters:
        sft.varlen_attn = varlen_attn


# --------------------------------------------------------------------------------------------------
# Models and groups without files


def model_config(heads, layers, vision_heads, vision_layers, vocabulary):
    """The 8B is (32, 36, 16, 27, 151_936). Heads have its widths: 128, and 72 in the vision tower."""
    rope = dict(rope_type="default", rope_theta=5e6)
    rope |= dict(mrope_section=[24, 20, 20], mrope_interleaved=True)
    text = dict(hidden_size=128 * heads, intermediate_size=384 * heads, head_dim=128)
    text |= dict(num_hidden_layers=layers, num_attention_heads=heads, rope_parameters=rope)
    text |= dict(num_key_value_heads=max(heads // 4, 1), vocab_size=vocabulary)
    vision = dict(hidden_size=72 * vision_heads, intermediate_size=269 * vision_heads)
    vision |= dict(depth=vision_layers, num_heads=vision_heads, out_hidden_size=128 * heads)
    vision["deepstack_visual_indexes"] = [i * vision_layers // 4 for i in (1, 2, 3)][:layers]
    ids = dict(image_token_id=0, video_token_id=1, vision_start_token_id=2, vision_end_token_id=3)
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)


def make_group(kind, grids, words, lengths):
    """kind: image or video; grids: (frames / 2, height / 16, width / 16) of each; words: tokens of
    text after them; lengths: of the responses. Pixels and tokens are random."""
    generator = torch.Generator().manual_seed(0)
    noise = lambda count: torch.randint(10, 500, (count,), generator=generator).tolist()
    token, ids = dict(image=0, video=1)[kind], []
    for steps, height, width in grids:
        ids += [2, *[token] * (height * width // 4), 3] * steps
    ids += noise(words)
    shape = sum(math.prod(grid) for grid in grids), 1536
    patches = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    table = torch.tensor(grids, dtype=torch.int64).reshape(-1, 3)
    prompt = data.Prompt({}, ids, data.mrope_positions(ids, [0, 1], grids), patches, table, {})
    return sft.Group(prompt, [noise(length) for length in lengths])


def small_model(folder):
    """Writes a model in which attention and images matter; returns three groups for it."""
    torch.manual_seed(0)
    model = Qwen3VL(model_config(8, 4, 8, 4, 2000) if CUDA else model_config(2, 2, 2, 2, 500))
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    model.save_pretrained(folder)
    images = make_group("image", [(1, 8, 12), (1, 4, 6)], 20, [9, 31, 17])
    return [images, make_group("video", [(3, 6, 8)], 7, [25, 1]), make_group("image", [], 40, [12])]


def whole(tensors):
    """Copies of tensors, of which some may be sharded by FSDP."""
    return [(x.full_tensor() if hasattr(x, "full_tensor") else x).clone() for x in tensors]


def distance(values, truth):
    """|values - truth| / |truth|, of all tensors in the two lists together."""
    pairs = [(a.double(), b.double()) for a, b in zip(values, truth, strict=True)]
    error = sum((a - b).square().sum().item() for a, b in pairs)
    return math.sqrt(error / sum(b.square().sum().item() for _, b in pairs))


def seconds_of(work):
    """The better of two runs. `work` has run before, and ends with a number on the host."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


# --------------------------------------------------------------------------------------------------
# The checks. Each yields (name, passed or None where it cannot run, figures).


def attention():
    """The truth is SDPA in float32 with a mask of all pairs."""
    sizes = [(700, [5, 300, 64]), (33, [1, 17]), (1500, [512, 3, 100])]
    sizes = sizes if CUDA else [(20, [5, 30]), (3, [1, 17])]
    batch = sft.pack([make_group("image", [], *size) for size in sizes], "cpu")
    sft_plan, length = batch["plan"], len(batch["ids"])
    pairs, (key_rows, query_ends, key_ends, *_) = torch.zeros(length, length).bool(), sft_plan
    for queries, keys in zip(query_ends.unfold(0, 2, 1), key_ends.unfold(0, 2, 1)):
        pairs[slice(*queries), key_rows[slice(*keys)]] = True
    sft_plan = [x.to(DEVICE) if torch.is_tensor(x) else x for x in sft_plan]
    text = lambda q, k, v, scale: sft.shared_prefix_attention(None, q, k, v, None, scale, sft_plan)
    frames = torch.tensor([1024, 256, 4, 516])
    plan = torch.cat([torch.zeros(1), frames.cumsum(0)]).to(DEVICE, torch.int32), 1024
    vision = lambda q, k, v, scale: sft.frame_attention(None, q, k, v, None, scale, *plan)
    blocks = torch.block_diag(*(torch.ones(n, n) for n in frames)).bool()
    for width, function, mask, heads in (
        (128, text, pairs.tril(), (32, 8, 8)),
        (72, vision, blocks, (16, 16, 16)),
    ):
        if function is vision and not CUDA:
            yield "attention, head 72", None, dict(needs="a GPU")
            continue
        torch.manual_seed(0)
        inputs = [torch.randn(1, n, len(mask), width, device=DEVICE).to(DTYPE) for n in heads]
        weight = torch.randn(1, len(mask), heads[0], width, device=DEVICE)
        results = []
        for ours in (True, False):
            leaves = [(x if ours else x.float()).clone().requires_grad_() for x in inputs]
            if ours:
                out, _ = function(*leaves, width**-0.5)
            else:
                out = sdpa(*leaves, mask.to(DEVICE), enable_gqa=True).transpose(1, 2)
            (out.float() * weight).sum().backward()
            results.append([out.detach(), *(leaf.grad for leaf in leaves)])
        errors = [distance([a], [b]) for a, b in zip(*results)]
        figures = dict(zip(("output", "query", "key", "value"), errors))  # the last: of gradients
        yield f"attention, head {width}", max(errors) < ERROR, figures


def one_at_a_time(model, groups):
    """Log-probabilities of all responses by transformers' own forward: no packing, no sharing."""
    result = []
    for prompt, response in [(prompt, response) for prompt, many in groups for response in many]:
        ids = torch.tensor([prompt.token_ids + response], device=DEVICE)
        kinds, media = (ids == 0).int() + 2 * (ids == 1).int(), {}
        pixels = (prompt.patches.to(DEVICE).float() / 127.5 - 1).to(model.dtype)
        if 0 in ids:
            media = dict(pixel_values=pixels, image_grid_thw=prompt.grids.to(DEVICE))
        if 1 in ids:
            media = dict(pixel_values_videos=pixels, video_grid_thw=prompt.grids.to(DEVICE))
        logits = model(input_ids=ids, mm_token_type_ids=kinds, **media).logits[0]
        logps = logits[-len(response) - 1 : -1].float().log_softmax(-1)
        result.append(logps.gather(1, ids[0, -len(response) :, None])[:, 0])
    return torch.cat(result)


def packed():
    """bfloat16 rounds. The measure is how far transformers itself in bfloat16 is from float32."""
    torch.backends.cudnn.allow_tf32 = False
    sft.init_distributed()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        groups = small_model(folder)
        for name in ("float32", "transformers", "ours"):
            if name == "ours":
                model = sft.load_model(folder, DEVICE, torch.bfloat16)
                logps = model.response_logps(sft.pack(groups, DEVICE))
            else:
                dtype = torch.float32 if name == "float32" else torch.bfloat16
                model = Qwen3VL.from_pretrained(folder, dtype=dtype).to(DEVICE).train()
                logps = one_at_a_time(model, groups)
            (logps * torch.linspace(-1, 1, len(logps), device=DEVICE)).sum().backward()
            results[name] = logps.detach(), whole(param.grad for param in model.parameters())
    logps, grads = results.pop("float32")
    errors = {f"log-probs, {k}": (v[0] - logps).abs().mean().item() for k, v in results.items()}
    errors |= {f"gradient, {k}": distance(v[1], grads) for k, v in results.items()}
    good = [
        errors[f"{x}, ours"] < 1.5 * errors[f"{x}, transformers"] for x in ("log-probs", "gradient")
    ]
    yield "packed forward, bfloat16", all(good), errors


def patches():
    """Forward and backward of the 8B's patch embedding."""
    count = 16_384 if CUDA else 256
    visual = Qwen3VL(model_config(4, 1, 16, 4, 500)).model.visual.to(DEVICE, DTYPE)
    pixels, results, times = torch.randn(count, 1536, device=DEVICE, dtype=DTYPE), [], []

    def work():
        visual.zero_grad()
        out = visual.patch_embed(pixels)
        out.float().square().mean().backward()
        proj = visual.patch_embed.proj
        return out.detach().clone(), proj.weight.grad.clone(), proj.bias.grad.sum().cpu()

    for side in ("Conv3d", "one matrix"):
        if side == "one matrix":
            cpu_compat.one_matrix_patch_embedding(visual)
        results.append(work())
        times.append(1000 * seconds_of(work))
    errors = [distance([a], [b]) for a, b in zip(*results)]
    figures = {
        "patches": count,
        "error": max(errors),
        "Conv3d, ms": times[0],
        "one matrix, ms": times[1],
    }
    yield "patch embedding", max(errors[:2]) < ERROR, figures


def layers():
    """Weights and gradients in bfloat16 on this one GPU; GB is what comes on top of them."""
    shape = (2, 2, 2, 4, 500)
    cases = [("64/16, images", "image", [(1, 8, 8)] * 4), ("64/16, video", "video", [(4, 8, 8)])]
    if CUDA:  # about 1 GB a layer: weights, gradients, and its input for 32k tokens
        depth = int(0.9 * torch.cuda.mem_get_info()[0] / 1e9 - 20)
        shape = (32, max(3, min(36, depth)), 16, 27, 151_936)
        cases = [("4k/512, images", "image", [(1, 64, 64)] * 4)]
        cases += [("16k/512, video", "video", [(64, 32, 32)])]
    torch.set_default_dtype(DTYPE)
    with DEVICE:
        model = Qwen3VL(model_config(*shape)).train()
    torch.set_default_dtype(torch.float32)
    vision = "flash_frames" if CUDA else "sdpa"
    model.set_attn_implementation({"text_config": "shared_prefix", "vision_config": vision})
    model.gradient_checkpointing_enable({"use_reentrant": False})
    cpu_compat.one_matrix_patch_embedding(model.model.visual)
    device = torch.cuda.get_device_name() if CUDA else "CPU"
    peak = next((peak for name, peak in bench.PEAK_TFLOPS.items() if name in device), None)
    for label, kind, grids in cases:
        group = make_group(kind, grids, 8, [512 if CUDA else 16] * 8)
        alone = sft.Group(group.prompt, group.responses[:1])
        figures = dict(layers=shape[1])
        for side, members in (("shared", group), ("one response", alone)):
            batch = sft.pack([members], DEVICE)

            def work(batch=batch):
                model.zero_grad(set_to_none=False)
                loss = sft.response_logps(model, batch).mean()
                loss.backward()
                return loss.item()

            work()
            before = torch.cuda.memory_allocated() / 1e9 if CUDA else bench.peak_memory_gb()
            bench.reset_peak_memory()
            seconds, tokens = seconds_of(work), len(batch["ids"])
            tflops = bench.training_flops(model, batch, recompute=True) / seconds / 1e12
            memory = bench.peak_memory_gb() - before
            row = dict(tokens=tokens, seconds=seconds, GB=memory) | {"TFLOP/s": tflops}
            if peak:
                row["MFU"] = tflops / peak
            # A recomputed layer keeps its input: 4096 numbers of 2 bytes a token.
            row["MB per token at 36 layers"] = 1e3 * memory / tokens + (36 - shape[1]) * 8192 / 1e6
            figures |= {f"{side}, {key}": value for key, value in row.items()}
        ratio = 8 * figures["one response, seconds"] / figures["shared, seconds"]
        yield f"layers, {label}", ratio > 1, dict(ratio=ratio) | figures


def checkpoint():
    sft.init_distributed()
    with tempfile.TemporaryDirectory() as folder:
        groups = small_model(folder)
        model = sft.load_model(folder, DEVICE, torch.bfloat16)
        args = argparse.Namespace(out=f"{folder}/run", keep=1, lr=1e-3, weight_decay=0.0)
        optimizer = sft.load_optimizer(args, model, 0)

        def everything():
            moments = [value for state in optimizer.state.values() for value in state.values()]
            return whole([*model.parameters(), *moments])

        def step():
            (-model.response_logps(sft.pack(groups, DEVICE)).mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
            return everything()

        saved, start = step(), time.perf_counter()
        sft.save_checkpoint(args, model, optimizer, dict(step=1))
        seconds, moved = time.perf_counter() - start, step()
        optimizer = sft.load_optimizer(args, model, 1)
        files = [path for path in Path(args.out).rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files) / 1e6
    same = all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(saved, everything(), strict=True))
    figures = {"MB": size, "seconds": seconds, "moved in between by": distance(moved, saved)}
    yield "checkpoint", same and figures["moved in between by"] > 0, figures


def make_toy(folder):
    command = [sys.executable, "tests/toy.py", folder, *"--sft 12 --rl 64 --eval 1".split()]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def engine():
    """The toy in bfloat16, trainer and vLLM side by side."""
    *_, device = sft.init_distributed()
    with tempfile.TemporaryDirectory() as folder:
        make_toy(folder)
        path, start = f"{folder}/model", time.perf_counter()
        processor = data.load_processor(path)
        model = sft.load_model(path, device, torch.bfloat16)
        llm = rl_ema_grpo.make_engine(path, "bfloat16", 512, dict(image=1, video=1), seed=0)
        figures = {"start, seconds": time.perf_counter() - start}
        limits = data.Limits(image_min_pixels=3136)
        records = data.load_records(f"{folder}/rl_train.json")[:16]
        prompts = [data.encode(record, processor, limits) for record in records]

    def rollouts():
        return rl_ema_grpo.generate(llm, prompts, range(16), 4, 32, processor.tokenizer)

    def gap(sampled):
        """Mean |log p trainer - log p vLLM| of what vLLM sampled."""
        ours = rl_ema_grpo.current_logps(model, sampled, 4096, device)
        theirs = [logp for rollout in sampled for logps in rollout.logps for logp in logps]
        return (ours - torch.tensor(theirs)).abs().mean().item()

    rollouts()  # warms up
    sampled = rollouts()
    wanted = [rollout.responses for rollout in sampled]
    same = lambda: [rollout.responses for rollout in rollouts()] == wanted
    yield "engine, seeds", same(), {}
    figures["gap"] = gap(sampled)
    batch = sft.pack([(rollout.prompt, rollout.responses) for rollout in sampled], device)
    (-model.response_logps(batch).mean()).backward()
    torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0).step()
    model.zero_grad()
    figures["gap after an update"] = before = gap(rollouts())
    start = time.perf_counter()
    rl_ema_grpo.sync_weights(llm, sft.full_weights(model, torch.bfloat16), compare=True)
    figures["sync, seconds"] = time.perf_counter() - start
    sampled = rollouts()
    figures["gap after the sync"] = after = gap(sampled)
    good = max(after, figures["gap"]) < 0.03 and before > 3 * after
    yield "engine, sync", good, figures
    wanted, freed, lost = [rollout.responses for rollout in sampled], [], []
    free = lambda: torch.cuda.mem_get_info()[0] / 1e9
    for _ in range(3 if CUDA else 0):
        before = free()
        rl_ema_grpo.release_kv_cache(llm)
        freed.append(free() - before)
        llm.wake_up(tags=["kv_cache"])
        lost.append(before - free())
    if CUDA:
        figures = {"GB released": freed, "GB lost": lost, "same tokens after": same()}
        good = figures["same tokens after"] and min(freed) > 0.9 * max(freed) > 0.5
        yield "engine, pool", good and max(lost) < 0.5, figures
    else:
        yield "engine, pool", None, dict(needs="a GPU")
    llm.llm_engine.engine_core.shutdown()


def step():
    """tests/doomed.py makes rewards from the tokens: the untrained toy then has groups to train on."""
    settings = (
        "--steps 1 --prompts-per-step 4 --rollouts-per-prompt 4 --updates-per-step 2 --workers 1"
    )
    settings += " --max-response-tokens 24 --max-prompt-tokens 400 --image-min-pixels 3136"
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 1 tests/doomed.py".split()
    with tempfile.TemporaryDirectory() as folder:
        make_toy(folder)
        files = ["--model", f"{folder}/model", "--data", f"{folder}/rl_train.json"]
        run = ["rl_ema_grpo", *files, "--out", f"{folder}/rl", *settings.split()]
        command = [sys.executable, *launcher, "", *run]
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
        row = json.loads(Path(folder, "rl/metrics.jsonl").read_text().splitlines()[-1])
    names = [name for name in row if name.startswith(("seconds/", "gb"))]
    figures = {name: row[name] for name in ("groups", "logp_gap", "grad_norm", *names)}
    good = row["groups"] >= 4 and row["logp_gap"] < 0.03 and (row["grad_norm"] or 0) > 0
    yield "step", good, figures


CHECKS = dict(attention=attention, packed=packed, patches=patches, layers=layers)
CHECKS |= dict(checkpoint=checkpoint, engine=engine, step=step)
NEEDS = dict(engine=PACKAGES, step=PACKAGES)

# --------------------------------------------------------------------------------------------------
# One process per check: what one leaves in a broken GPU context or in memory, no other meets.


def run(name, seconds):
    """Results of a check, a list of (name, passed, figures). One that ends badly has failed."""
    if lost := [package for package in NEEDS.get(name, ()) if package in MISSING]:
        return [(name, None, dict(needs=", ".join(lost)))]
    command = [sys.executable, __file__, "--here", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        return [(name, False, dict(error=f"not done after {seconds:.0f} s"))]
    lines = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    results = [json.loads(line) for line in lines]
    if done.returncode:
        print(done.stderr[-4000:], file=sys.stderr)
        results.append((name, False, dict(error=f"exit code {done.returncode}, see above")))
    return results


def rounded(figures):
    return json.loads(json.dumps(figures), parse_float=lambda number: float(f"{float(number):.4g}"))


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("checks", nargs="*", default=list(CHECKS), metavar="check")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # in this process
    args = parser.parse_args()
    if unknown := set(args.checks) - set(CHECKS):
        parser.error(f"no check {unknown.pop()!r}; there are {', '.join(CHECKS)}")
    if args.here:
        torch.set_num_threads(1)
        accept_older_torch()
        for result in CHECKS[args.checks[0]]():
            print("RESULT " + json.dumps(result), flush=True)
        return
    begin, table = time.time(), {}
    for check in args.checks:
        start = time.time()
        for name, passed, figures in run(check, 60 * MINUTES - (start - begin)):
            result = {True: "pass", False: "FAIL", None: "not run"}[passed]
            table[name] = dict(result=result, **rounded(figures))
            said = ", ".join(f"{key} {value}" for key, value in rounded(figures).items())
            print(f"{result:8}{name}" + f": {said}" * bool(said))
        print(f"        ({time.time() - start:.0f} s)", flush=True)
    failed = sum(row["result"] == "FAIL" for row in table.values())
    print(f"{failed} failed, in {time.time() - begin:.0f} s")
    if CUDA:
        device = torch.cuda.get_device_properties(0)
        machine = dict(gpu=device.name, gb=device.total_memory / 1e9, cuda=torch.version.cuda)
        machine |= {name: version(name) for name in ("torch", "transformers")}
        path = ROOT / "assets" / f"gpu-{'-'.join(device.name.lower().split())}.json"
        content = rounded(machine) | dict(missing=MISSING, checks=table)
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(f"written to {path}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
