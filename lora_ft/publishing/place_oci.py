"""oci:HOST/NAME:TAG: a package as an artifact in a registry of containers; files are layers, one manifest names all.

    layers and config, by their hashes  ->  the manifest under the tag: the artifact is there whole, or not at all

The login is Docker's (docker login HOST), or the environment's ORAS_USER and ORAS_PASS; the client is the package
oras. Without TLS only this machine itself is spoken to. The same package has the same digest: nothing is dated.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_ft.errors import ConfigError, MismatchError, ResourceError
from lora_ft.io import durable, untrusted
from lora_ft.publishing import sums

_FORM = re.compile(
    r"(?P<host>(?:localhost|[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+)(?::[0-9]{1,5})?|[A-Za-z0-9-]+:[0-9]{1,5})/"
    r"(?P<name>[a-z0-9]+(?:[._/-]+[a-z0-9]+)*):(?P<tag>\w[\w.-]{0,127})"
)
_HERE = re.compile(r"(?:localhost|127\.0\.0\.1)(?::|$)")
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_KIND = "application/vnd.lora-ft.package.v1"
_TITLE, _BASE = "org.opencontainers.image.title", "org.opencontainers.image.base.name"
_TYPES = {".json": "application/json", ".md": "text/markdown", ".svg": "image/svg+xml"}
_EMPTY = b"{}"  # the config of an artifact that has none, as the image specification 1.1 gives it
_MOST_BYTES = 4 * 2**20  # of a manifest, as registries allow
_SECONDS = 10


@dataclass(frozen=True)
class Registry:
    """A tag of a repository in a registry."""

    host: str
    name: str
    tag: str

    @classmethod
    def parse(cls, text: str) -> "Registry":
        found = _FORM.fullmatch(text)
        if not found:
            raise ConfigError(
                f"to=oci:{text} must be oci:HOST/NAME:TAG, NAME in small letters, as ghcr.io/me/adapter:v1"
            )
        return cls(**found.groupdict())

    def __str__(self) -> str:
        return f"oci:{self.host}/{self.name}:{self.tag}"

    def check(self, public: bool) -> str:
        if public:
            raise ConfigError(f"public=true is for hf: places; who sees {self} is decided in its registry")
        with self._client() as client:
            there = self._manifest(client, self.tag)
        if there and there[1].get("artifactType") != _KIND:
            raise ConfigError(f"{self} holds something that lora-ft did not publish: name another tag")
        return f"{self} ({'replaces the package there' if there else 'new'}; who sees it, the registry decides)"

    def send(self, folder: Path, message: str, public: bool) -> str:
        self.check(public)
        manifest, files = _manifest_of(folder, message)
        data = _canonical(manifest)
        digest = _digest(data)
        with self._client() as client:
            there = self._manifest(client, self.tag)
            if not there or there[0] != digest:
                self._put_blob(client, manifest["config"], _EMPTY)
                for layer, path in zip(manifest["layers"], files, strict=True):
                    self._put_blob(client, layer, path.read_bytes())
                headers = {"Content-Type": _MANIFEST}
                answer = client.do_request(self._url(client, "manifests", self.tag), "PUT", data=data, headers=headers)
                self._expect(answer, 201)
        return f"oci:{self.host}/{self.name}@{digest}"

    def fetch(self, folder: Path, revision: str | None) -> None:
        with self._client() as client, durable.staged_folder(folder) as staging:
            found = self._manifest(client, revision or self.tag)
            if not found:
                raise ResourceError(f"{self} ({revision or self.tag}) is not in the registry")
            if revision and found[0] != revision:
                raise MismatchError(f"{self}: the registry gives {found[0]} where {revision} was asked for")
            for name, layer in _layers(found[1], str(self)):
                url = self._url(client, "blobs", layer["digest"])
                self._write_blob(client, url, staging / name, layer["digest"])
            sums.check(staging)

    def _manifest(self, client: Any, reference: str) -> tuple[str, dict[str, Any]] | None:
        """Digest and content of a manifest; None where there is none."""
        answer = client.do_request(self._url(client, "manifests", reference), "GET", headers={"Accept": _MANIFEST})
        if answer.status_code == 404:
            return None
        self._expect(answer, 200)
        if len(answer.content) > _MOST_BYTES:
            raise MismatchError(f"{self}: its manifest is larger than {_MOST_BYTES // 2**20} MiB")
        try:
            return _digest(answer.content), dict(json.loads(answer.content))
        except (ValueError, TypeError, RecursionError) as error:
            raise MismatchError(f"{self}: its manifest is no JSON object: {error}") from None

    def _put_blob(self, client: Any, layer: dict[str, Any], data: bytes) -> None:
        if client.do_request(self._url(client, "blobs", layer["digest"]), "HEAD").status_code == 200:
            return
        begun = client.do_request(self._url(client, "blobs/uploads", ""), "POST")
        self._expect(begun, 202)
        place = begun.headers["Location"]
        url = place if "://" in place else f"{client.prefix}://{self.host}{place}"
        headers = {"Content-Type": "application/octet-stream"}
        joint = "&" if "?" in url else "?"
        put = client.do_request(f"{url}{joint}digest={layer['digest']}", "PUT", data=data, headers=headers)
        self._expect(put, 201)

    def _write_blob(self, client: Any, url: str, path: Path, digest: str) -> None:
        with contextlib.closing(client.do_request(url, "GET", stream=True)) as answer:
            self._expect(answer, 200)
            durable.make_folder(path.parent)
            durable.write_stream(path, answer.iter_content(2**20))
        if f"sha256:{sums.sha256(path)}" != digest:
            raise MismatchError(f"{self}: {path.name} is not the layer {digest} of its manifest")

    def _url(self, client: Any, kind: str, reference: str) -> str:
        return f"{client.prefix}://{self.host}/v2/{self.name}/{kind}/{reference}"

    def _expect(self, answer: Any, status: int) -> None:
        if answer.status_code == status:
            return
        if answer.status_code in (401, 403):
            raise self._no_login()
        raise ResourceError(f"{self}: the registry answers {answer.status_code} {answer.text[:200]}: publish again")

    @contextlib.contextmanager
    def _client(self) -> Iterator[Any]:
        """oras' client with the login there is; what goes wrong on the way is a ResourceError."""
        try:
            import oras.container
            import oras.provider
            import requests
            from requests.adapters import HTTPAdapter
            from urllib3.util import Retry
        except ImportError as error:
            raise ConfigError(f"to={self} needs the package {error.name}: pip install 'lora_ft[oci]'") from None
        plain = bool(_HERE.match(self.host))
        try:
            asked = requests.get(f"http{'' if plain else 's'}://{self.host}/v2/", timeout=_SECONDS)
            basic = asked.headers.get("WWW-Authenticate", "").lower().startswith("basic")
            client = oras.provider.Registry(self.host, insecure=plain, auth_backend="basic" if basic else "token")
            client.auth.load_configs(oras.container.Container(f"{self.host}/{self.name}:{self.tag}"))
            if "ORAS_USER" in os.environ and "ORAS_PASS" in os.environ:  # oras itself reads them for one of the two
                client.auth.set_basic_auth(os.environ["ORAS_USER"], os.environ["ORAS_PASS"])
            if basic and not getattr(client.auth, "_basic_auth", None):
                raise self._no_login()
            patient = Retry(4, backoff_factor=1, status_forcelist=(429, 500, 502, 503, 504), allowed_methods=None,
                            raise_on_status=False)  # fmt: skip
            client.session.mount(f"{client.prefix}://", HTTPAdapter(max_retries=patient))
            client.do_request = functools.partial(self._request, client)
            yield client
        except requests.exceptions.RequestException as error:
            raise ResourceError(f"{self} cannot be reached ({error}): publish again, which goes on") from None

    def _request(self, client: Any, url: str, method: str, **given: Any) -> Any:
        """oras' request, once: its own repetition takes two minutes, also where nothing but the login is missing."""
        from oras.provider import Registry as Client
        from requests.exceptions import RequestException

        try:
            return Client.do_request.__wrapped__(client, url, method, **given)
        except RequestException:
            raise
        except ValueError:  # a request for authentication that it cannot answer
            raise self._no_login() from None

    def _no_login(self) -> ResourceError:
        return ResourceError(f"{self} takes no files without a login, or not with this one: docker login {self.host}")


