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

Everything but math, ROUGE and OCR takes time linear in the text. Those three run in `Grader`'s worker processes.
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
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

LIMIT = 1e9  # no coordinate, second or reward-model score is larger; also keeps products finite
NUMBERS = {int, float}  # not bool
TEXT_TYPES = ("multiple choice", "numerical", "math", "regression", "ocr", "open-ended")
JSON_TYPES = ("temporal grounding", "spatial grounding", "spatial-temporal grounding", "tracking", "segmentation")
SLOW_TYPES = ("math", "open-ended", "ocr")  # graded in worker processes


class Score(NamedTuple):
    reward: float  # 0.9 * accuracy + 0.1 * format + structure, in [0, 1.5]
    accuracy: float  # in [0, 1]
    format: float  # 1.0 if the tags are right
    structure: float  # in [0, 0.5]


# ----------------------------------------------------------------------------------------------------------------------
# Reading: tags, JSON, choices, numbers


def parse_response(text):
    """The answer of a well-formed response, stripped of outer white space; None if the tags are wrong.

    >>> parse_response("<think>Two legs.</think> <answer> B </answer>")
    'B'
    >>> parse_response("<think>a</think><answer>B</answer><answer>C</answer>") is None
    True
    """
    if not isinstance(text, str) or any(
        text.count(tag) != 1 for tag in ("<think>", "</think>", "<answer>", "</answer>")
    ):
        return None
    match = re.fullmatch(r"\s*<think>.*</think>\s*<answer>(.*)</answer>\s*", text, re.DOTALL)
    return match[1].strip() if match else None


def find_answer(text):
    """The answer as a lenient reader finds it (evaluation): the last answer block after the thinking, an unclosed one,
    or else all that follows the thinking; without a Markdown fence. None if there is nothing.

    >>> find_answer('<think>Hm.</think> So: <answer>```json\\n{"time": [1, 2]}\\n```</answer>')
    '{"time": [1, 2]}'
    >>> find_answer("The answer is B.")
    'The answer is B.'
    >>> find_answer("<think>It could be B") is None
    True
    """
    if not isinstance(text, str) or ("<think>" in text and "</think>" not in text and "<answer>" not in text):
        return None  # cut off in mid-thought: a thought is no answer
    text = text.rpartition("</think>")[2].rpartition("<answer>")[2].partition("</answer>")[0].strip()
    if text.startswith("```") and text.endswith("```"):
        text = re.sub(r"^\w*\s", "", text.strip("`")).strip()
    return text or None


def _refuse(constant):
    raise ValueError(f"{constant} is not a number")


def _finite(text):
    return float(text) if abs(float(text)) <= LIMIT else _refuse(text)


_DECODER = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite)


@lru_cache(256)  # the truth is read once per group, the answer once for accuracy and structure
def read_json(text):
    """The JSON value of `text`, or None if it is no JSON, holds NaN, Infinity or a huge number, or nests too deep.
    Of duplicate keys the last one counts. The result is shared: do not change it.

    >>> read_json('{"time": [1, 2.5], "time": [3, 4]}')
    {'time': [3, 4]}
    >>> read_json('{"time": [0, NaN]}'), read_json("[" * 50000), read_json("1e400")
    (None, None, None)
    """
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError):  # ValueError: no JSON, or an integer of more than 4,300 digits
        return None


def truth_of(record):
    """The true answer of a record as text: `answer` or `solution`, without its <answer> tags.

    >>> truth_of({"solution": "<answer>B</answer>"})
    'B'
    """
    truth = next((record[key] for key in ("answer", "solution") if record.get(key) is not None), "")
    truth = truth if isinstance(truth, str) else json.dumps(truth)
    return truth.partition("<answer>")[2].partition("</answer>")[0].strip() if "<answer>" in truth else truth.strip()


_LEAD = re.compile(
    r"(?:(?:the |my )?(?:correct |final |best )?(?:answer|option|choice)\b(?: is\b)?[:*_ ]*){0,2}", re.IGNORECASE
)


def _plain(text):
    """Without Markdown emphasis, line breaks, and "The answer is" in front."""
    text = " ".join(text.split()).strip("*_` ")
    return text[_LEAD.match(text).end() :].strip("*_` ")


