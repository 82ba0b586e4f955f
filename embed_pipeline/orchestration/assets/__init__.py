"""The pipeline's assets, one factory a file, in the order the data takes; None is an asset that it does without."""

from embed_pipeline.orchestration.assets.champion import champion_asset
from embed_pipeline.orchestration.assets.cleaned_pairs import cleaned_pairs_asset
from embed_pipeline.orchestration.assets.embedder import embedder_asset
from embed_pipeline.orchestration.assets.evaluation import evaluation_asset
from embed_pipeline.orchestration.assets.exports import exports_asset
from embed_pipeline.orchestration.assets.hard_negatives import hard_negatives_asset
from embed_pipeline.orchestration.assets.hub import hub_asset
from embed_pipeline.orchestration.assets.merged_embedder import merged_embedder_asset
from embed_pipeline.orchestration.assets.raw_pairs import raw_pairs_asset
from embed_pipeline.orchestration.assets.reranker import reranker_asset

ASSET_FACTORIES = (
    raw_pairs_asset,
    cleaned_pairs_asset,
    hard_negatives_asset,
    embedder_asset,
    merged_embedder_asset,
    reranker_asset,
    evaluation_asset,
    champion_asset,
    exports_asset,
    hub_asset,
)

__all__ = ["ASSET_FACTORIES"]
