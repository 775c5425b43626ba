"""The CPU kernels: the library that came with the package, else compiled at first use and kept in a cache folder.

Wheels for Linux on x86-64 hold `lib/sparsify_cpu.so` (`packaging/wheel.py`); other installations compile:

    cache_dir()/kernels/<made from>-<compiler>/sparsify_cpu.so     or failed.txt: the reason, then all that was printed
                                               sparsify_cpu.so.sha256     of the library, checked before it is loaded

<made from> is a hash of the sources, the flags and torch (version and folder), <compiler> one of its path and version. One
process builds at a time, in a folder of its own; the finished library is moved to its target. Its compilers end with it,
however it ends. As root no library is loaded that another user could have written. The cache can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from sparsify.errors import one_line

SOURCES = Path(__file__).parent / "src"
LIBRARY = "sparsify_cpu.so"
SUM = f"{LIBRARY}.sha256"  # as sha256sum writes it
PREBUILT = Path(__file__).parent / "lib" / LIBRARY  # in wheels for Linux on x86-64 only
FAILED = "failed.txt"
TEMPORARY = ".building-"

COMMON = ("-std=c++20", "-O3", "-fPIC", "-fno-math-errno", "-fvisibility=hidden", "-DNDEBUG")
AVX2 = ("-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mpopcnt", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
AVX512BF16 = (*AVX512, "-mavx512vbmi", "-mavx512vbmi2", "-mavx512vnni", "-mavx512bf16")
FLAGS_OF = {"kernel_avx2": AVX2, "kernel_avx512": AVX512, "kernel_avx512bf16": AVX512BF16}
NEEDS_TORCH = "binding"
TORCH_2_10 = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the library runs with this torch and every later one

SILENT_S, LONGEST_S = 5.0, 300.0  # of waiting for another process that builds: until it is said, and until the end
PASSING = (  # words of failures that another time may not have
    "Killed",
    "terminated",
    "No space left",
    "quota exceeded",
    "File too large",
    "Input/output error",
    "Read-only file",
    "Cannot allocate",
    "virtual memory exhausted",
    "out of memory",
    "Resource temporarily unavailable",
)
ROOM = 16_000_000  # bytes: with less on the disk no failure is remembered

MORE = "'sparsify build-kernels --verbose' shows all, --force tries again"


@dataclass(frozen=True)
class Built:
    """The result of a build: the library, or one line that says why there is none."""

    path: Path | None
    reason: str = ""  # empty when there is a library
    seconds: float = 0.0  # 0 when nothing had to be compiled


class _Failed(Exception):
    """A compiler that failed: one line, all that was printed, and whether it would fail again."""

    def __init__(self, reason: str, printed: str = "", lasting: bool = False) -> None:
        super().__init__(reason)
        self.printed, self.lasting = printed, lasting


def cache_dir() -> Path:
    """$SPARSIFY_CACHE, else $XDG_CACHE_HOME/sparsify, else ~/.cache/sparsify; it need not exist.

    Raises:
        RuntimeError: none of them is set and the user has no home folder.
    """
    if own := os.environ.get("SPARSIFY_CACHE"):
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(shared) if os.path.isabs(shared) else Path.home() / ".cache") / "sparsify"


def find_compiler() -> list[str]:
    """$CXX (a command, arguments after it), else the first of c++, g++ and clang++; empty when there is none."""
    given = os.environ.get("CXX", "").split()
    for words in [given] if given else [["c++"], ["g++"], ["clang++"]]:
        if found := shutil.which(words[0]):
            return [found, *words[1:]]
    return []


def commands(
    sources: Iterable[Path], out_dir: Path, extra_flags: Sequence[str] = (), compiler: Sequence[str] = ()
) -> list[list[str]]:
    """A command for each source, in any order or together; the last one links their objects to out_dir/sparsify_cpu.so.

    Args:
        sources: *.cpp; the name decides the instruction set, and who sees torch's headers.
        out_dir: folder of the objects and of the library.
        extra_flags: come last, for compiling and for linking: -fsanitize=address.
        compiler: first words of every command.
    """
    folder = _torch_folder()
    with_torch = [TORCH_2_10, f"-isystem{folder / 'include'}"]
    compiling, objects = [], []
    for source in sources:
        own = with_torch if source.stem == NEEDS_TORCH else FLAGS_OF.get(source.stem, ())
        objects.append(str(out_dir / f"{source.stem}.o"))
        compiling.append([*compiler, *COMMON, *own, *extra_flags, "-c", str(source), "-o", objects[-1]])
    library = ["-shared", *extra_flags, *objects, "-o", str(out_dir / LIBRARY)]
    torch_library = [f"-L{folder / 'lib'}", "-ltorch_cpu"]  # found by its name: who loads the library has loaded torch
    return [*compiling, [*compiler, *library, *torch_library]]


def state() -> str:
    """Where the kernels of this machine are or how they will be made, in words. Nothing is compiled or checked."""
    if reason := _unsupported(SOURCES):
        return reason
    if PREBUILT.is_file():
        return "came with the package"
    try:
        built = next(iter(sorted((cache_dir() / "kernels").glob(f"{_made_from(SOURCES)}-*/{LIBRARY}"))), None)
    except (RuntimeError, ModuleNotFoundError, OSError):
        built = None
    if built:
        return f"compiled, {built}"
    words = find_compiler()
    return f"not compiled yet: {words[0]} does it at first use" if words else _no_compiler()


def build(
    *,
    force: bool = False,
    verbose: bool = False,
    say: Callable[[str], None] | None = None,
    sources: Path = SOURCES,
    prebuilt: Path | None = PREBUILT,
) -> Built:
    """The library of the kernels, compiled if this machine has not done so before. Ctrl-C leaves nothing behind.

    Args:
        force: compile again, also what is there and what failed.
        verbose: tell `say` (or print) every command and all that it printed, of a failure remembered too.
        say: called with one line when a build begins.
        sources: folder of *.cpp and *.h.
        prebuilt: a library that, where it exists, is the result: nothing is compiled then, nor by `force`.

    Returns:
        `reason` says in one line why a machine, compiler or folder cannot be used; nothing is raised for it.
    """
    if reason := _unsupported(sources):
        return Built(None, reason)
    if prebuilt is not None and prebuilt.is_file():
        return Built(prebuilt)
    show = (say or print) if verbose else (lambda line: None)
    try:
        kernels = cache_dir() / "kernels"
    except RuntimeError:
        return Built(None, "no home folder for the cache of the CPU kernels: set SPARSIFY_CACHE to a folder")
    made_from, words = _made_from(sources), find_compiler()
    try:
        if not words:  # built where there was a compiler, used where there is none
            every = [] if force else sorted(kernels.glob(f"{made_from}-*"))
            known = next((found for each in every if (found := _known(each, show)) and found.path), None)
            return known or Built(None, _no_compiler())
        target = kernels / f"{made_from}-{_digest([*words, _version(words)])[:8]}"
        if not force and (known := _known(target, show)):
            return known
        kernels.mkdir(parents=True, exist_ok=True)
        with _alone(kernels, say):
            for dead in kernels.glob(f"{TEMPORARY}*"):  # nobody else builds while this process holds the lock
                shutil.rmtree(dead, ignore_errors=True)
            if not force and (known := _known(target, show)):
                return known
            if target.exists():
                _check_owner(target)
            if say:
                say(f"building the CPU kernels with {Path(words[0]).name} (once, under a minute) ...")
            return _build(words, sources, target, show)
    except _Failed as error:
        return Built(None, str(error))
    except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
        advice = "set SPARSIFY_CACHE to a folder that can be written"
        return Built(None, f"cannot write {kernels} ({one_line(error)}): {advice}")


def _build(words: list[str], sources: Path, target: Path, show: Callable[[str], None]) -> Built:
    """Compile beside `target` and put the library, or the failure if it will last, into it. The lock is held."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=target.parent, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        *compiling, linking = commands(sorted(sources.glob("*.cpp")), folder, compiler=words)
        try:
            show(_run(compiling, folder) + _run([linking], folder))
        except _Failed as error:
            show(error.printed)
            if error.lasting:
                (folder / FAILED).write_text(f"{error}\n{error.printed}", encoding="utf-8")
                _put(folder / FAILED, target)
            raise
        (folder / SUM).write_text(f"{_sum(folder / LIBRARY)}  {LIBRARY}\n", encoding="utf-8")
        _put(folder / SUM, target)
        _put(folder / LIBRARY, target)
        (target / FAILED).unlink(missing_ok=True)
    return Built(target / LIBRARY, seconds=time.perf_counter() - began)


