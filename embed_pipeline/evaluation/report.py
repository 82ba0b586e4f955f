"""The report: one self-contained HTML page for a person, and a table for the terminal, from an evaluation's folder."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from markupsafe import Markup
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from embed_pipeline.errors import ArtifactError
from embed_pipeline.evaluation.comparison import BASE_EMBEDDER, BM25, EMBEDDER, RERANKER, Comparison
from embed_pipeline.evaluation.history import HistoryPoint
from embed_pipeline.evaluation.metrics import METRICS
from embed_pipeline.evaluation.plots import changes_plot, gains_plot, history_plot, scores_plot, similarities_plot
from embed_pipeline.evaluation.results import (
    DETAILS_FILE,
    REPORT_FILE,
    SUMMARY_FILE,
    Details,
    EvaluationReport,
)
from embed_pipeline.evaluation.verdict import METRIC_NAMES, SYSTEM_NAMES, interval, percent, row_of, signed
from embed_pipeline.tables import PER_QUERY_FILE, SIMILARITIES_FILE

_TERMINAL_METRICS = ("ndcg_at_10", "mrr_at_10", "recall_at_10", "hit_rate_at_1", "map_at_100")
OUTCOMES = {"promote": "Passed the gate", "refuse": "Refused by the gate", "too_few": "Too few to tell"}
_OF_OUTCOME = {"promote": "green", "refuse": "red", "too_few": "yellow"}
_COLOURS = {"better": "green", "worse": "red", "undecided": "dim"}


def read_report(folder: Path) -> EvaluationReport:
    """What `evaluate` wrote into `folder`. Raises ArtifactError when it is not an evaluation."""
    for name in (SUMMARY_FILE, DETAILS_FILE):
        if not (folder / name).is_file():
            raise ArtifactError(f"no {name} in {folder}: expected the folder of an evaluation version")
    summary = [Comparison.model_validate(row) for row in json.loads((folder / SUMMARY_FILE).read_text("utf-8"))]
    details = Details.model_validate_json((folder / DETAILS_FILE).read_text("utf-8"))
    return EvaluationReport(summary=summary, details=details)


def write_report(folder: Path, to: Path | None = None, history: Sequence[HistoryPoint] | None = None) -> Path:
    """The report of the evaluation in `folder`, as one HTML page: no script, no request, light and dark.

    Written beside the figures, or at the file `to`. The history that it shows ends with this evaluation; a later one,
    with what became of the candidate, can be given.
    """
    report = read_report(folder)
    details = report.details
    points = details.history if history is None else list(history)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"signed": _signed, "percent": percent}
    page = environment.get_template("report.html").render(
        details=details,
        cards=_cards(report.summary),
        tables=_tables(report),
        metric_names=METRIC_NAMES,
        measured={row.metric: METRIC_NAMES[row.metric] for row in report.summary},
        system_names=SYSTEM_NAMES,
        interval=lambda row: interval(row, details.confidence),
        verdict=_needed(report.summary, EMBEDDER, details.metric).verdict,
        reranker_verdict=_verdict_of(details.over_embedder, RERANKER),
        outcomes=OUTCOMES,
        history=list(reversed(points)),
        plots={name: Markup(svg) for name, svg in _plots(report, folder, points).items()},
    )
    path = to or folder / REPORT_FILE
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path


def terminal_table(folder: Path) -> Group:
    """The verdict and the main figures, for rich's `Console.print`."""
    report = read_report(folder)
    details = report.details
    table = Table(title=details.title, title_justify="left", caption_justify="left")
    table.add_column("system", no_wrap=True)
    table.add_column(details.items, justify="right")
    metrics = _TERMINAL_METRICS if details.kind == "retrieval" else ("spearman", "pearson")
    for metric in metrics:
        table.add_column(METRIC_NAMES[metric], justify="right", no_wrap=True)
    for system in dict.fromkeys(row.system for row in report.summary):
        rows = {row.metric: row for row in report.summary if row.system == system}
        cells = [_terminal_cell(rows[metric]) for metric in metrics]
        table.add_row(SYSTEM_NAMES[system], f"{rows[details.metric].num_queries:,}", *cells)
    table.caption = (
        f"below each figure: gain over the base embedder on the same {details.items}; green and red where its "
        f"{percent(details.confidence)} interval leaves out 0"
    )
    verdict = _needed(report.summary, EMBEDDER, details.metric).verdict
    said = "\n".join([details.headline, *details.verdicts.values()])
    gate = "\n".join([details.gate.sentence, *details.gate.reasons[1:]])
    return Group(
        table,
        *([_terminal_sources(details)] if details.sources else []),
        Panel(Text(said), border_style=_COLOURS[verdict]),
        Panel(Text(gate), title=OUTCOMES[details.gate.outcome], border_style=_OF_OUTCOME[details.gate.outcome]),
    )


def _terminal_sources(details: Details) -> Table:
    """The main figures of the library's evaluators."""
    table = Table(title="sentence-transformers' evaluators, on test", title_justify="left")
    table.add_column("source and metric", overflow="fold")
    for name, width in {
        "base": 5,
        "fine-tuned": 10,
        "difference": 10,
        f"{percent(details.confidence)} interval": 16,
    }.items():
        table.add_column(name, justify="right", no_wrap=True, min_width=width)
    for row in details.sources:
        if row.main:
            known = row.interval_low is not None and row.interval_high is not None
            span = f"{signed(row.interval_low or 0)} to {signed(row.interval_high or 0)}" if known else ""
            change = Text(_signed(row.change), style=_COLOURS[row.verdict])
            table.add_row(row.title, f"{row.base:.3f}", f"{row.trained:.3f}", change, span)
    return table


