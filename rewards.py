"""Response -> reward: how each of the ten tasks is graded, for training and evaluation alike.

    reward = 0.9 * accuracy + 0.1 * format + structure          accuracy in [0, 1], format 0 or 1, structure in [0, 0.5]

A response must be one <think> block, then one <answer> block, and nothing else; otherwise all three parts are 0.
Coordinates are 0-1000 of the width and height, times are seconds. Read the examples: `python rewards.py` runs them.

Where this departs from the release (arXiv 2512.03043), and why:
1. Tags are strict. The release takes several blocks, grades the first answer, and gives accuracy without any tags.
2. Text is graded as written. The release removes spaces around "<", ">" and "/" from the answer but not from the truth.
3. A choice may be written as people write it: "B", "(b)", "Answer: B", "B. the dog". The release takes the bare letter.
4. JSON numbers are finite numbers. The release turns NaN into a NaN reward, and reads true and "12" as numbers.
5. Spatial-temporal boxes are averaged over the true seconds (the release: over the seconds that both sides have, so
   that one right box of five scores as five), and the share of seconds counts for structure only if the schema holds.
6. Relative accuracy is exact on decimal ties, and math without dollars gets them (else \\sqrt{3} is not itself).
The time kernel of video segmentation is the release's exp(-|dt|/2); the paper has a Gaussian with a sigma of 1 s.
"""

import http.client
import itertools
import json
import logging
import math
import os
import queue
import re
import resource
import select
import signal
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from subprocess import PIPE, Popen
from typing import NamedTuple

import numpy as np

NUMBERS = {int, float}  # not bool
TEXT_TYPES = ("multiple choice", "numerical", "math", "regression", "OCR", "open-ended")
JSON_TYPES = (
    "temporal grounding",
    "spatial grounding",
    "spatial-temporal grounding",
    "tracking",
    "segmentation",
)
PROBLEM_TYPES = TEXT_TYPES + JSON_TYPES
SLOW_TYPES = ("math", "open-ended", "OCR")  # graded in worker processes


class Score(NamedTuple):
    reward: float = 0.0  # 0.9 * accuracy + 0.1 * format + structure, in [0, 1.5]
    accuracy: float = 0.0  # in [0, 1]
    format: float = 0.0  # 1.0 if the tags are right
    structure: float = 0.0  # in [0, 0.5]


# ----------------------------------------------------------------------------------------------------------------------
# Reading: tags, JSON, choices, numbers


def parse_response(text):
    """The answer of a well-formed response, stripped of outer white space; None if the tags are wrong.

    >>> parse_response("<think>2 legs</think> <answer> B </answer>"), parse_response("<think>2 legs</think> B")
    ('B', None)
    """
    if any(text.count(tag) != 1 for tag in ("<think>", "</think>", "<answer>", "</answer>")):
        return None
    match = re.fullmatch(r"\s*<think>.*</think>\s*<answer>(.*)</answer>\s*", text, re.DOTALL)
    return match[1].strip() if match else None


def find_answer(text):
    """The answer as a lenient reader finds it (evaluation): the last answer block after the thinking, an unclosed one,
    or else all that follows the thinking; without a Markdown fence. None if there is nothing.

    >>> find_answer('<think>Hm.</think> So: <answer>```json\\n{"time": [1, 2]}\\n```</answer>')
    '{"time": [1, 2]}'
    >>> find_answer("The answer is B."), find_answer("<think>It could be B")
    ('The answer is B.', None)
    """
    if not isinstance(text, str) or (
        "<think>" in text and "</think>" not in text and "<answer>" not in text
    ):
        return None  # cut off in mid-thought: a thought is no answer
    text = (
        text.rpartition("</think>")[2].rpartition("<answer>")[2].partition("</answer>")[0].strip()
    )
    return re.sub(r"^```(?:json\b|\w+\n)?|```$", "", text).strip() or None


_STRICT = json.JSONDecoder(parse_constant=int)  # NaN and Infinity are no JSON: int("NaN") raises


@lru_cache(256)  # the truth is read once per group, the answer once for accuracy and structure
def read_json(text):
    """The JSON object that `text` is; {} if it is anything else. Of duplicate keys the last one counts. The result is
    shared: do not change it.

    >>> read_json('{"time": [1, 2], "time": [3, 4]}'), read_json('{"time": NaN}'), read_json("[" * 50000)
    ({'time': [3, 4]}, {}, {})
    """
    try:
        value = _STRICT.decode(text)
    except (
        ValueError,
        RecursionError,
    ):  # ValueError: no JSON, or an integer of more than 4,300 digits
        return {}
    return value if isinstance(value, dict) else {}


