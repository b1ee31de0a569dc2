"""The saved view of MLflow's runs page that shows a study's front, and its address.

MLflow keeps shared views as experiment tags; the format is not documented. A view is best effort:
an MLflow that does not know it shows its plain runs page.
"""

from __future__ import annotations

import base64
import json
import time
import zlib
from typing import Any
from urllib.parse import quote

TAG_PREFIX = "mlflow.sharedViewState."

_METRICS = ("teacher_kl", "latency_ms", "size_bytes")
_PARAMS = ("mean_bits", "skipped_units", "tokens")
_TAGS = ("kind", "proposed_by", "runtime", "feasible")


def saved_view(name: str, study_key: str, measure: str = "quality") -> dict[str, Any]:
    """The state of a runs page with this study's front: table, scatters, parallel coordinates.

    `measure` is the metric that says how good a trial is: `quality`, or a perplexity.

    Sorted by a metric: sorted by date, MLflow would show the collapsed parent run alone.
    """
    return {
        "searchFilter": f"tags.study_key = '{study_key}' and tags.pareto = 'true'",
        "orderByKey": "metrics.`latency_ms`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": [
            *(f"metrics.`{metric}`" for metric in (measure, *_METRICS)),
            *(f"params.`{param}`" for param in _PARAMS),
            *(f"tags.`{tag}`" for tag in _TAGS),
        ],
        "columnOrder": [],
        "columnWidths": {},
        "runsHiddenMode": "SHOWALL",
        "compareRunCharts": [
            _scatter("autocomp-latency", "latency_ms", measure),
            _scatter("autocomp-size", "size_bytes", measure),
            {
                **_chart("autocomp-parallel", "PARALLEL"),
                "selectedParams": list(_PARAMS[:2]),
                "selectedMetrics": ["size_bytes", "latency_ms", measure],
            },
        ],
        "compareRunSections": [
            {
                "uuid": "autocomp-front",
                "name": name,
                "display": True,
                "isReordered": False,
                "deleted": False,
                "isGenerated": False,
            }
        ],
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": False,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "globalLineChartConfig": {
            "xAxisKey": "step",
            "lineSmoothness": 0,
            "selectedXAxisMetricKey": "",
        },
    }


def _chart(uuid: str, kind: str) -> dict[str, Any]:
    return {
        "uuid": uuid,
        "runsCountToCompare": 100,
        "metricSectionId": "autocomp-front",
        "deleted": False,
        "isGenerated": False,
        "type": kind,
    }


def _scatter(uuid: str, cost: str, measure: str) -> dict[str, Any]:
    return {
        **_chart(uuid, "SCATTER"),
        "xaxis": {"key": cost, "type": "METRIC"},
        "yaxis": {"key": measure, "type": "METRIC"},
    }


def view_tag(name: str, state: dict[str, Any]) -> str:
    """The value of the experiment tag that holds a view."""
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    now_ms = int(time.time() * 1000)
    return json.dumps(
        {"name": name, "createdAt": now_ms, "updatedAt": now_ms, "state": f"deflate;{packed}"}
    )


def run_artifact_url(base: str, experiment_id: str, run_id: str, path: str) -> str:
    """The address of a run's artifact on the MLflow server at `base`."""
    return (
        f"{base.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}/artifacts/{quote(path)}"
        f"?workflowType=machine_learning"
    )


def view_url(base: str, experiment_id: str, key: str) -> str:
    """The address of the saved view on the MLflow server at `base`."""
    return (
        f"{base.rstrip('/')}/#/experiments/{experiment_id}/runs?workflowType=machine_learning"
        f"&viewStateShareKey={quote(key, safe='')}&compareRunsMode=CHART"
    )