@contextmanager
def _alone(kernels: Path, say: Callable[[str], None] | None) -> Iterator[None]:
    """Waits until no other process builds. Raises _Failed where one does not come to an end."""
    lock = FileLock(str(kernels / "lock"))
    try:
        lock.acquire(timeout=SILENT_S)
    except Timeout:
        if say:
            say(f"waiting for another process that builds the CPU kernels in {kernels} ...")
        try:
            lock.acquire(timeout=LONGEST_S)
        except Timeout:
            advice = "end it, or set SPARSIFY_CACHE to another folder"
            raise _Failed(f"another process holds {kernels / 'lock'} and does not finish: {advice}") from None
    try:
        yield
    finally:
        lock.release()


def _run(todo: list[list[str]], folder: Path) -> str:
    """Run the commands, at most one for each processor at a time; what they printed, each below its command.

    They and all that they start end with this process: they are of one group, with a shell that ends the group when the
    pipe from this process is closed.

    Raises:
        _Failed: one of them failed. Then, and when interrupted, the others are stopped.
    """
    waiting, printed = todo[::-1], ""
    running: dict[subprocess.Popen[bytes], tuple[list[str], BinaryIO]] = {}
    environment = os.environ | {"LC_ALL": "C", "TMPDIR": str(folder)}  # 'error' in English; no litter in /tmp
    watch = subprocess.Popen(["/bin/sh", "-c", "read _; kill -KILL 0"], stdin=subprocess.PIPE, process_group=0)
    try:
        while waiting or running:
            while waiting and len(running) < len(os.sched_getaffinity(0)):
                command = waiting.pop()
                printing = os.fdopen(os.memfd_create("log"), "w+b")  # in memory: the disk may be full
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=printing,
                    stderr=printing,
                    env=environment,
                    process_group=watch.pid,
                )
                running[process] = command, printing
            time.sleep(0.01)
            for process in [each for each in running if each.poll() is not None]:
                command, log = running.pop(process)
                with log:
                    log.seek(0)
                    text = log.read().decode(errors="replace")
                printed += f"{' '.join(command)}\n{text}"
                if process.returncode:
                    passing = process.returncode < 0 or any(words in text for words in PASSING)
                    passing |= shutil.disk_usage(folder).free < ROOM
                    raise _Failed(_reason(command, text, process.returncode), printed, lasting=not passing)
        return printed
    finally:
        os.killpg(watch.pid, signal.SIGKILL)
        for process in (watch, *running):
            process.communicate()


