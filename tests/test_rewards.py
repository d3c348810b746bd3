"""rewards.py: every number as defined, right answers read as people write them, nothing that the
model writes can break it.

REWARD_EXAMPLES=100000 python -m pytest tests/test_rewards.py -k random     # the long random tests
"""

import doctest
import http.server
import json
import math
import os
import random
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rewards
from rewards import Grader, Score, accuracy, answer_of, find_answer, gradable, parse_response
from rewards import read_choice, read_number, score

CASES = os.path.join(os.path.dirname(__file__), "cases")
BOX, BOX2 = (
    [100, 200, 300, 400],
    [150, 200, 350, 400],
)  # IoU 150 * 200 / (2 * 200 * 200 - 150 * 200)
POINTS, FAR = [[110, 210], [200, 300], [290, 390]], [[50, 50], [500, 500], [10, 900]]
MASK = {"boxes": BOX, "positive_points": POINTS, "negative_points": FAR}
TRUTHS = {  # problem_type, data_type -> a true answer
    ("multiple choice", "image"): "B",
    ("numerical", "image"): "1234.5",
    ("math", "image"): "\\frac{1}{2}",
    ("regression", "video"): "100",
    ("OCR", "image"): "open a/b < c from 9 to 5",
    ("open-ended", "video"): "A man walks his dog along the river.",
    ("temporal grounding", "video"): {"time": [2.5, 6]},
    ("spatial grounding", "image"): {"boxes": BOX},
    ("spatial-temporal grounding", "video"): {"time": [2.5, 4.1], "boxes": {"3": BOX, "4": BOX}},
    ("tracking", "video"): {"boxes": {str(k): BOX for k in range(1, 33)}},
    ("segmentation", "image"): MASK,
    ("segmentation", "video"): {"time": 4.0, **MASK},
}


def ask(kind, truth, medium="video", **more):
    truth = truth if isinstance(truth, str) else json.dumps(truth)
    return {"problem_type": kind, "data_type": medium, "problem": "?", "answer": truth, **more}


def reply(answer):
    answer = answer if isinstance(answer, str) else json.dumps(answer)
    return f"<think>hm</think><answer>{answer}</answer>"


RECORDS = [ask(kind, truth, medium) for (kind, medium), truth in TRUTHS.items()]
BY_TYPE = {f"{record['problem_type']}-{record['data_type']}": record for record in RECORDS}
ALL = pytest.mark.parametrize("record", RECORDS, ids=BY_TYPE)
JSON_RECORDS = [record for record in RECORDS if record["problem_type"] in rewards.JSON_TYPES]
ALL_JSON = pytest.mark.parametrize("record", JSON_RECORDS, ids=list(BY_TYPE)[-len(JSON_RECORDS) :])


def check_bounds(result):
    assert all(type(part) is float and math.isfinite(part) for part in result), result
    assert 0 <= result.accuracy <= 1 and result.format in (0, 1), result
    assert 0 <= result.structure <= 0.5, result
    total = 0.9 * result.accuracy + 0.1 * result.format + result.structure
    assert result.reward == pytest.approx(total, abs=1e-12)


# ---- definitions


def test_examples():
    """The docstrings show numbers that the code no longer gives."""
    result = doctest.testmod(rewards)
    assert result.attempted > 10 and result.failed == 0


def test_import_is_light():
    """Importing rewards pulled in sympy or nltk and cost every script seconds."""
    heavy = "{'math_verify', 'rouge_score', 'sympy', 'torch', 'numpy'}"
    code = f"import rewards, sys; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=os.path.dirname(rewards.__file__))


@pytest.mark.parametrize("part", ["accuracy", "format", "structure"])
def test_golden(part):
    """A reward differs from what the release's own code gives for the same response."""
    for case in json.load(open(f"{CASES}/golden.json")):
        expected = pytest.approx(case[part], abs=1e-6)  # the release computes in float32
        assert getattr(score(case, case["response"]), part) == expected, case


def test_answers_as_people_write_them():
    """Right answers scored 0 in evaluation, or wrong ones were rewarded."""
    cases = json.load(open(f"{CASES}/answers.json"))
    given = [accuracy(case, answer_of(case, case["response"])) for case in cases]
    wrong = [case for case, value in zip(cases, given) if value > 0 and case["right"] == 0]
    good = sum(value == case["right"] for case, value in zip(cases, given))
    assert not wrong and good >= 0.97 * len(cases), (good, wrong)


@ALL
def test_exact_answer_is_worth_everything(record):
    """The truth itself did not score 1.5 (the release's clean-up: "a / b" never matches itself)."""
    assert score(record, reply(record["answer"])) == pytest.approx((1.5, 1, 1, 0.5))
    assert gradable(record) == ""


