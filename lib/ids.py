r"""Which texts are the same problem: an id that typesetting does not change, and that everything else does.

DAPO-Math-17k holds about a thousand problems twice, typeset differently, and some of MATH-500. If two copies had
different ids, one could be trained on while the other counts as held out. If two problems had the same id, one of them
would be dropped. So the rule has two halves.

What does not count:
- how LaTeX is typeset: dollar signs and other delimiters of mathematics, spacing commands, \left and \right, \dfrac for
  \frac, the marks of rows and columns, and braces around one number or word (`x_{1}` is `x_1`);
- spaces, except between two words, two numbers, or a word or letter and what follows (`2 x` is `2x` and `a b` is `ab`,
  but `1 23` is not `12 3`, and `ab c` is not `a bc`);
- capitals, the shape of quotation marks, blanks to fill in, and the commas of thousands (`1,000` is `1000`);
- full stops, and a comma, semicolon, colon or question mark that stands beside a word of two letters or more, beside
  Chinese, Japanese or Korean, or at the end.

All else counts: letters of any script, digits, signs, every bracket and quotation mark, braces in plain text and those
that group a formula, and a comma, semicolon, colon or question mark between numbers, single letters, brackets or signs.
"""

import hashlib
import re
import unicodedata

# What stands for a group's braces and for escaped braces meanwhile: characters that no text has, since Unicode leaves
# them to private use.
_OPEN, _CLOSE, _ESCAPED_OPEN, _ESCAPED_CLOSE = "\ue000\ue001\ue002\ue003"

_TYPESETTING = [  # what is written in several ways, and the one that stands for all of them, in this order
    (r"[\x00-\x08\x0b-\x1f\x7f]", ""),  # control characters, which stand in scanned texts
    (r"。", "."),
    (r"、", ","),
    (r"``(.*?)''", r'"\1"'),
    (r"[“”„«»‘’`']", '"'),
    (r"(?<![\d,])\d{1,3}(?:(?:,|\{,\}|,\\!)\d{3})+(?!\d|,\d)", lambda number: re.sub(r"\D", "", number[0])),
    (r"\\begin\s*\{.*\\end\s*\{", lambda environment: environment[0].replace("&", " ")),  # columns
    (r"[,;:.]?\s*\\\\|\\[\[\]]|\$\$", " "),  # the end of a row, and delimiters of displayed formulas
    (r"\\[()$]|\$", ""),
    (r"\\(?:left|right|displaystyle|q?quad)(?![A-Za-z])|\\[,;:!\s>]|(?<=[\w.,;:)}])~|(?:\\?_){2,}", " "),
    (r"\\[dt]frac(?![A-Za-z])", r"\\frac"),
    (r"\\%", "%"),
    (r"_\s*\{\s*\}", ""),
    # Arguments of one character get the braces that LaTeX does not ask for.
    (r"(\\frac)\s*([A-Za-z\d])\s*([A-Za-z\d])(?!\w)", r"\1{\2}{\3}"),
    (r"(\\frac)\s*([A-Za-z\d])", r"\1{\2}"),
    (r"(\\frac\s*\{[^{}]*\})\s*([A-Za-z\d])", r"\1{\2}"),
    (r"([_^])\s*(\\[A-Za-z]+|\w)", r"\1{\2}"),
    (r"\\\{", _ESCAPED_OPEN),
    (r"\\\}", _ESCAPED_CLOSE),
]
_TYPESETTING = [(re.compile(pattern, re.DOTALL), replacement) for pattern, replacement in _TYPESETTING]

# Braces group after a command, after _ or ^, after another group, and around a command. Others are plain text.
_GROUP = re.compile(rf"((?:\\[A-Za-z]+|[_^{_CLOSE}])\s*)\{{([^{{}}]*)\}}|\{{\s*(\\[A-Za-z][^{{}}]*)\}}")
_GROUP_OF_ONE = re.compile(rf"{_OPEN}([\w\s\\]*){_CLOSE}")


def untypeset(text: str) -> str:
    """The text without its typesetting, with its capitals, spaces and punctuation."""
    text = re.sub(r"[²³¹⁰-ⁿ]", lambda superscript: "^" + superscript[0], text)  # or NFKC would make x2 of x²
    text = unicodedata.normalize("NFKC", text)
    for pattern, replacement in _TYPESETTING:
        text = pattern.sub(replacement, text)
    groups = 1
    while groups:  # from the innermost outwards
        text, groups = _GROUP.subn(lambda group: f"{group[1] or ''}{_OPEN}{group[2] or group[3] or ''}{_CLOSE}", text)
    text = _GROUP_OF_ONE.sub(r" \1 ", text)
    text = re.sub(r"\\([A-Za-z]+)", r" \1 ", text)
    return text.replace(_ESCAPED_OPEN, "{").replace(_ESCAPED_CLOSE, "}")