def _signed(value: float) -> str:
    return signed(value) if math.isfinite(value) else "not a number"


def _terminal_cell(row: Comparison) -> Text:
    cell = Text(f"{row.value:.3f}")
    if row.system != BASE_EMBEDDER:
        cell.append(f"\n{signed(row.gain)}", style=_COLOURS[row.verdict])
    return cell


def _cards(summary: list[Comparison]) -> list[dict[str, Any]]:
    if row_of(summary, EMBEDDER, "spearman"):
        told = {
            "spearman": "Spearman: the order of the pairs, by people and by cosine",
            "pearson": "Pearson: the same for the values themselves",
        }
        return [{"what": what, "row": _needed(summary, EMBEDDER, metric)} for metric, what in told.items()]
    told = {
        "hit_rate_at_1": "right passage first",
        "hit_rate_at_10": "right passage in the first ten",
        "ndcg_at_10": "nDCG@10, quality of the first ten",
    }
    return [{"what": what, "row": _needed(summary, EMBEDDER, metric)} for metric, what in told.items()]


def _tables(report: EvaluationReport) -> list[dict[str, Any]]:
    """Systems on all test questions, and rerankers with the embedder on the questions they were given."""
    details = report.details
    everywhere = _by_system([row for row in report.summary if row.num_queries == details.queries])
    tables = [
        {
            "title": f"All {details.queries:,} test {details.items}",
            "baseline": BASE_EMBEDDER,
            "against": "the base embedder",
            "systems": everywhere,
        }
    ]
    reranked = _by_system([row for row in details.over_embedder if row.system != BM25])
    if reranked:
        one = next(iter(reranked.values()))
        embedder = {
            metric: row.model_copy(
                update={
                    "system": EMBEDDER,
                    "value": row.value - row.gain,
                    "gain": 0,
                    "interval_low": 0,
                    "interval_high": 0,
                }
            )
            for metric, row in one.items()
        }
        tables.append(
            {
                "title": f"Reranking the first {details.rerank_top_k} passages of {details.reranked_queries:,} "
                "test questions",
                "baseline": EMBEDDER,
                "against": "the fine-tuned embedder",
                "systems": {EMBEDDER: embedder, **reranked},
            }
        )
    over_champion = _by_system(details.over_champion)
    if over_champion:
        count = next(iter(over_champion.values()))[details.metric].num_queries
        tables.append(
            {
                "title": f"Against the champion, on the {count:,} test {details.items} that it was not trained on"
                if details.seen_by_champion
                else "Against the champion",
                "baseline": "",
                "against": "the champion",
                "systems": over_champion,
            }
        )
    return tables


def _by_system(rows: Sequence[Comparison]) -> dict[str, dict[str, Comparison]]:
    systems = dict.fromkeys(row.system for row in rows)
    return {system: {row.metric: row for row in rows if row.system == system} for system in systems}


def _plots(report: EvaluationReport, folder: Path, history: Sequence[HistoryPoint]) -> dict[str, str]:
    details = report.details
    gains = [row for row in report.summary if row.system == EMBEDDER]
    plots = {"gains": gains_plot(gains, "gains"), "history": history_plot(history, "history")}
    if details.kind == "scored":
        return {**plots, **_similarities(folder)}
    if row_of(details.over_embedder, RERANKER, METRICS[0]):
        reranker = [_needed(details.over_embedder, RERANKER, metric) for metric in METRICS]
        plots["reranker_gains"] = gains_plot(reranker, "reranker_gains")
    edges = [edge for scores in details.scores.values() for edge in (scores.edges[0], scores.edges[-1])]
    for system, scores in details.scores.items():
        plots[f"scores_{system}"] = scores_plot(scores, (min(edges), max(edges)), f"scores_{system}")
    plots["changes"] = changes_plot(_changes(folder), "changes")
    return plots


def _similarities(folder: Path) -> dict[str, str]:
    table = pq.read_table(folder / SIMILARITIES_FILE, partitioning=None)
    plots = {}
    for system in (BASE_EMBEDDER, EMBEDDER):
        of_system = table.filter(pc.equal(table["system"], system)).sort_by("example_id")
        expected, found = (of_system[column].to_numpy() for column in ("score", "similarity"))
        plots[f"similarities_{system}"] = similarities_plot(expected, found, f"similarities_{system}")
    return plots


def _changes(folder: Path) -> np.ndarray:
    table = pq.read_table(folder / PER_QUERY_FILE, filters=[("metric", "==", "ndcg_at_10")], partitioning=None)
    values = {}
    for system in (BASE_EMBEDDER, EMBEDDER):
        of_system = table.filter(pc.equal(table["system"], system)).sort_by("query_id")
        values[system] = of_system["value"].to_numpy()
    return values[EMBEDDER] - values[BASE_EMBEDDER]


def _verdict_of(rows: Sequence[Comparison], system: str) -> str | None:
    row = row_of(rows, system, "ndcg_at_10")
    return row.verdict if row else None


def _needed(rows: Sequence[Comparison], system: str, metric: str) -> Comparison:
    row = row_of(rows, system, metric)
    assert row is not None
    return row
