"""The CPU kernels' build: once, whole or not at all, and one line where it cannot be. The compilers are shell scripts."""

import hashlib
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import pytest

from sparsify.cli.app import main
from sparsify.ops.cpu import kernels
from sparsify.ops.cpu.build import LIBRARY, SUM, Built, build, cache_dir, commands

WHOLE = [LIBRARY, SUM]

COMPILER = """#!/bin/sh
case "$*" in *--version*) echo fake 1; exit;; esac
cd "${0%/*}"
echo "$@" >> calls
if [ -e hang ]; then echo $$ >> hanging; exec sleep 60; fi
if [ -e slow ]; then sleep 0.3; fi
if [ -e fail ]; then printf '%s\\n' 'In file included from a.h:' 'a.h:3:1: error: no such thing' 'more'; exit 1; fi
while [ $# -gt 0 ]; do if [ "$1" = -o ]; then printf library > "$2"; fi; shift; done
"""


class Workshop:
    """A fake compiler as $CXX, two sources and a cache, all in `root`; files named fail, hang and slow steer it."""

    def __init__(self, root):
        self.root, self.sources, self.cache = root, root / "src", root / "cache"
        self.sources.mkdir()
        for name in ("binding.cpp", "kernel_avx2.cpp", "tile.h"):
            (self.sources / name).write_text(name)
        (root / "fake").write_text(COMPILER)
        (root / "fake").chmod(0o755)
        self.said = []

    def build(self, **how):
        return build(sources=self.sources, say=self.said.append, **how)

    def calls(self):
        return (self.root / "calls").read_text().splitlines() if (self.root / "calls").exists() else []

    def left(self):
        """Files of the cache, but for the lock."""
        return sorted(p.name for p in self.cache.rglob("*") if p.name != "lock" and not p.is_dir())

    def temporary(self):
        return list(self.cache.glob("kernels/.building-*"))

    def hanging(self, count):
        """Process numbers of the compilers that hang, once there are `count`."""
        file, until = self.root / "hanging", time.monotonic() + 30
        while not file.exists() or len(file.read_text().split()) < count:
            assert time.monotonic() < until, "no compiler was started"
            time.sleep(0.01)
        return [int(word) for word in file.read_text().split()]


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    made = Workshop(tmp_path)
    monkeypatch.setenv("CXX", f"{tmp_path / 'fake'} -DOURS")
    monkeypatch.setenv("SPARSIFY_CACHE", str(made.cache))
    return made


def in_process(call):
    process = multiprocessing.get_context("fork").Process(target=call)
    process.start()
    return process


