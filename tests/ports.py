"""A port for processes that meet at it."""

import contextlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """A port that nobody else gets inside the block.

    One that was found free and closed is anybody's until it is bound again, seconds later. This one stays bound, and
    the kernel gives no port that is bound to who asks for a free one. torch's store asks for it by number, with
    SO_REUSEADDR, and gets it, because nothing listens here.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]