_CHOICE = re.compile(  # a letter, maybe in brackets; then the end, or a mark that is not followed by a second letter
    r"(?:\\boxed)?[(\[{]?([a-z])(?:$|(?:[)\]}.:;]| [-–—] )(?! ?[(\[]?(?:(?:and|or)\b|[a-z](?:$|[)\]}.:;,/])))"
    r"|,(?= ?(?!(?:and|or)\b)[a-z]{2}))",
    re.IGNORECASE,
)


def read_choice(text, options=()):
    """The letter that `text` chooses, or None if it names none or several. options: list of "A. the cat" or "the cat".

    >>> [read_choice(t) for t in ("B", "(b)", "B.", "Answer: B", "Option B", "**B**", "B. the dog")]
    ['B', 'B', 'B', 'B', 'B', 'B', 'B']
    >>> [read_choice(t) for t in ("Based on this, A", "A or B", "A, B", "ABCD", "a dog", "")]
    [None, None, None, None, None, None]
    >>> read_choice("the dog", ["A. the cat", "B. the dog"])
    'B'
    """
    text = _plain(text[:2000].replace("**", "")).strip("$\"' ")
    name, match, whole, body = text.casefold().rstrip("."), _CHOICE.match(text), {}, {}
    for letter, option in zip("abcdefghijklmnopqrstuvwxyz", options or ()):
        option = " ".join(str(option).split()).casefold().rstrip(".")
        whole[option] = body[re.sub(rf"^\(?{letter}[).:] ?", "", option)] = letter.upper()
    if len(name) > 1 and name in whole:  # all of an option's text, which may itself look like a letter
        return whole[name]
    return match[1].upper() if match else body.get(name)


_NUMBER = re.compile(
    r"\\?[$€£]? ?([+-]?(?=\.?\d)(?:\d{1,3}(?:,\d{2,3})*,\d{3}|\d*)(?:\.\d*)?(?:e[+-]?\d{1,2})?) ?\\?[%°]?\$?",
    re.IGNORECASE | re.ASCII,
)


def read_number(text):
    """The number that `text` is (as a Decimal), or None. Thousands commas, a currency sign, % and ° may be there.

    >>> read_number("1,234.50"), read_number("$-5$"), read_number("40%"), read_number("6.0e23")
    (Decimal('1234.50'), Decimal('-5'), Decimal('40'), Decimal('6.0E+23'))
    >>> [read_number(t) for t in ("nan", "1e400", "12 cats", "1,23", "9" * 5000, "")]
    [None, None, None, None, None, None]
    """
    text = _plain(text.replace("−", "-")) if len(text) <= 200 else ""
    match = _NUMBER.fullmatch(text)
    return Decimal(match[1].replace(",", "")) if match else None


# ----------------------------------------------------------------------------------------------------------------------
# Metrics: p is the prediction, y the truth


def same_number(p, y):
    """Equal after rounding to 2 decimals (of the binary float, as the release has it).

    >>> same_number(Decimal("3.14159"), Decimal("3.14")), same_number(Decimal("3.1"), Decimal("3.14"))
    (True, False)
    """
    return round(float(p), 2) == round(float(y), 2)


def mean_relative_accuracy(p, y):
    """Share of the thresholds c in {0.50, 0.55, .., 0.95} with |p - y| / |y| < 1 - c, exact on ties.

    >>> mean_relative_accuracy(90, 100)  # the error 0.1 is below 0.5, 0.45, .., 0.15, not below 0.1
    0.8
    >>> mean_relative_accuracy(0, 0), mean_relative_accuracy(1, 0)
    (1.0, 0.0)
    """
    p, y = Fraction(str(p)), Fraction(str(y))
    if y == 0:
        return float(p == 0)
    return sum(20 * abs(p - y) < k * abs(y) for k in range(1, 11)) / 10


