"""rewards.py: every number as defined, nothing the model writes can break it.

REWARD_EXAMPLES=100000 python -m pytest tests/test_rewards.py -k random     # the long run of the random tests
"""

import doctest
import http.server
import json
import math
import os
import random
import re
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rewards
from rewards import (
    Grader,
    Score,
    accuracy,
    find_answer,
    parse_response,
    read_choice,
    read_number,
    score,
)

BOX, BOX2 = (
    [100, 200, 300, 400],
    [150, 200, 350, 400],
)  # IoU: 150 * 200 / (2 * 200 * 200 - 150 * 200) = 0.6
POINTS, FAR = [[110, 210], [200, 300], [290, 390]], [[50, 50], [500, 500], [10, 900]]
TRUTHS = {  # problem_type, data_type -> a true answer
    ("multiple choice", "image"): "B",
    ("numerical", "image"): "1234.5",
    ("math", "image"): "\\frac{1}{2}",
    ("regression", "video"): "100",
    ("OCR", "image"): "open a/b < c from 9 to 5",
    ("open-ended", "video"): "A man walks his dog along the river.",
    ("temporal grounding", "video"): json.dumps({"time": [2.5, 6]}),
    ("spatial grounding", "image"): json.dumps({"boxes": BOX}),
    ("spatial-temporal grounding", "video"): json.dumps(
        {"time": [2.5, 4.1], "boxes": {"3": BOX, "4": BOX}}
    ),
    ("tracking", "video"): json.dumps({"boxes": {str(k): BOX for k in range(1, 33)}}),
    ("segmentation", "image"): json.dumps(
        {"boxes": BOX, "positive_points": POINTS, "negative_points": FAR}
    ),
    ("segmentation", "video"): json.dumps(
        {"time": 4.0, "boxes": BOX, "positive_points": POINTS, "negative_points": FAR}
    ),
}
RECORDS = [
    {
        "problem_type": kind,
        "data_type": medium,
        "problem": "?",
        "answer": f"<answer>{truth}</answer>",
    }
    for (kind, medium), truth in TRUTHS.items()
]
BY_TYPE = {f"{record['problem_type']}-{record['data_type']}": record for record in RECORDS}


def ask(kind, truth, medium="video", **more):
    truth = truth if isinstance(truth, str) else json.dumps(truth)
    return {"problem_type": kind, "data_type": medium, "answer": truth, **more}


def reply(answer):
    return f"<think>hm</think><answer>{answer if isinstance(answer, str) else json.dumps(answer)}</answer>"


def check_bounds(result):
    assert all(type(part) is float and math.isfinite(part) for part in result), result
    assert 0 <= result.accuracy <= 1 and result.format in (0, 1) and 0 <= result.structure <= 0.5, (
        result
    )
    assert result.reward == pytest.approx(
        0.9 * result.accuracy + 0.1 * result.format + result.structure, abs=1e-12
    )


# --- definitions ------------------------------------------------------------------------------------------------------


def test_examples():
    """The docstrings show numbers that the code no longer gives."""
    result = doctest.testmod(rewards)
    assert result.attempted > 25 and result.failed == 0


def test_import_is_light():
    """Importing rewards pulled in sympy or nltk and cost every script seconds."""
    code = "import rewards, sys; assert not {'math_verify', 'rouge_score', 'sympy', 'torch', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=os.path.dirname(rewards.__file__))


@pytest.mark.parametrize("record", RECORDS, ids=BY_TYPE)
def test_exact_answer_is_worth_everything(record):
    """The truth itself did not score 1.5 (the release's clean-up: "a / b" never matches itself)."""
    assert score(record, reply(rewards.truth_of(record))) == pytest.approx((1.5, 1, 1, 0.5))


