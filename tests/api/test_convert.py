"""`sparsify.convert` of what a caller holds: a module; tensors, a loader, a folder; a file or none."""

import copy
import itertools

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

import sparsify
from helpers.families import build, images, raise_attention
from sparsify.errors import BadData, SparsifyError, UnsupportedModel, UsageError
from sparsify.images import datasets
from sparsify.models import checkpoint, names, pretrained
from sparsify.nn import attention
from sparsify.nn.execution import sparse_form

FEW = {"calib_images": 8, "spread": "none"}
SETTINGS = {"keep": 0.3, "rank": 8, **FEW}


@pytest.fixture
def model():
    return build("deit")


@torch.inference_mode()
def outputs(model, x):
    """In the sparse form, whatever `auto` measured; of a dense model its own."""
    with sparse_form(model):
        return model(x)


def test_five_lines(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=10)
    loader = DataLoader(TensorDataset(torch.randn(12, 3, 64, 64), torch.zeros(12)), batch_size=4)
    sparse = sparsify.convert(model, loader, keep=0.1).model
    with torch.inference_mode():
        assert sparse(torch.randn(2, 3, 64, 64)).shape == (2, 10)


# ---- the module that is given ----


def test_the_module_is_left_as_it_was(model):
    seen = []
    model.train()
    model.blocks[0].register_forward_hook(lambda *call: seen.append(call))
    model.blocks[1].requires_grad_(False)
    before, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    config = copy.deepcopy(model.pretrained_cfg)
    made = sparsify.convert(model, images(model, 8), mean=(0.25,), **SETTINGS)
    assert not attention.attention_modules(model) and model.training and model.pretrained_cfg == config
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags and not seen
    model(images(model))
    assert len(seen) == 1
    made.model(images(model))
    assert len(seen) == 1 and not made.model.training and made.model.pretrained_cfg["mean"] == (0.25,) * 3
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in made.model.parameters()}
    assert not shared and made.model.blocks[0].norm1.weight.requires_grad
    assert not made.model.blocks[1].norm1.weight.requires_grad


@pytest.mark.parametrize("family", ["deit", "dinov2-registers", "eva02", "naflexvit", "siglip"])
def test_keep_one_equals_dense(family):
    model = build(family)
    x = images(model)
    made = sparsify.convert(model, images(model, 4), keep=1.0, rank=8, **FEW).model
    torch.testing.assert_close(outputs(made, x), outputs(model, x), atol=2e-4, rtol=2e-4)


def test_nothing_is_written_without_an_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = pretrained.load(names.resolve("digits"))
    made = sparsify.convert(model, images(model, 2), target_macs=(0.9, 0.5), **FEW)
    assert list(tmp_path.iterdir()) == [] and (made.path, made.report_json, made.report_md) == (None,) * 3
    assert made.model.set_budget.budgets == (1.0, 0.9, 0.5) and list(made.profiles) == [0.9, 0.5]
    first = outputs(made.model, x := images(model))
    made.model.set_budget(0.5)
    assert not torch.equal(outputs(made.model, x), first)


def test_dtype_and_device_of_the_module_are_those_of_the_result(model):
    model = model.to(torch.bfloat16)
    made = sparsify.convert(model, images(model, 4).bfloat16(), **SETTINGS)
    assert {p.dtype for p in made.model.parameters()} == {torch.bfloat16} and model.head.weight.dtype == torch.bfloat16
    x = images(model)
    whole = outputs(sparsify.convert(copy.deepcopy(model).float(), images(model, 4), **SETTINGS).model, x)
    assert (outputs(made.model, x.bfloat16()).float() - whole).abs().max() < 0.05 * whole.abs().max()


# ---- files ----


def test_a_written_file_gives_the_same_logits(tmp_path):
    path = tmp_path / "m.safetensors"
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=2, num_classes=7, global_pool="avg", reg_tokens=2, dynamic_img_size=True
    )  # fmt: skip
    made = sparsify.convert(raise_attention(model), images(model, 8), output=path, **SETTINGS)
    assert made.path == path and made.report_json.is_file() and made.report_md.is_file()
    loaded, x = sparsify.load(path), images(model)
    assert torch.equal(outputs(loaded, x), outputs(made.model, x))
    header = checkpoint.read_header(path)
    assert header.provenance["module"] is True and header.provenance["source"] is None
    assert "license" not in header.architecture["pretrained_cfg"]
    assert sparsify.profile(path, dense=model, measure=False).macs_dense > 0


def test_a_module_and_its_name_give_the_same_file(tmp_path):
    by_name = sparsify.convert("digits", output=tmp_path / "name.safetensors", **SETTINGS)
    module = pretrained.load(names.resolve("digits"))
    by_module = sparsify.convert(module, output=tmp_path / "module.safetensors", **SETTINGS)
    a, b = (made.model.state_dict() for made in (by_name, by_module))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    one, other = (made.header for made in (by_name, by_module))
    assert one.architecture["model_args"] == other.architecture["model_args"] and one.config == other.config
    assert one.dense_sha256 == other.dense_sha256 and one.report == other.report


