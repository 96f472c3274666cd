"""Publish an adapter: open -> package -> prove -> scan -> send -> fetch it back -> prove it again.

lora-ft publish run=runs/2026-11-23_10-15-00 to=hf:me/my-adapter
lora-ft publish run=... to=dir:my-package dry_run=true          # all but the sending
lora-ft publish lint_only=true adapter_path=DIR_OR_ID           # who can load it, of anybody's adapter
lora-ft publish verify_only=true adapter_path=DIR_OR_ID         # the proof again, of what was published

A package is made and kept in the user's cache until it is sent; what is there already stays as it was, or is replaced
as a whole.
"""

import contextlib
import dataclasses
import gc
import hashlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_ft import config, runs
from lora_ft.adapters import files, loading, provenance
from lora_ft.cli import entry
from lora_ft.config import QuantKind
from lora_ft.errors import ConfigError, MismatchError
from lora_ft.io import durable, untrusted
from lora_ft.models.load import Identity
from lora_ft.models.locate import locate
from lora_ft.ops.allocator import keep_freed_memory
from lora_ft.publishing import lint, package, places, plain, proof, scan, story, sums
from lora_ft.publishing.facts import Level
from lora_ft.publishing.proof import Proof

if TYPE_CHECKING:
    from peft import LoraConfig

log = logging.getLogger("lora_ft")

_HUB = "hf:"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_COLORS = {Level.OK: "green", Level.WARN: "yellow", Level.REFUSED: "red"}


def main(cfg: config.PublishRun, invocation: entry.Invocation) -> None:
    """Publish the adapter of a run, or one made elsewhere; or only lint it, or prove again what was published."""
    if cfg.lint_only:
        _lint(cfg)
    elif cfg.verify_only:
        _verify(cfg)
    else:
        _publish(cfg)


def _publish(cfg: config.PublishRun) -> None:
    place = places.parse(cfg.to)
    adapter = loading.adapter_folder(cfg.run, cfg.adapter_path)
    cfg = loading.with_base(cfg, adapter)
    public_id, stated = _public_id(cfg, adapter), _license(cfg)
    keep_freed_memory()
    with _workplace(adapter, cfg) as workplace:
        contents = _contents(cfg, adapter, workplace, public_id, stated)
        made, back = workplace / "package", workplace / "fetched"
        proven = package.assemble(made, contents)
        scan.check(made, _private(cfg, adapter, workplace))
        told = place.check(cfg.public)
        if cfg.dry_run:
            _say(made, proven, f"{told}; nothing was sent (dry_run): the package lies in {made}")
            return
        address = place.send(made, f"Adapter for {public_id}", cfg.public)
        place.fetch(back, address.rpartition("@")[2] if "@" in address else None)
        if sums.measured(back) != sums.measured(made):
            raise MismatchError(
                f"what came back from {address} is not what was sent: somebody else wrote there as well"
            )
        proven = proof.prove(back, contents.loading)
        _say(made, proven, f"{told}; sent to {address}, fetched back, and proven again")


@contextlib.contextmanager
def _workplace(adapter: Path, cfg: config.PublishRun) -> Iterator[Path]:
    """A folder in the user's cache, for one process at a time; a dry run's is kept, to be looked at."""
    key = hashlib.sha256(f"{adapter.resolve()}\0{cfg.to}".encode()).hexdigest()[:16]
    folder = durable.cache_folder("packages") / key
    with runs.locked(folder):
        kept = False
        try:
            yield folder
            kept = cfg.dry_run
        finally:
            if not kept:
                durable.remove_folder(folder)


def _public_id(cfg: config.PublishRun, adapter: Path) -> str:
    """The hub id of the base, by which others find it; ConfigError where only a place of this machine is known."""
    named = files.read_config(adapter).base_model_name_or_path
    found = cfg.model.id or locate(cfg.model, weights=False).id or (named if untrusted.is_public_id(named) else None)
    if not found:
        raise ConfigError(
            f"the base of {adapter} is known by a place of this machine only ({cfg.model.path or named}), where nobody "
            "else finds it: add model.id=OWNER/NAME, the base's id on the hub"
        )
    if not untrusted.is_hub_id(found):
        raise ConfigError(f"model.id must be an id of the hub, OWNER/NAME, got {found}")
    return found


def _license(cfg: config.PublishRun) -> str | None:
    """license=, or what the base states; ConfigError where the hub is to have one and nobody says it."""
    stated = cfg.license or story.license_of(cfg.model, locate(cfg.model, weights=False).folder)
    if not stated and cfg.to.startswith(_HUB):
        raise ConfigError("the base states no license, and the hub wants one: add license=NAME, as apache-2.0 or mit")
    if stated and not _LICENSE.fullmatch(stated):
        raise ConfigError(f"license must be a name as the hub has it, apache-2.0 or mit, got {stated}")
    return stated


def _contents(
    cfg: config.PublishRun, adapter: Path, workplace: Path, public_id: str, stated: str | None
) -> package.Contents:
    opened = _plain(cfg, adapter, workplace)
    tokenizer = loading.adapter_tokenizer(adapter, cfg.model)
    base, model = loading.open_adapter(opened, cfg.model, cfg.quant, cfg.device, tokenizer)
    contents = package.Contents(
        adapter=opened,
        tokenizer=tokenizer,
        probe=proof.make_probe(model, tokenizer),
        base_config=untrusted.json_object(Path(str(base.identity.folder)) / "config.json", ConfigError),
        quant=cfg.quant,
        loading=provenance.loading(base, cfg.quant, cfg.model),
        public=_public(base.identity, public_id, files.read_config(opened)),
        story=story.read(Path(cfg.run).expanduser()) if cfg.run else None,
        license=stated,
        name=cfg.to.removeprefix(_HUB) if cfg.to.startswith(_HUB) else "PATH_OF_THIS_FOLDER",
        also=tuple(cfg.also),
    )
    del base, model
    gc.collect()  # modules refer to each other in circles; a process of its own is about to load the base again
    return contents


