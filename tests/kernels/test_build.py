"""Building the CPU kernels: which inputs name a build, compilers that fail, and several that build at a time."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from negcache_fn._kernels import dispatch
from negcache_fn._kernels.cpu import build, compiler, functions
from negcache_fn._kernels.cpu import call as cpu
from tests.kernels.pretend import Machine, copied, forget, load
from tests.kernels.test_cpu import library_with, needs_kernels, problem


def warned(caplog: pytest.LogCaptureFixture) -> str:
    """The only warning."""
    (message,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return message


def test_without_a_compiler_there_are_no_kernels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given_problem = dispatch.Problem(*problem(1, 3, 2, torch.float32, 0, 0), None)
    forget()
    monkeypatch.setenv("NEGCACHE_FN_NATIVE", "0")
    try:
        assert build.library() is None
        assert not cpu.supports(given_problem)
        with pytest.raises(RuntimeError, match="ask `supports` first"):
            cpu.block_logsumexp(given_problem)
        assert not caplog.records  # the user has asked for it
        forget()
        monkeypatch.setenv("NEGCACHE_FN_NATIVE", "1")
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert build.library() is None
        assert build.library() is None
        assert "there is no C++ compiler: install g++, or set CXX" in warned(caplog)
    finally:
        monkeypatch.undo()
        forget()


def test_every_source_and_flag_names_the_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A build of other sources or flags is never taken for this one."""
    sources = build._sources()
    assert {source.suffix for source in sources} == {".cpp", ".h"}
    for source in sources:
        shutil.copy(source, tmp_path)
    before = build._fingerprint(["g++"])
    monkeypatch.setattr(build, "_FOLDER", tmp_path)
    assert build._fingerprint(["g++"]) == before
    for source in build._sources():
        text = source.read_text()
        source.write_text(text + "//\n")
        assert build._fingerprint(["g++"]) != before, source.name
        source.write_text(text)
    assert build._fingerprint(["g++", "-m32"]) != before
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-g"))
    assert build._fingerprint(["g++"]) != before


def test_another_compiler_of_the_same_name_is_another_build(tmp_path: Path) -> None:
    names = set()
    for version in ("12", "13.1"):
        program = tmp_path / "c++"
        program.unlink(missing_ok=True)
        program.write_text(f"#!/bin/sh\n# {version}\n")
        program.chmod(0o755)
        names |= {build._fingerprint([str(program)]), build._fingerprint(["ccache", str(program)])}
    assert len(names) == 4


X86 = "processor : 0\nvendor_id : A\ncpu MHz : {mhz}\nmodel : 1\nflags : fpu {flag}\n\nprocessor : 1\n"
ARM = "processor : 0\nBogoMIPS : {mhz}\nFeatures : fp {flag}\nCPU implementer : 0x41\nCPU part : 0xd0c\n"
RISC = "processor : 0\nhart : {mhz}\nisa : rv64{flag}\n"


@pytest.mark.parametrize("text", [X86, ARM, RISC], ids=["x86", "arm", "risc-v"])
def test_two_cpus_with_one_home_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    def name(mhz: str, flag: str) -> str:
        (tmp_path / "cpuinfo").write_text(text.format(mhz=mhz, flag=flag))
        return build._fingerprint(["g++"])

    monkeypatch.setattr(compiler, "_CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("platform.node", lambda: "one")
    mine = name("1000", "simd")
    assert name("1000", "wide") != mine
    assert name("2000", "simd") == mine
    monkeypatch.setattr("platform.node", lambda: "another")
    assert name("1000", "simd") == mine  # one build serves all machines of a kind
    part = text.replace("0xd0c", "0xd40").replace("model : 1", "model : 2").replace("rv64", "rv32")
    (tmp_path / "cpuinfo").write_text(part.format(mhz="1000", flag="simd"))
    assert build._fingerprint(["g++"]) != mine


@pytest.mark.parametrize("text", [None, "", "processor : 0\ncpu : POWER9\n"])
def test_an_unknown_cpu_has_builds_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None
) -> None:
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(compiler, "_CPU_INFO", tmp_path / "cpuinfo")
    names = set()
    for machine in ("one", "another"):
        monkeypatch.setattr("platform.node", lambda machine=machine: machine)
        names.add(build._fingerprint(["g++"]))
    assert len(names) == 2


@needs_kernels
@pytest.mark.parametrize("flag", ["-UNEGCACHE_BLOCK", "-DNEGCACHE_BLOCK=63"])
def test_the_size_of_a_block_is_checked_at_build_time(flag: str) -> None:
    assert library_with(flag) is None


def test_every_function_is_looked_for() -> None:
    found = {name.decode() for unit in build._units() for name in build._EXPORTED.findall(unit.read_bytes())}
    assert found == set(functions._ARGUMENTS)


@needs_kernels
def test_cxx_may_have_several_words(machine: Machine) -> None:
    machine.set_compiler('test "$LAUNCHED $1" = "yes -m64"', output=(machine.root / "output").read_bytes())
    machine.patch.setenv("CXX", f"env LAUNCHED=yes '{machine.root}/compiler' -m64")
    assert load() is not None
    assert machine.compilations() == 1


