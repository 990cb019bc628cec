"""How many files a process may open: raised to what is allowed, and what having none left is."""

from __future__ import annotations

import contextlib
import errno
import resource

_MOST = 1 << 20
"""Asked for where the hard limit is "unlimited", which kernels do not mean."""


_EXHAUSTED = frozenset(
    (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL)
)


def limit() -> int:
    """How many files this process may have open."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _MOST if soft == resource.RLIM_INFINITY else soft


def raise_limit() -> None:
    """Raises the soft limit to the hard one, for this process and its children."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # the kernel has a smaller bound
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def out_of_descriptors(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is that no more connections or files can be opened here.

    It says nothing of the server at the other end.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _EXHAUSTED:
            return True
        error = error.__cause__
    return False
