"""What Spark, Delta, hands and broken disks leave in a folder: every file is read, told as not read, or refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embed_pipeline.errors import ConfigurationError, SourceError
from embed_pipeline.settings import SourceSettings
from embed_pipeline.sources.check import find_files
from embed_pipeline.sources.fingerprint import content_digest, fingerprint, look, state_digest
from embed_pipeline.sources.read import SourceReport, read_sources
from embed_pipeline.tables import RAW_EXAMPLES_FILE, RAW_FILE

Write = Callable[..., Path]


def pair(text: str) -> dict[str, list[str]]:
    return {"query": [f"{text}?"], "passage": [text]}


def read(folder: Path, **settings: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Rows by their query or first sentence, and why files were not read; the fingerprint is of the files read."""
    source = SourceSettings.model_validate(settings)
    (folder / "out").mkdir(exist_ok=True)
    report: SourceReport = read_sources(source, folder, folder / "out")
    table = folder / "out" / (RAW_FILE if source.is_retrieval else RAW_EXAMPLES_FILE)
    empty = {one.source for one in report.not_read if one.reason == "no rows"}
    files = {entry["source"] for entry in fingerprint([source], folder)}
    assert files == {state.name for state in look([source], folder)} == empty | {one.source for one in report.files}
    rows = {row.get("query") or row["sentence1"]: row for row in pq.read_table(table, partitioning=None).to_pylist()}
    return rows, {one.source: one.reason for one in report.not_read}


# --- folders key=value -----------------------------------------------------------------------------------


def test_a_files_own_columns_go_before_its_folders(tmp_path: Path, parquet: Write, caplog: Any) -> None:
    own = {**pair("a"), "split": ["dev"], "relevance": [0.5], "document_id": ["d"]}
    parquet("raw/query=zzz/split=train/relevance=9/document_id=x/a.parquet", **own)
    rows, _ = read(tmp_path, path="raw")
    assert rows["a?"] | {"split": "dev", "relevance": 0.5, "document_id": "d", "passage": "a"} == rows["a?"]
    assert "its column 'split' takes precedence over split=train" in caplog.text


def test_folders_above_the_yaml_say_nothing(tmp_path: Path, parquet: Write) -> None:
    parquet("split=test/title=T/raw/a.parquet", **pair("a"))
    rows, _ = read(tmp_path / "split=test" / "title=T", path="raw")
    assert (rows["a?"]["split"], rows["a?"]["title"]) == (None, None)


@pytest.mark.parametrize("path", ["raw", "raw/*/*/*.parquet", "raw/split=*", "raw/**/*.parquet"])
def test_columns_that_files_lack_come_from_their_folders(tmp_path: Path, parquet: Write, path: str) -> None:
    parquet("raw/split=train/page=007/part-0.parquet", **pair("a"))
    parquet("raw/split=test/page=1%2F2/part-0.parquet", **pair("b"))
    parquet("raw/split=__HIVE_DEFAULT_PARTITION__/page=3/part-0.parquet", **pair("c"))
    rows, not_read = read(tmp_path, path=path, columns={"document_id": "page"})
    assert {query: (row["split"], row["document_id"]) for query, row in rows.items()} == {
        "a?": ("train", "007"),
        "b?": ("test", "1/2"),
        "c?": (None, "3"),
    }
    assert not_read == {}


def test_a_score_from_a_folder_must_be_a_number(tmp_path: Path, parquet: Write) -> None:
    parquet("raw/score=0.5/a.parquet", sentence1=["a"], sentence2=["b"])
    rows, _ = read(tmp_path, kind="scored", path="raw")
    assert rows["a"]["score"] == 0.5
    parquet("raw/score=-1e-3/a.parquet", sentence1=["c"], sentence2=["b"])
    rows, _ = read(tmp_path, kind="scored", path="raw")
    assert rows["c"]["score"] == -0.001


@pytest.mark.parametrize("value", ["high", "\u0661", "1_0", "0x10", "nan", "inf", "1e999", ""])
def test_a_folder_without_a_number(tmp_path: Path, parquet: Write, value: str) -> None:
    parquet(f"raw/score={value}/a.parquet", sentence1=["a"], sentence2=["b"])
    with pytest.raises(
        SourceError, match=rf"no column 'score' .* and score={value} in place of it is no number\. Give"
    ):
        read(tmp_path, kind="scored", path="raw")


