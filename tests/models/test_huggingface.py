"""Checkpoints of Hugging Face transformers: folder, one file, shards and hub; outputs are transformers' own."""

import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform

from helpers import transformers_models as tiny
from helpers.hubserver import serving
from helpers.image_folders import class_folders
from sparsify.config import SparsityConfig
from sparsify.errors import BadFile, SparsifyError, UnsupportedModel, UsageError
from sparsify.fit.calibrate.calibrate import calibrate
from sparsify.models import checkpoint, module, names, pretrained
from sparsify.models.header import check_source
from sparsify.models.huggingface import configs, families
from sparsify.nn import hosts
from sparsify.nn.attention import sparse_modules

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
TOLERANCE = 1e-4
ONES = ["vit", "deit-distilled", "beit", "data2vec-shared", "dinov2", "dinov2-registers-classifier", "dinov3-gated"]
ONES += ["clip", "siglip", "vit-mae", "vit-msn", "ijepa", "metaclip2", "chinese-clip"]


def loaded(name, weights=None, num_classes=None, img_size=None):
    return pretrained.load(names.resolve(str(name)), weights, num_classes, img_size)


def distance(name, made, model, side=tiny.SIDE, **how):
    """Largest difference of timm's `model` from transformers' `made`."""
    x = tiny.images(side)
    expected, given = tiny.outputs(name, made, x, **how), tiny.timms(name, model, x)
    assert expected.shape == given.shape and expected.abs().mean() > 0.01
    return float((expected - given).abs().max())


@pytest.mark.parametrize("name", tiny.CASES)
def test_folder_shards_and_one_file_give_what_transformers_gives(name, tmp_path):
    made = tiny.model(name)
    folder = tiny.save(made, tmp_path / "whole")
    model = loaded(folder)
    assert distance(name, made, model) < TOLERANCE
    in_shards = tiny.save(made, tmp_path / "shards", max_shard_size="40KB")
    assert (in_shards / "model.safetensors.index.json").is_file() and not (in_shards / "model.safetensors").is_file()
    state = loaded(in_shards).state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    # a training of Lightning: transformers' names in memory behind `model.`
    torch.save({"state_dict": {f"model.{k}": v for k, v in made.state_dict().items()}}, tmp_path / "last.ckpt")
    (folder / "model.safetensors").unlink()
    state = loaded(folder, tmp_path / "last.ckpt").state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ONES)
def test_keep_one_gives_what_transformers_gives(name, tmp_path):
    made = tiny.model(name)
    dense = loaded(tiny.save(made, tmp_path))
    for keep, same in ((1.0, True), (0.2, False)):  # the other shows that attention reaches the output
        model = copy.deepcopy(dense)
        calibrate(model, SparsityConfig(keep=keep, rank=4, spread="none", tail="none"), lambda: [tiny.images()])
        assert len(sparse_modules(model)) == 2
        assert (distance(name, made, model) < TOLERANCE) is same


def test_the_cases_are_twelve_architectures_and_all_that_are_listed(run):
    types = set()
    for case in tiny.CASES.values():
        types.add(getattr(transformers, case.config).model_type.removesuffix(families.TOWER))
    assert types == set(families.FAMILIES) and len(types) >= 12
    code, out, _ = run("models", "--from", "hf")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == list(families.FAMILIES)
    assert "facebook/dinov2-small" in run("models", "dino*", "--from", "hf")[1]


@pytest.mark.parametrize("model_type", families.FAMILIES)
def test_what_a_configuration_leaves_out_is_what_transformers_takes(model_type):
    """Files leave out what is transformers' default, so that another default would build another model."""
    by_type = {getattr(transformers, case.config).model_type: case.config for case in tiny.CASES.values()}
    tower = model_type + families.TOWER
    cls = {**by_type, "clip_vision_model": "CLIPVisionConfig", "siglip_vision_model": "SiglipVisionConfig"}
    default = getattr(transformers, cls.get(tower, cls.get(model_type)))()
    read = configs.Config(**families.FAMILIES[model_type].config).model_dump()
    differing = {
        name: (value, theirs)
        for name, value in read.items()
        if (theirs := getattr(default, name, value)) != value
        and not (name == "intermediate_size" and read["mlp_ratio"])
    }
    assert not differing


