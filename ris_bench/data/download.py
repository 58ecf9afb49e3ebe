"""A published file, fetched: resumed where it was cut, tried again a few times, and kept only if it is the original.

What the file must be is known beforehand, by its sha256; nothing that a server says is relied on.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ris_bench.data.archives import Report, require_space
from ris_bench.data.untrusted import shown

TIMEOUT = 30.0
"""Seconds that a server may be silent."""
WINDOW = 60.0
"""Seconds in which so many bytes must come as are `LEAST`."""
LEAST = 64 << 10
TRIES = 5
"""In a row, none of which brings the file `STEP` bytes further than any before."""
STEP = 1 << 20
PAUSE = 1.0
"""Seconds before the second try, and twice as many before each that follows."""
MOST = 1 << 30
"""Bytes that are taken of a file whose size is not known."""

PASSING = (http.client.REQUEST_TIMEOUT, http.client.REQUESTED_RANGE_NOT_SATISFIABLE, http.client.TOO_MANY_REQUESTS)
NO_WAY = (errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH)
NUMBER = re.compile(r"[0-9]{1,18}")
CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)")


class UnavailableError(Exception):
    """No address gave the file; the message has the reason of each."""


class _RefusedError(Exception):
    """The address does not give the file, however often it is asked."""


class _CutError(Exception):
    """It may give the rest if it is asked again."""


class _UnreachableError(_CutError):
    """There is no way to it at all."""


def download(urls: Sequence[str], path: Path, size: int | None, sha256: str, report: Report) -> None:
    """Fetch a file from the first address that gives the one with this sha256; `path` is there only when it is whole.

    What has arrived is in `<path>.part`, from where a later call goes on. Raises UnavailableError, OSError where it
    cannot be written, and UserError where the disk is too small.
    """
    part = path.with_name(f"{path.name}.part")
    reasons = []
    for url in urls:
        try:
            # What an earlier run left may be of another file, and is then fetched once more from the start.
            for _ in range(2 if part.exists() else 1):
                _Transfer(url, part, size, report).run()
                if (found := digest(part, report)) == sha256:
                    part.replace(path)
                    return
                part.unlink()
            raise _RefusedError(f"what it sends has the sha256 {found} instead of {sha256}")
        except _RefusedError as error:
            reasons.append(f"{urlsplit(url).netloc}: {error}")
    raise UnavailableError("; ".join(reasons))


def digest(path: Path, report: Report) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    found, total = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
            report(f"checking {path.name.removesuffix('.part')}", file.tell(), total)
    return found.hexdigest()


@dataclass
class _Transfer:
    """From one address into one file, behind what that holds already."""

    url: str
    part: Path
    size: int | None
    report: Report
    tag: str = ""
    """Which version the address had when it was last asked."""

    @property
    def name(self) -> str:
        return self.part.name.removesuffix(".part")

    @property
    def held(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def run(self) -> None:
        """Everything that there is. Raises _RefusedError when it has been tried often enough."""
        start = furthest = self.held
        failures = 0
        while self.size is None or self.held != self.size:
            try:
                self._ask()
                break
            except _CutError as error:
                if isinstance(error, _UnreachableError) and furthest == start:
                    raise _RefusedError(str(error)) from None
                if self.held >= furthest + STEP:
                    failures, furthest = 0, self.held
                failures += 1
                if failures == TRIES:
                    raise _RefusedError(f"{error}, and {TRIES} tries brought no more") from None
                time.sleep(PAUSE * 2 ** (failures - 1))

    def _ask(self) -> None:
        headers = {"User-Agent": "ris-bench"}
        if self.held:
            headers["Range"] = f"bytes={self.held}-"
            if self.tag and not self.tag.startswith("W/"):
                headers["If-Range"] = self.tag  # of another version everything is sent
        try:
            response = urllib.request.urlopen(urllib.request.Request(self.url, headers=headers), timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                self.part.unlink(missing_ok=True)  # it holds more than there is
            kind = _CutError if error.code in PASSING or error.code >= 500 else _RefusedError
            raise kind(f"it answers {error.code} {http.client.responses.get(error.code, '')}".rstrip()) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            no_way = isinstance(reason, socket.gaierror) or getattr(reason, "errno", None) in NO_WAY
            raise (_UnreachableError if no_way else _CutError)(_brief(reason)) from None
        with response:
            self.tag = response.headers.get("ETag", "")
            self._receive(response)

    def _receive(self, response: http.client.HTTPResponse) -> None:
        if response.headers.get_content_type() == "text/html":
            raise _RefusedError("it answers with a web page")
        offset, total = self._extent(response)
        if total is not None and (total != self.size if self.size is not None else total > MOST):
            self.part.unlink(missing_ok=True)
            expected = f", and the original {self.size:,}" if self.size is not None else ""
            raise _RefusedError(f"its file has {total:,} bytes{expected}")
        total = self.size if total is None else total
        require_space(self.part.parent, (total or 0) - offset, self.name)
        done = before = offset
        since = time.monotonic()
        with self.part.open("ab" if offset else "wb") as file:
            while done < (MOST if total is None else total) and (chunk := _chunk(response)):
                file.write(chunk)
                done += len(chunk)
                self.report(f"downloading {self.name}", done, total)
                if time.monotonic() > since + WINDOW:
                    if done < before + LEAST:
                        raise _CutError(f"it sends less than {LEAST:,} bytes in {WINDOW:g} seconds")
                    before, since = done, time.monotonic()
        if total is not None and done != total:
            raise _CutError(f"it ended after {done:,} of {total:,} bytes")

    def _extent(self, response: http.client.HTTPResponse) -> tuple[int, int | None]:
        """Where in the file the body begins, and how long the file is; None is not said."""
        if response.status != http.client.PARTIAL_CONTENT:
            length = response.headers.get("Content-Length", "")
            return 0, int(length) if NUMBER.fullmatch(length) else None
        given = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if given is None or int(given[1]) != self.held:
            self.part.unlink(missing_ok=True)
            raise _CutError("it sends another part than the one asked for")
        return int(given[1]), None if given[2] == "*" else int(given[2])


def _chunk(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(1 << 16)  # what is there: to wait for all of it could take for ever
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _CutError(_brief(error)) from None


def _brief(error: object) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return shown(text.splitlines()[0][:200])
