"""Gradients of a network's parameters for groups of samples, from one backward pass.

The gradient of a layer's weight is a sum over samples of products of the layer's input and its
output gradient. `Taps` hands both to a receiver, which sums the products over the samples of each
group. The arithmetic is that of an ordinary backward pass.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from ant_lightning.balancing.engines import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ant_lightning.balancing.groups import Groups

__all__ = ["Layer", "Taps"]

# Shape of the token: one that no tensor of a network has. It has no elements and costs nothing.
_TOKEN = (0, 1, 2, 3, 4, 5, 6)


@dataclass(frozen=True)
class Layer:
    """One use of a layer.

    Attributes:
        weight: Its weight.
        bias: Its bias, if it has one that is trained.
        weight_gradients: `(inputs, grad, groups, out) -> [m, ...]`, the gradient of the weight for
            each of the `m` groups; it may be written to `out [m, ...]`.
        sum_dims: Dimensions of the output, besides the first, along which the bias is broadcast;
            its gradient is summed over them.
        channel_dim: Dimension of the output whose slices give slices of the weight's gradient;
            `None` if there is none.
        factors: `(inputs, grad) -> (left [b, n, o], right [b, n, i])`; the products
            `left[s]^T right[s]` add up to the gradient of the weight as a matrix. `None` for a
            layer without factors.
        factor_sizes: `n`, `o` and `i`.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_gradients: Callable[[Tensor, Tensor, Groups, Tensor | None], Tensor]
    sum_dims: tuple[int, ...]
    channel_dim: int | None = None
    factors: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    factor_sizes: tuple[int, int, int] = (0, 0, 0)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters: the weight, and the bias if there is one."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def bias_gradients(self, grad: Tensor, groups: Groups, out: Tensor | None = None) -> Tensor:
        """The gradient of the bias for each group, `[m, ...]`; may be written to `out`."""
        return groups.sums(grad, self.sum_dims, out=out)