TRACK = {str(k): BOX for k in range(1, 5)}
DEFINITIONS = [  # kind, truth, answer, accuracy, structure
    ("numerical", "1234.5", "1,234.504", 1, 0.5),
    ("numerical", "2.67", "2.675", 1, 0.5),  # round() of the binary float, as released
    ("numerical", "3", "3.01", 0, 0.5),
    ("regression", "100", "90", 0.8, 0.5),
    ("regression", "100", "50", 0, 0.5),  # strictly less
    ("regression", "-2", "-2.1", 0.9, 0.5),  # exactly 0.05 off
    ("regression", "0", "0.0", 1, 0.5),
    ("OCR", "the dark room", "the dog", 1 / 3, 0.5),
    ("OCR", "a b", "x y z w", 0, 0.5),
    ("open-ended", "A dog runs fast.", "a dog runs", (6 / 7 + 4 / 5 + 6 / 7) / 3, 0.5),
    ("temporal grounding", {"time": [2, 6]}, {"time": [0, 4]}, 1 / 3, 0.5),
    ("spatial grounding", {"boxes": BOX}, {"boxes": BOX2}, 0.6, 0.5),
    ("tracking", {"boxes": TRACK}, {"boxes": {"1": BOX, "2": BOX2}}, 1.6 / 4, 0.375),
    ("tracking", {"boxes": TRACK}, {"boxes": {"1": BOX, "2": [1, 2, 3]}}, 0.25, 0),
]
DEFINITIONS = [(ask(*case[:2]), *case[2:]) for case in DEFINITIONS] + [
    (
        ask("spatial-temporal grounding", {"time": [2, 6], "boxes": {"2": BOX, **TRACK, "5": BOX}}),
        {"time": [0, 4], "boxes": {"2": BOX2, "9": BOX}},
        *(0.5 / 3 + 0.5 * 0.6 / 5, 0.25 + 0.25 / 5),
    ),
    (
        ask("segmentation", MASK, "image"),
        {
            "boxes": BOX2,
            "positive_points": [[x + 30, y + 40] for x, y in POINTS[::-1]],
            "negative_points": [[5000, 5000]] * 3,
        },
        *(0.5 * 0.6 + 0.25 * math.exp(-0.5), 0.5),
    ),
    (
        ask("segmentation", {"time": 4, **MASK}),
        {**MASK, "time": 7.0, "boxes": BOX2, "negative_points": FAR[::-1]},
        *(0.3 * 0.6 + 0.3 * math.exp(-1.5) + 0.4, 0.5),
    ),
]


@pytest.mark.parametrize(("record", "answer", "right", "structure"), DEFINITIONS)
def test_definitions(record, answer, right, structure):
    """A metric or a weight is not the paper's (worked by hand)."""
    result = score(record, reply(answer))
    assert (result.accuracy, result.structure) == pytest.approx((right, structure), abs=1e-9)
    check_bounds(result)


def test_shared_seconds_are_a_separate_number():
    """One right box of five scored as five in the reward; evaluation still needs that number."""
    truth = {str(k): BOX for k in range(5)}
    assert rewards.mean_box_iou({"0": BOX}, truth) == 0.2
    assert rewards.mean_box_iou({"0": BOX}, truth, "shared") == 1.0
    assert rewards.mean_box_iou({"9": BOX}, truth, "shared") == 0.0


def test_truth_in_any_form():
    """Records that say `solution`, or hold JSON instead of text, were graded against nothing."""
    for more in (
        {"answer": "3"},
        {"answer": None, "solution": "<answer> 3 </answer>"},
        {"answer": 3},
    ):
        assert accuracy({"problem_type": "numerical", **more}, "3") == 1
    record = {"problem_type": "temporal grounding", "solution": {"time": [1, 2]}}
    assert accuracy(record, '{"time": [1, 2]}') == 1


def test_unknown_type():
    """A misspelt problem type graded as a wrong answer for a whole run."""
    with pytest.raises(ValueError, match="numerics"):
        score(ask("numerics", "3"), reply("3"))


# ---- tags


TAGS = """B
<answer>B</answer>
<think>x</think>B
<answer>B</answer><think>x</think>
<think>x</think><answer>B</answer> done
so <think>x</think><answer>B</answer>
<think>x</think> so <answer>B</answer>
<think>x</think><answer>B</answer><answer>C</answer>
<think>x</think><think>x</think><answer>B</answer>
<think>x</think><answer><answer>B</answer></answer>
<think>x<answer>B</answer></think>
<think>x</think><answer>B
< think >x< / think ><answer>B</answer>
"""


