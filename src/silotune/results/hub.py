"""An export on the hub: who is logged in, and one commit with the folder.

The token is the hub library's own: it is neither read, shown nor kept here.
"""

from pathlib import Path
from typing import Any

from silotune.core.errors import ConfigError, SilotuneError


def hub_login() -> Any:
    """The hub's client, once it is known that somebody is logged in.

    Raises:
        ConfigError: Nobody is logged in.
        SilotuneError: The hub cannot be reached.
    """
    from httpx import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    api = HfApi()
    try:
        api.whoami()
    except (OSError, HTTPError) as error:
        refused = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
        if refused or isinstance(error, LocalTokenNotFoundError):
            raise ConfigError(
                "--push: nobody is logged in to the hub here.\n"
                "  Run `hf auth login`, or set HF_TOKEN to a token that may write."
            ) from None
        raise SilotuneError(
            f"--push: the hub does not answer ({type(error).__name__}).\n"
            "  Try again later, or leave --push out."
        ) from None
    return api


def push_folder(api: Any, folder: Path, repository: str, *, public: bool) -> str:
    """Upload an export in one commit.

    Args:
        api: From `hub_login`.
        folder: The export.
        repository: OWNER/NAME; created if it is not there.
        public: Whether everyone may read it.

    Returns:
        Its address.

    Raises:
        ConfigError: The repository is there and everyone may read it, which was not asked for.
        SilotuneError: The hub did not take it; the export stays.
    """
    from httpx import HTTPError

    again = f"hf upload {repository} {folder}"
    try:
        address = str(api.create_repo(repository, private=not public, exist_ok=True))
        # what is there already keeps its visibility
        if not public and not api.repo_info(repository).private:
            raise ConfigError(
                f"--push: {repository} is there, and everyone may read it; nothing was uploaded.\n"
                f"  Add --public, or name another. The export itself is done: {again}"
            )
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Upload a silotune export"
        )
    except (OSError, HTTPError) as error:
        raise SilotuneError(
            f"--push: the hub did not take {repository} ({type(error).__name__}).\n"
            f"  The export itself is done; once the cause is mended: {again}"
        ) from None
    return address
