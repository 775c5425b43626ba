"""Accuracy figures on tables small enough to count by hand, and on models with and without a classifier."""

import math

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from helpers.families import build
from sparsify.config import SparsityConfig
from sparsify.images import datasets
from sparsify.measure.accuracy import Features
from sparsify.measure.evaluate import evaluate, evaluate_images
from sparsify.measure.neighbours import knn
from sparsify.nn import graft
from sparsify.processes import Compute, Listener


class Answers(nn.Module):
    """A 'model' whose answers are the images."""

    num_classes = 3

    def forward(self, x):
        return x


def test_figures_of_four_images_counted_by_hand():
    dense = torch.tensor([[2.0, 0, 0], [2.0, 0, 0], [0, 2.0, 0], [0, 0, 2.0]])
    flip = nn.Module()
    flip.forward = lambda x: x[:, [1, 0, 2]]  # exchanges classes 0 and 1
    y = torch.tensor([0, 1, 0, 2])
    # dense answers 0 0 1 2: right, wrong, wrong, right; sparse 1 1 0 2: wrong, right, right, right
    e = evaluate(flip, Answers(), [(dense, y)])
    assert (e.images, e.dense_top1, e.top1, e.agreement) == (4, 50.0, 75.0, 25.0)
    assert (e.images_lost, e.images_gained) == (1, 2)
    p = math.exp(2) / (math.exp(2) + 2)
    q = 1 / (math.exp(2) + 2)
    assert e.kl == pytest.approx(3 / 4 * (p - q) * math.log(p / q))  # the fourth image does not differ
    assert e.kl_error == pytest.approx((p - q) * math.log(p / q) / 4)  # of a, a, a, 0 the deviation is a / 2
    assert e.top5 == e.dense_top5 == 100.0  # three classes: top-5 is everything


def test_batches_do_not_change_the_figures():
    x, y = torch.randn(7, 3), torch.randint(0, 3, (7,))
    noisy = nn.Module()
    noisy.forward = lambda x: x * torch.tensor([1.0, 0.5, 2.0])
    one = evaluate(noisy, Answers(), [(x, y)])
    many = evaluate(noisy, Answers(), zip(x.split(2), y.split(2), strict=True))
    assert (one.top1, one.agreement, one.images_lost) == (many.top1, many.agreement, many.images_lost)
    assert one.kl == pytest.approx(many.kl) and one.kl_error == pytest.approx(many.kl_error)
    assert evaluate(noisy, Answers(), [(x[:1], y[:1])]).kl_error is None


def test_images_without_labels_have_no_accuracy():
    x, none = torch.eye(3), torch.full((3,), -1)
    flip = nn.Module()
    flip.forward = lambda x: x[:, [1, 0, 2]]
    e = evaluate(flip, Answers(), [(x, none)])
    assert e.agreement == pytest.approx(100 / 3) and e.kl > 0 and e.images == 3
    assert {e.top1, e.top5, e.dense_top1, e.dense_top5, e.images_lost, e.images_gained} == {None}
    features, tokens = torch.randn(3, 4), torch.randn(3, 2, 4)
    sums = Features(0)
    sums.add((features, tokens), (features, tokens), none)
    alike = sums.result(3)
    assert (alike.knn_top1, alike.dense_knn_top1) == (None, None) and alike.cosine_patch == pytest.approx(1)


def test_nearest_neighbours_leave_the_image_itself_out():
    features = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1], [1, -0.5]])
    assert knn(features, torch.tensor([0, 0, 1, 1, 1]), k=1) == 80.0  # the last looks like class 0
    assert knn(features[:1], torch.tensor([0])) is None


def test_features_that_are_not_finite_are_wrong_and_no_neighbours():
    features = torch.tensor([[1.0, 0], [1, 0.1], [math.nan, 0], [math.inf, 0]])
    assert knn(features, torch.tensor([0, 0, 0, 0]), k=1) == 50.0  # the first two are each other's
    assert knn(features, torch.tensor([0, 0, 1, 1]), k=3) == 50.0


@pytest.mark.parametrize("name", ["dinov2", "siglip"])
def test_models_without_a_classifier_compare_features(name, tmp_path):
    for c in ("a", "b"):
        (tmp_path / c).mkdir()
        for i in range(3):
            Image.effect_noise((40, 40), 40 + 20 * i).convert("RGB").save(tmp_path / c / f"{i}.png")
    dense = build(name, patches=4)
    dense.reset_classifier(0)
    model = graft.graft(dense.eval(), SparsityConfig(keep=1.0, rank=8))
    e = evaluate_images(model, str(tmp_path), compute=Compute(batch_size=2))
    assert e.images == 6 and e.top1 is None and e.agreement is None
    assert e.cosine_pooled == pytest.approx(1, abs=1e-4) and e.cosine_patch == pytest.approx(1, abs=1e-4)
    assert e.rel_error_patch < 1e-4 and e.knn_top1 == e.dense_knn_top1 is not None
    sparser = graft.graft(graft.dense_twin(model), SparsityConfig(keep=0.1, rank=8, tail="none"))
    assert evaluate_images(sparser, str(tmp_path)).rel_error_patch > 1e-3


def test_broken_images_are_counted_and_left_out(tmp_path):
    for c in "ab":
        (tmp_path / c).mkdir()
        Image.new("RGB", (40, 40)).save(tmp_path / c / "good.png")
    (tmp_path / "a" / "broken.png").write_bytes(b"no picture")
    dense = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=2)
    model = graft.graft(dense.eval(), SparsityConfig(rank=8))
    lines = []
    e = evaluate_images(model, str(tmp_path), listener=Listener(say=lines.append))
    assert (e.images, e.broken) == (2, 1) and "broken.png" in lines[-1]
    with pytest.raises(Exception, match=r"broken\.png"):
        evaluate_images(model, str(tmp_path), strict=True)
    assert datasets.labelled(tmp_path, 2, datasets.transform(datasets.data_config(model))).total == 3
