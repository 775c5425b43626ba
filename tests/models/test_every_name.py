"""docs/families.md: what converts is what the page says, one model of each structure equals dense, the rest is refused."""

from collections import defaultdict
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from helpers import timm_names
from sparsify.errors import UnsupportedModel
from sparsify.nn import hosts

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
CURRENT = f" architectures in timm {timm.__version__}'s " in PAGE.read_text()


def test_the_page_is_what_timm_builds():
    if not CURRENT:
        pytest.skip("docs/families.md is of another timm")
    assert timm_names.table() == PAGE.read_text(), "run `make families`"


def test_nearly_everything_that_attends_plainly_converts():
    frames = {name: timm_names.frame(name) for listed in timm_names.names().values() for name in listed}
    refused = {name: frame for name, frame in frames.items() if isinstance(frame, str)}
    plain = [name for name, reason in refused.items() if "Parallel" not in reason and "Diff" not in reason]
    assert len(frames) > 200 and len(plain) <= 0.05 * (len(frames) - len(refused) + len(plain))


def test_one_model_of_each_structure_equals_dense_at_keep_one():
    """The attention reaches the output: without it the test would show nothing."""
    kinds = defaultdict(list)
    for listed in timm_names.names().values():
        for name in listed:
            if isinstance(frame := timm_names.frame(name), nn.Module):
                kinds[timm_names.structure(frame)].append(name)
    assert len(kinds) > 40
    for number, each in enumerate(kinds.values()):
        dense = timm_names.small(each[0])
        predictor = ("head-lowrank", "token-lowrank")[number % 2]
        assert timm_names.difference(dense, predictor) <= timm_names.TOLERANCE, each[0]
        assert timm_names.reaches_the_output(dense), each[0]


@pytest.mark.parametrize(
    "module", [m for m in timm.list_modules() if hasattr(timm.models, m) and m not in hosts.MODULES]
)
def test_other_modules_of_timm_are_refused_by_name(module):
    names = timm.list_models(module=module)
    if not names:
        pytest.skip("no models")
    try:
        with torch.device("meta"):
            model = timm.create_model(names[0])
    except (NotImplementedError, RuntimeError):
        pytest.skip("cannot be built on the meta device")
    with pytest.raises(UnsupportedModel) as caught:
        hosts.supported_attentions(model, names[0])
    text = str(caught.value)
    assert names[0] in text and "is not understood" in text and "\n" not in text
