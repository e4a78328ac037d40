"""Losses that parts of a model leave beside their output, such as the load balance of a router."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from polyhead.checks import given
from polyhead.errors import ConfigError, ShapeError

__all__ = ["AuxiliaryLosses", "auxiliary_losses"]


class AuxiliaryLosses(nn.Module):
    """Where a module leaves the auxiliary losses of its latest forward pass.

    Hold one as a submodule; in `forward` call `forget`, then `record`. A loss that is recorded again under
    the same name takes the earlier one's place. Losses are not part of the state: copying and pickling leave
    them behind.
    """

    def __init__(self) -> None:
        super().__init__()
        self.latest: dict[str, Tensor] = {}

    def record(self, name: str, loss: Tensor) -> None:
        """Keep the scalar `loss` under `name` until the next forward pass."""
        if not isinstance(loss, Tensor):
            raise ConfigError(f"auxiliary loss {name!r} must be a scalar tensor; got {given(loss)}")
        if loss.ndim:
            raise ShapeError(f"auxiliary loss {name!r} must be a scalar; got shape {tuple(loss.shape)}")
        self.latest[name] = loss

    def forget(self) -> None:
        """Let go of the losses of the forward pass before."""
        if self.latest:
            self.latest.clear()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"latest": {}}


def auxiliary_losses(model: nn.Module) -> dict[str, Tensor]:
    """The auxiliary losses of the latest forward pass of `model`, by the path of the module and a name.

    Add `sum(auxiliary_losses(model).values())` to the loss to train with them; weights are those that the
    mechanisms were configured with. A model without any gives an empty dict.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch module; got {given(model)}")
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryLosses):
            owner = path.rpartition(".")[0]
            for name, loss in module.latest.items():
                found[f"{owner}.{name}" if owner else name] = loss
    return found
