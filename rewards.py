"""Response -> reward: how each of the ten tasks is graded, in training and evaluation.

    reward = 0.9 * accuracy + 0.1 * format + structure
    accuracy in [0, 1], format 0 or 1, structure in [0, 0.5]

A response must be one <think> block, then one <answer> block, else all parts are 0.
Coordinates are 0-1000 of width and height. Departures from the release (arXiv 2512.03043):
1. Tags are strict. The release grades the first of several answers, and answers without any tags.
2. Text is graded as written. The release removes spaces around "<", ">" and "/" in the answer only.
3. Choices, numbers and units are read as people write them: "It is B.", "1/2"; 15 cm is not 15 km.
4. Math needs no dollars; its words are text, not products as in the release: ABC is not ACB.
5. JSON numbers are finite. The release gives a NaN reward for NaN, and reads true and "12".
6. Boxes over time are averaged over all true seconds; relative accuracy is exact on decimal ties.
7. ROUGE and OCR read every script. The release's ROUGE of Chinese is 0 even against itself.
The time kernel of video segmentation is the release's exp(-|dt|/2); the paper has a Gaussian.
"""

import itertools
import json
import logging
import math
import re
import resource
import signal
import sys
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from http.client import HTTPException
from subprocess import PIPE, Popen
from unicodedata import category, normalize
from urllib.request import Request, urlopen

SLOW_TYPES = ("math", "open-ended", "OCR")
Score = namedtuple("Score", "reward accuracy format structure", defaults=4 * (0.0,))


def are_numbers(x, n):
    """A list of n JSON numbers: no true, no "12"; at most 1e9, so that products stay finite."""
    shape = type(x) is list and len(x) == n
    return shape and all(type(v) in (int, float) and -1e9 <= v <= 1e9 for v in x)


is_number = lambda x: are_numbers([x], 1)
is_span = lambda x: are_numbers(x, 2)  # [start, end] in seconds
is_box = lambda x: are_numbers(x, 4)  # [x1, y1, x2, y2]
is_track = lambda x: isinstance(x, dict) and all(map(is_box, x.values()))  # {"second": box}
is_points = lambda x: type(x) is list and len(x) == 3 and all(are_numbers(xy, 2) for xy in x)
SCHEMAS = {
    "temporal grounding": {"time": is_span},
    "spatial grounding": {"boxes": is_box},
    "spatial-temporal grounding": {"time": is_span, "boxes": is_track},
    "tracking": {"boxes": is_track},
    "segmentation": {"boxes": is_box, "positive_points": is_points, "negative_points": is_points},
}
TEXT_TYPES = ("multiple choice", "numerical", "math", "regression", "OCR", "open-ended")
JSON_TYPES = tuple(SCHEMAS)
PROBLEM_TYPES = TEXT_TYPES + JSON_TYPES

# ---- Reading tags and JSON
_TAG = "</?(?:think|answer)>"
_TEXT = f"((?:(?!{_TAG}).)*)"
_MENDED = [  # JSON as base models write it
    (r",(\s*[}\]])", r"\1"),  # trailing commas
    (r"([{,]\s*)\"?(\d+)(?:\.0*)?\"?(\s*:)", r'\1"\2"\3'),  # seconds: 4, "4.0"
    (r"\"(-?\d+(?:\.\d+)?)(?: ?s)?\"(?!\s*:)", r"\1"),  # numbers as text
    (r'"b?box(?:_2d)?"', '"boxes"'),
    (r'\{[^][{}]*"boxes"\s*:\s*(\[[^][{}]*\])[^][{}]*\}', r"\1"),  # a box and its label
    (r"\[\s*(\[[^][]*\])\s*\]", r"\1"),  # a list of one
]
_JSON = re.compile(r'\{\s*"(?:[^{}]|\{[^{}]*\})*\}|\[(?:[^][{}]|\[[^][{}]*\])*\]')


def parse_response(text):
    """The answer of a well-formed response, stripped; None if tags are wrong."""
    match = re.fullmatch(rf"(?s)\s*<think>{_TEXT}</think>\s*<answer>{_TEXT}</answer>\s*", text)
    return match and match[2].strip()


