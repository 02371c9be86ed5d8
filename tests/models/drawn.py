"""What the tests of the networks share: inputs from a seed, and networks whose zeroed layers are drawn too."""

import torch
from torch import Tensor, nn


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def awake(make, **options):
    """`make(**options)`, with every matrix drawn, so that every path reaches the output."""
    torch.manual_seed(0)
    network = make(**options).eval()
    for name, parameter in network.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3 if "embeddings" in name else parameter[0].numel() ** -0.5)
    return network


def parts_are(network: nn.Module, *expected: tuple[str, int, int]) -> None:
    """Every child has its number of parameters and tensors."""
    found = [(name, size(child), len(child.state_dict())) for name, child in network.named_children()]
    assert sorted(found) == sorted(expected)
