"""Whether wandb can reach its server from here, and where it writes (no torch, no wandb)."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

from lbaccel.errors import InputError

WANDB_MODES = ("online", "offline", "disabled")
# wandb's own server: `wandb login` writes the second from 0.31 on, and reads api.wandb.ai's too
_FORGE = ("forge.coreweave.com", "api.forge.coreweave.com")


def has_wandb_key() -> bool:
    """Whether an API key lies in the environment or in netrc. wandb is not asked.

    wandb 0.31 deprecates `wandb.api.api_key` (it warns), and the replacement it names,
    `wandb.login(prompt=False)`, rewrites its settings file and verifies over the network.
    """
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "").netloc
    hosts = {host} if host and host not in _FORGE else {*_FORGE, "api.wandb.ai"}
    homes = (Path("~/.netrc").expanduser(), Path("~/_netrc").expanduser())
    given = os.environ.get("NETRC")
    for path in (Path(given),) if given else homes:
        try:
            if hosts & netrc.netrc(path).hosts.keys():
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def wandb_mode(requested: str | None = None) -> tuple[str, str]:
    """Where wandb writes, and why: what was asked for, `WANDB_MODE`, else whether a key is there.

    >>> wandb_mode("offline")
    ('offline', 'requested')

    Raises:
        InputError: a mode other than online, offline, disabled.
    """
    for value, origin in ((requested, "requested"), (os.environ.get("WANDB_MODE"), "WANDB_MODE")):
        if not value:
            continue
        if value not in WANDB_MODES:
            raise InputError(
                f"wandb mode {value!r} ({origin}) is not one of {', '.join(WANDB_MODES)}. "
                f"Use offline to log without a network."
            )
        return value, origin
    return ("online", "API key found") if has_wandb_key() else ("offline", "not logged in")
