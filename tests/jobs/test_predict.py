"""`sparsify predict` and `eval` for images that nobody labelled, on the digits model and small models drawn at random."""

import csv
import json

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

import sparsify
from helpers.error_lines import the_error
from helpers.families import build
from sparsify.config import SparsityConfig, Tokens
from sparsify.errors import UsageError
from sparsify.images import datasets
from sparsify.images.class_words import class_words
from sparsify.images.digits.scans import Digits
from sparsify.images.listed import ImagePaths
from sparsify.jobs import predict
from sparsify.measure.evaluate import evaluate_images
from sparsify.models import checkpoint
from sparsify.nn import graft
from sparsify.nn.adaptive import Adaptive, Rule
from sparsify.processes import Compute, Listener

N = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    sparsify.convert("digits", keep=0.3, output=folder / "m.safetensors", calib_images=4, spread="none")
    (folder / "flat").mkdir()
    for i in range(N):
        Digits("test")[i][0].save(folder / "flat" / f"{i}.png")
    return folder


def table(path="o.csv"):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_classes_and_probabilities_are_those_of_the_model(made, run):
    code, out, err = run(
        "predict", made / "m.safetensors", made / "flat", "--csv", "o.csv", "--top", 3, "--batch-size", 5
    )
    assert code == 0 and out == "wrote o.csv: 12 images\n" and "--class-map" in err
    rows = table()
    assert [row["image"] for row in rows] == [str(made / "flat" / f"{i}.png") for i in range(N)]
    model = sparsify.load(made / "m.safetensors", backend="reference")
    to = datasets.transform(datasets.data_config(model))
    with torch.inference_mode():
        p = model(torch.stack([to(Digits("test")[i][0]) for i in range(N)])).softmax(-1).topk(3)
    for rank in range(3):
        assert [int(row[f"class_{rank + 1}"]) for row in rows] == p.indices[:, rank].tolist()
        found = [float(row[f"probability_{rank + 1}"]) for row in rows]
        assert found == pytest.approx(p.values[:, rank].tolist(), abs=1e-4)


def test_names_limits_and_several_paths(made, run, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(f"digit {i}" for i in range(10)))
    Digits("test")[0][0].save(tmp_path / "one.png")
    how = ["--class-map", "names.txt", "--top", 1]
    code, out, err = run("predict", made / "m.safetensors", "one.png", made / "flat", "digits", *how, "--limit", 6)
    assert code == 0 and "6 of 610 images, drawn by seed 0" in err and out.count(" digit ") == 6
    assert out.splitlines()[0].startswith("one.png  ") and sum("digits/image" in line for line in out.splitlines()) >= 2
    code, out, err = run("predict", made / "m.safetensors", "one.png", *how, "-q")
    assert (code, out, err) == (0, "", "")


def test_broken_images_are_left_out_and_said(made, run, tmp_path):
    Digits("test")[0][0].save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    Digits("test")[1][0].save(tmp_path / "c.png")
    code, _, err = run("predict", made / "m.safetensors", ".", "--csv", "o.csv", "--features", "pooled")
    assert code == 0 and err.count("1 images could not be read") == 2 and "b.png" in err
    with safe_open("features.safetensors", "pt") as file:
        names = json.loads(file.metadata()["names"])
        assert names == [row["image"] for row in table()] == ["./a.png", "./c.png"]
        assert file.get_slice("features").get_shape()[0] == 2
    code, _, err = run("predict", made / "m.safetensors", ".", "--csv", "o.csv", "--strict")
    assert code == 1 and "b.png" in the_error(err) and len(table()) == 2  # the old table is still there


