"""Which method a run was trained with, read from its settings."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NAMES = {
    "sam": "SAM",
    "imbsam": "ImbSAM",
    "focal_sam": "Focal-SAM",
    "FocalSAM": "Focal-SAM",
    "CCSAM": "CC-SAM",
    "SSESAM": "SSE-SAM",
}
WITHOUT_A_TAIL = ("SAM", "GSAM", "Focal-SAM", "CC-SAM")
"""Methods that do not ask which classes are the tail."""

PLAIN = "plain training"


@dataclass(frozen=True)
class Method:
    """A method and its two settings that matter.

    Attributes:
        name: "plain training", the method's name in the literature, or the class of the user's own.
        rho: length of the perturbation, None for plain training.
        eta: classes with fewer training samples are the tail; None where the method does not ask.
    """

    name: str
    rho: float | None = None
    eta: float | None = None


def method_of(settings: Mapping[str, Any]) -> Method:
    """The method of a run.

    Args:
        settings: flattened, see :func:`imbsam.report.runs.flatten`: ``model.init_args.sam`` is the class under ``sam``
            and its arguments under ``sam.rho`` and ``sam.eta``. Earlier runs have ``method``, ``rho`` and ``eta``.
    """
    objects = "method" not in settings
    name = settings.get("sam" if objects else "method")
    rho, eta = (settings.get(f"sam.{key}" if objects else key) for key in ("rho", "eta"))
    if name in (None, "Plain", "sgd") or not rho:
        return Method(PLAIN)
    shown = NAMES.get(name, str(name))
    return Method(shown, rho, None if shown in WITHOUT_A_TAIL else eta)