@pytest.mark.parametrize("response", TAGS.split("\n"))
def test_wrong_tags_are_worth_nothing(response):
    """Several blocks passed as "strict" format; accuracy was given without any tags."""
    assert parse_response(response) is None
    assert score(BY_TYPE["multiple choice-image"], response) == Score(0, 0, 0, 0)


def test_white_space_around_blocks_is_fine():
    """The strict format refused line breaks between the blocks."""
    assert parse_response(" \n<think>\nx\n</think>\n\n<answer>\n B\n</answer>\n") == "B"
    assert score(ask("numerical", "3"), reply("")) == pytest.approx((0.6, 0, 1, 0.5))


@pytest.mark.parametrize("text", ["a / b", "x < 3 > y", "1 /2", "< / >"])
def test_text_is_graded_as_written(text):
    """A clean-up removed spaces around <, > and / from the answer but not from the truth."""
    assert parse_response(reply(text)) == text
    assert score(ask("OCR", text), reply(text)).accuracy == 1
    assert score(ask("OCR", "a / b"), reply("a/b")).accuracy == 0


FOUND = """<answer>A</answer> no</think><answer>B</answer>
<think>A</think>B
<think>a <answer>A</answer></think>B
<think>...</think><answer>B
<think>x</think><answer>B</answer></think>
<think>x</think><answer>B</answer> The <answer> tag holds the letter.
<think>x</think><answer>B</answer> as asked in <answer></answer> tags
<think>I end with </think> and <answer>A</answer>.</think><answer>B</answer>
<think>x</think>B</think>
<think>x</think><answer>B</answer><|im_end|>
<answer>B</answer>
<answer>A</answer> wait <answer>B</answer>"""


@pytest.mark.parametrize("response", FOUND.split("\n"))
def test_where_the_answer_stands(response):
    """A stray tag, or text about tags, hid the answer; an answer quoted in a thought was graded."""
    assert find_answer(response) == "B"


def test_a_thought_that_was_cut_off_is_no_answer():
    """A response cut off in its thinking was graded by what the thought quotes."""
    for text in ("<think>It is B", "<think>maybe <answer>B</answer>, but", "<think>as <answer>B"):
        assert find_answer(text) is None
    assert find_answer(" ") is None and find_answer(None) is None
    for record in RECORDS:  # where all is well, training and evaluation read alike
        assert find_answer(reply(record["answer"])) == parse_response(reply(record["answer"]))


# ---- choices

ANIMALS = ["A. the cat", "B. the dog", "C. a bird", "D. none of the above"]
CHOSEN = """B|(B)|b|B.|B)|(b).|[B]|B:|B!|$B$|\\boxed{B}|\\(B\\)|\\boxed{\\text{(B)}}|**B**|"B"|`B`| B
Answer: B|answer is B.|The correct answer is: (B)|Option B|option (B)|**Answer:** B|Answer - B|Letter B
B. the dog|**B.** the dog|B: a dog|B) I see|B - the dog|B.the dog|B (the dog)|B the dog|B = the dog
the dog|The dog.|It is the dog.|The answer is the dog.|B. the dog and a cat|B is the dog
B is correct|B is the right answer.|B because it barks|B, because it barks|B, since A is a cat
I think B|It must be B|So B|Therefore, the answer is option B.|The right one is B|Definitely B
（B）|Ｂ|B。|B、the dog|选B|答案：B|答案是B|选项B|正确答案是B。|所以答案是 B。|الإجابة B|Ответ: B
I think B.|The dog is shown. **B**|It barks, so the answer is B.|Among A, B, C and D, the answer is B.
B is correct. A is not.|Option A is wrong. Option B is right.|A cat would meow. So B."""
NOT_CHOSEN = """Based on the image|A or B|A and B|A, B|A. or B.|A) B)|A/B|B/C|ABCD|B C|B;C|a dog|Both||?|B-movie
B's|not B|b a|A. B. C. D.|1|B or C|B, or C|B? No, C.|B?|E|The answer is not B|The answer cannot be B.
B is wrong|B is not correct|Option B is wrong.|It is not the dog|a dog or a cat|B (the cat)|maybe B
不选B|不是B|B不对|选A或B|Both option A and option B|It is option A or option B|I don't think it is B
Except B|all but B|It could be B|Bird|Because|none|dogs|B... or C"""


@pytest.mark.parametrize("text", [*CHOSEN.replace("\n", "|").split("|"), "B\n\nThe dog"])
def test_a_choice_as_people_write_it(text):
    """ "Answer: B", "B because it barks", "选B" scored 0."""
    assert score(ask("multiple choice", "B", options=ANIMALS), reply(text)).accuracy == 1


