"""What runs below float32, and what must not."""

import copy
import logging

import lightning as L
import numpy as np
import pytest
import torch
from grouped import grouped
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from ant_lightning import (
    DDPM,
    EMA,
    CosineSchedule,
    DiT,
    DiTModule,
    FixedClustering,
    ImageDataModule,
    NashMTL,
    PCGrad,
    UncertaintyWeighting,
)
from ant_lightning.balancing.gradients import DenseTaskGradients
from ant_lightning.balancing.reduction import Reduction
from ant_lightning.data.dataset import TensorImages
from ant_lightning.errors import NonFiniteError
from ant_lightning.randomness import ImageNoise

K = 3
METHODS = {
    "vanilla": lambda: None,
    "uw": lambda: UncertaintyWeighting(K),
    "pcgrad": lambda: PCGrad(K),
    "nash": lambda: NashMTL(K, update_every=2),
}


class Noise(ImageDataModule):
    image_shape = (1, 4, 4)
    num_classes = 3

    def __init__(self, *, value=None):
        super().__init__(batch_size=10, num_workers=0, seed=0)
        self.value = value

    def prepare(self):
        images = torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
        if self.value is not None:
            images[:] = self.value
        return (TensorImages(images, torch.arange(50) % 3),) * 2


def module(method, **settings):
    torch.manual_seed(0)
    backbone = DiT(
        input_size=4,
        patch_size=2,
        in_channels=1,
        hidden_size=16,
        depth=1,
        num_heads=2,
        num_classes=3,
    )
    with torch.no_grad():
        for p in backbone.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    settings = {
        "optimizer": lambda groups: torch.optim.SGD(groups, lr=0.5),
        "clip_grad_norm": 0.5,
    } | settings
    return DiTModule(
        backbone,
        **grouped(
            schedule=CosineSchedule(),
            clustering=FixedClustering([0, 300, 500, 1000]),
            balancer=METHODS[method](),
            sampler=DDPM(num_steps=3),
            seed=1,
            **settings,
        ),
    )


def trainer(precision, *, steps=4, callbacks=(), init_scale=2.0**10):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    kind = {"precision": precision}
    if precision == "16-mixed":  # Lightning makes bf16-mixed of it on the CPU
        scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
        kind = {"plugins": [MixedPrecision("16-mixed", device="cpu", scaler=scaler)]}
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=list(callbacks),
        **kind,
    )


def flat(parameters):
    return torch.cat([p.detach().double().flatten() for p in parameters])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("bf16-mixed", 0.03), ("16-mixed", 0.004), ("bf16-true", 0.2)]
)
def test_an_update_is_that_of_float32_up_to_rounding(method, precision, tolerance):
    start = flat(module(method).backbone.parameters())
    exact, low = module(method), module(method)
    trainer("32-true").fit(exact, datamodule=Noise())
    ema = EMA(decay=0.5)
    run = trainer(precision, callbacks=[ema])
    run.fit(low, datamodule=Noise())
    update = flat(exact.backbone.parameters()) - start
    if precision == "bf16-true":
        start = start.bfloat16().double()
    error = flat(low.backbone.parameters()) - start - update
    assert 0 < error.norm() < tolerance * update.norm()
    assert run.global_step == ema.num_updates == 4
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {p.dtype for p in low.backbone.parameters()} == {dtype}
    assert {average.dtype for average in ema._averages.values()} == {torch.float32}
    if method == "uw":
        assert low.balancer.log_vars.dtype == torch.float32
        torch.testing.assert_close(
            low.balancer.log_vars, exact.balancer.log_vars, rtol=0.02, atol=1e-4
        )


