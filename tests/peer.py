"""Our RL step beside that of TRL's GRPOTrainer: same model, prompts, responses and rewards, on one
CPU thread, in float32.

    python tests/peer.py                               # the update, all settings
    python tests/peer.py 1024 text-ragged --rounds 5   # some of them: 1024, 256, text, video; -ragged
    python tests/peer.py step --model runs/demo/sft --data runs/demo/toy/rl_train.json   # a whole step

The first call makes .venv-peer (a few minutes, 4 GB). A setting names the vision tokens of a prompt;
text has 256 tokens; responses have 128 tokens, ragged ones 64 to 128. Each side is a process; they
take their steps in turn, and the first step warms up. Seconds are of the process's CPU time, and of
the clock: a whole step has helper processes, its clock counts. The gradients of the first step must
agree. The update begins with ready inputs. A whole step begins with records and ends with new weights
(TRL generates with transformers, its default).

Sides: ours (32,768 tokens a micro-batch), ours-group (a group a micro-batch), trl-8 and trl-32
(responses a micro-batch). TRL's head computes the log-probabilities of response rows only, as on a GPU.
TRL takes no video: there it gets an image in place of each pair of frames, as many vision tokens, and
the gradients are not compared.
"""

import argparse
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT, VENV, TRL = Path(__file__).resolve().parents[1], ".venv-peer", "trl==1.16.0"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["OMP_NUM_THREADS"] = "1"
RESPONSES, TOKENS = 8, 128  # to a prompt; of a response
UPDATE, STEP = ("ours", "ours-group", "trl-8", "trl-32"), ("ours", "trl-8", "trl-64")
SETTINGS = ("1024", "1024-ragged", "256", "256-ragged", "text", "text-ragged", "video")


def enter_venv():
    """Makes the virtual environment and installs into it where that has not been done; goes on in it."""
    python, done = ROOT / VENV / "bin/python", ROOT / VENV / f"installed-{TRL}"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", ROOT / VENV], check=True)
        (ROOT / VENV / ".gitignore").write_text("*\n")
        install = f". {VENV}/bin/activate && . tests/venv.sh && pip install --quiet {TRL}"
        subprocess.run(["bash", "-ec", install], cwd=ROOT, check=True)
        done.touch()
    if Path(sys.prefix) != ROOT / VENV:
        os.execv(python, [python, *sys.argv])


