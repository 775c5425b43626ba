"""One pass of teacher and student: which losses reach which parameters, and which images and tokens count."""

import copy

import pytest
import torch

from helpers.families import build, images
from sparsify.config import SparsityConfig
from sparsify.errors import UsageError
from sparsify.fit.finetune import trainable
from sparsify.fit.finetune.objective import Objective, Teacher, _outputs, _present
from sparsify.fit.finetune.plan import check_stage
from sparsify.nn import graft
from sparsify.nn.attention import sparse_modules
from sparsify.nn.folding import unfold
from sparsify.recipe import Stage

SMALL = dict(embed_dim=48, num_heads=3, patches=4)
HEAD = dict(predictor="head-lowrank", rank=4, spread="none", keep=0.3)
TOKEN = dict(predictor="token-lowrank", rank=5, keep=0.3, tail="none", token_lowrank=dict(channels=4, coef_topk=3))
OUTPUT = {"classification", "logits", "tokens", "features"}


def pair(sparsity, family="deit", random=True, **more):
    """A dense model and a sparse one over a copy of its weights, with predictors drawn at random."""
    dense = build(family, **{**SMALL, **more})
    student = graft.graft(copy.deepcopy(dense), SparsityConfig(**sparsity))
    unfold(student)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in sparse_modules(student).values() if random else ():
            for p in module.predictor.parameters():
                p += 0.3 * torch.randn(p.shape, generator=generator)
    return dense, student


def stage(losses, train="backbone", attention="sparse", **more):
    return Stage.model_construct(**Stage(losses={"logits": 1, "attention": 1}, steps=1, **more).__dict__ | {
        "losses": Stage(losses={"logits": 1, "attention": 1} | losses, steps=1).losses.model_copy(
            update={"logits": 0.0, "attention": 0.0} | losses
        ),
        "train": train, "attention": attention,
    })  # fmt: skip


def taught(dense, student, s, x=None):
    """The losses by name and the parameters that a stage moves; gradients are on the student."""
    trainable.select_parameters(student, s)
    x = images(dense, 4) if x is None else x
    classes = max(1, dense.num_classes)
    y = torch.eye(classes)[torch.arange(len(x)) % classes]
    said = Teacher(dense, s.losses, s.losses.attention > 0 and s.losses.attention_target == "teacher")(x)
    parts = Objective(student.train(), s)(x, y, said)
    if any(value.requires_grad for value in parts.values()):
        sum(parts.values()).backward()
    return parts


def touched(student):
    return {name for name, p in student.named_parameters() if p.grad is not None and bool(p.grad.any())}


def inside(student):
    """Names of the predictors' parameters, and of the others."""
    names = {name for name, _ in student.named_parameters()}
    predictors = {name for name in names if ".predictor." in name}
    return predictors, names - predictors


@pytest.mark.parametrize("attention", ["sparse", "dense"])
@pytest.mark.parametrize("sparsity", [HEAD, TOKEN], ids=["head", "token"])
@pytest.mark.parametrize("loss", sorted(OUTPUT))
@pytest.mark.parametrize("train", ["backbone", "all"])
def test_losses_of_the_output_reach_the_backbone_and_no_predictor(sparsity, attention, loss, train):
    dense, student = pair(sparsity)
    before = copy.deepcopy(dense.state_dict())
    with torch.no_grad():  # a student without sparsity says what the teacher says, with no gradient left
        student.norm.weight += 0.1 * torch.rand_like(student.norm.weight)
        student.blocks[0].mlp.fc2.weight *= 1.2
    parts = taught(dense, student, stage({loss: 1.0}, train, attention))
    assert set(parts) == {loss} and parts[loss] > 0
    unread = {"tokens": {"head.weight", "head.bias"}}.get(loss, set())
    if loss == "features":
        unread = {"head.weight", "head.bias", "norm.weight", "norm.bias"}
    assert touched(student) == inside(student)[1] - unread
    assert all(torch.equal(t, before[name]) for name, t in dense.state_dict().items())
    assert all(p.grad is None for p in dense.parameters())


