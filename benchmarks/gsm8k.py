"""Problems in words with a number as their answer, in the form of GSM8K: what is asked, and whether the answer is right.

A line of the file is {"question": "...", "answer": "... #### 42"}. Without examples a question is asked with a sentence that says
how to answer; with examples, as lm-evaluation-harness asks it, the first problems of the file stand before it with their worked
answers, and the answer ends where a next question would begin. An answer is right where its last number is the one behind ####.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from offload_sirius.errors import PromptError

INSTRUCTION = "Think step by step, and end with the answer as a number behind ####."
STOP = "Question:"
NUMBER = re.compile(r"(?:(?<![\d)])-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
"""The minus of a difference is none of its own."""
CALCULATION = re.compile(r"<<[^<>]*>>")
"""Notes for a calculator, which are not part of the worked answer's text."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One of them."""

    question: str
    worked: str
    """The answer with its steps."""
    result: Decimal


def read_problems(path: Path) -> list[Problem]:
    """Empty lines are passed over. Raises PromptError, naming file and line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise PromptError(f"problems {path}: {error.strerror}; give a file that can be read") from error
    except UnicodeDecodeError as error:
        raise PromptError(f"problems {path}: byte {error.start} is not UTF-8; give a JSONL file") from error
    problems = [_problem(line, f"problems {path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not problems:
        raise PromptError(
            f'problems {path}: the file has no line; give one {{"question": "...", "answer": "... #### 42"}} a line'
        )
    return problems


def ask(problem: Problem, examples: Sequence[Problem]) -> str:
    """The prompt."""
    if not examples:
        return f"{problem.question}\n{INSTRUCTION}"
    shown = "".join(f"Question: {each.question}\nAnswer: {each.worked}\n\n" for each in examples)
    return f"{shown}Question: {problem.question}\nAnswer:"


def is_right(text: str, result: Decimal) -> bool:
    """Whether the last number of a text is the result, however it is written."""
    numbers = NUMBER.findall(text)
    return bool(numbers) and _decimal(numbers[-1]) == result


def _decimal(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))


def _problem(line: str, source: str) -> Problem:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise PromptError(f'{source}: not JSON; give {{"question": "...", "answer": "... #### 42"}}') from error
    question, answer = (found.get(name) if isinstance(found, dict) else None for name in ("question", "answer"))
    if not isinstance(question, str) or not isinstance(answer, str) or "####" not in answer:
        raise PromptError(
            f'{source}: there is no question, or no answer with ####; give {{"question": "...", "answer": "... #### 42"}}'
        )
    number = answer.rsplit("####", 1)[1].strip().lstrip("$")
    if not NUMBER.fullmatch(number):
        raise PromptError(f"{source}: behind #### stands {number!r}; it must be a number, such as 42 or 1,234.5")
    return Problem(question=question, worked=CALCULATION.sub("", answer), result=_decimal(number))