def find_answer(text):
    """The answer as a lenient reader finds it, or None: after the thinking the last pair of tags,
    else the last text beside tags. Of a thought that was cut off nothing is read."""
    text = re.sub(r"(?:\s*<\|\w+\|>)+\s*$", "", text or "").strip()  # <|im_end|>
    ended = "</think>" in text or text.endswith("</answer>")
    if not ended and re.search("<think>|</answer>", text):
        return None
    rest = text.split("</think>", 1)[-1]
    parts = re.split(_TAG, rest) + re.findall(f"(?s)(?:^|<answer>){_TEXT}</answer>", rest)
    answer = next((part.strip() for part in reversed(parts) if part.strip(" .\n")), "")
    return re.sub(r"^```(?:json\b|\w+\n)?|```$", "", answer).strip() or None


def read_json(text):
    """The JSON object that `text` is, else {}."""
    try:
        value = json.loads(text, parse_constant=int)  # int("NaN") raises
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def truth_of(record):
    """A record's `answer` or `solution` as text, without its <answer> tags."""
    truth = record.get("answer")
    truth = record.get("solution") or "" if truth is None else truth
    truth = truth if isinstance(truth, str) else json.dumps(truth)
    return normalize("NFC", re.sub("(?s)^.*<answer>|</answer>.*", "", truth).strip())


# ---- Reading units and numbers
_SIGNS = dict(zip("−–⁄。、’“”π∞", ["-", "-", "/", ".", ",", "'", '"', '"', r"\pi ", r"\infty "]))
_MARKUP = [
    (r"(?<!\\)\$\$?((?:[^$\\]|\\.)*)\$\$?", r"\1"),
    (r"(?<=\d)(?:\{,\}|\\[,!])(?=\d{3}(?!\d))", ","),
    (r"(?<!\\)\\(?:[()\[\],;:! ]|q?quad\b)|~|`", " "),
    (r"\\f?boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}", r" \1 "),
    (r"\\(?:mbox|text\w*|math(?:rm|bf|it|sf)|operatorname)\s*\{([^{}]*)\}", r" \1 "),
    (r"(?<!\w)(\*\*|__)(.+?)\1(?!\w)", r"\2"),
    (r"[^\S\n]+", " "),
    (r"\^? ?\{? ?\\(?:circ|degree)\b ?\}?|\^°", "°"),
    (r"\\([%$]|Omega\b)", r"\1"),
]


def plain(text):
    """Text without LaTeX and Markdown marks; full-width letters and digits become ASCII."""
    text = re.sub("([⁰¹²³⁴-⁹⁻]+)", r"^{\1}", re.sub("([¼½¾])", r" \1", text))
    text = normalize("NFKC", text).translate(str.maketrans(_SIGNS))
    for pattern, new in _MARKUP:
        text = re.sub(pattern, new, text)
    return text.strip("*_#\"' \n")


_FILLER = (  # words around an answer
    r"\b(?:so|thus|hence|therefore|then|finally|the|my|final|correct|right|true|best|most|likely|"
    r"clear|sure|appropriate|suitable|accurate|probably|clearly|definitely|answer|option|choice|"
    r"letter|one|result|value|score|rating|total|that|this|it's|it|is|was|i am|about|around|nearly|"
    r"roughly|approximately|(?:would|must|should|will|has to) be|(?:(?:i|we)(?: would|'d| can)? )?"
    r"(?:see|choose|pick|select|go with|think|believe|guess|say|conclude|give)|ответ|respuesta|réponse|"
    r"antwort|r[ei]sposta|الإجابة|الجواب)\b(?!')|所以|因此|综上|我|认为|应该?|本题|正确|最终|[的故]|答案|选项?|择|是|为|答え|正解|は|정답"
)
_LEADS = rf"(?i)^(?:(?:[=≈]|\\approx\b|{_FILLER})(?:[\s:,*_#\"']|- (?=[a-z(]))*)+(?=\S)"
bare = lambda text: re.sub(_LEADS, "", plain(text))