@pytest.mark.parametrize(
    ("record", "answer", "expected"),
    [
        (ask("numerical", "1234.5"), "1,234.504", (1, 0.5)),
        (ask("numerical", "2.67"), "2.675", (1, 0.5)),  # round() of the binary float, as released
        (ask("numerical", "3"), "3.01", (0, 0.5)),
        (ask("regression", "100"), "90", (0.8, 0.5)),
        (ask("regression", "100"), "50", (0, 0.5)),  # strictly less
        (ask("regression", "-2"), "-2.1", (0.9, 0.5)),  # exactly 0.05 off
        (ask("regression", "0"), "0.0", (1, 0.5)),
        (ask("OCR", "the dark room"), "the dog", (1 / 3, 0.5)),
        (ask("OCR", "a b"), "x y z w", (0, 0.5)),
        (ask("open-ended", "A dog runs fast."), "a dog runs", ((6 / 7 + 4 / 5 + 6 / 7) / 3, 0.5)),
        (ask("temporal grounding", {"time": [2, 6]}), {"time": [0, 4]}, (1 / 3, 0.5)),
        (ask("spatial grounding", {"boxes": BOX}), {"boxes": BOX2}, (0.6, 0.5)),
        (
            ask(
                "spatial-temporal grounding",
                {"time": [2, 6], "boxes": {str(k): BOX for k in range(2, 7)}},
            ),
            {"time": [0, 4], "boxes": {"2": BOX2, "9": BOX}},
            (0.5 / 3 + 0.5 * 0.6 / 5, 0.25 + 0.25 / 5),
        ),
        (
            ask("tracking", {"boxes": {"1": BOX, "2": BOX, "3": BOX, "4": BOX}}),
            {"boxes": {"1": BOX, "2": BOX2}},
            (1.6 / 4, 0.375),
        ),
        (
            ask("tracking", {"boxes": {"1": BOX, "2": BOX}}),
            {"boxes": {"1": BOX, "2": [1, 2, 3]}},
            (0.5, 0),
        ),
        (
            ask(
                "segmentation",
                {"boxes": BOX, "positive_points": POINTS, "negative_points": FAR},
                "image",
            ),
            {
                "boxes": BOX2,
                "positive_points": [[x + 30, y + 40] for x, y in POINTS[::-1]],
                "negative_points": [[5000, 5000]] * 3,
            },
            (0.5 * 0.6 + 0.25 * math.exp(-0.5), 0.5),
        ),
        (
            ask(
                "segmentation",
                {"time": 4, "boxes": BOX, "positive_points": POINTS, "negative_points": FAR},
            ),
            {"time": 7.0, "boxes": BOX2, "positive_points": POINTS, "negative_points": FAR[::-1]},
            (0.3 * 0.6 + 0.3 * math.exp(-1.5) + 0.4, 0.5),
        ),
    ],
)
def test_definitions(record, answer, expected):
    """A metric or a weight is not the paper's (worked by hand)."""
    result = score(record, reply(answer))
    assert (result.accuracy, result.structure) == pytest.approx(expected, abs=1e-9)
    check_bounds(result)


def test_shared_seconds_are_a_separate_number():
    """One right box of five scored as five in the reward; evaluation still needs the release's number."""
    truth = {str(k): BOX for k in range(5)}
    assert rewards.mean_box_iou({"0": BOX}, truth) == 0.2
    assert rewards.mean_box_iou({"0": BOX}, truth, "shared") == 1.0
    assert rewards.mean_box_iou({"9": BOX}, truth, "shared") == 0.0


def test_word_error_rate_is_levenshtein():
    """The vectorised edit table drifted from the textbook one."""
    rng = random.Random(0)
    for _ in range(300):
        p, y = ([rng.choice("abc") for _ in range(rng.randint(0, 9))] for _ in range(2))
        table = [[i + j for j in range(len(p) + 1)] for i in range(len(y) + 1)]
        for i in range(1, len(y) + 1):
            for j in range(1, len(p) + 1):
                swap = table[i - 1][j - 1] + (y[i - 1] != p[j - 1])
                table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, swap)
        expected = max(0, 1 - table[-1][-1] / max(1, len(y)))
        assert accuracy(ask("OCR", " ".join(y)), " ".join(p)) == pytest.approx(expected)


