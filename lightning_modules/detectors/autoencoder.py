"""Pretraining of an encoder as half of an autoencoder, for DeepSAD and FEAWAD."""

import torch
from torch import Tensor, nn

from imbsam.checks import check_whole_numbers


def pretrain(
    encoder: nn.Module, decoder: nn.Module, x: Tensor, steps: int, lr: float = 1e-3, weight_decay: float = 0.0
) -> None:
    """Train ``decoder(encoder(x))`` to reconstruct x: mean squared error, Adam, batches of 128 drawn with replacement.

    Args:
        encoder: from x to a code.
        decoder: from the code to the shape of x.
        x: the training samples, (N, ...).
        steps: optimizer steps; 0 leaves both unchanged.
        lr: Adam's learning rate.
        weight_decay: Adam's weight decay.
    """
    check_whole_numbers(0, pretrain_steps=steps)
    params = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(params, lr=lr, weight_decay=weight_decay, fused=True)
    with torch.enable_grad():
        for _ in range(steps):
            batch = x[torch.randint(len(x), (128,), device=x.device)]
            loss = nn.functional.mse_loss(decoder(encoder(batch)), batch)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    optimizer.zero_grad()
