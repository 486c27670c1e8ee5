"""TimeTrojan-DE: a few steps and values found by differential evolution, without gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from antibackdoor.attacks.base import ATTACKS, State, channel_statistics
from antibackdoor.attacks.surrogate import Trained, logits, sample_rows
from antibackdoor.data.batches import Batch, gather
from antibackdoor.data.core import Data, Spec
from antibackdoor.files import Tree
from antibackdoor.options import options
from antibackdoor.seeds import generator
from antibackdoor.training.loop import Recipe
from antibackdoor.training.objectives import Objective, Step

if TYPE_CHECKING:
    from antibackdoor.training.job import Job


PAPER = "Ding et al. 2022, Towards backdoor attack on deep learning based time series classification"


@ATTACKS.register("timetrojan_de", paper=PAPER, kinds=("series",))
@options
class TimeTrojanDE(Trained):
    """The same few steps of every series, moved by values that differential evolution finds; data-poisoning version.

    An individual holds K = max(5, round(share * T)) genes: a place in the series, as a share of its own length, and one
    value a channel in [-eta, eta] standard deviations of the clean training set; `x' = x + value` at these places. Its
    fitness is the surrogate's mean cross entropy for the target on a fixed batch, plus `price` times the mean absolute
    value. Rounds alternate: `generations` of evolution (a challenger `a + F (b - c)`, crossed with its parent at a rate
    of CR, replaces it where it is fitter) against the present surrogate; then an epoch of the surrogate on batches of
    which a `portion` carries the best individual under the target label. The last best individual is the trigger.
    For series only: a few moved pixels of an image are what `trojannn` and `dynamic` are about.
    Deviation: one trigger for all series, not one evolution for each, which would cost a thousand times as much.
    """

    share: Annotated[float, Field(gt=0, le=1, description="share of the longest series that is moved")] = 0.05
    eta: Annotated[float, Field(gt=0, description="how far at most, in standard deviations")] = 2.0
    portion: Annotated[float, Field(gt=0, lt=1, description="share of each batch that is poisoned")] = 0.1
    price: Annotated[float, Field(ge=0, description="weight of the mean absolute value in the fitness")] = 0.05
    population: Annotated[int, Field(ge=4, description="individuals")] = 20
    generations: Annotated[int, Field(ge=1, description="of evolution in each round")] = 10
    probe: Annotated[int, Field(ge=1, description="series that the fitness is measured on")] = 32
    alternation: Recipe = Recipe(epochs=8, min_steps=0, learning_rate=0.02)

    def fit(self, clean: Data, job: Job | None = None) -> State:
        """Train the surrogate, then let evolution and surrogate take turns."""
        surrogate, job = self.train_surrogate(job)
        probe = gather(job.data, sample_rows(job, self.probe, without=self.target), job.fabric.device)
        steps = max(5, round(self.share * clean.spec.shape[-1]))
        objective = Turns(self, probe, channel_statistics(clean)["std"].to(job.fabric.device), steps, job.seed)
        rows = sample_rows(job, self.samples)
        job.fit("alternation", surrogate.requires_grad_(True), objective, self.alternation, rows=rows)
        places, values = objective.best()
        return {"places": places.cpu(), "values": values.cpu()}

    def trigger(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        """Add the values at their places in each series."""
        return add(x, state["places"].to(x.device)[None], state["values"].to(x.device)[None], lengths)


def add(x: Tensor, places: Tensor, values: Tensor, lengths: Tensor | None) -> Tensor:
    """`x` (n, C, T) plus `values` (n or 1, C, K) at `places` (n or 1, K), shares of each series' own length."""
    ends = torch.tensor(x.shape[-1], device=x.device) if lengths is None else lengths[:, None]
    at = (places * ends).long().minimum(ends - 1).expand(len(x), -1)[:, None].expand(-1, x.shape[1], -1)
    return x.scatter_add(2, at, values.expand(len(x), -1, -1).to(x.dtype))