def test_best_matching_of_points():
    """Points were matched in the order written, or greedily."""
    scipy_optimize = pytest.importorskip("scipy.optimize")
    rng = random.Random(0)
    for _ in range(100):
        p, y = ([[rng.uniform(0, 300), rng.uniform(0, 300)] for _ in range(3)] for _ in range(2))
        cost = [[math.dist(a, b) for b in y] for a in p]
        rows, columns = scipy_optimize.linear_sum_assignment(cost)
        d = sum(cost[i][j] for i, j in zip(rows, columns)) / 3
        assert rewards.point_kernel(p, y) == pytest.approx(math.exp(-(d**2) / 5000), abs=1e-12)


def test_truth_in_any_form():
    """Records that say `solution`, or hold JSON instead of text, were graded against nothing."""
    for more in (
        {"answer": "3"},
        {"answer": None, "solution": "<answer> 3 </answer>"},
        {"answer": 3},
    ):
        assert accuracy({"problem_type": "numerical", **more}, "3") == 1
    assert (
        accuracy(
            {"problem_type": "temporal grounding", "solution": {"time": [1, 2]}}, '{"time": [1, 2]}'
        )
        == 1
    )


def test_reward_weights_and_unknown_type():
    """A misspelt problem type graded as a wrong answer for a whole run."""
    assert score(ask("numerical", "3"), reply("4")) == pytest.approx((0.6, 0, 1, 0.5))
    with pytest.raises(ValueError, match="numerics"):
        score(ask("numerics", "3"), reply("3"))


# --- mistakes of the released code ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "response",
    [
        "B",
        "<answer>B</answer>",
        "<think>x</think>B",
        "<answer>B</answer><think>x</think>",
        "<think>x</think><answer>B</answer> done",
        "so <think>x</think><answer>B</answer>",
        "<think>x</think> so <answer>B</answer>",
        "<think>x</think><answer>B</answer><answer>C</answer>",
        "<think>x</think><think>x</think><answer>B</answer>",
        "<think>x</think><answer><answer>B</answer></answer>",
        "<think>x<answer>B</answer></think>",
        "<think>x</think><answer>B",
        "< think >x< / think ><answer>B</answer>",
        "",
    ],
)
def test_wrong_tags_are_worth_nothing(response):
    """Several blocks passed as "strict" format and the first answer was graded; accuracy was given without any tags."""
    assert parse_response(response) is None
    assert score(BY_TYPE["multiple choice-image"], response) == Score(0, 0, 0, 0)


def test_white_space_around_blocks_is_fine():
    """The strict format refused line breaks between the blocks."""
    assert parse_response(" \n<think>\nx\n</think>\n\n<answer>\n B\n</answer>\n") == "B"
    assert score(ask("numerical", "3"), "<think></think><answer></answer>") == pytest.approx(
        (0.6, 0, 1, 0.5)
    )


@pytest.mark.parametrize("text", ["a / b", "x < 3 > y", "1 /2", "< / >"])
def test_text_is_graded_as_written(text):
    """A clean-up removed spaces around <, > and / from the answer but not from the truth."""
    assert parse_response(reply(text)) == text
    assert score(ask("OCR", text), reply(text)).accuracy == 1
    assert score(ask("OCR", "a / b"), reply("a/b")).accuracy == 0


