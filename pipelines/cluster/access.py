"""Checks that a verb may talk to an address, made before anything is sent.

Whoever reaches Ray's or Prefect's ports can run code there, so addresses beyond this machine need a secret. Loopback is
recognised from the address alone: any name but `localhost` is resolved by others and may lead anywhere.
"""

import ipaddress
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from pipelines.errors import UsageError

# Two patterns, since a secret key may hold a slash and a slash ends the part of a URL that the first one reads. The
# second looks for a colon instead: no bucket has one in its name.
_CREDENTIALS = re.compile(r"""://[^/\s"]*@|\bs3://[^/\s"]*:""")


def is_loopback(address: str) -> bool:
    """Tell whether `host:port`, or a URL, names this machine by its loopback address."""
    try:
        host = urlsplit(address if "://" in address else f"//{address}").hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def refuse_credentials(what: str, text: str) -> None:
    """Raise UsageError if `text` holds a URL with a user or password. The error names `what` and never shows `text`."""
    if _CREDENTIALS.search(text):
        raise UsageError(
            f"{what} must not carry credentials in a URL: give them by files or variables "
            "(AWS_SHARED_CREDENTIALS_FILE, RAY_AUTH_TOKEN_PATH, PREFECT_API_AUTH_STRING)"
        )


def require_ray_token(address: str) -> None:
    """Raise UsageError unless Ray at `address` (host:port or a URL) is on this machine or a token is set.

    `local` and `auto` pass: the first is started here, the second has no address until it is looked for.
    """
    refuse_credentials("ray.address", address)
    if address in ("local", "auto") or is_loopback(address):
        return
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        lacking = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file with the cluster's token"
    elif not has_ray_token():
        lacking = "set RAY_AUTH_TOKEN_PATH to the file with the cluster's token"
    else:
        return
    raise UsageError(f"Ray at {address} is not on the loopback address and would be joined without a token: {lacking}")


def refused_token_error(address: str) -> UsageError:
    """Return the error to raise when Ray refuses a missing or wrong token."""
    return UsageError(
        f"Ray at {address} refuses this environment: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file with "
        "the cluster's token"
    )


def has_ray_token() -> bool:
    """Tell whether Ray would find a token: RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    try:
        path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
        return bool(path.read_text().strip())
    except (OSError, UnicodeDecodeError, RuntimeError):  # RuntimeError: there is no home
        return False


@contextmanager
def set_environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Set environment variables for the length of the block; None unsets one."""
    before = {name: os.environ.get(name) for name in values}
    _write_environment(values)
    try:
        yield
    finally:
        _write_environment(before)


def _write_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
