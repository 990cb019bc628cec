"""How many files and sockets a process may open, and whether an error says that none are left."""

from __future__ import annotations

import contextlib
import errno
import resource

_HIGHEST_LIMIT = 1 << 20
"""Used where the hard limit is "unlimited", which kernels refuse."""
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL)


def limit() -> int:
    """How many files this process may have open."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _HIGHEST_LIMIT if soft == resource.RLIM_INFINITY else soft


def raise_limit() -> None:
    """Raises the soft limit to the hard one, for this process and its children."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _HIGHEST_LIMIT if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # the kernel has a lower bound
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def out_of_descriptors(error: BaseException | None) -> bool:
    """True if an error or one of its causes is that this process can open no more files.

    Such an error says nothing about the server at the other end.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _EXHAUSTED:
            return True
        error = error.__cause__
    return False