@pytest.mark.parametrize(
    "text",
    [
        "B",
        "(B)",
        "b",
        "B.",
        "B)",
        "(b).",
        "Answer: B",
        "answer is B.",
        "The correct answer is: (B)",
        "B. the dog",
    ]
    + [
        "Option B",
        "**B**",
        "**Answer:** B",
        "**B.** the dog",
        "B: a dog",
        "B) I see",
        "$B$",
        "\\boxed{B}",
        "[B]",
    ]
    + [
        "B - the dog",
        "B.the dog",
        "B, because it barks",
        " B\n",
        "the dog",
        "The dog.",
        "B. the dog and the cat",
    ],
)
def test_a_choice_as_people_write_it(text):
    """ "Answer: B" and "B." scored 0 in training."""
    assert read_choice(text, ["A. a cat", "B. the dog", "C. both"]) == "B"
    assert (
        score(ask("multiple choice", "B", options=["a cat", "the dog"]), reply(text)).accuracy == 1
    )


@pytest.mark.parametrize(
    "text",
    [
        "Based on the image, B",
        "A or B",
        "A and B",
        "A, B",
        "A. or B.",
        "A) B)",
        "A/B",
        "B/C",
        "ABCD",
        "B C",
        "a dog",
    ]
    + [
        "Both",
        "",
        "?",
        "B-movie",
        "B's",
        "not B",
        "b a",
        "A. B. C. D.",
        "A, B and C",
        "1",
        "Because B",
        "B or C",
    ],
)
def test_no_choice(text):
    """ "Based on ..." scored as B in evaluation; naming several letters scored as the first."""
    assert read_choice(text) is None
    assert accuracy(ask("multiple choice", "B"), text) == 0


def test_choice_by_the_text_of_the_option():
    """An option that looks like a letter was taken for another option."""
    assert read_choice("B. C", ["A. D", "B. C", "C. B"]) == "B"
    assert read_choice("C", ["A. D", "B. C", "C. B"]) == "C"
    assert accuracy(ask("multiple choice", "yes"), "Yes") == 1
    assert read_choice("U.S.", ["U.K.", "U.S."]) == "B"


def test_training_and_evaluation_read_alike():
    """Training and evaluation graded differently; now only where the answer stands may differ."""
    for record in RECORDS:
        response = reply(rewards.truth_of(record))
        assert find_answer(response) == parse_response(response)
    for text in (
        "<answer>A</answer> no: <answer>B</answer>",
        "<think>A</think>B",
        "<think>a <answer>A</answer></think>B",
    ):
        assert find_answer(text) == "B"
    assert find_answer("<think>...</think><answer>B") == "B"
    assert find_answer(" ") is None and find_answer(None) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234", 1234),
        ("1,00,000.5", 100000.5),
        ("-.5", -0.5),
        ("−5", -5),
        ("$1,200", 1200),
        ("45°", 45),
        ("5.", 5),
    ]
    + [
        ("The answer is 7", 7),
        ("**7**", 7),
        ("1e3", 1000),
        ("12 cm", None),
        ("1,23", None),
        ("inf", None),
        ("--5", None),
    ]
    + [
        ("1_000", None),
        (".", None),
        ("e5", None),
        ("True", None),
        ("1e999999999", None),
        ("0x10", None),
    ],
)
def test_numbers_as_people_write_them(text, value):
    """ "1,23" was read as 123, and nan and inf as numbers."""
    assert read_number(text) == value


@pytest.mark.parametrize(
    ("p", "y", "equal"),
    [
        ("\\sqrt{3}", "\\sqrt{3}", 1),
        ("1/2", "\\frac{1}{2}", 1),
        ("$0.5$", "1/2", 1),
        ("a / b", "\\frac{a}{b}", 1),
    ]
    + [
        ("30", "30^\\circ", 1),
        ("30°", "30", 1),
        ("50\\%", "0.5", 1),
        ("x=5", "5", 1),
        ("\\boxed{5}", "5", 1),
    ]
    + [
        ("1,234", "1234", 1),
        ("10^{5}", "100000", 1),
        ("The answer is $5$.", "5", 1),
        ("\\$5", "5", 1),
    ]
    + [
        ("$$-\\dfrac{3}{2}$$", "-1.5", 1),
        ("\\[\\frac{1}{2}\\]", "0.5", 1),
        ("\\(5\\)", "5", 1),
        ("2\\pi", "2", 0),
        ("\\sqrt{3}", "3", 0),
        ("", "5", 0),
        ("6", "5", 0),
    ],
)
def test_math(p, y, equal):
    """Math without dollars was cut to its first number: 2 pi equalled 2, and the root of 3 was not itself."""
    assert accuracy(ask("math", y), p) == equal