# ---- configurations ----


def write(folder: Path, config, preprocessor=None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


@pytest.mark.parametrize("model_type", ["swin", "siglip2", "levit", "bert", "", 3, ["vit"]])
def test_another_model_type_is_refused_by_its_name_in_one_line(model_type, tmp_path, run):
    code, out, err = run("convert", write(tmp_path / "other", {"model_type": model_type}))
    assert (code, out) == (1, "") and len(err.strip().splitlines()) == 1
    assert repr(model_type) in err and "'sparsify models --from hf' lists what is" in err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": "many"}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_attention_heads": 5}, "768 channels and 5 heads"),
        ({"hidden_act": "mish"}, "hidden_act: 'mish'"),
        ({"patch_size": [16, 8]}, "square patches"),
        ({"id2label": {"a": "b"}}, "id2label"),
        ({"id2label": {"0": 7}}, "id2label"),
        ({"image_size": -1}, "image_size"),
        ({"layer_norm_eps": 0}, "layer_norm_eps"),
        ({"num_channels": 1}, "images of 3 channels"),
    ],
)
def test_a_configuration_that_no_model_has_is_refused(changes, said, tmp_path):
    tree = {"model_type": "vit", "architectures": ["ViTForImageClassification"], **changes}
    with pytest.raises(SparsifyError, match=said) as error:
        loaded(write(tmp_path / "m", tree))
    assert "\n" not in str(error.value)


ODD = st.sampled_from(
    [None, True, 0, -1, 1, 2.5, 10**30, float("inf"), float("nan"), "x", "", [], [3], [1, 2, 3], {}, {"a": 1}]
)
FIELDS = [*configs.Config.model_fields, "architectures", "id2label", "num_labels", "vision_config", "projection_dim"]
PIXELS = ["size", "crop_size", "image_mean", "image_std", "rescale_factor", "resample", "do_resize", "image_processor"]


@given(
    st.sampled_from([*families.FAMILIES, "clip_vision_model"]),
    st.dictionaries(st.sampled_from(FIELDS), ODD, max_size=3),
    st.none() | st.dictionaries(st.sampled_from(PIXELS), ODD, max_size=3),
)
def test_whatever_a_configuration_says_is_described_or_refused(model_type, changes, pixels):
    """What is described passes the check of every config.json; nothing else than one line comes of the rest."""
    try:
        found = configs.describe({"model_type": model_type, **changes}, pixels)
        check_source(found.model_args, names.known_config(found.pretrained_cfg))
    except UsageError as error:
        assert "\n" not in str(error)


def test_a_configuration_of_a_giant_is_refused_before_it_takes_memory(tmp_path):
    folder = tiny.save(tiny.model("vit"), tmp_path)
    tree = json.loads((folder / "config.json").read_text())
    write(folder, tree | {"hidden_size": 1 << 16, "intermediate_size": 1 << 16, "num_hidden_layers": 8})  # 0.8 TB
    with pytest.raises(BadFile, match="does not fit"):
        loaded(folder)


def test_keys_with_a_bias_which_timm_does_not_have_are_refused(tmp_path):
    with pytest.raises(BadFile, match="key_bias"):
        names.resolve(str(write(tmp_path / "m", {"model_type": "dinov3_vit", "key_bias": True})))


PREPROCESSORS = {
    "squashed": (
        {"size": {"height": 48, "width": 48}, "resample": 2, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]},
        dict(crop_pct=1.0, crop_mode="squash", interpolation="bilinear", mean=(0.1, 0.2, 0.3), std=(1, 2, 3)),
    ),
    "cropped": (
        {
            "size": {"shortest_edge": 64},
            "crop_size": {"height": 48, "width": 48},
            "do_center_crop": True,
            "resample": 3,
        },
        dict(crop_pct=0.75, crop_mode="center", interpolation="bicubic", mean=families.IMAGENET[0]),
    ),
    "older": ({"size": 64, "crop_size": 48, "resample": 1}, dict(crop_pct=0.75, interpolation="lanczos")),
    "deit": (
        {"size": {"height": 64, "width": 64}, "crop_size": 48, "do_center_crop": True},
        dict(crop_pct=0.75, crop_mode="squash"),
    ),
    "from -1 to 1": (
        {"size": 48, "do_normalize": False, "rescale_factor": 1 / 127.5},
        dict(mean=(0.0, 0.0, 0.0), std=(0.5, 0.5, 0.5)),
    ),
    "nested": ({"image_processor": {"size": 48, "image_mean": [0, 0, 0]}}, dict(mean=(0, 0, 0))),
}


