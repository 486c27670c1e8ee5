"""One thread: what is trained here is too small to gain from more, and workers share the cores."""

import torch

torch.set_num_threads(1)
