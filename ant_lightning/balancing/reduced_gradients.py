"""Task gradients on several ranks, which travel while the backward pass goes on."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import torch

from ant_lightning.balancing.buckets import ArrivalOrder, Bucket, arranged, blocks_of, views_of
from ant_lightning.balancing.gradients import DenseTaskGradients
from ant_lightning.balancing.products import dot_products, full_precision
from ant_lightning.balancing.weight_factors import WeightFactors
from ant_lightning.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from jaxtyping import Float
    from torch import Tensor

# Smallest parameter, in numbers for each rank, whose block is sent as it is. Smaller ones are
# copied into buckets of this many numbers a task: a message of 128 KiB takes about as long as its
# overhead.
_ALONE = 1 << 15
# Numbers on their way, in gradients of all parameters. Beyond them `receive` waits for the oldest,
# so that blocks are freed while others are made.
_MOST_PENDING = 2


class ReducedTaskGradients(DenseTaskGradients):
    """The gradients of each task, summed over ranks; each rank keeps a shard of every gradient.

    As soon as the blocks of a bucket of parameters are known, one reduce-scatter for each task
    starts, and the backward pass goes on. A large parameter is a bucket of its own whose block is
    sent as it is, without a copy. Buckets are sent in one order on all ranks, that of their arrival
    on rank 0 in the first step. The Gramian of the shards is all-reduced (k x k numbers), and the
    combination is gathered from its shards. In total this sends (k + 1) / 2 times the bytes of an
    all-reduce of one gradient. A weight that meets few positions is not sent at all: the factors of
    all ranks are gathered, and each rank makes the same combination of them.

    With N ranks, each holds `k p / N` numbers during the whole step, and the blocks that are on
    their way.

    Args:
        num_tasks: `k`.
        parameters: The shared parameters, `p` numbers in total.
        reduction: How sums over ranks are made.

    Attributes:
        keep: Whether `release` keeps the shards for the next step.
    """

    def _drop(self) -> None:
        super()._drop()
        self.order: ArrivalOrder = ArrivalOrder(len(self.parameters), self.reduction)
        self._forget_buckets()

    def _forget_buckets(self) -> None:
        """Forget buckets and buffers, but not the order of the parameters."""
        self._buckets: list[Bucket] = []
        self._shards = self._empty  # [k, sum of the lengths of the buckets / N]
        self._parts: list[Tensor] = []  # columns of `_shards` that belong to each bucket
        self._staged: dict[int, Tensor] = {}  # [k, length] for a bucket that blocks are copied into
        self._staged_blocks: dict[int, Tensor] = {}  # the part of each parameter, [k, *shape]
        self._bucket_of: dict[int, int] = {}
        self._zeros = self._empty

    def _make_buckets(self) -> None:
        """Arrange the parameters that have blocks in this step."""
        ranks, sizes = self.reduction.world_size, [p.numel() for p in self.parameters]
        left_out = self._apart.difference(self._factored)
        order = [index for index in self.order.indices if index not in left_out]
        alone = _ALONE * ranks
        self._buckets = arranged(
            sizes,
            order,
            capacity=alone,
            first=alone,
            alone=alone,
            separate=self._factored,
            ranks=ranks,
        )
        self._laid_out_for = self._apart, {*self._factored}
        # Weights that have factors take part in the order, but have no shards.
        lengths = [
            0 if bucket.members[0] in self._factored else bucket.length // ranks
            for bucket in self._buckets
        ]
        # Zeros: the padding at the end of a bucket must not add to the Gramian.
        self._shards = self._empty.new_zeros(self.num_tasks, sum(lengths))
        self._parts = list(self._shards.split(lengths, dim=1))
        for place, bucket in enumerate(self._buckets):
            self._bucket_of.update(dict.fromkeys(bucket.members, place))
            if len(bucket.members) > 1 or bucket.length != bucket.filled:
                rows = self._empty.new_zeros(self.num_tasks, bucket.length)
                members = [self.parameters[index] for index in bucket.members]
                self._staged[place] = rows
                self._staged_blocks.update(
                    zip(bucket.members, blocks_of(rows, members), strict=True)
                )

    def _begun(self, samples: Tensor | None, sample_tasks: Tensor | None) -> None:
        """Agree on an order, and lay out the buckets of this step."""
        if self._factored:
            assert samples is not None, "factors need the samples of each rank"
            assert sample_tasks is not None, "factors need the task of each sample"
            self._begin_factors(samples.cpu().long(), sample_tasks)
        changed = self.order.agree(self._empty.device)
        if changed or not self._buckets or self._laid_out_for != (self._apart, {*self._factored}):
            self._forget_buckets()
            self._make_buckets()
        if self._from_one_pass:
            self.order.begin()
        self._slots = {task: slot for slot, task in enumerate(self._tasks)}
        self._missing = [len(bucket.members) for bucket in self._buckets]
        self._sources: dict[int, Tensor] = {}  # blocks that are sent as they are
        self._pending: deque[tuple[int, Callable[[], None]]] = deque()
        self._num_pending = 0
        # Sums of each bucket that are still to arrive.
        self._left = [
            1 if bucket.members[0] in self._factored else self.num_tasks for bucket in self._buckets
        ]
        self._next = 0
        self._by_task = False
        device = self._empty.device
        self._sum = torch.zeros(self.num_tasks, self.num_tasks, dtype=torch.float64, device=device)

    def _begin_factors(self, samples: Tensor, sample_tasks: Tensor) -> None:
        """Note whose positions lie where: those of rank 0 first, and each rank's by task."""
        every = torch.arange(self.num_tasks)
        tasks = torch.cat([every.repeat_interleave(counts) for counts in samples])
        self._factors.sample_tasks = tasks.to(self._empty.device, non_blocking=True)
        self._by_task_order = sample_tasks.argsort(stable=True)
        self._num_samples: list[int] = samples.sum(1).tolist()
        self._packed: dict[int, Tensor] = {}

    def receive_factors(
        self, index: int, left: Float[Tensor, "bn o"], right: Float[Tensor, "bn i"]
    ) -> None:
        """Take the factors of one weight, and send what is complete."""
        assert self._open, "receive_factors was called before begin"
        self.order.arrived(index)
        self._pack(index, left, right)
        self._missing[self._bucket_of[index]] -= 1
        self._send_complete()

    def _pack(self, index: int, left: Tensor | None = None, right: Tensor | None = None) -> None:
        """Write this rank's factors, or zeros, into their place among those of all ranks."""
        p, each = self.parameters[index], self._factored[index]
        rows, columns = p.shape[0], p.numel() // p.shape[0]
        packed = self._empty.new_empty(sum(self._num_samples) * each, rows + columns)
        own = packed.split([count * each for count in self._num_samples])[self.reduction.rank]
        if left is None or right is None:
            own.zero_()
        else:
            for part, factor in zip(own.split([rows, columns], dim=1), (left, right), strict=True):
                by_sample = factor.detach().unflatten(0, (-1, each))
                part.copy_(by_sample[self._by_task_order].flatten(0, 1))
        self._packed[index] = packed

    def receive(self, index: int, block: Float[Tensor, "m ..."]) -> None:
        """Take the gradients of one parameter, and send what is complete."""
        assert self._open, "receive was called before begin"
        if index in self._factored:  # whose factors other ranks wait for
            raise UnsupportedError(
                "engine: one pass on several ranks needs as many positions for each sample in "
                "every step where a layer meets few, found another number for a weight of shape "
                f"{list(self.parameters[index].shape)}"
            )
        place = self._bucket_of[index]
        assert self._missing[place], "receive was called twice for a parameter"
        self.order.arrived(index)
        if place in self._staged:
            if self._tasks == [*range(self.num_tasks)]:
                self._staged_blocks[index].copy_(block)
            else:
                for task, slot in self._slots.items():
                    self._staged_blocks[index][task].copy_(block[slot])
        else:
            self._sources[place] = self._flat(index, block)
        self._blocks[index] = self._empty
        self._missing[place] -= 1
        self._send_complete()

    def _send_complete(self) -> None:
        """Send the next buckets in order, as long as they are complete."""
        while self._next < len(self._buckets) and not self._missing[self._next]:
            place, self._next = self._next, self._next + 1
            index = self._buckets[place].members[0]
            if index in self._factored:
                counts = [count * self._factored[index] for count in self._num_samples]
                parts = self._packed[index].split(counts)
                self._pending.append((place, self.reduction.all_gather_parts_(parts)))
                continue
            for task in range(self.num_tasks):
                self._send(place, task, self._source(place, task))

    def _source(self, place: int, task: int) -> Tensor | None:
        """The numbers of a bucket for one task; `None` if this rank has none."""
        if task not in self._slots:
            return None
        if place in self._staged:
            return self._staged[place][task]
        block = self._sources.get(place)
        return None if block is None else block[self._slots[task]]

    def _holders(self, task: int) -> Sequence[int] | None:
        """Ranks that send gradients of a task; `None` for all."""
        return None

    def _send(self, place: int, task: int, full: Tensor | None) -> None:
        """Start the sum over ranks of one bucket for one task."""
        holders, length = self._holders(task), self._buckets[place].length
        if holders is not None and self.reduction.rank not in holders:
            full = None
        elif full is None:
            if len(self._zeros) < length:
                self._zeros = self._empty.new_zeros(length)
            full = self._zeros[:length]
        wait = self.reduction.reduce_scatter(self._parts[place][task], full, holders)
        self._pending.append((place, wait))
        self._num_pending += length
        while self._num_pending > _MOST_PENDING * self.reduction.world_size * self._shards.shape[1]:
            self._settle()

    def _settle(self) -> None:
        """Wait for the oldest sum; the last one of a bucket completes its part of the Gramian."""
        place, wait = self._pending.popleft()
        wait()
        self._left[place] -= 1
        index = self._buckets[place].members[0]
        if index in self._factored:
            p, packed = self.parameters[index], self._packed.pop(index)
            left, right = packed.split([p.shape[0], p.numel() // p.shape[0]], dim=1)
            self._factors.put(index, left, right)
            if place % self.reduction.world_size == self.reduction.rank:  # ranks share the work
                self._sum += self._factors.gramian([index])
            return
        self._num_pending -= self._buckets[place].length
        if not self._left[place]:
            self._sources.pop(place, None)
            self._sum += dot_products(self._parts[place])

    def write(self, task: int, gradients: Iterator[Sequence[Tensor]]) -> None:
        """Set the gradients of `task` to the sum of `gradients`, and send it."""
        if not self._open:
            self.begin()
        self._by_task = True
        total: list[Tensor] = []
        for each in gradients:
            if total:
                torch._foreach_add_(total, list(each))
            else:
                total = list(each)
        for place, bucket in enumerate(self._buckets):
            full: Tensor | None = None
            if total and place in self._staged:
                full = self._staged[place][task]
                torch._foreach_copy_(
                    [self._staged_blocks[index][task] for index in bucket.members],
                    [total[index] for index in bucket.members],
                )
            elif total:
                (index,) = bucket.members
                full = self._flat(index, total[index][None])[0]
            self._send(place, task, full)

    def close(self) -> None:
        """Send what has not arrived as zeros, and wait until every shard has."""
        if not self._open:
            return
        self._open = False
        if not self._by_task:
            for place in range(self._next, len(self._buckets)):
                for index in self._buckets[place].members:
                    if index in self._factored:
                        if self._missing[place]:
                            self._pack(index)
                    elif index not in self._blocks and place in self._staged:
                        self._staged_blocks[index].zero_()
                self._missing[place] = 0
            self._send_complete()
        while self._pending:
            self._settle()
        self._blocks = {}

    def gramian(self, of: Collection[int] | None = None) -> Float[Tensor, "k k"]:
        """`G[i, j] = g_i . g_j`, float64, over the samples of all ranks; before `combine_`."""
        assert not self._spent, "gramian was called after combine_"
        self.close()
        return self.reduction.all_reduce_(self._sum.clone() if of is None else self._sum_of(of))

    def _sum_of(self, of: Collection[int]) -> Tensor:
        """This rank's share of the Gramian of some parameters."""
        total, rank = torch.zeros_like(self._sum), self.reduction.rank
        for place, (bucket, part) in enumerate(zip(self._buckets, self._parts, strict=True)):
            if bucket.members[0] in self._factored:
                if bucket.members[0] in of and place % self.reduction.world_size == rank:
                    total += self._factors.gramian(bucket.members)
                continue
            start = -rank * part.shape[1]  # of the bucket, in columns of this rank's part
            for index in bucket.members:
                stop = start + self.parameters[index].numel()
                if index in of:
                    total += dot_products(part[:, max(start, 0) : max(stop, 0)])
                start = stop
        return total

    def combine_(self, task_weights: Float[Tensor, " k"], *, scale: Tensor | float = 1.0) -> None:
        """Write `scale * sum_i task_weights[i] g_i` into the `.grad` of every parameter, once."""
        assert not self._spent, "combine_ was called twice"
        self.close()
        self._spent = True
        weights = (task_weights.to(self._empty.device) * scale).to(self._empty.dtype)
        found: list[tuple[Bucket, Tensor, Callable[[], None]]] = []
        # One bucket is gathered while the next is combined.
        for bucket, part in zip(self._buckets, self._parts, strict=True):
            if bucket.members[0] in self._factored:
                continue
            full = self._empty.new_empty(bucket.length)
            own = full.view(self.reduction.world_size, -1)[self.reduction.rank]
            with full_precision(full.device):
                torch.mv(part.mT, weights, out=own)
            found.append((bucket, full, self.reduction.all_gather_(full)))
        # Every rank makes the same product of the same factors, which sends nothing.
        self._combine_factors(weights)
        for bucket, full, wait in found:
            wait()
            members = [self.parameters[index] for index in bucket.members]
            self._assign(bucket.members, views_of(full, members))

    def release(self) -> None:
        """Free the shards unless `keep` is set."""
        self._sources, self._blocks = {}, {}
        self._factors = WeightFactors(self.num_tasks, self._empty)
        self._open = False
        if not self.keep:
            self._forget_buckets()

    def rows(self) -> Float[Tensor, "k p"]:
        """This rank's shard of every gradient, in the order of the buckets, which has padding.

        Valid before `combine_`.
        """
        assert not self._spent, "rows was called after combine_"
        assert not self._factored, "rows was called, but some weights have factors"
        self.close()
        return self._shards
