"""Why a row can be dropped. A row has one reason: the first of this list that applies to it."""

from __future__ import annotations

MISSING_ID = "missing_id"
MISSING_TEXT = "missing_text"
EMPTY_QUERY = "null_or_empty_query"
QUERY_TOO_SHORT = "query_too_short"
QUERY_TOO_LONG = "query_too_long"
EMPTY_PASSAGE = "null_or_empty_passage"
PASSAGE_TOO_SHORT = "passage_too_short"
PASSAGE_TOO_LONG = "passage_too_long"
QUERY_EQUALS_PASSAGE = "query_equals_passage"
INVALID_RELEVANCE = "invalid_relevance"
DUPLICATE_ID = "duplicate_id"
DUPLICATE_QUERY = "duplicate_query"
DUPLICATE_PASSAGE = "duplicate_passage"
UNKNOWN_QUERY = "unknown_query"
UNKNOWN_PASSAGE = "unknown_passage"
NEAR_DUPLICATE_PASSAGE = "near_duplicate_passage"
CONTRADICTION = "contradiction"
DUPLICATE = "duplicate"
SPLIT_LEAK = "split_leak"
OVERLAP_LEAK = "overlap_leak"
HELD_OUT_ELSEWHERE = "held_out_elsewhere"
TRAINED_ON_ELSEWHERE = "trained_on_elsewhere"
QUERY_WITHOUT_POSITIVE = "query_without_positive"
# Of scored, labelled and parallel sources.
EMPTY_SENTENCE = "null_or_empty_sentence"
SENTENCE_TOO_SHORT = "sentence_too_short"
SENTENCE_TOO_LONG = "sentence_too_long"
MISSING_LABEL = "missing_label"
INVALID_SCORE = "invalid_score"
SCORE_OUT_OF_RANGE = "score_out_of_range"

REASONS = {
    MISSING_ID: "a corpus, queries or qrels row without its id",
    MISSING_TEXT: "a query, passage or negative that stands for a missing one, such as nan (`missing_texts`)",
    EMPTY_QUERY: "no query, or nothing visible in it",
    QUERY_TOO_SHORT: "fewer characters than `query_min_characters`",
    QUERY_TOO_LONG: "more characters than `query_max_characters`",
    EMPTY_PASSAGE: "no passage (positive, negative), or nothing visible in it",
    PASSAGE_TOO_SHORT: "fewer characters than `passage_min_characters`",
    PASSAGE_TOO_LONG: "more characters than `passage_max_characters`",
    QUERY_EQUALS_PASSAGE: "query and passage are the same text, letter case aside",
    INVALID_RELEVANCE: "the relevance is null, NaN, infinite or damaged (closer to 0 than any grade)",
    DUPLICATE_ID: "the id was given to another text before",
    DUPLICATE_QUERY: "a query of another row with the same text; its judgements are kept, under one id",
    DUPLICATE_PASSAGE: "a passage of another row with the same text; its judgements are kept, under one id",
    UNKNOWN_QUERY: "a judgement whose query is nowhere, or was dropped",
    UNKNOWN_PASSAGE: "a judgement whose passage is nowhere, or was dropped",
    NEAR_DUPLICATE_PASSAGE: "a corpus passage that gave way to a near-duplicate, which inherits its judgements",
    CONTRADICTION: "one query (in any spelling) and passage, judged differently in two rows; all of them go",
    DUPLICATE: "the same query and passage again, word for word or through a near-duplicate",
    SPLIT_LEAK: "shares its query, document or near-duplicate cluster with a split that goes before (test, dev, train)",
    OVERLAP_LEAK: "its passage repeats too much of a passage that dev or test ask for",
    HELD_OUT_ELSEWHERE: "a train row with a question or positive that a source named before holds out for dev or test",
    TRAINED_ON_ELSEWHERE: "a dev or test row with a question or positive that a source named before trains on",
    QUERY_WITHOUT_POSITIVE: "nothing answers the query (any more)",
}
"""Reason -> what it means, in the order in which rows are looked at."""

EXAMPLE_REASONS = {
    MISSING_TEXT: "a sentence that stands for a missing one, such as nan (`missing_texts`)",
    EMPTY_SENTENCE: "a sentence is null, or nothing is visible in it",
    SENTENCE_TOO_SHORT: "fewer characters than `passage_min_characters`",
    SENTENCE_TOO_LONG: "more characters than `passage_max_characters`",
    MISSING_LABEL: "no label, or one that stands for a missing one (`missing_texts`)",
    INVALID_SCORE: "the score is null, NaN or infinite",
    SCORE_OUT_OF_RANGE: "the score lies outside `score_range` (0 to 1 where it is not set)",
    CONTRADICTION: "the same sentences with another score or label in another row of the split; all of them go",
    DUPLICATE: "the same sentences again (letter case, punctuation and width aside)",
    SPLIT_LEAK: "shares its sentences, or its document, with a split that goes before (test, dev, train)",
    HELD_OUT_ELSEWHERE: "a train row with sentences that a source named before holds out for dev or test",
    TRAINED_ON_ELSEWHERE: "a dev or test row with sentences that a source named before trains on",
}
"""The same for scored, labelled and parallel sources."""
