"""Whether a push will be let in, as far as the Hub tells before anything is uploaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cameo.hub.publish import explained_errors

__all__ = ["check_access", "check_repo_id"]


def check_repo_id(repo_id: str) -> None:
    """Check the form of a repository's id by the Hub's own rules.

    Example:
        >>> check_repo_id("you/my rooms")
        Traceback (most recent call last):
            ...
        ValueError: 'you/my rooms': is no id of a Hub repository; expected your-name/your-model of letters, digits, -, \
_ and ., at most 96 of them

    Raises:
        ValueError: if it is no id.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ValueError(
            f"{repo_id!r}: is no id of a Hub repository; expected your-name/your-model of letters, digits, -, _ and ., "
            "at most 96 of them"
        ) from None


def check_access(repo_id: str, token: str | None = None) -> str:
    """Check id, token and permission of a push, and return the id with its owner.

    The Hub tells who the token belongs to, whether it may write, and the organizations of that person. Whether one may
    write to a repository of an organization that exists already only shows when it is written to.

    Example:
        >>> check_access("rooms", token="hf_...")  # doctest: +SKIP
        'you/rooms'

    Args:
        repo_id: `name`, for the owner of the token, or `owner/name`.
        token: default `HF_TOKEN` or the token of `hf auth login`.

    Raises:
        ValueError: if the id has not the form of one.
        PermissionError: if there is no token, if the Hub does not know it, or it may not write for that owner.
        ConnectionError: if the Hub cannot be reached.
    """
    from huggingface_hub import HfApi, get_token

    check_repo_id(repo_id)
    if not (token or get_token()):
        raise PermissionError("no Hugging Face token: pass token=, set the variable HF_TOKEN, or run `hf auth login`")
    with explained_errors(repo_id):
        user = HfApi(token=token, library_name="cameo").whoami()
    name = str(user["name"])
    if "/" not in repo_id:
        repo_id = f"{name}/{repo_id}"
    if not _may_write(user):
        raise PermissionError(
            f"{repo_id}: the token of {name} may read and not write. Make one with write permission at "
            "https://huggingface.co/settings/tokens"
        )
    owner = repo_id.partition("/")[0]
    roles = {str(one.get("name")): one.get("roleInOrg") for one in user.get("orgs") or []}
    if owner != name and (owner not in roles or roles[owner] == "read"):
        member = f"may only read in {owner}" if owner in roles else f"is no member of {owner}"
        raise PermissionError(
            f"{repo_id}: the token is of {name}, who {member}. Push to {name}/{repo_id.partition('/')[2]}, or use a "
            f"token of someone who may write for {owner}"
        )
    return repo_id


def _may_write(user: Mapping[str, Any]) -> bool:
    """Whether the token may write to any repository; True where the Hub does not say."""
    access = (user.get("auth") or {}).get("accessToken") or {}
    if access.get("role") == "fineGrained" and (scopes := (access.get("fineGrained") or {}).get("scoped")):
        return any("repo.write" in (scope.get("permissions") or ()) for scope in scopes)
    return access.get("role") != "read"
