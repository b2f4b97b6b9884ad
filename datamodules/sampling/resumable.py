"""The position of a loader in its epoch, so that a run resumes at the very batch it stopped at."""

from typing import Any

from imbsam.errors import SettingError


class ResumableLoader:
    """A mixin in front of a loader that keeps its position and can start at any batch of any epoch.

    The loader's sampler has ``seed``, ``epoch``, ``set_epoch`` and ``first_batch``, the batch at which its next
    iteration starts. Lightning's ``overfit_batches`` replaces it by one that has none of these.
    """

    sampler: Any
    batch_size: int | None
    _yielded: int = 0

    def __iter__(self) -> Any:
        """Yield the batches of the sampler's epoch; nothing is drawn or fetched before the first is asked for.

        Lightning makes the iterator before it calls ``set_epoch``. After a whole epoch the next one follows, with or
        without ``set_epoch``.
        """
        self._yielded = getattr(self.sampler, "first_batch", 0)
        for batch in super().__iter__():  # type: ignore[misc]
            self._yielded += 1
            yield batch
        self._yielded = 0
        if hasattr(self.sampler, "first_batch"):
            self.sampler.set_epoch(self.sampler.epoch + 1)

    @property
    def seed(self) -> int:
        """Seed of the order."""
        return int(self.sampler.seed)

    @seed.setter
    def seed(self, seed: int) -> None:
        self.sampler.seed = seed

    @property
    def joint_batch_size(self) -> int:
        """Samples (or pairs) in a batch of all ranks together."""
        return (self.batch_size or 1) * int(getattr(self.sampler, "num_replicas", 1))

    def state_dict(self) -> dict[str, int]:
        """Seed, epoch, how many of its batches were yielded, and the joint batch size."""
        return {
            "seed": self.seed,
            "epoch": getattr(self.sampler, "epoch", 0),
            "batch": self._yielded,
            "joint_batch_size": self.joint_batch_size,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next iteration at the batch after the last one yielded.

        Raises:
            SettingError: The checkpoint was saved mid-epoch with another joint batch size.
        """
        if state["batch"] > 0 and self.joint_batch_size != state["joint_batch_size"]:
            raise SettingError(
                f"batch_size gives {self.joint_batch_size} samples a batch over all processes, but the checkpoint was "
                f"saved mid-epoch with {state['joint_batch_size']}: keep that product of batch size and processes, or "
                "resume from the end of an epoch"
            )
        self.seed = state["seed"]
        self.sampler.set_epoch(state["epoch"])
        self.sampler.first_batch = state["batch"]
