"""The network is built before any other callback is set up, so that Lightning's own callbacks find it."""

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer import call


class BuildNetwork(Callback):
    """Lets the module learn its classes from the DataModule and build its network, first of all callbacks.

    Lightning sets up the DataModule, then callbacks, then the module: ``EMAWeightAveraging``, ``BackboneFinetuning``
    and ``ModelPruning`` would meet a module without parameters.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Call the module's own ``setup`` and ``configure_model`` now; their later calls find nothing left to do."""
        pl_module.setup(stage)
        call._call_configure_model(trainer)  # in the strategy's and the precision's contexts