_named = lambda rows: {word: row.split()[0] for row in rows.split(", ") for word in row.split()}
_PREFIXES = _named("k kilo 千, c centi 厘, d deci, m milli 毫, μ micro, n nano, M mega, G giga")
_METRIC = _named(
    "m meter metre 米, g gram 克, L liter litre 升, s second 秒, N newton, J joule, W watt, V volt, "
    "A ampere amp, Pa pascal, Hz hertz, Ω ohm Omega, K kelvin, mol mole, eV, cal calorie"
)
_UNITS = {p + m: _PREFIXES[p] + _METRIC[m] for p in _PREFIXES for m in _METRIC}
_UNITS |= _METRIC | _named(  # "?" changes the number before it
    "km 公里, kg kilo kilos 公斤, s sec, min minute 分钟, h hr hour 小时, day 天, month 月, yr year 年 岁, "
    "in inch inche, ft foot feet, yd yard, mi mile, lb pound, oz ounce, ha hectare, km/h kmh kph, "
    "mi/h mph, ° deg degree 度, °C celsius, °F fahrenheit, % percent pct, $ US$ USD dollar 美元, "
    "¢ cent, € EUR euro, £ GBP, ¥ yuan RMB CNY 元, ₹, ₩, person people 人, 个, 只, 本, 条, 张, 次, 块, "
    "cc, ? half halve third quarter hundred thousand lakh crore dozen squared cubed floor time "
    "plus minus below not and more less fewer but wrong maybe perhaps score sin cos tan log sqrt "
    "alpha beta gamma delta theta lambda sigma tau phi omega"
)
_UNITS = {word.lower(): name for word, name in _UNITS.items() if len(word) > 1} | _UNITS
_WORD = r"US\$|°[CF]\b|[%°$€£¥₹₩¢]|[^\W\d_]+"
_UNIT = rf"/?(?:{_WORD})\.?(?:\^-?\d)?(?: ?[ /·*⋅.] ?(?:{_WORD})\.?(?:\^-?\d)?){{0,3}}"
_UNIT_FORMS = [
    (r"(?i)(?:\bsq(?:uare)?\b\.? ?|平方)([^\W\d_]+)", r"\1^2"),
    (r"(?i)(?:\bcu(?:bic)?\b\.? ?|立方)([^\W\d_]+)", r"\1^3"),
    (r" ?\bper\b ?", "/"),
    (r"(?i)(?:°|\bdeg(?:rees?)?) ?([CF])(?:elsius|ahrenheit)?\b", r"°\1"),
    (r"(?: ?\^ ?\{?|(?<=[a-zA-Z]))([23]|-[1-9])\}?", r"^\1"),
]
_CURRENCY = r"^([+-]?) ?(US\$|USD|EUR|GBP|CNY|RMB|[$€£¥₹₩]) ?([+-]?[\d.,]*\d)(?: ?USD$)?"
_BEFORE = r"(?:[^=]*=)?(?:\\[a-z]+|[^a-z])*?(?:[\d.)}]|\\pi)"
_SPLIT = rf"(?i)({_BEFORE}) ?((?!e[+-]?\d)/?(?:{_WORD}).*)"
_DIGITS = r"(?=\.?\d)(?:\d{1,3}(?:,\d{2,3})*,\d{3}|\d*)(?:\.\d*)?"
_VALUE = rf"([+-]?) ?(?:(\d+) (?=\d+ ?/))?({_DIGITS}(?:[eE][+-]?\d\d?)?)(?: ?/ ?({_DIGITS}))?"
_TEN_TO = re.compile(r"(?:(?<=[\d.]) ?(?:\\times|\\cdot|[×x*·]) ?|^)10 ?\^ ?\{? ?([+-]?\d\d?) ?\}?")
_FRACTION = re.compile(r"\\[dtc]?frac ?(?:\{([\d.,]+)\}|(\d)) ?(?:\{([\d.,]+)\}|(\d))")
_NAME = re.compile(r"^\\?[^\W\d][\w\\{}()' ]*[=≈] ?")  # x =
read_number = lambda text: read_quantity(text)[0]


def name_unit(match):
    """The one name of a unit's word, however spelled, or "?" if it is none."""
    low = match[0].lower() if len(match[0]) > 1 else match[0]
    name = low.removesuffix("s")
    known = _UNITS.get(match[0]) or _UNITS.get(low) or _UNITS.get(name)
    unknown = re.fullmatch("(?!.*(?:illion|teen|ty|th|fold)s?$)[a-z]{3,}", low)
    return known or (name if unknown else "?")