def word_error_rate(p, y):
    """Word edits that turn text p into text y, per word of y (can exceed 1). Rows of the edit table are vectors.

    >>> word_error_rate("the dark room", "the dog park")
    0.6666666666666666
    """
    p, y = p.split(), y.split()
    if abs(len(p) - len(y)) >= len(y):  # at least so many edits: 1 or more without looking, however long p is
        return abs(len(p) - len(y)) / max(1, len(y))
    ids = {word: i for i, word in enumerate({*p, *y})}
    p, steps = np.array([ids[word] for word in p]), np.arange(len(p) + 1)
    row = steps
    for i, word in enumerate(y):
        change = np.minimum(row[1:] + 1, row[:-1] + (p != ids[word]))  # leave the word out, or put p's in its place
        row = np.minimum.accumulate(np.concatenate(([i + 1], change)) - steps) + steps  # words of p too many: 1 each
    return float(row[-1]) / len(y)


@lru_cache(1)
def _rouge_scorer():
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def rouge(p, y):
    """Mean F of ROUGE-1, ROUGE-2 and ROUGE-L with stemming. No pair of words in y means no ROUGE-2: one word scores
    2/3 at most, as in the release. Bounded: reads 20,000 characters, and 40 letters of a word.

    >>> rouge("a dog runs", "A dog runs.")
    1.0
    >>> round(rouge("cat", "cat"), 4)
    0.6667
    """
    p, y = (re.sub(r"([A-Za-z0-9]{40})[A-Za-z0-9]+", r"\1", text[:20_000]) for text in (p, y))
    return sum(part.fmeasure for part in _rouge_scorer().score(y, p).values()) / 3


@lru_cache(256)
def _parse_math(text):
    from math_verify import parse

    text = _plain(text).replace("\\$", "")
    if text.count("$") < 2 and "\\(" not in text and "\\[" not in text:
        text = "$" + text.replace("$", "") + "$"
    return parse(
        text
    )  # by a grammar; where that fails by sympy's parse_expr, that is eval, but digits and operators only


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
    from math_verify import verify

    return bool(verify(_parse_math(y), _parse_math(p)))


def is_number(x):
    """A finite JSON number; not true, not "12".

    >>> is_number(3.5), is_number(True), is_number("12"), is_number(float("nan"))
    (True, False, False, False)
    """
    return type(x) in NUMBERS and -LIMIT <= x <= LIMIT


def are_numbers(x, n):
    """A list of n finite JSON numbers.

    >>> are_numbers([0, 2.5], 2), are_numbers([0, "2.5"], 2)
    (True, False)
    """
    if type(x) is not list or len(x) != n:
        return False
    for v in x:  # is_number, inlined: most of the time of grading a track goes here
        if type(v) not in NUMBERS or not -LIMIT <= v <= LIMIT:
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
    width = (c if c < g else g) - (a if a > e else e)  # noqa: FURB136 (calling min and max takes three times as long)
    height = (d if d < h else h) - (b if b > f else f)  # noqa: FURB136
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
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
    seconds = [k for k in y if k in p] if over == "shared" else list(y)
    return sum(iou_box(p.get(k), y[k]) for k in seconds) / max(1, len(seconds))


def are_points(x):
    """Exactly three points [x, y].

    >>> are_points([[1, 2], [3, 4], [5, 6]]), are_points([[1, 2], [3, 4]])
    (True, False)
    """
    return type(x) is list and len(x) == 3 and all(are_numbers(point, 2) for point in x)


def point_kernel(p, y, sigma=50.0):
    """G = exp(-d^2 / (2 sigma^2)), d = mean distance of three points to three under the best of the 6 matchings.

    >>> point_kernel([[5, 6], [1, 2], [3, 4]], [[1, 2], [3, 4], [5, 6]])
    1.0
    >>> round(point_kernel([[50, 0], [150, 0], [250, 0]], [[0, 0], [100, 0], [200, 0]]), 4)  # all off by one sigma
    0.6065
    """
    if not (are_points(p) and are_points(y)):
        return 0.0
    d = min(sum(map(math.dist, order, y)) for order in itertools.permutations(p)) / 3
    return math.exp(-(d**2) / (2 * sigma**2))


# ----------------------------------------------------------------------------------------------------------------------
# Grading


def kind_of(record):
    """The problem type in lower case. A type that does not exist is an error in the data, not a wrong answer.

    >>> kind_of({"problem_type": "OCR"})
    'ocr'
    """
    kind = str(record.get("problem_type")).lower()
    if kind not in TEXT_TYPES + JSON_TYPES:
        raise ValueError(f"problem_type is {record.get('problem_type')!r}, expected one of {TEXT_TYPES + JSON_TYPES}")
    return kind


