"""`quantkit families`."""

from __future__ import annotations

from click.testing import CliRunner

from quantkit.arch.registry import FAMILIES
from quantkit.cli import cli


def test_families_are_listed_with_their_classes_and_what_works():
    result = CliRunner().invoke(cli, ["families"])
    assert result.exit_code == 0
    for family in FAMILIES:
        assert family.title in result.output
        assert all(name in result.output for name in family.architectures)
    (gemma,) = [line for line in result.output.splitlines() if line.startswith("Gemma 2")]
    assert "runs" in gemma
    assert "feedback" not in gemma
