import torch

torch.set_num_threads(1)  # what is trained here is too small to gain from more
