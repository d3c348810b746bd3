"""Run by test_forward.py under torchrun with 1 and with 2 ranks, these as two shards and as two copies:
one SFT and one RL step on the same groups, dealt unevenly.

Saves what each step did to the weights (plain gradient descent with rate 1, so the difference is the gradient), and
whether a saved checkpoint brings everything back.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cpu_compat  # noqa: F401
import torch
from transformers import AutoProcessor

import data
import rl_ema_grpo
import sft

torch.set_num_threads(1)
toy, out, shard_size = sys.argv[1:]
rank, world, device = sft.init_distributed()
processor = AutoProcessor.from_pretrained(f"{toy}/model")
records = (
    data.load_records(f"{toy}/sft_image.json")[:4] + data.load_records(f"{toy}/sft_video.json")[:3]
)
groups = [sft.training_pair(record, processor, data.Limits()) for record in records]
groups = [
    sft.Group(group.prompt, [group.responses[0], groups[i - 1].responses[0]])
    for i, group in enumerate(groups)
]
mine = (
    groups if world == 1 else (groups[:5], groups[5:])[rank]
)  # 5 and 2: unequal token and micro-batch counts
settings = argparse.Namespace(
    recompute=True, tokens_per_microbatch=300, grad_clip=1e9, clip_low=0.2, clip_high=0.3, dual_clip=3.0, kl_coef=0.1, tis_cap=2.0
)  # fmt: skip

model = sft.load_model(f"{toy}/model", device, torch.float32, shard_size=int(shard_size))
model.gradient_checkpointing_enable({"use_reentrant": False})
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)


def weights():
    return {name: tensor.clone() for name, tensor in sft.full_weights(model, torch.float32)}


def set_weights(values):
    for name, param in model.named_parameters():
        whole = torch.distributed.tensor.distribute_tensor(
            values[name], param.device_mesh, param.placements
        )
        with torch.no_grad():
            param.copy_(whole)


start = weights()
logps = rl_ema_grpo.current_logps(model, mine, 10**6, device)
total, count = map(sum, zip(*sft.gather((logps.sum().item(), len(logps)))))
numbers = list(sft.update(model, optimizer, mine, settings, device).values())
result = {"mean": -total / count, "numbers": numbers}
result["sft"] = {name: value - start[name] for name, value in weights().items()}
set_weights(start)

rollouts = []
for prompt, responses in mine:
    logps = [[-0.5] * len(response) for response in responses]
    rollouts.append(
        rl_ema_grpo.RolloutGroup(prompt, responses, logps, [True] * 2, advantages=[1.5, -0.5])
    )
old = rl_ema_grpo.current_logps(model, mine, 300, device) - 0.05
numbers = rl_ema_grpo.update(model, optimizer, rollouts, old, old - 0.1, settings, device)
result["numbers"] += list(numbers.values())
result["microbatches"] = sft.gather(len(sft.microbatches(mine, 300)))
result["own"] = sft.gather(sum(bool(members) for members, _ in sft.microbatches(mine, 300)))
result["rl"] = {name: value - start[name] for name, value in weights().items()}

moved = weights()
run = argparse.Namespace(out=out, model="", keep=2, lr=1e-3, weight_decay=0.0, force=False)
optimizer = sft.load_optimizer(run, model, 0)
sft.update(model, optimizer, mine, settings, device)  # gives the optimiser a state
after = weights()
sft.save_checkpoint(run, model, optimizer, {"step": 1, "note": "as it was"})
sft.update(model, optimizer, mine, settings, device)
set_weights(moved)
state = sft.start_run(run)
optimizer = sft.load_optimizer(run, model, state["step"])
restored = weights()
same = all(torch.equal(after[name], restored[name]) for name in after)
step = next(iter(optimizer.state.values()))["step"].item()
result["resumed"] = same and step == 1 and state["note"] == "as it was"
if rank == 0:
    torch.save(result, os.path.join(out, "steps.pt"))
torch.distributed.destroy_process_group()