def read_quantity(text, named=True):
    """One number -> (its Decimal, its unit's one name or "", its text without the unit); of other
    text the Decimal is None. Unknown words of three letters are units; 2x m is a product.
    >>> [read_quantity(t)[1] for t in ("x = 5 km/h", "5 square meters per second", "5 red balls")]
    ['km/h', 'm^2/s', 'red ball']
    """
    text = (_NAME.sub("", bare(text)) if named else bare(text)).rstrip(".,; ")
    match = re.fullmatch(_SPLIT, re.sub(_CURRENCY, r"\1\3 \2", text)[:200])  # $5 -> 5 $
    number, unit = match.groups() if match else (text, "")
    for pattern, new in _UNIT_FORMS:
        unit = re.sub(pattern, new, unit[:60])
    unit = re.sub(_WORD, name_unit, unit).rstrip(".")
    text, unit = (number, unit) if re.fullmatch(_UNIT, unit) else (text, "")

    digits = re.sub(r"^[\[({](.*)[\])}]$", r"\1", text) if len(text) <= 200 else ""
    digits = _TEN_TO.sub(lambda match: ("e" if match.start() else "1e") + match[1], digits)
    match = re.fullmatch(_VALUE, _FRACTION.sub(r" \1\2/\3\4", digits).strip())
    sign, whole, number, below = match.groups() if match else ("", "", "0", "0")  # no value: 0/0
    number, below = (Decimal((part or "1").replace(",", "")) for part in (number, below))
    value = Decimal(f"{sign}1") * (number / below + int(whole or 0)) if below else None
    return value, unit, text


# ---- Reading choices
_DOUBT = r"(?<![\w'])(?:[b-h]|[ai](?! [a-z]))(?![\w'])|\b(?:or|and|not|wrong|incorrect)\b|\?"
_LETTER = re.compile(
    rf"(?is)[(\[{{]? ?([a-z])(?![\w'])(?:(?:[^\w?/&+]|{_FILLER})*"
    r"(?:\b(?:because|since|as|for|rather)\b.*|not [a-z]\W*)?|"  # "B since ...", "B, not C"
    rf"(?:[)\]}}:;.,]| [-–—=(])(?:(?!{_DOUBT}).)*)"  # "B: ..."
)
_LABEL = re.compile(r"^\W*([a-z])(?:[).:,\]]+ ?\(?| is | \(| [-–—=→] )(?=\S)")
_STATEMENT = re.compile(  # a sentence's end, or ", it is"
    r"(?i)(?<=[^.][.!?。！？])\s+(?!or\b|and\b)|\n+|\b(?=(?:so|thus|hence|therefore)\b)|"
    r"[,;] (?:but )?(?!(?:or|and)\b|[^.!?\n]*\b(?:not|wrong|incorrect)\b)"
    r"(?=[^.!?\n]*(?:\bis\b|it's|\bi\b|answer|option))"
)
fold = lambda text: _LABEL.sub(r"\1 ", " ".join(text.split()).casefold()).strip(" .!\"')]")


def read_phrase(phrase, names):
    """The letter of a phrase: an option's text, or a letter that nothing takes back."""
    text = bare(phrase)
    for name in (fold(plain(phrase)), fold(text)):
        if name in names:
            return names[name]
    match = _LETTER.fullmatch(text)
    letter = match and match[1].lower()
    right = letter in names.values() and names.get(name[2:], letter) == letter
    return letter if right else None


def read_choice(text, options=()):
    """The letter of the option ("A. the cat" or "the cat") that `text` chooses, else None.
    >>> [read_choice(t) for t in ("(b)", "答案是B", "I see. So B.", "Not B", "It may be B", "A, B")]
    ['B', 'B', 'B', None, None, None]
    """
    letters = "abcdefghijklmnopqrstuvwxyz"[: len(options) if options else None]
    names = {}  # text -> letter; None if two have it
    for letter, option in zip(letters, options or ()):
        body = fold(plain(str(option))).removeprefix(f"{letter} ")
        for name in {body, fold(bare(body)), f"{letter} {body}"}:
            names[name] = None if name in names else letter
    names |= {letter: letter for letter in letters}
    read = lambda phrases: {read_phrase(phrase[:2000], names) for phrase in phrases} - {None}
    found = read([text]) or read(_STATEMENT.split(text[-5000:]))
    return found.pop().upper() if len(found) == 1 else None


