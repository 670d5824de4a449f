"""Advice from findings: what to try first and why, each sentence with the evidence behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ant_lightning.diagnosis.findings import ENOUGH_IMAGES

if TYPE_CHECKING:
    from ant_lightning.diagnosis.findings import Findings

_UNEQUAL = 10.0  # a factor between the tasks' losses above which UW's weights need a bound
_RELIABLE = 0.5
_FEW_IMAGES = 64  # a diagnosis on a CPU takes as many
_LISTED = 8  # tasks in a sentence
_EARLY = 250  # steps; the studies compare no methods before


class Advice(NamedTuple):
    """One piece of advice: what to do, what was measured here, and what stands behind it.

    Attributes:
        title: What to do, in a few words.
        text: Why, with the numbers of this model.
        evidence: The page of the documentation, and its section, whose rows carry the advice.
        is_caveat: Whether it says that the measurement itself is not good enough yet.
    """

    title: str
    text: str
    evidence: str = ""
    is_caveat: bool = False


def advice(findings: Findings) -> list[Advice]:
    """What to try first, in this order: caveats, the prediction, then what was measured.

    No two pieces contradict each other or `docs/choosing.md`: only for a network that predicts the
    noise is a balancer advised, and conflicts alone are never a reason.
    """
    found = [*_caveats(findings), *_prediction(findings), _surgery(findings), _losses(findings)]
    clustering = _clustering(findings)
    if clustering is not None:
        found.append(clustering)
    found.append(
        Advice(
            "Compare with vanilla and with the control",
            "Train balancer/vanilla and balancer/linear with the same clusters, over several "
            "seeds. A balancer is worth something only if it beats both. MinSNR, a fixed weight "
            "for each noise level, costs nothing and had the lowest FID of the main study.",
            "results.md#reading-the-evidence",
        )
    )
    return found


def _caveats(findings: Findings) -> list[Advice]:
    """Why the numbers may not say much yet."""
    found, steps, num_images = [], findings.steps, findings.num_images
    if steps is not None and steps < _EARLY:
        found.append(
            Advice(
                "Train longer before you choose a method"
                if steps
                else "Train first: these weights are untrained",
                f"This is step {steps}, and losses and gradients change fast early in training. "
                f"The studies compare no methods before step {_EARLY}.",
                "results.md#does-an-early-measurement-predict-which-method-helps",
                is_caveat=True,
            )
        )
    noisy = [i for i, r in enumerate(findings.reliability.tolist()) if not r >= _RELIABLE]
    few = num_images < _FEW_IMAGES
    if few or noisy:
        why = f"Each gradient is that of {num_images} images only. " if few else ""
        if noisy:
            why += (
                f"The gradients of {_tasks(noisy)} are mostly noise (reliability below "
                f"{_RELIABLE:g}), so conflicts there may be missed. "
            )
        found.append(
            Advice(
                "Measure with more images before you decide",
                f"{why}Repeat with --num_images {max(ENOUGH_IMAGES, 4 * num_images)}.",
                "results.md#task-affinity-on-the-digits",
                is_caveat=True,
            )
        )
    return found


def _prediction(findings: Findings) -> list[Advice]:
    """What the studies say of networks that predict the same, as `docs/choosing.md`."""
    predicted, choosing = findings.prediction_type, "choosing.md#what-to-try-first"
    if predicted == "v":
        return [
            Advice(
                "Train without a balancer first: the network predicts v",
                "With v-prediction no method differed from vanilla in the excess risk of any "
                "cluster. "
                + (
                    "For latent diffusion on the digits uncertainty weighting raised the FID by "
                    "0.4 (0.2 to 0.6)."
                    if findings.is_latent
                    else "A DiT on the pixels of the digits had a FID of 5.2, with uncertainty "
                    "weighting 5.3; SiT, which predicts a velocity, 4.6 and 4.9."
                )
                + " To train so: --config balancer/vanilla.",
                choosing,
            )
        ]
    if predicted != "eps":
        return [
            Advice(
                f"Train without a balancer first: the network predicts {predicted}",
                "No study has compared methods for this prediction. To train so: --config "
                "balancer/vanilla.",
                choosing,
            )
        ]
    if not findings.is_latent:
        return [
            Advice(
                "Train the next model with prediction_type: v",
                "It costs nothing. A DiT on the pixels of the digits had a FID of 5.2 after 1,000 "
                "steps with it, and of 22 when it predicted the noise (three seeds).",
                "results.md#where-the-methods-help",
            )
        ]
    return [
        Advice(
            "Train the next model of these latents with prediction_type: v",
            "It weighs the noisy timesteps as uncertainty weighting learns to, and costs "
            "nothing. For latent diffusion on the digits, v-prediction without a balancer had "
            "a lower FID after 250 steps than noise prediction after 1,500, with lower recall.",
            "results.md#where-the-methods-help",
        ),
        Advice(
            "If this model must predict the noise, try uncertainty weighting",
            "For latent diffusion on the digits it had a FID of 3.9 after 1,500 steps, vanilla "
            "6.5 (three seeds), and recall fell from 0.86 to 0.78. Its last weights, fixed "
            "from the start, did as well, and MinSNR had 4.7. After four times the steps "
            "vanilla was as good (one seed).",
            "results.md#where-the-methods-help",
        ),
    ]


def _surgery(findings: Findings) -> Advice:
    """Whether methods that look at conflicts have something to do."""
    pairs, k = findings.conflicts, findings.num_tasks
    count = k * (k - 1) // 2
    if not pairs:
        spread = findings.weights["PCGrad"]
        low, high = float(spread.min()), float(spread.max())
        weights = (
            "would be those of equal weighting"
            if round(low, 2) == round(high, 2) == 1
            else f"would be {low:.2f} to {high:.2f} times those of equal weighting"
        )
        return Advice(
            "Do not expect a gain from PCGrad: no tasks conflict",
            f"None of the {count} pairs of tasks has a cosine that is below 0 by more than twice "
            f"its standard error; PCGrad's weights {weights}.",
            "results.md#reading-the-evidence",
        )
    i, j = pairs[0]
    cosine, error = float(findings.cosines[i, j]), float(findings.cosine_errors[i, j])
    measured = (
        f"{len(pairs)} of {count} pairs of tasks conflict, tasks {i} and {j} most: cosine "
        f"{cosine:.2f}, standard error {error:.2f}. "
    )
    if findings.prediction_type != "eps":
        return Advice(
            "Tasks conflict, which alone is no reason for a balancer",
            f"{measured}Over the settings that were studied, conflicts did not predict which "
            "method helps.",
            "results.md#does-an-early-measurement-predict-which-method-helps",
        )
    return Advice(
        "Tasks conflict: compare NashMTL with vanilla",
        f"{measured}With noise prediction NashMTL had 19% less excess risk in the study than equal "
        "weights, nearly all of it at the noisiest timesteps. PCGrad could not be told from equal "
        "weights there, nor in latent diffusion. Conflicts alone did not predict which method "
        "helps.",
        "results.md#reading-the-evidence",
    )


def _losses(findings: Findings) -> Advice:
    """Whether weights by the size of the losses would change anything."""
    losses, weights = findings.task_losses, findings.weights["UW"]
    low, high = int(losses.argmin()), int(losses.argmax())
    ratio = float(losses[high] / losses[low])
    if ratio < _UNEQUAL:
        return Advice(
            "Uncertainty weighting needs no bound: its largest weight is "
            f"{ratio:.1f} times its smallest",
            f"It weighs each task by the inverse of its loss: {float(weights.min()):.2f} to "
            f"{float(weights.max()):.2f} times equal weights here. Above a factor of "
            f"{_UNEQUAL:g} between tasks, bound it with min_loss.",
            "choosing.md#balancers",
        )
    return Advice(
        "If you try uncertainty weighting, bound it with min_loss",
        f"It would give task {low} {ratio:.0f} times the weight of task {high}, because its loss "
        f"is that much smaller. In the study it lowered the error at the noisiest timesteps and "
        f"raised it at the others; min_loss: 0.1 took the harm away.",
        "results.md#reading-the-evidence",
    )


def _clustering(findings: Findings) -> Advice | None:
    """Which axis orders the gradients better."""
    found = findings.correlations
    if len(found) < 2:
        return None
    best = min(found, key=lambda name: found[name])
    other = next(name for name in found if name != best)
    if found[best] > -0.3 or found[other] - found[best] < 0.1:
        return Advice(
            "Either clustering will do: timestep or SNR",
            "Affinity falls with distance about as much in timesteps as in log-SNR (rank "
            f"correlations {found['timestep']:.2f} and {found['log-SNR']:.2f}).",
            "results.md#task-affinity-on-the-digits",
        )
    return Advice(
        f"If you train with tasks, cluster by {'SNR' if best == 'log-SNR' else 'timestep'}",
        f"Affinity falls with distance in {best} (rank correlation {found[best]:.2f}) more than "
        f"in {other} ({found[other]:.2f}).",
        "results.md#task-affinity-on-the-digits",
    )


def _tasks(which: list[int]) -> str:
    more = f" and {len(which) - _LISTED} more" if len(which) > _LISTED else ""
    return f"task{'s' * (len(which) > 1)} {', '.join(map(str, which[:_LISTED]))}{more}"