def truth_of(record):
    """The true answer of a record as text: `answer` or `solution`, without its <answer> tags.

    >>> truth_of({"solution": "<answer>B</answer>"})
    'B'
    """
    truth = next((record[key] for key in ("answer", "solution") if record.get(key) is not None), "")
    truth = truth if isinstance(truth, str) else json.dumps(truth)
    return (
        truth.partition("<answer>")[2].partition("</answer>")[0].strip()
        if "<answer>" in truth
        else truth.strip()
    )


def plain(text):
    """Text on one line, without Markdown emphasis and without "The answer is" in front."""
    lead = r"((the |my )?(correct |final |best )?(answer|option|choice)\b( is\b)?[:*_ ]*){0,2}"
    text = " ".join(text.split()).strip("*_` ")
    return text[re.match(lead, text, re.IGNORECASE).end() :].strip("*_` ")


def read_choice(text, options=()):
    """The letter that `text` chooses, or None if it names none or several. options: list of "A. the cat" or "the cat".

    >>> [read_choice(t) for t in ("B", "(b)", "B.", "Answer: B", "Option B", "**B**", "B. the dog")]
    ['B', 'B', 'B', 'B', 'B', 'B', 'B']
    >>> [read_choice(t) for t in ("Based on this, A", "A or B", "A, B", "ABCD", "a dog", "")]
    [None, None, None, None, None, None]
    >>> read_choice("the dog", ["A. the cat", "B. the dog"])
    'B'
    """
    text = plain(text[:2000].replace("**", "")).strip("$\"' ")
    name, whole, body = text.casefold().rstrip("."), {}, {}
    for letter, option in zip("abcdefghijklmnopqrstuvwxyz", options or ()):
        option = " ".join(str(option).split()).casefold().rstrip(".")
        whole[option] = body[re.sub(rf"^\(?{letter}[).:] ?", "", option)] = letter.upper()
    if (
        len(name) > 1 and name in whole
    ):  # all of an option's text, which may itself look like a letter
        return whole[name]
    # A letter, maybe in brackets; then the end, or a mark that is not followed by a second letter.
    mark = r"(?:[)\]}.:;]| [-–—] )(?! ?[(\[]?(?:(?:and|or)\b|[a-z](?:$|[)\]}.:;,/])))|,(?= ?(?!(?:and|or)\b)[a-z]{2})"
    match = re.match(rf"(?:\\boxed)?[(\[{{]?([a-z])(?:$|{mark})", text, re.IGNORECASE)
    return match[1].upper() if match else body.get(name)


def read_number(text):
    """The number that `text` is (as a Decimal), or None. Thousands commas, a currency sign, % and ° may be there.

    >>> read_number("1,234.50"), read_number("$-5$"), read_number("40%"), read_number("6.0e23")
    (Decimal('1234.50'), Decimal('-5'), Decimal('40'), Decimal('6.0E+23'))
    >>> [read_number(t) for t in ("nan", "1e400", "12 cats", "1,23", "9" * 5000, "")]
    [None, None, None, None, None, None]
    """
    text = plain(text.replace("−", "-")) if len(text) <= 200 else ""
    digits = r"([+-]?(?=\.?\d)(?:\d{1,3}(?:,\d{2,3})*,\d{3}|\d*)(?:\.\d*)?(?:e[+-]?\d{1,2})?)"
    match = re.fullmatch(rf"\\?[$€£]? ?{digits} ?\\?[%°]?\$?", text, re.IGNORECASE | re.ASCII)
    return Decimal(match[1].replace(",", "")) if match else None


# ----------------------------------------------------------------------------------------------------------------------
# Metrics: p is the prediction, y the truth


def mean_relative_accuracy(p, y):
    """Share of the thresholds c in {0.50, 0.55, .., 0.95} with |p - y| / |y| < 1 - c, exact on ties.

    >>> mean_relative_accuracy(90, 100)  # the error 0.1 is below 0.5, 0.45, .., 0.15, not below 0.1
    0.8
    """
    p, y = Fraction(str(p)), Fraction(str(y))
    if y == 0:  # nothing is near it
        return float(p == 0)
    return sum(20 * abs(p - y) < k * abs(y) for k in range(1, 11)) / 10