class MatmulPrecision(TorchDispatchMode):
    """Notes what float32 products are allowed to use at each of them."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in {torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.mv}:
            self.seen.add(torch.backends.cuda.matmul.fp32_precision)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("setting", ["autocast", "tf32"])
def test_dot_products_and_combinations_keep_float32(setting):
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((3, 150_000)).astype(np.float32)
    parameter = nn.Parameter(torch.zeros(150_000))
    gradients = DenseTaskGradients(3, [parameter], reduction=Reduction())
    for task, row in enumerate(rows):
        gradients.write(task, iter([[torch.from_numpy(row)]]))
    weights = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium" if setting == "tf32" else before)
        watch = MatmulPrecision()
        with watch, torch.autocast("cpu", torch.bfloat16, enabled=setting == "autocast"):
            gramian = gradients.gramian()
            gradients.combine_(weights)
        inside = torch.get_float32_matmul_precision()
    finally:
        torch.set_float32_matmul_precision(before)
    assert inside == ("medium" if setting == "tf32" else before)
    assert watch.seen == {"ieee"}
    exact = rows.astype(np.float64)
    np.testing.assert_allclose(gramian.numpy(), exact @ exact.T, rtol=0, atol=0.2)
    assert parameter.grad.dtype == torch.float32
    # Each number is a sum of three products below 5, so five roundings of less than 10.
    wanted = weights.numpy() @ exact
    np.testing.assert_allclose(parameter.grad.numpy(), wanted, rtol=0, atol=5 * 10 * 2**-24)


class Watch(L.Callback):
    """Scale, steps, weights, balancer and averages after every batch."""

    def __init__(self, ema):
        self.ema = ema
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(
            {
                "scale": trainer.precision_plugin.scaler.get_scale(),
                "global_step": trainer.global_step,
                "skipped": pl_module.last_step_skipped,
                "weights": flat(pl_module.parameters()),
                "balancer": copy.deepcopy(pl_module.balancer.state_dict()),
                "averages": flat(self.ema._averages.values()),
                "finite": bool(pl_module.last_report.objective.isfinite()),
            }
        )


@pytest.mark.parametrize("method", ["uw", "pcgrad", "nash"])
def test_an_overflow_halves_the_scale_and_moves_nothing_else(method):
    # Far too large: the first steps overflow, more of them than may be skipped for a NaN.
    ema = EMA(decay=0.5)
    watch = Watch(ema)
    model = module(method, max_skipped_steps=2)
    run = trainer("16-mixed", steps=3, callbacks=[ema, watch], init_scale=2.0**28)
    run.fit(model, datamodule=Noise())
    num_skipped = model.num_skipped_steps
    assert num_skipped > 2
    assert [seen["skipped"] for seen in watch.seen] == [True] * num_skipped + [False] * 3
    first = watch.seen[0]
    for i, seen in enumerate(watch.seen[:num_skipped]):
        assert seen["scale"] == 2.0 ** (27 - i)
        assert seen["global_step"] == 0
        for name in ("weights", "averages"):
            assert torch.equal(seen[name], first[name]), name
        assert str(seen["balancer"]) == str(METHODS[method]().state_dict())
    assert torch.equal(first["weights"], flat(module(method).parameters()))
    for seen in watch.seen[num_skipped:]:
        assert seen["scale"] == watch.seen[num_skipped - 1]["scale"]
        assert not torch.equal(seen["weights"], first["weights"])
    assert run.global_step == ema.num_updates == 3


def test_a_nan_that_no_scale_cures_ends_the_run():
    model = module("pcgrad", max_skipped_steps=3)
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        trainer("16-mixed", steps=50, init_scale=4.0).fit(
            model, datamodule=Noise(value=float("nan"))
        )
    # 4 -> 2 -> 1 are taken for overflows; 0.5, 0.25 and 0.125 are not.
    assert model.num_skipped_steps == 5


@pytest.mark.parametrize("method", METHODS)
def test_clipping_sees_the_unscaled_gradient(method):
    one_step = lambda groups: torch.optim.SGD(groups, lr=1.0)  # noqa: E731
    model = module(method, optimizer=one_step, clip_grad_norm=1e-2)
    start = flat(model.backbone.parameters())
    trainer("16-mixed", steps=1).fit(model, datamodule=Noise())
    assert model.last_report.grad_norm > 0.1
    norm = (flat(model.backbone.parameters()) - start).norm()
    assert float(norm) == pytest.approx(1e-2, rel=1e-3)


def test_draws_do_not_depend_on_the_default_dtype():
    model = module("pcgrad", class_dropout=0.5)
    model.trainer = trainer("32-true")
    batch = Noise().train_images.load(list(range(10)), epoch=None)
    expected = model.draw(batch, step=3)
    noise = ImageNoise([3, 4], shape=(1, 4, 4), seed=0)()
    try:
        torch.set_default_dtype(torch.bfloat16)
        found = model.draw(batch, step=3)
        low_noise = ImageNoise([3, 4], shape=(1, 4, 4), seed=0)()
    finally:
        torch.set_default_dtype(torch.float32)
    for name in ("timesteps", "tasks", "noise", "condition"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0)
    assert torch.equal(low_noise, noise)


def test_samplers_keep_their_state_in_float32_for_a_bfloat16_network():
    class Predict(L.Callback):
        def on_predict_batch_end(self, trainer, pl_module, outputs, *args):
            images.append(outputs)

    images = []
    for precision in ("32-true", "bf16-true"):
        run = trainer(precision, callbacks=[Predict()])
        indices = DataLoader([[0, 1, 2, 3]], batch_size=None)
        run.predict(module("vanilla"), dataloaders=indices, return_predictions=False)
    exact, low = images
    assert low.dtype == torch.float32
    # Not all values are those of bfloat16, and they are near the exact ones.
    assert not torch.equal(low, low.bfloat16().float())
    assert 0 < (low - exact).abs().max() < 0.2
