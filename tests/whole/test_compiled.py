"""Under torch.compile: one graph, the same numbers, the same kernels."""

import pytest
import torch

from helpers.families import FAMILIES, LEAVING, build, draw_importance, images
from sparsify.config import SparsityConfig, Tokens
from sparsify.nn import attention, graft, hosts, token_models
from sparsify.ops import backends

HEAD, TOKEN = "head-lowrank", "token-lowrank"
NARROW = {
    family: dict(embed_dim=96, num_heads=3) for family in ("clip", "siglip", "dinov2", "dinov2-registers", "deit3")
}
WAYS = dict(zip(FAMILIES, ["merge", "evit", "evit-fused"] * len(FAMILIES), strict=False))
ALONE = dict(zip(FAMILIES, [HEAD, TOKEN] * len(FAMILIES), strict=False))


def sparse(family, predictors, tokens=None):
    """A block for each of the predictors named, random weights."""
    model = build(family, depth=len(predictors), **NARROW.get(family, {}))
    config = SparsityConfig(keep=0.3, rank=8, cells=(2, 2), predictor=TOKEN, tokens=tokens)
    made, g = [], torch.Generator().manual_seed(5)
    modules = hosts.supported_attentions(model)
    plan = config.resolved(hosts.geometry(model, modules))[0]
    for name, host in zip(predictors, modules.values(), strict=True):
        made.append(graft.new_predictor(model, host, config.model_copy(update={"predictor": name}), plan))
        for parameter in made[-1].parameters() if name == TOKEN else ():
            parameter.data.copy_(torch.rand(parameter.shape, generator=g) / parameter.shape[-1])
    return draw_importance(graft.graft(model, config, made)).requires_grad_(False)


def breaks(model):
    torch.compiler.reset()
    with torch.no_grad():
        found = torch._dynamo.explain(model)(images(model))
    assert found.graph_count >= 1
    return found.break_reasons


@pytest.mark.parametrize("family", FAMILIES)
def test_no_graph_break(family):
    """With one of the predictors, turn about; both are in the next test."""
    assert not breaks(sparse(family, [ALONE[family]]))


@pytest.mark.parametrize("family", LEAVING)
def test_no_graph_break_where_tokens_leave(family):
    model = sparse(family, [HEAD, TOKEN], Tokens(keep=0.5, stages=(1,), way=WAYS[family]))
    assert [i for i, _ in token_models.stages(model)] == [0] and len(attention.sparse_modules(model)) == 2
    assert not breaks(model)


@pytest.mark.parametrize("tokens", [None, Tokens(keep=(0.6, 0.0))])
def test_equals_eager(tokens):
    model = sparse("deit", [HEAD, TOKEN], tokens)
    x = images(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)


def test_kernels_of_eager_are_called(monkeypatch):
    """The sparse op's and the dense one: not the reference, not PyTorch's attention."""
    if backends.not_built():
        pytest.skip(f"no CPU kernels here: {backends.not_built()}")
    model = build("deit", depth=2)
    graft.graft(model, SparsityConfig(keep=(0.3, "dense"), rank=8, tokens=Tokens(keep=0.6, stages=(1,))))
    model.requires_grad_(False)
    graphs, x = [], images(model)

    def backend(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    expected = model(x)
    monkeypatch.setattr("sparsify.ops.reference.attend", lambda *_: pytest.fail("the reference was called"))
    torch.testing.assert_close(compiled(x), expected)
    (called,) = graphs
    assert "sparsify_cpu.dense_attention.default" in called
    assert not any("scaled_dot_product" in name for name in called)
