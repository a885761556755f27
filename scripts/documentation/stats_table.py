"""The table of `stats`, from the schema that the code itself uses."""

from homoflow._results._stats import ROUTES, SCHEMA

#: How a route is called in the table's heads.
_HEADS = {
    "smooth": "smooth",
    "averaged": "averaged",
    "exact": "exact",
    "stationary": "t1=inf",
    "modified": "modified",
    "heavy_ball": "heavy ball",
    "drift": "drift",
    "descend": "descend",
}


def stats_table() -> str:
    """One row for each key, with a dot for each kind of run that may know it."""
    heads = [_HEADS.get(route, route) for route in ROUTES]
    rows = [
        f"| key | meaning | type | {' | '.join(heads)} |",
        f"|---|---|---|{':-:|' * len(heads)}",
    ]
    for key, statistic in SCHEMA.items():
        dots = ["●" if route in statistic.routes else "" for route in ROUTES]
        rows.append(
            f"| `{key}` | {statistic.meaning} | {statistic.type} | {' | '.join(dots)} |"
        )
    return "\n".join(rows)
