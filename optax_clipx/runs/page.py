"""One self-contained page with interactive charts, drawn by Plotly."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .drawing import THEMES, Norms, bins, envelope, means, norms_of
from .escaping import for_page
from .marks import with_outermost
from .missing import missing
from .naming import UPDATE, with_update_norm
from .suggesting import Recorded, suggest_threshold
from .table import STEP, present

_POINTS = 2000
_LINEAR = np.log10(4)  # decades of an axis with fewer than two of 1, 2 and 5 on it
_THEMES = (THEMES["light"], THEMES["dark"])
_HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --page: {light.page}; --text: {light.text};
  --line: {light.grid}; }}
@media (prefers-color-scheme: dark) {{ :root {{ --page: {dark.page};
  --text: {dark.text}; --line: {dark.grid}; }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem;
  padding: 0 1rem; background: var(--page); color: var(--text); }}
h1 {{ font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.1rem; margin: 2rem 0 0; }}
table {{ border-collapse: collapse; margin: 1rem 0; display: block;
  overflow-x: auto; }}
td {{ white-space: nowrap; }}
th, td {{ text-align: left; vertical-align: bottom; padding: .3rem .9rem .3rem 0;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }}
</style></head><body><main>
<h1>{title}</h1>
"""
_PAGE = """{head}{table}
{charts}
<script>
const dark = window.matchMedia("(prefers-color-scheme: dark)");
function restyle() {{
  const text = dark.matches ? "{dark.text}" : "{light.text}";
  const grid = dark.matches ? "{dark.grid}" : "{light.grid}";
  for (const chart of document.querySelectorAll(".plotly-graph-div")) {{
    chart.data.forEach((trace, i) => {{
      if (!trace.meta) return;
      const [colour, faint] = trace.meta[dark.matches ? 1 : 0];
      const change = {{"line.color": colour, "marker.color": colour}};
      if (trace.fill) change.fillcolor = faint;
      Plotly.restyle(chart, change, [i]);
    }});
    const change = {{"font.color": text, "modebar.activecolor": text}};
    const names = chart.data[0].type === "heatmap" ? chart.data[0].y : [];
    if (names.length && window.innerWidth < 600) {{
      change["yaxis.tickvals"] = names;
      change["yaxis.ticktext"] = Array.from(names, x => x.length > 20
        ? "\u2026" + x.slice(-19) : x);
    }}
    for (const axis of Object.keys(chart.layout).filter(k => /^[xy]axis/.test(k))) {{
      change[axis + ".gridcolor"] = grid; change[axis + ".linecolor"] = text;
      change[axis + ".zerolinecolor"] = grid;
    }}
    Plotly.relayout(chart, change);
  }}
}}
dark.addEventListener("change", restyle);
restyle();
</script>
</main></body></html>
"""


def page(
    runs: Mapping[str, tuple[Mapping[str, np.ndarray], str]],
    limit: float | int | None = None,
) -> str:
    """A page with charts of some runs: from labels to columns and the norm's name."""
    try:
        import plotly.graph_objects as go
    except ImportError:
        raise ImportError(missing("plotly")) from None
    runs = {
        for_page(label): (with_update_norm(columns), norm)
        for label, (columns, norm) in runs.items()
    }
    charts = [
        _norms(go, runs, limit),
        _rates(go, runs, limit),
        _histograms(go, runs, limit),
        *(_lines(go, runs, name, title) for name, title in _TRACKED.items()),
        *(_layers(go, label, columns) for label, (columns, _) in runs.items()),
    ]
    drawn = [chart for chart in charts if chart is not None and chart.data]
    config = {"displaylogo": False, "responsive": True}
    parts = [
        f"<h2>{chart.layout.meta}</h2>"
        + chart.to_html(full_html=False, include_plotlyjs=i == 0, config=config)
        for i, chart in enumerate(drawn)
    ]
    return _PAGE.format(
        head=head("Gradient clipping: " + ", ".join(runs)),
        table=_table(runs, limit),
        charts="\n".join(parts),
        light=THEMES["light"],
        dark=THEMES["dark"],
    )


def head(title: str) -> str:
    """How a page begins; the title is escaped already."""
    return _HEAD.format(title=title, light=THEMES["light"], dark=THEMES["dark"])


def _chart(go: Any, title: str, x: str, y: str, **layout: Any) -> Any:
    chart = go.Figure()
    chart.update_layout(
        meta=title,  # a heading above, which breaks into lines where the page is narrow
        xaxis_title=x,
        yaxis_title=y,
        template="plotly",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        height=400,
        hovermode="x",  # a value shows wherever the pointer is above or below it
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#808080"},
        margin={"l": 60, "r": 10, "t": 34, "b": 50},
        legend={"orientation": "h", "y": -0.25, "x": 0, "yanchor": "top"},
        **layout,
    )
    chart.update_yaxes(automargin=True)
    chart.update_xaxes(tickangle=0, nticks=7)
    return chart


