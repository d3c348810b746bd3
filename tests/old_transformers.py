"""Does a folder that we export open in transformers 4.57, which other projects still use? Not in CI.

    python3 -m venv .venv-old && .venv-old/bin/pip install torch transformers==4.57.3 pillow torchvision
    python tests/old_transformers.py .venv-old/bin/python        # in the project's own environment

The old version makes a tiny Qwen3-VL folder, ours trains it for one step, and both open what it
exported: the same files, the same tokens of a chat with an image, logits within 1e-5.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Look."}]}]


def make(tokenizer_folder, folder):
    """Run by the old version: a folder as Qwen's hub has it, with random weights."""
    import torch
    from transformers import Qwen2TokenizerFast, Qwen2VLImageProcessor, Qwen3VLConfig
    from transformers import (
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    file = f"{tokenizer_folder}/tokenizer.json"
    ends = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer = Qwen2TokenizerFast(tokenizer_file=file, **ends)
    template = Path(tokenizer_folder, "chat_template.jinja").read_text()
    new = json.loads(Path(tokenizer_folder, "config.json").read_text())
    rope = dict(rope_type="default", mrope_section=[6, 5, 5], mrope_interleaved=True)
    text = dict(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, head_dim=32)
    text |= dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    text |= dict(rope_theta=5e6, rope_scaling=rope)
    vision = dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=128)
    vision |= dict(num_position_embeddings=256, deepstack_visual_indexes=[0])
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {name: new[name] for name in names}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **ids)
    torch.manual_seed(0)
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    half = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, patch_size=16)
    size = dict(shortest_edge=4096, longest_edge=2**20)
    parts = Qwen2VLImageProcessor(**half, size=size), tokenizer, Qwen3VLVideoProcessor(**half)
    Qwen3VLProcessor(*parts, chat_template=template).save_pretrained(folder)


def look(folder, out):
    """Run by both versions: token ids and logits of a chat about a grey image."""
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    text = processor.apply_chat_template(CHAT, add_generation_prompt=True)
    image = Image.new("RGB", (96, 64), "grey")
    inputs = processor(text=[text], images=[image], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    torch.save((inputs["input_ids"], logits), out)


def main(old):
    import torch

    run = lambda *command: subprocess.run(list(map(str, command)), cwd=ROOT, check=True)
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        run(sys.executable, "tests/toy.py", here / "toy", *"--sft 12 --rl 12 --eval 1".split())
        run(old, __file__, "make", here / "toy/model", here / "source")
        settings = "--steps 1 --sequences-per-step 4 --dtype float32 --no-recompute --workers 1"
        settings += " --image-min-pixels 4096"
        files = ["--model", here / "source", "--data", here / "toy/sft_image.json"]
        run(sys.executable, "sft.py", *files, "--out", here / "out", *settings.split())
        kept = {path.name for path in (here / "out").iterdir() if path.is_file()}
        kept -= {"args.json", "metrics.jsonl"}
        assert kept == {path.name for path in (here / "source").iterdir()}, kept
        for python, name in ((old, "old"), (sys.executable, "new")):
            run(python, __file__, "look", here / "out", here / f"{name}.pt")
        (ids, logits), (other_ids, other) = (torch.load(here / f"{n}.pt") for n in ("old", "new"))
        assert torch.equal(ids, other_ids)
        gap = (logits - other).abs().max().item()
        print(f"{len(kept)} files; {ids.shape[1]} tokens alike; logits differ by at most {gap:.1e}")
        assert gap < 1e-5


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(sys.argv[1])
    else:
        import cpu_compat  # noqa: F401  (before transformers)

        dict(make=make, look=look)[sys.argv[1]](*sys.argv[2:])
