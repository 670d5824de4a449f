"""Rules of layers: each computes with one copy of its parameters, and differentiates by task.

The gradient of a layer's weight is a sum over samples of products of its input and its output
gradient. A rule sums these products over the samples of each task. That is the arithmetic of an
ordinary backward pass. A rule returns `NotImplemented` for what it does not cover; the general
rules in `task_parameters` then apply.
"""

# ruff: noqa: ANN001, ANN205 - `ctx` and the tuples of `autograd.Function`
# mypy: disable-error-code="no-untyped-def, override, no-any-return"

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ant_lightning.balancing.one_pass.grouped import products, samples_of, sums
from ant_lightning.balancing.one_pass.task_parameters import (
    RULES,
    has_leaf,
    leaf_of,
    state,
    value_of,
)
from ant_lightning.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def _given_batch(input: object, ndim: int | None = None) -> bool:
    """Whether a layer's input is plain and has the batch as its first dimension."""
    plain = isinstance(input, Tensor) and not has_leaf(input)
    if not plain or input.ndim < 2 or ndim not in {None, input.ndim}:  # type: ignore[attr-defined]
        return False
    return input.shape[0] == state.num_samples  # type: ignore[attr-defined]


def _optional_leaf(value: Tensor | None) -> Tensor | None:
    return leaf_of(value) if has_leaf(value) else None  # type: ignore[arg-type]


def _cast(value: Tensor, *, to_norm: bool = False) -> Tensor:
    """Cast a layer's input as autocast would, so that the layer and its gradient share one copy."""
    device = value.device.type
    converts = value.is_floating_point() and value.dtype != torch.float64
    if not converts or not torch.is_autocast_enabled(device):
        return value
    # CUDA's autocast runs norms in float32; the CPU's leaves their input as it is.
    if to_norm:
        return value if device == "cpu" else value.float()
    return value.to(torch.get_autocast_dtype(device))


class _Linear(torch.autograd.Function):
    """On rows `[b n, c]` for n positions of each sample."""

    @staticmethod
    def forward(ctx, x, weight_leaf, bias_leaf, left, right, weight, bias, spare, sizes):
        ctx.save_for_backward(x, weight)
        ctx.spare = spare
        ctx.sizes, ctx.factored, ctx.with_bias = sizes, left is not None, bias_leaf is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        of_input = grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None
        g, x = (each.unflatten(0, (sum(ctx.sizes), -1)) for each in (grad, x))
        of_bias = sums(g.sum(1), ctx.sizes) if ctx.with_bias else None
        if ctx.factored:
            return of_input, None, of_bias, grad, x.flatten(0, 1), None, None, None, None
        of_weight = products(g, x.to(g.dtype), ctx.sizes, ctx.spare)
        return of_input, of_weight, of_bias, None, None, None, None, None, None


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:  # noqa: ANN401
    if not _given_batch(input) or weight.ndim != 2:
        return NotImplemented
    if not has_leaf(weight):
        assert bias is not None  # one of the two has a leaf
        return F.linear(input, weight) + bias
    positions = input.shape[1:-1].numel()
    left = right = None
    factors = getattr(weight, "factors", None)
    meets = input.shape[0] * positions
    if factors is not None and not factors.used and factors.left.shape[0] == meets:
        left, right, factors.used = factors.left, factors.right, True
    if not torch.compiler.is_compiling() and state.uses is not None:
        state.positions[id(weight)] = positions
    leaf, of_bias = leaf_of(weight), _optional_leaf(bias)
    values = (value_of(weight), value_of(bias))
    leaves = (leaf if left is None else None, of_bias, left, right)
    # On rows: of more dimensions the output would be a view, which may not be changed in place.
    spare = None if torch.compiler.is_compiling() else getattr(weight, "spare", None)
    output = _Linear.apply(_cast(input).flatten(0, -2), *leaves, *values, spare, state.sizes)
    return output.unflatten(0, input.shape[:-1])