def accuracy(record, answer):
    """How right an answer (text inside the tags) is, in [0, 1]. Training and evaluation both grade with this.

    >>> accuracy({"problem_type": "temporal grounding", "answer": '{"time": [2, 6]}'}, '{"time": [0, 4]}')
    0.3333333333333333
    """
    kind, truth = kind_of(record), truth_of(record)
    if not isinstance(answer, str):
        return 0.0
    if kind == "multiple choice":
        options = record.get("options")
        letter = read_choice(truth, options)
        return float(read_choice(answer, options) == letter if letter else answer.casefold() == truth.casefold())
    if kind in ("numerical", "regression"):
        p, y = read_number(answer), read_number(truth)
        if p is None or y is None:
            return 0.0
        return float(same_number(p, y)) if kind == "numerical" else mean_relative_accuracy(p, y)
    if kind == "math":
        return float(math_equal(answer, truth))
    if kind == "ocr":
        return max(0.0, 1 - word_error_rate(answer, truth))
    if kind == "open-ended":
        return rouge(answer, truth)

    p, y = read_json(answer), read_json(truth)
    if not (isinstance(p, dict) and isinstance(y, dict)):
        return 0.0
    if kind == "temporal grounding":
        return iou_1d(p.get("time"), y.get("time"))
    if kind == "spatial grounding":
        return iou_box(p.get("boxes"), y.get("boxes"))
    if kind == "spatial-temporal grounding":
        return 0.5 * iou_1d(p.get("time"), y.get("time")) + 0.5 * mean_box_iou(p.get("boxes"), y.get("boxes"))
    if kind == "tracking":
        return mean_box_iou(p.get("boxes"), y.get("boxes"))
    return segmentation_accuracy(p, y, video=record.get("data_type") != "image")


def segmentation_accuracy(p, y, video):
    """Box, points and (video) time of the prompt for SAM2, weighted; 0 without 3 + 3 points or a video's time.

    >>> y = {"boxes": [0, 0, 9, 9], "positive_points": [[1, 1], [2, 2], [3, 3]], "negative_points": [[9, 1]] * 3}
    >>> segmentation_accuracy(y, y, video=False), segmentation_accuracy(y, y, video=True)
    (1.0, 0.0)
    """
    if not all(are_points(side.get(key)) for side in (p, y) for key in ("positive_points", "negative_points")):
        return 0.0
    box = iou_box(p.get("boxes"), y.get("boxes"))
    positive = point_kernel(p["positive_points"], y["positive_points"])
    negative = point_kernel(p["negative_points"], y["negative_points"])
    if not video:
        return 0.5 * box + 0.25 * positive + 0.25 * negative
    if not (is_number(p.get("time")) and is_number(y.get("time"))):
        return 0.0
    return 0.3 * box + 0.3 * math.exp(-abs(p["time"] - y["time"]) / 2) + 0.2 * positive + 0.2 * negative


def structure(record, answer):
    """How well an answer keeps to the task's JSON schema, in [0, 0.5]. Free text has no schema: 0.5.

    >>> truth = {"problem_type": "tracking", "answer": '{"boxes": {"1": [0, 0, 9, 9], "2": [0, 0, 9, 9]}}'}
    >>> structure(truth, '{"boxes": {"1": [1, 2, 3, 4]}}')  # 0.25 for the schema, 0.25 * share of the true seconds
    0.375
    """
    kind = kind_of(record)
    if not isinstance(answer, str):
        return 0.0
    if kind in TEXT_TYPES:
        return 0.5
    p = read_json(answer)
    if not isinstance(p, dict):
        return 0.0
    boxes = p.get("boxes")
    if kind == "temporal grounding":
        return 0.5 * are_numbers(p.get("time"), 2)
    if kind == "spatial grounding":
        return 0.5 * are_numbers(boxes, 4)
    if kind == "segmentation":
        points = are_points(p.get("positive_points")) and are_points(p.get("negative_points"))
        timed = record.get("data_type") == "image" or is_number(p.get("time"))
        return 0.5 * (are_numbers(boxes, 4) and points and timed)
    if not isinstance(boxes, dict) or not all(are_numbers(box, 4) for box in boxes.values()):
        return 0.0
    if kind == "spatial-temporal grounding" and not are_numbers(p.get("time"), 2):
        return 0.0
    y = read_json(truth_of(record))
    seconds = y.get("boxes") if isinstance(y, dict) else None
    share = sum(k in boxes for k in seconds) / len(seconds) if isinstance(seconds, dict) and seconds else 0.0
    return 0.25 + 0.25 * share