@pytest.mark.parametrize("name", ["Split", "SPLIT", " split", "split\u200b"])
def test_an_optional_column_is_found_whatever_its_letter_case(
    tmp_path: Path, parquet: Write, name: str, caplog: Any
) -> None:
    parquet("raw/a.parquet", **pair("a"), **{name: ["test"]})
    parquet(f"folders/{name}=dev/a.parquet", **pair("b"))
    rows, _ = read(tmp_path, path="raw")
    assert rows["a?"]["split"] == "test"
    assert f"its column {name!a} is read as 'split' (source.columns.split)" in caplog.text
    rows, _ = read(tmp_path, path="folders")
    assert rows["b?"]["split"] == "dev"


def test_all_optional_columns_are_found_whatever_their_letter_case(tmp_path: Path, parquet: Write) -> None:
    optional = {"Title": ["t"], "Document_ID": ["d"], "PASSAGE_ID": ["p"], "Query_Id": ["q"], "Relevance": [2.0]}
    parquet("raw/a.parquet", **pair("a"), **optional)
    rows, _ = read(tmp_path, path="raw")
    assert rows["a?"] | {name.lower(): value for name, (value,) in optional.items()} == rows["a?"]


def test_numbered_negatives_are_found_whatever_their_letter_case(tmp_path: Path, parquet: Write) -> None:
    parquet("raw/a.parquet", query=["a?"], positive=["a"], negative=["b"], Negative_2=["c"])
    read_sources(SourceSettings(kind="triplets", path="raw"), tmp_path, tmp_path)
    table = pq.read_table(tmp_path / RAW_FILE).to_pylist()
    assert {row["passage"] for row in table if row["kind"] == "pair"} == {"c"}


def test_the_exact_name_takes_precedence_over_one_that_looks_alike(tmp_path: Path, parquet: Write) -> None:
    parquet("raw/a.parquet", **pair("a"), **{"split": ["test"], "Split ": ["other"]})
    assert read(tmp_path, path="raw")[0]["a?"]["split"] == "test"


def test_two_names_that_can_be_meant_are_refused(tmp_path: Path, parquet: Write) -> None:
    parquet("columns/a.parquet", **pair("a"), **{"Split": ["test"], "split ": ["dev"]})
    with pytest.raises(
        SourceError, match=r"the columns 'Split' and 'split ' can both be meant by 'split' \(source\.col"
    ):
        read(tmp_path, path="columns")
    parquet("folders/Split=test/split=train/a.parquet", **pair("a"))
    with pytest.raises(SourceError, match=r"the folders .*'Split' and 'split' can both be meant by 'split'"):
        read(tmp_path, path="folders")


def test_a_column_in_another_letter_case_takes_precedence_over_a_folder(tmp_path: Path, parquet: Write) -> None:
    parquet("raw/SPLIT=test/a.parquet", **pair("a"), Split=["dev"])
    assert read(tmp_path, path="raw")[0]["a?"]["split"] == "dev"


@pytest.mark.parametrize("split", ["split", "Split"])
def test_folders_of_jsonl(tmp_path: Path, split: str) -> None:
    place = tmp_path / "raw" / "query=z" / f"{split}=test"
    place.mkdir(parents=True)
    (place / "a.jsonl").write_text('{"query": "q", "pos": ["p"]}\n')
    rows, _ = read(tmp_path, kind="flag-embedding", path="raw")
    assert (rows["q"]["split"], rows["q"]["passage"]) == ("test", "p")


# --- Spark -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["raw", "raw/*", "raw/*.parquet", "raw/**", "raw/**/*.parquet"])
def test_files_and_folders_of_parts_are_read_together(tmp_path: Path, parquet: Write, path: str) -> None:
    parquet("raw/one.parquet", **pair("a"))
    parquet("raw/many.parquet/part-0.snappy.parquet", **pair("b"))
    parquet("raw/many.parquet/part-1.parquet", query=pa.array([], pa.string()), passage=pa.array([], pa.string()))
    parquet("raw/many.parquet/_temporary/0/part-2.parquet", **pair("unfinished"))
    parquet("raw/.hidden.parquet", **pair("unfinished"))
    (tmp_path / "raw" / "many.parquet" / "_SUCCESS").touch()
    (tmp_path / "raw" / "many.parquet" / ".part-0.snappy.parquet.crc").touch()
    rows, not_read = read(tmp_path, path=path)
    assert set(rows) == {"a?", "b?"}
    assert not_read.pop("raw/many.parquet/part-1.parquet") == "no rows"
    assert not_read.pop("raw/many.parquet/_temporary").startswith("a folder whose name starts with `_`")
    assert set(not_read) <= {"raw/.hidden.parquet"}  # a glob does not match it


