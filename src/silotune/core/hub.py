"""Whether the Hugging Face hub answers: asked once, before its libraries ask again and again.

Without a network, these libraries ask five times for every file and wait in between. In their own
offline mode they use what is in their caches at once, or say that it is not there. This file asks
once and switches that mode on; it does not know models or data sets.
"""

import os
import sys
import time

TIMEOUT_S = 5.0
"""How long the hub may take to answer at all."""
REMEMBERED_S = 60.0
"""How long an answer counts; a process that lives longer asks again."""

_last: tuple[float, str | None] | None = None


def why_offline() -> str | None:
    """Why the hub cannot be reached, in one line; None if it answers.

    Until it answers again, the hub's libraries are in their offline mode.
    """
    global _last
    from huggingface_hub import constants

    if _last is None and constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if _last is None or time.monotonic() - _last[0] > REMEMBERED_S:
        _tell_libraries(offline=False)  # otherwise they would refuse to ask
        reason = _ask()
        _last = time.monotonic(), reason
        _tell_libraries(offline=reason is not None)
    return _last[1]


def _ask() -> str | None:
    import httpx
    from huggingface_hub import constants, get_session

    try:  # any answer will do, also a refusal: then the libraries say what is wrong
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT_S, follow_redirects=False)
    except httpx.TimeoutException:
        return f"no answer within {TIMEOUT_S:.0f} s"
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return str(error).strip().split("\n", 1)[0] or type(error).__name__
    return None


def _tell_libraries(*, offline: bool) -> None:
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = offline
    if "datasets" in sys.modules and "HF_DATASETS_OFFLINE" not in os.environ:
        # it copies the option when it is imported
        sys.modules["datasets"].config.HF_HUB_OFFLINE = offline
