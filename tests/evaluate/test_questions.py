"""Files of questions are read strictly, sampled evenly, and MMLU comes from a pinned revision."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import UsageError
from quantkit.evaluate.questions import MMLU_REVISION, Question, Task, load_task, sample


def a_line(k=0, **more):
    return {"question": f"What is {k}+1?", "choices": ["7", str(k + 1)], "answer": "B"} | more


def write(path: Path, *lines) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


# --- files


def test_a_task_is_read_with_letters_and_indices(tmp_path):
    lines = [a_line(0, subject="maths"), a_line(1, answer=0), a_line(2, answer="A", subject="x")]
    examples = write(tmp_path / "dev.jsonl", a_line(9, subject="maths"), a_line(8))
    task = load_task(write(tmp_path / "mine.jsonl", *lines), examples=examples)
    assert task.name == "mine"
    assert [q.answer for q in task.questions] == [1, 0, 0]
    assert [q.subject for q in task.questions] == ["maths", "", "x"]
    assert task.questions[0].choices == ("7", "1")
    assert {s: [q.question for q in some] for s, some in task.examples.items()} == {
        "maths": ["What is 9+1?"],
        "": ["What is 8+1?"],
    }


def test_without_a_file_of_examples_the_first_five_of_each_subject_are_shown_not_graded(tmp_path):
    lines = [a_line(k, subject="ab"[k % 2]) for k in range(14)]
    task = load_task(write(tmp_path / "t.jsonl", *lines))
    assert [q.question for q in task.questions] == [f"What is {k}+1?" for k in (10, 11, 12, 13)]
    assert [q.question for q in task.examples["a"]] == [f"What is {k}+1?" for k in range(0, 10, 2)]
    assert len(task.examples["b"]) == 5


def test_a_file_that_is_all_examples_is_refused(tmp_path):
    path = write(tmp_path / "t.jsonl", *(a_line(k) for k in range(5)))
    with pytest.raises(UsageError, match="no question is left"):
        load_task(path)


BAD_LINES = {
    "no JSON": b"{",
    "not UTF-8": b'{"question": "\xff"}',
    "too deep": b"[" * 100_000,
    "a list": b"[]",
    "a number too long to convert": b"1" * 10_000,
    "an unknown key": json.dumps(a_line(id=3)).encode(),
    "no question": json.dumps({"choices": ["a", "b"], "answer": 0}).encode(),
    "an empty question": json.dumps(a_line(question=" ")).encode(),
    "choices that are a text": json.dumps(a_line(choices="ab")).encode(),
    "a choice that is a number": json.dumps(a_line(choices=["a", 1])).encode(),
    "one choice": json.dumps(a_line(choices=["a"], answer=0)).encode(),
    "27 choices": json.dumps(a_line(choices=["a"] * 27)).encode(),
    "no answer": json.dumps({"question": "q", "choices": ["a", "b"]}).encode(),
    "an answer beyond the choices": json.dumps(a_line(answer=2)).encode(),
    "an answer below zero": json.dumps(a_line(answer=-1)).encode(),
    "a letter beyond the choices": json.dumps(a_line(answer="C")).encode(),
    "a small letter": json.dumps(a_line(answer="b")).encode(),
    "two letters": json.dumps(a_line(answer="AB")).encode(),
    "an empty letter": json.dumps(a_line(answer="")).encode(),
    "a truth": json.dumps(a_line(answer=True)).encode(),
    "a fraction": json.dumps(a_line(answer=1.0)).encode(),
    "NaN": b'{"question": "q", "choices": ["a", "b"], "answer": NaN}',
    "a subject that is a list": json.dumps(a_line(subject=[])).encode(),
    "half a character in the question": json.dumps(a_line(question="\ud800")).encode(),
    "half a character in a choice": json.dumps(a_line(choices=["a", "\udfff"])).encode(),
    "half a character in the subject": json.dumps(a_line(subject="x\ud83d")).encode(),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_load_refuses_a_line_with(name, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(json.dumps(a_line()).encode() + b"\n\n" + BAD_LINES[name] + b"\n")
    with pytest.raises(UsageError) as caught:
        load_task(path)
    assert caught.value.where == f"{path}, line 3"
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 200


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_a_file_without_a_question_is_refused(content, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="holds no question"):
        load_task(path)


@pytest.mark.parametrize("name", [".", "missing.jsonl", "hellaswag"])
def test_what_is_no_file_is_refused_with_what_a_task_can_be(name, tmp_path):
    with pytest.raises(UsageError, match="no such file") as caught:
        load_task(tmp_path / name)
    assert "mmlu" in caught.value.hint


def test_a_huge_file_is_not_read(tmp_path):
    path = tmp_path / "t.jsonl"
    with path.open("wb") as file:
        file.truncate((256 << 20) + 1)
    with pytest.raises(UsageError, match="larger than 256 MiB"):
        load_task(path)


# --- MMLU from the hub


def test_mmlu_comes_from_a_pinned_revision_with_its_own_examples(monkeypatch):
    asked = []

    def load_dataset(name, config, *, revision, split):
        asked.append((name, config, revision, split))
        row = a_line(len(split), subject="abstract_algebra", answer=1)
        return [row | {"choices": ["a", "b", "c", "d"]}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    task = load_task("mmlu")
    assert [*{call[:3] for call in asked}] == [("cais/mmlu", "all", MMLU_REVISION)]
    assert len(MMLU_REVISION) == 40
    assert {call[3] for call in asked} == {"test", "dev"}
    assert [q.question for q in task.questions] == ["What is 4+1?"]
    assert [q.question for q in task.examples["abstract_algebra"]] == ["What is 3+1?"]


def test_mmlu_without_the_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError) as caught:
        load_task("mmlu")
    assert "pip install" in caught.value.hint


def test_mmlu_without_a_network_is_one_message(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no \x1b[31m route to host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(UsageError, match=r"cannot be loaded: no .* route to host") as caught:
        load_task("mmlu")
    assert caught.value.message.isprintable()
    assert "JSONL" in caught.value.hint


# --- samples


@given(st.lists(st.sampled_from("xyz"), min_size=1, max_size=60), st.integers(1, 70))
def test_a_sample_has_each_subjects_share_up_to_one_in_the_tasks_order(subjects, limit):
    task = Task("t", tuple(Question("Q?", (), k, of) for k, of in enumerate(subjects)))
    some = sample(task, limit)
    assert some == sample(task, limit)
    numbers = [question.answer for question in some.questions]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == min(limit, len(subjects))
    for subject, n in Counter(subjects).items():
        share = n * len(numbers) / len(subjects)
        assert abs(Counter(q.subject for q in some.questions)[subject] - share) < 1


def test_a_sample_of_nothing_is_refused():
    with pytest.raises(UsageError, match="0 questions"):
        sample(Task("t", (Question("Q?", ("x", "y"), 0),)), 0)