@pytest.mark.parametrize("text", NOT_CHOSEN.replace("\n", "|").split("|"))
def test_no_choice(text):
    """ "Not B" scored as B in evaluation; several letters scored as the first."""
    for answer_is in (accuracy, lambda record, text: accuracy(record, answer_of(record, text))):
        assert answer_is(ask("multiple choice", "B", options=ANIMALS), text) == 0


def test_choice_by_the_text_of_the_option():
    """An option that looks like a letter was taken for another option, or one beyond them was read."""
    assert read_choice("B. C", ["A. D", "B. C", "C. B"]) == "B"
    assert read_choice("C", ["A. D", "B. C", "C. B"]) == "C"
    assert read_choice("Vitamin C", ["A. Vitamin A", "B. Vitamin C", "C. Zinc"]) == "B"
    assert read_choice("The answer is Solution B.", ["Solution B", "Solution A"]) == "A"
    assert read_choice("E", ["A. x", "B. y"]) is None and read_choice("x", ["x", "x"]) is None
    assert accuracy(ask("multiple choice", "yes"), "Yes") == 1
    assert read_choice("U.S.", ["U.K.", "U.S."]) == "B"


# ---- numbers, units, math

NUMBERS_READ = """1,234=1234|1,00,000.5=100000.5|-.5=-0.5|−5=-5|–5=-5|$1,200=1200|45°=45|5.=5|The answer is 7=7
**7**=7|1e3=1000|12 cm=12|5\\,\\text{cm}=5|30^\\circ=30|30 degrees=30|5 km/h=5|5€=5|5 USD=5|≈5=5
$\\boxed{5}$=5|\\(5\\)=5|1/2=0.5|\\frac{1}{2}=0.5|1 1/2=1.5|2½=2.5|6 \\times 10^{23}=6e23|10^5=100000
５=5|３．１４=3.14|-5 °C=-5|答案是5=5|5个=5|5平方米=5|[5]=5|Score: 8=8|1{,}234=1234|5 red balls=5"""
NOT_READ = """1,23|inf|nan|--5|1_000|.|e5|True|1e999999999|0x10|5 or 6|5, 6|5-6|5 to 6|not 5|5 million|5 dozen
5x|5!|5 squared|5 minus 3|5 out of 8|2x = 5|5^2|5 pi|> 5|5 thirds|1 in 3|5 times|1/0||cm|5:30|5 万"""
UNITS = """cm=centimeters|m/s=meters per second|m^2=square meters|cm²=sq cm|km/h=kph|mph=miles per hour
h=hours|min=minutes|°=degrees|dollars=USD|L=litres|people=persons|apples=apple|°C=degrees Celsius
cm^3=cubic centimeters|N=newtons|\\Omega=ohms|m/s^2=m/s²|kg=千克|kWh=kWh|books=books"""
EQUAL = r"""\sqrt{3}=\sqrt{3}|1/2=\frac{1}{2}|$0.5$=1/2|a / b=\frac{a}{b}|30=30^\circ|50\%=0.5|25%=25
\boxed{5}=5|10^{5}=100000|The answer is $5$.=5|\$5=5|$$-\dfrac{3}{2}$$=-1.5|\[\frac{1}{2}\]=0.5|2π=2\pi
The area is $25$ square units.=25|We have 3 + 4. So the answer is 7.=7|First, $3+4$. \boxed{7}=7
yes=\text{Yes}|2 and 1=1, 2|√3=\sqrt{3}|2 sqrt(3)=2\sqrt{3}|3 ln 2=3\ln 2|1½=3/2|6e23=6 \times 10^{23}"""
UNEQUAL = r"""2\pi=2|\sqrt{3}=3|=5|6=5|2 x=2|2 pi=2|2 sqrt(3)=2|3 ln 2=3|2 or 3=2|5 million=5|5\text{ dozen}=5
5 squared=5|5 minus 3=5|5 out of 8=5|$5$ million=5|$5$ or 6=5|The answer is not $5$.=5|ACB=ABC|no=on|god=dog
\angle ACB=\angle ABC|2500=25%|0.333=1/3|5t=5|(2,1)=(1,2)|10^{-9}=0|5 km=5 cm|5 cm^2=5 cm|$5=5 cm"""


def cells(table):
    return [cell.rpartition("=")[::2] for cell in table.replace("\n", "|").split("|")]


@pytest.mark.parametrize(("text", "value"), cells(NUMBERS_READ))
def test_numbers_as_people_write_them(text, value):
    """A number with a unit, in LaTeX or in full-width digits scored 0."""
    assert float(read_number(text)) == float(value)