def _matmul(input: Tensor, other: Tensor) -> Any:  # noqa: ANN401
    if not _given_batch(input) or not has_leaf(other) or other.ndim != 2:
        return NotImplemented
    return F.linear(input, other.transpose(0, 1))


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_leaf, bias_leaf, weight, bias, settings, sizes):
        ctx.save_for_backward(x, weight)
        ctx.settings, ctx.sizes, ctx.with_bias = settings, sizes, bias_leaf is not None
        ndim = x.ndim - 2
        convolve = (F.conv1d, F.conv2d, F.conv3d)[ndim - 1]
        return convolve(x, weight, bias, *settings)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        x, weight = x.to(grad.dtype), weight.to(grad.dtype)
        stride, padding, dilation, groups = ctx.settings
        zeros = [0] * len(stride)

        def differentiate(g, x, mask):  # noqa: ANN202
            return torch.ops.aten.convolution_backward(
                g, x, weight, None, stride, padding, dilation, False, zeros, groups, mask
            )

        of_input = None
        if ctx.needs_input_grad[0]:
            of_input = differentiate(grad, x, (True, False, False))[0]
        pairs = zip(grad.split(ctx.sizes), x.split(ctx.sizes), strict=True)
        of_weight = torch.stack([differentiate(*pair, (False, True, False))[1] for pair in pairs])
        of_bias = sums(grad.flatten(2).sum(2), ctx.sizes) if ctx.with_bias else None
        return of_input, of_weight, of_bias, None, None, None, None


def _convolution(ndim: int) -> Callable[..., Any]:
    def as_tuple(value: int | Sequence[int]) -> tuple[int, ...]:
        return (value,) * ndim if isinstance(value, int) else tuple(value)

    def run(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Any:  # noqa: ANN401
        if not _given_batch(input, ndim + 2) or not has_leaf(weight) or isinstance(padding, str):
            return NotImplemented
        settings = (as_tuple(stride), as_tuple(padding), as_tuple(dilation), groups)
        leaf, of_bias = leaf_of(weight), _optional_leaf(bias)
        values = (value_of(weight), value_of(bias))
        return _Convolution.apply(_cast(input), leaf, of_bias, *values, settings, state.sizes)

    return run


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, leaf, weight, padding_idx, sizes):
        ctx.save_for_backward(x)
        ctx.num_rows, ctx.padding_idx, ctx.sizes = weight.shape[0], padding_idx, sizes
        return F.embedding(x, weight)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        # One table of the gradients of all tasks: row i of task t is row `t num_rows + i` of it.
        first = ctx.num_rows * samples_of(ctx.sizes, x.device)
        rows = x + first.view(-1, *[1] * (x.ndim - 1))
        table = grad.new_zeros(len(ctx.sizes) * ctx.num_rows, grad.shape[-1])
        table = table.index_add(0, rows.flatten(), grad.reshape(-1, grad.shape[-1]))
        table = table.unflatten(0, (len(ctx.sizes), -1))
        if ctx.padding_idx is not None:  # which has no gradient
            kept = torch.arange(ctx.num_rows, device=x.device) != ctx.padding_idx
            table = table * kept[:, None]
        return None, table, None, None, None


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:  # noqa: ANN401
    if max_norm is not None or scale_grad_by_freq:
        raise UnsupportedError(
            "engine: one pass needs embeddings without max_norm and scale_grad_by_freq, found "
            f"max_norm {max_norm} and scale_grad_by_freq {scale_grad_by_freq}"
        )
    if not input.ndim or input.shape[0] != state.num_samples or not has_leaf(weight):
        return NotImplemented
    if padding_idx is not None:
        padding_idx %= weight.shape[0]
    values = (value_of(weight), padding_idx)
    return _Embedding.apply(input, leaf_of(weight), *values, state.sizes)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_leaf, bias_leaf, shape, weight, bias, eps, sizes):
        output, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.shape, ctx.sizes = shape, sizes
        ctx.with_weight, ctx.with_bias = weight_leaf is not None, bias_leaf is not None
        return output

    @staticmethod
    def backward(ctx, grad):
        x, mean, rstd, weight, bias = ctx.saved_tensors
        of_input = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_input = torch.ops.aten.native_layer_norm_backward(
                grad, x, ctx.shape, mean, rstd, weight, bias, [True, False, False]
            )[0]
        middle = tuple(range(1, x.ndim - len(ctx.shape)))

        def sums_of(values):  # noqa: ANN202
            return sums(values.sum(middle) if middle else values, ctx.sizes)

        if ctx.with_weight:
            # y = weight * normalised + bias. The normalised input is computed again, not kept.
            of_weight = sums_of(grad * ((x - mean) * rstd))
        if ctx.with_bias:
            of_bias = sums_of(grad)
        return of_input, of_weight, of_bias, None, None, None, None, None


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:  # noqa: ANN401
    if not _given_batch(input) or input.ndim <= len(normalized_shape):
        return NotImplemented
    leaves = (_optional_leaf(weight), _optional_leaf(bias))
    values = (value_of(weight), value_of(bias))
    return _LayerNorm.apply(
        _cast(input, to_norm=True), *leaves, tuple(normalized_shape), *values, eps, state.sizes
    )