def make_update(folder, setting, count):
    """Writes a model of 2 layers of width 512, `count` prompts, their responses and rewards."""
    import av
    import bench
    import numpy as np
    import toy
    from PIL import Image
    from transformers import AutoTokenizer

    rng, kind = random.Random(0), setting.split("-")[0]
    words = [" " + a + b for a in "bdfgklmnprst" for b in ("ar", "el", "im", "on", "ut", "ain")]
    toy.write_model(folder, 0, words, base=None)
    tokenizer, (model, _) = AutoTokenizer.from_pretrained(folder), bench.bench_model()
    for name in ("image_pad", "video_pad", "vision_start", "vision_end"):
        field = name.removesuffix("_pad") + "_token_id"
        setattr(model.config, field, tokenizer.convert_tokens_to_ids(f"<|{name}|>"))
    model.save_pretrained(folder)
    least = TOKENS // 2 if setting.endswith("ragged") else TOKENS
    lengths = [least + (TOKENS - least) * i // (RESPONSES - 1) for i in range(RESPONSES)]
    side = 32 * math.isqrt(int(kind)) if kind.isdigit() else 256
    images = dict(text=0, video=16).get(kind, 1)
    prompts = []
    for i in range(count):
        noise = np.random.default_rng(i).integers(
            0, 256, (images, side // 8, side // 8, 3), np.uint8
        )
        frames = [Image.fromarray(frame).resize((side, side)) for frame in noise]
        for k, frame in enumerate(frames):
            frame.save(folder / f"{i}-{k}.png")
        if kind == "video":
            with av.open(str(folder / f"{i}.mp4"), "w") as file:
                stream = file.add_stream("libx264", rate=2)
                stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
                for frame in [frame for frame in frames for _ in range(2)]:
                    file.mux(stream.encode(av.VideoFrame.from_image(frame)))
                file.mux(stream.encode())
        names, text = (
            [f"{i}-{k}.png" for k in range(images)],
            rng.choices(words, k=16 if images else 250),
        )
        media, mark = dict(images=names) if images else {}, "<image>" * images
        if kind == "video":
            media, mark = dict(videos=[f"{i}.mp4"]), "<video>"
        question = dict(role="user", content=mark + "".join(text))
        turns = [question, dict(role="assistant", content="-")]
        record = dict(messages=turns, **media or dict(data_type="text"))
        responses = [rng.choices(range(10, len(tokenizer)), k=n) for n in lengths]
        prompt = dict(record=record, images=[str(folder / name) for name in names])
        prompt |= dict(responses=responses, rewards=[rng.random() for _ in lengths])
        prompts.append(prompt)
    (folder / "work.json").write_text(json.dumps(prompts))


# --------------------------------------------------------------------------------------------------
# In the process of a side


def clocks():
    return time.process_time(), time.perf_counter()


def wait_for_turn():
    """Returns the clocks at its begin."""
    print("READY", flush=True)
    if not sys.stdin.readline():
        os._exit(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory counts from here
    return clocks()


def end_turn(start):
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1e6
    seconds = [now - then for now, then in zip(clocks(), start)]
    print("ROW " + json.dumps([*seconds, peak]), flush=True)


def keep_gradients(path, model):
    """Those of the first step."""
    from safetensors.torch import save_file

    if not path.exists():
        grads = {
            name: param.grad for name, param in model.named_parameters() if param.grad is not None
        }
        whole = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in grads.items()}
        save_file({name: grad.clone().contiguous() for name, grad in whole.items()}, path)


def our_update(folder, side):
    import torch

    import data
    import rl_ema_grpo
    import sft

    *_, device = sft.init_distributed()
    processor = data.load_processor(str(folder))
    model = sft.load_model(folder, device, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6, weight_decay=0.0, fused=True)
    clip, rollouts = torch.nn.utils.clip_grad_norm_, []
    for i, work in enumerate(json.loads((folder / "work.json").read_text())):
        record = data.normalise(work["record"], "work.json", i, str(folder))
        prompt = data.encode(record, processor)
        logps = [[0.0] * len(response) for response in work["responses"]]
        rollout = rl_ema_grpo.RolloutGroup(prompt, work["responses"], logps, [])
        mean = statistics.mean(work["rewards"])
        rollout.advantages = [reward - mean for reward in work["rewards"]]
        rollouts.append(rollout)
    group = len(rollouts[0].prompt.token_ids) + sum(map(len, rollouts[0].responses))
    args = dict(tokens_per_microbatch=group if side == "ours-group" else 32_768, grad_clip=1e9)
    args |= dict(clip_low=0.2, clip_high=0.3, dual_clip=3.0, kl_coef=0.0, tis_cap=None)

    def watched(*rest):
        keep_gradients(folder / f"{side}.safetensors", model)
        return clip(*rest)

    torch.nn.utils.clip_grad_norm_ = watched
    args = argparse.Namespace(**args)
    while True:
        start = wait_for_turn()
        rl_ema_grpo.update(model, optimizer, rollouts, None, None, args, device)
        end_turn(start)


def our_step(args):
    """rl_ema_grpo.py itself. All groups count, so that both sides train as many responses."""
    import rl_ema_grpo
    import sft

    sync, log, start = rl_ema_grpo.sync_weights, sft.log_metrics, []

    def first(*rest):
        start.append(wait_for_turn())
        sync(*rest)

    def last(*rest):
        end_turn(start[-1])
        log(*rest)

    rl_ema_grpo.sync_weights, sft.log_metrics = first, last
    rl_ema_grpo.has_signal = lambda rollout: True
    sys.argv = ["rl_ema_grpo.py", "--model", args.model, "--data", f"{args.out}/records.json"]
    sys.argv += ["--media-root", str(Path(args.data).parent), "--out", f"{args.out}/ours"]
    sys.argv += f"--prompts-per-step {args.prompts} --max-response-tokens {TOKENS}".split()
    sys.argv += "--steps 99 --updates-per-step 1 --save-every 999 --lr 1e-6 --dtype float32".split()
    sys.argv += "--no-recompute --workers 1 --max-prompt-tokens 400 --image-min-pixels 3136".split()
    rl_ema_grpo.main()


def trl_side(model_path, rows, reward, side, out, responses=None):
    """GRPOTrainer. rows: dicts of prompt (text) and images (paths). responses: fixed ones; the time
    then counts from when they are tokenised, the images are patches and the rewards are known."""
    import torch
    import trl.trainer.utils
    from datasets import Dataset, Image, List
    from transformers import AutoProcessor, Qwen3VLForConditionalGeneration, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    trl.trainer.utils._use_triton = lambda device: True  # log-probs of response rows only
    count = len(rows) * RESPONSES
    batch = min(int(side.split("-")[1]), count)
    rows = [row | dict(prompt=[dict(role="user", content=row["prompt"])]) for row in rows]
    dataset = Dataset.from_list(rows * 99)
    if rows[0]["images"]:
        dataset = dataset.cast_column("images", List(Image()))
    else:
        dataset = dataset.remove_columns("images")
    start = [None]  # the clocks when the step began

    class Trainer(GRPOTrainer):
        def _generate_single_turn(self, *rest):
            return (responses, None) if responses else super()._generate_single_turn(*rest)

        def _generate_and_score_completions(self, inputs):
            result = super()._generate_and_score_completions(inputs)
            if responses:
                start[0] = clocks()
            return result

    class Turns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            start[0] = wait_for_turn()

        def on_pre_optimizer_step(self, *_, model, **__):
            keep_gradients(out / f"{side}.safetensors", model)

        def on_step_end(self, *_, **__):
            end_turn(start[0])

    config = GRPOConfig(
        output_dir=str(out / side), use_cpu=True, bf16=False, per_device_train_batch_size=batch,
        gradient_accumulation_steps=count // batch, num_generations=RESPONSES, beta=0.0, epsilon=0.2,
        max_completion_length=TOKENS, loss_type="dapo", scale_rewards="none", epsilon_high=0.3,
        learning_rate=1e-6, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1e9,
        temperature=1.0, top_k=0, gradient_checkpointing=False, shuffle_dataset=False, max_steps=99,
        logging_steps=999, save_strategy="no", report_to="none", dataloader_pin_memory=False,
    )  # fmt: skip
    processor = AutoProcessor.from_pretrained(model_path)
    processor.tokenizer.padding_side = "left"
    model = Qwen3VLForConditionalGeneration.from_pretrained(model_path, dtype=torch.float32)
    parts = dict(train_dataset=dataset, processing_class=processor, callbacks=[Turns()])
    Trainer(model=model, args=config, reward_funcs=reward, **parts).train()


def trl_update(folder, side):
    work = json.loads((folder / "work.json").read_text())
    rows = []
    for prompt in work:
        text = re.sub("<(image|video)>", "", prompt["record"]["messages"][0]["content"])
        rows.append(dict(prompt=text, images=prompt["images"]))
    responses = [response for prompt in work for response in prompt["responses"]]
    values = [reward for prompt in work for reward in prompt["rewards"]]
    table = dict(zip(map(tuple, responses), values))
    reward = lambda completion_ids, **_: [table[tuple(ids)] for ids in completion_ids]
    trl_side(folder, rows, reward, side, folder, responses)


def trl_step(args, side):
    import data
    import rewards

    records = data.load_records(args.out / "records.json", Path(args.data).parent)
    rows = []
    for record in records:
        text = data.render_problem(record).replace("<image>", "", 1)
        rows.append(
            dict(prompt=text, images=[record["media"][0]["path"]], record=json.dumps(record))
        )

    def reward(completions, record, **_):
        pairs = zip(record, completions)
        return [
            rewards.score(json.loads(text), turns[0]["content"]).reward for text, turns in pairs
        ]

    trl_side(args.model, rows, reward, side, args.out)


# --------------------------------------------------------------------------------------------------
# Taking turns


def take_turns(args, setting, sides):
    """{side: list of (CPU s, clock s, peak GB) of its steps, the first of which warms up}"""
    workers, rows = {}, {side: [] for side in sides}

    def until(side, word):
        for line in workers[side].stdout:
            if line.startswith(word):
                return line[len(word) :]
        raise SystemExit(f"{side} has ended: see {args.out}/{side}.log")

    for side in sides:
        command = [sys.executable, __file__, setting, "--out", args.out, "--worker", side]
        command += ["--model", args.model or "", "--data", args.data or ""]
        command += ["--prompts", str(args.prompts)]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        with open(args.out / f"{side}.log", "w") as log:
            workers[side] = subprocess.Popen(command, stderr=log, **pipes)
    for _ in range(args.rounds + 1):
        for side in sides:  # nobody works while another one's clock runs
            until(side, "READY")
        for side in sides:
            workers[side].stdin.write("\n")
            workers[side].stdin.flush()
            rows[side].append(json.loads(until(side, "ROW ")))
    for worker in workers.values():
        worker.stdin.close()  # it ends where it waits for its next turn
    for worker in workers.values():
        worker.wait()
    return rows


def gradient_error(folder, side):
    """|theirs - ours| / |ours|, of all parameters together."""
    from safetensors.torch import load_file

    ours, theirs = (load_file(folder / f"{name}.safetensors") for name in ("ours", side))
    assert theirs.keys() <= ours.keys()  # without images only we call the vision tower, times zero
    error = sum((grad - theirs.get(name, 0)).square().sum().item() for name, grad in ours.items())
    return math.sqrt(error / sum(grad.square().sum().item() for grad in ours.values()))


def print_rows(setting, rows, folder):
    """A line per side; where there is a folder, the gradients in it must agree."""
    medians = {}
    for side, turns in rows.items():
        cpu, wall, _ = medians[side] = [statistics.median(column) for column in zip(*turns[1:])]
        numbers = cpu, cpu / medians["ours"][0], wall, wall / medians["ours"][1]
        peak, error = max(peak for *_, peak in turns), ""
        if folder and side != "ours":
            error = gradient_error(folder, side)
            assert error < 1e-4, f"{side}: other gradients than ours, by {error:.1e}"
            error = f"{error:.1e}"
        cells = "".join(f"{number:9.2f}" for number in (*numbers, peak))
        print(f"{setting:14}{side:12}{cells}  {error}", flush=True)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("settings", nargs="*", default=SETTINGS, help="settings of the update, or step")
    add("--prompts", type=int, default=4, help="with 8 responses each (%(default)s)")
    add("--rounds", type=int, default=3, help="timed ones (%(default)s)")
    add("--sides", nargs="+", help="beginning with ours")
    add("--model", help="step: folder of a model, such as runs/demo/sft")
    add("--data", help="step: its records, such as runs/demo/toy/rl_train.json")
    add("--out", type=Path, default=ROOT / "runs/peer", help="folder (%(default)s)")
    add("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.settings) - {*SETTINGS, "step"}:
        parser.error(f"no setting {unknown.pop()!r}; there are {', '.join(SETTINGS)} and step")
    enter_venv()
    import cpu_compat  # noqa: F401  (before transformers)
    import torch

    torch.set_num_threads(1)
    if args.worker:
        ours = args.worker.startswith("ours")
        if args.settings == ["step"]:
            our_step(args) if ours else trl_step(args, args.worker)
        else:
            (our_update if ours else trl_update)(args.out, args.worker)
        return
    names = ("setting", "side", "CPU s", "/ ours", "clock s", "/ ours", "peak GB", "gradient error")
    print("{:14}{:12}{:>9}{:>9}{:>9}{:>9}{:>9}  {}".format(*names), flush=True)
    for setting in args.settings:
        args.out = args.out.parent / args.out.name / setting
        shutil.rmtree(args.out, ignore_errors=True)
        args.out.mkdir(parents=True)
        if setting == "step":
            records = json.loads(Path(args.data).read_text())
            images = [record for record in records if "images" in record][: args.prompts]
            (args.out / "records.json").write_text(json.dumps(images))
        else:
            make_update(args.out, setting, args.prompts)
        sides = args.sides or (STEP if setting == "step" else UPDATE)
        rows = take_turns(args, setting, sides)
        check = setting not in ("step", "video")
        print_rows(setting, rows, args.out if check else None)
        args.out = args.out.parent


if __name__ == "__main__":
    main()
