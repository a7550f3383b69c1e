"""A probe that teaches blocks to pass on what was told far before them. It is discarded after the training.

Where no row sees everything, a fact reaches a later question through the blocks between them, and these do not know
what will be asked. From the few answers alone they learn slowly to pass it on. So each block from the fact to the
question is asked for the fact's value. The probe is weak: for each character a query picks tokens of the block, and a
linear map guesses the character from their hidden states. The block with the fact shows what to pick, the blocks after
it learn to hold the same.

The hidden states are those at two thirds of the layers: the layers after it are free to read what was passed on, and to
predict the text.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vllm_power.tools.adapt.linear_loss import IGNORED

CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz"
END = len(CHARACTERS)  # the class after a value's last character
LONGEST = 8  # characters of a value


def fits(value: str) -> bool:
    """Whether the probe can ask for ``value``."""
    return len(value) <= LONGEST and set(value.lower()) <= set(CHARACTERS)


def classes(value: str) -> np.ndarray:
    """int16 [LONGEST]: the characters of a ``value`` that fits, in any case, and END where there are none."""
    found = [CHARACTERS.index(character) for character in value.lower()]
    return np.asarray(found + [END] * (LONGEST - len(found)), dtype=np.int16)


class Relay(nn.Module):
    """The probe of a model with hidden states of ``width``, for blocks of ``block_size`` tokens.

    sums: float [2], of the last forward pass: the result of :meth:`forward`, and the tokens of the blocks that were
    asked. It stays on the device.
    """

    def __init__(self, width: int, block_size: int) -> None:
        super().__init__()
        self.block_size = block_size
        self.pick = nn.Parameter(torch.zeros(LONGEST, width))
        self.guess = nn.Parameter(torch.zeros(LONGEST, width, END + 1))
        self.seen: dict[str, torch.Tensor] = {}
        self.sums = torch.zeros(2)

    def watch(self, model: Any) -> None:
        """Take the hidden states of each forward pass of ``model``, after two thirds of its layers."""
        layers = model.get_decoder().layers

        def note(layer: nn.Module, given: Any, output: Any) -> None:
            self.seen["states"] = output if isinstance(output, torch.Tensor) else output[0]

        layers[2 * len(layers) // 3 - 1].register_forward_hook(note)

    def forward(self, relayed: torch.Tensor) -> torch.Tensor:
        """The loss of the last forward pass: nats per character, summed over the tokens of the blocks that are asked.

        relayed: int16 [rows, length, LONGEST], from :func:`classes`, IGNORED at tokens that do not know the fact. A
        block is asked what its last token is asked.
        """
        states = self.seen["states"]
        states = F.rms_norm(states.float(), states.shape[-1:])
        blocks = relayed.shape[1] // self.block_size
        tokens = states[:, : blocks * self.block_size].unflatten(1, (blocks, self.block_size))
        shares = torch.einsum("rbtw,cw->rbtc", tokens, self.pick).float().softmax(2)
        picked = torch.einsum("rbtc,rbtw->rbcw", shares, tokens)
        guesses = torch.einsum("rbcw,cwk->rbck", picked, self.guess).float()
        wanted = relayed[:, self.block_size - 1 :: self.block_size].long()
        total = F.cross_entropy(
            guesses.flatten(0, 2), wanted.flatten(), ignore_index=IGNORED, reduction="sum"
        ) * (self.block_size / LONGEST)
        self.sums = torch.stack((total.detach(), self.block_size * (wanted[..., 0] != IGNORED).sum()))
        return total

    def summary(self) -> str:
        """The loss of the last forward pass, for people."""
        total, asked = self.sums.tolist()
        return f"{total / asked:.2f} nats" if asked else "nothing asked"
