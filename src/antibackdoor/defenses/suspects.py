"""From a ranking and a main head that never saw the isolated samples as labeled: who is suspect, and how sure."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from antibackdoor.data.core import Data
from antibackdoor.defenses.base import Outcome, Partition
from antibackdoor.training.ranking import top


def suspects_of(
    model: nn.Module,
    data: Data,
    scores: Tensor,
    logits: Tensor,
    asked: Tensor,
    backdoor_class: int,
    partitions: list[Partition],
) -> Outcome:
    """Flag the candidates that the main head took, and still takes, for another class than they are labeled.

    asked: `(n,)`, the class that the main head gave each candidate (isolated, labeled with the backdoor class) when it
    was first asked, before it was taught any recovered label; -1 for all other samples. logits: `(n, K)` of the final
    main head. probability: 1 minus its probability of the given label for candidates, 0 for all others.
    evidence: how often it disagreed in the more and in the less suspicious half of the candidates. In clean data what
    the shallow head learns first is the easiest, so the main head agrees most with the first half; with dirty-label
    poison it is the other way round.
    """
    given, answer = data.y.cpu(), logits.argmax(1)
    candidates = asked >= 0
    disagreed = candidates & (asked != given)
    flagged = disagreed & (answer != given)
    doubt = 1 - logits.double().softmax(1).gather(1, given[:, None]).squeeze(1)

    rows = candidates.nonzero().flatten()
    ranked = rows[top(scores[rows], len(rows))]
    more, less = ranked[: len(ranked) // 2], ranked[len(ranked) // 2 :]

    def count(part: Tensor) -> dict[str, int]:
        return {"count": int(disagreed[part].sum()), "n": len(part)}

    name = data.spec.classes[backdoor_class] if backdoor_class >= 0 else ""
    reason = f"the shallow layers tie it to {name!r}; the main model, never shown it so labeled, sees another class"
    return Outcome(
        model,
        scores,
        torch.where(candidates, doubt, 0.0),
        flagged,
        torch.where(flagged, answer, -1),
        dict.fromkeys(flagged.nonzero().flatten().tolist(), reason),
        {
            "backdoor_class": backdoor_class,
            "disagree_in_suspicious_half": count(more),
            "disagree_in_other_half": count(less),
            "flagged": int(flagged.sum()),
        },
        partitions,
    )