def word_error_rate(p, y):
    """Word edits that turn text p into text y, per word of y (can exceed 1). Rows of the edit table are vectors.

    >>> word_error_rate("the dark room", "the dog park")
    0.6666666666666666
    """
    p, y = p.split(), y.split()
    ids = {word: i for i, word in enumerate({*p, *y})}
    p, steps = np.array([ids[word] for word in p]), np.arange(len(p) + 1)
    row = steps
    for i, word in enumerate(y):
        change = np.minimum(
            row[1:] + 1, row[:-1] + (p != ids[word])
        )  # leave the word out, or put p's in its place
        row = (
            np.minimum.accumulate(np.concatenate(([i + 1], change)) - steps) + steps
        )  # words of p too many: 1 each
    return float(row[-1]) / max(1, len(y))


def rouge(p, y):
    """Mean F of ROUGE-1, ROUGE-2 and ROUGE-L with stemming. No pair of words in y means no ROUGE-2: one word scores
    2/3 at most, as in the release. Bounded: reads 20,000 characters, and 40 letters of a word.

    >>> rouge("a dog runs", "A dog runs."), round(rouge("cat", "cat"), 4)
    (1.0, 0.6667)
    """
    from rouge_score.rouge_scorer import RougeScorer

    p, y = (re.sub(r"([A-Za-z0-9]{40})[A-Za-z0-9]+", r"\1", text[:20_000]) for text in (p, y))
    scores = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(y, p)
    return sum(part.fmeasure for part in scores.values()) / 3


def math_equal(p, y):
    """Symbolic equivalence by math-verify, which gives up after 5 s where Python still listens (hence `Grader`).
    Main thread of a process only, since it uses SIGALRM.

    >>> math_equal("0.5", "$\\\\frac{1}{2}$"), math_equal("30^\\\\circ", "30"), math_equal("2", "\\\\sqrt{3}")
    (True, True, False)
    """
    if p.split() == y.split():
        return True
    if max(len(p), len(y)) > 2000:
        return False
    from math_verify import parse, verify

    parsed = []
    for text in (y, p):
        text = plain(text).replace("\\$", "")
        if text.count("$") < 2 and "\\(" not in text and "\\[" not in text:
            text = "$" + text.replace("$", "") + "$"
        parsed.append(
            parse(text)
        )  # by a grammar; where that fails by sympy's eval, but digits and operators only
    return bool(verify(*parsed))


def is_number(x):
    """A finite JSON number, not true, not "12"; at most 1e9 in size, so that products stay finite."""
    return are_numbers([x], 1)


def are_numbers(x, n):
    """A list of n such numbers.

    >>> are_numbers([0, 2.5], 2), are_numbers([0, "2.5"], 2), are_numbers([0, True], 2), are_numbers([0, 1e999], 2)
    (True, False, False, False)
    """
    if type(x) is not list or len(x) != n:
        return False
    for v in x:  # not all(): most of the time of grading a track goes here
        if type(v) not in NUMBERS or not -1e9 <= v <= 1e9:
            return False
    return True


def iou_1d(p, y):
    """Intersection over union of two spans [start, end]; 0 if one is malformed, reversed or both are empty.

    >>> iou_1d([0, 4], [2, 6])
    0.3333333333333333
    """
    if not (are_numbers(p, 2) and are_numbers(y, 2)):
        return 0.0
    union = max(p[1], y[1]) - min(p[0], y[0])
    return max(0.0, min(p[1], y[1]) - max(p[0], y[0])) / union if union > 0 else 0.0


def iou_box(p, y):
    """Intersection over union of two boxes [x1, y1, x2, y2]; 0 if one is malformed, reversed or empty.

    >>> iou_box([0, 0, 10, 10], [0, 5, 10, 15])
    0.3333333333333333
    """
    if not (are_numbers(p, 4) and are_numbers(y, 4)):
        return 0.0
    (a, b, c, d), (e, f, g, h) = p, y
    width = (c if c < g else g) - (a if a > e else e)
    height = (d if d < h else h) - (b if b > f else f)
    both = width * height if width > 0 and height > 0 else 0.0
    union = (c - a) * (d - b) + (g - e) * (h - f) - both
    return both / union if union > 0 else 0.0