@pytest.mark.parametrize("attention", ["sparse", "dense"])
@pytest.mark.parametrize(
    "losses",
    [
        {"attention": 1.0},
        {"attention": 1.0, "attention_form": "kl"},
        {"mass": 1.0},
        {"attention": 0.1, "attention_blocks": "rms", "mass": 1.0},
    ],
    ids=["squares", "kl", "mass", "both"],
)
@pytest.mark.parametrize("target", ["teacher", "self"])
@pytest.mark.parametrize("sparsity", [HEAD, TOKEN], ids=["head", "token"])
def test_predictors_alone_learn_from_attention(sparsity, attention, losses, target):
    dense, student = pair(sparsity)
    wanted = losses | {"attention_target": target}
    parts = taught(dense, student, stage(wanted, "predictors", attention))
    predictors, backbone = inside(student)
    assert set(parts) == {"attention", "mass"} & set(losses)
    assert all(part.isfinite() and part > 0 for part in parts.values())
    assert touched(student) == predictors
    assert all(p.grad is None for name, p in student.named_parameters() if name in backbone)


def test_attention_reaches_what_queries_and_keys_are_made_of_where_all_is_trained():
    for target in ("teacher", "self"):
        dense, student = pair(HEAD)
        taught(dense, student, stage({"attention": 1.0, "attention_target": target}, "all"))
        found, (predictors, backbone) = touched(student), inside(student)
        last = {f"blocks.1.{name}" for name in ("attn.proj.weight", "attn.proj.bias")}
        last |= {name for name in backbone if name.startswith(("blocks.1.norm2", "blocks.1.mlp", "norm.", "head."))}
        assert found == (predictors | backbone) - last
        values = student.blocks[1].attn.qkv.weight.grad.chunk(3)[2]
        assert not values.any()  # v has no part in which keys are chosen


def test_the_predictors_gradient_is_the_same_with_and_without_losses_of_the_output():
    gradients = []
    for losses in ({"attention": 1.0}, {"attention": 1.0, "logits": 1.0, "tokens": 1.0, "classification": 1.0}):
        dense, student = pair(TOKEN)
        taught(dense, student, stage(losses, "all"))
        gradients.append({n: p.grad for n, p in student.named_parameters() if ".predictor." in n})
    assert all(torch.equal(g, gradients[1][name]) for name, g in gradients[0].items())


def test_basis_l1_is_the_sum_of_the_basis():
    dense, student = pair(TOKEN)
    parts = taught(dense, student, stage({"basis_l1": 0.5}, "predictors", "dense"))
    bases = [m.predictor.w_up.detach() for m in sparse_modules(student).values()]
    assert float(parts["basis_l1"].detach()) == pytest.approx(0.5 * float(sum(w.abs().sum() for w in bases)), rel=1e-5)
    assert touched(student) == {f"blocks.{i}.attn.predictor.w_up" for i in range(2)}


def test_weights_multiply_the_losses():
    wanted = {"classification": 1.0, "logits": 1.0, "tokens": 1.0, "features": 1.0, "attention": 1.0, "mass": 1.0}
    once = taught(*pair(TOKEN), stage(wanted, "all"))
    other = {name: (2.0, 0.5, 0.25, 4.0, 0.01, 3.0)[i] for i, name in enumerate(wanted)}
    weighted = taught(*pair(TOKEN), stage(other, "all"))
    for name, weight in other.items():
        assert float(weighted[name].detach()) == pytest.approx(weight * float(once[name].detach()), rel=1e-5)


@pytest.mark.parametrize("train", ["predictors", "attention", "backbone", "all"])
def test_an_optimiser_step_moves_what_the_stage_names_and_nothing_else(train):
    dense, student = pair(TOKEN)
    losses = {"attention": 1.0} if train == "predictors" else {"logits": 1.0, "attention": 1.0}
    s = stage(losses, train, optimiser=dict(lr=0.01, weight_decay=0.3))
    parameters, teacher = copy.deepcopy(student.state_dict()), copy.deepcopy(dense.state_dict())
    named = trainable.select_parameters(student, s)
    optimizer = trainable.make_optimiser(student, s)
    taught(dense, student, s)
    optimizer.step()
    moved = {name for name, t in student.state_dict().items() if not torch.equal(t, parameters[name])}
    predictors, backbone = inside(student)
    own = {name for name in backbone if ".attn." in name}
    assert len(own) == 8  # weight and bias of qkv and proj, two blocks
    of = {"predictors": predictors, "attention": own, "backbone": backbone, "all": predictors | backbone}
    assert set(named) == of[train]
    assert moved == touched(student) and moved <= set(named) and moved >= set(named) - {"head.weight", "head.bias"}
    assert all(torch.equal(t, teacher[name]) for name, t in dense.state_dict().items())