def total(accuracy, structure):
    """The score of a response with the right tags.

    >>> total(1.0, 0.5)
    Score(reward=1.5, accuracy=1.0, format=1.0, structure=0.5)
    """
    return Score(0.9 * accuracy + 0.1 + structure, accuracy, 1.0, structure)


def score(record, response):
    """Grade one response here and now. Math can take 15 s or, on hostile text, hang: use `Grader` for model output.

    >>> record = {"problem_type": "numerical", "answer": "3"}
    >>> score(record, "<think>1 + 2</think><answer>3</answer>").reward, score(record, "3").reward
    (1.5, 0.0)
    """
    answer = parse_response(response)
    return Score(0.0, 0.0, 0.0, 0.0) if answer is None else total(accuracy(record, answer), structure(record, answer))


# ----------------------------------------------------------------------------------------------------------------------
# POLAR: a reward model for open-ended answers, served by
#     vllm serve internlm/POLAR-7B --runner pooling --trust-remote-code --port 8100


def min_max(scores):
    """Scores of one prompt's group -> [0, 1]; all 1 if all are equal.

    >>> min_max([-4.0, -2.0, 0.0]), min_max([3.0, 3.0])
    ([0.0, 0.5, 1.0], [1.0, 1.0])
    """
    low, high = min(scores), max(scores)
    return [(s - low) / (high - low) if high > low else 1.0 for s in scores]


def polar_text(record, answer):
    """What POLAR reads: question and truth against question and answer. The answer must not bring special tokens.

    >>> polar_text({"problem": "Who?", "answer": "Ann"}, "Bob")
    'Who?\\nAnn<|reward|>Who?\\nBob[UNUSED_TOKEN_130]'
    """
    problem = record.get("problem", "")
    answer = re.sub(r"<\|[^|]*\|>|\[UNUSED_TOKEN_\d+\]", " ", answer[:20_000])
    return f"{problem}\n{truth_of(record)}<|reward|>{problem}\n{answer}[UNUSED_TOKEN_130]"


def ask_polar(url, texts, deadline, tries=2):
    """One request to vLLM's pooling endpoint: list of text -> list of raw scores; None if the server fails or lies.
    deadline: time.monotonic() at which to give up. A score is the last number of an item: the last token's value."""
    body = json.dumps({"input": texts, "use_activation": False}).encode()  # False: no sigmoid over the score
    request = urllib.request.Request(f"{url.rstrip('/')}/pooling", body, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(tries):
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            return None
        try:
            with opener.open(request, timeout=seconds / 2) as response:
                items = read_json(response.read(2**26).decode())["data"]
            scores = [item["data"] for item in sorted(items, key=lambda item: item.get("index", 0))]
            while any(isinstance(s, list) for s in scores):
                scores = [s[-1] if isinstance(s, list) else s for s in scores]
        except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError, AttributeError):
            continue
        if are_numbers(scores, len(texts)):
            return scores
    return None


def polar_scores(url, pairs, seconds=60.0):
    """Accuracy of open-ended answers by POLAR: list of (record, answer) -> list of values in [0, 1], in order, and the
    number of groups that failed. A group is the answers to one prompt; one request each, 8 at a time. Where the server
    fails, the values of the whole group are None (never a mix: raw scales differ)."""
    groups = {}
    for i, (record, _) in enumerate(pairs):
        groups.setdefault((record.get("problem"), truth_of(record)), []).append(i)
    deadline, values, failed = time.monotonic() + seconds, [None] * len(pairs), 0
    with ThreadPoolExecutor(8) as pool:
        texts = [[polar_text(*pairs[i]) for i in group] for group in groups.values()]
        answers = pool.map(lambda group: ask_polar(url, group, deadline), texts)
        for group, scores in zip(groups.values(), answers):
            failed += scores is None
            for i, value in zip(group, min_max(scores) if scores else []):
                values[i] = value
    return values, failed


