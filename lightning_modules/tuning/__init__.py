"""What is trained of a network: all of it, parts of it, or small layers beside it."""

from lightning_modules.tuning.adaptformer import AdaptFormer
from lightning_modules.tuning.choice import Tuning
from lightning_modules.tuning.lora import LoRA
from lightning_modules.tuning.parts import All, Bias, HeadOnly, LastBlocks, Norm

__all__ = ["AdaptFormer", "All", "Bias", "HeadOnly", "LastBlocks", "LoRA", "Norm", "Tuning"]