def mean_box_iou(p, y, over="truth"):
    """Mean box IoU of {"second": box} dicts, over the true seconds (a missing box counts 0), or over="shared": only
    those that both sides have, which the release uses for spatial-temporal grounding.

    >>> truth = {"3": [0, 0, 10, 10], "4": [0, 0, 10, 10]}
    >>> mean_box_iou({"3": [0, 0, 10, 10]}, truth), mean_box_iou({"3": [0, 0, 10, 10]}, truth, over="shared")
    (0.5, 1.0)
    """
    if not (isinstance(p, dict) and isinstance(y, dict)):
        return 0.0
    seconds = [k for k in y if k in p] if over == "shared" else y
    return sum(iou_box(p.get(k), y[k]) for k in seconds) / max(1, len(seconds))


def are_points(x):
    """Exactly three points [x, y]."""
    return type(x) is list and len(x) == 3 and all(are_numbers(point, 2) for point in x)


def point_kernel(p, y, sigma=50.0):
    """G = exp(-d^2 / (2 sigma^2)), d = mean distance of three points [x, y] to three under the best of the 6 matchings.

    >>> round(point_kernel([[250, 0], [50, 0], [150, 0]], [[0, 0], [100, 0], [200, 0]]), 4)  # all off by one sigma
    0.6065
    """
    d = min(sum(map(math.dist, order, y)) for order in itertools.permutations(p)) / 3
    return math.exp(-(d**2) / (2 * sigma**2))


def segmentation_accuracy(p, y, video):
    """Box, points and (video) time of the prompt for SAM2, weighted; 0 without 3 + 3 points or a video's time.

    >>> y = {"boxes": [0, 0, 9, 9], "positive_points": [[1, 1], [2, 2], [3, 3]], "negative_points": [[9, 1]] * 3}
    >>> segmentation_accuracy(y, y, video=False), segmentation_accuracy(y, y, video=True)
    (1.0, 0.0)
    """
    signs = ("positive_points", "negative_points")
    if not all(are_points(side.get(sign)) for side in (p, y) for sign in signs):
        return 0.0
    box = iou_box(p.get("boxes"), y.get("boxes"))
    positive, negative = (point_kernel(p[sign], y[sign]) for sign in signs)
    if not video:
        return 0.5 * box + 0.25 * positive + 0.25 * negative
    if not (is_number(p.get("time")) and is_number(y.get("time"))):
        return 0.0
    return (
        0.3 * box
        + 0.3 * math.exp(-abs(p["time"] - y["time"]) / 2)
        + 0.2 * positive
        + 0.2 * negative
    )


# ----------------------------------------------------------------------------------------------------------------------
# POLAR: a reward model for open-ended answers, served by
#     vllm serve internlm/POLAR-7B --runner pooling --trust-remote-code --port 8100


def polar_text(record, answer):
    """What POLAR reads: question and truth against question and answer. The answer must not bring special tokens.

    >>> polar_text({"problem": "Who?", "answer": "Ann"}, "Bob")
    'Who?\\nAnn<|reward|>Who?\\nBob[UNUSED_TOKEN_130]'
    """
    problem = record.get("problem", "")
    answer = re.sub(r"<\|[^|]*\|>|\[UNUSED_TOKEN_\d+\]", " ", answer[:20_000])
    return f"{problem}\n{truth_of(record)}<|reward|>{problem}\n{answer}[UNUSED_TOKEN_130]"


def ask_polar(url, texts, seconds):
    """One request to vLLM's pooling endpoint: list of text -> list of raw scores; None if the server fails or lies, or
    takes longer than `seconds`. A score is the last number of an item: the last token's value."""
    body = json.dumps(
        {"input": texts, "use_activation": False}
    ).encode()  # False: no sigmoid over the score
    request = urllib.request.Request(
        f"{url.rstrip('/')}/pooling", body, {"Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({})
    )  # no proxy between the machines of a run
    try:
        with opener.open(request, timeout=seconds) as response:
            items = json.loads(response.read(2**26))["data"]
        scores = [item["data"] for item in sorted(items, key=lambda item: item["index"])]
        while any(isinstance(values, list) for values in scores):
            scores = [values[-1] for values in scores]
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, RecursionError):
        return None
    return scores if are_numbers(scores, len(texts)) else None