BAD = {
    "no such path": (["nowhere"], 1, "nowhere does not exist"),
    "empty folder": (["empty"], 1, "holds no images"),
    "not an image": (["x.png"], 1, "none of the 1 images could be read"),
    "csv": (["x.png", "--csv", "o.txt"], 2, ".csv"),
    "kind": (["x.png", "--features", "cls"], 2, "patch, pooled"),
    "another file": (["digits", "--limit", 1, "--features", "patch", "-o", "x.png"], 1, "choose another --output"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_done_is_one_line(made, run, tmp_path, case):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.png").write_text("no picture")
    how, code, words = BAD[case]
    found, out, err = run("predict", made / "m.safetensors", *how)
    assert (found, out) == (code, "") and words in the_error(err)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "x.png"]


def test_predict_and_evaluate_in_python(made):
    said, steps = [], []
    found = sparsify.predict(
        made / "m.safetensors",
        made / "flat",
        top=2,
        limit=4,
        seed=1,
        say=said.append,
        progress=lambda *s: steps.append(s),
    )
    assert len(found) == 4 and len(found[0].classes) == 2 and "4 of 12 images, drawn by seed 1" in said
    assert steps[-1] == ("predict", 4, 4) and found[0].probabilities[0] > 0.1
    model = sparsify.load(made / "m.safetensors")
    images = [made / "flat" / "0.png", str(made / "flat" / "1.png")]
    assert [each.image for each in sparsify.predict(model, images)] == [str(path) for path in images]
    e = sparsify.evaluate(model, "digits", limit=20, seed=3, no_labels=True)
    assert (e.images, e.drawn_from, e.top1) == (20, 597, None)


# features


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(5):
        Image.effect_noise((64, 64), 20 + 20 * i).convert("RGB").save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


def sparse(name, way=None, classes=0):
    torch.manual_seed(0)
    dense = build(name, patches=4)
    dense.reset_classifier(classes)
    tokens = None if way is None else Tokens(keep=0.5, stages=(1,), way=way, importance="attention")
    return graft.graft(dense.eval(), SparsityConfig(keep=0.5, rank=4, tokens=tokens))


@pytest.mark.parametrize("name, way, classes", [
    ("dinov2", None, 0), ("dinov2", "merge", 0), ("deit", "evit", 3), ("siglip", None, 0),
])  # fmt: skip
def test_features_are_those_of_forward_intermediates_on_the_full_grid(photos, tmp_path, name, way, classes):
    model, given = sparse(name, way, classes), ImagePaths((str(photos),))
    to = datasets.transform(datasets.data_config(model))
    x = torch.stack([to(Image.open(photos / f"{i}.png")) for i in range(5)])
    with torch.inference_mode():
        expected = model.forward_intermediates(x, 1, norm=True, output_fmt="NLC", intermediates_only=True)[0]
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    steps = []
    listener = Listener(progress=lambda *step: steps.append(step))
    for kind, wanted in (("patch", expected), ("pooled", pooled)):
        made = predict.write_features(
            model, given, kind, tmp_path / f"{kind}.safetensors", compute=Compute(batch_size=2), listener=listener
        )
        assert made.shape == tuple(wanted.shape) and made.bytes == made.path.stat().st_size
        with safe_open(made.path, "pt") as file:
            assert torch.allclose(file.get_tensor("features"), wanted, atol=1e-4)
            assert file.metadata()["grid"] == "4x4" and len(json.loads(file.metadata()["names"])) == 5
    assert steps[:3] == [("predict", 2, 5), ("predict", 4, 5), ("predict", 5, 5)]


def test_features_have_the_dtype_asked_for(photos, tmp_path):
    made = predict.write_features(
        sparse("dinov2"), ImagePaths((str(photos),)), "pooled", tmp_path / "f", compute=Compute(dtype="bfloat16")
    )
    with safe_open(made.path, "pt") as file:
        assert file.get_tensor("features").dtype == torch.bfloat16


def test_a_model_of_features_has_no_classes(photos):
    with pytest.raises(UsageError, match="has no classes: get its features with features"):
        predict.predictions(sparse("dinov2"), ImagePaths((str(photos),)))


def test_features_are_of_one_schedule(photos, tmp_path):
    model = sparse("deit", classes=3)
    with pytest.raises(UsageError, match="give budget, not adaptive"):
        predict.write_features(
            Adaptive(model, model, Rule(0.5, 1.0, 0.1, 0.2)), ImagePaths((str(photos),)), "patch", tmp_path / "f"
        )


def test_outputs_that_are_not_finite_have_empty_rows(photos, tmp_path):
    model = sparse("deit", classes=3)
    with torch.no_grad():
        model.head.bias[0] = torch.nan
    found = list(predict.predictions(model, ImagePaths((str(photos),))))
    assert [each.probabilities for each in found] == [()] * 5
    assert predict.write_csv(tmp_path / "o.csv", iter(found), predict.columns(3)) == (5, 5)
    assert [row["class_1"] for row in table(tmp_path / "o.csv")] == [None] * 5


def test_one_output_is_written_as_it_is(photos, tmp_path):
    model = sparse("deit", classes=1)
    found = predict.predictions(model, ImagePaths((str(photos),)))
    assert predict.write_csv(tmp_path / "o.csv", found, predict.columns(1)) == (5, 0)
    with open(tmp_path / "o.csv") as file:
        assert file.readline() == "image,output\n"
    assert all(abs(float(row["output"])) < 100 for row in table(tmp_path / "o.csv"))


class Named(nn.Module):
    def __init__(self, classes, names=None):
        super().__init__()
        self.num_classes, self.pretrained_cfg = classes, {"label_names": names}


def test_names_of_classes():
    words, note = class_words(Named(1000))
    assert words[0] == "tench, Tinca tinca" and len(words) == 1000 and "imagenet-1k" in note
    assert class_words(Named(2, ("cat", "dog"))) == (("cat", "dog"), "")
    assert class_words(Named(2, ("n01440764", "n99999999"))) == (("tench, Tinca tinca", "n99999999"), "")
    words, note = class_words(Named(3))
    assert words == () and "class_map" in note


# eval


def test_eval_of_a_flat_folder_compares_without_labels(made, run):
    code, out, err = run("eval", made / "m.safetensors", "--data", made / "flat", "--results-file", "r.json")
    assert code == 0 and "agreement" in out and "KL" in out and "top-1" not in out and "no class folders" in err
    found = json.loads(open("r.json").read())
    assert found["images"] == N and found["agreement"] > 50 and found["top1"] is None and found["drawn_from"] is None
    code, out, _ = run(
        "eval", made / "m.safetensors", "--data", made / "flat", "--limit", 5, "--results-file", "r.json"
    )
    found = json.loads(open("r.json").read())
    assert code == 0 and "5 of 12" in out and (found["images"], found["drawn_from"]) == (5, 12)
    assert (found["conditions"]["limit"], found["conditions"]["seed"]) == (5, 0)


def test_eval_says_how_to_do_without_labels(made, run, tmp_path):
    for name in "ab":
        (tmp_path / "set" / name).mkdir(parents=True)
        Digits("test")[0][0].save(tmp_path / "set" / name / "0.png")
    code, _, err = run("eval", made / "m.safetensors", "--data", "set")
    assert code == 1 and the_error(err).count("--no-labels") == 1
    code, out, _ = run("eval", made / "m.safetensors", "--data", "set", "--no-labels")
    assert code == 0 and "agreement" in out and "top-1" not in out
    code, _, err = run("eval", made / "m.safetensors", "--imagenet", "set", "--no-labels")
    assert code == 2 and "--data" in the_error(err)


def test_without_labels_and_without_dense_there_is_nothing_to_measure(made):
    model = checkpoint.read(made / "m.safetensors").model
    with pytest.raises(UsageError, match="nothing to measure"):
        sparsify.evaluate(model, made / "flat", backbone_changed=True)
    assert sparsify.evaluate(model, made / "flat").images == N


def test_features_share_neighbours_and_their_search_is_reported(photos):
    model, steps = sparse("dinov2"), []
    listener = Listener(progress=lambda *step: steps.append(step))
    e = evaluate_images(model, str(photos), compute=Compute(batch_size=2), listener=listener)
    assert e.images == 5 and e.neighbours == 2 and 0 <= e.neighbour_overlap <= 100 and e.recall_at_1 is None
    assert e.cosine_patch_error > 0 and steps[-2:] == [("neighbours", 5, 10), ("neighbours", 10, 10)]


def test_a_file_of_timms_models_can_be_told_from_its_classes():
    assert class_words(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1))[0][999].startswith(
        "toilet tissue"
    )
