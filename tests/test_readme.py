"""What the README says and a machine can check: lines of code, worked examples, anchors, pieces to copy.

python tests/test_readme.py      # after an edit of the scripts: moves the line numbers of "From the paper to the code"
"""

import doctest
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import ablation  # tests/ablation.py
import cpu_compat  # noqa: F401  (before transformers)
import pytest
import torch
from copying import paste, pieces  # tests/copying.py
from transformers import Qwen3VLForConditionalGeneration
from transformers.modeling_utils import AttentionInterface

import data
import sft
from rl_ema_grpo import EMAStd, advantages

README = ROOT / "README.md"
ROW = re.compile(r"^\| (.+) \| `(.+)` \| \[(\w+\.py):(\d+)\]\(\3#L(\d+)\) \|$", re.MULTILINE)


def section(title):
    return README.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]


def line_of(script, snippet):
    """The number of the only line of a script that has the snippet, counted from 1."""
    lines = (ROOT / script).read_text().splitlines()
    found = [number for number, line in enumerate(lines, 1) if snippet in line]
    assert len(found) == 1, f"{script} has `{snippet}` in lines {found}, expected one"
    return found[0]


def test_references_to_lines():
    """A table of equations that points beside them after the next edit."""
    rows = ROW.findall(section("From the paper to the code"))
    assert len(rows) == section("From the paper to the code").count("#L") > 25
    for what, snippet, script, shown, link in rows:
        assert [int(shown), int(link)] == [line_of(script, snippet)] * 2, (
            f"{what}: run python tests/test_readme.py"
        )


def test_worked_example():
    """Advantages in the README that the code does not give."""
    text = section("The method in one page")
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if re.match(r"\| [a-d],", line)
    ]
    numbers = [[list(map(float, cell.split())) for cell in cells] for _, *cells in rows]
    names, tasks = zip(*(name.split(", ") for name, *_ in rows))
    assert names == ("a", "b", "c", "d")
    flat = [reward for rewards, *_ in numbers for reward in rewards]
    groups, kinds = ([value for value in values for _ in range(4)] for values in (names, tasks))
    for column, method in enumerate(("grpo", "dr_grpo", "ema_grpo"), 1):
        ema = EMAStd()
        shown = [number for row in numbers for number in row[column]]
        assert advantages(flat, groups, kinds, ema, method) == pytest.approx(shown, abs=0.0051), (
            method
        )
    sigmas = re.search(r"sigma ([\d.]+) for QA and ([\d.]+) for boxes", text)
    assert [ema.std("QA"), ema.std("box")] == pytest.approx(
        list(map(float, sigmas.groups())), abs=5e-4
    )


def test_diagram_counts_like_the_loop():
    """A diagram of the step whose numbers are not those in the code."""
    diagram = section("The method in one page").split("```")[3]
    loop = (ROOT / "rl_ema_grpo.py").read_text().split("while step < args.steps:")[1]
    in_code = re.findall(r"^ +# (\d) (\w+)(?:.*? and (\d) (\w+))?", loop, re.MULTILINE)
    in_code = {pair for one in in_code for pair in (one[:2], one[2:]) if pair[0]}
    assert in_code == set(re.findall(r"(\d) (\w+)", diagram.replace("in 4 mini-batches", "")))
    assert len(in_code) == 8


def test_memory_arithmetic():
    """A table of memory that its own formula does not give."""
    rows = re.findall(
        r"^\| Qwen3-VL-\w+ \(P = ([\d.]+)\) \| (.+?) \| \d+ x",
        section("Fewer, smaller, more GPUs"),
        re.M,
    )
    assert len(rows) == 3
    for billions, cells in rows:
        expected = [2 * float(billions) + 16 * float(billions) / n + 4 for n in (1, 2, 4, 8)]
        assert list(map(float, cells.split(" | "))) == pytest.approx(expected, abs=0.06)


def test_ablation_table(capsys):
    """Numbers in the README that are not those of the committed runs."""
    result = json.loads((ROOT / "assets" / "ablation.json").read_text())
    ablation.print_table(result, sorted(result["heldout"]["sft"]), ablation.intervals(result))
    assert capsys.readouterr().out.strip() in section("Does it matter what one divides by?")
    rows = re.findall(
        r"^\| (?:QA|box) \| (.+) \|$", section("Does it matter what one divides by?"), re.MULTILINE
    )
    for k, row in enumerate(rows):  # after 105 steps, of which every third is there
        shares = [
            100 * sum(seed[35][k] for seed in result["without_images"][method]) / 10
            for method in ablation.METHODS
        ]
        assert list(map(float, row.split(" | "))) == pytest.approx(shares, abs=0.06)
    assert len(rows) == 2
    assert {name: len(run["reward"]) for name, run in result["runs"].items()} == {
        f"{method}-{seed}": 100 for method in ablation.METHODS for seed in range(3)
    }