def polar_scores(url, pairs, seconds=60.0):
    """Accuracy of open-ended answers by POLAR: list of (record, answer) -> list of values in [0, 1], in order, and the
    number of groups that failed. A group is the answers to one prompt: one request each, all at once, and the scores
    are min-max normalised within it (all 1 if all are equal). Where the server fails, the values of the whole group are
    None (never a mix: raw scales differ)."""
    groups = {}
    for i, (record, _) in enumerate(pairs):
        groups.setdefault((record.get("problem"), truth_of(record)), []).append(i)
    texts = [[polar_text(*pairs[i]) for i in group] for group in groups.values()]
    ask_twice = lambda texts: (
        ask_polar(url, texts, seconds / 2) or ask_polar(url, texts, seconds / 2)
    )
    values, failed = [None] * len(pairs), 0
    with ThreadPoolExecutor(len(texts) or 1) as pool:
        for group, scores in zip(groups.values(), pool.map(ask_twice, texts)):
            failed += scores is None
            for i, raw in zip(group, scores or []):
                low, high = min(scores), max(scores)
                values[i] = (raw - low) / (high - low) if high > low else 1.0
    return values, failed


# ----------------------------------------------------------------------------------------------------------------------
# Grading


def accuracy(record, answer):
    """How right an answer (text inside the tags) is, in [0, 1]. Training and evaluation both grade with this.

    >>> accuracy({"problem_type": "temporal grounding", "answer": '{"time": [2, 6]}'}, '{"time": [0, 4]}')
    0.3333333333333333
    """
    kind, truth = record["problem_type"], truth_of(record)
    if kind not in PROBLEM_TYPES:
        raise ValueError(f"problem_type is {kind!r}, expected one of {PROBLEM_TYPES}")
    if not isinstance(answer, str):
        return 0.0
    if kind == "multiple choice":
        options = record.get("options")
        letter = read_choice(truth, options)
        return float(
            read_choice(answer, options) == letter
            if letter
            else answer.casefold() == truth.casefold()
        )
    if kind in ("numerical", "regression"):
        p, y = read_number(answer), read_number(truth)
        if p is None or y is None:
            return 0.0
        if kind == "regression":
            return mean_relative_accuracy(p, y)
        return float(
            round(float(p), 2) == round(float(y), 2)
        )  # rounds the binary float, as the release does
    if kind == "math":
        return float(math_equal(answer, truth))
    if kind == "OCR":
        return max(0.0, 1 - word_error_rate(answer, truth))
    if kind == "open-ended":
        return rouge(answer, truth)

    p, y = read_json(answer), read_json(truth)
    if kind == "temporal grounding":
        return iou_1d(p.get("time"), y.get("time"))
    if kind == "spatial grounding":
        return iou_box(p.get("boxes"), y.get("boxes"))
    if kind == "spatial-temporal grounding":
        return 0.5 * iou_1d(p.get("time"), y.get("time")) + 0.5 * mean_box_iou(
            p.get("boxes"), y.get("boxes")
        )
    if kind == "tracking":
        return mean_box_iou(p.get("boxes"), y.get("boxes"))
    return segmentation_accuracy(p, y, video=record.get("data_type") != "image")


def structure(record, answer):
    """How well an answer keeps to the task's JSON schema, in [0, 0.5]. Free text has no schema: 0.5.

    >>> truth = {"problem_type": "tracking", "answer": '{"boxes": {"1": [0, 0, 9, 9], "2": [0, 0, 9, 9]}}'}
    >>> structure(truth, '{"boxes": {"1": [1, 2, 3, 4]}}')  # 0.25 for the schema, 0.25 * share of the true seconds
    0.375
    """
    kind = record["problem_type"]
    if kind in TEXT_TYPES:
        return 0.5
    p = read_json(answer)
    boxes, span = p.get("boxes"), are_numbers(p.get("time"), 2)
    if kind == "temporal grounding":
        return 0.5 * span
    if kind == "spatial grounding":
        return 0.5 * are_numbers(boxes, 4)
    if kind == "segmentation":
        points = are_points(p.get("positive_points")) and are_points(p.get("negative_points"))
        timed = record.get("data_type") == "image" or is_number(p.get("time"))
        return 0.5 * (are_numbers(boxes, 4) and points and timed)
    track = isinstance(boxes, dict) and all(are_numbers(box, 4) for box in boxes.values())
    if not track or (kind == "spatial-temporal grounding" and not span):
        return 0.0
    seconds = read_json(truth_of(record)).get("boxes")
    seconds = seconds if isinstance(seconds, dict) else {}
    return 0.25 + 0.25 * sum(k in boxes for k in seconds) / max(1, len(seconds))