def test_folded_predictors_have_nothing_to_train():
    student = graft.graft(build("deit", **SMALL), SparsityConfig(**HEAD))
    with pytest.raises(UsageError, match="trains nothing"):
        trainable.select_parameters(student, stage({"attention": 1.0}, "predictors"))


@pytest.mark.parametrize("attention", ["sparse", "dense"])
@pytest.mark.parametrize("family", ["deit", "deit-distilled", "vit-avg-pool", "dinov2-registers", "qk-norm"])
def test_a_student_that_keeps_all_has_nothing_to_learn(family, attention):
    whole = dict(HEAD, keep=1.0, tail="none")
    dense, student = pair(whole, family, random=False)
    parts = taught(dense, student, stage({"logits": 1.0, "tokens": 1.0, "features": 1.0}, "backbone", attention))
    assert all(abs(float(value)) < 1e-6 for value in parts.values()), parts


def test_a_model_without_a_head_learns_from_its_pooled_features():
    dense, student = pair(HEAD, num_classes=0)
    whole = pair(dict(HEAD, keep=1.0, tail="none"), random=False, num_classes=0)
    assert float(taught(*whole, stage({"logits": 1.0}))["logits"].detach()) < 1e-6
    parts = taught(dense, student, stage({"logits": 1.0, "tokens": 0.5}))
    assert parts["logits"] > 0 and touched(student) == inside(student)[1]
    x = images(dense, 4)
    with torch.no_grad():
        t, s = dense(x), student.train()(x)
    assert float(parts["logits"]) == pytest.approx(float(((t - s) ** 2).sum(1).div((t**2).sum(1)).mean()), rel=1e-4)
    with pytest.raises(UsageError, match="classification needs a model with classes"):
        check_stage(Stage(losses={"classification": 1}, steps=1), SparsityConfig(), 0)


LEAVING = {
    "merge": dict(way="merge", keep=0.5, stages=(1, 2)),
    "evit": dict(way="evit", keep=0.5, stages=(1, 2)),
    "evit-fused": dict(way="evit-fused", keep=0.5, stages=(1,)),
    "merge, none at the end": dict(way="merge", keep=(0.6, 0.0)),
    "evit, none at the end": dict(way="evit", keep=(0.6, 0.0)),
}
EVERY = {"classification": 1.0, "logits": 1.0, "tokens": 1.0, "features": 1.0}


@pytest.mark.parametrize("way", LEAVING)
@pytest.mark.parametrize("sparsity", [HEAD, TOKEN, dict(keep="dense")], ids=["head", "token", "dense"])
def test_losses_are_finite_where_tokens_leave(way, sparsity):
    dense, student = pair({**sparsity, "tokens": LEAVING[way]})
    parts = taught(dense, student, stage(EVERY))
    assert all(value.isfinite() for value in parts.values())
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    assert len(gradients) > 20 and all(g.isfinite().all() for g in gradients)
    assert {"norm.weight", "head.weight", "blocks.1.attn.qkv.weight", "patch_embed.proj.weight"} <= touched(student)


