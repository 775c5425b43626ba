"""One file holds the whole model; a bad file is one clear line and never a half-loaded model."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers.families import images
from sparsify.errors import BadFile, UsageError
from sparsify.jobs.convert import OutputOptions, convert
from sparsify.jobs.dense import DenseRequest
from sparsify.models import building, checkpoint, names, original, pretrained
from sparsify.nn import attention
from sparsify.processes import Listener
from sparsify.recipe import Recipe
from sparsify.reports import header as facts


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "digits.safetensors"
    recipe = Recipe().override(calib_images=8, spread="none")
    return convert(DenseRequest("digits"), recipe, OutputOptions(path))


@pytest.fixture
def parts(made):
    with safe_open(made.path, framework="pt") as file:
        return load_file(made.path), dict(file.metadata())


def test_file_is_enough_and_exact(made):
    loaded = checkpoint.load(made.path)
    x = images(loaded)
    with torch.inference_mode():
        assert torch.equal(loaded(x), made.model(x))
    assert len(attention.sparse_modules(loaded)) == 4 and not loaded.training
    assert loaded.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_header_says_everything(made, parts):
    meta = parts[1]
    assert meta["format"] == "pt" and meta["sparsify.format"] == "1"
    header = checkpoint.read_header(made.path)
    assert header.config.keep == 0.1 and header.provenance["recipe"]["seed"] == 0
    assert header.report["macs_sparse"] < header.report["macs_dense"]
    assert {"torch", "timm"} <= header.provenance["versions"].keys()
    assert str(made.path.parent) not in json.dumps(meta)  # no path of the machine that wrote it


def test_same_seed_gives_the_same_file_apart_from_the_date(made, tmp_path):
    small = Recipe().override(calib_images=8, spread="none")
    again = convert(DenseRequest("digits"), small, OutputOptions(tmp_path / "b.safetensors"))
    a, b = load_file(made.path), load_file(again.path)
    assert all(torch.equal(a[name], b[name]) for name in a | b)
    one, two = (dict(h.provenance) for h in (made.header, again.header))
    one.pop("date"), two.pop("date")
    assert (
        one == two
        and made.header.architecture == again.header.architecture
        and made.header.report == again.header.report
    )


def test_another_seed_draws_other_images(made, tmp_path):
    recipe = Recipe().override(calib_images=8, spread="none", seed=1)
    other = convert(DenseRequest("digits"), recipe, OutputOptions(tmp_path / "b.safetensors"))
    a, b = load_file(made.path), load_file(other.path)
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_another_image_size_is_resampled(made):
    model = checkpoint.load(made.path, img_size=42)
    with torch.inference_mode():
        assert model(torch.randn(1, 3, 42, 42)).shape == (1, 10)
    with pytest.raises(UsageError) as error:
        checkpoint.load(made.path, img_size=1)
    assert "--img-size 1: " in error.value.for_command_line()


BROKEN = {
    "truncated": (lambda path, t, m: path.write_bytes(path.read_bytes()[:-100]), "not a whole safetensors"),
    "empty": (lambda path, t, m: path.write_bytes(b""), "is empty"),
    "text": (lambda path, t, m: path.write_text("hello"), "not a whole safetensors"),
    "plain checkpoint": (lambda path, t, m: save_file(t, path), "--weights"),
    "newer": (lambda path, t, m: save_file(t, path, {**m, "sparsify.format": "99"}), "upgrade"),
    "tensor missing": (lambda path, t, m: save_file({k: t[k] for k in list(t)[1:]}, path, m), "missing"),
    "extra tensor": (lambda path, t, m: save_file({**t, "extra": t["cls_token"].clone()}, path, m), "extra"),
    "wrong shape": (lambda path, t, m: save_file({**t, "head.bias": torch.zeros(11)}, path, m), "shape"),
    "tampered tensor": (lambda path, t, m: save_file({**t, "head.bias": t["head.bias"] + 1}, path, m), "changed after"),
    "tampered keep": (
        lambda path, t, m: save_file(t, path, {**m, "sparsify.config": m["sparsify.config"].replace("0.1", "0.2")}),
        "changed after",
    ),
    "no digest": (
        lambda path, t, m: save_file(t, path, {k: v for k, v in m.items() if k != "sparsify.sha256"}),
        "header is damaged",
    ),
    "bad JSON": (lambda path, t, m: save_file(t, path, {**m, "sparsify.config": "{"}), "header is damaged"),
    "bad config": (lambda path, t, m: save_file(t, path, {**m, "sparsify.config": '{"keep": 7}'}), "header is damaged"),
    "unknown architecture": (
        lambda path, t, m: save_file(
            t, path, {**m, "sparsify.architecture": '{"architecture": "x", "model_args": {}, "pretrained_cfg": {}}'}
        ),
        "does not describe a model",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_bad_file_is_one_clear_line(kind, parts, made, tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(made.path.read_bytes())
    spoil, message = BROKEN[kind]
    spoil(path, *parts)
    with pytest.raises(BadFile, match=message) as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value) and "bad.safetensors" in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(BadFile, match="no file"):
        checkpoint.load(tmp_path / "none.safetensors")
    with pytest.raises(BadFile, match="folder"):
        checkpoint.load(tmp_path)


def test_file_may_be_read_by_whom_the_umask_allows(made, tmp_path):
    (tmp_path / "plain").touch()
    checkpoint.save(made.model, tmp_path / "model.safetensors", checkpoint.read_header(made.path))
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_failed_write_leaves_the_old_file_whole(made, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(made.path.read_bytes())
    before = path.read_bytes()

    def full(tensors, name, metadata):
        with open(name, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(BadFile, match="No space left"):
        checkpoint.save(made.model, path, made.header)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_another_models_file_is_not_overwritten_without_force(made, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("something else")
    architecture = building.describe(pretrained.load(names.resolve("digits")), names.resolve("digits"))
    with pytest.raises(BadFile, match="overwrite it with force"):
        checkpoint.may_overwrite(path, architecture, force=False)
    checkpoint.may_overwrite(path, architecture, force=True)
    path.write_bytes(made.path.read_bytes())
    checkpoint.may_overwrite(path, architecture, force=False)  # the same model again
    with pytest.raises(BadFile, match="overwrite it with force"):
        checkpoint.may_overwrite(path, {**architecture, "architecture": "deit_tiny_patch16_224"}, force=False)


def test_the_header_says_whether_averaged_weights_were_converted(tmp_path):
    last = pretrained.load(names.resolve("digits")).state_dict()
    average = {name: tensor * 1.01 for name, tensor in last.items()}
    file = tmp_path / "own.pth"
    torch.save({"model": last, "model_ema": average}, file)
    recipe = Recipe().override(calib_images=4, spread="none")
    made, lines = {}, []
    for ema in (None, False):
        request, output = DenseRequest("digits", file, ema=ema), OutputOptions(tmp_path / f"{ema}.safetensors")
        made[ema] = convert(request, recipe, output, listener=Listener(lines.append)).header
    assert (made[None].provenance["ema"], made[False].provenance["ema"]) == (True, False)
    assert len([line for line in lines if line.startswith("own.pth: ")]) == 2
    assert made[None].dense_sha256 != made[False].dense_sha256
    said = [dict(facts.origin(made[ema], tmp_path / f"{ema}.safetensors"))["checkpoint"] for ema in (None, False)]
    assert said[0] == f"{said[1]}, its averaged weights (EMA)"
    for ema, state in ((None, average), (False, last)):  # the original is found in the same file
        dense = original.load_original(made[ema], file)
        assert all(torch.equal(dense.state_dict()[name], state[name]) for name in state)
