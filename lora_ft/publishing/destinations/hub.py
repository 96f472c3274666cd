"""hf:OWNER/NAME: a package as a repository of the Hugging Face hub, sent in one commit.

    read the repository's state -> create it, private -> one commit on top of that state

The hub applies a commit as a whole or not at all, and only on top of the state that was read. Each operation can be
repeated: if the answer to a commit was lost, the next attempt finds its checksums there. The token comes from the
environment (HF_TOKEN) or from the hub's own login; this module never reads it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_ft.errors import ConfigError, ResourceError, SecurityError
from lora_ft.io import durable
from lora_ft.publishing import checksums
from lora_ft.publishing.destinations.hub_errors import retried

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo


@dataclass(frozen=True)
class Hub:
    """A model repository of the hub."""

    repository: str

    @classmethod
    def parse(cls, text: str) -> "Hub":
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        try:
            validate_repo_id(text)
        except HFValidationError as error:
            raise ConfigError(f"to=hf:{text}: {error}") from None
        if text.count("/") != 1:
            raise ConfigError(f"to=hf:{text} must be hf:OWNER/NAME; OWNER is your name or your organization's")
        return cls(text)

    def __str__(self) -> str:
        return f"hf:{self.repository}"

    def check(self, public: bool) -> str:
        return retried(str(self), lambda: self._check(_api(), public))

    def send(self, folder: Path, message: str, public: bool) -> str:
        api = _api()
        # The state is read once: a retried commit must not accept a commit of somebody else as its parent.
        info = retried(str(self), lambda: self._existing_or_new(api, public))
        return retried(str(self), lambda: self._commit(api, info, folder, message))

    def fetch(self, folder: Path, revision: str | None) -> None:
        retried(str(self), lambda: self._fetch(_api(), folder, revision))

    def _check(self, api: "HfApi", public: bool) -> str:
        user = api.whoami()
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise ResourceError(
                f"the token of {user.get('name')} can only read: create one that can write, at "
                f"{api.endpoint}/settings/tokens"
            )
        info = self._info(api)
        url = f"{api.endpoint}/{self.repository}"
        if info is None:
            return f"{url} (new, {'PUBLIC' if public else 'private'})"
        self._check_visibility(info, public)
        others = sorted(_file_names(info) - self._packaged(api, info))
        kept = f"; other files there are kept: {', '.join(others)}" if others else ""
        return f"{url} (existing, {'private' if info.private else 'PUBLIC'}, at {str(info.sha)[:8]}{kept})"

    def _existing_or_new(self, api: "HfApi", public: bool) -> "ModelInfo":
        """Return the state of the repository, which is created if needed."""
        info = self._info(api)
        if info is None:
            api.create_repo(self.repository, private=not public, exist_ok=True)
            info = self._info(api)
        if info is None:
            raise ResourceError(f"{self} was created but cannot be found yet: publish again")
        self._check_visibility(info, public)
        return info

    def _commit(self, api: "HfApi", info: "ModelInfo", folder: Path, message: str) -> str:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        head = api.model_info(self.repository)
        if head.sha != info.sha and self._holds(api, head, folder):  # the answer to an earlier attempt was lost
            return f"{self}@{head.sha}"
        names = checksums.file_names(folder)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(name, folder / name) for name in sorted(names)),
            *(CommitOperationDelete(name) for name in sorted(self._packaged(api, info) - names)),
        ]
        commit = api.create_commit(
            self.repository, operations, commit_message=message, revision="main", parent_commit=info.sha
        )
        return f"{self}@{commit.oid}"

    def _fetch(self, api: "HfApi", folder: Path, revision: str | None) -> None:
        with durable.staged_folder(folder) as staging:
            commit = revision or api.model_info(self.repository).sha

            def download(names: list[str]) -> None:
                api.snapshot_download(self.repository, revision=commit, local_dir=staging, allow_patterns=names)

            download([checksums.FILE])
            download([*checksums.read(staging)])
            durable.remove_folder(staging / ".cache")  # written by the client
            checksums.check(staging)

    def _info(self, api: "HfApi") -> "ModelInfo | None":
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            return api.model_info(self.repository)
        except RepositoryNotFoundError:
            return None

    def _check_visibility(self, info: "ModelInfo", public: bool) -> None:
        if not info.private and not public:
            raise SecurityError(
                f"{self} exists and is public: add public=true if everybody may see this adapter, "
                "or name another repository"
            )
        if info.private and public:
            raise ConfigError(
                f"{self} exists and is private, and public=true applies to new repositories: "
                "omit it, or change the repository's settings on the hub"
            )

    def _holds(self, api: "HfApi", info: "ModelInfo", folder: Path) -> bool:
        """Return True if the repository has the checksums of this package, which cover all of its files."""
        is_package = checksums.is_package(_file_names(info))
        return is_package and self._checksums(api, info) == (folder / checksums.FILE).read_bytes()

    def _checksums(self, api: "HfApi", info: "ModelInfo") -> bytes:
        return Path(api.hf_hub_download(self.repository, checksums.FILE, revision=info.sha)).read_bytes()

    def _packaged(self, api: "HfApi", info: "ModelInfo") -> set[str]:
        """Return the names of the files that an earlier package put into the repository."""
        names = _file_names(info)
        if not checksums.is_package(names):
            return set()
        text = self._checksums(api, info).decode("utf-8", "replace")
        listed = checksums.parse(text, f"{self}/{checksums.FILE}")
        return {checksums.FILE, *listed} & names


def _api() -> "HfApi":
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    if not sys.stderr.isatty():
        disable_progress_bars()
    return HfApi()


def _file_names(info: "ModelInfo") -> set[str]:
    return {file.rfilename for file in info.siblings or []} - {checksums.WRITTEN_BY_HUB}