def total(accuracy, structure):
    """The score of a response with the right tags."""
    return Score(0.9 * accuracy + 0.1 + structure, accuracy, 1.0, structure)


def score(record, response):
    """Grade one response here and now. Math can take 15 s or, on hostile text, hang: use `Grader` for model output.

    >>> record = {"problem_type": "numerical", "answer": "3"}
    >>> score(record, "<think>1 + 2</think><answer>3</answer>").reward, score(record, "3").reward
    (1.5, 0.0)
    """
    answer = parse_response(response)
    return Score() if answer is None else total(accuracy(record, answer), structure(record, answer))


def readable(record, answer):
    """Whether an answer says anything in the terms of its task, right or wrong.

    >>> readable({"problem_type": "numerical"}, "12"), readable({"problem_type": "numerical"}, "a dozen")
    (True, False)
    """
    kind = record["problem_type"]
    if not answer:
        return False
    if kind == "multiple choice":
        return read_choice(answer, record.get("options")) is not None
    if kind in ("numerical", "regression"):
        return read_number(answer) is not None
    return kind not in JSON_TYPES or structure(record, answer) > 0


def gradable(record):
    """Why no answer to this record could be graded, or "". Free text and math are not tried.

    >>> gradable({"problem_type": "temporal grounding", "answer": '{"time": [6, 2]}'})
    'scores 0.00 against itself'
    """
    kind, truth = record["problem_type"], truth_of(record)
    if kind == "multiple choice" and record.get("options"):
        return "" if read_choice(truth, record["options"]) else "is none of the options"
    if kind in ("numerical", "regression"):
        return "" if read_number(truth) is not None else "is no number"
    if kind not in JSON_TYPES or not truth and record.get("segmentation_output"):  # masks alone
        return ""
    y = read_json(truth)
    if not y:
        return "is no JSON object of finite numbers"
    value = accuracy(record, truth)
    if value < 1 - 1e-9 or structure(record, truth) < 0.5:
        return f"scores {value:.2f} against itself"
    boxes = y.get("boxes", [])
    boxes = list(boxes.values()) if isinstance(boxes, dict) else [boxes]
    places = boxes + y.get("positive_points", []) + y.get("negative_points", [])
    inside = all(0 <= v <= 1000 for place in places for v in place)
    return "" if inside else "has coordinates outside 0-1000"


_STATED = re.compile(  # "the answer is (B)", "Option: B"; not "the answer is a dog", "answer A or B", "Answer: BC"
    r"(?i:answer|option|choice)\b(?:(?!\b[A-Z]\b)[^.\n]){0,20}?[\s:*(\[{]([A-Z])(?![\w'])(?!\W{1,3}(?:(?:or|and)\b|[A-Z]\b))"
    r"(?!(?<=[AI]) (?!because|since|as\b)[a-z])"
)


def answer_of(record, response):
    """find_answer; in a multiple choice whose tags hold no choice, the last letter that is stated after the thinking.

    >>> answer_of({"problem_type": "multiple choice", "options": ["A. a cat", "B. a dog"]}, "It barks. So the answer is (B).")
    'B'
    """
    answer = find_answer(response)
    if answer is None or record["problem_type"] != "multiple choice" or readable(record, answer):
        return answer
    stated = []
    for line in response.rpartition("</think>")[2].splitlines():
        stated += _STATED.findall(line)
        bare = line.strip("*_$ ").removesuffix(".")
        stated += [read_choice(line)] * bool(re.fullmatch(r"(?:\\boxed)?[({\[]?[A-Z][)}\]]?", bare))
    return stated[-1] if stated else answer


