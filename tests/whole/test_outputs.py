"""Outputs: what lies at their path stays what it is, what cannot be written is refused first, and kills leave nothing."""

import contextlib
import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import sparsify
from helpers import small_runs
from sparsify import processes
from sparsify.errors import BadFile
from sparsify.files import locks, outputs
from sparsify.fit.finetune.objective import CachedTeacher
from sparsify.jobs.convert import ImageSources, OutputOptions
from sparsify.recipe import recipe_yaml

PYTHON = (sys.executable, "-c")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(sparsify.__file__).parents[1])}
ENVIRONMENT.pop("PYTHONUNBUFFERED", None)  # what was printed waits in a buffer, as for most users

# what lies there


def test_a_device_stays_a_device(tmp_path):
    device = tmp_path / "null"
    try:
        os.mknod(device, 0o600 | stat.S_IFCHR, os.stat("/dev/null").st_rdev)
    except PermissionError:
        pytest.skip("devices are made by root")
    outputs.write_json(device, {"a": 1})
    assert stat.S_ISCHR(device.lstat().st_mode) and device.stat().st_rdev == os.stat("/dev/null").st_rdev
    assert os.listdir(tmp_path) == ["null"]


def test_a_fifo_is_written_to(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "fifo").read_text()))
    reader.start()
    outputs.write_text(tmp_path / "fifo", "words")
    reader.join(30)
    assert read == ["words"] and stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)


@pytest.mark.parametrize("before", ["old", None])
def test_a_symbolic_link_is_followed_and_stays(tmp_path, before):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "link"
    link.symlink_to(Path("elsewhere") / "target")
    if before is not None:
        target.write_text(before)
    outputs.write_text(link, "new")
    assert os.readlink(link) == "elsewhere/target" and target.read_text() == "new"
    assert os.listdir(tmp_path / "elsewhere") == ["target"] and sorted(os.listdir(tmp_path)) == ["elsewhere", "link"]


