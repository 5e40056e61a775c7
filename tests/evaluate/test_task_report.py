"""Questions in a report: kept whole, checked when read back, a table on the page."""

from __future__ import annotations

import copy
import re

import pytest

from quantkit.errors import UsageError
from quantkit.evaluate.html import report_html
from quantkit.evaluate.report import TaskResult, parse_report
from tests.evaluate.reports import EVIL, a_quant, a_report

GRADE = {
    "n": 1200,
    "accuracy_reference": 0.75,
    "accuracy_reference_error": 0.0125,
    "accuracy": 0.625,
    "accuracy_error": 0.014,
    "difference": -0.125,
    "difference_error": 0.01,
    "correct_to_wrong": 1150,
    "wrong_to_correct": 17,
    "wrong_to_other_wrong": 23,
}


def a_result(**more):
    given = {"task": "mmlu", "shots": 5, "digest": "cd" * 32, "by_subject": {"law": GRADE}}
    return TaskResult(**GRADE | given | more)


def asked(text=None, **more):
    """A report of questions alone, unless a text is given."""
    quants = [a_quant(f"m-{k}.gguf", 10**6 + k, tasks=(a_result(**more),)) for k in range(2)]
    return a_report(quants, **{} if text else {"text": None})


def words(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html))


@pytest.mark.parametrize("text", [True, False])
def test_results_are_read_back_as_they_were(text):
    report = asked(text)
    assert report["version"] == 1
    assert (report["text"] is not None) == text
    (result,) = parse_report(report).quants[0].tasks
    assert result == a_result()
    assert report["quants"][0]["tasks"][0]["by_subject"] == {"law": GRADE}


def test_reports_made_before_there_were_tasks_are_still_read():
    report = a_report()
    for quant in report["quants"]:
        del quant["tasks"]
    assert parse_report(report).quants[0].tasks == ()


def test_a_single_question_has_null_for_its_errors():
    report = asked(accuracy_error=None, difference_error=float("nan"))
    result = report["quants"][0]["tasks"][0]
    assert result["accuracy_error"] is result["difference_error"] is None
    assert "62.50 75.00 ± 1.25 -12.50 1,150" in words(report_html(report))


HOSTILE = {
    "a count below zero": ("correct_to_wrong", -1),
    "a count that is no number": ("n", "many"),
    "an accuracy that is a text": ("accuracy", "0.5"),
    "an accuracy that is an object": ("accuracy", {}),
    "a field of no meaning": ("colour", "red"),
    "a list of subjects": ("by_subject", [GRADE]),
    "a subject without a grade": ("by_subject", {"law": None}),
    "a name that is no text": ("task", 7),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_parse_refuses(name):
    key, value = HOSTILE[name]
    report = copy.deepcopy(asked())
    report["quants"][0]["tasks"][0][key] = value
    with pytest.raises(UsageError, match="not a report of version 1: quants"):
        parse_report(report)


def test_a_quant_that_was_measured_by_nothing_is_refused():
    report = asked()
    report["quants"][1]["tasks"] = []
    with pytest.raises(UsageError, match="neither a text nor a task"):
        parse_report(report)


@pytest.mark.parametrize("text", [True, False])
def test_page_has_a_table_of_answers_and_says_what_was_asked(text):
    html = report_html(asked(text))
    told = words(html)
    assert told.count("mmlu 1,200 62.50 ± 1.40 75.00 ± 1.25 -12.50 ± 1.00 1,150 17 23") == 2
    assert "1,200 questions, 5 solved examples before each" in told
    assert "cd" * 32 in told
    assert ("windows of 512 tokens" in told) == text


def test_page_without_questions_has_no_section_for_them():
    assert "<h2>Questions</h2>" in report_html(asked())
    assert "<h2>Questions</h2>" not in report_html(a_report())


def test_hostile_names_are_text_and_nothing_else():
    html = report_html(asked(task=EVIL, digest=EVIL, by_subject={EVIL: GRADE}))
    html.encode()
    assert "<script" not in html
    assert not {"\u202e", "\x1b"} & set(html)