def test_what_a_file_cannot_describe_is_refused_early_and_converted_without_one(model, tmp_path):
    path, x = tmp_path / "m.safetensors", images(model, 4)
    longer, other, unknown = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
    longer.head = nn.Sequential(nn.Linear(192, 20), nn.Linear(20, 10))
    other.blocks[1].mlp.act = nn.Tanh()
    del unknown.pretrained_cfg, unknown.default_cfg
    for changed, words in (
        (longer, "it is not what timm builds as deit_tiny_patch16_224 .head.0.bias is .20,., there it is missing"),
        (other, "with the same weights its outputs differ"),
        (unknown, "it does not say which architecture of timm it is"),
    ):
        with pytest.raises(UsageError, match=f"^this VisionTransformer cannot be written to a file[^\n]*{words}"):
            sparsify.convert(changed, x, output=path, progress=pytest.fail, **SETTINGS)
        made = sparsify.convert(changed, x, keep=1.0, rank=8, **FEW)
        torch.testing.assert_close(outputs(made.model, x), changed(x), atol=2e-4, rtol=2e-4)
    assert list(tmp_path.iterdir()) == []


# ---- refusals of modules ----


def test_what_is_no_vit_of_timm_is_refused_by_its_class():
    class Mine(nn.Module):
        pass

    for wrong, name in ((timm.create_model("resnet10t"), "ResNet"), (nn.Linear(2, 2), "Linear"), (Mine(), "Mine")):
        with pytest.raises(UnsupportedModel, match=f"^{name}: model class {name} is not understood"):
            sparsify.convert(wrong)
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1), embed_dim=24, num_heads=(1, 1))
    with pytest.raises(UnsupportedModel, match="attention class WindowAttention"):
        sparsify.convert(swin)
    for nothing in (3, None, b"deit_small", [1]):
        with pytest.raises(UsageError, match=f"^model {type(nothing).__name__}: the name of a model or a module"):
            sparsify.convert(nothing)


def test_other_refusals_of_a_module_name_the_reason(model):
    x = images(model, 4)
    sparse = sparsify.convert(model, x, **SETTINGS).model
    pruned, wrapped = copy.deepcopy(model), copy.deepcopy(model)
    prune.l1_unstructured(pruned.blocks[0].attn.qkv, "weight", 0.5)

    class Adapter(nn.Linear):
        pass

    wrapped.blocks[1].attn.proj = Adapter(192, 192)
    cases = [
        (sparse, {}, "this VisionTransformer is sparse already"),
        (pruned, {}, r"no plain tensors in its attention \(qkv\)"),
        (wrapped, {}, r"has a [\w.]*Adapter in its attention \(proj\)"),
        (model, {"weights": "w.pth"}, "weights is of a name: a module has its own weights, classes and image size"),
        (model, {"img_size": 32}, "img_size is of a name"),
        (model, {"keap": 0.1}, "keap"),
        (model, {"device": "abacus"}, "device abacus cannot be used here"),
        (model, {"recipe": "distill"}, "this recipe trains[^\n]*: give output FILE, or calibrate only"),
        (copy.deepcopy(model).to("meta"), {}, "device meta cannot be used here"),
    ]
    for given, options, words in cases:
        with pytest.raises(SparsifyError, match=rf"^[^\n]*{words}[^\n]*$"):
            sparsify.convert(given, x, **options)
    with pytest.raises(UsageError, match="trains on image files, which it crops[^\n]*give data a folder"):
        sparsify.convert("digits", torch.zeros(4, 3, 28, 28), recipe="distill")


def test_wrappers_are_taken_off(model):
    x = images(model, 4)
    plain = outputs(sparsify.convert(model, x, **SETTINGS).model, x)
    for wrapped in (nn.DataParallel(model), timm.utils.ModelEmaV3(model)):
        assert torch.equal(outputs(sparsify.convert(wrapped, x, **SETTINGS).model, x), plain)


# ---- images ----


def forms(x):
    labels = torch.arange(len(x))
    return {
        "tensor": x,
        "batches": list(x.split(3)),
        "single images": list(x),
        "generator": (part for part in x.split(3)),
        "loader": DataLoader(TensorDataset(x, labels), 3),
        "loader of images alone": DataLoader(x, 3),
        "pairs": [(part, 0) for part in x.split(3)],
        "dicts": [{"pixel_values": part, "labels": torch.zeros(3)} for part in x.split(3)],
        "data set": TensorDataset(x, labels),
        "float64": x.double(),
        "more than are read": torch.cat([x, torch.full_like(x, torch.nan)]),
        "without end": iter(lambda: x, None),
    }


@pytest.mark.parametrize("form", list(forms(torch.zeros(1, 3, 4, 4))))
def test_every_form_of_the_same_images_gives_the_same_model(form, model):
    x = images(model, 8)
    made = sparsify.convert(model, forms(x)[form], **SETTINGS)
    assert made.calibration == "the first 8 images of data, given as tensors"
    assert made.header.provenance["calibration"] == {"images": 8, "set": "user"}
    expected = sparsify.convert(model, x, **SETTINGS).model.state_dict()
    assert all(torch.equal(expected[key], value) for key, value in made.model.state_dict().items())


