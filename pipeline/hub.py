"""Says in one line why the Hugging Face hub did not give what was asked for, and what to do."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from utils.errors import UserError

T = TypeVar("T")
LONGEST_REASON = 200  # characters
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


def ask_hub(name: str, call: Callable[[], T], *, otherwise: str = "") -> T:
    """Return the result of a call to the hub.

    Args:
        name: the repository.
        otherwise: another way to get its files, for the error.

    Raises:
        UserError: whatever went wrong, in one line with the remedy.
    """
    try:
        return call()
    except UserError:
        raise
    except Exception as error:  # versions of huggingface_hub use different HTTP libraries
        remedy = f"; or {otherwise}" if otherwise else ""
        raise UserError(f"{name}: cannot be downloaded: {explain_refusal(error, name)}{remedy}") from None


def explain_refusal(error: Exception, name: str) -> str:
    """Return the reason of an error of the hub's client, and the remedy, in one line."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if _is_full(error):
        return "the disk is full; make room, then the same command continues the download"
    if isinstance(error, GatedRepoError):
        return f"its terms have to be accepted first at {constants.ENDPOINT}/{name}; then {LOGIN}"
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
        return f"{constants.ENDPOINT} has no repository of this name, or it is private; check the name, or {LOGIN}"
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such revision; check the revision"
    if isinstance(error, HFValidationError):
        return f"{_first_line(error)}; check the name"
    if constants.HF_HUB_OFFLINE or isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and its files are not on this machine; unset it"
    if status is not None:
        return f"{constants.ENDPOINT} answers with status {status}; try again later"
    return f"{constants.ENDPOINT} cannot be reached ({_first_line(error)}); check the network and HF_ENDPOINT"


def _is_full(error: BaseException | None) -> bool:
    """Return whether a full disk is among the causes of an error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:LONGEST_REASON].rstrip(".")