@pytest.mark.parametrize("way", ["evit", "evit, none at the end"])
def test_patches_that_were_dropped_do_not_count(way):
    dense, student = pair({**HEAD, "tokens": LEAVING[way]})
    s = stage({"tokens": 1.0, "features": 1.0})
    x = images(dense, 4)
    with torch.no_grad():
        own, tokens = _outputs(student.train(), x, s.losses, False)
        present = _present(tokens)
        assert present.shape == (4, 16) and int(present.sum(1)[0]) == (0 if "none" in way else 4)
        said = Teacher(dense, s.losses, False)(x)
        clean = Objective(student, s)(x, None, said)
        spoiled = torch.where(present[..., None], said.patch, 1e3)
        again = Objective(student, s)(x, None, said._replace(patch=spoiled))
    assert float(again["tokens"]) == pytest.approx(float(clean["tokens"]), rel=1e-6)
    if "none" in way:
        assert float(clean["tokens"]) == 0
    shares = []  # of each block: error of the patches that are there, and of the prefix, beside the teacher's squares
    for (t, _), (z, there) in zip(said.blocks, own.blocks, strict=True):
        error, size = (t - z).square().mean(2), t.square().mean(2)
        patches = (error[:, 1:] * there).sum(1) / there.sum(1).clamp_min(1) / size[:, 1:].mean(1)
        shares.append((patches / 2 + error[:, 0] / size[:, 0] / 2).mean())
    assert float(clean["features"]) == pytest.approx(float(torch.stack(shares).mean()), rel=1e-5)


def test_with_dense_attention_all_tokens_stay():
    dense, student = pair({**HEAD, "tokens": LEAVING["evit, none at the end"]}, random=False)
    parts = taught(dense, student, stage({**EVERY, "attention": 1.0}, "all", "dense"))
    assert abs(float(parts["tokens"])) < 1e-6 and abs(float(parts["logits"])) < 1e-6 and parts["attention"] > 0
    assert student(images(dense)).shape == (2, 10)  # the student itself lets them leave still
    assert type(student).__name__ == "FewerTokens"


@pytest.mark.parametrize("family", ["deit", "qk-norm"])
@pytest.mark.parametrize("tokens", [None, LEAVING["merge"]], ids=["all", "merge"])
def test_recomputed_blocks_give_the_same_gradients(family, tokens):
    found = []
    losses = {**EVERY, "attention": 0.0 if tokens else 1.0}
    for recompute in (False, True):
        dense, student = pair({**HEAD, "tokens": tokens}, family)
        student.set_grad_checkpointing(recompute)
        parts = taught(dense, student, stage(losses, "all"))
        found.append(({n: p.grad for n, p in student.named_parameters() if p.grad is not None}, parts))
    (plain, one), (again, other) = found
    assert plain.keys() == again.keys() and one.keys() == other.keys()
    assert all(torch.allclose(plain[name], again[name], rtol=1e-4, atol=1e-6) for name in plain)


def test_attention_is_compared_in_float32():
    s = stage({"attention": 1.0}, "predictors", "dense")
    plain = taught(*pair(TOKEN), s)["attention"]
    dense, student = pair(TOKEN)
    x = images(dense, 4)
    rounded = []
    matmul = torch.Tensor.__matmul__
    with torch.autocast("cpu", torch.bfloat16):
        said = Teacher(dense, s.losses, True)(x)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "__matmul__", lambda a, b: rounded.append(matmul(a, b).dtype) or matmul(a, b))
            found = Objective(student, s)(x, None, said)["attention"]
    assert found.dtype == torch.float32 and set(rounded) == {torch.float32}
    assert float(found) == pytest.approx(float(plain), rel=0.05)


@pytest.mark.parametrize("family", ["dinov3", "beit-both-biases"])
def test_attention_is_compared_where_its_product_meets_with_places_and_biases(family):
    """A predictor of all coordinates reconstructs the attention itself: no loss, for teacher and student alike."""
    dense, student = pair(HEAD | dict(rank=16, keep=1.0), family, random=False, patches=6, embed_dim=48)
    parts = taught(dense, student, stage({"attention": 1.0}, train="all"))
    assert parts["attention"].item() < 1e-5
    dense, student = pair(HEAD, family, patches=6)
    parts = taught(dense, student, stage({"attention": 1.0}, train="all"))
    assert parts["attention"].item() > 1e-3 and inside(student)[0] <= touched(student)
    assert not any(type(m).__name__ == "DenseAttention" for m in dense.modules())  # the teacher is timm's again