def readable(record, answer):
    """Whether an answer has the form that its task asks for, right or wrong."""
    if answer and record["problem_type"] == "multiple choice":
        return bool(read_choice(answer, record.get("options")))
    if answer and record["problem_type"] in ("numerical", "regression"):
        return read_number(answer) is not None
    return bool(answer) and structure(record, answer) > 0


def answer_of(record, response):
    """The answer that evaluation grades and inference shows: find_answer; of a choice its letter,
    of JSON the one object of the schema, if there is one. Training is strict about JSON."""
    answer, kind = find_answer(response), record["problem_type"]
    if answer and kind == "multiple choice":
        return read_choice(answer, record.get("options")) or answer
    if not answer or kind not in JSON_TYPES:
        return answer
    text = answer[:20_000] if '"' in answer else answer[:20_000].replace("'", '"')
    for pattern, new in _MENDED:
        text = re.sub(pattern, new, text)
    field = "time" if kind == "temporal grounding" else "boxes"
    found = set()
    for part in _JSON.findall(text):
        value = read_json(part if part[0] == "{" else f'{{"{field}": {part}}}')
        if kind == "tracking" and isinstance(value.get("boxes"), list):  # one a second
            value = {"boxes": {str(k): box for k, box in enumerate(value["boxes"], 1)}}
        if structure(record, json.dumps(value)):
            found.add(json.dumps(value))
    return found.pop() if len(found) == 1 else answer


# ---- Metrics: p is the prediction, y the truth
def mean_relative_accuracy(p, y):
    """Share of the thresholds c in {0.50, 0.55, .., 0.95} with |p - y| / |y| < 1 - c; of Decimals.
    >>> mean_relative_accuracy(90, 100)  # the error 0.1 is below 0.5, 0.45, .., 0.15
    0.8
    """
    return sum(p == y or 20 * abs(p - y) < k * abs(y) for k in range(1, 11)) / 10  # y = 0 too


def mean_box_iou(p, y, over="truth"):
    """Mean box IoU of {"second": box} dicts over the true seconds (a missing box counts 0), or,
    with over="shared", over those of both sides, as released. Of two boxes their IoU.
    >>> mean_box_iou({"3": [0, 0, 9, 9]}, {"3": [0, 0, 9, 9], "4": [0, 0, 9, 9]})
    0.5
    """
    if not (isinstance(p, dict) and isinstance(y, dict)):
        return iou_box(p, y)
    seconds = [k for k in y if k in p] if over == "shared" else y
    return sum(iou_box(p.get(k), y[k]) for k in seconds) / max(1, len(seconds))


def point_kernel(p, y, sigma=50.0):
    """G = exp(-d^2 / (2 sigma^2)), d = mean distance of 3 points to 3, the best of 6 matchings.
    >>> round(point_kernel([[0, 150], [0, 50], [0, 100]], [[0, 0], [0, 50], [0, 100]]), 4)
    0.6065
    """
    d = min(sum(map(math.dist, order, y)) for order in itertools.permutations(p)) / 3
    return math.exp(-(d**2) / (2 * sigma**2))


def iou(p, y):
    """Intersection over union of two spans or two boxes; 0 if one is malformed, reversed or empty.
    >>> iou_1d([0, 4], [2, 6]), iou_box([0, 0, 10, 10], [0, 5, 10, 15])
    (0.3333333333333333, 0.3333333333333333)
    """
    if not (is_span(p) and is_span(y) or is_box(p) and is_box(y)):
        return 0.0
    n = len(p) // 2  # axes
    size = lambda x: math.prod(max(0.0, b - a) for a, b in zip(x[:n], x[n:]))
    both = size([*map(max, p[:n], y[:n]), *map(min, p[n:], y[n:])])
    union = size(p) + size(y) - both
    return both / union if union > 0 else 0.0


iou_1d = iou_box = iou
# Thai, Lao, Tibetan, Burmese; Khmer; Japanese, Chinese: a character is a word
_UNSPACED = re.compile("([\u0e00-\u109f\u1780-\u17ff\u3040-\u9fff])")


