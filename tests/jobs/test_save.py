"""A loaded model is an ordinary timm model: trained further by timm's own parts, saved, loaded back; features; a head."""

import copy
import math

import pytest
import timm
import torch
from PIL import Image
from timm.models._features import FeatureGetterNet
from torch import nn

import sparsify
import sparsify.registry
from helpers.families import build, images
from sparsify.config import SparsityConfig, Tokens
from sparsify.errors import BadFile, UsageError
from sparsify.models import checkpoint, names, pretrained
from sparsify.nn import attention, execution, graft
from sparsify.ops.auto import Choice, Chooser

SETTINGS = {
    "folded": {},
    "token-lowrank, merging": {
        "predictor": "token-lowrank",
        "rank": 8,
        "tail": "none",
        "tokens": {"keep": 0.7, "stages": (2,)},
    },
}


@pytest.fixture(scope="module", params=SETTINGS)
def file(request, tmp_path_factory):
    """The digits model with that setting, in a file."""
    path = tmp_path_factory.mktemp("further") / "model.safetensors"
    sparsify.convert("digits", keep=0.2, output=path, calib_images=4, spread="none", **SETTINGS[request.param])
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "model.safetensors"
    sparsify.convert("digits", keep=0.2, output=path, calib_images=4, spread="none")
    return path


@pytest.fixture
def dense_wins(monkeypatch):
    """`backend=auto` finds dense attention faster for every shape; the shapes that were asked about."""
    asked = []
    monkeypatch.setattr(Chooser, "choose", lambda self, shape, sparse: asked.append(shape) or Choice("sdpa", {}, 0, ""))
    return asked


def coloured(root, classes=4, each=16):
    """ROOT/CLASS/*.png: noise around a colour of the class."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(classes, 3, generator=generator)
    for c in range(classes):
        (root / f"class{c}").mkdir(parents=True)
        for i in range(each):
            noise = 0.3 * torch.rand(28, 28, 3, generator=generator)
            pixels = (255 * (0.7 * colours[c] + noise)).byte().numpy()
            Image.fromarray(pixels).save(root / f"class{c}" / f"{i}.png")
    return root


def finetune(model, folder, steps, classes=4):
    """`steps` steps as timm's training script takes them, by its own parts; losses of the steps and the averaged model."""
    from timm.data import Mixup, create_dataset, create_loader, resolve_model_data_config
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import ModelEmaV3, NativeScaler

    torch.manual_seed(0)
    config = resolve_model_data_config(model)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    ema = ModelEmaV3(model, decay=0.5)  # made before train(), as the script does
    dataset = create_dataset("", root=str(folder), is_training=True)
    loader = create_loader(
        dataset, config["input_size"], 8, is_training=True, use_prefetcher=False, num_workers=0, mean=config["mean"],
        std=config["std"], scale=(0.8, 1.0), interpolation=config["interpolation"], persistent_workers=False,
    )  # fmt: skip
    mixup = Mixup(mixup_alpha=0.2, prob=0.5, label_smoothing=0.1, num_classes=classes)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=4, warmup_epochs=1, warmup_lr=1e-4, updates_per_epoch=len(loader),
        step_on_epochs=False,
    )  # fmt: skip
    scaler, criterion, losses = NativeScaler(device="cpu"), SoftTargetCrossEntropy(), []
    model.train()
    while len(losses) < steps:
        for x, y in loader:
            x, y = mixup(x, y)
            with torch.autocast("cpu", torch.bfloat16):
                loss = criterion(model(x), y)
            optimizer.zero_grad()
            scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
            ema.update(model, step=len(losses))
            losses.append(loss.item())
            scheduler.step_update(len(losses))
            if len(losses) == steps:
                break
    return losses, ema


