"""Trainer and vLLM must read the same prompt and hold the same weights. One run of two ranks, looked at from all sides."""

import json

import av
import numpy as np
import pytest
from conftest import run


def write_video(path, width, height, times_ms):
    """A grey ramp of a video whose frame i is shown at times_ms[i]."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1000, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i, time in enumerate(times_ms):
            frame = av.VideoFrame.from_ndarray(
                np.full((height, width, 3), 8 * i % 256, np.uint8), format="rgb24"
            )
            frame.pts = time
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def measured(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("sync")
    write_video(
        out / "variable.mp4",
        64,
        64,
        [0, 40, 80, 1000, 1040, 3000, 3100, 3200, 7000, 7040, 9000, 9700],
    )
    write_video(out / "wide.mp4", 130, 50, range(0, 3300, 100))
    run("tests/sync.py", toy, out, ranks=2, timeout=400)
    return json.loads((out / "sync.json").read_text())


def test_prompt_ids_agree(measured):
    """Image, video, text, variable frame rate, odd sizes: ids that differ would give rewards to another prompt's tokens."""
    assert [part["prompts"] for part in measured] == [11, 11]


def test_same_log_probs_at_the_start(measured):
    """Another pixel normalisation, position or precision on the other side shows here first."""
    assert max(part["gap_at_start"] for part in measured) < 1e-5


def test_sync_brings_the_new_weights(measured):
    """A sync that reaches no, or only some, weights: vLLM goes on sampling from the old policy, silently."""
    for part in measured:
        assert part["gap_without_sync"] > 1e-3
        assert part["gap_after_sync"] < 1e-5


def test_all_ranks_hold_the_same_weights(measured):
    """Engines that drift apart: checksums are equal on all ranks, and changed by the sync."""
    assert measured[0]["checksums_after_sync"] == measured[1]["checksums_after_sync"]
    assert measured[0]["checksums_at_start"] != measured[0]["checksums_after_sync"]


def test_sampling_is_seeded_and_never_writes_vision_tokens(measured):
    """Rollouts that cannot be repeated after a restart; a sampled <|image_pad|> that claims the prompt's pixels."""
    assert all(part["same_seed_same_tokens"] for part in measured)
    assert sum(part["banned_sampled"] for part in measured) == 0
