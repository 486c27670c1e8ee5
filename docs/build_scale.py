"""Writes docs/scale.md from results/cost: python docs/build_scale.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from antibackdoor.bench.tables import markdown
from antibackdoor.files import read_json

ROOT = Path(__file__).resolve().parent.parent
ORDER = (
    *("plain", "compile", "e2abl", "jury", "defenses", "scoring", "data_path", "habits", "fixmatch", "growth", "start"),
    "grid",
)

HEAD = """# Speed and scale

The tables are made from `results/cost` by `python docs/build_scale.py`; do not edit. One command measures
everything again: `python -m benchmarks`, or `python -m benchmarks CASE`.

Every figure is a **ratio within one run**: both sides take turns in one process, each round gives one ratio, and
shown are the median, the smallest and the largest. On a CPU the seconds are those of the processor that the process
was given, so that other programs of a busy machine do not count. All these were measured on one thread of a small
shared machine; **nothing here was measured on a GPU**.

## Sets larger than memory

Image folders, CSV manifests, WebDataset shards, parquet files and `.npz` files are decoded once into a file that is
read as needed, by itself where they would fill a quarter of the memory, or with `--memory-map`:

```bash
antibackdoor train photos --memory-map --out run
ANTIBACKDOOR_CACHE=/scratch antibackdoor scan photos --memory-map --out scan
```

The copy lies in `$ANTIBACKDOOR_CACHE` (else `~/.cache/antibackdoor`), under `copies`, and never beside the data: their
author could have planted one there. It can be deleted at any time. It is made anew when a file of the set changes its
name, size or time, or when another image size is asked for; sample ids stay those of the files, and training gives the
same weights as in memory. A process holds no more of the file than one batch; what else grows
with the set is below, in bytes a sample. Series are read from disk out of an `.npz`; series in text files
(`.ts`, `.tsv`, `.arff`), shards and parquet are read into memory whole.

## Many devices

On one machine, `antibackdoor train photos --out run --devices 4` starts a process for each. On several, torchrun does,
on each of them: `torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --no-python`,
then `antibackdoor train photos --out run --devices 4 --nodes 2`. In Python it is `devices=` of `train` and `scan`, in a
program that does so under `if __name__ == "__main__":`. The number of devices changes how fast a run is, not what it
finds: the batch size of the recipe is that of all devices together, with the same steps, rates and order of samples,
and a run that was begun on two devices can be resumed on one.

- **Split**: what a network computes, forwards and backwards, in training; scoring passes and evaluation.
- **Not split**: every device holds the samples, draws the same order and augments the whole batch, which is little
  work beside the network's. In many small processes on slow links the exchange of batch statistics costs more than is
  gained: give each device 32 samples or more of a batch.
- **Gathered**: the logits of every batch and of every scoring pass, each row where its sample belongs, none twice. All
  devices compute the same losses, ranking and partition from the same logits. Gradients are averaged, in one message a
  step after the backward pass.
- **Batch norm** uses mean and variance of the whole batch, whatever the layer is called. Statistics of shares would
  make the training depend on the number of devices, and those of a few samples are poor.
- **Whole on every device**, so right but no faster: a batch of which a device would get less than two samples, and a
  stage whose objective looks into the network by hooks (the distillation of `nad`, the second stage of `dbr`).
- **Equal**: all defenses give the partition and flags of one device, and its weights up to rounding, which tests
  show in float64 on two processes of one CPU. In float32 sums are rounded in another order, and a training makes much
  of little: expect another model of the same kind, not the same one. Dropout draws other numbers.
- **Failure** of one device ends all, with its sentence and status 2. Only the first writes.

**Not tested**: several GPUs, several machines, and any speed. The folder of the run need only be seen by the first
process; the data must be where each can read them.

## Precision and compiling

A GPU of compute capability 8 or more and a CPU with AVX512-BF16 or AMX compute in bfloat16, all others in float32;
`--precision` asks for one. `--compile` has `torch.compile` compile the network, in stages that only call it on whole
batches: plain training, the model of the default defense, FixMatch, ABL's isolation. Others cut a network at a tap or
look into it, and stay as they are. On the CPU that was measured (a table below) it does not pay; on a GPU nobody tried.

