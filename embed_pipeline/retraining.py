"""Is there anything to train? Asked every night, answered from what lies on disk, without computing anything.

Levels are compared, not events: a night that failed is made up for in the next one.
"""

from __future__ import annotations

from dataclasses import dataclass

from embed_pipeline.champions import pair_key, read_history
from embed_pipeline.errors import ArtifactError, UserError
from embed_pipeline.libraries import installed, upgrades_since
from embed_pipeline.sources.fingerprint import content_digest, fingerprint, look, state_digest
from embed_pipeline.sources.watch import MOST_BYTES, Read
from embed_pipeline.stages import Pipeline, raw_recipe


@dataclass(frozen=True)
class Due:
    """Whether the pipeline should run, and why (not) in a sentence."""

    due: bool
    reason: str


def retraining_due(pipeline: Pipeline) -> Due:
    """Whether the raw files, the cleaned pairs or a model are not what the current evaluation stands for.

    A candidate that was evaluated and refused is not due: the same again would be refused again. Where a source has
    a script, only a run can tell what it builds, so a run is always due; it trains only if the cleaned pairs changed.
    What cannot be seen or read is due as well: the run fails with the cause, where somebody notices.
    """
    built = [source.where for source in pipeline.settings.sources if source.script is not None]
    if built:
        return Due(True, f"{built[0]}.script builds the raw files anew: the run will find out whether they changed")
    try:
        for reason in (_raw_files_changed, _not_made_of_each_other, _libraries_upgraded, _not_promoted):
            if found := reason(pipeline):
                return Due(True, found)
    except (UserError, OSError) as error:
        return Due(True, f"the run will tell what is wrong: {error}")
    raw, embedder = (pipeline.store.current(asset) for asset in ("raw_pairs", pipeline.settings.final_embedder))
    return Due(
        False,
        f"nothing to retrain: the raw files are those that raw_pairs {raw.version} was read from, and "
        f"{embedder.manifest.asset} {embedder.version} was trained on their cleaned pairs and evaluated",
    )


def raw_rows_read(pipeline: Pipeline) -> Read | None:
    """What the current raw rows were read from, None where the YAML's source would read them in another way."""
    try:
        raw = pipeline.store.current("raw_pairs")
    except ArtifactError:  # never made, or not to be used any more
        return None
    content = raw.manifest.recipe.inputs["files"]
    if raw.manifest.recipe != raw_recipe(pipeline, content):
        return None
    return Read(raw.version, content, pipeline.store.state_read(raw))


def _raw_files_changed(pipeline: Pipeline) -> str | None:
    sources, folder = pipeline.settings.sources, pipeline.folder
    read = raw_rows_read(pipeline)
    if read is None:
        return "raw_pairs was never made from these files with these settings"
    files = look(sources, folder)
    if state_digest(files) == read.state:
        return None
    if sum(file.bytes for file in files) > MOST_BYTES:
        return f"the raw files are not as raw_pairs {read.version} found them: the run will find out what changed"
    if content_digest(fingerprint(sources, folder)) == read.content:
        return None
    return f"the raw files are not those that raw_pairs {read.version} was read from"


def _not_made_of_each_other(pipeline: Pipeline) -> str | None:
    """The first stage that was not made from what is current before it."""
    store, final = pipeline.store, pipeline.settings.final_embedder
    merged = ("merged_embedder",) if final == "merged_embedder" else ()
    mined = ("hard_negatives",) if pipeline.settings.mines else ()
    reranked = ("reranker",) if pipeline.settings.reranker is not None else ()
    for asset in ("cleaned_pairs", *mined, "embedder", *merged, *reranked, "evaluation"):
        if not store.has_current(asset):
            return f"{asset} was never made"
        artifact = store.current(asset)
        for upstream, version in artifact.manifest.inputs.items():
            now = store.current(upstream)
            if artifact.manifest.recipe.inputs[upstream] != now.content:
                return f"{asset} {artifact.version} was made from {upstream} {version}, but {now.version} is current"
    return None


def _libraries_upgraded(pipeline: Pipeline) -> str | None:
    if not pipeline.settings.retrain_after_library_upgrade:
        return None
    embedder = pipeline.store.current("embedder")
    if embedder.manifest.recipe.settings.get("libraries") == installed():
        return None
    upgrades = upgrades_since(embedder) or "made before retrain_after_library_upgrade was switched on"
    return f"embedder {embedder.version} was {upgrades}"


def _not_promoted(pipeline: Pipeline) -> str | None:
    """A candidate that passed the gate and yet does not serve, because its promotion failed."""
    store = pipeline.store
    evaluation, embedder = (store.current(asset) for asset in ("evaluation", pipeline.settings.final_embedder))
    reranker = store.current("reranker") if pipeline.settings.reranker is not None else None
    key, history = pair_key(embedder, reranker), read_history(store)
    serves = history.champion is not None and history.champion.key == key
    if evaluation.report["gate"]["outcome"] != "promote" or serves or history.taken_down(key):
        return None
    return f"{embedder.manifest.asset} {embedder.version} passed the gate, but it does not serve"