def _rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor,
    eps: float | None = None,
) -> Any:  # noqa: ANN401
    if not has_leaf(weight):
        return NotImplemented
    return F.rms_norm(input, normalized_shape, None, eps) * weight


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_leaf, bias_leaf, num_groups, weight, bias, eps, sizes):
        batch, channels, positions = x.shape[0], x.shape[1], x.shape[2:].numel()
        output, mean, rstd = torch.native_group_norm(
            x, weight, bias, batch, channels, positions, num_groups, eps
        )
        ctx.save_for_backward(x, mean, rstd, weight)
        ctx.num_groups, ctx.sizes = num_groups, sizes
        ctx.with_weight, ctx.with_bias = weight_leaf is not None, bias_leaf is not None
        return output

    @staticmethod
    def backward(ctx, grad):
        x, mean, rstd, weight = ctx.saved_tensors
        batch, channels, positions = x.shape[0], x.shape[1], x.shape[2:].numel()
        grad = grad.contiguous()
        of_input = of_weight = of_bias = None
        backward = torch.ops.aten.native_group_norm_backward
        if ctx.needs_input_grad[0]:
            sizes = (batch, channels, positions, ctx.num_groups)
            of_input = backward(grad, x, mean, rstd, weight, *sizes, [True, False, False])[0]
        if ctx.with_weight:
            # The kernel sums the weight's gradient over samples. To keep the samples apart, it is
            # told of one sample that has the channels of all.
            every = (1, batch * channels)
            of_samples = backward(
                grad.view(*every, positions),
                x.view(*every, positions),
                mean.view(1, -1),
                rstd.view(1, -1),
                mean.new_ones(batch * channels),
                *every,
                positions,
                batch * ctx.num_groups,
                [False, True, False],
            )[1]
            of_weight = sums(of_samples.view(batch, channels), ctx.sizes)
        if ctx.with_bias:
            of_bias = sums(grad.flatten(2).sum(2) if grad.ndim > 2 else grad, ctx.sizes)
        return of_input, of_weight, of_bias, None, None, None, None, None


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:  # noqa: ANN401
    if not _given_batch(input):
        return NotImplemented
    leaves = (_optional_leaf(weight), _optional_leaf(bias))
    values = [
        value if value is None else _cast(value, to_norm=True)
        for value in (value_of(weight), value_of(bias))
    ]
    # The kernels read input, mean and rstd in this layout.
    input = _cast(input, to_norm=True).contiguous()
    return _GroupNorm.apply(input, *leaves, num_groups, *values, eps, state.sizes)


RULES.update(
    {
        F.linear: _linear,
        torch.matmul: _matmul,
        Tensor.matmul: _matmul,
        Tensor.__matmul__: _matmul,
        F.conv1d: _convolution(1),
        F.conv2d: _convolution(2),
        F.conv3d: _convolution(3),
        F.embedding: _embedding,
        F.layer_norm: _layer_norm,
        F.rms_norm: _rms_norm,
        F.group_norm: _group_norm,
    }
)