def _put(file: Path, target: Path) -> None:
    """Move `file` into the folder `target` once all of it is on the disk; only its owner may write either."""
    with open(file, "rb+") as written:
        os.fchmod(written.fileno(), 0o755)
        os.fsync(written.fileno())
    target.mkdir(mode=0o755, exist_ok=True)
    os.replace(file, target / file.name)


def _known(target: Path, show: Callable[[str], None]) -> Built | None:
    """What an earlier build left in `target`: a whole library, or a reason. Raises _Failed where it must not be loaded."""
    library = target / LIBRARY
    try:
        if (target / SUM).is_file() and (target / SUM).read_text(encoding="utf-8").split()[:1] == [_sum(library)]:
            _check_owner(library.resolve(), library.resolve().parent)
            return Built(library)
        if (target / FAILED).is_file():
            reason, _, printed = (target / FAILED).read_text(encoding="utf-8").partition("\n")
            if reason.strip():
                show(printed)
                return Built(None, reason)
    except (OSError, UnicodeDecodeError):  # damaged: built again
        pass
    return None


def _check_owner(*paths: Path) -> None:
    """Raises _Failed where this process is root's and another user can write one of `paths`."""
    for path in paths if os.geteuid() == 0 else ():
        info = path.stat()
        others = f"belongs to user {info.st_uid}" if info.st_uid else "can be written by other users"
        if info.st_uid or info.st_mode & 0o022:
            advice = "set SPARSIFY_CACHE to a folder of root's own"
            raise _Failed(f"{path} {others}, and root loads no such library: {advice}")


def _sum(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _reason(command: list[str], text: str, code: int) -> str:
    """One line: the compiler, what it was doing, and its first line with 'error'."""
    source = next((word for word in command if word.endswith(".cpp")), "")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if "ld returned" not in line and "linker command failed" not in line]
    first = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else f"exit code {code}")
    first = " ".join(first.split())
    if source:  # the folder of the sources says nothing
        first = first.replace(f"{Path(source).parent}/", "")
    return f"{Path(command[0]).name} cannot {'compile' if source else 'link'} the CPU kernels: {first[:200]}; {MORE}"


def _unsupported(sources: Path) -> str:
    if sys.platform != "linux":
        return f"the CPU kernels are for Linux so far, this is {sys.platform}"
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"the CPU kernels are for x86-64 processors so far, this is {platform.machine()}"
    if not any(sources.glob("*.cpp")):
        return f"no sources of the CPU kernels in {sources}: install sparsify again"
    return ""


def _no_compiler() -> str:
    if given := os.environ.get("CXX", "").strip():
        return f"CXX={given} is not a command: set CXX to a C++ compiler, or unset it"
    return "no C++ compiler was found for the CPU kernels: install g++ 10 or newer, or set CXX"


def _version(words: list[str]) -> str:
    try:
        return subprocess.run([*words, "--version"], stdin=subprocess.DEVNULL, capture_output=True).stdout.decode(
            "utf-8", "replace"
        )
    except OSError as error:
        raise _Failed(f"cannot run {words[0]}: {one_line(error)}") from error


def _torch_folder() -> Path:
    """Where torch is installed; it is not imported. Raises ModuleNotFoundError."""
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("torch is not installed", name="torch")
    return Path(found.submodule_search_locations[0])


def _made_from(sources: Path) -> str:
    """Hash of all that the library is made from, the compiler apart."""
    files = sorted(each for each in sources.iterdir() if each.suffix in (".cpp", ".h"))
    flags = commands([Path(each.name) for each in files if each.suffix == ".cpp"], Path())
    contents = [word for each in files for word in (each.name, hashlib.sha256(each.read_bytes()).hexdigest())]
    return _digest([metadata.version("torch"), *contents, *[word for command in flags for word in command]])[:16]


def _digest(words: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()