@pytest.mark.parametrize("name", PREPROCESSORS)
def test_the_preprocessor_says_size_crop_mean_and_interpolation(name, tmp_path):
    tree, expected = PREPROCESSORS[name]
    source = names.resolve(str(write(tmp_path / "m", {"model_type": "dinov2", "patch_size": 8}, tree)))
    assert source.model_args["img_size"] == (48, 48) and source.pretrained_cfg["input_size"] == (3, 48, 48)
    read = {key: source.pretrained_cfg[key] for key in expected}
    assert read == {key: pytest.approx(value) if key in ("mean", "std") else value for key, value in expected.items()}
    vit = names.resolve(str(write(tmp_path / "v", {"model_type": "vit"}, tree)))
    assert vit.model_args["img_size"] == (224, 224)  # transformers takes images of this size only


def test_numbers_that_are_none_are_refused(tmp_path):
    with pytest.raises(BadFile, match="image_mean"):
        names.resolve(str(write(tmp_path / "m", {"model_type": "vit"}, {"image_mean": "dark"})))


PROCESSORS = {
    "vit": ("ViTImageProcessor", {}),
    "deit": ("DeiTImageProcessor", {}),
    "beit": ("BeitImageProcessor", {}),
    "dinov2": ("BitImageProcessor", {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}),
    "clip_vision_model": ("CLIPImageProcessor", {}),
    "siglip_vision_model": ("SiglipImageProcessor", {}),
    "dinov3_vit": ("DINOv3ViTImageProcessor", {}),
}


@pytest.mark.parametrize("model_type", PROCESSORS)
def test_a_photograph_is_prepared_as_transformers_prepares_it(model_type, tmp_path):
    cls, args = PROCESSORS[model_type]
    processor = getattr(transformers, cls)(**args)
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    config = names.resolve(str(tmp_path)).pretrained_cfg
    given = {name: config[name] for name in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")}
    image = Image.effect_noise((450, 300), 60).resize((900, 600)).convert("RGB")  # crops begin at whole pixels
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    difference = (create_transform(**given)(image) - expected).abs()
    assert difference.max() < 2 / 255 / 0.224 and difference.mean() < 1 / 255 / 0.224  # rounded to grey levels or not


# ---- image sizes ----


@pytest.mark.parametrize("name", ["dinov2", "dinov2-registers", "dinov3"])
def test_a_model_of_any_size_has_that_of_its_preprocessor(name, tmp_path):
    made = tiny.model(name, image_size=64)
    tiny.save(made, tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 40}, "crop_size": 32}')
    model = loaded(tmp_path)
    assert hosts.image_size(model) == (32, 32)
    assert distance(name, made, model) < TOLERANCE  # positions are interpolated as transformers does
    assert distance(name, made, loaded(tmp_path, img_size=48), 48) < TOLERANCE


@pytest.mark.parametrize("name", ["vit", "deit-distilled", "clip-tower", "siglip-tower", "ijepa"])
def test_another_image_size_interpolates_positions_as_transformers_does(name, tmp_path):
    made = tiny.model(name)
    model = loaded(tiny.save(made, tmp_path), img_size=48)
    assert distance(name, made, model, 48, interpolate_pos_encoding=True) < TOLERANCE


def test_one_file_of_another_image_size_and_head_has_them(tmp_path):
    folder = tiny.save(tiny.model("vit"), tmp_path / "base")
    made = tiny.model("vit", image_size=48, id2label={i: f"class {i}" for i in range(5)})
    save_file(made.state_dict(), tmp_path / "tuned.safetensors")
    model = loaded(folder, tmp_path / "tuned.safetensors")
    assert model.num_classes == 5 and hosts.image_size(model) == (48, 48) and "label_names" not in model.pretrained_cfg
    assert distance("vit", made, model, 48) < TOLERANCE


