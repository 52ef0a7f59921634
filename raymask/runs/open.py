"""Opening of storage by path or URI: a local folder or an object store.

Names are paths inside the storage, such as `level-1/level.json`. Both kinds of storage show a file complete or not at
all, and one driver at a time can lock them. An object store can neither append nor rename.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from raymask.core.errors import UserError, first_line
from raymask.runs.local_storage import LocalStorage
from raymask.runs.object_storage import ObjectStorage, limit_gcs_retries
from raymask.runs.storage import OBJECT_STORES, MessageFn, Storage

SECRET = re.compile(r"://[^@]*:(?!\d+/)[^@]*@|[?&][^=&]*(key|secret|password|token|sig)[^=&]*=", re.IGNORECASE)
"""A password before the host (even one with slashes, which are not allowed there), or one among the URI's options."""


def open_storage(location: str | Path, note: MessageFn = lambda text: None, option: str = "") -> Storage:
    """Open a storage.

    Args:
        location: A local path, or a URI that pyarrow.fs or fsspec can open.
        note: Receives messages about outages.
        option: The command's option that chooses another location, for messages; empty if it has none.

    Raises:
        UserError: There is no such storage, or the URI contains a password, which would end up in logs.
    """
    uri = str(location)
    require_no_secret(uri)
    if "://" not in uri:
        path = Path(os.path.expanduser(uri))  # a Ray job's command line goes through no shell
        if path.is_file():
            raise UserError(f"{path}: is a file, and a run directory is a folder")
        return LocalStorage(path, option)
    import fsspec
    from pyarrow import ArrowException, fs

    try:
        try:
            filesystem, root = fs.FileSystem.from_uri(limit_gcs_retries(uri))
        except ArrowException as error:
            if "Unrecognized filesystem" not in str(error):
                raise
            # No cache: another driver's claim must be seen at once.
            fsspec_filesystem, root = fsspec.core.url_to_fs(uri, use_listings_cache=False)
            filesystem = fs.PyFileSystem(fs.FSSpecHandler(fsspec_filesystem))
    except (OSError, ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise UserError(f"{uri}: cannot be reached: {first_line(error)}") from None
    if filesystem.type_name in OBJECT_STORES and not root:
        raise UserError(f"{uri}: names no bucket")
    if filesystem.type_name == "local":
        return LocalStorage(Path(root), option)
    return ObjectStorage(uri, filesystem, root.rstrip("/"), note, option)


def require_no_secret(uri: str) -> None:
    """Check that a URI contains no password.

    Raises:
        UserError: It contains one.
    """
    scheme = uri.partition("://")[0]
    if "://" in uri and SECRET.search(uri):
        raise UserError(
            f"{scheme}://***: credentials do not belong in a URI, which is logged: put them where {scheme} looks for "
            "them (environment variables, a credentials file, the machine's role)"
        )