@pytest.mark.parametrize("text", [*NOT_READ.replace("\n", "|").split("|"), "9" * 5000])
def test_what_is_no_single_number(text):
    """ "1,23" was read as 123, and nan and inf as numbers; "5 million" is not 5."""
    assert read_number(text) is None


@pytest.mark.parametrize(("one", "other"), cells(UNITS))
def test_units(one, other):
    """15 m/s was a product of letters; 15 cm equalled 15 km. Numbers and math read units alike."""
    for kind in ("numerical", "math"):
        for truth, answer in (("15", one), (one, ""), (one, other), (other, one)):
            record = ask(kind, truth if truth == "15" else f"15 {truth}")
            assert accuracy(record, f"15 {answer}") == 1, (kind, truth, answer)
        assert accuracy(ask(kind, f"15 {one}"), "15 zebras") == 0


@pytest.mark.parametrize(("p", "y"), cells(EQUAL) + [("x = 5", "5"), ("x+y=1", "y=1-x")])
def test_math(p, y):
    """Math without dollars was cut to its first number; numbers in prose were not found."""
    assert accuracy(ask("math", y), p) == 1


@pytest.mark.parametrize(("p", "y"), cells(UNEQUAL) + [("y=3", "x=3"), ("2x = 5", "5")])
def test_math_that_is_not_equal(p, y):
    """2 pi equalled 2, 5 million equalled 5, ABC equalled ACB."""
    assert accuracy(ask("math", y), p) == 0


# ---- JSON, text

B, T, K = (
    '{"boxes": [1, 2, 3, 4]}',
    '{"time": [2, 6]}',
    '{"boxes": {"1": [0, 0, 9, 9], "2": [0, 0, 8, 8]}}',
)
S = '{"time": [3.2, 5.1], "boxes": {"4": [0, 0, 9, 9], "5": [0, 0, 9, 9]}}'
LOOSE = {
    ("spatial grounding", B): """Here: ```json {"boxes": [1, 2, 3, 4]} ``` as asked
{"boxes": [1, 2, 3, 4,],}
{'boxes': [1, 2, 3, 4]}
{"boxes": ["1", "2", "3", "4"]}
[[1, 2, 3, 4]]
[{"bbox_2d": [1, 2, 3, 4], "label": "cat"}]
{"bbox": [1, 2, 3, 4]}
The box of [a] is [1, 2, 3, 4], so {"box": [[1, 2, 3, 4]]}.""",
    ("temporal grounding", T): '[2, 6]\nFrom [[2.0, "6 s"]].\n[{"time": [2, 6]}]',
    ("tracking", K): """{"boxes": {1: [0, 0, 9, 9], 2: [0, 0, 8, 8]}}
{"boxes": [[0, 0, 9, 9], [0, 0, 8, 8]]}
[{"bbox_2d": [0, 0, 9, 9]}, {"bbox_2d": [0, 0, 8, 8]}]""",
    ("spatial-temporal grounding", S): S.replace('"4"', '"4.0"').replace('"5"', "5"),
    ("segmentation", json.dumps(MASK)): f"So: [{json.dumps(MASK).replace('boxes', 'bbox_2d')}]",
}


@pytest.mark.parametrize(("kind", "truth"), LOOSE, ids=str)
def test_json_as_base_models_write_it(kind, truth):
    """Qwen3-VL's own bbox_2d, fences, bare lists scored 0 in evaluation. Training stays strict."""
    record = ask(kind, truth, "image")
    for text in LOOSE[kind, truth].split("\n"):
        answer = answer_of(record, reply(text))
        assert accuracy(record, answer) == 1 and rewards.read_json(answer), text
        assert accuracy(record, text) < 1


def test_several_json_answers_are_none():
    """Of two boxes the first, or the better one, was graded."""
    record = ask("spatial grounding", B)
    texts = (
        B
        + """ or {"boxes": [5, 6, 7, 8]}
[1, 2, 3, 4] and [5, 6, 7, 8]
[{"bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": [5, 6, 7, 8]}]
[1, 2, 3]"""
    )
    for text in texts.split("\n"):
        assert accuracy(record, answer_of(record, reply(text))) == 0
    assert answer_of(ask("temporal grounding", T), reply("[2, 6] or [3, 7]")) == "[2, 6] or [3, 7]"


