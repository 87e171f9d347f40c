"""Upload an export to the hub: check the login, then push the folder in one commit.

The hub library handles the token. This file neither reads, shows nor stores it.
"""

from pathlib import Path
from typing import Any

from silotune.core.errors import ConfigError, SilotuneError


def hub_login() -> Any:
    """Return the hub's client after checking that somebody is logged in.

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
                "--push: nobody is logged in to the hub on this machine.\n"
                "  Run `hf auth login`, or set HF_TOKEN to a token with write access."
            ) from None
        raise SilotuneError(
            f"--push: the hub does not answer ({type(error).__name__}).\n"
            "  Try again later, or leave out --push."
        ) from None
    return api


def push_folder(api: Any, folder: Path, repository: str, *, public: bool) -> str:
    """Upload an export in one commit.

    Args:
        api: From `hub_login`.
        folder: The export.
        repository: OWNER/NAME; created if it does not exist.
        public: Whether everyone may read it.

    Returns:
        Its address.

    Raises:
        ConfigError: The repository exists and is public, but `public` is not set.
        SilotuneError: The upload failed; the export stays.
    """
    from httpx import HTTPError

    command = f"hf upload {repository} {folder}"
    try:
        address = str(api.create_repo(repository, private=not public, exist_ok=True))
        # an existing repository keeps its visibility
        if not public and not api.repo_info(repository).private:
            raise ConfigError(
                f"--push: {repository} exists and is public; nothing was uploaded.\n"
                f"  Add --public, or choose another. The export is done; to upload it: {command}"
            )
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Upload a silotune export"
        )
    except (OSError, HTTPError) as error:
        raise SilotuneError(
            f"--push: the upload to {repository} failed ({type(error).__name__}).\n"
            f"  The export is done; once the cause is fixed, run: {command}"
        ) from None
    return address
