"""MACs where tokens leave: both counters to the unit, nets counted by hand, and the authors' accounting."""

import dataclasses
import io
import json

import pytest
import timm
import torch
from rich.console import Console
from timm.models.vision_transformer import VisionTransformer

from helpers import families
from sparsify.cli import tables
from sparsify.config import SparsityConfig, Tokens
from sparsify.errors import SparsifyError
from sparsify.measure import analytic, macs, paper
from sparsify.measure.figures import Profile
from sparsify.measure.profile import profile, verify
from sparsify.nn import execution, graft, hosts
from sparsify.nn.attention import Execution, attention_modules, sparse_modules
from sparsify.nn.tokens import WAYS
from sparsify.ops.macs import PARTS
from sparsify.reports import profile as report
from sparsify.reports.words import human

ATTENTION = {
    "dense": dict(keep="dense", rank=4),
    "folded": dict(keep=0.3, rank=4),
    "unfolded": dict(keep=0.3, rank=4, fold=False),
    "token": dict(keep=0.3, rank=6, predictor="token-lowrank"),
    "mixed": dict(keep=(0.3, "dense", 0.5), rank=4),
}
KEEPS = {
    "all": Tokens(keep=1.0, stages=(1, 3)),
    "share": Tokens(keep=0.7, stages=(1, 2)),
    "tiny": Tokens(keep=0.01, stages=(1, 2)),  # a single patch token goes on
    "list": Tokens(keep=(0.7, 1.0, 0.5)),
    "low-first": Tokens(keep=(0.3, 0.5, 1.0)),  # more leave than half of those present
    "prefix-last": Tokens(keep=(0.7, 1.0, 0.0)),
    "prefix-early": Tokens(keep=(0.5, 0.0, 1.0)),
}


def small(attention: dict, tokens: Tokens, way: str, **options) -> torch.nn.Module:
    """4x4 patches, cls and a register: N = 18, 3 blocks of 2 heads of 8."""
    options = dict(img_size=8, patch_size=2, embed_dim=16, depth=3, num_heads=2, num_classes=3, reg_tokens=1) | options
    config = SparsityConfig(**attention, tokens=tokens.model_copy(update={"way": way}))
    return graft.graft(VisionTransformer(**options).eval(), config)


def by_attention(way: str, keep: float | tuple[float, ...], stages: tuple[int, ...] = (4, 7, 10)) -> Tokens:
    return Tokens(way=way, keep=keep, stages=stages, importance="attention")


def agree(model: torch.nn.Module) -> tuple[macs.Counts, analytic.Analytic]:
    """Both counts of a model, equal to the unit."""
    execution.set_execution(model, Execution("reference"))
    image = macs.image_shape(model)
    counts = macs.count(model, image, list(attention_modules(model)))
    other = analytic.count(model, torch.zeros(1, *image))
    assert not counts.unsupported
    verify("small", counts, other)
    assert counts.total == other.total > 0
    assert counts.mhsa == other.pairs + other.predictor + other.tail
    return counts, other


def test_of_many_tokens_every_256_are_compared_with_those_behind_them():
    agree(small({"keep": "dense"}, Tokens(keep=0.3, stages=(1,)), "merge", img_size=52))  # 676 patches, 3 rounds


def shown(*what: object) -> str:
    console = Console(file=io.StringIO(), width=80)
    for each in what:
        console.print(each)
    return console.file.getvalue()


# ---- fvcore against the analytic count ----


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("way", WAYS)
def test_both_counts_agree(way, attention, keep):
    agree(small(ATTENTION[attention], KEEPS[keep], way))
    agree(small(ATTENTION[attention], KEEPS[keep].model_copy(update={"importance": "attention"}), way))


