"""Training steps on two hosts joined by a slow network: `python -m benchmarks.two_hosts`, as root.

The hosts are two network namespaces of this machine, joined by a veth pair whose rate `tc` limits.
Each has one rank with one thread. The methods take turns, step by step, in forward and reverse
order; a step takes as long as its slowest rank. Times are relative to stock
`DistributedDataParallel` in the same run, with a 95% bootstrap interval of the ratio of medians
over rounds. Bytes are those that the kernel counts at the busier rank, headers included. The
namespaces are removed at the end, whatever happens.

With `--sharded` all networks are sharded over the two hosts by FSDP2, the stock one as well.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ant_lightning import (
    CosineSchedule,
    DiscreteDiffusion,
    DiT,
    MultiTaskStep,
    PCGrad,
    SNRClustering,
    UncertaintyWeighting,
    denoising_loss,
)
from studies.provenance import commit, machine

K, BATCH = 5, 10
METHODS = ("ddp", "vanilla", "uw", "pcgrad", "pcgrad, sorted", "forward")
SHARDED = ("fsdp2", "vanilla", "uw", "pcgrad")
GIGABITS = (10, 1)
_ADDRESS, _PORT = "10.203.77.{}", 29511


class Method:
    """One method with a network of its own: a DiT of 16.5M parameters with 64 tokens."""

    def __init__(self, name: str, rank: int, *, sharded: bool = False) -> None:
        torch.manual_seed(0)
        self.name, self.rank, self.num_steps = name, rank, 0
        self.model = DiT(
            input_size=16, patch_size=2, in_channels=4, num_classes=10,
            hidden_size=384, depth=6, num_heads=6,
            learn_sigma=False,
        )  # fmt: skip
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(torch.randn_like(p), alpha=0.02)
        if sharded:
            _shard(self.model)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.called: nn.Module = self.model
        if name == "ddp":
            self.called = DistributedDataParallel(self.model)
        balancer = {"uw": UncertaintyWeighting, "pcgrad": PCGrad}.get(name.removesuffix(", sorted"))
        self.balancer = balancer(K) if balancer else None
        self.step_of_run = MultiTaskStep(
            self.model,
            self.balancer,
            num_tasks=K,
            placement="sorted" if name.endswith("sorted") else "spread",
        )
        self.process = DiscreteDiffusion(CosineSchedule())
        self.clusters = SNRClustering(K)(self.process.log_snr)
        own = list(self.balancer.parameters()) if self.balancer else []
        self.optimizer = torch.optim.AdamW([*self.trained, *own], lr=1e-5)

    def step(self) -> None:
        """One optimization step, or a forward pass."""
        self.num_steps += 1
        generator = torch.Generator().manual_seed(self.num_steps)
        times, tasks = self.clusters.sample(2 * BATCH, generator=generator)
        order = tasks.argsort(stable=True) if self.name.endswith("sorted") else torch.arange(20)
        mine = order.view(2, BATCH)[self.rank]
        x, noise = torch.randn(2, 2 * BATCH, 4, 16, 16, generator=generator)[:, mine]
        t, tasks = times[mine], tasks[mine]
        x_t = self.process.q_sample(x, t, noise)

        def losses(rows: Tensor) -> Tensor:
            output = self.called(x_t[rows], t[rows], rows % 10)
            return denoising_loss(
                self.process, output, x[rows], x_t[rows], t[rows], noise[rows]
            ).loss

        if self.name == "forward":
            losses(torch.arange(BATCH))
            return
        if self.name in {"ddp", "fsdp2"}:
            self.optimizer.zero_grad()
            losses(torch.arange(BATCH)).mean().backward()
            norm = nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        else:
            norm = self.step_of_run.backward(losses, tasks).grad_norm
        factor = (1.0 / (norm + 1e-6)).clamp(max=1.0).float()
        torch._foreach_mul_([_own(p.grad) for p in self.trained], factor)
        self.optimizer.step()
        self.step_of_run.update()


def _shard(model: DiT) -> None:
    """Shard block by block, as `ShardedStrategy` does."""
    for unit in [*model.blocks, model]:
        fully_shard(unit, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=True)
        assert isinstance(unit, FSDPModule)
        unit.set_reduce_scatter_unused_params(True)


def _own(gradient: Tensor | None) -> Tensor:
    """What this rank has of a gradient."""
    assert gradient is not None
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def run_rank(rank: int, rounds: int, names: list[str], device: str, output: Path) -> None:
    """Time all methods at every rate; rank 0 writes the result."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = device
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{_ADDRESS.format(1)}:{_PORT}",
        rank=rank,
        world_size=2,
        timeout=timedelta(minutes=5),
    )
    sharded = names[0] == "fsdp2"
    methods = {name: Method(name, rank, sharded=sharded) for name in names}
    counter = Path(f"/sys/class/net/{device}/statistics/tx_bytes")
    found: dict[str, Any] = {}
    for rate in GIGABITS:
        _limit(device, rate)
        # Seconds, seconds of processor and bytes of each step, of the rank that has more.
        seen = {name: torch.zeros(rounds, 3, dtype=torch.float64) for name in names}
        for i in range(-2, rounds):  # two rounds to warm up
            for name in names if i % 2 else reversed(names):
                dist.barrier()
                before = _counts(counter)
                methods[name].step()
                if i >= 0:
                    seen[name][i] = _counts(counter) - before
        for values in seen.values():
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        found[str(rate)] = {name: values.tolist() for name, values in seen.items()}
    if rank == 0:
        output.write_text(json.dumps(found))
    dist.barrier()