class Turns(Objective):
    """Cross entropy on partly poisoned batches; before every epoch the population evolves against the surrogate.

    genes: `(P, 1 + C, K)` in [0, 1]: places, then values, of which [0, 1] stands for [-eta, eta] standard deviations.
    """

    def __init__(self, attack: TimeTrojanDE, probe: Batch, std: Tensor, steps: int, seed: int):
        self.attack, self.probe, self.std, self.seed = attack, probe, std, seed
        shape = (attack.population, 1 + len(std), steps)
        self.genes = torch.rand(shape, generator=generator(seed, "genes")).to(std.device)
        self.winner, self.numbers = 0, dict[str, float]()

    def best(self) -> tuple[Tensor, Tensor]:
        """Places `(K,)` and values `(C, K)` of the fittest."""
        places, values = self._read(self.genes[self.winner : self.winner + 1])
        return places[0], values[0]

    def __call__(self, model: nn.Module, batch: Batch) -> Step:
        """A portion of the batch, not of the target class, carries the fittest individual."""
        count = max(1, round(self.attack.portion * len(batch.x)))
        poison = (batch.y != self.attack.target).nonzero().flatten()[:count]
        places, values = self.best()
        ends = None if batch.lengths is None else batch.lengths[poison]
        x = batch.x.index_copy(0, poison, add(batch.x[poison], places[None], values[None], ends))
        out = logits(model, x, batch.lengths)
        loss = F.cross_entropy(out, batch.y.index_fill(0, poison, self.attack.target))
        return Step(loss, {"main": loss.detach().expand(len(out))})

    def before_epoch(self, model: nn.Module, epoch: int) -> None:
        """Some generations, in evaluation mode."""
        rng = generator(self.seed, "evolution", epoch)
        model.eval()
        fitness = self._fitness(model, self.genes)
        self.numbers = {"fitness_before": float(fitness.min())}
        for _ in range(self.attack.generations):
            challengers = self._challengers(rng)
            their_fitness = self._fitness(model, challengers)
            better = their_fitness < fitness
            self.genes = torch.where(better[:, None, None], challengers, self.genes)
            fitness = torch.where(better, their_fitness, fitness)
        self.winner = int(fitness.argmin())
        self.numbers["fitness"] = float(fitness.min())
        model.train()

    def after_epoch(self, model: nn.Module, epoch: int, records: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean loss, and the best fitness before and after the round's evolution."""
        return {"main_loss": float(records["main"].nanmean()), **self.numbers}

    def _challengers(self, rng: torch.Generator) -> Tensor:
        """`a + F (b - c)` of three others, F = 0.5, folded back into [0, 1], crossed with the parent at CR = 0.8."""
        size, device = len(self.genes), self.genes.device
        offsets = torch.stack(
            [torch.randperm(size - 1, generator=rng)[:3] + 1 for _ in range(size)]
        )  # never the parent
        a, b, c = self.genes[((torch.arange(size)[:, None] + offsets) % size).T.to(device)]
        crossed = torch.rand(self.genes.shape, generator=rng).to(device) < 0.8
        return torch.where(crossed, (a + 0.5 * (b - c)).remainder(1), self.genes)

    @torch.no_grad()
    def _fitness(self, model: nn.Module, genes: Tensor) -> Tensor:
        """`(P,)`, lower is fitter; all individuals on all probes in one pass."""
        places, values = self._read(genes)
        m, p = len(self.probe.x), len(genes)
        ends = None if self.probe.lengths is None else self.probe.lengths.repeat(p)
        each = (places.repeat_interleave(m, 0), values.repeat_interleave(m, 0))
        out = logits(model, add(self.probe.x.repeat(p, 1, 1), *each, ends), ends)
        losses = F.cross_entropy(out, torch.full((p * m,), self.attack.target, device=out.device), reduction="none")
        spread = torch.where(self.std > 0, self.std, 1)  # in a constant channel no value moves, and none is paid for
        return losses.view(p, m).mean(1) + self.attack.price * (values / spread[:, None]).abs().mean((1, 2))

    def _read(self, genes: Tensor) -> tuple[Tensor, Tensor]:
        return genes[:, 0], self.attack.eta * self.std[:, None] * (2 * genes[:, 1:] - 1)

    def state(self) -> Tree:
        """The population."""
        return {"genes": self.genes, "winner": self.winner}

    def load(self, state: Tree) -> None:
        """Go on with this population."""
        self.genes, self.winner = state["genes"].to(self.std.device), state["winner"]