class Grader:
    """Grades lists of responses, in order, whatever the model wrote.

    Math, ROUGE and OCR go to worker processes (`python rewards.py --worker`), since sympy can hang in C code where no
    Python time limit reaches; the rest takes microseconds, linear in the text. A worker that overruns `seconds` is killed
    and replaced, its item scores 0; one that dies is replaced and the item tried once more. Workers start in the
    background, and one thread for each waits for its replies.
    counts: {"killed": overran, "errors": worker deaths}, and "polar_failed" (groups) if polar_url is given.

    >>> with Grader(workers=1) as grader:
    ...     grader.score([({"problem_type": "math", "answer": "1/2"}, "<think>.</think><answer>0.5</answer>")])
    [Score(reward=1.5, accuracy=1.0, format=1.0, structure=0.5)]
    """

    command = (sys.executable, os.path.abspath(__file__), "--worker")

    def __init__(self, workers=2, seconds=10.0, polar_url=None):
        self.seconds, self.polar_url = seconds, polar_url
        self.counts = {"killed": 0, "errors": 0} | ({"polar_failed": 0} if polar_url else {})
        self.idle = queue.Queue()  # worker processes that wait for an item
        self.pool = ThreadPoolExecutor(workers)
        self.starting = [self.pool.submit(self._start) for _ in range(workers)]

    def score(self, pairs):
        """list of (record, response) -> list of Score."""
        pairs = [(record, parse_response(response)) for record, response in pairs]
        graded = zip(pairs, self.accuracies(pairs))
        return [
            Score() if pair[1] is None else total(value, structure(*pair)) for pair, value in graded
        ]

    def accuracies(self, pairs):
        """list of (record, answer or None) -> list of accuracy: `accuracy`, safely."""
        values = [
            None if a is not None and r["problem_type"] in SLOW_TYPES else accuracy(r, a)
            for r, a in pairs
        ]
        if self.polar_url:
            asked = [
                i
                for i, value in enumerate(values)
                if value is None and pairs[i][0]["problem_type"] == "open-ended"
            ]
            scores, failed = polar_scores(self.polar_url, [pairs[i] for i in asked])
            self.counts["polar_failed"] += failed
            for i, value in zip(asked, scores):
                values[i] = value
        slow = [i for i, value in enumerate(values) if value is None]
        for start in self.starting if slow else ():
            start.result()  # raises if the worker could not start: a broken grader is not a wrong answer
        for i, (value, killed, errors) in zip(
            slow, self.pool.map(self._grade, [pairs[i] for i in slow])
        ):
            values[i] = value
            self.counts["killed"] += killed
            self.counts["errors"] += errors
        return values

    def _grade(self, pair):
        """One slow item, in one of the pool's threads -> accuracy, kills, worker deaths."""
        record, answer = pair
        line = json.dumps(
            [{"problem_type": record["problem_type"], "answer": truth_of(record)}, answer]
        )
        for errors in range(2):
            worker = self.idle.get(timeout=300)
            try:
                print(line, file=worker.stdin, flush=True)
                value = float(self._reply(worker, self.seconds))
                self.idle.put(worker)
                return value, 0, errors
            except (
                TimeoutError,
                BrokenPipeError,
                ValueError,
            ) as error:  # it hangs, or died before or after it read
                worker.kill()
                worker.communicate()  # closes the pipes and waits for the end
                self._start()
                if isinstance(error, TimeoutError):
                    return 0.0, 1, errors
        return 0.0, 0, 2

    def _start(self):
        command, env = [*self.command, str(self.seconds)], os.environ | {"OMP_NUM_THREADS": "1"}
        worker = Popen(
            command, stdin=PIPE, stdout=PIPE, text=True, env=env, start_new_session=True
        )  # deaf to Ctrl-C
        if self._reply(worker, 120) != "ready\n":  # its imports do not count as grading time
            raise RuntimeError(f"a grading worker ended before it was ready: {self.command}")
        self.idle.put(worker)

    def _reply(self, worker, seconds):
        poll = select.poll()
        poll.register(worker.stdout, select.POLLIN)
        if not poll.poll(1000 * seconds):
            raise TimeoutError(f"no reply in {seconds} s")
        return worker.stdout.readline()

    def close(self, *_):
        self.pool.shutdown(cancel_futures=True)
        while not self.idle.empty():
            worker = self.idle.get()
            worker.kill()
            worker.communicate()

    def __enter__(self):
        return self

    __exit__ = close


def work(seconds):
    """A worker: reads one JSON line [record, answer], writes one line with the accuracy, and so on until the pipe ends.
    Should its Grader vanish while it hangs, the kernel ends it after 2 * seconds of CPU time (SIGPROF)."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    resource.setrlimit(
        resource.RLIMIT_AS, (2**32, 2**32)
    )  # 4 GiB: huge integers must not take the machine down
    math_equal("1", "2"), rouge("", "")  # imports
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, 2 * seconds)
        print(accuracy(*json.loads(line)), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(float(sys.argv[2]))
    else:
        import doctest

        print(doctest.testmod())