def word_error_rate(p, y):
    """Word edits that turn text p into text y, per word of y (can exceed 1).
    >>> word_error_rate("the dark room", "the dog park")
    0.6666666666666666
    """
    p, y = (_UNSPACED.sub(r" \1 ", text).split() for text in (p, y))
    row = list(range(len(p) + 1))  # edits from beginnings of p to one of y
    for i, word in enumerate(y, 1):
        above, row = row, [i]
        for j, other in enumerate(p):
            row.append(min(above[j] + (word != other), above[j + 1] + 1, row[j] + 1))
    return row[-1] / max(1, len(y))


def rouge(p, y):
    """Mean F of ROUGE-1, -2 and -L with stemming; at most 2/3 for a single word, as released.
    >>> rouge("a dog runs", "A dog runs."), round(rouge("cat", "cat"), 4), rouge("一只狗", "一只狗。")
    (1.0, 0.6667, 1.0)
    """
    from rouge_score.rouge_scorer import RougeScorer

    # It reads ASCII only: other letters are given in hex.
    code = lambda c: c if c.isascii() else f"{ord(c):x}" if category(c)[0] in "LMN" else " "
    words = lambda text: "".join(map(code, _UNSPACED.sub(r" \1 ", text[:20_000].lower())))
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    return sum(part.fmeasure for part in scorer.score(words(y), words(p)).values()) / 3


def math_side(text, named):
    """The value, unit and LaTeX of a text; of prose, of what follows the last "is"."""
    if "\\boxed" in text or len(re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}", text)) > 2:
        text = re.split(r"(?<=[.!?])\s+|\n+|\b(?:is|are|equals)\b", text.strip())[-1]
    value, unit, latex = read_quantity(text, named)
    latex = re.sub(r"(?:√|(?<!\\)sqrt) ?(?:\(([^()]*)\)|(\d+))", r"\\sqrt{\1\2}", latex)
    latex = re.sub(r"(?<![\\a-zA-Z])(sin|cos|tan|ln|log|pi)(?![a-zA-Z])", r"\\\1", latex)
    return value, unit, latex


def math_equal(p, y):
    """Numbers are equal to six decimals, words as text, the rest by math-verify (main thread only).
    >>> math_equal("0.5", "1/2"), math_equal("30°", "30"), math_equal("5 cm", "5 km")
    (True, True, False)
    """
    same = p.split() == y.split()
    if same or max(len(p), len(y)) > 2000:
        return same
    named = ("=" in p) != ("=" in y)  # x = 5 is 5, 2x = 5 is not
    (p_value, p_unit, p), (y_value, y_unit, y) = math_side(p, named), math_side(y, named)
    if p_unit and y_unit and p_unit != y_unit or named and "=" in p + y:
        return False
    if None not in (p_value, y_value):
        limit = min(Decimal("5e-7"), abs(y_value) / 100_000)
        scale = Decimal(100) ** ((p_unit == "%") - (y_unit == "%"))  # 25% is 25 and 0.25
        return any(abs(value - y_value) <= limit for value in (p_value, p_value / scale))
    words = r"(?!.* (?:and|or) )[(\[]?(?:\\\w+ )?[^\W\d_]+(?:[ '-]+[^\W\d_]+)*[)\]]?"
    if re.fullmatch(words, p) and re.fullmatch(words, y):
        return p.strip("()[]").casefold() == y.strip("()[]").casefold()
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    rules = NormalizationConfig(malformed_operators=True, nits=True)
    latex = [LatexExtractionConfig(normalization_config=rules)]
    return bool(verify(parse(f"${y}$", latex), parse(f"${p}$", latex)))