def test_links_lead_somewhere():
    """A heading that was renamed, a picture or a script that is gone."""
    text = README.read_text()
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE
    )
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert {link[1:] for link in links if link.startswith("#")} <= anchors
    files = {link.split("#")[0] for link in links if not link.startswith(("#", "http"))}
    files |= set(re.findall(r"(?:python|bash|torchrun[^\n]*?) ((?:tests/)?\w+\.(?:py|sh))", text))
    assert len(files) > 10
    assert {path for path in files if not (ROOT / path).exists()} == {
        "make_mine.py"
    }  # the reader writes it


# of torchrun, the hub, pip, containers and vLLM
OTHERS = """--nproc-per-node --nnodes --rdzv-backend --rdzv-endpoint --max-restarts --shutdown-timeout --repo-type --local-dir
    --extra-index-url --shm-size --trust-request-mm-kwargs""".split()


def test_flags_exist():
    """A command of the README with a flag that no script has."""
    scripts = "".join(
        path.read_text()
        for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("*.sh")]
    )
    scripts += "".join(f'"--{field}"' for field in data.Limits._fields).replace(
        "_", "-"
    )  # data.add_limits makes these
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", README.read_text())) - set(OTHERS)
    assert len(flags) > 30
    assert [flag for flag in flags if f'"{flag}' not in scripts and f"{flag} " not in scripts] == []


# ----------------------------------------------------------------------------------------------------------------------
# Copying pieces. The weight sync is pasted by tests/sync.py, where it meets a real vLLM (test_vllm.py).


def run_examples(module):
    """Runs the doctests of a pasted module; returns how many there were."""
    found = [
        test
        for test in doctest.DocTestFinder().find(module, "pasted", globs=vars(module))
        if test.examples
    ]
    runner = doctest.DocTestRunner()
    for test in found:
        assert runner.run(test).failed == 0, test.name
    return runner.tries


def test_every_piece_can_be_pasted():
    """A piece that reads a name which nobody told to copy: it breaks in the other project, perhaps only later."""
    assert len(pieces()) >= 12
    for title in pieces():
        paste(title)


def test_pasted_advantages():
    module = paste("EMA-GRPO's advantages")
    assert run_examples(module) >= 6
    assert module.advantages([1, 0], "aa", ["QA", "QA"], module.EMAStd()) == [1.0, -1.0]


def test_pasted_rewards():
    """Each reward's own examples, in a file that has nothing else."""
    titles = [title for title in pieces() if title.startswith("reward: ")]
    assert len(titles) == 10
    for title in titles:
        assert run_examples(paste(title)) > 0, title


def test_pasted_log_probabilities(seeded):
    """Chunks of the pasted function against one log-softmax over all logits, gradients included."""
    hidden, weight = torch.randn(10, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    targets, grad = torch.randint(30, (10,)), torch.randn(10)
    ours = paste("chunked log-probabilities").chunked_logps(hidden, weight, targets, chunk=4)
    plain = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    for a, b in zip(*(torch.autograd.grad(out, (hidden, weight), grad) for out in (ours, plain))):
        assert torch.allclose(a, b, atol=1e-5)
    assert torch.allclose(ours, plain, atol=1e-5)


def test_pasted_forward(toy, processor):
    """The packed forward in a project that knows nothing of ours but the prompts."""
    module = paste("the packed shared-prefix forward of Qwen3-VL")
    records = [data.load_records(toy / f"sft_{kind}.json")[0] for kind in ("image", "video")]
    groups = [sft.training_pair(record, processor, data.Limits()) for record in records]
    groups = [(prompt, [*responses, [15, 16, 17]]) for prompt, responses in groups]
    model = Qwen3VLForConditionalGeneration.from_pretrained(toy / "model", dtype=torch.float32)
    model.set_attn_implementation({"text_config": "shared_prefix", "vision_config": "sdpa"})
    pasted = module.response_logps(model, module.pack(groups, "cpu"))
    AttentionInterface.register(
        "shared_prefix", sft.shared_prefix_attention
    )  # not the pasted one for the tests to come
    assert torch.equal(pasted, sft.response_logps(model, sft.pack(groups, "cpu")))


def test_pasted_policy_loss():
    logps, old, advantage = torch.tensor([0.5]), torch.tensor([0.0]), torch.tensor([1.0])
    assert paste("the policy loss").policy_loss(logps, old, advantage)[0].item() == pytest.approx(
        -1.3
    )


def test_pasted_video_reader(toy):
    path = next((toy / "media").glob("*.mp4"))
    pasted, ours = (
        paste("reading a video, exact frames, true time stamps").read_video(str(path)),
        data.read_video(str(path)),
    )
    assert (
        pasted.frames.shape[0] == 16
        and (pasted.frames == ours.frames).all()
        and pasted[1:] == ours[1:]
    )


if __name__ == "__main__":
    moved = lambda m: f"| {m[1]} | `{m[2]}` | [{m[3]}:{(n := line_of(m[3], m[2]))}]({m[3]}#L{n}) |"
    README.write_text(ROW.sub(moved, README.read_text()))
