"""The networks whose first files are in tests/golden, and an input of each."""

import torch
from torch import Tensor, nn


class Tied(nn.Module):
    """A convolution, a batch norm, tied weights, a frozen layer, and buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.hidden = nn.Linear(8 * 4, 12)
        self.head = nn.Linear(12, 9, bias=False)
        self.embedding = nn.Embedding(9, 12)
        self.head.weight = self.embedding.weight
        self.hidden.requires_grad_(False)
        self.register_buffer("scale", torch.full((12,), 2.0))
        self.register_buffer("shift", torch.arange(12.0), persistent=False)
        self.register_buffer("steps", torch.tensor(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(self.norm(self.conv(x)).flatten(1))
        return self.head(h * self.scale + self.shift * self.steps)


class Narrowed(nn.Sequential):
    """Neurons, channels and network inputs that can go."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6)
        )


def input_of(model: nn.Module) -> Tensor:
    """Return the example input whose outputs are stored."""
    shape = (2, 4, 2, 2) if isinstance(model, Tied) else (2, 12)
    return torch.linspace(-1, 1, 2 * 4 * 4 if len(shape) == 4 else 24).reshape(shape)
