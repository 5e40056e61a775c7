"""Multiple-choice questions, MMLU's way: what a quant answers, and where its base said otherwise.

The model reads solved examples and the question, and the letter with the largest probability as
the next token is its answer (Hendrycks et al., arXiv:2009.03300). Accuracy alone hides changes
that cancel, so answers are also compared one by one (Dutta et al., arXiv:2407.09141).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from string import ascii_uppercase
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from quantkit.container.names import shown
from quantkit.errors import NonFiniteError, UnsupportedError, UsageError
from quantkit.evaluate.questions import SHOTS, Question, Task

_CUE = "Answer:"
_Floats = npt.NDArray[np.floating[Any]]


class Tokenizer(Protocol):
    """What is needed of a tokenizer; `encode` adds no BOS."""

    @property
    def bos(self) -> int | None:
        """Id of the BOS token."""

    @property
    def add_bos(self) -> bool:
        """Whether the model's texts begin with BOS."""

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """Token ids of a text."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """What a model reads for each question of a task, and the tokens of the letters.

    Question k has the first `n_choices[k]` letters for answers. `digest` names all token ids.
    """

    prompts: tuple[npt.NDArray[np.int64], ...]
    letters: tuple[int, ...]
    n_choices: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        """Of all prompts."""
        return sum(map(len, self.prompts))

    @property
    def digest(self) -> str:
        """sha256 in hex."""
        found = hashlib.sha256(repr((self.letters, self.n_choices)).encode())
        for prompt in self.prompts:
            found.update(len(prompt).to_bytes(8, "little") + prompt.astype("<i8").tobytes())
        return found.hexdigest()


@dataclass(frozen=True, slots=True)
class Grade:
    """Answers of base and quant on `n` questions, and those that changed.

    Accuracies are shares; standard errors are sqrt(p (1 - p) / (n - 1)), that of the difference
    is of the paired answers. Errors are None for a single question.
    """

    n: int
    accuracy_reference: float
    accuracy_reference_error: float | None
    accuracy: float
    accuracy_error: float | None
    difference: float
    difference_error: float | None
    correct_to_wrong: int
    wrong_to_correct: int
    wrong_to_other_wrong: int


@dataclass(frozen=True, slots=True)
class ChoiceResult:
    """The grade over all questions and by subject."""

    task: str
    total: Grade
    by_subject: Mapping[str, Grade]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "task": self.task,
            **asdict(self.total),
            "by_subject": {name: asdict(grade) for name, grade in self.by_subject.items()},
        }


def prompts(task: Task, shots: int = SHOTS) -> Iterator[str]:
    """What to read for each question: a headline, `shots` examples of its subject, the question.

    The next token should be a blank and one of the letters.
    `UsageError` where a subject has fewer examples.
    """
    if shots < 0:
        raise UsageError(f"{shots} examples before a question")
    heads: dict[str, str] = {}
    for question in task.questions:
        subject = question.subject
        if subject not in heads:
            heads[subject] = _head(task, subject, shots)
        yield heads[subject] + _asked(question)


def encode(
    tokenizer: Tokenizer, task: Task, shots: int = SHOTS, *, n_ctx: int | None = None
) -> Encoded:
    """The prompts as tokens, with BOS in front where the model's texts begin with it.

    `UsageError` where one has more than `n_ctx` tokens.
    """
    start = [tokenizer.bos] if tokenizer.add_bos and tokenizer.bos is not None else []
    n_choices = tuple(len(question.choices) for question in task.questions)
    read = []
    for k, text in enumerate(prompts(task, shots)):
        ids = start + tokenizer.encode(text, parse_special=False)
        if n_ctx is not None and len(ids) > n_ctx:
            raise UsageError(
                f"{len(ids):,} tokens with its {shots} examples, the model's context is {n_ctx:,}",
                where=f"{task.name}, question {k + 1}",
                hint="show fewer examples, or leave the question out",
            )
        read.append(np.array(ids, np.int64))
    letters = letter_tokens(tokenizer, ascii_uppercase[: max(n_choices, default=0)])
    return Encoded(tuple(read), tuple(letters), n_choices)


def letter_tokens(tokenizer: Tokenizer, letters: Sequence[str]) -> list[int]:
    """The token that each letter is behind "Answer:", with the blank before it.

    `UnsupportedError` for a tokenizer that makes several tokens of one, or one of two letters.
    """
    before = tokenizer.encode(_CUE, parse_special=False)
    ids: list[int] = []
    for letter in letters:
        tokens = tokenizer.encode(f"{_CUE} {letter}", parse_special=False)
        if tokens[:-1] != before:
            raise UnsupportedError(
                f"{f' {letter}'!r} is not one token after {_CUE!r}: {before} becomes {tokens}",
                where="tokenizer",
                hint="choices are compared by one token each; this tokenizer cannot be tested so",
            )
        ids.append(tokens[-1])
    if len(set(ids)) < len(ids):
        raise UnsupportedError("two letters are one token", where="tokenizer")
    return ids


def grade(reference: Sequence[_Floats], quantised: Sequence[_Floats], task: Task) -> ChoiceResult:
    """Compare the answers of base and quant: scores of the letters, f32[n_choices] per question.

    Scores are logits or log-probabilities: the largest wins, the first of equal ones.
    `NonFiniteError` names a question with NaN.
    """
    right = np.array([question.answer for question in task.questions])
    ours = _answers(reference, task, "the base")
    theirs = _answers(quantised, task, "the quant")
    if not right.size:
        raise UsageError("there is no question to grade", where=task.name)
    subjects: dict[str, list[int]] = {}
    for k, question in enumerate(task.questions):
        subjects.setdefault(question.subject, []).append(k)
    return ChoiceResult(
        task.name,
        _grade(right, ours, theirs),
        {name: _grade(right[k], ours[k], theirs[k]) for name, k in subjects.items()},
    )


def _answers(scores: Sequence[_Floats], task: Task, whose: str) -> npt.NDArray[np.intp]:
    if len(scores) != len(task.questions):
        raise ValueError(f"{len(scores)} answers to {len(task.questions)} questions")
    for k, (question, row) in enumerate(zip(task.questions, scores, strict=True)):
        if row.shape != (len(question.choices),):
            raise ValueError(f"question {k}: {row.shape} for {len(question.choices)} choices")
        if np.isnan(row).any():
            raise NonFiniteError(
                f"{whose} gives a choice the score NaN",
                where=f"{task.name}, question {k + 1}",
            )
    return np.array([np.argmax(row) for row in scores], np.intp)


def _grade(
    right: npt.NDArray[np.intp], ours: npt.NDArray[np.intp], theirs: npt.NDArray[np.intp]
) -> Grade:
    was, is_ = ours == right, theirs == right
    change = is_.astype(np.float64) - was
    return Grade(
        n=right.size,
        accuracy_reference=float(was.mean()),
        accuracy_reference_error=_standard_error(was),
        accuracy=float(is_.mean()),
        accuracy_error=_standard_error(is_),
        difference=float(change.mean()),
        difference_error=_standard_error(change),
        correct_to_wrong=int((was & ~is_).sum()),
        wrong_to_correct=int((~was & is_).sum()),
        wrong_to_other_wrong=int((~was & ~is_ & (ours != theirs)).sum()),
    )


def _standard_error(values: npt.NDArray[Any]) -> float | None:
    n = values.size
    return None if n < 2 else float(values.std() / (n - 1) ** 0.5)


def _head(task: Task, subject: str, shots: int) -> str:
    about = f" about {subject.replace('_', ' ')}" if subject else ""
    examples = task.examples.get(subject, ())[:shots]
    if len(examples) < shots:
        raise UsageError(
            f"subject {shown(subject)!r} has {len(examples)} examples, {shots} are to be shown",
            where=task.name,
            hint="give more examples, or show fewer",
        )
    solved = "".join(f"{_asked(q)} {ascii_uppercase[q.answer]}\n\n" for q in examples)
    return f"The following are multiple choice questions (with answers){about}.\n\n{solved}"


def _asked(question: Question) -> str:
    choices = "".join(
        f"{letter}. {choice}\n"
        for letter, choice in zip(ascii_uppercase, question.choices, strict=False)
    )
    return f"{question.question}\n{choices}{_CUE}"


def as_text(result: Mapping[str, Any]) -> str:
    """A result as plain data (`ChoiceResult.as_json`) in a few lines, figures in percent."""

    def percent(key: str, sign: str = "") -> str:
        value, error = result[key], result[f"{key}_error"]
        doubt = "" if error is None else f" ± {100 * error:.2f}"
        return f"{100 * value:{sign}.2f}{doubt} %"

    n = result["n"]
    changed = (
        f"{result['correct_to_wrong']:,} right to wrong, "
        f"{result['wrong_to_correct']:,} wrong to right, "
        f"{result['wrong_to_other_wrong']:,} wrong to another wrong"
    )
    return "\n".join(
        [
            f"{shown(result['task'])}, {n:,} question{'s' if n > 1 else ''}",
            "",
            f"{'Accuracy(Q)':<30}: {percent('accuracy')}",
            f"{'Accuracy(base)':<30}: {percent('accuracy_reference')}",
            f"{'Accuracy(Q)-Accuracy(base)':<30}: {percent('difference', '+')}",
            f"{'Changed answers':<30}: {changed}",
        ]
    )