@pytest.mark.parametrize(
    "text", ["一只狗在草地上跑", "собака бежит по траве", "कुत्ता घास पर", "كلب يجري في الحقل"]
)
def test_text_of_every_script(text):
    """ROUGE of Chinese, Cyrillic, Hindi, Arabic text was 0 even against itself: nothing to learn."""
    for kind in ("open-ended", "OCR"):
        assert accuracy(ask(kind, text), text) == 1
        assert 0 < accuracy(ask(kind, text), text[: -len(text) // 3]) < 1


def test_two_forms_of_unicode():
    """ "é" as one character and as two were different texts."""
    one, two = "caf\u00e9 au lait", "cafe\u0301 au lait"
    for kind in ("OCR", "open-ended", "math", "multiple choice"):
        assert accuracy(ask(kind, one), two) == accuracy(ask(kind, two), one) == 1


UNGRADABLE = [
    ("multiple choice", "D", {"options": ["A. x", "B. y"]}),
    ("numerical", "three", {}),
    ("regression", "nan", {}),
    ("spatial grounding", {"bbox": [1, 2, 3, 4]}, {}),
    ("spatial grounding", {"boxes": [[1, 2, 3, 4]]}, {}),
    ("spatial grounding", {"boxes": [900, 900, 50, 50]}, {}),
    ("spatial grounding", {"boxes": [1500, 200, 1800, 400]}, {}),
    ("temporal grounding", {"time": ["00:12", "00:15"]}, {}),
    ("tracking", {"boxes": {"1": BOX, "2": [300, 200, 100, 400]}}, {}),
    ("tracking", "x", {}),
    ("segmentation", {**MASK, "positive_points": POINTS[:2]}, {}),
    ("segmentation", {**MASK, "negative_points": [[-1, 0], *FAR[1:]]}, {}),
]


@pytest.mark.parametrize(("kind", "truth", "more"), UNGRADABLE)
def test_truth_that_cannot_be_graded(kind, truth, more):
    """A wrong truth (pixels, x1 > x2, a mistyped key) was trained on without a word."""
    assert gradable(ask(kind, truth, "image", **more))


def test_truth_that_can_be_graded():
    """A right record was refused: masks alone, times beyond 1000, text, no options."""
    assert gradable(ask("segmentation", "", segmentation_output={"frames": []})) == ""
    assert gradable(ask("temporal grounding", {"time": [1500, 1600.5]})) == ""
    assert gradable(ask("multiple choice", "yes")) == gradable(ask("math", "?")) == ""
    assert gradable(ask("multiple choice", "y", options=["A. x", "B. y"])) == ""


# ---- hostile text

BAD = ["NaN", "Infinity", "-Infinity", "1e400", "true", "null", '"5"', "[5]", "9" * 5000, "9" * 400]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad[:12])
@ALL_JSON
def test_what_is_no_number(record, bad):
    """NaN inside JSON became a NaN reward; true and "5" counted as numbers."""
    truth = rewards.truth_of(record)
    for number in ("4", "4.0", "2.5", "100", "390"):
        text = truth.replace(f"{number},", f"{bad},").replace(f"{number}]", f"{bad}]")
        result = score(record, reply(text))
        check_bounds(result)
        if number == "100" and record["problem_type"] != "temporal grounding":
            assert result.accuracy < 1 and result.structure < 0.5


@ALL_JSON
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


HOSTILE = [
    *BAD,
    *("[" * 50_000, '{"boxes":' * 50_000, "{" * 50_000 + "}" * 50_000, "{}", "[]", "\ud800 \udfff"),
    *("a " * 50_000, "B" * 100_000, "y" * 100_000, ("y" * 900 + " ") * 110, "*" * 100_000, "\x00"),
    *(" answer" * 15_000, " option A or B." * 7000, "1," * 50_000, "\\boxed{" * 9000, "$" * 1999),
    *("(" * 1000 + "1" + ")" * 1000, "\\frac{" * 300, "5 " + "m " * 90, "__import__('os').abort()"),
    '{"time": {}, "boxes": [[1, 2, 3, 4]], "positive_points": 3, "negative_points": [[1, 2], null]}',
    '{"time": [1e308, -1e308], "boxes": [1e308, 1e308, -1e308, 5e-324]}',
    '{"time": [0, 5e-324], "boxes": [0, 0, 5e-324, 5e-324]}',
]


@ALL
def test_hostile_text_here_and_now(record):
    """Something the model wrote raised, took minutes, or gave a number outside the bounds."""
    for text in HOSTILE:
        start = time.process_time()
        check_bounds(score(record, reply(text)))
        check_bounds(score(record, text))
        answer_of(record, text)
        assert time.process_time() - start < 5, text[:40]


@ALL
def test_hostile_truth(record):
    """A broken record ended the run in the middle of grading, long after it was read."""
    nan = float("nan")
    for truth in [*HOSTILE, 5, True, nan, {}, [], {"time": [nan, 1], "boxes": {"1": None}}]:
        result = score({**record, "answer": truth}, reply(rewards.truth_of(record)))
        check_bounds(result)
        gradable({**record, "answer": truth})


EXAMPLES = int(os.environ.get("REWARD_EXAMPLES", "300"))
NUMBERS = st.integers(-10, 1100) | st.floats(width=32)
NUMBERS |= st.sampled_from([0, 1e400, -0.0, 10**30, True, None, "7", [1]])
TEXTS = st.text(max_size=60) | st.text("AB().:* 019,-+e%$\\{}<>/[]\"'", max_size=30)
TEXTS |= st.sampled_from(["B", "90", "a dog", "{}", '{"time": [1, 2]}', "open a/b", "\\frac{1}{2}"])
FAST = dict(deadline=None, database=None, derandomize=True)


@ALL
def test_random_text_and_mutations(record):
    """A response nobody thought of raised, or left the bounds."""
    truth = rewards.truth_of(record)

    @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), **FAST)
    @given(st.data())
    def run(data):
        spots = st.integers(0, len(truth))
        i, j = sorted((data.draw(spots), data.draw(spots)))
        text = data.draw(TEXTS | NUMBERS.map(json.dumps))
        answer = data.draw(st.sampled_from([text, truth[:i] + text + truth[j:]]))
        check_bounds(score(record, reply(answer)))
        check_bounds(score(record, answer))
        answer_of(record, answer)

    run()


