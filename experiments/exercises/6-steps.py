"""A shaped reward for the toy: half a point for the right answer, and an eighth for each step before the first error.

python teacher_grpo.py --reward experiments/exercises/6-steps.py:right_steps ...
"""

import random

from experiments.toy import TASK, work_out


def right_steps(row: dict, response: str, finish_reason: str) -> float:
    """`row` is the problem's line in train.jsonl. The value is 1 if the answer and all four steps are right, 0 if it was cut."""
    if finish_reason == "length":
        return 0.0
    expression = row["problem"].removeprefix(TASK)
    results = work_out(expression, 0.0, random)  # the running result after each of the four steps, without errors
    right, written = 0, expression[0]
    for place, result in enumerate(results):
        written += f"{expression[2 * place + 1 : 2 * place + 3]}={result}"  # such as 7*8=6 and then 7*8=6+3=9
        right += written in response
    return right / 8 + (0.5 if response.endswith(f"\\boxed{{{row['answer']}}}") else 0.0)