"""


def tables() -> str:
    """One table a case; its ratios, and what they should be."""
    records = [read_json(path) for path in sorted((ROOT / "results" / "cost").glob("*.json"))]
    parts = []
    for case in ORDER:
        found = [record for record in records if record.get("case") == case]
        if not found:
            continue
        parts += [f"## {found[0]['what'][0].upper()}{found[0]['what'][1:]}", ""]
        rows = {title: line(title, ratio) for record in found for title, ratio in record["ratios"].items()}
        parts += [markdown(pd.DataFrame(list(rows.values()))), ""]
        parts += [f"`{record['command']}`, {record['environment']['device']}." for record in found] + [""]
    return "\n".join(parts)


def line(title: str, ratio: dict[str, Any]) -> dict[str, Any]:
    """One row."""
    goal = next((f"{words} {ratio[words]:g}" for words in ("at least", "at most") if words in ratio), "")
    reached = ("at least" not in ratio or ratio["median"] >= ratio["at least"]) and (
        "at most" not in ratio or ratio["median"] <= ratio["at most"]
    )
    return {
        "what": title,
        "median": f"{ratio['median']:.4g}",
        "smallest to largest": f"{ratio['low']:.4g} to {ratio['high']:.4g}" if ratio["n"] > 1 else "",
        "goal": goal,
        "reached": ("yes" if reached else "**no**") if goal else "",
    }


def poisoning() -> str:
    """How fast attacks make poison, and what the trained ones cost before that."""
    record = read_json(ROOT / "results" / "cost" / "poisoning.json")
    rows: dict[str, dict[str, str]] = {}
    for one in record["attacks"]:
        row = rows.setdefault(one["attack"], {"attack": one["attack"]})
        kind = {"image": "images", "series": "series"}[one["kind"]]
        row[f"{kind} a second"] = f"{one['samples_per_second']:,}"
        row[f"fitting on {kind}, s"] = f"{one['fit_seconds']:.0f}" if one["trained"] else ""
        ratio = record["ratios"].get(f"loop over batches, {one['attack']}, {one['kind']}")
        row[f"one by one, {kind}"] = f"{ratio['median']:.3g}" if ratio else ""
    words = ("{} a second", "fitting on {}, s", "one by one, {}")
    columns = ["attack", *(word.format(kind) for word in words for kind in ("images", "series"))]
    trained = next(one["samples"] for one in record["attacks"] if one["trained"])
    return f"""## Poisoning

Samples a second, of CIFAR-10's size and of ECG5000's, from stored values to stored values; how many times longer the
same takes one by one; and the seconds that attacks which train something take before, by their default recipes, on
{trained} samples with a ResNet-18 of width 8. A set is not copied: the poisoned rows lie over it.

{markdown(pd.DataFrame(list(rows.values())).reindex(columns=columns).fillna(""))}

`{record["command"]}`, {record["environment"]["device"]}.

"""


def billion() -> str:
    """The arithmetic for 10^9 samples."""
    record = read_json(ROOT / "results" / "cost" / "billion.json")
    state, out = record["measured"]["state_bytes_a_sample"], record["worked_out"]
    given, simulated = record["assumed"], record["simulation"]
    table = pd.DataFrame([{"kept of a sample": name, "bytes": f"{value:.0f}"} for name, value in state.items()])
    least, most = record["ratios"]["bytes to every worker: all scores over histograms"], simulated["rounds"]
    return f"""## A billion samples on a thousand workers

On paper, from bytes and seconds that `python -m benchmarks billion` measures on small sets; nobody has run it.
Assumed: {given["samples"]:.0e} samples, {given["workers"]:,} workers, batches of {given["batch"]} a worker,
{given["bandwidth"] / 1e9:g} GB/s between two workers.

{markdown(table)}

What breaks first, in this order:

1. **The table of suspects and the list of names**, in one process: {state["name"] * given["samples"] / 1e9:.0f}
   GB of names alone. Each worker must write the part of its own samples ({out["samples_of_a_worker"]:,.0f}).
2. **State that every worker holds for all samples**: {out["state_gigabytes_of_a_worker_if_not_split"]:.0f} GB,
   most of it names; split by samples it is {out["state_gigabytes_of_a_worker_if_split"]:.2f} GB a worker. The
   partition that E2ABL keeps for each epoch, for the judge, is the next to grow.
3. **One shuffle of all rows**: {out["shuffle_of_all_rows_gigabytes"]:.0f} GB and
   {out["shuffle_of_all_rows_seconds"]:.0f} s an epoch on every worker; a shuffle of its own rows takes
   {out["shuffle_of_own_rows_seconds"]:.2g} s.
4. **Gathering all scores** to rank them: {out["all_scores_gigabytes"]:.0f} GB to every worker,
   {out["all_scores_seconds"]:.1f} s each time. It is not needed: the highest 1 % is found exactly by adding up
   histograms of the scores. In the simulation ({simulated["scores"]:,} scores with ties on
   {simulated["workers"]:,} workers) {most} rounds of {simulated["bytes_a_worker"] / most / 1e6:.2g} MB chose the
   same {simulated["chosen"]:,} rows as sorting everything ({simulated["different"]} differ); at this scale that
   is {least["median"]:.3g} times less.
5. **Gradients**, as in any training: {out["gradients_megabytes_a_step"]:.0f} MB a step for a ResNet-34,
   {out["gradients_seconds_a_step"] * 1000:.0f} ms, {out["steps_an_epoch"]:,.0f} steps an epoch. E2ABL adds
   nothing to it but the second head's.

The samples themselves do not break: {out["decoded_gigabytes_of_a_worker_224x224"]:.0f} GB a worker at 224 x 224
pixels, read from a disk of its own.
"""


def page() -> str:
    """The text."""
    return HEAD + tables() + "\n" + poisoning() + billion()


if __name__ == "__main__":
    (ROOT / "docs" / "scale.md").write_text(page(), encoding="utf-8")
