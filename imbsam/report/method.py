"""Which method a run was trained with, read from its settings."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NAMES = {"FocalSAM": "Focal-SAM", "CCSAM": "CC-SAM", "SSESAM": "SSE-SAM"}
WITHOUT_A_TAIL = ("SAM", "GSAM", "FocalSAM", "CCSAM")
"""Methods that do not ask which classes are the tail."""

PLAIN = "plain training"


@dataclass(frozen=True)
class Method:
    """A method and the two settings of it that matter.

    Attributes:
        name: "plain training", the method's name in the literature, or the user's own class.
        rho: length of the perturbation, None for plain training.
        eta: classes with fewer training samples are the tail; None where the method does not use it.
    """

    name: str
    rho: float | None = None
    eta: float | None = None


def method_of(settings: Mapping[str, Any]) -> Method:
    """The method of a run.

    Args:
        settings: see :class:`imbsam.report.runs.Run`: the class of ``model.sam`` under ``sam``, its arguments under
            ``sam.rho`` and ``sam.eta``.
    """
    name, rho = settings.get("sam"), settings.get("sam.rho")
    if name in (None, "Plain") or not rho:
        return Method(PLAIN)
    return Method(NAMES.get(name, str(name)), rho, None if name in WITHOUT_A_TAIL else settings.get("sam.eta"))
