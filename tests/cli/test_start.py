"""Starting costs little, and help says what there is."""

from __future__ import annotations

import subprocess
import sys

import pytest

COMMANDS = (
    "convert",
    "plan",
    "calibrate",
    "imatrix",
    "evaluate",
    "allocate",
    "guide",
    "doctor",
    "inspect",
    "verify",
    "recipes",
)


def modules_after(arguments: list[str]) -> set[str]:
    code = (
        f"import sys; sys.argv = ['quantkit', *{arguments!r}]\n"
        "from quantkit.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('\\n'.join(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stderr.split())


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_loads_nothing_heavy(arguments):
    heavy = {"numpy", "numba", "torch", "pydantic", "rich", "yaml", "gguf", "regex"}
    assert not heavy & modules_after(arguments)


def test_help_names_every_command():
    done = subprocess.run(
        [sys.executable, "-m", "quantkit", "--help"], capture_output=True, text=True, check=True
    )
    for name in COMMANDS:
        assert f"\n  {name}" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["bake"],
        ["convert"],
        ["convert", "x", "--recipe", "q4_x"],
        ["plan", "x", "--recipe", "q4_x", "--max-shard-size", "large"],
        ["plan", "x", "--recipe", "q4_x", "--mmproj", "q8_0"],
    ],
)
def test_wrong_use_ends_with_2(arguments):
    done = subprocess.run(
        [sys.executable, "-m", "quantkit", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "Usage: " in done.stderr
