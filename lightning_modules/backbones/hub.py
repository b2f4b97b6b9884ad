"""Downloads from the Hugging Face hub, which give up at once where there is no network."""

import functools
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TIMEOUT = 5.0
"""Seconds to wait for the hub's first answer."""


class HubUnreachable(OSError):
    """The hub cannot be reached, and its cache does not have what was asked for."""


@contextmanager
def hub(source: str | None = None) -> Iterator[None]:
    """Let huggingface_hub work offline, from its cache, where the hub does not answer, and without its log.

    It would ask six times for each file, with pauses, and print a line each time.

    Args:
        source: what is read; a path that exists needs no hub.

    Raises:
        HubUnreachable: it does not answer, and what was asked for is not in the cache.
    """
    if source is not None and Path(source).exists():
        yield
        return
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    logger = logging.getLogger("huggingface_hub")
    level, offline = logger.level, constants.HF_HUB_OFFLINE
    logger.setLevel(logging.ERROR)
    constants.HF_HUB_OFFLINE = offline or not _answers(int(time.monotonic() // 60))
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
            cause = cause.__cause__ or cause.__context__
        if cause is None or not constants.HF_HUB_OFFLINE:
            raise
        why = "HF_HUB_OFFLINE is set" if offline else f"{constants.ENDPOINT} cannot be reached"
        raise HubUnreachable(f"{why}, and the hub's cache does not have it") from error
    finally:
        logger.setLevel(level)
        constants.HF_HUB_OFFLINE = offline


@functools.lru_cache(maxsize=1)
def _answers(minute: int) -> bool:
    """Whether the hub answers; asked once a minute."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception:  # of the client's library, which differs between versions
        return False
    return True
