"""The folder of an export on the Hugging Face hub, only where it was asked for."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from lbaccel.errors import InputError, RunFailed
from lbaccel.text import printable, without_tokens


def check_repo_id(repo_id: str) -> None:
    """Stop at a name that the hub would not take.

    Raises:
        InputError: it is not OWNER/NAME.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"--push-to-hub {repo_id}: {error} Use OWNER/NAME.") from error
    if "/" not in repo_id:
        raise InputError(f"--push-to-hub {repo_id} has no owner. Use OWNER/NAME.")


def push(folder: Path, repo_id: str, *, private: bool = False, title: str) -> str:
    """Make the repository where there is none, and upload the files of `folder`; its address.

    Raises:
        RunFailed: offline, not logged in, a repository that is public where `private` was asked
            for, or what the hub says; the folder stays.
    """
    by_hand = f"The folder is written: {folder}. Later: hf upload {repo_id} {folder}"
    by_hand += " --private" * private
    if constants.HF_HUB_OFFLINE:
        raise RunFailed(f"--push-to-hub {repo_id}: HF_HUB_OFFLINE is set. Unset it. {by_hand}")
    if huggingface_hub.get_token() is None:
        raise RunFailed(
            f"--push-to-hub {repo_id}: not logged in to the hub. Type: hf auth login. {by_hand}"
        )
    api = huggingface_hub.HfApi(library_name="lbaccel")
    try:
        # None leaves it to the owner's default; a repository that is there stays as it is
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        public = private and not api.model_info(repo_id).private
        if not public:
            done = api.upload_folder(
                repo_id=repo_id, folder_path=str(folder), commit_message=f"lbaccel export: {title}"
            )
            return str(getattr(done, "commit_url", repo_id))
    except Exception as error:  # of several libraries: the network's, the hub's, the upload's
        said = without_tokens(" ".join(str(error).split()), huggingface_hub.get_token())
        reason = printable(said[:300]) or type(error).__name__  # an answer may repeat the token
        raise RunFailed(f"--push-to-hub {repo_id}: {reason}. {by_hand}") from None
    raise RunFailed(
        f"--push-to-hub {repo_id} --private: there is such a repository, and it is public. "
        f"Nothing was uploaded. Make it private, or use another name. {by_hand}"
    )
