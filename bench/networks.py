"""Networks to time, minimal and without their heads' training parts: values are random, shapes are real."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrcompress import rewrite
from lrcompress.types import LowRank


class Residual(nn.Module):
    """Convolutions with batch norms, and a shortcut (He et al. 2016, option B)."""

    def __init__(self, sizes: Sequence[int], kernels: Sequence[int], stride: int) -> None:
        super().__init__()
        strides = [stride if k == 3 and i == kernels.index(3) else 1 for i, k in enumerate(kernels)]
        self.body = nn.Sequential()
        for i, (k, s) in enumerate(zip(kernels, strides, strict=True)):
            self.body.append(nn.Conv2d(sizes[i], sizes[i + 1], k, s, k // 2, bias=False))
            self.body.append(nn.BatchNorm2d(sizes[i + 1]))
            if i + 1 < len(kernels):
                self.body.append(nn.ReLU())
        self.short: nn.Module = nn.Identity()
        if stride > 1 or sizes[0] != sizes[-1]:
            conv = nn.Conv2d(sizes[0], sizes[-1], 1, stride, bias=False)
            self.short = nn.Sequential(conv, nn.BatchNorm2d(sizes[-1]))

    def forward(self, x: Tensor) -> Tensor:
        """Add body and shortcut."""
        return F.relu(self.body(x) + self.short(x))


def resnet(depths: Sequence[int], bottleneck: bool) -> nn.Sequential:
    """Return ResNet-18 (2, 2, 2, 2) or ResNet-50 (3, 4, 6, 3 with bottlenecks) for 224 x 224 images."""
    model = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    model.append(nn.MaxPool2d(3, 2, 1))
    channels = 64
    for stage, depth in enumerate(depths):
        width = 64 << stage
        for block in range(depth):
            stride = 2 if stage and not block else 1
            out = 4 * width if bottleneck else width
            sizes = (channels, width, width, out) if bottleneck else (channels, width, out)
            model.append(Residual(sizes, (1, 3, 1) if bottleneck else (3, 3), stride))
            channels = out
    return model.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)])


class Attention(nn.Module):
    """Self-attention with separate projections."""

    def __init__(self, width: int, heads: int, bias: bool, causal: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias) for _ in range(4))
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each sample."""
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


class VitBlock(nn.Module):
    """One block of ViT-S/16 (Dosovitskiy et al. 2021; Touvron et al. 2021): 197 tokens of 384."""

    def __init__(self, width: int = 384, heads: int = 6) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, bias=True, causal=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Attend, then transform each token."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class LlamaBlock(nn.Module):
    """One block of Llama-7B (Touvron et al. 2023), without rotary embedding and cache: tokens of 4096."""

    def __init__(self, width: int = 4096, inner: int = 11008, heads: int = 32) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = Attention(width, heads, bias=False, causal=True)
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Attend, then transform each token."""
        x = x + self.attention(self.norm1(x))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def halved(model: nn.Module) -> nn.Module:
    """Copy a model with each layer's weight as two random factors, one group, at half of its MACs."""
    layers, _ = rewrite.survey(model)
    new = {}
    for name, module in layers.items():
        layer = rewrite.describe(name, module)
        rank = layer.params // (2 * sum(layer.factor_sizes(0, 1)))
        rank -= rank % 8 if rank >= 16 else 0
        if rank:
            new[name] = rewrite.like(module, LowRank(0, 1, rank))
    return rewrite.replaced(model, new)


def networks(device: str) -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    """Return each network and its inputs of a few sizes; on the CPU the large ones run on little."""
    few = device == "cpu"
    images = {n: torch.randn(n, 3, 224, 224) for n in ((1,) if few else (1, 64))}
    tokens = [torch.randn(1, n, 4096) for n in ((1, 16) if few else (1, 16, 512))]
    return {
        "ResNet-18": (resnet((2, 2, 2, 2), bottleneck=False), tuple(images.values())),
        "ResNet-50": (resnet((3, 4, 6, 3), bottleneck=True), tuple(images.values())),
        "ViT-S block": (VitBlock(), tuple(torch.randn(n, 197, 384) for n in ((1, 8) if few else (1, 64)))),
        "Llama-7B block": (LlamaBlock(), tuple(tokens)),
    }
