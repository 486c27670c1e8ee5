"""From a ranking and a main head that never saw the isolated samples as labeled: who is suspect, and how sure."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from antibackdoor.data.core import Data
from antibackdoor.defenses.base import Outcome, Partition


def suspects_of(
    model: nn.Module,
    data: Data,
    scores: Tensor,
    logits: Tensor,
    partition: Partition,
    backdoor_class: int,
    partitions: list[Partition],
) -> Outcome:
    """Flag the isolated samples labeled with the backdoor class that the main head takes for another class.

    logits: `(n, K)` of the main head. The main head was not trained on isolated samples with their given label, so where it
    disagrees, the label is not what the rest of the data says. probability: 1 minus its probability of the given label
    for candidates (isolated and labeled with the backdoor class), 0 for all others.
    evidence: how often it disagrees on candidates, and, as the yardstick, on isolated samples of all other labels.
    """
    given = data.y.cpu()
    answer = logits.argmax(1)
    of_class = given == backdoor_class
    candidates = partition.isolated & of_class
    unseen = ~partition.recovered
    disagree = answer != given
    doubt = 1 - logits.double().softmax(1).gather(1, given[:, None]).squeeze(1)
    flagged = candidates & disagree
    others = partition.isolated & ~of_class & unseen

    def count(mask: Tensor) -> dict[str, int]:
        return {"count": int((mask & disagree).sum()), "n": int(mask.sum())}

    name = data.spec.classes[backdoor_class] if backdoor_class >= 0 else ""
    reason = f"learned early by the shallow head as {name!r}; the main model, which never saw it so labeled, disagrees"
    return Outcome(
        model,
        scores,
        torch.where(candidates, doubt, 0.0),
        flagged,
        torch.where(flagged, answer, -1),
        dict.fromkeys(flagged.nonzero().flatten().tolist(), reason),
        {
            "backdoor_class": backdoor_class,
            "disagree_on_candidates": count(candidates & unseen),
            "disagree_on_other_isolated": count(others),
            "flagged": int(flagged.sum()),
        },
        partitions,
    )
