"""Files: written whole or not at all, JSON and YAML, and names of data and models fit to be
published.

While a file is written, a folder `.sparsify-*` lies beside it; while long work makes it, a file `.NAME.lock` does. Both are
gone afterwards. What a killed process left of them holds no lock any more, and the next write removes it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from safetensors import SafetensorError

from sparsify.errors import BadFile, brief, field, one_line

SCRATCH = ".sparsify-"  # beginning of the names of folders for what is being written


@contextmanager
def whole(path: str | Path) -> Iterator[str]:
    """A temporary file to write to; what it holds becomes the file `path` when the block ends without error.

    A crash, Ctrl-C or a full disk leaves the old file, if any, unchanged. A symbolic link stays one, and its target is
    replaced; mode and owner of an existing file are kept. Devices, pipes and open files (/dev/null, /dev/stdout, /dev/fd/3)
    are written to and not replaced.

    Raises:
        BadFile: the folder is missing, or cannot be written.
        BrokenPipeError: whoever read the pipe has gone.
    """
    try:
        target = _Target.of(path)
        with scratch(target.folder) as folder:
            temporary = folder / "file"
            temporary.touch()
            mode = temporary.stat().st_mode & 0o777  # what the umask leaves
            yield str(temporary)
            if target.straight:
                with open(temporary, "rb") as content, _opened(target.path) as stream:
                    shutil.copyfileobj(content, stream)
                return
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            if target.info is not None:
                mode = stat.S_IMODE(target.info.st_mode)
                with contextlib.suppress(PermissionError, AttributeError):  # another user's file; Windows
                    os.chown(temporary, target.info.st_uid, target.info.st_gid)
            os.chmod(temporary, mode)  # safetensors writes with 0600
            os.replace(temporary, target.path)
    except BrokenPipeError:
        raise
    except (OSError, SafetensorError) as error:
        raise BadFile(f"cannot write {path}: {one_line(error)}; the old file, if any, is unchanged") from error


@contextmanager
def scratch(folder: str | Path) -> Iterator[Path]:
    """A new folder in `folder`, removed after the block; first those that killed processes of this user left there.

    A living process holds a lock in its own, which ends with it: process numbers, which repeat, say nothing.
    """
    from filelock import FileLock

    while True:
        made = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=folder))
        lock = FileLock(made / "lock")
        try:
            lock.acquire()
        except FileNotFoundError:  # taken for a killed one's before it was locked
            continue
        except OSError:  # a file system without locks: nobody removes it
            pass
        break
    try:
        for other in Path(folder).glob(f"{SCRATCH}*"):
            with contextlib.suppress(OSError):  # `Timeout`: its process lives
                info = other.lstat()
                if stat.S_ISDIR(info.st_mode) and info.st_uid == made.stat().st_uid:
                    with FileLock(other / "lock", timeout=0):
                        shutil.rmtree(other, ignore_errors=True)
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        lock.release()


@contextmanager
def reserved(*paths: str | Path | None) -> Iterator[None]:
    """Holds outputs while long work makes them, so that it does not fail at its end; None: no output.

    Raises:
        BadFile: an output that cannot be written (`check_file`), or that another process is making.
    """
    from filelock import FileLock, Timeout

    with contextlib.ExitStack() as held:
        for path in paths:
            if path is None:
                continue
            check_file(path)
            target = _Target.of(path)
            if target.straight:
                continue
            name = os.path.join(target.folder, f".{os.path.basename(target.path)}.lock")
            lock = FileLock(name, timeout=0)
            try:
                lock.acquire()
            except Timeout:
                advice = f"wait until it is done, or choose another {field('output')}"
                raise BadFile(f"another process is making {path}: {advice}") from None
            except OSError:  # a file system without locks
                continue
            held.callback(lock.release)
            held.callback(Path(name).unlink, missing_ok=True)  # before it is released
        yield


def check_file(path: str | Path) -> None:
    """Raise `BadFile` where `whole` could not write: a folder lies there, or its own is missing or cannot be written."""
    try:
        _Target.of(path)
    except OSError as error:
        raise BadFile(f"cannot write {path}: {one_line(error)}") from None


def check_folder(path: Path) -> None:
    """Raise `BadFile` where `path` is no folder that can be written, and none that can be made."""
    try:
        if path.is_dir():
            _check_writable(path)
        elif path.exists():
            raise NotADirectoryError("it is a file, a folder is expected")
        else:
            _Target.of(path)
    except OSError as error:
        raise BadFile(f"cannot write to {path}: {one_line(error)}") from None


class _Target(NamedTuple):
    """What a write to a path reaches."""

    path: str  # links followed
    info: os.stat_result | None  # of the file that lies there
    straight: bool  # a device, pipe or open file: written to, not replaced

    @classmethod
    def of(cls, path: str | Path) -> _Target:
        """Of `path`; raises OSError where that cannot be written."""
        info = None
        with contextlib.suppress(FileNotFoundError):
            info = os.stat(path)
        if info is not None and stat.S_ISDIR(info.st_mode):
            raise IsADirectoryError("it is a folder")
        if _descriptor(path) is not None or (info is not None and not stat.S_ISREG(info.st_mode)):
            return cls(str(path), info, True)
        target = cls(os.path.realpath(path), info, False)
        _check_writable(target.folder)
        return target

    @property
    def folder(self) -> str:
        """Where the content is collected."""
        return tempfile.gettempdir() if self.straight else os.path.dirname(self.path)


def _check_writable(folder: str | Path) -> None:
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"there is no folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"the folder {folder} cannot be written")


def _descriptor(path: str | Path) -> int | None:
    """The descriptor of this process that `path` names, as /dev/stdout and /dev/fd/3 do."""
    where = os.path.abspath(path)
    while True:
        folder, name = os.path.split(where)
        folder = os.path.realpath(folder)
        if name.isdecimal() and folder in (f"/proc/{os.getpid()}/fd", "/dev/fd"):
            return int(name)
        if not os.path.islink(where):
            return None
        where = os.path.join(folder, os.readlink(where))


def _opened(path: str) -> Any:
    """A binary stream into a device or pipe; an open file goes on where it stands."""
    number = _descriptor(path)
    if number is None:
        return open(path, "wb")
    print(end="", flush=True)  # what was printed comes first
    return open(os.dup(number), "wb")


def publishable(name: str, parts: int = 2) -> str:
    """The name of a data set or model as a file may tell it: of a path the last `parts` parts.

    '/home/me/photos/val' -> 'photos/val'
    """
    known = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..", "~")]
    return "/".join(known[-parts:]) or name


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file that a command wrote; `BadFile`: missing, not JSON, or JSON of another type."""
    if not path.exists():
        raise BadFile(f"no file {path}")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadFile(f"{path} cannot be read as JSON: {one_line(error, 100)}") from None
    if not isinstance(tree, dict):
        raise BadFile(f"{path} holds no results: an object of JSON is expected")
    return tree


