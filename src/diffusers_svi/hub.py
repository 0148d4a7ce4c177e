"""What goes wrong with the Hub, in a sentence that names the repository and what to do."""

import os
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HTTPError, RevisionNotFoundError


def hub_trouble(error: BaseException, repo_id: str) -> str | None:
    """What `error`, or the error it came from, says of a repository of the Hub; `None` if that is clear already."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HTTPError):
        cause = cause.__cause__ or cause.__context__
    if cause is None or isinstance(cause, (EntryNotFoundError, RevisionNotFoundError)):
        return None
    response = getattr(cause, "response", None)
    if response is None:
        return f"{constants.ENDPOINT} cannot be reached ({cause}): try again, or set `HF_ENDPOINT` to another Hub."
    if isinstance(cause, GatedRepoError):
        return f"The repository {repo_id!r} is gated: ask for access on its page, and log in with `hf auth login`."
    if response.status_code in (401, 404):
        # The Hub tells nobody whether a private repository exists.
        return (
            f"{constants.ENDPOINT} shows no repository {repo_id!r} to this user: is the name right? If it is private, "
            "log in with `hf auth login`, or pass the token of somebody who may read it."
        )
    if response.status_code == 403:
        return (
            f"This user may not write to the repository {repo_id!r}: choose a name of your own, or a token that may "
            "write there."
        )
    return f"The repository {repo_id!r} answers with an error: {cause}"


class HubModelMixin:
    """A pipeline's way to the Hub: before the pipeline among the bases of a class."""

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str | os.PathLike:
        """As in diffusers; an error says what is wrong with the repository."""
        try:
            return super().download(pretrained_model_name, **kwargs)  # type: ignore[misc]
        except (OSError, HTTPError) as error:
            trouble = hub_trouble(error, pretrained_model_name)
            if trouble is None:
                raise
            raise OSError(f"Cannot load the model {pretrained_model_name!r}. {trouble}") from None
