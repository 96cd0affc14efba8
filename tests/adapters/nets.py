"""Networks for the tests of the PyTorch adapter, in a module of its own: a worker process imports them by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn


def mlp() -> nn.Module:
    """A float32 matrix to three numbers."""
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def regularised() -> nn.Module:
    """A network whose training mode answers at random, and by its batch-mates."""
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 2))


def double() -> nn.Module:
    return mlp().double()


def conv() -> nn.Module:
    """Images of 3 x 32 x 32."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5)
    )


class Text(nn.Module):
    """Token ids and a mask, by name, in another order than a caller may give them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, mask: torch.Tensor, ids: torch.Tensor, *, scale: float = 1.0) -> Any:
        total = (self.embed(ids) * mask.unsqueeze(-1)).sum(1)
        return self.head(total / mask.sum(1, keepdim=True).clamp(min=1.0)) * scale


class Ids(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 4)

    def forward(self, ids: torch.Tensor) -> Any:
        return self.embed(ids).sum(1)


class Flags(nn.Module):
    def forward(self, flags: torch.Tensor) -> Any:
        return flags.logical_not(), flags.sum(1)


class Heads(nn.Module):
    """Several outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.first = nn.Linear(8, 1)
        self.second = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> Any:
        h = torch.tanh(self.body(x))
        return {"score": self.first(h).squeeze(-1), "logits": self.second(h)}


class Tied(nn.Module):
    """Two layers that share one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.there = nn.Linear(6, 6, bias=False)
        self.back = nn.Linear(6, 6, bias=False)
        self.back.weight = self.there.weight

    def forward(self, x: torch.Tensor) -> Any:
        return self.back(torch.relu(self.there(x)))


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


class Branching(nn.Module):
    """Decides by the values of its input, which no tracing can follow."""

    def forward(self, x: torch.Tensor) -> Any:
        return x * 2 if x.sum() > 0 else x * 3


class OfOneSize(nn.Module):
    """Works for two rows only once it was traced."""

    def forward(self, x: torch.Tensor) -> Any:
        return x.reshape(2, -1) * 2


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(6, 5, batch_first=True)

    def forward(self, steps: torch.Tensor) -> Any:
        return self.gru(steps)[0][:, -1]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)

    def forward(self, steps: torch.Tensor) -> Any:
        with torch.no_grad():
            return self.layer(steps).mean(1)


class Everything(nn.Module):
    """What an exported program can hold beside plain layers: blocks, constants, buffers, symbolic sizes."""

    offset: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("offset", torch.ones(6))
        self.constant = torch.arange(6.0)

    def forward(self, x: torch.Tensor) -> Any:
        with torch.no_grad():
            frozen = self.linear(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = self.linear(x)
        chosen = torch.cond(x.shape[0] > 3, lambda x: x + 1.0, lambda x: x * 2.0, (x,))
        halves = x.reshape(x.shape[0] * 2, 3).sum(1).reshape(x.shape[0], 2)
        outer = torch.einsum("bi,bj->bij", x, x + self.constant + torch.tensor([1.0]) + self.offset)
        zeros = torch.zeros(x.shape[0] + 1, device=x.device)[:-1].clamp(max=float("inf"))
        sized = nn.functional.interpolate(x[:, None], size=12, mode="linear").flatten(1) * (x.shape[0] // 2 + 1)
        return frozen, half, chosen, halves, outer, zeros, sized


def no_network() -> str:
    return "no network"


def fails() -> nn.Module:
    raise RuntimeError("out of order")


def other() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3), nn.Linear(3, 3))
