"""Publish an adapter: open -> package -> verify -> scan -> send -> fetch -> compare.

lora-ft publish run=runs/2026-11-23_10-15-00 to=hf:me/my-adapter
lora-ft publish run=... to=dir:my-package dry_run=true          # everything except sending
lora-ft publish lint_only=true adapter_path=DIR_OR_ID           # programs that can load any adapter
lora-ft publish verify_only=true adapter_path=DIR_OR_ID         # verify a published adapter again

The package is made in the user's cache and removed once it is sent. A destination holds either its old package or the
new one, never parts of both.
"""

import contextlib
import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_ft import config, runs, validation
from lora_ft.adapters import loading, peft_folder
from lora_ft.cli import entry
from lora_ft.errors import MismatchError
from lora_ft.io import durable
from lora_ft.publishing import (
    checksums,
    compatibility,
    destinations,
    package,
    prepare,
    secret_scan,
    verification,
)
from lora_ft.publishing.adapter_facts import Level
from lora_ft.publishing.compatibility import Verdict
from lora_ft.publishing.verification import Verification

log = logging.getLogger("lora_ft")

_COLORS = {Level.OK: "green", Level.WARN: "yellow", Level.REFUSED: "red"}


@dataclass(frozen=True)
class PublishedFile:
    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class PublishResult:
    """A verified package. `address` is the one it was sent to; None for a dry run, which keeps it in `folder`."""

    destination: str  # a description
    address: str | None
    folder: Path
    files: tuple[PublishedFile, ...]
    verification: Verification


def main(cfg: config.PublishRun, invocation: entry.Invocation) -> None:
    """Publish an adapter, or check its compatibility (lint_only), or verify it again (verify_only)."""
    if cfg.lint_only:
        verdicts = check_compatibility(cfg)
        _print_verdicts(verdicts)
        if compatibility.is_unusable(verdicts):
            faults = [v.reason for v in verdicts if v.program == compatibility.FILES and v.level is Level.REFUSED]
            adapter = cfg.run or cfg.adapter_path
            raise MismatchError(f"{adapter} cannot be used: {'; '.join(faults) or 'no program can load it'}")
    elif cfg.verify_only:
        _print_verification(verify(cfg))
    else:
        _print_result(publish(cfg))


def publish(cfg: config.PublishRun) -> PublishResult:
    """Package, verify and send an adapter."""
    validation.validate(cfg)
    destination = destinations.parse(cfg.to)
    adapter = loading.adapter_folder(cfg.run, cfg.adapter_path)
    saved = peft_folder.read_config(adapter)
    cfg = loading.with_base(cfg, adapter, saved)
    with _working_folder(adapter, cfg) as work:
        folder, fetched = work / "package", work / "fetched"
        contents = prepare.contents(cfg, adapter, saved, work)
        verified = package.assemble(folder, contents)
        secret_scan.check(folder, prepare.local_paths(cfg, adapter, work))
        description = destination.check(cfg.public)
        sent = checksums.compute(folder)
        listed = tuple(PublishedFile(name, (folder / name).stat().st_size, digest) for name, digest in sent.items())
        if cfg.dry_run:
            return PublishResult(description, None, folder, listed, verified)
        address = destination.send(folder, f"Adapter for {contents.public.id}", cfg.public)
        destination.fetch(fetched, address.rpartition("@")[2] if "@" in address else None)
        if checksums.compute(fetched) != sent:  # equal files need no second verification
            raise MismatchError(f"the files at {address} differ from those that were sent: somebody else changed them")
        return PublishResult(description, address, folder, listed, verified)


def verify(cfg: config.PublishRun) -> Verification:
    """Verify an adapter again: a run's, one in a folder, or one on the hub."""
    if cfg.run or Path(cfg.adapter_path or "").expanduser().is_dir():
        return _verify_folder(cfg, loading.adapter_folder(cfg.run, cfg.adapter_path))
    with _working_folder(Path(str(cfg.adapter_path)), cfg) as work:
        destinations.parse(f"{prepare.HUB}{cfg.adapter_path}").fetch(work / "fetched", None)
        return _verify_folder(cfg, work / "fetched")


def _verify_folder(cfg: config.PublishRun, folder: Path) -> Verification:
    saved = peft_folder.read_config(folder)
    cfg = loading.with_base(cfg, folder, saved)
    return verification.verify(folder, prepare.base_loading(folder, saved, cfg))


def check_compatibility(cfg: config.PublishRun) -> list[Verdict]:
    """Return the faults of an adapter's files and the programs that can load it."""
    base_config = prepare.base_config(cfg.model)
    if base_config is None:
        log.warning("the adapter is not compared with its base, because no base is named: add model=NAME")
    return compatibility.verdicts(loading.adapter_folder(cfg.run, cfg.adapter_path), base_config)


@contextlib.contextmanager
def _working_folder(adapter: Path, cfg: config.PublishRun) -> Iterator[Path]:
    """Yield a folder in the user's cache, locked; remove it at the end unless a dry run succeeded."""
    key = hashlib.sha256(f"{adapter.resolve()}\0{cfg.to}".encode()).hexdigest()[:16]
    folder = durable.cache_folder("packages") / key
    with runs.locked(folder):
        is_kept = False
        try:
            yield folder
            is_kept = cfg.dry_run
        finally:
            if not is_kept:
                durable.remove_folder(folder)


def _print_result(result: PublishResult) -> None:
    table = Table(box=None, header_style="bold")
    for column in ("file", "bytes", "sha256"):
        table.add_column(column, justify="right" if column == "bytes" else "left")
    for file in result.files:
        table.add_row(Text(file.name), f"{file.size:,}", file.sha256[:16])
    Console().print(table)
    _print_line(_describe(result.verification))
    if result.address:
        _print_line(f"{result.destination}; sent to {result.address}; the files fetched back are identical")
    else:
        _print_line(f"{result.destination}; nothing was sent (dry_run): the package is in {result.folder}")


def _print_verification(verified: Verification) -> None:
    _print_line(_describe(verified))
    if verified.files is None:
        log.warning("the files were not compared with the published ones: the folder has no %s", checksums.FILE)
    else:
        _print_line(f"all {verified.files} files match {checksums.FILE}")
    if verified.distance is None:
        log.warning("the logits were not compared with the trained model's: the folder has no %s", verification.PROBE)


def _describe(verified: Verification) -> str:
    loaded = f"PEFT {verified.versions['peft']} loaded all {verified.keys} tensors without lora_ft"
    if verified.distance is not None:
        loaded += (
            f"; logits differ from the trained model's by {verified.distance:.1e} ({verified.allowed:.1e} is allowed)"
        )
    return f"{loaded}; the adapter changes its base's logits by {verified.effect:.1e}"


def _print_verdicts(verdicts: list[Verdict]) -> None:
    table = Table(box=None, header_style="bold")
    for column in ("program", "verdict", "reason", "remedy"):
        table.add_column(column, overflow="fold")
    for verdict in verdicts:
        level = Text(verdict.level.name, _COLORS[verdict.level])
        table.add_row(verdict.program, level, Text(verdict.reason), Text(verdict.remedy))
    Console().print(table)


def _print_line(text: str) -> None:
    Console().print(Text(text), soft_wrap=True)


if __name__ == "__main__":
    entry.run("publish")
