"""What the two READMEs say and a machine can check: lines of code, worked examples, links, pieces to copy.

python tests/test_readme.py      # after an edit of the scripts: moves the line numbers and the line counts
"""

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

README, MEASURED = ROOT / "README.md", ROOT / "tests" / "README.md"
ROW = re.compile(r"^\| (.+) \| `(.+)` \| \[(\w+\.py):(\d+)\]\(\3#L(\d+)\) \|$", re.MULTILINE)
COUNT = re.compile(r"^\| \[([\w/]+\.py)\]\(\1\) \| (\d+) \|", re.MULTILINE)


def section(title, path=README):
    return path.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]


def line_of(script, snippet):
    """The number of the only line of a script that has the snippet, counted from 1."""
    lines = (ROOT / script).read_text().splitlines()
    found = [number for number, line in enumerate(lines, 1) if snippet in line]
    assert len(found) == 1, f"{script} has `{snippet}` in lines {found}, expected one"
    return found[0]


def lines_in(script):
    return (ROOT / script).read_text().count("\n")


def test_references_to_lines():
    """A table of equations, or of line counts, that is wrong after the next edit."""
    rows = ROW.findall(section("From the paper to the code"))
    assert len(rows) == section("From the paper to the code").count("#L") > 10
    for what, snippet, script, shown, link in rows:
        place = [int(shown), int(link)]
        assert place == [line_of(script, snippet)] * 2, f"{what}: python tests/test_readme.py"
    counts = COUNT.findall(section("Reading order"))
    assert len(counts) == 7
    assert all(int(count) == lines_in(script) for script, count in counts), counts


def test_worked_example():
    """Advantages in the README that the code does not give."""
    text = section("The method")
    rows = [line for line in text.splitlines() if re.match(r"\| [a-d],", line)]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    names, tasks = zip(*(name.split(", ") for name, *_ in cells))
    assert names == ("a", "b", "c", "d")
    numbers = [[list(map(float, cell.split())) for cell in row[1:]] for row in cells]
    flat = [reward for rewards, *_ in numbers for reward in rewards]
    groups, kinds = ([value for value in values for _ in range(4)] for values in (names, tasks))
    for column, method in enumerate(("grpo", "dr_grpo", "ema_grpo"), 1):
        ema = EMAStd()
        shown = [number for row in numbers for number in row[column]]
        assert advantages(flat, groups, kinds, ema, method) == pytest.approx(shown, abs=0.0051)
    sigmas = re.search(r"sigma ([\d.]+) for QA and ([\d.]+) for boxes", text)
    expected = list(map(float, sigmas.groups()))
    assert [ema.std("QA"), ema.std("box")] == pytest.approx(expected, abs=5e-4)


def test_diagram_counts_like_the_loop():
    """A diagram of the step whose numbers are not those in the code."""
    diagram = section("The method").split("```")[3]
    loop = (ROOT / "rl_ema_grpo.py").read_text().split("for step in range(first + 1")[1]
    found = re.findall(r"^ +# (\d) (\w+)(?:.*? and (\d) (\w+))?", loop, re.MULTILINE)
    in_code = {pair for one in found for pair in (one[:2], one[2:]) if pair[0]}
    assert in_code == set(re.findall(r"(\d) (\w+)", diagram)) and len(in_code) == 8


def test_memory_arithmetic():
    """A table of memory that its own formula does not give."""
    text = section("Fewer, smaller, more GPUs")
    rows = re.findall(r"^\| Qwen3-VL-\w+ \(P = ([\d.]+)\) \| (.+?) \| \d+ x", text, re.M)
    assert len(rows) == 3
    for billions, cells in rows:
        expected = [2 * float(billions) + 16 * float(billions) / n + 4 for n in (1, 2, 4, 8)]
        assert list(map(float, cells.split(" | "))) == pytest.approx(expected, abs=0.06)


