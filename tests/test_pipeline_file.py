"""A pipeline's YAML means what is written there, and what cannot be right is told with file, line and key."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from embed_pipeline.errors import ConfigurationError
from embed_pipeline.pipeline_file import read_documents, settings_of
from embed_pipeline.settings import PipelineSettings

SMALL = """\
type: embed_pipeline.RetrievalPipeline
attributes:
  name: shop
  source: {path: raw.parquet}
  embedder:
    base_model: {path: model}
"""


def read(text: str | bytes, folder: Path) -> PipelineSettings:
    file = folder / "defs.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    (document,) = read_documents(file)
    return settings_of(document)


def refused(text: str | bytes, folder: Path) -> str:
    with pytest.raises(ConfigurationError) as raised:
        read(text, folder)
    assert str(folder / "defs.yaml") in str(raised.value)
    return str(raised.value).replace(f"{folder}/", "")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (r'"query:\n"', "query:\n"),
        ("\"'quoted: '\"", "'quoted: '"),
        ('"Q {{text}}: "', "Q {{text}}: "),
        ('"{{ query }}"', "{{ query }}"),
        ('"{% if x %}"', "{% if x %}"),
        ("\"{{ env('HOME') }}\"", "{{ env('HOME') }}"),
        ('"None"', "None"),
        ('"1"', "1"),
        ('"[1, 2]"', "[1, 2]"),
        ('"true"', "true"),
        ("None", "None"),
        ("2026-11-28", "2026-11-28"),
        ("12:30:00", "12:30:00"),
        ("007", "007"),
        ('" spaces "', " spaces "),
        ("|\n        two\n        lines\n", "two\nlines\n"),
    ],
)
def test_a_text_stays_what_is_written(written: str, meant: str, tmp_path: Path) -> None:
    settings = read(
        f"{SMALL}    encoding: {{query_prompt: x}}\n".replace("{query_prompt: x}", f"\n      query_prompt: {written}"),
        tmp_path,
    )
    assert settings.embedder.encoding.query_prompt == meant


@pytest.mark.parametrize(
    ("written", "meant"), [("1e-5", 1e-5), ("1.0e-5", 1e-5), ("2", 2.0), ("0.5", 0.5), (".5", 0.5)]
)
def test_a_number_is_read_in_every_usual_form(written: str, meant: float, tmp_path: Path) -> None:
    assert read(f"{SMALL}    learning_rate: {written}\n", tmp_path).embedder.learning_rate == meant


def test_an_environment_variable_is_replaced_by_its_text_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAW", "/data")
    monkeypatch.setenv("EPOCHS", "3")
    monkeypatch.setenv("PROMPT", "{{ env.RAW }} 'x'\n")
    text = SMALL.replace("raw.parquet", "'{{ env.RAW }}/a/{{env.RAW}}.parquet'")
    settings = read(
        f"{text}    epochs: '{{{{ env.EPOCHS }}}}'\n    encoding: {{query_prompt: '{{{{ env.PROMPT }}}}'}}\n", tmp_path
    )
    assert settings.source.path == "/data/a//data.parquet"
    assert settings.embedder.epochs == 3
    assert (
        settings.embedder.encoding.query_prompt == "{{ env.RAW }} 'x'\n"
    )  # what a variable holds is text, no template


def test_every_unset_variable_is_named_with_its_line_and_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOWHERE", raising=False)
    text = SMALL.replace("raw.parquet", "'{{ env.NOWHERE }}/x'").replace("path: model", "path: '{{ env.NOWHERE }}'")
    told = refused(text, tmp_path).splitlines()
    assert told[0].startswith("defs.yaml:4: source.path: the environment variable NOWHERE is not set")
    assert told[1].startswith("defs.yaml:6: embedder.base_model.path: the environment variable NOWHERE is not set")


def test_an_empty_variable_makes_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAW", "")
    assert "source.path: the path is empty" in refused(SMALL.replace("raw.parquet", "'{{ env.RAW }}'"), tmp_path)


BOMB = "type: x\na: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, after in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "defs.yaml: the file is empty. Expected `type: embed_pipeline.RetrievalPipeline`"),
        ("# a comment\n", "defs.yaml: the file is empty"),
        (f"{SMALL}---\n", "the document is empty"),
        (f"{SMALL}  description: Käse\n".encode("latin-1"), "defs.yaml:7: the byte 0xe4 is not UTF-8"),
        (SMALL.encode("utf-16"), "the file is UTF-16 or UTF-32. Save it as UTF-8"),
        (SMALL.encode("utf-16-le"), "the file is UTF-16 or UTF-32. Save it as UTF-8"),
        (f"{SMALL}  description: a\x07b\n", "defs.yaml:7: found the control character 0x07"),
        (f"{SMALL}  description: [a\n", "this is not YAML: while parsing a flow sequence"),
        (f"{SMALL}\tname: x\n", "defs.yaml:7: this is not YAML"),
        (
            f"{SMALL}  description: !!python/object:os.system x\n",
            "defs.yaml:7: description: the tag !!python/object:os.s",
        ),
        (f"{SMALL}  name: other\n", "defs.yaml:7: the key 'name' is given twice, on lines 3 and 7"),
        (f"{SMALL}    base_model: {{path: b}}\n", "the key 'embedder.base_model' is given twice, on lines 6 and 7"),
        (f"{SMALL}  mining: {{top_k: 5, top_k: 6}}\n", "the key 'mining.top_k' is given twice, on lines 7 and 7"),
        ("- a\n", "defs.yaml:1: expected the keys `type` and `attributes`; found no keys at all"),
        ("just words\n", "defs.yaml:1: expected the keys `type` and `attributes`"),
        ("attributes: {name: a}\n", "defs.yaml:1: `type` is missing"),
        ("\ntype: embed_pipeline.Pipeline\n", "defs.yaml:2: there is no component 'embed_pipeline.Pipeline'"),
        ("type: embed_pipeline.RetrievalPipeline\n", "`attributes` is missing"),
        ("type: embed_pipeline.RetrievalPipeline\nattributes: words\n", "defs.yaml:2: `attributes` is missing"),
        (BOMB, "the file expands to more than 20,000 values"),
        ("type: x\nattributes: &a {b: *a}\n", "defs.yaml:2: an alias stands for what it stands in"),
        ("[" * 5000, "keys are nested too deeply"),
        (f"{SMALL}  [a]: b\n", "expected a plain word as key"),
        (SMALL.replace("raw.parquet", "''"), "defs.yaml:4: source.path: the path is empty"),
        (SMALL.replace("raw.parquet", "/"), "defs.yaml:4: source.path: the path is the root of the file system"),
        (SMALL.replace("raw.parquet", "/**/*.parquet"), "source.path: the path is the root of the file system"),
        (SMALL.replace("path: model", "path: ''"), "defs.yaml:6: embedder.base_model.path: the path is empty"),
        (f"{SMALL}    lerning_rate: 1\n", "defs.yaml:7: embedder: unknown key 'lerning_rate'. Did you mean 'learn"),
        (
            f"{SMALL}    epochs: 0\n",
            "defs.yaml:7: embedder.epochs: must be at least 0.001; found 0",
        ),
        (f"{SMALL}    epochs: many\n", "defs.yaml:7: embedder.epochs: must be a number; found 'many'"),
        (
            f"{SMALL}    nproc_per_node: many\n",
            "defs.yaml:7: embedder.nproc_per_node: must be 'auto' or a whole number; found 'many'",
        ),
        (SMALL.replace("  source: {path: raw.parquet}\n", ""), "defs.yaml:2: source is required"),
        (f"{SMALL}    arguments: {{adam_beta1: 5}}\n", "defs.yaml:7: embedder.arguments: adam_beta1: found 5"),
    ],
)
def test_what_cannot_be_right_is_told_with_its_line(text: str | bytes, message: str, tmp_path: Path) -> None:
    assert message in refused(text, tmp_path)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("0b_", "found '0b_', expected a whole number"),
        ("-0x__", "found '-0x__', expected a whole number"),
        ("1" * 5000, f"found '{'1' * 80}... (5,000 characters)', expected a whole number"),
        ("!!int abc", "found 'abc', expected a whole number"),
        ("!!int ''", "found '', expected a whole number"),
        ("!!float abc", "found 'abc', expected a number"),
        ("!!bool maybe", "found 'maybe', expected true or false"),
        ("!!null something", "found 'something', expected null"),
        ("!!timestamp x", "the tag !!timestamp is not known here"),
        ("!!binary aGk=", "the tag !!binary is not known here"),
        ("!!omap [license: b]", "the tag !!omap is not known here"),
        ("!!pairs [license: b]", "the tag !!pairs is not known here"),
        ("!!set {license, b}", "the tag !!set is not known here"),
        ("!mine x", "the tag !mine is not known here"),
        ("!!python/name:os.system x", "the tag !!python/name:os.system is not known here"),
        ("=", "found '=', which YAML takes for something else than text. Quote it"),
    ],
)
@pytest.mark.parametrize("key", ["seed", "card.license", "card.datasets[0]"])
def test_a_value_that_cannot_be_made_is_told_with_its_key(written: str, message: str, key: str, tmp_path: Path) -> None:
    line = {"seed": "seed: {}", "card.license": "card: {{license: {}}}", "card.datasets[0]": "card: {{datasets: [{}]}}"}
    assert refused(f"{SMALL}  {line[key].format(written)}\n", tmp_path).startswith(f"defs.yaml:7: {key}: {message}")


@pytest.mark.parametrize(
    ("written", "kind"),
    [
        ("~", "null"),
        ("1", "a whole number"),
        ("1:30", "a whole number"),
        ("true", "true or false"),
        ("on", "true or false"),
        (".nan", "a number"),
        ("1.5", "a number"),
    ],
)
@pytest.mark.parametrize("where", ["  {}: 1", "  card: {{{}: a}}", "{}: 1"])
def test_a_key_that_is_no_text_is_refused(written: str, kind: str, where: str, tmp_path: Path) -> None:
    told = refused(f"{SMALL}{where.format(written)}\n", tmp_path)
    assert f"found the key '{written}', which YAML reads as {kind}. If it is meant, put it in quotes" in told
    assert told.startswith("defs.yaml:7: ")


def test_another_component_may_have_numbers_for_keys(tmp_path: Path) -> None:
    (tmp_path / "defs.yaml").write_text("type: other.Component\nattributes: {ports: {80: http}}\n")
    (document,) = read_documents(tmp_path / "defs.yaml")
    assert document.attributes == {"ports": {80: "http"}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{SMALL}atributes: {{}}\n", "defs.yaml:7: unknown key 'atributes' beside `type`. Did you mean 'attributes'?"),
        (f"{SMALL}  description: {'[' * 60}{']' * 60}\n", "defs.yaml:7: keys are nested too deeply to be a pipeline"),
        (f"{SMALL}    learning_rate: -1\n", "embedder.learning_rate: must be 'auto' or greater than 0; found -1"),
        (f"{SMALL}    learning_rate: 101\n", "embedder.learning_rate: must be 'auto' or at most 100; found 101"),
        (f"{SMALL}    learning_rate: true\n", "defs.yaml:7: embedder.learning_rate: must be a number; found true"),
        (f"{SMALL}    epochs: yes\n", "defs.yaml:7: embedder.epochs: must be a number; found true"),
        (f"{SMALL}    temperature: 0\n", "embedder.temperature: must be at least 0.0001; found 0"),
        (
            f"{SMALL}    batch_size: 2000000\n",
            "embedder.batch_size: must be 'auto' or at most 1,000,000; found 2000000",
        ),
        (f"{SMALL}    batch_size: 1.5\n", "embedder.batch_size: must be 'auto' or a whole number; found 1.5"),
        (f"{SMALL}    preflight: maybe\n", "embedder.preflight: must be true or false; found 'maybe'"),
        (f"{SMALL}    encoding: {{pooling: max}}\n", "pooling: must be 'cls', 'mean' or 'lasttoken'; found 'max'"),
        (f"{SMALL}  gate: {{metric: ndcg}}\n", "or 'spearman'; found 'ndcg'"),
        (f"{SMALL}  gate: high\n", "defs.yaml:7: gate: must be keys with values; found 'high'"),
        (f"{SMALL}  gate:\n", "defs.yaml:7: gate: must be keys with values; found null"),
        (f"{SMALL}  description: 3\n", "description: must be text. Put it in quotes; found 3"),
        (f"{SMALL}  description: [a]\n", "description: must be text; found a list"),
        (f"{SMALL}  exports: {{formats: onnx}}\n", "exports.formats: must be a list; found 'onnx'"),
        (f"{SMALL}  forgetting: {{coefficients: []}}\n", "coefficients: must have at least 1 entries; found []"),
        (SMALL.replace("shop", "a" * 300), f"name: must have at most 64 characters; found '{'a' * 80}... (300 char"),
        (SMALL.replace("shop", "Käse"), "letters, digits and _, starting with a letter; found 'Käse'"),
        (SMALL.replace("  name: shop\n", ""), "defs.yaml:2: name is required"),
        (
            SMALL.replace("    base_model: {path: model}", "    epochs: 1"),
            "defs.yaml:5: embedder.base_model is required",
        ),
        (f"{SMALL}  hub: {{embedder: name}}\n", "embedder: expected owner/name; found 'name'"),
    ],
)
def test_a_message_says_in_plain_words_what_was_expected_and_found(text: str, message: str, tmp_path: Path) -> None:
    told = refused(text, tmp_path)
    assert message in told
    assert "pydantic" not in told


def test_of_an_environment_variable_only_the_name_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPOCHS", "whatever it is")
    told = refused(f"{SMALL}    epochs: '{{{{ env.EPOCHS }}}}'\n", tmp_path)
    assert "embedder.epochs: must be a number; found the value of {{ env.EPOCHS }}" in told
    assert "whatever it is" not in told


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    told = refused(f"{SMALL}    epochs: 0\n    batch_size: 0\n  mining: {{top_k: x}}\n", tmp_path).splitlines()
    assert [line.split(": must")[0] for line in told] == [
        "defs.yaml:9: mining.top_k",
        "defs.yaml:7: embedder.epochs",
        "defs.yaml:8: embedder.batch_size",
    ]


def test_links_that_lead_nowhere_and_what_is_no_file_are_told(tmp_path: Path) -> None:
    file = tmp_path / "defs.yaml"
    file.symlink_to("/nowhere/at/all.yaml")
    with pytest.raises(ConfigurationError, match=r"defs.yaml: the link leads to /nowhere/at/all.yaml, which is not"):
        read_documents(file)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ConfigurationError, match=r"defs.yaml: expected a file"):
        read_documents(file)


def test_anchors_and_merged_keys_are_read_as_yaml_says(tmp_path: Path) -> None:
    text = SMALL.replace("{path: model}", "&model {path: model}") + (
        "  reranker: {base_model: *model}\n  mining: {<<: {top_k: 30, range_min: 2}, top_k: 40}\n"
    )
    settings = read(text, tmp_path)
    assert settings.reranker is not None
    assert settings.reranker.base_model == settings.embedder.base_model
    assert (settings.mining.top_k, settings.mining.range_min) == (40, 2)


# ------------------------------------------------------------------------------------------------- secrets

PASSWORD, TOKEN = "s3cr3t/Pa+ss", "hf_" + "A1b2C3d4" * 4


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (f"{SMALL}  hub: {{token: {TOKEN}}}\n", "hub.token"),
        (f"{SMALL}  hub: {{token: {PASSWORD}}}\n", "unknown key 'token'"),
        (f"{SMALL}  {TOKEN}: 1\n", ""),
        (f"{SMALL}  tracking: {{experiment: [{PASSWORD}]}}\n", "tracking.experiment"),
        (f"{SMALL}  seed: {TOKEN}\n", "seed"),
        (f"{SMALL}  gate: {{metric: 'x {TOKEN}'}}\n", "gate.metric"),
        (f"{SMALL}  seed: !!int {TOKEN}\n", "seed"),
        (f"{SMALL}  seed: !!int 'http://user:{PASSWORD}@wiki/x'\n", "seed"),
        (f"{SMALL}  hub: {{api_key: !!int {PASSWORD}}}\n", "hub.api_key"),
        (f"{SMALL}  launch: {{kind: slurm, setup: [{PASSWORD}]}}\n", "launch.setup"),
        (f"{SMALL}  launch: {{kind: {{password: {PASSWORD}}}}}\n", "launch.kind"),
        (f"{SMALL}{TOKEN}: 1\n", "unknown key"),
        (SMALL.replace("raw.parquet", f"'s3://AKIA:{PASSWORD}@bucket/x.parquet'"), "source.path"),
        (SMALL.replace("path: model", f"hub: 'https://user:{PASSWORD}@hub/x'"), "embedder.base_model.hub"),
        (f"{SMALL}  launch: {{kind: ray, address: 'http://user:{PASSWORD}@head:8265'}}\n", "launch.address"),
        (f"{SMALL}  launch: {{kind: slurm, setup: 'export HF_TOKEN={TOKEN}'}}\n", "launch.setup"),
        (f"{SMALL}  description: 'see http://user:{PASSWORD}@wiki/x'\n", "description"),
    ],
)
def test_no_error_shows_what_may_be_a_secret(text: str, key: str, tmp_path: Path) -> None:
    told = refused(text, tmp_path)
    assert key in told
    assert PASSWORD not in told
    assert TOKEN not in told


def test_the_settings_themselves_show_no_input_either(tmp_path: Path) -> None:
    given: dict[str, Any] = {"name": "shop", "source": {"path": "x"}, "embedder": {"base_model": {"path": "m"}}}
    for wrong in ({"hub": {"token": PASSWORD}}, {"seed": PASSWORD}, {"exports": [PASSWORD]}):
        with pytest.raises(ValueError, match="validation error") as raised:
            PipelineSettings.model_validate({**given, **wrong})
        assert PASSWORD not in str(raised.value)