def _coloured(colours: Sequence[str]) -> dict[str, Any]:
    """The colour of a line on a light and on a dark page, for the script."""
    return {"meta": [(colour, _faint(colour)) for colour in colours]}


def _of_run(index: int) -> tuple[str, ...]:
    """The colour of a run in both themes, as in pictures."""
    return tuple(theme.lines[index % len(theme.lines)] for theme in _THEMES)


def _log_ticks(values: np.ndarray) -> dict[str, Any]:
    """A logarithmic axis with at most eight powers of ten on it.

    Within two powers of ten it also has 2 and 5, and within a factor of 4 it is linear.
    """
    positive = values[np.isfinite(values) & (values > 0)]
    decades = np.ptp(np.log10(positive)) if len(positive) else 0
    if decades < _LINEAR:
        return {"type": "linear"}
    if decades < 2:
        return {"type": "log", "dtick": "D2"}
    return {"type": "log", "exponentformat": "power", "dtick": 1 + int(decades // 8)}


def _norms(go: Any, runs: Any, limit: float | int | None) -> Any:
    chart = _chart(go, "Gradient norm before clipping", "step", "norm")
    everything = [norms_of(columns, name, limit) for columns, name in runs.values()]
    chart.update_yaxes(
        **_log_ticks(np.concatenate([seen.norms for seen in everything]))
    )
    for index, (label, seen) in enumerate(zip(runs, everything, strict=True)):
        colour = _of_run(index)[0]
        points = envelope(seen.steps, seen.norms, _POINTS)
        if not np.array_equal(points.low, points.high, equal_nan=True):
            style: dict[str, Any] = {
                "mode": "lines",
                "line": {"width": 0},
                "hoverinfo": "skip",
            }
            style |= {"showlegend": False, "legendgroup": label}
            chart.add_scatter(x=points.steps, y=points.high, **style)
            shade = {"fill": "tonexty", "fillcolor": _faint(colour)}
            shade |= _coloured(_of_run(index))
            chart.add_scatter(x=points.steps, y=points.low, **style, **shade)
        chart.add_scatter(
            x=points.steps,
            y=points.middle,
            name=label,
            legendgroup=label,
            line={"color": colour, "width": 1.5},
            **_coloured(_of_run(index)),
        )
        _marked(chart, seen, label)
        if seen.limits is not None and np.isfinite(seen.limits).any():
            limits = envelope(seen.steps, seen.limits, _POINTS)
            chart.add_scatter(
                x=limits.steps,
                y=limits.middle,
                name=f"threshold of {label}",
                line={"color": _THEMES[0].limit, "dash": "dash", "width": 1.5},
                **_coloured([theme.limit for theme in _THEMES]),
            )
    return chart


def _marked(chart: Any, seen: Norms, label: str) -> None:
    """Clipped steps as dots, skipped ones as triangles, non-finite norms as crosses."""
    style = {"clipped": ("circle", 4), "skipped": ("triangle-down", 9)}
    for what, (symbol, size) in style.items():
        colours = [getattr(theme, what) for theme in _THEMES]
        flags = getattr(seen, what)
        if flags is not None and flags.any():
            points = envelope(seen.steps, np.where(flags, seen.norms, np.nan), _POINTS)
            shown = np.isfinite(points.high)
            chart.add_scatter(
                x=points.steps[shown],
                y=points.high[shown],
                mode="markers",
                name=f"{what}: {label}",
                marker={"symbol": symbol, "color": colours[0], "size": size},
                **_coloured(colours),
            )
    lost = ~np.isfinite(seen.norms)
    if lost.any() and not lost.all():
        colours = [theme.clipped for theme in _THEMES]
        few = seen.steps[lost][:: -(-int(lost.sum()) // 200)]
        chart.add_scatter(
            x=few,
            y=np.full(len(few), seen.norms[~lost].max()),
            mode="markers",
            name=f"non-finite: {label}",
            marker={"symbol": "x", "color": colours[0], "size": 8},
            **_coloured(colours),
        )


def _rates(go: Any, runs: Any, limit: float | int | None) -> Any:
    chart = _chart(go, "Clipped and skipped steps", "step", "fraction of steps")
    chart.update_layout(showlegend=True)  # it says which of the two a line is
    chart.update_yaxes(tickformat=".2~%", rangemode="tozero")
    for index, (label, (columns, name)) in enumerate(runs.items()):
        seen = norms_of(columns, name, limit)
        for what, flags in (("clipped", seen.clipped), ("skipped", seen.skipped)):
            if flags is None:
                continue
            parts, each = means(flags, min(200, max(1, len(seen.steps) // 10)))
            chart.add_scatter(
                x=np.append(seen.steps[::each], seen.steps[-1] + 1),
                y=np.append(parts, parts[-1]),
                name=f"{what}: {label}",
                line={
                    "color": _of_run(index)[0],
                    "shape": "hv",
                    "dash": "solid" if what == "clipped" else "dot",
                },
                **_coloured(_of_run(index)),
            )
    return chart


def _histograms(go: Any, runs: Any, limit: float | int | None) -> Any:
    chart = _chart(go, "Norms", "norm", "fraction of steps", barmode="overlay")
    chart.update_yaxes(tickformat=".2~%")
    everything = [
        norms_of(columns, name, limit).norms for columns, name in runs.values()
    ]
    chart.update_xaxes(**_log_ticks(np.concatenate(everything)))
    for index, (label, norms) in enumerate(zip(runs, everything, strict=True)):
        values = norms[np.isfinite(norms) & (norms > 0)]
        if not len(values):
            continue
        edges = bins(values, 60)
        counts = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
        if len(runs) == 1:
            chart.update_xaxes(title=with_outermost("norm", values, edges))
        chart.add_scatter(
            x=np.sqrt(edges[1:] * edges[:-1]),
            y=counts / len(values),
            name=label,
            fill="tozeroy",
            fillcolor=_faint(_of_run(index)[0]),
            line={"color": _of_run(index)[0], "shape": "hvh"},
            **_coloured(_of_run(index)),
        )
    return chart


_TRACKED = {
    UPDATE: "Norm of the whole update",
    "track/dominant_share": "Share of the largest leaf in the squared norm",
    "track/starved": "Share of the other leaves that it starves",
    "track/spike_score": "Spike score: share of spikes among the last 1,000 norms",
}


def _lines(go: Any, runs: Any, name: str, title: str) -> Any:
    """One column of all runs that have it."""
    is_norm = name.endswith("norm")
    chart = _chart(go, title, "step", "norm" if is_norm else "")
    shown = []
    for index, (label, (columns, _)) in enumerate(runs.items()):
        if name not in columns or not present(columns[name]).any():
            continue
        there = present(columns[name])
        points = envelope(columns[STEP][there], columns[name][there], _POINTS)
        shown.append(points.middle)
        chart.add_scatter(
            x=points.steps,
            y=points.middle,
            name=label,
            line={"color": _of_run(index)[0], "width": 1.5},
            **_coloured(_of_run(index)),
        )
    if shown:
        scale = _log_ticks(np.concatenate(shown)) if is_norm else {"tickformat": "~%"}
        chart.update_yaxes(**scale)
    return chart


def _layers(go: Any, label: str, columns: Mapping[str, np.ndarray]) -> Any:
    start = "track_norms/"
    names = [name for name in columns if name.startswith(start)]
    if not names:
        return None
    there = np.any([present(columns[name]) for name in names], axis=0)
    steps = columns[STEP][there]
    rows = [envelope(steps, columns[name][there], 500) for name in names]
    table = np.stack([row.middle for row in rows])
    lacking = {"no gradient": table == 0, "not finite": ~np.isfinite(table)}
    kinds = " or ".join(what for what, some in lacking.items() if some.any())
    empty = f" (empty cells: {kinds})" if kinds else ""
    chart = _chart(go, f"Gradient norm of each layer: {label}{empty}", "step", "")
    chart.add_heatmap(
        x=rows[0].steps,
        y=[for_page(name.removeprefix(start)) for name in names],
        z=np.log10(np.where(table > 0, table, np.nan)),
        colorscale="Cividis",
        colorbar={
            "title": "log10(norm)",
            "orientation": "h",
            "y": 1,
            "yanchor": "bottom",
        }
        | {"thickness": 12, "title_side": "top"},
    )
    chart.update_yaxes(autorange="reversed")
    chart.update_layout(height=max(300, 120 + 24 * len(names)))
    return chart


def _table(runs: Any, limit: float | int | None) -> str:
    header = [
        "run",
        "steps",
        "median norm",
        "largest norm",
        "non-finite norms",
        "usual threshold",
        "clipped steps",
        "skipped steps",
        "suggested threshold",
    ]
    rows = []
    for label, (columns, name) in runs.items():
        seen = norms_of(columns, name, limit)
        finite = seen.norms[np.isfinite(seen.norms)]
        try:
            value = suggest_threshold(Recorded(columns, name), limit=limit).value
        except ValueError:
            value = np.nan
        rows.append(
            (
                label,
                f"{len(seen.steps):,}",
                f"{np.median(finite):.4g}",
                f"{np.max(finite):.4g}",
                str(len(seen.norms) - len(finite)),
                _usual(seen.limits),
                "-" if seen.rate is None else f"{seen.rate:.1%}",
                "-" if seen.skip_rate is None else f"{seen.skip_rate:.1%}",
                "-" if np.isnan(value) else f"{value:.4g}",
            )
        )
    cells = "".join(f"<th>{name}</th>" for name in header)
    lines = [f"<tr>{cells}</tr>"]
    for row in rows:
        cells = "".join(f"<td>{cell}</td>" for cell in row)
        lines.append(f"<tr>{cells}</tr>")
    return '<table tabindex="0">' + "".join(lines) + "</table>"


def _usual(limits: np.ndarray | None) -> str:
    """The median threshold of a run."""
    if limits is None or not present(limits).any():
        return "not recorded"
    middle = np.nanmedian(limits[present(limits)])
    return "infinite" if np.isinf(middle) else f"{middle:.4g}"


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.2)"
