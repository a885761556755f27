"""The table of `stats`, from the schema that the code itself uses."""

from homoflow._results._stats import ROUTES, SCHEMA

#: What a kind of run is called in the table.
_NAMES = {
    "smooth": "smooth flow",
    "averaged": "averaged flow",
    "exact": "exact flow",
    "stationary": "`t1=inf`",
    "modified": "`modified_flow`",
    "heavy_ball": "`heavy_ball_flow`",
    "drift": "`predict_drift`",
    "central": "`central_flow`",
    "descend": "`descend`",
}


def stats_table() -> str:
    """One row for each key, with the kinds of runs that may know it."""
    rows = ["| key | meaning | value | after |", "|---|---|---|---|"]
    for key, statistic in SCHEMA.items():
        rows.append(
            f"| `{key}` | {statistic.meaning} | {statistic.type} | "
            f"{_runs(statistic.routes)} |"
        )
    return "\n".join(rows)


def _runs(routes: tuple[str, ...]) -> str:
    others = [route for route in ROUTES if route not in routes]
    if not others:
        return "all"
    if len(others) <= 2:
        return f"all but {_listed(others)}"
    return _listed(route for route in ROUTES if route in routes)


def _listed(routes) -> str:
    return ", ".join(_NAMES[route] for route in routes)