def test_mode_and_owner_of_a_file_are_kept_and_a_new_one_has_the_umasks(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("")
    old.chmod(0o600)
    if os.geteuid() == 0:
        os.chown(old, 12345, 54321)
    owner = old.stat().st_uid, old.stat().st_gid
    before = os.umask(0o027)
    try:
        outputs.write_text(old, "x")
        outputs.write_text(new, "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE(old.stat().st_mode) == 0o600 and (old.stat().st_uid, old.stat().st_gid) == owner
    assert stat.S_IMODE(new.stat().st_mode) == 0o640


@pytest.mark.parametrize("stdout", ["file", "pipe"])
@pytest.mark.parametrize("name", ["/proc/self/fd/1", "/dev/fd/1", "link"])
def test_stdout_by_its_name_goes_on_where_it_stands(tmp_path, stdout, name):
    (tmp_path / "link").symlink_to("/proc/self/fd/1")  # as /dev/stdout, which a failing test must not touch
    program = (
        f"from sparsify.files import outputs; print('one'); outputs.write_text({name!r}, 'two\\n'); print('three')"
    )
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(open(tmp_path / "out", "wb")) if stdout == "file" else subprocess.PIPE
        done = subprocess.run([*PYTHON, program], cwd=tmp_path, stdout=out, env=ENVIRONMENT, timeout=60)
    text = (tmp_path / "out").read_bytes() if stdout == "file" else done.stdout
    assert done.returncode == 0 and text == b"one\ntwo\nthree\n" and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("writes", ["outputs.write_text('/proc/self/fd/1', 'x')", "tables.show(Table('x'))"])
def test_a_reader_that_has_gone_ends_a_command_as_a_pipe_does(writes):
    program = f"""
from rich.table import Table
from sparsify.files import outputs
from sparsify.cli import app, commands, tables
app.app.command("write")(lambda: {writes})
app.main(["write"])
"""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as pipe:
        done = subprocess.run([*PYTHON, program], stdout=pipe, stderr=subprocess.PIPE, env=ENVIRONMENT, timeout=120)
    assert (done.returncode, done.stderr) == (141, b"")


def test_several_files_are_all_written_or_none(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "c").mkdir()
    with pytest.raises(BadFile, match=r"cannot write .*c: it is a folder"):
        outputs.write_all({tmp_path / "a": "new", tmp_path / "b": b"new", tmp_path / "c": {"new": 1}})
    assert (tmp_path / "a").read_text() == "old" and sorted(os.listdir(tmp_path)) == ["a", "c"]


def test_a_full_disk_ends_an_export_in_one_line(run, tmp_path):
    """torch's own writer of .pt2 files aborts the process there."""
    assert run("convert", "digits", "--calib-images", 2)[0] == 0
    before = sorted(os.listdir(tmp_path))
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
    limited += "from sparsify.cli.app import main; main(sys.argv[1:])"
    command = [*PYTHON, limited, "export", "model.safetensors", "--format", "pt2", "-q"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and "model.pt2" in line and "File too large" in line and not done.stdout
    assert sorted(os.listdir(tmp_path)) == before


def test_the_teachers_cache_has_its_room_on_the_disk_before_it_is_mapped(tmp_path):
    losses = small_runs.recipe({}).stages[0].losses
    cache = CachedTeacher(type("Teacher", (), {"losses": losses})(), 1 << 16, tmp_path)
    path = next(tmp_path.glob("*.npy"))
    assert path.stat().st_blocks * 512 >= 1 << 16 and isinstance(cache.present, np.memmap)


# kills

HOLDS = """
import os, sys, time
from sparsify.files import locks, outputs
with locks.reserved("out"), outputs.whole("out") as temporary:
    open(temporary, "w").write("half")
    if os.fork() == 0:
        time.sleep(30)  # as a worker that outlives it
        os._exit(0)
    print("ready", flush=True)
    time.sleep(30)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that makes the file `out` until it is killed, and has a child."""
    process = subprocess.Popen([*PYTHON, HOLDS], cwd=tmp_path, stdout=subprocess.PIPE, env=ENVIRONMENT, process_group=0)
    assert process.stdout.readline() == b"ready\n"
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_what_a_killed_process_left_is_removed_by_the_next_write_and_a_living_ones_stays(holder, tmp_path):
    scratch = {name for name in os.listdir(tmp_path) if name.startswith(locks.SCRATCH)}
    assert len(scratch) == 1
    outputs.write_text(tmp_path / "other", "x")
    assert set(os.listdir(tmp_path)) == {*scratch, ".out.lock", "other"}
    holder.kill()
    holder.wait()
    with locks.reserved(tmp_path / "out"):
        outputs.write_text(tmp_path / "out", "whole")
    assert (tmp_path / "out").read_text() == "whole" and sorted(os.listdir(tmp_path)) == ["other", "out"]


def test_what_is_no_leftover_of_ours_stays(tmp_path):
    (tmp_path / f"{locks.SCRATCH}notes").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"{locks.SCRATCH}link").symlink_to("elsewhere")
    outputs.write_text(tmp_path / "out", "x")
    assert len(os.listdir(tmp_path)) == 4 and not os.listdir(tmp_path / "elsewhere")


def test_what_another_user_left_stays(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("files are given away by root")
    left = tmp_path / f"{locks.SCRATCH}left"
    left.mkdir()
    os.chown(left, 12345, 54321)
    outputs.write_text(tmp_path / "out", "x")
    assert sorted(os.listdir(tmp_path)) == [left.name, "out"]


def test_without_locks_files_are_written_all_the_same(tmp_path, monkeypatch):
    """As on some network file systems."""

    def refuse(*given):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / f"{locks.SCRATCH}left").mkdir()  # nobody knows whether its process lives
    with locks.reserved(tmp_path / "out"):
        outputs.write_text(tmp_path / "out", "x")
    assert (tmp_path / "out").read_text() == "x"
    assert sorted(os.listdir(tmp_path)) == [".sparsify-left", "out"]


# who writes

OUTPUTS = {
    "convert": ["digits", "--calib-images", "2", "-o", "out"],
    "convert learning": ["digits", "--data", "digits", "--recipe", "own.yaml", "--resume", "-o", "out"],
    "sweep": ["digits", "--data", "digits", "-o", "sw"],
    "export": ["model.safetensors", "--force", "-o", "out.onnx"],
}


@pytest.mark.parametrize("command", OUTPUTS)
def test_a_second_process_on_an_output_is_refused_before_it_computes(run, tmp_path, command):
    assert run("convert", "digits", "--calib-images", 2)[0] == 0
    (tmp_path / "own.yaml").write_text(recipe_yaml(small_runs.recipe({})))
    output = {"sweep": "sw.json", "export": "out.onnx"}.get(command, "out")
    before = sorted(os.listdir(tmp_path))
    with locks.reserved(tmp_path / output):
        code, out, err = run(command.split(" ")[0], *OUTPUTS[command])
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert f"another process is making {output}: wait" in err and "--output" in err
    assert sorted(os.listdir(tmp_path)) == before


def test_a_trained_output_is_held_from_before_calibration_to_the_end(tmp_path):
    seen = set()

    def say(line):
        with contextlib.suppress(BadFile), locks.reserved(tmp_path / "m.safetensors"):
            seen.add(f"free at: {line}")
        seen.add(line.split(" ")[0])

    made = small_runs.convert(tmp_path / "m.safetensors", small_runs.recipe({}), say=say)
    assert {"calibrating", "fine-tuning", "kept"} <= seen and not [line for line in seen if line.startswith("free")]
    with locks.reserved(made.path):
        pass


def test_a_device_is_held_by_nobody():
    with locks.reserved("/dev/null"), locks.reserved(Path("/dev/null"), None):
        pass


def test_only_the_main_process_of_several_holds_the_output(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "main", lambda: False)
    with locks.reserved(tmp_path / "m.safetensors"):
        small_runs.convert_job(
            small_runs.DenseRequest("digits"),
            small_runs.recipe(stages=[]),
            OutputOptions(tmp_path / "m.safetensors"),
            images=ImageSources(),
        )


# refused first


@pytest.mark.parametrize("where", ["no/folder/{}", "folder", "file/{}"])
@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("convert digits -o", "a.safetensors"),
        ("eval missing.safetensors --data digits --results-file", "a.json"),
        ("profile missing.safetensors --json", "a.json"),
        ("profile missing.safetensors --markdown", "a.md"),
        ("export missing.safetensors --format pt2 --force -o", "a.pt2"),
        ("report missing.safetensors -o", "a.html"),
        ("sweep digits --data missing -o", "a"),
        ("show missing.safetensors missing.jpg -o", "a/b"),
        ("push missing.safetensors org/name -o", "a/b"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_any_work(run, tmp_path, command, option, where):
    (tmp_path / "file").write_text("")
    suffix = Path(option).suffix
    output = f"folder{suffix}" if where == "folder" else where.format(option)
    if where == "folder" and command.split(" ")[0] in ("show", "push"):
        (tmp_path / output).write_text("")  # they write into a folder
    elif where == "folder":
        (tmp_path / (f"{output}.md" if command.startswith("sweep") else output)).mkdir()
    before = sorted(os.listdir(tmp_path))
    code, out, err = run(*command.split(" "), output)
    assert (code, out) == (1, "") and err.startswith("error: cannot write ") and err.count("\n") == 1, err
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("lies", ["a.report.json", "a.report.md", "a.recipe.yaml"])
def test_what_lies_beside_a_model_is_looked_at_first_too(run, tmp_path, lies):
    (tmp_path / lies).mkdir()
    code, out, err = run("convert", "digits", "--calib-images", 2, "--target-macs", 0.7, "-o", "a.safetensors")
    assert (code, out, err) == (1, "", f"error: cannot write {lies}: it is a folder\n")
    assert os.listdir(tmp_path) == [lies]