@needs_kernels
@pytest.mark.parametrize(
    ("commands", "said"),
    [
        (
            "echo; echo 'x.h: fatal error: no omp.h'; echo 'compilation ended'; exit 3",
            "status 3 (x.h: fatal error: no omp.h)",
        ),
        ("echo 'Segmentation fault' >&2; exit 1", "status 1 (Segmentation fault)"),
        ("exit 1", "status 1 (it printed nothing)"),
        ("exit 0", "wrote no file"),
    ],
)
def test_a_compiler_that_fails_says_so_once(
    machine: Machine, caplog: pytest.LogCaptureFixture, commands: str, said: str
) -> None:
    script = machine.set_compiler(commands)
    assert build.library() is None
    assert build.library() is None
    assert machine.compilations() == 1
    message = warned(caplog)
    assert said in message
    assert f"set CXX to a C++17 compiler with OpenMP (now: {script})" in message
    assert "NEGCACHE_FN_NATIVE=0" in message


@needs_kernels
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("no-such-compiler -m64", "there is no program 'no-such-compiler', from CXX='no-such-compiler -m64'"),
        ("g++ 'open", 'CXX="g++ \'open" is not a command (No closing quotation)'),
        ("''", "there is no program ''"),
        ("/dev/null", "there is no program '/dev/null'"),
    ],
)
def test_a_wrong_cxx_says_so(machine: Machine, caplog: pytest.LogCaptureFixture, given: str, said: str) -> None:
    machine.patch.setenv("CXX", given)
    assert build.library() is None
    assert said in warned(caplog)


@needs_kernels
def test_a_program_that_cannot_be_run_says_so(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.set_compiler().write_text("#!/no/such/shell\n")
    assert build.library() is None
    assert "the compiler does not run (" in warned(caplog)


@needs_kernels
def test_a_build_that_lacks_a_function_is_not_used(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.set_compiler(output=Path(torch._C.__file__).read_bytes())
    assert build.library() is None
    assert "has no function negcache_" in warned(caplog)
    forget()
    assert build.library() is None
    assert machine.compilations() == 1  # the same compiler would do the same


def is_alive(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@needs_kernels
def test_a_compiler_that_hangs_is_given_up(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.patch.setattr(build, "_PATIENCE_SECONDS", 2.0)
    machine.set_compiler(f"sleep 60 & echo $! > '{machine.root}/child'\nwait")
    start = time.monotonic()
    assert build.library() is None
    assert time.monotonic() - start < 10
    assert "had not finished after" in warned(caplog)
    for _ in range(100):
        if not is_alive(int((machine.root / "child").read_text())):
            return
        time.sleep(0.02)
    raise AssertionError("what the compiler had started runs on")


@needs_kernels
def test_threads_build_once(machine: Machine) -> None:
    machine.set_compiler("sleep 0.3", output=(machine.root / "output").read_bytes())
    barrier = threading.Barrier(3)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: (barrier.wait(), build.library())[1], range(3)))
    assert machine.compilations() == 1
    assert found[0] is not None
    assert all(kernels is found[0] for kernels in found)


@needs_kernels
def test_threads_try_a_failing_compiler_once(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.set_compiler("sleep 0.3; exit 1")
    barrier = threading.Barrier(3)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda _: (barrier.wait(), build.library())[1], range(3))) == [None] * 3
    assert machine.compilations() == 1
    assert warned(caplog)


@needs_kernels
def test_processes_build_once(machine: Machine) -> None:
    """While another builds, this one waits, and then loads what the other has built."""
    machine.cache.mkdir(mode=0o700, parents=True)
    name = f"cpu-{build._fingerprint(compiler.find_compiler())}"
    with (machine.cache / f"{name}.lock").open("w") as theirs, ThreadPoolExecutor(1) as pool:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        mine = pool.submit(load)
        time.sleep(0.3)
        assert not mine.done()
        copied(machine.cache, name, (machine.root / "output").read_bytes())
        fcntl.flock(theirs, fcntl.LOCK_UN)
        assert mine.result(timeout=10) is not None
    assert machine.compilations() == 0


@needs_kernels
def test_waiting_for_another_process_has_an_end(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.patch.setattr(build, "_PATIENCE_SECONDS", 0.2)
    machine.cache.mkdir(mode=0o700, parents=True)
    name = f"cpu-{build._fingerprint(compiler.find_compiler())}"
    with (machine.cache / f"{name}.lock").open("w") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        assert build.library() is None
    assert machine.compilations() == 0
    assert "another process was still building them" in warned(caplog)


@needs_kernels
def test_a_disk_without_locks_builds_all_the_same(machine: Machine) -> None:
    def refuse(*_: object) -> None:
        raise OSError(os.strerror(37))

    machine.patch.setattr(fcntl, "flock", refuse)
    assert load() is not None
    assert machine.compilations() == 1