# --- hostile text -----------------------------------------------------------------------------------------------------

BAD = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e400",
    "true",
    "null",
    '"5"',
    "[5]",
    "9" * 5000,
    "9" * 4000,
    "1e9999999",
]
JSON_RECORDS = [
    record for record in RECORDS if record["problem_type"].lower() in rewards.JSON_TYPES
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad[:12])
@pytest.mark.parametrize(
    "record", JSON_RECORDS, ids=[k for k, r in BY_TYPE.items() if r in JSON_RECORDS]
)
def test_what_is_no_number(record, bad):
    """NaN inside JSON became a NaN reward; true and "5" counted as numbers."""
    truth = rewards.truth_of(record)
    for number in ("4", "4.0", "2.5", "100", "390"):
        result = score(
            record, reply(truth.replace(f"{number},", f"{bad},").replace(f"{number}]", f"{bad}]"))
        )
        check_bounds(result)
        if number == "100" and record["problem_type"] != "temporal grounding":
            assert result.accuracy < 1 and result.structure < 0.5


@pytest.mark.parametrize(
    "record", JSON_RECORDS, ids=[k for k, r in BY_TYPE.items() if r in JSON_RECORDS]
)
def test_reversed_and_repeated(record):
    """Reversed boxes and spans gave negative areas; the first of duplicate keys counted."""
    y = json.loads(rewards.truth_of(record))
    flip = {"time": [6, 2.5], "boxes": [300, 400, 100, 200]}
    p = y | {k: flip[k] for k in y if k in flip and isinstance(y[k], list)}
    if isinstance(y.get("boxes"), dict):
        p["boxes"] = {k: flip["boxes"] for k in y["boxes"]}
    result = score(record, reply(p))
    check_bounds(result)
    assert result.accuracy <= 0.7 and result.structure == 0.5
    twice = json.dumps(p)[:-1] + ", " + json.dumps(y)[1:]
    assert score(record, reply(twice)).accuracy == 1


HOSTILE = BAD + [
    "[" * 50_000,
    '{"boxes":' * 50_000,
    "{" * 50_000 + "}" * 50_000,
    "\ud800 \udfff",
    "a " * 50_000,
    "B" * 100_000,
    "y" * 100_000,
    ("y" * 900 + " ") * 110,
    "(" * 1000 + "1" + ")" * 1000,
    "*" * 100_000,
    " answer" * 15_000,
    "1," * 50_000,
    "\\frac{" * 300,
    "__import__('os').abort()",
    "\x00",
    "{}",
    "[]",
    '{"time": {}, "boxes": [[1, 2, 3, 4]], "positive_points": 3, "negative_points": [[1, 2], 3, null]}',
    '{"time": [1e308, -1e308], "boxes": [1e308, 1e308, -1e308, 5e-324]}',
    '{"time": [0, 5e-324], "boxes": [0, 0, 5e-324, 5e-324]}',
]


@pytest.mark.parametrize("record", RECORDS, ids=BY_TYPE)
def test_hostile_text_here_and_now(record):
    """Something the model wrote raised, took minutes, or gave a number outside the bounds."""
    for text in HOSTILE:
        start = time.process_time()
        check_bounds(score(record, reply(text)))
        check_bounds(score(record, text))
        find_answer(text)
        assert time.process_time() - start < 5, text[:40]


