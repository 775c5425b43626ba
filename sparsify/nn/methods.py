"""Methods that one model has as attributes, because its class stays timm's."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, cast

from torch import nn


class ModelMethod:
    """A method of one model, called with its arguments.

    It holds the model weakly: a bound method would keep the model, and its memory, until the garbage collector runs. A copy
    of the model has the method of the copy.

    Args:
        model: whose attribute it becomes; None: of one that is gone.
        state: what a subclass remembers.
    """

    def __init__(self, model: nn.Module | None, *state: Any) -> None:
        self._model: Callable[[], nn.Module | None] = (lambda: None) if model is None else weakref.ref(model)
        self.state = state

    @property
    def model(self) -> Any:
        """The model; `ReferenceError` where it is gone."""
        model = self._model()
        if model is None:
            raise ReferenceError("the model of this method is gone: of a shallow copy, call it on a deep one")
        return model

    def resized(self, factor: float) -> None:
        """The model has another image size, for which `factor` times as many cells stand for its keys."""

    def __reduce__(self) -> tuple[type[ModelMethod], tuple[Any, ...]]:
        return type(self), (self._model(), *self.state)


def of(model: nn.Module) -> dict[str, ModelMethod]:
    """The methods that a model has as attributes, by name."""
    return {name: value for name, value in model.__dict__.items() if isinstance(value, ModelMethod)}


def renew(model: nn.Module) -> nn.Module:
    """The model, a shallow copy, with methods of its own."""
    for name, method in of(model).items():
        setattr(model, name, cast(Any, type(method))(model, *method.state))
    return model
