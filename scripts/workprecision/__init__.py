"""Work against precision of the exact flow and of its peers; see `work_precision.py`."""