@pytest.mark.parametrize("way", ["merge", "evit"])
@pytest.mark.parametrize("attention", ["folded", "token"])
@pytest.mark.parametrize(
    "tail",
    [dict(tail="none"), dict(tail="mean"), dict(tail="cells", cells=(3, 3)), dict(tail="clusters", cells=(3, 4))],
)
def test_both_counts_agree_for_every_tail(tail, attention, way):
    counts, _ = agree(small(ATTENTION[attention] | tail, KEEPS["share"], way))
    assert (counts.part("tail") > 0) == (tail["tail"] != "none")


@pytest.mark.parametrize("family,way", families.ways_of(WAYS))
def test_both_counts_agree_for_every_family(family, way):
    model = families.build(family, patches=4, depth=3)
    last = 0.0 if hosts.num_prefix_tokens(model) else 0.5
    config = SparsityConfig(keep=(0.3, "dense", 0.5), rank=4, tokens=Tokens(way=way, keep=(0.6, 0.7, last)))
    counts, other = agree(graft.graft(model, config))
    assert counts.stages > 0 and other.tokens[-1][1] < other.tokens[0][0]


@pytest.mark.parametrize("global_pool", ["token", "avg"])
def test_merge_on_the_full_grid_has_no_unknown_op(global_pool):
    agree(small(ATTENTION["dense"], KEEPS["list"], "merge", global_pool=global_pool))
    agree(small(ATTENTION["folded"], KEEPS["prefix-last"], "evit", num_classes=0, global_pool=global_pool))


def test_tiles_of_tokens_that_have_left():
    agree(small(dict(keep=0.4, rank=4, granularity="tile", tile=(2, 2)), KEEPS["share"], "evit"))


def test_a_stage_counted_wrongly_is_an_error():
    model = small(ATTENTION["dense"], KEEPS["share"], "merge")
    counts, other = agree(model)
    wrong = {**vars(other), "stages": other.stages + 1}
    with pytest.raises(SparsifyError, match="choosing tokens"):
        verify("sparse", counts, analytic.Analytic(**wrong))


# ---- by hand: 2x2 patches and a cls token; N = 5, P = 1; H = 2 heads of d = 4; C = 8; MLP 16; 3 classes ----
# conv 4 * 8 * 4 = 128; head 8 * 3 = 24; for every row of N: norm 5 * 8 = 40, qkv 192, proj 64, MLP 2 * 8 * 16 = 256


def tiny(tokens: Tokens, keep="dense", depth: int = 2) -> torch.nn.Module:
    model = VisionTransformer(
        img_size=4, patch_size=2, in_chans=1, embed_dim=8, depth=depth, num_heads=2, mlp_ratio=2, num_classes=3
    )
    return graft.graft(model.eval(), SparsityConfig(keep=keep, rank=2, tail="none", tokens=tokens))


@pytest.mark.parametrize(
    ("way", "after", "matching"),
    [
        ("evit", 3, 0),
        ("evit-fused", 4, 0),
        ("merge", 3, 2 * 3 * 8 + 2 * 2 * 8),  # cosines of 2 with the 3 behind the first, then of 2 with 2
    ],
)
@pytest.mark.parametrize(
    ("importance", "told"),
    [
        ("attention", 1 * 5 * 8),  # the cls row's logits with 5 keys
        ("fitted", 4 * 8 * (4 + 1)),  # a norm without parameters, and a product, of 4 patches
    ],
)
def test_half_of_four_patches_by_hand(way, after, matching, importance, told):
    counts, other = agree(tiny(Tokens(way=way, keep=0.5, stages=(1,), importance=importance)))
    stages = told + matching
    first = 5 * (40 + 192 + 64) + 2 * 5 * 5 * 8 + stages + after * (40 + 256)
    second = after * (40 + 192 + 64 + 40 + 256) + 2 * after * after * 8
    assert counts.total == 128 + first + second + after * 40 + 24
    assert counts.mhsa == counts.part("full") == 2 * (25 + after * after) * 8
    assert counts.stages == stages
    assert other.tokens == ((5, after), (after, after))