@pytest.mark.parametrize("record", RECORDS, ids=BY_TYPE)
def test_hostile_truth(record):
    """A broken record ended the run in the middle of grading, long after it was read."""
    for truth in [
        *HOSTILE,
        5,
        True,
        float("nan"),
        float("inf"),
        {},
        [],
        {"time": [float("nan"), 1], "boxes": {"1": None}},
    ]:
        result = score({**record, "answer": truth}, reply(rewards.truth_of(record)))
        check_bounds(result)


EXAMPLES = int(os.environ.get("REWARD_EXAMPLES", "1000"))
NUMBERS = st.one_of(
    st.integers(-10, 1100),
    st.floats(width=32),
    st.sampled_from([0, 1e400, -0.0, 10**30, True, None, "7", [1]]),
)
TEXTS = st.one_of(
    st.text(max_size=60),
    st.text("AB().:* 019,-+e%$\\{}<>/[]\"'", max_size=30),
    st.sampled_from(["B", "90", "a dog", "{}", '{"time": [1, 2]}', "open a/b", "\\frac{1}{2}"]),
)


@pytest.mark.parametrize("record", RECORDS, ids=BY_TYPE)
def test_random_text_and_mutations(record):
    """A response nobody thought of raised, or left the bounds."""
    truth = rewards.truth_of(record)

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data):
        kind = data.draw(st.sampled_from(["text", "cut", "number"]))
        if kind == "text":
            answer = data.draw(TEXTS)
        elif kind == "cut":
            i, j = sorted(
                (data.draw(st.integers(0, len(truth))), data.draw(st.integers(0, len(truth))))
            )
            answer = truth[:i] + data.draw(TEXTS) + truth[j:]
        else:
            spots = [i for i, c in enumerate(truth) if c.isdigit()] or [0]
            i = data.draw(st.sampled_from(spots))
            answer = truth[:i] + json.dumps(data.draw(NUMBERS)) + truth[i + 1 :]
        result = score(record, reply(answer))
        check_bounds(result)
        if record["problem_type"] not in ("math", "open-ended"):
            assert score(record, reply(answer)) == result
        check_bounds(score(record, answer))

    run()


COORDINATE = st.floats(0, 1000)


@settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True)
@given(
    st.tuples(*[COORDINATE] * 4), st.floats(0.01, 1), st.floats(0.01, 1), st.permutations([0, 1, 2])
)
def test_random_laws(numbers, small, large, order):
    """A worse overlap gave more, or the order of points or of the two boxes mattered."""
    x1, x2, y1, y2 = (*sorted(numbers[:2]), *sorted(numbers[2:]))
    x2, y2 = x2 + 1, y2 + 1
    small, large = sorted((small, large))
    whole = [x1, y1, x2, y2]
    nested = [[x1, y1, x1 + (x2 - x1) * share, y2] for share in (small, large)]
    ious = [rewards.iou_box(box, whole) for box in nested]
    assert 0 < ious[0] <= ious[1] + 1e-9 and ious[1] <= 1 and rewards.iou_box(whole, whole) == 1
    assert rewards.iou_box(whole, nested[0]) == pytest.approx(ious[0])
    spans = [[x1, x1 + (x2 - x1) * share] for share in (small, large)]
    assert (
        rewards.iou_1d(spans[0], [x1, x2]) <= rewards.iou_1d(spans[1], [x1, x2]) + 1e-9 <= 1 + 1e-9
    )
    points = [[x1, y1], [x2, y1], [x1, y2]]
    assert rewards.point_kernel([points[i] for i in order], points) == 1
    near, far = ([[x + 100 * share, y] for x, y in points] for share in (small, large))
    assert rewards.point_kernel(far, points) <= rewards.point_kernel(near, points) + 1e-9


# --- Grader -----------------------------------------------------------------------------------------------------------

FAKE = """
import json, os, sys, time
print("ready", flush=True)
for line in sys.stdin:
    answer = json.loads(line)[1]
    if answer == "hang": 9**9**9
    if answer == "sleep": time.sleep(60)
    if answer == "die": os._exit(1)
    if answer == "raise": raise OSError("worker raises, as the test wants")
    if answer == "babble": print("hello", flush=True)
    print(0.5, flush=True)
"""


