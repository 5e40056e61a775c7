"""Multiple-choice questions: from a JSONL file, or MMLU from the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import ascii_uppercase
from typing import TypeGuard

from quantkit.container.names import escaped, shown
from quantkit.errors import UsageError
from quantkit.text.extras import require

MMLU = "mmlu"
MMLU_DATASET = "cais/mmlu"
MMLU_REVISION = "c30699e8356da336a370243923dbaf21066bb9fe"
SHOTS = 5
MAX_FILE_BYTES = 256 << 20

_KEYS = {"question", "choices", "answer", "subject"}


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its 2 to 26 choices, and the index of the right one."""

    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str = ""


@dataclass(frozen=True, slots=True)
class Task:
    """Questions to grade, and solved examples by subject to show before them."""

    name: str
    questions: tuple[Question, ...]
    examples: Mapping[str, tuple[Question, ...]] = field(default_factory=dict)


def load_task(source: str | Path, *, examples: str | Path | None = None) -> Task:
    """A task from a JSONL file, or `mmlu` from the Hugging Face hub.

    A line is `{"question": str, "choices": [str, ...], "answer": index or letter,
    "subject"?: str}`. Examples come from a second such file; without one, the first five questions
    of each subject are shown and not graded. `UsageError` names the first line that is wrong.
    """
    if str(source) == MMLU:
        return _load_mmlu(examples)
    path = Path(source)
    questions = _read(path)
    if examples is None:
        return _split(path.stem, questions)
    return Task(path.stem, tuple(questions), _by_subject(_read(Path(examples))))


def sample(task: Task, limit: int) -> Task:
    """At most `limit` of the questions, evenly taken: every subject keeps its share, up to one.

    The same for every call, and an estimate of what all questions together would give.
    """
    if limit < 1:
        raise UsageError(f"{limit} questions to ask")
    n = len(task.questions)
    if limit >= n:
        return task
    subjects = list(dict.fromkeys(question.subject for question in task.questions))
    rank = {subject: k for k, subject in enumerate(subjects)}
    by_subject = sorted(range(n), key=lambda k: rank[task.questions[k].subject])
    # The middle of each of `limit` equal stretches.
    taken = sorted(by_subject[(2 * k + 1) * n // (2 * limit)] for k in range(limit))
    return replace(task, questions=tuple(task.questions[k] for k in taken))


def _split(name: str, questions: Iterable[Question]) -> Task:
    examples: dict[str, tuple[Question, ...]] = {}
    graded = []
    for question in questions:
        shown_first = examples.setdefault(question.subject, ())
        if len(shown_first) < SHOTS:
            examples[question.subject] = (*shown_first, question)
        else:
            graded.append(question)
    if not graded:
        raise UsageError(
            f"no question is left to grade: the first {SHOTS} of each subject are examples",
            where=name,
            hint="give the examples in a file of their own",
        )
    return Task(name, tuple(graded), examples)


def _by_subject(questions: Iterable[Question]) -> dict[str, tuple[Question, ...]]:
    subjects: dict[str, list[Question]] = {}
    for question in questions:
        subjects.setdefault(question.subject, []).append(question)
    return {subject: tuple(some) for subject, some in subjects.items()}


def _read(path: Path) -> list[Question]:
    where = escaped(str(path))
    try:
        if not path.is_file():
            raise UsageError(
                "no such file", where=where, hint=f"a task is a JSONL file, or {MMLU!r}"
            )
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UsageError(f"larger than {MAX_FILE_BYTES >> 20} MiB", where=where)
        raw = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=where) from error
    questions = []
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if line.strip():
            here = f"{where}, line {number}"
            try:
                item = json.loads(line.decode())
            except (ValueError, RecursionError) as error:
                raise UsageError("not a line of JSON", where=here) from error
            questions.append(_question(item, here))
    if not questions:
        raise UsageError("holds no question", where=where)
    return questions


def _question(item: object, where: str) -> Question:
    if not isinstance(item, dict):
        raise UsageError(f"expected an object, got {type(item).__name__}", where=where)
    if unknown := sorted(item.keys() - _KEYS):
        raise UsageError(
            f"unknown key {shown(unknown[0])!r}", where=where,
            hint=f"known are {', '.join(sorted(_KEYS))}",
        )  # fmt: skip
    question, choices = item.get("question"), item.get("choices")
    if not _is_text(question) or not question.strip():
        raise UsageError("question is not a text", where=where)
    if not isinstance(choices, list) or not all(map(_is_text, choices)):
        raise UsageError("choices are not a list of texts", where=where)
    if not 2 <= len(choices) <= len(ascii_uppercase):
        raise UsageError(f"{len(choices)} choices, expected 2 to 26", where=where)
    subject = item.get("subject", "")
    if not _is_text(subject):
        raise UsageError("subject is not a text", where=where)
    answer = _answer(item.get("answer"), len(choices), where)
    return Question(question, tuple(choices), answer, subject)


def _is_text(value: object) -> TypeGuard[str]:
    """JSON can spell halves of characters, which no tokenizer takes."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _answer(answer: object, n_choices: int, where: str) -> int:
    letters = ascii_uppercase[:n_choices]
    if isinstance(answer, str) and len(answer) == 1 and answer in letters:
        return letters.index(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < n_choices:
        return answer
    raise UsageError(
        f"answer is {shown(repr(answer))}, expected 0 to {n_choices - 1} or A to {letters[-1]}",
        where=where,
    )


def _load_mmlu(examples: str | Path | None) -> Task:
    """The test questions with the five solved ones per subject of the `dev` split."""
    solved = _mmlu_split("dev") if examples is None else _read(Path(examples))
    return Task(MMLU, tuple(_mmlu_split("test")), _by_subject(solved))


def _mmlu_split(split: str) -> list[Question]:
    library = require("datasets")
    try:
        rows = library.load_dataset(MMLU_DATASET, "all", revision=MMLU_REVISION, split=split)
    except (OSError, ValueError) as error:  # what the library raises without a network
        raise UsageError(
            f"cannot be loaded: {shown(str(error))}",
            where=f"{MMLU_DATASET} of the Hugging Face hub",
            hint="a task can also be a JSONL file",
        ) from error
    return [
        _question({key: row[key] for key in sorted(_KEYS)}, f"{MMLU_DATASET}, {split} {k}")
        for k, row in enumerate(rows)
    ]