class Taps:
    """Runs a network and hands the inputs and output gradients of its layers to `receive`.

    Inside `with taps:`, linear, convolution, embedding, layer-norm and group-norm layers treat
    their parameters as constants. A backward pass to `token` then calls
    `receive(layer, inputs, grad)` for each of these layers. A parameter that is used in any other
    way gets an ordinary gradient.

    To detect all uses, the parameters have a subclass inside `with taps:`. A `TorchFunctionMode`
    would detect as much, but every call of torch would pass through it, also those without a
    parameter.

    Args:
        parameters: Parameters to record.
        num_samples: Size of the first dimension of every layer's input.

    Raises:
        UnsupportedError: If a parameter has a subclass already.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], num_samples: int) -> None:
        for p in parameters:
            if type(p) not in {nn.Parameter, Tensor}:
                raise UnsupportedError(
                    f"engine: one pass needs parameters of the class Parameter, found {type(p)}"
                )
        # An input of every tap that needs a gradient. Without it autograd would skip the first
        # layers, whose inputs and (constant) parameters need none.
        self.token = torch.zeros(_TOKEN, requires_grad=True, device=parameters[0].device)
        self.layers: list[Layer] = []
        self.num_uses: Counter[int] = Counter()
        self.receive: Callable[[Layer, Tensor, Tensor], None] | None = None
        self._views: list[Tensor] = []
        self._known = {id(p): p for p in parameters}
        self.num_samples = num_samples

    def __enter__(self) -> None:
        self._classes = {key: type(p) for key, p in self._known.items()}
        # The class of the same object is changed: modules and the optimizer keep their references.
        for p in self._known.values():
            p.__class__, p.taps = _Watched, self  # type: ignore[attr-defined]

    def __exit__(self, *error: object) -> None:
        for key, p in self._known.items():
            del p.taps  # type: ignore[attr-defined]
            p.__class__ = self._classes[key]
        for view in self._views:  # the network may keep views, for instance in an attribute
            del view.taps  # type: ignore[attr-defined]
            view.__class__ = Tensor
        self._views.clear()

    def watch(self, view: Tensor) -> None:
        """Watch the uses of a view of a parameter, until `with taps:` ends."""
        view.taps, view.__class__ = self, _WatchedView  # type: ignore[attr-defined]
        self._views.append(view)

    def parameter(self, value: Tensor | None) -> nn.Parameter | None:
        """The recorded parameter that `value` is, or is a view of; `None` if there is none.

        Only a view of all elements in the same order counts, such as a flattened convolution
        weight: its gradient is that of the parameter in another shape.
        """
        if value is None:
            return None
        found = self._known.get(id(value))
        base = self._known.get(id(value._base))
        # A view without `grad_fn` was made under `no_grad`: to it, the parameter is a constant.
        if found is None and base is not None and value.grad_fn is not None:
            whole = base.numel() == value.numel()
            if whole and value.is_contiguous() and base.is_contiguous():
                found = base
        return found

    def wanted(
        self, weight: Tensor | None, inputs: Tensor, ndim: int | None = None
    ) -> nn.Parameter | None:
        """The recorded parameter behind the weight of a layer, if the layer can be tapped.

        `None` if not: under `no_grad`, or if the input does not have the batch as its first
        dimension. The layer then runs as usual, and its parameter gets an ordinary gradient.
        """
        given_batch = inputs.ndim >= 1 and inputs.shape[0] == self.num_samples
        if not given_batch or ndim not in {None, inputs.ndim} or not torch.is_grad_enabled():
            return None
        return self.parameter(weight)

    def tap(self, output: Tensor, inputs: Tensor, layer: Layer) -> Tensor:
        """Tap `output`: in the backward pass its gradient and `inputs` go to `receive`."""
        self.layers.append(layer)
        for p in layer.parameters:
            self.num_uses[id(p)] += 1
        if output._base is not None:
            output = output.clone()  # not every view may be marked as changed in place
        tapped: Tensor = _Tap.apply(output, self.token, inputs.detach(), self, layer)
        return tapped


class _Watched(nn.Parameter):
    """A parameter whose uses are watched."""

    taps: Taps

    def __new__(cls, data: Tensor, requires_grad: bool = True) -> nn.Parameter:  # type: ignore[misc]
        """Make an ordinary parameter: copies are not watched."""
        return nn.Parameter(data, requires_grad)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401 - torch's signature
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        # Disabled inside: the calls of torch below would otherwise come back here.
        with torch._C.DisableTorchFunctionSubclass():
            if func in _RULES:
                for each in (*args, *kwargs.values()):
                    if isinstance(each, (_Watched, _WatchedView)):
                        return _RULES[func](each.taps, *args, **kwargs)
            output = func(*args, **kwargs)
            # A view of a parameter is a plain tensor; its uses are uses of the parameter.
            if isinstance(output, Tensor) and isinstance(output._base, _Watched):
                output._base.taps.watch(output)
            return output


class _WatchedView(Tensor):
    """A view of a parameter whose uses are watched."""

    taps: Taps
    __torch_function__ = _Watched.__torch_function__


class _Tap(torch.autograd.Function):
    """Identity; in the backward pass, hands the output's gradient to `receive`."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        output: Tensor,
        token: Tensor,
        inputs: Tensor,
        taps: Taps,
        layer: Layer,
    ) -> Tensor:
        # Returning an input unchanged makes autograd hand out a view, which the network could not
        # change in place (`ReLU(inplace=True)`). Marked as changed in place, it is no view.
        ctx.mark_dirty(output)
        # The token is saved for its shape. Gradient checkpointing recomputes a layer without taps
        # and finds another tensor in its place. The shapes differ, so checkpointing raises.
        ctx.save_for_backward(inputs, token)
        ctx.taps, ctx.layer = taps, layer
        return output

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any,  # noqa: ANN401
        grad: Tensor,
    ) -> tuple[Tensor | None, ...]:
        inputs, _ = ctx.saved_tensors
        # A linear layer flattens its input `[b, ..., c]` to rows `[b n, c]`; see `_linear`.
        by_sample = grad.view(len(inputs), -1, grad.shape[-1]) if inputs.ndim > grad.ndim else grad
        ctx.taps.receive(ctx.layer, inputs, by_sample)
        return grad, None, None, None, None


