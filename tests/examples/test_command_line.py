"""What all command lines of the examples do alike."""

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from examples.command_line import FAILED, INTERRUPTED, CommandParser, natural, positive, run
from examples.interruptions import InterruptedRunError


def raising(error: BaseException):
    def command(_options: Namespace) -> None:
        raise error

    return command


def test_a_command_gets_its_options() -> None:
    taken: list[Namespace] = []
    options = Namespace(steps=3)
    assert run(taken.append, options) == 0
    assert taken == [options]


@pytest.mark.parametrize("error", [ValueError("too few"), FileNotFoundError("too few")])
def test_an_error_of_the_caller_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raising(error), Namespace()) == FAILED == 1
    assert capsys.readouterr().err == "error: too few\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), InterruptedRunError()])
def test_an_interruption_says_whether_the_run_resumes(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raising(error), Namespace(), resumes=True) == INTERRUPTED == 130
    assert capsys.readouterr().err == "interrupted, run again to go on\n"
    assert run(raising(error), Namespace()) == INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError):
        run(raising(RuntimeError()), Namespace())


@pytest.mark.parametrize(("kind", "least"), [(natural, 0), (positive, 1)])
def test_numbers_below_the_least_are_refused(kind, least: int, capsys: pytest.CaptureFixture[str]) -> None:
    parser = CommandParser("nothing", description="Nothing.")
    parser.add_argument("--count", type=kind)
    assert parser.parse_args([f"--count={least}"]).count == least
    for given in (str(least - 1), "1.5"):
        with pytest.raises(SystemExit) as left:
            parser.parse_args([f"--count={given}"])
        assert left.value.code == 2
        assert "argument --count: " in capsys.readouterr().err


def test_help_shows_the_defaults_there_are() -> None:
    parser = CommandParser("nothing", description="Nothing.")
    command = parser.add_subparsers(dest="command").add_parser("some", help="of it")
    command.add_argument("--steps", type=positive, default=20, help="training steps")
    command.add_argument("--page", type=Path, help="fill this page")
    command.add_argument("--quick", action="store_true", help="few rounds")
    text = command.format_help()
    assert "usage: python -m examples.nothing some" in text
    assert "training steps (default: 20)" in text
    assert text.count("default") == 1


def test_it_does_without_torch() -> None:
    code = "import sys, examples.command_line; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0
