"""Studies: one resumable runner of command line calls, and what is made of its rows.

`python -m studies FILE` runs a study file, whose form `studies.study`
describes, and leaves a row for each finished cell. A report reads them:

```python
study = Study.read(Path("studies/compare.yaml"))
rows = finished_rows(study, Path("runs/compare/results.jsonl"))     # by name of cell
rows["uw/seed0"]["files"]["generation_metrics.jsonl"][-1]["scores"]["fid"]
```
"""

from studies.results import append_row, finished_rows, read_rows
from studies.runner import missing_cells, run_study
from studies.study import Cell, Study

__all__ = [
    "Cell",
    "Study",
    "append_row",
    "finished_rows",
    "missing_cells",
    "read_rows",
    "run_study",
]