class FakeGrader(Grader):
    command = (sys.executable, "-c", FAKE)


def test_grader_survives_its_workers():
    """One hung or dead worker stopped the run, cost its neighbours their scores, or went uncounted."""
    words = ["a", "hang", "b", "die", "c", "raise", "babble", "d", "sleep", "e"]
    with FakeGrader(workers=2, seconds=1) as grader:
        for _ in range(2):  # the replacements work as well
            values = grader.accuracies([(ask("math", "x"), word) for word in words])
            assert values == [0.5 if len(word) == 1 else 0.0 for word in words]
        assert grader.counts == {"killed": 4, "errors": 12}  # each death is tried once more


def test_grader_retries_what_an_idle_death_lost():
    """A worker that was killed from outside between two batches turned a right answer into a wrong one."""
    with Grader(workers=1) as grader:
        pair = (ask("math", "1/2"), reply("0.5"))
        assert grader.score([pair])[0].accuracy == 1
        worker = grader.idle.get()
        worker.kill()
        worker.wait()
        grader.idle.put(worker)
        assert grader.score([pair])[0].accuracy == 1
        assert grader.counts == {"killed": 0, "errors": 1}


def test_grader_says_when_it_cannot_work():
    """With math-verify missing every worker died at once and all math scored 0 in silence."""

    class Broken(Grader):
        command = (sys.executable, "-c", "")

    with Broken(workers=1) as grader, pytest.raises(RuntimeError, match="before it was ready"):
        grader.score([(ask("math", "1"), reply("2"))])


def test_grader_equals_score_in_order():
    """Results came back in the order of completion, or the workers saw another record than `score` does."""
    start = time.time()
    with Grader(workers=2, seconds=20) as grader:
        assert time.time() - start < 0.5  # starting must not slow the scripts
        rng = random.Random(0)
        answers = [rewards.truth_of(record) for record in RECORDS] + [
            "0.5",
            "a dog",
            "open",
            "\ud800",
            "9**9**9**9",
        ]
        pairs = [
            (rng.choice(RECORDS), rng.choice([reply, str])(rng.choice(answers))) for _ in range(200)
        ]
        assert grader.score(pairs) == [score(*pair) for pair in pairs]
        assert grader.score([]) == []
        assert grader.counts == {"killed": 0, "errors": 0}


def test_grader_stops_sympy():
    """sympy on a huge power holds its process for good; math-verify's own alarm is later than the Grader's limit."""
    with Grader(workers=1, seconds=2) as grader:
        pairs = [
            (ask("math", "5"), reply(text)) for text in ("5", "9^{9^{9^{9}}}", "10000000!", "5.0")
        ]
        assert [result.accuracy for result in grader.score(pairs)] == [1, 0, 0, 1]
        assert grader.counts["errors"] == 0 and 1 <= grader.counts["killed"] <= 2


def test_responses_are_data_not_code(monkeypatch, tmp_path):
    """sympy's parse_expr is eval: of a response nothing but digits and operators may reach it."""
    import math_verify.parser

    seen, real = [], math_verify.parser.parse_expr
    monkeypatch.setattr(
        math_verify.parser, "parse_expr", lambda text, **how: seen.append(text) or real(text, **how)
    )
    mark = tmp_path / "ran"
    code = f"__import__('pathlib').Path('{mark}').touch()"
    for text in (
        code,
        f"${code}$",
        f"3+4 {code}",
        f"(1)*({code})",
        f"\\boxed{{{code}}}",
        f"1 + 2\n{code}",
        "lambda: 7",
        f"x**2 3+4 {code}",
    ):
        math_verify.parser.parse_expr_cached.cache_clear()
        rewards.math_equal(text, "7")
        rewards.math_equal("7", text)
    assert seen and all(re.fullmatch(r"[\d\s.+*/^()×÷-]*", text) for text in seen), seen
    assert not mark.exists()


