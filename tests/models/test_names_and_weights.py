"""Claims about names, weights and rebuilding of dense models. Weights come from local stand-ins: no network."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from sparsify.cli.preflight import preflight
from sparsify.errors import BadFile, SparsifyError, UnsupportedModel, UsageError
from sparsify.models import building, checkpoint, dense_weights, pretrained
from sparsify.models import building as building_
from sparsify.models.building import describe, described, note
from sparsify.models.digits import network
from sparsify.models.names import ALIASES, resolve
from sparsify.nn import hosts

TINY = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
SMALL = {"img_size": 32, "num_classes": 7}  # 2x2 patches: 5.4 M parameters remain


def make(architecture: str = "vit_tiny_patch16_224", **args) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(architecture, **{"depth": 2, **args}).eval()


@pytest.fixture(autouse=True)
def two_blocks(monkeypatch):
    """Every ViT of this file is two blocks deep, so that the tests are quick; timm's code path stays the same."""
    build, create = building.build, timm.create_model
    shallow = {"depth": 2}
    monkeypatch.setattr(
        building,
        "build",
        lambda a, args, cfg: (
            build(a, {**(shallow if a.startswith(("vit", "deit")) else {}), **args}, cfg)
            if a != network.ARCHITECTURE
            else build(a, args, cfg)
        ),
    )
    monkeypatch.setattr(
        timm,
        "create_model",
        lambda a, **kw: create(a, **{**(shallow if a.startswith(("vit", "deit")) else {}), **kw}),
    )


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text and text
    return text


# names


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_alias_names_pretrained_weights_of_a_model_that_can_be_converted(alias):
    source = resolve(alias)
    assert source.pretrained_name in timm.list_pretrained()
    assert source.note == f"{alias} -> {source.pretrained_name}"
    hosts.supported_attentions(building_.skeleton(source), alias)


def test_exact_name_keeps_its_tag_and_a_bare_one_says_the_default_tag():
    assert resolve("vit_base_patch16_224.mae").pretrained_name == "vit_base_patch16_224.mae"
    bare = resolve("deit_small_patch16_224")
    assert (bare.architecture, bare.pretrained_name, bare.note) == (
        "deit_small_patch16_224",
        "deit_small_patch16_224.fb_in1k",
        "",
    )


def test_unknown_name_offers_the_nearest_names():
    with pytest.raises(UsageError, match="deit_small") as error:
        resolve("deit_smal")
    assert "unknown model 'deit_smal'" in one_line(error)


def test_unknown_tag_lists_the_known_tags():
    with pytest.raises(UsageError, match=r"no weights tagged 'nope'.*fb_in1k"):
        resolve("deit_tiny_patch16_224.nope")


@pytest.mark.parametrize("name", ["model.pth", "some/where/x.safetensors"])
def test_path_as_name_points_to_weights(name):
    with pytest.raises(UsageError) as error:
        resolve(name)
    assert "--weights" in error.value.for_command_line()
    one_line(error)


def test_folder_without_config_is_told_what_a_model_has(tmp_path):
    with pytest.raises(UsageError, match=r"a folder without config\.json"):
        resolve(str(tmp_path))


def test_swin_resolves_and_is_refused_by_class_name_without_memory():
    skeleton = building_.skeleton(resolve("swin_tiny_patch4_window7_224"))
    assert all(p.is_meta for p in skeleton.parameters())
    with pytest.raises(UnsupportedModel, match="WindowAttention"):
        hosts.supported_attentions(skeleton)


def test_image_size_must_be_a_multiple_of_the_patch():
    with pytest.raises(UsageError, match="225 is not a multiple of the patch size 16"):
        building_.skeleton(resolve("deit_tiny"), img_size=225)


# local files


def test_checkpoint_loads_whatever_wraps_it(tmp_path):
    model = make(**SMALL)
    state = model.state_dict()
    doubled = {k: v * 2 for k, v in state.items()}
    prefixed = {f"module._orig_mod.{k}": v for k, v in state.items()}
    cases = {
        "plain.pth": state,
        "model.pt": {"model": state, "epoch": 3},
        "wrapped.ckpt": {"state_dict": prefixed},
        "lightning.ckpt": {"state_dict": {f"model.{k}": v for k, v in state.items()}},
        "ema.pth": {"state_dict": doubled, "state_dict_ema": state, "args": argparse.Namespace(lr=1.0)},
        "ema2.pth": {"model": doubled, "model_ema": {f"_orig_mod.{k}": v for k, v in state.items()}},
    }
    for name, content in cases.items():
        torch.save(content, tmp_path / name)
    save_file({f"module.{k}": v for k, v in state.items()}, tmp_path / "x.safetensors")
    for name in [*cases, "x.safetensors"]:
        loaded = pretrained.load(resolve("vit_tiny"), tmp_path / name, img_size=32)
        assert same(loaded, model), name
        assert not loaded.training and next(loaded.parameters()).requires_grad


