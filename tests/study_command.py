"""Commands of the runner's tests: `main(args)`, as a study calls it."""

import json
import multiprocessing
import os
import time
from pathlib import Path


def main(args):
    """`main([folder, what, ...])`: count the call, then do `what`."""
    folder, what, *rest = args
    folder = Path(folder)
    calls = folder / "calls"
    calls.write_text((calls.read_text() if calls.exists() else "") + what + "\n")
    if what == "value":
        (folder / "value.json").write_text(json.dumps(float(rest[0])))
    elif what == "add":  # the values of other cells
        total = sum(json.loads((Path(p) / "value.json").read_text()) for p in rest)
        (folder / "value.json").write_text(json.dumps(total))
    elif what == "fail_unless" and not Path(rest[0]).exists():
        print(f"no {rest[0]}")
        return 3
    elif what == "kill_runner_unless" and not Path(rest[0]).exists():
        Path(rest[0]).touch()
        os.kill(multiprocessing.parent_process().pid, 9)
        time.sleep(60)
    return 0