def alive(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_second_call_finds_the_library_and_compiles_nothing(workshop):
    first = workshop.build()
    assert first.path.name == LIBRARY and first.path.is_file() and first.seconds > 0 and not first.reason
    assert workshop.said == ["building the CPU kernels with fake (once, under a minute) ..."]
    assert len(workshop.calls()) == 3  # two sources, one link
    second = workshop.build()
    assert second.path == first.path and second.seconds == 0 and len(workshop.calls()) == 3 and len(workshop.said) == 1
    assert workshop.build(force=True).seconds > 0 and len(workshop.calls()) == 6
    assert workshop.left() == WHOLE and not workshop.temporary()


def test_commands_give_each_file_its_instruction_set_and_torch_to_the_binding_only(workshop):
    workshop.build()
    binding, kernel = sorted(call for call in workshop.calls() if " -c " in call)
    if "binding.cpp" not in binding:
        binding, kernel = kernel, binding
    assert "-mavx2" in kernel and "-mavx512f" not in kernel and "torch" not in kernel and "-DOURS" in kernel
    assert "torch/include" in binding and "-mavx2" not in binding and "-DTORCH_TARGET_VERSION=" in binding
    assert "-shared" in workshop.calls()[-1] and "-ltorch_cpu" in workshop.calls()[-1]
    *compiling, linking = commands([workshop.sources / "kernel_avx512bf16.cpp"], workshop.root, ["-fsanitize=address"])
    assert {"-mavx512bf16", "-mavx512bw", "-mfma", "-fsanitize=address"} <= set(compiling[0])
    assert "-fsanitize=address" in linking


def test_failure_is_one_line_remembered_and_tried_again_by_force(workshop):
    (workshop.root / "fail").touch()
    failed = workshop.build()
    assert failed.path is None and "\n" not in failed.reason
    for words in ("fake", "a.h:3:1: error: no such thing", "sparsify build-kernels", "--verbose"):
        assert words in failed.reason
    assert workshop.left() == ["failed.txt"] and not workshop.temporary()
    calls = len(workshop.calls())
    assert workshop.build() == failed and len(workshop.calls()) == calls and len(workshop.said) == 1
    workshop.build(verbose=True)
    assert "In file included" in workshop.said[-1] and "-c " in workshop.said[-1] and len(workshop.calls()) == calls
    (workshop.root / "fail").unlink()
    assert workshop.build().reason == failed.reason
    assert workshop.build(force=True).path.is_file() and workshop.left() == WHOLE


@pytest.mark.parametrize(
    ("printed", "ending", "words"),
    [
        ("/usr/bin/ld: cannot find -lc10\ncollect2: error: ld returned 1 exit status", "exit 1", "cannot find -lc10"),
        ("", "exit 3", "exit code 3"),
        ("cc1plus: fatal error: Killed signal terminated program", "exit 1", None),
        ("fatal error: error writing to /tmp/x.s: No space left on device", "exit 1", None),
        ("collect2: fatal error: ld terminated with signal 7 [Bus error]", "exit 1", None),
        ("", "kill -9 $$", None),
    ],
)
def test_reason_without_a_plain_error_line_and_failures_that_may_pass(workshop, printed, ending, words):
    script = '#!/bin/sh\ncase "$*" in *--version*) exit;; esac\n' + f"cat <<END\n{printed}\nEND\n{ending}\n"
    (workshop.root / "fake").write_text(script)
    failed = workshop.build()
    assert failed.path is None and "\n" not in failed.reason and (words or "") in failed.reason
    assert workshop.left() == ([] if words is None else ["failed.txt"])


def test_the_library_depends_on_sources_headers_and_compiler(workshop):
    paths = {workshop.build().path}
    (workshop.sources / "tile.h").write_text("another")
    paths.add(workshop.build().path)
    (workshop.sources / "kernel_avx2.cpp").write_text("another")
    paths.add(workshop.build().path)
    (workshop.root / "fake").write_text(COMPILER.replace("fake 1", "fake 2"))
    paths.add(workshop.build().path)
    assert len(paths) == 4
    (workshop.sources / "notes.txt").write_text("of no effect")
    assert workshop.build().seconds == 0


def test_without_a_compiler_a_library_built_before_is_used(workshop, monkeypatch):
    monkeypatch.setenv("PATH", str(workshop.root / "nowhere"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "CXX=no-such-compiler" in workshop.build().reason
    monkeypatch.delenv("CXX")
    assert "install g++" in workshop.build().reason and not workshop.said
    monkeypatch.setenv("CXX", str(workshop.root / "fake"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    built = workshop.build()
    monkeypatch.setenv("PATH", str(workshop.root / "nowhere"))
    monkeypatch.delenv("CXX")
    assert workshop.build().path == built.path


def test_compilers_are_tried_in_order(workshop, monkeypatch):
    monkeypatch.delenv("CXX")
    for name in ("clang++", "g++"):
        (workshop.root / name).write_text(COMPILER)
        (workshop.root / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{workshop.root}:/nowhere")
    (workshop.root / "fail").touch()
    assert workshop.build().reason.startswith("g++ cannot compile")


def test_cache_folder_that_cannot_be_written(workshop, monkeypatch):
    workshop.cache.write_text("a file where the folder should be")
    built = workshop.build()
    assert built.path is None and "\n" not in built.reason
    assert str(workshop.cache) in built.reason and "SPARSIFY_CACHE" in built.reason and not workshop.calls()


def test_cache_dir_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.setenv("SPARSIFY_CACHE", "")
    assert cache_dir() == tmp_path / "xdg" / "sparsify"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "sparsify"


def test_killed_build_leaves_no_library_and_the_next_one_cleans_up(workshop):
    (workshop.root / "hang").touch()
    process = in_process(workshop.build)
    pids = workshop.hanging(min(2, len(os.sched_getaffinity(0))))
    process.kill()
    process.join(30)
    until = time.monotonic() + 30
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(map(alive, pids)), "compilers outlive the process that started them"
    assert LIBRARY not in workshop.left() and len(workshop.temporary()) == 1
    (workshop.root / "hang").unlink()
    assert workshop.build().path.is_file() and not workshop.temporary() and workshop.left() == WHOLE


def test_ctrl_c_stops_the_compilers_and_leaves_nothing(workshop):
    (workshop.root / "hang").touch()

    def interrupted():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            workshop.build()
        except KeyboardInterrupt:
            os._exit(130)

    process = in_process(interrupted)
    pids = workshop.hanging(min(2, len(os.sched_getaffinity(0))))
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 130 and not any(map(alive, pids))
    assert not workshop.left() and not workshop.temporary()


@pytest.mark.parametrize("damage", ["cut", "flipped", "no sum", "another's sum"])
def test_a_damaged_library_is_not_loaded_but_built_again(workshop, damage, monkeypatch):
    library = workshop.build().path
    assert (library.parent / SUM).read_text().split() == [hashlib.sha256(b"library").hexdigest(), LIBRARY]
    if damage == "no sum":
        (library.parent / SUM).unlink()
    elif damage == "another's sum":
        (library.parent / SUM).write_text(f"{'0' * 64}  {LIBRARY}\n")
    else:
        library.write_bytes(b"libra" if damage == "cut" else b"lybrary")
    with monkeypatch.context() as patch:  # nor where it cannot be built again
        patch.setenv("PATH", str(workshop.root / "nowhere"))
        patch.delenv("CXX")
        assert "install g++" in workshop.build().reason
    again = workshop.build()
    assert again.path == library and again.seconds > 0 and library.read_bytes() == b"library"
    assert workshop.build().seconds == 0


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe\x00"])
def test_a_damaged_record_of_a_failure_is_none(workshop, content):
    library = workshop.build().path
    for file in library.parent.iterdir():
        file.unlink()
    (library.parent / "failed.txt").write_bytes(content)
    assert workshop.build().path == library and workshop.left() == WHOLE


def test_a_failure_on_a_full_disk_is_not_remembered(workshop, monkeypatch):
    """Neither where the compiler says so, nor where only the disk does."""
    (workshop.root / "fail").touch()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "no such thing" in workshop.build().reason and workshop.left() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is careful")
@pytest.mark.parametrize("what", ["file", "folder"])
@pytest.mark.parametrize("how", ["owner", "group", "others"])
@pytest.mark.parametrize("compiler", [True, False])
def test_root_loads_no_library_that_others_could_have_written(workshop, monkeypatch, what, how, compiler):
    library = workshop.build().path
    path = library if what == "file" else library.parent
    if how == "owner":
        os.chown(path, 1234, 0)
    else:
        path.chmod(path.stat().st_mode | (0o020 if how == "group" else 0o002))
    if not compiler:
        monkeypatch.setenv("PATH", str(workshop.root / "nowhere"))
        monkeypatch.delenv("CXX")
    calls = len(workshop.calls())
    refused = workshop.build()
    assert refused.path is None and str(path) in refused.reason and "\n" not in refused.reason
    assert ("user 1234" if how == "owner" else "written by other users") in refused.reason
    assert "SPARSIFY_CACHE" in refused.reason and len(workshop.calls()) == calls
    if what == "folder":  # and builds nothing into it
        library.unlink()
        assert compiler != workshop.build().reason.startswith("no C++") and len(workshop.calls()) == calls


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is careful")
def test_root_looks_behind_a_symbolic_link(workshop, tmp_path):
    library = workshop.build().path
    (tmp_path / "theirs").write_bytes(library.read_bytes())
    os.chown(tmp_path / "theirs", 1234, 0)
    library.unlink()
    library.symlink_to(tmp_path / "theirs")
    assert "user 1234" in workshop.build().reason


def test_what_is_built_can_be_written_by_its_owner_only(workshop):
    before = os.umask(0)
    try:
        library = workshop.build().path
    finally:
        os.umask(before)
    assert not (library.stat().st_mode | library.parent.stat().st_mode) & 0o022


def test_a_builder_that_does_not_end_is_said_and_not_waited_for_without_limit(workshop, monkeypatch):
    monkeypatch.setattr(kernels.build, "SILENT_S", 0.1)
    monkeypatch.setattr(kernels.build, "LONGEST_S", 0.2)
    (workshop.root / "hang").touch()
    process = in_process(workshop.build)
    workshop.hanging(1)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        found = workshop.build()
    finally:
        process.kill()
        process.join(30)
    assert found.path is None and "does not finish" in found.reason and "SPARSIFY_CACHE" in found.reason
    (waiting,) = workshop.said
    assert waiting.startswith("waiting for another process that builds the CPU kernels in ")
    (workshop.root / "hang").unlink()
    assert workshop.build().path.is_file()


def test_two_processes_build_once(workshop):
    (workshop.root / "slow").touch()
    processes = [in_process(lambda: sys.exit(0 if workshop.build().path else 1)) for _ in range(2)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(workshop.calls()) == 3 and workshop.left() == WHOLE


@pytest.mark.parametrize(("machine", "system"), [("aarch64", "linux"), ("x86_64", "darwin"), ("AMD64", "win32")])
def test_other_machines_get_a_reason(workshop, monkeypatch, machine, system):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(sys, "platform", system)
    built = workshop.build()
    assert built.path is None and (machine in built.reason or system in built.reason)
    assert not workshop.calls() and not workshop.cache.exists()


def test_missing_sources_are_said(workshop):
    for file in workshop.sources.glob("*.cpp"):
        file.unlink()
    assert str(workshop.sources) in workshop.build().reason


def test_command_says_in_one_line_why_there_are_no_kernels(workshop, capsys):
    (workshop.root / "fail").touch()
    for arguments in (["build-kernels"], ["build-kernels", "--force"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        out, err = capsys.readouterr()
        assert caught.value.code == 1 and not out
        building, error = err.splitlines()
        assert "building the CPU kernels" in building and error.startswith("error: ") and "no such thing" in error


def test_command_has_a_help_text(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["build-kernels", "--help"])
    out = capsys.readouterr().out
    assert (
        caught.value.code == 0
        and {"--force", "--verbose"} <= set(out.split())
        and max(map(len, out.splitlines())) <= 80
    )


def test_a_library_user_hears_once_that_the_reference_computes(monkeypatch):
    monkeypatch.setattr(kernels.build, "build", lambda **_: Built(None, "no C++ compiler was found", 0.0))
    with pytest.warns(RuntimeWarning, match="slow PyTorch reference: no C\\+\\+ compiler"):
        assert kernels._load.__wrapped__() == (0, "no C++ compiler was found")