def test_one_file_with_a_head_that_its_configuration_has_not(tmp_path):
    folder = tiny.save(tiny.model("clip-tower"), tmp_path / "base")
    made = tiny.model("clip-classifier")
    save_file(made.state_dict(), tmp_path / "tuned.safetensors")
    assert distance("clip-classifier", made, loaded(folder, tmp_path / "tuned.safetensors")) < TOLERANCE


# ---- files ----


def test_features_of_a_classifier_leave_its_head_out(tmp_path):
    made = tiny.model("dinov2-classifier")
    model = loaded(tiny.save(made, tmp_path), num_classes=0)
    with torch.inference_mode():
        expected = made.dinov2(tiny.images()).pooler_output
        assert (model(tiny.images()) - expected).abs().max() < TOLERANCE


def test_a_file_of_transformers_by_timms_name_is_told_what_to_give(tmp_path):
    save_file(tiny.model("vit").state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(BadFile, match=r"names are those of Hugging Face transformers: give its repository"):
        loaded("vit_tiny", tmp_path / "x.safetensors")
    folder = tiny.save(tiny.model("vit"), tmp_path / "m")
    save_file(pretrained.load(names.resolve(str(folder))).state_dict(), tmp_path / "timm.safetensors")
    with pytest.raises(BadFile, match="names as of Hugging Face transformers are expected"):
        loaded(folder, tmp_path / "timm.safetensors")


def test_a_module_of_transformers_is_told_what_to_give():
    with pytest.raises(
        UnsupportedModel, match="this ViTModel is a model of Hugging Face transformers: give the folder"
    ):
        module.copied(tiny.model("vit-features"))


def test_a_missing_and_an_unknown_tensor_are_named(tmp_path):
    folder = tiny.save(tiny.model("vit"), tmp_path)
    state = load_file(folder / "model.safetensors")
    del state["vit.encoder.layer.1.output.dense.bias"]
    state["vit.encoder.layer.1.extra"] = torch.zeros(3)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(BadFile, match=r"missing blocks\.1\.mlp\.fc2\.bias; unexpected encoder\.layer\.1\.extra"):
        loaded(folder)


class Evil:
    """Unpickling this would write a file."""

    def __reduce__(self):
        return (Path.touch, (Path("evil-was-here"),))


def test_pytorch_model_bin_is_read_and_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = tiny.model("vit")
    folder = tiny.save(made, tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert distance("vit", made, loaded(folder)) < TOLERANCE
    torch.save(state | {"more": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(BadFile, match="nothing else is unpickled"):
        loaded(folder)
    assert not Path("evil-was-here").exists()
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(BadFile, match="has no weights: one of model.safetensors, "):
        loaded(folder)


def timm_folder(folder: Path) -> torch.nn.Module:
    """A folder in timm's form with its weights in two shards."""
    model = loaded(tiny.save(tiny.model("vit"), folder.with_name("made")))
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 1.5}
    config = {"architecture": "vit_base_patch16_224", "num_classes": 3, "model_args": args | {"num_classes": 3}}
    write(folder, config | {"pretrained_cfg": {"license": "mit", "num_classes": 3, "classifier": "head"}})
    state = model.state_dict()
    half = len(state) // 2
    parts = {"a.safetensors": dict([*state.items()][:half]), "b.safetensors": dict([*state.items()][half:])}
    for name, tensors in parts.items():
        save_file(tensors, folder / name)
    weight_map = {key: name for name, tensors in parts.items() for key in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return model


def test_shards_of_timms_folder_and_by_their_index(tmp_path):
    expected = timm_folder(tmp_path / "m").state_dict()
    model = loaded(tmp_path / "m")
    assert model.pretrained_cfg["license"] == "mit"
    given = loaded(tmp_path / "m", tmp_path / "m" / "model.safetensors.index.json")
    assert "license" not in given.pretrained_cfg
    for state in (model.state_dict(), given.state_dict()):
        assert all(torch.equal(tensor, state[key]) for key, tensor in expected.items())


def test_an_index_names_files_beside_it_that_have_its_tensors(tmp_path):
    timm_folder(tmp_path / "m")
    index = tmp_path / "m" / "model.safetensors.index.json"
    tree = json.loads(index.read_text())["weight_map"]
    for shard in ("../b.safetensors", "/etc/b.safetensors", "sub/b.safetensors", "b.py", 3, "..", ""):
        index.write_text(json.dumps({"weight_map": tree | {"head.bias": shard}}))
        with pytest.raises(BadFile, match=r"shard of head\.bias"):
            loaded(tmp_path / "m")
    cases = {
        "names c.safetensors, which does not lie": {"weight_map": tree | {"head.bias": "c.safetensors"}},
        "lacks tensors that .* names: other": {"weight_map": tree | {"other": "b.safetensors"}},
        "no index": {"weight_map": []},
    }
    for said, content in cases.items():
        index.write_text(json.dumps(content))
        with pytest.raises(BadFile, match=said):
            loaded(tmp_path / "m")


def test_timms_model_that_transformers_saved_is_read(tmp_path):
    model = timm_folder(tmp_path / "m")
    save_file({f"timm_model.{k}": v for k, v in model.state_dict().items()}, tmp_path / "m" / "model.safetensors")
    config = json.loads((tmp_path / "m" / "config.json").read_text()) | {"model_type": "timm_wrapper"}
    state = loaded(write(tmp_path / "m", config)).state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


# ---- the hub ----


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("size", ["1GB", "40KB"])
def test_a_repository_by_its_name(size, monkeypatch, tmp_path):
    made = tiny.model("dinov2-registers")
    with serving(monkeypatch, tmp_path) as hub:
        hub.make("someone/features", files(tiny.save(made, tmp_path / "m", max_shard_size=size)))
        for name in ("someone/features", "hf-hub:someone/features", "someone/features@main"):
            assert distance("dinov2-registers", made, loaded(name)) < TOLERANCE
        hub.make("someone/cat", {"config.json": b'{"model_type": "bert"}'})
        with pytest.raises(BadFile, match="^hf-hub:someone/cat is a 'bert', which is not understood"):
            names.resolve("someone/cat")
        with pytest.raises(SparsifyError, match="someone/nothing could not be downloaded"):
            names.resolve("someone/nothing")
        hub.make("someone/empty", {"config.json": b'{"model_type": "vit"}'})
        with pytest.raises(BadFile, match="has no weights"):
            loaded("someone/empty")


def test_a_repository_of_timm_in_shards(monkeypatch, tmp_path):
    expected = timm_folder(tmp_path / "m").state_dict()
    with serving(monkeypatch, tmp_path) as hub:
        hub.make("someone/timm-vit", files(tmp_path / "m"))
        state = loaded("someone/timm-vit").state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in expected.items())


# ---- the commands ----


def test_a_classifier_is_converted_evaluated_and_compared_with_its_original(run, tmp_path):
    made = tiny.model("dinov2-classifier")
    tiny.save(made, tmp_path / "m")
    (tmp_path / "m" / "preprocessor_config.json").write_text('{"size": 32, "image_mean": [0, 0, 0], "do_resize": true}')
    save_file(load_file("m/model.safetensors"), "mine.safetensors")
    weights = ("--weights", "mine.safetensors")
    for more, dense in (((), "m"), (weights, "mine.safetensors")):
        code, _, err = run(
            "convert", "m", "--keep", 1, "--set", "calib_images=8", "-o", "s.safetensors", "--force", *more
        )
        assert code == 0 and "local-dir:m is a 'dinov2' of Hugging Face transformers" in err
        header = checkpoint.read_header(Path("s.safetensors"))
        assert (header.provenance["source"], header.provenance["transformers"]) == ("local-dir:m", "dinov2")
        assert header.architecture["pretrained_cfg"]["label_names"] == ["cat", "dog", "newt"]
        model = checkpoint.load(Path("s.safetensors"))
        assert distance("dinov2-classifier", made, model) < TOLERANCE
        assert run("profile", "s.safetensors", "--dense", dense, "--no-measure")[0] == 0
    class_folders(tmp_path / "images", ["cat", "newt"], 2)
    code, out, err = run("eval", "s.safetensors", "--data", "images", "--dense", "m")
    assert code == 0 and "2 of 3 classes, by the names that the model has" in out + err
