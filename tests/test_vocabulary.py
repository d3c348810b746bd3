"""A step of RL with a vocabulary of Qwen's size."""

import json
import shutil

import torch
from conftest import run
from safetensors.torch import load_file, save_file

ROWS = 151_936  # of Qwen3-VL's embedding
WEIGHT = "model.language_model.embed_tokens.weight"
FLAGS = "--dtype float32 --workers 1 --image-min-pixels 4096 --max-prompt-tokens 400 --steps 1"
FLAGS += " --prompts-per-step 2 --rollouts-per-prompt 2 --max-response-tokens 8"
FLAGS += " --kl-coef 0.01 --tis-cap 2"  # the paper's KL: a second model


def with_more_words(source, target):
    """Copies a toy model with as many tokens, and rows of its embedding, as Qwen3-VL has."""
    shutil.copytree(source, target)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words |= {f"word{i}": i for i in range(len(words), ROWS)}
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["vocab_size"] = ROWS
    (target / "config.json").write_text(json.dumps(config))
    weights = load_file(source / "model.safetensors")
    rows, width = weights[WEIGHT].shape
    weights[WEIGHT] = torch.cat([weights[WEIGHT], 0.1 * torch.randn(ROWS - rows, width)])
    save_file(weights, target / "model.safetensors", {"format": "pt"})


def test_a_vocabulary_of_qwens_size(toy, tmp_path, seeded):
    """An id, an index or a share of memory that only fits small vocabularies."""
    with_more_words(toy / "model", tmp_path / "model")
    command = ["tests/doomed.py", "", "rl_ema_grpo", *FLAGS.split(), "--out", tmp_path / "rl"]
    command += ["--model", tmp_path / "model", "--data", toy / "rl_train.json"]
    run(*command, ranks=1)
    row = json.loads((tmp_path / "rl/metrics.jsonl").read_text())
    assert row["logp_gap"] < 1e-4 and row["grad_norm"] > 0
    assert abs(row["kl"]) < 1e-4 and row["capped_share"] == 0  # to the model that it began with
    assert "word1" in (tmp_path / "rl/rollouts.jsonl").read_text()  # sampled from all of its range
    before, after = (load_file(tmp_path / out / "model.safetensors") for out in ("model", "rl"))
    assert before[WEIGHT].shape == after[WEIGHT].shape == (ROWS, 128)
