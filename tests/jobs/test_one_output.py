"""Models of one output, a binary head or a regression: a softmax of one number says nothing, so outputs themselves count."""

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import sparsify
from helpers.small_runs import recipe
from sparsify.images import datasets
from sparsify.images.trainset import trainset
from sparsify.measure.accuracy import classify, distance
from sparsify.measure.evaluate import evaluate
from sparsify.models.digits import network
from sparsify.nn import graft
from sparsify.recipe import load_recipe


def weights(path: Path, outputs: int) -> Path:
    """The digits network with 'how much more a 3 than an 8', as one output y or as two, y / 2 and -y / 2."""
    state = network.build().state_dict()
    w, b = (state[name][3] - state[name][8] for name in ("head.weight", "head.bias"))
    if outputs == 1:
        state |= {"head.weight": w[None], "head.bias": b[None]}
    else:
        state |= {"head.weight": torch.stack([w, -w]) / 2, "head.bias": torch.stack([b, -b]) / 2}
    save_file(state, path)
    return path


def test_distance_of_one_output_is_the_squared_error_over_the_dense_squares():
    dense, sparse = torch.tensor([[3.0], [-4.0]]), torch.tensor([[2.0], [-2.0]])
    assert distance(dense, sparse, logits=True) == pytest.approx((1 + 4) / (9 + 16))
    level = torch.tensor([[5.0, 5.0], [4.0, 4.001]])  # two outputs that hardly differ: p is 1/2 whatever they are
    assert distance(level, 0.5 * level, logits=True) == pytest.approx(0.25)
    assert not classify(dense) and not classify(level) and classify(torch.tensor([[5.0, 4.0]]))


def test_figures_of_one_output_counted_by_hand():
    dense, sparse = nn.Module(), nn.Module()
    dense.num_classes = 1
    dense.forward, sparse.forward = lambda x: x, lambda x: x * torch.tensor([[1.5], [1.0], [0.75], [1.0]])[: len(x)]
    x = torch.tensor([[1.0], [2.0], [4.0], [-3.0]])  # sparse: 1.5, 2, 3, -3
    e = evaluate(sparse, dense, [(x, torch.zeros(4, dtype=torch.int64))])
    assert e.rel_error_output == pytest.approx(math.sqrt(1.25 / 30))
    assert e.correlation == pytest.approx(23 / math.sqrt(26 * 21.1875))
    assert (e.agreement, e.kl, e.top1, e.top5, e.dense_top1, e.images_lost, e.images) == (*[None] * 6, 4)


def test_fine_tuning_of_one_output_sees_what_is_lost(tmp_path):
    lines: list[str] = []
    stage = {"steps": 20, "losses": {"logits": 1.0}, "optimiser": {"lr": 3e-4, "weight_decay": 0.0}}
    chosen = recipe(stage, sparsity={"keep": 0.05, "rank": 4, "tail": "none"}, hold_back=0.05)
    made = sparsify.convert(
        "digits", recipe=chosen, weights=weights(tmp_path / "w.safetensors", 1), data="digits",
        output=tmp_path / "m.safetensors", say=lines.append,
    )  # fmt: skip
    assert made.tuning is not None and made.tuning.start.agreement is None
    assert 0 < made.tuning.best.kl < made.tuning.start.kl < 1 and made.tuning.changed
    assert any("relative squared error" in line for line in lines)


def test_a_schedule_for_one_output_is_as_good_as_for_two(tmp_path):
    """The same function as one output and as two: the search must see as much of the damage."""
    found = {}
    for outputs in (1, 2):
        path = tmp_path / f"{outputs}.safetensors"
        given = weights(tmp_path / "w.safetensors", outputs)
        chosen = load_recipe("calibrate").override(calib_images=16, spread="none")
        made = sparsify.convert("digits", recipe=chosen, weights=given, output=path, target_macs=0.55)
        found[outputs] = correlation(made.model)
    assert found[1] > found[2] - 0.02 and found[1] > 0.9, found


def correlation(model: nn.Module) -> float:
    """Of the first output with dense, over 200 digits."""
    images = trainset("digits:test").calibration(200, 0, datasets.transform(datasets.data_config(model)))
    with torch.inference_mode():
        pairs = [torch.stack([graft.dense_twin(model)(x)[:, 0], model(x)[:, 0]]) for x in images]
    return float(torch.corrcoef(torch.cat(pairs, 1))[0, 1])


def test_any_class_folders_will_do_for_one_output(tmp_path):
    for name in ("low", "high"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (28, 28)).save(tmp_path / name / "0.png")
    batches = datasets.labelled(tmp_path, 1, datasets.transform(datasets.data_config(network.build(pretrained=False))))
    assert [y.tolist() for _, y in batches] == [[0, 1]]
