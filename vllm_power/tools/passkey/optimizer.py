"""Muon for the matrices inside the layers and AdamW for the other weights, as one optimizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vllm_power.tools.passkey.settings import Settings


class MuonAndAdamW(torch.optim.Optimizer):
    """torch's two optimizers. Schedulers and the Trainer see one, with the groups of both.

    student: all that is trained; layers: the part of it whose matrices Muon moves. fused: whether AdamW runs as one
    kernel.
    """

    def __init__(self, student: nn.Module, layers: nn.Module, settings: Settings, fused: bool) -> None:
        matrices = [weight for weight in layers.parameters() if weight.dim() == 2]
        inside = {id(weight) for weight in matrices}
        rest = [weight for weight in student.parameters() if id(weight) not in inside]
        self.parts: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(matrices, lr=settings.muon_lr, weight_decay=settings.weight_decay),
            torch.optim.AdamW(rest, lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused),
        )
        super().__init__([{"params": [*matrices, *rest]}], {})
        self._share_groups()

    def _share_groups(self) -> None:
        """What a scheduler writes into a group must be what the part reads."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of both. closure: not supported, None."""
        assert closure is None
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The states of both."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From :meth:`state_dict`."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()
