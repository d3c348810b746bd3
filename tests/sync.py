"""Run by test_vllm.py under torchrun with 2 ranks: trainer and vLLM side by side. Writes what was measured as JSON."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cpu_compat  # noqa: F401
import torch
from copying import paste
from transformers import AutoProcessor

import data
import rl_ema_grpo as rl
import sft

torch.set_num_threads(1)
toy, out = sys.argv[1:]
rank, world, device = sft.init_distributed()
model = sft.load_model(f"{toy}/model", device, torch.float32)
optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0)
processor = AutoProcessor.from_pretrained(f"{toy}/model")
llm = rl.make_engine(f"{toy}/model", "float32", 512, {"image": 1, "video": 1}, seed=rank)

records = data.load_records(f"{toy}/rl_train.json")
images = [record for record in records if record["data_type"] == "image"]
videos = [record for record in records if record["data_type"] == "video"]
text = {**images[0], "media": [], "data_type": "text", "problem": "How many squares are there?"}
strange = [
    dict(videos[0], media=[{"type": "video", "path": path}])
    for path in (f"{out}/variable.mp4", f"{out}/wide.mp4")
]
chosen = [*images[rank::2][:4], *videos[rank::2][:4], text, *strange]
prompts = [data.encode(record, processor, data.Limits(image_min_pixels=4096)) for record in chosen]


def rollouts():
    """One response to each prompt; `generate` itself asserts that vLLM's prompt ids are the trainer's."""
    return rl.generate(llm, prompts, range(len(prompts)), 1, 24, processor.tokenizer)


def gap(sampled):
    """Mean |log p trainer - log p vLLM| of what vLLM sampled."""
    ours = rl.current_logps(model, sampled, 4096, device)
    theirs = torch.tensor([logp for rollout in sampled for logp in rollout.logps[0]])
    return (ours - theirs).abs().mean().item()


def checksums():
    return llm.collective_rpc("compute_weight_checksums")


result = {
    "prompts": len(prompts),
    "gap_at_start": gap(rollouts()),
    "checksums_at_start": checksums(),
}
first = rollouts()
result["same_seed_same_tokens"] = [r.responses for r in first] == [r.responses for r in rollouts()]
groups = [sft.Group(rollout.prompt, rollout.responses) for rollout in first]
settings = type("Settings", (), dict(tokens_per_microbatch=4096, grad_clip=1.0))
sft.update(model, optimizer, groups, settings, device)
result["gap_without_sync"] = gap(rollouts())
pasted = paste(
    "weight sync from FSDP2 to vLLM"
)  # as a reader copies it; the loop uses the same lines
pasted.sync_weights(llm, pasted.full_weights(model, torch.float32))
result["gap_after_sync"] = gap(rollouts())
result["checksums_after_sync"] = checksums()
banned = processor.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
result["banned_sampled"] = sum(token in banned for r in rollouts() for token in r.responses[0])
everyone = rl.gather(result)
if rank == 0:
    Path(out, "sync.json").write_text(json.dumps(everyone))
llm.llm_engine.engine_core.shutdown()