def test_a_folder_and_its_tensors_give_the_same_model(model, tmp_path):
    draw = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(draw.integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    transform = datasets.transform(datasets.data_config(model))
    settings = SETTINGS | {"calib_images": 4, "workers": 0}
    read = sparsify.convert(model, tmp_path, **settings)
    order = datasets.draw(4, 4, 0)
    tensors = torch.stack([transform(Image.open(tmp_path / f"{i}.png")) for i in order])
    given = sparsify.convert(model, tensors, **settings)
    assert "4 images" in read.calibration and sorted(p.suffix for p in tmp_path.iterdir()) == [".png"] * 4
    a, b = read.model.state_dict(), given.model.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_name_takes_tensors_too(tmp_path):
    x = torch.randn(4, 3, 28, 28)
    made = sparsify.convert(
        "digits", x, output=tmp_path / "m.safetensors", dtype=torch.bfloat16, batch_size=2, **SETTINGS
    )
    assert made.path.is_file() and "given as tensors" in made.calibration


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (torch.zeros(2, 3, 64, 64), r"data gives tensors of 2x3x64x64: this model takes \[B, 3, 96, 96\]"),
        (torch.zeros(2, 1, 96, 96), "data gives tensors of 2x1x96x96"),
        (torch.zeros(96, 96), "data gives tensors of 96x96"),
        (torch.zeros(2, 3, 96, 96, dtype=torch.uint8), "data gives uint8: floating-point images are expected"),
        (torch.zeros(0, 3, 96, 96), "data holds no images"),
        ([], "data holds no images"),
        (DataLoader(TensorDataset(torch.zeros(0, 3, 96, 96))), "data holds no images"),
        ([{"a": torch.zeros(2, 3, 96, 96), "b": torch.zeros(2, 3, 96, 96)}], "data gives dicts with a, b"),
        ([{"labels": torch.zeros(2)}], "data gives dicts with labels"),
        ([np.zeros((2, 3, 96, 96))], "data gives ndarray, not tensors"),
        ([("cat.jpg", 1)], "data gives str, not tensors"),
        (np.zeros((2, 3, 96, 96)), "data gives ndarray, not tensors"),
        (7, r"data is of class int: a folder, a data set, tensors \[B, 3, H, W\] or an iterable of them is expected"),
    ],
)  # fmt: skip
def test_images_of_another_form_are_one_line(data, words, model):
    with pytest.raises(BadData, match=rf"^({words})[^\n]*$"):
        sparsify.convert(model, data, **SETTINGS)


@pytest.mark.parametrize(("scale", "warns"), [(1.0, False), ("pixels", True), ("shares", True)])
def test_images_that_are_not_normalised_are_pointed_out(scale, warns, model):
    pixels = torch.rand(4, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(model.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    x = {1.0: (pixels - mean) / std, "pixels": 255 * pixels, "shares": pixels}[scale]
    lines = []
    sparsify.convert(model, x, say=lines.append, **SETTINGS)
    assert any(line.startswith("warning: data has values from") for line in lines) == warns


# ---- progress ----


def test_progress_is_told_step_by_step_or_shown(model, capsys):
    steps = []
    sparsify.convert(model, images(model, 8), progress=lambda *step: steps.append(step), batch_size=4, **SETTINGS)
    assert {step[0] for step in steps} == {"reading", "moments", "MACs"} and {len(step) for step in steps} == {3}
    moments = [done for name, done, total in steps if name == "moments"]
    assert moments == [0, 2, 4, 4, 6, 8, 8]  # after each of two blocks, and after each batch
    assert capsys.readouterr() == ("", "")
    sparsify.convert(model, images(model, 8), progress=True, **SETTINGS)
    assert capsys.readouterr().out == ""


def test_every_pass_of_a_search_tells_how_far_it_is():
    """No image is computed by more than one block, or one trial, without a word: of large images that takes seconds."""
    steps, forwards = [], []
    model = pretrained.load(names.resolve("digits"))
    told = {"progress": lambda *step: steps.append((len(forwards), *step))}
    with pytest.MonkeyPatch.context() as patch:
        forward = Block.forward
        patch.setattr(Block, "forward", lambda self, *x, **more: forwards.append(1) or forward(self, *x, **more))
        sparsify.convert(model, images(model, 4), target_macs=(0.8, 0.5), calib_images=4, **told)
    names_of = list(dict.fromkeys(step for _, step, _, _ in steps))
    assert names_of == [
        "reading",
        "moments",
        "budgets",
        "blocks",
        "importance",
        "schedule",
        "search",
        "margins",
        "MACs",
    ]
    for name in names_of:
        done = [(at, total) for _, step, at, total in steps if step == name]
        assert all(a <= b for (a, _), (b, _) in itertools.pairwise(done)) and len({total for _, total in done}) == 1
        assert done[-1][0] == done[-1][1]
    calls = [at for at, *_ in steps]
    assert max(b - a for a, b in itertools.pairwise([*calls, len(forwards)])) <= 4 * 4  # blocks: four models
