"""Whether an output can be written where the user wants it, before anything is computed, and what
it means when it could not.
"""

import errno
import os
from pathlib import Path

from megatron_opdlm.errors import InputError

_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def is_refused_write(error: BaseException) -> bool:
    """Whether the file system took no more bytes: full, over quota, read-only, broken."""
    return isinstance(error, OSError) and error.errno in _REFUSALS


def check_place(out: Path, what: str) -> None:
    """InputError where ``out`` (named ``what``, e.g. ``--out DIR``) would lie inside a file, or in
    a directory that may not be written to.
    """
    above = Path(os.path.abspath(out)).parents
    nearest = next(path for path in above if os.path.lexists(path))
    if not nearest.is_dir():
        raise InputError(f"{what}: {nearest} is no directory; choose a place in a directory")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{what}: {nearest} may not be written to; choose another place")
