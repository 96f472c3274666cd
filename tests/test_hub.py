"""Publishing to a hub: one commit or none, private, never over somebody else's commit, whichever request fails.

The hub is tests/hub/server.py on loopback; the client is the unmodified huggingface_hub, in a process of its own.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from finished import adapted, contents, package, saved_run, settings
from hub.server import READER, Hub, Refused
from safetensors.torch import load_file
from tiny import tiny_folder

from lora_ft.adapters import files, peft_folder, provenance
from lora_ft.publishing import checksums, verification

CLIENT = Path(__file__).parent / "hub" / "client.py"
CARD = b"---\nbase_model: team/base\nlicense: mit\n---\nwords\n"
OLD = {"README.md": CARD, "adapter_model.safetensors": b"old" * 99, "lora_ft.json": b"{}", "adapter.gguf": b"gone"}
NEW = {"README.md": CARD + b"new\n", "adapter_model.safetensors": b"new" * 99, "lora_ft.json": b"{ }",
       "mlx/adapters.safetensors": b"mlx" * 9}  # fmt: skip


class Client:
    """Sends requests to the process that drives the client, one line each."""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(CLIENT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                env=environment, text=True,
            )  # fmt: skip
        self.environment = environment
        self.log = log

    def __call__(self, do: str, *given: Any, to: str = "hf:me/x", token: str | None = None) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        login = {"HF_TOKEN": self.environment.get("HF_TOKEN", "") if token is None else token}
        request = {"to": to, "do": do, "with": [str(v) if isinstance(v, Path) else v for v in given], "env": login}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, self.log.read_text()
        return dict(json.loads(answer))

    def end(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, Client]]:
    folder = tmp_path_factory.mktemp("hub")
    with Hub(folder) as hub:
        client = Client(hub.environment(), folder / "client.log")
        yield hub, client
        client.end()


@pytest.fixture
def hub(served: tuple[Hub, Client]) -> Hub:
    hub, _ = served
    hub.heal()
    hub.repositories.clear()
    hub.log.clear()
    for blob in hub.blobs.iterdir():
        blob.unlink()
    return hub


@pytest.fixture
def client(served: tuple[Hub, Client]) -> Client:
    return served[1]


def stored(hub: Hub, name: str = "me/x") -> dict[str, bytes]:
    """Return the files of the last commit, without the hub's own."""
    found = hub.repositories[name].files
    return {name: hub.read(digest) for name, digest in found.items() if name != ".gitattributes"}


@pytest.mark.closes("G02", "G03")
def test_package_is_sent_in_one_commit_to_a_private_repository_and_fetched(
    hub: Hub, client: Client, tmp_path: Path
) -> None:
    folder = package(tmp_path / "package", NEW)
    assert client("check", False)["value"] == f"{hub.url}/me/x (new, private)"
    assert not hub.repositories, "check writes nothing"
    address = client("send", folder, "message", False)["value"]
    repository = hub.repositories["me/x"]
    assert repository.private and len(repository.commits) == 2  # the hub's own first one, and ours
    assert stored(hub) == contents(folder)
    assert address == f"hf:me/x@{repository.commits[-1][0]}"
    assert client("fetch", tmp_path / "back", address.partition("@")[2])["value"] is None
    assert contents(tmp_path / "back") == contents(folder)
    shown = client("check", False)["value"]
    assert shown == f"{hub.url}/me/x (existing, private, at {repository.commits[-1][0][:8]})"


def test_sending_the_same_package_again_makes_no_commit(hub: Hub, client: Client, tmp_path: Path) -> None:
    folder = package(tmp_path / "package", NEW)
    first, second = (client("send", folder, "message", False)["value"] for _ in range(2))
    assert first == second and len(hub.repositories["me/x"].commits) == 2


def test_newer_package_replaces_the_older_and_keeps_other_files(hub: Hub, client: Client, tmp_path: Path) -> None:
    client("send", package(tmp_path / "old", OLD), "message", False)
    hub.put("me/x", {"notes.txt": b"mine"})
    shown = client("check", False)["value"]
    assert shown.endswith("; other files there are kept: notes.txt)")
    client("send", package(tmp_path / "new", NEW), "message", False)
    assert stored(hub) == contents(tmp_path / "new") | {"notes.txt": b"mine"}
    assert client("fetch", tmp_path / "back", None)["value"] is None
    assert contents(tmp_path / "back") == contents(tmp_path / "new")