def accuracy(record, answer):
    """How right an answer (text inside the tags) is, in [0, 1]."""
    kind, truth = record["problem_type"], truth_of(record)
    if kind not in PROBLEM_TYPES:
        raise ValueError(f"problem_type is {kind!r}, expected one of {PROBLEM_TYPES}")
    answer = normalize("NFC", answer or "")
    if kind == "multiple choice":
        letter = read_choice(truth, record.get("options"))
        said = read_choice(answer, record.get("options")) if letter else fold(answer)
        return float(said == (letter or fold(truth)))
    if kind in ("numerical", "regression"):
        (p, p_unit, _), (y, y_unit, _) = read_quantity(answer), read_quantity(truth)
        if None in (p, y) or (p_unit and y_unit and p_unit != y_unit):
            return 0.0
        same = round(float(p), 2) == round(float(y), 2)  # binary floats, as released
        return mean_relative_accuracy(p, y) if kind == "regression" else float(same)
    if kind == "math":
        return float(math_equal(answer, truth))
    if kind == "OCR":
        return max(0.0, 1 - word_error_rate(answer, truth))
    if kind == "open-ended":
        return rouge(answer, truth)
    p, y = read_json(answer), read_json(truth)
    fields = ("boxes", "time", "positive_points", "negative_points")
    boxes, times, positive, negative = ([p.get(k), y.get(k)] for k in fields)
    if kind == "temporal grounding":
        return iou_1d(*times)
    if kind in ("spatial grounding", "tracking"):
        return mean_box_iou(*boxes)
    if kind == "spatial-temporal grounding":
        return 0.5 * iou_1d(*times) + 0.5 * mean_box_iou(*boxes)
    # segmentation: 0 without 3 + 3 points or a video's time
    image = record.get("data_type") == "image"
    if not all(map(is_points, positive + negative)) or not (image or are_numbers(times, 2)):
        return 0.0
    box, points = iou_box(*boxes), point_kernel(*positive) + point_kernel(*negative)
    if image:
        return 0.5 * box + 0.25 * points
    return 0.3 * box + 0.3 * math.exp(-abs(times[0] - times[1]) / 2) + 0.2 * points


def structure(record, answer):
    """How well an answer keeps to the task's JSON schema, in [0, 0.5]; 0.5 for free text.
    >>> record = {"problem_type": "tracking", "answer": '{"boxes": {"1": [], "2": []}}'}
    >>> structure(record, '{"boxes": {"1": [1, 2, 3, 4]}}')  # one of two seconds
    0.375
    """
    kind, p = record["problem_type"], read_json(answer)
    video = kind == "segmentation" and record.get("data_type") != "image"
    schema = SCHEMAS.get(kind, {}) | ({"time": is_number} if video else {})
    if not all(fits(p.get(field)) for field, fits in schema.items()):
        return 0.0
    boxes, seconds = p.get("boxes"), read_json(truth_of(record)).get("boxes")
    if not (isinstance(boxes, dict) and isinstance(seconds, dict)):
        return 0.5
    return 0.25 + 0.25 * sum(k in boxes for k in seconds) / max(1, len(seconds))


def gradable(record):
    """Why no answer can be graded against a record's truth, or ""."""
    kind, truth, options = record["problem_type"], truth_of(record), record.get("options")
    if kind in SLOW_TYPES or not truth and record.get("segmentation_output"):
        return ""
    if kind == "multiple choice":
        return "" if not options or read_choice(truth, options) else "is none of the options"
    if structure(record, truth) < 0.5:
        return "does not keep to the schema of its task"
    if accuracy(record, truth) < 1:
        return "is no number" if kind in TEXT_TYPES else "has a reversed or empty time or box"
    y = read_json(truth)
    places = json.dumps([y[field] for field in SCHEMAS.get(kind, {}).keys() - {"time"}])
    numbers = re.findall(r"[-+.\de]+(?=[],])", places)  # not the seconds, which are keys
    return "" if all(0 <= float(n) <= 1000 for n in numbers) else "has a coordinate outside 0-1000"


def score(record, response, graded=None):
    """Grade a response, unless its accuracy is `graded` already. Math can hang: use `Grader`.
    >>> score({"problem_type": "numerical", "answer": "3"}, "<think>x</think><answer>3</answer>")
    Score(reward=1.5, accuracy=1.0, format=1.0, structure=0.5)
    """
    answer = parse_response(response)
    if answer is None:
        return Score()
    value = accuracy(record, answer) if graded is None else graded
    shape = structure(record, answer)
    return Score(0.9 * value + 0.1 + shape, value, 1.0, shape)


