"""Fetches a file over HTTP within limits: the server, and all that it sends, is untrusted."""

import asyncio
from dataclasses import dataclass
from http import HTTPStatus

import aiohttp

from pipelines.errors import HHNetError, InputError, Unavailable

CHUNK_BYTES = 1 << 16
_PASSING = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)
"""Refusals that end by themselves; so do all from 500 on."""


@dataclass(frozen=True)
class WebLimits:
    """Limits on fetching one file."""

    redirects: int = 5
    """Largest number of redirects that are followed."""
    connect_s: float = 10.0
    """Longest wait for a connection, in seconds."""
    total_s: float = 30.0
    """Longest time for the whole file, redirects included, in seconds."""


LIMITS = WebLimits()


def fetch_url(url: str, limit: int, limits: WebLimits = LIMITS) -> bytes:
    """Return all bytes at an http:// or https:// URL; if there are more than `limit`, the first `limit` + 1.

    Raises InputError for a URL that is wrong or refused, Unavailable where the server is out of reach, fails or is too
    slow. It is asked once. Not for use inside a running event loop.
    """
    try:
        return asyncio.run(_receive(url, limit, limits))
    except aiohttp.TooManyRedirects:
        raise InputError(
            f"{url} redirects more than {limits.redirects} times: give the address of the file itself"
        ) from None
    except aiohttp.NonHttpUrlRedirectClientError:
        raise InputError(
            f"{url} redirects to an address that is not http or https: give the address of the file itself"
        ) from None
    except TimeoutError:
        raise Unavailable(
            f"{url} did not arrive within {limits.total_s:g} s: try again, or download it and give the file"
        ) from None
    except ValueError:
        raise InputError(f"{url} is not a valid URL: write http://host/path or https://host/path") from None
    except (aiohttp.ClientError, OSError) as error:
        raise Unavailable(f"{url} cannot be fetched: {error}: check the address and the network") from None


async def _receive(url: str, limit: int, limits: WebLimits) -> bytes:
    timeout = aiohttp.ClientTimeout(total=limits.total_s, sock_connect=limits.connect_s)
    # Nothing is unpacked: a small answer could unfold to any size.
    headers = {"User-Agent": "hhnet", "Accept-Encoding": "identity"}
    async with (
        aiohttp.ClientSession(
            timeout=timeout,
            headers=headers,
            auto_decompress=False,
            trust_env=True,
            cookie_jar=aiohttp.DummyCookieJar(),
        ) as session,
        # aiohttp counts the redirect at which it gives up.
        session.get(url, max_redirects=limits.redirects + 1) as response,
    ):
        if response.status != HTTPStatus.OK:
            raise _refusal(url, response.status)
        data = bytearray()
        async for chunk in response.content.iter_chunked(CHUNK_BYTES):
            data += chunk[: limit + 1 - len(data)]
            if len(data) > limit:
                break
        return bytes(data)


def _refusal(url: str, status: int) -> HHNetError:
    try:
        answer = f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        answer = str(status)
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR or status in _PASSING:
        return Unavailable(f"{url}: the server answers {answer}: try again later")
    return InputError(f"{url}: the server answers {answer}: check the address, and that it needs no login")
