"""Multiple choice: MMLU's words, one token a letter, answers compared in pairs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import NonFiniteError, UnsupportedError, UsageError
from quantkit.evaluate.choice import as_text, encode, grade, letter_tokens, prompts
from quantkit.evaluate.questions import Question, Task

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-kimi-k2.5"


def a_task(answers, n_choices=4, subjects=None) -> Task:
    return Task(
        "t",
        tuple(
            Question(f"q{k}", ("x",) * n_choices, answer, subjects[k] if subjects else "")
            for k, answer in enumerate(answers)
        ),
    )


def chosen(answers, n_choices=4):
    """Log-probabilities that make these the answers."""
    return [np.log(np.eye(n_choices, dtype=np.float32)[a] + 0.1) for a in answers]


class Bytes:
    """A token per byte, but " A" to " Z" are one each."""

    def __init__(self, bos=None, add_bos=False):
        self.bos, self.add_bos = bos, add_bos

    def encode(self, text, *, parse_special):
        assert not parse_special
        raw, ids, k = text.encode(), [], 0
        while k < len(raw):
            is_letter = raw[k] == 32 and raw[k + 1 : k + 2].isupper() and k + 2 == len(raw)
            ids.append(1000 + raw[k + 1] if is_letter else raw[k])
            k += 2 if is_letter else 1
        return ids


# --- prompts


def test_prompt_is_worded_as_mmlu_is():
    dev = Question("What is 1+1?", ("1", "2", "3", "4"), 1, "abstract_algebra")
    test = Question("What is 2+2?", ("4", "5", "6", "7"), 0, "abstract_algebra")
    (prompt,) = prompts(Task("t", (test,), {"abstract_algebra": (dev, dev)}), shots=1)
    assert prompt == (
        "The following are multiple choice questions (with answers) about abstract algebra.\n"
        "\n"
        "What is 1+1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n"
        "\n"
        "What is 2+2?\nA. 4\nB. 5\nC. 6\nD. 7\nAnswer:"
    )


def test_a_question_without_subject_and_examples():
    (prompt,) = prompts(Task("t", (Question("Q?", ("x", "y"), 0),)), shots=0)
    assert prompt == (
        "The following are multiple choice questions (with answers).\n\nQ?\nA. x\nB. y\nAnswer:"
    )


@pytest.mark.parametrize("shots", [3, -1])
def test_more_examples_than_there_are_is_refused(shots):
    dev = Question("d", ("x", "y"), 0, "s")
    with pytest.raises(UsageError, match="examples"):
        list(prompts(Task("t", (Question("Q?", ("x", "y"), 0, "s"),), {"s": (dev, dev)}), shots))


# --- tokens


@pytest.mark.parametrize("bos", [None, 7])
def test_prompts_are_encoded_whole_with_a_token_per_letter(bos):
    task = Task("t", (Question("Q?", ("x", "y"), 0), Question("R?", ("x", "y", "z"), 2)))
    asked = encode(Bytes(bos, add_bos=True), task, shots=0)
    start = [] if bos is None else [bos]
    read = [start + list(text.encode()) for text in prompts(task, 0)]
    assert [ids.tolist() for ids in asked.prompts] == read
    assert asked.n_tokens == sum(map(len, read))
    assert asked.letters == (1065, 1066, 1067)
    assert asked.n_choices == (2, 3)


def test_bos_is_left_out_where_the_model_has_none_in_front():
    task = Task("t", (Question("Q?", ("x", "y"), 0),))
    assert encode(Bytes(7, add_bos=False), task, shots=0).prompts[0][0] == ord("T")


def test_a_question_beyond_the_context_is_refused_by_number():
    task = Task("t", (Question("Q?", ("x", "y"), 0), Question("R" * 50, ("x", "y"), 0)))
    n = encode(Bytes(), task, shots=0).n_tokens
    longest = max(map(len, encode(Bytes(), task, shots=0).prompts))
    assert encode(Bytes(), task, shots=0, n_ctx=longest).n_tokens == n
    with pytest.raises(UsageError, match=f"{longest} tokens") as caught:
        encode(Bytes(), task, shots=0, n_ctx=longest - 1)
    assert caught.value.where == "t, question 2"


def test_digest_names_prompts_and_choices():
    def digest(*questions):
        return encode(Bytes(), Task("t", questions), shots=0).digest

    one, two = Question("Q?", ("x", "y"), 0), Question("R?", ("x", "y"), 0)
    assert digest(one, two) == digest(one, two)
    assert len({digest(one), digest(two), digest(one, two), digest(two, one)}) == 4


def test_a_tokenizer_that_splits_letters_is_refused():
    class Split(Bytes):
        def encode(self, text, *, parse_special):
            return list(text.encode())

    with pytest.raises(UnsupportedError, match=r"' A' is not one token") as caught:
        letter_tokens(Split(), ["A", "B"])
    assert caught.value.hint


def test_a_tokenizer_that_merges_the_letter_with_the_colon_is_refused():
    class Merging(Bytes):
        def encode(self, text, *, parse_special):
            return [1, 2] if text.endswith(":") else [1, 3]

    with pytest.raises(UnsupportedError):
        letter_tokens(Merging(), ["A"])


def test_a_tokenizer_that_knows_no_letters_is_refused():
    class Unknowing(Bytes):
        def encode(self, text, *, parse_special):
            return [1] if text.endswith(":") else [1, 0]

    with pytest.raises(UnsupportedError, match="two letters are one token"):
        letter_tokens(Unknowing(), ["A", "B"])


def test_kimis_tokenizer_has_a_token_for_each_letter():
    from quantkit.source.checkpoint import open_checkpoint
    from quantkit.text.tokenizer import open_tokenizer

    with open_checkpoint(FIXTURE) as checkpoint:
        tokenizer = open_tokenizer(checkpoint, checkpoint.config)
    ids = letter_tokens(tokenizer, "ABCD")
    assert ids == [tokenizer.encode(f" {c}", parse_special=False)[0] for c in "ABCD"]


# --- grading


def test_flips_are_counted_by_kind():
    task = a_task([0, 1, 2, 3, 0])
    result = grade(chosen([0, 1, 0, 1, 1]), chosen([0, 2, 2, 2, 1]), task).total
    assert (result.accuracy_reference, result.accuracy) == (0.4, 0.4)
    assert result.difference == 0
    assert result.correct_to_wrong == 1  # question 1
    assert result.wrong_to_correct == 1  # question 2
    assert result.wrong_to_other_wrong == 1  # question 3; in 4 the wrong answer stayed


@given(
    st.lists(st.tuples(*[st.integers(0, 3)] * 3, st.sampled_from("xyz")), min_size=1, max_size=40)
)
def test_grades_agree_with_counting(rows):
    right, ours, theirs, subjects = map(list, zip(*rows, strict=True))
    result = grade(chosen(ours), chosen(theirs), a_task(right, subjects=subjects))
    assert list(result.by_subject) == list(dict.fromkeys(subjects))
    for name, graded in [(None, result.total), *result.by_subject.items()]:
        some = [row for row in rows if name in (None, row[3])]
        n = len(some)
        assert graded.n == n
        was, now = [r == o for r, o, _, _ in some], [r == t for r, _, t, _ in some]
        assert graded.accuracy_reference == pytest.approx(sum(was) / n)
        assert graded.accuracy == pytest.approx(sum(now) / n)
        assert graded.difference == pytest.approx((sum(now) - sum(was)) / n)
        flips = Counter(zip(was, now, strict=True))
        assert graded.correct_to_wrong == flips[True, False]
        assert graded.wrong_to_correct == flips[False, True]
        moved = [r != o and r != t and o != t for r, o, t, _ in some]
        assert graded.wrong_to_other_wrong == sum(moved)
        if n > 1:
            p = sum(now) / n
            assert graded.accuracy_error == pytest.approx((p * (1 - p) / (n - 1)) ** 0.5)
            paired = np.array(now, float) - np.array(was, float)
            assert graded.difference_error == pytest.approx(paired.std(ddof=1) / n**0.5)
        else:
            assert graded.accuracy_error is graded.difference_error is None


def test_of_equal_choices_the_first_counts():
    tie = [np.zeros(4, np.float32)]
    assert grade(tie, tie, a_task([0])).total.accuracy == 1


def test_a_choice_of_no_probability_is_merely_not_chosen():
    rows = [np.array([-np.inf, -1.0], np.float32)]
    assert grade(rows, rows, a_task([1], n_choices=2)).total.accuracy == 1


@pytest.mark.parametrize("which", [0, 1])
def test_nan_is_refused_with_its_question(which):
    rows = [chosen([0, 1]), chosen([0, 1])]
    rows[which][1][2] = np.nan
    with pytest.raises(NonFiniteError, match="the base" if which == 0 else "the quant") as caught:
        grade(*rows, a_task([0, 0]))
    assert caught.value.where == "t, question 2"


def test_nothing_to_grade_is_refused():
    with pytest.raises(UsageError, match="no question"):
        grade([], [], a_task([]))


@pytest.mark.parametrize("rows", [chosen([0]), chosen([0, 0], n_choices=3)])
def test_log_probabilities_that_do_not_fit_the_questions_are_a_bug(rows):
    with pytest.raises(ValueError, match=r"2 questions|4 choices"):
        grade(rows, chosen([0, 0]), a_task([0, 0]))


def test_result_is_plain_data():
    result = grade(chosen([0, 1]), chosen([0, 0]), a_task([0, 1], subjects=["a", "b"]))
    stored = json.loads(json.dumps(result.as_json(), allow_nan=False))
    assert stored["task"] == "t"
    assert stored["accuracy"] == 0.5
    assert stored["accuracy_error"] == pytest.approx(0.5)
    assert stored["by_subject"]["b"]["correct_to_wrong"] == 1
    assert stored["by_subject"]["a"]["accuracy_error"] is None


def test_result_is_told_in_percent_with_its_doubt():
    result = grade(chosen([0, 1, 1]), chosen([0, 0, 1]), a_task([0, 1, 1]))
    lines = dict(line.split(": ") for line in as_text(result.as_json()).splitlines()[2:])
    lines = {key.strip(): value for key, value in lines.items()}
    assert lines["Accuracy(base)"] == "100.00 ± 0.00 %"
    assert lines["Accuracy(Q)"] == "66.67 ± 33.33 %"
    assert lines["Accuracy(Q)-Accuracy(base)"] == "-33.33 ± 33.33 %"
    assert lines["Changed answers"].startswith("1 right to wrong, 0 wrong to right, 0 wrong to")


def test_a_single_question_has_no_doubt_and_a_hostile_name_no_effect():
    task = Task("\x1b[31m", (Question("Q?", ("x", "y"), 0),))
    text = as_text(grade(chosen([0], 2), chosen([0], 2), task).as_json())
    assert "\x1b" not in text
    assert "1 question\n" in text
    assert ": 100.00 %" in text