def _constant(value: Tensor | None) -> Tensor | None:
    """`value` without its graph, if there is one."""
    return None if value is None else value.detach()


def _cast(value: Tensor, *, to_norm: bool = False) -> Tensor:
    """Cast a layer's input as autocast would, so that the layer and its tap share one copy."""
    device = value.device.type
    converts = value.is_floating_point() and value.dtype != torch.float64
    if not converts or not torch.is_autocast_enabled(device):
        return value
    # CUDA's autocast runs norms in float32; the CPU's leaves their input as it is.
    if to_norm:
        return value if device == "cpu" else value.float()
    return value.to(torch.get_autocast_dtype(device))


def _linear(taps: Taps, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    known = taps.wanted(weight, input)
    if known is None or input.ndim < 2 or weight.ndim < 2:
        return F.linear(input, weight, bias)

    def weight_gradients(x: Tensor, grad: Tensor, groups: Groups, out: Tensor | None) -> Tensor:
        view = None if out is None else out.view(len(groups), grad.shape[-1], -1)
        return groups.products(_tokens(grad), _tokens(x), out=view)

    input = _cast(input)
    # On rows `[b n, c]`: with more dimensions the output is a view, which `tap` would have to copy.
    output = F.linear(input.flatten(0, -2), weight.detach(), _constant(bias))
    middle = (1,) if input.ndim > 2 else ()
    layer = Layer(
        known,
        taps.parameter(bias),
        weight_gradients,
        middle,
        channel_dim=-1,
        factors=lambda x, grad: (_tokens(grad), _tokens(x)),
        factor_sizes=(input.shape[1:-1].numel(), *weight.shape),
    )
    tapped = taps.tap(output, input, layer)
    return tapped.view(*input.shape[:-1], -1)


def _tokens(values: Tensor) -> Tensor:
    """`[b, n, c]` of `[b, ..., c]`."""
    return values.flatten(1, -2) if values.ndim > 2 else values[:, None]


def _convolution(ndim: int) -> Callable[..., Tensor]:
    convolve = (F.conv1d, F.conv2d, F.conv3d)[ndim - 1]
    gradient = (conv1d_weight, conv2d_weight, conv3d_weight)[ndim - 1]

    def run(
        taps: Taps,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,  # noqa: ANN401
        padding: Any = 0,  # noqa: ANN401
        dilation: Any = 1,  # noqa: ANN401
        groups: int = 1,
    ) -> Tensor:
        settings = (stride, padding, dilation, groups)
        known = taps.wanted(weight, input, ndim + 2)
        # `torch.nn.grad` takes no padding by name, such as "same".
        if known is None or isinstance(padding, str):
            return convolve(input, weight, bias, *settings)

        def weight_gradients(x: Tensor, grad: Tensor, split: Groups, out: Tensor | None) -> Tensor:
            shape = [grad.shape[1], *weight.shape[1:]]
            block = grad.new_empty(len(split), *shape) if out is None else out
            missing = set(range(len(split)))  # groups whose block is not written yet
            for group, piece in split.pieces():
                part = gradient(x[piece], shape, grad[piece], *settings)
                if group in missing:
                    block[group].copy_(part)
                    missing.remove(group)
                else:
                    block[group].add_(part)
            for group in missing:
                block[group].zero_()
            return block

        input = _cast(input)
        output = convolve(input, weight.detach(), _constant(bias), *settings)
        space = tuple(range(2, ndim + 2))
        # With several groups of channels, a slice of the outputs does not see all the inputs.
        channel_dim = 1 if groups == 1 else None
        layer = Layer(known, taps.parameter(bias), weight_gradients, space, channel_dim)
        if ndim == 2 and groups == 1:
            sizes = (tuple(weight.shape[2:]), dilation, padding, stride)
            # As a product of matrices: one position for each place that the kernel is applied at.
            layer = replace(
                layer,
                factors=lambda x, grad: (grad.flatten(2).mT, F.unfold(x, *sizes).mT),
                factor_sizes=(output.shape[2:].numel(), len(weight), weight[0].numel()),
            )
        return taps.tap(output, input, layer)

    return run


def _embedding(
    taps: Taps,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    known = taps.wanted(weight, input)
    plain = padding_idx is None and max_norm is None and not scale_grad_by_freq and not sparse
    if known is None or not plain:
        return F.embedding(
            input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
        )
    num_rows = len(weight)

    def weight_gradients(x: Tensor, grad: Tensor, groups: Groups, out: Tensor | None) -> Tensor:
        # One table of all groups' gradients: row i of group g is row `g num_rows + i` of the table.
        width = grad.shape[-1]
        first = num_rows * groups.of_samples(x.device)
        rows = x + first.view(-1, *[1] * (x.ndim - 1))
        block = grad.new_zeros(len(groups) * num_rows, width)
        block.index_add_(0, rows.flatten(), grad.reshape(-1, width))
        return block.view(len(groups), num_rows, width)

    output = F.embedding(input, weight.detach())
    return taps.tap(output, input, Layer(known, None, weight_gradients, (), channel_dim=-1))


def _layer_norm(
    taps: Taps,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    known = taps.wanted(weight, input)
    if known is None or input.ndim <= len(normalized_shape):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    middle = tuple(range(1, input.ndim - len(normalized_shape)))

    def weight_gradients(x: Tensor, grad: Tensor, groups: Groups, out: Tensor | None) -> Tensor:
        # y = weight * normalised + bias. The normalised input is computed again, not kept.
        products = grad * F.layer_norm(x.to(grad.dtype), normalized_shape, eps=eps)
        return groups.sums(products, middle, out=out)

    input = _cast(input, to_norm=True)
    output = F.layer_norm(input, normalized_shape, _constant(weight), _constant(bias), eps)
    return taps.tap(output, input, Layer(known, taps.parameter(bias), weight_gradients, middle))


def _group_norm(
    taps: Taps,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    known = taps.wanted(weight, input)
    if known is None:
        return F.group_norm(input, num_groups, weight, bias, eps)
    batch, channels, positions = len(input), input.shape[1], input.shape[2:].numel()
    # Contiguous like the layer's own copy: the kernels below read `x`, `mean` and `rstd` in this
    # layout.
    input = _cast(input, to_norm=True).contiguous()
    scale, shift = (None if v is None else _cast(v.detach(), to_norm=True) for v in (weight, bias))
    output, mean, rstd = torch.native_group_norm(
        input, scale, shift, batch, channels, positions, num_groups, eps
    )
    mean, rstd = mean.detach(), rstd.detach()

    def weight_gradients(x: Tensor, grad: Tensor, groups: Groups, out: Tensor | None) -> Tensor:
        # The kernel sums the weight's gradient over samples. To keep the samples apart, it is told
        # of one sample that has the channels of all.
        every = (1, batch * channels)
        _, of_samples, _ = torch.ops.aten.native_group_norm_backward(
            grad.reshape(*every, positions),
            x.view(*every, positions),
            mean.view(1, -1),
            rstd.view(1, -1),
            mean.new_ones(batch * channels),
            *every,
            positions,
            batch * num_groups,
            [False, True, False],
        )
        return groups.sums(of_samples.view(batch, channels), out=out)

    space = tuple(range(2, input.ndim))
    return taps.tap(output, input, Layer(known, taps.parameter(bias), weight_gradients, space))


# A watched parameter in any other function gets an ordinary gradient, which `TappedLosses` refuses.
_RULES: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.linear: _linear,
    F.conv1d: _convolution(1),
    F.conv2d: _convolution(2),
    F.conv3d: _convolution(3),
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
}
