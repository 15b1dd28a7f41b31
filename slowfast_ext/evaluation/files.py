"""Files that a reader never sees half written."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_then_renamed(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside ``path``, renamed to it when the block ends well and removed when it raises.

    The suffix is kept, for writers that tell the format by it. The folder must exist.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
