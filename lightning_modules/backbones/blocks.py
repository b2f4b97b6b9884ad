"""The blocks of a network, found by how it is built: the layers of a ViT, the residual blocks of a ResNet."""

from collections.abc import Iterator

from torch import nn

__all__ = ["depths", "named_blocks"]


def named_blocks(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks with their names, in the order in which they are registered, which is that of the forward.

    A block is an element of an ``nn.Sequential`` or ``nn.ModuleList`` that has three layers with parameters or more and
    is no such list itself; a stage, which holds a list of blocks of one class, is taken apart.

    Args:
        network: any network; one that is written otherwise has no blocks.

    Example:
        >>> from lightning_modules.backbones import Torchvision
        >>> [name for name, _ in named_blocks(Torchvision("resnet18")(num_classes=2))][:3]
        ['layer1.0', 'layer1.1', 'layer2.0']
    """
    return list(_blocks("", network))


def depths(network: nn.Module) -> dict[str, int]:
    """The depth of each parameter: 0 before the first block, i in the i-th of L, L + 1 after the last.

    Parameters that belong to no block count as those that are registered before them, except that a module's own, such
    as the class token of a ViT, count as its beginning.

    Returns:
        By the parameter's name; all 0 for a network without blocks.
    """
    blocks = named_blocks(network)
    found, current = {}, 0
    for name, _ in network.named_parameters():
        inside = next((i for i, (block, _) in enumerate(blocks, 1) if name.startswith(f"{block}.")), None)
        if inside is not None:
            current = inside
            found[name] = inside
        else:
            found[name] = 0 if current == 0 else (len(blocks) + 1 if current == len(blocks) else current)
        # CLIP's projection of the pooled features is a parameter of the tower itself, registered first
        if inside is None and name.rpartition(".")[2] == "proj":
            found[name] = len(blocks) + 1
    return found


def _blocks(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    in_list = isinstance(module, (nn.Sequential, nn.ModuleList))
    for name, child in module.named_children():
        full = f"{prefix}.{name}" if prefix else name
        if in_list and _is_block(child) and not _is_stage(child):
            yield full, child
        else:
            yield from _blocks(full, child)


def _is_block(module: nn.Module) -> bool:
    """Three layers with parameters or more (a convolution with its norm is none), and no mere list of them."""
    if isinstance(module, (nn.Sequential, nn.ModuleList)):
        return False
    return sum(any(p is not None for p in m._parameters.values()) for m in module.modules()) > 2


def _is_stage(module: nn.Module) -> bool:
    return any(
        len(child) > 0 and all(map(_is_block, child.children())) and len({type(m) for m in child.children()}) == 1
        for child in module.children()
        if isinstance(child, (nn.Sequential, nn.ModuleList))
    )
