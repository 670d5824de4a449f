"""Runs a function on several ranks: processes from one forkserver, joined by gloo over a file."""

import gc
import multiprocessing
import os
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

_CONTEXT = multiprocessing.get_context("forkserver")

# What the strategy needs, and says so if it is missing.
needs_unused_shards = pytest.mark.skipif(
    not hasattr(FSDPModule, "set_reduce_scatter_unused_params"), reason="needs torch >= 2.14"
)


def run_ranks(function, world_size, folder, *args, limit=120.0, check=True):
    """`function(rank, *args)` on each rank; gives a list of `(result, traceback or None)`.

    Ranks that are not done after `limit` seconds are killed, and the test fails: a hang is a
    failure and not a wait. With `check` a rank that raised is a failure as well; without it, a
    rank that died has its exit code in place of a traceback.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ranks = [
        _CONTEXT.Process(target=_rank, args=(function, rank, world_size, str(folder), args))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + limit
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    hung = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for process in ranks:
        process.kill()
        process.join()
    outcomes = [_outcome(folder, rank) for rank in range(world_size)]
    if not check:
        pairs = zip(outcomes, ranks, strict=True)
        outcomes = [o or (None, f"exit code {process.exitcode}") for o, process in pairs]
    faults = "\n".join(f"rank {r}: {o[1]}" for r, o in enumerate(outcomes) if o and o[1])
    assert not hung, f"ranks {hung} hung for {limit} s\n{faults}"
    assert None not in outcomes, f"a rank died without a word: {outcomes}"
    assert not (check and faults), faults
    return outcomes if not check else [result for result, _ in outcomes]


def _outcome(folder, rank):
    path = folder / f"outcome_{rank}.pt"
    return torch.load(path, weights_only=False) if path.exists() else None


def _rank(function, rank, world_size, folder, args):
    """What a rank does; it leaves its result, or what went wrong, in a file."""
    gc.freeze()  # the garbage collector need not look through what the server imported
    torch.set_num_threads(1)
    warnings.filterwarnings("error", category=FutureWarning, message="`torch.distributed")
    # Lightning takes a process that has a LOCAL_RANK for one of its own and starts no others.
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", GLOO_SOCKET_IFNAME="lo")
    path = Path(folder) / f"outcome_{rank}.pt"
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=30),
        )
        torch.save((function(rank, *args), None), path)
        dist.barrier()
        code = 0
    except BaseException:
        torch.save((None, traceback.format_exc()), path)
        code = 1
    # No destructors: a process group whose peers are gone may wait for them.
    os._exit(code)
