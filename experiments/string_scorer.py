r"""Grades as scorers of the MATH benchmark do: the last \boxed{...} must equal the right answer letter for letter.

Both are normalised before: spacing, \left and \right, \dfrac, units, text, degrees, dollar and percent signs, a final
full stop. No algebra is done, so that 2\sqrt{2} is not \sqrt{8} and 0.25 is not 1/4.

The authors' code for their earlier papers uses a scorer of this kind. This is our rendering of one, and not their code:
it is here to show how many points of a score belong to the scorer (`python -m experiments.audit --regrade REPORT`).
"""

import re

from lib.verifier import MAX_CHARS, extract_answer

_REPLACE = [  # patterns and what they become, in this order
    (r"\\[!,;: ]|~|\\q?quad(?![A-Za-z])|\s+", " "),  # all kinds of spacing; the spaces go at the end
    (r"\\(?:left|right)(?![A-Za-z])", ""),
    (r"\\[dt]frac(?![A-Za-z])", r"\\frac"),
    (r"\^ *(?:\{ *\\circ *\}|\\circ(?![A-Za-z]))", ""),  # degrees
    (r"\\?[$%]", ""),
    (r"\\(?:text|mbox) ?\{ [^{}]*\}.*$", ""),  # "5 \text{ cm}^2": text that begins with a space is a unit
    (r"\\(?:text|mbox|mathrm|textbf) ?\{([^{}]*)\}", r"\1"),
    (r"\.+ *$", ""),
    (" ", ""),
    (r"^[A-Za-z]{1,2}=", ""),  # "x=5" is 5
    (r"(^|[{(,])\.(?=\d)", r"\g<1>0."),
    (r"\\sqrt(\w)", r"\\sqrt{\1}"),
    (r"\\frac(\d)(\d)", r"\\frac{\1}{\2}"),
    (r"\\frac(\d)\{", r"\\frac{\1}{"),
    (r"(\\frac\{[^{}]*\})(\w)", r"\1{\2}"),
    (r"^(-?\d+)/(\d+)$", r"\\frac{\1}{\2}"),
    (r"^0\.50*$", r"\\frac{1}{2}"),
]
_REPLACE = [(re.compile(pattern, re.ASCII), replacement) for pattern, replacement in _REPLACE]


def normalise(answer: str) -> str:
    for pattern, replacement in _REPLACE:
        answer = pattern.sub(replacement, answer)
    return answer


def is_correct(response: str, gold: str) -> bool:
    """Whether the last box of a response holds the right answer, by string equality after a normalisation."""
    answer = extract_answer(response)
    return bool(answer) and len(answer) <= MAX_CHARS and normalise(answer) == normalise(gold)