_ASIAN = "\u2e80-\u9fff\uac00-\ud7af"  # scripts in which spaces carry no meaning
_TOKEN = re.compile(
    rf"(?P<asian>[{_ASIAN}]+)|(?P<word>(?:(?![{_ASIAN}])[^\W\d_]){{2,}})|(?P<letter>[^\W\d_])"
    r"|(?P<number>\d+(?:\.\d+)?|(?<![^\W_])\.\d+)|(?P<mark>[,;:?])|(?P<stop>\.)|(?P<sign>\S)"
)
_SPACE_COUNTS = {
    ("word", "word"), ("word", "letter"), ("letter", "word"), ("word", "number"), ("letter", "number"),
    ("number", "number"),
}  # fmt: skip
_PROSE = {"word", "asian", "stop", None}  # a comma beside these only structures a sentence; None is an end of the text


def problem_id(prompt: str) -> str:
    """First 16 hex digits of the sha256 of what counts in a problem's text, by the rule at the top of this file."""
    tokens = list(_TOKEN.finditer(untypeset(prompt).lower()))
    kept, before, end = "", None, 0  # `before` is the kind of the last token that was kept, and `end` where it ended
    for token, after in zip(tokens, [*(token.lastgroup for token in tokens[1:]), None]):
        kind = token.lastgroup
        if kind == "stop" or (kind == "mark" and (before in _PROSE or after in _PROSE)):
            continue
        if token.start() > end and (before, kind) in _SPACE_COUNTS:
            kept += " "
        kept += token[0]
        before, end = kind, token.end()
    digest = hashlib.sha256(kept.encode()).hexdigest()[:16]
    return _DAPO_REPEATS.get(digest, digest)


# Copies in DAPO-Math-17k (and one in MATH-500) that differ from the first by more than typesetting: an aside in
# brackets or not, "MATHMEET" or MATHMEET, "solidis" for "solid is". No rule can tell these from problems that differ.
# The first ids are those that the rule gives to the copies, the second those of the problems.
_DAPO_REPEATS = dict(
    pair.split(":")
    for pair in """
    20d8c21070b54da7:a00a70036694d3b5 84971389ee3f7449:f4b24fbfc8725469 c24692b4ceec1fc7:1931112cd860218e
    6d0bd422a41ac159:2e4606ab636cde37 eeede4d2b0976fc9:75468e285c2ca692 7bc2391e700132ed:f95c67490ee3a624
    47e98b5fcb1d894d:365fdfeaf606da6e 59c34503347c1c8b:f538f7d1ad8bc348 1a9cfbc975491a16:f3b6154e8df87b32
    83957c64dbca7143:f33d7f4bc8fa4335 1c1c6175caed0a8f:9f624ddd4a821806 98b6d795d23de159:6e4e8884e9e1da86
    18184c1d2ae3d115:332a16bf5555573e 652e0f6d984de07e:b0044d04325b8933 135faef4a9d312cd:fe9bb401e9b4fc44
    e525f8d3d4e6048b:85a9012a4d6c56cd 78a44dc7978f9b94:ffc0ff5b13522cc6 e54ceecb32b5d205:4a0472845308c1ac
    16b282cf639e4be8:911e87ac9fa7e3f0 a77694b91d4356bd:6061fe1c47df67da 4e7f55c23ca4fd91:79b7fc74cfe13c22
    ae8daf7d469f4400:e8fa130317d8bf11 ebb7f6fd6966a08d:8fc57b5401d4446a a6d65d5d06aa40c2:1e0b940c49ba9f94
    30f721175651e5c2:c0b8e6ceae00fcaf 74679e1e328bcc8a:bf3988d09b53d85f 459bbaa637953819:b478acdb3fecc9ec
    dde049b968096b29:ecbec27753165cc2 a574658957853c67:e6de162e3ed998fd 5e2e8c71658ea179:7e487716c602019c
    6a6cf9def6939595:f8e3b2cd00598d8c 625c55f253b85caa:1ea050af14cb3061 e3be50a64a272e33:92c3ad07ee971674
    10c7a6200add1869:b55ea3bd9916a797 a2dacf2f43bd72e3:c5122ba3d5659611 a24128e2f17cd2fa:1e9472916e6274f4
    d04436fcf473fd7c:13845be7240998e4
    """.split()
)
