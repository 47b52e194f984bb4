"""Downloads that continue where they broke off, and are checked."""

import errno
import hashlib
import http.client
import os
import re
import time
import urllib.request
from pathlib import Path

from captioning.run.files import check_disk
from captioning.run.messages import UserError, progress, why

BASE_URL = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/"

ARCHIVES = {  # name: MD5, bytes (about)
    "Flickr8k_Dataset.zip": ("f18a1e2920de5bd84dae7cf08ec78978", 1_115_000_000),
    "Flickr8k_text.zip": ("bf6c1abcb8e4a833b7f922104de18627", 2_340_000),
}


def download(
    folder, names, base_url=BASE_URL, archives=ARCHIVES, timeout=30, attempts=4, pause=1.0
):
    """Download archives; what an earlier attempt left is continued.

    :param names: names of those to fetch
    :param archives: dict name -> (MD5 in hex, number of bytes, about)
    :param timeout: seconds without a byte after which a connection is given up
    :param attempts: how often to try each archive
    :param pause: seconds before the second attempt; doubled before each further one
    :raises UserError: if one cannot be had; the message says how to get it by hand
    """
    check_disk(folder, sum(archives[name][1] for name in names))
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name in names:
        md5, size = archives[name]
        path, part = Path(folder) / name, Path(folder) / f"{name}.part"
        for attempt in range(attempts):
            time.sleep(pause * 2 ** (attempt - 1) if attempt else 0)
            try:
                _fetch(base_url + name, part, size, timeout)
                with open(part, "rb") as file:
                    digest = hashlib.file_digest(file, "md5").hexdigest()
                if digest != md5:
                    part.unlink()
                    raise OSError("what arrived has another MD5 checksum")
                os.replace(part, path)
                break
            except UserError:
                raise
            except (OSError, http.client.HTTPException, ValueError) as error:
                number = getattr(error, "errno", None)
                if number in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
                    problem = f"cannot write {part}: {error.strerror}"
                    raise UserError(f"{problem}; make room or check your rights") from error
                problem = why(error)
                if getattr(error, "code", None) in (401, 403, 404, 410) or attempt == attempts - 1:
                    raise UserError(
                        f"cannot download {base_url}{name}: {problem}. Run the command again to "
                        f"continue, or put {' and '.join(archives)} into {folder} by hand, or name "
                        "their folder with --source; --dataset shapes needs no download"
                    ) from error


def _fetch(url, part, size, timeout):
    """Continue ``part`` with what it lacks."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:
            return  # nothing is left to send: the checksum will tell whether all is well
        raise
    with response:
        if response.headers.get_content_type() == "text/html":
            raise OSError("the server sent a web page instead of the archive")
        sent = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        start = int(sent[1]) if response.status == 206 and sent else 0
        if start != have:
            have = 0
            part.unlink(missing_ok=True)
            if start:
                raise OSError("the server sent another part of the archive than it was asked for")
        total = None if response.length is None else have + response.length
        if max(have, total or 0) > 2 * size:
            raise OSError(f"the server says that it sends {total:,} bytes, expected about {size:,}")
        check_disk(part.parent, (total or size) - have)
        bar = progress(desc=part.stem, total=total, initial=have, unit="B", unit_scale=True)
        with open(part, "ab") as file, bar:
            while chunk := response.read1(2**18):  # what has come, so that a stall loses nothing
                have += len(chunk)
                if have > 2 * size:
                    raise OSError(f"the server sends more than {2 * size:,} bytes")
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and have < total:
        raise OSError(f"the connection broke after {have:,} of {total:,} bytes")