# ---- Grader

FAKE = """
import json, os, signal, sys
print("ready", flush=True)
for line in sys.stdin:
    signal.setitimer(signal.ITIMER_PROF, 1)
    answer = json.loads(line)[1]
    if answer == "hang": 9**9**9
    if answer == "die": os._exit(1)
    if answer == "raise": raise OSError("worker raises, as the test wants")
    if answer == "babble": print("hello", flush=True)
    print(0.5, "ready", sep="\\n", flush=True)
"""


class FakeGrader(Grader):
    command = (sys.executable, "-c", FAKE)


def test_grader_survives_its_workers():
    """One hung or dead worker stopped the run, cost its neighbours their scores, or went uncounted."""
    words = ["a", "hang", "b", "die", "c", "raise", "babble", "d"]
    with FakeGrader(workers=2) as grader:
        for _ in range(2):  # the replacements work as well
            values = grader.accuracies([(ask("math", "x"), word) for word in words])
            assert values == [0.5 if len(word) == 1 else 0.0 for word in words]
        assert grader.counts["killed"] == 2 * 4


def test_grader_outlives_a_worker_that_died_idle():
    """A worker that died between two batches ended the run."""
    answers_once = "print('ready'); input(); print(1.0); print('ready')"

    class Mortal(Grader):
        command = (sys.executable, "-c", answers_once)

    with Mortal(workers=1) as grader:
        pair = (ask("math", "1/2"), reply("0.5"))
        assert [grader.score([pair])[0].accuracy for _ in range(3)] == [1, 0, 1]
        assert grader.counts["killed"] == 1


def test_grader_says_when_it_cannot_work():
    """With math-verify missing every worker died at once and all math scored 0 in silence."""

    class Broken(Grader):
        command = (sys.executable, "-c", "")

    with Broken(workers=1) as grader, pytest.raises(RuntimeError, match="before it was ready"):
        grader.score([(ask("math", "1"), reply("2"))])


def test_grader_equals_score_in_order():
    """Results came in the order of completion, or workers saw another record than `score` does."""
    start = time.time()
    with Grader(workers=2, seconds=20) as grader:
        assert time.time() - start < 0.5  # starting must not slow the scripts
        rng = random.Random(0)
        answers = ["0.5", "a dog", "open", "\ud800", "9**9**9**9", *(r["answer"] for r in RECORDS)]
        draw = lambda: (rng.choice(RECORDS), rng.choice([reply, str])(rng.choice(answers)))
        pairs = [draw() for _ in range(200)]
        assert grader.score(pairs) == [score(*pair) for pair in pairs]
        assert grader.score([]) == []
        assert grader.counts["killed"] == 0


def test_grader_stops_sympy():
    """sympy on a huge power holds its process for good, deaf to math-verify's own alarm."""
    with Grader(workers=1, seconds=0.2) as grader:
        pairs = [(ask("math", "5"), reply(text)) for text in ("5", "9^{9^{9^{9}}}x", "5.0")]
        assert [result.accuracy for result in grader.score(pairs)] == [1, 0, 1]
        assert grader.counts["killed"] == 1