LONGEST = 64 * 1024  # characters of YAML: a recipe has 2,000
DEEPEST = 20
MOST = 10_000  # values, those that aliases repeat counted again


def read_yaml(text: str) -> Any:
    """The YAML document in `text`; its scalars are those of JSON: null, true, false, numbers and strings.

    Raises:
        ValueError: one line with the line's number: not YAML, a field given twice, a tag, or longer than `LONGEST`, deeper
            than `DEEPEST` or of more than `MOST` values.
    """
    if len(text) > LONGEST:
        raise ValueError(f"it is longer than {LONGEST} characters")
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = ", ".join(filter(None, (error.context, error.problem)))
        raise ValueError(f"line {mark.line + 1}: {what}" if mark else what) from None
    except (yaml.YAMLError, OverflowError) as error:
        raise ValueError(one_line(error)) from None


class _PlainLoader(yaml.SafeLoader):
    """PyYAML's, bounded, and with JSON's scalars."""

    yaml_implicit_resolvers: dict[Any, Any] = {  # noqa: RUF012
        None: [
            (f"tag:yaml.org,2002:{kind}", re.compile(rf"(?:{words})\Z"))
            for kind, words in {
                "null": "~|null|Null|NULL|",
                "bool": "true|True|TRUE|false|False|FALSE",
                "int": "[-+]?(0|[1-9][0-9_]{0,17})",
                "float": r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?",
                "merge": "<<",
            }.items()
        ]
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = self.values = 0
        self.sizes: dict[str, int] = {}  # values below each anchor

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As PyYAML's, which nests without end and lets aliases multiply."""
        event = self.peek_event()
        anchor, before, is_alias = event.anchor, self.values, isinstance(event, yaml.AliasEvent)
        self.values += self.sizes.get(anchor, MOST if anchor in self.anchors else 1) if is_alias else 1
        self.depth += 1
        if self.depth > DEEPEST:
            raise _bad(f"nested more than {DEEPEST} deep", event)
        if self.values > MOST:
            raise _bad(f"more than {MOST} values, or an alias of what it stands in", event)
        if getattr(event, "tag", None) is not None:
            raise _bad(f"tags such as {brief(event.tag)} are not read: write the value without", event)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if not is_alias:
            self.sizes[anchor] = self.values - before
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        """As PyYAML's, which takes a name twice, and the last of its values."""
        node, names = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _bad("a list or mapping stands where a field's name is expected", key)
            if key.value in names:
                raise _bad(f"the field {brief(key.value)} is given twice", key)
            names.add(key.value)
        return node


class _PlainDumper(yaml.SafeDumper):
    """PyYAML's, which quotes what either reader would take for something else than a string."""

    yaml_implicit_resolvers: dict[Any, Any] = (
        yaml.SafeDumper.yaml_implicit_resolvers | _PlainLoader.yaml_implicit_resolvers
    )


def to_yaml(tree: Any) -> str:
    """`tree` as YAML that `read_yaml` reads, fields in their order."""
    return yaml.dump(tree, Dumper=_PlainDumper, sort_keys=False, default_flow_style=None, width=120)


def _bad(problem: str, where: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=where.start_mark)


def to_json(tree: Any, **options: Any) -> str:
    """`tree` as JSON by `json.dumps`; a number that is not finite, which JSON does not have, becomes null."""
    return json.dumps(_known(tree), allow_nan=False, **options)


def _known(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {name: _known(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_known(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def write_json(path: str | Path, tree: Mapping[str, Any]) -> None:
    """Write a report as JSON with all digits, whole or not at all (`whole`)."""
    write_all({Path(path): tree})


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all (`whole`)."""
    write_all({Path(path): text})


def write_all(contents: Mapping[Path, Mapping[str, Any] | str | bytes]) -> None:
    """Write several files, mappings as JSON, text as UTF-8: where one of them cannot be written, none is (`whole`)."""
    with contextlib.ExitStack() as files:
        for path, content in contents.items():
            if isinstance(content, Mapping):
                content = to_json(content, indent=2) + "\n"
            data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
            Path(files.enter_context(whole(path))).write_bytes(data)