def _public(base: Identity, public_id: str, saved: "LoraConfig") -> Identity:
    """The base as others find it: its id, or a file inside a package that they can install, and no other place."""
    revision = base.revision or (saved.revision if saved.base_model_name_or_path == public_id else None)
    path = base.path if base.path.startswith("package:") else public_id
    return dataclasses.replace(base, id=public_id, path=path, folder=None, revision=revision)


def _plain(cfg: config.PublishRun, adapter: Path, workplace: Path) -> Path:
    """The adapter's folder, or that of the plain LoRA that it was converted to."""
    if not plain.changes_base(files.read_config(adapter)):
        return adapter
    if cfg.quant.kind is not QuantKind.none:
        raise MismatchError(
            f"{adapter}: of a quantized base, what its start left over is not the rest of the plain one"
        )
    plain.convert(adapter, workplace / "plain")
    return workplace / "plain"


def _private(cfg: config.PublishRun, adapter: Path, workplace: Path) -> set[str]:
    """Paths of this machine that nothing published may name."""
    stored = runs.read_config(Path(cfg.run).expanduser()) if cfg.run else {}
    known = [group.get("path") for name in ("model", "data") if isinstance(group := stored.get(name), dict)]
    base = locate(cfg.model, weights=False).folder
    return scan.local_places(adapter, cfg.run, cfg.model.path, base, workplace, *known)


def _say(folder: Path, proven: Proof, ending: str) -> None:
    """Files and proof as a table, and where it went."""
    table = Table(box=None, header_style="bold")
    for column in ("file", "bytes", "sha256"):
        table.add_column(column, justify="right" if column == "bytes" else "left")
    for name, digest in sums.measured(folder).items():
        table.add_row(Text(name), f"{(folder / name).stat().st_size:,}", digest[:16])
    console = Console()
    console.print(table)
    _say_proof(console, proven)
    console.print(Text(ending), soft_wrap=True)


def _say_proof(console: Console, proven: Proof) -> None:
    near = "" if proven.distance is None else (
        f"; its logits are {proven.distance:.1e} away from the trained model's, {proven.allowed:.1e} is allowed"
    )  # fmt: skip
    console.print(
        f"PEFT {proven.versions['peft']} alone loaded all {proven.keys} tensors{near}; the adapter moves its base's "
        f"logits by {proven.effect:.1e}",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def _lint(cfg: config.PublishRun) -> None:
    """Print who can load an adapter; MismatchError where nobody can."""
    adapter = loading.adapter_folder(cfg.run, cfg.adapter_path)
    verdicts = lint.lint(adapter, _base_config(cfg))
    table = Table(box=None, header_style="bold")
    for column in ("consumer", "verdict", "why", "what helps"):
        table.add_column(column, overflow="fold")
    for verdict in verdicts:
        level = Text(verdict.level.name, _COLORS[verdict.level])
        table.add_row(verdict.consumer, level, Text(verdict.reason), Text(verdict.remedy))
    Console().print(table)
    if lint.is_refused(verdicts):
        broken = [v.reason for v in verdicts if v.consumer == lint.FILES and v.level is Level.REFUSED]
        raise MismatchError(f"{adapter} cannot be used as it is: {'; '.join(broken) or 'every consumer refuses it'}")


def _base_config(cfg: config.PublishRun) -> dict[str, Any] | None:
    """The config.json of the base, where one is named."""
    if not cfg.model.path:
        log.warning("no base is named (model=): whether the adapter fits it is not looked at")
        return None
    folder = locate(cfg.model, weights=False).folder
    return untrusted.json_object(Path(str(folder)) / "config.json", ConfigError)


def _verify(cfg: config.PublishRun) -> None:
    """Prove again what was published: a folder, or what lies on the hub under an id."""
    if cfg.run or Path(cfg.adapter_path or "").expanduser().is_dir():
        _verify_folder(cfg, loading.adapter_folder(cfg.run, cfg.adapter_path))
        return
    with _workplace(Path(str(cfg.adapter_path)), cfg) as workplace:
        places.parse(f"{_HUB}{cfg.adapter_path}").fetch(workplace / "fetched", None)
        _verify_folder(cfg, workplace / "fetched")


def _verify_folder(cfg: config.PublishRun, folder: Path) -> None:
    cfg = loading.with_base(cfg, folder)
    proven = proof.prove(folder, package.loading(folder, cfg.model, cfg.quant, cfg.device))
    console = Console()
    _say_proof(console, proven)
    if proven.files is None:
        log.warning("not checked, whether the files are as they were sent: there is no %s", sums.SUMS)
    else:
        console.print(f"all {proven.files} files are as {sums.SUMS} says", markup=False, highlight=False)
    if proven.distance is None:
        log.warning("not checked, whether the logits are the trained model's: there is no %s", proof.PROBE)


if __name__ == "__main__":
    entry.run("publish")