# ---- POLAR: vllm serve internlm/POLAR-7B --runner pooling --trust-remote-code --port 8100
def polar_scores(url, pairs, seconds=60.0):
    """list of (record, answer) -> POLAR's scores, min-max normalised to [0, 1] within each prompt,
    1 if all are equal; all None if the server fails, since ROUGE for a part has another scale."""
    texts = []
    for record, answer in pairs:
        asked = record.get("problem", "")
        answer = re.sub(r"<\|[^|]*\|>|\[UNUSED_TOKEN_\d+\]", " ", answer[:20_000])
        texts.append(f"{asked}\n{truth_of(record)}<|reward|>{asked}\n{answer}[UNUSED_TOKEN_130]")
    body = json.dumps({"input": texts, "use_activation": False}).encode()  # no sigmoid
    request = Request(f"{url.rstrip('/')}/pooling", body, {"Content-Type": "application/json"})
    try:
        reply = json.load(urlopen(request, timeout=seconds))
        scores = [item["data"][-1][0] for item in reply["data"]]  # of the last token
    except (OSError, HTTPException, ValueError, LookupError, TypeError):
        scores = None
    if not are_numbers(scores, len(pairs)):
        return [None] * len(pairs)
    relative = []
    for (record, _), score in zip(pairs, scores):
        group = [value for pair, value in zip(pairs, scores) if pair[0] == record]
        low, high = min(group), max(group)
        relative.append((score - low) / (high - low) if high > low else 1.0)
    return relative


class Grader:
    """Grades lists of responses, in order. Math, ROUGE and OCR go to worker processes, since sympy
    can hang where no Python time limit reaches. An item that ends its worker, such as by `seconds`
    of CPU time, scores 0. counts: "killed" (such items), "polar_failed" (answers)."""

    command = ("env", "OMP_NUM_THREADS=1", sys.executable, __file__)
    __enter__ = lambda self: self
    __exit__ = lambda self, *_: self.close()

    def __init__(self, workers=2, seconds=10.0, polar_url=None):
        self.seconds, self.polar_url, self.counts = seconds, polar_url, Counter()
        # By this thread: a fork while another is inside Popen would keep a pipe open for good.
        self.idle = [self._launch() for _ in range(workers)]

    def _launch(self):
        options = dict(stdin=PIPE, stdout=PIPE, text=True, start_new_session=True)  # deaf to Ctrl-C
        return Popen([*self.command, str(self.seconds)], **options)

    def score(self, pairs):
        """list of (record, response) -> list of Score."""
        answers = [(record, parse_response(response)) for record, response in pairs]
        return [score(*pair, graded) for pair, graded in zip(pairs, self.accuracies(answers))]

    def accuracies(self, pairs):
        """list of (record, answer or None) -> list of accuracy."""
        kinds = [answer is not None and record["problem_type"] for record, answer in pairs]
        opens = [i for i, kind in enumerate(kinds) if self.polar_url and kind == "open-ended"]
        scores = polar_scores(self.polar_url, [pairs[i] for i in opens]) if opens else []
        polar = dict(zip(opens, scores))
        with ThreadPoolExecutor(len(self.idle)) as pool:
            values = list(pool.map(self._grade, pairs, map(polar.get, range(len(pairs)))))
        self.counts.update(killed=values.count(None), polar_failed=scores.count(None))
        return [value or 0.0 for value in values]

    def _grade(self, pair, polar):
        """One item's accuracy, or None if it ended its worker."""
        record, answer = pair
        if answer is None or polar is not None:
            return polar or 0.0
        if record["problem_type"] not in SLOW_TYPES:
            return accuracy(record, answer)
        worker = self.idle.pop()
        if worker.stdout.readline() != "ready\n":
            raise RuntimeError(f"a grading worker ended before it was ready: {self.command}")
        try:
            print(json.dumps([record, answer]), file=worker.stdin, flush=True)
            value = float(worker.stdout.readline())
        except (BrokenPipeError, ValueError):  # it is dead, or babbles
            worker.kill()
            worker.communicate()  # waits for its end
            worker, value = self._launch(), None
        self.idle.append(worker)
        return value

    def close(self):
        for worker in self.idle:
            worker.kill()
            worker.communicate()


def work(seconds):
    """A worker: reads JSON lines [record, answer] and answers each with a line, its accuracy."""
    logging.disable()  # math-verify tells what it gave up
    resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))  # 4 GiB, for huge integers
    math_equal("x", "y + 1"), rouge("", "")  # imports
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # then SIGPROF ends it
        print(accuracy(*json.loads(line)), "ready", sep="\n", flush=True)


if __name__ == "__main__":
    work(float(sys.argv[1]))