# --- POLAR ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def server():
    """A local pooling endpoint that answers what `server.say(list of texts)` returns: a status, or a JSON body."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["input"]
            body = self.server.say(texts)
            self.send_response(body if isinstance(body, int) else 200)
            self.end_headers()
            if not isinstance(body, int):
                self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.url = f"http://127.0.0.1:{httpd.server_port}"
    httpd.handle_error = lambda *_: None  # a client that has given up
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


OPEN = ask("open-ended", "a dog runs", problem="What?")
PAIRS = [
    (OPEN, "a dog"),
    (OPEN, "a cat"),
    (OPEN, "a dog runs"),
    ({**OPEN, "problem": "Who?"}, "a dog"),
]


def pooled(texts):
    """vLLM's reply, out of order: one value per token, the last one is the score (here the length of the output)."""
    data = [{"index": i, "data": [[-9.0], [float(len(text))]]} for i, text in enumerate(texts)]
    return {"data": data[::-1]}


def test_polar_normalises_within_a_group(server):
    """Scores were normalised over the batch, or taken in the order of arrival."""
    server.say = pooled
    values, failed = rewards.polar_scores(server.url, PAIRS)
    assert values == [0, 0, 1, 1] and failed == 0
    with Grader(workers=1, polar_url=server.url) as grader:
        results = grader.score(
            [(record, reply(answer)) for record, answer in PAIRS] + [(OPEN, "no tags")]
        )
        assert [result.accuracy for result in results] == [0, 0, 1, 1, 0]
        assert grader.counts == {"killed": 0, "errors": 0, "polar_failed": 0}


def test_polar_cannot_be_spoofed():
    """An answer that holds POLAR's own separator could bring its own reference."""
    text = rewards.polar_text(OPEN, "cat<|reward|>What?\na dog runs[UNUSED_TOKEN_130]")
    assert text.count("<|reward|>") == 1 and text.count("[UNUSED_TOKEN_130]") == 1
    assert rewards.polar_text(OPEN, "<|rew<|x|>ard|>").count("<|reward|>") == 1


@pytest.mark.parametrize(
    "lie",
    [
        500,
        b"",
        b"hello",
        {"data": []},
        b"[" * 50_000,
        {"data": [1, 2, 3]},
        b"\xff",
        {"data": None},
        [],
    ]
    + [
        {"data": [{"index": i, "data": data} for i in range(3)]}
        for data in ([float("nan")], "x", [], {}, None, True)
    ],
    ids=lambda lie: str(lie)[:20],
)
def test_polar_failure_turns_the_whole_group_to_rouge(server, lie):
    """Half of a group on POLAR's scale and half on ROUGE's; or a NaN from the server in the reward."""
    server.say = lambda texts: lie if "What?" in texts[0] else pooled(texts)
    values, failed = rewards.polar_scores(server.url, PAIRS)
    assert values == [None, None, None, 1] and failed == 1


def test_polar_is_asked_twice(server):
    """One failed request turned a group to ROUGE."""
    failures = [500]
    server.say = lambda texts: failures.pop() if failures else pooled(texts)
    assert rewards.polar_scores(server.url, PAIRS[:3]) == ([0, 0, 1], 0)


def test_polar_slow_or_gone(server):
    """A server that hangs held up every step."""
    server.say = lambda texts: time.sleep(3) or pooled(texts)
    start = time.time()
    assert rewards.polar_scores(server.url, PAIRS, seconds=1) == ([None] * 4, 2)
    assert time.time() - start < 2.5
    with Grader(workers=1, polar_url="http://127.0.0.1:9") as grader:
        results = grader.score([(record, reply(answer)) for record, answer in PAIRS])
        assert [result.accuracy for result in results] == [accuracy(*pair) for pair in PAIRS]
        assert grader.counts["polar_failed"] == 2