@pytest.mark.closes("G03")
@pytest.mark.parametrize(("fault", "before"), [("die", True), ("died_after", True), ("died_after", False)])
def test_hub_that_fails_at_any_request_holds_the_old_or_the_new_package(
    fault: str, before: bool, hub: Hub, client: Client, tmp_path: Path, record_property: Any
) -> None:
    old, new = package(tmp_path / "old", OLD), package(tmp_path / "new", NEW)
    complete = 0
    for request in range(1, 99):
        hub.repositories.clear()
        for blob in hub.blobs.iterdir():
            blob.unlink()
        if before:
            client("send", old, "message", False)
        commits = len(hub.repositories["me/x"].commits) if before else 1
        hub.arm(fault, request)
        answer = client("send", new, "message", False)
        if not hub.heal():
            break
        found = stored(hub) if hub.repositories else {}
        assert found in ((contents(old) if before else {}), contents(new))
        assert all(repository.private for repository in hub.repositories.values())
        if "error" in answer:
            assert answer["error"] == "ResourceError" and "publish again" in answer["message"]
            assert 15 < answer["waited"] < 300, "it retries for a limited time"
        complete += found == contents(new)
        assert "value" in client("send", new, "message", False), "a rerun completes the upload"
        assert stored(hub) == contents(new)
        assert len(hub.repositories["me/x"].commits) == commits + 1
    assert request > 8 and complete < request / 2
    record_property(
        "figure", f"{fault} at each of {request - 1} requests of an upload: the hub holds the old or the new package"
    )


@pytest.mark.closes("G03")
@pytest.mark.parametrize("fault", ["429", "drop", "answer_lost"])
def test_request_that_fails_once_is_retried(fault: str, hub: Hub, client: Client, tmp_path: Path) -> None:
    old, new = package(tmp_path / "old", OLD), package(tmp_path / "new", NEW)
    for request in range(1, 99):
        hub.repositories.clear()
        for blob in hub.blobs.iterdir():
            blob.unlink()
        client("send", old, "message", False)
        hub.arm(fault, request)
        answer = client("send", new, "message", False)
        if not hub.heal():
            break
        assert "value" in answer, answer
        assert stored(hub) == contents(new)
        assert len(hub.repositories["me/x"].commits) == 3, "a commit whose answer was lost is not made twice"
    assert request > 8


def test_failed_downloads_are_retried(hub: Hub, client: Client, tmp_path: Path) -> None:
    folder = package(tmp_path / "package", NEW)
    client("send", folder, "message", False)
    for request in (1, 3, 5):
        hub.arm("500", request)
        assert client("fetch", tmp_path / f"back{request}", None).get("value", "") is None
        assert hub.heal() and contents(tmp_path / f"back{request}") == contents(folder)
    hub.arm("die", 3)
    answer = client("fetch", tmp_path / "never", None)
    assert answer["error"] == "ResourceError" and not (tmp_path / "never").exists()


@pytest.mark.closes("G05")
@pytest.mark.parametrize("fails", [False, True], ids=["first attempt", "retried"])
def test_commit_by_somebody_else_during_the_upload_is_not_overwritten(
    fails: bool, hub: Hub, client: Client, tmp_path: Path
) -> None:
    client("send", package(tmp_path / "old", OLD), "message", False)
    act, has_met, refused = hub.meet, False, 0

    def meddle(answer: Any) -> Any:
        nonlocal has_met, refused
        if hub.log and "/preupload/" in hub.log[-1] and not has_met:
            hub.put("me/x", {"adapter_model.safetensors": b"theirs"})
            has_met = True
        if fails and has_met and refused < 7:  # more often than the client repeats a request by itself
            refused += 1
            return Refused(500, "try later").answer
        return act(answer)

    hub.meet = meddle  # type: ignore[method-assign]
    answer = client("send", package(tmp_path / "new", NEW), "message", False)
    assert answer["error"] == "ConfigError" and "somebody else has changed hf:me/x" in answer["message"]
    assert stored(hub)["adapter_model.safetensors"] == b"theirs"


@pytest.mark.closes("G02")
def test_visibility_other_than_requested_is_refused(hub: Hub, client: Client, tmp_path: Path) -> None:
    folder = package(tmp_path / "package", NEW)
    hub.put("me/open", {"README.md": b"x"})
    hub.put("me/closed", {"README.md": b"x"}, private=True)
    for do, given in (("check", ()), ("send", (folder, "message"))):
        answer = client(do, *given, False, to="hf:me/open")
        assert answer["error"] == "SecurityError" and "is public: add public=true" in answer["message"]
        answer = client(do, *given, True, to="hf:me/closed")
        assert answer["error"] == "ConfigError" and "is private, and public=true applies to new" in answer["message"]
    assert {name: len(r.commits) for name, r in hub.repositories.items()} == {"me/open": 1, "me/closed": 1}
    assert client("check", True, to="hf:me/new")["value"] == f"{hub.url}/me/new (new, PUBLIC)"
    assert "value" in client("send", folder, "message", True, to="hf:me/new")
    assert not hub.repositories["me/new"].private
    assert "(existing, PUBLIC, at " in client("check", True, to="hf:me/new")["value"]


