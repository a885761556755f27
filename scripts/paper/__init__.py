"""The paper's experiments [Du, Hu & Lee 2018], one module each.

Each module has a `Config` of what can be changed, a pure `run(config)` that returns a
`Report` of claims and numbers, and `draw(report)`, which returns a matplotlib figure.
`python -m paper` runs all of them. Needs `pip install homoflow[paper]`.
"""