# ----------------------------------------------------------------------------------------------------------------------
# Grading in worker processes


class Grader:
    """Grades lists of responses, in order, whatever the model wrote.

    Math, ROUGE and OCR go to worker processes (`python rewards.py --worker`), since sympy can hang in C code where no
    Python time limit reaches. A worker that overruns `seconds` is killed and replaced, its item scores 0; one that dies
    is replaced and the item tried once more. The rest takes microseconds, linear in the text, and is graded right here.
    Workers start in the background: making a Grader takes a millisecond. One thread per worker waits for its replies.

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
        answers = [parse_response(response) for _, response in pairs]
        values = self.accuracies([(record, answer) for (record, _), answer in zip(pairs, answers)])
        return [
            Score(0.0, 0.0, 0.0, 0.0) if answer is None else total(value, structure(record, answer))
            for (record, _), answer, value in zip(pairs, answers, values)
        ]

    def accuracies(self, pairs):
        """list of (record, answer or None) -> list of accuracy: `accuracy`, safely."""
        values = [None if kind_of(record) in SLOW_TYPES else accuracy(record, answer) for record, answer in pairs]
        slow = [i for i, value in enumerate(values) if value is None]
        if self.polar_url:
            asked = [i for i in slow if kind_of(pairs[i][0]) == "open-ended" and pairs[i][1] is not None]
            scores, failed = polar_scores(self.polar_url, [pairs[i] for i in asked])
            self.counts["polar_failed"] += failed
            for i, value in zip(asked, scores):
                values[i] = value
            slow = [i for i in slow if values[i] is None]
        for start in self.starting if slow else ():
            start.result()  # raises if the worker could not start: a broken grader is not a wrong answer
        for i, (value, killed, errors) in zip(slow, self.pool.map(self._grade, [pairs[i] for i in slow])):
            values[i] = value
            self.counts["killed"] += killed
            self.counts["errors"] += errors
        return values

    def _grade(self, pair):
        """One slow item, in one of the pool's threads -> accuracy, kills, worker deaths."""
        record, answer = pair
        if answer is None:
            return 0.0, 0, 0
        line = json.dumps([{"problem_type": record["problem_type"], "answer": truth_of(record)}, answer])
        for errors in range(2):
            worker = self.idle.get(timeout=300)
            try:
                worker.stdin.write(line + "\n")
                worker.stdin.flush()
                value = float(self._reply(worker, self.seconds))
            except TimeoutError:
                self._replace(worker)
                return 0.0, 1, errors
            except (BrokenPipeError, ValueError):  # it died, before or after it read the line
                self._replace(worker)
            else:
                self.idle.put(worker)
                return value, 0, errors
        return 0.0, 0, 2

    def _start(self):
        worker = subprocess.Popen(
            [*self.command, str(self.seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is the trainer's business
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        if self._reply(worker, 120) != "ready\n":  # its imports do not count as grading time
            raise RuntimeError(f"a grading worker ended before it was ready: {self.command}")
        self.idle.put(worker)

    def _replace(self, worker):
        worker.kill()
        worker.communicate()  # closes the pipes and waits for the end
        self._start()

    def _reply(self, worker, seconds):
        poll = select.poll()
        poll.register(worker.stdout, select.POLLIN)
        if not poll.poll(1000 * seconds):
            raise TimeoutError(f"no reply in {seconds} s")
        return worker.stdout.readline()

    def close(self):
        self.pool.shutdown(cancel_futures=True)
        while not self.idle.empty():
            worker = self.idle.get()
            worker.kill()
            worker.communicate()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def work(seconds):
    """A worker: reads one JSON line [record, answer], writes one line with the accuracy, and so on until the pipe ends.
    Should its Grader vanish while it hangs, the kernel ends it after 2 * seconds of CPU time (SIGPROF)."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))  # 4 GiB: huge integers must not take the machine down
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