def test_half_precision_checkpoint_becomes_float32(tmp_path):
    save_file(make(**SMALL).half().state_dict(), tmp_path / "half.safetensors")
    loaded = pretrained.load(resolve("vit_tiny"), tmp_path / "half.safetensors", img_size=32)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_head_and_image_size_are_read_off_the_file_and_told(tmp_path):
    model = make(**SMALL)
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    source = resolve("vit_tiny")
    loaded = pretrained.load(source, tmp_path / "x.safetensors")
    assert same(loaded, model)
    told = note(loaded, source)
    assert told == "vit_tiny_patch16_224 with 7 classes instead of 1000 and 32x32 px instead of 224x224"
    assert note(pretrained.load(source, tmp_path / "x.safetensors", 0), source).startswith(
        "vit_tiny_patch16_224 with 0"
    )
    config = timm.data.resolve_model_data_config(loaded)
    assert config["input_size"] == (3, 32, 32) and config["mean"] == (0.5, 0.5, 0.5)


def test_other_image_size_resamples_position_embeddings_as_timm_does(tmp_path):
    model = make(**SMALL)
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    loaded = pretrained.load(resolve("vit_tiny"), tmp_path / "x.safetensors", img_size=64)
    model.set_input_size(img_size=(64, 64))
    assert torch.allclose(loaded.pos_embed, model.pos_embed, atol=1e-6)
    assert loaded(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def test_deit3_original_names_are_understood(tmp_path):
    model = make("deit3_small_patch16_224", img_size=32, num_classes=5)
    original = {re.sub(r"ls(\d)\.gamma", r"gamma_\1", k): v for k, v in model.state_dict().items()}
    assert any("gamma_1" in k for k in original)
    torch.save({"model": original}, tmp_path / "deit3.pth")
    assert same(pretrained.load(resolve("deit3_small"), tmp_path / "deit3.pth"), model)


def test_distilled_model_loads_both_heads(tmp_path):
    model = make("deit_tiny_distilled_patch16_224", img_size=32, num_classes=5)
    torch.save(model.state_dict(), tmp_path / "d.pth")
    assert same(pretrained.load(resolve("deit_tiny_distilled"), tmp_path / "d.pth"), model)
    headless = pretrained.load(resolve("deit_tiny_distilled"), tmp_path / "d.pth", num_classes=0)
    assert not [k for k in headless.state_dict() if k.startswith("head")]


def test_features_model_takes_a_fine_tuned_head(tmp_path):
    model = make("vit_small_patch14_dinov2", img_size=28, num_classes=3)
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    assert pretrained.load(resolve("dinov2_small"), tmp_path / "x.safetensors").num_classes == 3


def _damaged(kind: str, path: Path) -> Path:
    file = path / ("x.safetensors" if kind not in ("pickled", "junk.pth", "not a state dict") else "x.pth")
    if kind == "text":
        file.write_text("these are no weights\n" * 20)
    elif kind == "truncated":
        save_file(make(**SMALL).state_dict(), file)
        file.write_bytes(file.read_bytes()[:5000])
    elif kind == "empty":
        file.touch()
    elif kind == "folder":
        file.mkdir()
    elif kind == "pickled":
        torch.save({"model": make(**SMALL).state_dict(), "extra": Evil()}, file)
    elif kind == "junk.pth":
        file.write_bytes(os.urandom(300))
    elif kind == "not a state dict":
        torch.save({"epoch": 3, "lr": 0.1}, file)
    elif kind == "converted":
        save_file({"a": torch.zeros(1)}, file, metadata={"sparsify.format": "1"})
    return file


class Evil:
    """Unpickling this would write a file."""

    def __reduce__(self):
        return (Path.touch, (Path("evil-was-here"),))


@pytest.mark.parametrize(
    "kind, said",
    [
        ("missing", "does not exist"),
        ("folder", "is a folder"),
        ("text", "cannot be read"),
        ("truncated", "cannot be read"),
        ("empty", "is empty"),
        ("junk.pth", "nothing else is unpickled|cannot be read"),
        ("pickled", "nothing else is unpickled"),
        ("not a state dict", "no state dict"),
        ("converted", r"^\S+ is already converted"),
    ],
)
def test_damaged_file_gives_one_line(kind, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadFile, match=said) as error:
        pretrained.load(resolve("vit_tiny"), _damaged(kind, tmp_path))
    assert "x." in one_line(error) and len(one_line(error)) < 400
    assert not Path("evil-was-here").exists()


def test_weights_of_another_architecture_name_the_differing_keys(tmp_path):
    state = make(**SMALL).state_dict()
    state["blocks.0.attn.extra"] = torch.zeros(3)
    state.pop("norm.bias")
    state["norm.weight"] = torch.zeros(5)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(BadFile) as error:
        pretrained.load(resolve("vit_tiny"), tmp_path / "x.safetensors")
    text = one_line(error)
    assert "missing norm.bias" in text and "unexpected blocks.0.attn.extra" in text
    assert "norm.weight [5] (expected [192])" in text


def test_many_differing_keys_are_counted(tmp_path):
    save_file(make(**SMALL).state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(BadFile, match=r"other shape: cls_token .* and \d+ more"):
        pretrained.load(resolve("vit_small"), tmp_path / "x.safetensors")


def test_resnet_weights_are_refused(tmp_path):
    save_file({"conv1.weight": torch.zeros(8, 3, 7, 7), "fc.weight": torch.zeros(10, 8)}, tmp_path / "x.safetensors")
    with pytest.raises(BadFile, match=r"missing .*; unexpected conv1.weight, fc.weight \(no head in the file"):
        pretrained.load(resolve("vit_tiny"), tmp_path / "x.safetensors")


def test_other_patch_size_is_refused_and_not_resampled(tmp_path):
    save_file(make("vit_small_patch32_224", num_classes=3).state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(BadFile, match="patches of 32 px, vit_small_patch16_224 of 16 px"):
        pretrained.load(resolve("vit_small"), tmp_path / "x.safetensors")


def test_number_of_classes_that_the_file_does_not_have_is_refused(tmp_path):
    save_file(make(**SMALL).state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(BadFile, match="has 7 classes, not 10"):
        pretrained.load(resolve("vit_tiny"), tmp_path / "x.safetensors", num_classes=10)


FOREIGN = {
    "page.pth": (b"\n<!DOCTYPE html><html>Sign in</html>", "a web page.*download the file itself"),
    "pointer.safetensors": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "LFS pointer.*git lfs pull",
    ),
    "shards.json": (
        b'{"metadata": {}, "weight_map": {"a": "x-1-of-2"}}',
        "several files.*named",
    ),
    "config.pth": (b'{"model_type": "vit"}', "is JSON, not weights"),
    "keras.h5": (b"\x89HDF\r\n", "HDF5"),
    "array.pth": (b"\x93NUMPY\x01\x00", "NumPy: a state dict is expected"),
    "archive.pth": (b"\x1f\x8b\x08\x00", "a gzip archive: unpack it"),
    "nothing.pth": (b"", "is empty"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_that_holds_no_weights_is_named_by_what_it_is(name, tmp_path):
    content, said = FOREIGN[name]
    (tmp_path / name).write_bytes(content)
    for read in (lambda path: pretrained.load(resolve("vit_tiny"), path), checkpoint.load):
        with pytest.raises(BadFile, match=said) as error:
            read(tmp_path / name)
        assert name in one_line(error)


def test_a_checkpoint_is_read_by_its_content_whatever_it_is_called(tmp_path):
    model = make(**SMALL)
    save_file(model.state_dict(), tmp_path / "tensors.pth")
    torch.save(model.state_dict(), tmp_path / "archive.safetensors")
    torch.save(model.state_dict(), tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for name in ("tensors.pth", "archive.safetensors", "old.bin"):
        assert same(pretrained.load(resolve("vit_tiny"), tmp_path / name), model)
    with pytest.raises(BadFile, match="PyTorch checkpoint, not a converted model.*--weights"):
        checkpoint.load(tmp_path / "archive.safetensors")


def test_objects_beside_the_tensors_are_named(tmp_path):
    torch.save({"model": make(**SMALL).state_dict(), "best": np.float64(0.7)}, tmp_path / "x.pth")
    with pytest.raises(
        BadFile, match=r"holds numpy\S*multiarray.scalar besides tensors.*save its state dict alone"
    ) as error:
        pretrained.load(resolve("vit_tiny"), tmp_path / "x.pth")
    one_line(error)


def test_the_average_is_taken_where_there_is_one_unless_it_is_left(tmp_path):
    last, average = make(**SMALL), make(**SMALL)
    average.load_state_dict({k: v * 2 for k, v in last.state_dict().items()})
    torch.save({"state_dict": last.state_dict(), "state_dict_ema": average.state_dict()}, tmp_path / "x.pth")
    for ema, model in ((None, average), (True, average), (False, last)):
        given = dense_weights.read_checkpoint(tmp_path / "x.pth", ema)
        assert same(pretrained.load(resolve("vit_tiny"), given), model) and given.averaged == (ema is not False)
        words = (
            "the last ones are taken, not the averaged" if ema is False else "the averaged weights .EMA. are taken, not"
        )
        assert re.match(f"x.pth: {words}", given.note)
    torch.save(last.state_dict(), tmp_path / "plain.pth")
    assert dense_weights.read_checkpoint(tmp_path / "plain.pth").note == ""
    with pytest.raises(BadFile, match="no averaged weights"):
        dense_weights.read_checkpoint(tmp_path / "plain.pth", True)


def test_names_of_other_libraries_are_recognised(tmp_path):
    state = make(**SMALL).state_dict()
    cases = {
        "names begin with 'backbone.'": {f"backbone.{k}": v for k, v in state.items()},
        "names are those of Hugging Face transformers": {"vit.encoder.layer.0.output.dense.weight": torch.zeros(3)},
    }
    for said, content in cases.items():
        save_file(content, tmp_path / "x.safetensors")
        with pytest.raises(BadFile, match=said) as error:
            pretrained.load(resolve("vit_tiny"), tmp_path / "x.safetensors")
        one_line(error)


def test_a_model_that_pools_by_the_mean_is_told_its_folder_which_loads_it(tmp_path):
    model = make(global_pool="avg", **SMALL)  # as fine-tuned MAE
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(BadFile, match="fc_norm: give local-dir:FOLDER") as error:
        pretrained.load(resolve("vit_tiny"), tmp_path / "model.safetensors")
    config = json.loads(re.search(r"{.*}", one_line(error))[0])
    config["model_args"] |= {"img_size": 32, "num_classes": 7}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert same(pretrained.load(resolve(f"local-dir:{tmp_path}")), model)


def test_positions_of_no_square_image_are_refused_in_words(tmp_path):
    distilled = make("deit_tiny_distilled_patch16_224", img_size=32, num_classes=5)
    save_file(distilled.state_dict(), tmp_path / "d.safetensors")
    with pytest.raises(BadFile, match="6 positions, 1 and a square number of patches.*distilled model"):
        pretrained.load(resolve("deit_tiny"), tmp_path / "d.safetensors")
    save_file(make(img_size=(32, 48), num_classes=7).state_dict(), tmp_path / "r.safetensors")
    for img_size in (None, 32):
        with pytest.raises(BadFile, match="7 positions, .* not square"):
            pretrained.load(resolve("vit_tiny"), tmp_path / "r.safetensors", None, img_size)


def test_a_folder_of_neither_form_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"num_classes": 3}')
    with pytest.raises(BadFile, match="neither timm's 'architecture' nor the 'model_type'"):
        resolve(f"local-dir:{tmp_path}")


# downloads, with local stand-ins


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that has one model; remembers what it was asked for."""
    asked = []
    save_file(make().state_dict(), tmp_path / "hub.safetensors")
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 4,
        "model_args": {"img_size": 32},
        "pretrained_cfg": {
            "input_size": [3, 32, 32],
            "mean": [0.1, 0.2, 0.3],
            "std": [1, 1, 1],
            "fixed_input_size": True,
            "classifier": "head",
            "first_conv": "patch_embed.proj",
            "license": "mit",
            "num_classes": 4,
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))

    def download(repo_id, filename, **_):
        asked.append((repo_id, filename))
        return str(tmp_path / ("config.json" if filename == "config.json" else "hub.safetensors"))

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    return asked


def test_download_asks_the_hub_for_the_repository_of_the_tag(hub, tmp_path):
    model = pretrained.load(resolve("vit_tiny"))
    assert hub == [(f"timm/{TINY}", "model.safetensors")]
    assert same(model, make())


def test_download_for_features_drops_the_head(hub):
    assert pretrained.load(resolve("vit_tiny"), num_classes=0).num_classes == 0


def test_download_with_another_number_of_classes_is_refused_before_it_starts(hub):
    with pytest.raises(UsageError, match="have 1000 classes, not 10"):
        pretrained.load(resolve("vit_tiny"), num_classes=10)
    assert not hub


def test_hub_name_takes_architecture_and_preprocessing_from_its_config(hub, tmp_path):
    model = make(img_size=32, num_classes=4)
    save_file(model.state_dict(), tmp_path / "hub.safetensors")
    source = resolve("hf-hub:someone/some-vit")
    assert source.architecture == "vit_tiny_patch16_224" and source.model_args == {"img_size": 32}
    loaded = pretrained.load(source)
    assert hub == [("someone/some-vit", "config.json"), ("someone/some-vit", "model.safetensors")]
    assert same(loaded, model)
    told = describe(loaded, source)
    assert told["pretrained_cfg"]["mean"] == [0.1, 0.2, 0.3] and told["pretrained_cfg"]["license"] == "mit"
    assert told["model_args"] == {"img_size": [32, 32], "num_classes": 4}


def test_local_dir_needs_no_network(tmp_path, monkeypatch):
    model = make(img_size=32, num_classes=4)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", None)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 4,
        "model_args": {"img_size": 32},
        "pretrained_cfg": {"input_size": [3, 32, 32], "classifier": "head"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = resolve(f"local-dir:{tmp_path}")
    loaded = pretrained.load(source)
    assert same(loaded, model)
    assert str(tmp_path) not in json.dumps(describe(loaded, source))


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_than_those_of_pictures_are_refused_in_words(channels, tmp_path):
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 4,
        "model_args": {"in_chans": channels},
        "pretrained_cfg": {},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UnsupportedModel,
        match=rf"^vit_tiny_patch16_224 with {channels} input channels: images of 3 \(RGB\) are expected$",
    ):
        building.skeleton(resolve(f"local-dir:{tmp_path}"))


def test_local_dir_without_config_says_what_is_expected(tmp_path):
    with pytest.raises(BadFile, match=r"not a model folder \(config.json and weights\)") as error:
        resolve(f"local-dir:{tmp_path}")
    one_line(error)


@pytest.mark.parametrize("name", ["vit_tiny", "hf-hub:someone/some-vit"])
def test_no_network_is_said_with_the_way_out(name, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", fail)
    with pytest.raises(SparsifyError, match=r"could not be downloaded \(ConnectionError: no route to host\)") as error:
        pretrained.load(resolve(name))
    assert "--weights FILE" in error.value.for_command_line() and "a model's folder" in one_line(error)


def test_without_name_service_the_real_hub_client_gives_up_at_once(monkeypatch, tmp_path, capfd):
    import huggingface_hub.constants as constants

    monkeypatch.setattr("sparsify.models.hub.reachable", lambda url: False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    start = time.perf_counter()
    with pytest.raises(SparsifyError, match="could not be downloaded"):
        pretrained.load(resolve("vit_tiny"))
    assert time.perf_counter() - start < 5
    assert capfd.readouterr().err == ""


def test_architecture_without_weights_points_to_a_file():
    name = next(n for n, told in building.listing("vit_*") if told.startswith("no weights"))
    with pytest.raises(UsageError, match="no pretrained weights") as error:
        pretrained.load(resolve(name))
    assert "--weights FILE" in error.value.for_command_line()


# rebuilding


@pytest.mark.parametrize(
    "name, args", [("vit_tiny", SMALL), ("deit_tiny_distilled", SMALL), ("deit3_small", SMALL),
                   ("dinov2_small_reg", {"img_size": 28}), ("siglip_base", {"img_size": 32})],
)  # fmt: skip
def test_header_alone_rebuilds_the_model(name, args, tmp_path):
    source = resolve(name)
    torch.save(make(source.pretrained_name, **args).state_dict(), tmp_path / "x.pth")
    model = pretrained.load(source, tmp_path / "x.pth")
    header = json.loads(json.dumps(describe(model, source)))
    again = described(**header).eval()
    assert not again.training and all(p.dtype == torch.float32 and not p.is_meta for p in again.parameters())
    again.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, args["img_size"], args["img_size"])
    assert torch.equal(again(x), model(x))
    assert timm.data.resolve_model_data_config(again) == timm.data.resolve_model_data_config(model)
    assert describe(again, source) == header


def test_header_of_a_newer_timm_or_with_strange_arguments_gives_one_line():
    with pytest.raises(BadFile, match="vit_of_tomorrow is not in timm"):
        described("vit_of_tomorrow", {}, {})
    with pytest.raises(BadFile, match="cannot be built") as error:
        described("vit_tiny_patch16_224", {"no_such_argument": 1}, {})
    one_line(error)


def test_digits_rebuilds_without_timm_registry():
    source = resolve("digits")
    frame = building_.skeleton(source)
    hosts.supported_attentions(frame, "digits")
    again = described(**describe(frame, source)).eval()
    assert again(torch.zeros(1, 3, 28, 28)).shape == (1, 10)
    assert again.pretrained_cfg["license"] == network.DATA_CONFIG["license"]


@pytest.mark.skipif(
    not (Path(network.__file__).parent / network.WEIGHTS_FILE).exists(), reason="digits not trained yet"
)
def test_digits_loads_from_the_package_and_from_its_own_file():
    source = resolve("digits")
    model = pretrained.load(source)
    assert same(model, network.build())
    assert same(pretrained.load(source, Path(network.__file__).parent / network.WEIGHTS_FILE), model)
    assert pretrained.load(source, num_classes=0).num_classes == 0


# listing


def test_listing_is_quick_and_true():
    start = time.process_time()
    names = dict(building.listing())
    assert time.process_time() - start < 20  # 8 s
    assert {
        "digits",
        "deit_small",
        "deit_small_patch16_224",
        "vit_small_patch14_reg4_dinov2",
        "beit_base",
    } <= names.keys()
    assert {"vit_base_patch16_sapiens2", "naflexvit_base_patch16_gap", "eva02_tiny_patch14_224"} <= names.keys()
    assert (
        not {"swin_tiny_patch4_window7_224", "vit_base_patch16_xp_224", "vit_dwee_patch16_reg1_gap_256"} & names.keys()
    )
    assert names["deit_small"] == "-> deit_small_patch16_224.fb_in1k"
    assert "fb_in1k" in names["deit_small_patch16_224"]


def test_listing_takes_a_part_of_a_name_or_a_pattern():
    assert {n for n, _ in building.listing("deit3_small")} == {
        "deit3_small", "deit3_small_patch16_224", "deit3_small_patch16_384",
    }  # fmt: skip
    assert [n for n, _ in building.listing("dig*")] == ["digits"]
    assert building.listing("resnet18") == []


# preflight


def test_mismatched_torchvision_is_said_in_one_line(monkeypatch):
    preflight()
    real = importlib.import_module

    def broken(name, *args):
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(name, *args)

    monkeypatch.setattr("sparsify.cli.preflight.importlib.import_module", broken)
    with pytest.raises(SparsifyError, match="torchvision must be the release made for torch") as error:
        preflight()
    assert "torchvision::nms" in one_line(error)


def test_preflight_imports_nothing_heavy_by_itself():
    import subprocess

    code = "import sys, sparsify.cli.preflight; sys.exit('timm' in sys.modules or 'torch' in sys.modules)"
    root = Path(network.__file__).resolve().parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


# real weights


def test_real_deit_tiny_loads_strictly(real_data, monkeypatch):
    monkeypatch.undo()
    file = real_data / "deit_tiny_patch16_224.safetensors"
    source = resolve("deit_tiny")
    model = pretrained.load(source, file)
    assert sum(p.numel() for p in model.parameters()) == 5_717_416
    assert note(model, source) == ""
    state = load_file(file)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with pytest.raises(BadFile, match="does not fit deit_small_patch16_224"):
        pretrained.load(resolve("deit_small"), file)


@pytest.mark.parametrize("name", ["swin_tiny", "vit_smal", "beit3_base", "eva03_large"])
def test_a_name_that_is_offered_can_be_converted(name):
    with pytest.raises(UsageError, match="nearest: ") as error:
        resolve(name)
    offered = str(error.value).partition("nearest: ")[2].partition(" (")[0].split(", ")
    assert 1 <= len(offered) <= 3 and set(offered) <= {each for one in offered for each, _ in building.listing(one)}