@pytest.mark.parametrize("keep", ["dense", 0.4])
def test_prefix_rows_alone_by_hand(keep):
    """Block 1: queries, projection and MLP of the cls row; keys and values of all 5."""
    counts, other = agree(tiny(by_attention("evit", (1.0, 0.0)), keep=("dense", keep)))
    first = 5 * (40 + 192 + 64 + 40 + 256) + 2 * 5 * 5 * 8
    second = 5 * 40 + 1 * 64 + 5 * 128 + 2 * 1 * 5 * 8 + 64 + 40 + 256
    assert counts.total == 128 + first + second + 40 + 24
    assert counts.attention["blocks.1.attn"]["full" if keep == "dense" else "prefix"] == 2 * 5 * 8
    assert counts.by_module["blocks.1.attn.qkv"] == 64 + 5 * 128
    assert counts.stages == 0 and other.tokens == ((5, 5), (5, 1))


def test_sparse_attention_over_the_tokens_left_by_hand():
    """keep 0.4: b = 2 of 5 tokens, and ceil(1.2) = 2 of the 3 that are left."""
    counts, _ = agree(tiny(by_attention("evit", 0.5, (1,)), keep=0.4))
    second = counts.attention["blocks.1.attn"]
    assert second == {"prefix": 3 * 2 * 8, "predictor": 2 * 3 * 2 * 2, "kept": 2 * 2 * 2 * (8 - 2), "tail": 0}


# ---- by module ----


@pytest.mark.parametrize("way", ["merge", "evit"])
@pytest.mark.parametrize("keep", ["list", "prefix-last"])
def test_every_mac_of_a_block_belongs_to_a_module(way, keep):
    found = profile(small(ATTENTION["mixed"], KEEPS[keep], way), measure=False)
    rows = {row["name"]: row for row in found.modules}
    for name, row in rows.items():
        children = [r for n, r in rows.items() if n and n.rpartition(".")[0] == name]
        own = row["macs_sparse"] - sum(c["macs_sparse"] for c in children)
        if name.endswith(".attn"):
            assert own == row["mhsa_macs_sparse"] - row["predictor_macs"]
            assert row["mhsa_macs_sparse"] == sum(row[f"{part}_macs"] for part in (*PARTS, "full"))
        elif children:
            assert own == 0, name
    attention = [row for row in found.modules if row["name"].endswith(".attn")]
    assert [row["type"] for row in attention] == ["SparseAttention", "DenseAttention", "SparseAttention"]
    assert sum(row["mhsa_macs_sparse"] for row in attention) == found.mhsa_macs_sparse
    stages = [row["macs_sparse"] for row in found.modules if row["type"] == "Stage"]
    assert sum(stages) == found.stage_macs and len(stages) == (1 if keep == "prefix-last" else 2)


# ---- DeiT-S, and the authors' accounting ----


def deit_small(**config) -> torch.nn.Module:
    return graft.graft(timm.create_model("deit_small_patch16_224").eval(), SparsityConfig(**config))


@pytest.mark.parametrize(
    ("keep", "left", "executed", "authors"),
    [(0.7, (139, 98, 69), 193_177_344, 193_089_792), (0.5, (99, 50, 26), 148_601_088, 149_051_136)],
)
def test_deit_small_with_dense_attention(keep, left, executed, authors):
    model = deit_small(keep="dense", tokens=by_attention("evit", keep))
    found = profile(model, measure=False, count_as="paper")
    a, b, c = left
    assert [before for before, _ in found.tokens] == [197] * 4 + [a] * 3 + [b] * 3 + [c] * 2
    assert [after for _, after in found.tokens] == [197] * 3 + [a] * 3 + [b] * 3 + [c] * 3
    assert found.mhsa_macs_sparse == found.full_macs == executed
    assert found.stage_macs == (197 + a + b) * 384
    assert found.paper == {"mhsa_macs_dense": 357_663_744, "mhsa_macs_sparse": authors}
    assert found.macs_dense == 4_608_338_304