def test_ablation_table(capsys):
    """Numbers in the README that are not those of the committed runs."""
    ablation.print_table(json.loads((ROOT / "assets" / "ablation.json").read_text()))
    text = section("Does it matter what one divides by?", MEASURED)
    assert capsys.readouterr().out.strip() in text


@pytest.mark.parametrize("path", [README, MEASURED], ids=["top", "tests"])
def test_links_lead_somewhere(path):
    """A heading that was renamed, an image or a script that is gone."""
    links = re.findall(r"\]\(([^)]+)\)", path.read_text())
    for link in links:
        if not link.startswith("http"):
            name, _, anchor = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            assert target.exists(), link
            if anchor and target.suffix == ".md":
                headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
                plain = [re.sub(r"[^\w\- ]", "", each.lower()) for each in headings]
                assert anchor in [each.replace(" ", "-") for each in plain], link
    commands = r"(?:python|bash|torchrun[^\n]*?) ((?:tests/)?\w+\.(?:py|sh))"
    named = set(re.findall(commands, path.read_text()))
    assert named and all((ROOT / name).exists() for name in named), named


# of torchrun, the hub, pip and containers
OTHERS = """--nproc-per-node --nnodes --rdzv-backend --rdzv-endpoint --max-restarts --shutdown-timeout
    --repo-type --local-dir --extra-index-url --shm-size""".split()


def test_flags_exist():
    """A command of a README with a flag that no script has."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("*.sh")]
    scripts = "".join(path.read_text() for path in files)
    limits = [f"--{field.replace('_', '-')}" for field in data.Limits._fields]
    text = (README.read_text() + MEASURED.read_text()).replace("--no-", "--")
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text)) - {*OTHERS, *limits}
    assert len(flags) > 25
    assert [flag for flag in flags if f'"{flag}"' not in scripts] == []


# --------------------------------------------------------------------------------------------------
# Copying pieces. The weight sync is pasted by tests/sync.py, where it meets a real vLLM.


def test_every_piece_can_be_pasted():
    """A piece that reads a name which nobody told to copy: it breaks in the other project."""
    assert len(pieces()) >= 5
    for title in pieces():
        paste(title)


def test_pasted_method():
    module = paste("EMA-GRPO's advantages")
    assert module.advantages([1, 0], "aa", ["QA", "QA"], module.EMAStd()) == [1.0, -1.0]
    half, zero, one = torch.tensor([0.5]), torch.tensor([0.0]), torch.tensor([1.0])
    losses, _ = paste("the policy loss").policy_loss(half, zero, one)
    assert losses.item() == pytest.approx(-1.3)


def test_pasted_forward(toy, processor):
    """The packed forward in a project that knows nothing of ours but the prompts."""
    module = paste("the packed forward of Qwen3-VL")
    records = [data.load_records(toy / f"sft_{kind}.json")[0] for kind in ("image", "video")]
    groups = [sft.training_pair(record, processor, data.Limits()) for record in records]
    groups = [(prompt, [*responses, [15, 16, 17]]) for prompt, responses in groups]
    model = Qwen3VLForConditionalGeneration.from_pretrained(toy / "model", dtype=torch.float32)
    model.set_attn_implementation({"text_config": "shared_prefix", "vision_config": "sdpa"})
    pasted = module.response_logps(model, module.pack(groups, "cpu"))
    AttentionInterface.register("shared_prefix", sft.shared_prefix_attention)  # ours again
    assert torch.equal(pasted, sft.response_logps(model, sft.pack(groups, "cpu")))


if __name__ == "__main__":
    moved = lambda m: f"| {m[1]} | `{m[2]}` | [{m[3]}:{(n := line_of(m[3], m[2]))}]({m[3]}#L{n}) |"
    counted = lambda m: f"| [{m[1]}]({m[1]}) | {lines_in(m[1])} |"
    README.write_text(COUNT.sub(counted, ROW.sub(moved, README.read_text())))
