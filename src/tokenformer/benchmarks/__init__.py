"""Speed, measured against peers in one process; one module per benchmark on the same core.

`timing.py` takes the times, `report.py` writes the record. A benchmark checks its
results first and reports no speed for a wrong one.
"""