def _manifest_of(folder: Path, message: str) -> tuple[dict[str, Any], list[Path]]:
    """The manifest of a folder, and the file of each of its layers."""
    listed = sums.measured(folder) | {sums.SUMS: sums.sha256(folder / sums.SUMS)}
    files = [folder / name for name in sorted(listed)]
    layers = [
        {
            "mediaType": _TYPES.get(path.suffix, "application/octet-stream"),
            "digest": f"sha256:{digest}",
            "size": path.stat().st_size,
            "annotations": {_TITLE: name},
        }
        for path, (name, digest) in zip(files, sorted(listed.items()), strict=True)
    ]
    from lora_ft.adapters.provenance import RECORD  # loads torch, which a place has no need of otherwise

    base = untrusted.json_object(folder / RECORD, MismatchError).get("base", {})
    annotations = {"org.opencontainers.image.description": message, _BASE: base.get("id")}
    return {
        "schemaVersion": 2,
        "mediaType": _MANIFEST,
        "artifactType": _KIND,
        "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": _digest(_EMPTY), "size": len(_EMPTY)},
        "layers": layers,
        "annotations": {key: str(value) for key, value in annotations.items() if value},
    }, files


def _layers(manifest: dict[str, Any], place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and layer of each file; MismatchError for a manifest of another form, or with names out of its folder."""
    try:
        found = [(layer["annotations"][_TITLE], layer) for layer in manifest["layers"]]
        wrong = [name for name, layer in found if not (sums.is_name(name) and _is_digest(layer["digest"]))]
    except (KeyError, TypeError, AttributeError) as error:
        raise MismatchError(f"{place} is no package of lora-ft: its manifest lacks {error}") from None
    if wrong or len({name for name, _ in found}) < len(found):
        raise MismatchError(f"{place} names a file in no way, or twice: {wrong[:3]}")
    yield from found


def _is_digest(text: str) -> bool:
    return bool(re.fullmatch(r"sha256:[0-9a-f]{64}", text))


def _canonical(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
