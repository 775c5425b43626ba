"""Recipes: YAML text and values that were changed, read by `load_recipe` and `--set`; what is accepted is planned."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from fuzz.harness import Case, Fault
from sparsify.fit.finetune import trainable
from sparsify.fit.finetune.plan import TrainingData, make_plan
from sparsify.models.digits import network
from sparsify.nn import graft
from sparsify.processes import Compute
from sparsify.recipe import Recipe, load_recipe, recipe_names, recipe_text, recipe_yaml

SUITE, MANY = 200, 1500

ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    7,
    10**9,
    10**18,
    10**30,
    0.0,
    0.1,
    0.5,
    1.0,
    1.5,
    -0.5,
    1e-300,
    1e300,
    float("inf"),
    float("nan"),
    "",
    "x",
    "yes",
    "none",
    "dense",
    "0.5",
    "1e-4",
    "auto",
    "kl",
    "\x1b[2J",
    "\ud800",
    "a" * 5000,
    [],
    [0.5],
    [1, 2],
    [0.5, 0.5],
    [1.0, 0.1],
    [[1, 2]],
    [[]],
    [0.5] * 4,
    [True],
    {},
    {"a": 1},
    {"keep": 0.5},
    {"start": 0.5},
)
TOKENS = (
    "!!int x",
    "!!float x",
    "!!bool x",
    "!!timestamp x",
    "!!python/object:os.system x",
    "!x",
    "2024-13-45",
    "2024-02-30 10:10:10",
    "9" * 5001,
    "[" * 600,
    "- " * 600,
    "{a: " * 600,
    "&a [*a]",
    "*a",
    "&a",
    "<<: *a",
    "<<: {seed: 3}",
    "? [a]",
    "'",
    '"',
    "|\n x",
    ">5",
    "%YAML 9.9",
    "---",
    "...",
    "\t",
    "\0",
    "\x1b",
    "\ufeff",
    "\u2028",
    "\x85",
    "#",
    ": ",
    "- ",
    "{",
    "}",
    "[",
    "]",
    ",",
    "@",
    "`",
    '"\\U00110000"',
    '"\\xzz"',
    ".inf",
    ".nan",
    "~",
    "yes",
    "0x10",
    "012",
    "1:30",
    "1e999",
    "seed: 1\nseed: 2",
    "a: &a [1, 1, 1]\n"
    + "".join(f"{y}: &{y} [{', '.join([f'*{x}'] * 9)}]\n" for x, y in zip("abcdef", "bcdefg", strict=True)),
)


def cases(seed: int, folder: Path) -> Iterator[Case]:
    """Endless; see `fuzz.harness`."""
    rng, path = random.Random(seed), folder / "drawn.yaml"
    ways: tuple[tuple[str, Callable[[random.Random], str]], ...] = (("text", _text), ("values", _values))
    while True:
        kind, draw = rng.choice(ways)
        text = draw(rng)
        yield Case(kind, repr(text[:60]), lambda text=text: _read(path, text))
        base = rng.choice(recipe_names())
        assignment = _assignment(rng, base)
        yield Case("--set", assignment[:80], lambda base=base, a=assignment: _planned(load_recipe(base).set([a])))


def _text(rng: random.Random) -> str:
    """The text of a recipe, changed in a few places."""
    text = recipe_text(rng.choice(recipe_names()))
    for _ in range(rng.randint(1, 4)):
        at, until = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
        until = min(until, at + rng.choice((0, 1, 5, 80, 5000)))
        piece = rng.choice((rng.choice(TOKENS), rng.choice(TOKENS), chr(rng.randrange(0x2100)), text[at:until] * 2, ""))
        text = text[:at] + piece + text[until:]
    return text


def _values(rng: random.Random) -> str:
    """A whole recipe, written out, with other values at a few places."""
    tree = load_recipe(rng.choice(recipe_names())).model_dump(mode="json")
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        *inside, last = rng.choice(list(_places(tree)))
        node = _at(tree, inside)
        if rng.random() < 0.1 and isinstance(node, dict):
            node[rng.choice(("", "seed", "x" * 300, 3, None, "keep"))] = rng.choice(ODD)
        elif rng.random() < 0.1:
            del node[last]
        else:
            node[last] = rng.choice(ODD) if rng.random() < 0.4 else _near(rng, node[last])
    return yaml.dump(tree, sort_keys=False, Dumper=yaml.SafeDumper)


def _near(rng: random.Random, value: Any) -> Any:
    """A value of the same type."""
    if isinstance(value, bool) or value is None:
        return rng.choice((True, False, None, 1, 0.5, "x"))
    if isinstance(value, int | float):
        return value * rng.choice((-1, 0, 0.5, 1.5, 2, 10, 1e6)) + rng.choice((0, 1, 1e-9))
    return rng.choice((value * 2, value[:1])) if isinstance(value, str | list) else {}


def _places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*path, key)
        yield from _places(value, (*path, key))


def _at(tree: Any, place: Iterable[Any]) -> Any:
    for key in place:
        tree = tree[key]
    return tree


def _assignment(rng: random.Random, base: str) -> str:
    tree = load_recipe(base).model_dump(mode="json")
    place = rng.choice(list(_places(tree)))
    path = ".".join(map(str, place))
    if rng.random() < 0.4:
        return f"{path}={_near(rng, _at(tree, place))}"
    if rng.random() < 0.2:
        path = rng.choice(
            (path + ".x", path[:-1], "", ".", "stages.-1.epochs", "stages." + "9" * 5000, path * 50, "\x1b")
        )
    value = rng.choice(TOKENS) if rng.random() < 0.5 else str(rng.choice(ODD))
    return f"{path}{rng.choice(('=', '=', '=', '', '=='))}{value}"


def _read(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    chosen = load_recipe(str(path))
    path.write_text(recipe_yaml(chosen), encoding="utf-8")
    if load_recipe(str(path)) != chosen:
        raise Fault("what is written is not what is read")
    _planned(chosen)


def _planned(recipe: Recipe) -> None:
    """All that a conversion of the digits does with a recipe before it computes, and an image of every stage."""
    model = _digits()
    graft.plans_of(model, recipe.sparsity)
    if not recipe.stages:
        return
    plan = make_plan(model, recipe, TrainingData("digits"), Compute(), "")
    for planned in plan.stages:
        optimiser = trainable.make_optimiser(model, planned.stage)
        if planned.stage.batch_size <= 32:
            next(planned.batches.from_step(0))
        trainable.lr_schedule(optimiser, planned.stage, planned.steps, planned.batches.steps_per_epoch).step_update(1)


@cache
def _digits() -> nn.Module:
    return network.build()