def _counts(sent: Path) -> Tensor:
    """Seconds, seconds of processor of all threads, and bytes sent, until now."""
    now = [time.perf_counter(), time.process_time(), int(sent.read_text())]
    return torch.tensor(now, dtype=torch.float64)


def _limit(device: str, gigabits: int) -> None:
    """Let the device send at this rate."""
    rate = ["rate", f"{gigabits}gbit", "burst", "4mb", "latency", "50ms"]
    _run("tc", "qdisc", "replace", "dev", device, "root", "tbf", *rate)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def missing() -> str | None:
    """Why this machine cannot make network namespaces, or `None`."""
    if not shutil.which("ip") or not shutil.which("tc"):
        return "the commands ip and tc (iproute2) are needed"
    try:
        with hosts():
            return None
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd)}: {error.stderr.strip()}"


@contextmanager
def hosts() -> Iterator[list[tuple[str, str]]]:
    """Namespace and device of two hosts, which are gone after the context."""
    names = [f"ant{os.getpid()}{side}" for side in "ab"]
    made = []
    try:
        for name in names:
            _run("ip", "netns", "add", name)
            made.append(name)
        first, second = ("ip", "-n", names[0]), ("ip", "-n", names[1])
        _run(*first, "link", "add", names[0], "type", "veth", "peer", names[1], "netns", names[1])
        for side, command, name in ((1, first, names[0]), (2, second, names[1])):
            _run(*command, "address", "add", f"{_ADDRESS.format(side)}/24", "dev", name)
            _run(*command, "link", "set", name, "up")
            _run(*command, "link", "set", "lo", "up")
        _run("ip", "netns", "exec", names[0], "tc", "qdisc", "replace", "dev", names[0],
             "root", "tbf", "rate", "10gbit", "burst", "4mb", "latency", "50ms")  # fmt: skip
        yield [(name, name) for name in names]
    finally:
        for name in made:  # with its end of the pair, and so with the other end
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def measure(rounds: int, names: list[str]) -> dict[str, Any]:
    """Start a rank on each host, and return what rank 0 has found."""
    with tempfile.TemporaryDirectory() as folder, hosts() as both:
        output = Path(folder) / "found.json"
        ranks = [
            subprocess.Popen(
                ["ip", "netns", "exec", space, sys.executable, "-m", "benchmarks.two_hosts",
                 "--rank", str(rank), "--device", device, "--rounds", str(rounds),
                 "--output", str(output), "--names", *names],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank, (space, device) in enumerate(both)
        ]  # fmt: skip
        try:
            codes = [rank.wait() for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        if any(codes):
            raise SystemExit(f"two_hosts: a rank failed, exit codes {codes}")
        found: dict[str, Any] = json.loads(output.read_text())
        return found


def lines(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Rows of the table of docs/benchmarks.md."""
    for rate, methods in found.items():
        values = {name: np.array(each) for name, each in methods.items()}
        stock = next(iter(values))  # what the others are compared with
        rounds = len(values[stock])
        picks = np.random.default_rng(0).integers(0, rounds, (5000, rounds))
        medians = {name: np.median(each, 0) for name, each in values.items()}
        for name, each in values.items():
            draws = np.median(each[picks], 1) / np.median(values[stock][picks], 1)
            low, high = np.percentile(draws, [2.5, 97.5], axis=0)
            seconds, _, sent = medians[name]
            ratio = medians[name] / medians[stock]
            shown = [f"{ratio[i]:.3f} [{low[i]:.3f}, {high[i]:.3f}]" for i in (0, 1)]
            target = {"vanilla": 1.05, "uw": 1.05}.get(name)
            if stock == "fsdp2":
                target = None
            elif name == "pcgrad" and rate == "10":
                target = 1.5
            elif name == "pcgrad" and "forward" in medians:
                wire = sent * 8 / (float(rate) * 1e9)
                target = (medians["forward"][0] + 1.2 * wire) / medians[stock][0]
            met = ""
            if target is not None:
                verdict = "met" if ratio[0] <= target else "in the interval"
                met = f"{target:.2f} {verdict if low[0] <= target else 'missed'}"
            cells = [rate, name, f"{seconds:.3f}", *shown, f"{sent / 1e6:.1f}", met]
            yield f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table of docs/benchmarks.md and keep it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sharded", action="store_true", help="FSDP2 in place of DDP")
    parser.add_argument("--names", nargs="+", choices=sorted({*METHODS, *SHARDED}))
    parser.add_argument("--output", type=Path, help="by default in runs/bench")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--device", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        run_rank(args.rank, args.rounds, args.names, args.device, args.output)
        return
    # So that `finally` removes the namespaces also if the run is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    reason = missing()
    if reason:
        print(f"two_hosts: skipped, {reason}")
        return
    print(
        f"{machine()}; commit {commit()}\n\n| Gbit/s | method | median s "
        "| relative to stock [95%] | by processor time [95%] | MB sent | target |\n"
        "|---|---|---|---|---|---|---|",
        flush=True,
    )
    stock, *others = SHARDED if args.sharded else METHODS
    others = args.names or others
    found = measure(args.rounds, [stock, *(name for name in others if name != stock)])
    name = "two_hosts_sharded" if args.sharded else "two_hosts"
    output = args.output or Path(f"runs/bench/{name}.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"machine": machine(), "commit": commit(), **found}))
    print("\n".join(lines(found)))


if __name__ == "__main__":
    main()
