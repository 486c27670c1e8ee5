# %% [markdown]
# # Time series, step by step
# Vowels of nine speakers (12 channels, 7 to 29 steps) that come along. The same calls as for images.

# %%
import antibackdoor
from antibackdoor.bench.poisoned import poison

clean = antibackdoor.load("japanese_vowels")
print(clean.train.spec.kind, clean.train.spec.shape, len(clean.train), "series")
poisoned = poison(clean, "badnets", {"rate": 0.1, "target": 0}, seed=0)

# %% [markdown]
# ## Train, judge, measure

# %%
result = antibackdoor.train(
    poisoned.splits, model="resnet18-w16", experiment=poisoned.experiment, out="vowels-run", device="cpu"
)
print(result.verdict)
print(result.metrics["attack_success_rate"], result.metrics["clean_accuracy"])

# %% [markdown]
# ## Use the model
# Series may have any length; give `lengths` for a padded batch.

# %%
import torch

x = torch.randn(2, 12, 20)
print([clean.train.spec.classes[k] for k in result.predict(x, lengths=torch.tensor([20, 12]))])
