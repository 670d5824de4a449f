"""Advice from findings: what to try first and why, each sentence with the evidence behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ant_lightning.diagnosis.findings import ENOUGH_IMAGES

if TYPE_CHECKING:
    from ant_lightning.diagnosis.findings import Findings

# Tasks whose losses differ by less have weights that uncertainty weighting hardly changes.
_UNEQUAL = 10.0
_RELIABLE = 0.5


class Advice(NamedTuple):
    """One piece of advice: what to do, what was measured here, and what stands behind it.

    Attributes:
        title: What to do, in a few words.
        text: Why, with the numbers of this model.
        evidence: The page of the documentation, and its section, whose rows carry the advice.
    """

    title: str
    text: str
    evidence: str = ""


def advice(findings: Findings) -> list[Advice]:
    """What to try first, in this order."""
    noisy = [i for i, r in enumerate(findings.reliability.tolist()) if not r >= _RELIABLE]
    found = []
    if noisy:
        found.append(
            Advice(
                "Measure with more images before you decide",
                f"The gradients of {_tasks(noisy)} are mostly noise (reliability below "
                f"{_RELIABLE:g}), so conflicts there may be missed. Repeat with --num_images "
                f"{max(ENOUGH_IMAGES, 4 * findings.num_images)}.",
                "results.md#task-affinity-on-the-digits",
            )
        )
    found += [_surgery(findings), _losses(findings)]
    if findings.prediction_type == "v":
        found.append(
            Advice(
                "Expect little from balancing: the network predicts v",
                "With v-prediction no method differed from vanilla in the excess risk of any "
                "cluster.",
                "results.md#reading-the-evidence",
            )
        )
    if findings.prediction_type == "eps" and not findings.is_latent:
        found.append(
            Advice(
                "Train the next model with prediction_type: v",
                "It costs nothing. A DiT on the pixels of the digits had a FID of 5.2 after 1,000 "
                "steps with it, and of 22 when it predicted the noise (three seeds).",
                "results.md#where-the-methods-help",
            )
        )
    if findings.prediction_type == "eps" and findings.is_latent:
        found += [
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
    return Advice(
        "Try NashMTL first: tasks conflict",
        f"{len(pairs)} of {count} pairs of tasks conflict, tasks {i} and {j} most: cosine "
        f"{cosine:.2f}, standard error {error:.2f}. In the study NashMTL had 19% less excess risk "
        "than equal weights, nearly all of it at the noisiest timesteps. PCGrad could not be told "
        "from equal weights there, nor in latent diffusion.",
        "results.md#reading-the-evidence",
    )


def _losses(findings: Findings) -> Advice:
    """Whether weights by the size of the losses would change anything."""
    losses = findings.task_losses
    low, high = int(losses.argmin()), int(losses.argmax())
    ratio = float(losses[high] / losses[low])
    if ratio < _UNEQUAL:
        return Advice(
            "Uncertainty weighting would change little here",
            f"The tasks' losses differ by a factor of {ratio:.1f} at most. Uncertainty weighting "
            "weighs each task by the inverse of its loss.",
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
        f"Cluster by {'SNR' if best == 'log-SNR' else 'timestep'}",
        f"Affinity falls with distance in {best} (rank correlation {found[best]:.2f}) more than "
        f"in {other} ({found[other]:.2f}).",
        "results.md#task-affinity-on-the-digits",
    )


def _tasks(which: list[int]) -> str:
    return f"task{'s' * (len(which) > 1)} {', '.join(map(str, which))}"
