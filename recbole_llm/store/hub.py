"""``hub:user/name``: folders on the Hugging Face hub, by huggingface_hub, which also knows the token and the endpoint."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

PREFIX = "hub:"
_NAME = re.compile(r"hub:(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?")


def parse(given: str, key: str) -> tuple[str, str | None]:
    """Repository and revision of ``hub:user/name`` or ``hub:user/name@revision``.

    Raises:
        ValueError: it is not of that form; names ``key``.
    """
    if (found := _NAME.fullmatch(given)) is None:
        raise ValueError(f"{key}={given}: give hub:user/name, or hub:user/name@revision")
    return found["repo"], found["revision"]


def download(given: str, key: str, kinds: Sequence[str]) -> Path:
    """The local folder of ``hub:user/name``; downloaded unless the hub's cache has it.

    Args:
        kinds: endings of the files to download.

    Raises:
        ValueError: there is no such folder, it may not be read, or the hub cannot be reached; names ``key``.
    """
    from huggingface_hub import snapshot_download

    repo, revision = parse(given, key)
    with errors(f"{key}={given}", "read"):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=[f"*{kind}" for kind in kinds]))


def upload(folder: Path, given: str, key: str, *, marker: str, private: bool) -> str:
    """Make ``folder`` the content of ``hub:user/name``, which is created if there is none; returns its address.

    Args:
        marker: a file that a repository has whose content may be replaced.

    Raises:
        ValueError: the repository has other files, may not be written, or the hub cannot be reached; names ``key``.
    """
    from huggingface_hub import HfApi

    repo, revision = parse(given, key)
    if revision is not None:
        raise ValueError(f"{key}={given}: a commit cannot be written; give hub:user/name")
    api = HfApi()
    with errors(f"{key}={given}", "write"):
        url = api.create_repo(repo, private=private, exist_ok=True)
        others = {*api.list_repo_files(repo)} - {".gitattributes", "README.md"}
        if others and marker not in others:
            raise ValueError(f"{key}={given}: the repository has other files, such as {min(others)}; give a new name")
        # what an earlier run has left there would belong to nothing
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Share a run of RecBole-LLM", delete_patterns="*")
    return str(url)


@contextlib.contextmanager
def errors(what: str, act: str) -> Iterator[None]:
    """Say in one sentence why the hub cannot be read or written.

    Raises:
        ValueError: in place of the errors of huggingface_hub; begins with ``what``.
    """
    from huggingface_hub import errors as hub
    from huggingface_hub.utils import get_token

    login = "run `hf auth login`, or set HF_TOKEN" if get_token() is None else "use a token that may (HF_TOKEN)"
    locally = "share to a folder" if act == "write" else "give a folder"
    offline = f"check the network and HF_ENDPOINT, or {locally}"
    try:
        yield
    except (hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError) as error:
        if isinstance(error, hub.OfflineModeIsEnabled) or isinstance(error.__cause__, hub.OfflineModeIsEnabled):
            raise ValueError(f"{what}: HF_HUB_OFFLINE is set, so the hub is not asked; unset it, or {locally}") from error
        raise ValueError(f"{what}: the hub cannot be reached, and the cache does not have all of it; {offline}") from error
    except hub.GatedRepoError as error:
        raise ValueError(f"{what}: its owner has to grant access first, on its page; then {login}") from error
    except hub.RevisionNotFoundError as error:
        raise ValueError(f"{what}: the repository has no such revision; leave out what follows the @") from error
    except hub.RepositoryNotFoundError as error:
        raise ValueError(f"{what}: there is no such repository, or you may not see it; check the name, or {login}") from error
    except hub.HFValidationError as error:
        raise ValueError(f"{what}: not a name of a repository ({_first_line(error)})") from error
    except hub.HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise ValueError(f"{what}: you may not {act} it (HTTP {error.response.status_code}); {login}") from error
        raise ValueError(f"{what}: the hub answered {_first_line(error)}; try again later") from error
    except (hub.HTTPError, ConnectionError) as error:
        raise ValueError(f"{what}: the hub cannot be reached ({_first_line(error)}); {offline}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
