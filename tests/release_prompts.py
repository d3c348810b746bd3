"""Prints the release's instructions as JSON for `--prompts`, from a clone of it; no code is run.

python tests/release_prompts.py PATH_TO_A_CLONE > prompts.json
"""

import ast
import json
import sys
from pathlib import Path


def release_prompts(clone):
    """{task: instruction}: in its code QUESTION_TEMPLATE comes before TYPE_TEMPLATE[task]."""
    for path in sorted(Path(clone).rglob("*.py")):
        text = path.read_text("utf-8")
        if "QUESTION_TEMPLATE = " in text and "TYPE_TEMPLATE = " in text:
            nodes = [node for node in ast.parse(text).body if isinstance(node, ast.Assign)]
            tables = {ast.unparse(node.targets[0]): node.value for node in nodes}
            start = ast.literal_eval(tables["QUESTION_TEMPLATE"]).format(Question="").lstrip("\n")
            ends = ast.literal_eval(tables["TYPE_TEMPLATE"])
            return {task.replace("_", "-"): start + end for task, end in ends.items()}
    raise SystemExit(f"{clone}: no file with QUESTION_TEMPLATE and TYPE_TEMPLATE")


if __name__ == "__main__":
    print(json.dumps(release_prompts(sys.argv[1]), indent=1))