@pytest.fixture(scope="module")
def shape():
    """The attention of DeiT-S's blocks with a keep share."""
    model = timm.create_model("deit_small_patch16_224").eval()
    graft.graft(model, SparsityConfig(keep=1.0))

    def with_keep(keep: float) -> list:
        for module in sparse_modules(model).values():
            module.sparsity = dataclasses.replace(module.sparsity, keeps=(keep,))
        return list(attention_modules(model).values())

    return with_keep


@pytest.mark.parametrize(("left", "published"), [((139, 98, 69), 113.32e6), ((99, 50, 26), 86.59e6)])
def test_tokens_and_keys_together_as_published(shape, left, published):
    a, b, c = left
    found = paper.count(shape(0.25), [197] * 4 + [a] * 3 + [b] * 3 + [c] * 2, 1)
    assert found.sparse == pytest.approx(published, rel=0.015)


@pytest.mark.parametrize(("keep", "budget"), [(0.1, 20), (0.25, 50), (0.5, 99), (0.9, 178)])
def test_keys_alone_are_the_published_line(shape, keep, budget):
    found = paper.count(shape(keep), [197] * 12, 1)
    assert found.sparse == pytest.approx(1_806_336 * budget + 75.26e6, abs=0.08e6)
    assert found.dense == 357_663_744


def test_authors_accounting_by_hand():
    """N0 = 5 and then M = 2 patch tokens; keep 0.6: b = 3, of which 2 are left."""
    dense, sparse = (tiny(by_attention("evit", 0.5, (1,)), keep=keep) for keep in ("dense", 0.6))
    found = [paper.count(list(attention_modules(m).values()), [5, 3], 1) for m in (dense, sparse)]
    assert found[0] == (2 * 8 * 50, 2 * 8 * (25 + 5 + 4))
    predictor = 2 * (5 + 3) * 32 * 8 + 2 * (4 * 5 + 2 * 3) * 5.53
    assert found[1] == (2 * 8 * 50, round(2 * 8 * (5 + 4 * 3 + 5 + 2 * 2) + predictor))


# ---- shown ----


@pytest.fixture(scope="module")
def found() -> Profile:
    return profile(small(ATTENTION["mixed"], KEEPS["list"], "merge"), measure=False, count_as="paper")


def test_json_has_tokens_stages_and_the_authors_figures(found):
    tree = json.loads(json.dumps(found.as_dict()))
    assert tree == found.as_dict()
    assert tree["tokens"] == [[18, 14], [14, 14], [14, 8]]
    assert tree["stage_macs"] == found.stage_macs > 0 and tree["full_macs"] > 0
    assert tree["paper"] == dict(found.paper)
    parts = ("kept_macs", "prefix_macs", "predictor_macs", "tail_macs", "full_macs")
    assert tree["mhsa_macs_sparse"] == sum(tree[part] for part in parts)


def test_table_says_the_whole_model_first_and_all_in_80_columns(found):
    text = shown(tables.profile_table(found), tables.module_tree(found, full=True))
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert text.splitlines()[2].startswith("whole model") and "%" in text.splitlines()[2]
    for words in (
        "choosing tokens",
        "tokens per block 18 14 14, then 8 into the last MLP",
        "authors' accounting",
        "Stage",
    ):
        assert words in text
    assert "dense blocks" in " ".join(text.split())


def test_markdown_has_the_same_lines(found):
    text = report.to_markdown(found)
    assert "tokens per block 18 14 14, then 8 into the last MLP." in text
    assert f"| choosing tokens | 0 | {human(found.stage_macs)} |" in text
    assert "| MHSA, authors' accounting |" in text


def test_models_that_keep_all_tokens_say_nothing_of_them():
    model = graft.graft(
        VisionTransformer(img_size=8, patch_size=2, embed_dim=16, depth=1, num_heads=2), SparsityConfig(rank=4)
    )
    found = profile(model, measure=False)
    assert found.tokens == ((17, 17),) and found.stage_macs == found.full_macs == 0 and found.paper is None
    text = shown(tables.profile_table(found))
    assert "tokens per block" not in text and "choosing" not in text and "authors" not in text
