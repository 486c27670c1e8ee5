# %% [markdown]
# # Images, step by step
# Handwritten digits that come along, poisoned on purpose, so that we know the answer. Run it as a script, or cell by
# cell in an editor that knows `# %%`.

# %%
import antibackdoor
from antibackdoor.bench.poisoned import poison

clean = antibackdoor.load("digits")
poisoned = poison(clean, "badnets", {"rate": 0.1, "target": 0}, seed=0)
print(len(poisoned.splits.train), "samples,", poisoned.attack["counts"]["poisoned"], "of them poisoned")

# %% [markdown]
# ## Without a defense
# Accuracy on clean data says nothing about the backdoor; the attack success rate does.

# %%
undefended = antibackdoor.train(
    poisoned.splits, defense="none", model="resnet18-w8", experiment=poisoned.experiment, device="cpu"
)
for key in ("clean_accuracy", "attack_success_rate"):
    print(key, undefended.metrics[key]["value"])

# %% [markdown]
# ## With the default defense
# It sees the same samples and is told nothing.

# %%
defended = antibackdoor.train(
    poisoned.splits, model="resnet18-w8", experiment=poisoned.experiment, out="digits-run", device="cpu"
)
print(defended.verdict)
for key in ("clean_accuracy", "attack_success_rate"):
    print(key, defended.metrics[key]["value"])

# %% [markdown]
# ## Who is suspect, and why
# The table joins with your own metadata by `id`.

# %%
flagged = defended.suspects[defended.suspects["flagged"]]
print(flagged[["id", "label", "suggested_label", "probability"]].head())
truth = poisoned.experiment.truth.poisoned
ids = {poisoned.splits.train.ids[row] for row in truth.nonzero().flatten().tolist()}
print("truly poisoned among the flagged:", flagged["id"].isin(ids).sum(), "of", len(flagged))

# %% [markdown]
# ## Where the second head looks
# High values are where the answer rests: at the patch in suspects, on the stroke in trusted samples.

# %%
if defended.attention is not None:
    print(defended.attention.suspects.round(2))
    print("report: digits-run/report.html")