def test_a_folder_that_the_yaml_names_is_read_whatever_its_name(tmp_path: Path, parquet: Write) -> None:
    parquet("_staged/a.parquet", **pair("a"))
    assert set(read(tmp_path, path="_staged/*.parquet")[0]) == set(read(tmp_path, path="_staged")[0]) == {"a?"}


def test_files_of_other_formats_are_told(tmp_path: Path, parquet: Write) -> None:
    parquet("raw/a.PARQUET", **pair("a"))
    others = ("b.csv", "c.parquet.gz", "d.jsonl", "e.parquet.tmp")
    for name in (*others, "README.md"):
        (tmp_path / "raw" / name).write_text("x")
    rows, not_read = read(tmp_path, path="raw")
    assert set(rows) == {"a?"}
    assert not_read == {
        f"raw/{n}": "not a .parquet file" for n in ("b.csv", "c.parquet.gz", "d.jsonl", "e.parquet.tmp")
    }


def test_no_part_has_rows(tmp_path: Path, parquet: Write) -> None:
    for name in ("a", "b"):
        parquet(f"raw/{name}.parquet", query=pa.array([], pa.string()), passage=pa.array([], pa.string()))
    with pytest.raises(SourceError, match=r"raw/a\.parquet \(and 1 more\): no rows\. Build the file again"):
        read(tmp_path, path="raw")