@pytest.mark.closes("G01", "G05")
def test_errors_name_the_remedy(hub: Hub, client: Client, tmp_path: Path) -> None:
    folder = package(tmp_path / "package", NEW | {"README.md": b"---\nbase_model: /home/me/base\n---\n"})
    answer = client("send", folder, "message", False)
    assert answer["error"] == "ConfigError" and not stored(hub), "refused before anything is sent"
    assert 'the hub refuses the model card: "base_model" with value "/home/me/base" is not valid' in answer["message"]

    answer = client("check", False, token="")
    assert answer["error"] == "ResourceError" and "no login for the hub: set HF_TOKEN" in answer["message"]
    answer = client("check", False, token="hf_" + "x" * 30)
    assert answer["error"] == "ResourceError" and "the hub does not know this token" in answer["message"]
    answer = client("check", False, token=READER)
    assert answer["error"] == "ResourceError" and "the token of me can only read" in answer["message"]
    answer = client("send", package(tmp_path / "new", NEW), "message", False, to="hf:them/x")
    assert answer["error"] == "ResourceError" and "this token may not write to hf:them/x" in answer["message"]
    for wrong in ("hf:x", "hf:me/x/y", "hf:me/-x", "hf:", "hf:me/a b"):
        answer = client("check", False, to=wrong)
        assert answer["error"] == "ConfigError" and f"to={wrong}" in answer["message"]
    secrets = [client.environment["HF_TOKEN"], READER, "hf_" + "x" * 30]
    assert not any(secret in client.log.read_text() + json.dumps(answer) for secret in secrets)


def test_offline_mode_is_reported_without_retries(hub: Hub, tmp_path: Path) -> None:
    client = Client(hub.environment(HF_HUB_OFFLINE="1"), tmp_path / "client.log")
    answer = client("check", False)
    client.end()
    assert answer["error"] == "ConfigError" and "HF_HUB_OFFLINE is set" in answer["message"]


LOADS = """
import sys, torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], revision=sys.argv[2])
model = PeftModel.from_pretrained(base, sys.argv[3], revision=sys.argv[4]).eval()
probe = load_file(sys.argv[5])
with torch.no_grad():
    save_file({"logits": model(probe["ids"][None]).logits[0][:, probe["columns"]].contiguous()}, sys.argv[6])
assert not any(name.startswith("lora_ft") for name in sys.modules)
"""


@pytest.mark.nightly
def test_published_adapter_loads_by_its_id_with_peft(hub: Hub, client: Client, tmp_path: Path) -> None:
    cfg = settings(tmp_path, "llama", use_rslora=True)
    folder = tmp_path / "package"
    base, model = adapted(cfg)
    files.save(model, "first", folder, base.tokenizer, provenance.Provenance(base.identity, cfg.quant, "d"))
    package(folder, {"README.md": CARD, verification.PROBE: verification.make_probe(model, base.tokenizer)})
    address = client("send", folder, "message", False)["value"]
    sources = tiny_folder(tmp_path / "again", "llama")
    commit = hub.put("team/base", {p.name: p.read_bytes() for p in sources.iterdir()})
    subprocess.run(
        [sys.executable, "-c", LOADS, "team/base", commit, *address.removeprefix("hf:").split("@"),
         str(folder / verification.PROBE), str(tmp_path / "logits")],
        env=hub.environment(), check=True, cwd=tmp_path, capture_output=True,
    )  # fmt: skip
    expected, found = load_file(folder / verification.PROBE)["adapter"], load_file(tmp_path / "logits")["logits"]
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-5
    assert (folder / peft_folder.WEIGHTS).stat().st_mode & 0o777 == 0o644


@pytest.mark.nightly
def test_publish_sends_a_run_to_the_hub_and_verifies_it(hub: Hub, tmp_path: Path) -> None:
    cfg = settings(tmp_path, "llama")
    cfg.model.hub_id = "team/base"
    run = saved_run(tmp_path / "run", cfg)
    environment = hub.environment(XDG_CACHE_HOME=str(tmp_path / "cache"))

    def publish(*words: str) -> str:
        command = [sys.executable, "-m", "lora_ft", "publish", *words]
        ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        assert environment["HF_TOKEN"] not in ended.stdout + ended.stderr
        return ended.stdout

    for _ in range(2):
        shown = publish(f"run={run}", "to=hf:me/x", "license=mit")
        commit = hub.repositories["me/x"].commits[-1][0]
        assert f"sent to hf:me/x@{commit}; the files fetched back are identical" in shown
    assert hub.repositories["me/x"].private and len(hub.repositories["me/x"].commits) == 2
    assert environment["HF_TOKEN"].encode() not in b"".join(stored(hub).values())
    assert str(tmp_path).encode() not in b"".join(stored(hub).values())
    shown = publish("verify_only=true", "adapter_path=me/x", f"model.path={cfg.model.path}")
    assert f"all {len(stored(hub)) - 1} files match {checksums.FILE}" in shown
