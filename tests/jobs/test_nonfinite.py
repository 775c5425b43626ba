"""NaN and infinity: named and refused where they come in, never counted as agreement, and never written into JSON."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import sparsify
from sparsify.errors import SparsifyError
from sparsify.files.plain_json import to_json
from sparsify.fit.finetune.validation import ValidationScore
from sparsify.measure.evaluate import evaluate
from sparsify.models.digits import network

FAST = ["--calib-images", "4", "--keep", "0.5", "-q"]


def weights(path, name, value=math.nan):
    state = network.build().state_dict()
    state[name].flatten()[0] = value
    save_file(state, path)


@pytest.mark.parametrize("name", ["head.bias", "blocks.1.mlp.fc1.weight", "blocks.2.attn.qkv.weight"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_convert_names_weights_that_are_not_finite(run, tmp_path, name, value):
    weights(tmp_path / "w.safetensors", name, value)
    code, out, err = run("convert", "digits", "--weights", "w.safetensors", *FAST)
    assert code == 1 and not out and err.count("\n") == 1
    assert f"in 1 tensors: {name} (1)" in err and "--allow-nonfinite" in err
    assert not (tmp_path / "model.safetensors").exists()


def test_queries_that_are_not_finite_are_one_line(run, tmp_path):
    weights(tmp_path / "w.safetensors", "blocks.2.attn.qkv.weight")
    code, _, err = run("convert", "digits", "--weights", "w.safetensors", "--allow-nonfinite", *FAST)
    assert code == 1 and err.count("\n") == 1 and "queries or keys of this model are not finite" in err


def test_eval_counts_nan_as_disagreement_says_so_and_writes_valid_json(run, tmp_path):
    weights(tmp_path / "w.safetensors", "head.bias")
    assert run("convert", "digits", "--weights", "w.safetensors", "--allow-nonfinite", *FAST)[0] == 0
    code, out, err = run("eval", "model.safetensors", "--data", "digits", "--results-file", "r.json")
    assert code == 1 and "597 of 597 images give outputs that are not finite" in err.splitlines()[-1]
    assert "597 image(s) with outputs that are not finite" in " ".join(out.split())
    result = json.loads((tmp_path / "r.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert (result["agreement"], result["top1"], result["dense_top1"], result["kl"]) == (0, 0, 0, None)
    assert result["nonfinite"] == 597 and result["images"] == 597


def test_figures_with_one_image_that_is_not_finite_counted_by_hand():
    dense, sparse = nn.Module(), nn.Module()
    dense.num_classes = 3
    dense.forward = lambda x: x
    sparse.forward = lambda x: torch.where(x == 9, torch.nan, x)
    x = torch.tensor([[9.0, 0, 0], [2.0, 0, 0], [0, 2.0, 0], [0, 0, 9.0]])  # of the first and last, sparse has a NaN
    e = evaluate(sparse, dense, [(x, torch.tensor([0, 0, 0, 2]))])
    assert (e.nonfinite, e.agreement, e.top1, e.dense_top1, e.kl) == (2, 50, 25, 75, None)
    assert (e.images_lost, e.images_gained) == (2, 0)


def test_a_model_without_sparse_attention_is_refused_by_evaluate_as_by_profile():
    for measure in (lambda m: sparsify.evaluate(m, "digits"), sparsify.profile):
        with pytest.raises(SparsifyError, match="no sparse attention: convert it first"):
            measure(network.build(pretrained=False))


def test_json_has_null_for_what_is_not_finite(tmp_path):
    tree = {"a": [1.0, math.nan, (math.inf, -math.inf)], "b": {"c": 2, "d": True, "e": "NaN"}, "f": None}
    expected = {"a": [1.0, None, [None, None]], "b": {"c": 2, "d": True, "e": "NaN"}, "f": None}
    assert json.loads(to_json(tree), parse_constant=lambda word: pytest.fail(word)) == expected


def test_a_score_that_is_no_number_is_never_better_however_many_labels_it_hits():
    none, some = ValidationScore(math.nan, 50.0, 90.0, 4), ValidationScore(2.0, 50.0, 10.0, 4)
    assert not none.better_than(some) and some.better_than(replace(none, top1=None))


def test_a_score_that_is_no_number_comes_back_as_that():
    saved = json.loads(to_json({"kl": math.nan, "agreement": 50.0, "top1": None, "images": 4}))
    score = ValidationScore.of(saved)
    assert saved["kl"] is None and math.isnan(score.kl) and (score.agreement, score.images) == (50, 4)
