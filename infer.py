"""Asks a model about one image or video: prints its thinking, then its answer.

    python infer.py --model runs/rl --image cat.jpg --task "spatial grounding" "the cat on the left"
    python infer.py --model runs/rl --video street.mp4 --task "multiple choice" "Who crosses first?" --options "a dog" "a man"

The prompt is written as in training (data.encode) and the answer is read as in evaluation (rewards.find_answer). The exit
code is 1 when the answer says nothing in the terms of the task, 2 when the request itself cannot be used.
"""

import argparse
import os
import re
import sys

import cpu_compat  # noqa: F401  (before transformers)

# isort: split
from transformers import AutoProcessor

import data
from evaluate import readable
from rewards import find_answer
from rl_ema_grpo import generate, make_engine, text_of
from sft import init_distributed

VIDEO_TASKS = ("temporal grounding", "spatial-temporal grounding", "tracking", "segmentation-video")


# fmt: off
def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?")
    parser.add_argument("--model", help="Hugging Face folder or hub id of a Qwen3-VL")
    medium = parser.add_mutually_exclusive_group()
    medium.add_argument("--image", help="image file")
    medium.add_argument("--video", help="video file, or a folder of numbered frames")
    parser.add_argument("--task", default="open-ended", help='see --list-tasks; "segmentation" goes by the medium (%(default)s)')
    parser.add_argument("--options", nargs="+", default=[], help="of a multiple choice, after the question; letters are added if missing")
    parser.add_argument("--list-tasks", action="store_true", help="print the tasks with their instructions, and end")
    parser.add_argument("--prompts", help="JSON file that replaces the instructions of data.py")
    parser.add_argument("--max-response-tokens", type=int, default=8192, help="per answer (%(default)s)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="compute (%(default)s)")
    data.add_limits(parser, image_max_pixels=1024 * 32 * 32, frame_max_pixels=256 * 32 * 32, max_prompt_tokens=20480)
    args = parser.parse_args()
    if args.list_tasks:
        print("\n".join(f"{task}\n    {instruction}" for task, instruction in data.PROMPTS.items()))
        sys.exit(0)
    return args
# fmt: on


def record_of(args):
    """The request as a record, the form in which training and evaluation have their questions."""
    kind, path = ("image", args.image) if args.image else ("video", args.video)
    task = f"segmentation-{kind}" if args.task == "segmentation" else args.task
    if not (args.model and path and args.question):
        data.refuse("--model, a question, and --image or --video are needed")
    if not os.path.isdir(args.model) and args.model.count("/") != 1:
        data.refuse(f"--model {args.model}: no such folder, and no hub id of the form owner/name")
    if task not in data.PROMPTS:
        data.refuse(f"--task is {args.task!r}, expected one of {', '.join(data.PROMPTS)}")
    if not os.path.exists(path):
        data.refuse(f"--{kind}: no file {path}")
    if kind == "image" and task in VIDEO_TASKS or kind == "video" and task == "segmentation-image":
        data.refuse(f"--task {task!r} does not go with --{kind}")
    if (task == "multiple choice") != bool(args.options):
        data.refuse("--options are needed for a multiple choice, and only there")
    options = args.options
    if not all(re.match(r"\(?[A-Z][).:]", option) for option in options):
        options = [f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(options)]
    placed = data.place_media(
        args.question, [kind], lambda *_: data.refuse(f"<{kind}> stands twice in the question"), None
    )
    return dict(
        problem_id="0",
        problem_type="segmentation" if task.startswith("segmentation") else task,
        data_type=kind,
        problem=placed,
        options=options,
        media=[dict(type=kind, path=os.path.abspath(path))],
    )


def main():
    args = parse_args()
    record = record_of(args)
    try:
        processor = AutoProcessor.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        data.refuse(f"--model {args.model}: {error}")
    try:
        prompt = data.encode(record, processor, data.limits_of(args), data.load_prompts(args.prompts))
    except (OSError, ValueError, data.MediaError) as error:
        data.refuse(error)

    init_distributed()  # a group of one: the engine expects torchrun's surroundings
    length = len(prompt.token_ids) + args.max_response_tokens
    media = {"image": int(record["data_type"] == "image"), "video": int(record["data_type"] == "video")}
    llm = make_engine(args.model, args.dtype, length, media, seed=0)
    rollout = generate(llm, [prompt], [0], 1, args.max_response_tokens, processor.tokenizer, temperature=0.0)[0]
    llm.llm_engine.engine_core.shutdown()

    text = text_of(rollout, 0, processor.tokenizer)
    answer = find_answer(text)
    if "<think>" in text:
        thinking, closed, _ = text.partition("<think>")[2].rpartition("</think>")
        print(f"thinking: {(thinking if closed else text.partition('<think>')[2]).strip()}")
        answer = answer if closed else None  # it ran out of tokens while thinking
    print(f"answer: {answer or ''}")
    if not rollout.finished[0]:
        print(f"infer.py: stopped after {args.max_response_tokens} tokens (--max-response-tokens)", file=sys.stderr)
    if not readable(record, answer):
        print(f"infer.py: this answer cannot be read for the task {args.task!r}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
