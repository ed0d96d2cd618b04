"""The machine's C++ compiler, and the CPU that it compiles for."""

import os
import platform
import shlex
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

__all__ = ["BuildError", "compile_units", "describe_compiler", "describe_cpu", "find_compiler"]

_CPU_INFO = Path("/proc/cpuinfo")
_INSTRUCTIONS = ("flags", "Features", "isa")  # of x86, ARM and RISC-V
_MODEL = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU variant", "CPU part", "uarch")


class BuildError(Exception):
    """The kernels could not be built. The message ends in a remedy."""


def find_compiler() -> list[str]:
    """The words of CXX, like `ccache g++`, or else g++ or clang++; the first as an absolute path."""
    given = os.environ.get("CXX", "").strip()
    try:
        choices = [shlex.split(given)] if given else [["g++"], ["clang++"]]
    except ValueError as error:
        raise BuildError(f"CXX={given!r} is not a command ({error}): set CXX to a C++ compiler") from None
    for program, *options in choices:
        found = shutil.which(program)
        if found is not None:
            return [os.path.abspath(found), *options]
    if given:
        raise BuildError(f"there is no program {choices[0][0]!r}, from CXX={given!r}: set CXX to a C++ compiler")
    raise BuildError("there is no C++ compiler: install g++, or set CXX to a compiler")


def compile_units(
    compiler: Sequence[str], flags: Sequence[str], units: Sequence[Path], to: Path, seconds: float
) -> None:
    """Compiles and links the units, in the folder of `to`. BuildError if that fails or takes longer than `seconds`."""
    seconds = max(seconds, 0.0)
    printed = to.parent / "printed"  # not a pipe, which a forgotten child of the compiler could keep open
    command = [*compiler, *flags, "-o", to.name, *map(str, units)]
    remedy = f"set CXX to a C++17 compiler with OpenMP (now: {shlex.join(compiler)})"
    with printed.open("wb") as output:
        try:
            process = subprocess.Popen(
                command,
                cwd=to.parent,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that all its children can be ended with it
            )
        except OSError as error:
            raise BuildError(f"the compiler does not run ({error}): {remedy}") from error
        try:
            status = process.wait(seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise BuildError(f"the compiler had not finished after {seconds:.0f} seconds: {remedy}") from None
            raise
    if status != 0 or not to.is_file():
        lines = printed.read_text(errors="replace").splitlines() or ["it printed nothing"]
        telling = next((line for line in lines if "error" in line.lower()), lines[-1])
        ended = f"failed with status {status}" if status != 0 else "wrote no file"
        raise BuildError(f"the compiler {ended} ({telling.strip()[:300]}): {remedy}")


def describe_compiler(compiler: Sequence[str]) -> list[str]:
    """Its words, and the programs among them: another version is another file."""
    programs = [os.path.realpath(found) for word in compiler if (found := shutil.which(word)) is not None]
    return [*compiler, *programs, *(str(os.stat(program).st_size) for program in programs)]


def describe_cpu() -> list[str]:
    """The CPU features on which a native build depends; if they are not known, this machine's name."""
    found: set[str] = set()
    known = False
    if _CPU_INFO.exists():
        for line in _CPU_INFO.read_text(errors="replace").splitlines():
            key = line.partition(":")[0].strip()
            if key in (*_INSTRUCTIONS, *_MODEL):
                found.add(line)
                known |= key in _INSTRUCTIONS
    return [platform.platform(), *sorted(found), *(() if known else (platform.node(),))]