def test_trained_by_timms_parts_saved_and_loaded_back(file, tmp_path, dense_wins):
    model = sparsify.load(file, drop_path_rate=0.1, drop_rate=0.1)
    model.reset_classifier(4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses, ema = finetune(model, coloured(tmp_path / "images"), 20)
    assert all(map(math.isfinite, losses)) and sum(losses[-5:]) < 0.8 * sum(losses[:5])
    for name, p in model.named_parameters():  # every weight learnt, but a choice of keys has no gradient
        assert torch.equal(p, before[name]) == (".predictor." in name) == (not p.requires_grad), name

    x = images(model, 3)
    for trained, name in ((model, "tuned"), (ema, "averaged")):
        path = sparsify.save(trained, tmp_path / f"{name}.safetensors", like=file)
        assert checkpoint.read_header(path).backbone_changed
        loaded = sparsify.load(path)
        with torch.inference_mode():
            expected = trained.eval()(x)
            assert torch.equal(loaded(x), expected) and expected.shape == (3, 4)
    with torch.inference_mode():
        assert not torch.equal(model(x), ema(x))
    assert not dense_wins  # neither the trained model nor its average was ever computed by dense attention


def test_gradient_checkpointing_gives_the_same_gradients(file):
    model, grads = sparsify.load(file), []
    x = images(model)
    for enable in (False, True):
        model.train().zero_grad()
        model.set_grad_checkpointing(enable)
        model(x).square().mean().backward()
        grads.append(model.blocks[0].attn.qkv.weight.grad.clone())
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-6 * float(grads[0].abs().max()))


def test_gradients_are_those_of_the_sparse_form(plain):
    """What the loop differentiates is what the file computes, not the dense attention that may stand in for inference."""
    model, reference = sparsify.load(plain), sparsify.load(plain, backend="reference")
    dense = graft.dense_twin(sparsify.load(plain))
    x, grads = images(model), []
    for m in (model, reference, dense):
        m.train()
        m(x).square().mean().backward()
        grads.append(m.blocks[0].attn.qkv.weight.grad)
    assert torch.allclose(grads[0], grads[1], atol=1e-5 * float(grads[1].abs().max()), rtol=1e-3)
    assert not torch.allclose(grads[0], grads[2], atol=1e-2 * float(grads[2].abs().max()), rtol=1e-2)


def test_dense_attention_stands_in_until_training_begins(plain, dense_wins):
    model = sparsify.load(plain)
    average, x = copy.deepcopy(model), images(model)
    with torch.inference_mode():
        model(x)
        assert len(dense_wins) == 8  # of four blocks: the check of the whole model asks too
        model.train()
        model.eval()(x), average(x), copy.deepcopy(model)(x)
        assert len(dense_wins) == 8
        sparsify.load(plain)(x)
        assert len(dense_wins) == 16  # another load is another model


def test_what_was_not_trained_is_not_called_changed(plain, tmp_path):
    model = sparsify.load(plain)
    path = sparsify.save(model, tmp_path / "same.safetensors", like=plain)
    header = checkpoint.read_header(path)
    assert not header.backbone_changed and len(header.provenance["further"]) == 1
    with torch.no_grad():
        model.blocks[3].mlp.fc2.bias += 1e-3
    assert checkpoint.read_header(sparsify.save(model, path, like=plain)).backbone_changed
    again = sparsify.save(sparsify.load(path), tmp_path / "again.safetensors", like=path)
    header = checkpoint.read_header(again)
    assert header.backbone_changed and len(header.provenance["further"]) == 2  # once changed, always changed


def test_a_learnt_predictor_alone_leaves_the_backbone_unchanged(tmp_path):
    path = tmp_path / "model.safetensors"
    sparsify.convert("digits", keep=0.2, output=path, calib_images=4, spread="none", fold=False)
    model = sparsify.load(path)
    with torch.no_grad():
        model.blocks[0].attn.predictor.a_q *= 1.5
    header = checkpoint.read_header(sparsify.save(model, tmp_path / "a.safetensors", like=path))
    assert not header.backbone_changed


@pytest.mark.parametrize("classes", [3, 0])
def test_reset_classifier_survives_the_file(classes, file, tmp_path):
    model = sparsify.load(file)
    model.reset_classifier(classes)
    path = sparsify.save(model, tmp_path / "new.safetensors", like=file)
    loaded, x = sparsify.load(path, backend="reference"), images(model)
    assert loaded.num_classes == classes == loaded.pretrained_cfg["num_classes"]
    execution.set_execution(model, next(iter(attention.attention_modules(loaded).values())).execution)
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x)) and loaded(x).shape == (2, classes or 128)
    report = checkpoint.read_header(path).report
    head = 128 * (10 - classes)
    assert report["macs_dense"] == checkpoint.read_header(file).report["macs_dense"] - head


def test_pooling_image_size_and_preprocessing_survive_the_file(plain, tmp_path):
    model = sparsify.load(plain, img_size=42)
    model.reset_classifier(5, "avg")
    model.pretrained_cfg["mean"] = (0.1, 0.2, 0.3)
    loaded = sparsify.load(sparsify.save(model, tmp_path / "new.safetensors", like=plain))
    x = torch.randn(1, 3, 42, 42)
    assert loaded.global_pool == "avg" and loaded.pretrained_cfg["input_size"] == (3, 42, 42)
    assert tuple(timm.data.resolve_model_data_config(loaded)["mean"]) == (0.1, 0.2, 0.3)
    with torch.inference_mode():
        assert torch.equal(loaded.train().eval()(x), model.train().eval()(x))


