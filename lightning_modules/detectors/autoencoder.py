"""Pretraining of an encoder as half of an autoencoder, which DeepSAD and FEAWAD share."""

import torch
from torch import Tensor, nn

from imbsam.errors import SettingError


def pretrain(
    encoder: nn.Module,
    decoder: nn.Module,
    x: Tensor,
    steps: int,
    batch_size: int = 128,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
) -> None:
    """Train ``decoder(encoder(x))`` to give x back: mean squared error, Adam, batches drawn with replacement.

    Args:
        encoder: from x to a code.
        decoder: from the code to the shape of x.
        x: all rows to learn from, (N, ...).
        steps: optimizer steps; 0 leaves both as they are.
        batch_size: rows of a step.
        lr: Adam's learning rate.
        weight_decay: Adam's weight decay.
    """
    if steps < 0:
        raise SettingError(f"pretrain_steps is {steps}: give a number from 0")
    params = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(params, lr=lr, weight_decay=weight_decay, fused=True)
    with torch.enable_grad():
        for _ in range(steps):
            batch = x[torch.randint(len(x), (batch_size,), device=x.device)]
            loss = nn.functional.mse_loss(decoder(encoder(batch)), batch)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    optimizer.zero_grad()
