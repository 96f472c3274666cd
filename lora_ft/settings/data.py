"""Settings of the rows."""

from dataclasses import dataclass
from typing import Any

from lora_ft.settings.setting import OnResume, setting
from lora_ft.values import Format, MixUntil, TooLong, TrainOn, Turns


@dataclass(slots=True)
class Data:
    path: str = setting(
        "",
        "rows: .jsonl .json .csv .tsv .parquet .arrow .txt .zip file (or .gz), folder, hub id, package:NAME/FOLDER, or "
        "cache:KIND/FOLDER",
        path=True,
    )
    format: Format = setting(Format.auto, "format of a row; auto: by its columns")
    columns: dict[str, str] = setting({}, "names of columns in the file, by the expected name")
    where: dict[str, Any] = setting(
        {}, "read only rows whose columns have these values: data.where.COLUMN=VALUE or [A,B]", text=True
    )
    delimiter: str | None = setting(
        None,
        "character between the fields of a table, or tab, comma, semicolon, pipe; null: as the file shows",
        text=True,
        pattern=r'tab|\\t|comma|semicolon|pipe|[^"\r\n]',
    )
    encoding: str | None = setting(
        None, "encoding of text files, such as utf-16 or cp1252; null: utf-8, or by the byte order mark", text=True
    )
    name: str | None = setting(None, "configuration of a hub dataset", text=True)
    split: str = setting(
        "train", "split of a hub dataset, or of a folder whose files are named by split; all: every file", text=True
    )
    revision: str | None = setting(None, "branch, tag or commit of a hub dataset", text=True)
    prompt: str | None = setting(None, "table: template of the prompt, with {column} fields", text=True)
    answer: str | None = setting(None, "table: template of the answer, with {column} fields", text=True)
    system: str | None = setting(None, "system message for chat rows that have none", text=True)
    labels: Any = setting(
        None,
        "labels, if the answers are labels: a list, a map {value in the rows: label}, or auto (found in the training "
        "rows, for a stream in the eval rows); eval scores them",
    )
    stream: bool = setting(
        False, "read training rows while the run trains, for rows that do not fit a disk; needs train.max_steps"
    )
    shuffle_buffer: int = setting(10_000, "rows of a stream that are shuffled together", unit="rows", at_least=1)
    workers: int | None = setting(
        None, "processes that read and tokenize rows; null: one for each core; 0 or 1: none", unit="processes",
        at_least=0, on_resume=OnResume.free,
    )  # fmt: skip
    turns: Turns = setting(
        Turns.repair,
        "chats whose turns do not alternate, or whose system message the chat template does not take; strict: refuse "
        "them, drop: leave them out",
    )
    template: dict[str, Any] = setting({}, "variables of the chat template by name, as in enable_thinking: false")
    strict: bool = setting(
        False, "refuse rows that are read only after a conversion, which the report counts otherwise"
    )
    deduplicate: bool = setting(False, "leave out duplicate rows (ignoring case and whitespace)")
    max_rows: int | None = setting(None, "maximum number of rows to read", unit="rows", at_least=1)
    max_length: int = setting(1024, "maximum length of a row", unit="tokens", at_least=2)
    too_long: TooLong = setting(
        TooLong.error, "handling of longer rows; answers are never truncated; split: cut plain text into windows"
    )
    train_on: TrainOn = setting(TrainOn.answers, "which tokens are supervised")
    train_on_thoughts: str = setting(
        "nonempty",
        "supervise the thoughts of answers: true, false, nonempty (but not one that the template wrote without text)",
        pattern="[Tt]rue|[Ff]alse|nonempty",
        text=True,
    )
    eval_fraction: float = setting(
        0.05, "fraction of the rows in the eval set, chosen by a hash of their content; 0: none", at_least=0, below=1
    )
    eval_split: str | None = setting(
        None, "split to evaluate on; null: a folder's validation files if it has any, else eval_fraction", text=True
    )
    eval_path: str | None = setting(
        None, "eval rows: another file, folder or hub dataset, instead of eval_fraction", path=True
    )
    sources: dict[str, dict[str, Any]] = setting(
        {}, "sources of rows by name, each with settings of `data` over those given here: data.sources.NAME.path=FILE"
    )
    mix: dict[str, float] = setting(
        {}, "share of each source in the supervised tokens: data.mix.NAME=0.3; 0: only evaluated", at_least=0
    )
    mix_until: MixUntil = setting(
        MixUntil.first, "end of an epoch of a mix: the first source runs out, or all were seen and shorter ones repeat"
    )