class Wrapped(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


def test_half_precision_and_wrappers_are_taken_off(plain, tmp_path):
    model = sparsify.load(plain).to(torch.bfloat16)
    loaded = sparsify.load(sparsify.save(Wrapped(model), tmp_path / "new.safetensors", like=plain))
    assert loaded.head.weight.dtype == torch.float32
    assert torch.equal(loaded.head.weight, model.head.weight.float()) and model.head.weight.dtype == torch.bfloat16


def widened(model):
    model.head = nn.Sequential(nn.Linear(128, 8), nn.Linear(8, 10))


def squared(model):
    model.head.register_forward_hook(lambda module, args, out: out.square())


NOT_SAVED = {
    "other modules": (widened, "cannot be described"),
    "other outputs": (squared, "other outputs"),
    "no blocks": (lambda model: model.prune_intermediate_layers([0, 1]), "cannot be described"),
}


@pytest.mark.parametrize("case", NOT_SAVED)
def test_a_model_that_a_file_cannot_describe_is_refused(case, plain, tmp_path):
    model = sparsify.load(plain)
    change, message = NOT_SAVED[case]
    change(model)
    with pytest.raises(UsageError, match=message) as caught:
        sparsify.save(model, tmp_path / "new.safetensors", like=plain)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_save_refuses_dense_models_other_files_and_strangers(plain, tmp_path):
    model = sparsify.load(plain)
    with pytest.raises(UsageError, match="no sparse attention"):
        sparsify.save(pretrained.load(names.resolve("digits")), tmp_path / "a.safetensors", like=plain)
    with pytest.raises(BadFile, match="no file"):
        sparsify.save(model, tmp_path / "a.safetensors", like=tmp_path / "none.safetensors")
    (tmp_path / "a.safetensors").write_text("something else")
    with pytest.raises(BadFile, match="exists and is not this model"):
        sparsify.save(model, tmp_path / "a.safetensors", like=plain)
    sparsify.save(model, tmp_path / "a.safetensors", like=plain, force=True)
    with pytest.raises(UsageError, match="unknown argument dropout"):
        sparsify.load(plain, dropout=0.1)


# features


def taken(model, x, **how):
    with torch.inference_mode():
        return model.forward_intermediates(x, **how)


@pytest.mark.parametrize("family", ["deit", "vit-avg-pool", "dinov2-registers", "siglip"])
def test_features_are_the_dense_models_where_all_keys_are_kept(family):
    dense = build(family)
    x = images(dense)
    with torch.inference_mode():
        expected = dense.forward_features(x)
    final, expected_maps = taken(dense, x, indices=2)
    model = graft.graft(copy.deepcopy(dense), SparsityConfig(keep=1.0, rank=4))
    with torch.inference_mode():
        assert torch.allclose(model.forward_features(x), expected, atol=1e-4)
    found, maps = taken(model, x, indices=2)
    assert torch.allclose(found, final, atol=1e-4)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(maps, expected_maps, strict=True))
    getter = FeatureGetterNet(model, out_indices=2)
    with torch.inference_mode():
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(getter(x), expected_maps, strict=True))
    assert getter.feature_info.channels() == [dense.embed_dim] * 2


def test_features_only_by_timms_factory(file):
    overlay = dict(file=str(file))
    net = timm.create_model(
        "sparsify_vit",
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        features_only=True,
        out_indices=(1, 3),
        norm=True,
    )
    model = sparsify.load(file, backend="reference")
    x = images(model)
    execution.set_execution(net, next(iter(attention.attention_modules(model).values())).execution)
    with torch.inference_mode():
        found = net(x)
    expected = taken(model, x, indices=(1, 3), norm=True, intermediates_only=True)
    assert [t.shape for t in found] == [(2, 128, 14, 14)] * 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_tokens_that_left_are_in_the_feature_maps():
    dense = build("deit", depth=3)
    config = SparsityConfig(keep="dense", tokens=Tokens(keep=0.5, stages=(1, 2)))
    net = FeatureGetterNet(graft.graft(dense, config), out_indices=(0, 1))
    with torch.inference_mode():
        assert [t.shape[-2:] for t in net(images(dense))] == [(6, 6)] * 2