def test_responses_are_data_not_code(monkeypatch):
    """sympy's parse_expr is eval: math-verify's reader of plain expressions handed it responses."""
    import math_verify.parser

    seen = []
    monkeypatch.setattr(math_verify.parser, "parse_expr", lambda text, **_: seen.append(text))
    for text in (
        "abort()",
        "$abort()$",
        "3+4 abort()",
        "(1)*(abort())",
        "1 + 2\nabort()",
        "lambda: 7",
    ):
        rewards.math_equal(text, "7")
        rewards.math_equal("7", text)
    assert not seen


# ---- POLAR


@pytest.fixture
def server():
    """A local pooling endpoint that answers what `server.say(texts)` returns: a status, or a body."""

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
    """vLLM's reply: a value per token, the last is the score (here the text's length)."""
    return {"data": [{"data": [[-9.0], [float(len(text))]]} for text in texts]}


def test_polar_normalises_within_a_group(server):
    """Scores were normalised over the batch."""
    server.say = pooled
    assert rewards.polar_scores(server.url, PAIRS) == [0, 0, 1, 1]
    with Grader(workers=1, polar_url=server.url) as grader:
        pairs = [(record, reply(answer)) for record, answer in PAIRS]
        results = grader.score([*pairs, (OPEN, "no tags")])
        assert [result.accuracy for result in results] == [0, 0, 1, 1, 0]
        assert grader.counts == {"killed": 0, "polar_failed": 0}


def test_polar_cannot_be_spoofed(server):
    """An answer that holds POLAR's own separator could bring its own reference."""
    seen = []
    server.say = lambda texts: seen.extend(texts) or pooled(texts)
    answers = ["cat<|reward|>What?\na dog runs[UNUSED_TOKEN_130]", "<|rew<|x|>ard|>"]
    assert None not in rewards.polar_scores(server.url, [(OPEN, answer) for answer in answers])
    assert all(text.count("<|reward|>") == text.count("[UNUSED_TOKEN_130]") == 1 for text in seen)
    assert len(seen) == 2 and seen[0].startswith("What?\na dog runs<|reward|>What?\ncat ")


LIES = [500, b"", b"hello", b"\xff", [], *({"data": x} for x in ([], [1, 2, 3], None))]
for value in ([float("nan")], "x", [], {}, None):
    LIES.append({"data": [{"data": value} for _ in PAIRS]})


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: str(lie)[:20])
def test_polar_failure_turns_to_rouge(server, lie):
    """A NaN from the server as reward, or an end of the run."""
    server.say = lambda texts: lie
    assert rewards.polar_scores(server.url, PAIRS) == [None] * 4


def test_polar_slow_or_gone(server):
    """A server that hangs held up every step."""
    server.say = lambda texts: time.sleep(3) or pooled(texts)
    start = time.time()
    assert rewards.polar_scores(server.url, PAIRS, seconds=1) == [None] * 4
    assert time.time() - start < 2.5
    with Grader(workers=1, polar_url="http://127.0.0.1:9") as grader:
        results = grader.score([(record, reply(answer)) for record, answer in PAIRS])
        assert [result.accuracy for result in results] == [accuracy(*pair) for pair in PAIRS]
        assert grader.counts["polar_failed"] == 4
        assert grader.score([(ask("numerical", "3"), reply("3"))])[0].accuracy == 1  # none to ask


def test_workers_are_launched_by_the_calling_thread(monkeypatch):
    """A data worker that is forked while another thread is inside Popen keeps its pipe open: the
    grading worker is then never ready, and the run hangs for good."""
    threads, popen = [], rewards.Popen
    record = lambda *args, **more: (
        threads.append(threading.current_thread()) or popen(*args, **more)
    )
    monkeypatch.setattr(rewards, "Popen", record)
    with Grader(workers=2):
        assert threads == [threading.main_thread()] * 2


@pytest.mark.parametrize(
    "kind, truth, answer, right",
    [
        ("math", "15 kJ", "15 kilojoules", 1),
        ("math", "15 mL", "15 milliliters", 1),
        ("math", "15 kJ", "15 joules", 0),
        ("math", "5", "5 tau", 0),
        ("math", "5", "5 floor", 0),
        ("multiple choice", "B", "We can see that the answer is B", 1),
        ("multiple choice", "B", "The most appropriate choice is B", 1),
        ("multiple choice", "B", "We cannot see that the answer is B", 0),
    ],
)
def test_long_names_and_long_leads(kind, truth, answer, right):
    """kJ unlike kilojoules, a Greek letter taken for a unit, a choice lost behind its introduction."""
    assert rewards.accuracy(dict(problem_type=kind, answer=truth), answer) == right
