"""How many kernels a model with token stages launches on a GPU, counted on fake tensors; none waits for the host."""

import copy
import functools

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers import launches
from helpers.families import build, draw_importance
from sparsify.config import SparsityConfig, Tokens
from sparsify.nn import graft
from sparsify.nn.merging import rounds
from sparsify.nn.tokens import WAYS, TokenStage, TokenState
from sparsify.ops.gpu import attention, tokens

BF16 = torch.bfloat16
IMPORTANCE = ("fitted", "attention")


@functools.cache
def deit_small():
    return timm.create_model("deit_small_patch16_224").eval()


def with_stages(dense, **stages):
    model = copy.deepcopy(dense)
    graft.graft(model, SparsityConfig(keep="dense", tokens=Tokens(**stages)))
    return draw_importance(model).eval()


def launched(model, size=224, capability=(9, 0), dtype=BF16):
    with launches.a_gpu(capability):
        parameters = launches.on_gpu(model, dtype)
        x = torch.empty(8, 3, size, size, dtype=dtype, device="cuda")
        return launches.launched(lambda: torch.func.functional_call(model, parameters, (x,)))


@pytest.mark.parametrize("importance", IMPORTANCE)
@pytest.mark.parametrize("way", WAYS)
def test_deit_small_with_three_stages_launches_little_more_than_dense(way, importance):
    """By block: 2 norms, 4 linear layers, GELU, 2 sums, attention; then 5: patches, cls, positions, norm, head."""
    dense = launched(deit_small())
    assert dense.total() == 12 * 10 + 5
    found = launched(with_stages(deit_small(), way=way, keep=0.7, importance=importance))
    assert not {"sort", "argsort", "gather", "scatter", "log"} & set(found)
    # each of 3 stages: importance 1 or 2, a round of merging 4, evit 2; attention over merged tokens is 1 as before
    stage = (1 if importance == "fitted" else 2) + (4 if way == "merge" else 2)
    assert found.total() == dense.total() + 3 * stage <= 200
    assert stage <= (8 if way == "merge" else 4)


def test_without_the_kernels_it_launches_three_times_as_many():
    found = launched(with_stages(deit_small(), way="merge", keep=0.7, importance="fitted"), capability=(7, 5))
    assert found.total() > 350


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("n,m", [(196, 40), (1369, 959)])
def test_every_round_is_four_launches_more(n, m, tracked):
    with launches.a_gpu():
        x, I = torch.empty(2, 1 + n, 384, dtype=BF16, device="cuda"), torch.empty(2, n, device="cuda")
        owner = torch.empty(2, n, dtype=torch.int64, device="cuda") if tracked else None
        found = launches.launched(lambda: TokenStage("merge", m / n, 1)(x, I, TokenState(n, owner=owner)))
    count = len(rounds(n, m))
    assert found["merge_tokens"] == tokens.merge_tokens.launches * count
    assert found.total() <= 8 * count


@pytest.mark.parametrize("family", ["deit-distilled", "dinov2-registers", "vit-avg-pool", "dinov3", "beit"])
@pytest.mark.parametrize("way", WAYS)
def test_other_hosts_run_on_fake_tensors_and_give_all_patches(family, way):
    model = with_stages(build(family, depth=2), way=way, keep=0.6, stages=(1,), importance="fitted")
    with launches.a_gpu():
        parameters = launches.on_gpu(model, BF16)
        x = torch.empty(2, 3, *model.patch_embed.img_size, dtype=BF16, device="cuda")
        model.forward = functools.partial(model.forward_features, full_grid=True)
        found = launches.launched(lambda: torch.func.functional_call(model, parameters, (x,)))
    assert found["merge_tokens" if way == "merge" else "choose_tokens"] > 0


@pytest.mark.parametrize("way", WAYS)
def test_a_model_compiles_without_a_graph_break(way):
    model = with_stages(build("deit", depth=2), way=way, keep=0.6, stages=(1,), importance="attention")
    graphs = []
    with launches.a_gpu(), torch.no_grad():
        parameters, x = launches.on_gpu(model, BF16), torch.empty(2, 3, 96, 96, dtype=BF16, device="cuda")
        keeping = lambda graph, inputs: graphs.append(graph) or graph  # noqa: E731
        run = torch.compile(
            lambda x: torch.func.functional_call(model, parameters, (x,)), fullgraph=True, backend=keeping
        )
        assert run(x).shape == (2, 10)
    ours = {str(node.target) for graph in graphs for node in graph.graph.nodes if "sparsify" in str(node.target)}
    assert ours == {
        f"sparsify.{name}.default"
        for name in (
            "attention_importance",
            *(("merge_tokens", "sized_attention") if way == "merge" else ("choose_tokens",)),
        )
    }


# ---- MACs ----


def macs(call):
    with launches.a_gpu(), FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return {op.__name__: flops / 2 for op, flops in counter.get_flop_counts()["Global"].items()}


def test_torch_counts_the_macs_of_every_op():
    def call():
        empty = functools.partial(torch.empty, device="cuda")
        x, I, q, k = empty(2, 6, 16), empty(2, 5), empty(2, 3, 1, 4), empty(2, 3, 6, 4)
        tokens.fitted_importance(x, empty(17), None, 1, 0.0)
        tokens.attention_importance(k, k, None, 1.0, 2, 1, 0.0)
        tokens.merge_tokens(x, I, None, None, 1, 3, 4)
        attention.sized_attention(q, k, k, empty(2, 6), 1.0)

    assert macs(call) == {
        "fitted_importance": 2 * 5 * 16,  # 5 tokens of 16 channels in 2 images
        "attention_importance": 2 * 3 * 2 * 6 * 4,  # 2 rows of 3 heads, 6 keys
        "merge_tokens": 2 * (4 + 3 + 2 + 1) * 16,  # each of the 4 with those after it
        "sized_attention": 2 * 3 * 1 * 6 * (4 + 4),  # 1 query, 6 keys
    }