def test_an_empty_jsonl_beside_others(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(SourceError, match=r"a\.jsonl: no rows"):
        read(tmp_path, kind="flag-embedding", path="*.jsonl")
    (tmp_path / "b.jsonl").write_text('{"query": "q", "pos": ["p"]}\n')
    rows, not_read = read(tmp_path, kind="flag-embedding", path="*.jsonl")
    assert (set(rows), not_read) == ({"q"}, {"a.jsonl": "no rows"})


# --- links and what is no file ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["raw", "raw/*", "raw/*.parquet"])
def test_a_broken_link_is_refused(tmp_path: Path, parquet: Write, path: str) -> None:
    parquet("raw/a.parquet", **pair("a"))
    (tmp_path / "raw" / "b.parquet").symlink_to("/mnt/share/b.parquet")
    with pytest.raises(ConfigurationError, match=r"b\.parquet is a link to /mnt/share/b\.parquet, which is not there"):
        read(tmp_path, path=path)


def test_a_broken_link_to_a_folder_is_refused(tmp_path: Path, parquet: Write) -> None:
    parquet("raw/a.parquet", **pair("a"))
    (tmp_path / "raw" / "2026").symlink_to("/mnt/share/2026")
    with pytest.raises(ConfigurationError, match=r"2026 is a link to /mnt/share/2026, which is not there"):
        read(tmp_path, path="raw")


@pytest.mark.parametrize("path", ["raw", "raw/*.parquet", "raw/p.parquet"])
def test_a_pipe_is_refused(tmp_path: Path, parquet: Write, path: str) -> None:
    parquet("raw/a.parquet", **pair("a"))
    os.mkfifo(tmp_path / "raw" / "p.parquet")
    with pytest.raises(ConfigurationError, match=r"p\.parquet is no file but a pipe, socket or device"):
        read(tmp_path, path=path)


def test_links_that_lead_back_or_to_the_same_file(tmp_path: Path, parquet: Write) -> None:
    parquet("raw/a.parquet", **pair("a"))
    parquet("elsewhere/b.parquet", **pair("b"))
    (tmp_path / "raw" / "loop").symlink_to(tmp_path / "raw")
    (tmp_path / "raw" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "raw" / "c.parquet").symlink_to("a.parquet")
    rows, not_read = read(tmp_path, path="raw")
    assert set(rows) == {"a?", "b?"}
    assert not_read == {"raw/c.parquet": "the same file as raw/a.parquet", "raw/loop": "the same folder as raw"}


def test_folders_that_are_linked_to_each_other_are_searched_once(tmp_path: Path, parquet: Write) -> None:
    """By every way through ten such folders, it would be millions."""
    names = [f"{number}" for number in range(10)]
    for name in names:
        parquet(f"raw/{name}/a.parquet", **pair(name))
    for name in names:
        for other in set(names) - {name}:
            (tmp_path / "raw" / name / f"to-{other}").symlink_to(tmp_path / "raw" / other)
    rows, not_read = read(tmp_path, path="raw")
    assert set(rows) == {f"{name}?" for name in names}
    assert set(not_read.values()) == {f"the same folder as raw/{name}" for name in names}
    assert len(not_read) == 90


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look everywhere")
@pytest.mark.parametrize("path", ["raw", "raw/*/*.parquet", "raw/**/*.parquet"])
def test_a_folder_without_permission_is_refused(tmp_path: Path, parquet: Write, path: str) -> None:
    parquet("raw/one/a.parquet", **pair("a"))
    closed = parquet("raw/two/b.parquet", **pair("b")).parent
    closed.chmod(0)
    try:
        with pytest.raises(ConfigurationError, match=r"two cannot be looked into: Permission denied"):
            read(tmp_path, path=path)
    finally:
        closed.chmod(0o700)


# --- Delta -----------------------------------------------------------------------------------------------


class Delta:
    """A Delta table as its writers leave it: a commit a version."""

    def __init__(self, table: Path, parquet: Write) -> None:
        self.table, self.parquet, self.version = table, parquet, -1
        (table / "_delta_log").mkdir(parents=True)

    def commit(self, *actions: Any) -> None:
        self.version += 1
        log = self.table / "_delta_log" / f"{self.version:020d}.json"
        log.write_text("".join(json.dumps(action) + "\n" for action in ({"commitInfo": {}}, *actions)))

    def write(self, text: str, **columns: Any) -> dict[str, Any]:
        self.parquet(f"{self.table.name}/{text}.parquet", **pair(text), **columns)
        return {"add": {"path": f"{text}.parquet", "size": 1, "dataChange": True}}

    def checkpoint(self, *files: str, partition: list[tuple[str, str | None]] | None = None) -> None:
        rows: list[dict[str, Any]] = [
            {"add": {"path": f"{name}.parquet", "partitionValues": partition}, "metaData": None} for name in files
        ]
        rows.append({"add": None, "metaData": {"configuration": [("delta.appendOnly", "false")]}})
        schema = pa.schema(
            {
                "add": pa.struct({"path": pa.string(), "partitionValues": pa.map_(pa.string(), pa.string())}),
                "metaData": pa.struct({"configuration": pa.map_(pa.string(), pa.string())}),
            }
        )
        log = self.table / "_delta_log"
        pq.write_table(pa.Table.from_pylist(rows, schema), log / f"{self.version:020d}.checkpoint.parquet")
        for commit in log.glob("*.json"):
            commit.unlink()


@pytest.fixture
def table(tmp_path: Path, parquet: Write) -> Delta:
    made = Delta(tmp_path / "table", parquet)
    made.commit(made.write("old"), made.write("kept"), {"metaData": {"configuration": {}}})
    made.commit({"remove": {"path": "old.parquet"}}, made.write("new"))
    return made


@pytest.mark.parametrize("path", ["table", "table/*.parquet", "ta*"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_delta_table_is_its_current_files(tmp_path: Path, table: Delta, path: str, checkpoint: bool) -> None:
    if checkpoint:
        table.checkpoint("kept", "new")
    table.commit(table.write("newest"))
    rows, not_read = read(tmp_path, path=path)
    assert set(rows) == {"kept?", "new?", "newest?"}
    log = {"table/_delta_log"} if checkpoint and path != "table/*.parquet" else set()
    assert set(not_read) == {"table/old.parquet"} | log
    assert not_read["table/old.parquet"] == "the log of the Delta table table does not name it any more"


def test_a_partitioned_delta_table(tmp_path: Path, table: Delta, parquet: Write) -> None:
    parquet("table/split=test/a b.parquet", **pair("a"))
    table.commit({"add": {"path": "split=test/a%20b.parquet"}})
    assert read(tmp_path, path="table")[0]["a?"]["split"] == "test"


@pytest.mark.parametrize("path", ["table", "table/*.parquet", "table/new.parquet"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_log_tells_the_partition_wherever_the_file_lies(
    tmp_path: Path, table: Delta, path: str, checkpoint: bool
) -> None:
    table.commit({"add": {"path": "new.parquet", "partitionValues": {"split": "test", "title": ""}}})
    if checkpoint:
        table.checkpoint("kept", "new", partition=[("split", "test"), ("title", None)])
    rows, _ = read(tmp_path, path=path)
    assert (rows["new?"]["split"], rows["new?"]["title"]) == ("test", None)


@pytest.mark.parametrize("folder", ["split=train", "Split=train"])
def test_the_log_takes_precedence_over_folders_and_columns(
    tmp_path: Path, table: Delta, parquet: Write, folder: str
) -> None:
    parquet(f"table/{folder}/a.parquet", **pair("a"))
    parquet(f"table/{folder}/b.parquet", **pair("b"), split=["dev"])
    values = {"partitionValues": {"split": "test"}}
    table.commit(*({"add": {"path": f"{folder}/{name}.parquet", **values}} for name in "ab"))
    rows, _ = read(tmp_path, path="table")
    assert (rows["a?"]["split"], rows["b?"]["split"]) == ("test", "test")


def test_other_values_in_the_log_are_another_content(tmp_path: Path, table: Delta) -> None:
    source = SourceSettings(path="table")
    digests, states = set(), set()
    for split in (None, "test", "dev"):
        table.commit({"add": {"path": "new.parquet", "partitionValues": {"split": split}}})
        digests.add(content_digest(fingerprint([source], tmp_path)))
        states.add(state_digest(look([source], tmp_path)))
    assert len(digests) == len(states) == 3


BROKEN: dict[str, tuple[Callable[[Delta], Any], str]] = {
    "deletion vector": (
        lambda t: t.commit({"add": {"path": "kept.parquet", "deletionVector": {"storageType": "u"}}}),
        "deleted by a deletion vector, and are still in kept.parquet. Rewrite",
    ),
    "column mapping": (
        lambda t: t.commit({"metaData": {"configuration": {"delta.columnMapping.mode": "name"}}}),
        r"maps its columns \(name\)",
    ),
    "file gone": (lambda t: (t.table / "new.parquet").unlink(), "names new.parquet, which is not there"),
    "file elsewhere": (lambda t: t.commit({"add": {"path": "s3://bucket/a.parquet"}}), "has files elsewhere"),
    "file above": (lambda t: t.commit({"add": {"path": "../out/a.parquet"}}), r"has files elsewhere \(\.\./out"),
    "file above, encoded": (lambda t: t.commit({"add": {"path": "%2E%2E/a.parquet"}}), "has files elsewhere"),
    "absolute, encoded": (lambda t: t.commit({"add": {"path": "%2Ftmp/a.parquet"}}), "has files elsewhere"),
    **{
        f"entry {entry}": (
            lambda t, entry=entry: t.commit(entry),
            r"table cannot be read: it has the entry .*, which is not as Delta's protocol says",
        )
        for entry in (
            {"add": ["a.parquet"]},
            {"add": {"path": 5}},
            {"add": {}},
            {"add": {"path": "kept.parquet", "partitionValues": {"split": 5}}},
            {"add": {"path": "kept.parquet", "partitionValues": "split"}},
            {"remove": "a"},
            {"metaData": {"configuration": 3}},
            [1],
            7,
        )
    },
    "commit gone": (lambda t: (t.table / "_delta_log" / f"{0:020d}.json").unlink(), "lacks commits"),
    "commit damaged": (
        lambda t: (t.table / "_delta_log" / f"{1:020d}.json").write_text('{"add"'),
        "the log of the Delta table .*table cannot be read",
    ),
    "emptied": (
        lambda t: t.commit({"remove": {"path": "kept.parquet"}}, {"remove": {"path": "new.parquet"}}),
        "the table is empty",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_delta_table_that_its_files_do_not_tell_is_refused(tmp_path: Path, table: Delta, case: str) -> None:
    breaks, message = BROKEN[case]
    breaks(table)
    with pytest.raises(ConfigurationError, match=rf"source\.path: .*{message}"):
        find_files(SourceSettings(path="table"), tmp_path)
